"""The pretrained encoders of CLIP as embeddings of images and texts for `kdiff.UnCLIP`."""

from typing import Any

import keras
import numpy as np

from kdiff.blocks.base import ConfigurableLayer, build_layer
from kdiff.encoders.picture_prompt import PICTURE, PicturePrompt
from kdiff.encoders.prompt import INPUT, Prompt

__all__ = ["Pair"]


class Pair(ConfigurableLayer, keras.layers.Layer):
    """Embeddings of images and texts in a joint space, not normalised to length 1.

        clip = Pair(PicturePrompt(vision), Prompt(text, tokenizer))
        clip.embed_image(images) @ clip.embed_text(["a cat"]).T

    Args:
        picture: a `PicturePrompt` with the image encoder; None if images are not embedded.
        text: a `Prompt` of one encoder with a `projection`; None if texts are not embedded.
        kwargs: `name` and `dtype`.

    Raises:
        ValueError: if the widths of the vectors differ, or the text encoder has none.
    """

    def __init__(self, picture: PicturePrompt | None = None, text: Prompt | None = None, **kwargs):
        super().__init__(autocast=False, **kwargs)
        widths = [part.width if part is picture else part.vector for part in (picture, text) if part is not None]
        if not widths or not all(widths) or len(set(widths)) > 1:
            raise ValueError(
                f"Pair: both encoders must return vectors of one width; received: {picture!r} and {text!r}"
            )
        self.picture, self.text = picture, text
        for part, name in ((picture, PICTURE), (text, INPUT)):
            if part is not None:
                build_layer(part, {name: (None, *part.row)})
        self.built = True

    def embed_image(self, images: Any, batch_size: int = 64) -> np.ndarray:
        """Maps images (count, height, width, channels), of any size, uint8 or in [-1, 1], to (count, width)."""
        if self.picture is None:
            raise ValueError("Pair: there is no image encoder")
        return self.picture.rows(np.asarray(images))

    def embed_text(self, texts: Any, batch_size: int = 64) -> np.ndarray:
        """Maps strings to (count, width)."""
        if self.text is None:
            raise ValueError("Pair: there is no text encoder")
        return self.text.prepare([texts] if isinstance(texts, str) else texts)[:, -1, : self.text.vector]
