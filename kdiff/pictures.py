"""Pictures from batches of images: grids, PNG files, animated GIFs, and a plot of the loss.

A batch of images has the shape `(count, height, width, channels)`, with 1, 3 or 4 channels, and values in [-1, 1]
(values outside, as in noisy samples, are clipped) or whole numbers in 0..255. A picture is a uint8 array `(height,
width, channels)`.
"""

import contextlib
import functools
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np

from kdiff.base import check_integer, check_number, needs
from kdiff.writing import replacing

__all__ = [
    "CAPTIONED",
    "FORMATS",
    "FRAME",
    "READABLE",
    "check_captions",
    "grid",
    "loss_plot",
    "opened",
    "pillow",
    "read_picture",
    "save_gif",
    "save_png",
    "to_uint8",
]

READABLE = 64  # tiny images are enlarged to about this many pixels
CAPTIONED = 128  # and to this many above a caption
# The formats that are read. Pillow has more, but for PostScript it would start Ghostscript, whatever the file name.
FORMATS = (
    *("AVIF", "BMP", "DDS", "DIB", "GIF", "ICO", "JPEG", "JPEG2000", "PCX"),
    *("PNG", "PPM", "PSD", "QOI", "SGI", "TGA", "TIFF", "WEBP"),
)
FRAME = 200  # the grey of the frame of an image with a caption


def to_uint8(images: Any) -> np.ndarray:
    """Converts images of any shape from [-1, 1] to 0..255, rounded; whole numbers are unchanged.

    Raises:
        ValueError: if there are NaNs, or whole numbers outside 0..255.
    """
    images = keras.ops.convert_to_numpy(images)
    if images.dtype.kind in "iu":
        if images.size and (images.min() < 0 or images.max() > 255):
            raise ValueError(f"images: whole numbers must be in 0..255; received {images.min()} to {images.max()}")
        return images.astype("uint8", copy=False)
    if np.isnan(images).any():
        raise ValueError("images: they contain NaN, as from a diverged model")
    return np.round((np.clip(images.astype("float32"), -1, 1) + 1) * 127.5).astype("uint8")


