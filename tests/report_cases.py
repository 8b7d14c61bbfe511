"""Made-up runs, a teacher and a cache to be reported, and what a browser makes of a page."""

from collections.abc import Mapping, Sequence
from html.parser import HTMLParser
from typing import Any

from pipeline.metrics import Direction, Metric
from pipeline.report import CacheReport, Comparison, RunReport, TeacherReport
from pipeline.runs import Result

UNITS: dict[str, tuple[str, Direction]] = {
    "loss": ("nats/token", "lower"),
    "perplexity": ("", "lower"),
    "agreement": ("%", "higher"),
    "accuracy": ("%", "higher"),
    "macro_f1": ("%", "higher"),
    "entity_f1": ("%", "higher"),
    "exact_match": ("%", "higher"),
    "f1": ("%", "higher"),
    "ece": ("%", "lower"),
}
KD = {"name": "forward_kl", "weight": 0.9, "temperature": 1.0}
CE = {"name": "cross_entropy", "weight": 1.0}
HOSTILE = "<script>alert(1)</script>\"'&\x00\x1b[2J\x9b\u202e"


def measure(slice: str = "all", **values: float) -> list[Metric]:
    return [Metric(name, value, *UNITS[name], slice) for name, value in values.items()]


def make_run(
    label: str,
    metrics: Sequence[Metric],
    losses: Sequence[Mapping[str, Any]] = (KD, CE),
    **changes: Any,
) -> RunReport:
    fields: dict[str, Any] = {
        "name": label,
        "kind": "student",
        "task": "causal-lm",
        "config": {"cache": "caches/demo", "output": f"runs/{label}", "losses": list(losses)},
        "identity": {"cache": "digest-1"},
        "model": {"architecture": "llama", "parameters": 610_000},
        "training": {
            "steps": 800,
            "examples_seen": 12_000,
            "tokens_seen": 3_000_000,
            "seconds": 71.25,
            "device": "cpu",
        },
        "metrics": list(metrics),
        "details": {},
    }
    curve = changes.pop("curve", [])
    return RunReport(label, Result(**{**fields, **changes}), curve)


TEACHER = TeacherReport("demo", 4_200_000, measure(loss=2.85, agreement=100.0))
CACHE = CacheReport(
    path="caches/demo",
    digest="digest-1",
    examples=4_000,
    tokens=1_000_000,
    targets=900_000,
    capture_seconds=40.0,
    forward_seconds=20.0,
    bytes=78_000_000,
    column_bytes={"ids": 30_000_000, "logits": 40_000_000},
)


def three_runs() -> list[RunReport]:
    curve = [
        {"step": 50 * i, "epoch": i, "split": "eval", "seconds": 10.0 * i, "loss": 6.5 - 0.317 * i}
        for i in range(9)
    ]
    return [
        make_run("labels", measure(loss=4.27, agreement=31.25), [CE], curve=curve),
        make_run("distilled", measure(loss=3.67, agreement=42.5), curve=curve),
        make_run(
            "larger",
            measure(loss=3.41, agreement=49.0),
            model={"parameters": 1_420_000},
            curve=curve,
        ),
    ]


def three_students() -> Comparison:
    return Comparison(three_runs(), [TEACHER], [CACHE])


class PageParser(HTMLParser):
    """Collects what a browser would load or run, and the text it would show."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.shown: list[str] = []
        self.open: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        while self.open and self.open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if not {"script", "style"} & set(self.open):
            self.shown.append(data)

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]
