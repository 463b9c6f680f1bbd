"""A solver that chooses its own steps: as many between two times of the grid as a tolerance asks for.

In z = x / alpha and l = log(alpha / sigma) = log_snr / 2 the probability flow is dz/dl = x_hat - z, so that a step of h
is

    z_then = e^-h z + integral of e^(y - h) x_hat dy, from 0 to h.

With x_hat constant it is DDIM; with x_hat linear in y, by its value x_hat_r at y = r h (`solvers.exponential`),

    z_then = e^-h z + (1 - e^-h) x_hat + w (x_hat_r - x_hat),    w = M_1(h) / r.

Nothing in it grows with h: a step may go to t = 0. This is DPM-Solver (Lu et al. 2022, arXiv:2206.00927, algorithms 1
and 2) in the form that predicts data (DPM-Solver++, arXiv:2211.01095), of order 2, and of order 3 if r = 2/3 and the
stage at r is itself made from one at 1/3.
"""

from typing import Any, NamedTuple

import numpy as np
from keras import ops

from kdiff.base import check_choice, check_integer, check_number
from kdiff.denoisers import Estimate
from kdiff.schedules import Marginal, NoiseSchedule
from kdiff.solvers.base import Denoise, Draw, Solver, half_step
from kdiff.solvers.exponential import weights

__all__ = ["LARGEST", "SAFETY", "SMALLEST", "Adaptive", "Control"]

SAFETY, SMALLEST, LARGEST = 0.9, 0.2, 5.0


class Control(NamedTuple):
    """What is carried from step to step, all scalars.

    Attributes:
        h: the next sub-step, in l.
        error: the error of the last one that was taken, in units of the tolerance.
        tried: how many there were so far, int32, those included that were not taken.
    """

    h: Any
    error: Any
    tried: Any


