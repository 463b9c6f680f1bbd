"""TimeGrid: the times of a sampling run.

Three kinds of grids, after what is spaced evenly:

    index     All, Leading, Trailing, Linspace: the steps of a discrete process
    time      BetaQuantile, FlowShift: t = f(u), u in equal spaces, f from [0, 1] to itself
    noise     Karras, Exponential, Polyexponential, UniformLogSNR: s = sigma / alpha, t = schedule.time(-2 log s)

A grid of times or of noise lies between the steps of a discrete schedule and is not rounded to them, as in k-diffusion;
`Rounded` rounds any grid, as most of diffusers does. It begins at t = 1 and ends at the schedule's clean end: with a
step to t = 0 from the last time, which on a discrete schedule is its first step, t = 1 / T.
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
    "Exponential",
    "FlowShift",
    "Karras",
    "Leading",
    "Linspace",
    "Polyexponential",
    "Rounded",
    "Sigmas",
    "TimeGrid",
    "Times",
    "Trailing",
    "UniformLogSNR",
    "check_steps",
    "incomplete_beta",
]


def check_steps(grid: "TimeGrid", steps: int, repeats: int = 1) -> None:
    """Raises a ValueError unless `steps` is a whole number, of at least 1, and at most a million with its repeats."""
    check_integer(type(grid).__name__, "steps", steps)
    if steps * repeats > MOST_STEPS:
        raise ValueError(f"{grid!r}: at most {MOST_STEPS} steps in all can be made; received: {steps * repeats}")


class TimeGrid(Value):
    """The base of the sampling times. A new grid defines `above_zero`; or `indices`, if it takes steps by number.

    Grids by number are defined on the T steps of a discrete process, at t = (i + 1) / T. On a continuous schedule they
    are read with T = `resolution`.
    """

    resolution = 1000

    def default_steps(self, schedule: NoiseSchedule) -> int:
        """The number of steps of a run that names none: 50, or all that the schedule has if they are fewer."""
        return min(50, schedule.num_steps or 50)

    def __call__(self, schedule: NoiseSchedule, steps: int) -> np.ndarray:
        """The times of a run of `steps` steps.

        Returns:
            float64 times, strictly decreasing, also as float32, that end at 0, with shape `(steps + 1,)`.

        Raises:
            ValueError: if `steps` is not a whole number of at least 1; if it exceeds the steps that the schedule has
                and the grid chooses from; or if there are so many that two times coincide.
        """
        check_steps(self, steps)
        times = np.append(self.above_zero(schedule, steps), 0.0)
        if not np.all(np.diff(times.astype("float32")) < 0):
            raise ValueError(
                f"{self!r}: {steps} steps are too many on {schedule!r}: two times are equal in float32. "
                f"Use fewer, or another grid"
            )
        return times

    def above_zero(self, schedule: NoiseSchedule, steps: int) -> np.ndarray:
        """All times but the last, which is 0: float64, decreasing, in (0, 1], with shape `(steps,)`."""
        if schedule.num_steps is not None and steps > schedule.num_steps:
            raise ValueError(
                f"{type(self).__name__}: `steps` must be at most {schedule.num_steps}, the number that "
                f"{schedule!r} has; received: {steps}"
            )
        num_steps = schedule.num_steps or max(self.resolution, steps)
        return (self.indices(num_steps, steps) + 1.0) / num_steps

    def indices(self, num_steps: int, steps: int) -> np.ndarray:
        """Which of the steps 0 ... `num_steps` - 1 are taken, decreasing, with shape `(steps,)`."""
        raise NotImplementedError


class All(TimeGrid):
    """Every step of a discrete process: i = T - 1 ... 0, as DDPM samples. `steps` must be T."""

    def default_steps(self, schedule: NoiseSchedule) -> int:
        return schedule.num_steps or self.resolution

    def indices(self, num_steps: int, steps: int) -> np.ndarray:
        if steps != num_steps:
            raise ValueError(f"All: `steps` must be {num_steps}, every step that there is; received: {steps}")
        return np.arange(num_steps)[::-1]


class Leading(TimeGrid):
    """i = (steps - 1 ... 0) floor(T / steps) + offset: begins below the last step, as DDIM's code does.

    Lin et al. 2024, arXiv:2305.08891, table 2, names the three spacings and shows what this one loses.

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

    On a continuous schedule, without rounding: t = 1 - k / steps.

    Args:
        min_log_snr: where it begins, if the schedule goes further: for solvers that must not begin where alpha is near
            zero. The same with t = time(min_log_snr) for 1, and for T the nearest step.
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
                f"{self!r}: `steps` must be at most {last}, the number that {schedule!r} has there; received: {steps}"
            )
        return (self.indices(last, steps) + 1.0) / schedule.num_steps

    def indices(self, num_steps: int, steps: int) -> np.ndarray:
        return np.round(num_steps - np.arange(steps) * (num_steps / steps)) - 1


