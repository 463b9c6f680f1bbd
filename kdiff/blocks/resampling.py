"""Downsampling and upsampling by 2 of a map, (batch, height, width, channels), or with one or three spatial axes."""

from collections.abc import Sequence

import keras
from keras import ops

from kdiff import backend, circular_padding
from kdiff.base import check_choice, check_integer
from kdiff.blocks.base import Block, check_map, kernel_initializer
from kdiff.blocks.layers import Conv2D

__all__ = ["INTERPOLATIONS", "Downsample", "FIRDownsample", "FIRUpsample", "Upsample", "upsample_aligned"]


class Downsample(Block):
    """Halves the height and the width.

    Args:
        mode: "convolution", 3x3 with stride 2 (Ho et al., 2020), or the "average" or "max" of each 2x2 square.
        width: the channels of the output; None keeps those of the input. After "average" and "max", a 1x1 convolution
            follows if they differ.
        padding: of the 3x3 convolution: "same" for one row of zeros at the bottom and one column on the right (Ho et
            al., 2020), "symmetric" for one on each side (ADM, Stable Diffusion). No effect in the other modes.

    Raises:
        ValueError: if height or width is odd.
    """

    def __init__(self, mode: str = "convolution", width: int | None = None, padding: str = "same", **kwargs):
        super().__init__(**kwargs)
        check_choice("Downsample", "mode", mode, ("convolution", "average", "max"))
        check_choice("Downsample", "padding", padding, ("same", "symmetric"))
        if width is not None:
            check_integer("Downsample", "width", width)
        self.mode = mode
        self.width = width
        self.padding = padding

    def build(self, x_shape):
        """Builds the convolution, if any."""
        check_map(self, x_shape)
        if self.mode == "convolution":
            padding = "same" if self.padding == "same" else "valid"
            self.convolution = _convolution(self, x_shape, 3, strides=2, padding=padding)
        else:
            self.convolution = _convolution(self, x_shape, 1) if _widens(self, x_shape) else None

    def call(self, x, embed=None, context=None, training=None):
        """Maps (batch, height, width, channels) to (batch, height / 2, width / 2, self.width)."""
        _check_even(self, x.shape)
        if self.mode != "convolution":
            x = {"average": backend.average_pool, "max": backend.max_pool}[self.mode](x)
        elif self.padding == "symmetric":
            x = _padded(x, 1, 0)  # with an even size, stride 2 never reaches zeros on the other side
        return x if self.convolution is None else self.convolution(x)

    def compute_output_shape(self, x_shape, embed_shape=None, context_shape=None):
        """(batch, height / 2, width / 2, self.width)."""
        return _half(x_shape, self.width)


class Upsample(Block):
    """Doubles the height and the width.

    Args:
        mode: "nearest" or "bilinear" interpolation, "aligned" for bilinear interpolation in which the corner pixels
            keep their values (PyTorch's `align_corners`), or a "transposed" convolution, 4x4 with stride 2.
        width: the channels of the output; None keeps those of the input.
        convolution: whether a 3x3 convolution follows the interpolation (Odena et al., "Deconvolution and Checkerboard
            Artifacts", 2016). Without it, a 1x1 convolution follows if `width` differs. No effect on "transposed".
    """

    def __init__(self, mode: str = "nearest", width: int | None = None, convolution: bool = True, **kwargs):
        super().__init__(**kwargs)
        check_choice("Upsample", "mode", mode, ("nearest", "bilinear", "transposed", "aligned"))
        if width is not None:
            check_integer("Upsample", "width", width)
        self.mode = mode
        self.width = width
        self.convolution = convolution

    def build(self, x_shape):
        """Builds the convolution, if any."""
        check_map(self, x_shape)
        if self.mode == "transposed":
            self.last = _convolution(self, x_shape, 4, _TRANSPOSED[len(x_shape)], strides=2)
        elif self.convolution:
            self.last = _convolution(self, x_shape, 3)
        else:
            self.last = _convolution(self, x_shape, 1) if _widens(self, x_shape) else None

    def call(self, x, embed=None, context=None, training=None):
        """Maps (batch, height, width, channels) to (batch, 2 height, 2 width, self.width)."""
        if self.mode == "transposed":
            return circular_padding.around(self.last, x, 1, 2)
        x = circular_padding.around(INTERPOLATIONS[self.mode], x, 1 if self.mode == "bilinear" else 0, 2)
        return x if self.last is None else self.last(x)

    def compute_output_shape(self, x_shape, embed_shape=None, context_shape=None):
        """(batch, 2 height, 2 width, self.width)."""
        return _twice(x_shape, self.width)


# By the rank of their input.
_TRANSPOSED = {3: keras.layers.Conv1DTranspose, 4: keras.layers.Conv2DTranspose, 5: keras.layers.Conv3DTranspose}


def upsample_aligned(x):
    """Maps (batch, *sizes, channels) at twice the size, bilinear, the corner pixels unchanged.

    Pixel i of 2n is read at `i (n - 1) / (2n - 1)`, where pixel j of n has the weight `max(0, 1 - distance)`.
    """
    y = ops.cast(x, "float32")
    for axis in range(1, len(x.shape) - 1):
        y = ops.moveaxis(ops.tensordot(_hats(ops.shape(x)[axis]), y, [[1], [axis]]), 0, axis)
    return ops.cast(y, x.dtype)


def _hats(size):
    """The weights of the pixels, (2 size, size), piecewise linear."""
    place, pixel = (ops.cast(ops.arange(count), "float32") for count in (2 * size, size))
    place = place * ops.cast((size - 1) / (2 * size - 1), "float32")
    return ops.relu(1 - ops.abs(place[:, None] - pixel))


