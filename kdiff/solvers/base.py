"""The interface of all solvers: one step from a noisy x_now to a less noisy x_then.

A solver calls a denoiser, `estimate = denoise(x, m)`, whose x_hat is the expected data at a marginal m. It depends
neither on the network and its prediction, nor on the grid and the loop. Its state is a value that the loop carries:

    state = solver.init(x, steps)
    x, estimate, state = solver.step(denoise, schedule, x, now, then, noise, state)        once per step

With the corresponding estimate of the noise, noise_hat = (x - alpha x_hat) / sigma, the probability flow of any
schedule is, in l = log_snr / 2 = log(alpha / sigma) (Lu et al. 2022, arXiv:2211.01095, eqs. 8 and 9; Salimans and Ho
2022, arXiv:2202.00512, appendix D),

    x / sigma  =  x_now / sigma_now + integral of e^l x_hat dl,          from l_now to l_then       (data)
    x / alpha  =  x_now / alpha_now - integral of e^-l noise_hat dl                                 (noise)

and a deterministic solver approximates one of the two integrals. If x_hat, or noise_hat, is constant, both give DDIM.
"""

from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple, Self

import numpy as np
from keras import ops

from kdiff.base import Value, check_integer
from kdiff.denoisers import Denoise, only_if
from kdiff.schedules import Marginal, NoiseSchedule
from kdiff.times import TimeGrid, Trailing

__all__ = ["Draw", "History", "Solver", "above_zero", "between", "check_order", "flow_to", "half_step", "noise_of"]

Draw = Callable[[], Any]


class Solver(Value):
    """The base class of all solvers. A new one defines `step`, its `order` and whether it is `stochastic`.

    Attributes:
        order: the error of a run decreases as steps^-order; for a stochastic solver, that of the mean and covariance.
        stochastic: whether `step` draws noise.
        evaluations: the number of calls of the denoiser per step; a solver's documentation says if the step to t = 0
            has fewer.
        grid: the default grid of a run.
        learned: whether the estimates must have a `share`, as with `predictions.LearnedVariance`.
        inverts: whether its steps lead to more noise, as those of an inversion.
        branches: whether the number of calls differs between steps, by `ops.cond`: what a network keeps in one of
            several branches cannot leave a compiled step, so there is no `Reuse`.
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
    inverts: bool = False
    branches: bool = False

    def init(self, x, steps: int) -> Any:
        """The state before the first of `steps` steps, a nested structure of tensors."""
        return ()

    def step(self, denoise: Denoise, schedule: NoiseSchedule, x, now: Marginal, then: Marginal, noise: Draw, state):
        """One step.

        Args:
            denoise: a `Denoiser`, estimate = denoise(x, m).
            schedule: the schedule, for intermediate marginals `schedule.at_log_snr(l)`.
            x: the noisy batch, float32, with shape `(batch, ...)`.
            now: the marginal of `x`, with fields of shape `()`.
            then: the marginal to step to.
            noise: a function, each call of which draws fresh standard normal noise with the shape of `x`.
            state: the state returned by `init` or the previous step.

        Returns:
            `(x, estimate, state)`: the batch at `then`, the estimate of the data in this step, and the new state.
        """
        raise NotImplementedError

    def inverse(self, iterations: int = 1) -> "Solver":
        """The solver from data to noise that inverts a run of this one, with this number of iterations per step.

        Raises:
            ValueError: if there is none.
        """
        why = "it is stochastic" if self.stochastic else "use DDIM"
        raise ValueError(f"{self!r} has no inverse: {why}. DDIM(eta=0.0) has one.")


def noise_of(x, x_hat, m: Marginal):
    """The estimate of the noise for an estimate of the data: noise_hat = (x - alpha x_hat) / sigma."""
    return (x - m.alpha * x_hat) / m.sigma


def flow_to(x, x_hat, now: Marginal, then: Marginal):
    """The step of DDIM with x_hat: (sigma_then / sigma_now) x - alpha_then (e^-h - 1) x_hat, h = l_then - l_now."""
    h = half_step(now, then)
    return then.sigma / now.sigma * x - then.alpha * ops.expm1(-h) * x_hat


def half_step(now: Marginal, then: Marginal):
    """h = l_then - l_now > 0, l = log(alpha / sigma) = log_snr / 2."""
    return 0.5 * (then.log_snr - now.log_snr)


def above_zero(then: Marginal, value: Callable[[], Any], otherwise):
    """`value()`, which calls the denoiser, in a step that ends above t = 0; in the step to t = 0 `otherwise`."""
    above = then.t > 0
    return only_if(above, lambda: ops.where(above, value(), otherwise), lambda: otherwise)


def between(schedule: NoiseSchedule, now: Marginal, then: Marginal, fraction: float) -> Marginal:
    """The marginal at this fraction of the way from `now` to `then`, in log-SNR."""
    return schedule.at_log_snr(now.log_snr + fraction * (then.log_snr - now.log_snr))


class History(NamedTuple):
    """The past values of a multistep solver, the newest first. All fields are tensors, as a compiled loop requires.

    Attributes:
        made: the number of steps made so far, int32.
        left: the number of steps left, including this one, int32.
        values: past x_hat or noise_hat, each with the shape of x.
        log_snrs: the log-SNR of each value, scalars.
    """

    made: Any
    left: Any
    values: tuple
    log_snrs: tuple

    @classmethod
    def empty(cls, x, length: int, steps: int) -> Self:
        """An empty history of `length` values; its placeholder log-SNRs are distinct."""
        made, left = (ops.convert_to_tensor(np.int32(number)) for number in (0, steps))
        values = tuple(ops.zeros_like(x) for _ in range(length))
        log_snrs = tuple(ops.convert_to_tensor(np.float32(-100.0 * (i + 1))) for i in range(length))
        return cls(made, left, values, log_snrs)

    def add(self, value, m: Marginal) -> Self:
        """The history after a step with `value` at `m`."""
        values, log_snrs = (value, *self.values)[: len(self.values)], (m.log_snr, *self.log_snrs)[: len(self.values)]
        return History(self.made + 1, self.left - 1, values, log_snrs)

    def places(self, now: Marginal, then: Marginal) -> list:
        """The positions of the values, as fractions of the step from `now` to `then` in log-SNR."""
        return [(past - now.log_snr) / (then.log_snr - now.log_snr) for past in self.log_snrs]

    def order(self, order: int, lower_final: bool = True):
        """The order of this step: `order`, reduced while the history is short, and at the end if `lower_final`."""
        order = ops.minimum(order, self.made + 1)
        return ops.minimum(order, self.left) if lower_final else order


def check_order(owner: Any, order: Any, highest: int, lowest: int = 1) -> None:
    """Raises a ValueError unless `order` is an integer from `lowest` to `highest`."""
    name = type(owner).__name__
    check_integer(name, "order", order, lowest)
    if order > highest:
        raise ValueError(f"{name}: `order` must be at most {highest}; received: {order}")
