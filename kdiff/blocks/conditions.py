"""Conditions: information about an example, such as its class, a text or an image, as a vector, tokens or a map.

A network has one named layer per condition. The layer returns `Encoded`, or one tensor whose rank decides its use.
There are three uses, which can be combined:

    vector   (batch, dim)                       added to `embed`
    tokens   (batch, tokens, dim)               a part of `context`, attended to where `mask`, (batch, tokens), is True
    map      (batch, height, width, channels)   concatenated to the channels of x_t

    UNet.transformer(64, conditions={"label": LabelEmbedding(10, dropout=0.1), "text": TextEncoder()})

A `Condition` also defines a null input: with probability `dropout` it replaces the condition of an example in training,
so that the network learns the unconditional distribution too (Ho & Salimans, "Classifier-Free Diffusion Guidance",
2022, algorithm 1), which guidance and `sample(text=None)` use.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple, Self

import keras
import numpy as np
from keras import ops

from kdiff import random
from kdiff.base import check_integer, check_number
from kdiff.blocks.base import Block, ConfigurableLayer, apply_layer, build_layer, copy_layer, get_layer, output_shape
from kdiff.blocks.initializers import Normal

__all__ = [
    "DROPPING",
    "Condition",
    "Encoded",
    "Input",
    "Joint",
    "OptionalCondition",
    "VectorAndTokens",
    "given_to",
    "inputs_of",
]

DROPPING = 4  # a stream of random numbers, distinct from those of `kdiff.random`


class Encoded(NamedTuple):
    """The output of the layer of a condition (see the module docstring); None for what is absent."""

    vector: Any = None
    tokens: Any = None
    mask: Any = None
    map: Any = None

    @classmethod
    def of(cls, y: Any) -> Self:
        """`y` itself, or `Encoded` of one tensor (or shape) by its rank."""
        if isinstance(y, cls):
            return y
        shape = tuple(getattr(y, "shape", y))
        kinds = {2: "vector", 3: "tokens", 4: "map"}
        if len(shape) not in kinds:
            raise ValueError(
                "the layer of a condition must return (batch, dim), (batch, tokens, dim), (batch, height, width, "
                f"channels), or `Encoded`; received: {shape}"
            )
        return cls(**{kinds[len(shape)]: y})

    def specified(self, dtype: str) -> "Encoded":
        """The specifications of the tensors, from shapes; the mask is boolean."""
        dtypes = zip(self._fields, self, strict=True)
        return Encoded(**{n: one and keras.KerasTensor(one, "bool" if n == "mask" else dtype) for n, one in dtypes})


class Input(NamedTuple):
    """An input of a network that is passed to the layer of a condition.

    Attributes:
        key: in the dictionary that the layer is called with; None if this input is the only argument.
        part: defines its `null`, and how to `prepare` and to `check` it; None for none of these.
        optional: whether it may be missing.
        of: computes it from the clean batch if training data has none: `of(x, key)`; None if it must be given.
    """

    key: str | None
    part: Any
    optional: bool = False
    of: Any = None


def inputs_of(layer: keras.layers.Layer, name: str) -> dict[str, Input]:
    """The inputs, by name, of the layer of the condition `name`; several if the layer has a method `inputs_of`."""
    return layer.inputs_of(name) if hasattr(layer, "inputs_of") else {name: Input(None, layer)}


def given_to(layer: keras.layers.Layer, name: str, values: Mapping[str, Any]) -> Any:
    """The argument of the layer of the condition `name`, taken from tensors (or shapes) by name."""
    inputs = inputs_of(layer, name)
    if inputs.keys() == {name} and inputs[name].key is None:
        return values[name]
    return {one.key: values[name] for name, one in inputs.items() if name in values}


class Joint(ConfigurableLayer, keras.layers.Layer):
    """Several inputs as one vector: `layer([parts])`, each part encoded by its own layer and flattened.

    Stable Diffusion XL's (Podell et al., 2023, section 2.2) combines a vector of the text and sinusoidal features of
    six numbers:

        Joint({"text_embeds": Identity(), "time_ids": SizeEmbedding(256)}, MLPEmbedding(Identity(), 1280))

    Args:
        parts: one layer per input, by the name of the input of the network, in order. Dropout is set in these.
        layer: the layer applied to their concatenation, (batch, total size of the parts).
    """

    def __init__(self, parts: Mapping[str, keras.layers.Layer], layer: keras.layers.Layer, **kwargs):
        super().__init__(autocast=False, **kwargs)
        if not parts:
            raise ValueError(f"Joint: `parts` must be a non-empty mapping of names to layers; received: {parts!r}")
        self.parts = {name: get_layer(part) for name, part in parts.items()}
        self.layer = get_layer(layer)

    def inputs_of(self, name: str) -> dict[str, Input]:
        """The inputs of the parts."""
        return {one: Input(one, part) for one, part in self.parts.items()}

    def build(self, x_shape, embed_shape=None):
        """Builds the layers."""
        shapes = [build_layer(part, x_shape[name], embed_shape) for name, part in self.parts.items()]
        sizes = [int(np.prod(shape[1:])) for shape in shapes]
        build_layer(self.layer, (shapes[0][0], sum(sizes)), embed_shape)

    def call(self, x, embed=None, training=None):
        """Maps a dictionary of the inputs to (batch, dim)."""
        parts = [apply_layer(part, x[name], embed, training=training) for name, part in self.parts.items()]
        flat = [ops.reshape(y, (ops.shape(y)[0], int(np.prod(y.shape[1:])))) for y in parts]
        flat = [ops.cast(y, self.compute_dtype) for y in flat]
        return apply_layer(self.layer, ops.concatenate(flat, axis=-1), embed, training=training)

    def compute_output_spec(self, x, embed=None, training=None):
        """The specification of the output."""
        width = None if embed is None else embed.shape
        shapes = [output_shape(part, x[name].shape, width) for name, part in self.parts.items()]
        flat = keras.KerasTensor((shapes[0][0], sum(int(np.prod(shape[1:])) for shape in shapes)))
        return self.layer.compute_output_spec(flat)


class VectorAndTokens(ConfigurableLayer, keras.layers.Layer):
    """One input as a condition with two uses: a vector for `embed` and tokens for `context`, each from its own layer.

    The image embedding of Kandinsky (Shakhmatov et al., 2022), used as 32 tokens and added to the time embedding:

        VectorAndTokens(Dense(1536), Chain([Dense(32 * 768), Reshape((32, 768)), LayerNorm()]))

    Args:
        vector: the layer that computes the vector.
        tokens: the layer that computes the tokens.
    """

    def __init__(self, vector: keras.layers.Layer, tokens: keras.layers.Layer, **kwargs):
        super().__init__(autocast=False, **kwargs)
        self.vector = get_layer(vector)
        self.tokens = get_layer(tokens)

    def build(self, x_shape, embed_shape=None):
        """Builds the layers."""
        for layer in (self.vector, self.tokens):
            build_layer(layer, x_shape, embed_shape)

    def call(self, x, embed=None, training=None):
        """Maps the input to `Encoded`."""
        made = [apply_layer(layer, x, embed, training=training) for layer in (self.vector, self.tokens)]
        return Encoded(vector=made[0], tokens=made[1])

    def compute_output_spec(self, x, embed=None, training=None):
        """The specifications of the outputs."""
        width = None if embed is None else embed.shape
        shapes = [output_shape(layer, x.shape, width) for layer in (self.vector, self.tokens)]
        return Encoded(vector=keras.KerasTensor(shapes[0]), tokens=keras.KerasTensor(shapes[1]))


class Condition(Block):
    """The base of condition layers. A subclass defines `encode`, and may define `null`, `prepare` and `check`.

    Which examples lose their condition in the n-th training call depends on `seed` and n alone, and so is the same on
    every backend; conditions with the same seed are dropped together:

        dropped = uniform(fold_in((seed, n), 0, DROPPING), (batch,)) < dropout

    Args:
        dropout: the probability with which, in training, `null` replaces the condition of an example.
        seed: for the dropout, less than 2^31.
        kwargs: `name` and `dtype`.
    """

    named = False

    def __init__(self, dropout: float = 0.0, seed: int = 0, **kwargs):
        super().__init__(autocast=False, **kwargs)
        check_number(type(self).__name__, "dropout", dropout, 0, 1)
        check_integer(type(self).__name__, "seed", seed, 0)
        self.dropout = dropout
        self.seed = seed
        self._generator = keras.random.SeedGenerator(seed)

    @property
    def null(self) -> np.ndarray | None:
        """The input that stands for the absence of the condition, of the shape of one row; None if undefined."""
        return None

    def prepare(self, values: Any) -> np.ndarray:
        """Converts user input, such as strings, to the input of the layer on the host, one row per value."""
        return np.asarray(values)

    def check(self, values: np.ndarray) -> None:
        """Raises a ValueError if the layer does not accept these prepared values, one row per example."""

    def encode(self, x, embed, training):
        """Maps the input, some rows of which may be `null`, to `Encoded` or one tensor."""
        raise NotImplementedError

    def call(self, x, embed=None, context=None, training=None):
        """Maps the input, one row per example, to the output of `encode`."""
        if training and self.dropout > 0:
            x = self._dropped(x, self._next())
        return self.encode(x, embed, training)

    def _next(self):
        """The key of this call, (seed, number of the call)."""
        return ops.cast(self._generator.next(), "int32")

    def _dropped(self, x, key):
        null = self.null
        if null is None:
            raise ValueError(f"{type(self).__name__}: `dropout` needs a `null`, which replaces dropped conditions")
        batch = ops.shape(x)[0]
        dropped = random.uniform(random.fold_in(random.on_device(key, batch), 0, DROPPING), (batch,)) < self.dropout
        x = ops.cast(x, null.dtype)
        return ops.where(ops.reshape(dropped, (-1, *[1] * (len(x.shape) - 1))), ops.convert_to_tensor(null), x)


class OptionalCondition(Condition):
    """Numbers that may be absent, such as an image embedding, the tokens of an encoded text, or a single number.

    Absence is represented by a learned input, unless one is given. In data, a row of NaN is absent. A number is mapped
    to a vector by sinusoidal features:

        OptionalCondition(MLPEmbedding(SinusoidalEmbedding(64), width=256))      # 256, the width of `embed`

    Args:
        layer: the layer, or its name, from a row of the input (or its replacement) to a vector or tokens; None for the
            input itself.
        absent: the input that represents absence, of the shape of one row, such as the embedding of the empty text;
            None for a learned weight.
        dropout, seed: as in `Condition`.

    Raises:
        ValueError: if a size of the input is unknown, or `absent` has another shape.
    """

    def __init__(self, layer: Any = None, absent: Any = None, dropout: float = 0.1, seed: int = 0, **kwargs):
        super().__init__(dropout, seed, **kwargs)
        self.layer = None if layer is None else copy_layer(layer, name="layer", dtype=self.dtype_policy)
        self.absent = None if absent is None else np.asarray(absent, "float32")
        self._row: tuple | None = None

    def build(self, x_shape, embed_shape=None):
        """Creates the learned row, of the shape of one row of the input, and builds the layer."""
        row = tuple(x_shape[1:])
        if None in row or (self.absent is not None and self.absent.shape != row):
            wanted = "of known size" if self.absent is None else f"of the shape of `absent`, {self.absent.shape}"
            raise ValueError(f"{type(self).__name__}: a row of the input must be {wanted}; received: {row}")
        if self.absent is None:
            options = {"dtype": "float32", "autocast": False, "name": "absent"}
            self.learned = self.add_weight(shape=row, initializer=Normal(0.02), **options)
        if self.layer is not None:
            build_layer(self.layer, x_shape, embed_shape)
        self._row = row

    @property
    def null(self):
        """`absent`; NaN if it is learned (a scalar until the shape of a row is known)."""
        return np.full(self._row or (), np.nan, "float32") if self.absent is None else self.absent

    def check(self, values) -> None:
        """Raises a ValueError for a row that is neither finite nor all NaN (absent)."""
        rows = values.reshape(len(values), -1)
        known = np.isfinite(rows).all(axis=1)
        if self.absent is None:
            known |= np.isnan(rows).all(axis=1)
        if not known.all():
            absent = "" if self.absent is not None else ", or all NaN for an absent condition"
            raise ValueError(f"The rows of a condition must be finite{absent}; received: {values[~known][0]}")

    def encode(self, x, embed, training):
        """The output of the layer, whose input is the learned row where `x` is NaN."""
        x = ops.cast(x, "float32")
        if self.absent is None:
            axes = tuple(range(1, len(x.shape)))
            x = ops.where(ops.all(ops.isnan(x), axis=axes, keepdims=True), ops.convert_to_tensor(self.learned), x)
        if self.layer is None:
            return ops.cast(x, self.compute_dtype)
        return apply_layer(self.layer, x, embed, training=training)

    def compute_output_spec(self, x, embed=None, context=None, training=None):
        """The specification of the output, which may be `Encoded`."""
        made = (
            x.shape if self.layer is None else output_shape(self.layer, x.shape, None if embed is None else embed.shape)
        )
        if isinstance(made, Encoded):
            return made.specified(self.compute_dtype)
        return keras.KerasTensor(made, self.compute_dtype)
