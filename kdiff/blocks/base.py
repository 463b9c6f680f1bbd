"""The interface that all blocks share: one call signature, and a constructor from which a block is saved and copied.

A block is a Keras layer that is called as

    y = block(x, embed=None, context=None, training=None)

    x         a map (batch, height, width, channels) or tokens (batch, tokens, channels); a series (batch, length,
              channels) or a volume (batch, depth, height, width, channels) also counts as a map
    embed     one vector per example, (batch, dim): an embedding of, for example, the time and the class
    context   one sequence per example, (batch, tokens, dim), such as an encoded text; with a mask, `Tokens`

It ignores the arguments that it does not use, so that blocks are interchangeable. Widths are inferred in `build`. A
layer that is given to a constructor is a template: a block works on a copy of it, so that no two blocks share
weights.
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Self

import keras
import numpy as np
from keras import ops

from kdiff import backend
from kdiff.base import Configurable
from kdiff.blocks.initializers import GlorotUniform
from kdiff.blocks.layers import Dense, Direct

__all__ = [
    "Block",
    "Chain",
    "ConfigurableLayer",
    "Shape",
    "Tokens",
    "apply_layer",
    "build_layer",
    "check_embed",
    "check_given",
    "check_map",
    "copy_layer",
    "derive_seed",
    "dropout_layer",
    "dropped",
    "get_layer",
    "kernel_initializer",
    "output_shape",
    "over_positions",
    "projection_of",
]

Shape = tuple[int | None, ...]


class Tokens(NamedTuple):
    """A sequence some of whose tokens are masked: the form of `context` when there is a mask.

    Blocks pass it on unchanged; only attention reads its fields.

    Attributes:
        values: (batch, tokens, dim); None where the mask is that of `x` itself, as in a joint sequence.
        mask: (batch, tokens), True for a token that is attended to; None for all.
        bias: added to the logits of self-attention, (batch or 1, heads, queries, keys); None for no bias.
    """

    values: Any
    mask: Any
    bias: Any = None


class ConfigurableLayer(Configurable):
    """Configurable for Keras layers and models: Keras' own entries are part of the configuration."""

    def get_config(self) -> dict[str, Any]:
        """Keras' own entries (name, trainable, dtype) and the constructor's arguments."""
        with backend.without_tensorflow():
            return {**keras.layers.Layer.get_config(self), **super().get_config()}

    def clone(self, /, **changes: Any) -> Self:
        """A new, unbuilt layer with a new name and the same constructor arguments, except for `changes`."""
        return copy_layer(self, **changes)


class Block(Direct, ConfigurableLayer, keras.layers.Layer):
    """A Keras layer with the call that all blocks share (see the module docstring).

    A subclass defines `__init__(self, ..., **kwargs)`, which stores every argument as an attribute of the same name and
    passes `kwargs` (name, dtype) on; `build(self, x_shape, embed_shape=None, context_shape=None)`; and `call`. The
    output has the shape of `x`, with `width` channels if the subclass has such an attribute; otherwise the subclass
    overrides `compute_output_shape`.
    """

    def compute_output_shape(self, x_shape: Shape, embed_shape: Shape | None = None, context_shape=None) -> Shape:
        """The shape of `x`, with `self.width` channels where that is given."""
        return (*x_shape[:-1], getattr(self, "width", None) or x_shape[-1])

    def multiply_adds(self, x_shape: Shape, embed_shape: Shape | None = None, context_shape=None) -> int:
        """The multiply-additions of a call except those of inner layers, which `kdiff.networks.flops` counts."""
        return 0


class Chain(Block):
    """Layers applied in order, each with the same `embed` and `context`: a `Sequential` for blocks.

    Args:
        layers: blocks or Keras layers, each applied to the previous output. They are used directly, not copied.
    """

    def __init__(self, layers: Sequence[keras.layers.Layer], **kwargs):
        super().__init__(**kwargs)
        self.layers = [get_layer(layer) for layer in layers]

    def build(self, x_shape, embed_shape=None, context_shape=None):
        """Builds the layers in order."""
        for layer in self.layers:
            x_shape = build_layer(layer, x_shape, embed_shape, context_shape)

    def call(self, x, embed=None, context=None, training=None):
        """The last layer's output."""
        for layer in self.layers:
            x = apply_layer(layer, x, embed, context, training)
        return x

    def compute_output_shape(self, x_shape, embed_shape=None, context_shape=None):
        """The last layer's shape."""
        for layer in self.layers:
            x_shape = output_shape(layer, x_shape, embed_shape, context_shape)
        return x_shape

    def compute_output_spec(self, x, embed=None, context=None, training=None):
        """The specification of the last layer's output, which may be several tensors."""
        for layer in self.layers:
            x = layer.compute_output_spec(x, **_taken(layer, {"embed": embed, "context": context}))
        return x


def get_layer(identifier: Any) -> keras.layers.Layer:
    """Returns a Keras layer unchanged, or the block that a name or a configuration describes."""
    if isinstance(identifier, keras.layers.MultiHeadAttention):
        raise ValueError(
            f"A block is called with one input, but Keras' {type(identifier).__name__} with a query and a value; use "
            f"`SelfAttention(heads={identifier.num_heads})`"
        )
    return identifier if isinstance(identifier, keras.layers.Layer) else Block.get(identifier)


def copy_layer(layer: Any, /, **changes: Any) -> keras.layers.Layer:
    """An unbuilt copy of `layer` (or of the block of that name) with a new name and the given arguments changed."""
    layer = get_layer(layer)
    with backend.without_tensorflow():
        config = {name: value for name, value in layer.get_config().items() if name != "name"}
    return type(layer).from_config({**config, **backend.serialized(changes)})


