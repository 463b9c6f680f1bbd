"""The uncertainty of a score, estimated from a single set of samples.

    jackknife:  v = (g - 1) / g  sum over j of (s_-j - mean of s_-j)^2,   s_-j without the j-th of g groups of rows
    parts:      v = 1 / (g (g - 1))  sum over j of (s_j - mean of s_j)^2,  s_j of the j-th group alone

Efron and Tibshirani, "An Introduction to the Bootstrap" (1993), chapter 11. For smooth functionals of the distribution
of rows, such as moments and sums of kernels, the jackknife is more precise. Counts of neighbours are not smooth and
cost n^2: there disjoint parts are both valid and cheap. A bootstrap would be neither: its repeated rows are neighbours
at distance 0, and bias a Frechet distance upwards.
"""

from collections.abc import Callable, Sequence

import numpy as np

from kdiff.base import check_number, needs

__all__ = ["groups_of", "half_width", "jackknife_variance", "parts_variance"]


def groups_of(count: int, groups: int, seed: int = 0) -> list[np.ndarray]:
    """The rows 0 ... count - 1 in random groups of nearly equal size, so that ordered classes are spread."""
    return np.array_split(np.random.default_rng(seed).permutation(count), min(groups, count))


def jackknife_variance(scores: Sequence[float]) -> float:
    """The variance of the score of all rows, from the scores `s_-j` without one group each."""
    scores = np.asarray(scores, "float64")
    return float((len(scores) - 1) * np.var(scores))


def parts_variance(scores: Sequence[float]) -> float:
    """The variance of the score of all rows, from the scores `s_j` of one group each."""
    scores = np.asarray(scores, "float64")
    return float(np.var(scores, ddof=1) / len(scores))


def half_width(variance: float, groups: int, level: float) -> float:
    """Half the width of the confidence interval at this level, by Student's t with groups - 1 degrees of freedom."""
    check_number("report", "level", level, 0.0, 1.0 - 1e-9)
    return float(np.sqrt(variance) * _student_quantile()(0.5 + level / 2.0, groups - 1))


def _student_quantile() -> Callable[[float, int], float]:
    """SciPy's quantile of Student's t, of (probability, degrees of freedom)."""
    with needs("evaluation", "Intervals need SciPy"):
        from scipy.stats import t
    return t.ppf
