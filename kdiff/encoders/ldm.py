"""The text encoder that was trained jointly with the first latent diffusion models, of BERT's size.

encoder = LDMText()                        # of text-to-image LDM, 1.45 B parameters with its network
text = encoder(tokens)                     # (batch, 77) integers
text.tokens                                # (batch, 77, 1280)
"""

from typing import Any

from kdiff.base import check_integer
from kdiff.blocks.base import build_layer
from kdiff.blocks.conditions import Encoded
from kdiff.blocks.lookup import LearnedEmbedding
from kdiff.blocks.normalization import LayerNorm
from kdiff.blocks.transformer import TransformerBlock
from kdiff.encoders.base import Encoder, ratio_of

__all__ = ["LDMText"]


class LDMText(Encoder):
    """The text encoder of latent diffusion: `norm(blocks(table[token] + position))`, with bidirectional attention.

    Rombach et al., "High-Resolution Image Synthesis with Latent Diffusion Models" (2022), section 4.3.1 and table 17.
    It returns `Encoded` with `tokens`, (batch, length, width), and the `mask` of the call. Queries, keys and values
    have no bias. The defaults are those of the paper.

    Args:
        vocabulary_size: tokens are 0 ... vocabulary_size - 1.
        length: the number of tokens of a text.
        width: the width of a token.
        depth: the number of blocks.
        heads: the number of attention heads.
        head_width: the channels per head.
        hidden: the hidden width of the feed-forward layers.
        activation: of the feed-forward layers.
        epsilon: of the normalisations.
        kwargs: `name` and `dtype`.
    """

    def __init__(
        self,
        vocabulary_size: int = 30522,
        length: int = 77,
        width: int = 1280,
        depth: int = 32,
        heads: int = 8,
        head_width: int = 64,
        hidden: int = 5120,
        activation: Any = "gelu",
        epsilon: float = 1e-5,
        **kwargs,
    ):
        check_integer("LDMText", "length", length)
        check_integer("LDMText", "hidden", hidden)
        norm = LayerNorm(epsilon)
        block = TransformerBlock(heads, head_width, ratio_of(hidden, width), activation, norm, bias=False, zero=False)
        super().__init__(width, depth, block, **kwargs)
        self.vocabulary_size = vocabulary_size
        self.length = length
        self.heads = heads
        self.head_width = head_width
        self.hidden = hidden
        self.activation = activation
        self.epsilon = epsilon
        self.table = self._part(LearnedEmbedding(vocabulary_size, width), "table")
        self.positions = self._part(LearnedEmbedding(), "positions")
        self.norm = self._part(norm, "norm")

    def build(self, input_shape):
        """Creates all weights, for tokens (batch, length)."""
        shape = self._shape(input_shape)
        build_layer(self.table, shape[:2])
        build_layer(self.positions, shape)
        self._build_blocks(shape)
        build_layer(self.norm, shape)

    def _shape(self, shape):
        """The shape of the embedded tokens."""
        if len(shape) != 2 or shape[1] not in (None, self.length):
            raise ValueError(
                f"LDMText: tokens must have the shape (batch, {self.length}); received the shape: {tuple(shape)}"
            )
        return (shape[0], self.length, self.width)

    def call(self, tokens, padding_mask=None, training=None):
        """Maps integers (batch, length) to `Encoded`; `padding_mask`, (batch, length), is False for masked tokens."""
        self._shape(tokens.shape)
        x, _ = self._run(self.positions(self.table(tokens)), padding_mask, training=training)
        return Encoded(tokens=self.norm(x), mask=padding_mask)

    def compute_output_spec(self, tokens, padding_mask=None, training=None):
        """The specification of the output of `call`."""
        return self._spec(self._shape(tokens.shape), vector=False, mask=padding_mask)
