"""One vector per text: the teacher reads a sentence, a student the sentence and its translations.

row -> tokens -> Example -> pooled vector -> scores -> cosine, retrieval both ways, Spearman

Reimers & Gurevych 2020: a student whose vectors of a text and of its translations are the teacher's
vector of the text. There is no class to tell: the only target of an example is one certain class.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from pipeline.errors import DataError
from pipeline.examples import CachedExample, Example
from pipeline.metrics import Metric, spearman
from pipeline.positions import Positions
from pipeline.scores import Inputs, Observation, Scores
from pipeline.sentences import HEAD, Pooling, SentenceHead, head_of, pooled_width
from pipeline.targets import UNLABELLED
from pipeline.tasks.base import Batch, Task, flat_index, mean_states
from pipeline.tasks.retrieval import cosines, retrieve
from pipeline.tasks.texts import ROWS_AT_ONCE, tokenize_texts


class SentenceEmbeddings(Task):
    """The vector of a whole text; rows bring `text`, or `text`, `text_pair` and maybe `score`.

    Of a pair each text is an example of its own, `ID` and `ID#2`; a score of the two is compared
    with the cosine of their vectors.

    Attributes:
        max_length: tokens read at most, special tokens included; what is longer is cut on the
            right. Left out, it is what the tokenizer's model reads.
        pooling: the mean of the tokens' hidden states, or that of the first token; left out, what
            each model's own folder says (`modules.json`), the mean where it says nothing.
        normalise: whether vectors have length 1; left out, what the teacher's folder says.
        width: of the teacher's vectors, which the students' have too; stage one writes it.
    """

    auto_class: ClassVar = "AutoModel"
    vocabulary: ClassVar = False
    shifted: ClassVar = False
    features: ClassVar = "tokens"
    same_tokens: ClassVar = False
    pooled: ClassVar = True

    name: Literal["sentence-embeddings"] = "sentence-embeddings"
    max_length: int | None = Field(default=None, ge=2)
    pooling: Pooling | None = None
    normalise: bool | None = None
    width: int | None = Field(default=None, ge=1)

    def num_classes(self, tokenizer: Any) -> int:
        """One, which says nothing."""
        return 1

    def examples(
        self, rows: Iterable[Mapping[str, Any]], tokenizer: Any, carry: Sequence[str]
    ) -> Iterator[Example]:
        """See `Task.examples`."""
        iterator = _each_text(rows)
        while chunk := list(islice(iterator, ROWS_AT_ONCE)):
            tokens = tokenize_texts(chunk, tokenizer, self.max_length)
            for row, ids, lengths in zip(chunk, *tokens, strict=True):
                kept = ("split", *(("pair", "score") if "pair" in row else ()), *carry)
                yield Example(
                    example_id=str(row["id"]),
                    input_ids=ids,
                    segment_lengths=lengths,
                    target_positions=np.zeros(1, dtype=np.int32),
                    label_ids=np.array([UNLABELLED], dtype=np.int32),
                    columns={column: row[column] for column in kept if column in row},
                )

    def batch(
        self, examples: Sequence[Example], pad_id: int, positions: Positions = "all"
    ) -> Batch:
        """See `Task.batch`; an example has one target, none where it was skipped."""
        batch = super().batch(examples, pad_id, positions)
        index = flat_index([example.target_positions for example in examples], 1)
        return replace(batch, target_index=index)

    def logits(self, outputs: Any, inputs: Inputs) -> Tensor:
        """One class of no meaning for each example, [B, 1]."""
        return torch.zeros(len(inputs["input_ids"]), 1, device=inputs["input_ids"].device)

    def equip(self, model: Any, name: str | None = None, revision: str | None = None) -> None:
        """Give a model its sentence head; a learned dense layer where it has not the `width`."""
        head = SentenceHead() if name is None else SentenceHead.read(name, revision)
        head.pooling = self.pooling or head.pooling
        head.normalise = head.normalise if self.normalise is None else self.normalise
        frozen = not any(parameter.requires_grad for parameter in model.parameters())
        if getattr(model, "pooler", None) is not None:
            model.pooler.requires_grad_(False)  # nothing reads it
        hidden = pooled_width(model)
        model.add_module(HEAD, head)
        if self.width not in (None, pooled_width(model)):
            head.dense, head.activation = nn.Linear(hidden, int(self.width or 0)), "Identity"
        head.to(model.device).requires_grad_(not frozen)

    def settle(self, model: Any) -> Task:
        """Width and length of the vectors are the teacher's; each model pools as it does."""
        found = {"width": pooled_width(model), "normalise": _known_head(model).normalise}
        return self.model_copy(update=found)

    def save(self, model: Any, folder: Path) -> None:
        """A folder of transformers that is one of sentence-transformers too."""
        head = _known_head(model)
        delattr(model, HEAD)
        super().save(model, folder)
        head.save(folder, pooled_width(model), self.max_length)
        model.add_module(HEAD, head)

    def pool(self, model: Any, last: Tensor, token_mask: Tensor) -> Tensor:
        """The sentence vectors [B, width]."""
        head = _known_head(model)
        states = last[:, 0] if head.pooling == "cls" else mean_states(last, token_mask)
        vectors: Tensor = head(states)
        return vectors

    def observe(self, seen: Observation) -> dict[str, np.ndarray]:
        """The vectors of the model and of the teacher, [B, width] each, and the examples' ids."""
        mask = seen.inputs["attention_mask"].bool()
        own = self.pool(seen.model, seen.outputs.last_hidden_state, mask).float().cpu().numpy()
        said = [e.hidden["pooled"].numpy() for e in seen.examples if isinstance(e, CachedExample)]
        return {
            "id": np.array([example.example_id for example in seen.examples], dtype=object),
            "vector": own,
            "teacher": np.concatenate(said) if said else np.full_like(own, np.nan),
        }

    def recall(self, example: CachedExample, tokenizer: Any) -> dict[str, np.ndarray]:
        """See `Task.recall`: the teacher's vectors, where scores of pairs judge them."""
        if "pair" not in example.columns:
            return {}
        said = example.hidden["pooled"].numpy()
        names = np.array([example.example_id], dtype=object)
        return {"id": names, "vector": said, "teacher": np.full_like(said, np.nan)}

    def metrics(self, scores: Scores) -> list[Metric]:
        """Nearness to the teacher's vectors, retrieval both ways, and Spearman on scored pairs.

        Nothing where no model was observed.
        """
        seen = scores.observed
        found: list[Metric] = []
        if not seen:
            return found
        own, said = seen["vector"], seen["teacher"]
        if not np.isnan(said).any():
            there, back = retrieve(own, said, seen["id"])
            found += [
                Metric("cosine", float(cosines(own, said).mean()), "", "higher"),
                Metric("mse", float(np.square(own - said).mean()), "", "lower"),
                Metric("retrieval_to_source", 100.0 * there, "%", "higher"),
                Metric("retrieval_from_source", 100.0 * back, "%", "higher"),
            ]
        first, second, judged = _scored_pairs(scores)
        if len(judged) > 1:
            found.append(Metric("spearman", spearman(cosines(first, second), judged), "", "higher"))
        return found


