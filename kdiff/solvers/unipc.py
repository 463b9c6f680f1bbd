"""UniPC, and the exponential Adams formula that it shares with SA-Solver.

From l_now to l_then, h = l_then - l_now, let u = (l - l_now) / h be the fraction of the way. The estimate m_0 is made
at u = 0, past ones m_k at u_k < 0. With the polynomial through all of them in place of x_hat, the integral of the
module `solvers.base` is, with z = h,

    x_then  =  sigma_then / sigma_now x_now  +  alpha_then (M_0 m_0 + sum_k w_k (m_k - m_0)),
    w_k     =  z integral_0^1 e^{-z (1 - u)} L_k(u) du,        L_k = 1 at u_k, 0 at the other u_j and at 0,
    M_n     =  z integral_0^1 e^{-z (1 - u)} u^n du.

A predictor knows u_k < 0 alone; a corrector also u_1 = 1, once the denoiser was asked there. For estimates of the noise
alpha and sigma change places, and z = -h.
"""

from math import factorial
from typing import Any, NamedTuple, Self

import numpy as np
from keras import ops

from kdiff.base import check_choice
from kdiff.schedules import Marginal, NoiseSchedule
from kdiff.solvers.base import Denoise, Draw, History, Solver, half_step, noise_of

# Where |z| is below this the moments are summed from a series, whose terms these are.
_SMALL = 1.5
_TERMS = np.arange(13, dtype="float32")
_SERIES = [np.float32([factorial(n) / factorial(n + k + 1) for k in range(13)]) for n in range(4)]


class Memory(NamedTuple):
    """What a predictor-corrector remembers of its last step.

    Attributes:
        history: the estimates, that of the last step first.
        x: where the last step began, corrected.
        now: the marginal of that x.
        noise: the noise that the last step drew; `()` in a deterministic solver.
    """

    history: History
    x: Any
    now: Marginal
    noise: Any

    @classmethod
    def empty(cls, x, length: int, steps: int, stochastic: bool = False) -> Self:
        """Before the first step; the marginal is any that is noisier than all others."""
        one, least = (ops.convert_to_tensor(np.float32(number)) for number in (1.0, -100.0))
        noise = ops.zeros_like(x) if stochastic else ()
        return cls(History.empty(x, length, steps), ops.zeros_like(x), Marginal(one, one, one, least), noise)

    def places(self, h):
        """u_k = (l_k - l_0) / h of the estimates before the last."""
        first, *others = self.history.log_snrs
        return [0.5 * (other - first) / h for other in others]


