"""Known distributions over a small vocabulary, and caches imported from dumps of them."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit

from pipeline.cache import TeacherCache
from pipeline.config import parse_config
from stages.import_dump import import_dump
from stages.import_reading import ImportConfig

V = 300


@dataclass(frozen=True)
class Said:
    """A text, and the teacher's log-probabilities of the token after each but the last.

    Attributes:
        tokens: [T].
        log_probs: [T - 1, V] float64.
    """

    tokens: np.ndarray
    log_probs: np.ndarray

    def top(self, k: int, row: int) -> list[tuple[int, float]]:
        """Ids and log-probabilities of the k most probable."""
        order = np.argsort(-self.log_probs[row], kind="stable")[:k]
        return [(int(i), float(self.log_probs[row, i])) for i in order]

    def own(self, row: int) -> float:
        """The log-probability of the token that followed."""
        return float(self.log_probs[row, self.tokens[row + 1]])

    def spell(self, first: int = 0, last: int | None = None) -> str:
        """The words of some tokens."""
        return " ".join(f"w{token}" for token in self.tokens[first:last])


def say(number: int, length: int = 24, sharpness: float = 3.0) -> Said:
    """Text `number`; the token that follows is usually a probable one."""
    rng = np.random.default_rng(number)
    logits = rng.normal(0, sharpness, (length - 1, V))
    log_probs = torch.from_numpy(logits).log_softmax(-1).numpy()
    drawn = [rng.choice(V, p=np.exp(row) / np.exp(row).sum()) for row in log_probs]
    return Said(np.array([rng.integers(V), *drawn]), log_probs)


def save_tokenizer(folder: Path, size: int = V) -> str:
    """A tokenizer of words w0, w1, ..., with a chat template that joins what was said."""
    folder.mkdir(parents=True, exist_ok=True)
    words = {f"w{i}": i for i in range(size)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return str(folder)


def import_files(folder: Path, format: Any, files: Any, **changes: Any) -> TeacherCache:
    """Import files into <folder>/cache with a tokenizer of V words."""
    settings = {
        "output": str(folder / "cache"),
        "format": format,
        "files": files,
        "tokenizer": save_tokenizer(folder / "tokenizer"),
        "teacher": {"model": "somebody/teacher"},
        **changes,
    }
    config = parse_config(ImportConfig, settings, "the import")
    return TeacherCache.open(import_dump(config, progress=False))


def write_lines(file: Path, rows: Sequence[Any]) -> str:
    """Lines of JSON."""
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(file)


def assert_says(
    cache: TeacherCache, row: int, said: Said, k: int, tolerance: float, first: int = 0
) -> None:
    """The cache's row holds the k most probable of each position from `first` on, and no more."""
    example = cache[row]
    assert example.input_ids.tolist() == said.tokens.tolist()
    assert example.target_positions.tolist() == [*range(first, len(said.tokens) - 1)]
    assert example.label_ids.tolist() == said.tokens[first + 1 :].tolist()
    distribution = example.targets.at(1.0)
    for index, position in enumerate(example.target_positions.tolist()):
        expected = dict(said.top(k, position))
        log_probs = distribution.log_probs[index]
        present = log_probs > -torch.inf
        found = dict(
            zip(distribution.ids[index][present].tolist(), log_probs[present].tolist(), strict=True)
        )
        assert found.keys() == expected.keys()
        for token, log_prob in expected.items():
            assert abs(found[token] - log_prob) <= tolerance
        mass = sum(np.exp(value) for value in found.values())
        assert abs(float(distribution.tail_mass[index]) - max(0.0, 1 - mass)) < 1e-5
