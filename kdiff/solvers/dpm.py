"""DPM-Solver and DPM-Solver++: exponential integrators of the probability flow, of orders 1 to 3.

They are the two sums of `solvers.exponential`, over a polynomial in the log-SNR through values of x_hat, or of
noise_hat: with its coefficients p_k, u the fraction of the step and M_k(z) = z integral of e^(-z (1 - u)) u^k du,

    x_then  =  (sigma_then / sigma_now) x_now  +  alpha_then sum_k M_k(h) p_k         p(u) = x_hat          (data)
    x_then  =  (alpha_then / alpha_now) x_now  +  sigma_then sum_k M_k(-h) p_k        p(u) = noise_hat      (noise)

Of order 1 both are DDIM. The polynomial goes through the value at u = 0 and, for the orders 2 and 3,

    multistep     the values of the last steps, at u < 0;
    singlestep    values at fractions of this step, 0 < u < 1, each of which is one more call of the denoiser.

Of order 2 the paper has two variants: "heun" takes M_1 as it is, "midpoint" takes M_0 / 2 for it, which differs by
O(h^2) and makes the singlestep solver use the value at its midpoint alone.

With noise (`solvers.dpm_sde`) the same sums solve the reverse SDE, where h is stretched by 1 + eta.

Sources: Lu et al. 2022, "DPM-Solver", arXiv:2206.00927 (noise); Lu et al. 2022, "DPM-Solver++", arXiv:2211.01095 (data,
multistep, SDE). The third order of the multistep solvers is in the authors' code alone, where the coefficient p_2 of
u^2 is halved by mistake (a second divided difference is half of a second derivative); so it is in diffusers and in
k-diffusion. The order is then 2. Here p_2 is whole, and the measured order is 3.
"""

from typing import Any, NamedTuple

from keras import ops

from kdiff.base import check_choice
from kdiff.schedules import Marginal, NoiseSchedule
from kdiff.solvers.base import Denoise, Draw, History, Solver, between, check_order, half_step, noise_of
from kdiff.solvers.exponential import half, weights
from kdiff.solvers.runge_kutta import CLOSING, Angle, Line, chosen

__all__ = [
    "VARIANTS",
    "DPMSolver",
    "DPMSolverPP",
    "DPMSolverPPSinglestep",
    "DPMSolverSinglestep",
    "Frozen",
    "OfData",
    "OfNoise",
]

VARIANTS = ("midpoint", "heun")


class Frozen(NamedTuple):
    """A step with the integrand frozen at its first value v_0, and what it takes to add that it is not:

    x_then  =  x  +  gain sum_i w_i (v_i - v_0)  +  spread noise,        w_i = `exponential.weights(h, ...)`.
    """

    x: Any
    gain: Any
    h: Any
    spread: Any

    def plus(self, weights: list, values: list):
        """x_then without the noise; `values` begins with v_0, `weights` with w_1."""
        first, *others = values
        return self.x + self.gain * sum(w * (value - first) for w, value in zip(weights, others, strict=False))


class OfData:
    """One of the two integrals, that of x_hat. With noise it is that of the SDE

    x_then = (sigma_then / sigma_now) e^(-eta h) x_now + alpha_then sum_k M_k((1 + eta) h) p_k + spread noise,
    spread = sigma_then sqrt(1 - e^(-2 eta h)).
    """

    eta = 0.0

    def value(self, x, x_hat, m: Marginal):
        """The integrand, x_hat."""
        return x_hat

    def frozen(self, x, x_hat, value, now: Marginal, then: Marginal) -> Frozen:
        """The step with x_hat frozen; `value` is x_hat."""
        h = half_step(now, then)
        longer = (1.0 + self.eta) * h
        kept = then.sigma / now.sigma * ops.exp(-self.eta * h)
        spread = then.sigma * ops.sqrt(-ops.expm1(-2.0 * self.eta * h))
        return Frozen(kept * x - then.alpha * ops.expm1(-longer) * x_hat, then.alpha, longer, spread)


class OfNoise:
    """One of the two integrals, that of noise_hat. With noise it is that of the SDE

    x_then = (alpha_then / alpha_now) x_now + (1 + eta) sigma_then sum_k M_k(-h) p_k + spread noise,
    spread = sigma_then sqrt(eta (e^(2h) - 1)) = alpha_then (sigma_now / alpha_now) sqrt(eta (1 - e^(-2h))).

    Its noise does not fall with sigma_then, so the step to t = 0 is made with eta = 0.
    """

    eta = 0.0

    def value(self, x, x_hat, m: Marginal):
        """The integrand, noise_hat."""
        return noise_of(x, x_hat, m)

    def frozen(self, x, x_hat, value, now: Marginal, then: Marginal) -> Frozen:
        """The step with noise_hat, `value`, frozen.

        With x_now = alpha_now x_hat + sigma_now noise_hat the formula above is, for eta = 0, alpha_then x_hat +
        sigma_then noise_hat. Written so, large numbers that cancel where alpha_now is near zero do not arise.
        """
        h = half_step(now, then)
        eta = ops.where(then.t > 0, self.eta, 0.0)
        spread = then.alpha / now.alpha * now.sigma * ops.sqrt(eta * -ops.expm1(-2.0 * h))
        x = then.alpha * x_hat + then.sigma * (1.0 - eta * ops.expm1(h)) * value
        return Frozen(x, (1.0 + eta) * then.sigma, -h, spread)


