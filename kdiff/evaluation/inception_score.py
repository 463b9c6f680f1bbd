"""The inception score: the confidence of a classifier in each sample, and the diversity of predicted classes."""

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np

from kdiff.base import check_integer
from kdiff.evaluation.base import FeatureMetric

__all__ = ["InceptionScore"]


class InceptionScore(FeatureMetric):
    """IS = exp(E KL(p(c | x) || p(c))), p(c) = E p(c | x): between 1 and the number of classes c.

    Salimans et al., "Improved Techniques for Training GANs" (2016), section 4: the mean over 10 splits of the samples
    in order, of 5000 each. It needs no real examples, and is biased low with few samples.

    Args:
        features: a function from a batch of examples to probabilities (batch, classes), or logits; None if the examples
            already are these.
        held_out: real examples, for the baseline.
        splits: the number of parts over which the score is averaged.
        from_logits: whether `features` are logits, as with `InceptionFID(output="logits")`.
        groups, name: as in `FeatureMetric`.
    """

    key = "inception_score"
    better = "max"

    def __init__(
        self,
        features: Callable | None = None,
        held_out: Any = None,
        *,
        splits: int = 10,
        from_logits: bool = False,
        groups: int = 20,
        name: str | None = None,
    ):
        check_integer("InceptionScore", "splits", splits)
        self.splits, self.from_logits, self.fewest = splits, from_logits, 2 * splits
        super().__init__(features, None, held_out, groups=groups, name=name)

    def _checked(self, features):
        features = super()._checked(features)
        if not self.from_logits and (features.min() < 0 or np.abs(features.sum(1) - 1).max() > 1e-3):
            raise ValueError(f"{self.name}: probabilities must sum to 1; use `from_logits=True` for logits")
        return features

    def _log_probabilities(self, rows):
        rows = rows.astype("float64")
        if not self.from_logits:
            return np.log(np.maximum(rows / rows.sum(1, keepdims=True), np.finfo("float64").tiny))
        rows = rows - rows.max(1, keepdims=True)
        return rows - np.log(np.exp(rows).sum(1, keepdims=True))

    def _score(self, samples):
        logs, n = self._log_probabilities(samples), len(samples)
        bounds = [i * n // self.splits for i in range(self.splits + 1)]
        return float(np.mean([self._of(logs[a:b]) for a, b in itertools.pairwise(bounds)]))

    @staticmethod
    def _of(logs):
        p = np.exp(logs)
        marginal = np.log(np.maximum(p.mean(0), np.finfo("float64").tiny))
        return np.exp((p * (logs - marginal)).sum(1).mean())

    def _variance(self, samples):
        """The variance by the jackknife."""
        return super(FeatureMetric, self)._variance(samples)
