"""Guidance of diffusers that differs from kdiff's own; it cannot be obtained by name through `get`."""

from keras import ops

from kdiff.base import check_number
from kdiff.guidance import Guidance

__all__ = ["LowThreshold"]


class LowThreshold(Guidance):
    """Dynamic thresholding of diffusers with a `sample_max_value` below 1, which is then the only threshold:

        x_hat <- clip(x_hat, -limit, limit) / limit.

    Args:
        limit: `sample_max_value`.
    """

    named = False

    def __init__(self, limit: float = 0.5):
        check_number("LowThreshold", "limit", limit, 1e-6, 1.0)
        self.limit = limit

    def change(self, x_hat):
        """clip(x_hat, -limit, limit) / limit."""
        return ops.clip(x_hat, -self.limit, self.limit) / self.limit
