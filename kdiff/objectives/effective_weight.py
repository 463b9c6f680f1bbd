"""The effective loss weight of a schedule, a prediction, a weighting and the training times.

For any prediction, and any distribution and weighting of noise levels, a network is trained with

    L = 1/2 integral of w(l) E|noise_hat - noise|^2 dl,        l = log_snr,

so the objective is determined by one function w, its effective weight (Kingma and Gao 2023, arXiv:2303.00848, eq. 8 and
table 1). The variational bound has w = 1. If the loss is defined per unit of l, only the ends of the schedule matter;
otherwise the schedule and the times determine the density p(l) of the noise levels, which acts as a weight:

    w(l) = 2 p(l) weight(l) / SNR,        p(l) = p(t) / |d l / d t|,

where weight is the factor on |x_hat - x|^2, and |noise_hat - noise|^2 = SNR |x_hat - x|^2. Two networks with the same
w, up to a constant factor, are trained with the same objective (`same_objective`), though with different variance.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Self

import numpy as np
from keras import ops

from kdiff.base import needs
from kdiff.predictions import Prediction
from kdiff.schedules import Marginal, NoiseSchedule
from kdiff.times import TimeSampler
from kdiff.weightings import Weighting
from kdiff.writing import replacing

__all__ = ["POINTS", "Recipe", "effective_weight", "loss_weight", "plot_objective", "same_objective"]

POINTS = 400  # the number of log-SNRs at which weights are compared, plotted and integrated


class Recipe(NamedTuple):
    """The objects that determine the effective weight."""

    schedule: NoiseSchedule
    prediction: Prediction
    weighting: Weighting | None
    times: TimeSampler

    @classmethod
    def of(cls, source: Any) -> Self:
        """The recipe of a tuple `(schedule, prediction, weighting, times)`, of objects or names, or of a model.

        Raises:
            TypeError: if it is neither.
        """
        if not isinstance(source, tuple):
            if not all(hasattr(source, name) for name in cls._fields):
                raise TypeError(f"Expected a model, or a tuple {cls._fields}; received: {source!r}")
            source = tuple(getattr(source, name) for name in cls._fields)
        if len(source) != len(cls._fields):
            raise TypeError(f"A recipe is a tuple {cls._fields}; received: {source!r}")
        schedule, prediction, weighting, times = source
        weighting = None if weighting is None else Weighting.get(weighting)
        return cls(NoiseSchedule.get(schedule), Prediction.get(prediction), weighting, TimeSampler.get(times))


def loss_weight(
    schedule: NoiseSchedule, prediction: Prediction, weighting: Weighting | None, times: TimeSampler, m: Marginal
) -> Any:
    """The factor on the squared error of the network's output, |y_hat - y|^2:

        weighting(log_snr) gain^2,   or   weighting(log_snr) gain^2 / p(log_snr)   if the weighting is `per_log_snr`.

    Args:
        schedule: the schedule.
        prediction: the parametrisation of the network.
        weighting: the weighting, or None.
        times: the times of training.
        m: the marginals of the batch, `schedule.at(t)`.

    Returns:
        float32, with the shape of the fields of `m`; None, for a factor of 1, if `weighting` is None.
    """
    if weighting is None:
        return None
    weight = weighting(m.log_snr) * prediction.gain(m) ** 2
    return weight / _density(schedule, times, m.t) if weighting.per_log_snr else weight


def _density(schedule: NoiseSchedule, times: TimeSampler, t):
    """p(log_snr) = p(t) / |d log_snr / dt|, above zero."""
    return ops.maximum(times.density(schedule, t) / ops.abs(schedule.slope(t)), 1e-30)


def effective_weight(
    schedule, prediction, weighting=None, times="uniform", *, normalise: bool = False
) -> Callable[[Any], np.ndarray]:
    """w in L = 1/2 integral of w(log_snr) E|noise_hat - noise|^2 dlog_snr.

    Args:
        schedule: a `NoiseSchedule` or its name.
        prediction: a `Prediction` or its name.
        weighting: a `Weighting` or its name; None is the simple loss.
        times: a `TimeSampler` or its name.
        normalise: whether to divide w by its integral over the log-SNRs of the schedule, removing constant factors.

    Returns:
        A function from a NumPy array of log-SNRs to float64 with the same shape, 0 outside the range of the schedule.
        Multiplied by SNR / 2 it is the weight of |x_hat - x|^2.
    """
    recipe = Recipe.of((schedule, prediction, weighting, times))
    lowest, highest = _range(recipe.schedule)

    def weight(log_snr) -> np.ndarray:
        log_snr = np.asarray(log_snr, "float64")
        inside = (log_snr >= lowest - 1e-4) & (log_snr <= highest + 1e-4)
        return np.where(inside, _effective(recipe, np.clip(log_snr, lowest, highest)), 0.0)

    if not normalise:
        return weight
    places = np.linspace(lowest, highest, POINTS)
    total = np.trapezoid(weight(places), places)
    return lambda log_snr: weight(log_snr) / total


def _effective(recipe: Recipe, log_snr: np.ndarray) -> np.ndarray:
    """2 p(l) weight(l) / SNR."""
    schedule, prediction, weighting, times = recipe
    m = schedule.at_log_snr(log_snr)
    weight = 1.0 / prediction.gain(m) ** 2 if weighting is None else weighting(m.log_snr)
    if weighting is None or not weighting.per_log_snr:
        weight = weight * _density(schedule, times, ops.clip(m.t, 0.0, 1.0))
    return 2.0 * ops.convert_to_numpy(weight).astype("float64") * np.exp(-log_snr)


def _range(schedule: NoiseSchedule) -> tuple[float, float]:
    """(smallest, largest) log-SNR."""
    largest, smallest = (float(ops.convert_to_numpy(end)) for end in schedule.log_snr_ends())
    return smallest, largest


def same_objective(a, b, tolerance: float = 0.02) -> bool:
    """Whether two recipes are the same objective up to a constant factor, over their common log-SNRs.

    The effective weights are compared at 400 evenly spaced log-SNRs of the common range, without a hundredth of it at
    each end, where float32 times are inaccurate. Regions where neither weight matters are excluded: those below 1e-5 of
    its maximum as a weight of the error of the noise, of the data, and of one halfway (the flow). The ends of the range
    are part of the objective but are not compared, and neither is the variance of the loss.

    Args:
        a: a tuple `(schedule, prediction, weighting, times)`, of objects or names, or a model.
        b: the same.
        tolerance: the largest relative deviation of the ratio of the two weights from its median.

    Raises:
        ValueError: if the two have no log-SNR in common.
    """
    a, b = Recipe.of(a), Recipe.of(b)
    lowest, highest = (
        f(ends) for f, ends in zip((max, min), zip(*map(_range, (a[0], b[0])), strict=True), strict=True)
    )
    if not lowest < highest:
        raise ValueError(f"same_objective: {a.schedule!r} and {b.schedule!r} have no log-SNR in common")
    margin = (highest - lowest) / 100
    places = np.linspace(lowest + margin, highest - margin, POINTS)
    first, second = (effective_weight(*recipe)(places) for recipe in (a, b))
    counts = _matters(first, places) | _matters(second, places)
    with np.errstate(divide="ignore"):
        quotient = np.log(first[counts]) - np.log(second[counts])
    return bool(np.all(np.abs(quotient - np.median(quotient)) <= np.log1p(tolerance)))


def _matters(weight: np.ndarray, log_snr: np.ndarray) -> np.ndarray:
    """Where a weight is above 1e-5 of its maximum, as a weight of the noise, the data or one halfway."""
    weights = [weight * np.exp(power * log_snr) for power in (0.0, 0.5, 1.0)]
    return np.any([one > 1e-5 * one.max() for one in weights], axis=0)


def plot_objective(*recipes, labels=None, normalise: bool = True, path: str | None = None):
    """Plots the effective weights of recipes, on |noise_hat - noise|^2 and on |x_hat - x|^2, against log-SNR.

    Args:
        *recipes: tuples `(schedule, prediction, weighting, times)`, of objects or names, or models.
        labels: one label per recipe; None: the names of its objects.
        normalise: whether to scale each to an integral of 1.
        path: the file for the figure.

    Returns:
        The matplotlib figure.

    Raises:
        ImportError: if matplotlib is missing (the extra `plot`).
    """
    with needs("plot", "Plots need matplotlib"):
        from matplotlib.figure import Figure

    recipes = [Recipe.of(recipe) for recipe in recipes]
    labels = [", ".join(map(repr, recipe)) for recipe in recipes] if labels is None else labels
    figure = Figure(figsize=(9, 3.5), layout="constrained")
    noise, data = figure.subplots(1, 2)
    for recipe, label in zip(recipes, labels, strict=True):
        log_snr = np.linspace(*_range(recipe.schedule), POINTS)
        weight = effective_weight(*recipe, normalise=normalise)(log_snr)
        noise.plot(log_snr, weight, label=label)
        weight = weight * np.exp(log_snr)
        data.plot(log_snr, weight / (np.trapezoid(weight, log_snr) if normalise else 2.0))
    noise.set_title("weight of |noise_hat - noise|²")
    data.set_title("weight of |x_hat - x|²")
    for axes in (noise, data):
        axes.set_xlabel("log-SNR  (noise on the left)")
    figure.legend(loc="outside lower center", fontsize="small")
    if path is not None:
        with replacing(path) as new:
            figure.savefig(new)
    return figure
