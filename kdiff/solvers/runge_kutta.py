"""Runge-Kutta methods, which do not look back: Euler, Heun, DPM2, RK4, and noise that may be added on the way.

As x = alpha x_hat + sigma noise_hat, the probability flow of every schedule is dx = x_hat d alpha + noise_hat d sigma.
Two variables make an ordinary differential equation of it:

    Angle    w = x / r,  r = sqrt(alpha^2 + sigma^2),    phi = arctan(sigma / alpha)    dw / d phi = v
    Ratio    z = x / alpha                               s = sigma / alpha              dz / ds = noise_hat

with v = cos(phi) noise_hat - sin(phi) x_hat (Salimans and Ho 2022, arXiv:2202.00512, appendix D; Karras et al. 2022,
"EDM", arXiv:2206.00364, algorithm 1). A method is a rule for stages at fractions c_i of the step in the variable, each
reached with the slope of the one before, and for the weights b_i of their slopes. What is integrated is the difference
to DDIM's step, on which x_hat and noise_hat, those of the beginning, are constant: with the bend e_i, by how much the
slope at stage i differs from that, and u for phi or s,

    x_i     =  alpha_i x_hat + sigma_i noise_hat + g_i (u_i - u) e_(i-1),             g = r, or alpha,
    x_then  =  alpha_then x_hat + sigma_then noise_hat + g_then (u_then - u) sum_i b_i e_i,

so that data that is one point is found in any step. phi lies between 0 and pi / 2, and no step is long in it. s falls
from 10^3 or more, and where it falls many times in a step a stage at s_then corrects by (s / s_then - 1) times the
change of x_hat: `Ratio` wants EDM's grid, or steps as short as on it.

In a step to t = 0, where noise_hat has no meaning at the end, `Angle` takes stages that are all within the step, of a
method of the same number of stages; `Ratio` makes it Euler's, as its authors do.
"""

from typing import Any, NamedTuple, Self

import numpy as np
from keras import ops

from kdiff.base import Value, check_number
from kdiff.denoisers import Estimate
from kdiff.schedules import Marginal, NoiseSchedule, bridge
from kdiff.solvers.ancestral import DDIM, DDIMInversion
from kdiff.solvers.base import Denoise, Draw, Solver, between, noise_of
from kdiff.times import Trailing

__all__ = [
    "CLOSING",
    "DPM2",
    "MIDPOINT",
    "RK4",
    "THIRD",
    "Angle",
    "DPM2Ancestral",
    "Euler",
    "EulerAncestral",
    "Heun",
    "Line",
    "Ratio",
    "RungeKutta",
    "Tableau",
    "Variable",
    "chosen",
    "ratio",
    "stages",
]


def ratio(m: Marginal):
    """s = sigma / alpha."""
    return m.sigma / m.alpha


class Tableau(NamedTuple):
    """An explicit method each of whose stages is reached with the slope of the one before.

    Attributes:
        places: c_2, c_3, ...: where the stages are, as fractions of the step.
        weights: b_2, b_3, ...; b_1 is what they lack of 1.
    """

    places: tuple = ()
    weights: tuple = ()


MIDPOINT = Tableau((1 / 2,), (1.0,))
THIRD = Tableau((1 / 3, 2 / 3), (0.0, 3 / 4))
# Methods whose stages are all within the step, by their number: Euler's, the midpoint rule, Heun's of order 3. (Of
# order 4 there is none of four stages; the fourth is the third again.)
CLOSING = (Tableau(), MIDPOINT, THIRD, Tableau((*THIRD.places, 2 / 3), (*THIRD.weights, 0.0)))


def chosen(condition, one: Marginal, other: Marginal) -> Marginal:
    """One of two marginals."""
    return Marginal(*(ops.where(condition, a, b) for a, b in zip(one, other, strict=True)))


class Variable(Value):
    """The base of the variables of integration u (see the module)."""

    def at(self, schedule: NoiseSchedule, now: Marginal, then: Marginal, fraction) -> Marginal:
        """The marginal at this fraction of the way from `now` to `then`."""
        raise NotImplementedError

    def length(self, now: Marginal, m: Marginal):
        """g_m (u_m - u_now)."""
        raise NotImplementedError

    def bend(self, m: Marginal, off, change):
        """e at `m`, from `off`, by how much x differs from DDIM's step there, and `change`, by how much x_hat does."""
        raise NotImplementedError

    def closing(self, method: Tableau) -> Tableau:
        """The method of a step to t = 0, with as many stages."""
        raise NotImplementedError


