"""The text condition of Stable Diffusion 3: the tokens of CLIP's two encoders, followed by those of T5."""

from collections.abc import Sequence
from typing import Any

from keras import ops

from kdiff.base import check_integer
from kdiff.encoders.base import Encoder
from kdiff.encoders.prompt import Prompt
from kdiff.encoders.t5 import T5Text
from kdiff.text import Tokenizer

__all__ = ["JointPrompt"]


class JointPrompt(Prompt):
    """A `Prompt` of two concatenated groups of tokens:

        [ [CLIP_1, CLIP_2, zeros] ; [T5, zeros] ],   each (length of the group, width)

    Esser et al., "Scaling Rectified Flow Transformers for High-Resolution Image Synthesis" (2024), section 4. The
    channels of the CLIP encoders are concatenated and padded with zeros to `width`. Without T5 its tokens are zeros, as
    in diffusers: the published networks were trained with both. Nothing is masked.

    Args:
        encoders: one or more `CLIPText`, optionally followed by a `T5Text`.
        tokenizers: one for each encoder; those of CLIP with one length.
        width: the channels of a token in the network.
        following: the tokens after those of CLIP, the length of T5's tokenizer.
        zeros, dropout, seed, batch_size: as in `Prompt`.

    Raises:
        ValueError: as in `Prompt`; if T5 is not the last, or the only encoder; if tokens are wider than `width`.
    """

    def __init__(
        self,
        encoders: Sequence[Encoder],
        tokenizers: Sequence[Tokenizer],
        width: int = 4096,
        following: int = 256,
        zeros: bool = False,
        dropout: float = 0.0,
        seed: int = 0,
        batch_size: int = 16,
        **kwargs,
    ):
        check_integer("JointPrompt", "width", width)
        check_integer("JointPrompt", "following", following)
        self._width = width
        self._following = following
        super().__init__(encoders, tokenizers, False, zeros, dropout, seed, batch_size, **kwargs)
        self.following = following

    @property
    def width(self) -> int:
        """The channels of a token."""
        return self._width

    @property
    def length(self) -> int:
        """The number of tokens per text, of both groups."""
        return self.tokenizers[0].length + self._following

    def _check_lengths(self):
        """Checks the lengths within each group."""
        after = [isinstance(encoder, T5Text) for encoder in self.encoders]
        if after[0] or any(after[:-1]):
            kinds = [type(encoder).__name__ for encoder in self.encoders]
            raise ValueError(
                f"JointPrompt: `encoders` must be CLIPText, optionally followed by T5Text; received: {kinds}"
            )
        count = len(after) - after[-1]
        groups = {self.tokenizers[0].length: range(count)} | ({self._following: [-1]} if after[-1] else {})
        for length, group in groups.items():
            for i in group:
                self._check_length(i, length)
        wide = max(sum(encoder.width for encoder in self.encoders[:count]), self.encoders[-1].width)
        if wide > self._width:
            raise ValueError(
                f"JointPrompt: `width` must be at least that of the tokens, {wide}; received: {self._width}"
            )

    def _check_length(self, i, length):
        lengths = {self.tokenizers[i].length, getattr(self.encoders[i], "length", length)}
        if lengths != {length}:
            raise ValueError(
                f"JointPrompt: texts for {type(self.encoders[i]).__name__} must have {length} tokens; tokenizer and "
                f"encoder have {sorted(lengths)}"
            )

    def _tokens_of(self, found: list[Any]) -> Any:
        """Both groups, padded with zeros."""
        last = isinstance(self.encoders[-1], T5Text)
        first = ops.concatenate([ops.cast(one.tokens, "float32") for one in found[: len(found) - last]], axis=-1)
        groups = [self._filled(first)]
        if last:
            groups.append(self._filled(ops.cast(found[-1].tokens, "float32")))
        rows = ops.concatenate(groups, axis=1)
        return rows if last else ops.pad(rows, [[0, 0], [0, self._following], [0, 0]])

    def _filled(self, x):
        return ops.pad(x, [[0, 0], [0, 0], [0, self._width - x.shape[-1]]])
