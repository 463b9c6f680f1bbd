"""Images, labels and captions of a folder."""

import os
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from kdiff.data._tensorflow import tf
from kdiff.data.base import Source, split_rows, utf8
from kdiff.pictures import FORMATS, opened, pillow

__all__ = ["decode", "from_folder", "read_caption"]


def from_folder(folder: Path, labels: bool, text: bool, split: str) -> Source:
    """The images in a folder and its subfolders, except hidden ones. With `labels`, each direct subfolder is a class.

    With `text`, the caption of photo.jpg is in photo.txt.
    """
    folder, split = _split_folder(folder, split)
    paths = list(_image_files(folder))
    if not paths:
        raise ValueError(f"images: the folder {folder} has no image files ({', '.join(FORMATS)})")
    class_names = _class_names(folder, paths) if labels else None
    paths, sizes = _without_broken(folder, paths)
    rows = split_rows(split, {"train": np.arange(len(paths)), "all": np.arange(len(paths))})
    elements = {"image": [os.fsencode(paths[row]) for row in rows]}  # bytes: a name need not be UTF-8
    if labels:
        elements["label"] = np.array([class_names.index(_class_name(folder, paths[row])) for row in rows], "int32")
    if text:
        elements["text"] = _captions(folder, [paths[row] for row in rows])
    size = sizes[0] if len(set(sizes)) == 1 else (None, None)
    dataset = tf.data.Dataset.from_tensor_slices(elements)
    return Source(dataset.map(_read_image((*size, 4)), tf.data.AUTOTUNE), class_names, channels=3)


def _split_folder(folder: Path, split: str) -> tuple[Path, str]:
    """`folder/test` and "all" for the split "test" if that folder exists; else both unchanged."""
    if not folder.is_dir():
        raise ValueError(f"images: no such folder: {folder}")
    name, bracket, part = str(split).partition("[")
    inner = folder / name
    return (inner, f"all{bracket}{part}") if name and inner.is_dir() else (folder, split)


def _image_files(folder: Path, above: tuple[str, ...] = ()) -> Iterator[Path]:
    """The image files, by suffix, in a folder and its subfolders, in order, except hidden ones.

    Links are followed, except into a folder that contains them (`above`, as real paths).
    """
    real = os.path.realpath(folder)
    if real in above:
        return
    suffixes = {suffix for suffix, name in pillow().registered_extensions().items() if name in FORMATS}
    try:
        paths = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
        folders = {path for path in paths if path.is_dir()}
    except OSError as error:
        raise ValueError(f"images: the folder {folder} cannot be read: {error}") from error
    for path in paths:
        if path in folders:
            yield from _image_files(path, (*above, real))
        elif path.suffix.lower() in suffixes:
            yield path
        elif path.is_symlink() and not path.exists():
            raise ValueError(f"images: {path} is a link to {os.readlink(path)}, which does not exist")


def _class_names(folder: Path, paths: list[Path]) -> list[str]:
    loose = [path.name for path in paths if path.parent == folder]
    if loose:
        raise ValueError(
            f"images: `labels=True` needs one subfolder per class; {folder} has {len(loose)} images outside any, "
            f"such as {loose[0]!r}"
        )
    return sorted({_class_name(folder, path) for path in paths})


def _class_name(folder: Path, path: Path) -> str:
    return path.relative_to(folder).parts[0]


def _captions(folder: Path, paths: list[Path]) -> np.ndarray:
    """The caption of each image, in the file of the same name with the suffix .txt."""
    files = [path.with_suffix(".txt") for path in paths]
    missing = [str(file.relative_to(folder)) for file in files if not file.is_file()]
    if missing:
        more = ", ..." if len(missing) > 5 else ""
        raise ValueError(
            f"images: `text=True` reads the caption of photo.jpg from photo.txt; of {len(files)} such files in "
            f"{folder}, {len(missing)} are missing: {', '.join(missing[:5])}{more}"
        )
    return utf8(read_caption(file) for file in files)


def read_caption(file: Path) -> str:
    """The text of a file."""
    try:
        return file.read_text("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise ValueError(f"images: {file} is not UTF-8: {error}") from None


def _without_broken(folder: Path, paths: list[Path]) -> tuple[list[Path], list[tuple[int, int]]]:
    """The readable files, with their sizes. One warning lists the others, each with its error."""
    with ThreadPoolExecutor() as pool:
        results = list(pool.map(_size_or_error, paths))
    broken = {path: result for path, result in zip(paths, results, strict=True) if isinstance(result, Exception)}
    if broken:
        names = "".join(f"\n  {path.relative_to(folder)}: {error}" for path, error in broken.items())
        message = f"images: {len(broken)} of {len(paths)} files in {folder} cannot be read"
        if len(broken) == len(paths):
            raise ValueError(f"{message}:{names}")
        warnings.warn(f"{message} and are skipped:{names}", stacklevel=2)
    good = [path for path in paths if path not in broken]
    return good, [result for result in results if not isinstance(result, Exception)]


def _size_or_error(path: Path) -> tuple[int, int] | Exception:
    try:
        return decode(path).shape[:2]
    except Exception as error:  # Pillow raises many types; the caller reports them
        return error


def decode(path: Any) -> np.ndarray:
    """The image in a file, rotated by its EXIF orientation, uint8 with shape `(height, width, 4)`."""
    from PIL import ImageOps

    with opened(path) as image:
        if image.mode[0] in "IF":
            raise ValueError(f"its pixels have the mode {image.mode!r}; 8 bits per channel are expected")
        image = ImageOps.exif_transpose(image)
        opaque = image if image.has_transparency_data else image.convert("RGB")
        return np.asarray(opaque.convert("RGBA"))


def _read_image(shape: tuple[int | None, ...]) -> Callable[[dict], dict]:
    def read(element: dict) -> dict:
        image = tf.numpy_function(lambda path: decode(os.fsdecode(path)), [element["image"]], tf.uint8, stateful=False)
        return {**element, "image": tf.ensure_shape(image, shape)}

    return read
