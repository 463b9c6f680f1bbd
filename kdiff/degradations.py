"""Random degradations, which derive the low-resolution images of super-resolution training from the data.

    y = of(x, key)          x (batch, height, width, channels); the same on every backend for a key

A fixed operator, `operators.Downsample(4)`, gives the same result every time. At inference the low-resolution image
comes from another model with different errors, so training augments it at random (Ho et al., "Cascaded Diffusion
Models", 2021, section 4: blur and noise; Ramesh et al., "DALL-E 2", 2022, section 2.3). Noise whose level is passed to
the network is separate: `blocks.Concat(noise=...)`.

    Concat(of=Degradations([RandomBlur(0.4, 0.6), operators.Downsample(4)]))
"""

from collections.abc import Sequence

import numpy as np
from keras import ops

from kdiff import random
from kdiff.base import Value, check_integer, check_number
from kdiff.operators import Operator, Shape

__all__ = ["Degradation", "Degradations", "RandomBlur", "RandomNoise"]


class Degradation(Value):
    """The base class. A new one defines `degrade`, and `output_shape` if it changes the shape."""

    def degrade(self, x, key):
        """Degrades images, float32, `(batch, height, width, channels)`; `key` is a random key, int32, `(2,)`."""
        raise NotImplementedError

    def __call__(self, x, key):
        """The degraded images, for tensors or arrays."""
        x = ops.convert_to_tensor(x, "float32")
        if len(x.shape) != 4:
            raise ValueError(
                f"{type(self).__name__}: a batch of images is expected, (batch, height, width, channels); received the "
                f"shape {tuple(x.shape)}"
            )
        return self.degrade(x, key)

    def output_shape(self, shape: Shape) -> Shape:
        """The shape of the result for an example of this shape.

        Raises:
            ValueError: if it does not fit.
        """
        return tuple(shape)


class Degradations(Degradation):
    """A sequence of degradations, each with independent random numbers.

    Args:
        parts: degradations and operators, the first of which is applied first.
    """

    def __init__(self, parts: Sequence[Degradation | Operator]):
        self.parts = list(parts)
        if not self.parts or not all(isinstance(one, (Degradation, Operator)) for one in self.parts):
            raise TypeError(f"Degradations: `parts` must be degradations or operators; received: {parts!r}")

    def degrade(self, x, key):
        for number, one in enumerate(self.parts):
            x = one(x, random.fold_in(key, number))
        return x

    def output_shape(self, shape: Shape) -> Shape:
        for one in self.parts:
            shape = one.output_shape(shape)
        return tuple(shape)


class RandomBlur(Degradation):
    """A Gaussian blur with a standard deviation of U(low, high) pixels per example, with reflection padding.

    Args:
        low, high: the range of the standard deviation, above 0.
        probability: the probability that an example is blurred.
        radius: the kernel has 2 radius + 1 pixels per side. The defaults are those of Ho et al. (2021), section 4.2.
    """

    def __init__(self, low: float = 0.4, high: float = 0.6, probability: float = 0.5, radius: int = 1):
        check_number("RandomBlur", "low", low, 1e-3)
        check_number("RandomBlur", "high", high, low)
        check_number("RandomBlur", "probability", probability, 0, 1)
        check_integer("RandomBlur", "radius", radius)
        self.low, self.high, self.probability, self.radius = low, high, probability, radius

    def degrade(self, x, key):
        std, chosen = ops.split(random.uniform(key, (ops.shape(x)[0], 2)), 2, axis=-1)
        std = self.low + (self.high - self.low) * std
        places = np.arange(-self.radius, self.radius + 1, dtype="float32")
        weights = ops.exp(-0.5 * ops.square(ops.convert_to_tensor(places) / std))
        weights = weights / ops.sum(weights, axis=-1, keepdims=True)
        weights = ops.where(chosen < self.probability, weights, ops.convert_to_tensor((places == 0).astype("float32")))
        for axis in (1, 2):
            size = x.shape[axis]
            mirrored = np.pad(np.arange(size), self.radius, mode="reflect").astype("int32")
            shifted = [ops.take(x, mirrored[i : i + size], axis=axis) for i in range(len(places))]
            x = sum(weights[:, i, None, None, None] * one for i, one in enumerate(shifted))
        return x

    def output_shape(self, shape: Shape) -> Shape:
        if len(shape) != 3 or min(shape[:2]) <= self.radius:
            raise ValueError(f"RandomBlur: an image larger than {self.radius} pixels is expected; received: {shape}")
        return tuple(shape)


class RandomNoise(Degradation):
    """White noise with a standard deviation of U(0, high) per example, which the network does not receive.

    Args:
        high: the largest standard deviation, at least 0, for images in [-1, 1].
    """

    def __init__(self, high: float = 0.1):
        check_number("RandomNoise", "high", high, 0)
        self.high = high

    def degrade(self, x, key):
        std = self.high * random.uniform(random.fold_in(key, 0), (ops.shape(x)[0], 1, 1, 1))
        return x + std * random.normal(random.fold_in(key, 1), ops.shape(x))
