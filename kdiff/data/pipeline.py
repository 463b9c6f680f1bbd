"""From a source of images to batches for `model.fit`."""

import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np

from kdiff.base import check_choice, check_integer
from kdiff.data import augmentation, encoding, latents, sources
from kdiff.data._tensorflow import tf
from kdiff.data.order import Order
from kdiff.writing import remove_leftovers

__all__ = ["UNCACHED_SHUFFLE", "images"]

UNCACHED_SHUFFLE = 10_000  # the shuffle buffer, in images, without a cache in memory


def images(
    source: Any,
    image_size: int | tuple[int, int] | None = None,
    batch_size: int = 64,
    *,
    split: str = "train",
    labels: Any = False,
    text: Any = False,
    text_encoder: Callable[[list[str]], np.ndarray] | None = None,
    channels: int | None = None,
    data_dir: str | os.PathLike | None = None,
    download: bool = False,
    codec: Any = None,
    flips: bool = False,
    augment: keras.layers.Layer | Callable | Sequence | None = None,
    cache: bool | str | os.PathLike = True,
    shuffle: bool = True,
    repeat: int | None = 1,
    drop_remainder: bool = True,
    seed: int | None = 0,
) -> tf.data.Dataset:
    """A pipeline of image batches: resized, cached, shuffled each epoch, augmented, batched, prefetched.

    It yields float32 images in [-1, 1] with shape `(batch, height, width, channels)`; with `labels` or `text`, dicts
    such as `{"image": images, "label": labels, "text": text}`; with a `codec`, dicts `{"encoded": data, ...}`.
    Its attribute `class_names` lists the names of the classes, or is `None`.

    Args:
        source: one of
            - the name of an embedded set, which needs no download: "digits", 1,797 handwritten digits of 8x8 pixels, or
              "shapes", 22,000 captioned pictures of coloured shapes, drawn at `image_size` (32);
            - a folder of images, as a path; files that cannot be read are named in a warning and skipped. Of more than
              10,000 images a sample is read beforehand; others that cannot be read are replaced, with a warning;
            - a folder of `write_shards`, for sets that are too large to list or to cache: with `cache=False`;
            - the name of a TensorFlow Dataset such as "cifar10";
            - an array `(count, height, width, channels)`, uint8 in 0..255 or floats in [-1, 1].
        image_size: the side, or `(height, width)`, of the images: center-cropped to that shape, then
            resized smoothly. `None` keeps their size.
        batch_size: the number of images in a batch.
        split: for digits "train" (1,500), "test" (297) or "all"; for shapes "train" (20,000) or "test" (2,000, with
            pairs of objects that do not occur in "train"); for a TensorFlow Dataset its splits; for an array "train" or
            "all", which are equal; for a folder the same, or the name of a subfolder ("test"). "train[:90%]" and
            "train[90%:]" divide any of them; all but TensorFlow Datasets are divided at random, always in the same way.
        labels: `True` for the labels of the source (in a folder of images, one subfolder per class); for an array of
            images an array with one row per image.
        text: `True` for the captions of the source: those of the shapes; in a folder, photo.txt is the caption of
            photo.jpg; in a TensorFlow Dataset, the first string of the feature "text", "caption" or "captions". For an
            array of images, one string per image.
        text_encoder: a function from a list of strings to int32 or float32 of the shape `(count, ...)`, such as a
            tokenizer of `kdiff.text` or a frozen text encoder. It is called for a few hundred texts at a time, and its
            results are cached with the images, so that each text is encoded once. `None` yields the strings, tf.string
            of the shape `(batch,)`.
        channels: 1, 3 or 4; colour is converted to grey, and transparent pixels to white. `None` keeps those of the
            source, which are 3 for a folder.
        data_dir: the folder of TensorFlow Datasets; `None` is their default, ~/tensorflow_datasets.
        download: whether a missing TensorFlow Dataset may be downloaded.
        codec: a codec of `kdiff.codecs`, such as `Latent`, that encodes each image once, before the cache, which holds
            mean and standard deviation in float16; each epoch samples from these. The model needs the same codec to
            decode: `DiffusionModel(network, codec=codec)`.
        flips: whether a `codec` also encodes the mirror image, with one of the two chosen at random in each epoch.
        augment: Keras or keras-cv layers, functions of a TensorFlow tensor, or a list of them. Each receives one
            float32 image `(height, width, channels)` in [0, 255], the range that Keras' layers expect, in every epoch.
            A function should draw from a `tf.random.Generator`: numbers of `tf.random.uniform` are repeated by tf.data
            in every epoch after `keras.utils.set_random_seed`.
        cache: `True` keeps the resized images and encoded texts in memory; a path keeps them in files of that name,
            written at once, or read if they exist, whatever the other arguments; `False` reads and encodes in every
            epoch.
        shuffle: whether each epoch has a new order.
        repeat: passes over the images in one epoch; `None` is endless, for `fit(steps_per_epoch=...)`.
        drop_remainder: whether to drop a smaller last batch.
        seed: fixes the order, and augments on one thread so that layers with a seed are reproducible too; `None` does
            neither. With it, training that `BackupCallback` resumes continues with the next order; the random numbers
            of layers in `augment` start anew. Hosts that share the batches out need it, the same for all: each goes
            through all images in the order of the seed, and takes its part of every batch.

    Raises:
        TypeError: if `codec` is not a codec.
        ValueError: for an unknown source or split, an empty source, fewer images than a batch, images of different
            sizes without `image_size`, an array of the wrong rank, type or range, or with NaN, labels or text that the
            source does not have, or a text encoder without text or with an invalid output.
        ImportError: if the source needs a package that is missing; the message names the extra to install.
    """
    size = _check_arguments(image_size, batch_size, channels, repeat, seed)
    augment = augmentation.steps(augment)
    latents.check_codec(codec, augment, flips)
    _check_encoder(text_encoder, text)
    found = sources.find(source, size, labels, text, split, data_dir, download)
    channels = channels or found.channels
    _check_source(found, size, channels, split)
    count = int(found.dataset.cardinality())
    _check_count(count, batch_size if drop_remainder else 1)

    def prepared(dataset):
        dataset = dataset.map(_conform(size, channels), tf.data.AUTOTUNE)
        if text_encoder is not None:
            dataset = encoding.encoded(dataset, text_encoder)
        return dataset if codec is None else latents.encoded(dataset, codec, flips)

    dataset = prepared(found.dataset)
    ready = found.in_memory and size in (None, found.shape[:2]) and text_encoder is None and codec is None
    if cache and not (cache is True and ready):
        dataset = dataset.cache() if cache is True else _cached(dataset, Path(cache))
    mixed = found.mixed is not None and not cache
    buffer = 1 if mixed and found.mixed_well else min(count, UNCACHED_SHUFFLE)
    order = Order(count, count if cache is True else buffer, seed)
    if shuffle:
        dataset = order.shuffled(lambda seed: prepared(found.mixed(seed)) if mixed else dataset, repeat)
    else:
        dataset = dataset.repeat(repeat)
    if augment:
        dataset = dataset.map(_augment(augment), tf.data.AUTOTUNE if seed is None else None)
    finish = _scale if codec is None else latents.drawn(seed)
    dataset = dataset.batch(batch_size, drop_remainder).map(finish).prefetch(tf.data.AUTOTUNE)
    dataset = dataset.with_options(_by_batches())
    dataset.class_names = found.class_names
    dataset.order = order
    return dataset


