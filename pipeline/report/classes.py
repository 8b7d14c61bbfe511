"""What a classifier found and confused, class by class, as the task's details tell it.

details["classification_report"], details["confusion_matrix"] -> F1 per class, a fold per model
"""

from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.report.markup import Html, element, join, text_in_own_direction
from pipeline.report.model import Comparison
from pipeline.report.sections import heat_class, run_headings, scrolling
from pipeline.report.slices import heat_cell, shades

REPORT = "classification_report"
SHARES = (("precision", "Precision"), ("recall", "Recall"), ("f1", "F1"))
Details = tuple[str, Mapping[str, Any]]  # a model and what its task found besides metrics


def classes_section(comparison: Comparison) -> Html:
    """F1 per class, teachers first, then each model's report and confusion matrix, folded."""
    found: list[Details] = [(t.label, t.details) for t in comparison.teachers]
    found += [(run.label, run.result.details) for run in comparison.runs]
    models = [(label, details) for label, details in found if details.get(REPORT)]
    if not models:
        return Html("")
    lead = (
        "F1 in %; the stronger the shade, the better. Below, each model's full report and what it"
        " confused."
    )
    return element(
        "section",
        element("h2", "By class"),
        element("p", lead, class_="lead"),
        _f1_table(comparison, models),
        *(_model_details(label, details) for label, details in models),
    )


def _f1_table(comparison: Comparison, models: Sequence[Details]) -> Html:
    reports = [details[REPORT] for _, details in models]
    names = list(dict.fromkeys(name for report in reports for name in report))
    values = [[_share(report, name, "f1") for report in reports] for name in names]
    body = [
        element(
            "tr",
            element("th", text_in_own_direction(name), scope="row"),
            *(heat_cell(_percent(v), s) for v, s in zip(row, shaded, strict=True)),
        )
        for name, row, shaded in zip(names, values, shades(values), strict=True)
    ]
    headings = run_headings(comparison, [label for label, _ in models])
    head = element("tr", element("th", "class", scope="col"), *headings)
    heat = heat_class(len(models))
    return scrolling(element("thead", head), element("tbody", *body), class_=heat)


def _model_details(label: str, details: Mapping[str, Any]) -> Html:
    parts = [_report_table(details[REPORT])]
    confusion = details.get("confusion_matrix")
    if confusion:
        parts.append(_confusion_table(confusion["labels"], confusion["counts"]))
    summary = element("summary", text_in_own_direction(label))
    return element("details", summary, element("div", *parts, class_="pair"))


def _report_table(report: Mapping[str, Mapping[str, Any]]) -> Html:
    titles = ["", *(title for _, title in SHARES), "Support"]
    head = element("tr", *(element("th", title, scope="col") for title in titles))
    body = [
        element(
            "tr",
            element("th", text_in_own_direction(name), scope="row"),
            *(element("td", _percent(found[share])) for share, _ in SHARES),
            element("td", f"{found['support']:,}"),
        )
        for name, found in report.items()
    ]
    note = element("p", "Classification report, %", class_="axis-name")
    table = scrolling(element("thead", head), element("tbody", *body), class_="narrow")
    return element("div", note, table)


def _confusion_table(labels: Sequence[str], counts: Sequence[Sequence[int]]) -> Html:
    """Shaded by the share of the label's examples; columns are numbered to stay narrow."""
    numbers = range(1, len(labels) + 1)
    head = [element("th", "", scope="col")]
    head += [
        element("th", str(n), scope="col", title=name)
        for n, name in zip(numbers, labels, strict=True)
    ]
    body = []
    for number, name, row in zip(numbers, labels, counts, strict=True):
        heading = join(f"{number}  ", text_in_own_direction(name))
        total = max(sum(row), 1)
        cells = [heat_cell(f"{count:,}", 100 * count / total) for count in row]
        body.append(element("tr", element("th", heading, scope="row"), *cells))
    note = element("p", "Rows: the label. Columns: what was predicted.", class_="axis-name")
    table = scrolling(
        element("thead", element("tr", *head)), element("tbody", *body), class_="heat confusion"
    )
    return element("div", note, table)


def _share(report: Mapping[str, Mapping[str, Any]], name: str, share: str) -> float | None:
    return float(report[name][share]) if name in report else None


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"
