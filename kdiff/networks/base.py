"""The base of networks: a dictionary of inputs, conditions encoded as vectors, tokens and maps, and template layers.

    network({"image": (batch, height, width, channels), "time": (batch,), **conditions})
        -> (batch, height, width, out_channels), float32

The image may also be a series (batch, length, channels) or a volume (batch, depth, height, width, channels): the rank
of the layers is inferred in `build`. A new network defines `_build_body` and `_body`; it need not derive from
`Network`, as any Keras model that satisfies this contract can be used.
"""

from collections.abc import Callable, Mapping
from typing import Any

import keras
from keras import ops

from kdiff import backend, deprecated, encodings
from kdiff.base import check_integer
from kdiff.blocks.attention import CrossAttention
from kdiff.blocks.base import (
    Chain,
    ConfigurableLayer,
    Tokens,
    apply_layer,
    build_layer,
    copy_layer,
    derive_seed,
    output_shape,
)
from kdiff.blocks.conditions import Encoded, Input, given_to, inputs_of
from kdiff.blocks.context_attention import ContextAttention
from kdiff.blocks.joint import JointBlock
from kdiff.networks.quantization import Quantizable

__all__ = ["AXES", "Network", "check_size", "joined"]

# The names of the spatial axes, by the rank of the batch.
AXES = {2: (), 3: ("length",), 4: ("height", "width"), 5: ("depth", "height", "width")}


