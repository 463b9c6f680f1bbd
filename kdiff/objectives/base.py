"""What all objectives share: from a clean batch to the problem that a training step solves.

    problem = objective.problem(model, x, conditions, keys, training)
    loss    = mean(weight * loss(target, output)) + mean(extra)

An objective asks the model what it likes: its network (`model.output`), as often as it wants and with the averaged
weights too, its schedule, its times, its prediction. One of your own, by which the answers at two noise levels of the
same data come together:

    class Agreement(Objective):
        def problem(self, model, x, conditions, keys, training):
            t = model.times(model.schedule, ops.shape(x)[0], next(keys))
            noise = random.normal(next(keys), ops.shape(x))
            here, less = model.schedule.at(t), model.schedule.at(0.9 * t)
            def x_hat(m, training, ema):
                x_t = m.like(x).alpha * x + m.like(x).sigma * noise
                return model.prediction.denoise(model.output(x_t, m, conditions, training, ema), x_t, m)
            return Problem(x_hat(here, training, not training), ops.stop_gradient(x_hat(less, False, True)))

It is a Keras layer, so that what it holds, another model or counts of its own, is a part of the model and saved with
it; the averages are of the network alone.
"""

from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import keras

from kdiff.base import Configurable

__all__ = ["Drawn", "Objective", "Problem"]


class Drawn(NamedTuple):
    """What a problem of one noise level an example was made of.

    Attributes:
        data: x, with shape `(batch, ...)`.
        t: its times, `(batch,)`.
        density: p(t), by which they were drawn; None if it is not known.
        m: the marginals, `schedule.at(t)`, of the schedule as it was then.
        slope: d log_snr / dt, likewise; None if the density is.
    """

    data: Any
    t: Any
    density: Any = None
    m: Any = None
    slope: Any = None


class Problem(NamedTuple):
    """What a training step solves.

    Attributes:
        output: what is trained, float32, with shape `(batch, ...)`.
        target: what it should be, of the same shape.
        weight: the factor on the loss of each example, `(batch,)`; None is 1.
        extra: what is added to the loss of each example, `(batch,)`; None is nothing.
        notes: what `learn` is to be told, a nest of tensors.
        drawn: the `Drawn` that the problem was made of, for metrics that ask for it, as `likelihood.BitsPerDim` does.
    """

    output: Any
    target: Any
    weight: Any = None
    extra: Any = None
    notes: Any = ()
    drawn: Any = None


class Objective(Configurable, keras.layers.Layer):
    """The base of all objectives. A new one defines `problem`.

    Attributes:
        inputs: what data may hold beside what the network takes, by name; `problem` finds it among the conditions.
        sampled_by: the arguments of the `Sampler` that suits what is learned, which `students.student` takes.
    """

    inputs: tuple[str, ...] = ()
    sampled_by: Mapping[str, Any] = MappingProxyType({})

    def __init__(self):
        super().__init__(dtype="float32", autocast=False)
        self.built = True

    @property
    def metrics(self) -> list:
        """Its own, and not those of another model that it asks."""
        return list(self._metrics)

    def problem(self, model: Any, x, conditions: Mapping[str, Any], keys: Iterator, training: bool) -> Problem:
        """The problem of a batch.

        Args:
            model: the `DiffusionModel`.
            x: data, float32, with shape `(batch, ...)`.
            conditions: by name, one row an example.
            keys: keys of random numbers (`kdiff.random`): `next(keys)` is a fresh one, the same on every backend.
            training: whether the weights are trained, or the averages evaluated.
        """
        raise NotImplementedError

    def learn(self, model: Any, problem: Problem, errors) -> None:
        """Learns from a training step: `errors`, `(batch,)`, are the mean squared errors; most objectives do not."""

    def check(self, model: Any) -> None:
        """Raises a ValueError if the objective does not suit the model; called when the model is made."""
