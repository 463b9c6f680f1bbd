"""The U-Net: levels of blocks at falling resolution and back, each block on the way up given one from the way down."""

from collections.abc import Mapping, Sequence
from typing import Any, Self

import keras
from keras import ops

from kdiff.base import Value, check_integer
from kdiff.blocks.attention import SelfAttention
from kdiff.blocks.base import apply_layer, build_layer, copy_layer, get_layer, kernel_initializer
from kdiff.blocks.convolution import ConvBlock, ResidualBlock
from kdiff.blocks.embeddings import MLPEmbedding, SinusoidalEmbedding
from kdiff.blocks.layers import Conv2D
from kdiff.blocks.transformer import TransformerBlock
from kdiff.networks.base import Network, check_size

__all__ = ["Level", "UNet", "WayDown", "check_levels"]


class Level(Value):
    """One resolution of a U-Net: template layers, which the network copies for every use.

    Args:
        width: the channels at this level.
        depth: the number of blocks on the way down; on the way up there is one more. Of the middle it may be 0.
        block: a block; where it has an argument `width`, the network sets it, and a UNet needs that.
        mixer: a layer that follows each block, such as `SelfAttention()`; None for none; or a list of `depth` of these,
            one a block.
        downsample: the layer that leads from here to the next, coarser level, at half the size.
        upsample: the layer that leads back from there, at twice the size.
        up_mixers: the number of mixers on the way up, after the last of the blocks; None for one after each.
        up_mixer: what follows each block on the way up: "same" for `mixer`, else a layer, None or a list of `depth + 1`
            of these.
    """

    def __init__(
        self,
        width: int,
        depth: int = 2,
        block: Any = "residual_block",
        mixer: Any = None,
        downsample: Any = "downsample",
        upsample: Any = "upsample",
        up_mixers: int | None = None,
        up_mixer: Any = "same",
    ):
        check_integer("Level", "width", width)
        check_integer("Level", "depth", depth, 0)
        if up_mixers is not None:
            check_integer("Level", "up_mixers", up_mixers, 0)
        self.width = width
        self.depth = depth
        self.block = get_layer(block)
        self.mixer = _mixers(mixer, depth)
        self.downsample = get_layer(downsample)
        self.upsample = get_layer(upsample)
        self.up_mixers = up_mixers
        self.up_mixer = up_mixer if isinstance(up_mixer, str) and up_mixer == "same" else _mixers(up_mixer, depth + 1)

    def unit(self, mixer: keras.layers.Layer | None, *after: keras.layers.Layer) -> list[keras.layers.Layer]:
        """Copies of the block, at this level's width, of a mixer, if there is one, and of the layers `after`."""
        width = {"width": self.width} if self.widens else {}
        mixers = [] if mixer is None else [mixer]
        return [copy_layer(self.block, **width), *map(copy_layer, [*mixers, *after])]

    @property
    def mixers_down(self) -> list[keras.layers.Layer | None]:
        """What follows each block on the way down."""
        return self.mixer if isinstance(self.mixer, list) else [self.mixer] * self.depth

    @property
    def mixers_up(self) -> list[keras.layers.Layer | None]:
        """What follows each block on the way up."""
        mixer, count = self.mixer if isinstance(self.up_mixer, str) else self.up_mixer, self.depth + 1
        if isinstance(mixer, list) and isinstance(self.up_mixer, str):
            raise ValueError("Level: a list of mixers for the way down needs an `up_mixer` for the way up")
        mixers = mixer if isinstance(mixer, list) else [mixer] * count
        plain = 0 if self.up_mixers is None else max(0, count - self.up_mixers)
        return [None] * plain + mixers[plain:]

    def units_down(self) -> list[list[keras.layers.Layer]]:
        """The `depth` units of the way down."""
        return [self.unit(mixer) for mixer in self.mixers_down]

    def units_up(self, *after: keras.layers.Layer) -> list[list[keras.layers.Layer]]:
        """The units of the way up, one more than `depth`, the last with the layers `after`."""
        *mixers, last = self.mixers_up
        return [*(self.unit(mixer) for mixer in mixers), self.unit(last, *after)]

    @property
    def widens(self) -> bool:
        """Whether the block has an argument `width`; otherwise it keeps the channels of its input."""
        return "width" in self.block.get_config()