class _Multistep(Solver):
    """The polynomial goes through the values of the last steps. One call of the denoiser a step.

    It comes with `OfData` or `OfNoise`; the public solvers are below.
    """

    _highest = 3
    _curvature = 1.0

    def __init__(self, order: int = 2, variant: str = "midpoint", lower_final: bool = True):
        check_order(self, order, self._highest)
        check_choice(type(self).__name__, "variant", variant, VARIANTS)
        self.order, self.variant, self.lower_final = order, variant, lower_final

    def init(self, x, steps: int) -> History:
        """An empty history, of as many values as the order needs."""
        return History.empty(x, self._length(), steps)

    def step(self, denoise: Denoise, schedule: NoiseSchedule, x, now: Marginal, then: Marginal, noise: Draw, state):
        """One step; arguments and results as in `Solver.step`."""
        estimate = denoise(x, now)
        x_hat = estimate.x_hat
        value = self.value(x, x_hat, now)
        frozen = self.frozen(x, x_hat, value, now, then)
        count = self._order(then, state) - 1
        x = frozen.plus(self._weights(frozen.h, state.places(now, then), count), [value, *state.values])
        if self.stochastic:
            x = x + frozen.spread * noise()
        return x, estimate, state.add(value, now)

    def _weights(self, h, places: list, count) -> list:
        return weights(h, places, count, half(h) if self.variant == "midpoint" else None, self._curvature)

    def _length(self) -> int:
        return self.order - 1

    def _order(self, then: Marginal, state: History):
        return state.order(self._length() + 1, self.lower_final)


class DPMSolver(OfNoise, _Multistep):
    """DPM-Solver, multistep: of the noise (Lu et al. 2022, arXiv:2206.00927; this form is in the authors' code).

    With p through noise_hat of this and the last steps,

        x_then = (alpha_then / alpha_now) x + sigma_then sum_k M_k(-h) p_k.

    A history must grow, so the first step is of order 1 and the second of order 2: unless the first is short, it leaves
    an error of order 2, and so does the last with `lower_final`.

    Args:
        order: 1 is DDIM; 2 or 3.
        variant: of order 2, "midpoint" or "heun" (the authors' code calls them "dpmsolver" and "taylor").
        lower_final: whether the last step is of order 1, and that before it of order 2 at most. Without it a step to
            t = 0 extrapolates far: only for runs that end above.

    Raises:
        ValueError: if `order` or `variant` is none of these.
    """


class DPMSolverPP(OfData, _Multistep):
    """DPM-Solver++, multistep: of the data; order 2 is 2M (Lu et al. 2022, arXiv:2211.01095, algorithm 2).

    With p through x_hat of this and the last steps,

        x_then = (sigma_then / sigma_now) x + alpha_then sum_k M_k(h) p_k.

    A history must grow, so the first step is of order 1 and the second of order 2: unless the first is short, it leaves
    an error of order 2, and so does the last with `lower_final`.

    Args:
        order: 1 is DDIM; 2 or 3.
        variant: of order 2, "midpoint" (algorithm 2) or "heun" (the authors' code calls them "dpmsolver" and "taylor").
        lower_final: whether the last step is of order 1, and that before it of order 2 at most.

    Raises:
        ValueError: if `order` or `variant` is none of these.
    """