class Adaptive(Solver):
    """DPM-Solver-23, or -12, with error control (Lu et al. 2022, arXiv:2206.00927, appendix C).

    k-diffusion's `sample_dpm_adaptive` is the same pair of methods, but not the same solver: it integrates noise_hat,
    where this integrates x_hat and so may go to t = 0; it measures the error by the root mean square over the whole
    batch, absolute in the scale of x / alpha, where this takes the worst sample, in units of the size of its z; and its
    next sub-step is by error^(-1 / order) alone, limited by an arctangent. At an equal tolerance they differ.

    A step of the grid is cut into sub-steps. The error of each is taken to be the difference of the methods of order
    `order` and `order` - 1, and measured in units of the tolerance,

        error = max over the batch of rms( (z_high - z_low) / (sqrt(1 + s^2) atol + rtol max(|z|, |z_high|)) ),

    where s = sigma / alpha and sqrt(1 + s^2) is about the size of z, whatever the schedule. A sub-step is taken if
    error <= 1, else tried again, shorter. The next one is (a PI controller; Gustafsson 1991)

        h <- h 0.9 error^(-0.7 / order) error_before^(0.4 / order),    from a fifth of h to five times h.

    An error that is NaN or infinite is too large. The samples of a batch share their sub-steps, so that one drawn in
    another batch is the same to within the tolerance only.

    Args:
        rtol: the relative tolerance.
        atol: the absolute one, for data of order 1. 0.0078 is one grey level of 256 on [-1, 1].
        order: 2 (DPM-Solver-12) or 3 (DPM-Solver-23): the method that is used, and the calls of the denoiser in each
            sub-step, tried or taken.
        max_substeps: the most sub-steps in one step of the grid, those included that are not taken. None is shorter
            than 1 / n of the way that is left, where n are left, and one of that length is taken whatever its error: a
            tolerance that cannot be met gives equal steps.
        first: the first sub-step of a run, in l.

    Raises:
        ValueError: if a number is out of range, or both tolerances are 0.
    """

    def __init__(
        self,
        rtol: float = 0.05,
        atol: float = 0.0078,
        order: int = 3,
        max_substeps: int = 100,
        first: float = 0.05,
    ):
        check_number("Adaptive", "rtol", rtol, 0.0)
        check_number("Adaptive", "atol", atol, 0.0)
        check_choice("Adaptive", "order", order, (2, 3))
        check_integer("Adaptive", "max_substeps", max_substeps)
        check_number("Adaptive", "first", first, 1e-6)
        if rtol == 0 and atol == 0:
            raise ValueError("Adaptive: `rtol` or `atol` must be above zero; received: 0 and 0")
        self.rtol, self.atol, self.max_substeps, self.first = rtol, atol, max_substeps, first
        self.order = self.evaluations = order

    def init(self, x, steps: int) -> Control:
        """The first sub-step, and an error of 1."""
        return Control(*(ops.convert_to_tensor(v) for v in (np.float32(self.first), np.float32(1.0), np.int32(0))))

    def step(self, denoise: Denoise, schedule: NoiseSchedule, x, now: Marginal, then: Marginal, noise: Draw, state):
        """One step of the grid, in sub-steps; arguments and results as in `Solver.step`."""
        span, start = half_step(now, then), state.tried

        def on_the_way(done, z, x_hat, memory, control):
            return ops.logical_and(done < span, control.tried - start < self.max_substeps)

        def substep(done, z, x_hat, memory, control):
            left = ops.cast(self.max_substeps - (control.tried - start), "float32")
            least = (span - done) / left
            # The last one goes all the way, by its number or because little would be left of the way.
            wanted = ops.maximum(control.h, least)
            last = ops.logical_or(wanted >= 0.999 * (span - done), left < 1.5)
            h = ops.where(last, span - done, wanted)
            m = schedule.at_log_snr(now.log_snr + 2.0 * done)
            z_low, z_high, estimate = self._pair(denoise, schedule, z, m, h)
            error = self._error(z, z_low, z_high, m, h)
            taken = ops.logical_or(error <= 1.0, h <= least)
            control = self._control(control, error, h, taken)
            done = ops.where(taken, ops.where(last, span, done + h), done)
            return done, ops.where(taken, z_high, z), estimate.x_hat, estimate.memory, control

        # The estimate is that of the last sub-step; all of them are told what was remembered before the step.
        begin = (ops.zeros_like(span), x / now.alpha, ops.zeros_like(x), denoise.given.memory, state)
        _, z, x_hat, memory, state = ops.while_loop(on_the_way, substep, begin)
        return then.alpha * z, Estimate(x_hat, memory=memory), state

    def _pair(self, denoise, schedule, z, m, h):
        """z after h by the method of one order less, and by the method; and the estimate at its beginning."""
        estimate = denoise(m.alpha * z, m)
        x_hat = estimate.x_hat

        def change(fraction, z_r):
            m_r = schedule.at_log_snr(m.log_snr + 2.0 * fraction * h)
            return denoise(m_r.alpha * z_r, m_r).x_hat - x_hat

        def constant(h):
            return ops.exp(-h) * z - ops.expm1(-h) * x_hat

        def linear(h, place, change):
            return constant(h) + weights(h, [place])[0] * change

        if self.order == 2:
            return constant(h), linear(h, 1 / 2, change(1 / 2, constant(h / 2))), estimate
        first = change(1 / 3, constant(h / 3))
        second = change(2 / 3, linear(2 * h / 3, 1 / 2, first))
        return linear(h, 1 / 3, first), linear(h, 2 / 3, second), estimate

    def _error(self, z, z_low, z_high, m, h):
        s = m.sigma / m.alpha * ops.exp(-h)
        unit = ops.sqrt(1.0 + s**2) * self.atol + self.rtol * ops.maximum(ops.abs(z), ops.abs(z_high))
        # 1e-30: where the tolerance is relative alone and z is 0.
        square = ((z_high - z_low) / ops.maximum(unit, 1e-30)) ** 2
        return ops.sqrt(ops.max(ops.mean(square, axis=tuple(range(1, len(square.shape))))))

    def _control(self, control: Control, error, h, taken) -> Control:
        """The next sub-step. One that the grid cut short, and that was good, says nothing against the longer one."""
        # A difference of 0 would divide by 0; NaN and infinity shorten the next sub-step as far as it goes.
        known = ops.where(error < 1e6, ops.maximum(error, 1e-6), 1e6)
        factor = SAFETY * known ** (-0.7 / self.order) * control.error ** (0.4 / self.order)
        proposed = h * ops.clip(factor, SMALLEST, ops.where(taken, LARGEST, SAFETY))
        good = ops.logical_and(taken, error <= 1.0)
        proposed = ops.where(good, ops.maximum(proposed, ops.where(h < control.h, control.h, 0.0)), proposed)
        return Control(proposed, ops.where(taken, known, control.error), control.tried + 1)