class WayDown(Network):
    """The first half of a U-Net, to the middle: `UNet` adds the way up, `kdiff.networks.ControlNet` what it hands over.

    Args:
        levels, middle, embedding, conditions, stem_width: as in `UNet`.
        options: of `Network`.
    """

    def __init__(self, levels, middle, embedding, conditions, stem_width, **options):
        name = type(self).__name__
        check_levels(name, levels)
        for level in (*levels, *([middle] if middle else [])):
            if not level.widens:
                raise ValueError(f"{name}: a level's `block` must have an argument `width`; received: {level.block!r}")
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
        """Of the time, where none is given."""
        return MLPEmbedding(SinusoidalEmbedding(max(2, width)))

    def _build_down(self, x_shape, embed_shape, context_shape):
        """(x, kept): the shapes of the output of the middle, and of those that the way up is given."""
        kept = [self._build_stem(x_shape, embed_shape)]
        for unit in self.down:
            kept.append(build_layer(unit, kept[-1], embed_shape, context_shape))
        return build_layer(self.bridge, kept[-1], embed_shape, context_shape), kept

    def _build_stem(self, x_shape, embed_shape):
        return build_layer(self.stem, x_shape)

    def _run_down(self, x, embed, context, training):
        """(x, kept) of the input of the first level."""
        kept = [x]
        for unit in self.down:
            kept.append(self._run(unit, kept[-1], embed, context, training))
        return self._run(self.bridge, kept[-1], embed, context, training), kept

    def _check_image(self, shape):
        super()._check_image(shape)
        check_size(self, shape, 2 ** (len(self.levels) - 1), f"{len(self.levels)} levels need")


