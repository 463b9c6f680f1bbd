"""Fidelity and diversity, by balls around each example that reach to its k-th nearest neighbour.

    precision  the share of samples in a ball of a real example          recall    the same with the roles exchanged
    density    the mean number of such balls per sample, divided by k    coverage  the share of balls with a sample

Distances are Euclidean. Even for equal distributions precision and recall are not 1: compare each with the baseline in
the report.
"""

import math

import numpy as np

from kdiff.base import check_integer, needs
from kdiff.evaluation.base import FeatureMetric

__all__ = ["Coverage", "Density", "Precision", "Recall"]


def _radii(rows: np.ndarray, k: int) -> np.ndarray:
    """(n,): the distance of each row to the k-th nearest of the others."""
    with needs("evaluation", "Neighbours need scikit-learn"):
        from sklearn.neighbors import NearestNeighbors
    return NearestNeighbors(n_neighbors=k).fit(rows).kneighbors()[0][:, -1]


def _in_balls(points: np.ndarray, centers: np.ndarray, radii: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(the number of balls that contain each point, whether each ball has a point), computed in chunks."""
    with needs("evaluation", "Neighbours need scikit-learn"):
        from sklearn.metrics import pairwise_distances_chunked

    counts, hit = [], np.zeros(len(centers), bool)
    for distances in pairwise_distances_chunked(points, centers):
        inside = distances < radii
        counts.append(inside.sum(1))
        hit |= inside.any(0)
    return np.concatenate(counts), hit


class _Neighbors(FeatureMetric):
    better = "max"

    def __init__(self, features=None, reference=None, held_out=None, *, k, groups=20, name=None):
        check_integer(type(self).__name__, "k", k)
        self.k = k
        self.fewest, self.fewest_of_part = k + 1, 20 * k  # with few rows, the balls cover everything
        super().__init__(features, reference, held_out, groups=groups, name=name)

    def _distance(self, samples, reference):
        rows = reference.cached("float64", lambda: reference.features.astype("float64"))
        if len(rows) <= self.k:
            raise ValueError(
                f"{self.name}: more than {self.k} examples are needed for {self.k} neighbours; received {len(rows)}"
            )
        radii = reference.cached(("radii", self.k), lambda: _radii(rows, self.k))
        return float(self._share(samples.astype("float64"), rows, radii))

    def _share(self, samples, rows, radii):
        raise NotImplementedError


class Precision(_Neighbors):
    """precision = share of the samples x with |x - y| < r_k(y) for some real y.

    Kynkaanniemi et al., "Improved Precision and Recall Metric for Assessing Generative Models" (2019), equation 1.

    Args:
        features, reference, held_out, groups, name: as in `FeatureMetric`.
        k: r_k(y) is the distance of y to its k-th nearest neighbour among the real examples.
    """

    key = "precision"

    def __init__(self, features=None, reference=None, held_out=None, *, k: int = 3, groups=20, name=None):
        super().__init__(features, reference, held_out, k=k, groups=groups, name=name)

    def _share(self, samples, rows, radii):
        return np.mean(_in_balls(samples, rows, radii)[0] > 0)


class Recall(Precision):
    """recall = share of the real y with |x - y| < r_k(x) for some sample x.

    Kynkaanniemi et al. (2019), equation 2. It grows with the number of samples: compare equal numbers.

    Args:
        features, reference, held_out, groups, name: as in `FeatureMetric`.
        k: r_k(x) is the distance of x to its k-th nearest neighbour among the samples.
    """

    key = "recall"

    def _share(self, samples, rows, radii):
        return np.mean(_in_balls(rows, samples, _radii(samples, self.k))[0] > 0)


class Density(_Neighbors):
    """density = 1 / (k n) sum over samples x and real y of [|x - y| < r_k(y)]: a precision that is robust to outliers.

    Naeem et al., "Reliable Fidelity and Diversity Metrics for Generative Models" (2020), equation 3. Its expectation is
    1 for equal distributions, and it may exceed 1.

    Args:
        features, reference, held_out, groups, name: as in `FeatureMetric`.
        k: r_k(y) is the distance of y to its k-th nearest neighbour among the real examples.
    """

    key = "density"

    def __init__(self, features=None, reference=None, held_out=None, *, k: int = 5, groups=20, name=None):
        super().__init__(features, reference, held_out, k=k, groups=groups, name=name)

    def _share(self, samples, rows, radii):
        return np.mean(_in_balls(samples, rows, radii)[0]) / self.k


class Coverage(Density):
    """coverage = share of the real y with |x - y| < r_k(y) for some sample x.

    Naeem et al. (2020), equation 4. Its expectation for equal distributions is `expected`.

    Args:
        features, reference, held_out, groups, name: as in `FeatureMetric`.
        k: r_k(y) is the distance of y to its k-th nearest neighbour among the real examples.
    """

    key = "coverage"

    def _share(self, samples, rows, radii):
        return np.mean(_in_balls(samples, rows, radii)[1])

    @staticmethod
    def expected(n: int, m: int, k: int = 5) -> float:
        """1 - prod for i < k of (m - 1 - i) / (m + n - 1 - i), of n samples and m real examples of one distribution.

        The complement of: none of the k nearest of the n + m - 1 others is a sample (Naeem et al. 2020, lemma 2).
        """
        return 1.0 - math.prod((m - 1 - i) / (m + n - 1 - i) for i in range(k))
