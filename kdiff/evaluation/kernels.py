"""The maximum mean discrepancy between samples and real examples, for a polynomial or a Gaussian kernel.

    MMD^2 = E k(x, x') + E k(y, y') - 2 E k(x, y)

Gretton et al., "A Kernel Two-Sample Test" (2012), lemma 6. All sums are computed once by blocks, one per pair of
groups, which give the distance, and that without any one group for the jackknife.
"""

from typing import NamedTuple

import numpy as np

from kdiff.base import check_integer, check_number, needs
from kdiff.evaluation.base import FeatureMetric
from kdiff.evaluation.resampling import groups_of, jackknife_variance

__all__ = ["CMMD", "KernelDistance"]


_CHUNK = 512  # rows per block of kernel values in memory


def _pairwise():
    with needs("evaluation", "Kernels need scikit-learn"):
        from sklearn.metrics import pairwise
    return pairwise


class _Polynomial(NamedTuple):
    degree: int
    gamma: float | None
    coefficient: float

    def __call__(self, x, y):
        return _pairwise().polynomial_kernel(x, y, self.degree, self.gamma, self.coefficient)

    def diagonal(self, x):
        gamma = 1.0 / x.shape[1] if self.gamma is None else self.gamma
        return (gamma * np.square(x).sum(1) + self.coefficient) ** self.degree


class _Gaussian(NamedTuple):
    sigma: float

    def __call__(self, x, y):
        return _pairwise().rbf_kernel(x, y, 1.0 / (2.0 * self.sigma**2))

    def diagonal(self, x):
        return np.ones(len(x))


class _Blocks:
    """The sums of k over pairs of groups of rows: `sums[i, j]`, over `counts[i] columns[j]` values."""

    def __init__(self, kernel, rows, others, groups):
        parts = groups_of(len(rows), groups)
        columns = groups_of(len(others), groups)
        self.counts, self.columns = (np.array([len(part) for part in side]) for side in (parts, columns))
        others, starts = others[np.concatenate(columns)], np.cumsum(self.columns) - self.columns
        self.sums = np.zeros((len(parts), len(columns)))
        for i, part in enumerate(parts):
            for rows_now in np.array_split(rows[part], -(-len(part) // _CHUNK)):
                self.sums[i] += np.add.reduceat(kernel(rows_now, others).sum(0), starts)


class _Within(_Blocks):
    """The sums of rows with themselves; `diagonal` is the sum of k(x, x) in each group."""

    def __init__(self, kernel, rows, groups):
        super().__init__(kernel, rows, rows, groups)
        self.diagonal = np.array([kernel.diagonal(rows[part]).sum() for part in groups_of(len(rows), groups)])


class _KernelMetric(FeatureMetric):
    """MMD^2 with the kernel of a subclass; `unbiased` excludes pairs of a row with itself."""

    unbiased: bool
    normalized = False
    scale = 1.0
    fewest = 4

    def _prepared(self, rows):
        rows = rows.astype("float64")
        if not self.normalized:
            return rows
        lengths = np.linalg.norm(rows, axis=1, keepdims=True)
        if not lengths.all():
            raise ValueError(f"{self.name}: a row of features is zero and has no direction; try `normalized=False`")
        return rows / lengths

    def _sums(self, samples, reference):
        if reference.features.shape[0] < self.fewest:
            raise ValueError(f"{self.name}: at least {self.fewest} real examples are needed; received {reference.n}")

        def real():
            rows = self._prepared(reference.features)
            return rows, _Within(self.kernel, rows, self.groups)

        rows, yy = reference.cached((self.kernel, self.normalized, self.groups), real)
        x = self._prepared(samples)
        return _Within(self.kernel, x, self.groups), _Blocks(self.kernel, x, rows, self.groups), yy

    def _within(self, blocks, kept):
        n = blocks.counts[kept].sum()
        total = blocks.sums[np.ix_(kept, kept)].sum()
        return (total - blocks.diagonal[kept].sum()) / (n * (n - 1)) if self.unbiased else total / n**2

    def _squared(self, sums, rows, columns):
        """MMD^2 from the groups of both sides that are kept."""
        xx, xy, yy = sums
        cross = xy.sums[np.ix_(rows, columns)].sum() / (xy.counts[rows].sum() * xy.columns[columns].sum())
        return self.scale * (self._within(xx, rows) + self._within(yy, columns) - 2.0 * cross)

    def _distance(self, samples, reference):
        sums = self._sums(samples, reference)
        return self._squared(sums, *(np.arange(size) for size in sums[1].sums.shape))

    def _measured(self, samples):
        sums = self._sums(samples, self._needed_reference())
        rows, columns = (np.arange(size) for size in sums[1].sums.shape)
        of_samples = [self._squared(sums, np.delete(rows, i), columns) for i in rows]
        of_reference = [self._squared(sums, rows, np.delete(columns, i)) for i in columns]
        variance = jackknife_variance(of_samples) + jackknife_variance(of_reference)
        return float(self._squared(sums, rows, columns)), variance


class KernelDistance(_KernelMetric):
    """KD = the unbiased MMD^2 with k(x, y) = (gamma x.y + coefficient)^degree, gamma = 1 / features.

    Binkowski et al., "Demystifying MMD GANs" (2018), section 4: the KID if the features are `InceptionFID`'s. It is
    unbiased for every n, and can be negative. They average 100 random subsets of 1000; here it is one sum over all
    pairs, with an interval by the jackknife.

    Args:
        features, reference, held_out, groups, name: as in `FeatureMetric`.
        degree: the degree of the polynomial.
        gamma: None for 1 / features.
        coefficient: the constant term of the polynomial.
    """

    key = "kd"
    better = "min"
    unbiased = True

    def __init__(
        self,
        features=None,
        reference=None,
        held_out=None,
        *,
        degree: int = 3,
        gamma: float | None = None,
        coefficient: float = 1.0,
        groups: int = 20,
        name: str | None = None,
    ):
        check_integer("KernelDistance", "degree", degree)
        check_number("KernelDistance", "coefficient", coefficient, 0.0)
        if gamma is not None:
            check_number("KernelDistance", "gamma", gamma, 0.0)
        self.kernel = _Polynomial(degree, gamma, coefficient)
        super().__init__(features, reference, held_out, groups=groups, name=name)


class CMMD(_KernelMetric):
    """CMMD = 1000 MMD^2 with k(x, y) = exp(-|x - y|^2 / (2 sigma^2)), for embeddings of length 1, such as CLIP's.

    Jayasumana et al., "Rethinking FID: Towards a Better Evaluation Metric for Image Generation" (2024), section 5. As
    in their code, pairs of a row with itself are included (Gretton et al., equation 5), which adds less than
    1000 / (n sigma^2) + 1000 / (m sigma^2).

    Args:
        features, reference, held_out, groups, name: as in `FeatureMetric`. The paper uses CLIP's ViT-L/14 at 336 px.
        sigma: the width of the kernel.
        normalized: whether features are divided by their length.
    """

    key = "cmmd"
    better = "min"
    unbiased = False
    scale = 1000.0

    def __init__(
        self,
        features=None,
        reference=None,
        held_out=None,
        *,
        sigma: float = 10.0,
        normalized: bool = True,
        groups: int = 20,
        name: str | None = None,
    ):
        check_number("CMMD", "sigma", sigma, 1e-9)
        self.kernel, self.normalized = _Gaussian(sigma), normalized
        super().__init__(features, reference, held_out, groups=groups, name=name)
