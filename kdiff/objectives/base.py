"""The interface of objectives, which turn a clean batch into the regression problem of a training step.

    problem = objective.problem(model, x, conditions, keys, training)
    loss    = mean(weight * loss(target, output)) + mean(extra)

An objective may use all of the model: its network (`model.output`), any number of times and also with the averaged
weights, its schedule, its times and its prediction. A custom objective, which makes the estimates at two noise levels
of the same data agree:

    class Agreement(Objective):
        def problem(self, model, x, conditions, keys, training):
            t = model.times(model.schedule, ops.shape(x)[0], next(keys))
            noise = random.normal(next(keys), ops.shape(x))
            here, less = model.schedule.at(t), model.schedule.at(0.9 * t)
            def x_hat(m, training, ema):
                x_t = m.like(x).alpha * x + m.like(x).sigma * noise
                return model.prediction.denoise(model.output(x_t, m, conditions, training, ema), x_t, m)
            return Problem(x_hat(here, training, not training), ops.stop_gradient(x_hat(less, False, True)))

An objective is a Keras layer, so another model or variables that it holds are parts of the model and saved with it;
only the weights of the network are averaged.
"""

from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import keras

from kdiff.base import Configurable

__all__ = ["Drawn", "Objective", "Problem"]


class Drawn(NamedTuple):
    """The data and times of a problem with one noise level per example.

    Attributes:
        data: x, with shape `(batch, ...)`.
        t: the times, `(batch,)`.
        density: the density p(t) from which they were drawn; None if it is not known.
        m: the marginals `schedule.at(t)`, at that state of the schedule.
        slope: d log_snr / dt at t; None if the density is None.
    """

    data: Any
    t: Any
    density: Any = None
    m: Any = None
    slope: Any = None


class Problem(NamedTuple):
    """The regression problem of a training step.

    Attributes:
        output: the output to be trained, float32, with shape `(batch, ...)`.
        target: its target, with the same shape.
        weight: the weight of the loss of each example, `(batch,)`; None is 1.
        extra: a term added to the loss of each example, `(batch,)`; None is 0.
        notes: values for `learn`, a nested structure of tensors.
        drawn: the `Drawn` of the problem, for metrics that need it, such as `likelihood.BitsPerDim`.
    """

    output: Any
    target: Any
    weight: Any = None
    extra: Any = None
    notes: Any = ()
    drawn: Any = None


class Objective(Configurable, keras.layers.Layer):
    """The base class of all objectives. A new one defines `problem`.

    Attributes:
        inputs: the names of additional entries of the data, which `problem` receives among the conditions.
        drawn_inputs: the range (low, high) of each guidance scale that `problem` draws and passes to the network, by
            the name of the input. `sample` then needs the scale.
        sampled_by: the arguments of the `Sampler` that suits the trained network, used by `students.student`.
    """

    inputs: tuple[str, ...] = ()
    drawn_inputs: Mapping[str, tuple[float, float]] = MappingProxyType({})
    sampled_by: Mapping[str, Any] = MappingProxyType({})

    def __init__(self):
        super().__init__(dtype="float32", autocast=False)
        self.built = True

    @property
    def metrics(self) -> list:
        """Its own metrics, without those of another model that it holds."""
        return list(self._metrics)

    def problem(self, model: Any, x, conditions: Mapping[str, Any], keys: Iterator, training: bool) -> Problem:
        """The problem of a batch.

        Args:
            model: the `DiffusionModel`.
            x: data, float32, with shape `(batch, ...)`.
            conditions: the conditions by name, with one row per example.
            keys: keys of random numbers (`kdiff.random`): `next(keys)` is a fresh key, the same on every backend.
            training: whether the weights are trained, or the averages are evaluated.
        """
        raise NotImplementedError

    def learn(self, model: Any, problem: Problem, errors) -> None:
        """Updates the objective itself by a training step with mean squared errors `errors`, `(batch,)`; optional."""

    def check(self, model: Any) -> None:
        """Raises a ValueError if the objective does not fit the model; called when the model is created."""

    def taken(self) -> None:
        """Called when a model has this objective, which has passed `check`."""
