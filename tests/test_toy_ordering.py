"""A toy whose whole distribution is known, learned through our draws, our cache and our losses.

    x -> teacher [N, V] -> sparse_targets -> cache -> per_position -> student -> exact metrics

What truncation does to a student shows at this size already: the kept classes alone teach it to be
over-confident, worse than labels do; an unbiased tail teaches it almost all the teacher knows.
"""

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pipeline.cache import CacheWriter, Draft, Identity, TargetsSpec, TeacherCache
from pipeline.examples import CachedExample
from pipeline.losses import LOSSES, Knowledge, Loss, StudentOutputs
from pipeline.metrics import expected_calibration_error
from pipeline.targets import UNLABELLED, Targets
from pipeline.teacher.sparse import sparse_targets

V, D, HIDDEN, N, STEPS = 512, 8, 32, 256, 700
KEPT = {
    "draws": TargetsSpec(top_k=0, tail_draws=30),
    "hybrid": TargetsSpec(top_k=8, tail_draws=4),
    "top-12": TargetsSpec(top_k=12),
}
KL = LOSSES["forward_kl"]
STUDENTS: dict[str, tuple[Loss, str | None]] = {  # its loss, and the cache it reads
    "labels": (LOSSES["cross_entropy"](), "hybrid"),
    "full": (KL(), None),
    "draws": (KL(), "draws"),
    "hybrid": (KL(), "hybrid"),
    "skew": (LOSSES["skew_kl"](), "hybrid"),
    "top-12": (KL.model_validate({"tail": "renormalise"}), "top-12"),
}


@dataclass(frozen=True)
class Outcome:
    """Exact figures of a student on held-out inputs: cross-entropy in nats, ECE in percent."""

    loss: float
    ece: float


def make_inputs(seed: int, count: int) -> Tensor:
    return torch.randn(count, D, generator=torch.Generator().manual_seed(seed))


def teach(inputs: Tensor) -> Tensor:
    """Logits [N, V]: a random network, sharper at some inputs than at others, over Zipf's law."""
    generator = torch.Generator().manual_seed(1)
    shapes = ((D, HIDDEN), (HIDDEN, V), (D, 1))
    first, second, sharpness = (
        torch.randn(shape, generator=generator) / shape[0] ** 0.5 for shape in shapes
    )
    scores = 1.6 * torch.tanh(inputs @ first) @ second
    return 3.0 * torch.exp(0.6 * inputs @ sharpness) * scores - torch.arange(1, V + 1).log()


def draw_labels(logits: Tensor, generator: torch.Generator) -> Tensor:
    """One label for each position, from the teacher's distribution: [N] int64."""
    unlabelled = torch.full((len(logits),), UNLABELLED)
    return sparse_targets(logits, 0, 1, (1.0,), unlabelled, generator).draw_ids[:, 0]


def make_example(step: int, targets: Targets) -> CachedExample:
    """The inputs of one step are a function of its name; the rest is what the teacher said."""
    return CachedExample(
        example_id=str(step),
        input_ids=np.zeros(N, dtype=np.int32),
        segment_lengths=np.array([N], dtype=np.int32),
        target_positions=np.arange(N, dtype=np.int32),
        label_ids=targets.label_ids.numpy().astype(np.int32),
        targets=targets,
    )


def make_draft(spec: TargetsSpec) -> Draft:
    """A cache of one example per step."""
    parts = ("data", "preprocessing", "tokenizer", "teacher")
    return Draft(
        identity=Identity(**{part: {"digest": "toy"} for part in parts}),
        task={"name": "toy"},
        targets=spec,
        num_classes=V,
        shifted=False,
        shard_examples=STEPS,
        num_examples=STEPS,
    )


def write_caches(folder: Path) -> dict[str, TeacherCache]:
    """One pass of the teacher, kept in each of the ways of KEPT."""
    writers = {name: CacheWriter(folder / name, make_draft(spec)) for name, spec in KEPT.items()}
    with ExitStack() as stack:
        shards = {name: stack.enter_context(w.shard(0)) for name, w in writers.items()}
        for step in range(STEPS):
            generator = torch.Generator().manual_seed(step)
            logits = teach(make_inputs(step, N))
            labels = draw_labels(logits, generator)
            for name, spec in KEPT.items():
                entries = (spec.top_k, spec.tail_draws, spec.temperatures)
                targets = sparse_targets(logits, *entries, labels, generator)
                shards[name].add(make_example(step, targets))
    for writer in writers.values():
        writer.finish()
    return {name: TeacherCache.open(folder / name) for name in KEPT}


