"""Runge-Kutta methods, which do not look back: Euler, Heun, DPM2, RK4, and noise that may be added on the way.

In z = x / alpha and s = sigma / alpha the probability flow of every schedule is (Karras et al. 2022, "EDM",
arXiv:2206.00364, algorithm 1)

    dz / ds = d,    d = (z - x_hat) / s = noise_hat,

a straight line where x_hat is constant. A stage i of an explicit method is at s_i, with weights a_ij that sum to 1:

    z_i = z + (s_i - s) sum_j a_ij d_j,    d_i = (z_i - x_hat_i) / s_i.

Here a stage is known by its bend, e_i = d_i - d, which vanishes with the change of x_hat, so that the rounding of d,
times an s of 10^5, does not come in; and z_i = x_hat + s_i d + ... loses no digits where s_i is near 0:

    z_i = x_hat + s_i d + (s_i - s) sum_j a_ij e_j,
    e_i = (x_hat - x_hat_i + (s_i - s) sum_j a_ij e_j) / s_i.

At t = 0 s_i is 0, or as good as 0, and e_i has no meaning: a step to t = 0 does without it. For the same reason a stage
at s_then, as Heun's method and RK4 have it, corrects by (s / s_then - 1) times the change of x_hat, and wants a grid on
which s falls by no more than a few times in a step, such as EDM's: not few equal steps of t from an s of 10^3.
"""

from typing import NamedTuple, Self

import numpy as np
from keras import ops

from kdiff.base import check_number
from kdiff.denoisers import Estimate
from kdiff.schedules import Marginal, NoiseSchedule, bridge
from kdiff.solvers.ancestral import DDIM, DDIMInversion
from kdiff.solvers.base import Denoise, Draw, Solver, between, noise_of


def ratio(m: Marginal):
    """s = sigma / alpha."""
    return m.sigma / m.alpha


class Line(NamedTuple):
    """Where a step begins, and its tangent: z = x_hat + s d."""

    s: object
    estimate: Estimate
    d: object

    @classmethod
    def at(cls, denoise: Denoise, x, m: Marginal) -> Self:
        """The line through `x` at `m`: one call of the denoiser."""
        estimate = denoise(x, m)
        return cls(ratio(m), estimate, noise_of(x, estimate.x_hat, m))

    @property
    def x_hat(self):
        """The estimate of the data."""
        return self.estimate.x_hat

    def reach(self, s, bend=0.0):
        """z at s, x_hat + s d + (s - s_now) bend."""
        return self.x_hat + s * self.d + (s - self.s) * bend

    def bend(self, denoise: Denoise, m: Marginal, bend=0.0):
        """e_i of the stage at `m`, that is reached with `bend`: one call of the denoiser."""
        s = ratio(m)
        x_hat = denoise(m.alpha * self.reach(s, bend), m).x_hat
        return (self.x_hat - x_hat + (s - self.s) * bend) / s


