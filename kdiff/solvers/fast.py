"""DPM-Solver-fast: singlestep steps of order 3, with lower orders at the end to match the number of calls."""

from typing import Any, NamedTuple

import numpy as np
from keras import ops

from kdiff.base import check_choice
from kdiff.schedules import Marginal, NoiseSchedule
from kdiff.solvers.base import Denoise, Draw, Solver
from kdiff.solvers.dpm import DPMSolverSinglestep

__all__ = ["DPMSolverFast", "Orders"]


class Orders(NamedTuple):
    """The state of `DPMSolverFast`: the orders of all steps, int32, and the number of steps made."""

    orders: Any
    made: Any


class DPMSolverFast(Solver):
    """DPM-Solver-fast (Lu et al. 2022, arXiv:2206.00927, section 3.4 and appendix D), `sample_dpm_fast` of k-diffusion:

        3, 3, ..., 3, 2, 1     the orders of the steps for 3 (steps - 1) calls,                      `rest` 0;
        3, 3, ..., 3, rest     for 3 (steps - 1) + rest calls,                                       `rest` 1 or 2,

    where each step is that of `DPMSolverSinglestep` of this order. Its grid is uniform in log-SNR, and ends above
    t = 0: `sampling.dpm_fast(20)` is the sampler that calls the denoiser 20 times.

    Args:
        rest: the number of calls beyond 3 (steps - 1).

    Raises:
        ValueError: if `rest` is not 0, 1 or 2.
    """

    evaluations = 3
    branches = True

    def __init__(self, rest: int = 0):
        check_choice("DPMSolverFast", "rest", rest, (0, 1, 2))
        self.rest = rest
        self.order = 3 if rest == 2 else 2  # that of the last step, and one more
        self._solvers = [DPMSolverSinglestep(order) for order in (1, 2, 3)]

    def orders(self, steps: int) -> list[int]:
        """The order of each step."""
        last = [2, 1] if self.rest == 0 else [self.rest]
        return ([3] * steps + last)[-steps:]

    def init(self, x, steps: int) -> Orders:
        """The orders of all steps."""
        orders, made = np.array(self.orders(steps), "int32"), np.int32(0)
        return Orders(ops.convert_to_tensor(orders), ops.convert_to_tensor(made))

    def step(self, denoise: Denoise, schedule: NoiseSchedule, x, now: Marginal, then: Marginal, noise: Draw, state):
        """One step; arguments and results as in `Solver.step`."""
        estimate, order = denoise(x, now), ops.take(state.orders, state.made)

        def by(solver):
            answers = iter([estimate])  # the first call of each method is at the beginning of the step

            def known(x, m):
                return next(answers, None) or denoise(x, m)

            return lambda: solver.step(known, schedule, x, now, then, noise, ())[0]

        first, second, third = self._solvers
        # `cond` runs only one branch.
        x = ops.cond(ops.equal(order, 3), by(third), lambda: ops.cond(ops.equal(order, 2), by(second), by(first)))
        return x, estimate, Orders(state.orders, state.made + 1)
