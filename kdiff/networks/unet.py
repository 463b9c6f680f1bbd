"""The U-Net: levels of blocks at falling resolution and back, each block on the way up given one from the way down."""

from collections.abc import Mapping, Sequence
from typing import Any, Self

import keras
from keras import ops

from kdiff.base import Value, check_integer
from kdiff.blocks.attention import SelfAttention
from kdiff.blocks.base import (
    Chain,
    ConfigurableLayer,
    apply_layer,
    build_layer,
    copy_layer,
    derive_seed,
    get_layer,
    kernel_initializer,
)
from kdiff.blocks.convolution import ConvBlock, ResidualBlock
from kdiff.blocks.embeddings import MLPEmbedding, SinusoidalEmbedding
from kdiff.blocks.transformer import TransformerBlock


class Level(Value):
    """One resolution of a U-Net: template layers, which the network copies for every use.

    Args:
        width: the channels at this level.
        depth: the number of blocks on the way down; on the way up there is one more.
        block: a block with an argument `width`, which the network sets.
        mixer: a layer that follows each block, such as `SelfAttention()`; None for none.
        downsample: the layer that leads from here to the next, coarser level, at half the size.
        upsample: the layer that leads back from there, at twice the size.
    """

    def __init__(
        self,
        width: int,
        depth: int = 2,
        block: Any = "residual_block",
        mixer: Any = None,
        downsample: Any = "downsample",
        upsample: Any = "upsample",
    ):
        check_integer("Level", "width", width)
        check_integer("Level", "depth", depth)
        self.width = width
        self.depth = depth
        self.block = get_layer(block)
        self.mixer = None if mixer is None else get_layer(mixer)
        self.downsample = get_layer(downsample)
        self.upsample = get_layer(upsample)
        if "width" not in self.block.get_config():
            raise ValueError(f"Level: `block` must have an argument `width`, its channels; received: {self.block!r}")

    def unit(self, *after: keras.layers.Layer) -> list[keras.layers.Layer]:
        """Copies of the block, at this level's width, of the mixer, if there is one, and of the layers `after`."""
        mixers = [] if self.mixer is None else [self.mixer]
        return [copy_layer(self.block, width=self.width), *map(copy_layer, [*mixers, *after])]


