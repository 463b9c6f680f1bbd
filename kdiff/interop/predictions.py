"""Predictions of diffusers that differ from kdiff's own; not obtainable by name through `get`."""

from keras import ops

from kdiff.base import check_number
from kdiff.predictions import Karras
from kdiff.schedules import Marginal

__all__ = ["ConsistencyKarras"]


class ConsistencyKarras(Karras):
    """`Karras` with the boundary condition of consistency models (Song et al. 2023, arXiv:2303.01469, appendix C):

        x_hat = c_skip z + c_out y,    c_skip = sigma_data^2 / ((s - sigma_min)^2 + sigma_data^2),
                                       c_out = (s - sigma_min) sigma_data / sqrt(s^2 + sigma_data^2),

    with z = x_t / alpha and s = sigma / alpha, so that at `sigma_min` x_hat is z.

    Args:
        sigma_data: the standard deviation of the data.
        sigma_min: the noise level at which x_hat = z.
    """

    named = False

    def __init__(self, sigma_data: float = 0.5, sigma_min: float = 0.002):
        super().__init__(sigma_data)
        check_number("ConsistencyKarras", "sigma_min", sigma_min, 0.0)
        self.sigma_min = sigma_min

    def coefficients(self, m: Marginal):
        """((1 - c_skip) / c_out, -s c_skip / c_out), for alpha = 1."""
        skip, out = self._scalings(m)
        return (1.0 - skip) / out, -m.sigma / m.alpha * skip / out

    def denoise(self, output, x_t, m: Marginal):
        """c_skip z + c_out y."""
        m = m.like(ops.convert_to_tensor(x_t, "float32"))
        skip, out = self._scalings(m)
        return skip * x_t / m.alpha + out * self.value(output)

    def _scalings(self, m: Marginal):
        s = m.sigma / m.alpha
        above = ops.maximum(s - self.sigma_min, 1e-6 * s)  # at sigma_min the coefficients diverge, but not x_hat
        skip = self.sigma_data**2 / (above**2 + self.sigma_data**2)
        return skip, above * self.sigma_data * ops.rsqrt(s**2 + self.sigma_data**2)
