"""Conditions given as embeddings: of an image, clean or noised, or of the tokens of a text, with a mask."""

from typing import Any

import keras
import numpy as np
from keras import ops

from kdiff import deprecated
from kdiff.base import check_integer
from kdiff.blocks.base import ConfigurableLayer, build_layer, copy_layer, kernel_initializer
from kdiff.blocks.conditions import Encoded, Input, OptionalCondition
from kdiff.blocks.embeddings import MLPEmbedding, SinusoidalEmbedding
from kdiff.blocks.layers import Dense
from kdiff.blocks.noising import Noising

__all__ = ["ImageEmbedding", "MaskedTokens", "NoisedEmbedding"]


class ImageEmbedding(OptionalCondition):
    """An embedding of an image, such as CLIP's, as a vector added to `embed` and as a few tokens of the context:

        vector = W z + b,  tokens = reshape(W' z + b', (tokens, width))

    The decoder of Ramesh et al., "Hierarchical Text-Conditional Image Generation with CLIP Latents" (2022), section
    2.1, drops the embedding for 10 % of the training examples and the text for 50 %, independently, so the two
    conditions need different seeds.

        conditions={"embedding": ImageEmbedding(128, dropout=0.1, seed=1), "text": TextEncoder(dropout=0.5, seed=2)}

    Args:
        width: the width of a token, equal to that of the other tokens of the context.
        tokens: the number of tokens; 0 for the vector alone.
        absent, dropout, seed: as in `OptionalCondition`; if `absent` is None, its replacement is learned.
    """

    def __init__(
        self, width: int = 128, tokens: int = 4, absent: Any = None, dropout: float = 0.1, seed: int = 1, **kwargs
    ):
        super().__init__(None, absent, dropout, seed, **kwargs)
        check_integer("ImageEmbedding", "width", width)
        check_integer("ImageEmbedding", "tokens", tokens, 0)
        self.width = width
        self.tokens = tokens

    @classmethod
    def _argument_defaults(cls):
        """The arguments, without `layer`, which is fixed."""
        return {name: default for name, default in super()._argument_defaults().items() if name != "layer"}

    def build(self, x_shape, embed_shape=None):
        """Creates the learned row and the dense layers; the vector is as wide as `embed`, or as a token."""
        if len(x_shape) != 2:
            raise ValueError(f"ImageEmbedding: one vector per example is expected, (batch, dim); received: {x_shape}")
        super().build(x_shape)
        self._vector = self.width if embed_shape is None else embed_shape[-1]
        options = {"kernel_initializer": kernel_initializer(), "dtype": self.dtype_policy}
        self.to_vector = Dense(self._vector, name="to_vector", **options)
        self.to_vector.build(x_shape)
        if self.tokens:
            self.to_tokens = Dense(self.tokens * self.width, name="to_tokens", **options)
            self.to_tokens.build(x_shape)

    def encode(self, x, embed, training):
        """Maps (batch, dim) to `Encoded`."""
        x = super().encode(x, embed, training)
        tokens = ops.reshape(self.to_tokens(x), (-1, self.tokens, self.width)) if self.tokens else None
        return Encoded(vector=self.to_vector(x), tokens=tokens)

    def compute_output_spec(self, x, embed=None, context=None, training=None):
        """The specification of the output of `encode`."""
        batch, width = x.shape[0], self.width if embed is None else embed.shape[-1]
        tokens = keras.KerasTensor((batch, self.tokens, self.width), self.compute_dtype) if self.tokens else None
        return Encoded(vector=keras.KerasTensor((batch, width), self.compute_dtype), tokens=tokens)


