"""The encoder of T5 (Raffel et al., "Exploring the Limits of Transfer Learning with a Unified Text-to-Text
Transformer", 2020), without its decoder, which diffusion models do not use.

    encoder = T5Text()                         # of T5 v1.1 XXL, as in Imagen, Stable Diffusion 3 and Flux
    text = encoder(tokens, mask)               # (batch, length) integers; the mask is True for tokens
    text.tokens                                # (batch, length, 4096)
"""

import math
from typing import Any

import numpy as np
from keras import ops

from kdiff import deprecated
from kdiff.base import check_integer
from kdiff.blocks.base import Block, build_layer
from kdiff.blocks.conditions import Encoded
from kdiff.blocks.lookup import LearnedEmbedding
from kdiff.blocks.normalization import RMSNorm
from kdiff.blocks.transformer import TransformerBlock
from kdiff.encoders.base import Encoder, ratio_of

__all__ = ["RelativePositionBias", "T5Text", "buckets_of"]


class T5Text(Encoder):
    """The text encoder of T5: `norm(blocks(table[token]))`, with bidirectional attention and `RelativePositionBias`.

    Section 2.1 of the paper; version 1.1 has GEGLU ("gelu_tanh", `glu`) where the paper has ReLU. No layer has a bias.
    The logits of T5 are `q k^T + bias`, not divided by sqrt(head_width): here that factor is part of the kernel of the
    queries. It returns `Encoded` with `tokens`, (batch, length, width), and the `mask` of the call. The defaults are
    those of version 1.1 XXL.

    Args:
        vocabulary_size: tokens are 0 ... vocabulary_size - 1.
        width: the width of a token.
        depth: the number of blocks.
        heads: the number of attention heads.
        head_width: the channels per head.
        hidden: the hidden width of the feed-forward layers.
        activation: "relu", or "gelu_tanh" in version 1.1.
        glu: whether the feed-forward layers are gated, as in version 1.1.
        buckets: the number of buckets of distances, as in `RelativePositionBias`.
        furthest: the distance from which on all share one bucket.
        epsilon: of the normalisations.
        kwargs: `name` and `dtype`.
    """

    def __init__(
        self,
        vocabulary_size: int = 32128,
        width: int = 4096,
        depth: int = 24,
        heads: int = 64,
        head_width: int = 64,
        hidden: int = 10240,
        activation: Any = "gelu_tanh",
        glu: bool = True,
        buckets: int = 32,
        furthest: int = 128,
        epsilon: float = 1e-6,
        **kwargs,
    ):
        check_integer("T5Text", "hidden", hidden)
        norm = RMSNorm(epsilon)
        options = {"bias": False, "glu": glu, "zero": False, "output_bias": False}
        block = TransformerBlock(heads, head_width, ratio_of(hidden, width), activation, norm, **options)
        super().__init__(width, depth, block, **kwargs)
        self.vocabulary_size = vocabulary_size
        self.heads = heads
        self.head_width = head_width
        self.hidden = hidden
        self.activation = activation
        self.glu = glu
        self.buckets = buckets
        self.furthest = furthest
        self.epsilon = epsilon
        self.table = self._part(LearnedEmbedding(vocabulary_size, width), "table")
        self.bias = self._part(RelativePositionBias(heads, buckets, furthest), "bias")
        self.norm = self._part(norm, "norm")

    def build(self, input_shape):
        """Creates all weights, for tokens (batch, length)."""
        shape = self._shape(input_shape)
        build_layer(self.table, shape[:2])
        build_layer(self.bias, shape)
        self._build_blocks(shape)
        build_layer(self.norm, shape)

    def _shape(self, shape):
        """The shape of the embedded tokens."""
        if len(shape) != 2:
            raise ValueError(f"T5Text: tokens must have the shape (batch, length); received the shape: {tuple(shape)}")
        return (*shape, self.width)

    def call(self, tokens, padding_mask=None, training=None):
        """Maps integers (batch, length) to `Encoded`; `padding_mask`, (batch, length), is False for masked tokens."""
        self._shape(tokens.shape)
        x = self.table(tokens)
        x, _ = self._run(x, padding_mask, self.bias(x), training)
        return Encoded(tokens=self.norm(x), mask=padding_mask)

    def compute_output_spec(self, tokens, padding_mask=None, training=None):
        """The specification of the output of `call`."""
        return self._spec(self._shape(tokens.shape), vector=False, mask=padding_mask)


class RelativePositionBias(Block):
    """A relative bias of attention logits, by head and by the distance of two tokens: `table[bucket(key - query)]`.

    Raffel et al. (2020), section 2.1. Half of the buckets are for keys before the query, half for those after it. In
    each half, the first half has one bucket per distance, and the others grow logarithmically up to `furthest`.

    Args:
        heads: the number of attention heads.
        buckets: the number of buckets.
        furthest: the distance from which on all share the last bucket.
    """

    formerly = ("kdiff.encoders>RelativeBias",)

    def __init__(self, heads: int, buckets: int = 32, furthest: int = 128, **kwargs):
        super().__init__(**kwargs)
        check_integer("RelativePositionBias", "heads", heads)
        check_integer("RelativePositionBias", "buckets", buckets, 4)
        check_integer("RelativePositionBias", "furthest", furthest, buckets // 4 + 1)
        self.heads = heads
        self.buckets = buckets
        self.furthest = furthest
        distances = np.arange(-furthest, furthest + 1)
        self._buckets = buckets_of(distances, buckets, furthest).astype("int32")
        self.table = LearnedEmbedding(buckets, heads, name="table", dtype=self.dtype_policy)

    def build(self, x_shape):
        """Creates the table, (buckets, heads)."""
        build_layer(self.table, (None, None))

    def call(self, x, embed=None, context=None, training=None):
        """Maps tokens (batch, length, dim) to (1, heads, length, length), queries before keys."""
        at = ops.arange(ops.shape(x)[1])
        distances = ops.clip(at[None, :] - at[:, None], -self.furthest, self.furthest)
        buckets = ops.take(ops.convert_to_tensor(self._buckets), distances + self.furthest, axis=0)
        return ops.transpose(self.table(buckets), (2, 0, 1))[None]

    def compute_output_shape(self, x_shape, embed_shape=None, context_shape=None):
        """(1, heads, length, length)."""
        return (1, self.heads, x_shape[1], x_shape[1])


def buckets_of(distances: np.ndarray, buckets: int, furthest: int) -> np.ndarray:
    """The bucket of each distance, key - query: with n = buckets / 2 and e = n / 2, plus n for d > 0,

        |d| if |d| < e, else min(n - 1, e + floor((n - e) log(|d| / e) / log(furthest / e)))

    In float32, as in the training of T5: where the logarithm is an integer, rounding decides.
    """
    half = buckets // 2
    exact = half // 2
    size = np.abs(distances)
    logarithm = np.log(np.maximum(size, 1).astype("float32") / np.float32(exact))
    grown = logarithm / np.float32(math.log(furthest / exact)) * np.float32(half - exact)
    large = np.minimum(exact + grown.astype("int64"), half - 1)
    return np.where(size < exact, size, large) + half * (distances > 0)


__getattr__ = deprecated.names(__name__, RelativeBias="RelativePositionBias")
