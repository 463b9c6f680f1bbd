"""Discrete processes: T steps given by a table, with log_snr linear in t between its entries.

Entry i = 0 ... T - 1 is at t = (i + 1) / T. At t = 0, which no table includes, the log-SNR is `CLEAN_LOG_SNR`.
"""

import numpy as np
from keras import ops

from kdiff import backend
from kdiff.base import check_integer, check_number
from kdiff.schedules.base import CLEAN_LOG_SNR, NoiseSchedule

__all__ = [
    "LARGEST",
    "MOST_STEPS",
    "AlphaBarTable",
    "BetaTable",
    "CosineBeta",
    "LinearBeta",
    "ScaledLinearBeta",
    "SigmoidBeta",
    "check_ends",
]


LARGEST = 80.0  # the largest |log-SNR|, beyond which alpha^2 or sigma^2 underflows float32
MOST_STEPS = 1_000_000


def check_ends(owner: str, log_snrs: np.ndarray) -> None:
    """Raises a ValueError if alpha or sigma underflows float32 at one of these log-SNRs."""
    if not np.all(np.abs(log_snrs) <= LARGEST):
        raise ValueError(
            f"{owner}: log-SNR must lie in [{-LARGEST:g}, {LARGEST:g}], or alpha or sigma underflows float32; received "
            f"values from {np.max(log_snrs):.4g} to {np.min(log_snrs):.4g}"
        )


class _Table(NoiseSchedule):
    """A discrete process given by its log-SNRs, float64, with shape `(T,)`; variance preserving."""

    def __init__(self, log_snrs):
        super().__init__()
        check_ends(type(self).__name__, log_snrs)
        self.num_steps = len(log_snrs)
        self.log_snrs = np.append(max(CLEAN_LOG_SNR, log_snrs[0] + 1.0), log_snrs)
        if not np.all(np.diff(self.log_snrs.astype("float32")) < 0):
            raise ValueError(
                f"{type(self).__name__}: log-SNR must decrease at each step by more than the float32 resolution, about "
                f"1e-6; the smallest decrease is {-np.diff(self.log_snrs).max():.1e}"
            )

    def log_snr(self, t):
        """Interpolates the table, linearly in t."""
        place = self._place(t)
        index = ops.cast(ops.clip(ops.floor(place), 0, self.num_steps - 1), "int32")
        left, right = self._neighbours(index)
        return left + (place - ops.cast(index, "float32")) * (right - left)

    def time(self, log_snr):
        """Inverts the table, linearly in log_snr between its entries."""
        log_snr = ops.convert_to_tensor(log_snr, "float32")
        table = backend.tensor(self.log_snrs, "float32")
        not_below = ops.sum(ops.cast(ops.less_equal(log_snr[..., None], table), "int32"), axis=-1)
        index = ops.clip(not_below - 1, 0, self.num_steps - 1)
        left, right = self._neighbours(index)
        place = ops.cast(index, "float32") + (log_snr - left) / (right - left)
        return ops.clip(place / self.num_steps, 0.0, 1.0)

    def slope(self, t):
        """T (log_snr_i - log_snr_(i-1)), for the interval that contains t or ends at it.

        The first interval begins at the arbitrary `CLEAN_LOG_SNR`, so there the slope of the second is used.
        """
        # A hundredth of a step is subtracted, so that the rounding of t T does not move a step into the next interval.
        index = ops.clip(ops.ceil(self._place(t) - 0.01) - 1, min(1, self.num_steps - 1), self.num_steps - 1)
        left, right = self._neighbours(ops.cast(index, "int32"))
        return self.num_steps * (right - left)

    def _place(self, t):
        return ops.clip(ops.convert_to_tensor(t, "float32"), 0.0, 1.0) * self.num_steps

    def _neighbours(self, index):
        table = backend.tensor(self.log_snrs, "float32")
        return ops.take(table, index), ops.take(table, index + 1)


class BetaTable(_Table):
    """A discrete process given by its betas: alpha_bar_i = prod_{j <= i} (1 - beta_j) = alpha^2, variance preserving.

    Ho et al. 2020, section 2.

    Args:
        betas: the variances of the steps of the forward process, each in (0, 1), with shape `(T,)`.

    Raises:
        ValueError: if a beta is not in (0, 1).
    """

    def __init__(self, betas):
        name, betas = type(self).__name__, np.asarray(betas, "float64")
        _check_shape(name, "betas", betas)
        if not np.all((betas > 0) & (betas < 1)):
            raise ValueError(
                f"{name}: `betas` must lie in (0, 1), so that alpha decreases; "
                f"received values from {betas.min()} to {betas.max()}"
            )
        log_alpha_bar = np.cumsum(np.log1p(-betas))
        super().__init__(log_alpha_bar - np.log(-np.expm1(log_alpha_bar)))
        self.betas = betas


