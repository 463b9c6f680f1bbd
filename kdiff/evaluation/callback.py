"""Scores of samples during training."""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import keras
import numpy as np

from kdiff.base import check_integer
from kdiff.evaluation.base import Report, SampleMetric
from kdiff.sampling import Sampler
from kdiff.solvers import Solver

__all__ = ["EvaluationCallback"]


class EvaluationCallback(keras.callbacks.Callback):
    """Draws samples every few epochs, with the averaged weights, and logs their scores.

        fd = evaluation.FrechetDistance(features, train_images)
        best = keras.callbacks.ModelCheckpoint("best.keras", monitor="fd", mode="min", save_best_only=True)
        model.fit(dataset, epochs=50, callbacks=[evaluation.EvaluationCallback([fd], every=5), best])

    Callbacks after it in the list find the scores in `logs` by the names of the metrics: `ModelCheckpoint`,
    `EarlyStopping`, `ReduceLROnPlateau`, `TensorBoard`, `CSVLogger`; their `mode` is `metric.better`. The scores are
    also in the history. Epochs without evaluation have no scores, as with Keras' `validation_freq`: `ModelCheckpoint`
    then warns that it skips, and `EarlyStopping` counts evaluations. The noise is the same in all evaluations, so that
    scores differ only by the model. A failure is a warning and does not stop training.

    Args:
        metrics: sample metrics with distinct names. Metrics with the same `features` share them.
        every: the number of epochs between two evaluations.
        num_samples: the number of samples.
        sampler: a `Sampler`, a `Solver` or its name; None for that of the model.
        steps: sampling steps; None for that of the sampler.
        seed: for the noise.
        batch_size: the number of samples drawn at once.
        conditions: the conditions of the samples, as in `sample`: a dict of arrays or strings with `num_samples` rows,
            or of single values for all. Metrics of pairs use `text`.
        options: further arguments of `sample`, such as `guidance` or `size`.
        intervals: whether to log the 95 % intervals too, as `fd_low` and `fd_high`. They are more expensive than the
            scores.

    Attributes:
        reports: the reports by epoch, from 1, and by metric, with `intervals`.

    Raises:
        TypeError: if a metric is not a sample metric.
        ValueError: if an argument is out of range, conditions have another number of rows, or names coincide.
    """

    def __init__(
        self,
        metrics: SampleMetric | Sequence[SampleMetric],
        every: int = 1,
        num_samples: int = 1000,
        *,
        sampler: Sampler | Solver | str | None = None,
        steps: int | None = None,
        seed: int = 0,
        batch_size: int = 64,
        conditions: Mapping[str, Any] | None = None,
        options: Mapping[str, Any] | None = None,
        intervals: bool = False,
    ):
        super().__init__()
        for name, value, least in (("every", every, 1), ("num_samples", num_samples, 2), ("seed", seed, 0)):
            check_integer("EvaluationCallback", name, value, least)
        check_integer("EvaluationCallback", "batch_size", batch_size)
        if steps is not None:
            check_integer("EvaluationCallback", "steps", steps)
        self.scores = _check_metrics(metrics)
        self.every, self.num_samples, self.intervals = every, num_samples, intervals
        self.conditions = {name: _check_rows(name, value, num_samples) for name, value in (conditions or {}).items()}
        self.options = {"steps": steps, "seed": seed, "batch_size": batch_size, **(options or {})}
        if sampler is not None:
            self.options["sampler"] = sampler if isinstance(sampler, Sampler) else Solver.get(sampler)
        self.reports: dict[int, dict[str, Report]] = {}

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        """Evaluates every `every` epochs."""
        if (epoch + 1) % self.every:
            return
        try:
            found = self.evaluate(epoch + 1)
        except Exception as error:  # training goes on, whatever the error
            message = f"EvaluationCallback has no scores of epoch {epoch + 1}, and training goes on: "
            warnings.warn(f"{message}{type(error).__name__}: {error}", stacklevel=2)
            return
        if taken := sorted(set(found) & set(logs or {})):
            names = ", ".join(taken)
            warnings.warn(f"EvaluationCallback: {names} is already logged by `fit`; rename the metric", stacklevel=2)
        if logs is not None:
            logs.update({name: value for name, value in found.items() if name not in logs})

    def evaluate(self, epoch: int) -> dict[str, float]:
        """Draws samples and returns their scores, as they are logged."""
        samples = self.model.sample(self.num_samples, **self.options, **self.conditions)
        shared: dict[int, np.ndarray] = {}
        for metric in self.scores:
            metric.reset_state()
            metric.update_from(samples, self.conditions, shared)
        if not self.intervals:
            return {metric.name: metric.result() for metric in self.scores}
        self.reports[epoch] = reports = {metric.name: metric.report() for metric in self.scores}
        found = {}
        for name, report in reports.items():
            found |= {name: report.value, f"{name}_low": report.interval[0], f"{name}_high": report.interval[1]}
        return found


def _check_metrics(metrics: Any) -> list[SampleMetric]:
    metrics = list(metrics) if isinstance(metrics, Sequence) else [metrics]
    for metric in metrics:
        if not isinstance(metric, SampleMetric):
            raise TypeError(f"EvaluationCallback: a metric of kdiff.evaluation is expected; received: {metric!r}")
    names = [metric.name for metric in metrics]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"EvaluationCallback: metrics must have distinct names; received: {names}")
    return metrics


def _check_rows(name: str, value: Any, count: int) -> Any:
    value = None if value is None else np.asarray(value)
    if value is not None and value.ndim and len(value) != count:
        raise ValueError(
            f"EvaluationCallback: the condition {name!r} must be one value, or one row for each of {count} samples; "
            f"received the shape {value.shape}"
        )
    return value
