"""Extractive question answering: the teacher's distributions of where an answer starts and ends.

    row -> windows of the context -> Example with two targets: start, end
    start and end over tokens -- best_span --> characters -> exact match, F1
    own tokens, the teacher's -- align --> its distributions over the student's tokens

A class is a position of an example's input; positions outside of the context are ruled out.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from pipeline.errors import ConfigError, DataError, MismatchError
from pipeline.examples import CachedExample, Example
from pipeline.metrics import Metric
from pipeline.positions import Positions
from pipeline.scores import Inputs, Observation, Scores
from pipeline.targets import UNLABELLED
from pipeline.tasks.answers import (
    answer_f1,
    exact_match,
    pick_answers,
    read_answers,
    read_texts,
)
from pipeline.tasks.base import Batch, Task
from pipeline.tasks.causal_lm import teacher_metrics
from pipeline.tasks.passages import (
    Passage,
    best_span,
    cut_windows,
    match_ends,
    match_starts,
    read_passage,
)

# Nats below the best context position: no share worth naming of any softmax up to T = 4, and yet
# finite for codecs and losses.
_RULED_OUT = 100.0
_CONTEXT = "context_mask"
_WINDOW = "is a window"  # marks a row that a cache carries


class QuestionAnswering(Task):
    """The span of a context that answers a question; rows bring `question`, `context`, `answers`.

    `answers` are as in SQuAD: texts and the characters of the context where they start; the first
    is learned, all are measured. A context that is too long becomes several examples
    `<id>@<window>`, of which the surest answers. An example's segments are the tokens before the
    context, of it, and after it (a fourth, empty one says that they differ in token type); its own
    text, answer and window are carried along. A target's label is the token of its answer, none
    where the window does not hold all of it.

    A student with another tokenizer gets the teacher's probabilities by characters: what falls on
    one of its tokens is added up, exactly at every cached temperature where all classes are kept.
    Of a truncated record, only what was kept is moved.

    Attributes:
        max_length: V, and the tokens of an example at most, special ones included.
        stride: tokens that neighbouring windows share, less where a word begins a little later:
            an answer of at most half as many is whole in one of them.
        max_answer_length: tokens of a predicted answer at most.
    """

    auto_class: ClassVar = "AutoModelForQuestionAnswering"
    vocabulary: ClassVar = False
    shifted: ClassVar = False
    features: ClassVar = "tokens"
    same_tokens: ClassVar = False
    draws: ClassVar = False  # they would fall on what is ruled out where all of a context is kept
    reads: ClassVar = ("question", "context")

    name: Literal["question-answering"] = "question-answering"
    max_length: int = Field(default=384, ge=16)
    stride: int = Field(default=128, ge=0)
    max_answer_length: int = Field(default=30, ge=1)

    def num_labels(self) -> int:
        """Outputs of the head: a start and an end for each token."""
        return 2

    def num_classes(self, tokenizer: Any) -> int:
        """`max_length`, whatever the tokenizer."""
        return self.max_length

    def examples(
        self, rows: Iterable[Mapping[str, Any]], tokenizer: Any, carry: Sequence[str]
    ) -> Iterator[Example]:
        """See `Task.examples`.

        Raises:
            ConfigError: the tokenizer is no fast one.
        """
        if not tokenizer.is_fast:
            raise ConfigError(
                "task question-answering: the tokenizer is no fast one, so that its tokens have no"
                " characters; choose a model with a tokenizer.json"
            )
        for row in rows:
            carried = {c: row[c] for c in ("split", *carry) if c in row}
            for name, own in self._windows(row, tokenizer):
                yield self._example(name, {**carried, **own}, tokenizer)

    def batch(
        self, examples: Sequence[Example], pad_id: int, positions: Positions = "all"
    ) -> Batch:
        """See `Task.batch`; the context has token type 1 where the tokenizer gives types."""
        batch = super().batch(examples, pad_id, positions)
        types = torch.zeros_like(batch.inputs["input_ids"])
        context = torch.zeros_like(types, dtype=torch.bool)
        for row, example in enumerate(examples):
            first, count = example.segment_lengths[:2].tolist()
            types[row, first : len(example.input_ids)] = 1
            context[row, first : first + count] = True
        inputs = {**batch.inputs, _CONTEXT: context}
        if all(len(example.segment_lengths) == 4 for example in examples):
            inputs["token_type_ids"] = types
        index = torch.arange(2 * len(examples))
        return replace(batch, inputs=inputs, target_index=index)

    def model_inputs(self, model: Any, inputs: Inputs) -> Inputs:
        """See `Task.model_inputs`: without the mask of the context, nor types where a model has
        none."""
        while not hasattr(model, "config") and hasattr(model, "module"):
            model = model.module
        left_out = {_CONTEXT}
        if (getattr(model.config, "type_vocab_size", 0) or 0) < 2:
            left_out.add("token_type_ids")
        return {name: tensor for name, tensor in inputs.items() if name not in left_out}

    def logits(self, outputs: Any, inputs: Inputs) -> Tensor:
        """Start and end by example, [2B, V] float32, what is no context ruled out."""
        context = inputs[_CONTEXT].to(outputs.start_logits.device)[:, None]
        both = torch.stack([outputs.start_logits, outputs.end_logits], dim=1).float()
        best = both.detach().masked_fill(~context, -torch.inf).amax(dim=2, keepdim=True)
        ruled_out = best - _RULED_OUT
        kept = torch.where(context, torch.maximum(both, ruled_out), ruled_out)
        missing = self.max_length - both.shape[2]
        rest = ruled_out.expand(-1, -1, missing)
        return torch.cat([kept, rest], dim=2).flatten(0, 1)

    def observe(self, seen: Observation) -> dict[str, np.ndarray]:
        """See `Task.observe`: the best answer of each window and how sure it is."""
        if seen.tokenizer is None or seen.logits is None:
            return {}
        log_probs = seen.logits.log_softmax(dim=1).cpu().view(-1, 2, self.max_length)
        return self._read_answers(log_probs, seen.examples, seen.tokenizer)

    def recall(self, example: CachedExample, tokenizer: Any) -> dict[str, np.ndarray]:
        """See `Task.recall`: the teacher's answer, from the positions that were kept."""
        said = example.targets.at(1.0)
        dense = torch.full((2, self.max_length), -torch.inf)
        dense.scatter_(1, said.ids, said.log_probs)
        return self._read_answers(dense[None], [example], tokenizer)

    def metrics(self, scores: Scores) -> list[Metric]:
        """Exact match and F1 by question, the loss of starts and ends; agreement, KL.

        Answers are normalised by the rules of the `language` that is carried (ISO 639-1), those of
        English where there is none.
        """
        found = []
        pairs = [
            (exact_match(text, answers, language), answer_f1(text, answers, language))
            for text, answers, language in pick_answers(scores)
        ]
        if pairs:
            matched, f1 = np.mean(pairs, axis=0)
            found.append(Metric("exact_match", 100.0 * float(matched), "%", "higher"))
            found.append(Metric("f1", 100.0 * float(f1), "%", "higher"))
        labelled = scores.where(scores.label_ids != UNLABELLED)
        if len(labelled.label_ids):
            loss = -float(labelled.label_log_probs.mean())
            found.append(Metric("loss", loss, "nats", "lower"))
        return found + teacher_metrics(scores)

    def align(
        self, own: Example, said: CachedExample, tokenizer: Any, teacher_tokenizer: Any
    ) -> CachedExample:
        """See `Task.align`, by the characters of the context.

        Raises:
            MismatchError: they have other contexts.
        """
        if own.columns["context"] != said.columns["context"]:
            raise MismatchError(
                f"example {own.example_id!r}: has another context than the cached one, and answers"
                " are found by its characters; leave inputs out"
            )
        mine, theirs = self._read(own, tokenizer), self._read(said, teacher_tokenizer)
        classes = np.full((2, self.max_length), -1, dtype=np.int64)
        matched = (match_starts(theirs, mine), match_ends(theirs, mine))
        for row, found in zip(classes, matched, strict=True):
            row[theirs.first : theirs.first + len(theirs)] = np.where(
                found < 0, -1, found + mine.first
            )
        targets = said.targets
        if not np.array_equal(classes, _keep(theirs, self.max_length)):
            targets = targets.regroup(torch.from_numpy(classes))
        labels = targets.label_ids.new_tensor(own.label_ids)
        targets = replace(targets, label_ids=labels)
        return CachedExample(**vars(own), targets=targets, hidden=said.hidden)

    def row(self, example: Example) -> dict[str, Any]:
        """See `Task.row`: the window, which is not cut into further ones."""
        return {**example.columns, "id": example.example_id, _WINDOW: True}

    def _limit(self, tokenizer: Any) -> int:
        return min(self.max_length, int(tokenizer.model_max_length))

    def _read(self, example: Example, tokenizer: Any) -> Passage:
        columns = example.columns
        question, context = str(columns["question"]), str(columns["context"])
        return read_passage(tokenizer, question, context, self._limit(tokenizer))

    def _windows(
        self, row: Mapping[str, Any], tokenizer: Any
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        """Id and own columns of each window of a row, or of one that a cache carries."""
        name, (question, context) = str(row["id"]), read_texts(row)
        if _WINDOW in row:
            own = ("question", "context", "answers", "answer_start", "window")
            yield name, {column: row[column] for column in own}
            return
        texts, start = read_answers(row)
        windows = list(
            cut_windows(tokenizer, question, context, self._limit(tokenizer), self.stride)
        )
        for number, (begin, end) in enumerate(windows):
            inside = start is not None and begin <= start and start + len(texts[0]) <= end
            yield (
                name if len(windows) == 1 else f"{name}@{number}",
                {
                    "question": question,
                    "context": context[begin:end],
                    "answers": texts or None,
                    "answer_start": start - begin if start is not None and inside else None,
                    "window": number if len(windows) > 1 else None,
                },
            )

    def _example(self, name: str, columns: Mapping[str, Any], tokenizer: Any) -> Example:
        passage = read_passage(
            tokenizer, columns["question"], columns["context"], self._limit(tokenizer)
        )
        if len(passage) == 0:
            raise DataError(f"example {name}: its context gives no token; leave it out of the data")
        start, span = columns["answer_start"], None
        if start is not None:
            span = passage.find_span(start, start + len(columns["answers"][0]))
        before, inside = passage.first, len(passage)
        lengths = [before, inside, len(passage.ids) - before - inside]
        if "token_type_ids" in tokenizer.model_input_names:
            lengths.append(0)
        return Example(
            example_id=name,
            input_ids=passage.ids,
            segment_lengths=np.array(lengths, dtype=np.int32),
            target_positions=np.arange(2, dtype=np.int32),
            label_ids=np.array(span or (UNLABELLED, UNLABELLED), dtype=np.int32),
            columns=columns,
        )

    def _read_answers(
        self, log_probs: Tensor, examples: Sequence[Example], tokenizer: Any
    ) -> dict[str, np.ndarray]:
        """Text and log-probability of the best span of each example, log_probs [B, 2, V]."""
        texts = np.full(2 * len(examples), None, dtype=object)
        scores = np.full(2 * len(examples), np.nan)
        for number, (example, both) in enumerate(zip(examples, log_probs, strict=True)):
            passage = self._read(example, tokenizer)
            inside = both[:, passage.first : passage.first + len(passage)]
            start, end, score = best_span(inside[0], inside[1], self.max_answer_length)
            context = str(example.columns["context"])
            texts[2 * number] = context[passage.starts[start] : passage.ends[end]]
            scores[2 * number] = score
        return {"answer": texts, "score": scores}


def _keep(passage: Passage, num_classes: int) -> np.ndarray:
    """The classes of a tokenizer that cuts the context in the same way, [2, V]."""
    places = np.arange(num_classes)
    inside = (places >= passage.first) & (places < passage.first + len(passage))
    return np.tile(np.where(inside, places, -1), (2, 1))
