"""Stable Diffusion 1, 2, XL and 3 in one file, in the layout of the code that trained them (latent diffusion, `sgm`).

    model = load("v1-5-pruned-emaonly.safetensors", tokenizer="clip-vit-large-patch14")
    images = model.sample(4, text="a red circle", guidance=7.5)

It is the `DiffusionModel` that `diffusers.load` makes of the folder of the same weights. A file has no tokenizer: it is
given, or the model takes embeddings as "context", and of XL "text_embeds" besides.

    model.diffusion_model.                      the U-Net: time_embed, label_emb, input_blocks, middle_block, ...
    model_ema.                                  its averaged weights, by names without dots
    first_stage_model.                          the autoencoder
    cond_stage_model.transformer.text_model.    1: CLIP's encoder in the layout of transformers
    cond_stage_model.model.                     2: OpenCLIP's, of which the last of 24 blocks is not used
    conditioner.embedders.0.transformer.        XL: CLIP's; in its refiner "0.model." is OpenCLIP's
    conditioner.embedders.1.model.              OpenCLIP's
    v_pred, ztsnr                               empty: that velocities are predicted, that nothing is left at T

Of version 3 see `kdiff.interop.single_files_sd3`.

Sizes are read off the weights. What these do not show is as published: attention has 8 heads in version 1, whose layers
before it are convolutions, and heads of 64 channels elsewhere; all norms have 32 groups.
"""

import functools
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from kdiff import deprecated
from kdiff.base import check_integer
from kdiff.blocks.attention import MultiHeadAttention
from kdiff.blocks.transformer import FeedForward, SpatialTransformer, TransformerBlock
from kdiff.codecs import Latent
from kdiff.encoders import CLIPText, Prompt
from kdiff.encoders.base import Encoder
from kdiff.encoders.tokenizers import JSONTokenizer
from kdiff.interop import autoencoders, diffusers, maps, prompts, schedulers, single_files_sd3, tokenizers, unets
from kdiff.interop.arrays import State
from kdiff.interop.configs import Described, explained
from kdiff.interop.encoders import CLIP_NAMES
from kdiff.interop.original import Source, count_of, guided_layers, guided_names, read, shape_of
from kdiff.interop.unet_names import NAMES
from kdiff.interop.unsupported import about_names
from kdiff.interop.weights import Part, Rows, Slot, fill, slots
from kdiff.model import DiffusionModel
from kdiff.networks.unet import UNet
from kdiff.text import Tokenizer

__all__ = [
    "AVERAGES",
    "BESIDE",
    "ENCODERS",
    "HEADS",
    "HEAD_WIDTH",
    "LDM_NAMES",
    "NOT_WEIGHTS",
    "NUMBER_WIDTH",
    "OPEN_CLIP_BLOCKS",
    "OPEN_CLIP_NAMES",
    "OTHERS",
    "UNET",
    "load",
    "open_clip_slots",
    "unet_slots",
]

UNET, AVERAGES = "model.diffusion_model.", "model_ema.diffusion_model"
ENCODERS = ("cond_stage_model.", "conditioner.embedders.0.", "conditioner.embedders.1.")
# What a file may have besides the U-Net: parts that are read elsewhere, averages, constants, and MiDaS, whose depth is
# given as a map.
OTHERS = re.compile(
    r"(first_stage_model|cond_stage_model|conditioner|model_ema|depth_model)\.|(v_pred|ztsnr|scale_factor|logvar"
    r"|lvlb_weights|global_step|betas|denoiser\.(sigmas|log_sigmas)"
    r"|(sqrt_|log_)?(one_minus_|recip_|recipm1_)?alphas_cumprod(_prev)?|posterior_\w+)$"
)
# Of CLIP's projection of a vector none of the three makes use.
NOT_WEIGHTS = re.compile(r"\.(position_ids|attn_mask|logit_scale|transformer\.text_projection\.weight)$")
# The pipeline of diffusers by the channels beside x_t.
BESIDE = {
    0: "StableDiffusionPipeline",
    1: "StableDiffusionDepth2ImgPipeline",
    4: "StableDiffusionInstructPix2PixPipeline",
    5: "StableDiffusionInpaintPipeline",
}
HEADS, HEAD_WIDTH = 8, 64
NUMBER_WIDTH = 256  # of the embedding of each of XL's "time_ids"
OPEN_CLIP_BLOCKS = 23  # of 24 in version 2

