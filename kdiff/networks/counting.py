"""The size of a network, parameters and multiply-additions of each part, without allocating or running it.

    networks.flops(DiT.xl(2), (32, 32, 4))          # 118.6e9
    networks.summary(UNet.attention(), (32, 32, 3))

As usual in the literature, a multiplication with its addition counts as one operation; only matrix products,
convolutions and attention count; per image.
"""

import contextlib
import functools
import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import keras
from keras import ops

from kdiff import backend
from kdiff.blocks.base import Block
from kdiff.blocks.layers import Conv2D, Dense, DepthwiseConv2D
from kdiff.networks.autoencoder import Autoencoder
from kdiff.networks.base import Network

__all__ = ["COUNTS", "Row", "Shape", "flops", "parameters", "rows", "summary"]

Shape = tuple[int, ...]


class Row(NamedTuple):
    """A part of a network.

    Attributes:
        name: of the layer.
        shape: the shape of its output, without the batch.
        parameters: the number of its parameters.
        flops: its multiply-additions.
    """

    name: str
    shape: Shape
    parameters: int
    flops: int


def flops(network: keras.Model, shape: Shape, **conditions: Shape) -> int:
    """The multiply-additions of one call of a network on one image.

    Args:
        network: a `Network` or an `Autoencoder`, built or not, which is not allocated; or another, built Keras model
            that satisfies the contract of networks.
        shape: of the image, without the batch: (height, width, channels).
        conditions: the shape of each condition, without the batch; the default is (), as for labels.

    Raises:
        ValueError: if the network does not accept such an image or condition.
    """
    return sum(row.flops for row in rows(network, shape, **conditions))


def parameters(network: keras.Model, shape: Shape, **conditions: Shape) -> int:
    """The number of parameters, trainable or not. Arguments as in `flops`; here sizes may be None."""
    with backend.unallocated():
        return _parameters(_built(network, _shapes(network, shape, conditions)))


def summary(
    network: keras.Model, shape: Shape, *, print_fn: Callable[[str], None] = print, **conditions: Shape
) -> None:
    """Prints the shape, the parameters and the multiply-additions of each part. Arguments as in `flops`."""
    parts = rows(network, shape, **conditions)
    total = Row("total", (), sum(row.parameters for row in parts), sum(row.flops for row in parts))
    print_fn(f"{network.name}: image {shape}\n{'part':24} {'output':>18} {'parameters':>14} {'multiply-adds':>16}")
    for row in (*parts, total):
        size = " x ".join(map(str, row.shape))
        print_fn(f"{row.name:24} {size:>18} {row.parameters:>14,} {row.flops:>16,}")


def rows(network: keras.Model, shape: Shape, **conditions: Shape) -> list[Row]:
    """The parts of a network, in the order of their calls. Arguments as in `flops`."""
    shapes = _shapes(network, shape, conditions)
    with backend.unallocated():
        network = _built(network, shapes)
        recorder = _Recorder(network)
        with recorder:
            inputs = {name: keras.KerasTensor(shape) for name, shape in shapes.items()}
            inputs = inputs["image"] if isinstance(network, Autoencoder) else inputs
            keras.Operation.compute_output_spec(network, inputs)
    return recorder.rows()


def _shapes(network, shape, conditions):
    """The shapes of the inputs by name, for a batch of one."""
    inputs = network.condition_inputs if isinstance(network, Network) else {}
    others = {name: () for name, one in inputs.items() if not one.optional}
    times = {} if isinstance(network, Autoencoder) else {"time": ()}
    sizes = {"image": shape, **times, **others, **conditions}
    return {name: (1, *size) for name, size in sizes.items()}


def _built(network, shapes):
    """An unallocated copy of a `Network` or an `Autoencoder`; any other network itself."""
    if isinstance(network, (Network, Autoencoder)):
        network = network.clone()
        network.build(shapes["image"] if isinstance(network, Autoencoder) else shapes)
    elif not network.built:
        raise ValueError(f"flops: a network that is not a kdiff `Network` must be built; {network.name!r} is not")
    return network