def keep_everything(logits: Tensor) -> Targets:
    """Every class of every position; more than is worth keeping in a file."""
    nothing = torch.empty(len(logits), 0)
    return Targets(
        ids=torch.arange(V).expand(len(logits), -1),
        logits=logits,
        draw_ids=nothing.long(),
        draw_logits=nothing,
        logsumexp=logits.logsumexp(dim=1, keepdim=True),
        label_ids=torch.full((len(logits),), UNLABELLED),
        label_log_probs=torch.zeros(len(logits)),
        temperatures=(1.0,),
        num_classes=V,
    )


def read_steps(cache: TeacherCache | None) -> Iterator[tuple[Tensor, Targets]]:
    """Inputs and targets of each step; without a cache the teacher is asked again."""
    if cache is None:
        for step in range(STEPS):
            inputs = make_inputs(step, N)
            yield inputs, keep_everything(teach(inputs))
    else:
        for example in cache.stream(seed=0, epoch=0):
            yield make_inputs(int(example.example_id), N), example.targets


def train_student(loss: Loss, cache: TeacherCache | None) -> nn.Module:
    """One epoch of fresh inputs with AdamW and a one-cycle rate."""
    torch.manual_seed(0)
    student = nn.Sequential(
        nn.Linear(D, 48), nn.GELU(), nn.Linear(48, 48), nn.GELU(), nn.Linear(48, V)
    )
    optimizer = torch.optim.AdamW(student.parameters(), lr=3e-3, foreach=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=STEPS)
    for inputs, targets in read_steps(cache):
        knowledge = Knowledge(targets, targets.label_ids)
        values = loss.per_position(StudentOutputs(student(inputs)), knowledge, nn.ModuleDict())
        optimizer.zero_grad()
        values.mean().backward()
        optimizer.step()
        schedule.step()
    return student


def measure_student(student: nn.Module) -> Outcome:
    """Expectations over the teacher's labels, so that nothing is left to their luck."""
    inputs = make_inputs(10**6, 4000)
    truth = teach(inputs).softmax(dim=1)
    with torch.no_grad():
        log_q = student(inputs).log_softmax(dim=1)
    confidence, choice = log_q.exp().max(dim=1)
    correct = truth.gather(1, choice[:, None])[:, 0]
    ece = expected_calibration_error(confidence.double().numpy(), correct.double().numpy())
    return Outcome(loss=-(truth * log_q).sum(dim=1).mean().item(), ece=ece)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome]:
    caches = write_caches(tmp_path_factory.mktemp("toy"))
    return {
        name: measure_student(train_student(loss, caches[cache] if cache else None))
        for name, (loss, cache) in STUDENTS.items()
    }


def test_sparse_targets_with_a_tail_beat_labels_and_truncation_loses_to_them(
    outcomes: dict[str, Outcome],
) -> None:
    loss = {name: outcome.loss for name, outcome in outcomes.items()}
    assert loss["full"] < loss["draws"] < loss["labels"] < loss["top-12"]
    assert loss["top-12"] - loss["labels"] > 0.1


@pytest.mark.parametrize("name", ["draws", "hybrid", "skew"])
def test_an_unbiased_tail_recovers_most_of_what_the_dense_teacher_gives(
    outcomes: dict[str, Outcome], name: str
) -> None:
    whole = outcomes["labels"].loss - outcomes["full"].loss
    assert outcomes["labels"].loss - outcomes[name].loss >= 0.75 * whole


def test_draws_alone_and_behind_an_exact_head_teach_the_same(outcomes: dict[str, Outcome]) -> None:
    assert abs(outcomes["hybrid"].loss - outcomes["draws"].loss) < 0.004


def test_draws_keep_a_student_calibrated_and_truncation_does_not(
    outcomes: dict[str, Outcome],
) -> None:
    assert abs(outcomes["draws"].ece - outcomes["full"].ece) < 0.5
    assert outcomes["top-12"].ece > 3.0 * outcomes["full"].ece
