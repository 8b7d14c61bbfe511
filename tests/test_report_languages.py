"""Languages in a report: named in their own script, ordered by what there was to learn from."""

import html
import re
from typing import Any

import pytest
from report_cases import make_run, measure

from pipeline.report import Comparison, RunReport, TeacherReport, render_page
from pipeline.report.languages import own_name

ROWS = {"eng_Latn": 9_000, "amh_Ethi": 40, "arb_Arab": 700}


def make_languages(label: str, accuracy: float, **rows: dict[str, Any]) -> RunReport:
    """A run measured on three languages, each a little better than the last."""
    metrics = measure(accuracy=accuracy)
    for step, language in enumerate(ROWS):
        metrics += measure(f"language={language}", accuracy=accuracy + step)
    return make_run(label, metrics, details={"training_rows": {"language": rows}} if rows else {})


def list_headings(page: str) -> list[str]:
    """The languages of the first table in their order."""
    return re.findall(r'data-language="(\w+)"', page)[: len(ROWS)]


@pytest.mark.parametrize(
    ("code", "lang", "name"),
    [
        ("arb_Arab", "ar-Arab", "العربية"),
        ("he", "he", "עברית"),
        ("amh_Ethi", "am-Ethi", "አማርኛ"),
        ("npi_Deva", "ne-Deva", "नेपाली"),
        ("khm-Khmr", "km-Khmr", "ខ្មែរ"),
        ("zho_Hans", "zh-Hans", "中文"),
        ("ckb_Arab", "ckb-Arab", "کوردیی ناوەندی"),
        ("pt_BR", "pt", "português"),
    ],
)
def test_a_language_is_named_in_its_own_script_and_direction(code, lang, name):
    assert own_name(code) == f'<bdi class="own-name" lang="{lang}" dir="auto">{name}</bdi>'


def test_an_unknown_language_keeps_its_code_alone():
    assert own_name("xyz_Latn") is None and own_name("") is None
    page = render_page(Comparison([make_run("a", measure("language=xyz", accuracy=1.0))]))
    assert '<th scope="row" data-language="xyz"><bdi dir="auto">xyz</bdi></th>' in page


def test_slices_stand_in_the_order_of_their_training_rows():
    rows = {name: {"rows": count} for name, count in ROWS.items()}
    runs = [make_languages("a", 50.0), make_languages("b", 60.0, **rows)]
    page = render_page(Comparison(runs))
    assert list_headings(page) == ["eng_Latn", "arb_Arab", "amh_Ethi"]
    assert "Those with the most training rows first." in page
    assert page.count("training rows</th>") == 1 and '<td class="rows">9,000</td>' in page
    assert "Draws of an epoch" not in page


def test_rows_that_nobody_tells_or_that_are_all_the_same_order_nothing():
    for rows in ({}, {name: {"rows": 701} for name in ROWS}):
        page = render_page(Comparison([make_languages("a", 50.0, **rows)]))
        assert list_headings(page) == ["amh_Ethi", "arb_Arab", "eng_Latn"]
        assert "training rows" not in page


def test_the_draws_of_sampled_runs_stand_beside_the_rows():
    drawn = {
        name: {"rows": count, "draws": 300 + i} for i, (name, count) in enumerate(ROWS.items())
    }
    runs = [make_languages("plain", 50.0), make_languages("sampled", 60.0, **drawn)]
    table = render_page(Comparison(runs)).split("Draws of an epoch")[1].split("</table>")[0]
    assert "sampled" in table and "plain" not in table
    assert re.findall(r"<td>([\d,]+)</td>", table) == ["9,000", "300", "700", "302", "40", "301"]


def test_the_scale_of_the_shades_runs_from_the_worst_value_to_the_best():
    metrics = measure("language=am", accuracy=31.7, loss=2.0)
    metrics += measure("language=ar", accuracy=68.5, loss=1.5)
    page = render_page(Comparison([make_run("a", metrics)]))
    ends = re.findall(r'class="scale"><span>(.*?)</span><i></i><span>(.*?)</span>', page)
    assert set(ends) == {("31.7", "68.5"), ("2.000", "1.500")}


def test_a_teacher_far_above_does_not_pale_the_students():
    metrics = measure("language=am", accuracy=30.0) + measure("language=ar", accuracy=40.0)
    teacher = TeacherReport("big", 1, measure("language=am", accuracy=95.0))
    page = render_page(Comparison([make_run("a", metrics)], [teacher]))
    assert re.findall(r'style="--v:(\d+)">([\d.]+)', page) == [
        ("100", "95.0"),
        ("0", "30.0"),
        ("100", "40.0"),
    ]


TEXTS = {
    "arb_Arab": ("ar-Arab", "قال العلماء إن النهر 12 كم طولا."),
    "heb_Hebr": ("he-Hebr", "המדענים אמרו: ‎x < 3."),
    "amh_Ethi": ("am-Ethi", "ሳይንቲስቶች ወንዙን ለኩ።"),
    "npi_Deva": ("ne-Deva", "वैज्ञानिकहरूले नदी नापे।"),
    "khm_Khmr": ("km-Khmr", "អ្នកវិទ្យាសាស្ត្រវាស់ទន្លេ។"),
}


def make_excerpt(language: str, prediction: str) -> dict[str, Any]:
    return {
        "language": language,
        "text": TEXTS[language][1],
        "label": "العلوم",
        "prediction": prediction,
        "confidence": 71.4,
    }


def test_texts_stand_in_their_own_language_and_direction_beside_what_was_made_of_them():
    chosen = {"a": "العلوم", "b": "sports"}
    runs = [
        make_run(
            label,
            measure(accuracy=50.0),
            details={"excerpts": [make_excerpt(language, name) for language in TEXTS]},
        )
        for label, name in chosen.items()
    ]
    page = render_page(Comparison([*runs, make_run("c", measure(accuracy=1.0))]))
    section = page.split("Held-out texts")[1].split("</section>")[0]
    for tag, text in TEXTS.values():
        assert f'<p lang="{tag}" dir="auto">{html.escape(text)}</p>' in section
    assert section.count("<td>✓ <bdi") == section.count("<td>✗ <bdi") == len(TEXTS)
    assert '✗ <bdi dir="auto">sports</bdi><span class="unit"> 71</span>' in section
    assert list_headings(section) == sorted(TEXTS)[: len(ROWS)] and ">c</bdi>" not in section


def test_a_page_without_texts_has_no_section_of_them():
    assert "Held-out texts" not in render_page(Comparison([make_languages("a", 50.0)]))
