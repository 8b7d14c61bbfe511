"""Answers on their way to the CPU: a GPU goes on while they are copied.

device tensors -- start_copy --> pinned memory + event -- examples() --> [CachedExample]
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from pipeline.errors import NumericalError
from pipeline.examples import CachedExample, Example
from pipeline.targets import Targets


@dataclass(frozen=True)
class Captured:
    """The answers to one batch; the CPU must not read them before `examples()` has waited.

    Attributes:
        targets: of all examples, one after another.
        hidden: signal -> [M, D], of all examples one after another; "pooled" -> [B, D].
        batch: the examples.
        features: of each example, the rows that it has in a signal other than "pooled".
        copied: set once the copy is complete; None where there was nothing to wait for.
    """

    targets: Targets
    hidden: Mapping[str, Tensor]
    batch: Sequence[Example]
    features: Sequence[int]
    copied: torch.cuda.Event | None

    @staticmethod
    def start_copy(
        targets: Targets,
        hidden: Mapping[str, Tensor],
        batch: Sequence[Example],
        features: Sequence[int],
    ) -> "Captured":
        """Start the copy of a batch's answers; it does not wait for the device."""
        moved: dict[str, Any] = {
            field.name: _start_copy(value)
            for field in fields(targets)
            if isinstance(value := getattr(targets, field.name), Tensor)
        }
        states = {name: _start_copy(tensor) for name, tensor in hidden.items()}
        copied = None
        if targets.logsumexp.is_cuda:
            copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            copied.record(torch.cuda.current_stream(targets.logsumexp.device))
        return Captured(replace(targets, **moved), states, batch, features, copied)

    def examples(self, lenient: bool = False) -> list[CachedExample]:
        """Wait for the copy and give each example its part.

        Args:
            lenient: give numbers that are none as they are.

        Raises:
            NumericalError: the teacher's logits for an example are NaN or infinite.
        """
        if self.copied is not None:
            self.copied.synchronize()
        counts = [len(example.target_positions) for example in self.batch]
        if not lenient:
            self._require_finite(counts)
        signals = {name: self._split(name) for name in self.hidden}
        found, start = [], 0
        for row, (example, count) in enumerate(zip(self.batch, counts, strict=True)):
            found.append(
                CachedExample(
                    **{f.name: getattr(example, f.name) for f in fields(Example)},
                    targets=self.targets.select(slice(start, start + count)),
                    hidden={name: parts[row] for name, parts in signals.items()},
                )
            )
            start += count
        return found

    def _split(self, name: str) -> Sequence[Tensor]:
        """The rows of a signal by example."""
        return torch.split(self.hidden[name], 1 if name == "pooled" else list(self.features))

    def _require_finite(self, counts: Sequence[int]) -> None:
        finite = self.targets.logsumexp.isfinite().all(dim=1)
        if bool(finite.all()):
            return
        row = int(finite.logical_not().nonzero()[0])
        for example, count in zip(self.batch, counts, strict=True):
            if row < count:
                raise NumericalError(
                    f"example {example.example_id!r}: the teacher's logits at position"
                    f" {int(example.target_positions[row])} are NaN or infinite; try another"
                    " teacher.dtype (bfloat16 or float32), or on_error: skip"
                )
            row -= count


def _start_copy(tensor: Tensor) -> Tensor:
    if not tensor.is_cuda:
        return tensor
    pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return pinned.copy_(tensor, non_blocking=True)
