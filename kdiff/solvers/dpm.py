"""DPM-Solver and DPM-Solver++: exponential integrators of the probability flow, of orders 1 to 3.

They are the two sums of `solvers.exponential`, for a polynomial in log-SNR through values of x_hat or noise_hat: with
its coefficients p_k, the fraction u of the step and M_k(z) = z integral of e^(-z (1 - u)) u^k du,

    x_then  =  (sigma_then / sigma_now) x_now  +  alpha_then sum_k M_k(h) p_k         p(u) = x_hat          (data)
    x_then  =  (alpha_then / alpha_now) x_now  +  sigma_then sum_k M_k(-h) p_k        p(u) = noise_hat      (noise)

For order 1 both are DDIM. The polynomial interpolates the value at u = 0 and, for orders 2 and 3,

    multistep     the values of the previous steps, at u < 0;
    singlestep    values at fractions of this step, 0 < u < 1, each of which needs one more call of the denoiser.

For order 2 the paper has two variants: "heun" uses M_1, and "midpoint" replaces it by M_0 / 2, which differs by O(h^2)
and makes the singlestep solver use only the value at the midpoint.

With noise (`solvers.dpm_sde`) the same sums solve the reverse SDE, with h multiplied by 1 + eta.

Sources: Lu et al. 2022, "DPM-Solver", arXiv:2206.00927 (noise); Lu et al. 2022, "DPM-Solver++", arXiv:2211.01095 (data,
multistep, SDE). The third-order multistep solver is only in the authors' code, where the coefficient p_2 of u^2 is
halved by mistake (a second divided difference is half of a second derivative), as it is in diffusers and k-diffusion.
The order is then 2. Here p_2 is correct, and the measured order is 3.
"""

from typing import Any, NamedTuple

from keras import ops

from kdiff.base import check_choice
from kdiff.schedules import Marginal, NoiseSchedule
from kdiff.solvers.base import Denoise, Draw, History, Solver, between, check_order, half_step, noise_of
from kdiff.solvers.exponential import half, weights
from kdiff.solvers.stages import CLOSING, Angle, Line, chosen

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
    """A step with the integrand frozen at its first value v_0, and the terms of the correction:

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
    """The integral over x_hat (data prediction). With noise it is that of the SDE

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
        kept, longer, spread = then.sigma / now.sigma, h, 0.0
        if self.eta:
            kept, longer = kept * ops.exp(-self.eta * h), (1.0 + self.eta) * h
            spread = then.sigma * ops.sqrt(-ops.expm1(-2.0 * self.eta * h))
        return Frozen(kept * x - then.alpha * ops.expm1(-longer) * x_hat, then.alpha, longer, spread)


class OfNoise:
    """The integral over noise_hat (noise prediction). With noise it is that of the SDE

    x_then = (alpha_then / alpha_now) x_now + (1 + eta) sigma_then sum_k M_k(-h) p_k + spread noise,
    spread = sigma_then sqrt(eta (e^(2h) - 1)) = alpha_then (sigma_now / alpha_now) sqrt(eta (1 - e^(-2h))).

    Its noise does not vanish with sigma_then, so the step to t = 0 uses eta = 0.
    """

    eta = 0.0

    def value(self, x, x_hat, m: Marginal):
        """The integrand, noise_hat."""
        return noise_of(x, x_hat, m)

    def frozen(self, x, x_hat, value, now: Marginal, then: Marginal) -> Frozen:
        """The step with noise_hat, `value`, frozen.

        With x_now = alpha_now x_hat + sigma_now noise_hat the formula above is, for eta = 0, alpha_then x_hat +
        sigma_then noise_hat, which avoids the cancellation of large numbers if alpha_now is near zero.
        """
        h = half_step(now, then)
        eta = ops.where(then.t > 0, self.eta, 0.0)
        spread = then.alpha / now.alpha * now.sigma * ops.sqrt(eta * -ops.expm1(-2.0 * h))
        x = then.alpha * x_hat + then.sigma * (1.0 - eta * ops.expm1(h)) * value
        return Frozen(x, (1.0 + eta) * then.sigma, -h, spread)


