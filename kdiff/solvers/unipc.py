"""UniPC: a predictor and a corrector, both exponential Adams formulas (`solvers.exponential`).

The predictor uses estimates at u_k < 0; the corrector also uses that at u_1 = 1, after the denoiser was called there.
"""

from typing import Any, NamedTuple, Self

import numpy as np
from keras import ops

from kdiff.base import check_choice
from kdiff.schedules import Marginal, NoiseSchedule
from kdiff.solvers.base import Denoise, Draw, History, Solver, half_step, noise_of
from kdiff.solvers.exponential import half, weights

__all__ = ["Memory", "UniPC", "adams"]


class Memory(NamedTuple):
    """The state of a predictor-corrector method.

    Attributes:
        history: the past estimates, that of the last step first.
        x: the corrected x at the beginning of the last step.
        now: the marginal of that x.
        noise: the noise drawn in the last step; `()` for a deterministic solver.
    """

    history: History
    x: Any
    now: Marginal
    noise: Any

    @classmethod
    def empty(cls, x, length: int, steps: int, stochastic: bool = False) -> Self:
        """The state before the first step, with a placeholder marginal that is noisier than all others."""
        one, least = (ops.convert_to_tensor(np.float32(number)) for number in (1.0, -100.0))
        noise = ops.zeros_like(x) if stochastic else ()
        return cls(History.empty(x, length, steps), ops.zeros_like(x), Marginal(one, one, one, least), noise)

    def places(self, then: Marginal) -> list:
        """u_k of the estimates before the last one, for the step to `then`."""
        return self.history.places(self.now, then)[1:]


class UniPC(Solver):
    """UniPC-p, the B(h) version (Zhao et al. 2023, arXiv:2302.04867, theorem 3.1, corollary 3.2).

    The predictor, of order p, is the formula of `solvers.exponential` with the p - 1 estimates before the last one. The
    corrector, of order p + 1, repeats the step with the estimate at its end. It is evaluated at the beginning of the
    next step, so there is one call of the denoiser per step. Estimates are not recomputed at the corrected x, and the
    last x is not corrected.

    If the sum has a single term, its M_1 is replaced by B / 2, which keeps the order. The two variants differ only
    there.

    Args:
        predictor_order: p, from 1 to 3. With strong guidance 2 is more stable than 3.
        variant: "bh1" is B = z, "bh2" is B = M_0 = 1 - e^-z.
        corrector: whether to use the corrector.
        predicts: "data" or "noise", the quantity that the polynomial interpolates. Errors of the noise are amplified by
            1 / alpha_now, so "noise" needs many steps if alpha is near 0, and is unsuitable for strong guidance.
        lower_final: whether the last step has order 1 and the step before it at most 2, which is more stable for few
            steps to t = 0. The order of the run is then at most 2.
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

    def init(self, x, steps: int) -> Memory:
        """The state without estimates."""
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
        return self._move(last, then, last.places(then), last.history.values[1:], order - 1)

    def _correct(self, value, now: Marginal, last: Memory):
        before = last.history._replace(made=last.history.made - 1, left=last.history.left + 1)
        order = before.order(self.predictor_order, self.lower_final)
        return self._move(last, now, [1.0, *last.places(now)], [value, *last.history.values[1:]], order)

    def _move(self, last: Memory, then: Marginal, places, values, count):
        """The formula, from `last.x` to `then`, with the first `count` of `values`, at `places`."""
        kept, scale, z = then.sigma / last.now.sigma, then.alpha, half_step(last.now, then)
        if self.predicts == "noise":
            kept, scale, z = then.alpha / last.now.alpha, then.sigma, -z
        single = z / 2.0 if self.variant == "bh1" else half(z)
        return kept * last.x + scale * adams(z, last.history.values[0], places, values, count, single)


def adams(z, first, places: list, values: list, count, single):
    """M_0 v_0 + sum_k w_k (v_k - v_0), where v_0 is `first`; other arguments as in `exponential.weights`."""
    changes = zip(weights(z, places, count, single), values, strict=True)
    return -ops.expm1(-z) * first + sum(w * (value - first) for w, value in changes)
