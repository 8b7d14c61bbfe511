"""What a cache says of targets that no teacher of ours was asked for."""

from typing import Literal

from pydantic import Field, JsonValue

from pipeline.cache.signals.spec import optional
from pipeline.config import StrictModel


class Imported(StrictModel):
    """Where targets come from that somebody else dumped, and what is not known of them.

    Attributes:
        format: of the dump: its name and settings.
        temperature: at which its log-probabilities were made; T = 1 of the cache is this one.
        tail: what the entries leave of 1, or nothing where every row adds up to 1.
        not_known: what the format does not tell.
        rows: counts, see data/README.md.
        origin: of our own plain files: the cache that they were exported from.
    """

    format: dict[str, JsonValue]
    temperature: float = Field(gt=0, allow_inf_nan=False)
    tail: Literal["rest", "none"]
    not_known: list[str]
    rows: dict[str, JsonValue]
    origin: dict[str, JsonValue] | None = optional()

    def describe(self) -> str:
        """One line."""
        tail = "no tail" if self.tail == "none" else "the tail is what the entries leave of 1"
        return f"{self.format.get('name')} · at T = {self.temperature:g} · {tail}"