class _Recorder:
    """A context that records the calls of a network's layers, and skips those that multiply by a kernel."""

    def __init__(self, network):
        self.network = network
        self.parts = list(network._flatten_layers(include_self=False, recursive=False))
        self.names = {id(part): part.name for part in self.parts}
        if isinstance(network, Network):
            self.names |= {id(layer): name for name, layer in network.conditions.items()}
            self.names[id(network.embedding)] = "time"
        self.counts = {}
        self.shapes = {}
        self.patches = contextlib.ExitStack()

    def __enter__(self):
        for part in self.parts:
            for layer in part._flatten_layers():
                self.patches.enter_context(
                    _replaced_call(layer, functools.partial(self._called, part, layer, layer.call))
                )
        return self

    def __exit__(self, *error):
        self.patches.close()

    def _called(self, part, layer, call, x, *arguments, **options):
        shape = tuple(x.shape) if hasattr(x, "shape") else None
        if type(layer) in COUNTS:
            y = _without_weights(layer, call, x)
            count = COUNTS[type(layer)](layer, shape, tuple(y.shape))
        else:
            y = call(x, *arguments, **options)
            count = _own_count(layer, shape, arguments, options)
        self.counts[id(part)] = self.counts.get(id(part), 0) + count
        outputs = [one for one in keras.tree.flatten(y) if one is not None]
        if layer is part and outputs:
            self.shapes[id(part)] = tuple(outputs[0].shape)[1:]
        return y

    def rows(self) -> list[Row]:
        parts = {id(part): _parameters(part) for part in self.parts}
        called = [Row(self.names[i], shape, parts[i], self.counts[i]) for i, shape in self.shapes.items()]
        others = _parameters(self.network) - sum(row.parameters for row in called)
        return [*called, Row("other weights", (), others, 0)] if others else called


def _without_weights(layer, call, x):
    """A tensor of the layer's output shape; the layer is called only if Keras cannot infer that shape."""
    shape = layer.compute_output_shape(tuple(x.shape))
    return call(x) if None in shape else ops.zeros(shape, layer.compute_dtype)


def _parameters(layer) -> int:
    return sum(math.prod(weight.shape) for weight in layer.weights)


@contextlib.contextmanager
def _replaced_call(layer, call) -> Iterator[None]:
    layer.call = call
    try:
        yield
    finally:
        del layer.call


def _own_count(layer, shape: Shape | None, arguments: tuple, options: dict[str, Any]) -> int:
    """The multiply-additions of a layer without those of inner layers."""
    if isinstance(layer, keras.layers.MultiHeadAttention):
        keys = (arguments[0] if arguments else options["value"]).shape[1:-1]
        return math.prod(shape[:-1]) * math.prod(keys) * layer.num_heads * (layer.key_dim + layer.value_dim)
    if isinstance(layer, Block):
        given = {name: options[name] for name in ("embed", "context") if options.get(name) is not None}
        shapes = keras.tree.map_structure(lambda value: None if value is None else tuple(value.shape), given)
        return layer.multiply_adds(shape, **{f"{name}_shape": value for name, value in shapes.items()})
    if any(len(weight.shape) > 1 for weight in layer._trainable_variables):
        warnings.warn(
            f"flops: the multiply-additions of {type(layer).__name__} are unknown and not counted", stacklevel=2
        )
    return 0


def _by_output(layer, x: Shape, y: Shape) -> int:
    """One kernel product per output position."""
    return math.prod(y[:-1]) * math.prod(layer.kernel.shape)


def _by_input(layer, x: Shape, y: Shape) -> int:
    """One kernel product per input position."""
    return math.prod(x[:-1]) * math.prod(layer.kernel.shape)


def _einsum(layer, x: Shape, y: Shape) -> int:
    """The product of the sizes of all indices of the equation."""
    first, kernel = layer.equation.split("->")[0].replace("...", "").split(",")
    sizes = dict(zip(first, x[-len(first) :], strict=True)) | dict(zip(kernel, layer.kernel.shape, strict=True))
    return math.prod(x[: -len(first)]) * math.prod(sizes.values())


# The multiply-additions of Keras' layers, as functions of the shapes of input and output.
COUNTS = {
    **dict.fromkeys([keras.layers.Dense, Dense, Conv2D], _by_output),
    keras.layers.EinsumDense: _einsum,
    **dict.fromkeys([keras.layers.Conv1D, keras.layers.Conv2D, keras.layers.Conv3D], _by_output),
    **dict.fromkeys([keras.layers.DepthwiseConv1D, keras.layers.DepthwiseConv2D, DepthwiseConv2D], _by_output),
    **dict.fromkeys([keras.layers.Conv1DTranspose, keras.layers.Conv2DTranspose], _by_input),
}
