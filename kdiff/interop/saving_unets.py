"""The configurations of U-Nets in diffusers, from the layers and the shapes of the weights of kdiff's."""

from collections.abc import Mapping
from typing import Any

import keras

from kdiff.blocks.attention import SelfAttention
from kdiff.blocks.base import Chain
from kdiff.blocks.conditions import VectorAndTokens
from kdiff.blocks.context_attention import ContextAttention
from kdiff.blocks.convolution import ResidualBlock
from kdiff.blocks.embeddings import GuidanceEmbedding, MLPEmbedding
from kdiff.blocks.layers import Dense
from kdiff.blocks.lookup import LabelEmbedding
from kdiff.blocks.normalization import GroupNorm, LayerNorm
from kdiff.blocks.transformer import SpatialTransformer
from kdiff.encoders.prompt import Prompt
from kdiff.interop.maps import input_shapes, map_conditions
from kdiff.interop.unet_conditions import as_in_diffusers
from kdiff.interop.unet_keys import ACTIVATIONS
from kdiff.interop.unets import PADDINGS
from kdiff.networks.ncsnpp import NCSNpp
from kdiff.networks.unet import UNet

__all__ = [
    "KNOWN",
    "MIDDLES",
    "TYPES",
    "Config",
    "attribute",
    "name_of",
    "ncsnpp_config",
    "one_of_all",
    "size_of",
    "unet_config",
]

Config = dict[str, Any]
TYPES = {type(None): "", SelfAttention: "Attn", SpatialTransformer: "CrossAttn", ContextAttention: "SimpleCrossAttn"}
MIDDLES = {
    type(None): "UNetMidBlock2D",
    SpatialTransformer: "UNetMidBlock2DCrossAttn",
    ContextAttention: "UNetMidBlock2DSimpleCrossAttn",
}


def unet_config(network: UNet, conditions: Mapping[str, keras.layers.Layer] | None = None) -> Config:
    """The configuration of a U-Net, of the class with cross-attention if it has a context.

    Args:
        network: a built one.
        conditions: by their names in `unet_conditions`; None for those of the network.
    """
    conditions = as_in_diffusers(network.conditions) if conditions is None else conditions
    conditioned = bool({"context", "image_embeds"} & set(conditions))
    waves = attribute(network, network.embedding, "embedding")
    depths = [level.depth for level in network.levels]
    config = {
        "_class_name": "UNet2DConditionModel" if conditioned else "UNet2DModel",
        **_shared(network, conditions),
        "flip_sin_to_cos": not attribute(network, waves, "sine_first"),
        "freq_shift": int(attribute(network, waves, "shift")),
        "time_embedding_dim": network.embedding.output_layer.units,
        "layers_per_block": depths if conditioned and len(set(depths)) > 1 else one_of_all(network, "depth", depths),
        "norm_num_groups": _groups(network),
        "norm_eps": attribute(network, network.normalization, "epsilon"),
        "act_fn": name_of(network, ACTIVATIONS, network.levels[0].block.activation),
        **_blocks(network),
        **_middle(network, conditioned),
    }
    if conditioned:
        return {**config, **_attention(network), **_conditions(network, conditions), **_tuned(network)}
    return {**config, "attention_head_dim": _head_width(network)}


def ncsnpp_config(network: NCSNpp) -> Config:
    """The configuration of an NCSN++."""
    attention = ["" if level.mixer is None else "Attn" for level in network.levels]
    norm, first = attribute(network, network.normalization, "epsilon"), network.normalization.groups
    down, _ = _mixers(network)
    on_levels = [one.normalization.groups_used for level in down for one in level if isinstance(one, SelfAttention)]
    one_of_all(network, "groups` of attention's norm on the levels", [32, *on_levels])
    if first is not None:  # None means the largest number up to 32, in diffusers too
        blocks = [layer for layer in network.bridge.layers if isinstance(layer, ResidualBlock)]
        groups = [block.normalization.groups_used for block in blocks]
        one_of_all(network, "groups` in the middle and at the end", [first, *groups])
    return {
        "_class_name": "UNet2DModel",
        **_shared(network, network.conditions),
        "time_embedding_type": "fourier",
        "time_embedding_dim": attribute(network, network.embedding, "output_layer").units,
        "down_block_types": [f"{kind}SkipDownBlock2D" for kind in attention],
        "up_block_types": [f"{kind}SkipUpBlock2D" for kind in attention[::-1]],
        "layers_per_block": one_of_all(network, "depth", [level.depth for level in network.levels]),
        "norm_num_groups": first,
        "norm_eps": norm,
        "attention_head_dim": _head_width(network),
        **_middle(network, False),
    }


