"""Images, labels and captions of a folder.

Of each image no more is kept than the bytes of its name; all else is read from the files when it is needed. Of a folder
of up to `CHECKED` images every file is read once beforehand, to find those that cannot be; of a larger one a sample is.
"""

import itertools
import os
import threading
import warnings
from array import array
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from kdiff.data._tensorflow import tf
from kdiff.data.base import Source, split_rows
from kdiff.pictures import FORMATS, opened, pillow

__all__ = ["CHECKED", "SAMPLED", "decode", "from_folder", "read_caption"]

CHECKED = 10_000  # the most images of a folder that are all read beforehand
SAMPLED = 1_000  # how many are of a larger one
_NAMED = 5  # missing captions, and files that turn out broken later, that are named


def from_folder(folder: Path, labels: bool, text: bool, split: str, size: tuple[int, int] | None = None) -> Source:
    """The images in a folder and its subfolders, except hidden ones. With `labels`, each direct subfolder is a class.

    With `text`, the caption of photo.jpg is in photo.txt. The `size` is that to which images will be brought, if any.
    """
    folder, split = _split_folder(folder, split)
    files = _Files(folder)
    if not files.count:
        raise ValueError(f"images: the folder {folder} has no image files ({', '.join(FORMATS)})")
    class_names = files.class_names() if labels else None
    checked, rows = np.arange(files.count), np.arange(files.count)
    if large := files.count > CHECKED:
        checked = np.sort(np.random.default_rng(0).choice(files.count, SAMPLED, replace=False))
    sizes = _sizes(files, checked)
    rows = np.setdiff1d(rows, [row for row, one in zip(checked, sizes, strict=True) if isinstance(one, Exception)])
    if text:
        files.check_captions(rows)
        for row in np.intersect1d(rows, checked):
            read_caption(files.caption(row))
    known = {one for one in sizes if not isinstance(one, Exception)}
    shape = known.pop() if len(known) == 1 and not (large and size) else (None, None)
    rows = split_rows(split, {"train": rows, "all": rows})
    reader = _Reader(files, rows, class_names, text, (*shape, 4))

    def mixed(seed: Any) -> tf.data.Dataset:
        order = tf.numpy_function(lambda seed: np.random.default_rng(int(seed)).permutation(rows), [seed], tf.int64)
        return reader.dataset(tf.data.Dataset.from_tensor_slices(order))

    dataset = reader.dataset(tf.data.Dataset.from_tensor_slices(rows.astype("int64")))
    return Source(dataset, class_names, channels=3, mixed=mixed, mixed_well=True)


class _File(NamedTuple):
    """An image file: its path relative to the folder, and whether its caption lies beside it."""

    name: str
    captioned: bool


