"""TimeGrid: the times of a sampling run.

There are three kinds of grids, by the quantity that they space:

    index     All, Leading, Trailing, Linspace: the steps of a discrete process
    time      BetaQuantile, FlowShift: t = f(u), u evenly spaced, f from [0, 1] to itself
    noise     Karras, Exponential, Polyexponential, UniformLogSNR (`noise_grids`): s = sigma / alpha

Grids of times or noise levels are not rounded to the steps of a discrete schedule, as in k-diffusion; `Rounded` rounds
any grid, as most schedulers of diffusers do. A grid begins at t = 1 and ends at the clean end of the schedule: the last
step leads to t = 0, and on a discrete schedule it starts from the first step, t = 1 / T.
"""

import math
from collections.abc import Sequence
from typing import Self

import numpy as np
from keras import ops

from kdiff.base import Value, check_integer, check_number
from kdiff.schedules import NoiseSchedule
from kdiff.schedules.tables import MOST_STEPS
from kdiff.schedules.wrappers import token_mu

__all__ = [
    "All",
    "BetaQuantile",
    "Distilled",
    "FlowShift",
    "Leading",
    "Linspace",
    "Rounded",
    "TimeGrid",
    "Times",
    "Trailing",
    "check_steps",
    "evenly_spaced",
    "incomplete_beta",
]


def check_steps(grid: "TimeGrid", steps: int, repeats: int = 1) -> None:
    """Raises a ValueError unless `steps` is an integer of at least 1, and `steps * repeats` at most a million."""
    check_integer(type(grid).__name__, "steps", steps)
    if steps * repeats > MOST_STEPS:
        raise ValueError(f"{grid!r}: a run has at most {MOST_STEPS} steps in total; received: {steps * repeats}")


class TimeGrid(Value):
    """The base class of sampling grids. A new grid defines `above_zero`, or `indices` if it selects steps by index.

    Grids of indices are defined on the T steps of a discrete process, at t = (i + 1) / T. On a continuous schedule they
    use T = `resolution`.
    """

    resolution = 1000

    def default_steps(self, schedule: NoiseSchedule) -> int:
        """The default number of steps: 50, or the number of steps of the schedule if it is smaller."""
        return min(50, schedule.num_steps or 50)

    def __call__(self, schedule: NoiseSchedule, steps: int) -> np.ndarray:
        """The times of a run of `steps` steps.

        Returns:
            float64 times with shape `(steps + 1,)`, strictly decreasing (also in float32), the last of which is 0.

        Raises:
            ValueError: if `steps` is not an integer of at least 1, if it exceeds the number of steps of the schedule
                from which the grid selects, or if two times coincide.
        """
        check_steps(self, steps)
        times = np.append(self.above_zero(schedule, steps), 0.0)
        if not np.all(np.diff(times.astype("float32")) < 0):
            raise ValueError(
                f"{self!r}: {steps} steps are too many on {schedule!r}: two times are equal in float32. "
                f"Use fewer steps, or another grid"
            )
        return times

    def above_zero(self, schedule: NoiseSchedule, steps: int) -> np.ndarray:
        """All times except the last, which is 0: float64, decreasing, in (0, 1], with shape `(steps,)`."""
        if schedule.num_steps is not None and steps > schedule.num_steps:
            raise ValueError(
                f"{type(self).__name__}: `steps` must be at most {schedule.num_steps}, the number of steps of "
                f"{schedule!r}; received: {steps}"
            )
        num_steps = schedule.num_steps or max(self.resolution, steps)
        return (self.indices(num_steps, steps) + 1.0) / num_steps

    def indices(self, num_steps: int, steps: int) -> np.ndarray:
        """The selected indices among 0 ... `num_steps` - 1, decreasing, with shape `(steps,)`."""
        raise NotImplementedError


class All(TimeGrid):
    """Every step of a discrete process, i = T - 1 ... 0, as in DDPM. `steps` must be T."""

    def default_steps(self, schedule: NoiseSchedule) -> int:
        return schedule.num_steps or self.resolution

    def indices(self, num_steps: int, steps: int) -> np.ndarray:
        if steps != num_steps:
            raise ValueError(f"All: `steps` must be {num_steps}, the number of steps of the process; received: {steps}")
        return np.arange(num_steps)[::-1]


