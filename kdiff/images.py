"""Pictures from batches of images: grids, PNG files, animated GIFs, and a plot of the loss.

A batch of images has the shape `(count, height, width, channels)`, with 1, 3 or 4 channels, and values in [-1, 1]
(those outside are clipped: a noisy sample has them) or uint8. A picture is a uint8 array `(height, width, channels)`.
"""

import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import keras
import numpy as np

from kdiff.base import check_integer, check_number

READABLE = 64  # tiny images are enlarged to about this many pixels


def to_uint8(images: Any) -> np.ndarray:
    """Images of any shape from [-1, 1] to 0..255, rounded; uint8 stays as it is.

    Raises:
        ValueError: if there are NaN.
    """
    images = keras.ops.convert_to_numpy(images)
    if images.dtype == np.uint8:
        return images
    if np.isnan(images).any():
        raise ValueError("images: there are NaN in them, as from a model that diverged")
    return np.round((np.clip(images.astype("float32"), -1, 1) + 1) * 127.5).astype("uint8")


def grid(images: Any, columns: int | None = None, *, padding: int = 2, scale: int | None = None) -> np.ndarray:
    """One picture of all images, row by row, on white.

    Args:
        images: a batch `(count, height, width, channels)`, as said above.
        columns: how many images a row has; `None` makes the grid about square.
        padding: white pixels between images and around them.
        scale: how many times each pixel is repeated in either direction; `None` enlarges tiny images until they can
            be seen.

    Returns:
        The picture, uint8 with shape `(height, width, channels)`.

    Raises:
        ValueError: for another rank or number of channels, no images, or NaN.
    """
    images = _check_batch(to_uint8(images))
    count, height, width, channels = images.shape
    columns = math.ceil(math.sqrt(count)) if columns is None else columns
    scale = max(1, READABLE // max(height, width)) if scale is None else scale
    for name, value, minimum in (("columns", columns, 1), ("padding", padding, 0), ("scale", scale, 1)):
        check_integer("grid", name, value, minimum)
    images = images.repeat(scale, axis=1).repeat(scale, axis=2)
    rows = math.ceil(count / columns)
    cells = np.full((rows * columns, scale * height + padding, scale * width + padding, channels), 255, "uint8")
    cells[:count, padding:, padding:] = images
    cells = cells.reshape(rows, columns, *cells.shape[1:]).transpose(0, 2, 1, 3, 4)
    picture = cells.reshape(rows * cells.shape[1], -1, channels)
    return np.pad(picture, ((0, padding), (0, padding), (0, 0)), constant_values=255)


def _check_batch(images: np.ndarray) -> np.ndarray:
    if images.ndim != 4 or images.shape[-1] not in (1, 3, 4) or len(images) == 0:
        raise ValueError(
            "images: one batch (count, height, width, channels) is expected, with at least one image of 1, 3 or 4 "
            f"channels; received the shape {images.shape}"
        )
    return images


def save_png(path: str | os.PathLike, images: Any, columns: int | None = None) -> Path:
    """Writes a batch of images as a grid, or a picture as it is, and returns the path. Makes folders as needed.

    Args:
        path: the file to write.
        images: a batch `(count, height, width, channels)`, or a picture such as `grid` returns.
        columns: the images in a row of the grid; `None` makes it about square.

    Raises:
        ImportError: if Pillow is missing.
        ValueError: as of `grid`.
    """
    _pillow_image(_picture(images, columns)).save(_with_folder(path))
    return Path(path)


def save_gif(
    path: str | os.PathLike, frames: Iterable, columns: int | None = None, *, fps: float = 12, hold: float = 2
) -> Path:
    """Writes an animation that repeats for ever, and returns the path. Makes folders as needed.

    Args:
        path: the file to write.
        frames: batches of images (each becomes a grid) or pictures, all of one size.
        columns: the images in a row of a grid; `None` makes it about square.
        fps: frames a second, up to 50.
        hold: seconds that the last frame stays.

    Raises:
        ImportError: if Pillow is missing.
        ValueError: if there are no frames, and as of `grid`.
    """
    check_number("save_gif", "fps", fps, 0.01, 50)
    check_number("save_gif", "hold", hold, 0)
    frames = [_on_white(_pillow_image(_picture(frame, columns))) for frame in frames]
    if not frames:
        raise ValueError("save_gif: `frames` is empty")
    durations = [round(1000 / fps)] * (len(frames) - 1) + [round(1000 * max(hold, 1 / fps))]
    frames[0].save(_with_folder(path), save_all=True, append_images=frames[1:], duration=durations, loop=0)
    return Path(path)


def loss_plot(path: str | os.PathLike, history: Any) -> Path:
    """Plots the losses of a training run against its epochs, and returns the path. Makes folders as needed.

    Args:
        path: the file to write, a PNG or what else its suffix says.
        history: what `model.fit` returned, or its dictionary from names to lists; those that end in "loss" are drawn.

    Raises:
        ImportError: if matplotlib is missing.
        ValueError: if there are no losses in `history`.
    """
    curves = {name: values for name, values in _losses(history).items() if name.endswith("loss") and len(values)}
    if not curves:
        raise ValueError(f"loss_plot: `history` holds no losses, only {list(_losses(history))}")
    figure = _figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for name, values in curves.items():
        axes.plot(range(1, len(values) + 1), values, marker="." if len(values) < 50 else None, label=name)
    positive = min(min(values) for values in curves.values()) > 0
    axes.set(xlabel="epoch", ylabel="loss", yscale="log" if positive else "linear")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    figure.savefig(_with_folder(path), dpi=120)
    return Path(path)


def read_picture(path: str | os.PathLike) -> np.ndarray:
    """The picture in a file that `save_png` wrote."""
    with pillow().open(path) as image:
        picture = np.asarray(image)
    return picture[..., None] if picture.ndim == 2 else picture


def pillow():
    """The module `PIL.Image`, imported when it is used; an ImportError names the extra that installs it."""
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError('Reading and writing image files needs Pillow: pip install "kdiff[plot]"') from error
    return Image


def _losses(history: Any) -> Mapping[str, Any]:
    losses = getattr(history, "history", history)
    if not isinstance(losses, Mapping):
        raise ValueError(f"loss_plot: `history` must be what `fit` returned, or a dictionary; received: {history!r}")
    return losses


def _picture(images: Any, columns: int | None) -> np.ndarray:
    is_picture = isinstance(images, np.ndarray) and images.ndim == 3 and images.dtype == np.uint8
    return images if is_picture else grid(images, columns)


def _pillow_image(picture: np.ndarray):
    return pillow().fromarray(picture[..., 0] if picture.shape[-1] == 1 else picture)


def _on_white(image):
    """An opaque copy: a GIF knows no half-transparent pixels."""
    if image.mode != "RGBA":
        return image
    white = _pillow_image(np.full((*image.size[::-1], 4), 255, "uint8"))
    white.alpha_composite(image)
    return white.convert("RGB")


def _figure(**options: Any):
    try:
        from matplotlib.figure import Figure  # not pyplot: no window, no global state
    except ImportError as error:
        raise ImportError('Plots need matplotlib: pip install "kdiff[plot]"') from error
    return Figure(**options)


def _with_folder(path: str | os.PathLike) -> Path:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    return Path(path)
