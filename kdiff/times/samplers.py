"""TimeSampler: random times for a training batch.

A sampler makes two choices. The first is how evenly a batch covers [0, 1]: `Uniform`, `Stratified`, `Systematic`,
`LowDiscrepancy` and `Antithetic` all have a uniform marginal density, and differ in how they spread a batch. The second
is how often each noise level is trained: `LogitNormal`, `LogNormalSigma` and others transform uniform numbers u to
another density, t = quantile(u), and take any of the first five as `points`:

    times.LogitNormal(0.0, 1.0, points="stratified")

All begin at the clean end of the schedule: 0, or the first step of a discrete process, t = 1 / T. Below, [0, 1] stands
for the interval from that end to 1.
"""

import math

import numpy as np
from keras import ops

from kdiff import random
from kdiff.base import Value, check_integer, check_number
from kdiff.schedules import NoiseSchedule

__all__ = [
    "HALF_STEP",
    "UNIFORM",
    "Antithetic",
    "Discrete",
    "LogNormalSigma",
    "LogUniform",
    "LogitNormal",
    "LowDiscrepancy",
    "Mode",
    "PowerLaw",
    "Stratified",
    "Systematic",
    "TimeSampler",
    "Uniform",
    "check_points",
]

HALF_STEP = 2.0**-24  # half the spacing of the numbers that `random.uniform` draws


class TimeSampler(Value):
    """The base class of distributions of training times. A new one defines `__call__`, and `density` if known."""

    def __call__(self, schedule: NoiseSchedule, batch, key):
        """Draws random times.

        Args:
            schedule: the noise schedule.
            batch: the number of times, an integer or a scalar tensor.
            key: the key of a random stream (`kdiff.random`), int32, with shape `(2,)`.

        Returns:
            float32 times in [0, 1], with shape `(batch,)`.
        """
        raise NotImplementedError

    @property
    def has_density(self) -> bool:
        """Whether `density` is defined. Training with a `Weighting` that is `per_log_snr` requires it."""
        return type(self).density is not TimeSampler.density

    def density(self, schedule: NoiseSchedule, t):
        """The probability density p(t) of the times, float32, with the shape of `t`."""
        raise NotImplementedError(f"{type(self).__name__} has no density: define `density(schedule, t)`")


class _OverTime(TimeSampler):
    """Times with the density `law` on [0, 1], independent of the schedule. A new one defines `law` and sampling."""

    def law(self, t):
        """The density on [0, 1]."""
        raise NotImplementedError

    def density(self, schedule: NoiseSchedule, t):
        t, first = ops.convert_to_tensor(t, "float32"), schedule.first_time
        span = (1.0 - first) or 1.0
        return ops.where(t < first, 0.0, self.law((t - first) / span) / span)


def _between_ends(schedule: NoiseSchedule, t):
    """Maps t from [0, 1] to the interval from the clean end of the schedule to 1."""
    return schedule.first_time + (1.0 - schedule.first_time) * t


class _Even(_OverTime):
    """Times that are uniform individually. A new one defines `spread`, which spreads them over a batch."""

    def __call__(self, schedule: NoiseSchedule, batch, key):
        return _between_ends(schedule, self.cover(batch, key))

    def cover(self, batch, key):
        """Uniform numbers in [0, 1], float32, with shape `(batch,)`; on several devices, those of this one."""
        return random.of_whole(self.spread, batch, key)

    def spread(self, batch, key):
        """The numbers of a whole batch."""
        raise NotImplementedError

    def law(self, t):
        return ops.ones_like(t)


class Uniform(_Even):
    """Independent t, uniform in [0, 1)."""

    def spread(self, batch, key):
        return random.uniform(key, (batch,))


UNIFORM = Uniform()


