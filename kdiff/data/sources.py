"""Where images come from: each source becomes one `Source`, a dataset of dicts not yet resized, cached or batched."""

import os
import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from kdiff import scenes
from kdiff.base import needs
from kdiff.data._tensorflow import tf
from kdiff.pictures import FORMATS, opened, pillow
from kdiff.text import strings

__all__ = [
    "CAPTIONS",
    "EMBEDDED",
    "SHAPES",
    "Source",
    "check_images",
    "check_labels",
    "check_text",
    "coloured_shapes",
    "decode",
    "digits",
    "find",
    "from_array",
    "from_folder",
    "from_tfds",
    "split_rows",
]


class Source(NamedTuple):
    """Images, and labels and captions if they were asked for.

    Attributes:
        dataset: yields dicts with "image", `(height, width, channels)`, uint8 or float32 in [-1, 1], and perhaps
            "label" and "text", one string; its cardinality is known.
        class_names: the names that integer labels stand for, if known.
        channels: how many channels the images get unless the caller says otherwise; `None` for as many as they have.
        in_memory: whether the images are held in memory, so that caching them as they are would gain nothing.
    """

    dataset: tf.data.Dataset
    class_names: list[str] | None = None
    channels: int | None = None
    in_memory: bool = False

    @property
    def shape(self) -> tuple[int | None, ...]:
        """The images' `(height, width, channels)`, `None` where it varies."""
        return tuple(self.dataset.element_spec["image"].shape)


def find(
    source: Any,
    size: tuple[int, int] | None,
    labels: Any,
    text: Any,
    split: str,
    data_dir: str | os.PathLike | None,
    download: bool,
) -> Source:
    """The `Source` that the arguments of `images` name. Its images need not be of that size yet."""
    if not isinstance(source, (str, os.PathLike)):
        return from_array(source, labels, text, split)
    for name, value in (("labels", labels), ("text", text)):
        if not isinstance(value, bool):
            raise ValueError(f"images: `{name}` of your own go with an array of images; else True or False: {value!r}")
    if source in EMBEDDED:
        return EMBEDDED[source](size, labels, text, split)
    if isinstance(source, os.PathLike) or Path(source).expanduser().is_dir():
        return from_folder(Path(source).expanduser(), labels, text, split)
    return from_tfds(source, labels, text, split, data_dir, download)


# Arrays


def from_array(images: Any, labels: Any, text: Any, split: str) -> Source:
    """Images of an array, checked, with `labels` an array of as many rows and `text` as many strings, or False."""
    images = check_images(images)
    arrays = {"image": images}
    if labels is True:
        raise ValueError("images: an array has no labels of its own; pass them as `labels=array`")
    if labels is not False:
        arrays["label"] = check_labels(labels, len(images))
    if text is True:
        raise ValueError("images: an array has no captions of its own; pass them as `text=[...]`")
    if text is not False:
        arrays["text"] = check_text(text, len(images))
    rows = split_rows(split, {"train": np.arange(len(images)), "all": np.arange(len(images))})
    return _in_memory({name: array[rows] for name, array in arrays.items()})


def _in_memory(arrays: dict[str, np.ndarray], class_names: list[str] | None = None) -> Source:
    return Source(tf.data.Dataset.from_tensor_slices(arrays), class_names, in_memory=True)


def check_images(images: Any) -> np.ndarray:
    """`images` as a uint8 array, or a float32 array in [-1, 1], with shape `(count, height, width, channels)`.

    Raises:
        ValueError: for another rank, type or range, NaN, or channels in the wrong place.
    """
    images = np.asarray(images)
    _check_image_shape(images.shape)
    if images.dtype == np.uint8 or images.size == 0:
        return images
    if not np.issubdtype(images.dtype, np.floating):
        raise ValueError(f"images: an array must be uint8 in 0..255 or floats in [-1, 1]; received: {images.dtype}")
    _check_image_range(images.min(), images.max())
    return images.astype("float32", copy=False)


