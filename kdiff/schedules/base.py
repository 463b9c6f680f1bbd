"""Noise schedules: how much signal and how much noise there is at each time.

A Gaussian diffusion process mixes data `x` with standard normal `noise`,

    x_t = alpha(t) x + sigma(t) noise,        q(x_t | x) = N(alpha x, sigma^2 I),

from t = 0, data, to t = 1, noise. All that matters is the signal-to-noise ratio alpha^2 / sigma^2, or its logarithm

    log_snr(t) = 2 log(alpha / sigma),

which decreases in t, and how the pair is normalised. A schedule is therefore one function, `log_snr(t)`, with its
inverse, `time(log_snr)`, and one normalisation, `scales(log_snr) = (alpha, sigma)`:

    variance preserving     alpha^2 + sigma^2 = 1     alpha = sqrt(sigmoid(l)),   sigma = sqrt(sigmoid(-l))
    interpolant             alpha + sigma = 1         alpha = sigmoid(l / 2),     sigma = sigmoid(-l / 2)

A discrete process of T steps, given by a table of betas, is the continuous one read at t = (i + 1) / T,
i = 0 ... T - 1; between the entries of the table log_snr is linear in t. Tables are computed in float64 and are
constants, not weights; everything that depends on t is float32.

Sources: Ho et al. 2020 (DDPM), arXiv:2006.11239; Kingma et al. 2021 (variational diffusion models),
arXiv:2107.00630; Nichol and Dhariwal 2021 (improved DDPM), arXiv:2102.09672; Hoogeboom et al. 2023 (simple
diffusion), arXiv:2301.11093; Liu et al. 2022 (rectified flow), arXiv:2209.03003.
"""

from typing import Any, NamedTuple, Self

import keras
import numpy as np
from keras import ops

from kdiff.base import Value, check_integer, check_number

# At t = 0 a table has no noise at all. Its log-SNR is written as 40, sigma = 2e-9, so that no infinity arises.
CLEAN_LOG_SNR = 40.0


class Marginal(NamedTuple):
    """q(x_t | x) = N(alpha x, sigma^2 I) at time t. The four fields share one shape: `()`, or `(batch,)`."""

    t: Any
    alpha: Any
    sigma: Any
    log_snr: Any

    def like(self, x) -> Self:
        """The same numbers with axes of length 1 added, so that they broadcast against the batch `x`."""
        axes = (..., *[None] * (len(x.shape) - 1))
        return Marginal(*(v[axes] if len(v.shape) == 1 else v for v in self))


def bridge(now: Marginal, then: Marginal):
    """(kept, fresh), the two numbers of a step back in time, from x_now to x_then:

        kept = (alpha_now sigma_then^2) / (alpha_then sigma_now^2),    fresh = 1 - SNR_now / SNR_then.

    `fresh` is written -expm1(log_snr_now - log_snr_then), which does not cancel near t = 0.
    """
    kept = now.alpha * then.sigma**2 / (then.alpha * now.sigma**2)
    return kept, -ops.expm1(now.log_snr - then.log_snr)


