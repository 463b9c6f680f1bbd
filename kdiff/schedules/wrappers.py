"""Schedules that wrap another: they change its log-SNR, and keep its normalisation and its number of steps."""

from typing import Self

import numpy as np
from keras import ops

from kdiff.base import check_number
from kdiff.schedules.base import NoiseSchedule
from kdiff.schedules.tables import _Table, check_ends

__all__ = ["Shifted", "ZeroTerminalSNR", "token_mu"]


def token_mu(owner: str, tokens: int, base_tokens: int, max_tokens: int, base_mu: float, max_mu: float) -> float:
    """The mu of Flux, linear in the number of tokens (see `Shifted.for_tokens`)."""
    check_number(owner, "tokens", tokens, 1)
    check_number(owner, "base_tokens", base_tokens, 1)
    check_number(owner, "max_tokens", max_tokens, base_tokens + 1)
    return base_mu + (max_mu - base_mu) * (tokens - base_tokens) / (max_tokens - base_tokens)


class Shifted(NoiseSchedule):
    """A schedule whose log-SNR is shifted by a constant, log_snr = schedule.log_snr + shift.

    Averaging s x s pixels divides the variance of the noise by s^2 but hardly changes that of the image. At the same
    log-SNR a larger image is therefore less corrupted, and needs a negative shift (Hoogeboom et al. 2023, section 3.1).

    Args:
        schedule: a `NoiseSchedule` or its name.
        shift: the constant that is added to log_snr; a negative one adds noise.
    """

    def __init__(self, schedule, shift: float):
        super().__init__()
        check_number("Shifted", "shift", shift, -80.0, 80.0)
        self.schedule, self.shift = NoiseSchedule.get(schedule), shift
        self.num_steps = self.schedule.num_steps
        check_ends("Shifted", _number(self.schedule.log_snr(np.array([0.0, 1.0], "float32"))) + shift)

    @classmethod
    def by_factor(cls, schedule, factor: float) -> Self:
        """Multiplies sigma / alpha by `factor`: shift = -2 log(factor).

        For `Rectified` it maps t to factor t / (1 + (factor - 1) t) (Esser et al. 2024, "SD3", arXiv:2403.03206,
        eq. 23, with factor = sqrt(m / n) for m pixels if the schedule was tuned for n; SD3 uses 3).
        """
        check_number("Shifted", "factor", factor, 1e-6, 1e6)
        return cls(schedule, float(-2.0 * np.log(factor)))

    @classmethod
    def for_resolution(cls, schedule, resolution: int, base: int = 64) -> Self:
        """shift = 2 log(base / resolution) (Hoogeboom et al. 2023, "simple diffusion", arXiv:2301.11093, section 3.1).

        Args:
            schedule: a schedule designed for images of `base` x `base` pixels.
            resolution: the side length of the images, in pixels.
            base: the side length that the schedule was designed for, in pixels.
        """
        check_number("Shifted", "resolution", resolution, 1)
        check_number("Shifted", "base", base, 1)
        return cls(schedule, float(2.0 * np.log(base / resolution)))

    @classmethod
    def for_tokens(
        cls,
        schedule,
        tokens: int,
        base_tokens: int = 256,
        max_tokens: int = 4096,
        base_mu: float = 0.5,
        max_mu: float = 1.15,
    ) -> Self:
        """The resolution-dependent shift of Flux: shift = -2 mu, with mu linear in the number of tokens,

            mu = base_mu + (max_mu - base_mu) (tokens - base_tokens) / (max_tokens - base_tokens).

        It equals `by_factor` with the factor e^mu. The defaults are those of the published sampling code of Flux.1 dev
        (Black Forest Labs 2024, no paper), which diffusers calls "dynamic shifting".

        Args:
            schedule: the schedule to shift; `Rectified` in Flux.
            tokens: the length of the transformer's sequence, (height / patch) (width / patch).
            base_tokens: the number of tokens at which mu is `base_mu`.
            max_tokens: the number of tokens at which mu is `max_mu`.
            base_mu: the increase of log(sigma / alpha) at `base_tokens`.
            max_mu: the increase of log(sigma / alpha) at `max_tokens`.
        """
        return cls(schedule, -2.0 * token_mu("Shifted", tokens, base_tokens, max_tokens, base_mu, max_mu))

    def log_snr(self, t):
        return self.schedule.log_snr(t) + self.shift

    def time(self, log_snr):
        return self.schedule.time(ops.convert_to_tensor(log_snr, "float32") - self.shift)

    def scales(self, log_snr):
        return self.schedule.scales(log_snr)

    def slope(self, t):
        """The slope of the wrapped schedule: a constant shift does not change it."""
        return self.schedule.slope(t)


