"""Steps of diffusers that differ from kdiff's own; not obtainable by name through `get`."""

from typing import Any, NamedTuple

import numpy as np
from keras import ops

from kdiff.guidance import Guidance
from kdiff.predictions import Prediction
from kdiff.schedules import Marginal, NoiseSchedule, bridge
from kdiff.solvers import DDIM, DDPM, IPNDM, Denoise, Draw, Solver
from kdiff.solvers.base import noise_of
from kdiff.solvers.runge_kutta import RK4
from kdiff.solvers.stages import Ratio, chosen

__all__ = [
    "DDIMInverted",
    "DDIMKeptNoise",
    "DiffusersDDIMInversion",
    "DiffusersIPNDM",
    "DiffusersPNDM",
    "DiffusersTCD",
    "EvenSteps",
    "FlowLine",
    "NoisyEnd",
    "Outputs",
    "PseudoRungeKutta",
    "QuietEnd",
    "TimeRatio",
    "below",
    "noise_from",
    "output_of",
]


class DDIMKeptNoise(DDIM):
    """DDIM in which `guidance` changes only the data, and the noise remains the network's estimate:

        x_then = alpha_then guided(x_hat) + sqrt(sigma_then^2 - s^2) noise_hat + s noise,
        noise_hat = (x_now - alpha_now x_hat) / sigma_now.

    The clipping of DDIM in diffusers. A guidance rule of the sampler would change both estimates.

    Args:
        guidance: a `Guidance` that changes only x_hat, or its name.
        eta: as in `DDIM`.
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
        """Raises a ValueError: clipping is not invertible."""
        raise ValueError(f"{self!r} has no inverse: it clips. DDIM(eta=0.0) has one.")


class TimeRatio(Ratio):
    """`Ratio` with intermediate stages at a fraction of the step in t."""

    named = False

    def at(self, schedule: NoiseSchedule, now: Marginal, then: Marginal, fraction) -> Marginal:
        """(1 - fraction) t_now + fraction t_then."""
        return schedule.at((1.0 - fraction) * now.t + fraction * then.t)


class PseudoRungeKutta(RK4):
    """The warm-up of PNDM as published (Liu et al. 2022, arXiv:2202.09778, eq. 13): the weights of the classical
    method, for values of noise_hat as a function of s = sigma / alpha, with the midpoint in t. Its order is 2.
    """

    named = False
    order = 2
    variable = TimeRatio()


class EvenSteps(Solver):
    """A solver whose steps always go T // steps down in the index, whatever the grid: diffusers' DDIM and PNDM.

    So on "linspace", and on "trailing" if the number of steps does not divide T, x is computed for another time than
    the one of the next network call. A step below 0 goes to the end of the run.

    Args:
        solver: the `Solver`.
    """

    named = False

    def __init__(self, solver="ddim"):
        self.solver = Solver.get(solver)
        self.order, self.evaluations = self.solver.order, self.solver.evaluations
        self.stochastic, self.learned = self.solver.stochastic, self.solver.learned
        self.branches = self.solver.branches

    def init(self, x, steps: int):
        """The state of the solver, and the number of steps."""
        return ops.convert_to_tensor(np.int32(steps)), self.solver.init(x, steps)

    def step(self, denoise: Denoise, schedule: NoiseSchedule, x, now: Marginal, then: Marginal, noise: Draw, state):
        """The solver's step; arguments and results as in `Solver.step`."""
        steps, state = state
        then = below(schedule, now, then, steps)
        x, estimate, state = self.solver.step(denoise, schedule, x, now, then, noise, state)
        return x, estimate, (steps, state)

    def inverse(self, iterations: int = 1):
        """The inverse of the solver."""
        return self.solver.inverse(iterations)


def below(schedule: NoiseSchedule, now: Marginal, then: Marginal, steps) -> Marginal:
    """T // steps below `now` in the index; `then` if that is below 0."""
    index = _index(schedule, now) - schedule.num_steps // steps
    return chosen(index < 0, then, _of_index(schedule, index))


def _index(schedule: NoiseSchedule, m: Marginal):
    return ops.cast(ops.round(m.t * schedule.num_steps), "int32") - 1


def _of_index(schedule: NoiseSchedule, index) -> Marginal:
    index = ops.clip(index, 0, schedule.num_steps - 1)
    return schedule.at((ops.cast(index, "float32") + 1.0) / schedule.num_steps)


class Outputs(NamedTuple):
    """The state of `DiffusersPNDM`.

    Attributes:
        steps: the number of steps of the run, int32.
        made: the number of completed steps, int32.
        values: the last outputs of the network, the newest first.
    """

    steps: Any
    made: Any
    values: tuple


