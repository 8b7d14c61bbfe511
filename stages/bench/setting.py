"""What the measurements of a bench share: sizes, teacher, text, and a folder for scratch files.

BenchConfig -- prepare --> Setting -- capture(name, targets) --> a cache in the folder, and seconds
"""

import shutil
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import torch
from pydantic import Field

from pipeline.cache import TargetsSpec, TeacherCache
from pipeline.capture_log import CaptureLog
from pipeline.config import StrictModel, load_config
from pipeline.examples import Example
from pipeline.sources import DataConfig, load_rows
from pipeline.student import Origin
from pipeline.tasks.causal_lm import CausalLM
from pipeline.teacher import Teacher, TeacherConfig, load_tokenizer
from stages.bench.language import LanguageRecipe
from stages.cache_teacher import CacheConfig, cache_teacher
from stages.hidden import HiddenConfig
from stages.shipped import find_config
from stages.sizes import BatchConfig, ShardConfig
from stages.train_student import StudentConfig
from stages.train_teacher import TrainTeacherConfig, train_teacher


@cache
def _demo_student() -> StudentConfig:
    return load_config(StudentConfig, find_config("student", "demo-kd"), ())


class BenchConfig(StrictModel):
    """What is measured, and how often; the shapes are the demo's.

    Attributes:
        output: the JSON file; scratch files lie beside it while it runs.
        teacher: a trained one; where there is none, one step of its recipe stands in for it.
        files: source files of the standard library that the teacher reads.
        block_size, batch_tokens: tokens of an example, and of a batch that the teacher reads.
        top_k, tail_draws, temperatures: of the targets; wide_k: of the other, without draws.
        student, batch_size, training_steps: the model of a training step, its examples, and the
            steps of a whole job: those of the demo's student.
        transfer_tokens: of the text that a whole job captures first; None counts the training text
            of the demo's cache.
        read_batch: examples that are read and collated at a time.
        captures, epochs, reads: repetitions of each side; an epoch is one over these files.
        codec_targets: targets of each class space that the codecs are compared on.
        languages: models that are trained for further class spaces; sharpening: of the last one's
            context, for one more; models: where they are kept for the next bench.
        vocabularies: class spaces that the fused head is measured at, with made-up targets.
        loss_positions, loss_width: of the loss alone; loss_runs: of it, and of whole steps.
        vocabulary_batch, vocabulary_steps: of whole steps.
        scale_tokens: of made-up caches that are written and read at growing sizes.
    """

    output: Path = Path("runs/bench/bench.json")
    teacher: Path = Path("data/teachers/demo")
    files: int = Field(default=18, ge=1)
    block_size: int = Field(default=256, ge=2)
    batch_tokens: int = Field(default=8192 if torch.cuda.is_available() else 2048, ge=2)
    top_k: int = 64
    tail_draws: int = 4
    temperatures: tuple[float, ...] = (1.0, 2.0, 4.0)
    wide_k: int = 64
    student: Origin = Field(default_factory=lambda: _demo_student().student)
    batch_size: int = Field(
        default_factory=lambda: _demo_student().training["per_device_train_batch_size"], ge=1
    )
    training_steps: int = Field(default_factory=lambda: _demo_student().training["max_steps"], ge=1)
    transfer_tokens: int | None = Field(default=None, ge=1)
    read_batch: int = Field(default=16, ge=1)
    captures: int = Field(default=4, ge=1)
    epochs: int = Field(default=4, ge=1)
    reads: int = Field(default=5, ge=1)
    codec_targets: int = Field(default=8192, ge=1)
    languages: tuple[LanguageRecipe, ...] = (
        LanguageRecipe(classes=32_768),
        LanguageRecipe(classes=131_072),
    )
    sharpening: float = 1.6
    models: Path = Path("runs/bench/models")
    vocabularies: tuple[int, ...] = (4_096, 32_000, 128_256)
    loss_positions: int = Field(default=2048, ge=1)
    loss_width: int = Field(default=512, ge=1)
    loss_runs: int = Field(default=3, ge=1)
    vocabulary_batch: int = Field(default=8, ge=1)
    vocabulary_steps: int = Field(default=4, ge=1)
    scale_tokens: tuple[int, ...] = (10**5, 10**6, 10**7)

    @property
    def targets(self) -> TargetsSpec:
        """What a capture keeps."""
        return TargetsSpec(
            top_k=self.top_k, tail_draws=self.tail_draws, temperatures=self.temperatures
        )


