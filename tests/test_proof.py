"""The arithmetic of the proof's table."""

import math

from pipeline.metrics import Metric
from pipeline.runs import Result
from stages.proof import METRICS, distance, tabulate


def _result(loss: float) -> Result:
    metrics = [Metric(name, loss, "", "lower") for name in METRICS]
    return Result("x", "student", "causal-lm", {}, {}, {}, {}, metrics)


def test_the_distance_is_in_standard_deviations_of_single_runs() -> None:
    assert math.isclose(distance([5.0, 5.2, 5.4], [4.0, 4.2, 4.4]), 1.0 / 0.2)
    assert distance([4.0, 4.2], [5.0, 5.2]) < 0


def test_the_table_holds_means_and_deviations() -> None:
    found = {"labels": [_result(5.0), _result(5.2)], "kd": [_result(4.0), _result(4.2)]}
    lines = tabulate(found)
    assert lines[2].startswith("| labels | 5.100 ± 0.141 |")
    assert lines[3].startswith("| kd | 4.100 ± 0.141 |")
    assert lines[3].endswith("| 7.1 sd |")
