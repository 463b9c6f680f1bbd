"""What networks share: one dictionary of inputs, time and conditions made into vectors and tokens, templates copied.

    network({"image": (batch, height, width, channels), "time": (batch,), **conditions})
        -> (batch, height, width, out_channels), float32

A network of your own writes `_build_body` and `_body`; it need not derive from `Network`: any Keras model with this
contract will do.
"""

from collections.abc import Callable, Mapping
from typing import Any

import keras
from keras import ops

from kdiff import backend
from kdiff.base import check_integer
from kdiff.blocks.base import Chain, ConfigurableLayer, apply_layer, build_layer, copy_layer, derive_seed


class Network(ConfigurableLayer, keras.Model):
    """Time and conditions to `embed` and `context`; the body of the network, which a subclass gives, does the rest.

    Args:
        embedding: the layer that makes `embed`, (batch, dim), of the time.
        conditions: a layer for each condition, by its name in the input, such as `{"label": LabelEmbedding(10)}`. What
            it makes is added to `embed` if it has the shape (batch, dim), and is a part of `context` if it has
            (batch, tokens, dim).
        out_channels: of the output; None for those of the image.
        remat: whether training keeps only the inputs of each block, and computes what is inside again for the
            gradient: less memory, about a third more time (Chen et al., "Training Deep Nets with Sublinear Memory
            Cost", 2016).
        seed: from which each copied layer that has a `seed` gets one of its own.
        kwargs: `name` and `dtype`. The precision is that of every layer made from a template; `embedding` and
            `conditions` keep theirs.
    """

    ranks = (4,)  # that the image may have

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
        if out_channels is not None:
            check_integer(type(self).__name__, "out_channels", out_channels)
        check_integer(type(self).__name__, "seed", seed, 0)
        self.embedding = embedding
        self.conditions = dict(conditions or {})
        self.out_channels = out_channels
        self.remat = remat
        self.seed = seed
        self._copies = 0

    def _build_body(self, x_shape, embed_shape, context_shape):
        """Builds all but `embedding` and `conditions`."""
        raise NotImplementedError

    def _body(self, x, embed, context, training):
        """The output, (..., out_channels), from the image in the network's precision."""
        raise NotImplementedError

    def _check_image(self, shape):
        """Raises a ValueError for an image of another rank or size than the network takes."""
        if len(shape) not in self.ranks or shape[-1] is None:
            axes = {2: "channels", 3: "length, channels", 4: "height, width, channels"}
            known = " or ".join(f"(batch, {axes[rank]})" for rank in reversed(self.ranks))
            raise ValueError(f"{self.name}: the image must have the shape {known}; received: {shape}")

    def _chain(self, layers, name: str) -> Chain:
        """A chain of layers, at the network's precision, each with random numbers of its own.

        With those of the template all copies would drop the same units.
        """
        chain = Chain(layers, name=name)
        for layer in chain._flatten_layers():
            layer.dtype_policy = self.dtype_policy
            if hasattr(layer, "seed"):
                layer.seed = derive_seed(self.seed, self._copies)
                self._copies += 1
        return chain

    def _copy(self, layer: Any, name: str) -> keras.layers.Layer:
        """A copy of a template, or of the block so named, at the network's precision."""
        return copy_layer(layer, name=name, dtype=self.dtype_policy)

    def _head(self, layer: Callable[..., keras.layers.Layer], channels: int, *arguments, **options):
        """The last layer, such as a Dense or a Conv2D: in float32, and zero at first unless `options` say otherwise."""
        options = {"kernel_initializer": "zeros", "dtype": "float32", "name": "head", **options}
        return layer(self.out_channels or channels, *arguments, **options)

    def _run(self, layer, x, embed, context, training):
        """Calls a chain or block, with its inside forgotten until the gradient wants it if `remat`."""
        if not (self.remat and training):
            return layer(x, embed=embed, context=context, training=training)
        return backend.recomputed(layer, {"x": x, "embed": embed, "context": context}, training=training)

    def build(self, input_shape):
        """Builds every layer, from the shapes of the inputs by name."""
        shapes = self._checked({name: tuple(shape) for name, shape in input_shape.items()})
        self._build_body(shapes["image"], *self._build_embeddings(shapes))

    def _build_embeddings(self, shapes):
        embed = build_layer(self.embedding, shapes["time"])
        encoded = {name: build_layer(layer, shapes[name], embed) for name, layer in self.conditions.items()}
        for name, shape in encoded.items():
            if len(shape) not in (2, 3) or (len(shape) == 2 and shape[-1] != embed[-1]):
                raise ValueError(
                    f"{type(self).__name__}: the layer of condition {name!r} must give (batch, {embed[-1]}), the width "
                    f"of the time embedding, or (batch, tokens, dim); it gives: {shape}"
                )
        return embed, self._joined([shape for shape in encoded.values() if len(shape) == 3])

    def _joined(self, shapes):
        """The shape of sequences one after the other; None for none."""
        if not shapes:
            return None
        if len({shape[-1] for shape in shapes}) > 1:
            raise ValueError(
                f"{type(self).__name__}: conditions that give tokens must give them one width; they give: {shapes}"
            )
        tokens = [shape[1] for shape in shapes]
        return (shapes[0][0], None if None in tokens else sum(tokens), shapes[0][-1])

    def call(self, inputs, training=None):
        """The dictionary of inputs (see the module) to the shape of the image with `out_channels`, float32."""
        self._checked({name: tuple(value.shape) for name, value in inputs.items()})
        embed, context = self._embed(inputs, training)
        return ops.cast(self._body(ops.cast(inputs["image"], self.compute_dtype), embed, context, training), "float32")

    def _embed(self, inputs, training):
        """The sum of the vectors of time and conditions, and the conditions' tokens one after the other, or None."""
        embed = time = apply_layer(self.embedding, inputs["time"], training=training)
        context = []
        for name, layer in self.conditions.items():
            encoded = apply_layer(layer, inputs[name], time, training=training)
            if len(encoded.shape) == 2:
                embed = embed + ops.cast(encoded, embed.dtype)
            else:
                context.append(encoded)
        return embed, ops.concatenate(context, axis=1) if context else None

    def compute_output_spec(self, inputs, training=None):
        """The image's shape with `out_channels`, in float32."""
        *shape, channels = inputs["image"].shape
        return keras.KerasTensor((*shape, self.out_channels or channels), "float32")

    def _checked(self, shapes):
        for name in ("image", "time", *self.conditions):
            if name not in shapes:
                raise ValueError(f"{self.name}: the input {name!r} is missing; received: {sorted(shapes)}")
        for name, shape in shapes.items():
            if name not in ("image", "time", *self.conditions):
                raise ValueError(
                    f"{self.name}: the input {name!r} is unknown; `conditions` has: {list(self.conditions)}"
                )
            if None not in (shape[0], shapes["image"][0]) and shape[0] != shapes["image"][0]:
                raise ValueError(
                    f"{self.name}: the input {name!r} must have the batch size of the image, "
                    f"{shapes['image'][0]}; received the shape: {shape}"
                )
        self._check_image(shapes["image"])
        return shapes


def check_size(owner: keras.Model, shape: tuple, factor: int, reason: str) -> None:
    """Raises a ValueError unless `factor` divides every known size, (batch, *sizes, channels)."""
    names = ("height", "width") if len(shape) == 4 else ("length",)
    for name, size in zip(names, shape[1:-1], strict=True):
        if size is not None and (size == 0 or size % factor):
            below, above = size // factor * factor, (size // factor + 1) * factor
            fit = f"{below} or {above}" if below else f"{above}"
            raise ValueError(
                f"{owner.name}: {reason} a {name} that {factor} divides; received: {size}. The nearest that fit: {fit}"
            )