class _RungeKutta(Solver):
    """A one-step method, with EDM's churn (Karras et al. 2022, algorithm 2):

        s_up = (1 + gamma) s,    z_up = z + sqrt(s_up^2 - s^2) s_noise noise,
        gamma = min(s_churn / steps, sqrt(2) - 1)  if s_min <= s <= s_max, else 0,

    then the step from s_up. A new one defines `bend`.
    """

    def __init__(self, s_churn: float = 0.0, s_min: float = 0.0, s_max: float = float("inf"), s_noise: float = 1.0):
        name = type(self).__name__
        check_number(name, "s_churn", s_churn, 0.0)
        check_number(name, "s_min", s_min, 0.0)
        check_number(name, "s_max", s_max, s_min)
        check_number(name, "s_noise", s_noise, 0.0)
        self.s_churn, self.s_min, self.s_max, self.s_noise = s_churn, s_min, s_max, s_noise
        self.stochastic = s_churn > 0

    def init(self, x, steps: int):
        """gamma, if there is churn."""
        if not self.stochastic:
            return ()
        return ops.convert_to_tensor(np.float32(min(self.s_churn / steps, np.sqrt(2.0) - 1.0)))

    def step(self, denoise: Denoise, schedule: NoiseSchedule, x, now: Marginal, then: Marginal, noise: Draw, state):
        """One step; arguments and results as in `Solver.step`."""
        if self.stochastic:
            x, now = self._churn(schedule, x, now, noise, gamma=state)
        line = Line.at(denoise, x, now)
        bend = self.bend(denoise, schedule, line, now, then)
        return then.alpha * line.reach(ratio(then), bend), line.estimate, state

    def bend(self, denoise: Denoise, schedule: NoiseSchedule, line: Line, now: Marginal, then: Marginal):
        """By how much the mean slope of the step differs from d: the method's weighted mean of e_i."""
        raise NotImplementedError

    def _churn(self, schedule, x, now, noise, gamma):
        s = ratio(now)
        gamma = ops.where(ops.logical_and(s >= self.s_min, s <= self.s_max), gamma, 0.0)
        up = schedule.at_log_snr(now.log_snr - 2.0 * ops.log1p(gamma))
        # Where nothing is added the time is the grid's own, to the last digit.
        up = up._replace(t=ops.where(gamma > 0, up.t, now.t))
        added = s * ops.sqrt(gamma * (2.0 + gamma)) * self.s_noise
        return up.alpha * (x / now.alpha + added * noise()), up


class Euler(_RungeKutta):
    """Euler's method (Karras et al. 2022, algorithm 2 without its correction): z_then = z + (s_then - s) d.

    Without churn it is DDIM, and of order 1; with churn it is k-diffusion's `sample_euler`.

    Args:
        s_churn: how much noise is added in a run, as a multiple of what there is; each step adds 1 / steps of it, at
            most sqrt(2) - 1. 0 adds none.
        s_min: noise is added where sigma / alpha is at least this ...
        s_max: ... and at most this.
        s_noise: the added noise's standard deviation. EDM takes up to 1.007, for what networks remove too much.

    Raises:
        ValueError: if a number is negative, or `s_max` is below `s_min`.
    """

    def bend(self, denoise: Denoise, schedule: NoiseSchedule, line: Line, now: Marginal, then: Marginal):
        """0."""
        return 0.0

    def inverse(self, iterations: int = 1) -> Solver:
        """`DDIMInversion(iterations)`, if there is no churn."""
        return super().inverse() if self.stochastic else DDIMInversion(iterations)


class Heun(_RungeKutta):
    """Heun's method, the trapezoidal rule (Karras et al. 2022, algorithm 2), of order 2:

        z_2 = z + (s_then - s) d,    z_then = z + (s_then - s) (d + d_2) / 2,

    and Euler's in a step to t = 0. (The denoiser is called there all the same, and its answer not used.)

    Args:
        s_churn: as of `Euler`. EDM's for ImageNet-64: 40, with `s_min` 0.05, `s_max` 50, `s_noise` 1.003, 256 steps.
        s_min: as of `Euler`.
        s_max: as of `Euler`.
        s_noise: as of `Euler`.

    Raises:
        ValueError: as of `Euler`.
    """

    order = 2
    evaluations = 2

    def bend(self, denoise: Denoise, schedule: NoiseSchedule, line: Line, now: Marginal, then: Marginal):
        """e_2 / 2."""
        return ops.where(then.t > 0, line.bend(denoise, then) / 2.0, 0.0)


class DPM2(_RungeKutta):
    """The midpoint rule with the middle in log-SNR, of order 2; DPM-Solver-2 in Karras' form, k-diffusion's
    `sample_dpm_2`:

        s_2 = sqrt(s s_then),    z_2 = z + (s_2 - s) d,    z_then = z + (s_then - s) d_2,

    and Euler's in a step to t = 0. DPM-Solver-2 itself (Lu et al. 2022, arXiv:2206.00927, algorithm 1) differs from it
    by a term of order 3.

    Args:
        s_churn: as of `Euler`.
        s_min: as of `Euler`.
        s_max: as of `Euler`.
        s_noise: as of `Euler`.

    Raises:
        ValueError: as of `Euler`.
    """

    order = 2
    evaluations = 2

    def bend(self, denoise: Denoise, schedule: NoiseSchedule, line: Line, now: Marginal, then: Marginal):
        """e_2."""
        return ops.where(then.t > 0, line.bend(denoise, between(schedule, now, then, 0.5)), 0.0)


