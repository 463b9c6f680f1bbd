"""The base of sample metrics: features collected on the host, a score, and its uncertainty.

    metric = FrechetDistance(features, reference=train_images, held_out=test_images)
    metric.update_state(model.sample(5000))
    metric.result()                 # a float
    print(metric.report())          # with its interval, n, and the score of real examples

`features` maps examples to features: an `Extractor`, any Keras model or function of a batch; None if the examples are
already features.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import keras
import numpy as np

from kdiff.base import check_integer
from kdiff.evaluation.extractors import Extractor
from kdiff.evaluation.reference import Reference, check_features
from kdiff.evaluation.resampling import groups_of, half_width, jackknife_variance, parts_variance

__all__ = ["FeatureMetric", "Report", "SampleMetric", "batches_of", "described", "features_of"]


class Report(NamedTuple):
    """A score and its uncertainty.

    Attributes:
        name: of the metric.
        value: the score.
        standard_error: of `value`, for the choice of the samples and, if its features are known, of the reference.
        interval: the confidence interval, at the requested level, of the expected score of this number of samples. NaN,
            as the standard error, if there are too few for two parts.
        n: the number of samples.
        reference_n: the number of examples in the reference; None if there is none, or it is unknown.
        extrapolated: the score for infinitely many samples and examples (only `FrechetDistance`); None if there are too
            few.
        extrapolated_interval: its confidence interval.
        baseline: the score of held-out real examples instead of samples; None if none were given.
        baseline_n: their number: n, if there are enough.
        features: a description of the features.
    """

    name: str
    value: float
    standard_error: float
    interval: tuple[float, float]
    n: int
    reference_n: int | None
    extrapolated: float | None = None
    extrapolated_interval: tuple[float, float] | None = None
    baseline: float | None = None
    baseline_n: int | None = None
    features: str = "given"

    def __str__(self) -> str:
        """All fields in one line."""
        against = "" if self.reference_n is None else f" against {self.reference_n}"
        text = f"{self.name} {self.value:.5g} [{_between(self.interval)}], n = {self.n}{against}"
        if self.extrapolated is not None:
            text += f"; infinitely many: {self.extrapolated:.5g} [{_between(self.extrapolated_interval)}]"
        if self.baseline is not None:
            text += f"; real examples: {self.baseline:.5g}, n = {self.baseline_n}"
        return f"{text}; features: {self.features}"


def _between(interval):
    return ", ".join(f"{value:.5g}" for value in interval)


class SampleMetric(keras.metrics.Metric):
    """A score of a set of samples. A subclass defines the rows and `_score`.

    It computes on the host in float64, and keeps all rows until `reset_state`. It is updated by `EvaluationCallback` or
    a custom loop; `compile(metrics=...)` cannot be used.

    Args:
        groups: the number of groups of rows for the interval (`kdiff.evaluation.resampling`).
        name: of the metric in logs; None for the default of the class.
    """

    key: ClassVar[str]  # the default name
    better: ClassVar[str]  # "min" or "max": the `mode` of `ModelCheckpoint` and `EarlyStopping`
    fewest: int = 2  # the minimum number of rows
    fewest_of_part: int = 2  # the minimum for a part, whose variance then scales with the number of rows

    def __init__(self, groups: int = 20, name: str | None = None):
        check_integer(type(self).__name__, "groups", groups, 2)
        super().__init__(name=name or self.key)
        self.groups = groups
        self._rows: list[np.ndarray] = []
        self._direction = {"min": "down", "max": "up"}[self.better]  # as in Keras' own metrics

    @property
    def n(self) -> int:
        """The number of samples so far."""
        return sum(len(rows) for rows in self._rows)

    @property
    def samples(self) -> np.ndarray:
        """The rows of all samples."""
        if self.n < self.fewest:
            raise ValueError(f"{self.name}: at least {self.fewest} samples are needed; received {self.n}")
        if len(self._rows) > 1:
            self._rows = [np.concatenate(self._rows)]
        return self._rows[0]

    def _append(self, rows: np.ndarray) -> None:
        if self._rows and self._rows[0].shape[1:] != rows.shape[1:]:
            raise ValueError(
                f"{self.name}: features have the shape {rows.shape[1:]}, but earlier ones {self._rows[0].shape[1:]}"
            )
        self._rows.append(rows)

    def update_from(self, samples: Any, conditions: Mapping[str, Any], shared: dict[int, np.ndarray]) -> None:
        """Adds samples drawn with these conditions; `shared` caches their features between metrics."""
        raise NotImplementedError

    def reset_state(self) -> None:
        """Discards the samples."""
        self._rows = []

    def get_config(self) -> dict[str, Any]:
        """Not supported, as the metric holds real examples and a network.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError(f"{type(self).__name__}: it holds data and cannot be saved; create it anew")

    def result(self) -> float:
        """The score.

        Raises:
            ValueError: if there are too few samples.
        """
        return self._score(self.samples)

    def report(self, level: float = 0.95) -> Report:
        """The score with its interval and context.

        Args:
            level: of the confidence intervals.

        Raises:
            ValueError: if there are too few samples, or `level` is outside [0, 1).
        """
        samples = self.samples
        value, variance = self._measured(samples)
        half = half_width(variance, self._groups_for(len(samples)), level)
        made = Report(self.name, value, variance**0.5, (value - half, value + half), len(samples), None)
        return self._completed(made, half)

    def _groups_for(self, *counts: int) -> int:
        """The number of groups for sets of these numbers of rows."""
        return min(self.groups, *(count // self.fewest_of_part for count in counts))

    def _measured(self, samples: np.ndarray) -> tuple[float, float]:
        """(score, variance of the score)."""
        return self._score(samples), self._variance(samples)

    def _completed(self, report: Report, half: float) -> Report:
        """The report with additions of a subclass; `half` is the half width of the interval."""
        return report

    def _score(self, samples: np.ndarray) -> float:
        """The score of these rows."""
        raise NotImplementedError

    def _variance(self, samples: np.ndarray) -> float:
        """The variance of `_score(samples)`, here by the jackknife."""
        left = (np.delete(samples, group, axis=0) for group in groups_of(len(samples), self.groups))
        return jackknife_variance([self._score(rows) for rows in left])


class FeatureMetric(SampleMetric):
    """A score that compares features of samples with those of real examples. A subclass defines `_distance`.

    Args:
        features: a function of a batch of examples to features (batch, features), such as an `Extractor` (a Keras model
            is wrapped in one); None if the examples are already features.
        reference: the real examples: an array, an iterable of batches, or a `Reference`, which metrics may share.
        held_out: other real examples, for the baseline: the score of the same number of real examples.
        groups, name: as in `SampleMetric`.

    Raises:
        TypeError: if `features` is not callable.
        ValueError: if features differ in width; or if only the samples or only the examples are uint8 images, and
            `features` does not convert them (`Extractor(network, Images())` does).
    """

    def __init__(
        self,
        features: Callable | None = None,
        reference: Any = None,
        held_out: Any = None,
        *,
        groups: int = 20,
        name: str | None = None,
    ):
        super().__init__(groups, name)
        if features is not None and not callable(features):
            raise TypeError(f"{self.name}: `features` must be a function of a batch, or None; received: {features!r}")
        self.features = Extractor(features) if isinstance(features, keras.layers.Layer) else features
        self._shared, self._whole = id(features), None
        self.reference = None if reference is None else self._reference(reference)
        self.held_out = None if held_out is None else self._reference(held_out).features
        widths = [part for part in (self.reference, self.held_out) if part is not None]
        self._check_widths([part.width if isinstance(part, Reference) else part.shape[1] for part in widths])

    def _reference(self, examples: Any) -> Reference:
        return examples if isinstance(examples, Reference) else Reference(self.extract(examples))

    def _check_widths(self, widths: Sequence[int]) -> None:
        if len(set(widths)) > 1:
            raise ValueError(
                f"{self.name}: features of samples and examples must have the same width; received: {widths}"
            )

    def extract(self, examples: Any) -> np.ndarray:
        """The features (count, features) of an array of examples, or of an iterable of batches of them."""
        return self._checked(features_of(self._of_batch, examples))

    def _checked(self, features: np.ndarray) -> np.ndarray:
        """Features that this metric takes."""
        return check_features(self.name, features)

    def _of_batch(self, batch):
        self._check_range(batch)
        return batch if self.features is None else self.features(batch)

    def _check_range(self, batch):
        whole = keras.backend.standardize_dtype(batch.dtype) == "uint8"
        if self._whole not in (None, whole) and getattr(self.features, "prepare", None) is None:
            raise ValueError(
                f"{self.name}: some examples are uint8 and others are not; convert both to one range, as "
                "`Extractor(network, Images())` does"
            )
        self._whole = whole

    def update_state(self, samples: Any) -> None:
        """Adds a batch of samples."""
        if isinstance(samples, keras.KerasTensor):
            raise TypeError(f"{self.name}: it computes on the host; update it outside `compile` and compiled code")
        self.add(self.extract(samples))

    def update_from(self, samples, conditions, shared):
        if self._shared not in shared:
            shared[self._shared] = self.extract(samples)
        for batch in batches_of(samples):
            self._check_range(batch)
        self.add(shared[self._shared])

    def add(self, features: np.ndarray) -> None:
        """Adds samples by their features, (count, features)."""
        features = self._checked(features)
        if self.reference is not None:
            self._check_widths([features.shape[1], self.reference.width])
        self._append(features)

    def _completed(self, report: Report, half: float) -> Report:
        baseline, baseline_n = self._baseline(report.n)
        return report._replace(
            reference_n=None if self.reference is None else self.reference.n,
            baseline=baseline,
            baseline_n=baseline_n,
            features=described(self.features),
        )

    def _baseline(self, n: int) -> tuple[float | None, int | None]:
        """(the score of at most n held-out examples, their number)."""
        if self.held_out is None:
            return None, None
        chosen = self.held_out[np.sort(np.concatenate(groups_of(len(self.held_out), 1))[:n])]
        return self._score(chosen), len(chosen)

    def _score(self, samples):
        return float(self._distance(samples, self._needed_reference()))

    def _needed_reference(self) -> Reference:
        if self.reference is None:
            raise ValueError(f"{self.name}: a `reference` is required")
        return self.reference

    def _distance(self, samples: np.ndarray, reference: Reference) -> float:
        """The distance of features (n, features) from those of the reference."""
        raise NotImplementedError

    def _variance(self, samples):
        """The variance by disjoint parts of both sides."""
        reference = self._needed_reference()
        groups = self._groups_for(len(samples), reference.n)
        if groups < 2:
            return float("nan")
        pairs = zip(groups_of(len(samples), groups), groups_of(reference.n, groups, seed=1), strict=True)
        return parts_variance([self._distance(samples[a], reference.rows(b)) for a, b in pairs])


def batches_of(examples: Any) -> Iterable:
    """The batches of examples: a single one for an array or a batch as in `fit`; those of a list or an iterable."""
    if hasattr(examples, "shape"):
        return [examples]
    if isinstance(examples, dict | tuple):  # one batch, as in `fit`
        return [_examples(examples)]
    if (
        isinstance(examples, Sequence)
        and not hasattr(examples[0], "shape")
        and not isinstance(examples[0], tuple | dict)
    ):
        return [np.asarray(examples)]
    return (_examples(batch) for batch in examples)


def features_of(function: Callable | None, examples: Any) -> np.ndarray:
    """The concatenated outputs of the function for all batches of examples."""
    made = [batch if function is None else function(batch) for batch in batches_of(examples)]
    return np.concatenate([np.asarray(keras.ops.convert_to_numpy(one)) for one in made])


def _examples(batch: Any) -> Any:
    """The examples of a batch as in `fit`: (x, y), or a dict with "image"."""
    batch = batch[0] if isinstance(batch, (tuple, list)) else batch
    if isinstance(batch, dict) and "image" not in batch:
        raise ValueError(f"evaluation: a batch must have 'image'; received: {sorted(batch)}")
    return batch["image"] if isinstance(batch, dict) else batch


def described(features: Callable | None) -> str:
    """A description of the features."""
    if features is None:
        return "given"
    return getattr(features, "description", None) or getattr(features, "__qualname__", type(features).__name__)