class UniPC(Solver):
    """UniPC-p, the B(h) version (Zhao et al. 2023, arXiv:2302.04867, theorem 3.1, corollary 3.2).

    The predictor, of order p, is the formula of this module with the p - 1 estimates before the last. The corrector, of
    order p + 1, makes the same step again once the estimate at its end is known: the next step begins with it, so that
    a step asks the denoiser once. Estimates stay what they were at the predicted x, and the last x is not corrected.

    Where the sum has a single term, M_1 in it is replaced by B / 2, which keeps the order. There alone the two variants
    differ.

    Args:
        predictor_order: p, from 1 to 3. With a strong guidance 2 is steadier than 3.
        variant: "bh1" is B = z, "bh2" is B = M_0 = 1 - e^-z.
        corrector: whether there is one.
        predicts: "data" or "noise": which of the two the polynomial is for. An error of the noise counts 1 / alpha_now
            times, so that "noise" needs many steps where alpha is near 0, and never suits strong guidance.
        lower_final: whether the last step has order 1 and the one before at most 2, steadier in few steps to t = 0. The
            order of the run is then at most 2.
    """

    def __init__(
        self,
        predictor_order: int = 2,
        variant: str = "bh2",
        corrector: bool = True,
        predicts: str = "data",
        lower_final: bool = True,
    ):
        check_choice("UniPC", "predictor_order", predictor_order, (1, 2, 3))
        check_choice("UniPC", "variant", variant, ("bh1", "bh2"))
        check_choice("UniPC", "predicts", predicts, ("data", "noise"))
        self.predictor_order, self.variant, self.corrector = predictor_order, variant, corrector
        self.predicts, self.lower_final = predicts, lower_final
        self.order = min(predictor_order + bool(corrector), 2 if lower_final else 4)

    @property
    def least_steps(self) -> int:
        """As many as the predictor's order."""
        return self.predictor_order

    def init(self, x, steps: int) -> Memory:
        """No estimates yet."""
        return Memory.empty(x, self.predictor_order, steps)

    def step(self, denoise: Denoise, schedule: NoiseSchedule, x, now: Marginal, then: Marginal, noise: Draw, state):
        """The corrector of the last step, then the predictor of this one; arguments and results as in `Solver.step`."""
        estimate = denoise(x, now)
        x_hat = estimate.x_hat
        value = x_hat if self.predicts == "data" else noise_of(x, x_hat, now)
        if self.corrector:
            x = ops.where(state.history.made > 0, self._correct(value, now, state), x)
        order = state.history.order(self.predictor_order, self.lower_final)
        state = Memory(state.history.add(value, now), x, now, ())
        return self._predict(then, state, order), estimate, state

    def _predict(self, then: Marginal, last: Memory, order):
        h = half_step(last.now, then)
        return self._move(last, then, h, last.places(h), last.history.values[1:], order - 1)

    def _correct(self, value, now: Marginal, last: Memory):
        h = half_step(last.now, now)
        before = last.history._replace(made=last.history.made - 1, left=last.history.left + 1)
        order = before.order(self.predictor_order, self.lower_final)
        return self._move(last, now, h, [1.0, *last.places(h)], [value, *last.history.values[1:]], order)

    def _move(self, last: Memory, then: Marginal, h, places, values, count):
        """The formula of the module, from `last.x` to `then`, with the first `count` of `values`, made at `places`."""
        kept, scale, z = then.sigma / last.now.sigma, then.alpha, h
        if self.predicts == "noise":
            kept, scale, z = then.alpha / last.now.alpha, then.sigma, -h
        single = z / 2 if self.variant == "bh1" else -ops.expm1(-z) / 2
        return kept * last.x + scale * adams(z, last.history.values[0], places, values, count, single)


def adams(z, first, places, values, count, single):
    """M_0 m_0 + sum_k w_k (m_k - m_0), with the first `count` of the m_k; M_1 is `single` where `count` is 1.

    Args:
        z: a scalar.
        first: m_0, with shape `(batch, ...)`.
        places: a list of scalars u_k, neither 0 nor equal to each other.
        values: the m_k, of the shape of m_0.
        count: a scalar, int32.
        single: a scalar.
    """
    m = moments(z, len(places))
    if places:
        m[1] = ops.where(ops.equal(count, 1), single, m[1])
    total = m[0] * first
    known = [ops.cast(count > k, "float32") for k in range(len(values))]
    for k, value in enumerate(values):
        w = sum(c * moment for c, moment in zip(_lagrange(places, k, known), m[1:], strict=True))
        total = total + known[k] * w * (value - first)
    return total


def _lagrange(places, k, known):
    """The coefficients of u, u^2, ... of the polynomial that is 1 at u_k, 0 at 0 and at the others that are known."""
    coefficients = [1.0 / places[k]]
    for j, other in enumerate(places):
        if j != k:
            # (u - u_j) / (u_k - u_j), or 1.
            slope = known[j] / (places[k] - other)
            constant = 1.0 - slope * places[k]
            pairs = zip([*coefficients, 0.0], [0.0, *coefficients], strict=True)
            coefficients = [constant * a + slope * b for a, b in pairs]
    return coefficients


def moments(z, highest: int) -> list:
    """M_n = z integral_0^1 e^{-z (1 - u)} u^n du, n = 0 ... `highest` (at most 3), to float32's precision at any z.

    By parts M_n = 1 - n / z M_{n-1}. Near z = 0 that loses all digits; there the series of the exponential is used,

        M_n = z sum_k n! / (n + k + 1)! (-z)^k.
    """
    found = [-ops.expm1(-z)]
    if not highest:
        return found
    small = ops.abs(z) < _SMALL
    safe = ops.where(small, _SMALL, z)
    powers = ops.power(ops.where(small, -z, _SMALL), _TERMS)
    for n in range(1, highest + 1):
        series = z * ops.sum(ops.convert_to_tensor(_SERIES[n]) * powers)
        found.append(ops.where(small, series, 1.0 - n / safe * found[-1]))
    return found
