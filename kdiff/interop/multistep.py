"""DPM-Solver, UniPC and DEIS as diffusers has them, where kdiff's own differ; they have no names to `get` them by.

What differs is the order of the steps at the end of a run; a third order whose coefficient of u^2 is half of what it
should be (`kdiff.solvers.dpm`), and with noise another one; and how the singlestep solver takes its stages.
"""

from typing import Any, NamedTuple

import numpy as np
from keras import ops

from kdiff.schedules import Marginal, NoiseSchedule
from kdiff.solvers import DEIS, Denoise, DPMSolver, DPMSolverPP, DPMSolverPPSDE, DPMSolverSDE, Draw, Solver, UniPC
from kdiff.solvers.base import History
from kdiff.solvers.dpm import OfData, OfNoise
from kdiff.solvers.exponential import half, integrals, moments, weights

__all__ = [
    "SHORT",
    "BothWays",
    "DiffusersDEIS",
    "DiffusersDPMSolver",
    "DiffusersDPMSolverPP",
    "DiffusersDPMSolverPPSDE",
    "DiffusersDPMSolverSDE",
    "DiffusersSinglestep",
    "DiffusersSinglestepPP",
    "DiffusersSinglestepSDE",
    "DiffusersUniPC",
    "Stages",
]

SHORT = 15  # diffusers lowers the orders at the end of runs of fewer steps
_FAR = 1_000_000


class _ShortRuns:
    """A multistep solver whose `lower_final` is of runs of fewer than 15 steps alone."""

    def init(self, x, steps: int):
        """The history; of a run that is not short, or without `lower_final`, it has as if a million steps more left."""
        return super().init(x, steps if self.lower_final and steps < SHORT else steps + _FAR)


class _Ending(_ShortRuns):
    """The step to t = 0 is of order 1 in any run, and with `euler_final` the last step is, wherever it ends."""

    _highest = 3
    _curvature = 0.5

    def __init__(
        self, order: int = 2, variant: str = "midpoint", lower_final: bool = True, euler_final: bool = False, **options
    ):
        super().__init__(order, variant, lower_final=lower_final, **options)
        self.euler_final = euler_final

    def _order(self, then: Marginal, state: History):
        order = state.order(self._length() + 1)
        closing = ops.equal(then.t, 0.0)
        if self.euler_final:
            closing = ops.logical_or(closing, ops.equal(state.left % _FAR, 1))
        return ops.where(closing, 1, order)


class DiffusersDEIS(_ShortRuns, DEIS):
    """`DEIS` as diffusers has it: `lower_final` is of runs of fewer than 15 steps alone."""

    named = False


class DiffusersDPMSolverPP(_Ending, DPMSolverPP):
    """`DPMSolverPP` as diffusers has it: the orders at the end, and the third order, are other ones."""

    named = False


class DiffusersDPMSolver(_Ending, DPMSolver):
    """`DPMSolver` as diffusers has it: the orders at the end, and the third order, are other ones."""

    named = False


class _EndingSDE(_Ending):
    def __init__(
        self,
        order: int = 2,
        variant: str = "midpoint",
        lower_final: bool = True,
        euler_final: bool = False,
        eta: float = 1.0,
    ):
        super().__init__(order, variant, lower_final, euler_final, eta=eta)


class DiffusersDPMSolverPPSDE(_EndingSDE, DPMSolverPPSDE):
    """`DPMSolverPPSDE` as diffusers has it: the orders at the end are other ones, and there is a third order.

    In that the coefficient of u^2 is multiplied by M_2 / 2 - 1, where M_2 would be right: a sign is wrong.
    """

    named = False

    def _weights(self, h, places: list, count) -> list:
        if len(places) < 2:
            return super()._weights(h, places, count)
        found = moments(h, 2)
        found[1] = ops.where(ops.equal(count, 1), half(h), found[1]) if self.variant == "midpoint" else found[1]
        return integrals(places, [*found[:2], 0.5 * found[2] - 1.0], count)


class DiffusersDPMSolverSDE(_EndingSDE, DPMSolverSDE):
    """`DPMSolverSDE` as diffusers has it: the orders at the end are other ones."""

    named = False
    _highest = 2
    _curvature = 1.0


class DiffusersUniPC(UniPC):
    """`UniPC` without a corrector in some steps.

    Args:
        predictor_order: as of `UniPC`.
        variant: as of `UniPC`.
        predicts: as of `UniPC`.
        lower_final: as of `UniPC`.
        uncorrected: the steps, from 0, that are not made again once the estimate at their end is known.
    """

    named = False

    def __init__(
        self,
        predictor_order: int = 2,
        variant: str = "bh2",
        predicts: str = "data",
        lower_final: bool = True,
        uncorrected: tuple[int, ...] = (),
    ):
        super().__init__(predictor_order, variant, True, predicts, lower_final)
        self.uncorrected = tuple(uncorrected)

    def _correct(self, value, now: Marginal, last):
        before = ops.convert_to_tensor(np.array(self.uncorrected or [-1], "int32"))
        left_out = ops.any(ops.equal(last.history.made - 1, before))
        # What the predictor made is the x that this step was called with.
        return ops.where(left_out, self._predict(now, last, self._order_of(last)), super()._correct(value, now, last))

    def _order_of(self, last):
        history = last.history._replace(made=last.history.made - 1, left=last.history.left + 1)
        return history.order(self.predictor_order, self.lower_final)


