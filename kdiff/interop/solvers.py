"""Steps as diffusers makes them, where kdiff's own differ; they have no names to `get` them by."""

from keras import ops

from kdiff.guidance import Guidance
from kdiff.schedules import Marginal, NoiseSchedule, bridge
from kdiff.solvers import DDIM, DEIS, Denoise, DPMSolver, DPMSolverPP, DPMSolverPPSDE, DPMSolverSDE, Draw
from kdiff.solvers.base import noise_of
from kdiff.solvers.runge_kutta import RK4, Ratio

__all__ = [
    "DDIMKeptNoise",
    "DiffusersDEIS",
    "DiffusersDPMSolver",
    "DiffusersDPMSolverPP",
    "DiffusersDPMSolverPPSDE",
    "DiffusersDPMSolverSDE",
    "PseudoRungeKutta",
    "TimeRatio",
]


class DDIMKeptNoise(DDIM):
    """DDIM in which `guidance` changes the data alone, and the noise stays as the network said:

        x_then = alpha_then guided(x_hat) + sqrt(sigma_then^2 - s^2) noise_hat + s noise,
        noise_hat = (x_now - alpha_now x_hat) / sigma_now.

    diffusers' clipping with DDIM. As a guidance of the sampler, both estimates would follow.

    Args:
        guidance: a `Guidance` that changes x_hat alone, or its name.
        eta: as of `DDIM`.
    """

    named = False

    def __init__(self, guidance="clip", eta: float = 0.0):
        super().__init__(eta)
        self.guidance = Guidance.get(guidance)

    def step(self, denoise: Denoise, schedule: NoiseSchedule, x, now: Marginal, then: Marginal, noise: Draw, state):
        """One implicit step; arguments and results as in `Solver.step`."""
        estimate = denoise(x, now)
        x_hat = self.guidance.change(estimate.x_hat)
        _, fresh = bridge(now, then)
        kept = then.sigma * ops.sqrt(1.0 - self.eta**2 * fresh)
        x = then.alpha * x_hat + kept * noise_of(x, estimate.x_hat, now)
        if self.stochastic:
            x = x + self.eta * then.sigma * ops.sqrt(fresh) * noise()
        return x, estimate._replace(x_hat=x_hat), state

    def inverse(self, iterations: int = 1):
        """There is none: what was clipped is lost."""
        raise ValueError(f"{self!r} has no inverse: it clips. DDIM(eta=0.0) has one.")


class TimeRatio(Ratio):
    """`Ratio`, in which a stage within a step is at a fraction of the way in t."""

    named = False

    def at(self, schedule: NoiseSchedule, now: Marginal, then: Marginal, fraction) -> Marginal:
        """(1 - fraction) t_now + fraction t_then."""
        return schedule.at((1.0 - fraction) * now.t + fraction * then.t)


class PseudoRungeKutta(RK4):
    """The warm-up of PNDM as it is published (Liu et al. 2022, arXiv:2202.09778, eq. 13): the weights of the classical
    method, for values of noise_hat in s = sigma / alpha whose middle is in t. Its order is 2.
    """

    named = False
    order = 2
    variable = TimeRatio()


class _ShortRuns:
    """A multistep solver whose `lower_final` is of runs of fewer than 15 steps alone."""

    def init(self, x, steps: int):
        """The history of a run that seems to go on, so that no order falls at its end, unless it is short."""
        return super().init(x, steps if steps < 15 else steps + self.order)


class _Halved(_ShortRuns):
    """The step to t = 0 is of order 1 in any run, and of order 3 a coefficient is halved (see `kdiff.solvers.dpm`)."""

    _highest = 3
    _curvature = 0.5

    def _order(self, then: Marginal, state):
        return ops.where(then.t > 0, super()._order(then, state), 1)


class DiffusersDEIS(_ShortRuns, DEIS):
    """`DEIS` as diffusers has it: `lower_final` is of runs of fewer than 15 steps alone."""

    named = False


class DiffusersDPMSolverPP(_Halved, DPMSolverPP):
    """`DPMSolverPP` as diffusers has it: the orders at the end, and the third order, are other ones."""

    named = False


class DiffusersDPMSolver(_Halved, DPMSolver):
    """`DPMSolver` as diffusers has it: the orders at the end, and the third order, are other ones."""

    named = False


class DiffusersDPMSolverPPSDE(_Halved, DPMSolverPPSDE):
    """`DPMSolverPPSDE` as diffusers has it: the orders at the end are other ones, and there is a third order."""

    named = False


class DiffusersDPMSolverSDE(_ShortRuns, DPMSolverSDE):
    """`DPMSolverSDE` as diffusers has it: `lower_final` is of runs of fewer than 15 steps alone."""

    named = False
