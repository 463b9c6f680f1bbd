"""A solver with adaptive step size control between the times of the grid.

In z = x / alpha and l = log(alpha / sigma) = log_snr / 2 the probability flow is dz/dl = x_hat - z, and a step of h is

    z_then = e^-h z + integral of e^(y - h) x_hat dy, from 0 to h.

For constant x_hat it is DDIM; for x_hat linear in y, with the value x_hat_r at y = r h (`solvers.exponential`),

    z_then = e^-h z + (1 - e^-h) x_hat + w (x_hat_r - x_hat),    w = M_1(h) / r.

All terms are bounded in h, so a step may go to t = 0. This is DPM-Solver (Lu et al. 2022, arXiv:2206.00927, algorithms
1 and 2) with data prediction (DPM-Solver++, arXiv:2211.01095), of order 2, and of order 3 if r = 2/3 and the stage at r
is itself computed from one at 1/3.
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
    """The state of the step size control, all scalars.

    Attributes:
        h: the size of the next substep, in l.
        error: the error of the last accepted substep, in units of the tolerance.
        tried: the number of substeps so far, int32, including rejected ones.
    """

    h: Any
    error: Any
    tried: Any


class Adaptive(Solver):
    """DPM-Solver-23, or -12, with error control (Lu et al. 2022, arXiv:2206.00927, appendix C).

    `sample_dpm_adaptive` of k-diffusion uses the same pair of methods, but differs in three ways: it integrates
    noise_hat, whereas this solver integrates x_hat and so can go to t = 0; it measures the error by the root mean
    square over the whole batch, absolute on the scale of x / alpha, whereas this takes the worst sample, relative to
    the size of its z; and its next step size depends on error^(-1 / order) alone, limited by an arctangent.

    Each step of the grid is divided into substeps. The error of a substep is estimated by the difference between the
    methods of order `order` and `order` - 1, in units of the tolerance,

        error = max over the batch of rms( (z_high - z_low) / (sqrt(1 + s^2) atol + rtol max(|z|, |z_high|)) ),

    where s = sigma / alpha and sqrt(1 + s^2) is about the size of z on any schedule. A substep is accepted if error <=
    1, and otherwise repeated with a smaller size. The next size is (a PI controller; Gustafsson 1991)

        h <- h 0.9 error^(-0.7 / order) error_before^(0.4 / order),    from a fifth of h to five times h.

    An error of NaN or infinity counts as too large. The samples of a batch share their substeps, so a sample that is
    drawn in another batch is equal only to within the tolerance.

    Args:
        rtol: the relative tolerance.
        atol: the absolute tolerance, for data of unit scale. 0.0078 is one of 256 grey levels on [-1, 1].
        order: 2 (DPM-Solver-12) or 3 (DPM-Solver-23), which is also the number of calls of the denoiser per substep,
            accepted or not.
        max_substeps: the maximum number of substeps in one step of the grid, including rejected ones. With n substeps
            left, none is shorter than 1 / n of the remaining interval, and one of that length is always accepted: a
            tolerance that cannot be met results in equal steps.
        first: the size of the first substep of a run, in l.

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
        """The initial step size, and an error of 1."""
        return Control(*(ops.convert_to_tensor(v) for v in (np.float32(self.first), np.float32(1.0), np.int32(0))))

    def step(self, denoise: Denoise, schedule: NoiseSchedule, x, now: Marginal, then: Marginal, noise: Draw, state):
        """One step of the grid, in substeps; arguments and results as in `Solver.step`."""
        signed, start = half_step(now, then), state.tried
        way, span = ops.sign(signed), ops.abs(signed)  # up to noise as well, for likelihoods

        def on_the_way(done, z, x_hat, memory, control):
            return ops.logical_and(done < span, control.tried - start < self.max_substeps)

        def substep(done, z, x_hat, memory, control):
            left = ops.cast(self.max_substeps - (control.tried - start), "float32")
            least = (span - done) / left
            # The last substep goes to the end, either as the last one allowed or because little is left.
            wanted = ops.maximum(control.h, least)
            last = ops.logical_or(wanted >= 0.999 * (span - done), left < 1.5)
            h = ops.where(last, span - done, wanted)
            m = schedule.at_log_snr(now.log_snr + 2.0 * way * done)
            z_low, z_high, estimate = self._pair(denoise, schedule, z, m, way * h)
            error = self._error(z, z_low, z_high, m, way * h)
            taken = ops.logical_or(error <= 1.0, h <= least)
            control = self._control(control, error, h, taken)
            done = ops.where(taken, ops.where(last, span, done + h), done)
            return done, ops.where(taken, z_high, z), estimate.x_hat, estimate.memory, control

        # The estimate is that of the last substep; all substeps receive the memory from before the step.
        begin = (ops.zeros_like(span), x / now.alpha, ops.zeros_like(x), denoise.given.memory, state)
        _, z, x_hat, memory, state = ops.while_loop(on_the_way, substep, begin)
        return then.alpha * z, Estimate(x_hat, memory=memory), state

    def _pair(self, denoise, schedule, z, m, h):
        """z after h by the method of lower order and by that of higher order, and the estimate at the beginning."""
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
        # 1e-30, for a purely relative tolerance where z is 0.
        square = ((z_high - z_low) / ops.maximum(unit, 1e-30)) ** 2
        return ops.sqrt(ops.max(ops.mean(square, axis=tuple(range(1, len(square.shape))))))

    def _control(self, control: Control, error, h, taken) -> Control:
        """The next step size. An accepted substep that was shortened by the grid does not reduce the step size."""
        # A difference of 0 would divide by 0; NaN and infinity shorten the next substep as much as possible.
        known = ops.where(error < 1e6, ops.maximum(error, 1e-6), 1e6)
        factor = SAFETY * known ** (-0.7 / self.order) * control.error ** (0.4 / self.order)
        proposed = h * ops.clip(factor, SMALLEST, ops.where(taken, LARGEST, SAFETY))
        good = ops.logical_and(taken, error <= 1.0)
        proposed = ops.where(good, ops.maximum(proposed, ops.where(h < control.h, control.h, 0.0)), proposed)
        return Control(proposed, ops.where(taken, known, control.error), control.tried + 1)
