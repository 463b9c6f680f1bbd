"""The levels of a U-Net: template layers for one resolution."""

from collections.abc import Sequence
from typing import Any

import keras

from kdiff.base import Value, check_integer
from kdiff.blocks.base import copy_layer, get_layer

__all__ = ["Level", "check_levels"]


class Level(Value):
    """One resolution of a U-Net: template layers, which the network copies for each use.

    Args:
        width: the channels at this level.
        depth: the number of blocks in the encoder; the decoder has one more. For the middle it may be 0.
        block: a block; if it has an argument `width`, the network sets it (required in a UNet).
        mixer: a layer that follows each block, such as `SelfAttention()`; None for none; or a list of `depth` of these,
            one per block.
        downsample: the layer to the next, coarser level, at half the size.
        upsample: the layer back from that level, at twice the size.
        up_mixers: the number of mixers in the decoder, after the last of the blocks; None for one after each.
        up_mixer: the layer that follows each block in the decoder: "same" for `mixer`, else a layer, None or a list of
            `depth + 1` of these.
    """

    def __init__(
        self,
        width: int,
        depth: int = 2,
        block: Any = "residual_block",
        mixer: Any = None,
        downsample: Any = "downsample",
        upsample: Any = "upsample",
        up_mixers: int | None = None,
        up_mixer: Any = "same",
    ):
        check_integer("Level", "width", width)
        check_integer("Level", "depth", depth, 0)
        if up_mixers is not None:
            check_integer("Level", "up_mixers", up_mixers, 0)
        self.width = width
        self.depth = depth
        self.block = get_layer(block)
        self.mixer = _mixers(mixer, depth)
        self.downsample = get_layer(downsample)
        self.upsample = get_layer(upsample)
        self.up_mixers = up_mixers
        self.up_mixer = up_mixer if isinstance(up_mixer, str) and up_mixer == "same" else _mixers(up_mixer, depth + 1)

    def unit(self, mixer: keras.layers.Layer | None, *after: keras.layers.Layer) -> list[keras.layers.Layer]:
        """Copies of the block at the width of this level, of the mixer, if any, and of the layers `after`."""
        width = {"width": self.width} if self.widens else {}
        mixers = [] if mixer is None else [mixer]
        return [copy_layer(self.block, **width), *map(copy_layer, [*mixers, *after])]

    @property
    def mixers_down(self) -> list[keras.layers.Layer | None]:
        """The mixers that follow the blocks of the encoder."""
        return self.mixer if isinstance(self.mixer, list) else [self.mixer] * self.depth

    @property
    def mixers_up(self) -> list[keras.layers.Layer | None]:
        """The mixers that follow the blocks of the decoder."""
        mixer, count = self.mixer if isinstance(self.up_mixer, str) else self.up_mixer, self.depth + 1
        if isinstance(mixer, list) and isinstance(self.up_mixer, str):
            raise ValueError("Level: a list of mixers for the encoder needs an `up_mixer` for the decoder")
        mixers = mixer if isinstance(mixer, list) else [mixer] * count
        plain = 0 if self.up_mixers is None else max(0, count - self.up_mixers)
        return [None] * plain + mixers[plain:]

    def units_down(self) -> list[list[keras.layers.Layer]]:
        """The `depth` units of the encoder."""
        return [self.unit(mixer) for mixer in self.mixers_down]

    def units_up(self, *after: keras.layers.Layer) -> list[list[keras.layers.Layer]]:
        """The `depth + 1` units of the decoder, the last with the layers `after`."""
        *mixers, last = self.mixers_up
        return [*(self.unit(mixer) for mixer in mixers), self.unit(last, *after)]

    @property
    def widens(self) -> bool:
        """Whether the block has an argument `width`; otherwise it keeps the channels of its input."""
        return "width" in self.block.get_config()


def check_levels(owner: str, levels: Sequence[Level]) -> None:
    """Raises a ValueError unless `levels` is a non-empty list of `Level`s of at least one block each."""
    if isinstance(levels, int):
        raise ValueError(
            f"{owner}: `levels` must be a list of `Level`s; received: {levels}. From numbers build one with "
            f"`UNet.residual(width=64, levels={levels})`, `UNet.attention`, `Hybrid.composed` or similar"
        )
    if not isinstance(levels, Sequence) or not levels or not all(isinstance(level, Level) for level in levels):
        raise ValueError(f"{owner}: `levels` must be at least one `Level`; received: {levels!r}")
    if not all(level.depth for level in levels):
        raise ValueError(f"{owner}: each of `levels` must have a `depth` of at least 1; received: {levels!r}")


def _mixers(given, count):
    """A list of `count` mixers, from a template, None or a list."""
    if isinstance(given, (list, tuple)):
        if len(given) != count:
            raise ValueError(
                f"Level: a list of mixers must have {count} entries, one per block; received: {len(given)}"
            )
        return [None if one is None else get_layer(one) for one in given]
    return None if given is None else get_layer(given)
