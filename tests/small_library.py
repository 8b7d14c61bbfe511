"""A made-up library of Python files: names that follow one another by chance, in a few ways each.

What comes next depends on the last name alone, so a tiny model learns it at once; but no short text
tells the chances well, and a teacher that read many texts does.
"""

import random
from pathlib import Path

_NAMES = "abcdefghijklmnopqrstuvwxyz"
_FOLLOWERS, _LENGTH = 5, 400


def write_library(folder: Path, files: int = 100) -> Path:
    """Write the files and return their folder; their names deal them to the splits."""
    folder.mkdir(parents=True)
    table = random.Random(0)
    followers = {name: table.sample(_NAMES, _FOLLOWERS) for name in _NAMES}
    for number in range(files):
        chance = random.Random(f"file {number}")
        name, names = chance.choice(_NAMES), ["#"]
        for _ in range(_LENGTH):
            names.append(name)
            name = chance.choices(followers[name], weights=range(_FOLLOWERS, 0, -1))[0]
        (folder / f"module_{number}.py").write_text(" ".join(names) + "\n", encoding="utf-8")
    return folder