class NoiseSchedule(Value, keras.layers.Layer):
    """The base of all schedules: a Keras layer without weights that computes in float32 under any policy.

    A new schedule defines `log_snr` and `time`, and `scales` if it is not variance preserving:

        class Linear(NoiseSchedule):
            def log_snr(self, t):
                return 10.0 - 20.0 * t
            def time(self, log_snr):
                return (10.0 - log_snr) / 20.0

    Attributes:
        num_steps: the number of steps T of a discrete process; None if the schedule is continuous.
    """

    num_steps: int | None = None

    def __init__(self):
        super().__init__(dtype="float32", autocast=False)
        self.built = True

    def log_snr(self, t):
        """log(alpha^2 / sigma^2) at t in [0, 1]; decreasing in t. Any shape; returns float32 of the same shape."""
        raise NotImplementedError

    def time(self, log_snr):
        """The inverse of `log_snr`: the t in [0, 1] at which it has this value."""
        raise NotImplementedError

    def scales(self, log_snr):
        """(alpha, sigma) from the log-SNR; variance preserving unless overridden."""
        return ops.sqrt(ops.sigmoid(log_snr)), ops.sqrt(ops.sigmoid(-log_snr))

    def snr(self, t):
        """The signal-to-noise ratio alpha^2 / sigma^2 = exp(log_snr) at `t`."""
        return ops.exp(self.log_snr(t))

    def at(self, t) -> Marginal:
        """The marginal q(x_t | x) at times `t`, of any shape."""
        t = ops.convert_to_tensor(t, "float32")
        log_snr = self.log_snr(t)
        return Marginal(t, *self.scales(log_snr), log_snr)

    def at_log_snr(self, log_snr) -> Marginal:
        """The marginal with this log-SNR, of any shape."""
        log_snr = ops.convert_to_tensor(log_snr, "float32")
        return Marginal(self.time(log_snr), *self.scales(log_snr), log_snr)

    def call(self, x, noise, t):
        """The forward process, x_t = alpha x + sigma noise (DDPM eq. 4).

        Args:
            x: data, with shape `(batch, ...)`.
            noise: standard normal noise of the same shape.
            t: times in [0, 1], with shape `(batch,)` or `()`.
        """
        x, noise = ops.convert_to_tensor(x, "float32"), ops.convert_to_tensor(noise, "float32")
        m = self.at(t).like(x)
        return m.alpha * x + m.sigma * noise

    def posterior(self, x, x_t, now: Marginal, then: Marginal):
        """q(x_then | x_now, x), exactly, for then.t < now.t (DDPM eqs. 6 and 7, for any schedule):

            mean = (alpha_now sigma_then^2) / (alpha_then sigma_now^2) x_now + alpha_then (1 - r) x
            variance = sigma_then^2 (1 - r),       r = SNR_now / SNR_then

        Returns:
            The mean, of the shape of `x`, and the variance, which broadcasts against it.
        """
        x, x_t = ops.convert_to_tensor(x, "float32"), ops.convert_to_tensor(x_t, "float32")
        now, then = now.like(x), then.like(x)
        kept, fresh = bridge(now, then)
        return kept * x_t + then.alpha * fresh * x, then.sigma**2 * fresh

    def compute_output_shape(self, x_shape, *_):
        """The forward process keeps the shape."""
        return x_shape

    def plot(self, path: str | None = None, points: int = 400):
        """Draws alpha, sigma and log-SNR against t; with `path`, writes the figure there.

        Returns:
            The matplotlib figure. Needs matplotlib (the extra `plot`).
        """
        from matplotlib.figure import Figure

        t = np.linspace(0.0, 1.0, points)
        m = Marginal(*(ops.convert_to_numpy(v) for v in self.at(t)))
        figure = Figure(figsize=(8, 3), layout="constrained")
        scales, ratio = figure.subplots(1, 2)
        scales.plot(t, m.alpha, label="alpha")
        scales.plot(t, m.sigma, label="sigma")
        scales.legend()
        ratio.plot(t, m.log_snr)
        ratio.set_ylabel("log-SNR")
        for axes in (scales, ratio):
            axes.set_xlabel("t  (0 = data, 1 = noise)")
        figure.suptitle(repr(self))
        if path is not None:
            figure.savefig(path)
        return figure


