"""The diffusion transformer: patches of the image as tokens, through blocks conditioned on time and class."""

from collections.abc import Mapping
from typing import Any, Self

import keras
from keras import ops

from kdiff import reuse
from kdiff.base import check_integer
from kdiff.blocks.attention import usual_heads
from kdiff.blocks.base import ConfigurableLayer, apply_layer, build_layer, copy_layer, get_layer
from kdiff.blocks.conditions import Encoded, given_to
from kdiff.blocks.embeddings import MLPEmbedding, SinusoidalEmbedding
from kdiff.blocks.lookup import LabelEmbedding
from kdiff.blocks.normalization import AdaptiveNorm, LayerNorm
from kdiff.blocks.patches import Patchify, Unpatchify
from kdiff.blocks.transformer import adaptive_block
from kdiff.networks.base import Network, check_size

__all__ = ["DiT", "Steering"]


class DiT(Network):
    """DiT: a transformer on patches of the image, with adaptive normalisation.

        network({"image": (batch, height, width, channels), "time": (batch,), **conditions})
            -> (batch, height, width, out_channels), float32

    Peebles & Xie, "Scalable Diffusion Models with Transformers" (2022), section 3.2: `depth` adaLN-Zero blocks, each
    initialised to the identity. The patches stay arranged as a map, so attention may be local
    (`TransformerBlock(pattern=Window(8))`). A series (batch, length, channels) is patched along its length, a volume
    (batch, depth, height, width, channels) along all of its axes.

    Args:
        width: the channels of a token.
        depth: the number of blocks.
        patch: the height and width of a patch, which must divide those of the image.
        block: a template of the blocks, or several, used in turn; None for the paper's, with the largest number of
            heads of at least 64 channels.
        positions: a layer that adds positions to the tokens; None for none, as with rotary positions.
        embedding: the layer from the time to `embed`, (batch, dim); None for an MLPEmbedding of `width` channels on a
            SinusoidalEmbedding of 256.
        conditions: a layer for each condition, by its name in the input, such as `{"label": LabelEmbedding(1000)}`.
            Its output is added to `embed` if it is a vector, (batch, dim), becomes a part of `context` if it is tokens,
            (batch, tokens, dim), and is concatenated to the channels of the image if it is a map.
        normalization: before the last layer; scaled and shifted by `embed`.
        out_channels: of the output; None for those of the image; twice as many for a learned variance.
        remat: whether each block is recomputed in the backward pass, to save memory.
        seed: from which the seed of each copied layer that has one is derived.
        separate: whether each block except the first has its own copies of `embedding` and `conditions`, as in the
            networks that diffusers trained, unlike the paper's. Their vectors condition the block; the first block's
            also condition the last layer. Tokens and maps come from `conditions`.
        kwargs: `name` and `dtype`.

    Raises:
        ValueError: if `patch` does not divide the size of the image; if a condition is missing, unknown or of another
            batch size.
    """

    def __init__(
        self,
        width: int = 384,
        depth: int = 12,
        patch: int = 2,
        block: Any = None,
        positions: Any = "sin_cos_2d",
        embedding: keras.layers.Layer | None = None,
        conditions: Mapping[str, keras.layers.Layer] | None = None,
        normalization: Any = None,
        out_channels: int | None = None,
        remat: bool = False,
        seed: int = 0,
        separate: bool = False,
        **kwargs,
    ):
        for name, value in {"width": width, "depth": depth, "patch": patch}.items():
            check_integer("DiT", name, value)
        embedding = embedding or MLPEmbedding(SinusoidalEmbedding(256), width)
        super().__init__(embedding, conditions, out_channels, remat, seed, **kwargs)
        self.width = width
        self.depth = depth
        self.patch = patch
        self.block = adaptive_block(usual_heads(width)) if block is None else _templates(block)
        self.positions = None if positions is None else self._copy(positions, "positions")
        self.normalization = self._copy(normalization or LayerNorm(1e-6, affine=False), "normalization")
        self.patchify = Patchify(patch, width, dtype=self.dtype_policy, name="patchify")
        self.blocks = [self._chain([copy_layer(layer)], f"block_{i}") for i, layer in enumerate(self._turns())]
        self.last = AdaptiveNorm(self.normalization, dtype=self.dtype_policy, name="last")
        self.separate = separate
        self.steering = [Steering(self.embedding, self.conditions) for _ in self.blocks[1:]] if separate else []

    def build(self, input_shape):
        """As in `Network`."""
        super().build(input_shape)
        for one in self.steering:
            build_layer(one, {name: tuple(shape) for name, shape in input_shape.items()})

    def call(self, inputs, training=None):
        """As in `Network`."""
        return self._output(inputs, training, **({"given": inputs} if self.separate else {}))

    def _turns(self):
        templates = self.block if isinstance(self.block, list) else [self.block]
        return [templates[i % len(templates)] for i in range(self.depth)]

    def _build_body(self, x_shape, embed_shape, context_shape):
        x = build_layer(self.patchify, x_shape)
        if self.positions is not None:
            x = build_layer(self.positions, x)
        self._build_blocks(x, embed_shape, context_shape)
        build_layer(self.last, x, embed_shape)
        self.head = Unpatchify(self.patch, self._channels, zero=True, dtype="float32", name="head")
        build_layer(self.head, x)

    def _build_blocks(self, x, embed_shape, context_shape):
        for block in self.blocks:
            build_layer(block, x, embed_shape, context_shape)

    def _body(self, x, embed, context, training, given=None):
        x = self.patchify(x)
        if self.positions is not None:
            x = apply_layer(self.positions, x, training=training)
        vectors = [embed, *(one(given, training=training) for one in self.steering)]
        x = self._through(x, vectors if self.separate else vectors * self.depth, context, training)
        return self.head(self.last(x, embed=embed))

    def _through(self, x, vectors, context, training):
        """The output of the blocks on a map, each conditioned on one of the vectors."""
        pairs = list(zip(self.blocks, vectors, strict=True))
        count = min(reuse.shallow_blocks(), len(pairs) // 2)

        def through(x, pairs):
            for block, embed in pairs:
                x = self._run(block, x, embed, context, training)
            return x

        x = through(x, pairs[:count])
        x = reuse.residual(self, x, lambda: through(x, pairs[count : len(pairs) - count]))
        return through(x, pairs[len(pairs) - count :])

    def _check_image(self, shape):
        super()._check_image(shape)
        check_size(self, shape, self.patch, f"patches of {self.patch} need")

    @classmethod
    def s(cls, patch: int = 2, **options) -> Self:
        """DiT-S: 12 blocks of 384 channels and 6 heads; 33.0 M parameters with patches of 2. Options as in `sized`."""
        return cls.sized(384, 12, 6, patch, **options)

    @classmethod
    def b(cls, patch: int = 2, **options) -> Self:
        """DiT-B: 12 blocks of 768 channels and 12 heads; 130.5 M parameters. Options as in `sized`."""
        return cls.sized(768, 12, 12, patch, **options)

    @classmethod
    def l(cls, patch: int = 2, **options) -> Self:  # noqa: E743
        """DiT-L: 24 blocks of 1024 channels and 16 heads; 458.1 M parameters. Options as in `sized`."""
        return cls.sized(1024, 24, 16, patch, **options)

    @classmethod
    def xl(cls, patch: int = 2, **options) -> Self:
        """DiT-XL: 28 blocks of 1152 channels and 16 heads; 675.1 M parameters. Options as in `sized`."""
        return cls.sized(1152, 28, 16, patch, **options)

    @classmethod
    def sized(cls, width: int, depth: int, heads: int, patch: int = 2, **options) -> Self:
        """The network of the paper for latents of ImageNet (table 1), at any size.

        Args:
            width: the channels of a token.
            depth: the number of blocks.
            heads: of the attention.
            patch: the size of a patch.
            options: the other arguments of `DiT`. By default, as published, `conditions` has the label, one of 1000
                classes, dropped with probability 0.1, and `out_channels` is 8, for latents of 4 channels and a learned
                variance.
        """
        published = {"conditions": {"label": LabelEmbedding(1000, dropout=0.1)}, "out_channels": 8}
        return cls(width, depth, patch, adaptive_block(heads), **{**published, **options})


class Steering(ConfigurableLayer, keras.layers.Layer):
    """The sum of the time embedding and of the vectors of the conditions, (batch, dim).

    Args:
        embedding: a template of the time embedding.
        conditions: a template for each condition, by its name in the input.
    """

    def __init__(
        self, embedding: keras.layers.Layer, conditions: Mapping[str, keras.layers.Layer] | None = None, **kwargs
    ):
        super().__init__(autocast=False, **kwargs)
        self.embedding = copy_layer(embedding)
        self.conditions = {name: copy_layer(layer) for name, layer in (conditions or {}).items()}

    def build(self, shapes):
        """Builds the layers from the shapes of the inputs of the network."""
        time = build_layer(self.embedding, given_to(self.embedding, "time", shapes))
        for name, layer in self.conditions.items():
            build_layer(layer, given_to(layer, name, shapes), time, image=shapes["image"])

    def call(self, inputs, training=None):
        """Maps the inputs of the network, by name, to (batch, dim)."""
        embed = apply_layer(self.embedding, given_to(self.embedding, "time", inputs), training=training)
        for name, layer in self.conditions.items():
            given, others = given_to(layer, name, inputs), {"training": training, "image": inputs["image"]}
            vector = Encoded.of(apply_layer(layer, given, embed, **others)).vector
            embed = embed if vector is None else embed + ops.cast(vector, embed.dtype)
        return embed


def _templates(block: Any) -> Any:
    """One template or a list of them."""
    return [get_layer(one) for one in block] if isinstance(block, (list, tuple)) else get_layer(block)
