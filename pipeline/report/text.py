"""Text of any script made safe to print in the middle of other text."""

import unicodedata

_SHOWN = {" ": "·", "\n": "↵", "\t": "→", "\r": "␍"}
_INVISIBLE = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zs", "Zl", "Zp"})
_FIRST_STRONG_ISOLATE, _END_OF_ISOLATE = "\u2068", "\u2069"


def show_invisible(text: str) -> str:
    """White space as signs; control, formatting and unassigned characters as <U+xxxx>.

    So no text can move the terminal's cursor or turn the direction of what follows.
    """
    return "".join(_SHOWN.get(c) or (_escape(c) if _is_invisible(c) else c) for c in text)


def show_running(text: str) -> str:
    """Running text or a name: plain blanks stay, all else as `show_invisible`; isolated."""
    return isolate(" ".join(show_invisible(word) for word in text.split(" ")))


def isolate(text: str) -> str:
    """Text that runs right to left kept apart from its surroundings; other text unchanged."""
    backwards = any(unicodedata.bidirectional(c) in ("R", "AL") for c in text)
    return f"{_FIRST_STRONG_ISOLATE}{text}{_END_OF_ISOLATE}" if backwards else text


def _is_invisible(character: str) -> bool:
    return unicodedata.category(character) in _INVISIBLE


def _escape(character: str) -> str:
    return f"<U+{ord(character):04X}>"
