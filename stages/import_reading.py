"""A dump as its config names it: the files, and their records as often as they are asked for."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from pipeline.cache import hash_id
from pipeline.cache.codecs import CODECS, Codec, Lossless
from pipeline.config import StrictModel, member_of
from pipeline.errors import DataError
from pipeline.examples import Column, Example
from pipeline.exchange import (
    CARRIED,
    DUMPS,
    Dump,
    Facts,
    Findings,
    Sound,
    Space,
    plain,
    read_rows,
    require_sound,
)
from pipeline.storage import Location, as_path, is_local

Split = Literal["train", "validation", "test"]
Patterns = str | list[str]

_NO_ROW = (DataError, ValueError, TypeError, LookupError, AttributeError)


class ImportedTeacher(StrictModel):
    """What the dump's maker says of the teacher.

    Attributes:
        model: its name.
        licence: for the cards of students.
    """

    model: str
    licence: str | None = None


class ImportConfig(StrictModel):
    """Which dump becomes which cache.

    Attributes:
        output: the cache's folder.
        format: what the files are: a name of DUMPS, with its settings.
        files: paths or globs, by split where it is a mapping.
        tokenizer: folder or hub name; the one that the dump's ids are of.
        teacher: who said it.
        carry: fields of the rows that stay with an example.
        held_out: shares of the split `train` that become others, by the example's id.
        top_k: K; the most entries that a row has where left out.
        codec: how entries are written; where rows differ in length it must be lossless.
        shard_tokens: of a shard, about.
    """

    output: Location
    format: Annotated[Dump, *member_of(DUMPS, "format")]
    files: Patterns | dict[Split, Patterns]
    tokenizer: str
    teacher: ImportedTeacher
    carry: list[str] = []
    held_out: dict[Literal["validation", "test"], Annotated[float, Field(gt=0, lt=1)]] = {}
    top_k: int | None = Field(default=None, ge=1)
    codec: Annotated[Codec, *member_of(CODECS, "codec")] = Lossless()
    shard_tokens: int = Field(default=1 << 18, gt=0)


@dataclass(frozen=True)
class DumpReading:
    """The dump's records, as often as they are asked for, in one order."""

    config: ImportConfig
    dump: Dump
    facts: Facts
    space: Space
    files: Sequence[tuple[Path, Split | None]]
    tokenizer: Any

    @cached_property
    def columns(self) -> dict[str, str]:
        """Carried column -> field of a row."""
        asked = {name.removeprefix(CARRIED): name for name in self.config.carry}
        return {**(self.facts.columns or {}), **asked}

    def examples(self, findings: Findings) -> Iterator[Example]:
        """Every example, its rows checked and counted.

        Raises:
            DataError: there is none, or not one target.
        """
        for sound, columns in self.sounds(findings):
            yield replace(sound.example, columns=columns)
        if not findings.targets:
            texts = f"{findings.unanswered:,} texts without one distribution"
            raise DataError(
                f"files: hold {texts if findings.unanswered else 'no rows'}, expected"
                f" log-probabilities as {self.dump.name} has them; give the files of a teacher that"
                " was asked for them"
            )

    def sounds(self, findings: Findings) -> Iterator[tuple[Sound, Mapping[str, Column]]]:
        """Every record with its carried columns.

        Raises:
            DataError: names the file and row, and what is wrong with it.
        """
        for file, split in self.files:
            for number, row in enumerate(read_rows(file)):
                try:
                    yield from self._read(row, f"{file.stem}:{number}", split, findings)
                except _NO_ROW as error:
                    what = str(error) if isinstance(error, DataError) else _explain(error)
                    raise DataError(f"{file}: row {number}: {what}") from error

    def _read(
        self, row: Mapping[str, Any], name: str, split: Split | None, findings: Findings
    ) -> Iterator[tuple[Sound, Mapping[str, Column]]]:
        if self.dump.id_field is not None:
            name = _pick(row, self.dump.id_field, "format.id_field")
            if name is None:
                raise DataError(
                    f"has a null in {self.dump.id_field!r}; name a field that all rows have in"
                    " format.id_field"
                )
            name = str(name)
        columns = {ours: _pick(row, theirs, "carry") for ours, theirs in self.columns.items()}
        for count, record in enumerate(self.dump.records(row, self.tokenizer)):
            sound = require_sound(record, self.space, findings)
            known = record.example_id or (f"{name}#{count}" if count else name)
            example = replace(sound.example, example_id=known)
            found = split or columns.get("split") or self._hold_out(known)
            yield replace(sound, example=example), {**columns, "split": found}

    def _hold_out(self, name: str) -> Split:
        """The split of an example that no file tells; a function of its id."""
        place = hash_id(name) / 2**64
        for split, share in self.config.held_out.items():
            if place < share:
                return split
            place -= share
        return "train"


def list_files(files: Patterns | dict[Split, Patterns]) -> list[tuple[Path, Split | None]]:
    """Every file once, with the split that it is named under.

    Raises:
        DataError: a path or glob that finds nothing.
    """
    if isinstance(files, dict):
        by_split = [(path, split) for split in files for path, _ in list_files(files[split])]
        return list(by_split)
    found: list[tuple[Path, Split | None]] = []
    for pattern in [files] if isinstance(files, str) else files:
        path = as_path(pattern)
        if is_local(path):
            path = path.expanduser()
        if path.is_file():
            found.append((path, None))
            continue
        base = path.parent
        while set("*?[") & set(base.name):
            base = base.parent
        paths = sorted(base.glob(path.relative_to(base).as_posix()))
        if not paths:
            raise DataError(f"files: {pattern} finds nothing; give the dump's files")
        found += [(path, None) for path in paths]
    return found


def _pick(row: Mapping[str, Any], name: str, setting: str) -> Any:
    if name not in row:
        raise DataError(f"has no {name!r} among {', '.join(row)}; see to {setting}")
    return plain(row[name])


def _explain(error: Exception) -> str:
    """What is wrong with a row that is none of its format."""
    if isinstance(error, KeyError):
        return f"has no {error}; give the format of these files"
    return f"is no row of this format ({' '.join(str(error).split())})"