LDM_NAMES = {
    **guided_names(),
    **{kind: NAMES[kind] for kind in (SpatialTransformer, TransformerBlock, FeedForward, MultiHeadAttention)},
}
OPEN_CLIP_NAMES = {
    CLIPText: {
        "token_embedding": "table",
        "positional_embedding": "positions",
        "transformer.resblocks.*": "blocks",
        "ln_final": "norm",
        "text_projection": Part("projection_layer", "same"),  # (width, projection)
    },
    TransformerBlock: {
        "ln_1": "self_attention.normalization",
        "attn": "self_attention.attention",
        "ln_2": "feed_forward.normalization",
        "mlp": "feed_forward",
    },
    MultiHeadAttention: {
        "in_proj": [Part(name, rows=Rows((i,), 3)) for i, name in enumerate(("query", "key", "value"))],
        "out_proj": "output_layer",
    },
    FeedForward: {"c_fc": "hidden", "c_proj": "output_layer"},
}
# OpenCLIP has some arrays without a layer around them.
_BARE = {
    "in_proj.weight": "in_proj_weight",
    "in_proj.bias": "in_proj_bias",
    "positional_embedding.weight": "positional_embedding",
    "text_projection.weight": "text_projection",
}


@deprecated.arguments(averages="ema")
def load(
    source: Source,
    tokenizer: Any = None,
    *,
    velocity: bool | None = None,
    zero_snr: bool | None = None,
    image_size: int | None = None,
    ema: bool = True,
    clip_skip: int = 0,
    strict: bool = True,
    **options: Any,
) -> DiffusionModel:
    """Stable Diffusion 1, 2, XL, 3 or 3.5, told apart by the names and shapes of the weights.

    Those for inpainting, by a depth, by instructions (InstructPix2Pix) and XL's refiner are read too; not the upscaler.
    Noise levels are those of all three, whatever constants the file has. `sample` is by the solver of the published
    folders: PNDM; DDIM for velocities, or where nothing is left at T, of versions 1 and 2; Euler's method of XL and 3.

    Args:
        source: a `.safetensors`, `.ckpt`, `.pt` or `.npz` file, of which a pickle is read for its tensors alone; or a
            mapping of arrays.
        tokenizer: the folder of CLIP's tokenizer (`tokenizer.json`, or `vocab.json` and `merges.txt`) or a `Tokenizer`,
            which no such file has: "text" takes strings then. It is made to fill up as the encoders of the file have
            learned, CLIP's with the token of the end and OpenCLIP's with token 0; a list, of one for each encoder, is
            used as it is. Of version 3 T5 is left out but for a list of three. None for no text encoders: the network
            takes what they give.
        velocity: whether the network predicts velocities, not noise; None if the file's "v_pred" tells, or it is of
            version 1 or XL, or of version 2 with something beside x_t, which predict noise.
        zero_snr: whether nothing of the data is left at T, where samples begin then (Lin et al. 2023,
            arXiv:2305.08891); None for whether there is a "ztsnr". Version 3 has neither `velocity` nor `zero_snr`.
        image_size: of samples, if `sample` is not told; None for 512, of version 2 with velocities 768, of XL and 3
            1024.
        ema: whether to take the averaged weights of the U-Net, if there are any.
        clip_skip: how many of the last blocks of the text encoders to leave out.
        strict: whether weights that do not match are an error; otherwise a warning.
        options: arguments of `DiffusionModel`, in place of what the file says.

    Raises:
        ValueError: if the file is missing or damaged; if it is none of these; if it does not tell what is predicted;
            if there is a tokenizer and no text encoder; if weights do not match, with a list of all that do not.
    """
    state, name = read(source)
    if single_files_sd3.is_one(state):
        if velocity is not None or zero_snr is not None:
            raise ValueError(
                f"{name}: is Stable Diffusion 3, of which `velocity` and `zero_snr` say nothing; leave them out"
            )
        image_size = 1024 if image_size is None else image_size
        check_integer("single_files.load", "image_size", image_size)
        return single_files_sd3.load(state, name, tokenizer, image_size, clip_skip, strict, options)
    _check_is_one(state, name)
    xl, first = f"{UNET}label_emb.0.0.weight" in state, not _is_linear(state)
    beside = _beside(state, name)
    velocity = _velocity(state, name, velocity, told=xl or first or beside > 0)
    zero_snr = "ztsnr" in state if zero_snr is None else zero_snr
    if image_size is None:
        image_size = 1024 if xl else 768 if velocity and not first else 512
    check_integer("single_files.load", "image_size", image_size)
    codec = _codec(state, name, 0.13025 if xl else 0.18215, strict) if "codec" not in options else options["codec"]
    config = _unet_config(state, name, image_size // (codec.factor if isinstance(codec, Latent) else 8))
    prompt = None if tokenizer is None else _prompt(state, name, tokenizer, xl, clip_skip, strict)
    with explained(name):
        described = unets.unet_2d_condition(config, name)
        channels = maps.maps_of(BESIDE[beside], config["in_channels"], config["out_channels"], False, name)
        described = maps.with_maps(described, channels)
        if prompt is not None:
            described = prompts.conditioned(described, prompt)
        process = schedulers.process(_scheduler(xl, velocity, zero_snr), name)
    _fill_unet(described, state, name, ema, strict)
    return diffusers.assembled(described, process, codec, options)


def _check_is_one(state: State, name: str) -> None:
    if not any(key.startswith(f"{UNET}input_blocks.") for key in state):
        raise ValueError(
            f"{name}: not Stable Diffusion in one file, which has `{UNET}input_blocks.0.0.weight`; it has: "
            f"{list(state)[:5]}{about_names(state)}"
        )


def _beside(state: State, name: str) -> int:
    """The channels beside x_t."""
    inputs = shape_of(state, f"{UNET}input_blocks.0.0.weight", name, 4)[1]
    outputs = shape_of(state, f"{UNET}out.2.weight", name, 4)[0]
    if inputs - outputs not in BESIDE:
        raise ValueError(
            f"{name}: the U-Net must have {list(BESIDE)} channels more in than out; received: {inputs} in "
            f"(`{UNET}input_blocks.0.0.weight`) and {outputs} out (`{UNET}out.2.weight`)"
        )
    return inputs - outputs


def _velocity(state: State, name: str, velocity: bool | None, told: bool) -> bool:
    if velocity is None and "v_pred" not in state and not told:
        raise ValueError(
            f"{name}: by its shapes it is Stable Diffusion 2, which there is with both predictions, and the file does "
            'not tell by a "v_pred"; give `velocity=True` (2 and 2.1, of 768 pixels) or `velocity=False` (2 and 2.1 '
            "base, of 512)"
        )
    return "v_pred" in state if velocity is None else velocity


def _scheduler(xl: bool, velocity: bool, zero_snr: bool) -> dict[str, Any]:
    """The configuration of the published folders."""
    solver = "EulerDiscreteScheduler" if xl else "DDIMScheduler" if velocity or zero_snr else "PNDMScheduler"
    config = {
        "_class_name": solver,
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "steps_offset": 1,
        "timestep_spacing": "leading",
        "set_alpha_to_one": False,
        "clip_sample": False,
        "skip_prk_steps": True,
        "prediction_type": "v_prediction" if velocity else "epsilon",
    }
    return {**config, "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"} if zero_snr else config


def _codec(state: State, name: str, scale: float, strict: bool) -> Any:
    """The autoencoder; "identity" where it was left out."""
    if not any(key.startswith(autoencoders.FIRST_STAGE) for key in state):
        return "identity"
    return autoencoders.from_state(state, name, scale, upcast=True, strict=strict)


# --- the U-Net


def _is_linear(state: State) -> bool:
    """Whether dense layers stand before and after attention, and not convolutions, as in version 1."""
    found = (state[key].ndim == 2 for key in state if key.startswith(UNET) and key.endswith(".1.proj_in.weight"))
    return next(found, False)


def _unet_config(state: State, name: str, size: int) -> dict[str, Any]:
    """What a `UNet2DConditionModel` of such weights says."""
    levels = _levels(state, name)
    widths = [shape_of(state, f"{level[0]}.0.out_layers.3.weight", name, 4)[0] for level in levels]
    depths = [count_of(state, f"{level[0]}.1.transformer_blocks") for level in levels]
    middle = count_of(state, f"{UNET}middle_block.1.transformer_blocks")
    first = next((level[0] for level, depth in zip(levels, depths, strict=True) if depth), levels[0][0])
    linear = _is_linear(state)
    config = {
        "sample_size": size,
        "in_channels": shape_of(state, f"{UNET}input_blocks.0.0.weight", name, 4)[1],
        "out_channels": shape_of(state, f"{UNET}out.2.weight", name, 4)[0],
        "block_out_channels": widths,
        "layers_per_block": [len(level) for level in levels],
        "down_block_types": ["CrossAttnDownBlock2D" if depth else "DownBlock2D" for depth in depths],
        "up_block_types": ["CrossAttnUpBlock2D" if depth else "UpBlock2D" for depth in depths[::-1]],
        "transformer_layers_per_block": [depth or 1 for depth in (*depths[:-1], depths[-1] or middle)],
        "attention_head_dim": [max(1, width // HEAD_WIDTH) if linear else HEADS for width in widths],
        "cross_attention_dim": shape_of(state, f"{first}.1.transformer_blocks.0.attn2.to_k.weight", name)[1],
        "use_linear_projection": linear,
    }
    if f"{UNET}label_emb.0.0.weight" not in state:
        return config
    total = shape_of(state, f"{UNET}label_emb.0.0.weight", name)[1]
    added = {"addition_time_embed_dim": NUMBER_WIDTH, "projection_class_embeddings_input_dim": total}
    return {**config, "addition_embed_type": "text_time", **added}


def _levels(state: State, name: str) -> list[list[str]]:
    """The names of the blocks of each level on the way down, the finest first, without what ends a level."""
    levels: list[list[str]] = [[]]
    for i in range(1, count_of(state, f"{UNET}input_blocks")):
        block = f"{UNET}input_blocks.{i}"
        if f"{block}.0.op.weight" in state:
            levels.append([])
        else:
            levels[-1].append(block)
    if not all(levels):
        raise ValueError(f"{name}: each level of `{UNET}input_blocks` must have a block; received: {levels}")
    return levels


def unet_slots(network: UNet) -> Iterator[Slot]:
    """The names of the weights of a U-Net in the code of latent diffusion, as they stand in a whole file."""
    for name, layer in guided_layers(network):
        yield from slots(layer, UNET + name, LDM_NAMES)
    if "added" in network.conditions:
        yield from slots(network.conditions["added"].layer, f"{UNET}label_emb.0", LDM_NAMES)


def _fill_unet(described: Described, state: State, name: str, ema: bool, strict: bool) -> None:
    """The weights of the U-Net, with which all is named that is of no part."""
    mine = {key: array for key, array in state.items() if not OTHERS.match(key)}
    ema = ema and any(key.startswith(AVERAGES) for key in state)
    if ema:
        mine = {key: array for key, array in mine.items() if not key.startswith(UNET)}
        mine |= {key: array for key, array in state.items() if key.startswith(AVERAGES)}

    def named(network):
        found = unet_slots(network)
        return (slot._replace(name=_averaged(slot.name)) for slot in found) if ema else found

    fill(described.network, {"time": (None,), **described.shapes}, named, mine, name, strict)


def _averaged(key: str) -> str:
    """What the average of a weight is called: the name inside of the model, without dots."""
    return "model_ema." + key.removeprefix("model.").replace(".", "")


# --- text


def _prompt(state: State, name: str, tokenizer: Any, xl: bool, skip: int, strict: bool) -> Prompt:
    """The text encoders of the file and their tokenizers."""
    options = {"skip": skip + 1, "normalized": False} if xl else {"skip": skip}
    made: list[Encoder] = []
    opened: list[bool] = []
    for place in ENCODERS:
        for inner, make in (("transformer.", _clip), ("model.", _open_clip)):
            if any(key.startswith(place + inner) for key in state):
                made.append(make(state, name, place + inner, strict, **options))
                opened.append(make is _open_clip)
    if not made:
        raise ValueError(
            f"{name}: there is no text encoder, under none of {list(ENCODERS)}; without a `tokenizer` the model takes "
            "embeddings"
        )
    with explained(name):
        return Prompt(made, _tokenizers(tokenizer, opened), zeros=xl and len(made) == 2)  # not in XL's refiner


def _tokenizers(given: Any, opened: Sequence[bool]) -> list[Any]:
    if isinstance(given, (list, tuple)):
        return [_tokenizer(one) for one in given]
    one = _tokenizer(given)
    if not isinstance(one, JSONTokenizer) or not one.end:
        return [one for _ in opened]
    return [tokenizers.padded(one, 0 if open_clip else one.end[-1]) for open_clip in opened]


def _tokenizer(given: Any) -> Tokenizer:
    return tokenizers.load(given) if isinstance(given, (str, Path)) else Tokenizer.get(given)


def _clip(state: State, name: str, prefix: str, strict: bool, **options) -> Encoder:
    """CLIP's encoder in the layout of transformers, with "text_model." or, as transformers 5 writes it, without."""
    inner = f"{prefix}text_model."
    inner = inner if any(key.startswith(inner) for key in state) else prefix
    vocabulary, width = shape_of(state, f"{inner}embeddings.token_embedding.weight", name)
    with explained(name):
        encoder = CLIPText(
            vocabulary,
            shape_of(state, f"{inner}embeddings.position_embedding.weight", name)[0],
            width,
            count_of(state, f"{inner}encoder.layers"),
            max(1, width // HEAD_WIDTH),
            shape_of(state, f"{inner}encoder.layers.0.mlp.fc1.weight", name)[0],
            **options,
        )
    arrays = _weights(state, prefix)
    fill(encoder, (None, encoder.length), lambda one: slots(one, inner[:-1], CLIP_NAMES), arrays, name, strict)
    return encoder


def _open_clip(state: State, name: str, prefix: str, strict: bool, **options) -> Encoder:
    """OpenCLIP's encoder; of version 2 without the last of 24 blocks, and the projection of what comes after it."""
    second, blocks = prefix.startswith("cond_stage_model."), f"{prefix}transformer.resblocks"
    vocabulary, width = shape_of(state, f"{prefix}token_embedding.weight", name)
    depth = count_of(state, blocks)
    arrays = _weights(state, prefix)
    if second:
        unused = (f"{blocks}.{OPEN_CLIP_BLOCKS}.", f"{prefix}text_projection")
        depth = min(depth, OPEN_CLIP_BLOCKS)
        arrays = {key: array for key, array in arrays.items() if not key.startswith(unused)}
    with explained(name):
        encoder = CLIPText(
            vocabulary,
            shape_of(state, f"{prefix}positional_embedding", name)[0],
            width,
            depth,
            max(1, width // HEAD_WIDTH),
            shape_of(state, f"{blocks}.0.mlp.c_fc.weight", name)[0],
            "gelu",
            None if second else shape_of(state, f"{prefix}text_projection", name)[1],
            **options,
        )
    named = functools.partial(open_clip_slots, prefix=prefix)
    fill(encoder, (None, encoder.length), named, arrays, name, strict)
    return encoder


def open_clip_slots(encoder: CLIPText, prefix: str = "") -> Iterator[Slot]:
    """The names of the weights of CLIP's encoder of text in the code of OpenCLIP."""
    for slot in slots(encoder, "", OPEN_CLIP_NAMES):
        ending = next((one for one in _BARE if slot.name.endswith(one)), "")
        yield slot._replace(name=prefix + slot.name.removesuffix(ending) + _BARE.get(ending, ""))


def _weights(state: State, prefix: str) -> State:
    return {key: array for key, array in state.items() if key.startswith(prefix) and not NOT_WEIGHTS.search(key)}
