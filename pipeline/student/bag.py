"""A student that is no transformer: the mean of hashed n-gram embeddings, and a linear layer.

    n-gram ids -> embeddings -> mean -> (hidden layers) -> classes
    n-gram ids -> embeddings, as the hidden states of a model without a head

Joulin et al. 2017, Bojanowski et al. 2017. It reads any script at thousands of texts a second, and
opens with the Auto classes like any other model once this module is imported.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import BaseModelOutput, SequenceClassifierOutput

from pipeline.student.ngrams import HashedNgramTokenizer


class HashedBagConfig(PreTrainedConfig):  # type: ignore[misc]  # ships without types
    """Numbers of a bag.

    Attributes:
        vocab_size: rows of the embedding: the tokenizer's buckets and the padding.
        hidden_size: width of the embeddings and of the pooled vector.
        num_hidden_layers: layers between the pooled vector and the classes, 0 for a linear model;
            a model without a head has none.
        intermediate_size: width of these layers.
        hidden_dropout: share of the pooled vector's and the layers' entries dropped in training.
        token_dropout: share of the n-grams left out of the mean in training.
        initializer_range: standard deviation of the first embeddings.
    """

    model_type = "hashed-bag"

    vocab_size: int = 2**16 + 1
    hidden_size: int = 24
    num_hidden_layers: int = 0
    intermediate_size: int = 192
    hidden_dropout: float = 0.0
    token_dropout: float = 0.0
    initializer_range: float = 0.1
    pad_token_id: int | None = 0


class HashedBagPreTrainedModel(PreTrainedModel):  # type: ignore[misc]
    """What bags share: the embeddings of the n-grams."""

    config_class = HashedBagConfig
    base_model_prefix = "bag"
    supports_gradient_checkpointing = False

    def __init__(self, config: HashedBagConfig) -> None:
        super().__init__(config)
        self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size, padding_idx=0)
        self.dropout = nn.Dropout(config.hidden_dropout)

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
            nn.init.zeros_(module.weight[0])
        elif isinstance(module, nn.Linear):
            nn.init.kaiming_uniform_(module.weight, a=5**0.5)
            nn.init.zeros_(module.bias)

    def get_input_embeddings(self) -> nn.Module:
        """The embeddings of the n-grams."""
        return self.embeddings


class HashedBagModel(HashedBagPreTrainedModel):
    """Embeddings of a text's n-grams, to be pooled: a bag without classes."""

    def __init__(self, config: HashedBagConfig) -> None:
        super().__init__(config)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        output_hidden_states: bool = False,
        return_dict: bool = True,
        **kwargs: Any,
    ) -> BaseModelOutput | tuple[Tensor, ...]:
        """The embeddings [B, T, D] of n-gram ids [B, T], as `last_hidden_state`.

        Args:
            input_ids: [B, T], 0 where padded.
            attention_mask: of no consequence here: n-grams do not see one another.
            output_hidden_states: return them as `hidden_states`, of one layer, too.
            return_dict: False gives a tuple, as for every transformers model.
        """
        embedded = self.dropout(self.embeddings(input_ids))
        if self.training and self.config.token_dropout > 0:
            whole = embedded.new_ones(input_ids.shape)
            kept = nn.functional.dropout(whole, self.config.token_dropout)  # of the same mean
            embedded = embedded * kept[..., None]
        states = (embedded,) if output_hidden_states else None
        output = BaseModelOutput(last_hidden_state=embedded, hidden_states=states)
        return output if return_dict else output.to_tuple()


class HashedBagForSequenceClassification(HashedBagPreTrainedModel):
    """Classes of a text from the mean of its n-grams' embeddings."""

    def __init__(self, config: HashedBagConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.layers = nn.ModuleList()
        width = config.hidden_size
        for _ in range(config.num_hidden_layers):
            self.layers.append(nn.Linear(width, config.intermediate_size))
            width = config.intermediate_size
        self.classifier = nn.Linear(width, config.num_labels)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool = False,
        return_dict: bool = True,
        **kwargs: Any,
    ) -> SequenceClassifierOutput | tuple[Tensor, ...]:
        """Logits [B, V] of n-gram ids [B, T].

        Args:
            input_ids: [B, T], 0 where padded.
            attention_mask: [B, T], 1 where an id counts; ids other than 0 where left out.
            labels: [B], for a mean cross-entropy as `loss`.
            output_hidden_states: return the embeddings, ([B, T, D],); their mean over the mask is
                what the classes are read from.
            return_dict: False gives a tuple, as for every transformers model.
        """
        mask = input_ids != 0 if attention_mask is None else attention_mask.bool()
        logits = self._classify(self._mean(input_ids, mask))
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        states = (self.embeddings(input_ids),) if output_hidden_states else None
        output = SequenceClassifierOutput(loss=loss, logits=logits, hidden_states=states)
        return output if return_dict else output.to_tuple()

    def _mean(self, input_ids: Tensor, mask: Tensor) -> Tensor:
        """[B, D] mean of the counted embeddings, where it can be without holding [B, T, D]."""
        if self.training and self.config.token_dropout > 0:
            kept = torch.rand(mask.shape, device=mask.device) >= self.config.token_dropout
            mask = mask & kept
        weights = mask.to(self.classifier.bias.dtype)
        return self._sum(input_ids, weights) / weights.sum(dim=1, keepdim=True).clamp(min=1.0)

    def _sum(self, input_ids: Tensor, weights: Tensor) -> Tensor:
        if type(self.embeddings) is not nn.Embedding or torch.compiler.is_exporting():
            # in int8, or as a graph
            return torch.matmul(weights[:, None], self.embeddings(input_ids))[:, 0]
        return nn.functional.embedding_bag(
            input_ids, self.embeddings.weight, mode="sum", per_sample_weights=weights
        )

    def _classify(self, pooled: Tensor) -> Tensor:
        state = self.dropout(pooled)
        for layer in self.layers:
            state = self.dropout(torch.relu(layer(state)))
        logits: Tensor = self.classifier(state)
        return logits


AutoConfig.register(HashedBagConfig.model_type, HashedBagConfig, exist_ok=True)
AutoModel.register(HashedBagConfig, HashedBagModel, exist_ok=True)
AutoModelForSequenceClassification.register(
    HashedBagConfig, HashedBagForSequenceClassification, exist_ok=True
)
AutoTokenizer.register(HashedBagConfig, tokenizer_class=HashedNgramTokenizer, exist_ok=True)