class Discrete(_Even):
    """Independent t, uniform over the steps of a discrete process: t = (i + 1) / T, i = 0 ... T - 1 (DDPM, alg. 1).

    `density` makes -slope / density the part of the log-SNRs that is nearer to this step than to another, times T: so
    the mean over the steps of values, each divided by it, is their integral by the trapezoidal rule. It is about 1
    between the ends.

    Args:
        num_steps: T, at most that of the schedule. None: that of the schedule, which must be discrete.
    """

    def __init__(self, num_steps: int | None = None):
        if num_steps is not None:
            check_integer("Discrete", "num_steps", num_steps)
        self.num_steps = num_steps

    def __call__(self, schedule: NoiseSchedule, batch, key):
        num_steps = self.num_steps or schedule.num_steps
        if num_steps is None:
            raise ValueError(f"Discrete: {schedule!r} is continuous; give `num_steps`, or use Uniform or Stratified")
        if num_steps > (schedule.num_steps or num_steps):
            raise ValueError(
                f"Discrete: `num_steps` must be at most {schedule.num_steps}, the number of steps of {schedule!r}; "
                f"received: {num_steps}"
            )
        return (ops.floor(random.uniform(key, (batch,)) * num_steps) + 1.0) / num_steps

    def density(self, schedule: NoiseSchedule, t):
        num_steps = self.num_steps or schedule.num_steps
        t = ops.convert_to_tensor(t, "float32")
        if num_steps is None or num_steps == 1:
            return ops.ones_like(t)
        step = 1.0 / num_steps
        first, own = t < 1.5 * step, schedule.log_snr(t)
        # Twice the ends of the part: the sums of neighbours, or the ends of the schedule.
        before = schedule.log_snr(ops.where(first, schedule.first_time, t - step))
        high, low = before + ops.where(first, before, own), own + schedule.log_snr(ops.minimum(t + step, 1.0))
        return -2.0 * step * schedule.slope(t) / (high - low)


class Stratified(_Even):
    """One random t in each of `batch` equal parts of [0, 1), so that a batch covers all noise levels evenly:

        t_n = (k_n + u_n) / batch,    k_n = (n + offset) mod batch

    Each t is still uniform, and the variance of the loss is reduced. The random offset makes the noise level
    independent of the position in the batch. `Systematic` uses one u for all parts.
    """

    def spread(self, batch, key):
        u = random.uniform(key, (batch + 1,))
        size = ops.cast(batch, "float32")
        part = (_count(batch) + ops.floor(u[0] * size)) % size
        return (part + u[1:]) / size


class Systematic(_Even):
    """Evenly spaced times with a random offset: t_n = (u + n / batch) mod 1, with one u for the whole batch.

    The low-discrepancy sampler of variational diffusion models (Kingma et al. 2021, arXiv:2107.00630, appendix I.1). A
    batch covers [0, 1) with even spacing; a part of it, such as that of one device, covers only a part of [0, 1).
    """

    def spread(self, batch, key):
        return (random.uniform(key, (1,)) + _count(batch) / ops.cast(batch, "float32")) % 1.0


class LowDiscrepancy(_Even):
    """The golden-ratio sequence with a random offset: t_n = (u + n / phi) mod 1, phi = (1 + sqrt(5)) / 2.

    Any consecutive examples cover [0, 1) evenly, whether they are the whole batch or the part of one device or one
    accumulation step (a Kronecker sequence; phi is the number that is worst approximated by fractions).
    """

    RATIO = np.array(round((math.sqrt(5) - 1) / 2 * 2**32), "uint32").astype("int32")  # 2^32 / phi, with wrap-around

    def spread(self, batch, key):
        """(u + n / phi) mod 1; n / phi mod 1 is computed in units of 2^-32, and so is exact for any n."""
        turns = ops.arange(batch, dtype="int32") * ops.convert_to_tensor(self.RATIO)
        turns = ops.cast(ops.bitwise_and(ops.right_shift(turns, 8), 2**24 - 1), "float32") * 2.0**-24
        return (random.uniform(key, (1,)) + turns) % 1.0


