"""An hourglass network: convolutions at fine resolution and transformers at coarse resolution."""

from collections.abc import Mapping, Sequence
from typing import Any, Self

import keras
from keras import ops

from kdiff.base import check_integer
from kdiff.blocks.base import apply_layer, build_layer, copy_layer, kernel_initializer
from kdiff.blocks.convolution import ResidualBlock
from kdiff.blocks.embeddings import MLPEmbedding, SinusoidalEmbedding
from kdiff.blocks.layers import Conv2D
from kdiff.blocks.patterns import Neighborhood, Pattern
from kdiff.blocks.transformer import adaptive_block
from kdiff.networks.base import Network, check_size
from kdiff.networks.levels import Level, check_levels

__all__ = ["Hybrid"]


class Hybrid(Network):
    """An encoder and a decoder of any blocks, with one skip connection per level.

        network({"image": (batch, height, width, channels), "time": (batch,), **conditions})
            -> (batch, height, width, out_channels), float32

    Hoogeboom et al., "Simple diffusion" (2023), section 3.3: convolutions at fine levels, a transformer below; Crowson
    et al., "Scalable High-Resolution Pixel-Space Image Synthesis with Hourglass Diffusion Transformers" (2024), section
    4: neighbourhood attention at fine levels, global attention at the coarsest, and skips that are learned
    interpolations, `fraction x + (1 - fraction) skip`. Height and width may be any multiple of `2 ** (len(levels) - 1)`
    that the blocks accept. The last convolution is initialised to zero.

    Args:
        levels: the `Level`s, from the finest to the coarsest, with any blocks; `depth` blocks in the encoder and the
            same number in the decoder, once at the coarsest. A downsampling or upsampling layer with an argument
            `width` gets the width of the level that it leads to; one without must produce it.
        embedding: the layer from the time to `embed`, (batch, dim); None for an MLPEmbedding of 256 channels.
        conditions: a layer for each condition, by its name in the input; see `UNet`.
        normalization: before the last convolution.
        activation: before the last convolution.
        out_channels: of the output; None for those of the image.
        remat: whether each block is recomputed in the backward pass, to save memory.
        seed: from which the seed of each copied layer that has one is derived.
        kwargs: `name` and `dtype`.
    """

    def __init__(
        self,
        levels: Sequence[Level],
        embedding: keras.layers.Layer | None = None,
        conditions: Mapping[str, keras.layers.Layer] | None = None,
        normalization: Any = "group_norm",
        activation: Any = "silu",
        out_channels: int | None = None,
        remat: bool = False,
        seed: int = 0,
        **kwargs,
    ):
        check_levels("Hybrid", levels)
        embedding = embedding or MLPEmbedding(SinusoidalEmbedding(64), 256)
        super().__init__(embedding, conditions, out_channels, remat, seed, **kwargs)
        self.levels = list(levels)
        self.normalization = self._copy(normalization, "normalization")
        self.activation = activation
        self._activate = keras.activations.get(activation)
        options = {"kernel_initializer": kernel_initializer(), "dtype": self.dtype_policy}
        self.stem = Conv2D(levels[0].width, 3, padding="same", name="stem", **options)
        finer = self.levels[:-1]
        self.down = [self._level(level, f"down_{i}") for i, level in enumerate(finer)]
        self.bridge = self._level(self.levels[-1], "bridge")
        self.up = [self._level(level, f"up_{i}") for i, level in enumerate(finer)]
        self.shrink = [self._resample(a.downsample, b, f"shrink_{i}") for i, (a, b) in enumerate(self._steps())]
        self.grow = [self._resample(a.upsample, a, f"grow_{i}") for i, (a, b) in enumerate(self._steps())]

    def _steps(self):
        return zip(self.levels[:-1], self.levels[1:], strict=True)

    def _level(self, level, name):
        return [self._chain(unit, f"{name}_{i}") for i, unit in enumerate(level.units_down())]

    def _resample(self, layer, towards, name):
        width = {"width": towards.width} if "width" in layer.get_config() else {}
        return self._chain([copy_layer(layer, **width)], name)

    def _build_body(self, x_shape, embed_shape, context_shape):
        def built(layers, x):
            for layer in layers:
                x = build_layer(layer, x, embed_shape, context_shape)
            return x

        x, skips = build_layer(self.stem, x_shape), []
        for units, shrink in zip(self.down, self.shrink, strict=True):
            skips.append(built(units, x))
            x = built([shrink], skips[-1])
        x = built(self.bridge, x)
        self.fractions = [
            self.add_weight(shape=(), initializer=keras.initializers.Constant(0.5), name=f"fraction_{i}")
            for i in range(len(skips))
        ]
        for units, grow, skip in reversed(list(zip(self.up, self.grow, skips, strict=True))):
            x = built([grow], x)
            if x[-1] != skip[-1]:
                raise ValueError(f"Hybrid: the upsampling returns {x[-1]} channels, but the level has {skip[-1]}")
            x = built(units, x)
        build_layer(self.normalization, x)
        self.head = self._head(Conv2D, 3, padding="same")
        self.head.build(x)

    def _body(self, x, embed, context, training):
        def run(layers, x):
            for layer in layers:
                x = self._run(layer, x, embed, context, training)
            return x

        x, skips = self.stem(x), []
        for units, shrink in zip(self.down, self.shrink, strict=True):
            skips.append(run(units, x))
            x = run([shrink], skips[-1])
        x = run(self.bridge, x)
        for units, grow, fraction in reversed(list(zip(self.up, self.grow, self.fractions, strict=True))):
            skip = skips.pop()
            x = skip + ops.cast(fraction, skip.dtype) * (run([grow], x) - skip)
            x = run(units, x)
        return self.head(self._activate(apply_layer(self.normalization, x, training=training)))

    def _check_image(self, shape):
        super()._check_image(shape)
        check_size(self, shape, 2 ** (len(self.levels) - 1), f"{len(self.levels)} levels need")

    @classmethod
    def composed(
        cls,
        widths: Sequence[int] = (64, 128, 256),
        depths: Sequence[int] = (2, 2, 4),
        convolutional: int = 1,
        pattern: Pattern | str | None = None,
        head_width: int = 64,
        rotary: Any = "rotary",
        dropout: float = 0.0,
        **options,
    ) -> Self:
        """Convolutions at the finest levels, local attention below, global attention at the coarsest.

        Args:
            widths: the channels of each level.
            depths: the number of blocks of each level.
            convolutional: the number of levels with `ResidualBlock`s; the others have adaLN-Zero transformer blocks.
            pattern: the attention pattern of the levels between; None for `Neighborhood(7)`.
            head_width: the channels per head.
            rotary: the relative positions of the attention.
            dropout: the rate of dropout in every block.
            options: the other arguments of `Hybrid`.
        """
        check_integer("Hybrid", "convolutional", convolutional, 0)
        if len(widths) != len(depths):
            raise ValueError(
                f"Hybrid: `widths` and `depths` must have the same length; received: {widths!r} and {depths!r}"
            )
        local = {"pattern": Neighborhood(7) if pattern is None else Pattern.get(pattern)}
        attention = {"head_width": head_width, "rotary": rotary, "dropout": dropout}
        last = len(widths) - 1
        blocks = [
            ResidualBlock(dropout=dropout)
            if i < convolutional
            else adaptive_block(**attention, **({} if i == last else local))
            for i in range(len(widths))
        ]
        return cls([Level(*level) for level in zip(widths, depths, blocks, strict=True)], **options)