def apply_layer(
    layer: keras.layers.Layer, x: Any, embed: Any = None, context: Any = None, training=None, **others: Any
) -> Any:
    """Calls a block or another Keras layer with those of `embed`, `context`, `training` and others that it accepts."""
    return layer(x, **_taken(layer, {"embed": embed, "context": context, "training": training, **others}))


def build_layer(layer: keras.layers.Layer, x_shape: Shape, embed_shape=None, context_shape=None, **others) -> Any:
    """Builds a layer, unless it is built (a loaded layer is already built), and returns the shape of its output.

    `others` are the shapes of further arguments of its call, by argument name.
    """
    if not layer.built:
        _build(layer, x_shape, embed_shape, context_shape, others)
    return output_shape(layer, x_shape, embed_shape, context_shape, **others)


def _build(layer, x_shape, embed_shape, context_shape, others):
    shapes = {"embed": embed_shape, "context": context_shape, **others}
    if type(layer).build is keras.layers.Layer.build:  # without a `build`, weights are created in the first call
        layer(_symbol(x_shape), **_symbols(layer, shapes))
        return
    accepted = _parameters(type(layer).build)
    named = {f"{name}_shape": shape for name, shape in shapes.items() if shape is not None}
    layer.build(x_shape, **{name: shape for name, shape in named.items() if name in accepted})


def output_shape(layer: keras.layers.Layer, x_shape: Shape, embed_shape=None, context_shape=None, **others) -> Any:
    """The output shape of a block or any other Keras layer, in the structure of the output."""
    symbols = _symbols(layer, {"embed": embed_shape, "context": context_shape, **others})
    spec = layer.compute_output_spec(_symbol(x_shape), **symbols)
    return keras.tree.map_structure(lambda y: None if y is None else tuple(y.shape), spec)


def _symbols(layer, shapes):
    return {name: _symbol(shape) for name, shape in _taken(layer, shapes).items()}


def _symbol(shape):
    """A symbolic tensor, or several by name."""
    if isinstance(shape, dict):
        return {name: _symbol(one) for name, one in shape.items()}
    return keras.KerasTensor(shape)


def _taken(layer: keras.layers.Layer, arguments: dict[str, Any]) -> dict[str, Any]:
    accepted = _parameters(type(layer).call)
    return {name: value for name, value in arguments.items() if value is not None and name in accepted}


_PARAMETERS: dict[Callable, frozenset[str]] = {}


def _parameters(function: Callable) -> frozenset[str]:
    """The argument names, cached because PyTorch's compiler cannot trace `inspect.signature`."""
    if function not in _PARAMETERS:
        _PARAMETERS[function] = frozenset(inspect.signature(function).parameters)
    return _PARAMETERS[function]


def derive_seed(seed: int, index: int) -> int:
    """A seed for part `index` of a layer. Consecutive seeds give shifted copies of one stream on PyTorch."""
    return int(np.random.SeedSequence([seed, index]).generate_state(1)[0] >> 1)


def dropout_layer(block: Block) -> keras.layers.Layer:
    """A dropout layer with the block's `dropout`, `seed` and precision."""
    return keras.layers.Dropout(block.dropout, seed=block.seed, dtype=block.dtype_policy)


def dropped(layer: keras.layers.Layer, x: Any, training) -> Any:
    """`x` after dropout. A layer of rate 0 is skipped, since every layer call has a cost on PyTorch."""
    return layer(x, training=training) if layer.rate > 0 else x


def kernel_initializer(zero: bool = False) -> keras.initializers.Initializer:
    """The initialiser of a kernel; zeros for the last layer of a residual block that starts as the identity."""
    return keras.initializers.Zeros() if zero else GlorotUniform()


def over_positions(vector: Any, x: Any) -> Any:
    """`vector`, (batch, channels), shaped to broadcast over the positions of a map or of tokens `x`."""
    return ops.reshape(vector, (-1, *[1] * (len(x.shape) - 2), vector.shape[-1]))


def projection_of(block: Block, embed_shape: Shape | None, width: int) -> keras.layers.Layer | None:
    """A dense layer from the embedding to `width` channels; None without an embedding."""
    if embed_shape is None:
        return None
    layer = Dense(width, kernel_initializer=kernel_initializer(), dtype=block.dtype_policy)
    layer.build(embed_shape)
    return layer


def check_embed(block: Block, embed: Any) -> None:
    """Raises a ValueError if a block that was built with an embedding is called without one, or vice versa."""
    if block.embedded != (embed is not None):
        built, received = ("with", "none") if block.embedded else ("without", "one")
        raise ValueError(f"{type(block).__name__}: built {built} an `embed`, but received {received}")


def check_map(owner: keras.layers.Layer, shape: Shape) -> None:
    """Raises a ValueError unless `shape` is that of a map of one to three axes with a known number of channels."""
    if len(shape) not in (3, 4, 5) or shape[-1] is None:
        raise ValueError(
            f"{type(owner).__name__}: `x` must have the shape (batch, height, width, channels), or one to three sizes "
            f"in place of height and width, with known channels; received: {tuple(shape)}"
        )


def check_given(owner: keras.layers.Layer, argument: str, value: Any, description: str) -> None:
    """Raises a ValueError if `value` is None."""
    if value is None:
        raise ValueError(f"{type(owner).__name__}: `{argument}` is required, {description}; received: None")