class Angle(Variable):
    """phi = arctan(sigma / alpha), of x / sqrt(alpha^2 + sigma^2); linear in t on `Cosine`."""

    def at(self, schedule: NoiseSchedule, now: Marginal, then: Marginal, fraction) -> Marginal:
        """log_snr = 2 log(sin(pi / 2 - phi) / sin phi), which keeps its digits at either end."""
        phi, rest = (
            (1.0 - fraction) * ops.arctan2(a, b) + fraction * ops.arctan2(c, d)
            for a, b, c, d in (
                (now.sigma, now.alpha, then.sigma, then.alpha),
                (now.alpha, now.sigma, then.alpha, then.sigma),
            )
        )
        return schedule.at_log_snr(2.0 * (ops.log(ops.sin(rest)) - ops.log(ops.sin(phi))))

    def length(self, now: Marginal, m: Marginal):
        """r_m (phi_m - phi_now)."""
        return _size(m) * (ops.arctan2(m.sigma, m.alpha) - ops.arctan2(now.sigma, now.alpha))

    def bend(self, m: Marginal, off, change):
        """cos(phi) d noise_hat - sin(phi) d x_hat, with d noise_hat = (off - alpha d x_hat) / sigma."""
        r = _size(m)
        return (m.alpha * off - r**2 * change) / (m.sigma * r)

    def closing(self, method: Tableau) -> Tableau:
        """Euler's, the midpoint rule, or Heun's of order 3."""
        return CLOSING[len(method.places)]


def _size(m: Marginal):
    return ops.sqrt(m.alpha**2 + m.sigma**2)


class Ratio(Variable):
    """s = sigma / alpha, of x / alpha, as EDM and k-diffusion have it on any schedule; a stage within a step of it is
    at a fraction of the way in log s.
    """

    def at(self, schedule: NoiseSchedule, now: Marginal, then: Marginal, fraction) -> Marginal:
        """log_snr at the fraction of its way."""
        return between(schedule, now, then, fraction)

    def length(self, now: Marginal, m: Marginal):
        """alpha_m (s_m - s_now)."""
        return m.alpha * (ratio(m) - ratio(now))

    def bend(self, m: Marginal, off, change):
        """d noise_hat."""
        return (off - m.alpha * change) / m.sigma

    def closing(self, method: Tableau) -> Tableau:
        """Euler's; what the denoiser says on the way is not used."""
        return Tableau(MIDPOINT.places * len(method.places), (0.0,) * len(method.places))


class Line(NamedTuple):
    """Where a step begins, and DDIM's step from there, on which x_hat and noise_hat are constant."""

    now: Marginal
    estimate: Estimate
    noise_hat: Any

    @classmethod
    def at(cls, denoise: Denoise, x, m: Marginal) -> Self:
        """The line through `x` at `m`: one call of the denoiser."""
        estimate = denoise(x, m)
        return cls(m, estimate, noise_of(x, estimate.x_hat, m))

    def reach(self, m: Marginal, off=0.0):
        """x at `m`, `off` the line."""
        return m.alpha * self.estimate.x_hat + m.sigma * self.noise_hat + off

    def change(self, denoise: Denoise, m: Marginal, off=0.0):
        """By how much x_hat is another there: one call of the denoiser."""
        return denoise(self.reach(m, off), m).x_hat - self.estimate.x_hat


def stages(denoise: Denoise, schedule: NoiseSchedule, line: Line, then: Marginal, variable: Variable, method: Tableau):
    """x at `then` by this method: a call of the denoiser for each of its places, tensors or numbers."""
    bend = total = 0.0
    for place, weight in zip(*method, strict=True):
        m = variable.at(schedule, line.now, then, place)
        # A stage at the end is asked for at the time of the grid, to the last digit.
        m = chosen(ops.equal(place, 1.0), then, m)
        off = variable.length(line.now, m) * bend
        bend = variable.bend(m, off, line.change(denoise, m, off))
        total = total + weight * bend
    return line.reach(then, variable.length(line.now, then) * total)


class RungeKutta(Solver):
    """The base of one-step methods, with EDM's churn (Karras et al. 2022, algorithm 2):

        s_up = (1 + gamma) s,    z_up = z + sqrt(s_up^2 - s^2) s_noise noise,
        gamma = min(s_churn / steps, sqrt(2) - 1)  if s_min <= s <= s_max, else 0,

    then the step from s_up. A new one defines `method`, and its `order`.
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
        """One, and one for each further stage."""
        return 1 + len(self.method.places)

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
        return self.go(denoise, schedule, line, then), line.estimate, state

    def go(self, denoise: Denoise, schedule: NoiseSchedule, line: Line, then: Marginal):
        """x at `then`, from the beginning of this line."""
        pairs = zip(self.method, self.variable.closing(self.method), strict=True)
        method = Tableau(*([ops.where(then.t > 0, *one) for one in zip(*pair, strict=True)] for pair in pairs))
        return stages(denoise, schedule, line, then, self.variable, method)

    def _churn(self, schedule, x, now, noise, gamma):
        s = ratio(now)
        gamma = ops.where(ops.logical_and(s >= self.s_min, s <= self.s_max), gamma, 0.0)
        up = schedule.at_log_snr(now.log_snr - 2.0 * ops.log1p(gamma))
        # Where nothing is added the time is the grid's own, to the last digit.
        up = up._replace(t=ops.where(gamma > 0, up.t, now.t))
        added = s * ops.sqrt(gamma * (2.0 + gamma)) * self.s_noise
        return up.alpha * (x / now.alpha + added * noise()), up


class Euler(RungeKutta):
    """Euler's method (Karras et al. 2022, algorithm 2 without its correction):

        x_then = alpha_then x_hat + sigma_then noise_hat.

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

    def inverse(self, iterations: int = 1) -> Solver:
        """`DDIMInversion(iterations)`, if there is no churn."""
        return super().inverse() if self.stochastic else DDIMInversion(iterations)