class BothWays(Solver):
    """A solver that is its own inverse, on the times of the run backwards: diffusers' `DPMSolverMultistepInverse`.

    Unlike `DDIM`'s inverse it asks the network where a step begins, not where it ends.

    Args:
        solver: the `Solver`; without noise.
    """

    named = False

    def __init__(self, solver="dpm_solver_pp"):
        self.solver = Solver.get(solver)
        self.order, self.evaluations, self.learned = self.solver.order, self.solver.evaluations, self.solver.learned

    def init(self, x, steps: int):
        """The solver's."""
        return self.solver.init(x, steps)

    def step(self, denoise: Denoise, schedule: NoiseSchedule, x, now: Marginal, then: Marginal, noise: Draw, state):
        """The solver's step; arguments and results as in `Solver.step`."""
        return self.solver.step(denoise, schedule, x, now, then, noise, state)

    def inverse(self, iterations: int = 1) -> Solver:
        """The solver, which asks the network once a step."""
        return self.solver


class Stages(NamedTuple):
    """What a singlestep solver remembers in a block of steps of the grid.

    Attributes:
        made: steps made so far, int32.
        orders: of all steps of the run, int32: the steps of a block have the orders 1, 2, 3.
        x: where the block began.
        start: the marginal of that x.
        values: what was found in this block, the newest first.
        log_snrs: where.
    """

    made: Any
    orders: Any
    x: Any
    start: Marginal
    values: tuple
    log_snrs: tuple


class _Blocks(Solver):
    """DPM-Solver singlestep as diffusers has it: the stages are steps of the grid, `order` of which are one step.

    The first step of a block is of order 1; the second begins again where the first began, with both values, and has
    order 2; the third order 3. A grid whose number is not divisible by the order ends in a block that is shorter.

    Args:
        order: 1, 2 or 3.
        variant: "midpoint" or "heun".
        lower_final: whether the last block is cut so that the run ends with order 1.
    """

    named = False
    evaluations = 1
    eta = 0.0

    def __init__(self, order: int = 2, variant: str = "midpoint", lower_final: bool = True):
        self.order, self.variant, self.lower_final = order, variant, lower_final
        self.stochastic = self.eta > 0

    def orders(self, steps: int) -> list[int]:
        """Of each step."""
        block = list(range(1, self.order + 1))
        if steps % self.order or self.lower_final:
            blocks = [block] * ((steps - 1) // self.order)
            rest = steps - len(blocks) * self.order
            end = [[1], [1, 1] if self.order == 2 else [1, 2], [1, 2, 1]][rest - 1]
            return [order for one in blocks for order in one] + end
        return block * (steps // self.order)

    def init(self, x, steps: int) -> Stages:
        """No stage yet."""
        one = ops.convert_to_tensor(np.float32(1.0))
        orders = ops.convert_to_tensor(np.array(self.orders(steps), "int32"))
        start = Marginal(one, one, one, ops.convert_to_tensor(np.float32(-100.0)))
        past = tuple(ops.convert_to_tensor(np.float32(-100.0 - i)) for i in range(3))
        made = ops.convert_to_tensor(np.int32(0))
        return Stages(made, orders, ops.zeros_like(x), start, (ops.zeros_like(x),) * 3, past)

    def step(self, denoise: Denoise, schedule: NoiseSchedule, x, now: Marginal, then: Marginal, noise: Draw, state):
        """One step of the grid; arguments and results as in `Solver.step`."""
        estimate = denoise(x, now)
        values = (self.value(x, estimate.x_hat, now), *state.values)[:3]
        log_snrs = (now.log_snr, *state.log_snrs)[:3]
        order = ops.where(ops.equal(then.t, 0.0), 1, ops.take(state.orders, state.made))
        first = ops.equal(order, 1)
        start = Marginal(*(ops.where(first, a, b) for a, b in zip(now, state.start, strict=True)))
        begun = ops.where(first, x, state.x)
        v_0 = ops.where(first, values[0], ops.where(ops.equal(order, 2), values[1], values[2]))
        # The data that goes with the first value of the block, where the integral is that of the noise.
        x_hat = (begun - start.sigma * v_0) / start.alpha if isinstance(self, OfNoise) else v_0
        frozen = self.frozen(begun, x_hat, v_0, start, then)
        places = [(one - start.log_snr) / (then.log_snr - start.log_snr) for one in log_snrs[:2]]
        x = frozen.plus(self._blended(frozen.h, places, order), [v_0, *values[:2]])
        if self.stochastic:
            x = x + frozen.spread * noise()
        return x, estimate, Stages(state.made + 1, state.orders, begun, start, values, log_snrs)

    def _blended(self, h, places: list, order) -> list:
        """Of the newest value and that before, which of order 1 and 2 do not both count."""
        newest = ops.where(order > 1, places[0], 0.5)
        middle = ops.where(order > 2, places[1], 0.25)
        second = weights(h, [newest], single=half(h) if self.variant == "midpoint" else None)[0]
        if self.variant == "midpoint":
            third = [weights(h, [newest])[0], 0.0 * h]
        else:
            third = integrals([newest, middle], self._moments(h), 2)
        pairs = zip(third, [second, 0.0], strict=True)
        return [ops.where(order > 2, a, ops.where(order > 1, b, 0.0)) for a, b in pairs]

    def _moments(self, h) -> list:
        return moments(h, 2)


class DiffusersSinglestep(OfNoise, _Blocks):
    """Of the noise."""

    named = False


class DiffusersSinglestepPP(OfData, _Blocks):
    """Of the data."""

    named = False


class DiffusersSinglestepSDE(DiffusersSinglestepPP):
    """Of the data, with the noise of the reverse SDE in each stage; in the third order of "heun" a sign is wrong."""

    named = False
    eta = 1.0

    def _moments(self, h) -> list:
        found = moments(h, 2)
        return [*found[:2], found[2] - 2.0]
