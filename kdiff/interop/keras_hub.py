"""Presets of KerasHub for Stable Diffusion 3 and 3.5, `config.json` and `model.weights.h5`, read without KerasHub.

    model = load("stable_diffusion_3_medium", tokenizer="clip-vit-large-patch14")
    images = model.sample(4, text="a red circle", guidance=7.0)

The result is the `DiffusionModel` that `single_files.load` makes from the published file of the same weights: each
array is renamed to its name there. The presets have both encoders of CLIP but not T5, which KerasHub replaces by 77
zeros, as this model does. The last norm of CLIP has epsilon 1e-5, as in CLIP; KerasHub uses 1e-6.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from kdiff.interop import autoencoders, single_files_sd3
from kdiff.interop.arrays import State, Stored
from kdiff.interop.configs import explained, shown
from kdiff.interop.files import read_json
from kdiff.interop.single_files_sd3 import TEXT, UNET
from kdiff.interop.unsupported import check_is_itself
from kdiff.model import DiffusionModel

__all__ = ["CLASS", "CLIP", "MMDIT", "VAE", "WEIGHTS", "load", "read_h5", "renamed"]

CLASS, WEIGHTS = "StableDiffusion3Backbone", "model.weights.h5"

# KerasHub's names, as regular expressions of layer paths, and those of the single file; "#" is the index of a layer in
# a list, which Keras omits for the first.
MMDIT = {
    r"patch_embedding/patch_embedding": "x_embedder.proj",
    r"timestep_embedding/mlp/dense1": "t_embedder.mlp.0",
    r"timestep_embedding/mlp/dense2": "t_embedder.mlp.2",
    r"mlp/dense1": "y_embedder.mlp.0",
    r"mlp/dense2": "y_embedder.mlp.2",
    r"dense": "context_embedder",
    r"dense_1": "final_layer.linear",
    r"adaptive_layer_normalization/dense": "final_layer.adaLN_modulation.1",
    r"mm_di_t_block(_\d+)?/(\w+)/ada_layer_norm/dense": r"joint_blocks.#.\2.adaLN_modulation.1",
    r"mm_di_t_block(_\d+)?/(\w+)/attention_qkv(2?)": r"joint_blocks.#.\2.attn\3.qkv",
    r"mm_di_t_block(_\d+)?/(\w+)/attention_proj(2?)": r"joint_blocks.#.\2.attn\3.proj",
    r"mm_di_t_block(_\d+)?/(\w+)/([qk])_norm(2?)": r"joint_blocks.#.\2.attn\4.ln_\3",
    r"mm_di_t_block(_\d+)?/(\w+)/mlp/dense([12])": r"joint_blocks.#.\2.mlp.fc\3",
}
CLIP = {
    r"token_and_position_embedding/(token|position)_embedding": r"embeddings.\1_embedding",
    r"layer_normalization": "final_layer_norm",
    r"clip_encoder_layer(_\d+)?/layer_norm_([12])": r"encoder.layers.#.layer_norm\2",
    r"clip_encoder_layer(_\d+)?/attention/output_dense": r"encoder.layers.#.self_attn.out_proj",
    r"clip_encoder_layer(_\d+)?/attention/([qkv])\w+_dense": r"encoder.layers.#.self_attn.\2_proj",
    r"clip_encoder_layer(_\d+)?/dense_([12])": r"encoder.layers.#.mlp.fc\2",
}
_RESNET = {"residual_projection": "nin_shortcut"}
_ATTENTION = {"group_norm": "norm", "output_conv2d": "proj_out"} | {
    f"{n}_conv2d": n[0] for n in ("query", "key", "value")
}
VAE = {
    r"input_projection": "conv_in",
    r"output_norm": "norm_out",
    r"output_projection": "conv_out",
    r"mid_block_(0)/(\w+)": r"mid.block_1.\2",
    r"mid_block_(1)/(\w+)": r"mid.block_2.\2",
    r"mid_attention/(\w+)": r"mid.attn_1.\1",
}


def load(
    folder: str | Path,
    tokenizer: Any = None,
    *,
    image_size: int | None = None,
    clip_skip: int = 0,
    strict: bool = True,
    **options: Any,
) -> DiffusionModel:
    """Loads a preset of KerasHub's `StableDiffusion3Backbone`.

    Args:
        folder: with `config.json` and `model.weights.h5`, as written by `save_to_preset` and downloaded by
            `from_preset`.
        tokenizer: of CLIP, for both encoders; or a list of two. None for no text encoders: their outputs are then the
            conditions "context" and "text_embeds".
        image_size: the default size of samples; None for that of the preset.
        clip_skip: the number of further final blocks of CLIP's encoders to skip.
        strict: whether weights that do not match are an error; otherwise a warning.
        options: arguments of `DiffusionModel` that replace those of the preset.

    Raises:
        ValueError: if a file is missing or damaged; if the preset is of another model, or has a T5; if weights do not
            match, with a list of all mismatches.
    """
    folder = Path(folder)
    source = folder / "config.json"
    whole = read_json(source)
    config = whole.get("config")
    if whole.get("class_name") != CLASS or not isinstance(config, Mapping):
        raise ValueError(
            f"{source}: `class_name` must be {CLASS!r} to be loaded; received: {shown(whole.get('class_name'))}"
        )
    if config.get("t5") is not None:
        raise ValueError(f"{source}: the preset has a T5, which is not supported; published presets have none")
    try:
        vae = config["vae"]["config"]
        counts = {side: vae[f"{side}_num_blocks"] for side in ("encoder", "decoder")}
        heads, size, shift = config["mmdit_num_heads"], config["image_shape"][0], float(config["shift"])
        length = config["clip_l"]["config"]["max_sequence_length"]
        scale, offset = float(vae["scale"]), float(vae["shift"])
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise ValueError(f"{source}: must have the arguments of {CLASS}; missing or not a number: {error}") from None
    file = folder / WEIGHTS
    state = renamed(read_h5(file), counts, file)
    codec = None
    if "codec" not in options:
        codec = autoencoders.from_state(state, str(file), scale, offset, upcast=True, strict=strict)
    more = {"codec": codec, "shift": shift, "heads": heads, "following": length}
    size = size if image_size is None else image_size
    return single_files_sd3.load(state, str(file), tokenizer, size, clip_skip, strict, options, **more)


def read_h5(path: Path) -> dict[str, Stored]:
    """The arrays of a file of Keras' weights by path, "layers/dense/vars/0", read lazily."""
    check_is_itself(path)
    found: dict[str, Stored] = {}
    with explained(path):
        try:
            file = h5py.File(path)
        except OSError as error:
            raise ValueError(f"{path}: not a complete HDF5 file: {error}") from None

        def keep(name, entry):
            if isinstance(entry, h5py.Dataset):
                half = entry.attrs.get("dtype") == "bfloat16"
                kind = np.dtype("bfloat16") if half else entry.dtype
                found[name] = Stored(entry.shape, kind, lambda: entry[()].view(kind) if half else entry[()])

        file.visititems(keep)
    return found


