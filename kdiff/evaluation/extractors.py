"""Feature extractors: a network and the preprocessing of its images.

    Extractor(network, Images(299, mean, std))         any Keras model, or a function of a batch
    Extractor(classifier, layer="embedding")           a layer of a trained classifier
    InceptionFID("pt_inception-2015-12-05.pth")        for the FID (`kdiff.evaluation.inception`)
    clip_vision(encoder), dinov2(folder)               for CMMD; for FD-DINOv2

A score depends on both, so both are part of its report.
"""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from types import CodeType
from typing import Any

import keras
import numpy as np
from keras import ops

from kdiff import backend, deprecated
from kdiff.base import Value, check_choice, check_integer, needs
from kdiff.blocks.resizing import FORMS, resized
from kdiff.checks import check_examples, like_bytes
from kdiff.encoders import pixels
from kdiff.encoders.clip import CLIPVision

__all__ = ["IMAGENET", "Extractor", "Images", "clip_vision", "dinov2"]

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # mean and std per channel, in [0, 1]


class Images(Value):
    """Preprocessing of images for a network: (x / 255 - mean) / std, with x resized, in 0 ... 255.

    As in clean-fid (Parmar et al. 2022, "On Aliased Resizing and Surprising Subtleties in GAN Evaluation"): Pillow's
    bicubic filter with antialiasing, on floats, per channel, then clipped. Grey images become three equal channels.

    Args:
        size: (height, width) of the input of the network, or one integer for both; None keeps the size.
        mean, std: per channel, or one number for all.
        interpolation: of the resizing, one of "bicubic", "bilinear", "area", "nearest".
        rounded: whether images in [-1, 1] are first rounded to 256 levels, as in an image file.
        channels: 3, or 1 for a network of grey images, or None for those of the images.
    """

    @deprecated.arguments(form="interpolation")
    def __init__(
        self,
        size: int | Sequence[int] | None = None,
        mean: float | Sequence[float] = 0.5,
        std: float | Sequence[float] = 0.5,
        interpolation: str = "bicubic",
        rounded: bool = True,
        channels: int | None = 3,
    ):
        check_choice("Images", "interpolation", interpolation, tuple(FORMS))
        check_choice("Images", "channels", channels, (1, 3, None))
        for value in () if size is None else (size,) if isinstance(size, int) else tuple(size):
            check_integer("Images", "size", value)
        self.size, self.mean, self.std = size, mean, std
        self.interpolation, self.rounded, self.channels = interpolation, rounded, channels

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Maps (batch, height, width, channels), integers in 0 ... 255 or floats in [-1, 1], to float32."""
        if images.ndim != 4:
            raise ValueError(
                f"Images: images must have the shape (batch, height, width, channels); received: {images.shape}"
            )
        check_examples(images, None if images.dtype.kind == "f" else 1.0, "images")
        if images.dtype.kind == "f" and like_bytes(images):
            raise ValueError(
                f"Images: floating-point images must be in [-1, 1]; received {images.min():.4g} to {images.max():.4g}. "
                "Pass values in 0..255 as uint8"
            )
        x = images.astype("float32")
        if images.dtype.kind == "f":
            x = np.clip(127.5 * (x + 1.0), 0.0, 255.0)
            x = np.round(x) if self.rounded else x
        if self.size is not None:
            sizes = (self.size,) * 2 if isinstance(self.size, int) else tuple(self.size)
            if sizes != x.shape[1:3]:
                x = np.clip(ops.convert_to_numpy(resized(x, sizes, self.interpolation)), 0.0, 255.0)
        if self.channels not in (None, x.shape[-1]):
            if x.shape[-1] != 1:
                raise ValueError(f"Images: images must have {self.channels} channels; received: {x.shape[-1]}")
            x = np.repeat(x, self.channels, axis=-1)
        return ((x / 255.0 - np.float32(self.mean)) / np.float32(self.std)).astype("float32")


class Extractor:
    """Features of examples, (batch, features), float32 on the host: `output(network(prepare(examples)))`.

    Args:
        network: a built Keras model or layer, compiled for batches of one size; or a function of a batch.
        prepare: a function of a batch of NumPy arrays, such as `Images`; None passes examples unchanged.
        layer: the name of a layer of a functional model whose output is used; None for that of the model.
        output: a function from the output of the network to (batch, features); None takes the `vector` of an encoder of
            kdiff, and other outputs unchanged.
        batch_size: the number of examples per call of the network.
        name: its name in reports; None for the name of the network.

    Raises:
        TypeError: if an argument is not callable.
        ValueError: if `layer` is unknown, or the network is not functional.
    """

    def __init__(
        self,
        network: Callable,
        prepare: Callable | None = None,
        *,
        layer: str | None = None,
        output: Callable | None = None,
        batch_size: int = 64,
        name: str | None = None,
    ):
        for argument, value in (("network", network), ("prepare", prepare), ("output", output)):
            if not callable(value) and (value is not None or argument == "network"):
                raise TypeError(f"Extractor: `{argument}` must be a function or a model; received: {value!r}")
        check_integer("Extractor", "batch_size", batch_size)
        if layer is not None:
            if not isinstance(network, keras.Model):
                raise ValueError(f"Extractor: `layer` needs a functional Keras model; received: {network!r}")
            network = keras.Model(network.inputs, network.get_layer(layer).output, name=f"{network.name}.{layer}")
        self.network, self.prepare, self.output, self.batch_size = network, prepare, output, batch_size
        self.name = name or getattr(network, "name", None) or getattr(network, "__name__", type(network).__name__)
        self._run = self._function()

    def _function(self):
        pick = self.output or (lambda made: getattr(made, "vector", made))
        if not isinstance(self.network, keras.layers.Layer):
            return lambda batch: pick(self.network(batch))
        struct = getattr(self.network, "input", None) if isinstance(self.network, keras.Model) else None
        name = (
            next(iter(struct)) if isinstance(struct, dict) and len(struct) == 1 else None
        )  # such as "images" of KerasHub

        def run(batch):
            return pick(self.network(batch if name is None else {name: batch}, training=False))

        return backend.compiled(run, self.network)

    @property
    def description(self) -> str:
        """The description in reports."""
        return self.name if self.prepare is None else f"{self.name} of {self.prepare!r}"

    def __call__(self, examples: Any) -> np.ndarray:
        """The features of an array of any number of examples."""
        examples = np.asarray(ops.convert_to_numpy(examples))
        if not len(examples):
            raise ValueError(f"{self.name}: at least one example is required")
        size, made = min(self.batch_size, len(examples)), []
        for first in range(0, len(examples), size):
            # The last batch is padded, and the result cut, as another size would be recompiled.
            batch = examples[np.minimum(np.arange(first, first + size), len(examples) - 1)]
            batch = batch if self.prepare is None else self.prepare(batch)
            made.append(np.asarray(ops.convert_to_numpy(self._run(batch)), "float32"))
        features = np.concatenate(made)[: len(examples)]
        if features.ndim != 2:
            raise ValueError(
                f"{self.name}: features must have the shape (batch, features), as from a pooling layer or "
                f"`output`; received: {features.shape}"
            )
        return features

    def signature(self) -> str:
        """A hash of the network, its weights, its preprocessing and its output function.

        Raises:
            ValueError: if the network is not a Keras layer, or a function has no configuration or code, as a change of
                it could not be detected.
        """
        if not isinstance(self.network, keras.layers.Layer):
            raise ValueError(
                f"{self.name}: only a Keras model has a hash, not a function, so features cannot be cached"
            )
        if not isinstance(self.prepare, Value | None):
            raise ValueError(f"{self.name}: `prepare` has no configuration, so features cannot be cached")
        made = hashlib.sha256()
        parts = [type(self.network).__name__, self._output_code(), repr(self.prepare)]
        with backend.without_tensorflow():
            parts.append(_without_names(self.network))
        made.update(json.dumps(parts, sort_keys=True, default=repr).encode())
        for weight in self.network.weights:
            array = np.ascontiguousarray(ops.convert_to_numpy(weight))
            made.update(f"{array.dtype}{array.shape}".encode())
            made.update(array.view("uint8").reshape(-1).data if array.ndim else array.tobytes())
        return made.hexdigest()

    def _output_code(self) -> list | None:
        """The code of the output function, with the values that it holds."""
        if self.output is None:
            return None
        code, cells = getattr(self.output, "__code__", None), getattr(self.output, "__closure__", None) or ()
        held = [getattr(self.output, "__defaults__", None) or (), *(cell.cell_contents for cell in cells)]
        plain = (int, float, str, bool, type(None), slice, type(...))
        if code is None or not all(isinstance(part, plain) for part in keras.tree.flatten(held)):
            raise ValueError(
                f"{self.name}: `output` must be a function that holds nothing but numbers and strings, so that its "
                f"hash shows what it computes; received: {self.output!r}"
            )
        return [self.output.__qualname__, _described(code), repr(held)]


def _described(code: CodeType) -> list:
    """What a function computes, the same in every process; not where it was defined."""
    constants = [_described(part) if isinstance(part, CodeType) else repr(part) for part in code.co_consts]
    return [code.co_code.hex(), constants, list(code.co_names)]


def _without_names(network: keras.layers.Layer) -> Any:
    """Its configuration, with layer names, which Keras numbers per process, replaced by indices."""
    names = {layer.name: f"layer {i}" for i, layer in enumerate(network._flatten_layers())}
    config = network.get_config()
    return keras.tree.map_structure(lambda x: names.get(x, x) if isinstance(x, str) else x, config)


def clip_vision(encoder: CLIPVision, batch_size: int = 64) -> Extractor:
    """The vectors of CLIP's image encoder, as from `interop.encoders.load`: for `CMMD` and `CLIPScore`.

    Images are resized without cropping.
    """
    size, channels = encoder.size, encoder.channels
    return Extractor(encoder, Images(size, pixels.MEAN, pixels.STD, channels=channels), batch_size=batch_size)


def _first_token(tokens):
    return tokens[:, 0]


def dinov2(folder: str | os.PathLike, size: int = 224, batch_size: int = 64) -> Extractor:
    """The class token of DINOv2, read by KerasHub from a folder of transformers or a preset: for FD-DINOv2.

    Stein et al., "Exposing flaws of generative model evaluation metrics and their unfair treatment of diffusion models"
    (2023): ViT-L/14 at 224 pixels, with bicubic resizing.

    Args:
        folder: of the weights.
        size: the side of the resized images, in pixels.
        batch_size: the number of images per call of the network.

    Raises:
        ImportError: if `keras-hub` is missing (the extra `hub`).
        ValueError: if the folder does not exist.
    """
    if not Path(folder).is_dir():
        raise ValueError(f"dinov2: there is no such folder: {folder}")
    with needs("hub", "DINOv2 needs KerasHub"):
        from keras_hub.models import DINOV2Backbone
    network = DINOV2Backbone.from_preset(os.fspath(folder))
    return Extractor(network, Images(size, *IMAGENET), output=_first_token, batch_size=batch_size, name="dinov2")
