"""Decoders: the last step of the bound, from slightly noisy data, with N(mean, variance), to the data."""

import math
from collections.abc import Callable
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
    """The base class of decoders. A subclass defines `nats` and `nats_of_signal`.

    Attributes:
        of_images: whether it is for images, from which a codec with `images` makes the data x, not for x itself.
    """

    of_images: bool = False

    def check(self, x: np.ndarray) -> None:
        """Raises a ValueError if the decoder is not for such data."""

    def nats(self, x, mean, log_variance):
        """-log p(x), in nats, if the last step has this mean and log-variance; with shape `(batch,)`."""
        raise NotImplementedError

    def nats_of_signal(self, x, noise, log_snr):
        """-log p(x | x_t), in nats, of the decoder that sees only x_t = alpha x + sigma noise; with shape `(batch,)`.

        It is proportional to q(x_t | x) (Kingma et al. 2021, arXiv:2107.00630, eq. 15 and appendix E).
        """
        raise NotImplementedError


class Density(Decoder):
    """Continuous data: the density of N(mean, variance)."""

    def nats(self, x, mean, log_variance):
        rest = (x - mean) ** 2 * ops.exp(-log_variance) + log_variance
        return 0.5 * sum_of_rows(rest + math.log(2.0 * math.pi))

    def nats_of_signal(self, x, noise, log_snr):
        """The mean over the noise, in closed form, for the density N(x_t / alpha, (sigma / alpha)^2)."""
        each = 0.5 * (1.0 + math.log(2.0 * math.pi) - log_snr)
        return sum_of_rows(ops.zeros_like(x) + each)


class Levels(Decoder):
    """Images with 256 levels in [-1, 1]: the probability, under N(mean, variance), of the bin of each level.

    The first and last bins are open (Ho et al. 2020, arXiv:2006.11239, eq. 13). The likelihood is then a probability.
    """

    of_images = True

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

    def nats_of_signal(self, x, noise, log_snr):
        """-log-softmax over the levels of -(x_t - alpha level)^2 / (2 sigma^2), at the level of x.

        `log_snr` may be an array that broadcasts against x. Only levels near x are summed, up to 8 sigma beyond the
        reach of the noise: the rest is below 1e-13 of the sum.
        """
        spread = 127.5 * np.exp(-0.5 * np.asarray(log_snr, "float32"))  # sigma / alpha, in steps
        reach = min(255, math.ceil(14.0 * spread.max()))
        apart = ops.convert_to_tensor(1.0 / spread)  # of neighbouring levels, in units of the noise
        total = ops.zeros_like(x)
        level = ops.round((x + 1.0) * 127.5)
        own = 0.5 * noise**2
        for j in range(-reach, reach + 1):
            there = ops.logical_and(level + j >= 0, level + j <= 255)
            total = total + ops.where(there, ops.exp(own - 0.5 * (noise - j * apart) ** 2), 0.0)
        return sum_of_rows(ops.log(total))


def decoder_of(decoder: Any, images: Callable | None) -> tuple[Decoder, Callable]:
    """(the decoder, the function that maps data to what it decodes), where a codec has this method `images`, or None.

    The decoder is the given one; None is `Levels` for images, `Density` for other data.
    """
    if decoder is None:
        decoder = Density() if images is None else Levels()
    decoder = Decoder.get(decoder)
    return decoder, images if decoder.of_images and images is not None else _unchanged


def _unchanged(x):
    return x