class Linspace(TimeGrid):
    """i = round of `steps` equal spaces from T - 1 to 0: takes both ends (Lin et al. 2024, table 2)."""

    def indices(self, num_steps: int, steps: int) -> np.ndarray:
        return np.round(np.linspace(num_steps - 1, 0, steps))


class Times(TimeGrid):
    """Times of your own.

    Args:
        times: strictly decreasing, in [0, 1], the last 0; one more than there are steps.

    Raises:
        ValueError: if they are not; and, when called, if the run has another number of steps.
    """

    def __init__(self, times: Sequence[float]):
        self.times = tuple(float(t) for t in times)
        t = np.array(self.times, "float32")
        if len(t) < 2 or not (t[0] <= 1 and t[-1] == 0 and np.all(np.diff(t) < 0)):
            raise ValueError(f"Times: `times` must decrease strictly, within [0, 1], to a last 0; received: {times!r}")

    def default_steps(self, schedule: NoiseSchedule) -> int:
        return len(self.times) - 1

    def above_zero(self, schedule: NoiseSchedule, steps: int) -> np.ndarray:
        if steps != len(self.times) - 1:
            raise ValueError(f"Times: `steps` must be {len(self.times) - 1}, to use every time; received: {steps}")
        return np.array(self.times[:-1])


class Rounded(TimeGrid):
    """Another grid, each time at the nearest step of a discrete schedule; on a continuous one as it is.

    Args:
        grid: a `TimeGrid` or its name. Where it is finer than the schedule two times coincide, which is an error:
            `Karras` on `CosineBeta`, whose last steps are far apart in sigma, has more than one time in each of them.
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
    """t = first + (1 - first) warp(u), where first is the schedule's first step, or 0. A new one defines `warp`."""

    def above_zero(self, schedule: NoiseSchedule, steps: int) -> np.ndarray:
        first = schedule.first_time
        return first + (1.0 - first) * self.warp(_spaces(steps, closed=first > 0))

    def warp(self, u: np.ndarray) -> np.ndarray:
        """An increasing function of u, from [0, 1] to [0, 1]."""
        raise NotImplementedError


class BetaQuantile(_Warped):
    """t is the quantile of a beta distribution at u: I_t(alpha, beta) = u, with u in equal spaces.

    Lee et al. 2024, "Beta sampling is all you need", arXiv:2407.12173. Below 1 both parameters place more times at the
    two ends; 1 and 1 is uniform.

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

    The sum is used where it converges fast, at x <= 1 / 2; `terms` are enough for a and b up to 50.
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
    """t = shift u / (1 + (shift - 1) u): a uniform grid, moved to the noise (SD3, arXiv:2403.03206, eq. 23).

    The shift of a schedule moves training and sampling; this moves the sampling alone. On `Rectified` the two give the
    same noise levels.

    Args:
        shift: above 0; 1 is the uniform grid.
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
        """The shift of Flux, which depends on the size of the sample: exp(mu), mu linear in the tokens.

        Args:
            tokens: the length of the transformer's sequence.
            base_tokens: where mu is `base_mu`.
            max_tokens: where mu is `max_mu`.
            base_mu: the logarithm of the shift at `base_tokens`.
            max_mu: and at `max_tokens`.
        """
        return cls(math.exp(token_mu("FlowShift", tokens, base_tokens, max_tokens, base_mu, max_mu)))

    def warp(self, u: np.ndarray) -> np.ndarray:
        return self.shift * u / (1.0 + (self.shift - 1.0) * u)


_LEAST = 1e-7  # a time that is not 0, where the noise is as good as at 0


