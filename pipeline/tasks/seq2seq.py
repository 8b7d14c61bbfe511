"""One text from another: translation, summarisation, by a model with an encoder and a decoder.

    row -> source and target tokens -> [source | start, y1 .. yN] -> Example

An example holds both streams in one sequence of tokens, so that row t is about token t + 1 here
too: the decoder's start token asks for y1, y1 for y2, and so on to the end mark. A batch takes them
apart again: the encoder reads the source, the decoder start .. y(N-1).
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby, islice
from typing import Any, ClassVar, Literal, Self

import numpy as np
from pydantic import Field
from torch import Tensor

from pipeline.errors import ConfigError, DataError
from pipeline.examples import CachedExample, Example
from pipeline.metrics import Metric
from pipeline.positions import Positions, pick_positions
from pipeline.scores import Observation, Scores
from pipeline.tasks.base import Batch, flat_index, pad_rows
from pipeline.tasks.bilingual import encode_texts, speaking
from pipeline.tasks.causal_lm import count_ids, language_metrics
from pipeline.tasks.generation import Decoding, Evaluate, Writer, generate_texts
from pipeline.tasks.texts import NO_LIMIT, ROWS_AT_ONCE, read_texts
from pipeline.text_metrics import describe_metrics, measure_texts, require_packages


class Seq2Seq(Writer):
    """Target tokens given a source; rows bring `source` and `target`.

    A target may be a list of texts: the first is learned, all are references.

    Attributes:
        targets, generation: whether references are learned or what the teacher writes itself.
        max_source_length, max_target_length: tokens read and learned at most, special ones
            included; what is longer is cut on the right. What the tokenizer's model reads where
            left out.
        source_language, target_language: codes of a multilingual tokenizer (its src_lang and
            tgt_lang); a row's own columns of these names come first.
        evaluate: write texts for held-out sources and compare them with their targets; slow, so
            only where it is asked for. A cache then holds the teacher's; a student's config may say
            it under `evaluation.task`.
        decoder_start: the token id that each decoder input begins with; "teacher" takes what the
            teacher's configuration says, "last" the last token of each target (mBART's language).
    """

    auto_class: ClassVar = "AutoModelForSeq2SeqLM"
    vocabulary: ClassVar = True
    shifted: ClassVar = True
    segments: ClassVar = "streams"
    features: ClassVar = "targets"
    same_tokens: ClassVar = True
    measured_by: ClassVar = ("evaluate",)

    name: Literal["seq2seq"] = "seq2seq"
    max_source_length: int | None = Field(default=None, ge=2)
    max_target_length: int | None = Field(default=None, ge=2)
    source_language: str | None = None
    target_language: str | None = None
    evaluate: Evaluate | None = None
    decoder_start: int | Literal["teacher", "last"] = "teacher"

    def num_classes(self, tokenizer: Any) -> int:
        """The number of token ids, gaps included."""
        return count_ids(tokenizer)

    def complete(self, config: Any, tokenizer: Any) -> Self:
        """See `Task.complete`: with which token the decoder begins.

        Raises:
            ConfigError: the model does not say.
        """
        if self.decoder_start != "teacher":
            return self
        start = getattr(config, "decoder_start_token_id", None)
        if config.model_type == "mbart":  # there it is the language that the target ends with
            start = "last"
        if start is None:
            raise ConfigError(
                "task.decoder_start: the teacher's configuration has no decoder_start_token_id;"
                " set it to the id of the token that its decoder begins with"
            )
        return self.model_copy(update={"decoder_start": start})

    def model_settings(self, tokenizer: Any) -> dict[str, Any]:
        """See `Task.model_settings`: the same start as the teacher's."""
        if self.decoder_start == "last":
            return {}
        start: int | None = None if self.decoder_start == "teacher" else self.decoder_start
        marks = (start, tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id)
        return {"decoder_start_token_id": next((m for m in marks if m is not None), 0)}

    def examples(
        self, rows: Iterable[Mapping[str, Any]], tokenizer: Any, carry: Sequence[str]
    ) -> Iterator[Example]:
        """See `Task.examples`; the target's text stays with the example, for metrics of text."""
        if self.decoder_start == "teacher":
            raise ConfigError("task.decoder_start: is not known yet; complete the task first")
        iterator = iter(rows)
        while chunk := list(islice(iterator, ROWS_AT_ONCE)):
            for languages, group in groupby(chunk, self._languages):
                same = list(group)
                sources, targets = self._tokenize(same, tokenizer, languages)
                for row, source, target in zip(same, sources, targets, strict=True):
                    yield self._example(row, source, target, carry)

    def prompts(
        self, rows: Sequence[Mapping[str, Any]], tokenizer: Any
    ) -> tuple[list[np.ndarray], list[np.ndarray] | None]:
        """See `Writer.prompts`."""
        unwritten = [{**row, "generated": ""} for row in rows]
        return _prompts(list(self.examples(unwritten, tokenizer, [])), tokenizer)

    def writes(self, split: str) -> tuple[str, Decoding] | None:
        """See `Writer.writes`; held-out hypotheses are for metrics of the teacher."""
        if self.evaluate is not None and split != "train":
            return super().writes(split) or ("hypothesis", self.evaluate)
        return super().writes(split)

    def batch(
        self, examples: Sequence[Example], pad_id: int, positions: Positions = "all"
    ) -> Batch:
        """See `Task.batch`; indices count the decoder's positions, [B, W of the decoder]."""
        sources, spoken = zip(*(streams(example) for example in examples), strict=True)
        input_ids, attention_mask = pad_rows(sources, pad_id)
        # The last token is no input: nothing is asked after it.
        decoder_ids, decoder_mask = pad_rows([ids[:-1] for ids in spoken], pad_id)
        inputs = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "decoder_input_ids": decoder_ids,
            "decoder_attention_mask": decoder_mask,
        }
        lengths, width = [len(source) for source in sources], decoder_ids.shape[1]
        targets = [e.target_positions - n for e, n in zip(examples, lengths, strict=True)]
        features = [
            pick_positions(e.target_positions, e, positions) - n
            for e, n in zip(examples, lengths, strict=True)
        ]
        return Batch(inputs, flat_index(targets, width), flat_index(features, width), examples)

    def hidden_states(self, outputs: Any) -> Sequence[Tensor]:
        """See `Task.hidden_states`: those of the decoder."""
        states: Sequence[Tensor] = outputs.decoder_hidden_states
        return states

    def require_packages(self) -> None:
        """See `Task.require_packages`."""
        if self.evaluate is not None:
            require_packages(self.evaluate.metrics)

    def observe(self, seen: Observation) -> dict[str, np.ndarray]:
        """See `Task.observe`: what the model writes for each source, where `evaluate` asks."""
        if self.evaluate is None or seen.tokenizer is None:
            return {}
        prompts, sources = _prompts(seen.examples, seen.tokenizer)
        texts = generate_texts(seen.model, seen.tokenizer, prompts, self.evaluate, sources)
        firsts = np.cumsum([0, *(len(e.target_positions) for e in seen.examples)])
        written = np.full(firsts[-1], None, dtype=object)
        written[firsts[:-1]] = [found[0] for found in texts]
        return {"hypothesis": written}

    def recall(self, example: CachedExample, tokenizer: Any) -> dict[str, np.ndarray]:
        """See `Task.recall`: what the teacher wrote, where the cache holds it."""
        written = np.full(len(example.target_positions), None, dtype=object)
        written[0] = example.columns.get("hypothesis")
        return {"hypothesis": written}

    def metrics(self, scores: Scores) -> list[Metric]:
        """Loss, perplexity, accuracy, calibration on the targets; agreement, KL; where texts were
        written, how near they are to the references."""
        found = language_metrics(scores)
        hypotheses, references = _written(scores)
        if self.evaluate is not None and hypotheses:
            metrics, tokenizer = self.evaluate.metrics, self.evaluate.bleu_tokenizer
            texts = measure_texts(metrics, hypotheses, references, tokenizer)
            found += [Metric(name, value, "", "higher") for name, value in texts.items()]
        return found

    def details(self, scores: Scores) -> dict[str, Any]:
        """See `Task.details`: signatures of the metrics of text."""
        hypotheses, references = _written(scores)
        if self.evaluate is None or not hypotheses:
            return {}
        most = max(len(several) for several in references)
        metrics, tokenizer = self.evaluate.metrics, self.evaluate.bleu_tokenizer
        return {"text_metrics": describe_metrics(metrics, most, tokenizer)}

    def _languages(self, row: Mapping[str, Any]) -> tuple[str | None, str | None]:
        source = row.get("source_language") or self.source_language
        return source, row.get("target_language") or self.target_language

    def _tokenize(
        self,
        rows: Sequence[Mapping[str, Any]],
        tokenizer: Any,
        languages: tuple[str | None, str | None],
    ) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """Token ids of sources and targets."""
        limits = (
            self._limit(self.max_source_length, tokenizer),
            self._limit(self.max_target_length, tokenizer, spare=1),
        )
        with speaking(tokenizer, *languages):
            sources = encode_texts(read_texts(rows, "source"), tokenizer, limits[0])
            targets = encode_texts(_learned(rows), tokenizer, limits[1], target=True)
        return sources, targets

    def _limit(self, chosen: int | None, tokenizer: Any, spare: int = 0) -> int | None:
        """Tokens at most; `spare` is room for the start token."""
        if chosen is None and tokenizer.model_max_length < NO_LIMIT:
            return int(tokenizer.model_max_length) - spare
        return chosen

    def _example(
        self, row: Mapping[str, Any], source: np.ndarray, target: np.ndarray, carry: Sequence[str]
    ) -> Example:
        if len(source) == 0 or len(target) == 0:
            empty = "target" if len(source) else "source"
            raise DataError(
                f"example {row['id']}: its {empty} gives no token; leave it out of the data"
            )
        start = int(target[-1]) if self.decoder_start == "last" else int(self.decoder_start)
        kept = dict.fromkeys(("split", "target", "generated", "hypothesis", *carry))
        return Example(
            example_id=str(row["id"]),
            input_ids=np.concatenate([source, [start], target]).astype(np.int32),
            segment_lengths=np.array([len(source), 1 + len(target)], dtype=np.int32),
            target_positions=np.arange(len(target), dtype=np.int32) + len(source),
            label_ids=target,
            columns={column: row[column] for column in kept if column in row},
        )


