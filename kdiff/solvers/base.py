"""What all solvers share: one step from a noisy x_now to a less noisy x_then.

A solver knows a denoiser, `estimate = denoise(x, m)`, whose x_hat is the data to be expected at a marginal m. It knows
neither the network nor what it predicts, neither the grid nor the loop. Its state is a value that the loop carries:

    state = solver.init(x, steps)
    x, estimate, state = solver.step(denoise, schedule, x, now, then, noise, state)        once a step

With the estimate of the noise that goes with x_hat, noise_hat = (x - alpha x_hat) / sigma, the probability flow of any
schedule is, in l = log_snr / 2 = log(alpha / sigma) (Lu et al. 2022, arXiv:2211.01095, eqs. 8 and 9; Salimans and Ho
2022, arXiv:2202.00512, appendix D),

    x / sigma  =  x_now / sigma_now + integral of e^l x_hat dl,          from l_now to l_then       (data)
    x / alpha  =  x_now / alpha_now - integral of e^-l noise_hat dl                                 (noise)

and a deterministic solver is a rule for one of the two integrals. Where x_hat, or noise_hat, is constant both are DDIM.
"""

from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple, Self

import numpy as np
from keras import ops

from kdiff.base import Value, check_integer
from kdiff.denoisers import Denoise
from kdiff.schedules import Marginal, NoiseSchedule
from kdiff.times import TimeGrid, Trailing

__all__ = ["Draw", "History", "Solver", "between", "check_order", "flow_to", "half_step", "noise_of"]

Draw = Callable[[], Any]


class Solver(Value):
    """The base of all solvers. A new one defines `step`, its `order` and whether it is `stochastic`.

    Attributes:
        order: the error of a run falls as steps^-order; of a stochastic solver, that of its mean and covariance.
        stochastic: whether `step` draws noise.
        evaluations: how often a step calls the denoiser.
        grid: the grid of a run that names none.
        learned: whether an estimate must have a `share`, as of `predictions.LearnedVariance`.
    """

    aliases: ClassVar = {
        "dpmpp": "dpm_solver_pp",
        "dpmpp2m": "dpm_solver_pp",
        "dpmpp2msde": "dpm_solver_pp_sde",
        "dpmpp3msde": "dpm_solver_pp_3m_sde",
        "dpmpp2sa": "dpm_solver_pp_2s_ancestral",
        "dpm2a": "dpm2_ancestral",
        "dpmfast": "dpm_solver_fast",
        "eulera": "euler_ancestral",
        "keuler": "euler",
        "keulera": "euler_ancestral",
        "klms": "lms",
        "meanflow": "flow_map",
        "shortcut": "flow_map",
        "kheun": "heun",
        "plms": "pndm",
    }
    order: int = 1
    stochastic: bool = False
    evaluations: int = 1
    grid: TimeGrid = Trailing()
    learned: bool = False

    def init(self, x, steps: int) -> Any:
        """The state before the first of `steps` steps: a nest of tensors."""
        return ()

    def step(self, denoise: Denoise, schedule: NoiseSchedule, x, now: Marginal, then: Marginal, noise: Draw, state):
        """One step.

        Args:
            denoise: estimate = denoise(x, m), a `Denoiser`.
            schedule: gives marginals between the two, `schedule.at_log_snr(l)`, to solvers that need them.
            x: the noisy batch, float32, with shape `(batch, ...)`.
            now: the marginal that `x` is at; its fields have shape `()`.
            then: the marginal to go to.
            noise: a function; each call gives fresh standard normal noise with the shape of `x`.
            state: what `init` or the last step returned.

        Returns:
            `(x, estimate, state)`: the batch at `then`, the estimate of the data that led there, and the new state.
        """
        raise NotImplementedError

    def inverse(self, iterations: int = 1) -> "Solver":
        """The solver that goes from data to noise, and undoes a run of this one, by so many iterations a step.

        Raises:
            ValueError: if there is none.
        """
        why = "it is stochastic" if self.stochastic else "use DDIM"
        raise ValueError(f"{self!r} has no inverse: {why}. DDIM(eta=0.0) has one.")


def noise_of(x, x_hat, m: Marginal):
    """The noise that goes with an estimate of the data: noise_hat = (x - alpha x_hat) / sigma."""
    return (x - m.alpha * x_hat) / m.sigma


def flow_to(x, x_hat, now: Marginal, then: Marginal):
    """DDIM's step with this data: (sigma_then / sigma_now) x - alpha_then (e^-h - 1) x_hat, h = l_then - l_now."""
    h = half_step(now, then)
    return then.sigma / now.sigma * x - then.alpha * ops.expm1(-h) * x_hat


def half_step(now: Marginal, then: Marginal):
    """h = l_then - l_now > 0, l = log(alpha / sigma) = log_snr / 2."""
    return 0.5 * (then.log_snr - now.log_snr)


def between(schedule: NoiseSchedule, now: Marginal, then: Marginal, fraction: float) -> Marginal:
    """The marginal at this fraction of the way from `now` to `then`, in log-SNR."""
    return schedule.at_log_snr(now.log_snr + fraction * (then.log_snr - now.log_snr))


class History(NamedTuple):
    """What a multistep solver remembers: the newest value first. All fields are tensors, fit for a compiled loop.

    Attributes:
        made: steps made so far, int32.
        left: steps left, this one included, int32.
        values: past x_hat or noise_hat, each with the shape of x.
        log_snrs: where they were, scalars.
    """

    made: Any
    left: Any
    values: tuple
    log_snrs: tuple

    @classmethod
    def empty(cls, x, length: int, steps: int) -> Self:
        """A history of `length` values with nothing in it; places count down, so that no two coincide."""
        made, left = (ops.convert_to_tensor(np.int32(number)) for number in (0, steps))
        values = tuple(ops.zeros_like(x) for _ in range(length))
        log_snrs = tuple(ops.convert_to_tensor(np.float32(-100.0 * (i + 1))) for i in range(length))
        return cls(made, left, values, log_snrs)

    def add(self, value, m: Marginal) -> Self:
        """The history after a step that found `value` at `m`."""
        values, log_snrs = (value, *self.values)[: len(self.values)], (m.log_snr, *self.log_snrs)[: len(self.values)]
        return History(self.made + 1, self.left - 1, values, log_snrs)

    def places(self, now: Marginal, then: Marginal) -> list:
        """Where the values are on the way from `now` to `then`, as fractions of it in log-SNR."""
        return [(past - now.log_snr) / (then.log_snr - now.log_snr) for past in self.log_snrs]

    def order(self, order: int, lower_final: bool = True):
        """The order that this step can have: `order`, less while there is no history, and at the end if asked for."""
        order = ops.minimum(order, self.made + 1)
        return ops.minimum(order, self.left) if lower_final else order


def check_order(owner: Any, order: Any, highest: int, lowest: int = 1) -> None:
    """Raises a ValueError unless `order` is a whole number from `lowest` to `highest`."""
    name = type(owner).__name__
    check_integer(name, "order", order, lowest)
    if order > highest:
        raise ValueError(f"{name}: `order` must be at most {highest}; received: {order}")
