"""Several students in one pass: each is what it would have been alone, each batch made once."""

import signal
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import TINY, make_language_cache, make_student_config, open_student
from small_worlds import SIGNALS, TASK, make_example, make_student, make_trainer, weights

from pipeline.batches import Collator, Selection
from pipeline.errors import ConfigError, NumericalError
from pipeline.examples import CachedExample
from pipeline.lockstep import Seat, SharedBatches, run_in_turns
from pipeline.losses import LOSSES, Loss
from stages.train_student import StudentConfig, train_student
from stages.train_together import train_together


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_language_cache(tmp_path_factory.mktemp("together"))


def make_configs(cache: Path, root: Path, **changes: Any) -> list[StudentConfig]:
    """Two students of other sizes, losses, rates and lengths, both with dropout."""
    small = {"from": "scratch", "architecture": "gpt2", "dropout": 0.2, **TINY}
    hidden = {"name": "hidden_mse", "layers": {-1: -1}}
    training = {"per_device_train_batch_size": 4, **changes}
    sampling = {"by": "split", "examples": 13}
    return [
        make_student_config(
            cache,
            root / "one",
            student=small,
            training={**training, "max_steps": 7},
            sampling=sampling,
        ),
        make_student_config(
            cache,
            root / "two",
            student={**small, "layers": 2},
            losses=[{"name": "forward_kl"}, hidden],
            training={**training, "max_steps": 4, "learning_rate": 3e-3},
            evaluation={"every": 2},
            sampling=sampling,
        ),
    ]


def parameters(run: Path) -> dict[str, torch.Tensor]:
    return weights(open_student(run))


def test_students_trained_together_are_those_trained_alone(cache: Path, tmp_path: Path) -> None:
    together = train_together(make_configs(cache, tmp_path / "together"))
    for config, run in zip(make_configs(cache, tmp_path / "alone"), together, strict=True):
        alone = parameters(train_student(config))
        found = parameters(run)
        assert alone.keys() == found.keys()
        for name, value in alone.items():
            assert torch.equal(value, found[name]), name


class CountedReads(list[CachedExample]):
    """Examples that count how often one is read."""

    reads = 0

    def __getitem__(self, index: Any) -> Any:
        self.reads += 1
        return super().__getitem__(index)


def train_seated(
    folder: Path, examples: Sequence[CachedExample], losses: Sequence[Loss], seat: Seat | None
) -> dict[str, torch.Tensor]:
    trainer = make_trainer(
        folder,
        losses,
        examples,
        seat=seat,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        num_train_epochs=2,
    )
    trainer.train()
    return weights(trainer.model)


def test_an_example_is_read_once_for_all_students(tmp_path: Path) -> None:
    losses = [
        [LOSSES["forward_kl"].model_validate({"name": "forward_kl"})],
        [LOSSES["hidden_mse"].model_validate({"name": "hidden_mse", "layers": {-1: -1}})],
        [LOSSES["hidden_mse"].model_validate({"name": "hidden_mse", "pooled": True})],
    ]
    examples = CountedReads(make_example(number) for number in range(8))

    def job(number: int) -> Any:
        return lambda seat: train_seated(tmp_path / str(number), examples, losses[number], seat)

    found = run_in_turns([job(number) for number in range(3)], keep=2)
    assert examples.reads == 2 * 8  # two epochs
    for number, own in enumerate(found):
        alone = train_seated(tmp_path / f"alone {number}", list(examples), losses[number], None)
        for name, value in alone.items():
            assert torch.equal(value, own[name]), name


def test_a_shared_batch_holds_what_each_student_compares() -> None:
    examples = [make_example(number) for number in range(4)]
    shared, selection = SharedBatches(), Selection(examples)
    collators = [Collator(TASK, 0, {"layer.1": "layer.1"}), Collator(TASK, 0, SIGNALS)]
    for collator in collators:
        rows, collate = shared.view(selection, collator)
        batch, alone = collate([rows[2], rows[0]]), collator([examples[2], examples[0]])
        assert batch.keys() == alone.keys()
        assert batch["hidden"].keys() == collator.signals.keys()
        for name in collator.signals:
            assert torch.equal(batch["hidden"][name], alone["hidden"][name])
        assert torch.equal(batch["targets"].logits, alone["targets"].logits)
        assert torch.equal(batch["documents"], alone["documents"])
    assert shared.made == 1


def test_students_that_read_otherwise_are_refused(cache: Path, tmp_path: Path) -> None:
    one, two = make_configs(cache, tmp_path)
    other = two.model_copy(update={"seed": 3})
    with pytest.raises(ConfigError, match=r"two: training\.seed is 3, that of .*one is 0;"):
        train_together([one, other])
    workers = make_configs(cache, tmp_path, dataloader_num_workers=2)
    with pytest.raises(ConfigError, match="a worker process would read for one student alone"):
        train_together(workers)
    shared, selection = SharedBatches(), Selection([make_example(0)])
    shared.view(selection, Collator(TASK, 0))
    with pytest.raises(ConfigError, match="students trained together must read alike"):
        shared.view(selection, Collator(TASK, 1))


def test_an_interrupt_ends_all_students() -> None:
    """Or their threads would train on, in folders that nobody else may use."""
    begun: list[Seat] = []
    assert threading.current_thread() is threading.main_thread()

    def job(seat: Seat) -> None:
        begun.append(seat)
        if len(begun) == 2:  # all have been started, and are waited for
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
        while True:
            seat.on_step_end(None, None, None)

    before = threading.active_count()
    with pytest.raises(KeyboardInterrupt):
        run_in_turns([job, job])
    assert (len(begun), threading.active_count()) == (2, before)


def test_one_students_failure_ends_all_with_its_error(tmp_path: Path) -> None:
    examples = [make_example(number) for number in range(8)]
    loss = LOSSES["forward_kl"].model_validate({"name": "forward_kl"})

    def diverge(seat: Seat) -> None:
        student = make_student()
        with torch.no_grad():
            next(student.parameters()).fill_(torch.nan)
        make_trainer(tmp_path / "nan", [loss], examples, student, seat=seat).train()

    with pytest.raises(NumericalError, match="the loss is not finite"):
        run_in_turns(
            [lambda seat: train_seated(tmp_path / "well", examples, [loss], seat), diverge]
        )
