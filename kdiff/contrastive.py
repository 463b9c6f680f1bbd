"""CLIP: contrastive training of an image and a text encoder with a joint embedding space.

    clip = Contrastive(CLIPVision(32, 4, projection=64, ...), CLIPText(512, 16, projection=64, ...), tokenizer)
    clip.compile("adam")
    clip.fit({"image": images, "text": captions}, batch_size=64)
    clip.evaluate({"image": images, "text": captions}, batch_size=64)    # loss, and retrieval within batches of 64
    clip.evaluate(images, labels, classes=["a cat", "a dog"])            # zero-shot classification
    z = clip.embed_image(images)                                         # (count, 64), of length 1

Radford et al., "Learning Transferable Visual Models From Natural Language Supervision" (2021). DALL-E 2 uses such
embeddings: its prior maps texts to them, and its decoder maps them to images (`kdiff.UnCLIP`).
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import keras
import numpy as np
from keras import ops

from kdiff import backend
from kdiff.base import Configurable, check_integer
from kdiff.blocks.base import apply_layer, build_layer
from kdiff.blocks.conditions import Encoded
from kdiff.blocks.layers import Dense
from kdiff.checks import check_examples, is_integer, like_bytes, value_range
from kdiff.codecs import Identity
from kdiff.codecs.base import to_unit
from kdiff.model.condition_inputs import Preparation
from kdiff.model.feeding import BatchCheck
from kdiff.model.training import OwnLoss
from kdiff.text import Tokenizer, is_text

__all__ = ["LARGEST_SCALE", "Contrastive"]

LARGEST_SCALE = 100.0  # needed for stable training (section 2.5 of the paper)


class Contrastive(OwnLoss, Configurable, keras.Model):
    """Contrastive training of two encoders with the symmetric InfoNCE loss of CLIP (Radford et al., 2021, figure 3):

        u_i = f(image_i) / |f(image_i)|,  v_j = g(text_j) / |g(text_j)|,  s_ij = exp(log_scale) u_i v_j
        loss = mean_i (-s_ii + log sum_j exp(s_ij)) / 2 + mean_j (-s_jj + log sum_i exp(s_ij)) / 2

    over the examples of a batch, where all other texts count as wrong, even equal ones. The scale is learned, initially
    1 / 0.07, and at most 100. Everything except the encoders is float32.

    `fit` and `evaluate` report the loss and retrieval within the batch: the share "image_to_text" of images whose own
    text is the nearest, and "text_to_image" of texts whose own image is; chance level is 1 / batch size.

    Args:
        image: a Keras layer or model from "image", integers scaled to [-1, 1] or floats unchanged, to a vector
            (batch, dim), or to `Encoded` with one, such as `encoders.CLIPVision`. It is used directly, not copied.
        text: the same for "text", such as `encoders.CLIPText` or `blocks.TextEncoder(pooled=True, dropout=0)`.
        tokenizer: a `Tokenizer` or its name, which converts strings to tokens; None for that of `text`, if it has one;
            otherwise data must be token ids.
        width: of the joint space, to which both vectors are projected, without a bias; None for no projection of
            vectors of equal width.
        name: the name of the model.

    Raises:
        ValueError: if the vectors differ in width, or `text` has dropout of texts.
    """

    def __init__(
        self,
        image: keras.layers.Layer,
        text: keras.layers.Layer,
        tokenizer: Any = None,
        width: int | None = None,
        name: str | None = None,
    ):
        super().__init__(name=name, dtype="float32", autocast=False)
        for argument, layer in {"image": image, "text": text}.items():
            if not isinstance(layer, keras.layers.Layer):
                raise TypeError(f"Contrastive: `{argument}` must be a Keras layer or model; received: {layer!r}")
        if getattr(text, "dropout", 0.0) and hasattr(text, "null"):
            raise ValueError(f"Contrastive: `text` must not drop texts: set `dropout=0`; received {text.dropout}")
        if width is not None:
            check_integer("Contrastive", "width", width)
        self.image, self.text, self.width = image, text, width
        self.tokenizer = None if tokenizer is None else Tokenizer.get(tokenizer)
        self.shapes: dict[str, tuple] | None = None
        self._parts = ("loss", "image_to_text", "text_to_image")
        self._means = [keras.metrics.Mean(name=part) for part in self._parts[1:]]
        self._programs: dict[str, Any] = {}

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments, serialised."""
        return Configurable.get_config(self)

    @property
    def conditions(self) -> dict[str, Any]:
        """Converts texts in data to tokens."""
        return {"text": _Text(self.text, self.tokenizer)}

    @backend.uninterrupted
    def build(self, shapes) -> None:
        """Creates all weights, for the shapes {"image": (None, 32, 32, 3), "text": (None, 16)}."""
        if self.built:
            return
        shapes = {name: (None, *tuple(shapes[name])[1:]) for name in ("image", "text")}
        widths = {}
        for name, layer in (("image", self.image), ("text", self.text)):
            vector = Encoded.of(build_layer(layer, shapes[name])).vector
            if vector is None:
                raise ValueError(
                    f"Contrastive: `{name}` must return one vector per example, (batch, dim), or `Encoded` with one; "
                    "pool its output"
                )
            widths[name] = vector[-1]
        if self.width is None and widths["image"] != widths["text"]:
            raise ValueError(
                f"Contrastive: the vectors must have one width unless `width` is given; received: {widths}"
            )
        self.projections = {}
        if self.width is not None:
            for name, width in widths.items():
                layer = Dense(self.width, use_bias=False, dtype="float32", name=f"{name}_projection")
                layer.build((None, width))
                self.projections[name] = layer
        self.log_scale = self.add_weight(
            shape=(),
            initializer=keras.initializers.Constant(-math.log(0.07)),
            constraint=_bounded,
            dtype="float32",
            name="log_scale",
        )
        self.shapes = shapes
        self.built = True

    def get_build_config(self) -> dict[str, Any] | None:
        """The argument of `build`."""
        return None if self.shapes is None else {"shapes": self.shapes}

    def build_from_config(self, config: dict[str, Any]) -> None:
        """Builds a loaded model."""
        if config:
            self.build(config["shapes"])

    # What it computes

    def _embedded(self, name: str, x, training: bool = False):
        """The normalised vectors of one side, (batch, width), float32."""
        x = to_unit(ops.convert_to_tensor(x)) if name == "image" else x
        vector = Encoded.of(apply_layer(getattr(self, name), x, training=training)).vector
        vector = ops.cast(vector, "float32")
        if name in self.projections:
            vector = self.projections[name](vector)
        return vector / ops.maximum(ops.norm(vector, axis=-1, keepdims=True), 1e-12)

    @backend.uninterrupted
    def call(self, inputs, training: bool | None = None) -> dict[str, Any]:
        """Maps a batch {"image": ..., "text": ...} to the loss and, per example, 1 if it is retrieved, else 0."""
        training = bool(training)
        image, text = (self._embedded(name, inputs[name], training) for name in ("image", "text"))
        logits = ops.exp(ops.convert_to_tensor(self.log_scale)) * ops.matmul(image, ops.transpose(text))
        own = ops.diagonal(logits)
        losses = [ops.logsumexp(logits, axis=axis) - own for axis in (1, 0)]
        place = ops.cast(ops.arange(ops.shape(logits)[0]), "int32")
        found = [ops.cast(ops.equal(ops.cast(ops.argmax(logits, axis), "int32"), place), "float32") for axis in (1, 0)]
        return dict(zip(self._parts, (0.5 * ops.mean(losses[0] + losses[1]), *found), strict=True))

    # Training

    instead = "use `embed_image(images)`, `embed_text(texts)` or `classify(images, classes)`"

    def _new_check(self, shapes: dict[str, tuple]) -> BatchCheck:
        if missing := {"image", "text"} - set(shapes):
            raise ValueError(f"Contrastive: data must have 'image' and 'text'; missing: {sorted(missing)}")
        certain = self.built and not self._on_trial
        return _Check(Identity(), (self.shapes if certain else shapes)["image"][1:], self, weighted=False)

    def _take_shapes_anew(self, shapes: dict[str, tuple]) -> None:
        self.shapes = {name: (None, *shapes[name][1:]) for name in self.shapes}

    def evaluate(self, x=None, y=None, *args, classes: Sequence | None = None, **options):
        """Keras' `evaluate`: the loss, and retrieval within each batch; or zero-shot classification.

        Args:
            x: as in `fit`; with `classes`, images.
            y: with `classes`, the label of each image, 0 ... len(classes) - 1.
            *args, **options: as in `keras.Model.evaluate`; with `classes`, `batch_size` and `return_dict`.
            classes: as in `classify`: "accuracy", the share of correctly classified images, is returned.
        """
        if classes is None:
            return super().evaluate(x, y, *args, **options)
        options.pop("verbose", None)
        labels, return_dict = np.asarray(y), options.pop("return_dict", False)
        found = self.classify(x, classes, *args, **options)
        right = labels.shape in (found.shape, (*found.shape, 1)) and labels.dtype.kind in "iuf"
        if not right or not np.isin(labels, np.arange(len(classes))).all():
            raise ValueError(
                f"evaluate: `y` must be {len(found)} integer labels in 0..{len(classes) - 1}; received "
                f"{labels.dtype} of the shape {labels.shape}"
            )
        labels = labels.reshape(-1)
        accuracy = float(np.mean(found == labels))
        return {"accuracy": accuracy} if return_dict else accuracy

    # Use

    def embed_image(self, images: Any, batch_size: int = 64) -> np.ndarray:
        """The embeddings u of images, (count, width), float32, of length 1."""
        return self._rows("image", np.asarray(images), batch_size)

    def embed_text(self, texts: Any, batch_size: int = 64) -> np.ndarray:
        """The embeddings v of strings, or of inputs of `text`, (count, width), float32, of length 1."""
        texts = [texts] if isinstance(texts, str) else texts
        return self._rows("text", np.asarray(Preparation(self).value("text", texts)), batch_size)

    def classify(self, images: Any, classes: Sequence, batch_size: int = 64) -> np.ndarray:
        """Zero-shot classification: the class with the nearest text for each image, integers (count,) (section 3.1).

        Args:
            images: as in `embed_image`.
            classes: a text for each class, or several, which are averaged, such as "a photo of a cat", "a drawing of
                a cat" (section 3.1.4).
            batch_size: the number encoded at once.
        """
        if isinstance(classes, str) or not len(classes):
            raise ValueError(
                f"classify: `classes` must be a list of texts, one or more per class; received: {classes!r}"
            )
        groups = [[one] if isinstance(one, str) else list(one) for one in classes]
        vectors = self.embed_text([text for group in groups for text in group], batch_size)
        ends = np.cumsum([len(group) for group in groups])
        means = np.stack([part.mean(0) for part in np.split(vectors, ends[:-1])])
        means /= np.linalg.norm(means, axis=-1, keepdims=True)
        return np.argmax(self.embed_image(images, batch_size) @ means.T, axis=-1)

    def _rows(self, name: str, x: np.ndarray, batch_size: int) -> np.ndarray:
        if name == "image":
            _check_images(x)
        check_integer("Contrastive", "batch_size", batch_size)
        if not self.built:
            raise ValueError("Contrastive: the model has no weights yet; train it, load it, or call `build`")
        shape = self.shapes[name][1:]
        if len(x.shape) != len(shape) + 1 or not len(x):
            raise ValueError(f"Contrastive: `{name}` must have the shape (count, *{shape}); received: {x.shape}")
        backend.synchronise(self)
        program = self._programs.get(name)
        if program is None:
            program = backend.compiled(partial(self._embedded, name), self)
            self._programs[name] = program
        size, rows = min(batch_size, len(x)), []
        for first in range(0, len(x), size):  # the last batch is padded, as another size would be recompiled
            at = np.minimum(np.arange(first, first + size), len(x) - 1)
            rows.append(ops.convert_to_numpy(program(x[at])))
        return np.concatenate(rows)[: len(x)]


