"""Runge-Kutta methods, optionally with added noise: Euler, Heun, DPM2, RK4.

Since x = alpha x_hat + sigma noise_hat, the probability flow of any schedule is dx = x_hat d alpha + noise_hat d sigma.
It becomes an ordinary differential equation in either of two variables:

    Angle    w = x / r,  r = sqrt(alpha^2 + sigma^2),    phi = arctan(sigma / alpha)    dw / d phi = v
    Ratio    z = x / alpha                               s = sigma / alpha              dz / ds = noise_hat

with v = cos(phi) noise_hat - sin(phi) x_hat (Salimans and Ho 2022, arXiv:2202.00512, appendix D; Karras et al. 2022,
"EDM", arXiv:2206.00364, algorithm 1). A method has stages at fractions c_i of the step in that variable, each reached
with the slope of the previous stage, and weights b_i of the slopes. It is applied to the difference from the step of
DDIM, on which the initial x_hat and noise_hat are constant. With e_i, the difference of the slope at stage i from the
initial slope, and u for phi or s,

    x_i     =  alpha_i x_hat + sigma_i noise_hat + g_i (u_i - u) e_(i-1),             g = r, or alpha,
    x_then  =  alpha_then x_hat + sigma_then noise_hat + g_then (u_then - u) sum_i b_i e_i,

so that data at a single point is found exactly by any step. phi is between 0 and pi / 2, so no step is long in phi. s
decreases from 10^3 or more, and if it decreases by a large factor in one step, a stage at s_then multiplies the change
of x_hat by s / s_then - 1: `Ratio` requires EDM's grid, or steps as short as on that grid.

In a step to t = 0, where noise_hat is undefined at the end, `Angle` uses a method with the same number of stages, or
three of four, all inside the step; `Ratio` uses Euler's method, as in EDM, with one call of the denoiser.
"""

from functools import partial

import numpy as np
from keras import ops

from kdiff.base import check_number
from kdiff.schedules import Marginal, NoiseSchedule, bridge
from kdiff.solvers.ancestral import DDIM, DDIMInversion
from kdiff.solvers.base import Denoise, Draw, Solver, above_zero
from kdiff.solvers.stages import MIDPOINT, Angle, Line, Ratio, Tableau, Variable, ratio, stages
from kdiff.times import Trailing

__all__ = ["DPM2", "RK4", "DPM2Ancestral", "Euler", "EulerAncestral", "Heun", "RungeKutta"]


class RungeKutta(Solver):
    """The base class of one-step methods, with the churn of EDM (Karras et al. 2022, algorithm 2):

        s_up = (1 + gamma) s,    z_up = z + sqrt(s_up^2 - s^2) s_noise noise,
        gamma = min(s_churn / steps, sqrt(2) - 1)  if s_min <= s <= s_max, else 0,

    followed by the step from s_up. A new one defines `method` and `order`.
    """

    named = False
    method = Tableau()
    variable: Variable = Angle()

    def __init__(self, s_churn: float = 0.0, s_min: float = 0.0, s_max: float = float("inf"), s_noise: float = 1.0):
        name = type(self).__name__
        check_number(name, "s_churn", s_churn, 0.0)
        check_number(name, "s_min", s_min, 0.0)
        check_number(name, "s_max", s_max, s_min)
        check_number(name, "s_noise", s_noise, 0.0)
        self.s_churn, self.s_min, self.s_max, self.s_noise = s_churn, s_min, s_max, s_noise
        self.stochastic = s_churn > 0

    @property
    def evaluations(self) -> int:
        """The number of stages."""
        return 1 + len(self.method.places)

    def init(self, x, steps: int):
        """gamma, if there is churn."""
        if not self.stochastic:
            return ()
        return ops.convert_to_tensor(np.float32(min(self.s_churn / max(steps, 1), np.sqrt(2.0) - 1.0)))

    def step(self, denoise: Denoise, schedule: NoiseSchedule, x, now: Marginal, then: Marginal, noise: Draw, state):
        """One step; arguments and results as in `Solver.step`."""
        if self.stochastic:
            x, now = self._churn(schedule, x, now, noise, gamma=state)
        line = Line.at(denoise, x, now)
        return self.go(denoise, schedule, line, then), line.estimate, state

    def go(self, denoise: Denoise, schedule: NoiseSchedule, line: Line, then: Marginal):
        """x at `then`, starting from the beginning of this line."""
        closing, run = self.variable.closing(self.method), partial(stages, denoise, schedule, line, then, self.variable)
        count, pairs = len(closing.places), zip(self.method, closing, strict=True)
        both = Tableau(*([ops.where(then.t > 0, *one) for one in zip(*pair, strict=False)] for pair in pairs))
        rest = Tableau(*(numbers[count:] for numbers in self.method))
        bend, total = run(both)
        if rest.places:
            total = above_zero(then, lambda: run(rest, bend, total)[1], total + ops.zeros_like(line.noise_hat))
        return line.reach(then, self.variable.length(line.now, then) * total)

    def _churn(self, schedule, x, now, noise, gamma):
        s = ratio(now)
        gamma = ops.where(ops.logical_and(s >= self.s_min, s <= self.s_max), gamma, 0.0)
        up = schedule.at_log_snr(now.log_snr - 2.0 * ops.log1p(gamma))
        # If nothing is added, the time is exactly that of the grid.
        up = up._replace(t=ops.where(gamma > 0, up.t, now.t))
        added = s * ops.sqrt(gamma * (2.0 + gamma)) * self.s_noise
        return up.alpha * (x / now.alpha + added * noise()), up


