"""SA-Solver: an Adams predictor-corrector for the reverse SDE with an adjustable amount of noise."""

from keras import ops

from kdiff.base import Value, check_choice, check_number
from kdiff.schedules import Marginal, NoiseSchedule
from kdiff.solvers.base import Denoise, Draw, Solver, half_step
from kdiff.solvers.exponential import half
from kdiff.solvers.unipc import Memory, adams

__all__ = ["SASolver", "Tau", "Within"]


class Tau(Value):
    """The base class of the noise strength tau(t) of SA-Solver. A new one defines only `__call__`."""

    def __call__(self, m: Marginal):
        """tau >= 0 for a step that begins at `m`: 0 is the probability flow, 1 the standard reverse SDE."""
        raise NotImplementedError


class Within(Tau):
    """tau is `value` for `low` <= t <= `high`, and 0 elsewhere, as in Xue et al. 2023.

    Args:
        value: tau inside the interval.
        low: the lower end of the interval, in [0, 1].
        high: the upper end of the interval, in [0, 1].
    """

    def __init__(self, value: float = 1.0, low: float = 0.2, high: float = 0.8):
        check_number("Within", "value", value, 0.0)
        check_number("Within", "low", low, 0.0, 1.0)
        check_number("Within", "high", high, low, 1.0)
        self.value, self.low, self.high = value, low, high

    def __call__(self, m: Marginal):
        """value if low <= t <= high, else 0."""
        inside = ops.logical_and(m.t >= self.low, m.t <= self.high)
        return ops.where(inside, float(self.value), 0.0)


class SASolver(Solver):
    """SA-Solver, data prediction (Xue et al. 2023, arXiv:2309.05019, algorithm 1). With z = (1 + tau^2) h,

        x_then = e^{-tau^2 h} sigma_then / sigma_now x_now + alpha_then (M_0 m_0 + sum_k w_k (m_k - m_0))
                 + sigma_then sqrt(1 - e^{-2 tau^2 h}) noise,

    where m_k are the estimates, and M_0 and w_k are those of `solvers.exponential`. The predictor uses the estimates at
    the last `predictor_order` times. The corrector repeats the step, with the same noise, using the estimate at its end
    and those at the `corrector_order` - 1 times before. As in UniPC it is evaluated at the beginning of the next step,
    estimates are not recomputed at the corrected x, and the last x is not corrected.

    If the sum has a single term, its M_1 is replaced by M_0 / 2, as in UniPC ("bh2"). The authors' code uses z / 2
    ("bh1"), which grows with the step: with tau = 1 and 8 steps on a variance exploding schedule, the covariance of a
    Gaussian becomes 17 times too large, whereas with M_0 / 2 its error is 1 %. With a predictor of two estimates, and
    no corrector or one of two or three, the covariance is then more accurate than that of Euler's method with equally
    many calls, from 8 calls on; with three and tau = 1, from 20 calls on. With one estimate in either it may be worse:
    for a covariance of 0.5 and 20 steps on a variance exploding schedule, the error of Euler's method is 0.12, and that
    of the orders (1, 0) is 0.19, of (1, 1) 0.06, of (1, 2) 0.14, of (2, 1) 0.18, and of (2, 2) 0.015.

    With tau = 0 this is UniPC, with the order of its corrector. With tau > 0 past estimates differ by noise of size
    sqrt(h), and the order of the mean and covariance is at most 2. With tau = 1 and orders (1, 0) it is DDPM.

    Args:
        tau: the strength of the noise, a number or a `Tau`.
        predictor_order: the number of estimates in the predictor, from 1 to 3.
        corrector_order: the number of estimates in the corrector, from 1 to 3; 0 for no corrector.
        lower_final: whether the orders decrease to 1 and 2 in the last step, which is more stable for few steps to
            t = 0.
        variant: "bh2", or "bh1" as in the authors' code.
    """

    def __init__(
        self,
        tau: float | Tau = 1.0,
        predictor_order: int = 2,
        corrector_order: int = 2,
        lower_final: bool = True,
        variant: str = "bh2",
    ):
        if not isinstance(tau, Tau):
            check_number("SASolver", "tau", tau, 0.0)
        check_choice("SASolver", "predictor_order", predictor_order, (1, 2, 3))
        check_choice("SASolver", "corrector_order", corrector_order, (0, 1, 2, 3))
        self.tau, self.predictor_order, self.corrector_order = tau, predictor_order, corrector_order
        check_choice("SASolver", "variant", variant, ("bh1", "bh2"))
        self.lower_final, self.variant = lower_final, variant
        self.stochastic = isinstance(tau, Tau) or tau > 0
        order = min(predictor_order + 1, corrector_order) if corrector_order else predictor_order
        self.order = min(order, 2 if lower_final or self.stochastic else 3)

    def init(self, x, steps: int) -> Memory:
        """The state without estimates."""
        return Memory.empty(x, max(self.predictor_order, self.corrector_order - 1), steps, self.stochastic)

    def step(self, denoise: Denoise, schedule: NoiseSchedule, x, now: Marginal, then: Marginal, noise: Draw, state):
        """The corrector of the last step, then the predictor of this one; arguments and results as in `Solver.step`."""
        estimate = denoise(x, now)
        x_hat = estimate.x_hat
        if self.corrector_order:
            x = ops.where(state.history.made > 0, self._correct(x_hat, now, state), x)
        order = state.history.order(self.predictor_order, self.lower_final)
        state = Memory(state.history.add(x_hat, now), x, now, noise() if self.stochastic else ())
        return self._predict(then, state, order), estimate, state

    def _predict(self, then: Marginal, last: Memory, order):
        first, *others = last.history.values
        count = self.predictor_order - 1
        return self._move(last, then, first, last.places(then)[:count], others[:count], order - 1)

    def _correct(self, x_hat, now: Marginal, last: Memory):
        first, *others = last.history.values
        if self.corrector_order == 1:
            return self._move(last, now, x_hat, [], [], 0)
        order = ops.minimum(self.corrector_order, last.history.made + 1)
        if self.lower_final:
            order = ops.minimum(order, last.history.left + 2)
        count = self.corrector_order - 2
        places, values = [1.0, *last.places(now)[:count]], [x_hat, *others[:count]]
        return self._move(last, now, first, places, values, order - 1)

    def _move(self, last: Memory, then: Marginal, first, places, values, count):
        """The step from `last.x` to `then`, with the first `count` of `values` besides `first`."""
        h = half_step(last.now, then)
        square = (self.tau(last.now) if isinstance(self.tau, Tau) else float(self.tau)) ** 2
        z = (1.0 + square) * h
        single = z / 2.0 if self.variant == "bh1" else half(z)
        x = ops.exp(-square * h) * then.sigma / last.now.sigma * last.x
        x = x + then.alpha * adams(z, first, places, values, count, single)
        if self.stochastic:
            x = x + then.sigma * ops.sqrt(-ops.expm1(-2.0 * square * h)) * last.noise
        return x