class RK4(_RungeKutta):
    """The classical method of Runge and Kutta, in s, of order 4:

        z_then = z + (s_then - s) (d + 2 d_2 + 2 d_3 + d_4) / 6,    s_2 = s_3 = (s + s_then) / 2,  s_4 = s_then,

    and the midpoint rule, which needs d_2 alone, in a step to t = 0.

    It is in s and not in log s, where the flow is dz / d log s = z - x_hat and a step multiplies even an error that
    x_hat does not see by 1 - h + h^2 / 2 - ..., h = log(s / s_then): by 2,000 at h = 15. In s such errors shrink as
    they should, by s_then / s.

    Args:
        s_churn: as of `Euler`.
        s_min: as of `Euler`.
        s_max: as of `Euler`.
        s_noise: as of `Euler`.

    Raises:
        ValueError: as of `Euler`.
    """

    order = 4
    evaluations = 4

    def bend(self, denoise: Denoise, schedule: NoiseSchedule, line: Line, now: Marginal, then: Marginal):
        """(2 e_2 + 2 e_3 + e_4) / 6."""
        middle = schedule.at_log_snr(-2.0 * ops.log(0.5 * (line.s + ratio(then))))
        return classical(denoise, line, middle, then)


def classical(denoise: Denoise, line: Line, middle: Marginal, then: Marginal):
    """The bend of the classical method; in a step to t = 0, of the midpoint rule. Three calls of the denoiser."""
    e_2 = line.bend(denoise, middle)
    e_3 = line.bend(denoise, middle, e_2)
    e_4 = line.bend(denoise, then, e_3)
    return ops.where(then.t > 0, (2.0 * e_2 + 2.0 * e_3 + e_4) / 6.0, e_2)


class EulerAncestral(DDIM):
    """Euler's method to s_down, and noise from there to s_then; k-diffusion's `sample_euler_ancestral`:

        z_then = z + (s_down - s) d + s_up noise,
        s_up^2 = eta^2 s_then^2 (1 - s_then^2 / s^2),    s_down^2 = s_then^2 - s_up^2.

    It is DDIM, by another name and with another default: with eta = 1, DDPM.

    Args:
        eta: 0 is Euler's method, 1 adds the noise that the posterior has; any number in [0, 1].
    """

    def __init__(self, eta: float = 1.0):
        super().__init__(eta)


class DPM2Ancestral(Solver):
    """`DPM2` to s_down, and noise from there to s_then, s_down and s_up as of `EulerAncestral`; k-diffusion's
    `sample_dpm_2_ancestral`. Mean and covariance are of order 2. A step to t = 0 is `EulerAncestral`'s.

    Args:
        eta: 0 is `DPM2`, 1 adds the noise that the posterior has; any number in [0, 1].
    """

    order = 2
    evaluations = 2

    def __init__(self, eta: float = 1.0):
        check_number("DPM2Ancestral", "eta", eta, 0.0, 1.0)
        self.eta = eta
        self.stochastic = eta > 0

    def step(self, denoise: Denoise, schedule: NoiseSchedule, x, now: Marginal, then: Marginal, noise: Draw, state):
        """One step; arguments and results as in `Solver.step`."""
        # kept = s_down^2 / s_then^2 = 1 - eta^2 (1 - r), written so that it does not cancel where r is near 0.
        kept = (1.0 - self.eta**2) + self.eta**2 * ops.exp(now.log_snr - then.log_snr)
        down = ratio(then) * ops.sqrt(kept)
        middle = schedule.at_log_snr(0.5 * (now.log_snr + then.log_snr - ops.log(kept)))
        line = Line.at(denoise, x, now)
        bend = ops.where(then.t > 0, line.bend(denoise, middle), 0.0)
        x = then.alpha * line.reach(down, bend)
        if self.stochastic:
            x = x + self.eta * then.sigma * ops.sqrt(bridge(now, then)[1]) * noise()
        return x, line.estimate, state
