"""Flow maps: networks that step from any noise level to any lower one.

Both need the input "interval", as in `blocks.Interval`, and are sampled by `solvers.FlowMap`; with an interval of 0
they are diffusion models, which any other solver can sample.
"""

from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
from keras import ops

from kdiff import deprecated, random
from kdiff.base import check_integer, check_number
from kdiff.denoisers import INTERVAL, interval, leading
from kdiff.objectives.base import Objective, Problem
from kdiff.objectives.effective_weight import loss_weight
from kdiff.objectives.taught import (
    Taught,
    check_continuous,
    check_simple,
    check_tangent,
    condition_inputs,
    implied_output,
    joined_jumps,
    noised,
    rows,
    still,
)
from kdiff.predictions import Flow
from kdiff.solvers.base import flow_to
from kdiff.tangents import Tangent

__all__ = ["MeanFlow", "Shortcut"]


def _check_interval(owner: str, model: Any) -> None:
    taken = condition_inputs(model)
    if INTERVAL not in taken or not taken[INTERVAL].optional:
        raise ValueError(
            f"{owner}: the network must have the input {INTERVAL!r}: give it `conditions={{'interval': "
            f"blocks.Interval()}}`; it has: {sorted(taken)}"
        )


def _part(share: float, batch):
    """The number of examples in this fraction of a batch, at least one."""
    return (
        ops.maximum(ops.cast(share * ops.cast(batch, "float32"), "int32"), 1)
        if ops.is_tensor(batch)
        else max(int(share * batch), 1)
    )


def _joined(*parts):
    return ops.concatenate(parts, axis=0)


class Shortcut(Objective):
    """Shortcut models (Frans et al. 2024, arXiv:2410.12557, algorithm 1), on any continuous schedule. In each batch

        a fraction `share`   learns x_hat(x_now, now, then) from two steps of half the length, by the averaged weights
        the rest             learns denoising, with an interval of 0: flow matching

    where now = (i + 1) / N, then = i / N, i = 0 ... N - 1, with N one of 1, 2, 4 ... `steps` / 2. The shortest steps,
    of 1 / `steps`, use an interval of 0. With Flow on Rectified the target of the first part is that of the paper, the
    mean (s(x_now, now, d) + s(x_mid, mid, d)) / 2 of two velocities. The model's `times` are used for the rest.

    It needs no teacher: one network learns both at once. It is sampled by `FlowMap` in 1, 2, 4 ... steps.

    Args:
        share: the fraction of the batch that learns longer steps: its first examples, at least one.
        steps: the number of the shortest steps, a power of 2.
    """

    sampled_by = MappingProxyType({"solver": "flow_map", "steps": 4})

    def __init__(self, share: float = 0.25, steps: int = 128):
        super().__init__()
        check_number("Shortcut", "share", share, 0.0, 1.0)
        check_integer("Shortcut", "steps", steps, 2)
        if steps & (steps - 1):
            raise ValueError(f"Shortcut: `steps` must be a power of 2; received: {steps}")
        self.share, self.steps = share, steps

    def problem(self, model: Any, x, conditions: Mapping[str, Any], keys: Iterator, training: bool) -> Problem:
        schedule, prediction, batch = model.schedule, model.prediction, ops.shape(x)[0]
        count = _part(self.share, batch)
        noise = random.normal(next(keys), ops.shape(x))
        now, mid, then, shortest = self._steps(schedule, random.uniform(next(keys), (batch, 2))[:count])
        t = _joined(now.t, model.times(schedule, batch, next(keys))[count:])
        m = schedule.at(ops.maximum(t, schedule.first_time))
        x_t = noised(x, noise, m)
        long = interval(now, then)
        told = {**conditions, INTERVAL: _joined(long, ops.zeros_like(t[count:]))}
        output = model.output(x_t, m, told, training, ema=not training)

        def target():
            start = x_t[:count]
            some = {name: value[:count] for name, value in conditions.items()}

            def x_hat(at, here, there):
                short = ops.where(shortest, 0.0, interval(here, there))
                answer = model.output(at, here, {**some, INTERVAL: short}, training=False, ema=True)
                return prediction.denoise(answer, at, here)

            first = x_hat(start, now, mid)
            second = x_hat(flow_to(start, first, now.like(start), mid.like(start)), mid, then)
            return implied_output(prediction, joined_jumps(first, second, now, mid, then), start, now)

        rest = type(m)(*(field[count:] for field in m))
        target = _joined(still(target), prediction.target(x[count:], noise[count:], rest))
        return Problem(output, target, loss_weight(schedule, prediction, model.weighting, model.times, m))

    def _steps(self, schedule, u):
        """(now, mid, then, whether the halves are the shortest steps), from two uniform numbers per example."""
        levels = int(np.log2(self.steps))
        number = ops.cast(2 ** ops.cast(levels * u[:, 0], "int32"), "float32")  # N = 1, 2, 4 ... steps / 2
        i = ops.minimum(ops.floor(number * u[:, 1]), number - 1.0)
        now, mid, then = (schedule.sampled_at((i + 1.0 - part) / number) for part in (0.0, 0.5, 1.0))
        return now, mid, then, number > 0.75 * self.steps / 2

    def check(self, model: Any) -> None:
        """Raises a ValueError for a network without the interval, a discrete schedule or a learned variance."""
        _check_interval("Shortcut", model)
        check_continuous("Shortcut", model)
        check_simple("Shortcut", model)