QUICK: dict[str, Any] = {
    "files": 6,
    "captures": 2,
    "epochs": 2,
    "reads": 2,
    "codec_targets": 2048,
    "languages": (),
    "loss_positions": 512,
    "loss_runs": 1,
    "vocabulary_batch": 2,
    "vocabulary_steps": 4,
    "scale_tokens": (10**5, 10**6),
}


@dataclass(frozen=True)
class Setting:
    """What all measurements share.

    Attributes:
        config: the sizes.
        folder: for scratch files.
        teacher: what is asked; trained: whether it is a teacher to take figures of content from.
    """

    config: BenchConfig
    folder: Path
    teacher: TeacherConfig
    trained: bool

    @property
    def task(self) -> CausalLM:
        """Packed blocks."""
        return CausalLM(block_size=self.config.block_size)

    @property
    def data(self) -> DataConfig:
        """The first files of the demo's transfer text."""
        files = self.config.files
        return DataConfig(source="stdlib", splits={"train": "transfer"}, max_examples=files)

    @cached_property
    def tokenizer(self) -> Any:
        """The teacher's."""
        return load_tokenizer(self.teacher)

    @cached_property
    def model(self) -> Any:
        """The teacher as transformers gives it, on its device."""
        classes = self.task.num_classes(self.tokenizer)
        return Teacher.load(self.teacher, self.task, classes).model

    @cached_property
    def examples(self) -> list[Example]:
        """What the teacher reads, as a capture makes it."""
        return list(self.task.examples(load_rows(self.data), self.tokenizer, []))

    @property
    def shard_examples(self) -> int:
        """A quarter, so that writing overlaps with asking as it does in a job of several shards."""
        return -(-len(self.examples) // 4)

    @cached_property
    def transfer_tokens(self) -> int:
        """Of the text that a whole job captures before its students learn from it."""
        if self.config.transfer_tokens is not None:
            return self.config.transfer_tokens
        demo = load_config(CacheConfig, find_config("cache", "demo"), ())
        rows = load_rows(demo.data)
        examples = demo.task.examples(rows, self.tokenizer, ["split"])
        return sum(len(one.input_ids) for one in examples if one.columns["split"] == "train")

    @cached_property
    def tokens(self) -> int:
        """Of all examples."""
        return sum(len(example.input_ids) for example in self.examples)

    def capture(self, name: str, targets: TargetsSpec, layers: tuple[int, ...] = ()) -> float:
        """Cache the teacher afresh into a folder of this name.

        Returns:
            Seconds from the first batch to the last byte of the last shard.
        """
        output = self.folder / name
        shutil.rmtree(output, ignore_errors=True)
        config = CacheConfig(
            output=output,
            task=self.task,
            data=self.data,
            teacher=self.teacher,
            targets=targets,
            hidden=HiddenConfig(layers=layers),
            batch=BatchConfig(tokens=self.config.batch_tokens),
            shard=ShardConfig(examples=self.shard_examples),
        )
        cache_teacher(config, progress=False)
        return CaptureLog.read(output / "capture.json").total("seconds")

    def open(self, name: str) -> TeacherCache:
        """Open a cache that `capture` left, with nothing of it in memory."""
        return TeacherCache.open(self.folder / name)


def prepare(config: BenchConfig, folder: Path) -> Setting:
    """Find the teacher, or take one step of its recipe where it is not there."""
    trained = (config.teacher / "model.safetensors").is_file()
    where = config.teacher if trained else _train_one_step(folder / "teacher")
    return Setting(config, folder, TeacherConfig(model=str(where)), trained)


def _train_one_step(folder: Path) -> Path:
    """A teacher of the demo's shape that has learned next to nothing."""
    settings = (
        f"output={folder}",
        "data.max_examples={train: 20, test: 1}",
        "training.max_steps=1",
        "training.per_device_train_batch_size=1",
        "evaluation.every=null",
    )
    return train_teacher(load_config(TrainTeacherConfig, find_config("teacher", "demo"), settings))