class DiffusersPNDM(Solver):
    """PNDM (Liu et al. 2022, arXiv:2202.09778) of diffusers: it combines outputs of the network, whatever the
    prediction, and each step goes T // steps down in the index, whatever the grid (`EvenSteps`).

    Args:
        prediction: the prediction of the network, "noise" or "velocity".
        warm: as in `PNDM`: 3 for Runge-Kutta; 1 for a repeated step (`skip_prk_steps`).
    """

    named = False
    branches = True
    order = 2

    def __init__(self, prediction="noise", warm: int = 3):
        self.prediction, self.warm = Prediction.get(prediction), warm

    def init(self, x, steps: int) -> Outputs:
        """The initial state."""
        steps, made = (ops.convert_to_tensor(np.int32(number)) for number in (steps, 0))
        return Outputs(steps, made, (ops.zeros_like(x),) * 3)

    def step(self, denoise: Denoise, schedule: NoiseSchedule, x, now: Marginal, then: Marginal, noise: Draw, state):
        """One step; arguments and results as in `Solver.step`."""
        estimate = denoise(x, now)
        output = output_of(self.prediction, x, estimate.x_hat, now)
        lower = below(schedule, now, then, state.steps)
        warm = self._runge_kutta if self.warm == 3 else self._twice
        x = ops.cond(
            ops.logical_and(state.made < self.warm, state.steps > self.warm),
            lambda: warm(denoise, schedule, x, now, then, lower, output, state.steps),
            lambda: self._move(x, now, lower, self._combined(output, state)),
        )
        return x, estimate, Outputs(state.steps, state.made + 1, (output, *state.values)[:3])

    def _combined(self, output, state: Outputs):
        """The Adams-Bashforth combination of the available outputs."""
        a, b, c = state.values
        found = ops.where(state.made < 2, (3.0 * output - a) / 2.0, (23.0 * output - 16.0 * a + 5.0 * b) / 12.0)
        found = ops.where(state.made < 3, found, (55.0 * output - 59.0 * a + 37.0 * b - 9.0 * c) / 24.0)
        return ops.where(state.made < 1, output, found)

    def _move(self, x, now: Marginal, then: Marginal, output):
        """A DDIM step with this output."""
        x_hat = self.prediction.denoise(output, x, now)
        return then.alpha * x_hat + then.sigma * noise_of(x, x_hat, now)

    def _ask(self, denoise, x, m: Marginal):
        return output_of(self.prediction, x, denoise(x, m).x_hat, m)

    def _twice(self, denoise, schedule, x, now, then, lower, output, steps):
        second = self._ask(denoise, self._move(x, now, lower, output), then)
        start = _of_index(schedule, _index(schedule, then) + schedule.num_steps // steps)
        return self._move(x, start, then, (output + second) / 2.0)

    def _runge_kutta(self, denoise, schedule, x, now, then, lower, output, steps):
        """The stages are `way` above the next time of the grid; the first is reached by a step down of `way`."""
        way = schedule.num_steps // steps // 2
        middle, first = (
            _of_index(schedule, one) for one in (_index(schedule, then) + way, _index(schedule, now) - way)
        )
        second = self._ask(denoise, self._move(x, now, first, output), middle)
        third = self._ask(denoise, self._move(x, now, middle, second), middle)
        lowest = _of_index(schedule, _index(schedule, middle) - way)
        fourth = self._ask(denoise, self._move(x, now, lowest, third), then)
        return self._move(x, now, then, (output + 2.0 * second + 2.0 * third + fourth) / 6.0)


def output_of(prediction: Prediction, x, x_hat, m: Marginal):
    """The network output that corresponds to x_hat: a x_hat + b noise_hat."""
    a, b = prediction.coefficients(m)
    return a * x_hat + b * noise_of(x, x_hat, m)


class NoisyEnd(DDPM):
    """`DDPM` of diffusers, which adds noise, of variance "large" or "learned", in the last step unless that begins at
    the first step of the process.

    Args:
        variance: as in `DDPM`.
    """

    named = False

    def _sigma(self, now: Marginal, then: Marginal, share):
        small = ops.maximum(then.sigma, 1e-10)  # as in diffusers, the variance is at least 1e-20
        return small * (now.sigma / small) ** share if self.learned else now.sigma


class DiffusersTCD(Solver):
    """`TCD` of diffusers: the index of s is floor((1 - gamma) i), with i that of `then`.

    Args:
        gamma: in [0, 1].
    """

    named = False
    order = 0

    def __init__(self, gamma: float = 0.3):
        self.gamma = gamma
        self.stochastic = gamma > 0

    def step(self, denoise: Denoise, schedule: NoiseSchedule, x, now: Marginal, then: Marginal, noise: Draw, state):
        """One step; arguments and results as in `Solver.step`."""
        estimate = denoise(x, now)
        index = ops.cast(_index(schedule, then), "float32")
        s = _of_index(schedule, ops.cast(ops.floor((1.0 - self.gamma) * index + 1e-3), "int32"))
        x_s = s.alpha * estimate.x_hat + s.sigma * noise_of(x, estimate.x_hat, now)
        if not self.stochastic:
            return x_s, estimate, state
        fresh = then.sigma * ops.sqrt(-ops.expm1(then.log_snr - s.log_snr))
        return then.alpha / s.alpha * x_s + fresh * noise(), estimate, state


class DiffusersIPNDM(IPNDM):
    """`IPNDM` of velocities of diffusers: where alpha = 0 the network output is ignored and x_hat = 0."""

    named = False

    def step(self, denoise: Denoise, schedule: NoiseSchedule, x, now: Marginal, then: Marginal, noise: Draw, state):
        """One step; arguments and results as in `Solver.step`."""

        def believed(x, m):
            estimate = denoise(x, m)
            return estimate._replace(x_hat=ops.where(m.alpha < 1e-4, 0.0, 1.0) * estimate.x_hat)

        return super().step(believed, schedule, x, now, then, noise, state)


class FlowLine(Ratio):
    """The variable t of rectified flow, in which the slope of x is noise - x, as in diffusers' Heun."""

    named = False

    def at(self, schedule: NoiseSchedule, now: Marginal, then: Marginal, fraction) -> Marginal:
        """(1 - fraction) t_now + fraction t_then."""
        return schedule.at((1.0 - fraction) * now.t + fraction * then.t)

    def length(self, now: Marginal, m: Marginal):
        """t_m - t_now."""
        return m.sigma - now.sigma

    def bend(self, m: Marginal, off, change):
        """d noise_hat - d x_hat, with d noise_hat = (off - alpha d x_hat) / sigma."""
        return (off - (m.alpha + m.sigma) * change) / m.sigma


class QuietEnd(DDPM):
    """`DDPM` of the variance "small" that adds no noise in a step to t below 1e-6."""

    named = False

    def __init__(self):
        super().__init__("small")

    def _sigma(self, now: Marginal, then: Marginal, share):
        return ops.where(then.t > 1e-6, then.sigma, 0.0)


class DDIMInverted(DDIM):
    """DDIM with the inverse of diffusers' `DDIMInverseScheduler`, used by `Sampler.invert`.

    Args:
        prediction: the prediction of the network.
        limit: the bound to which x_hat is clipped in the inversion; None for no clipping.
    """

    named = False

    def __init__(self, prediction="noise", limit: float | None = None):
        super().__init__()
        self.prediction, self.limit = Prediction.get(prediction), limit

    def inverse(self, iterations: int = 1) -> Solver:
        """`DiffusersDDIMInversion`, which calls the network once per step."""
        return DiffusersDDIMInversion(self.prediction, self.limit)


class DiffusersDDIMInversion(Solver):
    """From data to noise: the network output at `then` approximates that at T // steps below.

    Args:
        prediction: the prediction of the network.
        limit: the bound to which x_hat is clipped; None for no clipping.
    """

    named = False
    inverts = True

    def __init__(self, prediction="noise", limit: float | None = None):
        self.prediction, self.limit = Prediction.get(prediction), limit

    def init(self, x, steps: int):
        """The number of steps."""
        return ops.convert_to_tensor(np.int32(steps))

    def step(self, denoise: Denoise, schedule: NoiseSchedule, x, now: Marginal, then: Marginal, noise: Draw, state):
        """One step back; arguments and results as in `Solver.step`."""
        estimate = denoise(x, then)
        output = output_of(self.prediction, x, estimate.x_hat, then)
        now = below(schedule, then, now, state)
        x_hat, noise_hat = self.prediction.denoise(output, x, now), noise_from(self.prediction, output, x, now)
        if self.limit is not None:
            x_hat = ops.clip(x_hat, -self.limit, self.limit)
        return then.alpha * x_hat + then.sigma * noise_hat, estimate._replace(x_hat=x_hat), state


def noise_from(prediction: Prediction, output, x, m: Marginal):
    """The noise that an output implies, (a x - alpha y) / (a sigma - b alpha), also where sigma is 0."""
    a, b = prediction.coefficients(m)
    return (a * x - m.alpha * output) / (a * m.sigma - b * m.alpha)
