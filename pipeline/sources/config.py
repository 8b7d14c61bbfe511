"""What a config says about its data: where rows come from, what their columns mean, which are
kept and which keep their label."""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from pipeline.config import StrictModel
from pipeline.sources.augmenting import Augmentation

Split = Literal["train", "validation", "test"]
Count = Annotated[int, Field(ge=1)]
Values = list[str | int | float | bool]


class Labelled(StrictModel):
    """Which rows of the train split keep their label; a pure function of the example's id.

    Attributes:
        count: this many ids, those with the smallest keyed hash of (seed, id); None keeps all.
            An id that stands on several rows (one per language) counts once.
        seed: another seed keeps other ids.
        where: and only rows whose columns hold one of the listed values.
    """

    count: Annotated[int, Field(ge=0)] | None = None
    seed: int = 0
    where: dict[str, Values] = Field(default={})


class DataConfig(StrictModel):
    """A data set, by what `datasets` can load and by sources of our own.

    Attributes:
        source: "stdlib", "sib200", "ud", "xquad", "parallel" (pairs of a text and its translation;
            "tatoeba" and "flores" are such), a builder of `datasets` (json, csv, parquet, text,
            arrow), a local file or folder, or a name on the hub.
        name: configuration(s) of the data set; with several, `name_column` says which one a row
            came from. For sib200 the languages, None for the 24 of its local file; for ud the
            treebanks, for xquad the languages.
        name_column: the column that holds the configuration's name.
        files: paths, globs or URLs for a builder, by source split where it is a mapping; $NAME
            stands for an environment variable.
        options: further arguments of `datasets.load_dataset`, for instance sample_by or revision.
        split_column: the source's column that names its splits, where one file holds them all.
        splits: our split -> the source's; slices such as "train[:90%]" are understood.
        columns: canonical column -> the source's column, where the names differ; a.b is field b of
            column a.
        carry: canonical columns that stay with an example, for slices and for students.
        where: keep only rows whose canonical columns hold one of the listed values.
        max_examples: the first rows in source order, for every split or by split.
        labelled: which train rows keep their label; all where it is left out.
        label_names: the classes in order; found in the data where they are left out.
        augment: changed copies of the training texts, for a teacher to judge.
        licence: what the model card says of the data, for instance cc-by-sa-4.0.
    """

    source: str
    name: str | list[str] | None = None
    name_column: str = "config"
    files: str | list[str] | dict[str, str | list[str]] | None = None
    options: dict[str, Any] = Field(default={})
    split_column: str | None = None
    splits: dict[Split, str] = Field(default={"train": "train"}, min_length=1)
    columns: dict[str, str] = Field(default={})
    carry: list[str] = Field(default=[])
    where: dict[str, Values] = Field(default={})
    max_examples: Count | dict[Split, Count] | None = None
    labelled: Labelled | None = None
    label_names: list[str] | None = None
    augment: Augmentation | None = None
    licence: str | None = None

    @model_validator(mode="after")
    def _check(self) -> "DataConfig":
        names = self.label_names or []
        if len(set(names)) < len(names):
            raise ValueError(f"label_names repeats a name: {', '.join(names)}")
        if "split" in self.columns:
            raise ValueError("columns.split cannot be mapped; use `splits` to choose splits")
        return self

    @property
    def names(self) -> list[str | None]:
        """The configurations to load, one None where the source has only one."""
        return list(self.name) if isinstance(self.name, list) else [self.name]

    def max_of(self, split: Split) -> int | None:
        """The largest number of rows of a split."""
        if isinstance(self.max_examples, dict):
            return self.max_examples.get(split)
        return self.max_examples