class Antithetic(_Even):
    """Antithetic pairs t and 1 - t: the second half of the batch mirrors the first.

    The part of the loss that is odd about t = 1/2 cancels within a pair. It is used by the code of DDIM (Song et al.
    2021, arXiv:2010.02502). In a batch of odd size one t has no partner.
    """

    def spread(self, batch, key):
        u = random.uniform(key, ((batch + 1) // 2,))
        return ops.concatenate([u, 1.0 - u])[:batch]


def _count(batch):
    return ops.cast(ops.arange(batch, dtype="int32"), "float32")


class _Bent(TimeSampler):
    """Times t = quantile(u) for uniform u. A new one defines `quantile` and `density`, and passes on `points`."""

    def __init__(self, points=UNIFORM):
        self.points = check_points(type(self).__name__, points)

    def __call__(self, schedule: NoiseSchedule, batch, key):
        return self.quantile(schedule, self.points.cover(batch, key))

    def quantile(self, schedule: NoiseSchedule, u):
        """Maps a uniform number u to t: the inverse of the distribution function, or that of its mirror image."""
        raise NotImplementedError


class _BentTime(_OverTime, _Bent):
    """t = quantile(u), independent of the schedule. A new one defines `bend` and `law`."""

    def quantile(self, schedule: NoiseSchedule, u):
        return _between_ends(schedule, self.bend(ops.convert_to_tensor(u, "float32")))

    def bend(self, u):
        """Maps a uniform number u to t in [0, 1]."""
        raise NotImplementedError


class LogitNormal(_BentTime):
    """logit(t) = log(t / (1 - t)) is normal (Esser et al. 2024, "Stable Diffusion 3", arXiv:2403.03206, eq. 19):

        p(t) = exp(-(logit(t) - mean)^2 / (2 std^2)) / (std sqrt(2 pi) t (1 - t))

    Args:
        mean: the mean of logit(t); positive values favour high noise levels, negative ones low noise levels.
        std: the standard deviation of logit(t), above 0.
        points: the sampler of the uniform numbers u, a `TimeSampler` or its name.
    """

    def __init__(self, mean: float = 0.0, std: float = 1.0, points=UNIFORM):
        super().__init__(points)
        check_number("LogitNormal", "mean", mean, -30.0, 30.0)
        check_number("LogitNormal", "std", std, 1e-6)
        self.mean, self.std = mean, std

    def bend(self, u):
        return ops.sigmoid(self.mean + self.std * _normal(u))

    def law(self, t):
        t = _inside(t)
        return _gaussian(ops.log(t / (1.0 - t)), self.mean, self.std) / (t * (1.0 - t))


class Mode(_BentTime):
    """The heavy-tailed mode sampling of Stable Diffusion 3 (Esser et al. 2024, arXiv:2403.03206, eq. 20):

        t = f(u) = 1 - u - scale (cos^2(pi u / 2) - 1 + u),    p(t) = 1 / |f'(u)|

    Args:
        scale: positive values favour the middle, 0 is uniform, negative values favour the ends; in
            [-1, 2 / (pi - 2)], where f is monotone.
        points: the sampler of the uniform numbers u, a `TimeSampler` or its name.
    """

    def __init__(self, scale: float = 1.29, points=UNIFORM):
        super().__init__(points)
        check_number("Mode", "scale", scale, -1.0, 2.0 / (np.pi - 2.0))
        self.scale = scale

    def bend(self, u):
        t = 1.0 - u - self.scale * (ops.cos(np.pi * u / 2) ** 2 - 1.0 + u)
        return ops.clip(t, 0.0, 1.0)

    def law(self, t):
        """1 / |f'(u)|, f'(u) = -1 - scale (1 - pi / 2 sin(pi u)); u is found by bisection."""
        u = ops.full_like(t, 0.5)
        for i in range(2, 26):  # f is decreasing
            u = u + ops.sign(self.bend(u) - t) * 2.0**-i
        return 1.0 / ops.maximum(ops.abs(1.0 + self.scale * (1.0 - np.pi / 2 * ops.sin(np.pi * u))), 1e-6)


class PowerLaw(_BentTime):
    """p(t) = (exponent + 1) t^exponent, the distribution Beta(exponent + 1, 1).

    With 0.5 it is that of pi-0 (Black et al. 2024, arXiv:2410.24164, where it is truncated just below pure noise).

    Args:
        exponent: above -1; positive values favour high noise levels, 0 is uniform, negative ones favour low noise.
        points: the sampler of the uniform numbers u, a `TimeSampler` or its name.
    """

    def __init__(self, exponent: float = 0.5, points=UNIFORM):
        super().__init__(points)
        check_number("PowerLaw", "exponent", exponent, -1.0 + 1e-6)
        self.exponent = exponent

    def bend(self, u):
        return u ** (1.0 / (self.exponent + 1.0))

    def law(self, t):
        return (self.exponent + 1.0) * _inside(t) ** self.exponent


class LogNormalSigma(_Bent):
    """ln(sigma / alpha) is normal (Karras et al. 2022, "EDM", arXiv:2206.00364, table 1, with the same defaults):

        t = schedule.time(-2 n),  n ~ N(mean, std^2),        p(t) = N(ln(sigma / alpha); mean, std^2) |slope(t)| / 2

    Values beyond the ends of the schedule are clipped to the ends, a point mass that `density` omits. On a discrete
    schedule the times also lie between its steps, and the clean end is its first step.

    Args:
        mean: the mean of ln(sigma / alpha).
        std: the standard deviation of ln(sigma / alpha).
        points: the sampler of the uniform numbers u, a `TimeSampler` or its name.
    """

    def __init__(self, mean: float = -1.2, std: float = 1.2, points=UNIFORM):
        super().__init__(points)
        check_number("LogNormalSigma", "mean", mean, -30.0, 30.0)
        check_number("LogNormalSigma", "std", std, 1e-6)
        self.mean, self.std = mean, std

    def quantile(self, schedule: NoiseSchedule, u):
        """time(-2 (mean + std z)), clipped to the range of the schedule."""
        clean, noisy = schedule.log_snr_ends()
        log_snr = -2.0 * (self.mean + self.std * _normal(u))
        return _time(schedule, ops.minimum(ops.maximum(log_snr, noisy), clean))

    def density(self, schedule: NoiseSchedule, t):
        t = ops.convert_to_tensor(t, "float32")
        log_ratio = -0.5 * schedule.log_snr(t)
        density = _gaussian(log_ratio, self.mean, self.std) * 0.5 * ops.abs(schedule.slope(t))
        return ops.where(t < schedule.first_time, 0.0, density)


class LogUniform(_Bent):
    """sigma / alpha is log-uniform, so log-SNR is uniform, over the range of the schedule:

        t = schedule.time(l),  l uniform,        p(t) = |slope(t)| / (log_snr(0) - log_snr(1))

    On a discrete schedule the clean end is its first step, t = 1 / T, and the times also lie between its steps.

    Args:
        points: the sampler of the uniform numbers u, a `TimeSampler` or its name.
    """

    def quantile(self, schedule: NoiseSchedule, u):
        clean, noisy = schedule.log_snr_ends()
        return _time(schedule, clean + (noisy - clean) * ops.convert_to_tensor(u, "float32"))

    def density(self, schedule: NoiseSchedule, t):
        t = ops.convert_to_tensor(t, "float32")
        clean, noisy = schedule.log_snr_ends()
        return ops.where(t < schedule.first_time, 0.0, ops.abs(schedule.slope(t)) / (clean - noisy))


def _time(schedule: NoiseSchedule, log_snr):
    return ops.clip(schedule.time(log_snr), schedule.first_time, 1.0)  # against rounding errors of `time`


def _normal(u):
    """Standard normal numbers from uniform ones: sqrt(2) erfinv(2 u - 1), at the middle of each step of u."""
    u = 2.0 * ops.convert_to_tensor(u, "float32") - 1.0 + HALF_STEP
    u = ops.clip(u, HALF_STEP - 1.0, 1.0 - HALF_STEP)
    # In the lower tail, because TensorFlow's erfinv(1 - 2^-24) is infinite.
    return -math.sqrt(2.0) * ops.sign(u) * ops.erfinv(-ops.abs(u))


def _gaussian(x, mean: float, std: float):
    """N(x; mean, std^2)."""
    return ops.exp(-0.5 * ops.square((x - mean) / std)) / (std * math.sqrt(2.0 * math.pi))


def _inside(t):
    """t, clipped away from 0 and 1, where a density may be infinite."""
    return ops.clip(ops.convert_to_tensor(t, "float32"), HALF_STEP, 1.0 - HALF_STEP)


def check_points(owner: str, points) -> TimeSampler:
    """The sampler of uniform times for `points`; a ValueError if its times are not uniform."""
    sampler = TimeSampler.get(points)
    if not isinstance(sampler, _Even) or isinstance(sampler, Discrete):
        known = [Uniform(), Stratified(), Systematic(), LowDiscrepancy(), Antithetic()]
        raise ValueError(f"{owner}: `points` must be one of {known}; received: {points!r}")
    return sampler
