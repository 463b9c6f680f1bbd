"""U-ViT: a transformer in which time, conditions and patches are all tokens, with long skip connections."""

import math
from collections.abc import Mapping
from typing import Any, Self

import keras
from keras import ops

from kdiff import reuse
from kdiff.base import check_integer
from kdiff.blocks.attention import opened, usual_heads
from kdiff.blocks.base import Tokens, apply_layer, build_layer, copy_layer, get_layer, kernel_initializer
from kdiff.blocks.conditions import Encoded
from kdiff.blocks.embeddings import SinusoidalEmbedding
from kdiff.blocks.layers import Conv2D, Dense
from kdiff.blocks.patches import Patchify, Unpatchify
from kdiff.blocks.transformer import TransformerBlock
from kdiff.networks.base import Network, check_size, joined

__all__ = ["UViT"]


class UViT(Network):
    """U-ViT: a transformer on patches, time and conditions as the tokens of one sequence.

        network({"image": (batch, height, width, channels), "time": (batch,), **conditions})
            -> (batch, height, width, out_channels), float32

    Bao et al., "All are Worth Words: A ViT Backbone for Diffusion Models" (2022), section 3: the output of each block
    of the first half is concatenated to the input of its mirror in the second, and a 3x3 convolution follows the last.
    The size of the image is fixed by the first call.

    Args:
        width: the channels of a token.
        depth: the number of blocks, odd: the same number before and after the middle one.
        patch: the height and width of a patch, which must divide those of the image.
        block: a template of the blocks; None for the paper's, with the largest number of heads of at least 64 channels.
        positions: a layer that adds positions to the sequence.
        embedding: the layer from the time to a vector, (batch, width); None for a SinusoidalEmbedding.
        conditions: a layer for each condition, by its name in the input. Its output, (batch, width) or
            (batch, tokens, width), becomes further tokens; a map is concatenated to the channels of the image.
        normalization: before the last layers.
        out_channels: of the output; None for those of the image.
        remat: whether each block is recomputed in the backward pass, to save memory.
        seed: from which the seed of each copied layer that has one is derived.
        kwargs: `name` and `dtype`.

    Raises:
        ValueError: if `depth` is even; if `patch` does not divide the size of the image; if a condition is missing,
            unknown or not `width` wide.
    """

    def __init__(
        self,
        width: int = 512,
        depth: int = 13,
        patch: int = 2,
        block: Any = None,
        positions: Any = "learned_embedding",
        embedding: keras.layers.Layer | None = None,
        conditions: Mapping[str, keras.layers.Layer] | None = None,
        normalization: Any = "layer_norm",
        out_channels: int | None = None,
        remat: bool = False,
        seed: int = 0,
        **kwargs,
    ):
        for name, value in {"width": width, "depth": depth, "patch": patch}.items():
            check_integer("UViT", name, value)
        if depth % 2 == 0:
            raise ValueError(
                f"UViT: `depth` must be odd, with equally many blocks before and after the middle; received: {depth}"
            )
        super().__init__(embedding or SinusoidalEmbedding(width), conditions, out_channels, remat, seed, **kwargs)
        self.width = width
        self.depth = depth
        self.patch = patch
        self.block = _block(usual_heads(width)) if block is None else get_layer(block)
        self.positions = self._copy(positions, "positions")
        self.normalization = self._copy(normalization, "normalization")
        self.patchify = Patchify(patch, width, dtype=self.dtype_policy, name="patchify")
        self.blocks = [self._chain(self._unit(i), f"block_{i}") for i in range(depth)]

    def _unit(self, index):
        """A block; in the second half with the layer that merges its two inputs."""
        merge = Dense(self.width, kernel_initializer=kernel_initializer(), name="merge")
        return [*([merge] if index > self.depth // 2 else []), copy_layer(self.block)]

    def _steering_shapes(self, time, encoded):
        """There is no `embed`; `context` is the shape of all tokens except the patches."""
        tokens = []
        for name, one in {"time": Encoded(time), **encoded}.items():
            for shape in (one.vector, one.tokens):
                if shape is not None and shape[-1] != self.width:
                    raise ValueError(
                        f"UViT: the layer of {name!r} must return vectors or tokens of {self.width}, the width of the "
                        f"network; it returns: {shape}"
                    )
                if shape is not None:
                    tokens.append(shape if len(shape) == 3 else (shape[0], 1, shape[1]))
        return None, self._joined(tokens)

    def _steering(self, time, encoded):
        tokens = []
        for one in (Encoded(time), *encoded):
            if one.vector is not None:
                tokens.append(Encoded(tokens=ops.expand_dims(ops.cast(one.vector, self.compute_dtype), 1)))
            if one.tokens is not None:
                tokens.append(Encoded(tokens=ops.cast(one.tokens, self.compute_dtype), mask=one.mask))
        return None, joined(tokens)

    def _check_attended(self, context):
        """Always satisfied: all tokens are in one sequence."""

    def _build_body(self, x_shape, embed_shape, context_shape):
        batch, *sizes, _ = self._map = build_layer(self.patchify, x_shape)
        if None in (*sizes, context_shape[1]):
            raise ValueError(f"UViT: the size of the image and the number of tokens must be known; received: {x_shape}")
        x = build_layer(self.positions, (batch, context_shape[1] + math.prod(sizes), self.width))
        for i, block in enumerate(self.blocks):
            build_layer(block, x if i <= self.depth // 2 else (*x[:-1], 2 * x[-1]))
        build_layer(self.normalization, x)
        self.unpatchify = Unpatchify(self.patch, self._channels, dtype=self.dtype_policy, name="unpatchify")
        self.head = self._head(Conv2D, 3, padding="same")
        build_layer(self.head, build_layer(self.unpatchify, self._map))

    def _body(self, x, embed, context, training):
        patches = self.patchify(x)
        (context, mask), own = opened(context), None
        x = ops.concatenate([context, ops.reshape(patches, (ops.shape(x)[0], -1, self.width))], axis=1)
        if mask is not None:
            own = Tokens(None, ops.pad(mask, [[0, 0], [0, x.shape[1] - mask.shape[1]]], constant_values=True))
        x = apply_layer(self.positions, x, training=training)
        half, count = self.depth // 2, min(reuse.shallow_blocks(), self.depth // 2)

        def through(x, numbers, skips):
            for i in numbers:
                x = ops.concatenate([x, skips.pop()], axis=-1) if i > half else x
                x = self._run(self.blocks[i], x, None, own, training)
                if i < half:
                    skips.append(x)
            return x

        outer = []
        x = through(x, range(count), outer)
        (x,) = reuse.once("deep", self, x, lambda: (through(x, range(count, self.depth - count), []),))
        x = through(x, range(self.depth - count, self.depth), outer)
        x = apply_layer(self.normalization, x, training=training)[:, context.shape[1] :]
        return self.head(self.unpatchify(ops.reshape(x, ops.shape(patches))))

    def _check_image(self, shape):
        super()._check_image(shape)
        check_size(self, shape, self.patch, f"patches of {self.patch} need")

    @classmethod
    def s(cls, patch: int = 2, **options) -> Self:
        """U-ViT-S: 13 blocks of 512 channels and 8 heads; 44 M parameters. `options` are arguments of `UViT`."""
        return cls.sized(512, 13, 8, patch, **options)

    @classmethod
    def m(cls, patch: int = 4, **options) -> Self:
        """U-ViT-M: 17 blocks of 768 channels and 12 heads; 131 M parameters. `options` are arguments of `UViT`."""
        return cls.sized(768, 17, 12, patch, **options)

    @classmethod
    def l(cls, patch: int = 2, **options) -> Self:  # noqa: E743
        """U-ViT-L: 21 blocks of 1024 channels and 16 heads; 287 M parameters. `options` are arguments of `UViT`."""
        return cls.sized(1024, 21, 16, patch, **options)

    @classmethod
    def h(cls, patch: int = 2, **options) -> Self:
        """U-ViT-H: 29 blocks of 1152 channels and 16 heads; 501 M parameters. `options` are arguments of `UViT`."""
        return cls.sized(1152, 29, 16, patch, **options)

    @classmethod
    def sized(cls, width: int, depth: int, heads: int, patch: int = 2, **options) -> Self:
        """The network of the paper (table 1) at any size; `depth` includes the middle block."""
        return cls(width, depth, patch, _block(heads), **options)


def _block(heads):
    return TransformerBlock(heads, bias=False, zero=False)