def grid(
    images: Any,
    columns: int | None = None,
    *,
    padding: int | None = None,
    scale: int | None = None,
    captions: Sequence[str] | None = None,
) -> np.ndarray:
    """One picture of all images, row by row, on white.

    Args:
        images: a batch `(count, height, width, channels)`, as described above.
        columns: the number of images per row; `None` makes the grid about square.
        padding: white pixels between images and around them; `None` is 2, or 8 with captions.
        scale: how many times each pixel is repeated along each axis; `None` enlarges tiny images so that they, and
            their captions, are legible.
        captions: the text under each image, wrapped at its width.

    Returns:
        The picture, uint8 with shape `(height, width, channels)`.

    Raises:
        ValueError: for a wrong rank or number of channels, no images, NaN, or a wrong number of captions.
        ImportError: if Pillow is missing, which captions need.
    """
    images = _check_batch(to_uint8(images))
    count, height, width, _ = images.shape
    columns = math.ceil(math.sqrt(count)) if columns is None else columns
    readable = READABLE if captions is None else CAPTIONED
    scale = max(1, readable // max(height, width)) if scale is None else scale
    padding = (2 if captions is None else 8) if padding is None else padding
    for name, value, minimum in (("columns", columns, 1), ("padding", padding, 0), ("scale", scale, 1)):
        check_integer("grid", name, value, minimum)
    cells = images.repeat(scale, axis=1).repeat(scale, axis=2)
    if captions is not None:
        cells = [_with_caption(*pair) for pair in zip(cells, check_captions("grid", captions, count), strict=True)]
    return _table(cells, columns, padding, height * scale if captions is not None else None)


def _table(cells: Sequence[np.ndarray], columns: int, padding: int, framed: int | None) -> np.ndarray:
    """Cells of one width in rows, padded, on white; the first `framed` pixel rows of each in a frame."""
    _, width, channels = cells[0].shape
    heights = [max(map(len, cells[i : i + columns])) for i in range(0, len(cells), columns)]
    tops = padding + np.cumsum([0, *(height + padding for height in heights)])
    table = np.full((tops[-1], padding + columns * (width + padding), channels), 255, "uint8")
    for index, cell in enumerate(cells):
        top, left = tops[index // columns], padding + index % columns * (width + padding)
        if framed and padding:
            table[top - 1 : top + framed + 1, left - 1 : left + width + 1] = FRAME | _opaque(channels)
        table[top : top + len(cell), left : left + width] = cell
    return table


def _check_batch(images: np.ndarray) -> np.ndarray:
    if images.ndim != 4 or images.shape[-1] not in (1, 3, 4) or len(images) == 0:
        raise ValueError(
            "images: a batch (count, height, width, channels) is expected, with at least one image of 1, 3 or 4 "
            f"channels; received the shape {images.shape}"
        )
    return images


def check_captions(owner: str, captions: Any, count: int) -> list[str]:
    """Captions as a list of strings, one per image.

    Raises:
        ValueError: if their number is wrong.
    """
    array = np.asarray(captions, dtype=object)
    if array.shape != (count,):
        raise ValueError(f"{owner}: `captions` must be one string for each of {count} images; received: {captions!r}")
    return [caption.decode(errors="replace") if isinstance(caption, bytes) else str(caption) for caption in array]


def _with_caption(image: np.ndarray, caption: str) -> np.ndarray:
    _, width, channels = image.shape
    return np.concatenate([image, np.repeat(_caption(caption, width), channels, axis=-1) | _opaque(channels)])


def _opaque(channels: int) -> np.ndarray:
    """The minimum of each channel: a fourth one is 255."""
    return np.array([0, 0, 0, 255][:channels], "uint8")


@functools.lru_cache(1024)  # shared by the frames of an animation
def _caption(text: str, width: int) -> np.ndarray:
    """The lower edge of the frame and the words, black on white, in centred lines, `(height, width, 1)`."""
    pillow()
    from PIL import Image, ImageDraw, ImageFont

    size = min(max(width // 16, 12), 24)
    font = ImageFont.load_default(size)
    lines = _lines(text, lambda line: font.getlength(line) <= width - 4)
    height = round(1.2 * size)
    picture = Image.new("L", (width, len(lines) * height + size // 2), 255)
    draw = ImageDraw.Draw(picture)
    draw.line((0, 0, width, 0), FRAME)
    for number, line in enumerate(lines):
        draw.text((width / 2, (number + 0.5) * height + size / 4), line, fill=0, font=font, anchor="mm")
    return np.asarray(picture)[..., None]


def _lines(text: str, fits: Callable[[str], bool]) -> list[str]:
    """The words of a text in lines that fit; words longer than a line are truncated."""
    lines = []
    for word in text.encode("utf-8", "replace").decode().split():
        if lines and fits(f"{lines[-1]} {word}"):
            lines[-1] += f" {word}"
        else:
            lines.append(_shortened(word, fits))
    return lines


def _shortened(word: str, fits: Callable[[str], bool]) -> str:
    if fits(word):
        return word
    return next((f"{word[:end]}…" for end in range(len(word) - 1, 0, -1) if fits(f"{word[:end]}…")), "…")


def save_png(
    path: str | os.PathLike, images: Any, columns: int | None = None, captions: Sequence[str] | None = None
) -> Path:
    """Writes a batch of images as a grid, or a picture unchanged, and returns the path. Creates missing folders.

    Args:
        path: the file to write.
        images: a batch `(count, height, width, channels)`, or a picture such as `grid` returns.
        columns: the number of images per row; `None` makes it about square.
        captions: the text under each image of a batch.

    Raises:
        ImportError: if Pillow is missing.
        ValueError: as in `grid`, or if captions are given for a picture.
    """
    image = _pillow_image(_picture(images, columns, captions))
    with replacing(path) as new:
        image.save(new)
    return Path(path)


def save_gif(
    path: str | os.PathLike,
    frames: Iterable,
    columns: int | None = None,
    *,
    fps: float = 12,
    hold: float = 2,
    captions: Sequence[str] | None = None,
) -> Path:
    """Writes an animation that loops forever, and returns the path. Creates missing folders.

    Args:
        path: the file to write.
        frames: batches of images (each becomes a grid) or pictures, all of one size.
        columns: the number of images per row; `None` makes it about square.
        fps: frames per second, at most 50.
        hold: the duration of the last frame, in seconds.
        captions: the text under each image of a batch, the same in all frames.

    Raises:
        ImportError: if Pillow is missing.
        ValueError: if there are no frames, as in `grid`, or if captions are given for pictures.
    """
    check_number("save_gif", "fps", fps, 0.01, 50)
    check_number("save_gif", "hold", hold, 0)
    frames = [_on_white(_pillow_image(_picture(frame, columns, captions))) for frame in frames]
    if not frames:
        raise ValueError("save_gif: `frames` is empty")
    durations = [round(1000 / fps)] * (len(frames) - 1) + [round(1000 * max(hold, 1 / fps))]
    with replacing(path) as new:
        frames[0].save(new, save_all=True, append_images=frames[1:], duration=durations, loop=0)
    return Path(path)


def loss_plot(path: str | os.PathLike, history: Any) -> Path:
    """Plots the losses of a training run against its epochs, and returns the path. Creates missing folders.

    Args:
        path: the file to write, in the format of its suffix.
        history: the result of `model.fit`, or its dictionary from names to lists; names that end in "loss" are drawn.

    Raises:
        ImportError: if matplotlib is missing.
        ValueError: if `history` has no losses.
    """
    curves = {name: values for name, values in _losses(history).items() if name.endswith("loss") and len(values)}
    if not curves:
        raise ValueError(f"loss_plot: `history` has no losses, only {list(_losses(history))}")
    figure = _figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for name, values in curves.items():
        axes.plot(range(1, len(values) + 1), values, marker="." if len(values) < 50 else None, label=name)
    positive = min(min(values) for values in curves.values()) > 0
    axes.set(xlabel="epoch", ylabel="loss", yscale="log" if positive else "linear")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    with replacing(path) as new:
        figure.savefig(new, dpi=120)
    return Path(path)


def read_picture(path: str | os.PathLike) -> np.ndarray:
    """Reads a picture that `save_png` wrote."""
    with opened(path) as image:
        picture = np.asarray(image)
    return picture[..., None] if picture.ndim == 2 else picture


def pillow():
    """The module `PIL.Image`, imported on use; an ImportError names the extra that installs it."""
    with needs("plot", "Reading and writing image files needs Pillow"):
        from PIL import Image
    return Image


@contextlib.contextmanager
def opened(path: str | os.PathLike) -> Iterator:
    """The image in a file, as Pillow opens it, if it is in one of `FORMATS`.

    Raises:
        ImportError: if Pillow is missing.
        OSError: if the file cannot be read, or is in another format.
        ValueError: if the image has more pixels than `PIL.Image.MAX_IMAGE_PIXELS`, at which Pillow itself only warns.
    """
    pil = pillow()
    pil.init()
    limit = pil.MAX_IMAGE_PIXELS
    with pil.open(path, formats=[name for name in FORMATS if name in pil.OPEN]) as image:  # not every build has all
        if limit is not None and image.width * image.height > limit:
            raise ValueError(
                f"it has {image.width} x {image.height} pixels, more than the limit of {limit:,}: make it smaller, or "
                "raise PIL.Image.MAX_IMAGE_PIXELS"
            )
        yield image


def _losses(history: Any) -> Mapping[str, Any]:
    losses = getattr(history, "history", history)
    if not isinstance(losses, Mapping):
        raise ValueError(f"loss_plot: `history` must be the result of `fit`, or a dictionary; received: {history!r}")
    return losses


def _picture(images: Any, columns: int | None, captions: Sequence[str] | None = None) -> np.ndarray:
    if not (isinstance(images, np.ndarray) and images.ndim == 3 and images.dtype == np.uint8):
        return grid(images, columns, captions=captions)
    if captions is not None:
        raise ValueError("images: `captions` need a batch of images; a picture is written unchanged")
    return images


def _pillow_image(picture: np.ndarray):
    return pillow().fromarray(picture[..., 0] if picture.shape[-1] == 1 else picture)


def _on_white(image):
    """An opaque copy: GIF has no partial transparency."""
    if image.mode != "RGBA":
        return image
    white = _pillow_image(np.full((*image.size[::-1], 4), 255, "uint8"))
    white.alpha_composite(image)
    return white.convert("RGB")


def _figure(**options: Any):
    with needs("plot", "Plots need matplotlib"):
        from matplotlib.figure import Figure  # not pyplot: no window, no global state
    return Figure(**options)
