"""The multimodal diffusion transformer: separate weights for image and text tokens, and joint attention."""

from collections.abc import Mapping, Sequence
from typing import Any

import keras

from kdiff import reuse
from kdiff.blocks.attention import opened, usual_heads
from kdiff.blocks.base import Tokens, build_layer
from kdiff.blocks.joint import JointBlock
from kdiff.blocks.layers import Dense
from kdiff.blocks.transformer import adaptive_block
from kdiff.networks.dit import DiT

__all__ = ["MMDiT"]


class MMDiT(DiT):
    """MM-DiT: a `DiT` whose blocks update image and text, as in Stable Diffusion 3 and 3.5.

        network({"image": (batch, height, width, channels), "time": (batch,), **conditions})
            -> (batch, height, width, out_channels), float32

    Esser et al., "Scaling Rectified Flow Transformers for High-Resolution Image Synthesis" (2024), section 4: the
    tokens of the conditions, the `context`, are projected to `width` and pass with the patches through `depth` blocks
    of `JointBlock`, the last of which returns no text. Vectors of conditions are added to the time embedding.

        MMDiT(384, 6, conditions={"text": TextEncoder(kdiff.text.Bytes(80), dropout=0.1)})
        published.stable_diffusion_3()                      # 2.03 G parameters

    Args:
        width: the channels of a token.
        depth: the number of blocks.
        patch: the height and width of a patch, which must divide those of the image.
        block: a template of the `TransformerBlock` of image and of text, in every block; None for `adaptive_block`,
            with the largest number of heads of at least 64 channels.
        dual: the indices of the blocks in which the image has a second attention, to itself alone, as in Stable
            Diffusion 3.5 medium.
        positions: a layer that adds positions to the patches, such as `PositionTable(192)`; None for none.
        embedding, conditions, normalization, out_channels, remat, seed: as in `DiT`. At least one of the conditions
            must return tokens.
        kwargs: `name` and `dtype`.

    Raises:
        ValueError: as in `DiT`; if no condition returns tokens; if an index in `dual` is out of range.
    """

    def __init__(
        self,
        width: int = 384,
        depth: int = 12,
        patch: int = 2,
        block: Any = None,
        dual: Sequence[int] = (),
        positions: Any = "sin_cos_2d",
        embedding: keras.layers.Layer | None = None,
        conditions: Mapping[str, keras.layers.Layer] | None = None,
        normalization: Any = None,
        out_channels: int | None = None,
        remat: bool = False,
        seed: int = 0,
        **kwargs,
    ):
        block = adaptive_block(usual_heads(width)) if block is None else block
        self._dual = {int(number) for number in dual}
        rest = (positions, embedding, conditions, normalization, out_channels, remat, seed)
        super().__init__(width, depth, patch, block, *rest, **kwargs)
        self.dual = sorted(self._dual)
        if not self._dual <= set(range(depth)):
            raise ValueError(f"MMDiT: `dual` must be indices of blocks in 0..{depth - 1}; received: {list(dual)}")
        self.projection = Dense(width, dtype=self.dtype_policy, name="projection")

    def _turns(self):
        one = {"block": self.block, "dtype": self.dtype_policy}
        return [JointBlock(dual=i in self._dual, last=i == self.depth - 1, **one) for i in range(self.depth)]

    def _build_blocks(self, x, embed_shape, context_shape):
        tokens, mask = opened(context_shape)
        if tokens is None:
            raise ValueError(
                f"{self.name}: a condition must return tokens, (batch, tokens, dim), as `TextEncoder` does; "
                f"`conditions` are: {self.conditions}"
            )
        tokens = build_layer(self.projection, tokens)
        for block in self.blocks:
            build_layer(block, x, embed_shape, tokens if mask is None else Tokens(tokens, mask))

    def _through(self, x, vectors, context, training):
        tokens, mask = opened(context)
        pairs = list(zip(self.blocks, vectors, strict=True))
        count = min(reuse.shallow_blocks(), len(pairs) // 2)

        def through(both, pairs):
            x, tokens = both
            for block, embed in pairs:
                context = tokens if mask is None else Tokens(tokens, mask)
                x, context = self._run(block, x, embed, context, training)
                tokens = opened(context)[0]
            return x, tokens

        both = through((x, self.projection(tokens)), pairs[:count])
        if count:  # else the one block returns no text
            middle = pairs[count : len(pairs) - count]
            both = reuse.residual(self, both, lambda: through(both, middle))
        return through(both, pairs[len(pairs) - count :] if count else pairs)[0]
