"""What a teacher says now of some examples, beside what a cache says that it said.

cache, its config.yaml, a model -- asked one example at a time --> Difference: log p, KL, cosine
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.cache import Manifest, TeacherCache, read_bases
from pipeline.config import load_config
from pipeline.errors import CacheError
from pipeline.examples import CachedExample
from pipeline.safe_loading import open_tokenizer
from pipeline.targets import Targets
from pipeline.tasks import TASKS
from pipeline.teacher import Teacher
from stages.asking import make_spec
from stages.cache_teacher import CacheConfig
from stages.naming import require_asked
from stages.quiet import quiet_libraries

# What is expected of the mean KL in nats: by the codec, whose documented worst case is a third of
# it, and by the teacher's dtype, as other batches and devices round otherwise.
_CODEC_KL = {"lossless": 0.0, "steps": 1e-3}
_DTYPE_KL = {"float32": 1e-5, "float16": 1e-3, "bfloat16": 1e-2}
_TARGETS = 256  # compared at a time
_DTYPE_COSINE = {"float32": 1e-4, "float16": 1e-3, "bfloat16": 1e-2}


@dataclass(frozen=True)
class Difference:
    """How far a cache is from its teacher, at T = 1.

    Attributes:
        examples, targets, entries: compared; entries are the kept ones that the teacher has among
            its highest now.
        max_log_prob, mean_log_prob: of |log p now - log p kept|, over the entries, in nats.
        mean_kl, max_kl: over the targets, in nats, of the teacher now from what is kept, with all
            that is not kept as one outcome.
        allowed_kl: what codec and dtype explain of the mean.
        cosine: signal -> the mean cosine of its vectors now with those kept.
        allowed_cosine: the least that its dtype and projection explain.
    """

    examples: int
    targets: int
    entries: int
    max_log_prob: float
    mean_log_prob: float
    mean_kl: float
    max_kl: float
    allowed_kl: float
    cosine: Mapping[str, float]
    allowed_cosine: Mapping[str, float]

    @property
    def outside(self) -> list[str]:
        """What is further away than codec and dtype explain."""
        found = []
        if not self.mean_kl <= self.allowed_kl:
            found.append(f"mean KL {self.mean_kl:.2g}, at most {self.allowed_kl:.2g}")
        for name, cosine in self.cosine.items():
            least = self.allowed_cosine[name]
            if not cosine >= least:
                found.append(f"cosine of {name} {cosine:.5f}, at least {least:.5f}")
        return found

    def dump(self) -> dict[str, Any]:
        """As JSON, with what is outside."""
        return {**asdict(self), "outside": self.outside}


@quiet_libraries()
def ask_again(path: Path, model: str, sample: int, seed: int) -> Difference:
    """Ask a teacher about some examples of a cache.

    Args:
        model: a folder, or a name on the hub.
        sample: examples, drawn with the seed.

    Raises:
        CacheError: the cache does not know how its teacher was asked.
        StillroomError: the teacher cannot be loaded, or does not fit the cache.
    """
    cache = TeacherCache.open(path)
    require_asked(cache)
    if not (path / "config.yaml").is_file():
        raise CacheError(
            f"{path}: has no config.yaml, so nobody knows how its teacher was asked; verify it"
            " without --teacher"
        )
    manifest = cache.manifest
    config = load_config(CacheConfig, path / "config.yaml")
    # The file may be a stranger's: its settings are taken, its code and its revision are not.
    asked = {"model": model, "revision": None, "trust_remote_code": False, "device": "auto"}
    teacher_config = config.teacher.model_copy(update=asked)
    task = TASKS[str(manifest.task["name"])].model_validate(manifest.task)
    teacher = Teacher.load(teacher_config, task, manifest.num_classes)
    kept = manifest.layout.top_k
    wide = {"top_k": min(manifest.num_classes, 2 * kept + 16), "tail_draws": 0}
    targets = manifest.targets.model_copy(update=wide)
    spec = make_spec(config.model_copy(update={"targets": targets}), teacher)
    pad_id = open_tokenizer(cache.tokenizer_path).pad_token_id or 0
    known = np.asarray(cache.answered)
    rows = np.random.default_rng(seed).choice(known, min(sample, len(known)), replace=False)
    pairs = []
    for row in np.sort(rows).tolist():
        example = cache[row]
        batch = task.batch([example], pad_id, manifest.positions)
        captured = teacher.capture(
            batch.inputs, batch.target_index, batch.feature_index, batch.examples, spec
        )
        pairs.append((example, captured.examples()[0]))
    dtype = str(teacher.model.dtype).removeprefix("torch.")
    return _compare(path, manifest, pairs, dtype)


def _compare(
    path: Path,
    manifest: Manifest,
    pairs: Sequence[tuple[CachedExample, CachedExample]],
    dtype: str,
) -> Difference:
    found = [_compare_targets(kept.targets, now.targets) for kept, now in pairs]
    gaps = torch.cat([gap for gap, _ in found])
    divergences = torch.cat([kl for _, kl in found])
    cosine = _compare_signals(path, manifest, pairs)
    lost = {n: 1 - m.cosine if (m := manifest.fidelity.get(n)) else 0.0 for n in cosine}
    allowed = {n: 1 - 1.5 * share - _DTYPE_COSINE.get(dtype, 1e-2) for n, share in lost.items()}
    return Difference(
        examples=len(pairs),
        targets=len(divergences),
        entries=len(gaps),
        max_log_prob=float(gaps.max()) if len(gaps) else 0.0,
        mean_log_prob=float(gaps.mean()) if len(gaps) else 0.0,
        mean_kl=float(divergences.mean()) if len(divergences) else 0.0,
        max_kl=float(divergences.max()) if len(divergences) else 0.0,
        allowed_kl=_CODEC_KL[manifest.targets.codec.name] + _DTYPE_KL.get(dtype, 1e-2),
        cosine=cosine,
        allowed_cosine=allowed,
    )


def _compare_signals(
    path: Path, manifest: Manifest, pairs: Sequence[tuple[CachedExample, CachedExample]]
) -> dict[str, float]:
    """The mean cosine of the vectors of each signal, reconstructed where they were projected."""
    bases = read_bases(path, manifest.projections) if manifest.projections else {}
    found = {}
    for name in manifest.signals:
        angles = []
        for kept, now in pairs:
            vectors = kept.hidden[name]
            if name in bases:
                vectors = bases[name].reconstruct(vectors)
            angles.append(torch.cosine_similarity(vectors, now.hidden[name].float(), dim=1))
        joined = torch.cat(angles)
        if len(joined):
            found[name] = float(joined.mean())
    return found


def _compare_targets(kept: Targets, now: Targets) -> tuple[Tensor, Tensor]:
    """[entries] |Δ log p|, and [N] KL of the teacher now from what is kept."""
    said, says = _log_probs(kept), _log_probs(now)
    live = torch.empty_like(said)
    for start in range(0, len(said), _TARGETS):  # all V classes of so many at a time
        part = slice(start, start + _TARGETS)
        table = torch.full((len(said[part]), now.num_classes), torch.nan, dtype=says.dtype)
        live[part] = table.scatter(1, now.ids[part], says[part]).gather(1, kept.ids[part])
    known = ~live.isnan()
    # A kept class that is not among the highest any more is less probable than all of them.
    live = torch.where(known, live, says.min(dim=1, keepdim=True).values)
    gaps = (live - said).abs()[known]
    p, q = live.exp(), said.exp()
    rest_p, rest_q = ((1 - mass.sum(dim=1)).clamp(min=1e-9) for mass in (p, q))
    divergence = (p * (live - said)).sum(dim=1) + rest_p * (rest_p / rest_q).log()
    return gaps, divergence.clamp(min=0)


def _log_probs(targets: Targets) -> Tensor:
    """[N, K] log p at T = 1, float64."""
    at = list(targets.temperatures).index(1.0)
    logs: Tensor = targets.logits.double() - targets.logsumexp[:, at : at + 1].double()
    return logs