class MeanFlow(Taught):
    """MeanFlow (Geng et al. 2025, arXiv:2505.13447, eqs. 6 and 11), which learns the average velocity u between times:

        u(x_s, s, r) = 1 / (s - r) integral of the velocity v from r to s,
        target       = v - (s - r) du/ds,    du/ds along (dx, ds, dr) = (v, 1, 0),      v = noise - x
        loss         = w |u - target|^2,     w = 1 / (|u - target|^2 + c)^power,        a constant

    with the prediction Flow, on Rectified or another schedule with alpha + sigma = 1. s and r are the values of sigma
    for two draws from the model's `times`, the larger first, for a fraction `share` of each batch; for the rest r = s,
    which is flow matching. The paper's times are LogitNormal(-0.4, 1.0). With a teacher v is its velocity. It needs no
    other network, but far more training than the other objectives, since it learns from its own derivative. The scale
    of the time input must be small, as in `time_label=Scaled(10.0)`.

    Args:
        teacher: a `DiffusionModel` that provides the velocity; None: that of the data and the noise.
        share: the fraction of the batch with r < s: its first examples, at least one.
        tangent: a `Tangent` or its name, for du/ds; `tangents.FiniteDifference` needs a float32 network.
        power: the exponent of the adaptive weight; 0 for none.
        c: the constant of the adaptive weight, which keeps it finite.
        guidance, guidance_input: as in `Taught`. Without a teacher the network provides the guidance (section 4.2,
            eqs. 18 to 21): v becomes w v + kappa u(x_s, s, s) + (1 - w - kappa) u(x_s, s, s | no condition), with
            w = (1 - kappa) guidance, so that one evaluation samples with this scale.
        kappa: the mixing weight of guidance without a teacher, in [0, 1).
    """

    sampled_by = MappingProxyType({"solver": "flow_map", "steps": 1})
    guides_itself = True

    @deprecated.arguments(steering="guidance_input")
    def __init__(
        self,
        teacher: Any = None,
        share: float = 0.25,
        tangent="finite_difference",
        power: float = 1.0,
        c: float = 1e-3,
        guidance: Any = None,
        guidance_input: str = "timestep_cond",
        kappa: float = 0.0,
    ):
        super().__init__(teacher, guidance, guidance_input)
        check_number("MeanFlow", "share", share, 0.0, 1.0)
        check_number("MeanFlow", "kappa", kappa, 0.0, 1.0)
        check_number("MeanFlow", "power", power, 0.0)
        check_number("MeanFlow", "c", c, 1e-12)
        self.share, self.tangent, self.power, self.c, self.kappa = share, Tangent.get(tangent), power, c, kappa

    def problem(self, model: Any, x, conditions: Mapping[str, Any], keys: Iterator, training: bool) -> Problem:
        schedule, batch = model.schedule, ops.shape(x)[0]
        count = _part(self.share, batch)
        noise = random.normal(next(keys), ops.shape(x))
        first, second = (model.times(schedule, batch, next(keys)) for _ in range(2))
        late = _joined(ops.maximum(first, second)[:count], first[count:])
        early = _joined(ops.minimum(first, second)[:count], first[count:])
        m, r = schedule.at(late), schedule.at(early)
        x_t, scale = noised(x, noise, m), self.scales(x, next(keys))
        data, fresh = self.ends(model, x, noise, x_t, m, conditions, scale)
        conditions, velocity = self.told(conditions, scale), fresh - data
        if self.teacher is None and scale is not None:
            velocity = self._guided_velocity(model, velocity, x_t, m, conditions, scale, training)
        u = model.output(x_t, m, leading(conditions, m, r), training, ema=not training)
        slope = self._slope(model, x_t, velocity, m, r, conditions, count, training)
        change = _joined(rows((m.sigma - r.sigma)[:count], x) * slope, ops.zeros_like(x[count:]))
        target = ops.stop_gradient(velocity - change)
        size = ops.sum(ops.square(ops.stop_gradient(u) - target), axis=tuple(range(1, len(x.shape))))
        dimension = float(np.prod(x.shape[1:]))  # the loss of Keras is a mean over the coordinates
        return Problem(u, target, dimension / (size + self.c) ** self.power if self.power else None)

    def _guided_velocity(self, model, velocity, x_t, m, conditions, scale, training):
        """w v + kappa u + (1 - w - kappa) u_none, u a constant, without an interval."""
        denoise = model.denoiser_in_step(ema=not training, **conditions)
        both = still(
            lambda: [one.x_hat for one in denoise.batched(x_t, m, denoise.conditions, denoise.unconditional())]
        )
        given, none = ((x_t - x_hat) / m.like(x_t).sigma for x_hat in both)  # of Flow, where alpha + sigma = 1
        w = rows((1.0 - self.kappa) * scale, x_t)
        return w * velocity + self.kappa * given + (1.0 - w - self.kappa) * none

    def _slope(self, model, x_t, velocity, m, r, conditions, count, training):
        """du/ds for the first examples."""
        some = {name: value[:count] for name, value in conditions.items()}
        x_t, velocity, s = x_t[:count], velocity[:count], m.sigma[:count]
        end = type(r)(*(field[:count] for field in r))

        def curve(e):
            moved = s + e
            here = model.schedule.at_log_snr(2.0 * ops.log((1.0 - moved) / moved))
            moved_x = x_t + rows(e, x_t) * velocity
            return model.output(moved_x, here, leading(some, here, end), training=False, ema=not training)

        clean, noisy = (model.schedule.scales(end)[1] for end in model.schedule.log_snr_ends())
        return self.tangent(curve, ops.zeros_like(s), s - clean, noisy - s)

    def check(self, model: Any) -> None:
        """Raises a ValueError for another prediction or schedule, or a network without the interval or float32."""
        super().check(model)
        _check_interval("MeanFlow", model)
        check_continuous("MeanFlow", model)
        if not isinstance(model.prediction, Flow):
            raise ValueError(f"MeanFlow: the prediction must be Flow(), the velocity; received: {model.prediction!r}")
        m = model.schedule.at(np.linspace(0.0, 1.0, 5, dtype="float32"))
        if not np.allclose(ops.convert_to_numpy(m.alpha + m.sigma), 1.0, atol=1e-4):
            raise ValueError(
                f"MeanFlow: the schedule must be linear, alpha + sigma = 1, as Rectified(); received: "
                f"{model.schedule!r}"
            )
        if model.weighting is not None:
            raise ValueError(f"MeanFlow: it has a weight of its own; received: weighting={model.weighting!r}")
        check_tangent("MeanFlow", self.tangent, model)