def _check_arguments(image_size, batch_size, channels, repeat, seed) -> tuple[int, int] | None:
    """Checks the arguments and returns the size as `(height, width)`."""
    check_integer("images", "batch_size", batch_size)
    check_choice("images", "channels", channels, (None, 1, 3, 4))
    if repeat is not None:
        check_integer("images", "repeat", repeat)
    if seed is not None:
        check_integer("images", "seed", seed, minimum=0)
    if image_size is None:
        return None
    size = tuple(image_size) if isinstance(image_size, (tuple, list)) else (image_size, image_size)
    if len(size) != 2:
        raise ValueError(f"images: `image_size` must be an integer or (height, width); received: {image_size!r}")
    for side in size:
        check_integer("images", "image_size", side)
    return size


def _check_encoder(text_encoder: Callable | None, text: Any) -> None:
    if text_encoder is None:
        return
    if text is False:
        raise ValueError("images: a `text_encoder` needs text: pass `text=True`, or the strings for an array of images")
    if not callable(text_encoder):
        raise ValueError(
            f"images: `text_encoder` must be a function from a list of strings; received: {text_encoder!r}"
        )


def _check_source(found: sources.Source, size: tuple[int, int] | None, channels: int | None, split: str) -> None:
    if found.dataset.cardinality() == 0:
        raise ValueError(f"images: the source is empty: it has no images in the split {split!r}")
    if size is None and None in found.shape:
        raise ValueError("images: the images differ in size; pass an `image_size`")
    if channels and found.shape[-1] not in (1, 2, 3, 4):
        raise ValueError(
            f"images: `channels` must be None for images of {found.shape[-1]} channels; received: {channels}"
        )