def streams(example: Example) -> tuple[np.ndarray, np.ndarray]:
    """What the encoder reads, and what the decoder says after its start token (which is first)."""
    length = int(example.segment_lengths[0])
    return example.input_ids[:length], example.input_ids[length:]


def _learned(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """What the decoder learns to say: the teacher's text where there is one, else the reference."""
    said = []
    for row in rows:
        text = row["generated"] if row.get("generated") is not None else row.get("target")
        first = text[0] if isinstance(text, list) and text else text
        said.append({"id": row["id"], "target": first})
    return read_texts(said, "target")


def _prompts(
    examples: Sequence[Example], tokenizer: Any
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """The decoder's first tokens and the sources: a language or BOS after the start is given, not
    chosen."""
    speaks = hasattr(tokenizer, "src_lang")
    given = {*tokenizer.all_special_ids} if speaks else {tokenizer.bos_token_id}
    given -= {tokenizer.eos_token_id}
    both = [streams(example) for example in examples]
    prompts = [spoken[: 2 if int(spoken[1]) in given else 1] for _, spoken in both]
    return prompts, [source for source, _ in both]


def _written(scores: Scores) -> tuple[list[str], list[list[str]]]:
    """What the model wrote and the references, for sources that have both."""
    hypotheses, references = [], []
    targets = scores.columns.get("target", ())
    for text, known in zip(scores.observed.get("hypothesis", ()), targets, strict=False):
        if text is not None and known:
            hypotheses.append(text)
            references.append([known] if isinstance(known, str) else list(known))
    return hypotheses, references
