"""Images in a few large files, for sets that are too many to list: read in order from the disk, mixed on the way.

    kdiff.data.write_shards("imagenet/train", "imagenet-shards", labels=True)          # once
    dataset = kdiff.data.images("imagenet-shards", 256, 256, labels=True, cache=False)

The files are TFRecords of `tf.train.Example`: "image", the bytes of the image's own file, and perhaps "label" and
"text". Which file an image is in is drawn at random, so each file is a sample of the whole.
"""

import io
import json
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from kdiff.base import check_integer
from kdiff.data._tensorflow import tf
from kdiff.data.base import Source, split_rows
from kdiff.data.folders import decode, read_caption
from kdiff.pictures import FORMATS, pillow
from kdiff.writing import replacing

__all__ = ["INDEX", "from_shards", "is_sharded", "write_shards"]

INDEX = "shards.json"  # how many images there are in each file, and the names of the classes
_AT_ONCE = 16  # files that are read side by side
_NAMED = 5  # files that warnings and errors name


def write_shards(
    source: str | os.PathLike,
    folder: str | os.PathLike,
    *,
    labels: bool = False,
    text: bool = False,
    shards: int = 128,
    seed: int = 0,
) -> int:
    """Writes the images of a folder, and below it, into a few large files that `images` reads.

    The folder is gone through once, and with `labels` or `text` once before, by names alone, so that errors come before
    anything is written; nothing is held but the names of the classes. Files that cannot be read are skipped with a
    warning. The images are copied as they are, whatever their sizes.

    Args:
        source: the folder.
        folder: where the files go, in place of those of the same names; made if it is not there.
        labels: whether each folder directly in `source` is a class, if it has images, as in `images`.
        text: whether the caption of photo.jpg is in photo.txt.
        shards: how many files; of some hundred megabytes each they are read well.
        seed: by which images are shared out among them.

    Returns:
        How many images were written.

    Raises:
        ValueError: if there are no images, or, with `labels`, some outside of any class; if a caption is missing; if
            `folder` is a file.
    """
    check_integer("write_shards", "shards", shards)
    source, folder = Path(source).expanduser(), Path(folder).expanduser()
    if not source.is_dir():
        raise ValueError(f"write_shards: no such folder: {source}")
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"write_shards: `folder` must be a folder, or not there yet; {folder} is neither")
    class_names = _checked_names(source, labels, text) if labels or text else []
    class_numbers = {name: number for number, name in enumerate(class_names)} if labels else None
    generator, counts, broken = np.random.default_rng(seed), [0] * shards, _Noted()
    with replacing(folder) as new:
        new.mkdir()
        files = [new / f"images-{i:05}-of-{shards:05}.tfrecord" for i in range(shards)]
        with ExitStack() as stack:
            writers = [stack.enter_context(tf.io.TFRecordWriter(str(file))) for file in files]
            for path in _walk(source):
                try:
                    example = _example(source, path, class_numbers, text)
                except OSError as error:
                    broken.note(f"{path}: {error}")
                    continue
                number = int(generator.integers(shards))
                writers[number].write(example)
                counts[number] += 1
        unread = f"; {broken.count} cannot be read:{broken.named()}" if broken.count else ""
        if not sum(counts):
            raise ValueError(f"write_shards: {source} holds no image files ({', '.join(FORMATS)}){unread}")
        (folder / INDEX).unlink(missing_ok=True)  # of the files that are now replaced
    about = {"counts": {file.name: count for file, count in zip(files, counts, strict=True)}}
    about |= {"class_names": class_names if labels else None, "text": text}
    with replacing(folder / INDEX) as new:  # last: where it is, all files are
        new.write_text(json.dumps(about))
    if unread:
        warnings.warn(f"write_shards: images were skipped{unread}", stacklevel=2)
    return sum(counts)


def _checked_names(source: Path, labels: bool, text: bool) -> list[str]:
    """The names of the folders directly in `source` that have images, in order, as `images` numbers them.

    Raises:
        ValueError: with `labels` for images outside of these folders, with `text` for images without a caption, unless
            none of the latter can be read.
    """
    names, loose, missing, readable = set(), _Noted(), _Noted(), False
    for path in _walk(source):
        if path.parent == source:
            loose.note(path)
        else:
            names.add(_class_name(source, path))
        if text and not (caption := path.with_suffix(".txt")).is_file():
            missing.note(caption)
            readable = readable or _is_readable(path)
    if labels and loose.count:
        raise ValueError(
            f"write_shards: `labels=True` takes one folder a class; {loose.count} images are outside of any:"
            f"{loose.named()}"
        )
    if readable:
        raise ValueError(
            f"write_shards: `text=True` takes the caption of photo.jpg from photo.txt; {missing.count} are missing:"
            f"{missing.named()}"
        )
    return sorted(names)