def _check_count(count: int, batch_size: int) -> None:
    if count < batch_size:
        raise ValueError(
            f"images: `batch_size` is {batch_size}, but there are only {count} images, less than one batch; "
            "pass a smaller one, or `drop_remainder=False`"
        )


def _by_batches() -> tf.data.Options:
    """Options by which hosts share out batches, since files are read inside of a pass or not at all, from a cache."""
    options = tf.data.Options()
    options.experimental_distribute.auto_shard_policy = tf.data.experimental.AutoShardPolicy.DATA
    return options


# One image, as a float in 0..255, cached as uint8 unless the source has floats.


def _conform(size: tuple[int, int] | None, channels: int | None) -> Callable[[dict], dict]:
    """Converts images to one size and number of channels."""

    def conform(element: dict) -> dict:
        image = element["image"]
        exact = image.dtype.is_floating
        image = (image + 1) * 127.5 if exact else tf.cast(image, tf.float32)
        image = _to_size(_to_channels(image, channels), size)
        return {**element, "image": image if exact else tf.cast(tf.round(image), tf.uint8)}

    return conform


def _to_channels(image: tf.Tensor, channels: int | None) -> tf.Tensor:
    if channels in (None, image.shape[-1]):
        return image
    if image.shape[-1] in (2, 4):  # grey or colour with alpha: composite on white
        opacity = image[..., -1:] / 255
        image = image[..., :-1] * opacity + 255 * (1 - opacity)
    if channels == 1:
        return image if image.shape[-1] == 1 else tf.image.rgb_to_grayscale(image)
    image = tf.image.grayscale_to_rgb(image) if image.shape[-1] == 1 else image
    return image if channels == 3 else tf.pad(image, [[0, 0], [0, 0], [0, 1]], constant_values=255)


def _to_size(image: tf.Tensor, size: tuple[int, int] | None) -> tf.Tensor:
    if size in (None, tuple(image.shape[:2])):
        return image
    resized = tf.image.resize(_centre_window(image, size), size, "bicubic", antialias=True)
    return tf.clip_by_value(resized, 0, 255)  # bicubic interpolation overshoots at edges


def _centre_window(image: tf.Tensor, size: tuple[int, int]) -> tf.Tensor:
    """The largest central window with the aspect ratio of `size`."""
    whole = tf.shape(image)[:2]
    scale = tf.reduce_min(whole / size)
    window = tf.maximum(tf.cast(tf.round(scale * size), tf.int32), 1)
    top, left = tf.unstack((whole - window) // 2)
    return image[top : top + window[0], left : left + window[1]]


def _cached(dataset: tf.data.Dataset, path: Path) -> tf.data.Dataset:
    """The dataset from files of that name, which are written in a temporary folder and moved into place if missing.

    tf.data would write them during the first epoch, and a killed process would leave its lock behind.
    """
    if not path.with_name(f"{path.name}.index").exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(path)
        with tempfile.TemporaryDirectory(f"-{path.name}", ".partial-", path.parent) as folder:
            dataset.cache(os.path.join(folder, path.name)).reduce(np.int64(0), lambda count, _: count + 1)
            for file in sorted(Path(folder).iterdir(), key=lambda file: file.suffix == ".index"):  # move the index last
                os.replace(file, path.with_name(file.name))
    return dataset.cache(str(path))


def _augment(steps: list[Callable]) -> Callable[[dict], dict]:
    def augment(element: dict) -> dict:
        image = tf.cast(element["image"], tf.float32)
        for step in steps:
            image = augmentation.apply(step, image)
        return {**element, "image": image}

    return augment


def _scale(batch: dict) -> dict | tf.Tensor:
    """Scales 0..255 to [-1, 1]."""
    images = tf.clip_by_value(tf.cast(batch["image"], tf.float32), 0, 255) / 127.5 - 1
    return {**batch, "image": images} if len(batch) > 1 else images
