"""Small language models of large vocabularies, trained here because no such teacher is at hand.

    source of the installed packages -- byte-level BPE --> tokens -- sampled softmax --> model
    text of files that it never saw  -- model --> logits [tokens, V], the tokens that came next

Vocabulary, text and knowledge are real; what minutes of training cannot give is a large model's
certainty. A trained model lies below the bench's folder, under the digest of its recipe.
"""

import platform
from collections.abc import Iterable, Iterator, Sequence
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import Field
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from pipeline.config import StrictModel
from pipeline.errors import DataError
from pipeline.identity import digest_json
from pipeline.runs import write_json
from pipeline.sources.stdlib import stdlib_rows

_END = "<|endoftext|>"
_HEADS = 4
_DECAY = 0.95  # of the learning rate, linearly, until the last step
_WARM_UP = 30  # steps
Labelled = tuple[Tensor, Tensor]


class LanguageRecipe(StrictModel):
    """How a language model is made.

    Attributes:
        classes: V; the merges of the BPE are as many as the text allows, up to this.
        packages: whose source is read beside the standard library's.
        files: at most so many of them, None for all.
        width, layers, block_size, batch_size, steps: of the model and its training.
        negatives: classes of a step that its text did not ask for.
        learning_rate: of all weights.
    """

    classes: int = Field(ge=300)
    packages: tuple[str, ...] = ("torch", "transformers", "numpy")
    files: int | None = None
    width: int = Field(default=128, multiple_of=_HEADS)
    layers: int = 2
    block_size: int = 128
    batch_size: int = 8
    steps: int = 1200
    negatives: int = 1024
    learning_rate: float = 3e-3

    @property
    def digest(self) -> str:
        """Of the recipe and of the versions of what it reads; text changes with them."""
        try:
            versions = {name: version(name) for name in self.packages}
        except PackageNotFoundError as error:
            raise DataError(f"bench: package {error.name!r} is not installed; install it") from None
        read = {"python": platform.python_version(), "tokenizers": version("tokenizers")}
        return digest_json({**self.model_dump(mode="json"), "read": {**read, **versions}})[:16]


class LanguageModel(nn.Module):
    """Embeddings, pre-norm transformer layers, a head of its own weights and biases.

    Args:
        recipe: the sizes.
        classes: V.
    """

    def __init__(self, recipe: LanguageRecipe, classes: int) -> None:
        super().__init__()
        width = recipe.width
        self.embedding = nn.Embedding(classes, width, sparse=True)
        self.places = nn.Parameter(torch.randn(recipe.block_size, width) * 0.02)
        layer = nn.TransformerEncoderLayer(
            width, _HEADS, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True
        )
        norm = nn.LayerNorm(width)
        self.body = nn.TransformerEncoder(layer, recipe.layers, norm, enable_nested_tensor=False)
        self.head = nn.Embedding(classes, width, sparse=True)
        self.bias = nn.Buffer(torch.zeros(classes))
        nn.init.normal_(self.embedding.weight, 0, 0.08)
        nn.init.normal_(self.head.weight, 0, 0.02)

    def forward(self, ids: Tensor) -> Tensor:
        """Hidden states [B, T, width] of tokens [B, T]."""
        size = ids.shape[1]
        mask = nn.Transformer.generate_square_subsequent_mask(size)
        hidden: Tensor = self.embedding(ids) + self.places[:size]
        return self.body(hidden, mask=mask, is_causal=True)  # type: ignore[no-any-return]

    def logits(self, hidden: Tensor, sharpening: float = 1.0) -> Tensor:
        """[N, V] of hidden states [N, width]; the context counts `sharpening` times."""
        return torch.addmm(self.bias, hidden, self.head.weight.t(), alpha=sharpening)


def ask_language(
    folder: Path, recipe: LanguageRecipe, positions: int, sharpening: float = 1.0
) -> Iterator[Labelled]:
    """Yield logits [rows, V] and the tokens that came next, [rows], of text that nobody learned.

    The model is trained first where `folder` has none of this recipe.

    Args:
        folder: of all such models.
        positions: how many rows there are in all.
        sharpening: what the context's part of the logits is multiplied with.

    Raises:
        DataError: the held-out text is too short.
    """
    path = train_language(folder, recipe)
    held = torch.from_numpy(np.load(path / "held.npy").astype(np.int64))
    model = _load(path, recipe)
    size, count = recipe.block_size, 0
    for start in range(0, len(held) - size, size):
        if count >= positions:
            return
        block = held[start : start + size + 1]
        with torch.inference_mode():
            logits = model.logits(model(block[None, :-1])[0], sharpening)
        yield logits[: positions - count], block[1:][: positions - count]
        count += size
    if count < positions:
        raise DataError(
            f"bench: the held-out text of {recipe.classes:,} classes has {count:,} tokens, asked"
            f" for {positions:,}; lower codec_targets"
        )


