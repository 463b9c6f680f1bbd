"""Latents: images encoded by an autoencoder, scaled to unit variance, with tiling for large images."""

import math
from collections.abc import Callable, Iterable
from typing import Any, Self

import keras
import numpy as np
from keras import ops, tree

from kdiff import backend, random
from kdiff.base import check_integer
from kdiff.checks import check_examples
from kdiff.codecs.base import Codec, Shape, to_unit

__all__ = ["OVERLAP", "Latent", "tiled"]

OVERLAP = 4  # the overlap of neighbouring tiles is 1 / OVERLAP of their side


class Latent(Codec):
    """The latents of an autoencoder, shifted and scaled to unit variance:

        x = (latent - shift) scale,    latent = mean + exp(log_variance / 2) noise
        images = decode(x / scale + shift)

    Rombach et al., "High-Resolution Image Synthesis with Latent Diffusion Models" (2022), section 3.3 and appendix G.
    Latents are sampled in training; editing uses their mean. The autoencoder is not trained.

        codec = Latent(AutoencoderKL.sd(), 0.18215)
        codec = Latent.fitted(autoencoder, images)

    | | scale | shift |
    |---|---|---|
    | Stable Diffusion 1 and 2 | 0.18215 | 0 |
    | Stable Diffusion XL | 0.13025 | 0 |
    | Stable Diffusion 3 | 1.5305 | 0.0609 |
    | Flux | 0.3611 | 0.1159 |

    Args:
        autoencoder: of `kdiff.networks`, or a Keras layer with `encode(images) -> (mean, log_variance or None)`,
            `decode(latents)` and `latent_shape(shape)`.
        scale, shift: numbers, or one per channel.
        tiles: the side in pixels of the squares in which larger images are encoded and decoded, one after the other;
            None for all at once. Neighbours overlap by a quarter and are blended. Tiled results differ slightly, as
            norms and attention see less of the image.
        batch_size: the number of images decoded at once.
        upcast: whether the autoencoder computes in float32 whatever its precision; that of Stable Diffusion XL
            overflows in float16.
        saved: whether its weights are saved with the model.

    Raises:
        TypeError: if `autoencoder` is not an autoencoder.
        ValueError: if a number is not finite, `scale` is 0, or `tiles` not a multiple of four latents.
    """

    limit = 1.0

    def __init__(
        self,
        autoencoder: keras.layers.Layer,
        scale: Any = 1.0,
        shift: Any = 0.0,
        *,
        tiles: int | None = None,
        batch_size: int | None = 8,
        upcast: bool = False,
        saved: bool = True,
    ):
        super().__init__()
        wanted = ("encode", "decode", "latent_shape")
        if not isinstance(autoencoder, keras.layers.Layer) or not all(hasattr(autoencoder, name) for name in wanted):
            raise TypeError(f"Latent: a Keras layer with {list(wanted)} is expected; received: {autoencoder!r}")
        if batch_size is not None:
            check_integer("Latent", "batch_size", batch_size)
        self.autoencoder = autoencoder
        self.scale, self.shift = _numbers("scale", scale), _numbers("shift", shift)
        if np.any(np.asarray(self.scale) == 0):
            raise ValueError(f"Latent: `scale` must not be 0; received: {scale!r}")
        self.tiles = tiles
        self.batch_size = batch_size
        self.upcast = upcast
        self.saved = saved
        if tiles is not None:
            check_integer("Latent", "tiles", tiles)
            if tiles % (OVERLAP * self.factor):
                raise ValueError(
                    f"Latent: `tiles` must be a multiple of {OVERLAP * self.factor} pixels, for {OVERLAP} latents; "
                    f"received: {tiles}"
                )
        if upcast:
            _upcast(autoencoder)

    @classmethod
    def fitted(
        cls, autoencoder: keras.layers.Layer, examples: Any, *, per_channel: bool = False, batches: int = 32, **options
    ) -> Self:
        """A codec with the scale 1 / std of the latents of these examples (Rombach et al., appendix G).

        Args:
            autoencoder: a trained autoencoder.
            examples: a batch of images; or an iterable of batches, such as a `tf.data.Dataset`, of which each is
                images, (images, ...) or {"image": images, ...}.
            per_channel: whether each channel has its own shift, its mean, and scale.
            batches: the number of batches to use.
            options: other arguments of the codec.
        """
        plain = cls(autoencoder, **options)
        plain.freeze()
        moments = backend.without_gradients(plain.moments)
        count, total, squares = 0, 0.0, 0.0
        for _, images in zip(range(batches), _batches(examples), strict=False):
            check_examples(images, cls.limit)
            mean, std = (None if one is None else _float64(one) for one in moments(ops.convert_to_tensor(images)))
            axes = tuple(range(mean.ndim - 1))
            count += math.prod(mean.shape[:-1])
            total = total + mean.sum(axes)
            squares = squares + (mean**2 + (0.0 if std is None else std**2)).sum(axes)
        if not count:
            raise ValueError("Latent: fitting a scale needs examples; received none")
        mean, square = total / count, squares / count
        if per_channel:
            scale, shift = 1.0 / np.sqrt(np.maximum(square - mean**2, 1e-12)), mean
        else:
            scale, shift = 1.0 / np.sqrt(max(square.mean() - mean.mean() ** 2, 1e-12)), 0.0
        return cls(autoencoder, scale, shift, **options)

    @property
    def factor(self) -> int:
        """The number of pixels per latent along each axis."""
        return int(getattr(self.autoencoder, "factor", 1))

    def build(self, shape):
        """Builds the autoencoder, if needed."""
        if not self.autoencoder.built:
            self.autoencoder.build(None)

    def moments(self, examples) -> tuple[Any, Any]:
        """(mean, std) of the encoded data; the second is None for deterministic latents."""
        mean, log_variance = self._by_tiles(self._encode_whole, to_unit(examples), self.tiles, 1, self.factor)
        scale, shift = self._constants()
        std = None if log_variance is None else ops.exp(0.5 * log_variance) * ops.abs(scale)
        return (ops.cast(mean, "float32") - shift) * scale, std

    def encode(self, examples, key: Any = None):
        mean, std = self.moments(examples)
        return mean if key is None or std is None else mean + std * random.normal(key, ops.shape(mean))

    def decode(self, x):
        scale, shift = self._constants()
        latents = ops.cast(x, "float32") / scale + shift
        tile = self.tiles and self.tiles // self.factor
        images = self._by_tiles(lambda part: self.autoencoder.decode(part, training=False), latents, tile, self.factor)
        return ops.clip(ops.cast(images, "float32"), -1.0, 1.0)

    def data_shape(self, shape: Shape) -> Shape:
        return tuple(self.autoencoder.latent_shape(tuple(shape)))

    def _encode_whole(self, images):
        mean, log_variance = self.autoencoder.encode(images, training=False)
        return (mean,) if log_variance is None else (mean, log_variance)

    def _by_tiles(self, function, x, tile, grow=1, shrink=1):
        """`function`, of images or latents, by tiles if these are larger and have two known sizes."""
        large = tile is not None and len(x.shape) == 4 and None not in x.shape[1:3] and max(x.shape[1:3]) > tile
        y = tiled(function, x, tile, tile * grow // shrink) if large else function(x)
        return (*y, None)[:2] if isinstance(y, tuple) else y

    def _constants(self):
        return (ops.convert_to_tensor(np.asarray(value, "float32")) for value in (self.scale, self.shift))


def tiled(function: Callable, x: Any, tile: int, out_tile: int) -> Any:
    """`function` of a map by overlapping squares, row by row, each blended with those above and to the left.

    Args:
        function: of maps (batch, height, width, channels) to maps `out_tile / tile` times as large, or tuples of them.
        x: the map.
        tile: the side of a square.
        out_tile: the side of its output.
    """
    step, blend = tile - tile // OVERLAP, out_tile // OVERLAP
    kept = out_tile - blend
    above, rows = None, []
    for top in range(0, x.shape[1], step):
        row = []
        for left in range(0, x.shape[2], step):
            part = function(x[:, top : top + tile, left : left + tile])
            part = part if above is None else _faded(above[len(row)], part, blend, 1)
            row.append(_faded(row[-1], part, blend, 2) if row else part)
        crops = [tree.map_structure(lambda map: map[:, :kept, :kept], part) for part in row]
        rows.append(tree.map_structure(lambda *maps: ops.concatenate(maps, axis=2), *crops))
        above = row
    return tree.map_structure(lambda *maps: ops.concatenate(maps, axis=1), *rows)


def _faded(before, after, blend, axis):
    """`after`, whose first `blend` rows or columns are blended with the last ones of `before`."""

    def fade(a, b):
        extent = min(a.shape[axis], b.shape[axis], blend)
        weight = np.arange(extent, dtype="float32") / extent
        weight = ops.convert_to_tensor(weight.reshape(-1, 1, 1) if axis == 1 else weight.reshape(-1, 1))
        last, first, rest = _part(a, axis, -extent, None), _part(b, axis, 0, extent), _part(b, axis, extent, None)
        return ops.concatenate([last * (1.0 - weight) + first * weight, rest], axis=axis)

    return tree.map_structure(fade, before, after)


def _part(x, axis, start, stop):
    return x[(slice(None),) * axis + (slice(start, stop),)]


def _numbers(name: str, value: Any) -> float | list[float]:
    """A number, or a list of one per channel."""
    array = np.asarray(ops.convert_to_numpy(value), "float64")
    if array.ndim > 1 or not np.isfinite(array).all():
        raise ValueError(f"Latent: `{name}` must be a finite number, or one per channel; received: {value!r}")
    return array.tolist()


def _upcast(autoencoder):
    for layer in autoencoder._flatten_layers():
        if layer.variable_dtype != "float32":
            raise ValueError(
                f"Latent: `upcast` needs weights in float32, as in 'mixed_float16'; {layer.name} has them in "
                f"{layer.variable_dtype}"
            )
        layer.dtype_policy = "float32"


def _batches(examples: Any) -> Iterable:
    """The images of each batch."""
    for batch in [examples] if hasattr(examples, "shape") else examples:
        batch = batch[0] if isinstance(batch, (tuple, list)) else batch
        yield np.asarray(ops.convert_to_numpy(batch["image"] if isinstance(batch, dict) else batch))


def _float64(x) -> np.ndarray:
    return ops.convert_to_numpy(x).astype("float64")
