"""How the small image that super-resolution learns from is made of the large one, with random numbers of its own.

    y = of(x, key)          x (batch, height, width, channels), of one key the same on every backend

An operator alone, `operators.Downsample(4)`, makes the same of an image each time. In use the small image comes from
another model, whose mistakes the operator does not make, so that training makes some at random (Ho et al., "Cascaded
Diffusion Models", 2021, section 4: blur and noise; Ramesh et al., "DALL-E 2", 2022, section 2.3). Noise whose level the
network is told is not one of them: `blocks.Concat(noise=...)`.

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
    """The base. A new one defines `degrade`, and `output_shape` if it changes the shape."""

    def degrade(self, x, key):
        """(batch, height, width, channels), float32, to the same; `key` is of random numbers, int32, (2,)."""
        raise NotImplementedError

    def __call__(self, x, key):
        """What is left of `x`, tensors or arrays."""
        x = ops.convert_to_tensor(x, "float32")
        if len(x.shape) != 4:
            raise ValueError(
                f"{type(self).__name__}: a batch of images is expected, (batch, height, width, channels); received the "
                f"shape {tuple(x.shape)}"
            )
        return self.degrade(x, key)

    def output_shape(self, shape: Shape) -> Shape:
        """The shape of what is left of an example of this shape.

        Raises:
            ValueError: if it does not fit.
        """
        return tuple(shape)


class Degradations(Degradation):
    """One after the other, each with random numbers of its own.

    Args:
        parts: degradations and operators; the first is applied first.
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
    """A Gaussian blur whose standard deviation is U(low, high) pixels, one an example; beyond its edge the image is
    mirrored.

    Args:
        low, high: above 0.
        probability: with which an example is blurred; others are left as they are.
        radius: the kernel has 2 radius + 1 pixels a side. The defaults are those of Ho et al. (2021), section 4.2.
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
    """White noise whose standard deviation is U(0, high), one an example. The network is not told how much.

    Args:
        high: at least 0, where black and white are 2 apart.
    """

    def __init__(self, high: float = 0.1):
        check_number("RandomNoise", "high", high, 0)
        self.high = high

    def degrade(self, x, key):
        std = self.high * random.uniform(random.fold_in(key, 0), (ops.shape(x)[0], 1, 1, 1))
        return x + std * random.normal(random.fold_in(key, 1), ops.shape(x))
