"""HTML that is escaped by construction: text becomes markup in one place, `element`.

text -> element(...) -> Html -> element(...) -> Html -> page
"""

from html import escape

# Control characters, halves of letters, and what turns the direction of the text that follows.
_UNSEEN = (*range(9), 11, 12, *range(14, 32), *range(127, 160), *range(0x202A, 0x202F))
_SHOWN = {code: f"<U+{code:04X}>" for code in (*_UNSEEN, 0x2066, 0x2067, *range(0xD800, 0xE000))}
VOID = frozenset({"meta", "input", "line", "circle", "path", "polyline", "rect", "br"})


class Html(str):
    """Markup that is safe to show as it is; any other str is text and will be escaped."""

    __slots__ = ()


def element(tag: str, *children: str, **attributes: object) -> Html:
    """`<tag attributes>children</tag>`; children that are not Html are escaped.

    An attribute's trailing underscore is dropped and other underscores become hyphens (class_,
    data_x); one whose value is None is left out, one whose value is True has no value.
    """
    written = "".join(_attribute(name, value) for name, value in attributes.items())
    if tag in VOID and not children:
        return Html(f"<{tag}{written}>" if tag in ("meta", "input", "br") else f"<{tag}{written}/>")
    return Html(f"<{tag}{written}>{join(*children)}</{tag}>")


def join(*parts: str) -> Html:
    """The parts one after the other; those that are not Html are escaped."""
    return Html("".join(p if isinstance(p, Html) else _escape(p) for p in parts))


def text_in_own_direction(text: str) -> Html:
    """Text of unknown script: isolated, and laid out from its own first strong character."""
    return element("bdi", text, dir="auto")


def _attribute(name: str, value: object) -> str:
    if value is None or value is False:
        return ""
    written = name.rstrip("_").replace("_", "-")
    return f" {written}" if value is True else f' {written}="{_escape(str(value))}"'


def _escape(text: str) -> str:
    """Text that neither ends its element nor reaches beyond it unseen."""
    return escape(text.translate(_SHOWN))
