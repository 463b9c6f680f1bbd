"""A network for vectors, such as points in the plane, latents or features."""

from collections.abc import Mapping
from typing import Any

import keras
from keras import ops

from kdiff.base import check_integer
from kdiff.blocks.base import apply_layer, build_layer, copy_layer, get_layer, kernel_initializer
from kdiff.blocks.embeddings import MLPEmbedding, SinusoidalEmbedding
from kdiff.blocks.layers import Dense
from kdiff.blocks.normalization import AdaptiveNorm, LayerNorm
from kdiff.blocks.transformer import FeedForward
from kdiff.networks.base import Network

__all__ = ["MLP"]


class MLP(Network):
    """Dense residual blocks on vectors, conditioned on time and conditions.

        network({"image": (batch, channels), "time": (batch,), **conditions}) -> (batch, out_channels), float32

    A vector is processed as a sequence of one token, so any block on tokens can be used. The last layer is initialised
    to zero.

    Args:
        width: the channels of the hidden vectors.
        depth: the number of blocks.
        block: a template of the blocks; None for a `FeedForward` with an `AdaptiveNorm`.
        embedding: the layer from the time to `embed`, (batch, dim); None for an MLPEmbedding of `width`.
        conditions: a layer for each condition, by its name in the input; see `UNet`.
        normalization: before the last layer.
        out_channels: of the output; None for those of the input.
        remat: whether each block is recomputed in the backward pass, to save memory.
        seed: from which the seed of each copied layer that has one is derived.
        kwargs: `name` and `dtype`.
    """

    ranks = (2,)

    def __init__(
        self,
        width: int = 128,
        depth: int = 4,
        block: Any = None,
        embedding: keras.layers.Layer | None = None,
        conditions: Mapping[str, keras.layers.Layer] | None = None,
        normalization: Any = "layer_norm",
        out_channels: int | None = None,
        remat: bool = False,
        seed: int = 0,
        **kwargs,
    ):
        check_integer("MLP", "width", width)
        check_integer("MLP", "depth", depth)
        embedding = embedding or MLPEmbedding(SinusoidalEmbedding(64), width)
        super().__init__(embedding, conditions, out_channels, remat, seed, **kwargs)
        self.width = width
        self.depth = depth
        self.block = get_layer(block or FeedForward(normalization=AdaptiveNorm(LayerNorm(affine=False))))
        self.normalization = self._copy(normalization, "normalization")
        options = {"kernel_initializer": kernel_initializer(), "dtype": self.dtype_policy}
        self.stem = Dense(width, name="stem", **options)
        self.blocks = [self._chain([copy_layer(self.block)], f"block_{i}") for i in range(depth)]

    def _build_body(self, x_shape, embed_shape, context_shape):
        batch, width = build_layer(self.stem, x_shape)
        x = (batch, 1, width)
        for block in self.blocks:
            x = build_layer(block, x, embed_shape, context_shape)
        build_layer(self.normalization, x)
        self.head = self._head(Dense)
        self.head.build((batch, x[-1]))

    def _body(self, x, embed, context, training):
        x = ops.expand_dims(self.stem(x), 1)
        for block in self.blocks:
            x = self._run(block, x, embed, context, training)
        return self.head(apply_layer(self.normalization, x, training=training)[:, 0])