class _TwoStages(RungeKutta):
    """A method of order 2, in either variable."""

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

    The step to t = 0 is the midpoint rule, or, in "ratio", Euler's. `Heun("ratio")` is EDM's (Karras et al. 2022,
    algorithm 2) and k-diffusion's `sample_heun`, for runs on EDM's grid, `times.Karras`; there too "angle" has the
    smaller error on data of unit size.

    Args:
        variable: a `Variable`: "angle", good on any grid, or "ratio".
        s_churn: as of `Euler`. EDM's for ImageNet-64: 40, with `s_min` 0.05, `s_max` 50, `s_noise` 1.003, 256 steps.
        s_min: as of `Euler`.
        s_max: as of `Euler`.
        s_noise: as of `Euler`.

    Raises:
        ValueError: as of `Euler`; if `variable` is unknown.
    """

    method = Tableau((1.0,), (1 / 2,))


class DPM2(_TwoStages):
    """The midpoint rule, of order 2. In the variable u of y = w or z, with slope f (see the module),

        y_2 = y + (u_2 - u) f,    y_then = y + (u_then - u) f_2,

    u_2 in the middle: of the angle; or, in "ratio", of log s. The step to t = 0 is no other, or, in "ratio", Euler's.
    `DPM2("ratio")` is k-diffusion's `sample_dpm_2`, which differs from DPM-Solver-2 (Lu et al. 2022, arXiv:2206.00927,
    algorithm 1) by a term of order 3.

    Args:
        variable: a `Variable`: "angle", good on any grid, or "ratio", which wants a grid on which s falls by no more
            than a few times in a step.
        s_churn: as of `Euler`.
        s_min: as of `Euler`.
        s_max: as of `Euler`.
        s_noise: as of `Euler`.

    Raises:
        ValueError: as of `Euler`; if `variable` is unknown.
    """

    method = MIDPOINT


class RK4(RungeKutta):
    """The classical method of Runge and Kutta in the angle (see the module), of order 4:

        w_then = w + (phi_then - phi) (v + 2 v_2 + 2 v_3 + v_4) / 6,    phi_2 = phi_3 = (phi + phi_then) / 2.

    The step to t = 0 is Heun's method of order 3, whose stages are at 1/3 and 2/3. (A fourth answer of the denoiser is
    not used there.)

    Args:
        s_churn: as of `Euler`.
        s_min: as of `Euler`.
        s_max: as of `Euler`.
        s_noise: as of `Euler`.

    Raises:
        ValueError: as of `Euler`.
    """

    order = 4
    method = Tableau((1 / 2, 1 / 2, 1.0), (1 / 3, 1 / 3, 1 / 6))


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
    """`DPM2("ratio")` to s_down, and noise from there to s_then, s_down and s_up as of `EulerAncestral`; k-diffusion's
    `sample_dpm_2_ancestral`. Mean and covariance are of order 2. A step to t = 0 is `EulerAncestral`'s. Unless another
    grid is named a run begins at a log-SNR of -6: from much above it the first step, in s, is too long.

    Args:
        eta: 0 is `DPM2("ratio")`, 1 adds the noise that the posterior has; any number in [0, 1].
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
        # kept = s_down^2 / s_then^2 = 1 - eta^2 (1 - r), written so that it does not cancel where r is near 0.
        kept = (1.0 - self.eta**2) + self.eta**2 * ops.exp(now.log_snr - then.log_snr)
        down = then._replace(sigma=then.sigma * ops.sqrt(kept))
        middle = schedule.at_log_snr(0.5 * (now.log_snr + then.log_snr - ops.log(kept)))
        line = Line.at(denoise, x, now)
        bend = ops.where(then.t > 0, variable.bend(middle, 0.0, line.change(denoise, middle)), 0.0)
        x = line.reach(down, variable.length(now, down) * bend)
        if self.stochastic:
            x = x + self.eta * then.sigma * ops.sqrt(bridge(now, then)[1]) * noise()
        return x, line.estimate, state
