"""Denoising with importance sampling of the times by their losses."""

from collections.abc import Iterator, Mapping
from typing import Any

from keras import ops

from kdiff import backend
from kdiff.base import check_integer, check_number
from kdiff.objectives.base import Problem
from kdiff.objectives.denoising import Denoising, VariationalBound
from kdiff.schedules import NoiseSchedule
from kdiff.times import Discrete, TimeSampler
from kdiff.times.samplers import HALF_STEP, UNIFORM, check_points

__all__ = ["LossAware", "LossAwareBound"]


class LossAware(Denoising):
    """`Denoising`, with importance sampling of the times (Nichol and Dhariwal 2021, arXiv:2102.09672, section 3.3):

        p_i ~ sqrt(E[L_i^2]),  i = 0 ... T - 1,        loss = L_i / (T p_i)

    with E over the last `history` losses of each i, and uniform until every i has as many. It lowers the variance of a
    loss that differs much between noise levels, such as the variational bound; the expected loss is that of uniform
    times. The model's own `times` are not used.

    Its weights, `past_losses` and `counts`, are saved with the model. On a continuous schedule i is the interval
    [i / T, (i + 1) / T) of time, in which t is uniform; on a discrete schedule it is one step, or a fixed number of
    steps.

    With a learned variance L_i includes its bound; `LossAwareBound` is that bound alone.

    Two examples of a batch with the same i give two losses of its history, in the order of the batch; of more than
    `history`, the last are kept. Losses that are not finite are ignored.

    Args:
        num_steps: T, which must divide the number of steps of a discrete schedule.
        history: the number of losses kept for each i.
        uniform: the fraction of times that is always drawn uniformly, in (0, 1].
        points: the sampler of the uniform numbers, a `TimeSampler` of uniform times or its name.
    """

    def __init__(self, num_steps: int = 1000, history: int = 10, uniform: float = 0.001, points=UNIFORM):
        super().__init__()
        check_integer("LossAware", "num_steps", num_steps)
        check_integer("LossAware", "history", history)
        check_number("LossAware", "uniform", uniform, 1e-9, 1.0)
        self.points = check_points("LossAware", points)
        self.num_steps, self.history, self.uniform = num_steps, history, uniform
        self.past_losses = self._state("past_losses", (num_steps, history), "float32")
        self.counts = self._state("counts", (num_steps,), "int32")

    def _state(self, name: str, shape: tuple, dtype: str):
        return self.add_weight(name=name, shape=shape, dtype=dtype, initializer="zeros", trainable=False)

    def problem(self, model: Any, x, conditions: Mapping[str, Any], keys: Iterator, training: bool) -> Problem:
        problem = super().problem(model, x, conditions, keys, training)
        drawn, weight, extra = problem.drawn, problem.weight, problem.extra
        importance = self.importance(model.schedule, drawn.t)
        return problem._replace(
            weight=importance if weight is None else weight * importance,
            extra=None if extra is None else extra * importance,
            notes=(ops.ones_like(drawn.t) if weight is None else weight, 0.0 if extra is None else extra),
            drawn=drawn._replace(density=drawn.density / importance),
        )

    def learn(self, model: Any, problem: Problem, errors) -> None:
        weight, extra = problem.notes
        self.update(model.schedule, problem.drawn.t, errors * weight + extra)

    def times(self, model: Any) -> Any:
        return self.draw

    def density(self, model: Any) -> TimeSampler:
        return Discrete()

    def check(self, model: Any) -> None:
        super().check(model)
        self._check(model.schedule)

    def probabilities(self):
        """p_i, float32, shape `(T,)`."""
        size = ops.sqrt(ops.mean(ops.square(self.past_losses.value), axis=1))
        total, share = ops.sum(size), 1.0 / self.num_steps
        known = ops.logical_and(ops.all(self.counts.value >= self.history), total > 0)
        aware = (1.0 - self.uniform) * size / ops.where(total > 0, total, 1.0) + self.uniform * share
        return ops.where(known, aware, share)

    def draw(self, schedule: NoiseSchedule, batch, key):
        """Times t of which i has the probability p_i; float32, shape `(batch,)`.

        (i + r) / T, where a uniform u is the share r of the way through p_i; on a discrete schedule its next step.
        """
        self._check(schedule)
        u = ops.convert_to_tensor(self.points.cover(batch, key), "float32")
        p = self.probabilities()
        until = ops.cumsum(p)
        u = u * until[-1]  # 1 but for rounding
        i = ops.minimum(ops.searchsorted(until, u, side="right"), self.num_steps - 1)
        r = ops.clip(1.0 - (ops.take(until, i) - u) / ops.take(p, i), 0.0, 1.0 - 2.0 * HALF_STEP)
        i = ops.cast(i, "float32")
        if schedule.num_steps is None:
            return (i + r) / self.num_steps
        steps = schedule.num_steps // self.num_steps  # of each i
        return (i * steps + ops.floor(r * steps) + 1.0) / schedule.num_steps

    def importance(self, schedule: NoiseSchedule, t):
        """1 / (T p_i), of the shape of `t`: with this factor the expected loss is that of uniform times."""
        return 1.0 / (self.num_steps * ops.take(self.probabilities(), self._index(schedule, t)))

    def update(self, schedule: NoiseSchedule, t, losses) -> None:
        """Writes the losses, shape `(batch,)`, before any `importance`, over the oldest of their times."""
        losses = backend.gathered(ops.stop_gradient(ops.convert_to_tensor(losses, "float32")))
        t = backend.gathered(t)
        finite = ops.isfinite(losses)
        index = ops.where(finite, self._index(schedule, t), self.num_steps)  # an i of their own, cut off below
        order = ops.argsort(index)
        index, losses = ops.take(index, order), ops.take(ops.where(finite, losses, 0.0), order)
        # `place` is the number of earlier losses of the same i in the batch, `left` that of later ones.
        first, last = (ops.cast(ops.searchsorted(index, index, side=side), "int32") for side in ("left", "right"))
        place = ops.arange(ops.shape(index)[0], dtype="int32") - first
        left = last - first - 1 - place
        counts = ops.concatenate([self.counts.value, ops.zeros((1,), "int32")])
        slot = (ops.take(counts, index) + place) % self.history
        cell = index * self.history + slot
        end = self.num_steps * self.history
        cell = ops.where(ops.logical_or(index == self.num_steps, left >= self.history), end, cell)
        table = ops.concatenate([ops.reshape(self.past_losses.value, (-1,)), ops.zeros((1,), "float32")])
        table = ops.scatter_update(table, cell[:, None], losses)[:-1]
        counts = ops.segment_sum(ops.ones_like(index), index, self.num_steps + 1)[:-1] + self.counts.value
        self.past_losses.assign(ops.reshape(table, (self.num_steps, self.history)))
        self.counts.assign(counts)

    def _index(self, schedule: NoiseSchedule, t):
        """The i of each t: a discrete step stands at the end of what it rounds."""
        self._check(schedule)
        behind = 0.0 if schedule.num_steps is None else 0.5 / schedule.num_steps
        i = ops.floor((ops.convert_to_tensor(t, "float32") - behind) * self.num_steps)
        return ops.cast(ops.clip(i, 0, self.num_steps - 1), "int32")

    def _check(self, schedule: NoiseSchedule) -> None:
        if schedule.num_steps is not None and schedule.num_steps % self.num_steps:
            raise ValueError(
                f"LossAware: `num_steps` must divide {schedule.num_steps}, the number of steps of {schedule!r}; "
                f"received: {self.num_steps}"
            )


class LossAwareBound(LossAware, VariationalBound):
    """`VariationalBound` with the times of `LossAware`: L_vlb as improved DDPM trains it (Nichol and Dhariwal 2021,
    arXiv:2102.09672, section 3.3), of which L_i are the terms.

    Args:
        num_steps, history, uniform, points: as in `LossAware`.
    """
