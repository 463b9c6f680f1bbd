"""Stable Diffusion 1, 2, XL and 3 in one file, in the layout of the original code (latent diffusion, `sgm`).

    model = load("v1-5-pruned-emaonly.safetensors", tokenizer="clip-vit-large-patch14")
    images = model.sample(4, text="a red circle", guidance=7.5)

The result is the `DiffusionModel` that `diffusers.load` makes from the folder of the same weights. A file has no
tokenizer: pass one, or the model takes embeddings as "context" and, for XL, "text_embeds".

    model.diffusion_model.                      the U-Net: time_embed, label_emb, input_blocks, middle_block, ...
    model_ema.                                  its averaged weights, with names without dots
    first_stage_model.                          the autoencoder
    cond_stage_model.transformer.text_model.    1: CLIP's encoder in the layout of transformers
    cond_stage_model.model.                     2: OpenCLIP's, without the last of 24 blocks
    conditioner.embedders.0.transformer.        XL: CLIP's; in its refiner "0.model." is OpenCLIP's
    conditioner.embedders.1.model.              OpenCLIP's
    v_pred, ztsnr                               empty markers: velocity prediction, zero SNR at T

For version 3 see `kdiff.interop.single_files_sd3`.

Sizes are inferred from the weights. Other properties are as published: attention has 8 heads in version 1, with
convolutions before it, and heads of 64 channels elsewhere; all norms have 32 groups.
"""

import re
from collections.abc import Iterator
from typing import Any

from kdiff import deprecated
from kdiff.base import check_integer
from kdiff.blocks.attention import MultiHeadAttention
from kdiff.blocks.transformer import FeedForward, SpatialTransformer, TransformerBlock
from kdiff.codecs import Latent
from kdiff.interop import autoencoders, diffusers, maps, prompts, schedulers, single_files_sd3, unets
from kdiff.interop.arrays import State
from kdiff.interop.configs import Described, explained
from kdiff.interop.original import Source, count_of, guided_layers, guided_names, read, shape_of
from kdiff.interop.single_files_text import HEAD_WIDTH, prompt_of
from kdiff.interop.unet_names import NAMES
from kdiff.interop.unsupported import about_names
from kdiff.interop.weights import Slot, fill, slots
from kdiff.model import DiffusionModel
from kdiff.networks.unet import UNet

__all__ = [
    "AVERAGES",
    "BESIDE",
    "HEADS",
    "LDM_NAMES",
    "NUMBER_WIDTH",
    "OTHERS",
    "UNET",
    "load",
    "unet_slots",
]

UNET, AVERAGES = "model.diffusion_model.", "model_ema.diffusion_model"
# Other contents of a file besides the U-Net: parts that are read elsewhere, averages, constants, and MiDaS, whose depth
# is given as a map.
OTHERS = re.compile(
    r"(first_stage_model|cond_stage_model|conditioner|model_ema|depth_model)\.|(v_pred|ztsnr|scale_factor|logvar"
    r"|lvlb_weights|global_step|betas|denoiser\.(sigmas|log_sigmas)"
    r"|(sqrt_|log_)?(one_minus_|recip_|recipm1_)?alphas_cumprod(_prev)?|posterior_\w+)$"
)
# The pipeline of diffusers by the number of extra input channels.
BESIDE = {
    0: "StableDiffusionPipeline",
    1: "StableDiffusionDepth2ImgPipeline",
    4: "StableDiffusionInstructPix2PixPipeline",
    5: "StableDiffusionInpaintPipeline",
}
HEADS = 8
NUMBER_WIDTH = 256  # of the embedding of each of the "time_ids" of XL