def _shared(network: UNet, conditions) -> Config:
    block = network.levels[0].block
    return {
        "sample_size": size_of(network),
        "in_channels": network.stem.kernel.shape[2],
        "out_channels": network.head.kernel.shape[3],
        "block_out_channels": [level.width for level in network.levels],
        "resnet_time_scale_shift": "scale_shift" if block.scale_shift else "default",
        "dropout": block.dropout,
        **_labels(network, conditions),
    }


# --- blocks


def _blocks(network: UNet) -> Config:
    *finer, _ = network.levels
    mixers_down, mixers_up = _mixers(network)
    shrinking = [*(level.downsample for level in finer), None]
    growing = [None, *(level.upsample for level in finer)]
    rows = zip(network.levels, mixers_down, mixers_up, shrinking, growing, strict=True)
    types = [(_type(network, "Down", a, b, c), _type(network, "Up", a, d, e)) for a, b, d, c, e in rows]
    resnets = {
        f"{way}sample_type": "resnet"
        for way, name in (("down", "downsample"), ("up", "upsample"))
        if any(isinstance(one, SelfAttention) for level in (*mixers_down, *mixers_up) for one in level)
        and any(isinstance(getattr(level, name), ResidualBlock) for level in finer)
    }
    paddings = {level.downsample.padding for level in finer if hasattr(level.downsample, "padding")}
    padding = one_of_all(network, "padding", sorted(paddings) or ["symmetric"])
    padding = next(number for number, name in PADDINGS.items() if name == padding)
    down, up = ([pair[i] for pair in types] for i in (0, 1))
    return {"down_block_types": down, "up_block_types": up[::-1], "downsample_padding": padding, **resnets}


def _type(network, way: str, level, mixers, resampler) -> str:
    kinds = {type(mixer) for mixer in mixers}
    if len(kinds) > 1 or not kinds <= TYPES.keys():
        unknown = next((mixer for mixer in mixers if type(mixer) not in TYPES), mixers)
        raise ValueError(f"{network.name}: diffusers does not support a block with the mixer {unknown!r}")
    name = TYPES[kinds.pop()]
    tuned = getattr(level.block, "rescale", 1) != 1 or getattr(level.block, "embed_activation", None) is not None
    if not name and (isinstance(resampler, ResidualBlock) or tuned):
        return f"Resnet{way}sampleBlock2D"
    return f"{name}{way}Block2D"


def _mixers(network: UNet) -> tuple[list[list], list[list]]:
    """The layer, or None, after each block, by level from the finest, for the encoder and the decoder."""
    down, up, last = iter(network.down), iter(network.up), network.levels[-1]
    on_way_down = []
    for level in network.levels:
        on_way_down.append([_follows(next(down), template) for template in level.mixers_down])
        if level is not last:
            next(down)
    on_way_up = [[_follows(next(up), one) for one in level.mixers_up] for level in reversed(network.levels)]
    return on_way_down, on_way_up[::-1]


def _follows(chain: Chain, template: Any) -> Any:
    return None if template is None else chain.layers[1]


def _tuned(network: UNet) -> Config:
    scales = [level.block.rescale for level in network.levels if level.block.rescale != 1]
    before = [level.block.embed_activation for level in network.levels if level.block.embed_activation is not None]
    before += [network.middle.block.embed_activation] if network.middle.block.embed_activation is not None else []
    config: Config = {"resnet_out_scale_factor": scales[0]} if scales else {}
    if before:
        config["resnet_skip_time_act"] = True
        if before[0] != "linear":
            config["time_embedding_act_fn"] = name_of(network, ACTIVATIONS, before[0])
    return config


def _middle(network: UNet, conditioned: bool) -> Config:
    middle, mixer = network.middle, network.middle.mixer
    if middle.depth == 0:
        return {"mid_block_type": None}
    config = {"mid_block_scale_factor": middle.block.rescale}
    if conditioned:
        if type(mixer) not in MIDDLES:
            raise ValueError(f"{network.name}: diffusers does not support a middle with the mixer {mixer!r}")
        only = {"mid_block_only_cross_attention": mixer.only_context} if isinstance(mixer, ContextAttention) else {}
        return {**config, "mid_block_type": MIDDLES[type(mixer)], **only}
    norm = getattr(mixer, "normalization", None)
    groups = network.bridge.layers[1].normalization.groups_used if isinstance(norm, GroupNorm) else None
    return {**config, "add_attention": mixer is not None, "attn_norm_num_groups": groups}


# --- attention


