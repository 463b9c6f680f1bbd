"""Sources of images: each becomes a `Source`, a dataset of dicts before resizing, caching and batching."""

import os
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from kdiff import scenes
from kdiff.base import needs
from kdiff.data._tensorflow import tf
from kdiff.data.base import Source, split_rows, utf8
from kdiff.data.folders import from_folder
from kdiff.data.shards import from_shards, is_sharded
from kdiff.text import strings

__all__ = [
    "CAPTIONS",
    "EMBEDDED",
    "SHAPES",
    "check_images",
    "check_labels",
    "check_text",
    "coloured_shapes",
    "digits",
    "find",
    "from_array",
    "from_tfds",
]


def find(
    source: Any,
    size: tuple[int, int] | None,
    labels: Any,
    text: Any,
    split: str,
    data_dir: str | os.PathLike | None,
    download: bool,
) -> Source:
    """The `Source` for these arguments of `images`. Its images need not have that size yet."""
    if not isinstance(source, (str, os.PathLike)):
        return from_array(source, labels, text, split)
    for name, value in (("labels", labels), ("text", text)):
        if not isinstance(value, bool):
            raise ValueError(
                f"images: `{name}` must be True or False, unless the images are an array; received: {value!r}"
            )
    if source in EMBEDDED:
        return EMBEDDED[source](size, labels, text, split)
    if is_sharded(source):
        return from_shards(source, labels, text, split)
    if isinstance(source, os.PathLike) or Path(source).expanduser().is_dir():
        return from_folder(Path(source).expanduser(), labels, text, split, size)
    return from_tfds(source, labels, text, split, data_dir, download)


# Arrays


def from_array(images: Any, labels: Any, text: Any, split: str) -> Source:
    """Images of an array, checked, with `labels` an array and `text` strings of one row per image, or False."""
    images = check_images(images)
    arrays = {"image": images}
    if labels is True:
        raise ValueError("images: for an array pass labels as `labels=array`")
    if labels is not False:
        arrays["label"] = check_labels(labels, len(images))
    if text is True:
        raise ValueError("images: for an array pass captions as `text=[...]`")
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
        raise ValueError(
            f"images: an array must have the shape (count, height, width, channels); received the shape {shape}{hint}"
        )
    if shape[1] in (1, 3, 4) and shape[3] > 4:
        raise ValueError(f"images: channels come last; received the shape {shape}; transpose it with (0, 2, 3, 1)")


def _check_image_range(low: float, high: float) -> None:
    if not np.isfinite([low, high]).all():
        raise ValueError("images: the array has NaN or infinite values")
    if low < -1.001 or high > 1.001:
        hint = "; for values in 0..255 pass uint8, or divide by 127.5 and subtract 1" if high > 2 else ""
        raise ValueError(f"images: floats must lie in [-1, 1]; received values in [{low:.4g}, {high:.4g}]{hint}")
    if low >= 0 and high > low:
        warnings.warn(
            f"images: values in [{low:.4g}, {high:.4g}] look like [0, 1], but [-1, 1] is expected", stacklevel=2
        )


def check_labels(labels: Any, count: int) -> np.ndarray:
    """`labels` as int32 or float32, one row per image."""
    labels = np.asarray(labels)
    if labels.ndim == 0 or len(labels) != count:
        raise ValueError(f"images: `labels` must have one row for each of {count} images; received: {labels.shape}")
    if labels.dtype.kind not in "iuf":
        raise ValueError(f"images: `labels` must be integers or floats; received: {labels.dtype}")
    return labels.astype("float32" if labels.dtype.kind == "f" else "int32")


def check_text(text: Any, count: int) -> np.ndarray:
    """`text` as UTF-8 bytes, one string per image."""
    if isinstance(text, (str, bytes)) or np.ndim(text) != 1 or len(text) != count:
        received = repr(text) if np.ndim(text) == 0 else f"an array of the shape {np.shape(text)}"
        raise ValueError(f"images: `text` must have one string for each of {count} images; received: {received}")
    try:
        return utf8(strings(text))
    except TypeError as error:
        raise ValueError(f"images: `text` must be strings: {error}") from None


