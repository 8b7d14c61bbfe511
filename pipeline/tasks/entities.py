"""Entities in tagged words, found and counted as the CoNLL evaluation does.

tags of a sentence -> find_entities -> {(kind, first, last)} -> F1 over all sentences

Tjong Kim Sang & De Meulder 2003. Tags are B-, I- and O (IOB2), with E- and S- (IOBES) or L- and U-
(BILOU); a tag that breaks its scheme still begins or continues an entity, as in conlleval.
"""

import re
from collections.abc import Iterable, Iterator, Sequence

Entity = tuple[str, int, int]  # kind, first and last word

_TAG = re.compile(r"O|[BIESLU]-.+")
_BEGINS, _ENDS = "BSU", "ESLU"


def mark_entities(labels: Iterable[str]) -> bool:
    """Whether labels are tags of entities: nothing but O and prefixed kinds, one B- or I- at
    least."""
    names = list(labels)
    known = all(_TAG.fullmatch(name) for name in names)
    return known and any(name.startswith(("B-", "I-")) for name in names)


def find_entities(tags: Sequence[str]) -> Iterator[Entity]:
    """The entities of one sentence, in order."""
    start, before = None, "O"
    for word, tag in enumerate([*tags, "O"]):
        ends = tag == "O" or _begins(tag, before)
        if start is not None and ends:
            yield before[2:], start, word - 1
            start = None
        if tag != "O" and ends:
            start = word
        before = tag


def entity_f1(pairs: Iterable[tuple[Sequence[str], Sequence[str]]]) -> float | None:
    """Micro-averaged F1 in percent of exactly matched entities; None where there are none.

    Args:
        pairs: of each sentence the true and the predicted tags.
    """
    hits = total = 0
    for true, predicted in pairs:
        expected, found = set(find_entities(true)), set(find_entities(predicted))
        hits += len(expected & found)
        total += len(expected) + len(found)
    return 200.0 * hits / total if total else None


def _begins(tag: str, before: str) -> bool:
    """Whether a tag other than O begins an entity after another tag."""
    return tag[0] in _BEGINS or before == "O" or before[0] in _ENDS or tag[2:] != before[2:]
