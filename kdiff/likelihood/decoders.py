"""Decoders: the last step of the bound, from slightly noisy data, with N(mean, variance), to the data."""

import math
from typing import Any

import numpy as np
from keras import ops

from kdiff.base import Value
from kdiff.gaussian import log_bin

__all__ = ["Decoder", "Density", "Levels", "decoder_of", "sum_of_rows"]


def sum_of_rows(x):
    """The sum over all axes except the first."""
    return ops.sum(x, axis=tuple(range(1, len(x.shape))))


class Decoder(Value):
    """The base class of decoders. A subclass defines `nats` and `nats_of_signal`."""

    def check(self, x: np.ndarray) -> None:
        """Raises a ValueError if the decoder is not for such data."""

    def nats(self, x, mean, log_variance):
        """-log p(x), in nats, if the last step has this mean and log-variance; with shape `(batch,)`."""
        raise NotImplementedError

    def nats_of_signal(self, x, noise, log_snr: float):
        """-log p(x | x_t), in nats, of the decoder that sees only x_t = alpha x + sigma noise; with shape `(batch,)`.

        It is proportional to q(x_t | x) (Kingma et al. 2021, arXiv:2107.00630, eq. 15 and appendix E).
        """
        raise NotImplementedError


class Density(Decoder):
    """Continuous data: the density of N(mean, variance)."""

    def nats(self, x, mean, log_variance):
        rest = (x - mean) ** 2 * ops.exp(-log_variance) + log_variance
        return 0.5 * sum_of_rows(rest + math.log(2.0 * math.pi))

    def nats_of_signal(self, x, noise, log_snr: float):
        """The mean over the noise, in closed form, for the density N(x_t / alpha, (sigma / alpha)^2)."""
        each = 0.5 * (1.0 + math.log(2.0 * math.pi) - log_snr)
        return sum_of_rows(ops.zeros_like(x) + each)


class Levels(Decoder):
    """Images with 256 levels in [-1, 1]: the probability, under N(mean, variance), of the bin of each level.

    The first and last bins are open (Ho et al. 2020, arXiv:2006.11239, eq. 13). The likelihood is then a probability.
    """

    def check(self, x: np.ndarray) -> None:
        """Raises a ValueError unless x is on the 256 levels k / 127.5 - 1."""
        places = (np.asarray(x, "float64") + 1.0) * 127.5
        off = np.abs(places - np.round(places)) > 0.01
        wrong = off | (places < -0.01) | (places > 255.01)
        if wrong.any():
            raise ValueError(
                "likelihood: the decoder of 256 levels needs data on the levels k / 127.5 - 1, such as uint8 images "
                f"are; {wrong.mean():.0%} of the numbers are not, such as {np.asarray(x)[wrong][0]:.6g}. Give the "
                "images as uint8, or `decoder=Density()`, for a density"
            )

    def nats(self, x, mean, log_variance):
        return -sum_of_rows(log_bin(x, mean, ops.exp(0.5 * log_variance)))

    def nats_of_signal(self, x, noise, log_snr: float):
        """-log-softmax over the levels of -(x_t - alpha level)^2 / (2 sigma^2), at the level of x.

        Only levels near x are summed, up to 8 sigma beyond the reach of the noise: the rest is below 1e-13 of the sum.
        """
        spread = 127.5 * math.exp(-0.5 * log_snr)  # sigma / alpha, in steps
        reach = min(255, math.ceil(14.0 * spread))
        total = ops.zeros_like(x)
        level = ops.round((x + 1.0) * 127.5)
        own = 0.5 * noise**2
        for j in range(-reach, reach + 1):
            there = ops.logical_and(level + j >= 0, level + j <= 255)
            total = total + ops.where(there, ops.exp(own - 0.5 * (noise - j / spread) ** 2), 0.0)
        return sum_of_rows(ops.log(total))


def decoder_of(decoder: Any, limit: float | None) -> Decoder:
    """The decoder that is given; None is `Levels` for images and `Density` for other data."""
    if decoder is not None:
        return Decoder.get(decoder)
    return Density() if limit is None else Levels()