# --- names


def renamed(arrays: Mapping[str, Stored], counts: Mapping[str, list[int]], source: Any) -> State:
    """The arrays by the names, and in the layouts, of the published file of Stable Diffusion 3.

    Args:
        arrays: by KerasHub's paths.
        counts: the number of residual blocks of each level of the autoencoder's "encoder", and its "decoder".
        source: the file, for errors.

    Raises:
        ValueError: if a path is not one of KerasHub's.
    """
    state: State = {}
    for path, array in arrays.items():
        place, _, number = path.removeprefix("layers/").rpartition("/vars/")
        name = next(filter(None, (_renamed(place, find) for find in _places(counts))), None)
        if name is None or number not in ("0", "1"):
            raise ValueError(f"{source}: {path} is not a weight of {CLASS}")
        leaf = ("weight", "bias")[int(number)]
        name = name if name.endswith("pos_embed") else f"{name}.{leaf}"
        state[name] = _laid_out(name, place, array)
    return state


_Find = tuple[str, str, Callable[[str], str | None]]


def _places(counts) -> Iterator[_Find]:
    """(prefix in KerasHub, prefix in the single file, names inside)."""
    yield "mm_di_t/layers/adjustable_position_embedding", f"{UNET}pos_embed", lambda rest: "" if not rest else None
    yield "mm_di_t/layers/", UNET, lambda rest: _by(MMDIT, rest)
    for i, place in enumerate(TEXT[:2]):
        number = f"_{i}" if i else ""
        yield f"clip_projection{number}/dense", f"{place}text_projection", lambda rest: "" if not rest else None
        yield f"clip_text_encoder{number}/layers/", f"{place}text_model.", lambda rest: _by(CLIP, rest)
    for side, levels in counts.items():
        inner = f"{autoencoders.FIRST_STAGE}{side}."
        yield f"vae_{side}/", inner, lambda rest, side=side, levels=levels: _coder(rest, side, levels)


def _renamed(place: str, find: _Find) -> str | None:
    before, after, inside = find
    name = inside(place.removeprefix(before)) if place.startswith(before) else None
    return None if name is None else after + name


def _by(table: Mapping[str, str], path: str) -> str | None:
    for pattern, name in table.items():
        found = re.fullmatch(pattern, path)
        if found:
            return found.expand(name).replace("#", (found[1] or "_0")[1:] if "#" in name else "")
    return None


def _coder(path: str, side: str, levels: list[int]) -> str | None:
    """A name in the autoencoder of latent diffusion, whose decoder numbers its levels from the last."""
    way, last = ("down", 0) if side == "encoder" else ("up", len(levels) - 1)
    found = re.fullmatch(r"blocks/res_net_block(?:_(\d+))?/(\w+)", path)
    if found:
        places = [(level, i) for level, count in enumerate(levels) for i in range(count)]
        level, i = places[int(found[1] or 0)]
        return f"{way}.{abs(last - level)}.block.{i}.{_RESNET.get(found[2], found[2])}"
    found = re.fullmatch(r"(down|up)samples/conv2d(?:_(\d+))?", path)
    if found:
        return f"{way}.{abs(last - int(found[2] or 0))}.{found[1]}sample.conv"
    name = _by(VAE, path)
    first, dot, part = (name or "").rpartition(".")
    return f"{first}{dot}{_ATTENTION.get(part, part)}" if first == "mid.attn_1" else name


def _laid_out(name: str, place: str, array: Stored) -> Stored:
    """In the layout of PyTorch: outputs first, heads and their channels in one axis."""
    shape = array.shape
    if place.endswith("position_embedding") and name.endswith("pos_embed"):
        return Stored((1, *shape), array.dtype, lambda: np.asarray(array)[None])
    if "embeddings." in name or len(shape) == 1:
        return array
    if "self_attn." in name:
        if name.endswith("bias"):
            return Stored((int(np.prod(shape)),), array.dtype, lambda: np.asarray(array).reshape(-1))
        split = 2 if "out_proj" in name else 1  # number of input axes
        inputs, outputs = int(np.prod(shape[:split])), int(np.prod(shape[split:]))
        return Stored((outputs, inputs), array.dtype, lambda: np.asarray(array).reshape(inputs, outputs).T)
    order = (1, 0) if len(shape) == 2 else (3, 2, 0, 1)
    return Stored(tuple(shape[i] for i in order), array.dtype, lambda: np.asarray(array).transpose(order))
