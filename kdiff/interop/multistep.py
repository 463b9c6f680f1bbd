"""DPM-Solver, UniPC and DEIS of diffusers, where they differ from kdiff's own; not obtainable by name through `get`.

The differences are the order of the final steps of a run; a third order whose coefficient of u^2 is half the correct
value (`kdiff.solvers.dpm`), and another one with noise; and the stages of the singlestep solver.
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

SHORT = 15  # in runs of fewer steps diffusers lowers the final orders
_FAR = 1_000_000


class _ShortRuns:
    """A multistep solver whose `lower_final` applies only to runs of fewer than 15 steps."""

    def init(self, x, steps: int):
        """The history; if the run is not short, or without `lower_final`, as if a million more steps followed."""
        return super().init(x, steps if self.lower_final and steps < SHORT else steps + _FAR)


class _Ending(_ShortRuns):
    """The step to t = 0 always has order 1, and with `euler_final` so has the last step, wherever it ends."""

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
    """`DEIS` of diffusers, whose `lower_final` applies only to runs of fewer than 15 steps."""

    named = False


class DiffusersDPMSolverPP(_Ending, DPMSolverPP):
    """`DPMSolverPP` of diffusers, with other final orders and another third order."""

    named = False


class DiffusersDPMSolver(_Ending, DPMSolver):
    """`DPMSolver` of diffusers, with other final orders and another third order."""

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
    """`DPMSolverPPSDE` of diffusers, with other final orders and with a third order.

    There the coefficient of u^2 is multiplied by M_2 / 2 - 1, where M_2 would be correct: a sign error.
    """

    named = False

    def _weights(self, h, places: list, count) -> list:
        if len(places) < 2:
            return super()._weights(h, places, count)
        found = moments(h, 2)
        found[1] = ops.where(ops.equal(count, 1), half(h), found[1]) if self.variant == "midpoint" else found[1]
        return integrals(places, [*found[:2], 0.5 * found[2] - 1.0], count)


class DiffusersDPMSolverSDE(_EndingSDE, DPMSolverSDE):
    """`DPMSolverSDE` of diffusers, with other final orders."""

    named = False
    _highest = 2
    _curvature = 1.0


class DiffusersUniPC(UniPC):
    """`UniPC` without the corrector in some steps.

    Args:
        predictor_order: as in `UniPC`.
        variant: as in `UniPC`.
        predicts: as in `UniPC`.
        lower_final: as in `UniPC`.
        uncorrected: the indices, from 0, of the steps that are not corrected.
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
        # The output of the predictor is the x of this step.
        return ops.where(left_out, self._predict(now, last, self._order_of(last)), super()._correct(value, now, last))

    def _order_of(self, last):
        history = last.history._replace(made=last.history.made - 1, left=last.history.left + 1)
        return history.order(self.predictor_order, self.lower_final)


class BothWays(Solver):
    """A solver that is its own inverse, on the reversed times of the run: diffusers' `DPMSolverMultistepInverse`.

    Unlike the inverse of `DDIM`, it calls the network at the start of a step, not at its end.

    Args:
        solver: the `Solver`, deterministic.
    """

    named = False

    def __init__(self, solver="dpm_solver_pp"):
        self.solver = Solver.get(solver)
        self.order, self.evaluations, self.learned = self.solver.order, self.solver.evaluations, self.solver.learned

    def init(self, x, steps: int):
        """The state of the solver."""
        return self.solver.init(x, steps)

    def step(self, denoise: Denoise, schedule: NoiseSchedule, x, now: Marginal, then: Marginal, noise: Draw, state):
        """The solver's step; arguments and results as in `Solver.step`."""
        return self.solver.step(denoise, schedule, x, now, then, noise, state)

    def inverse(self, iterations: int = 1) -> Solver:
        """The solver, which calls the network once per step."""
        return self.solver


class Stages(NamedTuple):
    """The state of a singlestep solver within a block of steps of the grid.

    Attributes:
        made: the number of completed steps, int32.
        orders: of all steps of the run, int32: the steps of a block have the orders 1, 2, 3.
        x: at the start of the block.
        start: the marginal of that x.
        values: the estimates in this block, the newest first.
        log_snrs: those of the estimates.
    """

    made: Any
    orders: Any
    x: Any
    start: Marginal
    values: tuple
    log_snrs: tuple


class _Blocks(Solver):
    """DPM-Solver singlestep of diffusers: the stages are steps of the grid, `order` of which form one step.

    The first step of a block has order 1; the second restarts from the beginning of the block with both estimates and
    has order 2; the third has order 3. If the order does not divide the number of steps, the last block is shorter.

    Args:
        order: 1, 2 or 3.
        variant: "midpoint" or "heun".
        lower_final: whether the last block is split so that the run ends with order 1.
    """

    named = False
    evaluations = 1
    eta = 0.0

    def __init__(self, order: int = 2, variant: str = "midpoint", lower_final: bool = True):
        self.order, self.variant, self.lower_final = order, variant, lower_final
        self.stochastic = self.eta > 0

    def orders(self, steps: int) -> list[int]:
        """The order of each step."""
        block = list(range(1, self.order + 1))
        if steps % self.order or self.lower_final:
            blocks = [block] * ((steps - 1) // self.order)
            rest = steps - len(blocks) * self.order
            end = [[1], [1, 1] if self.order == 2 else [1, 2], [1, 2, 1]][rest - 1]
            return [order for one in blocks for order in one] + end
        return block * (steps // self.order)

    def init(self, x, steps: int) -> Stages:
        """The initial state."""
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
        # The data that corresponds to the first value of the block, for the integral of the noise.
        x_hat = (begun - start.sigma * v_0) / start.alpha if isinstance(self, OfNoise) else v_0
        frozen = self.frozen(begun, x_hat, v_0, start, then)
        places = [(one - start.log_snr) / (then.log_snr - start.log_snr) for one in log_snrs[:2]]
        x = frozen.plus(self._blended(frozen.h, places, order), [v_0, *values[:2]])
        if self.stochastic:
            x = x + frozen.spread * noise()
        return x, estimate, Stages(state.made + 1, state.orders, begun, start, values, log_snrs)

    def _blended(self, h, places: list, order) -> list:
        """The newest value and the one before, not all of which are used at orders 1 and 2."""
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
    """The singlestep DPM-Solver of diffusers, on the noise."""

    named = False


class DiffusersSinglestepPP(OfData, _Blocks):
    """The singlestep DPM-Solver++ of diffusers, on the data."""

    named = False


class DiffusersSinglestepSDE(DiffusersSinglestepPP):
    """As above, with the noise of the reverse SDE in each stage; the third order of "heun" has a sign error."""

    named = False
    eta = 1.0

    def _moments(self, h) -> list:
        found = moments(h, 2)
        return [*found[:2], found[2] - 2.0]
