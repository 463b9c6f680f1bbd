"""Weights of other code bases: DiT, improved and guided diffusion, and the SimpleUNet of PyTorch tutorials.

    network = dit("DiT-XL-2-256x256.pt")
    network = simple_unet(theirs.state_dict())
    network = guided("64x64_diffusion.safetensors", image_size=64, multipliers=(1, 2, 3, 4), new_order=True)

Such a file describes the network only by the shapes of its weights; what they do not determine, such as the number of
heads and the size of the images, must be given.
"""

import functools
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from kdiff.blocks.attention import MultiHeadAttention, SelfAttention
from kdiff.blocks.convolution import ResidualBlock, SimpleBlock
from kdiff.blocks.embeddings import MLPEmbedding, SinusoidalEmbedding
from kdiff.blocks.lookup import LabelEmbedding
from kdiff.blocks.normalization import AdaptiveNorm, GroupNorm
from kdiff.blocks.patches import Patchify, Unpatchify
from kdiff.blocks.resampling import Downsample, Upsample
from kdiff.blocks.transformer import FeedForward, TransformerBlock, adaptive_block
from kdiff.interop.arrays import State
from kdiff.interop.checkpoints import state_of
from kdiff.interop.files import read_state
from kdiff.interop.transformers import patch_layout
from kdiff.interop.unsupported import about_names
from kdiff.interop.weights import Part, Rows, Slot, fill, slots
from kdiff.networks.dit import DiT
from kdiff.networks.levels import Level
from kdiff.networks.simple_unet import SimpleUNet
from kdiff.networks.unet import UNet

__all__ = [
    "DIT_NAMES",
    "SIMPLE_NAMES",
    "Source",
    "count_of",
    "dit",
    "dit_slots",
    "guided",
    "guided_layers",
    "guided_names",
    "guided_slots",
    "read",
    "shape_of",
    "simple_slots",
    "simple_unet",
]

Source = str | Path | Mapping[str, Any]


def read(source: Source) -> tuple[State, str]:
    """The arrays, from a file or a mapping of arrays by name, and the name of the source for errors.

    Args:
        source: a `.safetensors`, `.npz` or `.pt` file (of `.pt` only tensors are read); or a mapping of arrays. From a
            checkpoint with several state dicts, the averaged weights are read: see `kdiff.interop.checkpoints`.
    """
    if isinstance(source, Mapping):
        return state_of(source, "the state dict"), "the state dict"
    return read_state(source), str(source)


def shape_of(state: State, name: str, source: str, rank: int = 2) -> tuple[int, ...]:
    """The shape of a required array with `rank` axes."""
    if name not in state:
        raise ValueError(
            f"{source}: `{name}` is missing, which determines the size of the network; it has: {list(state)[:5]}"
            f"{about_names(state)}"
        )
    shape = state[name].shape
    if len(shape) != rank or 0 in shape:
        raise ValueError(f"{source}: `{name}` must have {rank} nonempty axes; received the shape: {shape}")
    return shape


def count_of(state: State, prefix: str) -> int:
    """The number of modules in a list, from 0 to the first missing index."""
    found = (re.match(rf"{re.escape(prefix)}\.(\d+)\.", name) for name in state)
    numbers = {int(one[1]) for one in found if one}
    return next(i for i in itertools.count() if i not in numbers)


# --- DiT

DIT_NAMES = {
    MLPEmbedding: {"mlp.0": "hidden", "mlp.2": "output_layer"},
    TransformerBlock: {
        "adaLN_modulation.1": [
            Part("self_attention.normalization.projection", rows=Rows((1, 0), 6)),
            Part("self_attention.gate", rows=Rows((2,), 6)),
            Part("feed_forward.normalization.projection", rows=Rows((4, 3), 6)),
            Part("feed_forward.gate", rows=Rows((5,), 6)),
        ],
        "attn": "self_attention.attention",
        "mlp": "feed_forward",
    },
    MultiHeadAttention: {
        "qkv": [Part(name, rows=Rows((i,), 3)) for i, name in enumerate(("query", "key", "value"))],
        "proj": "output_layer",
    },
    FeedForward: {"fc1": "hidden", "fc2": "output_layer"},
    AdaptiveNorm: {"adaLN_modulation.1": Part("projection", rows=Rows((1, 0), 2))},
    Patchify: {"proj": Part("projection", patch_layout)},
    Unpatchify: {"linear": "projection"},
}