def _known_head(model: Any) -> SentenceHead:
    head = head_of(model)
    assert head is not None, "equip() comes first"
    return head


def _each_text(rows: Iterable[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    """Rows of one text each; those of a pair carry its id and score."""
    for row in rows:
        if row.get("text_pair") is None:
            yield row
            continue
        score = row.get("score")
        if score is not None and not isinstance(score, int | float):
            raise DataError(
                f"example {row['id']}: has {score!r} as its score, expected a number; map the"
                " right column with data.columns.score"
            )
        shared = {**row, "pair": str(row["id"]), "score": None if score is None else float(score)}
        second = shared.pop("text_pair")
        yield shared
        yield {**shared, "id": f"{row['id']}#2", "text": second}


def _scored_pairs(scores: Scores) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The vectors of both texts of each pair, [n, D] each, and its score, [n]."""
    pairs, judged = (scores.columns.get(name, np.array([])) for name in ("pair", "score"))
    first: dict[Any, int] = {}
    both = []
    for row, (pair, score) in enumerate(zip(pairs, judged, strict=True)):
        if pair is None or score is None:
            continue
        if (pair, score) in first:
            both.append((first.pop((pair, score)), row))
        else:
            first[pair, score] = row
    own = scores.observed["vector"]
    one, other = np.array(both, dtype=np.int64).reshape(-1, 2).T
    return own[one], own[other], np.array([judged[row] for row in one], dtype=np.float64)
