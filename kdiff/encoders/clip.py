"""The two encoders of CLIP (Radford et al., "Learning Transferable Visual Models From Natural Language Supervision",
2021).

encoder = CLIPText()                       # of ViT-L/14, as in Stable Diffusion 1
text = encoder(tokens)                     # (batch, 77) integers
text.tokens, text.vector                   # (batch, 77, 768), (batch, 768)
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from keras import ops

from kdiff.base import check_integer
from kdiff.blocks.base import build_layer
from kdiff.blocks.conditions import Encoded
from kdiff.blocks.initializers import Normal
from kdiff.blocks.lookup import LearnedEmbedding
from kdiff.blocks.normalization import LayerNorm
from kdiff.blocks.patches import Patchify
from kdiff.blocks.patterns import Causal
from kdiff.blocks.transformer import TransformerBlock
from kdiff.encoders.base import Encoder, ratio_of
from kdiff.encoders.vocabulary import Vocabulary

__all__ = ["CLIPText", "CLIPVision"]


class CLIPText(Encoder):
    """The text encoder of CLIP: `norm(blocks(table[token] + position))`, with causal attention.

    Section 2.4 of the paper. It returns `Encoded`: `tokens`, (batch, length, width), and `vector`, that of the end
    token, (batch, width), or (batch, projection). The defaults are those of ViT-L/14.

    Args:
        vocabulary_size: tokens are 0 ... vocabulary_size - 1.
        length: the number of tokens of a text.
        width: the width of a token.
        depth: the number of blocks.
        heads: the number of attention heads.
        hidden: the hidden width of the feed-forward layers.
        activation: "quick_gelu", for OpenAI's weights, or "gelu", for OpenCLIP's.
        projection: the width of the joint space of text and images, to which `vector` is projected, without a bias;
            None for no projection.
        end: the end token, at whose first position `vector` is taken; None for the largest token id, which in CLIP's
            own vocabulary is the end token.
        skip: the number of final blocks that `tokens` skip, Stable Diffusion's "clip skip"; `vector` uses all blocks.
        normalized: whether the final normalisation is applied to `tokens` too; not in Stable Diffusion XL.
        epsilon: of the normalisations.
        learned: (first, count) of tokens whose vectors are separate, trainable weights (set by `kdiff.inversion`).
        kwargs: `name` and `dtype`.
    """

    def __init__(
        self,
        vocabulary_size: int = 49408,
        length: int = 77,
        width: int = 768,
        depth: int = 12,
        heads: int = 12,
        hidden: int = 3072,
        activation: Any = "quick_gelu",
        projection: int | None = None,
        end: int | None = None,
        skip: int = 0,
        normalized: bool = True,
        epsilon: float = 1e-5,
        learned: Sequence[int] | None = None,
        **kwargs,
    ):
        check_integer("CLIPText", "length", length)
        check_integer("CLIPText", "hidden", hidden)
        norm = LayerNorm(epsilon)
        block = TransformerBlock(heads, None, ratio_of(hidden, width), activation, norm, pattern=Causal(), zero=False)
        super().__init__(width, depth, block, projection, skip, **kwargs)
        self.vocabulary_size = vocabulary_size
        self.length = length
        self.heads = heads
        self.hidden = hidden
        self.activation = activation
        self.end = end
        self.normalized = normalized
        self.epsilon = epsilon
        self.learned = None if learned is None else tuple(learned)
        self.table = self._part(Vocabulary(vocabulary_size, width, learned), "table")
        self.positions = self._part(LearnedEmbedding(), "positions")
        self.norm = self._part(norm, "norm")

    def build(self, input_shape):
        """Creates all weights, for tokens (batch, length)."""
        shape = self._shape(input_shape)
        build_layer(self.table, shape[:2])
        build_layer(self.positions, shape)
        self._build_blocks(shape)
        build_layer(self.norm, shape)

    def extend(self, rows: np.ndarray) -> None:
        """Adds tokens with these vectors, (count, width), at the end of the table."""
        self.table.extend(rows)
        self.vocabulary_size = self.table.size

    def learn(self, first: int, count: int) -> None:
        """Makes the vectors of `count` tokens from `first` on trainable, and nothing else in the encoder."""
        self.table.learn(first, count)
        self.learned = self.table.learned

    def keep(self, rows: np.ndarray) -> None:
        """Ends the training of these tokens, with the vectors `rows`, (count, width)."""
        self.table.keep(rows)
        self.learned = None

    def _shape(self, shape):
        """The shape of the embedded tokens."""
        if len(shape) != 2 or shape[1] not in (None, self.length):
            raise ValueError(
                f"CLIPText: tokens must have the shape (batch, {self.length}); received the shape: {tuple(shape)}"
            )
        return (shape[0], self.length, self.width)

    def call(self, tokens, padding_mask=None, training=None):
        """Maps integers (batch, length) to `Encoded`; `padding_mask`, (batch, length), is False for masked tokens."""
        self._shape(tokens.shape)
        x, last = self._run(self.positions(self.table(tokens)), padding_mask, training=training)
        normed = self.norm(last)
        at = ops.argmax(tokens if self.end is None else ops.cast(ops.equal(tokens, self.end), "int32"), axis=-1)
        vector = ops.take_along_axis(normed, at[:, None, None], axis=1)[:, 0]
        if self.normalized:
            x = self.norm(x) if self.skip else normed
        return Encoded(self._projected(vector), x)

    def compute_output_spec(self, tokens, padding_mask=None, training=None):
        """The specification of the output of `call`."""
        return self._spec(self._shape(tokens.shape), vector=True)


class CLIPVision(Encoder):
    """The image encoder of CLIP, a vision transformer: `blocks(norm([class, patches] + position))`.

    Dosovitskiy et al., "An Image is Worth 16x16 Words" (2021), equations 1 to 4; section 2.4 of the paper. It returns
    `Encoded`: `tokens`, (batch, 1 + patches, width), the first of which is the class token, and `vector`, which is
    `norm(tokens[:, 0])`, (batch, width), or (batch, projection). The defaults are those of ViT-L/14.

    Args:
        size: height and width of the images.
        patch: height and width of a patch, which must divide `size`.
        channels: of the images.
        width, depth, heads, hidden, activation, projection, skip, epsilon: as in `CLIPText`.
        kwargs: `name` and `dtype`.
    """

    def __init__(
        self,
        size: int = 224,
        patch: int = 14,
        channels: int = 3,
        width: int = 1024,
        depth: int = 24,
        heads: int = 16,
        hidden: int = 4096,
        activation: Any = "quick_gelu",
        projection: int | None = None,
        skip: int = 0,
        epsilon: float = 1e-5,
        **kwargs,
    ):
        for name, value in {"size": size, "patch": patch, "channels": channels, "hidden": hidden}.items():
            check_integer("CLIPVision", name, value)
        if size % patch:
            raise ValueError(f"CLIPVision: `patch` must divide the size of the image, {size}; received: {patch}")
        norm = LayerNorm(epsilon)
        block = TransformerBlock(heads, None, ratio_of(hidden, width), activation, norm, zero=False)
        super().__init__(width, depth, block, projection, skip, **kwargs)
        self.size = size
        self.patch = patch
        self.channels = channels
        self.heads = heads
        self.hidden = hidden
        self.activation = activation
        self.epsilon = epsilon
        self.patchify = self._part(Patchify(patch, width, bias=False), "patchify")
        self.positions = self._part(LearnedEmbedding(), "positions")
        self.first_norm = self._part(norm, "first_norm")
        self.norm = self._part(norm, "norm")

    def build(self, input_shape):
        """Creates all weights, for images (batch, size, size, channels)."""
        shape = self._shape(input_shape)
        build_layer(self.patchify, (shape[0], self.size, self.size, self.channels))
        self.first = self.add_weight(shape=(self.width,), initializer=Normal(0.02), name="first")
        for layer in (self.positions, self.first_norm, self.norm):
            build_layer(layer, shape)
        self._build_blocks(shape)

    def _shape(self, shape):
        """The shape of the tokens."""
        wanted = (self.size, self.size, self.channels)
        if len(shape) != 4 or any(a not in (None, b) for a, b in zip(shape[1:], wanted, strict=True)):
            raise ValueError(
                f"CLIPVision: images must have the shape (batch, {self.size}, {self.size}, {self.channels}); "
                f"received the shape: {tuple(shape)}"
            )
        return (shape[0], 1 + (self.size // self.patch) ** 2, self.width)

    def call(self, images, training=None):
        """Maps images (batch, size, size, channels), normalised by CLIP's mean and std, to `Encoded`."""
        tokens = self._shape(images.shape)[1]
        batch = ops.shape(images)[0]
        patches = self.patchify(ops.cast(images, self.compute_dtype))
        patches = ops.reshape(patches, (batch, tokens - 1, self.width))
        first = ops.broadcast_to(ops.cast(self.first, patches.dtype), (batch, 1, self.width))
        x = self.first_norm(self.positions(ops.concatenate([first, patches], axis=1)))
        x, last = self._run(x, training=training)
        return Encoded(self._projected(self.norm(last[:, 0])), x)

    def compute_output_spec(self, images, training=None):
        """The specification of the output of `call`."""
        return self._spec(self._shape(images.shape), vector=True)
