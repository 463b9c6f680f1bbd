"""The U-Net: an encoder and a decoder of blocks, with a skip connection from each encoder block to a decoder block."""

from collections.abc import Mapping, Sequence
from typing import Any, Self

import keras
from keras import ops

from kdiff import deprecated, reuse
from kdiff.base import check_integer
from kdiff.blocks.attention import SelfAttention
from kdiff.blocks.base import apply_layer, build_layer, copy_layer, kernel_initializer
from kdiff.blocks.convolution import ConvBlock, ResidualBlock
from kdiff.blocks.embeddings import MLPEmbedding, SinusoidalEmbedding
from kdiff.blocks.layers import Conv2D
from kdiff.blocks.transformer import TransformerBlock
from kdiff.networks.base import Network, check_size
from kdiff.networks.levels import Level, check_levels

__all__ = ["UNet", "UNetEncoder", "plus"]


class UNetEncoder(Network):
    """The encoder and the middle of a U-Net, to which `UNet` adds a decoder, and `ControlNet` the output convolutions.

    Args:
        levels, middle, embedding, conditions, stem_width: as in `UNet`.
        options: as in `Network`.
    """

    formerly = ("kdiff.networks>WayDown",)

    def __init__(self, levels, middle, embedding, conditions, stem_width, **options):
        name = type(self).__name__
        check_levels(name, levels)
        for level in (*levels, *([middle] if middle else [])):
            if not level.widens:
                raise ValueError(
                    f"{name}: the `block` of a level must have an argument `width`; received: {level.block!r}"
                )
        if stem_width is not None:
            check_integer(name, "stem_width", stem_width)
        embedding = embedding or self._usual_embedding(stem_width or levels[0].width)
        super().__init__(embedding, conditions, **options)
        self.levels = list(levels)
        self.middle = middle or Level(levels[-1].width, 2, levels[-1].block, levels[-1].mixers_down[-1])
        self.stem_width = stem_width
        options = {"kernel_initializer": kernel_initializer(), "dtype": self.dtype_policy, "name": "stem"}
        self.stem = Conv2D(stem_width or levels[0].width, 3, padding="same", **options)
        self.down = [self._chain(unit, f"down_{i}") for i, unit in enumerate(_way_down(self.levels))]
        self.bridge = self._chain(_between(self.middle), "bridge")

    @staticmethod
    def _usual_embedding(width):
        """The default embedding of the time."""
        return MLPEmbedding(SinusoidalEmbedding(max(2, width)))

    def _build_down(self, x_shape, embed_shape, context_shape):
        """(x, kept): the shapes of the output of the middle and of the skip connections."""
        kept = [self._build_stem(x_shape, embed_shape)]
        for unit in self.down:
            kept.append(build_layer(unit, kept[-1], embed_shape, context_shape))
        return build_layer(self.bridge, kept[-1], embed_shape, context_shape), kept

    def _build_stem(self, x_shape, embed_shape):
        return build_layer(self.stem, x_shape)

    def _run_down(self, x, embed, context, training):
        """(x, kept): the output of the middle and the skip connections."""
        kept = self._through(self.down, [x], embed, context, training)
        return self._run(self.bridge, kept[-1], embed, context, training), kept

    def _through(self, units, kept, embed, context, training):
        """The skip connections `kept`, and the outputs of the units that follow the last of them."""
        kept = list(kept)
        for unit in units:
            kept.append(self._run(unit, kept[-1], embed, context, training))
        return kept

    def _check_image(self, shape):
        super()._check_image(shape)
        check_size(self, shape, 2 ** (len(self.levels) - 1), f"{len(self.levels)} levels need")


