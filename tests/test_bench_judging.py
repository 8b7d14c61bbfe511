"""Goals are read as they are written."""

import pytest

from pipeline.errors import ConfigError
from stages.bench.judging import judge


@pytest.mark.parametrize(
    ("goal", "unit", "measured", "ratio", "reached"),
    [
        ("≤ 0.85", "ms", 400.0, 0.85, True),
        ("≤ 0.85", "ms", 0.1, 0.86, False),
        ("≥ 0.95", "tokens/s", 9000.0, 0.949, False),
        ("≥ 0.95", "tokens/s", 9000.0, 1.2, True),
        ("5 M", "tokens/s", 5.1e6, 0.1, True),
        ("5 M", "tokens/s", 4.9e6, 9.0, False),
        ("1,000", "MB/s", 1200.0, None, True),
        ("300 µs", "µs", 299.0, 9.0, True),
        ("1 s", "ms", 1001.0, 0.1, False),
        ("≤ 100 B", "bytes/target", 91.8, 2.0, True),
        ("≤ 3e-4", "", 3.1e-4, None, False),
        ("≤ 0", "", 0.0, None, True),
        ("", "s", 1.0, 1.0, None),
    ],
)
def test_a_goal_is_of_the_ratio_or_of_the_measurement(
    goal: str, unit: str, measured: float, ratio: float | None, reached: bool | None
) -> None:
    assert judge(goal, unit, measured, ratio) is reached


def test_a_goal_that_cannot_be_judged_is_refused() -> None:
    with pytest.raises(ConfigError, match="'fast': not a sign"):
        judge("fast", "ms", 1.0, 1.0)