def _check_image_shape(shape: tuple[int, ...]) -> None:
    if len(shape) != 4:
        hint = "; add the channel axis with `array[..., None]`" if len(shape) == 3 else ""
        raise ValueError(f"images: an array must be (count, height, width, channels); received the shape {shape}{hint}")
    if shape[1] in (1, 3, 4) and shape[3] > 4:
        raise ValueError(f"images: channels come last; received the shape {shape}; transpose it with (0, 2, 3, 1)")


def _check_image_range(low: float, high: float) -> None:
    if not np.isfinite([low, high]).all():
        raise ValueError("images: the array holds NaN or infinite values")
    if low < -1.001 or high > 1.001:
        hint = "; for values in 0..255 pass uint8, or divide by 127.5 and subtract 1" if high > 2 else ""
        raise ValueError(f"images: floats must lie in [-1, 1]; received values in [{low:.4g}, {high:.4g}]{hint}")
    if low >= 0 and high > low:
        warnings.warn(f"images: values in [{low:.4g}, {high:.4g}] look like [0, 1]; [-1, 1] is expected", stacklevel=2)


def check_labels(labels: Any, count: int) -> np.ndarray:
    """`labels` as int32 or float32, one row an image."""
    labels = np.asarray(labels)
    if labels.ndim == 0 or len(labels) != count:
        raise ValueError(f"images: `labels` must have one row for each of {count} images; received: {labels.shape}")
    if labels.dtype.kind not in "iuf":
        raise ValueError(f"images: `labels` must be whole numbers or floats; received: {labels.dtype}")
    return labels.astype("float32" if labels.dtype.kind == "f" else "int32")


def check_text(text: Any, count: int) -> np.ndarray:
    """`text` as UTF-8 bytes, one string an image."""
    if isinstance(text, (str, bytes)) or np.ndim(text) != 1 or len(text) != count:
        received = repr(text) if np.ndim(text) == 0 else f"an array of the shape {np.shape(text)}"
        raise ValueError(f"images: `text` must have one string for each of {count} images; received: {received}")
    try:
        return _utf8(strings(text))
    except TypeError as error:
        raise ValueError(f"images: `text` must be strings: {error}") from None


def _utf8(text: Iterable[str]) -> np.ndarray:
    return np.array([caption.encode() for caption in text], dtype=object)


# Splits


def split_rows(split: str, rows: dict[str, np.ndarray]) -> np.ndarray:
    """The rows of `split`: a name in `rows`, or a part of one such as "train[:90%]" or "train[100:]".

    A part is taken from one fixed random order, so that parts which do not overlap share no image and each holds
    every class.
    """
    match = re.fullmatch(r"(\w+)(?:\[(-?\d+%?)?:(-?\d+%?)?\])?", split) if isinstance(split, str) else None
    if not match or match[1] not in rows:
        raise ValueError(
            f"images: `split` must be one of {list(rows)}, or a part such as '{next(iter(rows))}[:90%]'; "
            f"received: {split!r}"
        )
    whole = rows[match[1]]
    if "[" not in split:
        return whole
    start, stop = (_position(text, len(whole)) for text in match.groups()[1:])
    return np.sort(np.random.default_rng(0).permutation(whole)[start:stop])


def _position(text: str | None, count: int) -> int | None:
    if text is None:
        return None
    return round(count * int(text[:-1]) / 100) if text.endswith("%") else int(text)


# Embedded sets


def digits(size: tuple[int, int] | None, labels: bool, text: bool, split: str) -> Source:
    """The 1,797 handwritten 8x8 digits that ship with scikit-learn: 1,500 in "train", the last 297 in "test"."""
    with needs("data", "The digits come with scikit-learn"):
        from sklearn.datasets import load_digits
    if text:
        raise ValueError("images: the digits have labels, and no `text`")
    bunch = load_digits()
    arrays = {"image": np.round(bunch.images[..., None] * (255 / 16)).astype("uint8")}  # 17 shades of grey
    if labels:
        arrays["label"] = bunch.target.astype("int32")
    order = np.arange(len(bunch.images))
    rows = split_rows(split, {"train": order[:1500], "test": order[1500:], "all": order})
    return _in_memory({name: array[rows] for name, array in arrays.items()}, [str(digit) for digit in range(10)])


SHAPES = {"train": 20_000, "test": 2_000}


