"""The transformer of DALL-E 2's prior, which denoises image embeddings given text."""

from collections.abc import Mapping
from typing import Any

import keras
from keras import ops

from kdiff.base import check_integer
from kdiff.blocks.attention import MultiHeadAttention, usual_heads
from kdiff.blocks.base import Tokens, build_layer, copy_layer, get_layer, kernel_initializer
from kdiff.blocks.embeddings import MLPEmbedding, SinusoidalEmbedding
from kdiff.blocks.initializers import Normal
from kdiff.blocks.layers import Dense
from kdiff.blocks.lookup import LearnedEmbedding
from kdiff.blocks.patterns import Causal
from kdiff.blocks.transformer import TransformerBlock
from kdiff.networks.base import Network, joined

__all__ = ["PriorTransformer"]


class PriorTransformer(Network):
    """A causal transformer on one sequence, whose last token, a learned query, becomes the output.

        [tokens of the conditions; vectors of the conditions; time; noisy embedding; query] + positions

        network({"image": (batch, channels), "time": (batch,), **conditions}) -> (batch, out_channels), float32

    Ramesh et al., "Hierarchical Text-Conditional Image Generation with CLIP Latents" (2022), section 2.2: with the
    prediction "data", the encoded text as tokens and its CLIP embedding as a vector, this is the prior of DALL-E 2. All
    are projected to `width`; each token attends to itself and to those before it, except masked ones, so that padding
    has no effect. Vectors of other conditions, such as labels, are one token each.

        conditions={"text": Prompt(clip.text, tokenizer, masked=True), "vector": Joint({"text": PromptVector(64)}, ...)}

    Args:
        width: the channels of a token.
        depth: the number of blocks.
        block: a template of the blocks; None for a causal `TransformerBlock` with the largest number of heads of at
            least 64 channels.
        embedding: the layer of the time; None for an MLPEmbedding of `width` channels on a SinusoidalEmbedding of
            `width`.
        conditions: a layer for each condition, by its name in the input. At least one must return a vector or tokens.
        normalization: before the last layer.
        out_channels: of the output; None for those of the input.
        remat: whether each block is recomputed in the backward pass, to save memory.
        seed: from which the seed of each copied layer that has one is derived.
        kwargs: `name` and `dtype`.

    Raises:
        ValueError: if a condition returns a map, or an unknown number of tokens, or there is no token before the time;
            if a block is not causal.
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

    # Conditions are not added to the time embedding, but are part of the sequence.

    def _steering_shapes(self, time, encoded):
        if time[-1] != self.width:
            raise ValueError(
                f"PriorTransformer: the time embedding must have the token width, {self.width}; received: {time[-1]}"
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
                "PriorTransformer: at least one condition must return tokens or a vector (for unconditional "
                f"embeddings use an `MLP`); received: {self.conditions}"
            )
        return time, context

    def _steering(self, time, encoded):
        """The time, and the sequence that precedes it, with a mask if a condition has one."""
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
            raise ValueError(f"PriorTransformer: conditions must return tokens or vectors; {found} return maps")

    def _check_attended(self, context):
        """Checks instead that the blocks are causal, as the tokens are part of the sequence."""
        layers = [layer for block in self.blocks for layer in block._flatten_layers()]
        later = [one.pattern for one in layers if isinstance(one, MultiHeadAttention) and one.pattern != Causal()]
        if later:
            raise ValueError(
                f"PriorTransformer: blocks must have the attention pattern Causal(); received: {later[0]!r}"
            )

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
