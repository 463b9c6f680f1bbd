"""UniPC: a predictor and a corrector, both exponential Adams formulas (`solvers.exponential`).

A predictor knows estimates at u_k < 0 alone; a corrector also that at u_1 = 1, once the denoiser was asked there.
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

    def places(self, then: Marginal) -> list:
        """u_k of the estimates before the last, in the step to `then`."""
        return self.history.places(self.now, then)[1:]


class UniPC(Solver):
    """UniPC-p, the B(h) version (Zhao et al. 2023, arXiv:2302.04867, theorem 3.1, corollary 3.2).

    The predictor, of order p, is the formula of `solvers.exponential` with the p - 1 estimates before the last. The
    corrector, of order p + 1, makes the same step again once the estimate at its end is known: the next step begins
    with it, so that a step asks the denoiser once. Estimates stay what they were at the predicted x, and the last x is
    not corrected.

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
        return self._move(last, then, last.places(then), last.history.values[1:], order - 1)

    def _correct(self, value, now: Marginal, last: Memory):
        before = last.history._replace(made=last.history.made - 1, left=last.history.left + 1)
        order = before.order(self.predictor_order, self.lower_final)
        return self._move(last, now, [1.0, *last.places(now)], [value, *last.history.values[1:]], order)

    def _move(self, last: Memory, then: Marginal, places, values, count):
        """The formula, from `last.x` to `then`, with the first `count` of `values`, made at `places`."""
        kept, scale, z = then.sigma / last.now.sigma, then.alpha, half_step(last.now, then)
        if self.predicts == "noise":
            kept, scale, z = then.alpha / last.now.alpha, then.sigma, -z
        single = z / 2.0 if self.variant == "bh1" else half(z)
        return kept * last.x + scale * adams(z, last.history.values[0], places, values, count, single)


def adams(z, first, places: list, values: list, count, single):
    """M_0 v_0 + sum_k w_k (v_k - v_0), where v_0 is `first`; the others as of `exponential.weights`."""
    changes = zip(weights(z, places, count, single), values, strict=True)
    return -ops.expm1(-z) * first + sum(w * (value - first) for w, value in changes)
