"""An image prompt: tokens of an image from a pretrained encoder, attended to in addition to the text.

    model.sample(4, text="a cat", image_prompt=image, guidance=7.5)

Ye et al., "IP-Adapter: Text Compatible Image Prompt Adapter for Text-to-Image Diffusion Models" (2023). As for a
`Prompt`, the input of the network is the output of the encoder, computed on the host before the first step.
"""

import functools
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from kdiff import backend
from kdiff.blocks.base import build_layer, copy_layer, output_shape
from kdiff.blocks.beside_context import DecoupledAttention
from kdiff.blocks.conditions import Condition, Encoded
from kdiff.encoders.clip import CLIPVision
from kdiff.encoders.pixels import prepared

__all__ = ["ImagePrompt"]


class ImagePrompt(Condition):
    """Tokens of an image, to which each attention to the context attends separately (`blocks.DecoupledAttention`).

    It must be the last condition of its network, which it modifies. `fit` and `sample` accept images, uint8 or in
    [-1, 1], of any size, (batch, height, width, 3) or a single one, or the output of `rows`. It is not trained.

    The null input is a vector of zeros or, for tokens, those of a black image after normalisation.

    Args:
        layer: the layer, or its name, from the vector, (batch, dim), or the tokens, (batch, tokens, dim), of the
            encoder to the tokens that are attended to.
        encoder: a built `CLIPVision`, used directly, not copied; None if its outputs are given instead of images.
        row: the shape of the output of the encoder for one image; None for that of `encoder`.
        of_tokens: whether the tokens of the encoder are used instead of its vector.
        dropout, seed: as in `Condition`.

    Raises:
        ValueError: if the shape of a row is unknown.
    """

    frozen = True

    def __init__(
        self,
        layer: Any,
        encoder: CLIPVision | None = None,
        row: Sequence[int] | None = None,
        of_tokens: bool = False,
        dropout: float = 0.0,
        seed: int = 0,
        **kwargs,
    ):
        super().__init__(dropout, seed, **kwargs)
        if encoder is None and row is None:
            raise ValueError("ImagePrompt: without an `encoder`, `row` must be given")
        self.layer = copy_layer(layer, name="layer", dtype=self.dtype_policy)
        self.encoder = encoder
        self.of_tokens = of_tokens
        self.row = tuple(row) if encoder is None else self._row_of(encoder)
        if encoder is not None:
            encoder.freeze()
        self._nothing: np.ndarray | None = None

    def _row_of(self, encoder):
        tokens = 1 + (encoder.size // encoder.patch) ** 2
        return (tokens, encoder.width) if self.of_tokens else (encoder.projection or encoder.width,)

    def build(self, x_shape, embed_shape=None):
        """Builds the layers, which are not trained."""
        build_layer(self.layer, (None, *self.row))
        if self.encoder is not None and not self.encoder.built:
            build_layer(self.encoder, (None, self.encoder.size, self.encoder.size, self.encoder.channels))
        self.trainable = True
        self.trainable = False
        for weight in self.weights:
            weight.averaged = weight.trainable = False

    def get_build_config(self):
        """The shape of a row."""
        return {"row": self.row} if self.built else None

    def build_from_config(self, config):
        """Builds a loaded layer."""
        self.build((None, *config["row"]))

    def attach(self, attentions: Sequence[keras.layers.Layer]) -> None:
        """Adds attention to the tokens to each `MultiHeadAttention` to the context."""
        _, count, width = self._tokens_shape()
        for one in attentions:
            beside = DecoupledAttention(*one.split, dtype=one.dtype_policy, name="image")
            beside.build((None, count, width))
            one.attend_beside(beside, count)

    def _tokens_shape(self):
        return output_shape(self.layer, (None, *self.row))

    # On the host

    @property
    def null(self) -> np.ndarray:
        """The null input."""
        if self._nothing is None:
            if self.of_tokens and self.encoder is not None:
                size = self.encoder.size
                self._nothing = self._given(np.zeros((1, size, size, self.encoder.channels), "float32"))[0]
            else:
                self._nothing = np.zeros(self.row, "float32")
        return self._nothing

    def rows(self, images: Any) -> np.ndarray:
        """Encodes images, uint8 or in [-1, 1], one row per image; encoded rows are unchanged."""
        images = images if isinstance(images, np.ndarray) else ops.convert_to_numpy(images)
        rank = len(self.row)
        if images.shape[-rank:] == self.row and images.ndim in (rank, rank + 1):
            return images
        if images.ndim not in (3, 4) or self.encoder is None or images.shape[-1] != self.encoder.channels:
            taken = "" if self.encoder is None else f"images (batch, height, width, {self.encoder.channels}), or "
            raise ValueError(
                f"ImagePrompt: {taken}rows of the shape {self.row} are expected; received the shape: {images.shape}"
            )
        several = images[None] if images.ndim == 3 else images
        if several.dtype.kind not in "iu" and np.abs(several).max() > 1.001:
            raise ValueError(f"ImagePrompt: images must be uint8 or in [-1, 1]; received: {np.abs(several).max()}")
        found = [self._given(prepared(several[i : i + 1], self.encoder.size)) for i in range(len(several))]
        return np.concatenate(found)[0] if images.ndim == 3 else np.concatenate(found)

    def _given(self, images):
        return ops.convert_to_numpy(self._encode(images))

    @functools.cached_property
    def _encode(self):
        def run(images):
            found = self.encoder(images, training=False)
            return ops.cast(found.tokens if self.of_tokens else found.vector, "float32")

        return backend.compiled(run, self.encoder)

    def check(self, values) -> None:
        """Raises a ValueError for rows that are not finite."""
        if not np.all(np.isfinite(values)):
            raise ValueError("ImagePrompt: the rows of images must be finite; received NaN or infinity")

    # In the network

    def encode(self, x, embed, training):
        """Maps rows to tokens."""
        return Encoded(tokens=self.layer(ops.cast(x, self.compute_dtype)))

    def compute_output_spec(self, x, embed=None, context=None, training=None):
        """The specification of the tokens."""
        _, count, width = self._tokens_shape()
        return Encoded(tokens=keras.KerasTensor((x.shape[0], count, width), self.compute_dtype))