class Network(Quantizable, ConfigurableLayer, keras.Model):
    """Encodes time and conditions as `embed`, `context` and maps; a subclass defines the body.

    Args:
        embedding: the layer from the time (and its other inputs, `inputs_of`) to `embed`, (batch, dim).
        conditions: a layer for each condition, by its name in the input, such as `{"label": LabelEmbedding(10)}`. Its
            output (see `kdiff.blocks.Encoded`) is added to `embed` if it is a vector, (batch, dim), becomes a part of
            `context` if it is tokens, (batch, tokens, dim), and is concatenated to the channels of the image if it is a
            map.
        out_channels: of the output; None for those of the image.
        remat: whether training keeps only the inputs of each block and recomputes its activations in the backward pass
            (gradient checkpointing): less memory for about a third more time (Chen et al., "Training Deep Nets with
            Sublinear Memory Cost", 2016).
        seed: from which the seed of each copied layer that has one is derived.
        kwargs: `name` and `dtype`. The precision applies to every layer made from a template; `embedding` and
            `conditions` keep theirs.
    """

    ranks: tuple[int, ...] = (3, 4, 5)  # the possible ranks of the image

    def __init__(
        self,
        embedding: keras.layers.Layer,
        conditions: Mapping[str, keras.layers.Layer] | None = None,
        out_channels: int | None = None,
        remat: bool = False,
        seed: int = 0,
        **kwargs,
    ):
        super().__init__(autocast=False, **kwargs)
        name = type(self).__name__
        if out_channels is not None:
            check_integer(name, "out_channels", out_channels)
        check_integer(name, "seed", seed, 0)
        layers = conditions.values() if isinstance(conditions, Mapping) else [conditions] if conditions else []
        if not all(isinstance(layer, keras.layers.Layer) for layer in layers):
            raise TypeError(
                f"{name}: `conditions` must map names to layers, such as {{'label': LabelEmbedding(10)}}; received: "
                f"{conditions!r}"
            )
        self.embedding = embedding
        self.conditions = dict(conditions or {})
        self.out_channels = out_channels
        self.remat = remat
        self.seed = seed
        self._copies = 0

    def _build_body(self, x_shape, embed_shape, context_shape):
        """Builds all layers but `embedding` and `conditions`. `x_shape` includes the channels of the maps."""
        raise NotImplementedError

    def _body(self, x, embed, context, training):
        """Computes the output, (..., out_channels), from image and maps in the compute precision."""
        raise NotImplementedError

    def _check_image(self, shape):
        """Raises a ValueError if the network does not support an image of this rank or size."""
        if len(shape) not in self.ranks or shape[-1] is None:
            known = " or ".join(f"(batch, {', '.join((*AXES[rank], 'channels'))})" for rank in self.ranks)
            raise ValueError(f"{self.name}: the image must have the shape {known}; received: {shape}")

    def _chain(self, layers, name: str) -> Chain:
        """A chain of copied layers at the network's precision, each with its own seed.

        With the seed of the template all copies would drop the same units.
        """
        chain = Chain(layers, name=name)
        for layer in chain._flatten_layers():
            layer.dtype_policy = self.dtype_policy
            if hasattr(layer, "seed"):
                layer.seed = derive_seed(self.seed, self._copies)
                self._copies += 1
        return chain

    def _copy(self, layer: Any, name: str) -> keras.layers.Layer:
        """A copy of a template, or of the block of this name, at the network's precision."""
        return copy_layer(layer, name=name, dtype=self.dtype_policy)

    def _head(self, layer: Callable[..., keras.layers.Layer], *arguments, **options):
        """The last layer, such as a Dense or a Conv2D: float32, and initialised to zero unless set in `options`."""
        options = {"kernel_initializer": "zeros", "dtype": "float32", "name": "head", **options}
        return layer(self._channels, *arguments, **options)

    def _run(self, layer, x, embed, context, training):
        """Calls a chain or block, recomputed in the backward pass if `remat`."""
        if not (self.remat and training):
            return layer(x, embed=embed, context=context, training=training)
        return backend.remat(layer, {"x": x, "embed": embed, "context": context}, training=training)

    def build(self, input_shape):
        """Builds every layer, from the shapes of the inputs by name."""
        shapes = self._checked({name: tuple(shape) for name, shape in input_shape.items()})
        *sizes, channels = image = shapes["image"]
        self._channels = self.out_channels or channels
        time, encoded = self.encoded_shapes(shapes)
        embed, context = self._steering_shapes(time, encoded)
        self._check_maps(encoded, image)
        channels += sum(one.map[-1] for one in encoded.values() if one.map is not None)
        self._build_body((*sizes, channels), embed, context)
        self._check_attended(context)
        for name, layer in self.conditions.items():
            if hasattr(layer, "attach"):  # to the layers that attend to its tokens
                self._attach(name, layer)

    def load_own_variables(self, store) -> None:
        """As in Keras; in a file of an older kdiff, layers are found under their old names."""
        deprecated.find_old_paths(store)
        super().load_own_variables(store)

    def add_condition(self, name: str, layer: keras.layers.Layer, shapes: Mapping[str, tuple]) -> None:
        """Adds a condition to a built network, without changing its other weights.

        Args:
            name: the name of the condition.
            layer: a layer with `attach`, such as `kdiff.encoders.ImagePrompt`.
            shapes: the shapes of all inputs by name, including the new one.
        """
        time = build_layer(self.embedding, given_to(self.embedding, "time", shapes))
        build_layer(layer, given_to(layer, name, shapes), time)
        self._tracker.unlock()
        self.conditions = {**self.conditions, name: layer}
        self._tracker.lock()
        self._build_shapes_dict = {"input_shape": dict(shapes)}
        self._attach(name, layer)

    def _attach(self, name, layer):
        if list(self.conditions)[-1] != name:
            raise ValueError(
                f"{type(self).__name__}: {name!r} must be the last of `conditions`; received: {self.conditions}"
            )
        inside = {id(one) for top in self.conditions.values() for one in top._flatten_layers()}
        layers = [one for one in self._flatten_layers() if isinstance(one, CrossAttention) and id(one) not in inside]
        layer.attach([one.attention for one in layers if one.built])

    def encoded_shapes(self, shapes: Mapping[str, tuple]) -> tuple[Any, dict[str, Encoded]]:
        """The shapes of the output of `encoded` for inputs of these shapes; builds layers that are not built."""
        time = build_layer(self.embedding, given_to(self.embedding, "time", shapes))
        made = {
            name: build_layer(layer, given_to(layer, name, shapes), time, image=shapes["image"])
            for name, layer in self.conditions.items()
        }
        return time, {name: Encoded.of(shape) for name, shape in made.items()}

    def _steering_shapes(self, time, encoded):
        """The shapes of the output of `_steering`."""
        for name, one in encoded.items():
            if one.vector is not None and one.vector[-1] != time[-1]:
                raise ValueError(
                    f"{type(self).__name__}: the layer of condition {name!r} must return (batch, {time[-1]}), the "
                    f"width of the time embedding, or (batch, tokens, dim); it returns: {one.vector}"
                )
        return time, self._joined([one.tokens for one in encoded.values() if one.tokens is not None])

    def _joined(self, shapes):
        """The shape of the concatenated sequences; None if there are none."""
        if not shapes:
            return None
        if len({shape[-1] for shape in shapes}) > 1:
            raise ValueError(f"{type(self).__name__}: all tokens of conditions must have one width; received: {shapes}")
        tokens = [shape[1] for shape in shapes]
        return (shapes[0][0], None if None in tokens else sum(tokens), shapes[0][-1])

    def _check_maps(self, encoded, image):
        for name, one in encoded.items():
            shape = None if one.map is None else tuple(getattr(one.map, "shape", one.map))
            known = shape is None or len(shape) == len(image)
            pairs = zip(shape[1:-1], image[1:-1], strict=True) if known and shape is not None else ()
            if not known or any(None not in pair and pair[0] != pair[1] for pair in pairs):
                raise ValueError(
                    f"{type(self).__name__}: the map of condition {name!r} must have the sizes of the image, {image}; "
                    f"it has the shape: {shape}. `blocks.Concat` resizes images."
                )

    def _check_attended(self, context):
        """Raises a ValueError if no layer attends to the tokens. Layers from outside kdiff are assumed to."""
        conditions = {id(layer) for top in self.conditions.values() for layer in top._flatten_layers()}
        layers = [layer for layer in self._flatten_layers(include_self=False) if id(layer) not in conditions]
        own = all(type(layer).__module__.split(".")[0] in ("kdiff", "keras") for layer in layers)
        if (
            context is not None
            and own
            and not any(isinstance(layer, (CrossAttention, ContextAttention, JointBlock)) for layer in layers)
        ):
            raise ValueError(
                f"{type(self).__name__}: some conditions give tokens, but no layer attends to them: use "
                "blocks with attention to a context, such as `TransformerBlock`, or return a vector, as in "
                "`TextEncoder(pooled=True)`"
            )

    @property
    def condition_inputs(self) -> dict[str, Input]:
        """The inputs other than image and time, by name; if conditions share one, the first defines its null."""
        layers, found = {"time": self.embedding, **self.conditions}, {}
        for name, layer in layers.items():
            for one, taken in inputs_of(layer, name).items():
                found.setdefault(one, taken)
        return {name: one for name, one in found.items() if name != "time"}

    def call(self, inputs, training=None):
        """Maps the inputs (see the module) to the shape of the image with `out_channels`, float32."""
        return self._output(inputs, training)

    def _output(self, inputs, training, encoded=None, **options):
        """The output of `call`; `options` are for `_body`, `encoded` is the output of `encoded` for these inputs."""
        image = inputs["image"]
        time, conditions = self.encoded(inputs, training) if encoded is None else encoded
        maps = [image, *(one.map for one in conditions.values() if one.map is not None)]
        maps = [ops.cast(one, self.compute_dtype) for one in maps]
        x = ops.concatenate(maps, axis=-1) if len(maps) > 1 else maps[0]
        embed, context = self._steering(time, list(conditions.values()))
        return ops.cast(self._body(x, embed, context, training, **options), "float32")

    def encoded(self, inputs, training=None) -> tuple[Any, dict[str, Encoded]]:
        """The output of the embedding of time and, by name, of the layer of each condition."""
        self._checked({name: tuple(value.shape) for name, value in inputs.items()})
        time = apply_layer(self.embedding, given_to(self.embedding, "time", inputs), training=training)
        kept = None if training else encodings.current(self)
        found = {name: kept and kept.find(name, inputs) for name in self.conditions}
        if None in found.values():
            inputs = self._unfolded(inputs, training)
        encoded = {
            name: self._encoded(name, inputs, time, inputs["image"], training) if known is None else Encoded(**known)
            for name, known in found.items()
        }
        self._check_maps(encoded, tuple(inputs["image"].shape))
        return time, encoded

    def _unfolded(self, inputs, training):
        """The inputs after trainable encoders, each of which runs once for all conditions that share it."""
        for layer in self.conditions.values():
            if hasattr(layer, "unfolded"):
                inputs = layer.unfolded(inputs, training)
        return inputs

    def _encoded(self, name, inputs, time, image, training) -> Encoded:
        layer = self.conditions[name]
        return Encoded.of(apply_layer(layer, given_to(layer, name, inputs), time, training=training, image=image))

    @property
    def inputs_by_condition(self) -> dict[str, tuple[str, ...]]:
        """The names of the inputs of each condition."""
        return {name: tuple(inputs_of(layer, name)) for name, layer in self.conditions.items()}

    def encoder(self) -> "Network":
        """The network whose `constant_encodings` hold for a run of this one."""
        return self

    def constant_encodings(self, conditions: Mapping[str, Any], size: tuple[int, ...]) -> dict[str, dict[str, Any]]:
        """What the layers of conditions return that depend neither on the time nor on x_t, outside training.

        Args:
            conditions: the inputs of these layers, with one row per example.
            size: the shape of one example of x_t.

        Returns:
            The fields of `Encoded` that are not None, by the name of the condition.

        Raises:
            Exception: that of a layer which raises for another reason than that it needs the time or x_t.
        """
        if not conditions:
            return {}
        first = next(iter(conditions.values()))
        rows = first.shape[0]
        image = encodings.Changing((rows, *size))
        shapes = {"image": image.shape, "time": (rows,), **{name: tuple(one.shape) for name, one in conditions.items()}}
        time = output_shape(self.embedding, given_to(self.embedding, "time", shapes))
        time = encodings.Changing(time, self.embedding.compute_dtype)
        inputs, made = self._unfolded(conditions, False), {}
        for name, layer in self.conditions.items():
            by_row = all(getattr(one, "by_row", True) for one in layer._flatten_layers())
            if by_row and any(one in inputs for one in inputs_of(layer, name)):
                made[name] = self._constant_encoding(name, inputs, time, image, ops.shape(first)[0])
        made = {name: one._asdict() for name, one in made.items() if one is not None}
        return {name: {k: v for k, v in one.items() if v is not None} for name, one in made.items()}

    def _constant_encoding(self, name, inputs, time, image, rows) -> Encoded | None:
        """What the layer of a condition returns; None if it raises without the numbers of time and image alone."""
        try:
            return self._encoded(name, inputs, time, image, False)
        except Exception:  # its type depends on the operation and on the backend
            self._encoded(name, inputs, *(ops.zeros((rows, *one.shape[1:]), one.dtype) for one in (time, image)), False)
            return None

    def _steering(self, time, encoded: list[Encoded]):
        """The sum of the vectors of time and conditions, and the concatenated tokens of conditions, or None."""
        embed = time
        for one in encoded:
            if one.vector is not None:
                embed = embed + ops.cast(one.vector, embed.dtype)
        return embed, joined([one for one in encoded if one.tokens is not None])

    def compute_output_spec(self, inputs, training=None):
        """The shape of the image with `out_channels`, float32."""
        *shape, channels = inputs["image"].shape
        return keras.KerasTensor((*shape, self.out_channels or channels), "float32")

    def _checked(self, shapes):
        known = self.condition_inputs
        for name in ("image", "time", *(name for name, one in known.items() if not one.optional)):
            if name not in shapes:
                raise ValueError(f"{self.name}: the input {name!r} is missing; received: {sorted(shapes)}")
        for name, shape in shapes.items():
            if name not in ("image", "time", *known):
                raise ValueError(f"{self.name}: the input {name!r} is unknown; `conditions` are: {list(known)}")
            if None not in (shape[0], shapes["image"][0]) and shape[0] != shapes["image"][0]:
                raise ValueError(
                    f"{self.name}: the input {name!r} must have the batch size of the image, "
                    f"{shapes['image'][0]}; received the shape: {shape}"
                )
        self._check_image(shapes["image"])
        return shapes


def joined(encoded: list[Encoded]) -> Any:
    """The concatenated tokens of several conditions, `Tokens` if one has a mask; None if there are none."""
    if not encoded:
        return None
    values = ops.concatenate([one.tokens for one in encoded], axis=1)
    if all(one.mask is None for one in encoded):
        return values
    masks = [ops.ones(ops.shape(one.tokens)[:2], "bool") if one.mask is None else one.mask for one in encoded]
    return Tokens(values, ops.concatenate([ops.cast(mask, "bool") for mask in masks], axis=1))


def check_size(owner: keras.Model, shape: tuple, factor: int, reason: str) -> None:
    """Raises a ValueError unless `factor` divides every known size, (batch, *sizes, channels)."""
    for name, size in zip(AXES[len(shape)], shape[1:-1], strict=True):
        if size is not None and (size == 0 or size % factor):
            below, above = size // factor * factor, (size // factor + 1) * factor
            fit = f"{below} or {above}" if below else f"{above}"
            raise ValueError(
                f"{owner.name}: {reason} a {name} divisible by {factor}; received: {size}. The nearest that fit: {fit}"
            )