class AlphaBarTable(_Table):
    """A discrete process given by its alpha-bars, alpha_bar_i = alpha^2 after step i, variance preserving.

    Ho et al. 2020, section 2.

    Args:
        alpha_bars: strictly decreasing values in (0, 1), with shape `(T,)`.

    Raises:
        ValueError: if they are not strictly decreasing or not in (0, 1).
    """

    def __init__(self, alpha_bars):
        name, alpha_bars = type(self).__name__, np.asarray(alpha_bars, "float64")
        _check_shape(name, "alpha_bars", alpha_bars)
        if not (np.all((alpha_bars > 0) & (alpha_bars < 1)) and np.all(np.diff(alpha_bars) < 0)):
            raise ValueError(
                f"{name}: `alpha_bars` must lie in (0, 1) and decrease from step to step; received: {alpha_bars}"
            )
        super().__init__(np.log(alpha_bars) - np.log1p(-alpha_bars))
        self.alpha_bars = alpha_bars


class LinearBeta(BetaTable):
    """The linear schedule of DDPM (Ho et al. 2020, section 4): beta_i is linear in i.

    Args:
        num_steps: the number of steps T.
        beta_start: the first beta.
        beta_end: the last beta.
    """

    def __init__(self, num_steps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02):
        _check_steps("LinearBeta", num_steps)
        super().__init__(np.linspace(beta_start, beta_end, num_steps))
        self.beta_start, self.beta_end = beta_start, beta_end


class ScaledLinearBeta(BetaTable):
    """The schedule of Stable Diffusion (Rombach et al. 2022, arXiv:2112.10752): sqrt(beta_i) is linear in i.

    Args:
        num_steps: the number of steps T.
        beta_start: the first beta.
        beta_end: the last beta.
    """

    def __init__(self, num_steps: int = 1000, beta_start: float = 0.00085, beta_end: float = 0.012):
        _check_steps("ScaledLinearBeta", num_steps)
        check_number("ScaledLinearBeta", "beta_start", beta_start, 0.0, 1.0)
        check_number("ScaledLinearBeta", "beta_end", beta_end, 0.0, 1.0)
        super().__init__(np.linspace(beta_start**0.5, beta_end**0.5, num_steps) ** 2)
        self.beta_start, self.beta_end = beta_start, beta_end


class CosineBeta(BetaTable):
    """The cosine schedule of improved DDPM (Nichol and Dhariwal 2021, eq. 17):

        alpha_bar(t) = f(t) / f(0),    f(t) = cos^2((t + s) / (1 + s) pi / 2),
        beta_i = 1 - alpha_bar((i + 1) / T) / alpha_bar(i / T), clipped to [min_beta, max_beta].

    PyTorch tutorials often clip to [1e-4, 0.9999].

    Args:
        num_steps: the number of steps T.
        s: the offset that prevents the first betas from being too small.
        max_beta: the upper limit of beta, which avoids the singularity at t = 1.
        min_beta: the lower limit of beta.
    """

    def __init__(self, num_steps: int = 1000, s: float = 0.008, max_beta: float = 0.999, min_beta: float = 0.0):
        _check_steps("CosineBeta", num_steps)
        check_number("CosineBeta", "s", s, 0.0)
        check_number("CosineBeta", "max_beta", max_beta, 0.0, 1.0)
        check_number("CosineBeta", "min_beta", min_beta, 0.0, max_beta)
        alpha_bar = np.cos((np.linspace(0.0, 1.0, num_steps + 1) + s) / (1.0 + s) * np.pi / 2) ** 2
        super().__init__(np.clip(1.0 - alpha_bar[1:] / alpha_bar[:-1], min_beta, max_beta))
        self.s, self.max_beta, self.min_beta = s, max_beta, min_beta


class SigmoidBeta(BetaTable):
    """The sigmoid schedule of GeoDiff (Xu et al. 2022, arXiv:2203.02923), "sigmoid" in diffusers:

        beta_i = beta_start + sigmoid(u_i) (beta_end - beta_start),    u_i linear in i, from -6 to 6.

    In the different schedule `SigmoidAlphaBar`, alpha_bar is a sigmoid.

    Args:
        num_steps: the number of steps T.
        beta_start: the lower limit of beta, slightly below the first one.
        beta_end: the upper limit of beta, slightly above the last one.
    """

    def __init__(self, num_steps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02):
        _check_steps("SigmoidBeta", num_steps)
        rise = 1.0 / (1.0 + np.exp(-np.linspace(-6.0, 6.0, num_steps)))
        super().__init__(beta_start + rise * (beta_end - beta_start))
        self.beta_start, self.beta_end = beta_start, beta_end


def _check_steps(name: str, num_steps: int) -> None:
    check_integer(name, "num_steps", num_steps)
    if num_steps > MOST_STEPS:
        raise ValueError(f"{name}: `num_steps` must be at most {MOST_STEPS}; received: {num_steps}")


def _check_shape(name: str, argument: str, table: np.ndarray) -> None:
    if table.ndim != 1 or table.size == 0:
        raise ValueError(f"{name}: `{argument}` must have shape (T,); received: {table.shape}")