def _attention(network: UNet) -> Config:
    """The keys for heads, depths and the context."""
    count = len(network.levels)
    down, up = _mixers(network)
    middle = [layer for layer in network.bridge.layers if isinstance(layer, (SpatialTransformer, ContextAttention))]
    own = [(i, False, one) for i, level in enumerate(down) for one in level if one is not None]
    own += [(i, True, one) for i, level in enumerate(up) for one in level if one is not None]
    own += [(count - 1, False, one) for one in middle]
    context = [one for *_, one in own if isinstance(one, (SpatialTransformer, ContextAttention))]
    if not context:
        raise ValueError(f"{network.name}: no level attends to the context, which diffusers does not support")
    heads: dict[int, int] = {}
    for i, above, layer in own:
        across = isinstance(layer, SpatialTransformer)
        value = layer.blocks[0].self_attention.attention._split[0] if across else _split(layer)[1]
        place = count - 1 - i if above and not across else i  # this list is not reversed in diffusers
        if heads.setdefault(place, value) != value:
            raise ValueError(
                f"{network.name}: diffusers supports one number of heads at level {place}; received several"
            )
    first = next(iter(heads.values()))
    only = [any(map(_only_context, level)) for level in down]
    return {
        "attention_head_dim": [heads.get(i, first) for i in range(count)],
        **_depths(network, down, up, middle),
        "cross_attention_dim": _context_width(context[0]),
        "use_linear_projection": True,
        "only_cross_attention": only if any(only) else False,
        "cross_attention_norm": _context_norm(network, context),
    }


def _split(layer) -> tuple[int, int]:
    return layer._split if isinstance(layer, ContextAttention) else layer.attention._split


def _only_context(layer) -> bool:
    if isinstance(layer, SpatialTransformer):
        return bool(getattr(layer.block, "only_context", False))
    return isinstance(layer, ContextAttention) and layer.only_context


def _context_width(layer) -> int:
    if isinstance(layer, ContextAttention):
        return layer.context_key.kernel.shape[0]
    return layer.blocks[0].cross_attention.attention.key.kernel.shape[0]


def _context_norm(network, layers) -> str | None:
    norms = [layer.context_normalization for layer in layers if isinstance(layer, ContextAttention)]
    names = {type(None): None, LayerNorm: "layer_norm", GroupNorm: "group_norm"}
    kinds = [names.get(type(norm), norm) for norm in norms]
    return one_of_all(network, "context_normalization", kinds) if kinds else None


def _depths(network, down, up, middle) -> Config:
    """The keys for depths of stacks of transformer blocks; lists where those of a level differ."""
    ours = [[one.depth if isinstance(one, SpatialTransformer) else None for one in level] for level in down]
    theirs = [[one.depth if isinstance(one, SpatialTransformer) else None for one in level] for level in up]
    deep = [one.depth for one in middle if isinstance(one, SpatialTransformer)]
    if deep and ours[-1][0] is None:
        ours[-1] = deep * len(ours[-1])
    if deep and ours[-1][0] != deep[0]:
        raise ValueError(
            f"{network.name}: diffusers supports one depth for the coarsest level and the middle; received two"
        )
    lists = [[1 if depth is None else depth for depth in level] for level in ours]
    turned = [lists[i][:1] * len(level) if level[0] is None else level for i, level in enumerate(theirs)]
    plain = [level[0] if len(set(level)) == 1 else level for level in lists]
    plain_up = [level[0] if len(set(level)) == 1 else level for level in turned]
    config = {"transformer_layers_per_block": plain}
    return (
        config
        if plain == plain_up and all(isinstance(one, int) for one in plain)
        else {**config, "reverse_transformer_layers_per_block": plain_up[::-1]}
    )


def _head_width(network: UNet) -> int | None:
    """The channels per head at every level; None if each has one head."""
    layers = [one for way in _mixers(network) for level in way for one in level if isinstance(one, SelfAttention)]
    layers += [layer for layer in network.bridge.layers if isinstance(layer, SelfAttention)]
    splits = [layer.attention._split for layer in layers]
    if all(heads == 1 for heads, _ in splits):
        return None
    return one_of_all(network, "head_width", [width for _, width in splits])


def _groups(network: UNet) -> int:
    """The groups of all normalisations except those of a context, of attention in the middle, and of templates."""
    layers = network._flatten_layers()
    apart = [layer.normalization for layer in network.bridge.layers if isinstance(layer, SelfAttention)]
    apart += [layer.context_normalization for layer in layers if isinstance(layer, ContextAttention)]
    own = {id(layer) for layer in apart}
    norms = [layer for layer in layers if isinstance(layer, GroupNorm) and layer.built]
    return one_of_all(network, "groups", [norm.groups_used for norm in norms if id(norm) not in own])