class _Check(BatchCheck):
    """The check of batches of images and texts."""

    def numbers(self, name: str, examples: Any) -> None:
        super().numbers(name, examples)
        _check_images(examples)


def _check_images(images: Any) -> None:
    """Raises a ValueError if images are not finite, or are floats in 0 ... 255."""
    check_examples(images, 1.0 if is_integer(images) else None)
    if not is_integer(images) and like_bytes(images) and value_range(images)[1] > 20.0:
        raise ValueError(
            f"Contrastive: floating-point images are not scaled, but these reach {value_range(images)[1]:.4g}, "
            "as if in 0..255: pass uint8, or x / 127.5 - 1"
        )


class _Text:
    """Converts strings to tokens, and checks them."""

    def __init__(self, layer: keras.layers.Layer, tokenizer: Tokenizer | None):
        self.layer, self.tokenizer = layer, tokenizer

    def prepare(self, values: Any) -> np.ndarray:
        """Converts strings to tokens; token ids are unchanged."""
        if not is_text(values):
            return np.asarray(values)
        if self.tokenizer is not None:
            return self.tokenizer(values)
        if hasattr(self.layer, "prepare"):
            return self.layer.prepare(values)
        raise ValueError(
            f"Contrastive: strings need a `tokenizer`, which the text encoder, {type(self.layer).__name__}, does "
            "not have"
        )

    def check(self, values: np.ndarray) -> None:
        """As in the layer."""
        if hasattr(self.layer, "check"):
            self.layer.check(values)


def _bounded(log_scale):
    """The constraint after each update."""
    return ops.minimum(log_scale, math.log(LARGEST_SCALE))
