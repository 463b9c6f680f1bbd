"""Agreement of samples with their texts, by embeddings of both in a joint space, such as CLIP's.

    metric = CLIPScore(clip.embed_image, clip.embed_text)    # from a `kdiff.contrastive.Contrastive`
    metric.update_state(model.sample(100, text=prompts), prompts)
    print(metric.report())

Any functions of images and of texts can be used. Embeddings are normalised to length 1.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from kdiff.base import check_integer, needs
from kdiff.evaluation.base import SampleMetric, described, features_of
from kdiff.evaluation.reference import check_features

__all__ = ["CLIPScore", "Retrieval"]


_EQUAL = 1e-12  # cosines that differ by rounding alone


class _PairMetric(SampleMetric):
    """The base of pair metrics: a row is the two embeddings of a pair, (2, features), of length 1."""

    better = "max"

    def __init__(
        self,
        images: Callable | None = None,
        texts: Callable | None = None,
        held_out: tuple[Any, Any] | None = None,
        *,
        groups: int = 20,
        name: str | None = None,
    ):
        super().__init__(groups, name)
        self.images, self.texts = images, texts
        self.held_out = None if held_out is None else self.extract(*held_out)

    def extract(self, images: Any, texts: Sequence[str] | Any) -> np.ndarray:
        """The embeddings (count, 2, features) of equally many images and texts."""
        made = []
        for name, function, values in (("images", self.images, images), ("texts", self.texts, texts)):
            rows = check_features(f"{self.name}: {name}", features_of(function, values)).astype("float64")
            lengths = np.linalg.norm(rows, axis=1, keepdims=True)
            if not lengths.all():
                raise ValueError(f"{self.name}: an embedding of {name} is zero and has no direction")
            made.append(rows / lengths)
        if made[0].shape != made[1].shape:
            raise ValueError(
                f"{self.name}: images and texts must be equally many, embedded in one space; received the shapes "
                f"{made[0].shape} and {made[1].shape}"
            )
        return np.stack(made, 1)

    def update_state(self, images: Any, texts: Sequence[str] | Any) -> None:
        """Adds pairs."""
        self._append(self.extract(images, texts))

    def update_from(self, samples, conditions, shared):
        if conditions.get("text") is None:
            raise ValueError(f"{self.name}: samples need a condition `text`; received: {sorted(conditions)}")
        texts = np.broadcast_to(conditions["text"], (len(samples),))
        self.update_state(samples, texts.tolist())

    def _completed(self, report, half):
        made = report._replace(features=f"{described(self.images)}, {described(self.texts)}")
        if self.held_out is None:
            return made
        return made._replace(
            baseline=self._score(self.held_out[: report.n]), baseline_n=min(report.n, len(self.held_out))
        )


class CLIPScore(_PairMetric):
    """100 times the mean of max(cos(image, text), 0).

    Hessel et al., "CLIPScore: A Reference-free Evaluation Metric for Image Captioning" (2021), equation 1, where the
    factor is 2.5.

    Args:
        images: a function of a batch of images to embeddings (batch, features); None if they are already embeddings.
        texts: the same for a list of strings.
        held_out: real images and their texts, for the baseline.
        groups, name: as in `SampleMetric`.
    """

    key = "clip_score"

    def _score(self, samples):
        cosines = np.sum(samples[:, 0] * samples[:, 1], axis=1)
        return float(100.0 * np.maximum(cosines, 0.0).mean())


class Retrieval(_PairMetric):
    """The share of images whose own text is among the k nearest texts: R@k, or R-precision.

    Xu et al., "AttnGAN" (2018), section 4.1, where each image has its own text and 99 random ones. Here it is the
    expectation over all such choices: if b of the n - 1 other texts are nearer, P(fewer than k of them are chosen) is
    hypergeometric. Texts that are equally near are taken in random order. It is not meaningful for repeated texts.

    Args:
        images, texts, held_out: as in `CLIPScore`.
        k: the rank that the own text must reach.
        pool: the number of texts, including its own; None for all.
        groups, name: as in `SampleMetric`.
    """

    key = "retrieval"

    def __init__(
        self, images=None, texts=None, held_out=None, *, k: int = 1, pool: int | None = 100, groups=20, name=None
    ):
        check_integer("Retrieval", "k", k)
        if pool is not None:
            check_integer("Retrieval", "pool", pool, k + 1)
            self.fewest = pool
        self.k, self.pool = k, pool
        super().__init__(images, texts, held_out, groups=groups, name=name)

    def _score(self, samples):
        with needs("evaluation", "Retrieval needs SciPy"):
            from scipy.stats import hypergeom
        n = len(samples)
        cosines = samples[:, 0] @ samples[:, 1].T
        ahead = cosines - np.diagonal(cosines)[:, None]
        nearer = (ahead > _EQUAL).sum(1)
        equal = (np.abs(ahead) <= _EQUAL).sum(1)  # with its own
        pool = n if self.pool is None else min(self.pool, n)
        # With j of the equal ones before its own, each j as likely.
        shares = np.zeros(n)
        for j in range(equal.max()):
            shares += (j < equal) / equal * hypergeom.cdf(self.k - 1, n - 1, np.minimum(nearer + j, n - 1), pool - 1)
        return float(shares.mean())
