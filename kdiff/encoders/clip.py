"""CLIP's two encoders (Radford et al., "Learning Transferable Visual Models From Natural Language Supervision", 2021).

encoder = CLIPText()                       # of ViT-L/14, which Stable Diffusion 1 has
text = encoder(tokens)                     # (batch, 77) whole numbers
text.tokens, text.vector                   # (batch, 77, 768), (batch, 768)
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from keras import ops

from kdiff.base import check_integer
from kdiff.blocks.base import build_layer
from kdiff.blocks.conditions import Encoded
from kdiff.blocks.embeddings import LearnedEmbedding
from kdiff.blocks.initializers import Normal
from kdiff.blocks.normalization import LayerNorm
from kdiff.blocks.patches import Patchify
from kdiff.blocks.patterns import Causal
from kdiff.blocks.transformer import TransformerBlock
from kdiff.encoders.base import Encoder, ratio_of
from kdiff.encoders.vocabulary import Vocabulary

__all__ = ["CLIPText", "CLIPVision"]


class CLIPText(Encoder):
    """CLIP's encoder of text: `norm(blocks(table[token] + position))`, in which no token sees those after it.

    Section 2.4 of the paper. It gives `Encoded`: `tokens`, (batch, length, width), and `vector`, that of the token
    which ends the text, (batch, width), or (batch, projection). The defaults are those of ViT-L/14.

    Args:
        vocabulary_size: tokens are 0 ... vocabulary_size - 1.
        length: the number of tokens of a text.
        width: of a token.
        depth: the number of blocks.
        heads: of the attention.
        hidden: the hidden width of the feed-forward layers.
        activation: "quick_gelu", of OpenAI's weights, or "gelu", of OpenCLIP's.
        projection: the width of the space that text shares with images, to which `vector` is projected, without a bias;
            None for no projection.
        end: the token whose first place `vector` is of; None for the place of the largest token. With CLIP's own
            vocabulary, where the end is the largest, they are the same.
        skip: how many of the last blocks `tokens` leave out; `vector` is always of all. Stable Diffusion's "clip skip".
        normalized: whether `tokens` go through the last normalisation, as `vector` does; not in Stable Diffusion XL.
        epsilon: of the normalisations.
        learned: (first, count) of tokens whose vectors are weights of their own, as while `kdiff.inversion` teaches
            them.
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
        """Makes all weights, for tokens (batch, length)."""
        shape = self._shape(input_shape)
        build_layer(self.table, shape[:2])
        build_layer(self.positions, shape)
        self._build_blocks(shape)
        build_layer(self.norm, shape)

    def extend(self, rows: np.ndarray) -> None:
        """Adds tokens, whose vectors, (count, width), stand after those of the table."""
        self.table.extend(rows)
        self.vocabulary_size = self.table.size

    def learn(self, first: int, count: int) -> None:
        """Lets the vectors of `count` tokens from `first` on learn, and nothing else of the encoder."""
        self.table.learn(first, count)
        self.learned = self.table.learned

    def keep(self, rows: np.ndarray) -> None:
        """Ends that, with these vectors, (count, width), of the tokens."""
        self.table.keep(rows)
        self.learned = None

    def _shape(self, shape):
        """Of the tokens' embeddings."""
        if len(shape) != 2 or shape[1] not in (None, self.length):
            raise ValueError(
                f"CLIPText: tokens must have the shape (batch, {self.length}); received the shape: {tuple(shape)}"
            )
        return (shape[0], self.length, self.width)

    def call(self, tokens, padding_mask=None, training=None):
        """Whole numbers (batch, length) to `Encoded`; `padding_mask`, (batch, length), is False where one is hidden."""
        self._shape(tokens.shape)
        x, last = self._run(self.positions(self.table(tokens)), padding_mask, training=training)
        normed = self.norm(last)
        at = ops.argmax(tokens if self.end is None else ops.cast(ops.equal(tokens, self.end), "int32"), axis=-1)
        vector = ops.take_along_axis(normed, at[:, None, None], axis=1)[:, 0]
        if self.normalized:
            x = self.norm(x) if self.skip else normed
        return Encoded(self._projected(vector), x)

    def compute_output_spec(self, tokens, padding_mask=None, training=None):
        """The specification of what `call` gives."""
        return self._spec(self._shape(tokens.shape), vector=True)


class CLIPVision(Encoder):
    """CLIP's encoder of images, a vision transformer: `blocks(norm([class, patches] + position))`.

    Dosovitskiy et al., "An Image is Worth 16x16 Words" (2021), equations 1 to 4; section 2.4 of the paper. It gives
    `Encoded`: `tokens`, (batch, 1 + patches, width), the first of which is the class's, and `vector`, which is
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
        """Makes all weights, for images (batch, size, size, channels)."""
        shape = self._shape(input_shape)
        build_layer(self.patchify, (shape[0], self.size, self.size, self.channels))
        self.first = self.add_weight(shape=(self.width,), initializer=Normal(0.02), name="first")
        for layer in (self.positions, self.first_norm, self.norm):
            build_layer(layer, shape)
        self._build_blocks(shape)

    def _shape(self, shape):
        """Of the tokens."""
        wanted = (self.size, self.size, self.channels)
        if len(shape) != 4 or any(a not in (None, b) for a, b in zip(shape[1:], wanted, strict=True)):
            raise ValueError(
                f"CLIPVision: images must have the shape (batch, {self.size}, {self.size}, {self.channels}); "
                f"received the shape: {tuple(shape)}"
            )
        return (shape[0], 1 + (self.size // self.patch) ** 2, self.width)

    def call(self, images, training=None):
        """Images (batch, size, size, channels), normalised by CLIP's mean and deviation, to `Encoded`."""
        tokens = self._shape(images.shape)[1]
        batch = ops.shape(images)[0]
        patches = self.patchify(ops.cast(images, self.compute_dtype))
        patches = ops.reshape(patches, (batch, tokens - 1, self.width))
        first = ops.broadcast_to(ops.cast(self.first, patches.dtype), (batch, 1, self.width))
        x = self.first_norm(self.positions(ops.concatenate([first, patches], axis=1)))
        x, last = self._run(x, training=training)
        return Encoded(self._projected(self.norm(last[:, 0])), x)

    def compute_output_spec(self, images, training=None):
        """The specification of what `call` gives."""
        return self._spec(self._shape(images.shape), vector=True)
