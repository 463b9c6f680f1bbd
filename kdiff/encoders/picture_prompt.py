"""A picture as a condition in place of a text, by CLIP's encoder of images, frozen inside of the network.

network = UNet.transformer(64, conditions={"picture": PicturePrompt(CLIPVision(projection=768))})
model.sample(4, picture=photo, guidance=3.0)
"""

import functools
from typing import Any

import keras
import numpy as np
from keras import ops

from kdiff import backend
from kdiff.base import check_integer
from kdiff.blocks.base import apply_layer, build_layer, get_layer, output_shape
from kdiff.blocks.conditions import Condition, Encoded, Input, inputs_of
from kdiff.encoders.clip import CLIPVision
from kdiff.encoders.pixels import MEAN, STD, prepared

__all__ = ["PICTURE", "PicturePrompt"]

PICTURE = "picture"  # the input of the network, whatever the condition's name


class PicturePrompt(Condition):
    """The vector of a picture by CLIP, as the one token of the context: Stable Diffusion's image variations.

    `fit` and `sample` take pictures as "picture", whatever the name of the condition: (height, width, channels) each,
    whole numbers in 0 ... 255 or floating-point ones in [-1, 1], of any size; or vectors, as `rows` makes them. A
    picture is brought to the encoder's size by its shorter side, cut to a square in the middle, and normalised.

    A vector of zeros stands for no picture. In training it takes the place of one with probability `dropout`.

    With a `layer` the vector goes through it in place of the context. Stable unCLIP's image variations have it noised,
    at a level that may be given as "picture_level", with the noise "picture_noise":

        conditions={"picture": PicturePrompt(clip, layer=NoisedEmbedding(schedules.CosineBeta(1000)))}

    Args:
        encoder: a built `CLIPVision` with a `projection`. It is used as it is, not copied, and frozen.
        mean, std: of pixels in [0, 1], by channel, that the encoder was trained with.
        dropout, seed: as in `Condition`.
        batch_size: how many are encoded at once.
        layer: of the vector, (batch, width), such as a `Dense`, an `ImageEmbedding` or a `NoisedEmbedding`, which see
            zeros for none; it is trained. None for the one token.

    Raises:
        TypeError: if the encoder is another.
        ValueError: if it has no projection, or `mean` and `std` are not of its channels.
    """

    def __init__(
        self,
        encoder: CLIPVision,
        mean: Any = MEAN,
        std: Any = STD,
        dropout: float = 0.0,
        seed: int = 0,
        batch_size: int = 16,
        layer: Any = None,
        **kwargs,
    ):
        super().__init__(dropout, seed, **kwargs)
        check_integer("PicturePrompt", "batch_size", batch_size)
        if not isinstance(encoder, CLIPVision):
            raise TypeError(f"PicturePrompt: `encoder` must be a CLIPVision; received: {encoder!r}")
        if encoder.projection is None:
            raise ValueError("PicturePrompt: the encoder must have a `projection`")
        self.encoder, self.batch_size = encoder, batch_size
        self.layer = None if layer is None else get_layer(layer)
        self.mean, self.std = (tuple(float(one) for one in values) for values in (mean, std))
        if not len(self.mean) == len(self.std) == encoder.channels or min(self.std) <= 0:
            raise ValueError(
                f"PicturePrompt: `mean` and `std` must be {encoder.channels} numbers, `std` above 0; received: {mean} "
                f"and {std}"
            )
        encoder.freeze()

    input = PICTURE
    vector = 0  # beside the token

    @property
    def width(self) -> int:
        """Channels of the token."""
        return self.encoder.projection

    @property
    def row(self) -> tuple[int]:
        """The shape of what `rows` makes of one picture."""
        return (self.width,)

    def inputs_of(self, name: str) -> dict[str, Input]:
        """One, "picture", and those that the layer has beside it."""
        beside = {} if self.layer is None else inputs_of(self.layer, PICTURE)
        return {**beside, PICTURE: Input(PICTURE, self)}

    def build(self, x_shape, embed_shape=None):
        """Builds the encoder if it is not, and the layer."""
        self._check_shape(_taken(x_shape))
        if self.layer is not None:
            build_layer(self.layer, self._for_layer(x_shape, tuple(_taken(x_shape))), embed_shape)
        build_layer(self.encoder, (None, self.encoder.size, self.encoder.size, self.encoder.channels))
        self.encoder.freeze()  # with the variables that it has now

    def _check_shape(self, shape):
        if tuple(shape)[1:] not in (self.row, (None,)):
            raise ValueError(
                f"PicturePrompt: pictures (height, width, {self.encoder.channels}), or vectors of {self.width} numbers "
                f"as `rows` makes them, are expected; received the shape: {tuple(shape)}"
            )

    # On the host

    @property
    def null(self) -> np.ndarray:
        """Zeros."""
        return np.zeros(self.row, "float32")

    def rows(self, pictures: Any) -> Any:
        """Pictures, one or a batch, to vectors, (count, width), or one; vectors are left as they are."""
        shape = tuple(pictures.shape)
        if len(shape) not in (3, 4) or shape[-1] != self.encoder.channels:
            return pictures
        if not self.encoder.built:
            raise ValueError("PicturePrompt: the encoder has no weights yet; build it, or the model")
        pictures = ops.convert_to_numpy(pictures)
        batch = pictures[None] if len(shape) == 3 else pictures
        size = min(self.batch_size, 2 ** (len(batch) - 1).bit_length())
        found = []
        for first in range(0, len(batch), size):  # the last is filled up: another size would be compiled again
            at = np.minimum(np.arange(first, first + size), len(batch) - 1)
            found.append(
                ops.convert_to_numpy(self._encode(prepared(batch[at], self.encoder.size, self.mean, self.std)))
            )
        vectors = np.concatenate(found)[: len(batch)]
        return vectors[0] if len(shape) == 3 else vectors

    @functools.cached_property
    def _encode(self):
        """The compiled encoder."""

        def run(pixels):
            return ops.cast(self.encoder(pixels, training=False).vector, "float32")

        return backend.compiled(run, self.encoder)

    def check(self, values) -> None:
        """Raises a ValueError for rows of another shape."""
        self._check_shape(values.shape)

    # In the network

    def call(self, x, embed=None, context=None, training=None):
        """Rows, or a dictionary of them and what the layer has beside them, to `Encoded`: tokens, (batch, 1, width), or
        what the layer gives.
        """
        rows = _taken(x)
        if training and self.dropout > 0:
            rows = self._dropped(rows, self._next())
        self._check_shape(rows.shape)
        rows = ops.cast(rows, self.compute_dtype)
        if self.layer is None:
            return Encoded(tokens=rows[:, None])
        return Encoded.of(apply_layer(self.layer, self._for_layer(x, rows), embed, training=training))

    def _for_layer(self, x, rows):
        """What the layer is called with, of tensors or shapes."""
        key = inputs_of(self.layer, PICTURE)[PICTURE].key
        beside = {name: value for name, value in x.items() if name != PICTURE} if isinstance(x, dict) else {}
        return rows if key is None else {key: rows, **beside}

    def compute_output_spec(self, x, embed=None, context=None, training=None):
        """The specification of what `call` gives."""
        rows = keras.KerasTensor((_taken(x).shape[0], self.width), self.compute_dtype)
        if self.layer is None:
            return Encoded(tokens=keras.KerasTensor((rows.shape[0], 1, self.width), self.compute_dtype))
        width = None if embed is None else tuple(embed.shape)
        shapes = {name: tuple(one.shape) for name, one in x.items()} if isinstance(x, dict) else {}
        made = Encoded.of(output_shape(self.layer, self._for_layer(shapes, tuple(rows.shape)), width))
        return made.specified(self.compute_dtype)


def _taken(x):
    """The rows, of a dictionary of inputs too; or their shape, or symbol."""
    return x[PICTURE] if isinstance(x, dict) else x
