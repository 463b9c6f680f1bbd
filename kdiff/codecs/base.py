"""Codecs: between user data and the space of the diffusion.

A codec encodes a batch of examples into the space where noise is added, and decodes samples back:

    x = codec.encode(examples, key)      examples, (batch, ...) -> float32 data, (batch, *data_shape(...))
    examples = codec.decode(x)

It may change shape and rank. It is a Keras layer, and may have weights, which are not trained by the model, not
averaged, and saved with it unless `saved` is False. It computes at its own precision. A codec with a pretrained
encoder:

    class Latent(Codec):
        def __init__(self, encoder, decoder):
            super().__init__()
            self.encoder, self.decoder = encoder, decoder

        def encode(self, examples, key=None):
            mean, log_variance = ops.split(self.encoder(examples), 2, axis=-1)
            return mean if key is None else mean + ops.exp(0.5 * log_variance) * random.normal(key, ops.shape(mean))

        def decode(self, x):
            return self.decoder(x)

        def data_shape(self, shape):
            *size, channels = self.encoder.compute_output_shape((None, *shape))[1:]
            return (*size, channels // 2)
"""

from collections.abc import Callable
from typing import Any

import keras
from keras import ops

from kdiff.base import Value

__all__ = ["Absent", "Codec", "Identity", "Pixels", "Shape", "to_unit"]

Shape = tuple[int | None, ...]


class Codec(Value, keras.layers.Layer):
    """The base of all codecs. A subclass defines `encode`, `decode` and, if it changes the shape, `data_shape`.

    Its weights are created by the constructor, or by `build(None)`.

    Attributes:
        limit: the largest magnitude of floating-point examples; None for no limit.
        batch_size: the number of examples decoded at once; None for the number sampled at once.
        saved: whether its weights are saved with the model. A model that was saved without them has no codec when
            loaded, and raises an error where it needs one: set `model.codec = codec`.
        images: a method that maps data to the images in [-1, 1] of which it is an orthonormal transform, without
            clipping; None if it is not one. The likelihood of 8-bit images then counts their 256 levels.
    """

    limit: float | None = None
    batch_size: int | None = None
    saved: bool = True
    images: Callable[[Any], Any] | None = None

    def __init__(self, dtype: Any = "float32"):
        super().__init__(dtype=dtype, autocast=False)

    def encode(self, examples, key: Any = None):
        """Encodes examples as data.

        Args:
            examples: with shape `(batch, ...)`.
            key: of random numbers (`kdiff.random`), for a stochastic codec; None for the mean.

        Returns:
            float32 data.
        """
        raise NotImplementedError

    def decode(self, x):
        """Decodes data to examples."""
        raise NotImplementedError

    def data_shape(self, shape: Shape) -> Shape:
        """The shape of an encoded example, for an example of this shape; None is an unknown size.

        Raises:
            ValueError: if examples cannot have this shape.
        """
        return shape

    def freeze(self) -> None:
        """Creates its weights, if needed, and makes them constant in the model."""
        if not self.built:
            self.build(None)
        self.trainable = False
        for variable in self.variables:  # on TensorFlow a value that is already False is not passed on to inner layers
            variable.trainable = False

    def call(self, examples, key: Any = None, training: bool = False):
        """`encode`, as a layer, always in inference mode."""
        return ops.cast(self.encode(examples, key), "float32")

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments, serialised; `dtype`, if there is one, as a policy."""
        config = super().get_config()
        return {**config, "dtype": keras.dtype_policies.serialize(self.dtype_policy)} if "dtype" in config else config

    # A codec with weights equals only itself, and is copied with them.

    def __eq__(self, other: object) -> bool:
        return self is other or (not getattr(self, "weights", ()) and super().__eq__(other))

    __hash__ = Value.__hash__

    def __reduce__(self):
        return keras.layers.Layer.__reduce__(self) if self.weights else super().__reduce__()

    # Keras saves the variables of a layer, and those of the layers that `dir` shows.

    def __dir__(self):
        return super().__dir__() if self.saved else ()

    def save_own_variables(self, store) -> None:
        if self.saved:
            super().save_own_variables(store)

    def load_own_variables(self, store) -> None:
        if self.saved:
            super().load_own_variables(store)


class Absent(Codec):
    """A placeholder for a codec that was not `saved` with a model: it raises an error where a codec is needed.

    Args:
        codec: a description of the codec.
    """

    named = False

    def __init__(self, codec: str):
        super().__init__()
        self.codec = codec

    def _refuse(self):
        raise ValueError(f"The model was saved without its codec, {self.codec}; set it: `model.codec = codec`")

    def encode(self, examples, key: Any = None):
        self._refuse()

    def decode(self, x):
        self._refuse()

    def data_shape(self, shape: Shape) -> Shape:
        self._refuse()


class Pixels(Codec):
    """Images in [-1, 1], unchanged; uint8 images become x / 127.5 - 1. Decoding clips to [-1, 1]."""

    limit = 1.0

    def encode(self, examples, key: Any = None):
        return to_unit(examples)

    def decode(self, x):
        return ops.clip(x, -1.0, 1.0)

    def images(self, x):
        """The data itself."""
        return x


class Identity(Codec):
    """Vectors, latents or any other data of any range, unchanged."""

    def encode(self, examples, key: Any = None):
        return ops.cast(examples, "float32")

    def decode(self, x):
        return x


def to_unit(images):
    """Images in [-1, 1], float32: x / 127.5 - 1 for integers, x for floats."""
    if "int" in str(images.dtype):
        return ops.cast(images, "float32") / 127.5 - 1.0
    return ops.cast(images, "float32")
