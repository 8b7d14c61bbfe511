"""The batches that one rank trains on, epoch after epoch.

Selection -> StepSampler (which rows, in which order) -> DataLoader -> Collator -> batch
"""

from typing import Any

from torch.utils.data import DataLoader
from transformers import TrainerCallback, TrainingArguments

from pipeline.batches import Collator, Selection, StepSampler
from pipeline.lockstep import Seat


def load_batches(
    train: Selection,
    collator: Collator,
    args: TrainingArguments,
    batch_size: int,
    first_epoch: int = 0,
    seat: Seat | None = None,
) -> DataLoader[Any]:
    """This rank's share of every batch.

    Args:
        batch_size: examples of one rank's batch.
        first_epoch: whose order comes first.
        seat: among students that read their batches together.
    """
    sampler = StepSampler(
        train.deal or len(train),
        batch_size,
        args.seed,
        args.process_index,
        args.world_size,
        args.dataloader_drop_last,
        first_epoch,
        train.read_ahead if train.is_remote else None,
    )
    examples: Any = train
    collate: Any = collator
    if seat is not None:
        examples, collate = seat.shared.view(train, collator)
    return DataLoader(
        examples,
        batch_sampler=sampler,
        collate_fn=collate,
        num_workers=args.dataloader_num_workers,
        pin_memory=args.dataloader_pin_memory,
        persistent_workers=args.dataloader_persistent_workers,
        prefetch_factor=args.dataloader_prefetch_factor,
    )


class SetEpoch(TrainerCallback):  # type: ignore[misc]  # ships without types
    """Tell the sampler the epoch."""

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        kwargs["train_dataloader"].batch_sampler.set_epoch(int(state.epoch or 0))
