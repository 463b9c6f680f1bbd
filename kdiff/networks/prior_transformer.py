"""The transformer of DALL-E 2's prior: embeddings from noisy ones, read after the text that they are to suit."""

from collections.abc import Mapping
from typing import Any

import keras
from keras import ops

from kdiff.base import check_integer
from kdiff.blocks.attention import MultiHeadAttention, usual_heads
from kdiff.blocks.base import Tokens, build_layer, copy_layer, get_layer, kernel_initializer
from kdiff.blocks.embeddings import LearnedEmbedding, MLPEmbedding, SinusoidalEmbedding
from kdiff.blocks.initializers import Normal
from kdiff.blocks.layers import Dense
from kdiff.blocks.patterns import Causal
from kdiff.blocks.transformer import TransformerBlock
from kdiff.networks.base import Network, joined

__all__ = ["PriorTransformer"]


class PriorTransformer(Network):
    """A causal transformer on one sequence, whose last token, a learned query, becomes the output.

        [tokens of the conditions; vectors of the conditions; time; noisy embedding; query] + positions

        network({"image": (batch, channels), "time": (batch,), **conditions}) -> (batch, out_channels), float32

    Ramesh et al., "Hierarchical Text-Conditional Image Generation with CLIP Latents" (2022), section 2.2: with the
    prediction "data", the encoded text as tokens and its CLIP embedding as a vector, the prior of DALL-E 2. All are
    projected to `width`; each token sees itself and those before it, but for those that a condition's mask hides. So
    padding changes nothing. Where the vectors are of other conditions than a text, such as labels, each is a token too.

        conditions={"text": Prompt(clip.text, tokenizer, masked=True), "vector": Joint({"text": PromptVector(64)}, ...)}

    Args:
        width: the channels of a token.
        depth: the number of blocks.
        block: a template of the blocks; None for a `TransformerBlock` with as many heads of 64 channels or more as
            there can be, each token of which sees those before it.
        embedding: the layer of the time; None for an MLPEmbedding of `width` channels of as many waves.
        conditions: a layer for each condition, by its name in the input. One at least must give something.
        normalization: before the last layer.
        out_channels: of the output; None for those of the input.
        remat: whether the inside of each block is computed again for the gradient, to save memory.
        seed: from which each copied layer that has a `seed` gets one of its own.
        kwargs: `name` and `dtype`.

    Raises:
        ValueError: if a condition gives a map, or tokens whose number is not known, or there is nothing before the
            time; if a block attends to tokens after its own.
    """

    ranks = (2,)

    def __init__(
        self,
        width: int = 512,
        depth: int = 6,
        block: Any = None,
        embedding: keras.layers.Layer | None = None,
        conditions: Mapping[str, keras.layers.Layer] | None = None,
        normalization: Any = "layer_norm",
        out_channels: int | None = None,
        remat: bool = False,
        seed: int = 0,
        **kwargs,
    ):
        check_integer("PriorTransformer", "width", width)
        check_integer("PriorTransformer", "depth", depth)
        embedding = embedding or MLPEmbedding(SinusoidalEmbedding(width), width)
        super().__init__(embedding, conditions, out_channels, remat, seed, **kwargs)
        self.width = width
        self.depth = depth
        self.block = get_layer(block or TransformerBlock(usual_heads(width), pattern=Causal()))
        self.normalization = self._copy(normalization, "normalization")
        self.blocks = [self._chain([copy_layer(self.block)], f"block_{i}") for i in range(depth)]
        self.token_projection = self._dense("token_projection")
        self.vector_projections: dict[str, keras.layers.Layer] = {}
        self.stem = self._dense("stem")
        self.positions = self._copy(LearnedEmbedding(), "positions")

    def _dense(self, name):
        return Dense(self.width, kernel_initializer=kernel_initializer(), dtype=self.dtype_policy, name=name)

    # What conditions give is not added to the time, but stands in the sequence.

    def _steering_shapes(self, time, encoded):
        if time[-1] != self.width:
            raise ValueError(
                f"PriorTransformer: the time embedding must have the width of a token, {self.width}; it has: {time[-1]}"
            )
        context = self._joined([one.tokens for one in encoded.values() if one.tokens is not None])
        if context is not None and context[1] is None:
            raise ValueError(f"PriorTransformer: the number of a condition's tokens must be known; received: {context}")
        for name, one in encoded.items():
            if one.vector is not None and name not in self.vector_projections:
                self.vector_projections[name] = self._dense(f"{name}_projection")
            if one.vector is not None:
                build_layer(self.vector_projections[name], one.vector)
        if context is None and not self.vector_projections:
            raise ValueError(
                "PriorTransformer: there must be a condition that gives tokens or a vector; of noise alone an `MLP` "
                f"makes embeddings; received: {self.conditions}"
            )
        return time, context

    def _steering(self, time, encoded):
        """The time, and the sequence up to it, with a mask if a condition has one."""
        given = [one for one in encoded if one.tokens is not None]
        sequence, mask = [], None
        if given:
            context = joined(given)
            context, mask = context[:2] if isinstance(context, Tokens) else (context, None)
            sequence.append(self.token_projection(ops.cast(context, self.compute_dtype)))
        vectors = zip(self.conditions, encoded, strict=True)
        for name, one in vectors:
            if one.vector is not None:
                vector = self.vector_projections[name](ops.cast(one.vector, self.compute_dtype))
                sequence.append(vector[:, None])
        return time, (sequence, mask)

    def _check_maps(self, encoded, image):
        if found := [name for name, one in encoded.items() if one.map is not None]:
            raise ValueError(f"PriorTransformer: conditions must give tokens or vectors; {found} give maps")

    def _check_attended(self, context):
        """They stand in the sequence that attends to itself."""
        layers = [layer for block in self.blocks for layer in block._flatten_layers()]
        later = [one.pattern for one in layers if isinstance(one, MultiHeadAttention) and one.pattern != Causal()]
        if later:
            raise ValueError(f"PriorTransformer: blocks must attend by the pattern Causal(); received: {later[0]!r}")

    def _build_body(self, x_shape, embed_shape, context_shape):
        batch = x_shape[0]
        build_layer(self.stem, x_shape)
        if context_shape is not None:
            build_layer(self.token_projection, context_shape)
        count = (0 if context_shape is None else context_shape[1]) + len(self.vector_projections) + 3
        shape = (batch, count, self.width)
        build_layer(self.positions, shape)
        self.query = self.add_weight(shape=(self.width,), initializer=Normal(0.02), name="query")
        for block in self.blocks:
            build_layer(block, shape)
        build_layer(self.normalization, shape)
        self.head = self._head(Dense)
        self.head.build((batch, self.width))

    def _body(self, x, embed, context, training):
        sequence, mask = context
        batch = ops.shape(x)[0]
        query = ops.broadcast_to(ops.cast(self.query, self.compute_dtype), (batch, 1, self.width))
        one = [ops.cast(embed, self.compute_dtype)[:, None], self.stem(x)[:, None], query]
        x = self.positions(ops.concatenate([*sequence, *one], axis=1))
        own = None
        if mask is not None:
            rest = ops.ones((batch, x.shape[1] - mask.shape[1]), "bool")
            own = Tokens(None, ops.concatenate([ops.cast(mask, "bool"), rest], axis=1))
        for block in self.blocks:
            x = self._run(block, x, None, own, training)
        return self.head(self.normalization(x[:, -1]))
