"""Half and twice the size of a map, (batch, height, width, channels)."""

import keras

from kdiff import backend
from kdiff.base import check_choice, check_integer
from kdiff.blocks.base import Block, check_map, kernel_initializer


class Downsample(Block):
    """Half the height and half the width.

    Args:
        mode: "convolution", 3x3 with stride 2 (Ho et al., 2020), or the "average" or "max" of each 2x2 square.
        width: the channels of the output; None keeps those of the input. After "average" and "max" a 1x1 convolution
            makes them, where they differ.

    Raises:
        ValueError: if height or width is odd.
    """

    def __init__(self, mode: str = "convolution", width: int | None = None, **kwargs):
        super().__init__(**kwargs)
        check_choice("Downsample", "mode", mode, ("convolution", "average", "max"))
        if width is not None:
            check_integer("Downsample", "width", width)
        self.mode = mode
        self.width = width

    def build(self, x_shape):
        """Builds the convolution, if there is one."""
        check_map(self, x_shape)
        if self.mode == "convolution":
            self.convolution = _convolution(self, x_shape, 3, strides=2)
        else:
            self.convolution = _convolution(self, x_shape, 1) if _widens(self, x_shape) else None

    def call(self, x, embed=None, context=None, training=None):
        """(batch, height, width, channels) to (batch, height / 2, width / 2, self.width)."""
        if any(size is not None and size % 2 for size in x.shape[1:3]):
            raise ValueError(f"Downsample: height and width must be even; received the shape: {tuple(x.shape)}")
        if self.mode != "convolution":
            x = {"average": backend.average_pool, "max": backend.max_pool}[self.mode](x)
        return x if self.convolution is None else self.convolution(x)

    def compute_output_shape(self, x_shape, embed_shape=None, context_shape=None):
        """(batch, height / 2, width / 2, self.width)."""
        batch, height, width, channels = x_shape
        return (batch, height and height // 2, width and width // 2, self.width or channels)


class Upsample(Block):
    """Twice the height and twice the width.

    Args:
        mode: "nearest" or "bilinear" interpolation, or a "transposed" convolution, 4x4 with stride 2.
        width: the channels of the output; None keeps those of the input.
        convolution: whether a 3x3 convolution follows the interpolation (Odena et al., "Deconvolution and Checkerboard
            Artifacts", 2016). Without it a 1x1 convolution makes another width, where one is asked for. Of no effect on
            "transposed".
    """

    def __init__(self, mode: str = "nearest", width: int | None = None, convolution: bool = True, **kwargs):
        super().__init__(**kwargs)
        check_choice("Upsample", "mode", mode, ("nearest", "bilinear", "transposed"))
        if width is not None:
            check_integer("Upsample", "width", width)
        self.mode = mode
        self.width = width
        self.convolution = convolution

    def build(self, x_shape):
        """Builds the convolution, if there is one."""
        check_map(self, x_shape)
        if self.mode == "transposed":
            self.last = _convolution(self, x_shape, 4, keras.layers.Conv2DTranspose, strides=2)
        elif self.convolution:
            self.last = _convolution(self, x_shape, 3)
        else:
            self.last = _convolution(self, x_shape, 1) if _widens(self, x_shape) else None

    def call(self, x, embed=None, context=None, training=None):
        """(batch, height, width, channels) to (batch, 2 height, 2 width, self.width)."""
        if self.mode != "transposed":
            x = {"nearest": backend.upsample_nearest, "bilinear": backend.upsample_bilinear}[self.mode](x)
        return x if self.last is None else self.last(x)

    def compute_output_shape(self, x_shape, embed_shape=None, context_shape=None):
        """(batch, 2 height, 2 width, self.width)."""
        batch, height, width, channels = x_shape
        return (batch, height and 2 * height, width and 2 * width, self.width or channels)


def _widens(block, x_shape):
    return block.width is not None and block.width != x_shape[-1]


def _convolution(block, x_shape, kernel_size, layer=keras.layers.Conv2D, **options):
    options = {"kernel_initializer": kernel_initializer(), "dtype": block.dtype_policy, **options}
    made = layer(block.width or x_shape[-1], kernel_size, padding="same", **options)
    made.build(x_shape)
    return made
