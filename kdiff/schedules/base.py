"""Noise schedules: the amounts of signal and noise at each time.

A Gaussian diffusion process mixes data `x` with standard normal `noise`,

    x_t = alpha(t) x + sigma(t) noise,        q(x_t | x) = N(alpha x, sigma^2 I),

from data at t = 0 to noise at t = 1. It is determined by the signal-to-noise ratio alpha^2 / sigma^2, or its logarithm

    log_snr(t) = 2 log(alpha / sigma),

which decreases in t, and by the normalisation of the pair. A schedule is therefore one function, `log_snr(t)`, with
its inverse, `time(log_snr)`, and one normalisation, `scales(log_snr) = (alpha, sigma)`:

    variance preserving     alpha^2 + sigma^2 = 1     alpha = sqrt(sigmoid(l)),   sigma = sqrt(sigmoid(-l))
    variance exploding      alpha = 1                                             sigma = exp(-l / 2)
    interpolant             alpha + sigma = 1         alpha = sigmoid(l / 2),     sigma = sigmoid(-l / 2)
    sub-variance-preserving alpha^2 + sigma = 1       alpha = exp(l / 2) sigma,   sigma = 2 / (1 + sqrt(1 + 4 e^l))

A discrete process of T steps, given by a table, is the continuous process evaluated at t = (i + 1) / T,
i = 0 ... T - 1; between the entries of the table log_snr is linear in t. Tables are computed in float64 and are
constants, not weights; everything that depends on t is float32. If the formula of a continuous schedule has an
infinite log-SNR at one end, the schedule is truncated there by a small `epsilon`, which its documentation states.

Sources: Ho et al. 2020 (DDPM), arXiv:2006.11239; Kingma et al. 2021 (variational diffusion models),
arXiv:2107.00630; Nichol and Dhariwal 2021 (improved DDPM), arXiv:2102.09672; Hoogeboom et al. 2023 (simple
diffusion), arXiv:2301.11093; Liu et al. 2022 (rectified flow), arXiv:2209.03003; Song et al. 2021 (score SDEs),
arXiv:2011.13456; Karras et al. 2022 (EDM), arXiv:2206.00364.
"""

from typing import Any, ClassVar, NamedTuple, Self

import keras
import numpy as np
from keras import ops

from kdiff import backend
from kdiff.base import Value, needs
from kdiff.writing import replacing

__all__ = ["CLEAN_LOG_SNR", "Marginal", "NoiseSchedule", "bridge"]

# At t = 0 a table has no noise. Its log-SNR is set to 40, sigma = 2e-9, so that no infinity arises.
CLEAN_LOG_SNR = 40.0


class Marginal(NamedTuple):
    """q(x_t | x) = N(alpha x, sigma^2 I) at time t. The four fields share one shape: `()`, or `(batch,)`."""

    t: Any
    alpha: Any
    sigma: Any
    log_snr: Any

    def like(self, x) -> Self:
        """The same values with axes of length 1 appended, so that they broadcast against the batch `x`."""
        axes = (..., *[None] * (len(x.shape) - 1))
        return Marginal(*(v[axes] if len(v.shape) == 1 else v for v in self))


def bridge(now: Marginal, then: Marginal):
    """(kept, fresh), the two coefficients of a step of the reverse process from x_now to x_then:

        kept = (alpha_now sigma_then^2) / (alpha_then sigma_now^2),    fresh = 1 - SNR_now / SNR_then.

    `fresh` is computed as -expm1(log_snr_now - log_snr_then), which does not cancel near t = 0.
    """
    kept = now.alpha * then.sigma**2 / (then.alpha * now.sigma**2)
    return kept, -ops.expm1(now.log_snr - then.log_snr)


