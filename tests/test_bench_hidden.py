"""The bench of hidden states: every way is measured on the same vectors, by the real writer."""

import json
from io import StringIO

import pytest
from rich.console import Console
from small_teachers import make_llama, save_teacher

from pipeline.cache.signals.quantization import ENCODINGS
from stages.bench.hidden import Choice, list_choices, measure_choices, show_choices
from stages.bench.setting import BenchConfig, prepare

WIDTH = 32  # of the small teacher


@pytest.fixture(scope="module")
def choices(tmp_path_factory: pytest.TempPathFactory) -> list[Choice]:
    root = tmp_path_factory.mktemp("hidden")
    teacher = save_teacher(root / "teacher", make_llama(vocab_size=300))
    config = BenchConfig(teacher=teacher, files=1, block_size=64, reads=1)
    return measure_choices(prepare(config, root))


def pick(choices: list[Choice], dtype: str, projection: str = "") -> Choice:
    [found] = [c for c in choices if (c.dtype, c.projection) == (dtype, projection)]
    return found


def test_every_dtype_and_every_kind_of_projection_is_measured(choices: list[Choice]) -> None:
    assert {choice.dtype for choice in choices if not choice.projection} == set(ENCODINGS)
    projections = {choice.projection for choice in choices}
    assert projections == {"", "pca 16", "pca 8", "random 8"}
    assert len({choice.fidelity.rows for choice in choices}) == 1


def test_bytes_are_those_of_the_numbers(choices: list[Choice]) -> None:
    numbers = {"float32": 4 * WIDTH, "float16": 2 * WIDTH, "bfloat16": 2 * WIDTH, "int8": WIDTH + 4}
    found = {dtype: pick(choices, dtype).bytes for dtype in numbers}
    assert all(found[dtype] > size for dtype, size in numbers.items())
    assert found["float32"] > found["float16"] == found["bfloat16"] > found["int8"]


def test_fewer_bits_and_fewer_components_are_further_from_the_teacher(
    choices: list[Choice],
) -> None:
    exact = pick(choices, "float32").fidelity
    assert (exact.cosine, exact.relative_mse, exact.cka) == (1.0, 0.0, 1.0)
    order = [("float16", ""), ("int8", ""), ("int8", "pca 16"), ("int8", "pca 8")]
    errors = [pick(choices, *choice).fidelity.relative_mse for choice in order]
    assert errors == sorted(errors) and 0 < errors[0] < errors[-1] < 1
    random = pick(choices, "int8", "random 8").fidelity.relative_mse
    assert errors[-1] < random


def test_what_is_printed_is_what_is_written(choices: list[Choice]) -> None:
    printed = StringIO()
    show_choices(choices, Console(file=printed, width=100))
    for entry in json.loads(json.dumps(list_choices(choices))):
        cosine = f"{entry['fidelity']['cosine']:.5f}"
        lines = [line for line in printed.getvalue().splitlines() if cosine in line]
        assert any(entry["dtype"] in line and entry["projection"] in line for line in lines)