class _Multistep(Solver):
    """The polynomial interpolates the values of the previous steps. One call of the denoiser per step.

    It is combined with `OfData` or `OfNoise` in the public solvers below.
    """

    _highest = 3
    _curvature = 1.0

    def __init__(self, order: int = 2, variant: str = "midpoint", lower_final: bool = True):
        check_order(self, order, self._highest)
        check_choice(type(self).__name__, "variant", variant, VARIANTS)
        self.order, self.variant, self.lower_final = order, variant, lower_final

    def init(self, x, steps: int) -> History:
        """An empty history with the number of values that the order needs."""
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
    """DPM-Solver, multistep, noise prediction (Lu et al. 2022, arXiv:2206.00927; this form is in the authors' code).

    With p through noise_hat of this and the previous steps,

        x_then = (alpha_then / alpha_now) x + sigma_then sum_k M_k(-h) p_k.

    The history is initially empty, so the first step has order 1 and the second order 2. Unless the first step is
    short, it causes an error of order 2, as does the last step with `lower_final`.

    Args:
        order: 1 (DDIM), 2 or 3.
        variant: for order 2, "midpoint" or "heun" ("dpmsolver" and "taylor" in the authors' code).
        lower_final: whether the last step has order 1, and the step before it at most 2. If false, a step to t = 0
            extrapolates too far, so it is only for runs that end above.

    Raises:
        ValueError: if `order` or `variant` is invalid.
    """


class DPMSolverPP(OfData, _Multistep):
    """DPM-Solver++, multistep, data prediction; order 2 is 2M (Lu et al. 2022, arXiv:2211.01095, algorithm 2).

    With p through x_hat of this and the previous steps,

        x_then = (sigma_then / sigma_now) x + alpha_then sum_k M_k(h) p_k.

    The history is initially empty, so the first step has order 1 and the second order 2. Unless the first step is
    short, it causes an error of order 2, as does the last step with `lower_final`.

    Args:
        order: 1 (DDIM), 2 or 3.
        variant: for order 2, "midpoint" (algorithm 2) or "heun" ("dpmsolver" and "taylor" in the authors' code).
        lower_final: whether the last step has order 1, and the step before it at most 2.

    Raises:
        ValueError: if `order` or `variant` is invalid.
    """


class _Singlestep(Solver):
    """The polynomial interpolates values at fractions of the step. The calls of the denoiser per step equal the order.

    The step to t = 0, whose log-SNR is unbounded, is made in the angle (`stages.Angle`), by the midpoint rule or Heun's
    third-order method. It is combined with `OfData` or `OfNoise` in the public solvers below.
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
                f"{type(self).__name__}: `fractions` of order {self.order} must be {self.order - 1} increasing numbers "
                f"between 0 and 1; received: {fractions!r}"
            )
        # The value at r_1 has an error of order h^2, and only for r_2 = 2/3 its weight vanishes with h.
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
            # The first value is computed from v_0 alone, the second from a line.
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
        # A line through the values at 0 and 2/3: the integral of the remaining u^2 term vanishes with h.
        return [0.0, *weights(h, [self._at[1]])]


class DPMSolverSinglestep(OfNoise, _Singlestep):
    """DPM-Solver-1, -2 and -3, noise prediction (Lu et al. 2022, arXiv:2206.00927, eq. 3.7, algorithms 1 and 2).

    With p through noise_hat at fractions of this step,

        x_then = (alpha_then / alpha_now) x + sigma_then sum_k M_k(-h) p_k.

    The step to t = 0 is made in the angle, by the midpoint rule or Heun's third-order method.

    Args:
        order: 1 (DDIM), 2 (algorithm 1) or 3 (algorithm 2); also the number of calls of the denoiser per step.
        variant: "midpoint" is that of the paper's algorithms; "heun" uses the full polynomial ("dpmsolver" and "taylor"
            in the authors' code).
        fractions: the positions of the intermediate values in log-SNR, the paper's r_1, or r_1 and r_2. None: 1/2, or
            1/3 and 2/3. For order 3, r_2 must be 2/3: any other value gives order 2.

    Raises:
        ValueError: if an argument is invalid.
    """


class DPMSolverPPSinglestep(OfData, _Singlestep):
    """DPM-Solver++, singlestep, data prediction; order 2 is 2S (Lu et al. 2022, arXiv:2211.01095, algorithm 1).

    With p through x_hat at fractions of this step,

        x_then = (sigma_then / sigma_now) x + alpha_then sum_k M_k(h) p_k.

    Order 3, 3S, is algorithm 2 of arXiv:2206.00927 with data prediction, as in the authors' code. The step to t = 0 is
    made in the angle, by the midpoint rule or Heun's third-order method.

    Args:
        order: 1 (DDIM), 2 or 3; also the number of calls of the denoiser per step.
        variant: "midpoint" is that of the papers' algorithms; "heun" uses the full polynomial ("dpmsolver" and "taylor"
            in the authors' code).
        fractions: the positions of the intermediate values in log-SNR, the papers' r_1, or r_1 and r_2. None: 1/2, or
            1/3 and 2/3. For order 3, r_2 must be 2/3: any other value gives order 2.

    Raises:
        ValueError: if an argument is invalid.
    """