class BetaTable(NoiseSchedule):
    """A discrete process given by its betas: alpha_bar_i = prod_{j <= i} (1 - beta_j) = alpha^2, variance preserving.

    Args:
        betas: the variance of each step of the forward process, each in (0, 1), with shape `(T,)`.

    Raises:
        ValueError: if a beta is not in (0, 1), so that alpha would not decrease.
    """

    def __init__(self, betas):
        super().__init__()
        self.betas = np.asarray(betas, "float64")
        if self.betas.ndim != 1 or self.betas.size == 0:
            raise ValueError(f"{type(self).__name__}: `betas` must have shape (T,); received: {self.betas.shape}")
        if not np.all((self.betas > 0) & (self.betas < 1)):
            raise ValueError(
                f"{type(self).__name__}: `betas` must lie in (0, 1), so that alpha decreases; "
                f"received numbers from {self.betas.min()} to {self.betas.max()}"
            )
        log_alpha_bar = np.cumsum(np.log1p(-self.betas))
        log_snr = log_alpha_bar - np.log(-np.expm1(log_alpha_bar))
        self.num_steps = len(self.betas)
        self.log_snrs = np.append(max(CLEAN_LOG_SNR, log_snr[0] + 1.0), log_snr).astype("float32")

    def log_snr(self, t):
        """Read from the table, linear in t between its entries."""
        place = ops.clip(ops.convert_to_tensor(t, "float32"), 0.0, 1.0) * self.num_steps
        index = ops.cast(ops.clip(ops.floor(place), 0, self.num_steps - 1), "int32")
        left, right = self._neighbours(index)
        return left + (place - ops.cast(index, "float32")) * (right - left)

    def time(self, log_snr):
        """The place in the table, linear in log_snr between its entries."""
        log_snr = ops.convert_to_tensor(log_snr, "float32")
        not_below = ops.sum(ops.cast(ops.less_equal(log_snr[..., None], self.log_snrs), "int32"), axis=-1)
        index = ops.clip(not_below - 1, 0, self.num_steps - 1)
        left, right = self._neighbours(index)
        place = ops.cast(index, "float32") + (log_snr - left) / (right - left)
        return ops.clip(place / self.num_steps, 0.0, 1.0)

    def _neighbours(self, index):
        table = ops.convert_to_tensor(self.log_snrs)
        return ops.take(table, index), ops.take(table, index + 1)


class LinearBeta(BetaTable):
    """The linear table of DDPM (Ho et al. 2020, section 4): beta rises in equal steps.

    Args:
        num_steps: the number of steps T.
        beta_start: the first beta.
        beta_end: the last beta.
    """

    def __init__(self, num_steps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02):
        check_integer("LinearBeta", "num_steps", num_steps)
        super().__init__(np.linspace(beta_start, beta_end, num_steps))
        self.beta_start, self.beta_end = beta_start, beta_end


class ScaledLinearBeta(BetaTable):
    """The table of Stable Diffusion (Rombach et al. 2022, arXiv:2112.10752): sqrt(beta) rises in equal steps.

    Args:
        num_steps: the number of steps T.
        beta_start: the first beta.
        beta_end: the last beta.
    """

    def __init__(self, num_steps: int = 1000, beta_start: float = 0.00085, beta_end: float = 0.012):
        check_integer("ScaledLinearBeta", "num_steps", num_steps)
        check_number("ScaledLinearBeta", "beta_start", beta_start, 0.0, 1.0)
        check_number("ScaledLinearBeta", "beta_end", beta_end, 0.0, 1.0)
        super().__init__(np.linspace(beta_start**0.5, beta_end**0.5, num_steps) ** 2)
        self.beta_start, self.beta_end = beta_start, beta_end


class CosineBeta(BetaTable):
    """The cosine table of improved DDPM (Nichol and Dhariwal 2021, eq. 17):

        alpha_bar(t) = f(t) / f(0),    f(t) = cos^2((t + s) / (1 + s) pi / 2),
        beta_i = min(1 - alpha_bar((i + 1) / T) / alpha_bar(i / T), max_beta).

    Args:
        num_steps: the number of steps T.
        s: the offset that keeps the first betas from being too small.
        max_beta: betas are clipped here, below the singularity at t = 1.
    """

    def __init__(self, num_steps: int = 1000, s: float = 0.008, max_beta: float = 0.999):
        check_integer("CosineBeta", "num_steps", num_steps)
        check_number("CosineBeta", "s", s, 0.0)
        alpha_bar = np.cos((np.linspace(0.0, 1.0, num_steps + 1) + s) / (1.0 + s) * np.pi / 2) ** 2
        super().__init__(np.minimum(1.0 - alpha_bar[1:] / alpha_bar[:-1], max_beta))
        self.s, self.max_beta = s, max_beta


