"""Networks with more input channels than the data: the maps concatenated to x_t are conditions in kdiff.

diffusers    9 channels in, x_t, a mask and the masked image; 4 out
here         image 4, conditions "mask_image" 1 and "masked_image" 4; 4 out

The second stage of DeepFloyd IF has a picture that is noised at step n of `image_noising_scheduler` and receives n as a
label: here it is a `Concat` with `noise`, at the level (n + 1) / T.
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

ANY = "beside"  # the name of a condition if the pipeline does not define it
# The maps of each pipeline, in order, with their channels; None for the channels of the data.
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
LEVEL = 250  # the step at which the picture is noised in the second stage of DeepFloyd IF
BEFORE = tuple(name for name in MAPS if name.startswith("Marigold"))  # the map's channels come before those of x_t


def maps_of(pipeline: str, inputs: int, outputs: int, learned: bool, source: Any) -> dict[str, int]:
    """The channels of each map that is concatenated to x_t.

    Args:
        pipeline: its class.
        inputs, outputs: the channels of the network.
        learned: whether half of the output is a variance, according to the scheduler.
        source: for errors.

    Raises:
        ValueError: if the numbers of channels fit no supported network.
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
            f"{source}: the network has {inputs} input and {outputs} output channels, and kdiff supports only networks "
            "with as many outputs as the data has channels, or twice that for a variance, and at least as many inputs"
        )
    return {ANY: inputs - data} if inputs > data else {}


def with_maps(
    described: Described,
    maps: Mapping[str, int],
    layers: Mapping[str, Concat] | None = None,
    noise: Any = None,
) -> Described:
    """The network with the last channels of its input as conditions.

    Args:
        described: an unbuilt network.
        maps: the channels of each condition by name, in order.
        layers: of the conditions; None for `Concat`, resized by "nearest" for masks.
        noise: the schedule that noises a picture "low", if any.

    Raises:
        ValueError: if `noise` is given, and the network does not receive the step as a label.
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
    """The condition of a noised picture, whose step was a label of the network.

    Args:
        label: the embedding of the step.
        noise: the schedule.
        like: a `Concat` from which the levels are copied.
    """
    if not isinstance(label, MLPEmbedding) or noise.num_steps is None:
        raise ValueError(
            "a network with a noised picture must take the step of the noise by `class_embed_type` "
            f"'timestep', from a scheduler with a table; received: {label!r} and {noise!r}"
        )
    embedding = label.clone(embedding=label.embedding.clone(scale=float(noise.num_steps), offset=-1.0))
    options = {"noise": noise, "embedding": embedding}
    if like is not None and like.noise is not None:
        return like.clone(interpolation="aligned", noise_first=False, **options)
    return Concat("aligned", level=(LEVEL + 1) / noise.num_steps, **options)


def _layer(name: str) -> Concat:
    """The picture of InstructPix2Pix may be absent, and is then zero (Brooks et al. 2022, section 3.2.1)."""
    form = "nearest" if name == "mask_image" else "bilinear"
    return Concat(form, dropout=0.05) if name == "source" else Concat(form)


def maps_first(state: State, pipeline: str, maps: Mapping[str, int]) -> State:
    """The weights with the channels of x_t before those of the maps, as in kdiff."""
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
    """The shapes by name with which a network was built; empty if unknown."""
    config = network.get_build_config() or {}
    shapes = config.get("shapes_dict") or config.get("input_shape") or {}
    return shapes if isinstance(shapes, dict) else {}