def coloured_shapes(size: tuple[int, int] | None, labels: bool, text: bool, split: str) -> Source:
    """The pictures of `kdiff.scenes`, drawn at `size`: 20,000 in "train", and in "test" 2,000 of pairs held out."""
    height, width = size or (32, 32)
    if height != width:
        raise ValueError(f"images: the shapes are square; `image_size` must be one number, not {size}")
    if labels:
        raise ValueError("images: the shapes have captions, and no `labels`; pass `text=True`")
    rows = split_rows(split, {name: np.arange(count) for name, count in SHAPES.items()})
    name = split.partition("[")[0]
    images, captions = scenes.dataset(SHAPES[name], height, held_out=name == "test", rows=rows)
    return _in_memory({"image": images, **({"text": _utf8(captions)} if text else {})})


EMBEDDED: dict[str, Callable[[tuple[int, int] | None, bool, bool, str], Source]] = {
    "digits": digits,
    "shapes": coloured_shapes,
}


# Folders


def from_folder(folder: Path, labels: bool, text: bool, split: str) -> Source:
    """The images in a folder and below it, hidden ones apart. With `labels`, each folder directly in it is a class.

    With `text`, the caption of photo.jpg is in photo.txt.
    """
    folder, split = _split_folder(folder, split)
    paths = list(_image_files(folder))
    if not paths:
        raise ValueError(f"images: the folder {folder} holds no image files ({', '.join(FORMATS)})")
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
    """`folder/test` and "all" for the split "test" where there is such a folder; else both as they are."""
    if not folder.is_dir():
        raise ValueError(f"images: no such folder: {folder}")
    name, bracket, part = str(split).partition("[")
    inner = folder / name
    return (inner, f"all{bracket}{part}") if name and inner.is_dir() else (folder, split)