class Cosine(NoiseSchedule):
    """The continuous cosine schedule (Hoogeboom et al. 2023, section 2), variance preserving:

        alpha = cos(u),  sigma = sin(u),  log_snr = -2 log tan(u),

    with the angle u linear in t, from the one at which log_snr is `max_log_snr` to the one at which it is
    `min_log_snr`.

    Args:
        min_log_snr: log-SNR at t = 1.
        max_log_snr: log-SNR at t = 0.
    """

    def __init__(self, min_log_snr: float = -15.0, max_log_snr: float = 15.0):
        super().__init__()
        check_number("Cosine", "min_log_snr", min_log_snr, -40.0, 40.0)
        check_number("Cosine", "max_log_snr", max_log_snr, min_log_snr, 40.0)
        if min_log_snr == max_log_snr:
            raise ValueError(f"Cosine: `max_log_snr` must exceed `min_log_snr`; both are {min_log_snr}")
        self.min_log_snr, self.max_log_snr = min_log_snr, max_log_snr
        self.first = float(np.arctan(np.exp(-max_log_snr / 2)))  # u at t = 0
        self.rest = float(np.arctan(np.exp(min_log_snr / 2)))  # pi / 2 - u at t = 1
        self.span = np.pi / 2 - self.first - self.rest

    def log_snr(self, t):
        """-2 log tan(u); near t = 1 from pi / 2 - u, because tan(u) loses its digits there."""
        t = ops.convert_to_tensor(t, "float32")
        early = -2.0 * ops.log(ops.tan(self.first + self.span * ops.minimum(t, 0.5)))
        late = 2.0 * ops.log(ops.tan(self.rest + self.span * ops.minimum(1.0 - t, 0.5)))
        return ops.where(t < 0.5, early, late)

    def time(self, log_snr):
        """(u - u(0)) / (u(1) - u(0)), u = arctan(exp(-log_snr / 2))."""
        half = ops.convert_to_tensor(log_snr, "float32") / 2
        return (ops.arctan(ops.exp(-half)) - self.first) / self.span


class Rectified(NoiseSchedule):
    """Rectified flow (Liu et al. 2022, eq. 1): the straight line from data to noise,

        alpha = 1 - t,  sigma = t,  log_snr = 2 log(alpha / sigma),

    drawn a hair short at both ends, sigma = `epsilon` + (1 - 2 `epsilon`) t, so that log_snr stays finite.

    Args:
        epsilon: what is kept of the noise at t = 0, and of the data at t = 1.
    """

    def __init__(self, epsilon: float = 1e-5):
        super().__init__()
        check_number("Rectified", "epsilon", epsilon, 1e-8, 0.1)
        self.epsilon = epsilon

    def log_snr(self, t):
        """2 log(alpha / sigma)."""
        t = ops.convert_to_tensor(t, "float32")
        slope = 1.0 - 2.0 * self.epsilon
        return 2.0 * ops.log((self.epsilon + slope * (1.0 - t)) / (self.epsilon + slope * t))

    def time(self, log_snr):
        """From sigma = sigmoid(-log_snr / 2)."""
        sigma = ops.sigmoid(-ops.convert_to_tensor(log_snr, "float32") / 2)
        return (sigma - self.epsilon) / (1.0 - 2.0 * self.epsilon)

    def scales(self, log_snr):
        """(sigmoid(log_snr / 2), sigmoid(-log_snr / 2)): alpha + sigma = 1."""
        return ops.sigmoid(log_snr / 2), ops.sigmoid(-log_snr / 2)