class UNet(WayDown):
    """A U-Net of levels of template layers, steered by time and by conditions.

        network({"image": (batch, height, width, channels), "time": (batch,), **conditions})
            -> (batch, height, width, out_channels), float32

    Ronneberger et al., "U-Net" (2015), as Ho et al. (2020), appendix B, and Dhariwal & Nichol (2021) have it: the
    outputs of the first convolution, of every block and of every downsampling on the way down are each concatenated to
    the input of one block on the way up. The last convolution is zero at first.

    Height and width may be any multiple of `2 ** (len(levels) - 1)`, of twice that with `shrink`, and may change from
    call to call. So may the length of a series (batch, length, channels) and the sizes of a volume (batch, depth,
    height, width, channels), which the network takes as well: its rank is that of what it is built for. `time` is what
    the embedding takes: a SinusoidalEmbedding wants it to span some hundreds, as 0 ... 999.

    Args:
        levels: the `Level`s, from the finest to the coarsest.
        middle: a Level of which `depth` blocks, with a mixer between each two, stand between the way down and the way
            up, none if that is 0; None for two blocks of the coarsest level, and its mixer.
        embedding: the layer that makes `embed`, (batch, dim), of the time; None for an MLPEmbedding of a
            SinusoidalEmbedding as wide as the first convolution.
        conditions: a layer for each condition, by its name in the input, such as `{"label": LabelEmbedding(10)}`. What
            it gives is added to `embed` if it is a vector, (batch, dim), is a part of `context` if it is tokens,
            (batch, tokens, dim), and is joined to the channels of the image if it is a map.
        normalization: of the last convolution's input.
        activation: of the last convolution's input.
        out_channels: of the output; None for those of the image.
        remat: whether the inside of each block is computed again for the gradient, to save memory.
        seed: from which each copied layer that has a `seed` gets one of its own.
        stem_width: the channels of the first convolution; None for those of the first level.
        shrink, grow: layers around the levels, after the first convolution at half the size, and before the last at
            twice the size, such as "downsample" and "upsample": no block works at the size of the image. None for none.
        kwargs: `name` and `dtype`. The precision is that of every layer made from a template; `embedding` and
            `conditions` keep theirs.

    Raises:
        ValueError: if the image has no rank from 3 to 5, or a size that the levels do not divide; if a condition is
        missing, unknown or of another batch size.
    """

    any_size = True  # of images, whatever it was built for, if its layers are not for one size

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
            raise ValueError(f"UNet: `shrink` and `grow` go together; received: {shrink!r} and {grow!r}")
        options = {"out_channels": out_channels, "remat": remat, "seed": seed}
        super().__init__(levels, middle, embedding, conditions, stem_width, **options, **kwargs)
        self.normalization = self._copy(normalization, "normalization")
        self.activation = activation
        self._activate = keras.activations.get(activation)
        self.shrink = None if shrink is None else self._copy(shrink, "shrink")
        self.grow = None if grow is None else self._copy(grow, "grow")
        self.up = [self._chain(unit, f"up_{i}") for i, unit in enumerate(self._way_up())]

    def _way_up(self):
        """Lists of layers, the input of each joined by one output of the way down."""
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
            skips: what is added to the outputs that the way down hands to the way up, as ControlNet does (Zhang et al.,
                2023, section 3.2): maps, as many as there are, in the order of the way down, the stem's first.
            middle: what is added to the output of the middle.
            encoded: what the method `encoded` has made of these inputs, if it was called already.
        """
        return self._output(inputs, training, **_given(encoded=encoded, skips=skips, middle=middle))

    def compute_output_spec(self, inputs, training=None, skips=None, middle=None, encoded=None):
        """As in `Network`."""
        return super().compute_output_spec(inputs, training)

    def _body(self, x, embed, context, training, skips=None, middle=None):
        x = self.stem(x)
        x = x if self.shrink is None else apply_layer(self.shrink, x, embed, training=training)
        x, kept = self._run_down(x, embed, context, training)
        x, kept = self._with_additions(x, kept, skips, middle)
        for unit in self.up:
            x = self._run(unit, ops.concatenate([x, kept.pop()], axis=-1), embed, context, training)
        x = x if self.grow is None else apply_layer(self.grow, x, embed, training=training)
        return self.head(self._activate(apply_layer(self.normalization, x, training=training)))

    def _with_additions(self, x, kept, skips, middle):
        """The output of the middle and those that are kept for the way up, with what is added to them."""
        if skips is not None and len(skips) != len(kept):
            raise ValueError(f"{self.name}: `skips` must be {len(kept)} maps; received: {len(skips)}")
        kept = kept if skips is None else [y + ops.cast(more, y.dtype) for y, more in zip(kept, skips, strict=True)]
        return x if middle is None else x + ops.cast(middle, x.dtype), kept

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
        """A U-Net of `ResidualBlock`s with a `TransformerBlock` after each at the levels `at`.

        A condition whose layer gives tokens is attended to there, as in Rombach et al. (2022). For `options` see
        `UNet.composed`.
        """
        mixer = TransformerBlock(heads, head_width, ratio, adaptive=adaptive, dropout=dropout)
        return cls._own(ResidualBlock(scale_shift=scale_shift, dropout=dropout), mixer, width, levels, depth, options)

    @classmethod
    def _own(cls, block, mixer, width, levels, depth, options: dict[str, Any]) -> Self:
        """`composed` of parts that the caller does not choose."""
        if given := sorted({"block", "mixer"} & options.keys()):
            raise TypeError(
                f"{cls.__name__}: {given} are what this kind of U-Net is made of; others go to `UNet.composed(block, "
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
        """A U-Net of one kind of block and of mixer.

        Args:
            block: a block with an argument `width`, or its name.
            mixer: the layer that follows each block at the levels `at`, and stands between the two in the middle.
            width: the channels of the first level, before its multiplier.
            levels: the number of levels.
            depth: the number of blocks at each.
            multipliers: the channels of each level as multiples of `width`; None for 1, 2, 4, 4, 4 ...
            at: the levels with mixers, 0 being the finest and -1 the coarsest.
            downsample: a layer that halves the size, or its name.
            upsample: a layer that doubles it, or its name.
            up_mixers: the number of mixers on the way up of each such level; None for one after each block.
            kwargs: the other arguments of `UNet`.
        """
        check_integer("UNet", "width", width)
        check_integer("UNet", "levels", levels)
        multipliers = [min(2**i, 4) for i in range(levels)] if multipliers is None else multipliers
        if len(multipliers) != levels:
            raise ValueError(f"UNet: `multipliers` must be {levels} numbers, one a level; received: {multipliers!r}")
        mixed = {_index("at", i, levels) for i in at}
        made = [
            Level(int(width * multiplier), depth, block, mixer if i in mixed else None, downsample, upsample, up_mixers)
            for i, multiplier in enumerate(multipliers)
        ]
        kwargs = {"middle": Level(made[-1].width, 2, block, mixer), **kwargs}
        return cls(made, **kwargs)


def check_levels(owner: str, levels: Sequence[Level]) -> None:
    """Raises a ValueError unless they are one `Level` or more, of one block or more, as the middle need not have."""
    if isinstance(levels, int):
        raise ValueError(
            f"{owner}: `levels` must be a list of `Level`s; received: {levels}. From widths and numbers one is made by "
            f"`UNet.residual(width=64, levels={levels})`, `UNet.attention`, `Hybrid.composed` and the like"
        )
    if not isinstance(levels, Sequence) or not levels or not all(isinstance(level, Level) for level in levels):
        raise ValueError(f"{owner}: `levels` must be one `Level` or more; received: {levels!r}")
    if not all(level.depth for level in levels):
        raise ValueError(f"{owner}: each of `levels` must have a `depth` of 1 or more; received: {levels!r}")


def _given(**options):
    """Those that are not None."""
    return {name: value for name, value in options.items() if value is not None}


def _way_down(levels):
    """Lists of layers; the output of each is kept for the way up."""
    for level in levels:
        yield from level.units_down()
        if level is not levels[-1]:
            yield [copy_layer(level.downsample)]


def _between(level):
    """`depth` blocks with a mixer between each two."""
    *units, last = level.units_down() or [[]]
    units.append(last if level.depth == 1 else last[:1])
    return [layer for unit in units for layer in unit]


def _mixers(given, count):
    """A template, None, or a list of so many."""
    if isinstance(given, (list, tuple)):
        if len(given) != count:
            raise ValueError(f"Level: a list of mixers must have {count}, one a block; received: {len(given)}")
        return [None if one is None else get_layer(one) for one in given]
    return None if given is None else get_layer(given)


def _index(argument, index, length):
    if not -length <= index < length:
        raise ValueError(f"UNet: `{argument}` must be within -{length} ... {length - 1}; received: {index}")
    return index % length