class NoisedEmbedding(Noising):
    """A noised embedding of an image and its noise level s, as a vector:

        vector = layer([mean + std (alpha_s (z - mean) / std + sigma_s noise), waves(s)])

    The condition of Stable unCLIP, by the noise conditioning augmentation of `Noising`: the higher the level, the less
    the images are tied to the embedding. For a condition "embedding" the inputs "embedding_level", (batch,), and
    "embedding_noise", of the shape of the embedding, may be given; otherwise the level is `level`, with fixed noise,
    and in training both are random, up to `max_level`. A zero embedding means no condition; for it the layer receives
    zeros.

        conditions={"embedding": NoisedEmbedding(schedules.CosineBeta(1000), dropout=0.1)}

    Args:
        noise: the forward process, a layer called as `noise(z, noise, level)`.
        mean, std: of the embeddings, numbers or arrays (dim,).
        waves: the layer from the level, a number in [0, 1], to a vector; None for a SinusoidalEmbedding of width 64.
        layer: applied to the concatenation of both vectors; None for two dense layers as wide as `embed`.
        max_level, level, dropout, seed: as in `Noising`.
    """

    main = "embedding"

    @deprecated.arguments(highest="max_level")
    def __init__(
        self,
        noise: keras.layers.Layer,
        mean: Any = 0.0,
        std: Any = 1.0,
        waves: Any = None,
        layer: Any = None,
        max_level: float = 1.0,
        level: float = 0.001,
        dropout: float = 0.0,
        seed: int = 0,
        **kwargs,
    ):
        super().__init__(noise, max_level, level, dropout, seed, **kwargs)
        self.mean, self.std = (np.asarray(ops.convert_to_numpy(value), "float32") for value in (mean, std))
        if noise is None or not (np.isfinite(self.mean).all() and np.all(self.std > 0)):
            raise ValueError(
                "NoisedEmbedding: `noise` must be given, `mean` finite and `std` positive; received: "
                f"{noise!r}, {mean!r} and {std!r}"
            )
        waves = SinusoidalEmbedding(64, scale=1000.0) if waves is None else waves
        self.waves = copy_layer(waves, name="waves", dtype="float32")
        self.layer = None if layer is None else copy_layer(layer, name="layer", dtype=self.dtype_policy)
        self._row: tuple | None = None

    def build(self, x_shape, embed_shape=None):
        """Builds the layers."""
        shape = tuple(x_shape[self.main])
        if len(shape) != 2 or any(one.shape not in ((), shape[1:]) for one in (self.mean, self.std)):
            raise ValueError(
                "NoisedEmbedding: one vector per example is expected, (batch, dim), and `mean` and "
                f"`std` of that size; received: {shape}, {self.mean.shape} and {self.std.shape}"
            )
        self._row = shape[1:]
        waves = build_layer(self.waves, shape[:1])
        width = None if embed_shape is None else embed_shape[-1]
        options = {"dtype": self.dtype_policy, "name": "layer"}
        self.projection = self.layer or MLPEmbedding(keras.layers.Identity(), width, **options)
        build_layer(self.projection, (shape[0], shape[1] + waves[-1]))

    @property
    def null(self) -> np.ndarray | None:
        """Zeros; None until the shape of a row is known."""
        return None if self._row is None else np.zeros(self._row, "float32")

    def call(self, x, embed=None, context=None, training=None):
        """Maps a dictionary of the embedding, its level and noise to `Encoded`."""
        z, key = ops.cast(x[self.main], "float32"), self._key_of_call(training)
        if training and self.dropout > 0:
            z = self._dropped(z, key)
        level = self._level_of(x, ops.shape(z)[0], key, training)
        mean, std = (ops.convert_to_tensor(one) for one in (self.mean, self.std))
        noised = mean + std * self._noised(x, (z - mean) / std, level, key)
        joined = ops.concatenate([noised, self.waves(level)], axis=-1)
        joined = ops.where(ops.any(z != 0, axis=-1, keepdims=True), joined, 0.0)
        return Encoded(vector=self.projection(ops.cast(joined, self.compute_dtype)))

    def compute_output_spec(self, x, embed=None, context=None, training=None):
        """The specification of the output."""
        batch, width = x[self.main].shape
        waves = self.waves.compute_output_shape((batch,))[-1]
        return Encoded(vector=self.projection.compute_output_spec(keras.KerasTensor((batch, width + waves))))


class MaskedTokens(ConfigurableLayer, keras.layers.Layer):
    """Tokens used unchanged, (batch, length, dim), with an optional mask: for a condition "context", the input
    "context_mask", (batch, length), is nonzero for a token that is attended to.

    Args:
        kwargs: `name` and `dtype`.
    """

    def __init__(self, **kwargs):
        super().__init__(autocast=False, **kwargs)
        self.built = True

    def inputs_of(self, name: str) -> dict[str, Input]:
        """The tokens, and the optional mask."""
        return {name: Input("tokens", None), f"{name}_mask": Input("mask", None, True)}

    def call(self, x, training=None):
        """Maps a dictionary of both to `Encoded`."""
        mask = x.get("mask")
        mask = None if mask is None else ops.not_equal(mask, ops.cast(0, mask.dtype))
        return Encoded(tokens=ops.cast(x["tokens"], self.compute_dtype), mask=mask)

    def compute_output_spec(self, x, training=None):
        """The specification of the output of `call`."""
        mask = None if x.get("mask") is None else keras.KerasTensor(x["mask"].shape, "bool")
        return Encoded(tokens=keras.KerasTensor(x["tokens"].shape, self.compute_dtype), mask=mask)
