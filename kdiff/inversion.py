"""Textual inversion: the embedding of a new token of a text encoder is trained, and nothing else.

    v* = argmin_v E w |prediction of x_t given (text with v in place of the token) - target|^2

Gal et al., "An Image is Worth One Word: Personalizing Text-to-Image Generation using Textual Inversion" (2023),
equation 2, where v is one or several rows of the token table of the encoder.

    model = interop.diffusers.load("stable-diffusion-v1-5")
    inversion.add(model, "<cat-toy>", initializer_token="toy")    # a token that is initialised with "toy"
    inversion.enable(model, "<cat-toy>")                          # only its vector is trained
    model.compile(keras.optimizers.Adam(5e-3))
    model.fit({"image": images, "text": ["a photo of <cat-toy>"] * len(images)})
    interop.inversions.save(model, "<cat-toy>", "learned_embeds.safetensors")
    inversion.finish(model)                                       # the encoders are frozen again
"""

from typing import Any

import keras
import numpy as np
from keras import ops

from kdiff import deprecated, lora
from kdiff.base import check_integer

__all__ = ["add", "enable", "extend", "finish", "prompt_of", "vectors_of"]


@deprecated.arguments(like="initializer_token")
def add(model: keras.layers.Layer, token: str, initializer_token: str, vectors: int = 1) -> None:
    """Adds a token to all text encoders of a model, initialised with the vectors of a word.

    In a text the token expands to all of its vectors, each of which takes the place of one token of the encoder. If the
    model has averages that have been updated, they become its weights, and averaging begins anew.

    Args:
        model: a `DiffusionModel` or its network, built, whose text condition is a `Prompt` of `CLIPText` with
            `JSONTokenizer`s.
        token: such as "<cat-toy>", which must not be in the vocabulary.
        initializer_token: a word from whose tokens the vectors are initialised: one each, or all from a single one.
        vectors: the number of vectors.

    Raises:
        ValueError: if the model has no such text condition, or the token exists; if the word has another number of
            tokens.
    """
    check_integer("inversion.add", "vectors", vectors)
    prompt, rows = prompt_of(model, "inversion.add"), []
    for encoder, tokenizer in zip(prompt.encoders, prompt.tokenizers, strict=True):
        numbers = tokenizer.tokens(initializer_token)
        if len(numbers) not in (1, vectors):
            raise ValueError(
                f"inversion.add: `initializer_token` must have one token, or {vectors}; {initializer_token!r} has "
                f"{len(numbers)}"
            )
        rows.append(np.broadcast_to(_table(encoder)[numbers], (vectors, encoder.width)))
    extend(model, token, rows)


def extend(model: keras.layers.Layer, token: str, rows: list[np.ndarray | None]) -> None:
    """Adds a token with the vectors `rows`, (count, width) per encoder; None leaves an encoder unchanged.

    Raises:
        ValueError: if the model has no such text condition, or another token is being trained; if the token exists; if
            the vectors have another width. In these cases nothing is changed.
    """
    prompt = prompt_of(model, "inversion")
    if any(encoder.learned for encoder in prompt.encoders):
        raise ValueError("inversion: a token of the model is being trained; call `inversion.finish` first")
    made: list[tuple] = []
    for encoder, tokenizer, vectors in zip(prompt.encoders, prompt.tokenizers, rows, strict=True):
        if vectors is None:
            made.append((tokenizer, None, None))
            continue
        vectors = np.asarray(vectors, "float32")
        if vectors.ndim != 2 or not len(vectors) or vectors.shape[1] != encoder.width or not np.isfinite(vectors).all():
            raise ValueError(
                f"inversion: vectors of {token!r} must be finite, (count, {encoder.width}); received the shape: "
                f"{vectors.shape}"
            )
        made.append((*tokenizer.with_token(token, len(vectors)), vectors))
    lora.follow_ema(model)
    for i, (encoder, (tokenizer, numbers, vectors)) in enumerate(zip(prompt.encoders, made, strict=True)):
        if vectors is not None:
            size = encoder.vocabulary_size
            encoder.extend(np.zeros((max(0, numbers[-1] + 1 - size), encoder.width), "float32"))
            whole = _table(encoder).copy()
            whole[numbers] = vectors
            encoder.table.table.assign(whole)
        prompt.tokenizers[i] = tokenizer
    lora.changed(model)


