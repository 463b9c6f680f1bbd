"""Files of textual inversion: embeddings of new tokens for text encoders.

    load(model, "learned_embeds.safetensors")                   # the file names the token
    load(model, "charturner.pt", token="charturner")
    images = model.sample(4, text="a <cat-toy> on a beach")

| file | holds |
|---|---|
| diffusers' `.safetensors`, `.bin` | {token: vector, or (count, width)} |
| A1111's `.pt` | "string_to_param": {"*": (count, width)}, "name": token; its `.safetensors` "emb_params" alone |
| of Stable Diffusion XL | "clip_l" and "clip_g": (count, width) of either encoder |

A token of several vectors expands to the same tokens as in diffusers: `<toy> <toy>_1 <toy>_2`.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from kdiff import deprecated, inversion
from kdiff.interop.arrays import State, array_of
from kdiff.interop.files import read_archived, read_state, write_safetensors
from kdiff.interop.unsupported import listing

__all__ = ["NAMES", "load", "read", "save"]

NAMES = ("learned_embeds.safetensors", "learned_embeds.bin")  # the names that diffusers looks for in a folder
_OF_XL = ("clip_l", "clip_g")
_UNNAMED = ("*", "emb_params")  # in these files the token is named after the file


def load(model: Any, source: str | Path | Mapping[str, Any], token: str | None = None) -> str:
    """Adds the token of a file to the tokenizers of a model, and its vectors to the encoders.

    The vectors for one encoder go to the first of this width; other encoders see plain text, as in diffusers.

    Args:
        model: a `DiffusionModel` or its network, built, with CLIP's text encoders.
        source: a file, a folder with one of `NAMES`, or the content of such a file.
        token: the name of the token; None for the name in the file or, if there is none, of the file.

    Returns:
        The token.

    Raises:
        ValueError: if the file is missing, damaged, or not a textual inversion; if it has no name; if no encoder has
            its width; if the vocabulary has the token. In these cases nothing is changed.
    """
    name, vectors, where = _read(source, token)
    prompt = inversion.prompt_of(model, "inversions.load")
    widths = [encoder.width for encoder in prompt.encoders]
    rows: list[np.ndarray | None] = [None] * len(widths)
    for one in vectors:
        free = [i for i, width in enumerate(widths) if width == one.shape[1] and rows[i] is None]
        if not free:
            raise ValueError(f"{where}: a vector must be as wide as an encoder's, {widths}; received: {one.shape[1]}")
        rows[free[0]] = one
    inversion.extend(model, name, rows)
    return name


def read(source: str | Path | Mapping[str, Any], token: str | None = None) -> tuple[str, list[np.ndarray]]:
    """(token, vectors (count, width) for each encoder concerned); arguments as in `load`."""
    return _read(source, token)[:2]


def _read(source, token) -> tuple[str, list[np.ndarray], str]:
    state, name, where = _opened(source)
    if set(state) == set(_OF_XL):
        names, arrays = [name], [state[one] for one in _OF_XL]
    elif len(state) == 1:
        names, arrays = [name if one in _UNNAMED else one for one in state], list(state.values())
    else:
        raise ValueError(
            f"{where}: must hold one token, A1111's `string_to_param`, or {list(_OF_XL)}; it has: {list(state)[:5]}"
        )
    token = names[0] if token is None else token
    if not isinstance(token, str) or not token:
        raise ValueError(f"{where}: has no name for its token; give `token`; received: {token!r}")
    vectors = [np.asarray(array, "float32") for array in arrays]
    vectors = [one[None] if one.ndim == 1 else one for one in vectors]
    for one in vectors:
        if one.ndim != 2 or not one.size or not np.isfinite(one).all():
            raise ValueError(f"{where}: vectors must be finite, (count, width); received the shape: {one.shape}")
    return token, vectors, where


def _opened(source) -> tuple[State, str | None, str]:
    """(arrays by name, the name of the token, the name of the source for errors)."""
    if isinstance(source, Mapping):
        return *_tensors(source, None, "the mapping"), "the mapping"
    path = Path(source)
    if path.is_dir():
        there = [path / name for name in NAMES if (path / name).is_file()]
        if not there:
            raise ValueError(f"{path}: must have one of {list(NAMES)}; found: {listing(path)}")
        path = there[0]
    if path.suffix in (".bin", ".pt"):
        return *_tensors(read_archived(path), path.stem, str(path)), str(path)
    return *_tensors(read_state(path), path.stem, str(path)), str(path)


def _tensors(content: Any, stem: str | None, where: str) -> tuple[State, str | None]:
    """The vectors by name, and the name of the token if not among these."""
    if not isinstance(content, Mapping):
        raise ValueError(f"{where}: must hold vectors by name; received: {type(content).__name__}")
    name = stem
    if "string_to_param" in content:
        said = content.get("name")
        name = said if isinstance(said, str) and said else stem
        content = content["string_to_param"]
        content = getattr(content, "state", None) or content  # a pickled `ParameterDict`
        content = content.get("_parameters", content) if isinstance(content, Mapping) else {}
    arrays = {str(key): value for key, value in content.items() if hasattr(value, "shape")}
    return {key: array_of(value, key, where) for key, value in arrays.items()}, name


@deprecated.arguments(averages="ema")
def save(model: Any, token: str, path: str | Path, ema: bool = True) -> None:
    """Writes the vectors of a token in the format of diffusers: {token: (count, width)}; for two, "clip_l", "clip_g".

    Args:
        model: a `DiffusionModel` or its network, to which `inversion.add` or `load` has added the token.
        token: the name of the token.
        path: a `.safetensors` file, or a folder, in which the default name of diffusers is used.
        ema: whether to write averages of trained vectors, if the model has averages that have been updated.

    Raises:
        ValueError: if no encoder has the token.
    """
    path = Path(path)
    rows = inversion.vectors_of(model, token, ema)
    known = [one for one in rows if one is not None]
    state = {token: known[0]} if len(known) == 1 else dict(zip(_OF_XL, known, strict=True))
    write_safetensors(path if path.suffix == ".safetensors" else path / NAMES[0], state)