class Euler(RungeKutta):
    """Euler's method (Karras et al. 2022, algorithm 2 without its correction):

        x_then = alpha_then x_hat + sigma_then noise_hat.

    Without churn it is DDIM, of order 1; with churn it is `sample_euler` of k-diffusion.

    Args:
        s_churn: the total amount of added noise relative to the present noise, of which each step adds 1 / steps, at
            most sqrt(2) - 1; 0 adds none.
        s_min: the smallest sigma / alpha at which noise is added.
        s_max: the largest sigma / alpha at which noise is added.
        s_noise: the standard deviation of the added noise. EDM uses up to 1.007, to compensate for networks that remove
            slightly too much noise.

    Raises:
        ValueError: if a number is negative, or `s_max` is below `s_min`.
    """

    def inverse(self, iterations: int = 1) -> Solver:
        """`DDIMInversion(iterations)`, if there is no churn."""
        return super().inverse() if self.stochastic else DDIMInversion(iterations)


class _TwoStages(RungeKutta):
    """A second-order method, in either variable."""

    order = 2

    def __init__(
        self,
        variable: Variable | str = "angle",
        s_churn: float = 0.0,
        s_min: float = 0.0,
        s_max: float = float("inf"),
        s_noise: float = 1.0,
    ):
        super().__init__(s_churn, s_min, s_max, s_noise)
        self.variable = Variable.get(variable)


class Heun(_TwoStages):
    """Heun's method, the trapezoidal rule, of order 2. In the variable u of y = w or z, with slope f (see the module),

        y_2 = y + (u_then - u) f,    y_then = y + (u_then - u) (f + f_2) / 2.

    The step to t = 0 is the midpoint rule, or for "ratio" Euler's method, with one call of the denoiser.
    `Heun("ratio")` is the solver of EDM (Karras et al. 2022, algorithm 2) and `sample_heun` of k-diffusion, for the
    grid of EDM, `times.Karras`; even there, "angle" has the smaller error for data of unit scale.

    Args:
        variable: a `Variable`: "angle", for any grid, or "ratio".
        s_churn: as in `Euler`. EDM on ImageNet-64: 40, with `s_min` 0.05, `s_max` 50, `s_noise` 1.003, 256 steps.
        s_min, s_max, s_noise: as in `Euler`.

    Raises:
        ValueError: as in `Euler`; if `variable` is unknown.
    """

    method = Tableau((1.0,), (1 / 2,))