def _image_files(folder: Path, above: tuple[str, ...] = ()) -> Iterator[Path]:
    """The files in a folder and below it whose suffix is that of an image, in order; what is hidden is left out.

    Links are followed, but into a folder that they lie in (`above` are those, as real paths).
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
            raise ValueError(f"images: {path} is a link to {os.readlink(path)}, which is not there")


def _class_names(folder: Path, paths: list[Path]) -> list[str]:
    loose = [path.name for path in paths if path.parent == folder]
    if loose:
        raise ValueError(
            f"images: `labels=True` takes one folder a class; {folder} holds {len(loose)} images outside any, "
            f"such as {loose[0]!r}"
        )
    return sorted({_class_name(folder, path) for path in paths})


def _class_name(folder: Path, path: Path) -> str:
    return path.relative_to(folder).parts[0]


def _captions(folder: Path, paths: list[Path]) -> np.ndarray:
    """The text beside each image, in the file of the same name with the suffix .txt."""
    files = [path.with_suffix(".txt") for path in paths]
    missing = [str(file.relative_to(folder)) for file in files if not file.is_file()]
    if missing:
        more = ", ..." if len(missing) > 5 else ""
        raise ValueError(
            f"images: `text=True` takes the caption of photo.jpg from photo.txt; of {len(files)} such files in "
            f"{folder}, {len(missing)} are missing: {', '.join(missing[:5])}{more}"
        )
    return _utf8(_read_caption(file) for file in files)


def _read_caption(file: Path) -> str:
    try:
        return file.read_text("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise ValueError(f"images: {file} is not UTF-8: {error}") from None


def _without_broken(folder: Path, paths: list[Path]) -> tuple[list[Path], list[tuple[int, int]]]:
    """The files that decode, with their sizes. One warning names those that do not, each with its reason."""
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
    except Exception as error:  # Pillow raises many types; each is reported by the caller
        return error


def decode(path: str | os.PathLike) -> np.ndarray:
    """The image in a file, the right way up, uint8 with shape `(height, width, 4)`."""
    from PIL import ImageOps

    with opened(path) as image:
        if image.mode[0] in "IF":
            raise ValueError(f"its pixels are of mode {image.mode!r}; 8 bits a channel are expected")
        image = ImageOps.exif_transpose(image)
        opaque = image if image.has_transparency_data else image.convert("RGB")
        return np.asarray(opaque.convert("RGBA"))


def _read_image(shape: tuple[int | None, ...]) -> Callable[[dict], dict]:
    def read(element: dict) -> dict:
        image = tf.numpy_function(lambda path: decode(os.fsdecode(path)), [element["image"]], tf.uint8, stateful=False)
        return {**element, "image": tf.ensure_shape(image, shape)}

    return read


# TensorFlow Datasets


def from_tfds(
    name: str, labels: bool, text: bool, split: str, data_dir: str | os.PathLike | None, download: bool
) -> Source:
    """A TensorFlow Dataset with a feature "image", with `labels` one "label", and with `text` one of `CAPTIONS`."""
    builder = _tfds_builder(name, data_dir)
    _prepare(builder, name, download)
    features = builder.info.features
    _check_features(name, features, ["image", "label"] if labels else ["image"])
    dataset = _read_split(builder, split)
    names = getattr(features["label"], "names", None) if labels else None
    caption = _caption_feature(name, dataset.element_spec) if text else None
    return Source(dataset.map(_select(labels, caption), tf.data.AUTOTUNE), names)


def _tfds_builder(name: str, data_dir: str | os.PathLike | None) -> Any:
    what = f"images: {name!r} is neither an embedded set ({sorted(EMBEDDED)}) nor a folder; a TensorFlow Dataset needs"
    with needs("data", what):
        import tensorflow_datasets as tfds
    try:
        return tfds.builder(name, data_dir=data_dir and os.path.expanduser(data_dir))
    except (tfds.core.DatasetNotFoundError, ValueError) as error:
        raise ValueError(
            f"images: unknown `source` {name!r}. It is neither an embedded set ({sorted(EMBEDDED)}) nor a folder nor a "
            "TensorFlow Dataset: https://www.tensorflow.org/datasets/catalog names those; pass one such as 'cifar10' "
            "with `data_dir=` where it is prepared, or with `download=True`"
        ) from error


def _prepare(builder: Any, name: str, download: bool) -> None:
    if builder.is_prepared():
        return
    if not download:
        raise ValueError(
            f"images: the TensorFlow Dataset {name!r} is not prepared in {builder.data_dir}; "
            "pass the `data_dir` where it is, or `download=True`"
        )
    builder.download_and_prepare()


def _check_features(name: str, features: Any, wanted: Iterable[str]) -> None:
    for feature in wanted:
        if feature not in features:
            raise ValueError(f"images: {name!r} has no feature {feature!r}, only {sorted(features)}")
    if features["image"].dtype != np.uint8:
        raise ValueError(f"images: the images of {name!r} are {features['image'].dtype}; uint8 is expected")


def _read_split(builder: Any, split: str) -> tf.data.Dataset:
    try:
        return builder.as_dataset(split=split, shuffle_files=False)
    except ValueError as error:
        raise ValueError(
            f"images: unknown `split` {split!r}; this set has {sorted(builder.info.splits)}, "
            "and parts such as 'train[:90%]'"
        ) from error


CAPTIONS = ("text", "caption", "captions")  # features that hold one string, or some


def _caption_feature(name: str, features: dict) -> str:
    for feature in CAPTIONS:
        if feature in features and getattr(_string(features[feature]), "dtype", None) == tf.string:
            return feature
    raise ValueError(f"images: {name!r} has no text in a feature of {list(CAPTIONS)}; it has {sorted(features)}")


def _string(caption: Any) -> Any:
    """The string of a caption that has other parts too, as those of COCO have."""
    return caption.get("text") if isinstance(caption, dict) else caption


def _first(caption: Any) -> tf.Tensor:
    """The first of several captions, "" if there is none."""
    caption = _string(caption)
    return caption if caption.shape.rank == 0 else tf.concat([tf.reshape(caption, [-1]), [""]], 0)[0]


def _select(labels: bool, caption: str | None) -> Callable[[dict], dict]:
    def select(element: dict) -> dict:
        selected = {"image": element["image"]}
        if labels:
            selected["label"] = tf.cast(element["label"], tf.int32)
        return {**selected, "text": _first(element[caption])} if caption else selected

    return select
