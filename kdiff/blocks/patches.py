"""Images as maps of patches, and back."""

from keras import ops

from kdiff.base import check_integer
from kdiff.blocks.base import Block, kernel_initializer
from kdiff.blocks.layers import Dense

__all__ = ["Patchify", "Unpatchify"]


class Patchify(Block):
    """Patch embedding: `y = W patch + b` for each patch of size x size pixels, a convolution with stride `size`.

    Dosovitskiy et al., "An Image is Worth 16x16 Words" (2021), equation 1, without positions. A patch is read row by
    row, the channels of a pixel together, so `W` is the kernel of the equivalent convolution, (size, size, channels,
    width), reshaped. A sequence (batch, length, channels) has patches of `size` elements, a volume (batch, depth,
    height, width, channels) of size x size x size.

    Args:
        size: the side of a patch, which must divide height and width.
        width: the channels of the output.
        bias: whether `b` is present.

    Raises:
        ValueError: if `size` does not divide the height or width.
    """

    def __init__(self, size: int, width: int, bias: bool = True, **kwargs):
        super().__init__(**kwargs)
        check_integer("Patchify", "size", size)
        check_integer("Patchify", "width", width)
        self.size = size
        self.width = width
        self.bias = bias

    def build(self, x_shape):
        """Builds the dense layer."""
        _check(self, x_shape)
        self.projection = _dense(self, self.width, use_bias=self.bias)
        self.projection.build((None, self.size ** (len(x_shape) - 2) * x_shape[-1]))

    def call(self, x, embed=None, context=None, training=None):
        """Maps (batch, height, width, channels) to (batch, height / size, width / size, self.width)."""
        _check(self, x.shape)
        return self.projection(_apart(x, self.size))

    def compute_output_shape(self, x_shape, embed_shape=None, context_shape=None):
        """(batch, height / size, width / size, self.width)."""
        batch, *sizes, _ = x_shape
        return (batch, *(length and length // self.size for length in sizes), self.width)


class Unpatchify(Block):
    """The linear decoder from each vector of a map to a patch of size x size pixels.

    Peebles & Xie, "Scalable Diffusion Models with Transformers" (2022), section 3.2. The layout of a patch is that of
    `Patchify`: row by row, the channels of a pixel together.

    Args:
        size: the side of a patch.
        channels: of the image.
        zero: whether the dense layer is initialised to zero.
    """

    def __init__(self, size: int, channels: int, zero: bool = False, **kwargs):
        super().__init__(**kwargs)
        check_integer("Unpatchify", "size", size)
        check_integer("Unpatchify", "channels", channels)
        self.size = size
        self.channels = channels
        self.zero = zero

    def build(self, x_shape):
        """Builds the dense layer."""
        _check_rank(self, x_shape)
        self.projection = _dense(self, self.size ** (len(x_shape) - 2) * self.channels, self.zero)
        self.projection.build(x_shape)

    def call(self, x, embed=None, context=None, training=None):
        """Maps (batch, height, width, dim) to (batch, height * size, width * size, self.channels)."""
        return _together(self.projection(x), self.size, self.channels)

    def compute_output_shape(self, x_shape, embed_shape=None, context_shape=None):
        """(batch, height * size, width * size, self.channels)."""
        batch, *sizes, _ = x_shape
        return (batch, *(length and length * self.size for length in sizes), self.channels)


def _apart(x, size):
    """Maps (batch, height, width, channels) to (batch, height / size, width / size, size size channels), any rank."""
    batch, *sizes = ops.shape(x)[:-1]
    patches = [length // size for length in sizes]
    split = [part for count in patches for part in (count, size)]
    x = ops.transpose(ops.reshape(x, (batch, *split, x.shape[-1])), _order(len(sizes)))
    return ops.reshape(x, (batch, *patches, size ** len(sizes) * x.shape[-1]))


def _together(x, size, channels):
    """The inverse of `_apart`."""
    batch, *patches = ops.shape(x)[:-1]
    dims = len(patches)
    x = ops.reshape(x, (batch, *patches, *[size] * dims, channels))
    order = [0, *(axis for i in range(dims) for axis in (1 + i, 1 + dims + i)), 1 + 2 * dims]
    return ops.reshape(ops.transpose(x, order), (batch, *(count * size for count in patches), channels))


def _order(dims):
    """The axes of (batch, count, size, count, size, channels), the counts first."""
    return [0, *range(1, 2 * dims, 2), *range(2, 2 * dims + 1, 2), 2 * dims + 1]


def _dense(block, width, zero=False, **options):
    return Dense(width, kernel_initializer=kernel_initializer(zero), dtype=block.dtype_policy, **options)


def _check_rank(block, shape):
    if len(shape) not in (3, 4, 5) or shape[-1] is None:
        raise ValueError(
            f"{type(block).__name__}: `x` must be a map (batch, height, width, channels) or tokens "
            f"(batch, tokens, channels), with known channels; received the shape: {tuple(shape)}"
        )


def _check(block, shape):
    _check_rank(block, shape)
    if any(length is not None and length % block.size for length in shape[1:-1]):
        raise ValueError(
            f"{type(block).__name__}: `size`, {block.size}, must divide the size of `x`, {tuple(shape[1:-1])}; "
            f"received the shape: {tuple(shape)}"
        )
