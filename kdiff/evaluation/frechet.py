"""The Frechet distance between Gaussians with the moments of the features."""

from typing import Any

import numpy as np

from kdiff.base import needs
from kdiff.evaluation.base import FeatureMetric, Report
from kdiff.evaluation.reference import Reference
from kdiff.evaluation.resampling import groups_of, jackknife_variance

__all__ = ["FrechetDistance", "frechet_distance"]


def frechet_distance(
    mean: np.ndarray, covariance: np.ndarray, other: np.ndarray, other_covariance: np.ndarray
) -> float:
    """|m - o|^2 + tr(S + O - 2 (O^1/2 S O^1/2)^1/2), the squared 2-Wasserstein distance of two Gaussians.

    Dowson and Landau, "The Frechet Distance between Multivariate Normal Distributions" (1982), equation 4. By two
    symmetric eigenproblems in float64, so that singular covariances are supported.

    Args:
        mean: m, (features,).
        covariance: S, (features, features), symmetric.
        other: o.
        other_covariance: O.
    """
    return _distance(
        np.asarray(mean), np.asarray(covariance), np.asarray(other), *_rooted(np.asarray(other_covariance))
    )


def _eigh(matrix: np.ndarray, **options: Any) -> Any:
    with needs("evaluation", "The Frechet distance needs SciPy"):
        from scipy.linalg import eigh
    return eigh(matrix, check_finite=False, **options)


def _rooted(covariance):
    """(O^1/2, tr O)."""
    values, vectors = _eigh(covariance)
    return (vectors * np.sqrt(np.maximum(values, 0.0))) @ vectors.T, np.trace(covariance)


def _distance(mean, covariance, other, root, trace):
    values = _eigh(root @ covariance @ root, eigvals_only=True)
    cross = np.sqrt(np.maximum(values, 0.0)).sum()
    return float(np.sum((mean - other) ** 2) + np.trace(covariance) + trace - 2.0 * cross)


class _Moments:
    """The moments of rows, and of those without each group of them, from one sum of products per group."""

    def __init__(self, rows: np.ndarray, groups: int = 1):
        rows = rows.astype("float64")
        self.shift = rows.mean(0)
        parts = [rows[group] - self.shift for group in groups_of(len(rows), groups)]
        self.counts = np.array([len(part) for part in parts])
        self.sums = np.array([part.sum(0) for part in parts])
        self.products = [part.T @ part for part in parts]

    def _of(self, count, total, products):
        mean = total / count
        return self.shift + mean, (products - count * np.outer(mean, mean)) / (count - 1)

    def all(self):
        """(mean, covariance)."""
        return self._of(self.counts.sum(), self.sums.sum(0), sum(self.products))

    def without(self):
        """(mean, covariance) without each group in turn."""
        count, total, products = self.counts.sum(), self.sums.sum(0), sum(self.products)
        for one in zip(self.counts, self.sums, self.products, strict=True):
            yield self._of(*(a - b for a, b in zip((count, total, products), one, strict=True)))


class FrechetDistance(FeatureMetric):
    """FD = |m - r|^2 + tr(S + R - 2 (R^1/2 S R^1/2)^1/2): mean m, covariance S of samples, r, R of real ones.

    Heusel et al., "GANs Trained by a Two Time-Scale Update Rule Converge to a Local Nash Equilibrium" (2017), equation
    6: the FID if the features are `InceptionFID`'s, and FD-DINOv2 if they are DINOv2's (Stein et al. 2023).

    The score is biased, the more so the fewer the samples: FD_N = a + b / N. The report extrapolates, as Chong and
    Forsyth, "Effectively Unbiased FID and Inception Score and Where to Find Them" (2020), section 4. They fit a line to
    random subsets of 15 sizes; here the sizes are n, n / 2, ..., n / 5, each averaged over all disjoint pairs of parts
    of samples and reference, which removes the variance of choosing subsets. Both sides are extrapolated, unless the
    reference is only moments. Parts with fewer than twice as many rows as features are left out.

    The interval is from the jackknife, with `groups` distances for each side.

    Args:
        features, reference, held_out, groups, name: as in `FeatureMetric`.
    """

    key = "fd"
    better = "min"
    parts = 5

    def _distance(self, samples: np.ndarray, reference: Reference) -> float:
        return self._from(_Moments(samples).all(), reference)

    @staticmethod
    def _from(moments, reference):
        root = reference.cached("root", lambda: _rooted(reference.covariance))
        return _distance(*moments, reference.mean, *root)

    def _variance(self, samples):
        reference, moments = self._needed_reference(), _Moments(samples, self.groups)
        if len(samples) < 3 or (reference.has_features and reference.n < 3):
            return float("nan")  # without one there is no covariance
        variance = jackknife_variance([self._from(left, reference) for left in moments.without()])
        if reference.has_features:
            mean, covariance = moments.all()
            root = _rooted(covariance)
            left = reference.cached(
                ("without", self.groups), lambda: list(_Moments(reference.features, self.groups).without())
            )
            variance += jackknife_variance([_distance(*one, mean, *root) for one in left])
        return variance

    def _completed(self, report: Report, half: float) -> Report:
        made = super()._completed(report, half)
        value = self._extrapolated(self.samples, report.value)
        if value is None:
            return made
        return made._replace(extrapolated=value, extrapolated_interval=(value - half, value + half))

    def _extrapolated(self, samples, value):
        """The intercept a of a + b k, fitted to the mean distances of k pairs of parts, each 1 / k of the rows."""
        reference = self._needed_reference()
        smaller = min(len(samples), reference.n) if reference.has_features else len(samples)
        most = min(self.parts, smaller // max(2 * samples.shape[1], self.fewest))
        if most < 2:
            return None
        means = [value] + [self._of_parts(samples, reference, k) for k in range(2, most + 1)]
        return float(np.polyfit(np.arange(1, most + 1), means, 1)[1])

    def _of_parts(self, samples, reference, k):
        rows = groups_of(len(samples), k)
        whole = [reference] * k
        if reference.has_features:
            whole = [reference.rows(group) for group in groups_of(reference.n, k, seed=1)]
        return np.mean([self._distance(samples[a], part) for a, part in zip(rows, whole, strict=True)])