def enable(model: keras.layers.Layer, token: str) -> None:
    """Freezes all weights except the vectors of one token; only these are then trained and averaged.

    Call it before `compile`. The network calls the encoders in each step, on tokens, to which `fit` and `sample`
    convert texts; precomputed embeddings are no longer accepted. An enabled LoRA remains trainable. If the model has
    averages that have been updated, they become its weights.

    Args:
        model: a `DiffusionModel` or its network, built.
        token: a token added by `add` or `interop.inversions.load`.

    Raises:
        ValueError: if no encoder has this token, or a token is already being trained.
    """
    prompt = prompt_of(model, "inversion.enable")
    if any(encoder.learned for encoder in prompt.encoders):
        raise ValueError(
            "inversion.enable: a token of the model is already being trained; call `inversion.finish` first"
        )
    known = _numbers(prompt, token, "inversion.enable")
    lora.follow_ema(model)
    lora.freeze(model)
    for encoder, numbers in known:
        encoder.learn(numbers[0], len(numbers))
        encoder.freeze()
    lora.changed(model)


@deprecated.arguments(averages="ema")
def finish(model: keras.layers.Layer, ema: bool = True) -> None:
    """Ends the training of a token: its vectors are stored in the tables, and other weights are trainable again.

    Args:
        model: a `DiffusionModel` or its network.
        ema: whether to store the averages of the vectors, if the model has averages that have been updated. Those of
            other weights, such as A and B of a LoRA, then become these weights.
    """
    prompt = prompt_of(model, "inversion.finish")
    if ema:
        lora.follow_ema(model)
    for encoder in prompt.encoders:
        if encoder.learned:
            encoder.keep(ops.convert_to_numpy(encoder.table.rows))
    lora.release(model)
    lora.changed(model)


@deprecated.arguments(averages="ema")
def vectors_of(model: keras.layers.Layer, token: str, ema: bool = True) -> list[np.ndarray | None]:
    """The vectors of an added token, (count, width) for each encoder; None for encoders without it.

    Args:
        model: a `DiffusionModel` or its network.
        token: an added token.
        ema: whether to return averages of trained vectors, if the model has averages that have been updated.

    Raises:
        ValueError: if no encoder has this token.
    """
    prompt = prompt_of(model, "inversion.vectors_of")
    numbers = {id(encoder): found for encoder, found in _numbers(prompt, token, "inversion.vectors_of")}
    averaged = lora.ema_of(model) if ema else {}
    vectors = []
    for encoder in prompt.encoders:
        found = numbers.get(id(encoder))
        if found is not None and encoder.learned and encoder.learned[0] == found[0]:
            vectors.append(ops.convert_to_numpy(averaged.get(id(encoder.table.rows), encoder.table.rows)))
        else:
            vectors.append(None if found is None else _table(encoder)[found])
    return vectors


def prompt_of(model: keras.layers.Layer, name: str) -> Any:
    """The text condition of a model whose encoders accept new tokens.

    Args:
        model: a `DiffusionModel` or its network.
        name: of the calling function, for errors.

    Raises:
        ValueError: if there is none, or its encoders or tokenizers do not accept new tokens.
    """
    network = getattr(model, "network", model)
    found = [part for part in network._flatten_layers() if hasattr(part, "encoders") and hasattr(part, "tokenizers")]
    if not found:
        raise ValueError(f"{name}: the network must have a `kdiff.encoders.Prompt` as text condition; it has none")
    prompt = found[0]
    for encoder, tokenizer in zip(prompt.encoders, prompt.tokenizers, strict=True):
        if not hasattr(encoder, "extend") or not hasattr(tokenizer, "with_token") or not encoder.built:
            raise ValueError(
                f"{name}: only a built CLIPText with a JSONTokenizer can have new tokens; received: "
                f"{type(encoder).__name__}, {tokenizer!r:.80}"
            )
    return prompt


def _numbers(prompt: Any, token: str, name: str) -> list[tuple[Any, list[int]]]:
    """(encoder, ids of the token) for each encoder that has it."""
    pairs = zip(prompt.encoders, prompt.tokenizers, strict=True)
    known = [(encoder, tokenizer.numbers_of(token)) for encoder, tokenizer in pairs]
    known = [(encoder, numbers) for encoder, numbers in known if numbers]
    if not known:
        raise ValueError(f"{name}: no encoder has the token {token!r}; `inversion.add` adds one")
    return known


def _table(encoder: Any) -> np.ndarray:
    return ops.convert_to_numpy(encoder.table.table)
