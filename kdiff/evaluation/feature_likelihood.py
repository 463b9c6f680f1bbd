"""The feature likelihood divergence: the likelihood of held-out examples under a density fitted to samples."""

from collections.abc import Callable
from typing import Any

import numpy as np

from kdiff.base import needs
from kdiff.evaluation.base import FeatureMetric
from kdiff.evaluation.resampling import groups_of, parts_variance

__all__ = ["FeatureLikelihoodDivergence", "fitted_variances", "mixture_log_likelihood"]

_LEAST, _MOST = np.exp(-40.0), np.exp(20.0)  # the range of a variance
_BACKGROUND = 0.9**2


def _squared(rows: np.ndarray, centers: np.ndarray) -> np.ndarray:
    with needs("evaluation", "Distances need scikit-learn"):
        from sklearn.metrics.pairwise import euclidean_distances
    return euclidean_distances(rows, centers, squared=True)


def _log_normal(squared, variances, d):
    return -0.5 * (squared / variances + d * np.log(2.0 * np.pi * variances))


def _log_sum(terms):
    top = terms.max(1, keepdims=True)
    return top[:, 0] + np.log(np.exp(terms - top).sum(1))


def mixture_log_likelihood(rows: np.ndarray, centers: np.ndarray, variances: np.ndarray) -> np.ndarray:
    """log 1/m sum over j of N(x; c_j, s_j I) of each row x, in nats.

    Args:
        rows: (n, d).
        centers: c, (m, d).
        variances: s, (m,).
    """
    return _log_sum(_log_normal(_squared(rows, centers), variances, rows.shape[1])) - np.log(len(centers))


def fitted_variances(rows: np.ndarray, centers: np.ndarray, steps: int = 500, tolerance: float = 1e-7) -> np.ndarray:
    """The variances s, (m,), that maximise the likelihood of rows under sum over j of N(x; c_j, s_j I) / m +
    N(0.9 (x - x_mean); 0, s_0 I): a broad component, then discarded, makes the fit robust to outliers.

    By expectation maximisation, s_j = sum_i r_ij |x_i - c_j|^2 / (d sum_i r_ij), which is deterministic and never
    decreases the likelihood; the authors take 50 steps of Adam. Memory is a few arrays (n, m).

    Args:
        rows: x, (n, d).
        centers: c, (m, d).
        steps: the maximum number of steps.
        tolerance: the minimum gain per step, in nats per row and dimension.
    """
    d = rows.shape[1]
    far = _BACKGROUND * np.square(rows - rows.mean(0)).sum(1, keepdims=True)
    squared = np.concatenate([_squared(rows, centers), far], axis=1)
    variances = np.append((squared[:, :-1].min(0) + 1e-3) / d, 1.0)
    weights = np.append(np.full(len(centers), -np.log(len(centers))), 0.0)
    before = -np.inf
    for _ in range(steps):
        terms = _log_normal(squared, variances, d) + weights
        likelihood = _log_sum(terms)
        shares = np.exp(terms - likelihood[:, None])
        total = shares.sum(0)
        known = total > np.finfo("float64").tiny
        new = (shares * squared).sum(0)[known] / (d * total[known])
        variances[known] = np.clip(new, _LEAST, _MOST)
        if likelihood.mean() - before < tolerance * d:
            break
        before = likelihood.mean()
    return variances[:-1]


class FeatureLikelihoodDivergence(FeatureMetric):
    """FLD = 100 / d (nll(samples) - nll(half of the training set)), where

        nll(c) = - mean over held-out y of log 1/m sum over j of N(y; c_j, s_j I)

    and s maximises the likelihood of the training set. A sample that copies a training example gets a variance near 0,
    and then adds no likelihood to held-out examples: so, unlike a distance, FLD detects memorisation. 0 is as good as
    the training set. The interval is conservative: it is estimated from small parts, and the score of few examples
    varies more than in proportion.

    Jiralerspong et al., "Feature Likelihood Divergence: Evaluating the Generalization of Generative Models Using
    Samples" (2023), section 3; features are normalised to mean 0 and variance 1 on the held-out set, as in their code.

    Args:
        features, groups, name: as in `FeatureMetric`.
        reference: the training set of the model.
        held_out: real examples outside the training set.

    Raises:
        ValueError: if `held_out` is missing.
    """

    key = "fld"
    better = "min"
    fewest_of_part = 8

    def __init__(
        self,
        features: Callable | None = None,
        reference: Any = None,
        held_out: Any = None,
        *,
        groups: int = 20,
        name: str | None = None,
    ):
        super().__init__(features, reference, held_out, groups=groups, name=name)
        if self.held_out is None:
            raise ValueError(f"{self.name}: `held_out` is required, real examples outside the training set")
        self._best: dict[int, float] = {}  # the nll of the training set, by the number of its examples

    def _distance(self, samples, reference):
        return self._difference(samples, reference.features, self.held_out, self._best)

    def _difference(self, samples, train, test, best):
        test = test.astype("float64")
        mean, std = test.mean(0), test.std(0, ddof=1)
        std = np.where(std > 0, std, 1.0)
        samples, train, test = ((rows - mean) / std for rows in (samples, train, test))

        def nll(centers, rows):
            return -mixture_log_likelihood(test, centers, fitted_variances(rows, centers)).mean()

        size = min(len(samples), len(train) // 2)
        if size not in best:
            order = np.concatenate(groups_of(len(train), 1))
            best[size] = nll(train[order[:size]], train[order[size:]])
        return 100.0 / test.shape[1] * (nll(samples, train) - best[size])

    def _variance(self, samples):
        """The variance by disjoint parts of samples, training set and held-out set."""
        reference = self._needed_reference()
        sides = (samples, reference.features, self.held_out)
        groups = self._groups_for(*map(len, sides))
        if groups < 2:
            return float("nan")
        parts = zip(*(groups_of(len(rows), groups, seed) for seed, rows in enumerate(sides)), strict=True)
        chosen = ([rows[part] for rows, part in zip(sides, row, strict=True)] for row in parts)
        return parts_variance([self._difference(*rows, {}) for rows in chosen])

    def _baseline(self, n):
        """None, since the score of real examples is 0 by definition."""
        return None, None
