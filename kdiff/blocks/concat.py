"""An image as a condition: a map concatenated to x_t, with noise conditioning augmentation for cascades."""

from typing import Any

import keras
import numpy as np
from keras import ops

from kdiff import deprecated
from kdiff.base import check_choice
from kdiff.blocks.base import build_layer, copy_layer
from kdiff.blocks.conditions import Encoded, Input
from kdiff.blocks.embeddings import MLPEmbedding, SinusoidalEmbedding
from kdiff.blocks.noising import Noising
from kdiff.blocks.resizing import FORMS, resized
from kdiff.checks import like_bytes, value_range

__all__ = ["Concat"]


class Concat(Noising):
    """An image of any size, resized to that of x_t and concatenated to its channels: the low-resolution image of
    super-resolution, the known part of an inpainted image, a depth map, a sketch.

        UNet.attention(conditions={"low": Concat("bicubic")})               # network({"image", "time", "low"})

    With `noise` it is noise conditioning augmentation (Ho et al., "Cascaded Diffusion Models", 2021, section 4; Saharia
    et al., "Photorealistic Text-to-Image Diffusion Models", 2022, section 2.4). The resized image is noised, as in
    DeepFloyd IF, and the level is embedded in the same way as time and added to `embed`:

        training    level ~ U(0, max_level), one per example, a function of `seed` and the number of the call
        otherwise   `level`, or, for a condition "low", the inputs "low_level", (batch,), and "low_noise", of the size
                    of the noised image: normal noise that replaces the layer's own, which is fixed

    With `of` the image need not be in the data: `fit` computes it from each clean batch, and only `sample` receives
    one.

        Concat("bicubic", noise=Cosine(), of=operators.Downsample(4))       # the super-resolution model of a cascade

    Args:
        interpolation: of the resizing: "nearest", "bilinear", "bicubic", "area", or "aligned" for bilinear resizing in
            which the corner pixels keep their values.
        antialias: whether an image that is made smaller is low-pass filtered.
        noise: the forward process, a layer called as `noise(image, noise, level)`, such as
            `kdiff.schedules.Cosine()`; None for no noise.
        max_level: the highest level in training, at most 1.
        level: the level where none is given.
        embedding: the layer from the level, a number in [0, 1], to a vector as wide as `embed`; None for an
            MLPEmbedding of a SinusoidalEmbedding.
        noise_first: whether the image is noised before it is resized, as in Ho et al., rather than after. This is
            required if a run that is stopped early takes its place (`truncated` of `Cascade`).
        of: computes the image from the (encoded) data when a batch has none, `of(x, key)`, with
            `of.output_shape(shape)`, such as `operators.Downsample(4)` or one of `kdiff.degradations`; None: not
            computed.
        dropout, seed: as in `Condition`. An image of zeros, grey, stands for no image.
    """

    formerly = ("kdiff.blocks>Beside",)

    @deprecated.arguments(form="interpolation", highest="max_level")
    def __init__(
        self,
        interpolation: str = "bilinear",
        antialias: bool = True,
        noise: keras.layers.Layer | None = None,
        max_level: float = 1.0,
        level: float = 0.1,
        embedding: Any = None,
        noise_first: bool = False,
        of: Any = None,
        dropout: float = 0.0,
        seed: int = 0,
        **kwargs,
    ):
        super().__init__(noise, max_level, level, dropout, seed, **kwargs)
        check_choice("Concat", "interpolation", interpolation, tuple(FORMS))
        if of is not None and not (callable(of) and hasattr(of, "output_shape")):
            raise TypeError(
                "Concat: `of` must be None, or compute the image, of(x, key), and have an `output_shape`, such as "
                f"kdiff.operators.Downsample(4); received: {of!r}"
            )
        self.interpolation = interpolation
        self.antialias = antialias
        self.noise_first = noise_first
        self.of = of
        self.embedding = None if embedding is None else copy_layer(embedding, name="embedding", dtype=self.dtype_policy)
        self._row: tuple | None = None

    main = "image"
    any_size = True  # the image may have another size than at build

    def inputs_of(self, name: str) -> dict[str, Input]:
        """The image, which `of` may compute, and the inputs of `Noising`."""
        found = super().inputs_of(name)
        return {**found, name: found[name]._replace(of=self.of)}

    def build(self, x_shape, embed_shape=None, image_shape=None):
        """Builds the embedding of the level."""
        self._row = tuple(_image(x_shape)[1:])
        if image_shape is None or len(self._row) + 1 != len(image_shape) or len(image_shape) < 3:
            raise ValueError(
                "Concat: both the image and x_t must be (batch, height, width, channels); received the "
                f"shapes {tuple(_image(x_shape))} and {image_shape}"
            )
        if self.noise is not None:
            if self.embedding is None:
                width = None if embed_shape is None else embed_shape[-1]
                options = {"dtype": self.dtype_policy, "name": "embedding"}
                self.level_embedding = MLPEmbedding(SinusoidalEmbedding(64, scale=1000.0), width, **options)
            else:
                self.level_embedding = self.embedding
            build_layer(self.level_embedding, _image(x_shape)[:1])

    @property
    def null(self):
        """With dropout, a grey image of one pixel, which is resized to any size."""
        known = self.dropout > 0 and self._row is not None
        return np.zeros((*[1] * (len(self._row) - 1), self._row[-1]), "float32") if known else None

    def check(self, values) -> None:
        """Raises a ValueError for integers, and for values outside the range of the data."""
        if values.dtype.kind != "f":
            raise ValueError(
                "Concat: an image must be floating-point, such as x / 127.5 - 1 for x in 0..255; received: "
                f"{values.dtype}"
            )
        if (self.of is not None or self.noise is not None) and like_bytes(values):
            raise ValueError(
                "Concat: an image must have the range of the data, [-1, 1] for pictures; received values from "
                f"{value_range(values)[0]:.4g} to {value_range(values)[1]:.4g}. Scale it: x / 127.5 - 1 for 0..255"
            )

    def call(self, x, embed=None, context=None, image=None, training=None):
        """Maps an image, or a dictionary of image, level and noise, and x_t to a map of the size of x_t."""
        given = x if isinstance(x, dict) else {"image": x}
        x, sizes = ops.cast(given["image"], "float32"), tuple(image.shape[1:-1])
        if None in (*x.shape[1:], *sizes):
            raise ValueError(
                f"Concat: the sizes of the image and of x_t must be known; received the shapes {tuple(x.shape)} and "
                f"{tuple(image.shape)}"
            )
        key = self._key_of_call(training)
        if training and self.dropout > 0:
            x = self._dropped(x, key)
        if self.noise is None:
            return Encoded(map=ops.cast(resized(x, sizes, self.interpolation, self.antialias), self.compute_dtype))
        level = self._level_of(given, ops.shape(x)[0], key, training)
        y = x if self.noise_first else resized(x, sizes, self.interpolation, self.antialias)
        y = resized(self._noised(given, y, level, key), sizes, self.interpolation, self.antialias)
        return Encoded(vector=self.level_embedding(level), map=ops.cast(y, self.compute_dtype))

    def compute_output_spec(self, x, embed=None, context=None, image=None, training=None):
        """A map of the size of x_t, and a vector if `noise` is given."""
        shape = (*image.shape[:-1], _image(x).shape[-1])
        y = keras.KerasTensor(shape, self.compute_dtype)
        if self.noise is None:
            return Encoded(map=y)
        return Encoded(vector=self.level_embedding.compute_output_spec(keras.KerasTensor(shape[:1])), map=y)


def _image(x):
    """The image, or its shape, alone or in the dictionary of inputs."""
    return x["image"] if isinstance(x, dict) else x