class DPM2(_TwoStages):
    """The midpoint rule, of order 2. In the variable u of y = w or z, with slope f (see the module),

        y_2 = y + (u_2 - u) f,    y_then = y + (u_then - u) f_2,

    with u_2 at the midpoint of the angle, or of log s for "ratio". The step to t = 0 is the same, or for "ratio"
    Euler's method, with one call of the denoiser. `DPM2("ratio")` is `sample_dpm_2` of k-diffusion, which differs from
    DPM-Solver-2 (Lu et al. 2022, arXiv:2206.00927, algorithm 1) by a term of order 3.

    Args:
        variable: a `Variable`: "angle", for any grid, or "ratio", for grids on which s decreases by at most a small
            factor per step.
        s_churn, s_min, s_max, s_noise: as in `Euler`.

    Raises:
        ValueError: as in `Euler`; if `variable` is unknown.
    """

    method = MIDPOINT


class RK4(RungeKutta):
    """The classical fourth-order Runge-Kutta method in the angle (see the module):

        w_then = w + (phi_then - phi) (v + 2 v_2 + 2 v_3 + v_4) / 6,    phi_2 = phi_3 = (phi + phi_then) / 2.

    The step to t = 0 is Heun's third-order method, with stages at 1/3 and 2/3 and three calls of the denoiser.

    Args:
        s_churn, s_min, s_max, s_noise: as in `Euler`.

    Raises:
        ValueError: as in `Euler`.
    """

    order = 4
    method = Tableau((1 / 2, 1 / 2, 1.0), (1 / 3, 1 / 3, 1 / 6))


class EulerAncestral(DDIM):
    """Euler's method to s_down, followed by noise up to s_then; `sample_euler_ancestral` of k-diffusion:

        z_then = z + (s_down - s) d + s_up noise,
        s_up^2 = eta^2 s_then^2 (1 - s_then^2 / s^2),    s_down^2 = s_then^2 - s_up^2.

    It is DDIM with another default: for eta = 1, DDPM.

    Args:
        eta: the amount of noise, in [0, 1]; 0 is Euler's method, and 1 adds the noise of the posterior.
    """

    def __init__(self, eta: float = 1.0):
        super().__init__(eta)


class DPM2Ancestral(Solver):
    """`DPM2("ratio")` to s_down, followed by noise up to s_then, with s_down and s_up as in `EulerAncestral`;
    `sample_dpm_2_ancestral` of k-diffusion. The mean and covariance have order 2. A step to t = 0 is that of
    `EulerAncestral`, with one call of the denoiser. The default grid begins at a log-SNR of -6, since the first step in
    s is too long from more noise.

    Args:
        eta: the amount of noise, in [0, 1]; 0 is `DPM2("ratio")`, and 1 adds the noise of the posterior.
    """

    order = 2
    evaluations = 2
    grid = Trailing(-6.0)

    def __init__(self, eta: float = 1.0):
        check_number("DPM2Ancestral", "eta", eta, 0.0, 1.0)
        self.eta = eta
        self.stochastic = eta > 0

    def step(self, denoise: Denoise, schedule: NoiseSchedule, x, now: Marginal, then: Marginal, noise: Draw, state):
        """One step; arguments and results as in `Solver.step`."""
        variable = Ratio()
        # kept = s_down^2 / s_then^2 = 1 - eta^2 (1 - r), in a form that does not cancel for r near 0.
        kept = (1.0 - self.eta**2) + self.eta**2 * ops.exp(now.log_snr - then.log_snr)
        down = then._replace(sigma=then.sigma * ops.sqrt(kept))
        middle = schedule.at_log_snr(0.5 * (now.log_snr + then.log_snr - ops.log(kept)))
        line = Line.at(denoise, x, now)
        none = ops.zeros_like(line.noise_hat)
        bend = above_zero(then, lambda: variable.bend(middle, 0.0, line.change(denoise, middle)), none)
        x = line.reach(down, variable.length(now, down) * bend)
        if self.stochastic:
            x = x + self.eta * then.sigma * ops.sqrt(bridge(now, then)[1]) * noise()
        return x, line.estimate, state