class UNet(ConfigurableLayer, keras.Model):
    """A U-Net of levels of template layers, steered by time and by conditions.

        network({"image": (batch, height, width, channels), "time": (batch,), **conditions})
            -> (batch, height, width, out_channels), float32

    Ronneberger et al., "U-Net" (2015), as Ho et al. (2020), appendix B, and Dhariwal & Nichol (2021) have it: the
    outputs of the first convolution, of every block and of every downsampling on the way down are each concatenated to
    the input of one block on the way up. The last convolution is zero at first.

    Height and width may be any multiple of `2 ** (len(levels) - 1)`, and may change from call to call. `time` is what
    the embedding takes: a SinusoidalEmbedding wants it to span some hundreds, as 0 ... 999.

    Args:
        levels: the `Level`s, from the finest to the coarsest.
        middle: a Level of which `depth` blocks, with a mixer between each two, stand between the way down and the way
            up; None for two blocks of the coarsest level, and its mixer.
        embedding: the layer that makes `embed`, (batch, dim), of the time; None for an MLPEmbedding of a
            SinusoidalEmbedding as wide as the first level.
        conditions: a layer for each condition, by its name in the input, such as `{"label": LabelEmbedding(10)}`. What
            it makes is added to `embed` if it has the shape (batch, dim), and is a part of `context` if it has
            (batch, tokens, dim).
        normalization: of the last convolution's input.
        activation: of the last convolution's input.
        out_channels: of the output; None for those of the image.
        seed: from which each copied layer that has a `seed` gets one of its own.
        kwargs: `name` and `dtype`. The precision is that of every layer made from a template; `embedding` and
            `conditions` keep theirs.

    Raises:
        ValueError: if the image does not have rank 4, or a size that the levels divide; if a condition is missing,
            unknown or of another batch size.
    """

    def __init__(
        self,
        levels: Sequence[Level],
        middle: Level | None = None,
        embedding: keras.layers.Layer | None = None,
        conditions: Mapping[str, keras.layers.Layer] | None = None,
        normalization: Any = "group_norm",
        activation: Any = "silu",
        out_channels: int | None = None,
        seed: int = 0,
        **kwargs,
    ):
        super().__init__(autocast=False, **kwargs)
        if not levels or not all(isinstance(level, Level) for level in levels):
            raise ValueError(f"UNet: `levels` must be one `Level` or more; received: {levels!r}")
        if out_channels is not None:
            check_integer("UNet", "out_channels", out_channels)
        check_integer("UNet", "seed", seed, 0)
        self.levels = list(levels)
        self.middle = middle or Level(levels[-1].width, 2, levels[-1].block, levels[-1].mixer)
        self.embedding = embedding or MLPEmbedding(SinusoidalEmbedding(max(2, levels[0].width)))
        self.conditions = dict(conditions or {})
        self.normalization = copy_layer(normalization, name="normalization", dtype=self.dtype_policy)
        self.activation = activation
        self.out_channels = out_channels
        self.seed = seed
        self._activate = keras.activations.get(activation)
        self.stem = keras.layers.Conv2D(
            levels[0].width,
            3,
            padding="same",
            kernel_initializer=kernel_initializer(),
            dtype=self.dtype_policy,
            name="stem",
        )
        self.down = [self._chain(unit, f"down_{i}") for i, unit in enumerate(_way_down(self.levels))]
        self.bridge = self._chain(_between(self.middle), "bridge")
        self.up = [self._chain(unit, f"up_{i}") for i, unit in enumerate(_way_up(self.levels))]
        self._seed_copies()

    def _chain(self, layers, name):
        chain = Chain(layers, name=name)
        for layer in chain._flatten_layers():
            layer.dtype_policy = self.dtype_policy
        return chain

    def _seed_copies(self):
        """Gives each copy its own random numbers: with those of the template, all would drop the same units."""
        copies = [layer for chain in (*self.down, self.bridge, *self.up) for layer in chain._flatten_layers()]
        for index, layer in enumerate(layer for layer in copies if hasattr(layer, "seed")):
            layer.seed = derive_seed(self.seed, index)

    def build(self, input_shape):
        """Builds every layer, from the shapes of the inputs by name."""
        shapes = self._checked({name: tuple(shape) for name, shape in input_shape.items()})
        embed, context = self._build_embeddings(shapes)
        x = build_layer(self.stem, shapes["image"])
        skips = [x]
        for unit in self.down:
            x = build_layer(unit, x, embed, context)
            skips.append(x)
        x = build_layer(self.bridge, x, embed, context)
        for unit in self.up:
            x = build_layer(unit, (*x[:-1], x[-1] + skips.pop()[-1]), embed, context)
        self._build_head(x, self.out_channels or shapes["image"][-1])

    def _build_embeddings(self, shapes):
        embed = build_layer(self.embedding, shapes["time"])
        encoded = {name: build_layer(layer, shapes[name], embed) for name, layer in self.conditions.items()}
        for name, shape in encoded.items():
            if len(shape) not in (2, 3) or (len(shape) == 2 and shape[-1] != embed[-1]):
                raise ValueError(
                    f"UNet: the layer of condition {name!r} must give (batch, {embed[-1]}), the width of the time "
                    f"embedding, or (batch, tokens, dim); it gives: {shape}"
                )
        return embed, _joined([shape for shape in encoded.values() if len(shape) == 3])

    def _build_head(self, x_shape, channels):
        build_layer(self.normalization, x_shape)
        self.head = keras.layers.Conv2D(
            channels, 3, padding="same", kernel_initializer="zeros", dtype="float32", name="head"
        )
        self.head.build(x_shape)

    def call(self, inputs, training=None):
        """The dictionary of inputs (see the class) to (batch, height, width, out_channels), float32."""
        self._checked({name: tuple(value.shape) for name, value in inputs.items()})
        embed, context = self._embed(inputs, training)
        x = self.stem(ops.cast(inputs["image"], self.compute_dtype))
        skips = [x]
        for unit in self.down:
            x = unit(x, embed=embed, context=context, training=training)
            skips.append(x)
        x = self.bridge(x, embed=embed, context=context, training=training)
        for unit in self.up:
            x = ops.concatenate([x, skips.pop()], axis=-1)
            x = unit(x, embed=embed, context=context, training=training)
        x = self._activate(apply_layer(self.normalization, x, training=training))
        return ops.cast(self.head(x), "float32")

    def _embed(self, inputs, training):
        """The sum of the vectors of time and conditions, and the conditions' tokens one after the other, or None."""
        embed = time = apply_layer(self.embedding, inputs["time"], training=training)
        context = []
        for name, layer in self.conditions.items():
            encoded = apply_layer(layer, inputs[name], time, training=training)
            if len(encoded.shape) == 2:
                embed = embed + ops.cast(encoded, embed.dtype)
            else:
                context.append(encoded)
        return embed, ops.concatenate(context, axis=1) if context else None

    def compute_output_spec(self, inputs, training=None):
        """The image's shape with `out_channels`, in float32."""
        *shape, channels = inputs["image"].shape
        return keras.KerasTensor((*shape, self.out_channels or channels), "float32")

    def _checked(self, shapes):
        for name in ("image", "time", *self.conditions):
            if name not in shapes:
                raise ValueError(f"{self.name}: the input {name!r} is missing; received: {sorted(shapes)}")
        for name, shape in shapes.items():
            if name not in ("image", "time", *self.conditions):
                raise ValueError(
                    f"{self.name}: the input {name!r} is unknown; `conditions` has: {list(self.conditions)}"
                )
            if None not in (shape[0], shapes["image"][0]) and shape[0] != shapes["image"][0]:
                raise ValueError(
                    f"{self.name}: the input {name!r} must have the batch size of the image, "
                    f"{shapes['image'][0]}; received the shape: {shape}"
                )
        self._check_image(shapes["image"])
        return shapes

    def _check_image(self, shape):
        if len(shape) != 4 or shape[-1] is None:
            raise ValueError(
                f"{self.name}: the image must have the shape (batch, height, width, channels); received: {shape}"
            )
        factor = 2 ** (len(self.levels) - 1)
        for name, size in zip(("height", "width"), shape[1:3], strict=True):
            if size is not None and (size == 0 or size % factor):
                below, above = size // factor * factor, (size // factor + 1) * factor
                fit = f"{below} or {above}" if below else f"{above}"
                raise ValueError(
                    f"{self.name}: {len(self.levels)} levels need a {name} that {factor} divides; received: {size}. "
                    f"The nearest that fit: {fit}"
                )

    @classmethod
    def basic(cls, width: int = 64, levels: int = 3, depth: int = 2, **options) -> Self:
        """A U-Net of plain convolutions, `ConvBlock`. For `options` see `UNet.composed`."""
        return cls.composed(ConvBlock(), None, width, levels, depth, **options)

    @classmethod
    def residual(
        cls, width: int = 64, levels: int = 3, depth: int = 2, dropout: float = 0.0, scale_shift: bool = True, **options
    ) -> Self:
        """A U-Net of `ResidualBlock`s, without attention. For `options` see `UNet.composed`."""
        return cls.composed(
            ResidualBlock(scale_shift=scale_shift, dropout=dropout), None, width, levels, depth, **options
        )

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
        return cls.composed(
            ResidualBlock(scale_shift=scale_shift, dropout=dropout), mixer, width, levels, depth, **options
        )

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
        return cls.composed(
            ResidualBlock(scale_shift=scale_shift, dropout=dropout), mixer, width, levels, depth, **options
        )

    @classmethod
    def composed(
        cls,
        block: Any = "residual_block",
        mixer: Any = None,
        width: int = 64,
        levels: int = 3,
        depth: int = 2,
        multipliers: Sequence[int] | None = None,
        at: Sequence[int] = (-1,),
        downsample: Any = "downsample",
        upsample: Any = "upsample",
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
            kwargs: the other arguments of `UNet`.
        """
        check_integer("UNet", "width", width)
        check_integer("UNet", "levels", levels)
        multipliers = [min(2**i, 4) for i in range(levels)] if multipliers is None else multipliers
        if len(multipliers) != levels:
            raise ValueError(f"UNet: `multipliers` must be {levels} numbers, one a level; received: {multipliers!r}")
        mixed = {_index("at", i, levels) for i in at}
        made = [
            Level(width * multiplier, depth, block, mixer if i in mixed else None, downsample, upsample)
            for i, multiplier in enumerate(multipliers)
        ]
        kwargs = {"middle": Level(made[-1].width, 2, block, mixer), **kwargs}
        return cls(made, **kwargs)


def _way_down(levels):
    """Lists of layers; the output of each is kept for the way up."""
    for level in levels:
        yield from (level.unit() for _ in range(level.depth))
        if level is not levels[-1]:
            yield [copy_layer(level.downsample)]


def _between(level):
    """`depth` blocks with a mixer between each two."""
    units = [layer for _ in range(level.depth) for layer in level.unit()]
    return units if level.mixer is None or level.depth == 1 else units[:-1]


def _way_up(levels):
    """Lists of layers, the input of each joined by one output of the way down: one more a level than blocks there."""
    for i, level in reversed(list(enumerate(levels))):
        yield from (level.unit() for _ in range(level.depth))
        yield level.unit(*([levels[i - 1].upsample] if i else []))


def _joined(shapes):
    """The shape of sequences one after the other; None for none."""
    if not shapes:
        return None
    if len({shape[-1] for shape in shapes}) > 1:
        raise ValueError(f"UNet: conditions that give tokens must give them one width; they give: {shapes}")
    tokens = [shape[1] for shape in shapes]
    return (shapes[0][0], None if None in tokens else sum(tokens), shapes[0][-1])


def _index(argument, index, length):
    if not -length <= index < length:
        raise ValueError(f"UNet: `{argument}` must be within -{length} ... {length - 1}; received: {index}")
    return index % length