# Embedded sets


def digits(size: tuple[int, int] | None, labels: bool, text: bool, split: str) -> Source:
    """The 1,797 handwritten 8x8 digits that ship with scikit-learn: 1,500 in "train", the last 297 in "test"."""
    with needs("data", "the digits are part of scikit-learn"):
        from sklearn.datasets import load_digits
    if text:
        raise ValueError("images: the digits have labels but no `text`")
    bunch = load_digits()
    arrays = {"image": np.round(bunch.images[..., None] * (255 / 16)).astype("uint8")}  # 17 shades of grey
    if labels:
        arrays["label"] = bunch.target.astype("int32")
    order = np.arange(len(bunch.images))
    rows = split_rows(split, {"train": order[:1500], "test": order[1500:], "all": order})
    return _in_memory({name: array[rows] for name, array in arrays.items()}, [str(digit) for digit in range(10)])


SHAPES = {"train": 20_000, "test": 2_000}


def coloured_shapes(size: tuple[int, int] | None, labels: bool, text: bool, split: str) -> Source:
    """The pictures of `kdiff.scenes`, drawn at `size`: 20,000 in "train", and 2,000 of held-out pairs in "test"."""
    height, width = size or (32, 32)
    if height != width:
        raise ValueError(f"images: the shapes are square; `image_size` must be one number; received: {size}")
    if labels:
        raise ValueError("images: the shapes have captions but no `labels`; pass `text=True`")
    rows = split_rows(split, {name: np.arange(count) for name, count in SHAPES.items()})
    name = split.partition("[")[0]
    images, captions = scenes.dataset(SHAPES[name], height, held_out=name == "test", rows=rows)
    return _in_memory({"image": images, **({"text": utf8(captions)} if text else {})})


EMBEDDED: dict[str, Callable[[tuple[int, int] | None, bool, bool, str], Source]] = {
    "digits": digits,
    "shapes": coloured_shapes,
}


# TensorFlow Datasets


def from_tfds(
    name: str, labels: bool, text: bool, split: str, data_dir: str | os.PathLike | None, download: bool
) -> Source:
    """A TensorFlow Dataset with a feature "image", with `labels` also "label", and with `text` one of `CAPTIONS`."""
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
            f"images: unknown `source` {name!r}. It is not an embedded set ({sorted(EMBEDDED)}), a folder, or a "
            "TensorFlow Dataset (see https://www.tensorflow.org/datasets/catalog); pass one such as 'cifar10' "
            "with its `data_dir=`, or with `download=True`"
        ) from error


def _prepare(builder: Any, name: str, download: bool) -> None:
    if builder.is_prepared():
        return
    if not download:
        raise ValueError(
            f"images: the TensorFlow Dataset {name!r} is not prepared in {builder.data_dir}; "
            "pass its `data_dir`, or `download=True`"
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


CAPTIONS = ("text", "caption", "captions")  # features with one or several strings


def _caption_feature(name: str, features: dict) -> str:
    for feature in CAPTIONS:
        if feature in features and getattr(_string(features[feature]), "dtype", None) == tf.string:
            return feature
    raise ValueError(f"images: {name!r} has no text in a feature of {list(CAPTIONS)}; it has {sorted(features)}")


def _string(caption: Any) -> Any:
    """The string of a caption with further parts, as in COCO."""
    return caption.get("text") if isinstance(caption, dict) else caption


def _first(caption: Any) -> tf.Tensor:
    """The first of several captions, or ""."""
    caption = _string(caption)
    return caption if caption.shape.rank == 0 else tf.concat([tf.reshape(caption, [-1]), [""]], 0)[0]


def _select(labels: bool, caption: str | None) -> Callable[[dict], dict]:
    def select(element: dict) -> dict:
        selected = {"image": element["image"]}
        if labels:
            selected["label"] = tf.cast(element["label"], tf.int32)
        return {**selected, "text": _first(element[caption])} if caption else selected

    return select