def _is_readable(path: Path) -> bool:
    try:
        decode(path)
    except Exception:  # Pillow raises many types
        return False
    return True


def _class_name(source: Path, path: Path) -> str:
    return path.relative_to(source).parts[0]


class _Noted:
    """Counts files, and keeps the names of the first."""

    def __init__(self):
        self.count, self.first = 0, []

    def note(self, what: Path | str) -> None:
        self.count += 1
        if len(self.first) < _NAMED:
            self.first.append(f"\n  {what}")

    def named(self) -> str:
        return "".join(self.first)


def _walk(folder: Path, above: tuple[str, ...] = ()) -> Iterator[Path]:
    """The image files in a folder and below it, one folder after the other, in whatever order the disk has them."""
    real = os.path.realpath(folder)
    if real in above:  # a link to a folder that it is in
        return
    suffixes = {suffix for suffix, name in pillow().registered_extensions().items() if name in FORMATS}
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                yield from _walk(Path(entry.path), (*above, real))
            elif Path(entry.name).suffix.lower() in suffixes:
                yield Path(entry.path)


def _example(source: Path, path: Path, class_numbers: dict[str, int] | None, text: bool) -> bytes:
    """The record of an image, which is decoded to see that it can be.

    Raises:
        OSError: for an image or caption that cannot be read, or whose folder was not there when writing began.
    """
    try:
        data = path.read_bytes()
        decode(io.BytesIO(data))
        caption = read_caption(path.with_suffix(".txt")) if text else None
    except Exception as error:  # Pillow raises many types
        raise OSError(str(error)) from error
    features = {"image": tf.train.Feature(bytes_list=tf.train.BytesList(value=[data]))}
    if class_numbers is not None:
        number = class_numbers.get(_class_name(source, path))
        if number is None:
            raise OSError("it is of no class that was there when writing began")
        features["label"] = tf.train.Feature(int64_list=tf.train.Int64List(value=[number]))
    if caption is not None:
        features["text"] = tf.train.Feature(bytes_list=tf.train.BytesList(value=[caption.encode()]))
    return tf.train.Example(features=tf.train.Features(feature=features)).SerializeToString()


def is_sharded(source: Any) -> bool:
    """Whether this is a folder that `write_shards` has written."""
    return isinstance(source, (str, os.PathLike)) and (Path(source).expanduser() / INDEX).is_file()


def from_shards(folder: str | os.PathLike, labels: Any, text: Any, split: str) -> Source:
    """The images of such a folder; a part of the split is a part of its files.

    Raises:
        ValueError: for labels or captions that it does not have.
    """
    folder = Path(folder).expanduser()
    about = json.loads((folder / INDEX).read_text())
    for name, asked, has in (("labels", labels, about["class_names"] is not None), ("text", text, about["text"])):
        if not isinstance(asked, bool) or (asked and not has):
            raise ValueError(f"images: `{name}` must be True or False, and {folder} has {'them' if has else 'none'}")
    files = sorted(about["counts"])
    rows = split_rows(split, {name: np.arange(len(files)) for name in ("train", "all")})
    files = [files[row] for row in rows]
    count = sum(about["counts"][file] for file in files)
    spec = {"image": tf.io.FixedLenFeature([], tf.string)}
    spec |= {"label": tf.io.FixedLenFeature([], tf.int64)} if labels else {}
    spec |= {"text": tf.io.FixedLenFeature([], tf.string)} if text else {}
    paths = [str(folder / file) for file in files]

    def read(seed: Any = None) -> tf.data.Dataset:
        dataset = tf.data.Dataset.from_tensor_slices(paths)
        if seed is not None:
            dataset = dataset.shuffle(len(paths), seed, reshuffle_each_iteration=False)
        dataset = dataset.interleave(tf.data.TFRecordDataset, _AT_ONCE, num_parallel_calls=tf.data.AUTOTUNE)
        dataset = dataset.map(_parsed(spec), tf.data.AUTOTUNE)
        return dataset.apply(tf.data.experimental.assert_cardinality(count))

    return Source(read(), about["class_names"] if labels else None, channels=3, mixed=read)


def _parsed(spec: dict[str, Any]) -> Callable[[Any], dict]:
    def parse(record):
        element = tf.io.parse_single_example(record, spec)
        image = tf.numpy_function(lambda data: decode(io.BytesIO(data)), [element["image"]], tf.uint8, stateful=False)
        element["image"] = tf.ensure_shape(image, (None, None, 4))
        return {**element, "label": tf.cast(element["label"], tf.int32)} if "label" in element else element

    return parse
