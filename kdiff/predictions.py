"""Parametrisations: what the network predicts.

A network may predict the data, the noise, or any mixture of them. One pair of numbers says which,

    target = a x + b noise,

and since x_t = alpha x + sigma noise is the other linear equation in the same two unknowns, any output y gives

    x_hat = (b x_t - sigma y) / (b alpha - a sigma).

An error of the output is an error of x_hat multiplied by the gain, sigma / |b alpha - a sigma|, so a loss weight
stated for x_hat is a loss weight for the output times gain^2.

| class    | a      | b     | x_hat (variance preserving) | gain^2                      |
|----------|--------|-------|-----------------------------|-----------------------------|
| Data     | 1      | 0     | y                           | 1                           |
| Noise    | 0      | 1     | (x_t - sigma y) / alpha     | sigma^2 / alpha^2           |
| Velocity | -sigma | alpha | alpha x_t - sigma y         | sigma^2                     |
| Flow     | -1     | 1     | x_t - t y (rectified)       | sigma^2 / (alpha + sigma)^2 |
"""

from keras import ops

from kdiff.base import Value
from kdiff.schedules import Marginal


class Prediction(Value):
    """The base of all parametrisations. A new one defines `coefficients` alone."""

    def coefficients(self, m: Marginal):
        """(a, b) such that the network's target is a x + b noise; each broadcasts against the fields of `m`."""
        raise NotImplementedError

    def target(self, x, noise, m: Marginal):
        """What the network should answer, a x + b noise, with the shape of `x`."""
        x, noise = ops.convert_to_tensor(x, "float32"), ops.convert_to_tensor(noise, "float32")
        a, b = self.coefficients(m.like(x))
        return a * x + b * noise

    def denoise(self, output, x_t, m: Marginal):
        """The data that the network's output implies, x_hat = (b x_t - sigma y) / (b alpha - a sigma)."""
        output, x_t = ops.convert_to_tensor(output, "float32"), ops.convert_to_tensor(x_t, "float32")
        m = m.like(x_t)
        a, b = self.coefficients(m)
        return (b * x_t - m.sigma * output) / (b * m.alpha - a * m.sigma)

    def gain(self, m: Marginal):
        """|d x_hat / d y| = sigma / |b alpha - a sigma|, with the shape of the fields of `m`."""
        a, b = self.coefficients(m)
        return m.sigma / ops.abs(b * m.alpha - a * m.sigma)


class Data(Prediction):
    """The network predicts the data x: a = 1, b = 0 (Ho et al. 2020, section 3.2)."""

    def coefficients(self, m: Marginal):
        """(1, 0)."""
        return 1.0, 0.0


class Noise(Prediction):
    """The network predicts the noise: a = 0, b = 1 (Ho et al. 2020, eq. 14)."""

    def coefficients(self, m: Marginal):
        """(0, 1)."""
        return 0.0, 1.0


class Velocity(Prediction):
    """The network predicts v = alpha noise - sigma x: a = -sigma, b = alpha.

    Salimans and Ho 2022, "Progressive distillation", arXiv:2202.00512, appendix D.
    """

    def coefficients(self, m: Marginal):
        """(-sigma, alpha)."""
        return -m.sigma, m.alpha


class Flow(Prediction):
    """The network predicts noise - x, the velocity of rectified flow: a = -1, b = 1.

    Liu et al. 2022, arXiv:2209.03003, eq. 1, with time running from data to noise.
    """

    def coefficients(self, m: Marginal):
        """(-1, 1)."""
        return -1.0, 1.0
