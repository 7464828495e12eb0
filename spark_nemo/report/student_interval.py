"""Student's 95% interval of a mean over a few seeds."""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt

# Two-sided 95% quantiles of Student's t for 1 to 30 degrees of freedom.
# fmt: off
_T_95 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228,
    2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086,
    2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)
# fmt: on


def mean_and_half_width(values: Sequence[float]) -> tuple[float, float | None]:
    """Return the mean and the half-width of its interval, None with fewer than two values."""
    count = len(values)
    mean = sum(values) / count
    if count < 2:
        return mean, None
    deviation = sqrt(sum((value - mean) ** 2 for value in values) / (count - 1))
    return mean, _t_95(count - 1) * deviation / sqrt(count)


def _t_95(degrees: int) -> float:
    """Look up or approximate the quantile for this many degrees of freedom."""
    if degrees <= len(_T_95):
        return _T_95[degrees - 1]
    # The first terms of the expansion in 1 / degrees (Abramowitz and Stegun, 26.7.5).
    z = 1.959964
    return z + (z**3 + z) / (4 * degrees) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * degrees**2)
