"""Files of textual inversions: vectors of tokens that text encoders do not know.

    load(model, "learned_embeds.safetensors")                   # of a token that the file names
    load(model, "charturner.pt", token="charturner")
    images = model.sample(4, text="a <cat-toy> on a beach")

| file | holds |
|---|---|
| diffusers' `.safetensors`, `.bin` | {token: vector, or (count, width)} |
| A1111's `.pt` | "string_to_param": {"*": (count, width)}, "name": token; its `.safetensors` "emb_params" alone |
| of Stable Diffusion XL | "clip_l" and "clip_g": (count, width) of either encoder |

A token of several vectors stands for the tokens that diffusers would put in its place: `<toy> <toy>_1 <toy>_2`.
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

NAMES = ("learned_embeds.safetensors", "learned_embeds.bin")  # which diffusers looks for in a folder
_OF_XL = ("clip_l", "clip_g")
_UNNAMED = ("*", "emb_params")  # of files whose token has the file's name


def load(model: Any, source: str | Path | Mapping[str, Any], token: str | None = None) -> str:
    """Adds the token of a file to the text of a model: its tokenizers know it, and its encoders have the vectors.

    Of a file for one encoder the first of this width gets it; for others the token is letters, as in diffusers.

    Args:
        model: a `DiffusionModel` or its network, built, with CLIP's text encoders.
        source: a file, a folder with one of `NAMES`, or what such a file holds.
        token: what it is called; None for its name in the file, or if there is none, that of the file.

    Returns:
        the token.

    Raises:
        ValueError: if the file is missing or damaged, or no textual inversion; if it has no name; if no encoder is of
            its width; if the vocabulary has the token. Then nothing has been changed.
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
    """(token, vectors (count, width) for each encoder that has some), as of `load`."""
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
        raise ValueError(f"{where}: does not say what its token is called; give `token`; received: {token!r}")
    vectors = [np.asarray(array, "float32") for array in arrays]
    vectors = [one[None] if one.ndim == 1 else one for one in vectors]
    for one in vectors:
        if one.ndim != 2 or not one.size or not np.isfinite(one).all():
            raise ValueError(f"{where}: vectors must be finite, (count, width); received the shape: {one.shape}")
    return token, vectors, where


def _opened(source) -> tuple[State, str | None, str]:
    """(arrays by name, the name of the token, the name for errors)."""
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
    """The vectors by name, and the name of the token where that is none."""
    if not isinstance(content, Mapping):
        raise ValueError(f"{where}: must hold vectors by name; received: {type(content).__name__}")
    name = stem
    if "string_to_param" in content:
        said = content.get("name")
        name = said if isinstance(said, str) and said else stem
        content = content["string_to_param"]
        content = getattr(content, "state", None) or content  # a `ParameterDict` that was pickled whole
        content = content.get("_parameters", content) if isinstance(content, Mapping) else {}
    arrays = {str(key): value for key, value in content.items() if hasattr(value, "shape")}
    return {key: array_of(value, key, where) for key, value in arrays.items()}, name


@deprecated.arguments(averages="ema")
def save(model: Any, token: str, path: str | Path, ema: bool = True) -> None:
    """Writes the vectors of a token in diffusers' form: {token: (count, width)}; of two encoders "clip_l", "clip_g".

    Args:
        model: a `DiffusionModel` or its network, to which `inversion.add` or `load` has added the token.
        token: its name.
        path: of the file, `.safetensors`, or of a folder, for diffusers' name in it.
        ema: whether to write the averages of vectors that learn, if a model has averages that were moved.

    Raises:
        ValueError: if no encoder has the token.
    """
    path = Path(path)
    rows = inversion.vectors_of(model, token, ema)
    known = [one for one in rows if one is not None]
    state = {token: known[0]} if len(known) == 1 else dict(zip(_OF_XL, known, strict=True))
    write_safetensors(path if path.suffix == ".safetensors" else path / NAMES[0], state)