class _Files:
    """The image files of a folder: the bytes of their names, since as many `Path`s would take ten times the memory."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._names, self._ends, self._captioned = bytearray(), array("q", [0]), bytearray()
        for file in _image_files(os.fspath(folder)):
            self._names += os.fsencode(file.name)  # a name need not be UTF-8
            self._ends.append(len(self._names))
            self._captioned.append(file.captioned)

    @property
    def count(self) -> int:
        return len(self._captioned)

    def name(self, row: int) -> str:
        """The path relative to the folder."""
        return os.fsdecode(bytes(self._names[self._ends[row] : self._ends[row + 1]]))

    def path(self, row: int) -> Path:
        return self.folder / self.name(row)

    def class_name(self, row: int) -> str:
        return self.name(row).split(os.sep, 1)[0]

    def caption(self, row: int) -> Path:
        """The file of the caption."""
        return self.path(row).with_suffix(".txt")

    def class_names(self) -> list[str]:
        """The names of the direct subfolders with images."""
        loose = [name for name in map(self.name, range(self.count)) if os.sep not in name]
        if loose:
            raise ValueError(
                f"images: `labels=True` needs one subfolder per class; {self.folder} has {len(loose)} images outside "
                f"any, such as {loose[0]!r}"
            )
        return sorted({self.class_name(row) for row in range(self.count)})

    def check_captions(self, rows: np.ndarray) -> None:
        """Raises a ValueError if one is missing."""
        missing = rows[np.frombuffer(self._captioned, "bool")[rows] == 0]
        if len(missing):
            names = ", ".join(os.path.relpath(self.caption(row), self.folder) for row in missing[:_NAMED])
            raise ValueError(
                f"images: `text=True` reads the caption of photo.jpg from photo.txt; of {len(rows)} such files in "
                f"{self.folder}, {len(missing)} are missing: {names}{', ...' if len(missing) > _NAMED else ''}"
            )


class _Reader:
    """Reads the elements of a dataset: image, label and caption of a row of the files.

    A file that cannot be read, of those that were not checked, is replaced by the next, and the first are named in
    warnings.
    """

    def __init__(self, files: _Files, rows: np.ndarray, class_names: list[str] | None, text: bool, shape: tuple):
        self.files, self.rows, self.text, self.shape = files, rows, text, shape
        self.numbers = None if class_names is None else {name: i for i, name in enumerate(class_names)}
        self._broken, self._lock = 0, threading.Lock()

    def dataset(self, rows: tf.data.Dataset) -> tf.data.Dataset:
        """The elements of these rows."""
        types = [tf.uint8, *([] if self.numbers is None else [tf.int32]), *([tf.string] if self.text else [])]
        names = ["image", *([] if self.numbers is None else ["label"]), *(["text"] if self.text else [])]

        def read(row):
            values = tf.numpy_function(self._element, [row], types, stateful=False)
            shapes = [self.shape, *[()] * (len(names) - 1)]
            return {n: tf.ensure_shape(value, shape) for n, value, shape in zip(names, values, shapes, strict=True)}

        dataset = rows.map(read, tf.data.AUTOTUNE)
        return dataset.apply(tf.data.experimental.assert_cardinality(len(self.rows)))

    def _element(self, row):
        first = int(np.searchsorted(self.rows, row))
        for place in itertools.islice(itertools.cycle(range(len(self.rows))), first, first + SAMPLED):
            try:
                values = self._read(int(self.rows[place]))
            except Exception as error:  # Pillow raises many types
                self._note(int(self.rows[place]), error)
                continue
            self._check_size(int(self.rows[place]), values[0].shape)
            return values
        raise ValueError(f"images: none of {SAMPLED} files in a row can be read; the first is {self.files.path(row)}")

    def _read(self, row: int) -> list:
        values: list = [decode(self.files.path(row))]
        if self.numbers is not None:
            values.append(np.int32(self.numbers[self.files.class_name(row)]))
        return [*values, read_caption(self.files.caption(row)).encode()] if self.text else values

    def _check_size(self, row: int, shape: tuple) -> None:
        if self.shape[0] is not None and shape != self.shape:
            raise ValueError(
                f"images: the images differ in size: most have {self.shape[:2]}, {self.files.path(row)} has "
                f"{shape[:2]}; pass an `image_size`"
            )

    def _note(self, row: int, error: Exception) -> None:
        with self._lock:
            self._broken += 1
            more = "; others are replaced without a word" if self._broken == _NAMED else ""
            named = self._broken <= _NAMED
        if named:
            path = self.files.path(row)
            warnings.warn(f"images: {path} cannot be read, and is replaced by the next: {error}{more}", stacklevel=2)


def _split_folder(folder: Path, split: str) -> tuple[Path, str]:
    """`folder/test` and "all" for the split "test" if that folder exists; else both unchanged."""
    if not folder.is_dir():
        raise ValueError(f"images: no such folder: {folder}")
    name, bracket, part = str(split).partition("[")
    inner = folder / name
    return (inner, f"all{bracket}{part}") if name and inner.is_dir() else (folder, split)


def _image_files(folder: str, inside: str = "", above: tuple[str, ...] = ()) -> Iterator[_File]:
    """The image files, by suffix, in a folder and its subfolders, in order, except hidden ones.

    Links are followed, except into a folder that contains them (`above`, as real paths).
    """
    here = os.path.join(folder, inside)
    real = os.path.realpath(here)
    if real in above:
        return
    suffixes = {suffix for suffix, name in pillow().registered_extensions().items() if name in FORMATS}
    try:
        with os.scandir(here) as entries:
            found = {entry.name: entry.is_dir() for entry in entries if not entry.name.startswith(".")}
    except OSError as error:
        raise ValueError(f"images: the folder {here.removesuffix(os.sep)} cannot be read: {error}") from error
    for name in sorted(found):
        stem, suffix = os.path.splitext(name)
        path = os.path.join(inside, name)
        if found[name]:
            yield from _image_files(folder, path, (*above, real))
        elif suffix.lower() in suffixes:
            yield _File(path, f"{stem}.txt" in found)
        elif os.path.islink(os.path.join(folder, path)) and not os.path.exists(os.path.join(folder, path)):
            path = os.path.join(folder, path)
            raise ValueError(f"images: {path} is a link to {os.readlink(path)}, which does not exist")


def read_caption(file: Path) -> str:
    """The text of a file."""
    try:
        return file.read_text("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise ValueError(f"images: {file} is not UTF-8: {error}") from None


def _sizes(files: _Files, rows: np.ndarray) -> list[tuple[int, int] | Exception]:
    """The sizes of these images, or why they cannot be read. One warning lists the latter."""
    with ThreadPoolExecutor() as pool:
        results = list(pool.map(lambda row: _size_or_error(files.path(row)), rows))
    broken = {files.name(row): one for row, one in zip(rows, results, strict=True) if isinstance(one, Exception)}
    if broken:
        names = "".join(f"\n  {name}: {error}" for name, error in broken.items())
        message = f"images: {len(broken)} of {len(rows)} files in {files.folder} cannot be read"
        if len(broken) == len(rows):
            raise ValueError(f"{message}:{names}")
        warnings.warn(f"{message} and are skipped:{names}", stacklevel=2)
    return results


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
