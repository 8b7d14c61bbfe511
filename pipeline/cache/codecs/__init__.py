"""How the entries of a target become the columns of a file, and back.

Codec   base      steps      levels of the fourth root of p: small, with a bound on the error
                  lossless   the teacher's numbers bit for bit
        planes    ids as differences, integers as byte planes
            ranking   ids numbered by how often a shard keeps them
"""

from pipeline.cache.codecs.base import MAX_CLASSES, Codec, Columns, Decoded, Entries, Find, Layout
from pipeline.cache.codecs.lossless import Lossless
from pipeline.cache.codecs.ranking import Ranking
from pipeline.cache.codecs.steps import Steps

__all__ = [
    "CODECS",
    "MAX_CLASSES",
    "Codec",
    "Columns",
    "Decoded",
    "Entries",
    "Find",
    "Layout",
    "Lossless",
    "Ranking",
    "Steps",
]

CODECS: dict[str, type[Codec]] = {"steps": Steps, "lossless": Lossless}
