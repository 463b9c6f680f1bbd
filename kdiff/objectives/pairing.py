"""Consistency models: a network whose estimate is constant along a trajectory of the probability flow.

Noise levels are ratios s = sigma / alpha, the sigma of Karras et al. 2022, on any continuous schedule.
"""

import math
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
from keras import ops

from kdiff import deprecated, random
from kdiff.base import Value, check_integer, check_number
from kdiff.denoisers import leading
from kdiff.objectives.base import Problem
from kdiff.objectives.taught import Taught, check_continuous, check_noisy_end, check_simple, noised, rows, still
from kdiff.schedules import CLEAN_LOG_SNR, Marginal, NoiseSchedule

__all__ = ["Consistency", "Discretised", "Easy", "Pairs"]


class Pairs(Value):
    """The base class of rules for the two noise levels that are compared. A new one defines `__call__`."""

    def __call__(self, s, least, most, step):
        """(s, r), r < s, both `(batch,)`; values of r up to `least` stand for data.

        Args:
            s: ratios drawn from the model's times, `(batch,)`.
            least, most: the ratios at the ends of the schedule, scalars.
            step: the number of training steps made, a scalar int32.
        """
        raise NotImplementedError


class Discretised(Pairs):
    """Neighbours on a grid that is refined in training (Song and Dhariwal 2023, arXiv:2310.14189, sections 3.4, 3.5):

        s_i = (least^(1/rho) + i / (N - 1) (most^(1/rho) - least^(1/rho)))^rho,       i = 0 ... N - 1,
        N   = min(first 2^floor(step / K'), last) + 1,     K' = floor(iterations / (floor(log2(last / first)) + 1)).

    A drawn ratio is rounded up to s_{i+1} and compared with s_i. With the paper's times, LogNormalSigma(-1.1, 2.0), i
    has the paper's probability, a difference of error functions.

    Args:
        iterations: the number of steps of the whole training.
        first, last: the numbers of intervals at its beginning and end.
        rho: the exponent of the grid.
    """

    def __init__(self, iterations: int, first: int = 10, last: int = 1280, rho: float = 7.0):
        check_integer("Discretised", "iterations", iterations)
        check_integer("Discretised", "first", first)
        check_integer("Discretised", "last", last, first)
        check_number("Discretised", "rho", rho, 0.1, 100.0)
        self.iterations, self.first, self.last, self.rho = iterations, first, last, rho

    def intervals(self, step):
        """N - 1 at a step, float32."""
        stay = max(1, int(self.iterations / (math.floor(math.log2(self.last / self.first)) + 1)))
        doublings = ops.minimum(ops.cast(step, "int32") // stay, 30)
        return ops.cast(ops.minimum(self.first * ops.cast(2**doublings, "float32"), float(self.last)), "float32")

    def __call__(self, s, least, most, step):
        count, low, high = self.intervals(step), least ** (1.0 / self.rho), most ** (1.0 / self.rho)
        place = (s ** (1.0 / self.rho) - low) / (high - low) * count
        i = ops.clip(ops.floor(place), 0.0, count - 1.0)
        return tuple((low + (i + more) / count * (high - low)) ** self.rho for more in (1.0, 0.0))


class Easy(Pairs):
    """Easy consistency tuning, with a decreasing relative distance (Geng et al. 2024, arXiv:2406.14548, section 3.2):

        r = s max(0, 1 - q^-(a + 1) (1 + k sigmoid(-b s))),     a = floor(stages step / iterations) < stages.

    Initially almost all r are data, which is denoising, so training can start from a diffusion model
    (`students.student`); only the later stages make it a consistency function.

    Args:
        iterations: the number of steps of the whole training.
        q, k, b: the constants above.
        stages: the number of stages; in each the distance is q times smaller than in the one before.
    """

    def __init__(self, iterations: int, q: float = 2.0, k: float = 8.0, b: float = 1.0, stages: int = 8):
        check_integer("Easy", "iterations", iterations)
        check_number("Easy", "q", q, 1.0 + 1e-6)
        check_number("Easy", "k", k, 0.0)
        check_number("Easy", "b", b, 0.0)
        check_integer("Easy", "stages", stages)
        self.iterations, self.q, self.k, self.b, self.stages = iterations, q, k, b, stages

    def __call__(self, s, least, most, step):
        done = ops.minimum(ops.cast(step, "int32"), self.iterations - 1)
        a = ops.cast(done * self.stages // self.iterations, "float32")
        way = (1.0 + self.k * ops.sigmoid(-self.b * s)) * self.q ** (-(a + 1.0))
        return s, s * ops.maximum(1.0 - way, 0.0)


class Consistency(Taught):
    """A consistency model f = x_hat(x_s, s), equal at two noise levels of a trajectory, and x at the clean end:

        loss = w |f(x_s, s) - f(x_r, r)|^2,   f(x_r, r) a constant, and x_r if r is the clean end
        w    = 1 / (s - r) / sqrt(|f(x_s, s) - f(x_r, r)|^2 + c^2)

    (Song et al. 2023, arXiv:2303.01469, algorithms 2 and 3), where x_r is

        without a teacher   from the same data and noise: consistency training (eq. 10)
        with a teacher      a step of Heun's method by the teacher from x_s: consistency distillation (eq. 7)

    and the second factor of w makes the gradient that of the pseudo-Huber metric (Song and Dhariwal 2023,
    arXiv:2310.14189, section 3.3): compile the model with the loss "mse". Three published recipes,

        distilled (CD)   students.student(teacher, Consistency(teacher))
        easy (ECT)       students.student(teacher, Consistency(pairs=Easy(iterations)))
        improved (iCT)   DiffusionModel(..., objective=Consistency(pairs=Discretised(iterations)))

    all on `VarianceExploding(0.002, 80.0)` with the prediction `Karras(0.5)`, `times=LogNormalSigma(-1.1, 2.0)` and
    `time_label=LogSNR(-0.125)` or another that tells noise levels apart all along, and sampled by `solvers.Consistency`
    in 1, 2 or 4 steps. These numbers are for data of standard deviation 0.5; times that seldom come near the noise at
    which sampling begins leave one step blurred. The target is asked without dropout. A `weighting` of the model takes
    the place of 1 / (s - r).

    Args:
        teacher: a `DiffusionModel`, whose trajectories are followed; None for those of data and noise.
        pairs: a `Pairs`: which two noise levels. None, with a teacher: neighbours on a grid of 18 levels, as in the
            first paper. Without a teacher it is required, since the two levels approach each other during training.
        ema: whether the target is computed with the averaged (EMA) weights.
        c: the constant in w; None for 0.00054 sqrt(d), with d the size of an example.
        guidance, guidance_input: as in `Taught`.
    """

    sampled_by = MappingProxyType({"solver": "consistency", "steps": 2})

    @deprecated.arguments(averaged="ema", steering="guidance_input")
    def __init__(
        self,
        teacher: Any = None,
        pairs: Any = None,
        ema: bool = False,
        c: float | None = None,
        guidance: Any = None,
        guidance_input: str = "timestep_cond",
    ):
        super().__init__(teacher, guidance, guidance_input)
        if pairs is None and teacher is None:
            raise ValueError(
                "Consistency: without a teacher say how many steps training has, by which the two noise levels come "
                "together: `pairs=Easy(iterations)`, going on from a diffusion model, or "
                "`pairs=Discretised(iterations)`"
            )
        if c is not None:
            check_number("Consistency", "c", c, 1e-12)
        self.pairs, self.ema, self.c = Pairs.get(Discretised(1, 17, 17) if pairs is None else pairs), ema, c

    def problem(self, model: Any, x, conditions: Mapping[str, Any], keys: Iterator, training: bool) -> Problem:
        schedule, (clean, noisy) = model.schedule, model.schedule.log_snr_ends()
        least, most = ops.exp(-0.5 * clean), ops.exp(-0.5 * noisy)
        drawn = schedule.at(model.times(schedule, ops.shape(x)[0], next(keys)))
        s, r = self.pairs(ops.exp(-0.5 * drawn.log_snr), least, most, model.step.value)
        m, at_end = _at(schedule, s), r <= 1.0001 * least
        end = _at(schedule, ops.where(at_end, math.exp(-0.5 * CLEAN_LOG_SNR), r))
        noise = random.normal(next(keys), ops.shape(x))
        x_t, scale = noised(x, noise, m), self.scales(x, next(keys))
        told = self.told(conditions, scale)

        def f(at, m, training, ema):
            answer = model.output(at, m, leading(told, m), training, ema)
            return model.prediction.denoise(answer, at, m)

        def target():
            if self.teacher is None:
                x_r = noised(x, noise, end)
            else:
                x_r = _heun(self.taught(model, conditions, scale), x_t, m, end, at_end)
            inside = _at(schedule, ops.maximum(r, 1.0001 * least))
            answer = f(x_r, inside, False, self.ema or not training)
            return ops.where(rows(at_end, x), x_r / end.like(x).alpha, answer)

        answer, held = f(x_t, m, training, not training), still(target)
        size = ops.sum(ops.square(ops.stop_gradient(answer) - held), axis=tuple(range(1, len(x.shape))))
        dimension = float(np.prod(x.shape[1:]))  # the loss of Keras is a mean over the coordinates
        c = 0.00054 * math.sqrt(dimension) if self.c is None else self.c
        weight = 1.0 / (s - ops.where(at_end, 0.0, r)) if model.weighting is None else model.weighting(m.log_snr)
        return Problem(answer, held, 0.5 * dimension / ops.sqrt(size + c**2) * weight)

    def check(self, model: Any) -> None:
        """Raises a ValueError for a discrete schedule, a weight per log-SNR, a learned variance, and a prediction that
        does not give x itself at the clean end.
        """
        super().check(model)
        check_continuous("Consistency", model)
        check_simple("Consistency", model)
        check_noisy_end("Consistency", model)
        gain = float(ops.convert_to_numpy(model.prediction.gain(model.schedule.at(np.float32(0.0)))))
        if gain > 0.1:
            raise ValueError(
                f"Consistency: x_hat must be x itself at the clean end, for any output of the network, but with "
                f"{model.prediction!r} on {model.schedule!r} its gain is {gain:.2g} there. Use Karras(), TrigFlow(), "
                "Velocity() or Flow()"
            )


def _at(schedule: NoiseSchedule, s) -> Marginal:
    """The marginal with sigma / alpha = s."""
    m = schedule.at_log_snr(-2.0 * ops.log(s))
    return m._replace(t=ops.clip(m.t, 0.0, 1.0))


def _heun(taught, x_t, now: Marginal, then: Marginal, at_end):
    """Heun's method from `now` to `then` for dz/ds = (z - x_hat) / s, z = x / alpha; Euler's method where `at_end`."""
    wide, after = now.like(x_t), then.like(x_t)
    z, s, r = x_t / wide.alpha, wide.sigma / wide.alpha, after.sigma / after.alpha
    slope = (z - taught(x_t, now)) / s
    ahead = z + (r - s) * slope
    safe = Marginal(*(ops.where(at_end, *pair) for pair in zip(now, then, strict=True)))
    there = safe.like(x_t)
    second = (ahead - taught(there.alpha * ahead, safe)) / (there.sigma / there.alpha)
    return after.alpha * (z + (r - s) * ops.where(rows(at_end, x_t), slope, 0.5 * (slope + second)))