class UNet(UNetEncoder):
    """A U-Net composed of levels of template layers, conditioned on time and conditions.

        network({"image": (batch, height, width, channels), "time": (batch,), **conditions})
            -> (batch, height, width, out_channels), float32

    Ronneberger et al., "U-Net" (2015), in the form of Ho et al. (2020), appendix B, and Dhariwal & Nichol (2021): the
    outputs of the first convolution and of every block and downsampling of the encoder are each concatenated to the
    input of one block of the decoder. The last convolution is initialised to zero.

    Height and width may be any multiple of `2 ** (len(levels) - 1)` (of twice that with `shrink`), and may change
    between calls. The same holds for the length of a series (batch, length, channels) and the sizes of a volume (batch,
    depth, height, width, channels): the rank is inferred in `build`. `time` is the input of the embedding; for a
    SinusoidalEmbedding it should span some hundreds, as 0 ... 999.

    Args:
        levels: the `Level`s, from the finest to the coarsest.
        middle: a Level whose `depth` blocks, with a mixer between consecutive ones, stand between encoder and decoder,
            none if that is 0; None for two blocks of the coarsest level, and its mixer.
        embedding: the layer from the time to `embed`, (batch, dim); None for an MLPEmbedding of a SinusoidalEmbedding
            as wide as the first convolution.
        conditions: a layer for each condition, by its name in the input, such as `{"label": LabelEmbedding(10)}`. Its
            output is added to `embed` if it is a vector, (batch, dim), becomes a part of `context` if it is tokens,
            (batch, tokens, dim), and is concatenated to the channels of the image if it is a map.
        normalization: before the last convolution.
        activation: before the last convolution.
        out_channels: of the output; None for those of the image.
        remat: whether each block is recomputed in the backward pass, to save memory.
        seed: from which the seed of each copied layer that has one is derived.
        stem_width: the channels of the first convolution; None for those of the first level.
        shrink, grow: layers around the levels, after the first convolution to half the size, and before the last to
            twice the size, such as "downsample" and "upsample": no block works at full size. None for none.
        kwargs: `name` and `dtype`. The precision applies to every layer made from a template; `embedding` and
            `conditions` keep theirs.

    Raises:
        ValueError: if the rank of the image is not 3 to 5, or its size is not divisible as above; if a condition is
            missing, unknown or of another batch size.
    """

    any_size = True  # the image may have another size than at build, unless a layer fixes it

    def __init__(
        self,
        levels: Sequence[Level],
        middle: Level | None = None,
        embedding: keras.layers.Layer | None = None,
        conditions: Mapping[str, keras.layers.Layer] | None = None,
        normalization: Any = "group_norm",
        activation: Any = "silu",
        out_channels: int | None = None,
        remat: bool = False,
        seed: int = 0,
        stem_width: int | None = None,
        shrink: Any = None,
        grow: Any = None,
        **kwargs,
    ):
        if (shrink is None) != (grow is None):
            raise ValueError(f"UNet: `shrink` and `grow` must be given together; received: {shrink!r} and {grow!r}")
        options = {"out_channels": out_channels, "remat": remat, "seed": seed}
        super().__init__(levels, middle, embedding, conditions, stem_width, **options, **kwargs)
        self.normalization = self._copy(normalization, "normalization")
        self.activation = activation
        self._activate = keras.activations.get(activation)
        self.shrink = None if shrink is None else self._copy(shrink, "shrink")
        self.grow = None if grow is None else self._copy(grow, "grow")
        self.up = [self._chain(unit, f"up_{i}") for i, unit in enumerate(self._way_up())]

    def _way_up(self):
        """The units of the decoder, the input of each concatenated with one skip connection."""
        for i, level in reversed(list(enumerate(self.levels))):
            yield from level.units_up(*([self.levels[i - 1].upsample] if i else []))

    def _check_image(self, shape):
        super()._check_image(shape)
        if self.shrink is not None:
            check_size(self, shape, 2 ** len(self.levels), f"{len(self.levels)} levels behind `shrink` need")

    def _build_stem(self, x_shape, embed_shape):
        x = super()._build_stem(x_shape, embed_shape)
        return x if self.shrink is None else build_layer(self.shrink, x, embed_shape)

    def _build_body(self, x_shape, embed_shape, context_shape):
        x, skips = self._build_down(x_shape, embed_shape, context_shape)
        for unit in self.up:
            x = build_layer(unit, (*x[:-1], x[-1] + skips.pop()[-1]), embed_shape, context_shape)
        x = x if self.grow is None else build_layer(self.grow, x, embed_shape)
        build_layer(self.normalization, x)
        self.head = self._head(Conv2D, 3, padding="same")
        self.head.build(x)

    def call(self, inputs, training=None, skips=None, middle=None, encoded=None):
        """As in `Network`.

        Args:
            inputs: the dictionary of inputs.
            training: whether this is training.
            skips: added to the skip connections, as in ControlNet (Zhang et al., 2023, section 3.2): one map for each,
                in the order of the encoder, the stem's first.
            middle: added to the output of the middle.
            encoded: the output of the method `encoded` for these inputs, if it was already computed.
        """
        return self._output(inputs, training, **_given(encoded=encoded, skips=skips, middle=middle))

    def compute_output_spec(self, inputs, training=None, skips=None, middle=None, encoded=None):
        """As in `Network`."""
        return super().compute_output_spec(inputs, training)

    def _body(self, x, embed, context, training, skips=None, middle=None):
        x = self.stem(x)
        x = x if self.shrink is None else apply_layer(self.shrink, x, embed, training=training)
        self._check_skips(skips)
        count = min(reuse.shallow_blocks(), len(self.down))
        first = self._through(self.down[:count], [x], embed, context, training)

        def deep():
            kept = self._through(self.down[count:], first[-1:], embed, context, training)
            y = plus(self._run(self.bridge, kept[-1], embed, context, training), middle)
            more = skips if skips is None else skips[count:]
            return (self._back(self.up[: -count - 1], y, kept, more, embed, context, training),)

        (x,) = reuse.once("deep", self, x, deep)
        x = self._back(self.up[-count - 1 :], x, first, skips, embed, context, training)
        x = x if self.grow is None else apply_layer(self.grow, x, embed, training=training)
        return self.head(self._activate(apply_layer(self.normalization, x, training=training)))

    def _back(self, units, x, kept, more, embed, context, training):
        """The output of these units of the way up, each given one of the last skip connections, with the additions."""
        for i, unit in enumerate(units):
            j = len(kept) - 1 - i
            joined = ops.concatenate([x, plus(kept[j], None if more is None else more[j])], axis=-1)
            x = self._run(unit, joined, embed, context, training)
        return x

    def _check_skips(self, skips):
        if skips is not None and len(skips) != len(self.up):
            raise ValueError(f"{self.name}: `skips` must be {len(self.up)} maps; received: {len(skips)}")

    @classmethod
    def basic(cls, width: int = 64, levels: int = 3, depth: int = 2, **options) -> Self:
        """A U-Net of plain convolutions, `ConvBlock`. For `options` see `UNet.composed`."""
        return cls._own(ConvBlock(), None, width, levels, depth, options)

    @classmethod
    def residual(
        cls, width: int = 64, levels: int = 3, depth: int = 2, dropout: float = 0.0, scale_shift: bool = True, **options
    ) -> Self:
        """A U-Net of `ResidualBlock`s, without attention. For `options` see `UNet.composed`."""
        return cls._own(ResidualBlock(scale_shift=scale_shift, dropout=dropout), None, width, levels, depth, options)

    @classmethod
    def attention(
        cls,
        width: int = 64,
        levels: int = 3,
        depth: int = 2,
        dropout: float = 0.0,
        scale_shift: bool = True,
        heads: int | None = None,
        head_width: int | None = None,
        **options,
    ) -> Self:
        """A U-Net of `ResidualBlock`s with `SelfAttention` at the levels `at`. For `options` see `UNet.composed`.

        The U-Net of Ho et al. (2020) with `scale_shift=False`, of Dhariwal & Nichol (2021) with `head_width=64`.
        """
        mixer = SelfAttention(heads, head_width)
        return cls._own(ResidualBlock(scale_shift=scale_shift, dropout=dropout), mixer, width, levels, depth, options)

    @classmethod
    def transformer(
        cls,
        width: int = 64,
        levels: int = 3,
        depth: int = 2,
        dropout: float = 0.0,
        scale_shift: bool = True,
        heads: int | None = 4,
        head_width: int | None = None,
        ratio: int = 4,
        adaptive: bool = False,
        **options,
    ) -> Self:
        """A U-Net of `ResidualBlock`s followed by `TransformerBlock`s at the levels `at`.

        These attend to the tokens of conditions, as in Rombach et al. (2022). For `options` see
        `UNet.composed`.
        """
        mixer = TransformerBlock(heads, head_width, ratio, adaptive=adaptive, dropout=dropout)
        return cls._own(ResidualBlock(scale_shift=scale_shift, dropout=dropout), mixer, width, levels, depth, options)

    @classmethod
    def _own(cls, block, mixer, width, levels, depth, options: dict[str, Any]) -> Self:
        """`composed` with a fixed block and mixer."""
        if given := sorted({"block", "mixer"} & options.keys()):
            raise TypeError(
                f"{cls.__name__}: {given} are fixed for this kind of U-Net; for others use `UNet.composed(block, "
                "mixer, width, levels, depth)`"
            )
        return cls.composed(block, mixer, width, levels, depth, **options)

    @classmethod
    def composed(
        cls,
        block: Any = "residual_block",
        mixer: Any = None,
        width: int = 64,
        levels: int = 3,
        depth: int = 2,
        multipliers: Sequence[float] | None = None,
        at: Sequence[int] = (-1,),
        downsample: Any = "downsample",
        upsample: Any = "upsample",
        up_mixers: int | None = None,
        **kwargs,
    ) -> Self:
        """A U-Net with one kind of block and of mixer.

        Args:
            block: a block with an argument `width`, or its name.
            mixer: the layer that follows each block at the levels `at`, and between the two blocks in the middle.
            width: the base channels, multiplied at each level by its multiplier.
            levels: the number of levels.
            depth: the number of blocks per level.
            multipliers: the channels of each level as multiples of `width`; None for 1, 2, 4, 4, 4 ...
            at: the levels with mixers, 0 being the finest and -1 the coarsest.
            downsample: a layer that halves the size, or its name.
            upsample: a layer that doubles it, or its name.
            up_mixers: the number of mixers in the decoder of each such level; None for one after each block.
            kwargs: the other arguments of `UNet`.
        """
        check_integer("UNet", "width", width)
        check_integer("UNet", "levels", levels)
        multipliers = [min(2**i, 4) for i in range(levels)] if multipliers is None else multipliers
        if len(multipliers) != levels:
            raise ValueError(f"UNet: `multipliers` must be {levels} numbers, one per level; received: {multipliers!r}")
        mixed = {_index("at", i, levels) for i in at}
        made = [
            Level(int(width * multiplier), depth, block, mixer if i in mixed else None, downsample, upsample, up_mixers)
            for i, multiplier in enumerate(multipliers)
        ]
        kwargs = {"middle": Level(made[-1].width, 2, block, mixer), **kwargs}
        return cls(made, **kwargs)


def plus(x, more):
    """x plus an addition, if there is one."""
    return x if more is None else x + ops.cast(more, x.dtype)


def _given(**options):
    """The options that are not None."""
    return {name: value for name, value in options.items() if value is not None}


def _way_down(levels):
    """The units of the encoder; the output of each is a skip connection."""
    for level in levels:
        yield from level.units_down()
        if level is not levels[-1]:
            yield [copy_layer(level.downsample)]


def _between(level):
    """`depth` blocks with a mixer between consecutive ones."""
    *units, last = level.units_down() or [[]]
    units.append(last if level.depth == 1 else last[:1])
    return [layer for unit in units for layer in unit]


def _index(argument, index, length):
    if not -length <= index < length:
        raise ValueError(f"UNet: `{argument}` must be within -{length} ... {length - 1}; received: {index}")
    return index % length


__getattr__ = deprecated.names(__name__, WayDown="UNetEncoder")
