"""Kill and starve every stage at every file operation, and see that nothing finished is lost.

    world -- make_scenes --> Scene -- Rack, at many points --> Report

`python -m tests.torture --points 100` stops each scene a hundred times, `--all` at every operation
in every way. Torch is imported once: each start is a fork.
"""

import argparse
import os
import random
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]
os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}

import torch  # noqa: E402
import tqdm  # noqa: E402
from torture_rack import Rack, Report  # noqa: E402
from torture_scenes import make_scenes  # noqa: E402
from torture_syscalls import can_watch  # noqa: E402
from torture_views import make_view_scenes  # noqa: E402

_AT_A_TIME = 0.15  # how many of the stops are kills at a time, wherever the process is


def torture(
    root: Path, points: int | None, seed: int, timed: float, chosen: Sequence[str] = ()
) -> Iterator[Report]:
    """Try the scenes of these names, or all; see the module.

    Args:
        points: stops on each scene, None for all that there are.
        timed: share of the stops that come at a random time, which no seed repeats.
    """
    watched = can_watch()
    if not watched:
        print("torture: no system calls are handed over here; killed at random times only")
    scenes = make_scenes(root)
    for number, scene in enumerate([*scenes, *make_view_scenes(root, scenes[0])]):
        wanted = not chosen or scene.name in chosen
        if wanted or number == 0:  # the others begin with the cache of the first
            rack = Rack(scene, root / "log", random.Random(f"{seed}/{scene.name}"), watched, timed)
        if wanted:
            if watched:
                rack.try_slow()
            if points is None and watched:
                rack.try_all()
            else:
                rack.try_some(points or 1000)
            yield rack.report


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--points", type=int, default=100, help="stops on each scene")
    parser.add_argument("--all", action="store_true", help="every operation in every way")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--timed", type=float, default=_AT_A_TIME, help="share at random times")
    parser.add_argument("--scene", action="append", default=[], help="by name; repeatable")
    options = parser.parse_args()
    points = None if options.all else options.points
    torch.set_num_threads(1)
    tqdm.tqdm.monitor_interval = 0  # no thread beside, which a fork would lose
    began, losses = time.perf_counter(), 0
    with tempfile.TemporaryDirectory() as folder:
        os.environ["HF_HOME"] = str(Path(folder) / "hf")
        for report in torture(Path(folder), points, options.seed, options.timed, options.scene):
            print(report, flush=True)
            for loss in report.losses:
                print(f"  {loss}")
            losses += len(report.losses)
    print(f"torture: {time.perf_counter() - began:.0f} s, {losses} losses")
    sys.stdout.flush()
    os._exit(losses > 0)  # the libraries have much to say when they are left


if __name__ == "__main__":
    main()
