"""KerasCV's weights of Stable Diffusion 1.4 and 2.1, in HDF5, renamed to the original names.

    model = load("kcv_diffusion_model.h5", "kcv_encoder.h5", "kcv_decoder.h5", "vae_encoder.h5",
                 tokenizer="clip-vit-large-patch14")
    images = model.sample(4, text="a red circle", guidance=7.5)

Both formats are read: that of Keras 2, in which the published files are, and `.weights.h5` of Keras 3. In either, a
layer is identified only by its class and its position among the layers of its class: see the tables below.

The resulting network computes as Stable Diffusion does. KerasCV's own differs in three ways with little effect on
images: its GELUs are the tanh approximation, the epsilon of norms before attention and in the autoencoder is 1e-5
instead of 1e-6, and texts for version 2 are padded with the end token instead of 0.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np

from kdiff.interop import single_files
from kdiff.interop.arrays import State, Stored
from kdiff.interop.unsupported import check_is_itself
from kdiff.model import DiffusionModel

__all__ = ["KINDS", "LAYERS", "Kind", "load", "read"]

# The inner layers of a layer, in the order of their creation: their path, their original name, and the number of arrays
# of each.
_RESIDUAL = (
    ("entry_flow/group_normalization", "in_layers.0", 2),
    ("entry_flow/padded_conv2d/conv2d", "in_layers.2", 2),
    ("embedding_flow/dense", "emb_layers.1", 2),
    ("exit_flow/group_normalization", "out_layers.0", 2),
    ("exit_flow/padded_conv2d/conv2d", "out_layers.3", 2),
    ("residual_projection/conv2d", "skip_connection", 2),
)


def _attention(i: int) -> tuple[tuple[str, str, int], ...]:
    projections = ((f"attn{i}/{one}", f"attn{i}.{one}", 1) for one in ("to_q", "to_k", "to_v"))
    return ((f"norm{i}", f"norm{i}", 2), *projections, (f"attn{i}/out_proj", f"attn{i}.to_out.0", 2))


_FEED_FORWARD = (("norm3", "norm3", 2), ("geglu/dense", "ff.net.0.proj", 2), ("dense", "ff.net.2", 2))
_BLOCK = (*_attention(1), *_attention(2), *_FEED_FORWARD)
LAYERS = {
    "dense": (("", "", 2),),
    "group_normalization": (("", "", 2),),
    "layer_normalization": (("", "", 2),),
    "padded_conv2d": (("conv2d", "", 2),),
    "upsample": (("conv/conv2d", "conv", 2),),
    "res_block": _RESIDUAL,
    "spatial_transformer": (
        ("norm", "norm", 2),
        ("proj1|proj1/conv2d", "proj_in", 2),
        *((f"transformer_block/{path}", f"transformer_blocks.0.{name}", count) for path, name, count in _BLOCK),
        ("proj2|proj2/conv2d", "proj_out", 2),
    ),
    "resnet_block": (
        ("norm1", "norm1", 2),
        ("conv1/conv2d", "conv1", 2),
        ("norm2", "norm2", 2),
        ("conv2/conv2d", "conv2", 2),
        ("residual_projection/conv2d", "nin_shortcut", 2),
    ),
    "attention_block": (
        ("norm", "norm", 2),
        *((f"{one}/conv2d", one, 2) for one in ("q", "k", "v", "proj_out")),
    ),
    "clip_embedding": (("token_embedding", "token_embedding", 1), ("position_embedding", "position_embedding", 1)),
    "clip_encoder_layer": (
        ("layer_norm1", "layer_norm1", 2),
        *((f"clip_attn/{one}_proj", f"self_attn.{one}_proj", 2) for one in ("q", "k", "v", "out")),
        ("layer_norm2", "layer_norm2", 2),
        ("fc1", "mlp.fc1", 2),
        ("fc2", "mlp.fc2", 2),
    ),
}


class Kind(NamedTuple):
    """One of the models of KerasCV's Stable Diffusion.

    Attributes:
        prefix: of the original names.
        layers: the original names of the layers of each class, in order; None allows any number.
    """

    prefix: str
    layers: Mapping[str, tuple[str, ...] | None]


def _unet() -> dict[str, tuple[str, ...]]:
    down, attending = (1, 2, 4, 5, 7, 8, 10, 11), (1, 2, 4, 5, 7, 8)
    blocks = [*(f"input_blocks.{i}.0" for i in down), "middle_block.0", "middle_block.2"]
    attention = [*(f"input_blocks.{i}.1" for i in attending), "middle_block.1"]
    return {
        "dense": ("time_embed.0", "time_embed.2"),
        "padded_conv2d": ("input_blocks.0.0", *(f"input_blocks.{i}.0.op" for i in (3, 6, 9)), "out.2"),
        "res_block": (*blocks, *(f"output_blocks.{i}.0" for i in range(12))),
        "spatial_transformer": (*attention, *(f"output_blocks.{i}.1" for i in range(3, 12))),
        "upsample": ("output_blocks.2.1", "output_blocks.5.2", "output_blocks.8.2"),
        "group_normalization": ("out.0",),
    }


def _half(way: str) -> dict[str, tuple[str, ...]]:
    """The encoder or the decoder of the autoencoder."""
    mid, attention, norm = ("mid.block_1", "mid.block_2"), ("mid.attn_1",), ("norm_out",)
    if way == "down":
        blocks = (*(f"down.{i}.block.{j}" for i in range(4) for j in range(2)), *mid)
        convolutions = ("conv_in", *(f"down.{i}.downsample.conv" for i in range(3)), "conv_out", "quant_conv")
    else:
        blocks = (*mid, *(f"up.{i}.block.{j}" for i in (3, 2, 1, 0) for j in range(3)))
        convolutions = ("post_quant_conv", "conv_in", *(f"up.{i}.upsample.conv" for i in (3, 2, 1)), "conv_out")
    return {
        "padded_conv2d": convolutions,
        "resnet_block": blocks,
        "attention_block": attention,
        "group_normalization": norm,
    }


KINDS = {
    "diffusion model": Kind(single_files.UNET, _unet()),
    "text encoder": Kind(
        "cond_stage_model.transformer.text_model.",
        {"clip_embedding": ("embeddings",), "clip_encoder_layer": None, "layer_normalization": ("final_layer_norm",)},
    ),
    "decoder": Kind("first_stage_model.decoder.", _half("up")),
    "image encoder": Kind("first_stage_model.encoder.", _half("down")),
}
_WIDTH_2 = 1024  # the width of the text encoder of version 2, OpenCLIP's


def load(*sources: str | Path, tokenizer: Any = None, **options: Any) -> DiffusionModel:
    """Loads KerasCV's Stable Diffusion 1.4 or 2.1 from its files, in any order, identified by their content.

    `sample` behaves as for the published folders of diffusers; see `single_files.load`.

    Args:
        sources: the file of the diffusion model, and optionally those of the text encoder, and of the decoder and the
            image encoder, which go together; without these two the model returns latents.
        tokenizer: of CLIP, as in `single_files.load`; None for text given as embeddings.
        options: other arguments of `single_files.load`, such as `ema`.

    Raises:
        ValueError: if a file is missing or damaged, or of another kind; if two are of one kind; if one is missing.
    """
    state, kinds = _read(sources)
    if "diffusion model" not in kinds:
        raise ValueError(f"keras_cv.load: one of the files must be the diffusion model; received: {sorted(kinds)}")
    halves = {"decoder", "image encoder"}
    if len(halves & kinds) == 1:
        raise ValueError(
            f"keras_cv.load: the autoencoder needs the files of {sorted(halves)}; received: {sorted(kinds)}"
        )
    if tokenizer is not None and "text encoder" not in kinds:
        raise ValueError(f"keras_cv.load: a `tokenizer` needs the file of the text encoder; received: {sorted(kinds)}")
    return single_files.load(state, tokenizer, **{"velocity": False, **options})


def read(*sources: str | Path) -> State:
    """The arrays of such files, with the names and layout of a single file of Stable Diffusion.

    `autoencoders.original(read("kcv_decoder.h5", "vae_encoder.h5"))` is the codec alone.
    """
    return _read(sources)[0]


def _read(sources) -> tuple[State, set[str]]:
    state: State = {}
    kinds: dict[str, Any] = {}
    for source in sources:
        kind, arrays = _one(Path(source))
        if kind in kinds:
            raise ValueError(f"keras_cv: {kinds[kind]} and {source} are both of the {kind}")
        kinds[kind] = source
        state |= arrays
    return state, set(kinds)


def _one(path: Path) -> tuple[str, State]:
    """(kind, arrays) of a file, read lazily."""
    check_is_itself(path)
    try:
        file = h5py.File(path, "r")
    except OSError as error:
        raise ValueError(f"{path}: not a complete HDF5 file: {error}") from error
    layers = list(_of_keras_2(file) if "layer_names" in file.attrs else _of_keras_3(file))
    found: dict[str, list[list[list[Any]]]] = {}
    for name, parts in layers:
        found.setdefault(name, []).append(parts)
    fitting = [kind for kind, one in KINDS.items() if _fits(found, one)]
    if len(fitting) != 1:
        counts = {name: len(parts) for name, parts in found.items()}
        raise ValueError(
            f"{path}: must be one of {list(KINDS)} of KerasCV's Stable Diffusion; received layers of: {counts}"
        )
    state: State = {}
    for name, several in found.items():
        called = KINDS[fitting[0]].layers[name] or [f"encoder.layers.{i}" for i in range(len(several))]
        for place, parts in zip(called, several, strict=True):
            for (_, inner, _), arrays in zip(LAYERS[name], parts, strict=True):
                stem = ".".join(filter(None, (place, inner)))
                state |= _arrays(stem, arrays, path)
    return fitting[0], _as_trained(KINDS[fitting[0]].prefix, state)


def _fits(found, kind: Kind) -> bool:
    same = found.keys() == kind.layers.keys()
    return same and all(wanted is None or len(found[name]) == len(wanted) for name, wanted in kind.layers.items())


def _class_of(name: str) -> str:
    return re.sub(r"_\d+$", "", name)


def _of_keras_2(file: h5py.File) -> Iterator[tuple[str, list[list[Any]]]]:
    """(class, arrays of each layer inside) of the layers with weights, in the order of creation."""
    for name in file.attrs["layer_names"]:
        group = file[name]
        arrays = [group[one] for one in group.attrs["weight_names"]]
        if not arrays:
            continue
        name = _class_of(name if isinstance(name, str) else name.decode())
        counts = [count for _, _, count in LAYERS.get(name, ())]
        if sum(counts) - len(arrays) == 2 and counts[-1] == 2:  # no projection in the shortcut
            counts[-1] = 0
        if sum(counts) != len(arrays):
            raise ValueError(f"{file.filename}: layers of {name!r} have {counts} arrays; received: {len(arrays)}")
        ends = np.cumsum(counts)
        yield name, [arrays[end - count : end] for end, count in zip(ends, counts, strict=True)]


def _of_keras_3(file: h5py.File) -> Iterator[tuple[str, list[list[Any]]]]:
    """As `_of_keras_2`, for files with arrays at the attribute paths of their layers."""
    if "layers" not in file:
        raise ValueError(f"{file.filename}: must be the weights of a Keras model; it has: {list(file)[:5]}")
    for name in sorted(file["layers"], key=lambda one: int((re.findall(r"_(\d+)$", one) or ["0"])[0])):
        group, kind = file["layers"][name], _class_of(name)
        if not _count(group):
            continue
        parts = [_vars(group, path) for path, _, _ in LAYERS.get(kind, ())]
        if sum(map(len, parts)) != _count(group):
            raise ValueError(f"{file.filename}: {name!r} is not a layer of KerasCV's Stable Diffusion: {list(group)}")
        yield kind, parts


def _count(group: h5py.Group) -> int:
    found: list[str] = []
    group.visititems(lambda name, one: found.append(name) if isinstance(one, h5py.Dataset) else None)
    return len(found)


def _vars(group: h5py.Group, paths: str) -> list[Any]:
    for path in paths.split("|"):
        place = f"{path}/vars".lstrip("/")
        if place in group and len(group[place]):
            return [group[place][str(i)] for i in range(len(group[place]))]
    return []


def _arrays(stem: str, arrays: list[Any], path: Path) -> State:
    """Kernel and bias, gamma and beta, or embeddings, in the layout of PyTorch."""
    state: State = {}
    for ending, array in zip(("weight", "bias"), arrays, strict=False):
        wanted = array.ndim in (1, 2, 4) and array.dtype.kind == "f" and (ending == "weight" or array.ndim == 1)
        if not wanted or len(arrays) > 2:
            raise ValueError(
                f"{path}: {stem}.{ending} has the shape {array.shape} and type {array.dtype}, which no such layer has"
            )
        axes = {4: (3, 2, 0, 1), 2: (0, 1) if "embedding" in stem else (1, 0), 1: (0,)}[array.ndim]
        shape = tuple(array.shape[axis] for axis in axes)
        state[f"{stem}.{ending}"] = Stored(shape, array.dtype, _reading(array, axes))
    return state


def _reading(array: Any, axes: tuple[int, ...]):
    return lambda: np.transpose(array[()], axes)


def _as_trained(prefix: str, state: State) -> State:
    """The names of a single file; those of the text encoder of version 2 are OpenCLIP's."""
    table = state.get("embeddings.token_embedding.weight")
    if table is not None and table.shape[1] == _WIDTH_2:
        return _open_clip(state)
    outside = ("quant_conv.", "post_quant_conv.")
    beside = prefix.rpartition("encoder.")[0] or prefix.rpartition("decoder.")[0]
    return {(beside if name.startswith(outside) else prefix) + name: array for name, array in state.items()}


_OPEN_CLIP = {
    "embeddings.token_embedding": "token_embedding",
    "embeddings.position_embedding.weight": "positional_embedding",
    "encoder.layers": "transformer.resblocks",
    "layer_norm": "ln_",
    "self_attn.out_proj": "attn.out_proj",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "final_ln_": "ln_final",
}


def _open_clip(state: State) -> State:
    """The names of OpenCLIP, in which one array holds the projections to queries, keys and values."""
    named: State = {}
    for name, array in state.items():
        called, found = name, re.fullmatch(r"(.+\.self_attn\.)q_proj\.(weight|bias)", name)
        if found:
            three = [state[f"{found[1]}{one}_proj.{found[2]}"] for one in "qkv"]
            shape = (3 * array.shape[0], *array.shape[1:])
            array, called = Stored(shape, array.dtype, _joining(three)), f"{found[1]}in_proj_{found[2]}"
        elif re.search(r"[kv]_proj", name):
            continue
        for theirs, ours in (*_OPEN_CLIP.items(), (".self_attn.", ".attn.")):
            called = called.replace(theirs, ours)
        named["cond_stage_model.model." + called] = array
    return named


def _joining(arrays: list[Any]):
    return lambda: np.concatenate([np.asarray(one) for one in arrays])