LDM_NAMES = {
    **guided_names(),
    **{kind: NAMES[kind] for kind in (SpatialTransformer, TransformerBlock, FeedForward, MultiHeadAttention)},
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
    """Loads Stable Diffusion 1, 2, XL, 3 or 3.5, identified by the names and shapes of the weights.

    Variants for inpainting, depth and instructions (InstructPix2Pix), and the refiner of XL, are read too; the upscaler
    is not. Noise levels are the published ones, whatever constants the file has. `sample` uses the solver of the
    published folders: PNDM, or DDIM for velocities or zero terminal SNR, in versions 1 and 2; Euler's method in XL and
    3.

    Args:
        source: a `.safetensors`, `.ckpt`, `.pt` or `.npz` file (from a pickle only tensors are read); or a mapping of
            arrays.
        tokenizer: the folder of CLIP's tokenizer (`tokenizer.json`, or `vocab.json` and `merges.txt`) or a `Tokenizer`,
            with which "text" accepts strings. Its padding is set to what the encoders were trained with: the end token
            for CLIP and 0 for OpenCLIP; a list, one per encoder, is used unchanged. For version 3 T5 is loaded only
            with a list of three. None for no text encoders: the network takes their outputs.
        velocity: whether the network predicts velocities, not noise. None infers it from "v_pred" in the file; version
            1, XL, and variants of version 2 with extra channels predict noise.
        zero_snr: whether the SNR at T is zero (Lin et al. 2023, arXiv:2305.08891), where sampling then starts; None for
            whether the file has "ztsnr". Version 3 has neither `velocity` nor `zero_snr`.
        image_size: the default size of samples; None for 512 (version 2 with velocities: 768; XL and 3: 1024).
        ema: whether to use the averaged weights of the U-Net, if any.
        clip_skip: the number of final blocks of the text encoders to skip.
        strict: whether weights that do not match are an error; otherwise a warning.
        options: arguments of `DiffusionModel` that replace those of the file.

    Raises:
        ValueError: if the file is missing, damaged, or another model; if the prediction is ambiguous; if there is a
            tokenizer but no text encoder; if weights do not match, with a list of all mismatches.
    """
    state, name = read(source)
    if single_files_sd3.is_one(state):
        if velocity is not None or zero_snr is not None:
            raise ValueError(f"{name}: is Stable Diffusion 3, to which `velocity` and `zero_snr` do not apply")
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
    prompt = None if tokenizer is None else prompt_of(state, name, tokenizer, xl, clip_skip, strict)
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
            f"{name}: not a single file of Stable Diffusion, which has `{UNET}input_blocks.0.0.weight`; it has: "
            f"{list(state)[:5]}{about_names(state)}"
        )


def _beside(state: State, name: str) -> int:
    """The number of channels concatenated to x_t."""
    inputs = shape_of(state, f"{UNET}input_blocks.0.0.weight", name, 4)[1]
    outputs = shape_of(state, f"{UNET}out.2.weight", name, 4)[0]
    if inputs - outputs not in BESIDE:
        raise ValueError(
            f"{name}: the U-Net must have {list(BESIDE)} more input than output channels; received: {inputs} in "
            f"(`{UNET}input_blocks.0.0.weight`) and {outputs} out (`{UNET}out.2.weight`)"
        )
    return inputs - outputs


def _velocity(state: State, name: str, velocity: bool | None, told: bool) -> bool:
    if velocity is None and "v_pred" not in state and not told:
        raise ValueError(
            f"{name}: by its shapes it is Stable Diffusion 2, which exists with both predictions, and the file does "
            'not have "v_pred"; give `velocity=True` (2 and 2.1, 768 pixels) or `velocity=False` (2 and 2.1 '
            "base, 512 pixels)"
        )
    return "v_pred" in state if velocity is None else velocity


def _scheduler(xl: bool, velocity: bool, zero_snr: bool) -> dict[str, Any]:
    """The configuration of the scheduler in the published folders."""
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
    """The autoencoder; "identity" if the file has none."""
    if not any(key.startswith(autoencoders.FIRST_STAGE) for key in state):
        return "identity"
    return autoencoders.from_state(state, name, scale, upcast=True, strict=strict)


# --- the U-Net


def _is_linear(state: State) -> bool:
    """Whether dense layers, not convolutions as in version 1, precede and follow attention."""
    found = (state[key].ndim == 2 for key in state if key.startswith(UNET) and key.endswith(".1.proj_in.weight"))
    return next(found, False)


def _unet_config(state: State, name: str, size: int) -> dict[str, Any]:
    """The configuration of a `UNet2DConditionModel` with such weights."""
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
    """The names of the blocks of each encoder level, the finest first, without the downsampling."""
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
    """The names of the weights of a U-Net in the code of latent diffusion, as in a full file."""
    for name, layer in guided_layers(network):
        yield from slots(layer, UNET + name, LDM_NAMES)
    if "added" in network.conditions:
        yield from slots(network.conditions["added"].layer, f"{UNET}label_emb.0", LDM_NAMES)


def _fill_unet(described: Described, state: State, name: str, ema: bool, strict: bool) -> None:
    """Assigns the weights of the U-Net; names that belong to no part are reported with them."""
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
    """The name of the average of a weight: its name in the model, without dots."""
    return "model_ema." + key.removeprefix("model.").replace(".", "")
