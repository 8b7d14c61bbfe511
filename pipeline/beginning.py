"""A run begins: in a folder that fits its config, and in which nobody else is at work.

finished? -- left as it is
no        -- lock --> config.yaml, identity.json --> Place --> training --> the lock goes

Of processes that train one model together the first holds the lock; the others belong to it.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
import transformers

from pipeline.config import StrictModel
from pipeline.errors import LockError, StillroomError
from pipeline.locking.locks import LOCKS, Occupant, occupy
from pipeline.resuming import check_run_folder, is_finished

_OTHERWISE = "choose another output"


class Place(transformers.TrainerCallback):  # type: ignore[misc]  # ships without types
    """This process's place in a run's folder; as a callback, it ends a training that has lost it.

    A process that slept may have been taken for dead by one of another machine, which goes on with
    the run: whatever it writes from then on would be written over the other one's.
    """

    def __init__(self, here: Occupant | None) -> None:
        """Take a place.

        Args:
            here: in the folder; None where another process holds it for this one.
        """
        self._here = here

    def require(self) -> None:
        """Make sure that the folder is still this run's own.

        Raises:
            LockError: another process works there now.
        """
        if self._here is not None:
            self._here.require()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Before anything is logged or saved."""
        self.require()


@contextmanager
def begin_run(
    output: Path,
    config: StrictModel,
    purpose: str,
    plan: Callable[[], transformers.TrainingArguments],
    lineage: Mapping[str, str] | None = None,
    tasks: Collection[str] = (),
    tell: Callable[[str], object] = lambda line: None,
) -> Iterator[Place | None]:
    """Keep the folder of a run for the block; None where the run is finished, and left as it is.

    Args:
        purpose: the command.
        plan: how it will train, asked where it is not finished: it says which of several processes
            this is, for which they have to find one another.
        lineage, tasks: see `is_finished`.
        tell: given one line for each dead process whose place is taken.

    Raises:
        LockError: another process trains there, or the folder cannot be written.
        StillroomError: as `is_finished`.
    """
    if is_finished(output, config, lineage, tasks):
        check_run_folder(output, config, lineage, tasks)
        _remove_locks(output, purpose)
        yield None
        return
    args = plan()
    with ExitStack() as stack:

        def enter() -> Place | None:
            here = stack.enter_context(occupy(output, purpose, tell=tell, otherwise=_OTHERWISE))
            return None if check_run_folder(output, config, lineage, tasks) else Place(here)

        if args.world_size > 1:
            yield _follow(enter, args.process_index == 0)
        else:
            yield enter()


def _follow(enter: Callable[[], Place | None], first: bool) -> Place | None:
    """The first process enters, and all go on with what came of it."""
    place: Place | None = None
    came: list[Any] = [None]  # of it: an error, or whether there is anything to do
    if first:
        try:
            place = enter()
            came = [place is not None]
        except (StillroomError, OSError) as error:
            came = [error]
    torch.distributed.broadcast_object_list(came, src=0)
    if isinstance(came[0], Exception):
        raise came[0]
    return place or (Place(None) if came[0] else None)


def _remove_locks(output: Path, purpose: str) -> None:
    """Remove those of the dead from a finished run; one that cannot be written keeps them."""
    if (output / LOCKS).exists():
        with suppress(LockError, OSError), occupy(output, purpose):
            pass