class _Singlestep(Solver):
    """The polynomial goes through values at fractions of the step. As many calls of the denoiser a step as the order.

    The step to t = 0, which has no end in log-SNR, is made in the angle (`runge_kutta.Angle`): by the midpoint rule, or
    Heun's method of order 3. It comes with `OfData` or `OfNoise`; the public solvers are below.
    """

    def __init__(self, order: int = 2, variant: str = "midpoint", fractions: tuple[float, ...] | None = None):
        check_order(self, order, 3)
        check_choice(type(self).__name__, "variant", variant, VARIANTS)
        self.order, self.variant, self.fractions = order, variant, fractions
        self.evaluations = order
        self._at = self._checked(fractions)

    def _checked(self, fractions) -> tuple:
        at = ((), (1 / 2,), (1 / 3, 2 / 3))[self.order - 1] if fractions is None else tuple(fractions)
        rising = all(low < high for low, high in zip((0.0, *at), (*at, 1.0), strict=True))
        if len(at) != self.order - 1 or not rising:
            raise ValueError(
                f"{type(self).__name__}: `fractions` of order {self.order} must be {self.order - 1} rising numbers "
                f"between 0 and 1; received: {fractions!r}"
            )
        # The value at r_1 is found with an error of order h^2, and only with r_2 = 2/3 its weight vanishes with h.
        if self.order == 3 and abs(at[1] - 2 / 3) > 1e-6:
            raise ValueError(
                f"{type(self).__name__}: the second of the `fractions` must be 2/3, or the order is not 3; "
                f"received: {fractions!r}"
            )
        return at

    def step(self, denoise: Denoise, schedule: NoiseSchedule, x, now: Marginal, then: Marginal, noise: Draw, state):
        """One step; arguments and results as in `Solver.step`."""
        line, angle, above = Line.at(denoise, x, now), Angle(), then.t > 0
        x_hat = first = line.estimate.x_hat
        values, bend, total = [self.value(x, first, now)], 0.0, 0.0
        for number, (fraction, place, weight) in enumerate(zip(self._at, *CLOSING[self.order - 1], strict=False)):
            m = chosen(above, between(schedule, now, then, fraction), angle.at(schedule, now, then, place))
            frozen, off = self.frozen(x, first, values[0], now, m), angle.length(now, m) * bend
            # The first value is found with nothing but v_0, the second by a line.
            x_m = frozen.plus(weights(frozen.h, [self._at[0] / fraction]) if number else [], values)
            x_m = ops.where(above, x_m, line.reach(m, off))
            x_hat = denoise(x_m, m).x_hat
            values.append(self.value(x_m, x_hat, m))
            bend = angle.bend(m, off, x_hat - first)
            total = total + weight * bend
        frozen = self.frozen(x, first, values[0], now, then)
        closed = line.reach(then, angle.length(now, then) * total)
        x = ops.where(above, frozen.plus(self._weights(frozen.h), values), closed)
        return x, line.estimate._replace(x_hat=x_hat), state

    def _weights(self, h) -> list:
        if self.variant == "heun" or self.order == 1:
            return weights(h, list(self._at))
        if self.order == 2:
            return weights(h, list(self._at), single=half(h))
        # A line through the values at 0 and 2/3: the integral of what is left of u^2 vanishes with h.
        return [0.0, *weights(h, [self._at[1]])]


class DPMSolverSinglestep(OfNoise, _Singlestep):
    """DPM-Solver-1, -2 and -3: of the noise (Lu et al. 2022, arXiv:2206.00927, eq. 3.7, algorithms 1 and 2).

    With p through noise_hat at fractions of this step,

        x_then = (alpha_then / alpha_now) x + sigma_then sum_k M_k(-h) p_k.

    The step to t = 0 is made in the angle, by the midpoint rule or Heun's method of order 3.

    Args:
        order: 1 is DDIM; 2 is algorithm 1; 3 is algorithm 2. So many are the calls of the denoiser a step.
        variant: "midpoint" is the paper's algorithms; "heun" the full polynomial (the authors' code calls them
            "dpmsolver" and "taylor").
        fractions: where in the step, in log-SNR, the further values are: the paper's r_1, or r_1 and r_2. None for
            1/2, or 1/3 and 2/3. Of order 3, r_2 must be 2/3:
            with any other the order is 2.

    Raises:
        ValueError: if an argument is none of these.
    """


class DPMSolverPPSinglestep(OfData, _Singlestep):
    """DPM-Solver++, singlestep: of the data; order 2 is 2S (Lu et al. 2022, arXiv:2211.01095, algorithm 1).

    With p through x_hat at fractions of this step,

        x_then = (sigma_then / sigma_now) x + alpha_then sum_k M_k(h) p_k.

    Order 3, 3S, is algorithm 2 of arXiv:2206.00927 for the data, as in the authors' code. The step to t = 0 is made in
    the angle, by the midpoint rule or Heun's method of order 3.

    Args:
        order: 1 is DDIM; 2 or 3. So many are the calls of the denoiser a step.
        variant: "midpoint" is the papers' algorithms; "heun" the full polynomial (the authors' code calls them
            "dpmsolver" and "taylor").
        fractions: where in the step, in log-SNR, the further values are: the papers' r_1, or r_1 and r_2. None for
            1/2, or 1/3 and 2/3. Of order 3, r_2 must be 2/3:
            with any other the order is 2.

    Raises:
        ValueError: if an argument is none of these.
    """