def dit(source: Source, heads: int = 16, image_size: int | None = None, strict: bool = True) -> DiT:
    """A DiT of the paper (Peebles & Xie 2022) with its weights: the condition "label" is a class, or 1000 for none.

    Args:
        source: the weights, as in `read`.
        heads: 16 in DiT-L and DiT-XL, 12 in DiT-B, 6 in DiT-S.
        image_size: of the latents, an eighth of that of the picture; None for the size of the stored positions.
        strict: whether weights that do not match are an error; otherwise a warning.
    """
    state, name = read(source)
    width, channels, patch, _ = shape_of(state, "x_embedder.proj.weight", name, 4)
    outputs = shape_of(state, "final_layer.linear.weight", name)[0] // patch**2
    classes = shape_of(state, "y_embedder.embedding_table.weight", name)[0] - 1
    network = DiT(
        width,
        count_of(state, "blocks"),
        patch,
        adaptive_block(heads),
        embedding=MLPEmbedding(SinusoidalEmbedding(256), width),
        conditions={"label": LabelEmbedding(classes, dropout=0.1)},
        out_channels=outputs,
    )
    positions = state.pop("pos_embed", None)  # a constant, which the network computes
    if image_size is None and positions is not None and positions.ndim > 1:
        image_size = patch * round(positions.shape[-2] ** 0.5)
    shapes = {"image": (None, image_size, image_size, channels), "time": (None,), "label": (None,)}
    fill(network, shapes, dit_slots, state, name, strict)
    return network


def dit_slots(network: DiT) -> Iterator[Slot]:
    """The names of the weights of a DiT in the paper's code."""
    layers = {
        "x_embedder": network.patchify,
        "t_embedder": network.embedding,
        "y_embedder.embedding_table": network.conditions["label"],
        **{f"blocks.{i}": chain.layers[0] for i, chain in enumerate(network.blocks)},
    }
    for name, layer in layers.items():
        yield from slots(layer, name, DIT_NAMES)
    for layer in (network.last, network.head):
        yield from slots(layer, "final_layer", DIT_NAMES)


# --- improved and guided diffusion


def _heads(new_order: bool):
    """The rows of queries, keys and values in their joint layer: all queries first, or head by head."""

    def rows(chunk):
        return lambda layer: Rows((chunk,), 3, 1 if new_order else layer._split[0])

    return [Part(name, rows=rows(i)) for i, name in enumerate(("query", "key", "value"))]


def guided_names(new_order: bool = False) -> dict[type, dict[str, Any]]:
    """The names of the parts of the layers."""
    return {
        MLPEmbedding: {"0": "hidden", "2": "output_layer"},
        ResidualBlock: {
            "in_layers.0": "normalization",
            "in_layers.2": "first",
            "emb_layers.1": ["projection", "second_normalization.projection"],
            "out_layers.0": "second_normalization",
            "out_layers.3": "second",
            "skip_connection": "shortcut",
        },
        AdaptiveNorm: {"": "normalization"},
        SelfAttention: {"norm": "normalization", "": "attention"},
        MultiHeadAttention: {"qkv": _heads(new_order), "proj_out": "output_layer"},
        Downsample: {"op": "convolution"},
        Upsample: {"conv": "last"},
    }


