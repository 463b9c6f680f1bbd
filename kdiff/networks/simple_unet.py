"""A small U-Net that reads from top to bottom: no templates, few options, each layer created and called explicitly."""

from collections.abc import Mapping, Sequence

import keras
from keras import ops

from kdiff.base import check_integer
from kdiff.blocks.base import build_layer
from kdiff.blocks.convolution import SimpleBlock
from kdiff.blocks.embeddings import MLPEmbedding, SinusoidalEmbedding
from kdiff.blocks.layers import Conv2D
from kdiff.blocks.resampling import Downsample, Upsample
from kdiff.networks.base import Network, check_size

__all__ = ["SimpleUNet"]


class SimpleUNet(Network):
    """The textbook U-Net, conditioned on time: an encoder, a decoder, and skip connections between them.

        network({"image": (batch, height, width, channels), "time": (batch,), **conditions})
            -> (batch, height, width, out_channels), float32

        image - block 64 ------------------------- skip ------------------------- block 64 - output
                   half - block 128 -------------- skip ------------- block 64 - twice
                            half - block 256 ----- skip ---- block 128 - twice
                                     half - block 256 (bottleneck) - twice

    Ronneberger et al., "U-Net: Convolutional Networks for Biomedical Image Segmentation" (2015), figure 1. Going down,
    the map is halved by 2x2 max pooling; going up, it is doubled by bilinear interpolation (aligned corners) and
    concatenated with the map of the same level of the encoder, which carries the fine detail. A decoder block has the
    width of the next finer level. The last layer is a 1x1 convolution, initialised to zero. `time` is 0 ... 999,
    embedded as in Ho et al. (2020), sines first.

    It equals the SimpleUNet of PyTorch tutorials, whose weights `interop.original.simple_unet` reads.

    Args:
        widths: the channels of each level, from the finest, multiples of 8. Height and width of the image must be
            multiples of `2 ** len(widths)`.
        bottleneck: the channels between encoder and decoder, a multiple of 8; None for those of the last level.
        embed_width: the width of the time embedding, at least 4.
        conditions: a layer for each condition, by its name in the input, such as `{"label": LabelEmbedding(10)}`.
        out_channels: of the output; None for those of the image.
        remat: whether each block is recomputed in the backward pass, to save memory.
        kwargs: `name` and `dtype`.
    """

    def __init__(
        self,
        widths: Sequence[int] = (64, 128, 256),
        bottleneck: int | None = None,
        embed_width: int = 256,
        conditions: Mapping[str, keras.layers.Layer] | None = None,
        out_channels: int | None = None,
        remat: bool = False,
        **kwargs,
    ):
        if not isinstance(widths, Sequence) or not widths:
            raise ValueError(
                f"SimpleUNet: `widths` must be one width per level, such as (64, 128); received: {widths!r}"
            )
        for width in (*widths, *([] if bottleneck is None else [bottleneck])):
            check_integer("SimpleUNet", "a width", width, 8)
        check_integer("SimpleUNet", "embed_width", embed_width, 4)
        embedding = MLPEmbedding(SinusoidalEmbedding(embed_width, sine_first=True, shift=1), embed_width)
        super().__init__(embedding, conditions, out_channels, remat, **kwargs)
        self.widths = list(widths)
        self.bottleneck = bottleneck
        self.embed_width = embed_width
        self.down = [self._block(width) for width in widths]
        self.middle = self._block(bottleneck or widths[-1])
        self.up = [self._block(width) for width in (widths[0], *widths[:-1])]
        self.smaller = Downsample("max", dtype=self.dtype_policy)
        self.larger = Upsample("aligned", convolution=False, dtype=self.dtype_policy)

    def _block(self, width):
        return SimpleBlock(width, dtype=self.dtype_policy)

    def _body(self, x, embed, context, training):
        skips = []
        for block in self.down:
            x = self._run(block, x, embed, context, training)
            skips.append(x)
            x = self.smaller(x)
        x = self._run(self.middle, x, embed, context, training)
        for block, skip in zip(self.up[::-1], skips[::-1], strict=True):
            x = ops.concatenate([self.larger(x), skip], axis=-1)
            x = self._run(block, x, embed, context, training)
        return self.head(x)

    def _build_body(self, x_shape, embed_shape, context_shape):
        """The same path with shapes, in which the blocks infer their input channels."""
        x, skips = x_shape, []
        for block in self.down:
            x = build_layer(block, x, embed_shape)
            skips.append(x)
            x = build_layer(self.smaller, x)
        x = build_layer(self.middle, x, embed_shape)
        for block, skip in zip(self.up[::-1], skips[::-1], strict=True):
            x = build_layer(self.larger, x)
            x = build_layer(block, (*skip[:-1], x[-1] + skip[-1]), embed_shape)
        self.head = self._head(Conv2D, 1)
        self.head.build(x)

    def _check_image(self, shape):
        super()._check_image(shape)
        check_size(self, shape, 2 ** len(self.widths), f"{len(self.widths)} halvings need")