class _Sigmas(TimeGrid):
    """Times at which s = sigma / alpha has given values, from `sigma_max` to `sigma_min`. A new one defines `sigmas`.

    An end that is None is the schedule's: t = 1, and the first step of a discrete schedule. The clean end of a
    continuous schedule is t = 0 itself, so there the `steps` + 1 values from one end to the other are the grid. A
    `sigma_min` of one's own comes before the last step, which goes from there to t = 0, as EDM's does; where it is the
    schedule's own, as 0.002 is of `VarianceExploding()`, it is taken at a t of 1e-7, for 0 is the data itself.
    """

    def __init__(self, sigma_min: float | None = None, sigma_max: float | None = None):
        name = type(self).__name__
        for argument, value in (("sigma_min", sigma_min), ("sigma_max", sigma_max)):
            if value is not None:
                check_number(name, argument, value, 1e-12)
        if None not in (sigma_min, sigma_max) and sigma_min >= sigma_max:
            raise ValueError(f"{name}: `sigma_max` must exceed `sigma_min`; received: {sigma_max} and {sigma_min}")
        self.sigma_min, self.sigma_max = sigma_min, sigma_max

    def above_zero(self, schedule: NoiseSchedule, steps: int) -> np.ndarray:
        low, high = self._ends(schedule)
        sigmas = self.sigmas(low, high, self.spaces(steps, self.sigma_min is not None or schedule.first_time > 0))
        times = _times_at(schedule, sigmas)
        # `time` may miss the ends by its rounding.
        times[0] = 1.0 if self.sigma_max is None else times[0]
        if self.sigma_min is None and steps > 1:
            times[-1] = max(times[-1], schedule.first_time)
        return times

    def sigmas(self, low: float, high: float, u: np.ndarray) -> np.ndarray:
        """s at u, increasing from `low` at u = 0 to `high` at u = 1."""
        raise NotImplementedError

    def spaces(self, steps: int, closed: bool) -> np.ndarray:
        """u, falling from 1; to 0, if `closed`."""
        return _spaces(steps, closed)

    def _ends(self, schedule: NoiseSchedule) -> tuple[float, float]:
        """(sigma_min, sigma_max), inside of the schedule's own."""
        lowest, highest = _ends_of(schedule)
        low = lowest if self.sigma_min is None else self.sigma_min
        high = highest if self.sigma_max is None else self.sigma_max
        _check_within(type(self).__name__, schedule, low, high)
        return low, high


def _ends_of(schedule: NoiseSchedule) -> list[float]:
    """The least and the largest sigma / alpha."""
    return [math.exp(-0.5 * float(ops.convert_to_numpy(end))) for end in schedule.log_snr_ends()]


def _check_within(name: str, schedule: NoiseSchedule, low: float, high: float) -> None:
    lowest, highest = _ends_of(schedule)
    if not lowest * 0.9999 <= low <= high <= highest * 1.0001:  # of the ends only float32 is known
        raise ValueError(
            f"{name}: `sigma_min` < `sigma_max` must lie in [{lowest:.6g}, {highest:.6g}], the sigma / alpha of "
            f"{schedule!r}; received: {low:.6g} and {high:.6g}"
        )


def _times_at(schedule: NoiseSchedule, sigmas: np.ndarray) -> np.ndarray:
    """Times above 0 at which sigma / alpha has these values."""
    log_snr = ops.convert_to_tensor(-2.0 * np.log(sigmas), "float32")
    return np.clip(ops.convert_to_numpy(schedule.time(log_snr)).astype("float64"), _LEAST, 1.0)


class Sigmas(TimeGrid):
    """Noise levels of your own, s = sigma / alpha, as users of EDM and k-diffusion have them: of any schedule.

    Args:
        sigmas: strictly decreasing, above zero, with as many values as there are steps; a last 0 may stand after them.

    Raises:
        ValueError: if they are not; and, when called, if the run has another number of steps, or the schedule does not
            have such levels.
    """

    def __init__(self, sigmas: Sequence[float]):
        s = np.asarray(sigmas, "float64").ravel()
        above = s[:-1] if len(s) and s[-1] == 0 else s
        if not (len(above) and np.all(np.isfinite(above)) and above[-1] > 0 and np.all(np.diff(above) < 0)):
            raise ValueError(
                f"Sigmas: `sigmas` must decrease strictly to a last above 0, or to 0; received: {sigmas!r}"
            )
        self.sigmas = tuple(float(one) for one in s)
        self._above = above

    def default_steps(self, schedule: NoiseSchedule) -> int:
        return len(self._above)

    def above_zero(self, schedule: NoiseSchedule, steps: int) -> np.ndarray:
        if steps != len(self._above):
            raise ValueError(f"Sigmas: `steps` must be {len(self._above)}, to use every value; received: {steps}")
        _check_within("Sigmas", schedule, self._above[-1], self._above[0])
        return _times_at(schedule, self._above)