def guided(
    source: Source,
    image_size: int,
    multipliers: Sequence[float],
    attention_at: Sequence[int] = (32, 16, 8),
    heads: int | None = None,
    head_width: int | None = 64,
    scale_shift: bool = True,
    new_order: bool = False,
    strict: bool = True,
) -> UNet:
    """A U-Net of improved diffusion (Nichol & Dhariwal 2021) or guided diffusion (Dhariwal & Nichol 2021).

    Args:
        source: the weights, as in `read`.
        image_size: of the images.
        multipliers: the channels of each level as multiples of the width of the time embedding's sinusoids
            (`channel_mult` there, of `model_channels`). At 512, the first, also of the first convolution, is a half.
        attention_at: the sizes of maps with attention (`attention_resolutions` there).
        heads: `num_heads`, if `head_width` is None.
        head_width: `num_head_channels`; None where the number of heads is given.
        scale_shift: `use_scale_shift_norm`.
        new_order: `use_new_attention_order`: in the joint layer all queries come first, not head by head.
        strict: whether weights that do not match are an error; otherwise a warning.
    """
    state, name = read(source)
    stem, channels = shape_of(state, "input_blocks.0.0.weight", name, 4)[:2]
    inner, width = shape_of(state, "time_embed.0.weight", name)
    resampled = any(re.match(r"input_blocks\.\d+\.0\.in_layers", key) for key in _resamplers(state, len(multipliers)))
    norm = GroupNorm(32)
    mixer = SelfAttention(None if head_width else heads or 1, head_width, norm, zero=False)
    block = ResidualBlock(None, scale_shift, normalization=norm)
    down = block.clone(resample=Downsample("average")) if resampled else Downsample(padding="symmetric")
    up = block.clone(resample=Upsample(convolution=False)) if resampled else Upsample()
    depth = (count_of(state, "input_blocks") - len(multipliers)) // len(multipliers)
    levels = [
        Level(int(width * multiplier), depth, block, mixer if image_size // 2**i in attention_at else None, down, up)
        for i, multiplier in enumerate(multipliers)
    ]
    classes = shape_of(state, "label_emb.weight", name)[0] if "label_emb.weight" in state else None
    network = UNet(
        levels,
        Level(levels[-1].width, 2, block, mixer),
        MLPEmbedding(SinusoidalEmbedding(width), inner),
        {} if classes is None else {"label": LabelEmbedding(classes)},
        normalization=norm,
        out_channels=shape_of(state, "out.2.weight", name, 4)[0],
        stem_width=None if stem == levels[0].width else stem,
    )
    labels = {} if classes is None else {"label": (None,)}
    shapes = {"image": (None, image_size, image_size, channels), "time": (None,), **labels}
    fill(network, shapes, functools.partial(guided_slots, new_order=new_order), state, name, strict)
    return network


def _resamplers(state: State, levels: int) -> list[str]:
    """The names of the weights of the blocks that end a level of the encoder."""
    depth = (count_of(state, "input_blocks") - levels) // levels
    ends = tuple(f"input_blocks.{(depth + 1) * i}." for i in range(1, levels))
    return [name for name in state if name.startswith(ends)]


def guided_slots(network: UNet, new_order: bool = False) -> Iterator[Slot]:
    """The names of the weights of a U-Net in the code of improved and of guided diffusion."""
    names = guided_names(new_order)
    for name, layer in guided_layers(network):
        yield from slots(layer, name, names)


def guided_layers(network: UNet) -> Iterator[tuple[str, Any]]:
    """The layers of a U-Net by their names in that code, which latent diffusion shares."""
    yield from {"time_embed": network.embedding, "label_emb": network.conditions.get("label")}.items()
    yield "input_blocks.0.0", network.stem
    for way, chains, first in (("input_blocks", network.down, 1), ("output_blocks", network.up, 0)):
        for i, chain in enumerate(chains):
            yield from ((f"{way}.{first + i}.{j}", layer) for j, layer in enumerate(chain.layers))
    yield from ((f"middle_block.{i}", layer) for i, layer in enumerate(network.bridge.layers))
    yield from {"out.0": network.normalization, "out.2": network.head}.items()


# --- the SimpleUNet of PyTorch tutorials

SIMPLE_NAMES = {
    MLPEmbedding: {"1": "hidden", "3": "output_layer"},
    SimpleBlock: {
        "conv1": "first",
        "conv2": "second",
        "time_mlp": "projection",
        "norm1": "first_norm",
        "norm2": "second_norm",
        "shortcut": "shortcut",
    },
}


def simple_unet(source: Source, strict: bool = True) -> SimpleUNet:
    """The SimpleUNet of PyTorch tutorials (`enc1`, `enc2`, ..., `mid`, ..., `dec1`, `out`) with its weights.

    The other parts of such a tutorial, with T steps, are

        linear betas                    LinearBeta(T)
        cosine betas                    CosineBeta(T, min_beta=1e-4, max_beta=0.9999)
        its integer time i              t = (i + 1) / T
        q_sample(x, i, noise)           schedule(x, noise, t)
        the posterior's mean, variance  schedule.posterior(x, x_t, schedule.at(t), schedule.at(t - 1 / T))
        the model and its loss          DiffusionModel(network, schedule, "noise", times="discrete", time_label="index")
        sample, with x_0 clamped        Sampler("ddpm", "all", guidance="clip")
        DDIM at the integer times i     Sampler("ddim", Times([*(i + 1) / T, 0])), i falling

    Args:
        source: the weights, as in `read`.
        strict: whether weights that do not match are an error; otherwise a warning.
    """
    state, name = read(source)
    count = 1 + next(i for i in itertools.count() if f"enc{i + 2}.conv1.weight" not in state)
    widths = [shape_of(state, f"enc{i + 1}.conv1.weight", name, 4)[0] for i in range(count)]
    channels, outputs = state["enc1.conv1.weight"].shape[1], shape_of(state, "out.weight", name, 4)[0]
    network = SimpleUNet(
        widths,
        shape_of(state, "mid.conv1.weight", name, 4)[0],
        shape_of(state, "time_mlp.1.weight", name)[0],
        out_channels=None if outputs == channels else outputs,
    )
    fill(network, {"image": (None, None, None, channels), "time": (None,)}, simple_slots, state, name, strict)
    return network


def simple_slots(network: SimpleUNet) -> Iterator[Slot]:
    """The names of the weights of a SimpleUNet in PyTorch tutorials."""
    layers = {"time_mlp": network.embedding, "mid": network.middle, "out": network.head}
    for way, blocks in (("enc", network.down), ("dec", network.up)):
        layers |= {f"{way}{i + 1}": block for i, block in enumerate(blocks)}
    for name, layer in layers.items():
        yield from slots(layer, name, SIMPLE_NAMES)
