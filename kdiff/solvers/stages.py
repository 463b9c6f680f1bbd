"""The variables in which Runge-Kutta methods integrate, and their stages. The theory is in `runge_kutta`."""

from typing import Any, NamedTuple, Self

from keras import ops

from kdiff.base import Value
from kdiff.denoisers import Estimate
from kdiff.schedules import Marginal, NoiseSchedule
from kdiff.solvers.base import Denoise, between, noise_of

__all__ = ["CLOSING", "MIDPOINT", "THIRD", "Angle", "Line", "Ratio", "Tableau", "Variable", "chosen", "ratio", "stages"]


def ratio(m: Marginal):
    """s = sigma / alpha."""
    return m.sigma / m.alpha


class Tableau(NamedTuple):
    """An explicit method in which each stage is reached with the slope of the previous one.

    Attributes:
        places: c_2, c_3, ..., the positions of the stages as fractions of the step.
        weights: b_2, b_3, ...; b_1 is 1 minus their sum.
    """

    places: tuple = ()
    weights: tuple = ()


MIDPOINT = Tableau((1 / 2,), (1.0,))
THIRD = Tableau((1 / 3, 2 / 3), (0.0, 3 / 4))
# Methods with all stages inside the step, by the number of stages: Euler, the midpoint rule, Heun's third-order method.
# (There is none of order 4 with four stages; the fourth entry is the third.)
CLOSING = (Tableau(), MIDPOINT, THIRD, THIRD)


def chosen(condition, one: Marginal, other: Marginal) -> Marginal:
    """Selects one of two marginals."""
    return Marginal(*(ops.where(condition, a, b) for a, b in zip(one, other, strict=True)))


class Variable(Value):
    """The base class of the variables of integration u (see `runge_kutta`)."""

    def at(self, schedule: NoiseSchedule, now: Marginal, then: Marginal, fraction) -> Marginal:
        """The marginal at this fraction of the way from `now` to `then`."""
        raise NotImplementedError

    def length(self, now: Marginal, m: Marginal):
        """g_m (u_m - u_now)."""
        raise NotImplementedError

    def bend(self, m: Marginal, off, change):
        """e at `m`, from `off`, the deviation of x from the DDIM step, and `change`, that of x_hat."""
        raise NotImplementedError

    def closing(self, method: Tableau) -> Tableau:
        """The method for a step to t = 0, with at most as many stages."""
        raise NotImplementedError


class Angle(Variable):
    """phi = arctan(sigma / alpha), of x / sqrt(alpha^2 + sigma^2); linear in t on `Cosine`."""

    def at(self, schedule: NoiseSchedule, now: Marginal, then: Marginal, fraction) -> Marginal:
        """log_snr = 2 log(sin(pi / 2 - phi) / sin phi), which is accurate at either end."""
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
        """Euler's method, the midpoint rule, or Heun's third-order method."""
        return CLOSING[len(method.places)]


def _size(m: Marginal):
    return ops.sqrt(m.alpha**2 + m.sigma**2)


class Ratio(Variable):
    """s = sigma / alpha, of x / alpha, as in EDM and k-diffusion, on any schedule; stages inside a step are placed at a
    fraction of the step in log s.
    """

    def at(self, schedule: NoiseSchedule, now: Marginal, then: Marginal, fraction) -> Marginal:
        """The marginal at this fraction of the step in log-SNR."""
        return between(schedule, now, then, fraction)

    def length(self, now: Marginal, m: Marginal):
        """alpha_m (s_m - s_now)."""
        return m.alpha * (ratio(m) - ratio(now))

    def bend(self, m: Marginal, off, change):
        """d noise_hat."""
        return (off - m.alpha * change) / m.sigma

    def closing(self, method: Tableau) -> Tableau:
        """Euler's method."""
        return Tableau()


class Line(NamedTuple):
    """The beginning of a step, and the step of DDIM from there, on which x_hat and noise_hat are constant."""

    now: Marginal
    estimate: Estimate
    noise_hat: Any

    @classmethod
    def at(cls, denoise: Denoise, x, m: Marginal) -> Self:
        """The line through `x` at `m`: one call of the denoiser."""
        estimate = denoise(x, m)
        return cls(m, estimate, noise_of(x, estimate.x_hat, m))

    def reach(self, m: Marginal, off=0.0):
        """x at `m`, plus the deviation `off` from the line."""
        return m.alpha * self.estimate.x_hat + m.sigma * self.noise_hat + off

    def change(self, denoise: Denoise, m: Marginal, off=0.0):
        """The change of x_hat at `m`: one call of the denoiser."""
        return denoise(self.reach(m, off), m).x_hat - self.estimate.x_hat


def stages(
    denoise: Denoise,
    schedule: NoiseSchedule,
    line: Line,
    then: Marginal,
    variable: Variable,
    method: Tableau,
    bend=0.0,
    total=0.0,
) -> tuple:
    """(e_i, sum_i b_i e_i) after these stages of a method, with one call of the denoiser for each.

    Args:
        denoise: a `Denoiser`.
        schedule: the schedule.
        line: the beginning of the step.
        then: the marginal at its end.
        variable: the variable of integration.
        method: places and weights of the stages, tensors or numbers.
        bend: e_i of the stage before.
        total: the sum over the stages before.
    """
    for place, weight in zip(*method, strict=True):
        m = variable.at(schedule, line.now, then, place)
        # A stage at the end uses exactly the time of the grid.
        m = chosen(ops.equal(place, 1.0), then, m)
        off = variable.length(line.now, m) * bend
        bend = variable.bend(m, off, line.change(denoise, m, off))
        total = total + weight * bend
    return bend, total
