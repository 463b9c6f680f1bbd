"""diffusers' U-Nets: their configuration as ours.

    UNet2DModel             DDPM's U-Net, with or without attention and classes; NCSN++
    UNet2DConditionModel    Stable Diffusion's, with attention to a context, and Stable Diffusion XL's

Each level must have the same kind of block on its way down and on its way up.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import keras

from kdiff.blocks.attention import SelfAttention
from kdiff.blocks.convolution import ResidualBlock
from kdiff.blocks.embeddings import FourierEmbedding, LabelEmbedding, MLPEmbedding, SinusoidalEmbedding
from kdiff.blocks.normalization import GroupNorm
from kdiff.blocks.resampling import Downsample, FIRDownsample, FIRUpsample, Upsample
from kdiff.blocks.transformer import SpatialTransformer
from kdiff.interop.configs import Described, complete, each, kind
from kdiff.interop.files import State
from kdiff.interop.unet_keys import SHARED, UNET_2D, UNET_2D_CONDITION, image_shape
from kdiff.networks.ncsnpp import InputSkip, NCSNpp, OutputSkip
from kdiff.networks.published import text_and_numbers
from kdiff.networks.unet import Level, UNet

__all__ = [
    "DOWN",
    "LARGEST_NETWORK",
    "NUMBERS",
    "PADDINGS",
    "RATED",
    "RESAMPLERS",
    "SKIP_DOWN",
    "SKIP_UP",
    "UP",
    "Kind",
    "told",
    "unet_2d",
    "unet_2d_condition",
]

LARGEST_NETWORK = 500  # blocks on the way down; Stable Diffusion XL has 30
NUMBERS = 6  # of "time_ids": two sizes, a corner, each of height and width; of XL's refiner 5, with a score last

RATED = "requires_aesthetics_score"


class Kind(NamedTuple):
    """What a type of block says: the mixer after each residual block, and how the size changes.

    Attributes:
        mixer: a key of the mixers, or None.
        resample: "conv", "resnet"; None for as the configuration says.
    """

    mixer: str | None = None
    resample: str | None = "conv"


DOWN = {
    "DownBlock2D": Kind(),
    "AttnDownBlock2D": Kind("self", None),
    "ResnetDownsampleBlock2D": Kind(None, "resnet"),
    "CrossAttnDownBlock2D": Kind("cross"),
}
UP = {
    "UpBlock2D": Kind(),
    "AttnUpBlock2D": Kind("self", None),
    "ResnetUpsampleBlock2D": Kind(None, "resnet"),
    "CrossAttnUpBlock2D": Kind("cross"),
}
SKIP_DOWN = {"SkipDownBlock2D": Kind(), "AttnSkipDownBlock2D": Kind("self")}
SKIP_UP = {"SkipUpBlock2D": Kind(), "AttnSkipUpBlock2D": Kind("self")}


def unet_2d(config: dict[str, Any], source: Any) -> Described:
    """The network that a `UNet2DModel` is."""
    config = complete(config, UNET_2D, source)
    _check_number(config, source)
    if set(config["down_block_types"]) & set(SKIP_DOWN):
        return _ncsnpp(config, source)
    if config["time_embedding_type"] != "positional" or config["norm_num_groups"] is None:
        raise ValueError(
            f"{source}: `time_embedding_type` 'fourier' and `norm_num_groups` None need blocks of {list(SKIP_DOWN)}"
        )
    mixers = {None: lambda i, width: None, "self": lambda i, width: _self_attention(config, width)}
    network = UNet(_levels(config, mixers, source), _middle(config), _time(config), _classes(config), **_ends(config))
    return Described(network, _shapes(config))


def told(state: State, index: Mapping[str, Any]) -> dict[str, Any]:
    """What `model_index.json` says of the numbers in "time_ids"."""
    return {"numbers": NUMBERS - 1 if index[RATED] else None} if RATED in index else {}


def unet_2d_condition(config: dict[str, Any], source: Any, numbers: int | None = None) -> Described:
    """The network that a `UNet2DConditionModel` is: the condition "context" is the tokens of the text, as they come.

    Args:
        config: what the file says.
        source: the file, for errors.
        numbers: how many there are in "time_ids", if any; None for 5 where so many leave a vector of the text as wide
            as its tokens, as in the refiner of Stable Diffusion XL, and otherwise 6.
    """
    config = {**SHARED, **complete(config, UNET_2D_CONDITION, source)}
    count = len(config["block_out_channels"])
    heads = each(config["attention_head_dim"], count, source, "attention_head_dim")
    depths = each(config["transformer_layers_per_block"], count, source, "transformer_layers_per_block")
    if len(set(each(config["cross_attention_dim"], count, source, "cross_attention_dim"))) > 1:
        received = config["cross_attention_dim"]
        raise ValueError(f"{source}: `cross_attention_dim` must be one number; received: {received}")
    config["numbers"] = numbers or _numbers(config)
    _check_added(config, source)
    _check_number(config, source, depths)

    def cross(i, width):
        return _spatial(config, depths[i], heads[i], width)

    def attention(i, width):
        return _self_attention({**config, "attention_head_dim": heads[i]}, width)

    levels = _levels(config, {None: lambda i, width: None, "self": attention, "cross": cross}, source)
    width = config["block_out_channels"][-1]
    crossed, block = config["mid_block_type"] == "UNetMidBlock2DCrossAttn", _block(config, **_rescaled(config))
    middle = Level(width, 2, block, cross(-1, width)) if crossed else Level(width, 1, block)
    conditions = {"context": keras.layers.Identity(), **_classes(config)}
    if config["addition_embed_type"] is not None:
        waves = _waves(config, config["addition_time_embed_dim"])
        conditions["added"] = text_and_numbers(waves, _time_width(config))
    return Described(UNet(levels, middle, _time(config), conditions, **_ends(config)), _shapes(config))


def _check_number(config, source, depths=()) -> None:
    """Before any is made."""
    widths = config["block_out_channels"]
    layers = each(config["layers_per_block"], len(widths), source, "layers_per_block")
    number = sum(count * (1 + depth) for count, depth in zip(layers, depths or layers, strict=True))
    if number > LARGEST_NETWORK:
        raise ValueError(f"{source}: more than {LARGEST_NETWORK} blocks cannot be loaded; received: {number}")


def _numbers(config) -> int:
    width, total = (config[f"{name}_dim"] or 0 for name in ("addition_time_embed", "projection_class_embeddings_input"))
    return NUMBERS - 1 if total - (NUMBERS - 1) * width == config["cross_attention_dim"] else NUMBERS


def _check_added(config, source) -> None:
    width, total = (config[f"{name}_dim"] for name in ("addition_time_embed", "projection_class_embeddings_input"))
    numbers = config["numbers"]
    if config["addition_embed_type"] is not None and not (width and total and total > numbers * width):
        raise ValueError(
            f"{source}: `addition_embed_type` needs an `addition_time_embed_dim`, and for "
            f"`projection_class_embeddings_input_dim` more than {numbers} times as much; received: {width} and {total}"
        )


def _ncsnpp(config, source) -> Described:
    """NCSN++. Its `time` is the logarithm of what diffusers calls so, sigma."""
    widths = list(config["block_out_channels"])
    if config["time_embedding_type"] != "fourier" or any(width % 64 for width in widths):
        raise ValueError(
            f"{source}: with blocks of {list(SKIP_DOWN)}, `time_embedding_type` must be 'fourier' and 64 must divide "
            f"`block_out_channels`; received: {config['time_embedding_type']!r} and {widths}"
        )
    own, rescale = GroupNorm(epsilon=config["norm_eps"]), {"rescale": math.sqrt(2)}
    block = _block(config, **rescale).clone(normalization=own)
    mixers = [one.mixer for one in _kinds(config, len(widths), source, SKIP_DOWN, SKIP_UP)[0]]
    attention = [
        _self_attention(config, width, GroupNorm(32, config["norm_eps"]), **rescale) if mixer else None
        for mixer, width in zip(mixers, widths, strict=True)
    ]
    down = block.clone(resample=FIRDownsample(), project=True)
    up = block.clone(resample=FIRUpsample(), project=True)
    depth = config["layers_per_block"]
    network = NCSNpp(
        [Level(width, depth, block, attention[i], down, up, up_mixers=1) for i, width in enumerate(widths)],
        _middle(config),
        MLPEmbedding(FourierEmbedding(2 * widths[0], 16.0, sine_first=True), _time_width(config)),
        _classes(config),
        **_ends(config),
        progressive_input=InputSkip(),
        progressive_output=OutputSkip(normalization=own),
        divide=True,
    )
    return Described(network, _shapes(config))


def _levels(config, mixers, source) -> list[Level]:
    widths = list(config["block_out_channels"])
    down, up = _kinds(config, len(widths), source)
    depths = each(config["layers_per_block"], len(widths), source, "layers_per_block")
    levels = []
    for i, width in enumerate(widths):
        coarser = up[min(i + 1, len(up) - 1)]  # whose block it is that ends in this level's upsampling
        downsample = _resampler("down", down[i].resample or config["downsample_type"], config)
        upsample = _resampler("up", coarser.resample or config["upsample_type"], config)
        levels.append(Level(width, depths[i], _block(config), mixers[down[i].mixer](i, width), downsample, upsample))
    return levels


def _ends(config) -> dict[str, Any]:
    return {"normalization": _norm(config), "out_channels": config["out_channels"]}


def _kinds(config, count, source, down_kinds=DOWN, up_kinds=UP):
    """(down, up): the kinds of the levels, both from the finest."""
    down = [kind(down_kinds, one, source, "down_block_types") for one in config["down_block_types"]]
    up = [kind(up_kinds, one, source, "up_block_types") for one in config["up_block_types"]][::-1]
    if not len(down) == len(up) == count:
        raise ValueError(
            f"{source}: `block_out_channels`, `down_block_types` and `up_block_types` must have one length; received: "
            f"{count}, {len(down)} and {len(up)}"
        )
    if [one.mixer for one in down] != [one.mixer for one in up]:
        raise ValueError(
            f"{source}: `up_block_types` must mirror `down_block_types`, with attention at the same levels; received: "
            f"{config['down_block_types']} and {config['up_block_types']}"
        )
    return down, up


def _norm(config) -> GroupNorm:
    return GroupNorm(config["norm_num_groups"], config["norm_eps"])


def _block(config, **options) -> ResidualBlock:
    shift = config["resnet_time_scale_shift"] == "scale_shift"
    return ResidualBlock(None, shift, config["dropout"], normalization=_norm(config), **options)


def _self_attention(config, width, norm=None, **options) -> SelfAttention:
    head_width = config["attention_head_dim"] or width
    return SelfAttention(max(1, width // head_width), head_width, norm or _norm(config), zero=False, **options)


def _spatial(config, depth, heads, width) -> SpatialTransformer:
    return SpatialTransformer(depth, heads, width // heads, normalization=GroupNorm(config["norm_num_groups"], 1e-6))


def _resampler(direction, how, config) -> keras.layers.Layer:
    return RESAMPLERS[direction, how](config)


RESAMPLERS = {
    ("down", "conv"): lambda config: Downsample(padding=PADDINGS[config["downsample_padding"]]),
    ("down", "resnet"): lambda config: _block(config, resample=Downsample("average")),
    ("up", "conv"): lambda config: Upsample(),
    ("up", "resnet"): lambda config: _block(config, resample=Upsample(convolution=False)),
}
PADDINGS = {0: "same", 1: "symmetric"}


def _middle(config) -> Level:
    """Two blocks, with attention between them, whose normalisation may have groups of its own, or be left out."""
    width, options = config["block_out_channels"][-1], _rescaled(config)
    if not config["add_attention"]:
        return Level(width, 2, _block(config, **options))
    groups = config["attn_norm_num_groups"]
    if groups is None and config["resnet_time_scale_shift"] == "default":
        norm = _norm(config)
    else:
        norm = keras.layers.Identity() if groups is None else GroupNorm(groups, config["norm_eps"])
    return Level(width, 2, _block(config, **options), _self_attention(config, width, norm, **options))


def _rescaled(config) -> dict[str, float]:
    rescale = config["mid_block_scale_factor"]
    return {} if rescale == 1 else {"rescale": rescale}


def _waves(config, width) -> SinusoidalEmbedding:
    return SinusoidalEmbedding(width, sine_first=not config["flip_sin_to_cos"], shift=config["freq_shift"])


def _time(config) -> MLPEmbedding:
    return MLPEmbedding(_waves(config, config["block_out_channels"][0]), _time_width(config))


def _time_width(config) -> int:
    return config["time_embedding_dim"] or 4 * config["block_out_channels"][0]


def _classes(config) -> dict[str, keras.layers.Layer]:
    if config["class_embed_type"] is None and config["num_class_embeds"] is None:
        return {}
    kinds = {
        None: lambda: LabelEmbedding(config["num_class_embeds"]),
        "timestep": lambda: _time(config),
        "identity": keras.layers.Identity,
    }
    return {"label": kinds[config["class_embed_type"]]()}


def _shapes(config) -> dict[str, tuple]:
    """Of the inputs. Texts have 77 tokens, as CLIP's, but a call may bring any number."""
    shapes = {"image": image_shape(config)}
    if config.get("cross_attention_dim"):
        shapes["context"] = (None, None, each(config["cross_attention_dim"], 1, "", "cross_attention_dim")[0])
    if config["class_embed_type"] or config["num_class_embeds"] is not None:
        shapes["label"] = (None, _time_width(config)) if config["class_embed_type"] == "identity" else (None,)
    if config.get("addition_embed_type"):
        vector = config["projection_class_embeddings_input_dim"] - config["numbers"] * config["addition_time_embed_dim"]
        shapes |= {"text_embeds": (None, vector), "time_ids": (None, config["numbers"])}
    return shapes