INTERPOLATIONS = {
    "nearest": backend.upsample_nearest,
    "bilinear": backend.upsample_bilinear,
    "aligned": upsample_aligned,
}


class _FIR(Block):
    """A fixed filter, the outer product of `taps` with themselves, each divided by its sum, applied per channel."""

    def __init__(self, taps: Sequence[float] = (1, 3, 3, 1), **kwargs):
        super().__init__(**kwargs)
        if len(taps) < 2 or not sum(taps):
            raise ValueError(
                f"{type(self).__name__}: `taps` must be at least two numbers with a nonzero sum; received: {taps!r}"
            )
        self.taps = tuple(taps)

    def _filtered(self, x, before, after, strides=1, gain=1.0):
        taps = [gain * tap / sum(self.taps) for tap in self.taps[::-1]]
        x = _padded(x, before, after)
        for axis in range(1, len(x.shape) - 1):
            parts = (slice(k, k + 1 - len(taps) or None, strides) for k in range(len(taps)))
            x = sum(tap * x[(*[slice(None)] * axis, part)] for tap, part in zip(taps, parts, strict=True))
        return x


class FIRDownsample(_FIR):
    """Halves the height and the width after a low-pass filter on each channel.

    Zhang, "Making Convolutional Networks Shift-Invariant Again" (2019), section 3.2; Karras et al., "Analyzing and
    Improving the Image Quality of StyleGAN" (2020), appendix B; in diffusion models Song et al. (NCSN++, 2021),
    appendix H.

    Args:
        taps: of the filter along height and along width, divided by their sum. (1, 1) averages 2x2 squares.
        width: the channels of the output of the convolution; None keeps those of the input.
        convolution: whether a 3x3 convolution with stride 2 follows the filter; without it there are no weights.

    Raises:
        ValueError: if height or width is odd, or `width` is given without `convolution`.
    """

    def __init__(
        self,
        taps: Sequence[float] = (1, 3, 3, 1),
        width: int | None = None,
        convolution: bool = False,
        **kwargs,
    ):
        super().__init__(taps, **kwargs)
        if width is not None:
            check_integer("FIRDownsample", "width", width)
        if width is not None and not convolution:
            raise ValueError(f"FIRDownsample: `width` needs `convolution=True`; received: {width}")
        self.width = width
        self.convolution = convolution

    def build(self, x_shape):
        """Builds the convolution, if any."""
        check_map(self, x_shape)
        self.last = _convolution(self, x_shape, 3, strides=2, padding="valid") if self.convolution else None

    def call(self, x, embed=None, context=None, training=None):
        """Maps (batch, height, width, channels) to (batch, height / 2, width / 2, self.width)."""
        _check_even(self, x.shape)
        extra = len(self.taps) - 2
        if self.last is None:
            return self._filtered(x, (extra + 1) // 2, extra // 2, strides=2)
        return self.last(self._filtered(x, (extra + 3) // 2, (extra + 2) // 2))

    def compute_output_shape(self, x_shape, embed_shape=None, context_shape=None):
        """(batch, height / 2, width / 2, self.width)."""
        return _half(x_shape, self.width)


class FIRUpsample(_FIR):
    """Doubles the height and the width: zeros are inserted between the pixels, then each channel is filtered.

    The transpose of `FIRDownsample` (see its references), times four. It has no weights.

    Args:
        taps: of the filter along height and along width, divided by their sum. (1, 1) repeats each pixel in a 2x2
            square.
    """

    def call(self, x, embed=None, context=None, training=None):
        """Maps (batch, height, width, channels) to (batch, 2 height, 2 width, channels)."""
        y = x
        for axis in range(1, len(x.shape) - 1):  # a zero after each number
            shape = ops.shape(y)
            y = ops.stack([y, ops.zeros_like(y)], axis=axis + 1)
            y = ops.reshape(y, (*shape[:axis], 2 * shape[axis], *shape[axis + 1 :]))
        extra = len(self.taps) - 2
        return self._filtered(y, (extra + 1) // 2 + 1, extra // 2, gain=2.0)

    def compute_output_shape(self, x_shape, embed_shape=None, context_shape=None):
        """(batch, 2 height, 2 width, channels)."""
        return _twice(x_shape)


def _half(shape, channels=None):
    batch, *sizes, own = shape
    return (batch, *[size and size // 2 for size in sizes], channels or own)


def _twice(shape, channels=None):
    batch, *sizes, own = shape
    return (batch, *[size and 2 * size for size in sizes], channels or own)


def _check_even(block, shape):
    if any(size is not None and size % 2 for size in shape[1:-1]):
        raise ValueError(f"{type(block).__name__}: height and width must be even; received the shape: {tuple(shape)}")


def _padded(x, before, after):
    """Pads the map with zeros, unless it is periodic."""
    axes = len(x.shape) - 2
    return circular_padding.padded(x, [before] * axes, [after] * axes)


def _widens(block, x_shape):
    return block.width is not None and block.width != x_shape[-1]


def _convolution(block, x_shape, kernel_size, layer=Conv2D, **options):
    options = {"kernel_initializer": kernel_initializer(), "dtype": block.dtype_policy, "padding": "same", **options}
    made = layer(block.width or x_shape[-1], kernel_size, **options)
    made.build((*[None] * (len(x_shape) - 1), x_shape[-1]))  # the map before padding may be smaller than the kernel
    return made