class Leading(TimeGrid):
    """i = (steps - 1 ... 0) floor(T / steps) + offset: begins below the last step, as in the code of DDIM.

    Lin et al. 2024, arXiv:2305.08891, table 2, names the three spacings; this one never visits pure noise.

    Args:
        offset: is added to each i. Stable Diffusion uses 1.
    """

    def __init__(self, offset: int = 0):
        check_integer("Leading", "offset", offset, minimum=0)
        self.offset = offset

    def indices(self, num_steps: int, steps: int) -> np.ndarray:
        indices = np.arange(steps)[::-1] * (num_steps // steps) + self.offset
        if indices[0] >= num_steps:
            raise ValueError(
                f"Leading: `offset` must be at most {num_steps - 1 - indices[0] + self.offset} with {steps} steps "
                f"of {num_steps}; received: {self.offset}"
            )
        return indices


class Trailing(TimeGrid):
    """i = round(T - k T / steps) - 1, k = 0 ... steps - 1: begins at the last step (Lin et al. 2024, table 2).

    On a continuous schedule it is not rounded: t = 1 - k / steps.

    Args:
        min_log_snr: the log-SNR of the first time, if the schedule extends below it, for solvers that must not begin
            where alpha is close to zero. The grid then begins at t = time(min_log_snr), or the nearest step.
    """

    def __init__(self, min_log_snr: float | None = None):
        if min_log_snr is not None:
            check_number("Trailing", "min_log_snr", min_log_snr, -80.0, 80.0)
        self.min_log_snr = min_log_snr

    def above_zero(self, schedule: NoiseSchedule, steps: int) -> np.ndarray:
        first = 1.0
        if self.min_log_snr is not None:
            first = float(np.clip(ops.convert_to_numpy(schedule.time(np.float32(self.min_log_snr))), 0.0, 1.0))
        if schedule.num_steps is None:
            return first * np.arange(steps, 0, -1) / steps
        last = int(schedule.nearest(first) * schedule.num_steps + 0.5)
        if steps > last:
            raise ValueError(
                f"{self!r}: `steps` must be at most {last}, the steps of {schedule!r} up to there; received: {steps}"
            )
        return (self.indices(last, steps) + 1.0) / schedule.num_steps

    def indices(self, num_steps: int, steps: int) -> np.ndarray:
        return np.round(num_steps - np.arange(steps) * (num_steps / steps)) - 1


class Distilled(TimeGrid):
    """The times of LCM and TCD: a subset of the `original` times at which a network was distilled,

        i = k floor(T / original) - 1,  k = original ... 1,   at the indices floor(j original / steps),  j = 0, 1, ...

    Luo et al. 2023, arXiv:2310.04378, whose network has learned no other times.

    Args:
        original: the number of times at distillation, which is also the largest number of steps.
    """

    formerly = ("kdiff.interop>Distilled",)

    def __init__(self, original: int = 50):
        check_integer("Distilled", "original", original)
        self.original = original

    def indices(self, num_steps: int, steps: int) -> np.ndarray:
        """i."""
        if steps > self.original:
            raise ValueError(
                f"Distilled: `steps` must be at most {self.original}, the number at distillation "
                f"(`original_inference_steps`); received: {steps}"
            )
        if self.original > num_steps:
            raise ValueError(
                f"Distilled: `original` must be at most {num_steps}, the number of steps of the process; received: "
                f"{self.original}"
            )
        of_training = np.arange(self.original, 0, -1) * (num_steps // self.original) - 1
        return of_training[np.floor(np.linspace(0, self.original, steps, endpoint=False)).astype(int)]


class Linspace(TimeGrid):
    """`steps` evenly spaced indices from T - 1 to 0, rounded, including both ends (Lin et al. 2024, table 2)."""

    def indices(self, num_steps: int, steps: int) -> np.ndarray:
        return np.round(np.linspace(num_steps - 1, 0, steps))


class Times(TimeGrid):
    """Explicitly given times.

    Args:
        times: `steps + 1` strictly decreasing values in [0, 1], the last of which is 0.

    Raises:
        ValueError: if they are not; and, when called, if the run has another number of steps.
    """

    def __init__(self, times: Sequence[float]):
        self.times = tuple(float(t) for t in times)
        t = np.array(self.times, "float32")
        if len(t) < 2 or not (t[0] <= 1 and t[-1] == 0 and np.all(np.diff(t) < 0)):
            raise ValueError(f"Times: `times` must be in [0, 1] and strictly decrease to 0; received: {times!r}")

    def default_steps(self, schedule: NoiseSchedule) -> int:
        return len(self.times) - 1

    def above_zero(self, schedule: NoiseSchedule, steps: int) -> np.ndarray:
        if steps != len(self.times) - 1:
            raise ValueError(f"Times: `steps` must be {len(self.times) - 1}, to use every time; received: {steps}")
        return np.array(self.times[:-1])


class Rounded(TimeGrid):
    """Another grid, rounded to the steps of a discrete schedule; unchanged on a continuous schedule.

    Args:
        grid: a `TimeGrid` or its name. It is an error if the rounding makes two times equal, as for `Karras` on
            `CosineBeta`, whose last steps are far apart in sigma.
    """

    def __init__(self, grid="beta_quantile"):
        self.grid = TimeGrid.get(grid)

    def default_steps(self, schedule: NoiseSchedule) -> int:
        return self.grid.default_steps(schedule)

    def above_zero(self, schedule: NoiseSchedule, steps: int) -> np.ndarray:
        times = self.grid.above_zero(schedule, steps)
        if schedule.num_steps is None:
            return times
        return np.maximum(np.round(times * schedule.num_steps), 1.0) / schedule.num_steps


class _Warped(TimeGrid):
    """t = first + (1 - first) warp(u), where first is the schedule's first step or 0. A new one defines `warp`."""

    def above_zero(self, schedule: NoiseSchedule, steps: int) -> np.ndarray:
        first = schedule.first_time
        return first + (1.0 - first) * self.warp(evenly_spaced(steps, closed=first > 0))

    def warp(self, u: np.ndarray) -> np.ndarray:
        """An increasing function of u, from [0, 1] to [0, 1]."""
        raise NotImplementedError


class BetaQuantile(_Warped):
    """t is the quantile of a beta distribution at u, I_t(alpha, beta) = u, for evenly spaced u.

    Lee et al. 2024, "Beta sampling is all you need", arXiv:2407.12173. Parameters below 1 place more times near the two
    ends; 1 and 1 give a uniform grid.

    Args:
        alpha: in [0.05, 50].
        beta: in [0.05, 50].
    """

    def __init__(self, alpha: float = 0.6, beta: float = 0.6):
        check_number("BetaQuantile", "alpha", alpha, 0.05, 50.0)
        check_number("BetaQuantile", "beta", beta, 0.05, 50.0)
        self.alpha, self.beta = alpha, beta

    def warp(self, u: np.ndarray) -> np.ndarray:
        """The inverse of I(alpha, beta) at u, by bisection."""
        low, high = np.zeros_like(u), np.ones_like(u)
        for _ in range(60):
            middle = (low + high) / 2
            below = incomplete_beta(middle, self.alpha, self.beta) < u
            low, high = np.where(below, middle, low), np.where(below, high, middle)
        return np.where(u < 1.0, high, 1.0)  # I is 1 to float64 before x is


def incomplete_beta(x: np.ndarray, a: float, b: float, terms: int = 400) -> np.ndarray:
    """I_x(a, b), the distribution function of the beta distribution, for x in [0, 1] (DLMF 8.17.8, all terms positive):

        I_x(a, b) = x^a (1 - x)^b / (a B(a, b)) sum_n x^n (a + b)_n / (a + 1)_n,     I_x(a, b) = 1 - I_{1 - x}(b, a)

    The sum is used for x <= 1 / 2, where it converges fast; the default `terms` suffice for a and b up to 50.
    """
    x = np.asarray(x, "float64")
    mirrored = x > 0.5
    x, a, b = np.where(mirrored, 1.0 - x, x), np.where(mirrored, b, a), np.where(mirrored, a, b)
    n = np.arange(1.0, terms)[:, None]
    factors = x * (a + b + n - 1.0) / (a + n)
    total = 1.0 + np.sum(np.cumprod(factors, axis=0), axis=0)
    log_beta = np.array([math.lgamma(p) + math.lgamma(q) - math.lgamma(p + q) for p, q in zip(a, b, strict=True)])
    value = x**a * (1.0 - x) ** b / a * np.exp(-log_beta) * total
    return np.where(mirrored, 1.0 - value, value)


class FlowShift(_Warped):
    """t = shift u / (1 + (shift - 1) u): a uniform grid shifted towards noise (SD3, arXiv:2403.03206, eq. 23).

    Shifting the schedule (`schedules.Shifted`) changes training and sampling; this grid changes only sampling. On
    `Rectified` the two give the same noise levels.

    Args:
        shift: above 0; 1 gives the uniform grid.
    """

    def __init__(self, shift: float = 3.0):
        check_number("FlowShift", "shift", shift, 1e-6)
        self.shift = shift

    @classmethod
    def for_tokens(
        cls,
        tokens: int,
        base_tokens: int = 256,
        max_tokens: int = 4096,
        base_mu: float = 0.5,
        max_mu: float = 1.15,
    ) -> Self:
        """The resolution-dependent shift of Flux: exp(mu), with mu linear in the number of tokens.

        Args:
            tokens: the length of the transformer's sequence.
            base_tokens: the number of tokens at which mu is `base_mu`.
            max_tokens: the number of tokens at which mu is `max_mu`.
            base_mu: the logarithm of the shift at `base_tokens`.
            max_mu: the logarithm of the shift at `max_tokens`.
        """
        return cls(math.exp(token_mu("FlowShift", tokens, base_tokens, max_tokens, base_mu, max_mu)))

    def warp(self, u: np.ndarray) -> np.ndarray:
        return self.shift * u / (1.0 + (self.shift - 1.0) * u)


def evenly_spaced(steps: int, closed: bool) -> np.ndarray:
    """`steps` evenly spaced values from 1, the last of which is 0 if `closed`; otherwise 0 would be the next."""
    return np.linspace(1.0, 0.0, steps) if closed else np.arange(steps, 0, -1) / steps
