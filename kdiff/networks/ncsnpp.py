"""NCSN++: a U-Net with a progressively downsampled input and a progressively upsampled output.

Song et al., "Score-Based Generative Modeling through Stochastic Differential Equations" (2021), appendix H,
"progressive architecture", after Karras et al., "Analyzing and Improving the Image Quality of StyleGAN" (2020),
figure 7.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import keras
from keras import ops

from kdiff.base import check_number
from kdiff.blocks.base import ConfigurableLayer, apply_layer, build_layer, copy_layer, get_layer, kernel_initializer
from kdiff.blocks.embeddings import FourierEmbedding, MLPEmbedding
from kdiff.blocks.layers import Conv2D
from kdiff.blocks.resampling import FIRDownsample
from kdiff.networks.levels import Level
from kdiff.networks.unet import UNet, plus

__all__ = ["InputResidual", "InputSkip", "NCSNpp", "OutputSkip"]


class InputSkip(ConfigurableLayer, keras.layers.Layer):
    """Adds the image, downsampled to the same size, after a downsampling: `image = down(image)`, `x + W image`.

    Args:
        downsample: a layer that halves the image.
    """

    def __init__(self, downsample: Any = "fir_downsample", **kwargs):
        super().__init__(**kwargs)
        self.downsample = copy_layer(downsample, name="downsample", dtype=self.dtype_policy)

    def build(self, x_shape, image_shape):
        """Builds the downsampling and the 1x1 convolution `W`."""
        options = {"kernel_initializer": kernel_initializer(), "dtype": self.dtype_policy}
        self.convolution = Conv2D(x_shape[-1], 1, **options)
        build_layer(self.convolution, build_layer(self.downsample, image_shape))

    def call(self, x, image):
        """Maps a map and an image of twice its size to the sum and the image at the size of the map."""
        image = self.downsample(image)
        return x + self.convolution(image), image

    def next_shape(self, x_shape, image_shape):
        """The shape of the image that `call` returns."""
        return (*x_shape[:-1], image_shape[-1])


class InputResidual(ConfigurableLayer, keras.layers.Layer):
    """Adds a downsampled residual stream, and passes the sum on: `image = x = (x + down(image)) / c`.

    Args:
        downsample: a layer that halves the size, with an argument `width`, which is set to the channels of `x`; None is
            `FIRDownsample(convolution=True)`.
        rescale: the divisor c.
    """

    def __init__(self, downsample: Any = None, rescale: float = math.sqrt(2), **kwargs):
        super().__init__(**kwargs)
        check_number("InputResidual", "rescale", rescale, 1e-6)
        self.downsample = FIRDownsample(convolution=True) if downsample is None else get_layer(downsample)
        self.rescale = rescale

    def build(self, x_shape, image_shape):
        """Builds a copy of the downsampling at the width of `x`."""
        self.down = copy_layer(self.downsample, name="down", width=x_shape[-1], dtype=self.dtype_policy)
        build_layer(self.down, image_shape)

    def call(self, x, image):
        """Maps a map and the stream, of twice its size, to (sum, sum)."""
        x = (x + self.down(image)) / self.rescale
        return x, x

    def next_shape(self, x_shape, image_shape):
        """The shape of the stream that `call` returns."""
        return x_shape


class OutputSkip(ConfigurableLayer, keras.layers.Layer):
    """Adds the contribution of a map to the output image, which is then upsampled: `up(image + W silu(norm(x)))`.

    `W` is a 3x3 convolution, initialised to zero.

    Args:
        upsample: a layer that doubles the size.
        normalization: a normalising layer or its name.
        activation: a Keras activation.
    """

    def __init__(
        self, upsample: Any = "fir_upsample", normalization: Any = "group_norm", activation: Any = "silu", **kwargs
    ):
        super().__init__(**kwargs)
        self.upsample = copy_layer(upsample, name="upsample", dtype=self.dtype_policy)
        self.normalization = copy_layer(normalization, name="normalization", dtype=self.dtype_policy)
        self.activation = activation
        self._activate = keras.activations.get(activation)

    def build(self, x_shape, channels):
        """Builds the normalisation, the convolution to this many channels and the upsampling."""
        options = {"kernel_initializer": kernel_initializer(zero=True), "dtype": self.dtype_policy}
        self.convolution = Conv2D(channels, 3, padding="same", **options)
        build_layer(self.upsample, build_layer(self.convolution, build_layer(self.normalization, x_shape)))

    def call(self, x, image=None):
        """Maps a map, and the image at its size or None, to the image at twice the size."""
        y = self.convolution(self._activate(apply_layer(self.normalization, x)))
        return self.upsample(y if image is None else image + y)


class NCSNpp(UNet):
    """A `UNet` that receives the image at each resolution and adds to its output at each resolution.

        network({"image": (batch, height, width, channels), "time": (batch,), **conditions})
            -> (batch, height, width, out_channels), float32

    Song et al. (2021), appendix H. Its levels have `ResidualBlock(scale_shift=False, rescale=sqrt(2))`, FIR resampling
    inside such blocks and attention with the same rescaling; see `kdiff.networks.published`.

    Args:
        levels, middle, conditions, normalization, activation, out_channels, remat, seed, stem_width: as in `UNet`.
        embedding: as in `UNet`; None for an MLPEmbedding of Fourier features of scale 16: `time` is log(sigma).
        progressive_input: a template of the layer that adds the image at each level but the finest, `InputSkip()` or
            `InputResidual()`; None for none.
        progressive_output: a template of the layer that adds to the output at each level, `OutputSkip()`; None for
            none.
        divide: whether the output is divided by `sigma = exp(time)`, so that it is the score.
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
        remat: bool = False,
        seed: int = 0,
        stem_width: int | None = None,
        progressive_input: keras.layers.Layer | None = None,
        progressive_output: keras.layers.Layer | None = None,
        divide: bool = False,
        **kwargs,
    ):
        ends = (normalization, activation, out_channels, remat, seed, stem_width)
        super().__init__(levels, middle, embedding, conditions, *ends, **kwargs)
        self.progressive_input = progressive_input
        self.progressive_output = progressive_output
        self.divide = divide
        self.grow = [self._chain([copy_layer(level.upsample)], f"grow_{i}") for i, level in self._finer()]
        self.inputs_down = self._copies_of(progressive_input, "input")
        self.outputs_up = self._copies_of(progressive_output, "output")

    @staticmethod
    def _usual_embedding(width):
        return MLPEmbedding(FourierEmbedding(2 * width, 16.0, sine_first=True), 4 * width)

    def _finer(self):
        return enumerate(self.levels[:-1])

    def _copies_of(self, template, name):
        return [self._copy(template, f"{name}_{i}") for i, _ in self._finer()] if template is not None else []

    def _way_up(self):
        """As in `UNet`, without the upsampling: which follows a contribution to the output."""
        for level in reversed(self.levels):
            yield from level.units_up()

    def _build_body(self, x_shape, embed_shape, context_shape):
        def built(unit, x):
            return build_layer(unit, x, embed_shape, context_shape)

        image, channels = x_shape, self._channels
        skips = [build_layer(self.stem, x_shape)]
        for i, unit in self._numbered_down():
            skips.append(built(unit, skips[-1]))
            if i is not None and self.inputs_down:
                image = self._build_input(self.inputs_down[i], skips[-1], image)
        x = built(self.bridge, skips[-1])
        for i, unit in self._numbered_up():
            x = built(unit, (*x[:-1], x[-1] + skips.pop()[-1]))
            if i is not None:
                self._build_output(i, x, channels)
                x = built(self.grow[i], x)
        build_layer(self.normalization, x)
        self.head = self._head(Conv2D, 3, padding="same")
        self.head.build(x)

    def _build_input(self, layer, x, image):
        if not layer.built:
            layer.build(x, image)
        return layer.next_shape(x, image)

    def _build_output(self, i, x, channels):
        if self.outputs_up and not self.outputs_up[i].built:
            self.outputs_up[i].build(x, channels)

    def _numbered_down(self):
        """The units of the encoder; a downsampling with the index of the level before it, others with None."""
        numbers = [n for i, level in enumerate(self.levels) for n in [*[None] * level.depth, i]]
        return zip(numbers[:-1], self.down, strict=True)

    def _numbered_up(self):
        """The units of the decoder; the last of a level with the index of the next finer level, others with None."""
        numbers = [n for i, level in enumerate(self.levels) for n in [i - 1 if i else None, *[None] * level.depth]]
        return zip(numbers[::-1], self.up, strict=True)

    def _body(self, x, embed, context, training, skips=None, middle=None):
        image, kept = x, [self.stem(x)]
        for i, unit in self._numbered_down():
            x = self._run(unit, kept[-1], embed, context, training)
            if i is not None and self.inputs_down:
                x, image = self.inputs_down[i](x, image)
            kept.append(x)
        x, image = self._run(self.bridge, kept[-1], embed, context, training), None
        self._check_skips(skips)
        x, kept = plus(x, middle), [plus(*pair) for pair in zip(kept, skips or [None] * len(kept), strict=True)]
        for i, unit in self._numbered_up():
            x = self._run(unit, ops.concatenate([x, kept.pop()], axis=-1), embed, context, training)
            if i is not None:
                image = self.outputs_up[i](x, image) if self.outputs_up else None
                x = self._run(self.grow[i], x, embed, context, training)
        y = self.head(self._activate(apply_layer(self.normalization, x, training=training)))
        return y if image is None else y + ops.cast(image, y.dtype)

    def call(self, inputs, training=None, skips=None, middle=None, encoded=None):
        """As in `UNet`, divided by sigma if `divide`."""
        y = super().call(inputs, training=training, skips=skips, middle=middle, encoded=encoded)
        if not self.divide:
            return y
        return y * ops.reshape(ops.exp(-ops.cast(inputs["time"], "float32")), (-1, 1, 1, 1))
