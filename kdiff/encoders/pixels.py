"""The preprocessing of images for CLIP's encoder."""

from collections.abc import Sequence

import numpy as np
from keras import ops

from kdiff.blocks.resizing import resized

__all__ = ["MEAN", "STD", "prepared"]

# The statistics of CLIP's training images, per channel, for pixels in [0, 1].
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def prepared(images: np.ndarray, size: int, mean: Sequence[float] = MEAN, std: Sequence[float] = STD) -> np.ndarray:
    """Images resized by their shorter side, center-cropped to a square, and normalised, as in transformers with Pillow,
    which rounds to integers between the two passes of a resizing.

    Args:
        images: (batch, height, width, channels), integers in 0 ... 255 or floats in [-1, 1].
        size: the side of the result.
        mean, std: of pixels in [0, 1], per channel.

    Returns:
        float32, (batch, size, size, channels).
    """
    whole = images.dtype.kind in "iu"
    height, width = images.shape[1:3]
    short = min(height, width)
    sizes = (size * height // short, size * width // short)
    y = images.astype("float32") if whole else 127.5 * (images.astype("float32") + 1.0)
    for shape in ((height, sizes[1]), sizes):
        y = np.clip(ops.convert_to_numpy(resized(y, shape, "bicubic")), 0.0, 255.0)
        y = np.round(y) if whole else y
    top, left = ((side - size) // 2 for side in sizes)
    y = y[:, top : top + size, left : left + size] / 255.0
    return ((y - np.float32(mean)) / np.float32(std)).astype("float32")