# --- conditions

KNOWN = {"context", "label", "added", "image_embeds", "text_embeds"}


def _labels(network: UNet, conditions) -> Config:
    layer = conditions.get("label")
    unknown = sorted(set(conditions) - KNOWN - set(map_conditions(network)))
    if unknown or not isinstance(layer, (type(None), LabelEmbedding, MLPEmbedding, Dense, keras.layers.Identity)):
        raise ValueError(f"{network.name}: diffusers does not support these conditions: {unknown or {'label': layer}}")
    if layer is None and any(one.noise is not None for one in map_conditions(network).values()):
        return {"class_embed_type": "timestep"}
    if isinstance(layer, LabelEmbedding):
        return {"num_class_embeds": layer.table.shape[0]}
    if isinstance(layer, Dense):
        width = layer.kernel.shape[0]
        return {"class_embed_type": "simple_projection", "projection_class_embeddings_input_dim": width}
    if isinstance(layer, MLPEmbedding) and isinstance(layer.embedding, keras.layers.Identity):
        width = layer.hidden.kernel.shape[0]
        return {"class_embed_type": "projection", "projection_class_embeddings_input_dim": width}
    kinds = {MLPEmbedding: "timestep", keras.layers.Identity: "identity"}
    return {} if layer is None else {"class_embed_type": kinds[type(layer)]}


def _conditions(network: UNet, conditions) -> Config:
    """The keys for tokens and for vectors added to the time, except the label."""
    config: Config = {}
    if isinstance(network.embedding, GuidanceEmbedding):
        config["time_cond_proj_dim"] = network.embedding.size
    context = conditions.get("context")
    config |= _context(context.layer if isinstance(context, Prompt) else context)
    if "image_embeds" in conditions:
        config |= _image(conditions["image_embeds"])
    if "added" in conditions:
        added = conditions["added"]
        waves = attribute(network, attribute(network, added, "parts").get("time_ids"), "width")
        config["addition_embed_type"] = "text_time"
        config["addition_time_embed_dim"] = waves
        config["projection_class_embeddings_input_dim"] = attribute(network, added.layer, "hidden").kernel.shape[0]
    return config


def _context(layer) -> Config:
    both = isinstance(layer, VectorAndTokens)
    tokens, config = layer.tokens if both else layer, {}
    if isinstance(tokens, Dense):
        config |= {"encoder_hid_dim": tokens.kernel.shape[0], "encoder_hid_dim_type": "text_proj"}
    if both:
        pool = next((one for one in getattr(layer.vector, "layers", []) if hasattr(one, "heads")), None)
        config |= {"addition_embed_type": "text", "addition_embed_type_num_heads": getattr(pool, "heads", 64)}
    return config


def _image(layer) -> Config:
    """The keys for Kandinsky's image embeddings: as tokens, a vector, or both."""
    config: Config = {}
    parts = [layer.vector, layer.tokens] if isinstance(layer, VectorAndTokens) else [layer]
    for part in parts:
        layers = part.layers if isinstance(part, Chain) else [part]
        normed, tokens = isinstance(layers[-1], LayerNorm), any(isinstance(x, keras.layers.Reshape) for x in layers)
        if tokens:
            config["encoder_hid_dim_type"] = "image_proj" if normed else "text_image_proj"
        else:
            config["addition_embed_type"] = "image" if normed else "text_image"
        if normed:
            config["encoder_hid_dim"] = layers[0].kernel.shape[0]
    return config


# --- shared helpers


def size_of(network: keras.Model) -> int | list | None:
    """The size of the image for which it was built."""
    sizes = list(input_shapes(network).get("image", (None,) * 4)[1:3])
    return sizes[0] if sizes[0] == sizes[1] else sizes


def one_of_all(network, name: str, values: list) -> Any:
    """The common value, or a ValueError."""
    if any(value != values[0] for value in values):
        raise ValueError(f"{network.name}: diffusers supports one `{name}` for all blocks; received: {values}")
    return values[0]


def attribute(network, layer, name: str) -> Any:
    """An attribute of a layer, or a ValueError."""
    if not hasattr(layer, name):
        raise ValueError(f"{network.name}: diffusers does not support {layer!r}")
    return getattr(layer, name)


def name_of(network, table: dict, value: Any) -> str:
    """The name of a value in diffusers."""
    for name, known in table.items():
        if known == value:
            return name
    raise ValueError(f"{network.name}: diffusers supports {sorted(set(table.values()))}; received: {value!r}")