class NoiseSchedule(Value, keras.layers.Layer):
    """The base class of all schedules: a Keras layer that computes in float32 under any dtype policy.

    A schedule with weights, or one that wraps such a schedule, is equal only to itself.

    A new schedule defines `log_snr` and `time`, and also `scales` if it is not variance preserving:

        class Linear(NoiseSchedule):
            def log_snr(self, t):
                return 10.0 - 20.0 * t
            def time(self, log_snr):
                return (10.0 - log_snr) / 20.0

    Attributes:
        num_steps: the number of steps T of a discrete process; None if the schedule is continuous.
    """

    aliases: ClassVar = {
        "linear": "linear_beta",  # as diffusers and Ho et al. (2020) call it
        "scaledlinear": "scaled_linear_beta",
        "squaredcoscapv2": "cosine_beta",
        "sigmoid": "sigmoid_beta",
    }
    num_steps: int | None = None

    def __init__(self):
        super().__init__(dtype="float32", autocast=False)
        self.built = True

    def __eq__(self, other: object) -> bool:
        return self is other or (not self.weights and super().__eq__(other))

    __hash__ = Value.__hash__

    def log_snr(self, t):
        """log(alpha^2 / sigma^2) at t in [0, 1], decreasing in t. `t` has any shape; the result is float32."""
        raise NotImplementedError

    def time(self, log_snr):
        """The inverse of `log_snr`: the t in [0, 1] with this log-SNR."""
        raise NotImplementedError

    def scales(self, log_snr):
        """(alpha, sigma) as a function of the log-SNR; variance preserving unless overridden."""
        return ops.sqrt(ops.sigmoid(log_snr)), ops.sqrt(ops.sigmoid(-log_snr))

    @property
    def first_time(self) -> float:
        """The lowest time in training and sampling: 1 / T for a discrete process, 0 for a continuous one."""
        return 0.0 if self.num_steps is None else 1.0 / self.num_steps

    def log_snr_ends(self) -> tuple:
        """(largest, smallest) log-SNR, at `first_time` and at t = 1, as scalar tensors."""
        ends = self.log_snr(ops.convert_to_tensor([self.first_time, 1.0], "float32"))
        return ends[0], ends[1]

    def snr(self, t):
        """The signal-to-noise ratio alpha^2 / sigma^2 = exp(log_snr) at `t`."""
        return ops.exp(self.at(t).log_snr)

    def slope(self, t):
        """d log_snr / dt at t in [0, 1], negative. `t` has any shape; the result is float32.

        The default is a central difference over t +- 0.001, clipped to [0, 1]. Every schedule of kdiff overrides it
        with its own formula; a discrete process uses the difference between two adjacent steps.
        """
        t = ops.convert_to_tensor(t, "float32")
        before, after = ops.maximum(t - 1e-3, 0.0), ops.minimum(t + 1e-3, 1.0)
        return (self.log_snr(after) - self.log_snr(before)) / (after - before)

    def at(self, t) -> Marginal:
        """The marginal q(x_t | x) at times `t` in [0, 1], of any shape.

        Raises:
            ValueError: if a time is not in [0, 1]; not checked for symbolic tensors inside a compiled function.
        """
        self._check_times(t)
        t = ops.convert_to_tensor(t, "float32")
        log_snr = self.log_snr(t)
        return Marginal(t, *self.scales(log_snr), log_snr)

    def sampled_at(self, t) -> Marginal:
        """The marginal at times `t` of a sampling run: as `at`, except that t = 0 is data without noise.

        So a run ends at the data even if the schedule itself is truncated, or ends at EDM's sigma of 0.002.
        """
        self._check_times(t)
        t = ops.convert_to_tensor(t, "float32")
        log_snr = self.log_snr(t)
        log_snr = ops.where(t > 0, log_snr, ops.maximum(log_snr, CLEAN_LOG_SNR))
        return Marginal(t, *self.scales(log_snr), log_snr)

    def _check_times(self, t) -> None:
        numbers = backend.concrete(t) if ops.is_tensor(t) else np.asarray(t, "float64")
        if numbers is None or np.all(inside := np.abs(numbers - 0.5) <= 0.5 + 1e-6):
            return
        wrong = numbers[~inside].flat[0]
        raise ValueError(
            f"{type(self).__name__}: times must lie in [0, 1], where 0 is data and 1 is noise; received t = {wrong:g}. "
            f"Step i = 0 ... T - 1 of a discrete process is t = (i + 1) / T; {_counted(self.num_steps)}. (The time "
            "that is passed to the network is separate: `times.Index` passes i)"
        )

    def at_log_snr(self, log_snr) -> Marginal:
        """The marginal with this log-SNR, of any shape."""
        log_snr = ops.convert_to_tensor(log_snr, "float32")
        return Marginal(self.time(log_snr), *self.scales(log_snr), log_snr)

    def nearest(self, t: float) -> float:
        """The time of the process nearest to `t`: i / T for T steps, and 0 only if `t` is 0."""
        if self.num_steps is None or t == 0:
            return t
        return max(1, round(t * self.num_steps)) / self.num_steps

    def __call__(self, x, noise, t, **options):
        return super().__call__(x, noise, t=t, **options)  # by name, as Keras requires if it is a plain number

    def call(self, x, noise, t):
        """The forward process, x_t = alpha x + sigma noise (DDPM eq. 4).

        Args:
            x: data, with shape `(batch, ...)`.
            noise: standard normal noise of the same shape.
            t: times in [0, 1], with shape `(batch,)` or `()`.

        Raises:
            ValueError: as in `at`.
        """
        x, noise = ops.convert_to_tensor(x, "float32"), ops.convert_to_tensor(noise, "float32")
        m = self.at(t).like(x)
        return m.alpha * x + m.sigma * noise

    def posterior(self, x, x_t, now: Marginal, then: Marginal):
        """The exact posterior q(x_then | x_now, x) for then.t < now.t (DDPM eqs. 6 and 7, for any schedule):

            mean = (alpha_now sigma_then^2) / (alpha_then sigma_now^2) x_now + alpha_then (1 - r) x
            variance = sigma_then^2 (1 - r),       r = SNR_now / SNR_then

        Returns:
            The mean, with the shape of `x`, and the variance, which broadcasts against it.
        """
        x, x_t = ops.convert_to_tensor(x, "float32"), ops.convert_to_tensor(x_t, "float32")
        now, then = now.like(x), then.like(x)
        kept, fresh = bridge(now, then)
        return kept * x_t + then.alpha * fresh * x, then.sigma**2 * fresh

    def compute_output_shape(self, x_shape, *_):
        return x_shape

    def plot(self, path: str | None = None, points: int = 400):
        """Plots alpha, sigma and log-SNR against t, and writes the figure to `path` if it is given.

        Returns:
            The matplotlib figure.

        Raises:
            ImportError: if matplotlib is missing (the extra `plot`).
        """
        with needs("plot", "Plots need matplotlib"):
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
            with replacing(path) as new:
                figure.savefig(new)
        return figure


def _counted(num_steps: int | None) -> str:
    return "this schedule is continuous" if num_steps is None else f"here T is {num_steps}"