class ZeroTerminalSNR(NoiseSchedule):
    """A schedule rescaled to zero terminal SNR, which ends in pure noise (Lin et al. 2024, arXiv:2305.08891, alg. 1):

        alpha'(t) = (alpha(t) - alpha(1)) alpha_0 / (alpha_0 - alpha(1)),   sigma'^2 = 1 - alpha'^2,

    where alpha_0 is the alpha of the first step of a discrete process, or alpha(0) of a continuous one; it does not
    change. alpha is that of the variance preserving normalisation, sqrt(sigmoid(log_snr)); the new log-SNR is then
    used with the normalisation of the schedule.

    The log-SNR at t = 1 would be minus infinity and is set to `min_log_snr`; at -40 alpha is 2e-9. A network that
    predicts the noise cannot be sampled from there, because x_hat is divided by alpha. One that predicts the velocity,
    the data or the flow can, which is why the paper changes the prediction along with the schedule.

    Args:
        schedule: a `NoiseSchedule` or its name, with bounded sigma.
        min_log_snr: the log-SNR at t = 1. None: -40, or less if the log-SNR of the preceding step is close to that.
    """

    def __init__(self, schedule, min_log_snr: float | None = None):
        super().__init__()
        self.schedule, self.min_log_snr = NoiseSchedule.get(schedule), min_log_snr
        self.num_steps = self.schedule.num_steps
        end = float(_number(self.schedule.log_snr(1.0)))
        if min_log_snr is not None:
            check_number("ZeroTerminalSNR", "min_log_snr", min_log_snr, -80.0, end - 1.0)
        if _number(self.schedule.scales(ops.convert_to_tensor(min(-40.0, end), "float32"))[1]) > 10.0:
            raise ValueError(
                f"ZeroTerminalSNR: the sigma of {self.schedule!r} is without bound; use a schedule whose sigma ends "
                "near 1, such as a variance preserving one or Rectified"
            )
        if self.num_steps == 1:
            raise ValueError(f"ZeroTerminalSNR: a schedule of one step cannot be rescaled; received: {self.schedule!r}")
        self._rescaled = (_RescaledTable if self.num_steps else _Rescaled)(self.schedule, min_log_snr)

    def log_snr(self, t):
        """log(alpha'^2 / (1 - alpha'^2)), at least the log-SNR at t = 1."""
        return self._rescaled.log_snr(t)

    def time(self, log_snr):
        """The time of the wrapped schedule with alpha = alpha' (alpha_0 - alpha(1)) / alpha_0 + alpha(1)."""
        return self._rescaled.time(log_snr)

    def scales(self, log_snr):
        return self.schedule.scales(log_snr)

    def slope(self, t):
        """By the chain rule; for a discrete process, as for any table."""
        return self._rescaled.slope(t)


class _RescaledTable(_Table):
    """Algorithm 1 for a discrete process: a new table, computed in float64."""

    def __init__(self, schedule, min_log_snr):
        times = np.arange(1, schedule.num_steps + 1) / schedule.num_steps
        log_snrs = schedule.log_snrs[1:] if isinstance(schedule, _Table) else _number(schedule.log_snr(times))
        alpha = np.sqrt(1.0 / (1.0 + np.exp(-log_snrs.astype("float64"))))
        alpha = (alpha - alpha[-1]) * alpha[0] / (alpha[0] - alpha[-1])
        with np.errstate(divide="ignore"):  # log(0) at the end
            log_snrs = 2.0 * np.log(alpha) - np.log1p(-(alpha**2))
        lowest = min(-40.0, log_snrs[-2] - 1.0) if min_log_snr is None else min_log_snr
        super().__init__(np.maximum(log_snrs, lowest))
        self.schedule, self.min_log_snr = schedule, min_log_snr  # for the hash, which compiling a model needs


class _Rescaled(NoiseSchedule):
    """Algorithm 1 for a continuous schedule. Near t = 0 it is computed from d = 1 - alpha, to keep precision."""

    def __init__(self, schedule, min_log_snr):
        super().__init__()
        self.schedule, self.min_log_snr = schedule, min_log_snr
        first, last = _number(schedule.log_snr(np.array([0.0, 1.0]))).astype("float64")
        self.lowest = min(-40.0, last - 1.0) if min_log_snr is None else min_log_snr
        first, self.last = (float(np.sqrt(1.0 / (1.0 + np.exp(-end)))) for end in (first, last))
        self.factor = first / (first - self.last)
        self.offset = 1.0 - self.factor * (1.0 - self.last)  # 1 - alpha' = factor d + offset

    def log_snr(self, t):
        alpha, d = self._new(self._old(t))
        return ops.maximum(_log_snr(alpha, d), self.lowest)

    def time(self, log_snr):
        alpha, d = _alpha(ops.convert_to_tensor(log_snr, "float32"))
        return self.schedule.time(_log_snr(alpha / self.factor + self.last, (d - self.offset) / self.factor))

    def slope(self, t):
        """(alpha sigma^2 / alpha' sigma'^2) (d alpha' / d alpha) slope; d log_snr / d alpha = 2 / (alpha sigma^2)."""
        old = self._old(t)
        alpha, d = self._new(old)
        ratio = old[0] * old[1] * (1.0 + old[0]) / (alpha * d * (1.0 + alpha))
        return self.factor * ratio * self.schedule.slope(t)

    def _old(self, t):
        return _alpha(self.schedule.log_snr(t))

    def _new(self, old):
        """(alpha', 1 - alpha'); alpha' is at least its value at t = 1."""
        alpha, d = old
        lowest = float(np.exp(self.lowest / 2))
        return ops.maximum(self.factor * (alpha - self.last), lowest), self.factor * d + self.offset


def _alpha(log_snr):
    """(alpha, 1 - alpha) for the variance preserving normalisation."""
    alpha = ops.sqrt(ops.sigmoid(log_snr))
    return alpha, ops.sigmoid(-log_snr) / (1.0 + alpha)


def _log_snr(alpha, d):
    """log(alpha^2 / (1 - alpha^2)), where d = 1 - alpha."""
    return 2.0 * ops.log(alpha) - ops.log(d * (1.0 + alpha))


def _number(tensor) -> np.ndarray:
    return ops.convert_to_numpy(tensor)
