"""A picture as a condition instead of a text, encoded by CLIP's image encoder, frozen inside the network.

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
from kdiff.checks import check_examples
from kdiff.encoders.clip import CLIPVision
from kdiff.encoders.pixels import MEAN, STD, prepared

__all__ = ["PICTURE", "PicturePrompt"]

PICTURE = "picture"  # the input of the network, whatever the name of the condition


class PicturePrompt(Condition):
    """CLIP's vector of a picture as the only token of the context: the image variations of Stable Diffusion.

    `fit` and `sample` accept pictures as "picture", whatever the name of the condition: (height, width, channels) each,
    integers in 0 ... 255 or floats in [-1, 1], of any size; or vectors, as returned by `rows`. The shorter side of a
    picture is resized to the size of the encoder, and the picture is center-cropped and normalised.

    The null input is a vector of zeros. In training it replaces a picture with probability `dropout`.

    With a `layer` the vector is the input of that layer instead of a token. In the image variations of Stable unCLIP
    the vector is noised, at a level that may be given as "picture_level", with the noise "picture_noise":

        conditions={"picture": PicturePrompt(clip, layer=NoisedEmbedding(schedules.CosineBeta(1000)))}

    Args:
        encoder: a built `CLIPVision` with a `projection`. It is used directly, not copied, and frozen.
        mean, std: of pixels in [0, 1], per channel, with which the encoder was trained.
        dropout, seed: as in `Condition`.
        batch_size: the number of pictures that are encoded at once.
        layer: applied to the vector, (batch, width), such as a `Dense`, an `ImageEmbedding` or a `NoisedEmbedding`;
            zeros for no picture; it is trained. None for the token.

    Raises:
        TypeError: if the encoder is of another class.
        ValueError: if it has no projection, or `mean` and `std` do not match its channels.
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
                f"PicturePrompt: `mean` and `std` must be {encoder.channels} numbers, `std` positive; received: {mean} "
                f"and {std}"
            )
        encoder.freeze()

    input = PICTURE
    vector = 0  # in addition to the token

    @property
    def width(self) -> int:
        """The channels of the token."""
        return self.encoder.projection

    @property
    def row(self) -> tuple[int]:
        """The shape of the output of `rows` for one picture."""
        return (self.width,)

    def inputs_of(self, name: str) -> dict[str, Input]:
        """ "picture", and the further inputs of the layer."""
        beside = {} if self.layer is None else inputs_of(self.layer, PICTURE)
        return {**beside, PICTURE: Input(PICTURE, self)}

    def build(self, x_shape, embed_shape=None):
        """Builds the encoder, if needed, and the layer."""
        self._check_shape(_taken(x_shape))
        if self.layer is not None:
            build_layer(self.layer, self._for_layer(x_shape, tuple(_taken(x_shape))), embed_shape)
        build_layer(self.encoder, (None, self.encoder.size, self.encoder.size, self.encoder.channels))
        self.encoder.freeze()  # including the variables just created

    def _check_shape(self, shape):
        if tuple(shape)[1:] not in (self.row, (None,)):
            raise ValueError(
                f"PicturePrompt: pictures (height, width, {self.encoder.channels}), or vectors of size {self.width} "
                f"as returned by `rows`, are expected; received the shape: {tuple(shape)}"
            )

    # On the host

    @property
    def null(self) -> np.ndarray:
        """Zeros."""
        return np.zeros(self.row, "float32")

    def rows(self, pictures: Any) -> Any:
        """Encodes a picture, or a batch, as a vector, or vectors (count, width); vectors are unchanged.

        Raises:
            ValueError: if pictures are not integers in 0 ... 255 or floats in [-1, 1].
        """
        shape = tuple(pictures.shape)
        if len(shape) not in (3, 4) or shape[-1] != self.encoder.channels:
            return pictures
        if not self.encoder.built:
            raise ValueError("PicturePrompt: the encoder has no weights yet; build it, or the model")
        pictures = ops.convert_to_numpy(pictures)
        check_examples(pictures, 1.0, PICTURE)
        batch = pictures[None] if len(shape) == 3 else pictures
        size = min(self.batch_size, 2 ** (len(batch) - 1).bit_length())
        found = []
        for first in range(0, len(batch), size):  # the last is padded, as another size would be recompiled
            at = np.minimum(np.arange(first, first + size), len(batch) - 1)
            found.append(
                ops.convert_to_numpy(self._encode(prepared(batch[at], self.encoder.size, self.mean, self.std)))
            )
        vectors = np.concatenate(found)[: len(batch)]
        return vectors[0] if len(shape) == 3 else vectors

    @functools.cached_property
    def _encode(self):
        """The compiled encoder function."""

        def run(pixels):
            return ops.cast(self.encoder(pixels, training=False).vector, "float32")

        return backend.compiled(run, self.encoder)

    def check(self, values) -> None:
        """Raises a ValueError for rows of another shape."""
        self._check_shape(values.shape)

    # In the network

    def call(self, x, embed=None, context=None, training=None):
        """Maps rows, or a dictionary of rows and further inputs of the layer, to `Encoded`: tokens, (batch, 1, width),
        or the output of the layer.
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
        """The argument of the layer, from tensors or shapes."""
        key = inputs_of(self.layer, PICTURE)[PICTURE].key
        beside = {name: value for name, value in x.items() if name != PICTURE} if isinstance(x, dict) else {}
        return rows if key is None else {key: rows, **beside}

    def compute_output_spec(self, x, embed=None, context=None, training=None):
        """The specification of the output of `call`."""
        rows = keras.KerasTensor((_taken(x).shape[0], self.width), self.compute_dtype)
        if self.layer is None:
            return Encoded(tokens=keras.KerasTensor((rows.shape[0], 1, self.width), self.compute_dtype))
        width = None if embed is None else tuple(embed.shape)
        shapes = {name: tuple(one.shape) for name, one in x.items()} if isinstance(x, dict) else {}
        made = Encoded.of(output_shape(self.layer, self._for_layer(shapes, tuple(rows.shape)), width))
        return made.specified(self.compute_dtype)


def _taken(x):
    """The rows, also from a dictionary of inputs; or their shape, or symbolic tensor."""
    return x[PICTURE] if isinstance(x, dict) else x
