"""The configurations of U-Nets of diffusers, translated to networks of kdiff.

    UNet2DModel             DDPM's U-Net, with or without attention and classes; NCSN++
    UNet2DConditionModel    Stable Diffusion's, with attention to a context, and Stable Diffusion XL's; those of
                            DeepFloyd IF, Karlo and Kandinsky, with joint attention to context and image

The decoder may have other blocks than the encoder.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import keras

from kdiff.blocks.attention import SelfAttention
from kdiff.blocks.context_attention import ContextAttention
from kdiff.blocks.convolution import ResidualBlock
from kdiff.blocks.embeddings import FourierEmbedding, MLPEmbedding
from kdiff.blocks.normalization import GroupNorm, LayerNorm
from kdiff.blocks.resampling import Downsample, FIRDownsample, FIRUpsample, Upsample
from kdiff.blocks.transformer import SpatialTransformer, TransformerBlock
from kdiff.interop import unet_conditions as parts
from kdiff.interop.configs import Described, complete, each, kind
from kdiff.interop.files import State
from kdiff.interop.unet_keys import ACTIVATIONS, SHARED, UNET_2D, UNET_2D_CONDITION
from kdiff.networks.levels import Level
from kdiff.networks.ncsnpp import InputSkip, NCSNpp, OutputSkip
from kdiff.networks.unet import UNet

__all__ = [
    "CONTEXT_NORMS",
    "DOWN",
    "LARGEST_NETWORK",
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

LARGEST_NETWORK = 500  # encoder blocks; Stable Diffusion XL has 30
RATED = "requires_aesthetics_score"


class Kind(NamedTuple):
    """The meaning of a block type: the mixer after each residual block, and the resampling.

    Attributes:
        mixer: "self", "cross", "simple", or None.
        resample: "conv", "resnet"; None if the configuration decides.
        tuned: whether `resnet_out_scale_factor` and `resnet_skip_time_act` apply to it.
    """

    mixer: str | None = None
    resample: str | None = "conv"
    tuned: bool = False


def _table(way: str) -> dict[str, Kind]:
    return {
        f"{way}Block2D": Kind(),
        f"Attn{way}Block2D": Kind("self", None),
        f"Resnet{way}sampleBlock2D": Kind(None, "resnet", True),
        f"CrossAttn{way}Block2D": Kind("cross"),
        f"SimpleCrossAttn{way}Block2D": Kind("simple", "resnet", True),
    }


DOWN, UP = _table("Down"), _table("Up")
SKIP_DOWN = {"SkipDownBlock2D": Kind(), "AttnSkipDownBlock2D": Kind("self")}
SKIP_UP = {"SkipUpBlock2D": Kind(), "AttnSkipUpBlock2D": Kind("self")}
CONTEXT_NORMS: dict[str | None, Callable[[], keras.layers.Layer | None]] = {
    None: lambda: None,
    "layer_norm": LayerNorm,
    "group_norm": lambda: GroupNorm(32),
}


def unet_2d(config: dict[str, Any], source: Any) -> Described:
    """The network of a `UNet2DModel`."""
    config = complete(config, UNET_2D, source, UNET_2D_CONDITION)
    _check_number(config, source)
    if set(config["down_block_types"]) & set(SKIP_DOWN):
        return _ncsnpp(config, source)
    if config["time_embedding_type"] != "positional" or config["norm_num_groups"] is None:
        raise ValueError(
            f"{source}: `time_embedding_type` 'fourier' and `norm_num_groups` None need blocks of {list(SKIP_DOWN)}"
        )
    network = UNet(
        _levels(config, source), _middle(config), parts.time(config), parts.classes(config), **_ends(config, "silu")
    )
    return Described(network, parts.shapes(config))


def told(state: State, index: Mapping[str, Any]) -> dict[str, Any]:
    """The number of entries in "time_ids" according to `model_index.json`."""
    return {"numbers": parts.NUMBERS - 1 if index[RATED] else None} if RATED in index else {}


def unet_2d_condition(config: dict[str, Any], source: Any, numbers: int | None = None) -> Described:
    """The network of a `UNet2DConditionModel`; for its conditions see `kdiff.interop.unet_conditions`.

    Args:
        config: the configuration in the file.
        source: the file, for errors.
        numbers: the number of entries in "time_ids", if any; None for 5 if that leaves a text vector as wide as the
            tokens, as in the refiner of Stable Diffusion XL, and otherwise 6.
    """
    config = {**SHARED, **complete(config, UNET_2D_CONDITION, source, UNET_2D)}
    count = len(config["block_out_channels"])
    only = config["only_cross_attention"]  # in the middle too, if there is one value for all
    if config["mid_block_only_cross_attention"] is None:
        config["mid_block_only_cross_attention"] = only if isinstance(only, bool) else False
    for name in ("attention_head_dim", "transformer_layers_per_block", "only_cross_attention", "cross_attention_dim"):
        config[name] = each(config[name], count, source, name)
    if len(set(config["cross_attention_dim"])) > 1:
        received = config["cross_attention_dim"]
        raise ValueError(f"{source}: `cross_attention_dim` must be one number; received: {received}")
    config["cross_attention_dim"] = config["cross_attention_dim"][0]
    if config["encoder_hid_dim"] and not config["encoder_hid_dim_type"]:
        config["encoder_hid_dim_type"] = "text_proj"
    config["numbers"] = numbers or parts.numbers_of(config)
    parts.check_added(config, source)
    _check_number(config, source)
    levels, middle = _levels(config, source), _middle_of_context(config)
    activation = ACTIVATIONS[config["act_fn"]]
    network = UNet(levels, middle, parts.time(config), parts.conditions(config), **_ends(config, activation))
    return Described(network, parts.shapes(config))


def _check_number(config, source) -> None:
    """Checks the number of blocks before any is created."""
    widths = config["block_out_channels"]
    layers = each(config["layers_per_block"], len(widths), source, "layers_per_block")
    depths = config.get("transformer_layers_per_block", [1] * len(widths))
    depths = [max(depth) if isinstance(depth, (list, tuple)) else depth for depth in depths]
    number = sum(count * (1 + depth) for count, depth in zip(layers, depths, strict=True))
    if number > LARGEST_NETWORK:
        raise ValueError(f"{source}: more than {LARGEST_NETWORK} blocks cannot be loaded; received: {number}")


def _ncsnpp(config, source) -> Described:
    """NCSN++. Its `time` is the logarithm of that in diffusers, sigma."""
    widths = list(config["block_out_channels"])
    if config["time_embedding_type"] != "fourier" or any(width % 64 for width in widths):
        raise ValueError(
            f"{source}: with blocks of {list(SKIP_DOWN)}, `time_embedding_type` must be 'fourier', and 64 must divide "
            f"`block_out_channels`; received: {config['time_embedding_type']!r} and {widths}"
        )
    if ACTIVATIONS[config["act_fn"]] != "silu":
        raise ValueError(f"{source}: with blocks of {list(SKIP_DOWN)}, `act_fn` must be 'silu'")
    own, rescale = GroupNorm(epsilon=config["norm_eps"]), {"rescale": math.sqrt(2)}
    block = _block(config, **rescale).clone(normalization=own)
    down, up = _kinds(config, source, SKIP_DOWN, SKIP_UP)
    if [one.mixer for one in down] != [one.mixer for one in up]:
        raise ValueError(
            f"{source}: `up_block_types` must mirror `down_block_types`, with attention at the same levels; received: "
            f"{config['down_block_types']} and {config['up_block_types']}"
        )
    attention = [
        _self_attention(config, width, GroupNorm(32, config["norm_eps"]), **rescale) if one.mixer else None
        for one, width in zip(down, widths, strict=True)
    ]
    shrink = block.clone(resample=FIRDownsample(), project=True)
    grow = block.clone(resample=FIRUpsample(), project=True)
    depth = config["layers_per_block"]
    network = NCSNpp(
        [Level(width, depth, block, attention[i], shrink, grow, up_mixers=1) for i, width in enumerate(widths)],
        _middle(config),
        MLPEmbedding(FourierEmbedding(2 * widths[0], 16.0, sine_first=True), parts.time_width(config)),
        parts.classes(config),
        **_ends(config, "silu"),
        progressive_input=InputSkip(),
        progressive_output=OutputSkip(normalization=own),
        divide=True,
    )
    return Described(network, parts.shapes(config))


def _levels(config, source) -> list[Level]:
    widths = list(config["block_out_channels"])
    down, up = _kinds(config, source)
    _check_tuned(config, down, up, source)
    depths = each(config["layers_per_block"], len(widths), source, "layers_per_block")
    levels = []
    for i, width in enumerate(widths):
        coarser = up[min(i + 1, len(up) - 1)]  # whose last block has the upsampling of this level
        plans = [_plan(config, down[i].mixer, i, j, False, source) for j in range(depths[i])]
        plans_up = [_plan(config, up[i].mixer, i, j, True, source) for j in range(depths[i] + 1)]
        same = len({*plans, *plans_up}) == 1
        level = Level(
            width,
            depths[i],
            _block(config, down[i].tuned),
            _mixers(config, plans, width),
            _resampler("down", down[i], config),
            _resampler("up", coarser, config),
            up_mixer="same" if same else _mixers(config, plans_up, width),
        )
        levels.append(level)
    return levels


def _ends(config, activation) -> dict[str, Any]:
    return {"normalization": _norm(config), "activation": activation, "out_channels": config["out_channels"]}


def _kinds(config, source, down_kinds=DOWN, up_kinds=UP) -> tuple[list[Kind], list[Kind]]:
    """(down, up): the kinds of the levels, both from the finest."""
    names = [[one.removeprefix("UNetRes") for one in config[f"{way}_block_types"]] for way in ("down", "up")]
    down = [kind(down_kinds, one, source, "down_block_types") for one in names[0]]
    up = [kind(up_kinds, one, source, "up_block_types") for one in names[1]][::-1]
    count = len(config["block_out_channels"])
    if not len(down) == len(up) == count:
        raise ValueError(
            f"{source}: `block_out_channels`, `down_block_types` and `up_block_types` must have one length; received: "
            f"{count}, {len(down)} and {len(up)}"
        )
    return down, up


def _check_tuned(config, down, up, source) -> None:
    """Raises a ValueError for settings of some blocks that kdiff can only apply to all."""
    settings = {name: config.get(name) for name in ("resnet_skip_time_act", "time_embedding_act_fn")}
    changed = any(settings.values()) or config.get("resnet_out_scale_factor", 1.0) != 1
    if changed and any(a.tuned != b.tuned for a, b in zip(down, up, strict=True)):
        raise ValueError(
            f"{source}: with `resnet_out_scale_factor`, `resnet_skip_time_act` or `time_embedding_act_fn`, blocks of "
            f"a level must be of one kind in encoder and decoder; received: {config['down_block_types']} and "
            f"{config['up_block_types']}"
        )
    plain = [one for one in down if not one.tuned]
    middle = config["mid_block_type"] not in (None, "UNetMidBlock2DSimpleCrossAttn")
    if config.get("time_embedding_act_fn") and (not settings["resnet_skip_time_act"] or plain or middle):
        raise ValueError(
            f"{source}: `time_embedding_act_fn` must be null unless `resnet_skip_time_act` is true and all blocks are "
            "Resnet- or SimpleCrossAttn-; others would activate the embedding twice, which is not supported"
        )


# --- blocks


def _norm(config) -> GroupNorm:
    return GroupNorm(config["norm_num_groups"], config["norm_eps"])


def _block(config, tuned: bool = False, **options) -> ResidualBlock:
    shift, activation = config["resnet_time_scale_shift"] == "scale_shift", ACTIVATIONS[config["act_fn"]]
    options = {"activation": activation, "normalization": _norm(config), **options}
    if tuned and config.get("resnet_out_scale_factor", 1.0) != 1:
        options = {"rescale": float(config["resnet_out_scale_factor"]), **options}
    if tuned and config.get("resnet_skip_time_act"):
        before = ACTIVATIONS.get(config["time_embedding_act_fn"], "linear")
        options["embed_activation"] = None if before == activation else before
    return ResidualBlock(None, shift, config["dropout"], **options)


def _self_attention(config, width, norm=None, **options) -> SelfAttention:
    head_width = config["attention_head_dim"] or width
    return SelfAttention(max(1, width // head_width), head_width, norm or _norm(config), zero=False, **options)


def _plan(config, mixer: str | None, i: int, j: int, up: bool, source) -> tuple | None:
    """The arguments of `_mixer` after block j of level i."""
    if mixer is None:
        return None
    heads = config["attention_head_dim"]
    if mixer == "self" and not isinstance(heads, list):
        return (mixer, heads)
    if mixer in ("self", "simple"):  # whose list is not reversed in the decoder
        heads = heads[-1 - i if up else i]
        return (mixer, heads) if mixer == "self" else (mixer, heads, config["only_cross_attention"][i])
    turned = config["reverse_transformer_layers_per_block"]
    nested = [isinstance(depth, (list, tuple)) for depth in config["transformer_layers_per_block"]]
    if up and turned is None and any(nested):
        raise ValueError(
            f"{source}: lists in `transformer_layers_per_block` need `reverse_transformer_layers_per_block`"
        )
    name = "transformer_layers_per_block" if turned is None or not up else "reverse_transformer_layers_per_block"
    depths = config[name] if name.startswith("transformer") else turned[::-1]
    count = len(config["block_out_channels"])
    depth = each(depths, count, source, name)[i]
    layers = each(config["layers_per_block"], count, source, "layers_per_block")[i] + up
    depth = each(depth, layers, source, name)[j]
    return (mixer, depth, heads[i], config["only_cross_attention"][i])


def _mixers(config, plans, width):
    """A layer, or None, for all blocks, or a list with one for each."""
    if len(set(plans)) == 1:
        return _mixer(config, plans[0], width)
    return [_mixer(config, plan, width) for plan in plans]


def _mixer(config, plan, width) -> keras.layers.Layer | None:
    if plan is None:
        return None
    name, *values = plan
    return {"self": _attending_to_itself, "cross": _spatial, "simple": _joining}[name](config, width, *values)


def _attending_to_itself(config, width, head_width) -> SelfAttention:
    return _self_attention({**config, "attention_head_dim": head_width}, width)


def _spatial(config, width, depth, heads, only_context=False) -> SpatialTransformer:
    norm = GroupNorm(config["norm_num_groups"], 1e-6)
    block = TransformerBlock(bias=False, glu=True, zero=False, only_context=True) if only_context else None
    return SpatialTransformer(depth, heads, width // heads, block, normalization=norm)


def _joining(config, width, head_width, only_context) -> ContextAttention:
    return ContextAttention(
        width // head_width,
        head_width,
        GroupNorm(config["norm_num_groups"]),
        context_normalization=CONTEXT_NORMS[config["cross_attention_norm"]](),
        only_context=only_context,
    )


def _resampler(direction, level: Kind, config) -> keras.layers.Layer:
    how = level.resample or config[f"{direction}sample_type"]
    return RESAMPLERS[direction, how]({**config, "tuned": level.tuned})


RESAMPLERS = {
    ("down", "conv"): lambda config: Downsample(padding=PADDINGS[config["downsample_padding"]]),
    ("down", "resnet"): lambda config: _block(config, config["tuned"], resample=Downsample("average")),
    ("up", "conv"): lambda config: Upsample(),
    ("up", "resnet"): lambda config: _block(config, config["tuned"], resample=Upsample(convolution=False)),
}
PADDINGS = {0: "same", 1: "symmetric"}


# --- the middle


def _middle(config) -> Level:
    """Two blocks, with attention between them, which is optional, and whose normalisation may have other groups."""
    width, options = config["block_out_channels"][-1], _rescaled(config)
    if config["mid_block_type"] is None:
        return Level(width, 0, _block(config))
    if not config["add_attention"]:
        return Level(width, 2, _block(config, **options))
    groups = config["attn_norm_num_groups"]
    if groups is None and config["resnet_time_scale_shift"] == "default":
        norm = _norm(config)
    else:
        norm = keras.layers.Identity() if groups is None else GroupNorm(groups, config["norm_eps"])
    return Level(width, 2, _block(config, **options), _self_attention(config, width, norm, **options))


def _middle_of_context(config) -> Level:
    width, name, options = config["block_out_channels"][-1], config["mid_block_type"], _rescaled(config)
    depth, heads = config["transformer_layers_per_block"][-1], config["attention_head_dim"][-1]
    depth = depth[0] if isinstance(depth, (list, tuple)) else depth
    only = config["mid_block_only_cross_attention"]
    makers = {
        None: lambda: Level(width, 0, _block(config)),
        "UNetMidBlock2D": lambda: Level(width, 1, _block(config, **options)),
        "UNetMidBlock2DCrossAttn": lambda: Level(
            width, 2, _block(config, **options), _spatial(config, width, depth, heads)
        ),
        "UNetMidBlock2DSimpleCrossAttn": lambda: Level(
            width, 2, _block(config, tuned=True, **{"rescale": 1.0, **options}), _joining(config, width, heads, only)
        ),
    }
    return makers[name]()


def _rescaled(config) -> dict[str, float]:
    rescale = config["mid_block_scale_factor"]
    return {} if rescale == 1 else {"rescale": rescale}
