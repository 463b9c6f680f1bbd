"""The base of encoders: a stack of transformer blocks on tokens, as a Keras model that returns `Encoded`."""

import math
from typing import Any

import keras

from kdiff.base import check_integer
from kdiff.blocks.base import ConfigurableLayer, Shape, Tokens, build_layer, copy_layer
from kdiff.blocks.conditions import Encoded
from kdiff.blocks.layers import Dense

__all__ = ["Encoder", "ratio_of"]


class Encoder(ConfigurableLayer, keras.Model):
    """A transformer on tokens: `block_depth(... block_1(x))`. A subclass defines its input and output.

    Args:
        width: the width of a token.
        depth: the number of blocks.
        block: a template of the blocks.
        projection: the width to which `vector` is projected at the end, without a bias; None for none.
        skip: the number of final blocks that `tokens` skip.
        kwargs: `name` and `dtype`.

    Attributes:
        frozen: whether it is constant in the network that contains it: not trained, and not averaged.
    """

    frozen: bool = False

    def __init__(self, width: int, depth: int, block: Any, projection: int | None = None, skip: int = 0, **kwargs):
        super().__init__(autocast=False, **kwargs)
        name = type(self).__name__
        for argument, value in {"width": width, "depth": depth, "projection": projection}.items():
            if value is not None:
                check_integer(name, argument, value)
        check_integer(name, "skip", skip, 0)
        if skip > depth:
            raise ValueError(f"{name}: `skip` must be at most the number of blocks, {depth}; received: {skip}")
        self.width = width
        self.depth = depth
        self.projection = projection
        self.skip = skip
        policy = {"dtype": self.dtype_policy}
        self.blocks = [copy_layer(block, name=f"block_{i}", **policy) for i in range(depth)]
        options = {"use_bias": False, "name": "projection", **policy}
        self.projection_layer = None if projection is None else Dense(projection, **options)

    def freeze(self) -> None:
        """Makes its weights constant in any network that contains it."""
        # After loading, it is already False, but not for its parts; on TensorFlow Keras skips equal values.
        self.trainable = True
        self.trainable = False
        self.frozen = True
        for weight in self.weights:
            weight.averaged = weight.trainable = getattr(weight, "adapts", False)

    @property
    def learns(self) -> bool:
        """Whether some of its weights are trained although it is frozen: those of a LoRA, or the vectors of a token."""
        return any(weight.trainable for weight in self.weights)

    def _part(self, layer: Any, name: str) -> keras.layers.Layer:
        """A copy of a layer at this precision."""
        return copy_layer(layer, name=name, dtype=self.dtype_policy)

    def _build_blocks(self, shape: Shape) -> None:
        """Builds the blocks, for tokens of this shape, and the projection."""
        for block in self.blocks:
            build_layer(block, shape)
        if self.projection_layer is not None:
            build_layer(self.projection_layer, (shape[0], shape[-1]))

    def _run(self, x, mask=None, bias=None, training=None) -> tuple[Any, Any]:
        """(x after all blocks but `skip`, x after all of them)."""
        context = None if mask is None and bias is None else Tokens(None, mask, bias)
        states = [x]
        for block in self.blocks:
            states.append(block(states[-1], context=context, training=training))
        return states[-1 - self.skip], states[-1]

    def _projected(self, vector):
        """Maps (batch, width) to (batch, projection)."""
        return vector if self.projection_layer is None else self.projection_layer(vector)

    def _spec(self, shape: Shape, vector: bool, mask: Any = None) -> Encoded:
        """The specification of the output, for tokens of this shape."""
        pooled = keras.KerasTensor((shape[0], self.projection or self.width), self.compute_dtype)
        return Encoded(pooled if vector else None, keras.KerasTensor(shape, self.compute_dtype), mask)


def ratio_of(hidden: int, width: int) -> float:
    """The `ratio` of a `FeedForward` whose hidden width is this."""
    ratio = hidden / width
    return ratio if int(ratio * width) == hidden else math.nextafter(ratio, math.inf)