class Karras(_Sigmas):
    """s^(1 / rho) in equal spaces (Karras et al. 2022, "EDM", arXiv:2206.00364, eq. 5):

        s = (sigma_min^(1 / rho) + u (sigma_max^(1 / rho) - sigma_min^(1 / rho)))^rho

    Args:
        rho: above 0: the larger, the more of the steps are near the data.
        sigma_min: the last sigma / alpha above zero; EDM's is 0.002. None is the schedule's.
        sigma_max: the first; EDM's is 80. None is the schedule's.
    """

    def __init__(self, rho: float = 7.0, sigma_min: float | None = None, sigma_max: float | None = None):
        super().__init__(sigma_min, sigma_max)
        check_number("Karras", "rho", rho, 1e-3)
        self.rho = rho

    def sigmas(self, low: float, high: float, u: np.ndarray) -> np.ndarray:
        low, high = low ** (1.0 / self.rho), high ** (1.0 / self.rho)
        return (low + u * (high - low)) ** self.rho


class Exponential(_Sigmas):
    """log s in equal spaces, which is log-SNR in equal spaces (Lu et al. 2022, DPM-Solver, arXiv:2206.00927, sec. 3.4).

    Args:
        sigma_min: the last sigma / alpha above zero. None is the schedule's.
        sigma_max: the first. None is the schedule's.
    """

    def sigmas(self, low: float, high: float, u: np.ndarray) -> np.ndarray:
        return np.exp(math.log(low) + u * (math.log(high) - math.log(low)))


class Polyexponential(_Sigmas):
    """log s at the powers of equal spaces, as k-diffusion has it:

        s = exp(log(sigma_min) + u^rho (log(sigma_max) - log(sigma_min)))

    Args:
        rho: above 0: 1 is `Exponential`; above 1 more of the steps are near the data.
        sigma_min: the last sigma / alpha above zero. None is the schedule's.
        sigma_max: the first. None is the schedule's.
    """

    def __init__(self, rho: float = 1.0, sigma_min: float | None = None, sigma_max: float | None = None):
        super().__init__(sigma_min, sigma_max)
        check_number("Polyexponential", "rho", rho, 1e-3)
        self.rho = rho

    def sigmas(self, low: float, high: float, u: np.ndarray) -> np.ndarray:
        return np.exp(math.log(low) + u**self.rho * (math.log(high) - math.log(low)))


class UniformLogSNR(Exponential):
    """log-SNR in equal spaces: `Exponential`, with the ends given as log-SNR.

    Args:
        min_log_snr: the first. None is the schedule's at t = 1.
        max_log_snr: the last above t = 0. None is the schedule's clean end.
    """

    def __init__(self, min_log_snr: float | None = None, max_log_snr: float | None = None):
        for argument, value in (("min_log_snr", min_log_snr), ("max_log_snr", max_log_snr)):
            if value is not None:
                check_number("UniformLogSNR", argument, value, -50.0, 50.0)
        if None not in (min_log_snr, max_log_snr) and min_log_snr >= max_log_snr:
            raise ValueError(
                f"UniformLogSNR: `max_log_snr` must exceed `min_log_snr`; received: {max_log_snr} and {min_log_snr}"
            )
        low, high = (None if end is None else math.exp(-0.5 * end) for end in (max_log_snr, min_log_snr))
        super().__init__(low, high)
        self.min_log_snr, self.max_log_snr = min_log_snr, max_log_snr


def _spaces(steps: int, closed: bool) -> np.ndarray:
    """`steps` numbers in equal spaces from 1, the last 0 if `closed`; if not, 0 would be the next."""
    return np.linspace(1.0, 0.0, steps) if closed else np.arange(steps, 0, -1) / steps
