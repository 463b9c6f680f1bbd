"""Guidance: a denoiser made from a denoiser, so that it works with any solver and any prediction.

guided = guidance(denoise),    x_hat = guided(x, m)
"""

from keras import ops

from kdiff.base import Value, check_number
from kdiff.solvers import Denoise


class Guidance(Value):
    """The base of all guidance. A new one defines `__call__` alone, or, if it changes x_hat alone, `change`."""

    def __call__(self, denoise: Denoise) -> Denoise:
        """The guided denoiser."""

        def guided(x, m):
            estimate = denoise(x, m)
            # With a learned variance the estimate is a pair, whose second part no guidance changes.
            return (self.change(estimate[0]), estimate[1]) if isinstance(estimate, tuple) else self.change(estimate)

        return guided

    def change(self, x_hat):
        """The guided x_hat."""
        raise NotImplementedError


class Clip(Guidance):
    """Static thresholding: x_hat is clipped to [-limit, limit], as DDPM's code does.

    Args:
        limit: the largest magnitude of data.
    """

    def __init__(self, limit: float = 1.0):
        check_number("Clip", "limit", limit, 0.0)
        self.limit = limit

    def change(self, x_hat):
        """clip(x_hat, -limit, limit)."""
        return ops.clip(x_hat, -self.limit, self.limit)


class DynamicThreshold(Guidance):
    """Dynamic thresholding (Saharia et al. 2022, "Imagen", arXiv:2205.11487, section 2.3):

        s = max(quantile of |x_hat|, 1),   x_hat <- clip(x_hat, -s, s) / s,     for each example.

    Args:
        quantile: in [0, 1].
        highest: the largest s.
    """

    def __init__(self, quantile: float = 0.995, highest: float = float("inf")):
        check_number("DynamicThreshold", "quantile", quantile, 0.0, 1.0)
        check_number("DynamicThreshold", "highest", highest, 1.0)
        self.quantile, self.highest = quantile, highest

    def change(self, x_hat):
        """clip(x_hat, -s, s) / s."""
        magnitudes = ops.reshape(ops.abs(x_hat), (ops.shape(x_hat)[0], -1))
        s = ops.clip(ops.quantile(magnitudes, self.quantile, axis=-1), 1.0, self.highest)
        s = ops.reshape(s, (-1, *[1] * (len(x_hat.shape) - 1)))
        return ops.clip(x_hat, -s, s) / s