def train_language(folder: Path, recipe: LanguageRecipe) -> Path:
    """Train the model of a recipe unless it is there; return its folder, named by the digest."""
    path = folder / recipe.digest
    if (path / "recipe.json").is_file():
        return path
    path.mkdir(parents=True, exist_ok=True)
    rows = _read_rows(recipe)
    learned = [row["text"] for row in rows if row["split"] == "teacher"]
    unseen = [row["text"] for row in rows if row["split"] == "test"]
    tokenizer = _train_tokenizer(recipe.classes, learned)
    size = recipe.block_size + 1
    tokens = _encode(tokenizer, learned, recipe.steps * recipe.batch_size * size)
    np.save(path / "held.npy", _encode(tokenizer, unseen, 2**17))
    torch.manual_seed(0)
    model = LanguageModel(recipe, tokenizer.get_vocab_size())
    _train(model, torch.from_numpy(tokens.astype(np.int64)), recipe)
    save_file(model.state_dict(), path / "model.safetensors")
    write_json(path / "recipe.json", {**recipe.model_dump(mode="json"), "tokens": len(tokens)})
    return path


def _load(path: Path, recipe: LanguageRecipe) -> LanguageModel:
    state = load_file(path / "model.safetensors")
    model = LanguageModel(recipe, len(state["bias"]))
    model.load_state_dict(state)
    return model.eval()


def _read_rows(recipe: LanguageRecipe) -> list[dict[str, str]]:
    """Rows of all files in an order without meaning, the same each time."""
    roots: list[Path | None] = [None]
    for name in recipe.packages:
        found = find_spec(name)
        if found is None or found.origin is None:
            raise DataError(f"bench: package {name!r} has no source here; take another")
        roots.append(Path(found.origin).parent)
    rows = list(chain.from_iterable(stdlib_rows(root) for root in roots))
    rows.sort(key=lambda row: sha256(row["id"].encode()).digest())
    return rows[: recipe.files]


def _train_tokenizer(classes: int, texts: Iterable[str]) -> Any:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=classes,
        special_tokens=[_END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return bpe


def _encode(tokenizer: Any, texts: Sequence[str], count: int) -> np.ndarray:
    """At most the first `count` tokens, int32; each text ends with the special token."""
    parts, have = [], 0
    for text in texts:
        ids = [*tokenizer.encode(text).ids, tokenizer.token_to_id(_END)]
        parts.append(np.array(ids, dtype=np.int32))
        have += len(ids)
        if have >= count:
            break
    return np.concatenate(parts)[:count]


def _train(model: LanguageModel, tokens: Tensor, recipe: LanguageRecipe) -> None:
    """Once over the tokens in random order, against the classes of the step and some negatives."""
    counts = torch.bincount(tokens, minlength=len(model.bias)).double()
    shares = (counts + 0.2) / (counts + 0.2).sum()
    model.bias.copy_(shares.log())
    proposal = (counts + 0.5).pow(0.6)
    proposal /= proposal.sum()
    tables = [model.embedding.weight, model.head.weight]
    dense = [model.places, *model.body.parameters()]
    betas = (0.9, 0.98)
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.SparseAdam(tables, recipe.learning_rate, betas),
        torch.optim.AdamW(dense, recipe.learning_rate, betas, weight_decay=0.0),
    ]
    generator = torch.Generator().manual_seed(0)
    size = recipe.block_size + 1
    blocks = tokens[: len(tokens) // size * size].view(-1, size)
    for step in range(recipe.steps):
        picks = torch.randint(0, len(blocks), (recipe.batch_size,), generator=generator)
        rate = min(1.0, (step + 1) / _WARM_UP) * (1 - _DECAY * step / recipe.steps)
        for optimizer in optimizers:
            optimizer.zero_grad()
            for group in optimizer.param_groups:
                group["lr"] = recipe.learning_rate * rate
        loss = _sampled_loss(model, blocks[picks], proposal, shares, recipe.negatives, generator)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(dense, 1.0)
        for optimizer in optimizers:
            optimizer.step()


def _sampled_loss(
    model: LanguageModel,
    block: Tensor,
    proposal: Tensor,
    shares: Tensor,
    negatives: int,
    generator: torch.Generator,
) -> Tensor:
    """Cross-entropy over the classes of the block and drawn ones, each logit less the logarithm
    of the chance that its class is among them."""
    hidden = model(block[:, :-1]).flatten(0, 1)
    following = block[:, 1:].flatten()
    drawn = torch.multinomial(proposal, negatives, replacement=True, generator=generator)
    classes = torch.unique(torch.cat([drawn, following]))
    expected = negatives * proposal[classes] + len(following) * shares[classes]
    chance = torch.log(-torch.expm1(-expected)).float()
    logits = hidden @ model.head(classes).t() + (model.bias[classes] - chance)
    return cross_entropy(logits, torch.searchsorted(classes, following))
