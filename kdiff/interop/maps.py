"""Networks with more channels in than data has: what stands beside x_t there is a condition, a map, here.

diffusers    9 channels in, x_t, a mask and the masked image; 4 out
here         image 4, conditions "mask_image" 1 and "masked_image" 4; 4 out

DeepFloyd IF's second stage has a picture beside x_t that is noised at step n of `image_noising_scheduler`, which it is
told as a label: here it is a `Concat` with `noise`, at the level (n + 1) / T.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from kdiff.blocks.concat import Concat
from kdiff.blocks.embeddings import MLPEmbedding
from kdiff.interop.configs import Described
from kdiff.interop.files import State

__all__ = [
    "ANY",
    "BEFORE",
    "LEVEL",
    "MAPS",
    "NOISING",
    "channels_of",
    "input_shapes",
    "map_conditions",
    "maps_first",
    "maps_of",
    "noised",
    "with_maps",
]

ANY = "beside"  # the name of a condition of which a pipeline does not say what it is
# The maps beside x_t by pipeline, in their order, with their channels; None for as many as data has.
_INPAINT, _OTHER_INPAINT, _LOW = {"mask_image": 1, "masked_image": 4}, {"masked_image": 4, "mask_image": 1}, {"low": 3}
MAPS: dict[str, Mapping[str, int | None]] = {
    "StableDiffusionInpaintPipeline": _INPAINT,
    "StableDiffusionXLInpaintPipeline": _INPAINT,
    "StableDiffusionControlNetInpaintPipeline": _INPAINT,
    "StableDiffusionXLControlNetInpaintPipeline": _INPAINT,
    "KandinskyInpaintPipeline": _OTHER_INPAINT,
    "KandinskyV22InpaintPipeline": _OTHER_INPAINT,
    "StableDiffusionInstructPix2PixPipeline": {"source": 4},
    "StableDiffusionXLInstructPix2PixPipeline": {"source": 4},
    "StableDiffusionDepth2ImgPipeline": {"depth": 1},
    "StableDiffusionUpscalePipeline": _LOW,
    "LDMSuperResolutionPipeline": _LOW,
    "IFSuperResolutionPipeline": {"low": None},
    "IFImg2ImgSuperResolutionPipeline": {"low": None},
    "IFInpaintingSuperResolutionPipeline": {"low": None},
    "MarigoldDepthPipeline": {"picture": 4},
    "MarigoldNormalsPipeline": {"picture": 4},
    "MarigoldIntrinsicsPipeline": {"picture": 4},
}
NOISING = "image_noising_scheduler"
LEVEL = 250  # the step at which DeepFloyd IF's second stage has the picture noised
BEFORE = tuple(name for name in MAPS if name.startswith("Marigold"))  # the map's channels come before those of x_t


def maps_of(pipeline: str, inputs: int, outputs: int, learned: bool, source: Any) -> dict[str, int]:
    """The channels of each map beside x_t.

    Args:
        pipeline: its class.
        inputs, outputs: the channels of the network.
        learned: whether the scheduler says that half of the output is a variance.
        source: for errors.

    Raises:
        ValueError: if the numbers of channels are those of no such network.
    """
    known = MAPS.get(pipeline, {})
    halves = None in known.values() and inputs % 2 == 0
    sizes = {name: inputs // 2 if one is None else one for name, one in known.items()}
    data = inputs - sum(sizes.values())
    if known and data > 0 and outputs in (data, 2 * data) and (halves or inputs != outputs):
        return sizes
    data = outputs // 2 if learned and outputs % 2 == 0 else inputs if outputs == 2 * inputs else outputs
    if data > inputs:
        raise ValueError(
            f"{source}: the network has {inputs} channels in and {outputs} out, and kdiff has only networks with as "
            "many out as data has, or twice as many for a variance, and as many in or more"
        )
    return {ANY: inputs - data} if inputs > data else {}


def with_maps(
    described: Described,
    maps: Mapping[str, int],
    layers: Mapping[str, Concat] | None = None,
    noise: Any = None,
) -> Described:
    """The network with the last channels of its image as conditions.

    Args:
        described: a network, not built.
        maps: the channels of each condition by name, in their order.
        layers: of the conditions; None for `Concat`, of a mask the "nearest".
        noise: the schedule by which a picture "low" is noised, if it is.

    Raises:
        ValueError: if it is, and the network is not told the step as a label.
    """
    if not maps:
        return described
    layers = dict(layers or {name: _layer(name) for name in maps})
    conditions, shapes = dict(described.network.conditions), dict(described.shapes)
    given = {name: one.noise for name, one in layers.items() if one.noise is not None}
    given |= {} if noise is None or "low" not in layers else {"low": noise}
    for name, schedule in given.items():
        layers[name] = noised(conditions.pop("label", None), schedule, layers[name])
        shapes.pop("label", None)
    network = described.network.clone(conditions={**conditions, **layers})
    *sizes, channels = shapes["image"]
    image = {"image": (*sizes, channels - sum(maps.values()))}
    own = {name: (None, None, None, n) if name in given else (*sizes, n) for name, n in maps.items()}
    return Described(network, {**shapes, **image, **own})


def noised(label: Any, noise: Any, like: Concat | None = None) -> Concat:
    """The picture that a network sees noised, whose step it took as a label.

    Args:
        label: the embedding of the step.
        noise: the schedule.
        like: whose level, and what training does, it has.
    """
    if not isinstance(label, MLPEmbedding) or noise.num_steps is None:
        raise ValueError(
            "a network with a noised picture beside x_t must take the step of the noise as its `class_embed_type` "
            f"'timestep', of a scheduler with a table; received: {label!r} and {noise!r}"
        )
    embedding = label.clone(embedding=label.embedding.clone(scale=float(noise.num_steps), offset=-1.0))
    options = {"noise": noise, "embedding": embedding}
    if like is not None and like.noise is not None:
        return like.clone(form="aligned", noise_first=False, **options)
    return Concat("aligned", level=(LEVEL + 1) / noise.num_steps, **options)


def _layer(name: str) -> Concat:
    """InstructPix2Pix can do without its picture, for which zeros stand (Brooks et al. 2022, section 3.2.1)."""
    form = "nearest" if name == "mask_image" else "bilinear"
    return Concat(form, dropout=0.05) if name == "source" else Concat(form)


def maps_first(state: State, pipeline: str, maps: Mapping[str, int]) -> State:
    """The weights with the channels of x_t before those of the maps, as kdiff joins them."""
    name = "conv_in.weight"
    if pipeline not in BEFORE or name not in state or state[name].ndim != 4:
        return state
    return {**state, name: np.roll(state[name], -sum(maps.values()), axis=1)}


def map_conditions(network: Any) -> dict[str, Concat]:
    """The conditions of a network that are maps."""
    return {name: one for name, one in network.conditions.items() if isinstance(one, Concat)}


def channels_of(network: Any) -> dict[str, int]:
    """The channels of the maps of a built network."""
    shapes = input_shapes(network)
    return {name: shapes[name][-1] for name in map_conditions(network)}


def input_shapes(network: Any) -> dict[str, tuple]:
    """The shapes by name that a network was built with; none if it was built otherwise."""
    config = network.get_build_config() or {}
    shapes = config.get("shapes_dict") or config.get("input_shape") or {}
    return shapes if isinstance(shapes, dict) else {}
