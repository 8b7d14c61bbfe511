"""Whether a measurement reaches its goal.

    "≤ 0.85", "≥ 0.95"                       of the ratio, where there is one
    "≤ 100 B", "≥ 5 M", "5 M", "300 µs"      of the measurement, in its unit or one named here

Without a sign a rate has to be as high, anything else as low.
"""

import re

from pipeline.errors import ConfigError

_FORM = re.compile(r"^([≤≥]?)\s*([\d.,]+(?:e-?\d+)?)\s*(\S*)$")
_SCALES = {"M": 1e6, "k": 1e3}
_SECONDS = {"s": 1.0, "ms": 1e-3, "µs": 1e-6}


def judge(goal: str, unit: str, measured: float, ratio: float | None) -> bool | None:
    """Tell whether a goal is reached; None where there is none.

    Args:
        goal: as above, or empty.
        unit: of `measured`, for instance tokens/s or ms.
        ratio: measured over baseline.

    Raises:
        ConfigError: the goal is not of these forms.
    """
    if not goal:
        return None
    found = _FORM.match(goal)
    if found is None:
        raise ConfigError(f"goal {goal!r}: not a sign, a number and a unit, like '≤ 300 µs'")
    sign, digits, scale = found.groups()
    wanted, value = float(digits.replace(",", "")), ratio
    if scale or not sign or value is None:
        value = measured
        wanted *= _SCALES.get(scale, 1.0)
        if scale in _SECONDS and unit in _SECONDS:
            wanted *= _SECONDS[scale] / _SECONDS[unit]
    higher = sign == "≥" or (not sign and unit.endswith("/s"))
    return value >= wanted if higher else value <= wanted
