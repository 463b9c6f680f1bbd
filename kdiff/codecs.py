"""Codecs: between what people hold and what diffuses.

A codec encodes a batch of examples into the space where noise is added, and decodes samples back.
"""

from keras import ops

from kdiff.base import Value


class Codec(Value):
    """The base of all codecs.

    Attributes:
        limit: the largest magnitude that floating-point examples may have; None if any will do.
    """

    limit: float | None = None

    def encode(self, examples):
        """Examples, with shape `(batch, ...)`, to float32 data."""
        raise NotImplementedError

    def decode(self, x):
        """Data to examples."""
        raise NotImplementedError


class Pixels(Codec):
    """Images as they are, in [-1, 1]; uint8 images become x / 127.5 - 1. Decoding clips to [-1, 1]."""

    limit = 1.0

    def encode(self, examples):
        """x / 127.5 - 1 for whole numbers, x for floating-point ones."""
        if "int" in str(examples.dtype):
            return ops.cast(examples, "float32") / 127.5 - 1.0
        return ops.cast(examples, "float32")

    def decode(self, x):
        """x clipped to [-1, 1]."""
        return ops.clip(x, -1.0, 1.0)


class Identity(Codec):
    """Vectors, latents or any other numbers, of any size, unchanged."""

    def encode(self, examples):
        """x."""
        return ops.cast(examples, "float32")

    def decode(self, x):
        """x."""
        return x
