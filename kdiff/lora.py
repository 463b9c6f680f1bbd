"""LoRA: low-rank changes of some kernels of a network are trained, and nothing else.

    y = x W + scale (x A) B,    scale = alpha / rank,    A (inputs, rank) ~ N(0, 1 / rank^2),  B (rank, outputs) = 0

Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models" (2022), section 4.1, with the standard deviation of the
training scripts of diffusers. For a convolution, A has the size of its kernel, and B is a 1x1 convolution.

    model = interop.diffusers.load("stable-diffusion-v1-5", ema=0.99)
    lora.enable(model, rank=8)                    # from now on only A and B are trained and averaged
    model.compile(keras.optimizers.Adam(1e-4))
    model.fit(...)
    interop.lora.save(model, "mine.safetensors")  # only A and B, with the names of diffusers
    lora.merge(model)                             # or lora.remove(model)
"""

import re
from collections.abc import Iterator

import keras
import numpy as np
from keras import ops

from kdiff import deprecated
from kdiff.base import check_integer, check_number

__all__ = [
    "ATTENTION",
    "changed",
    "ema_of",
    "enable",
    "enabled",
    "find",
    "follow_ema",
    "freeze",
    "merge",
    "plan",
    "release",
    "remove",
    "restore",
]

ATTENTION = r"attention\w*/(query|key|value|output)$"


def find(model: keras.layers.Layer, where: str = ATTENTION, text: bool = False) -> dict[str, keras.layers.Layer]:
    """The layers to which LoRA applies, by their paths in Keras.

    Args:
        model: a `DiffusionModel` or its network, built.
        where: a regular expression, searched in the paths, such as
            "u_net/down_0/spatial_transformer/transformer_block/cross_attention/multi_head_attention/key"; "" for all
            dense layers and convolutions. By default the layers of attention.
        text: whether to search in the text encoders of the network too.
    """
    found = _layers(_network(model)) if text else _own_layers(_network(model))
    layers = {layer._kernel.path.rpartition("/")[0]: layer for layer in found}
    return {path: layer for path, layer in layers.items() if re.search(where, path)}


def enable(
    model: keras.layers.Layer,
    rank: int = 4,
    where: str = ATTENTION,
    alpha: float | None = None,
    text: bool = False,
) -> list[str]:
    """Freezes all weights and adds A and B to some layers; only these are then trained and averaged.

    Call it before `compile`. B is initialised to zero, and so is the change. Frozen weights have no averages: if the
    model had averages that have been updated, they become its weights. The vectors of a token that
    `kdiff.inversion.enable` made trainable remain trainable.

    Args:
        model: a `DiffusionModel` or its network, built.
        rank: the rank of the changes.
        where: the layers, as in `find`.
        alpha: scale times rank; None for the rank itself.
        text: whether `where` applies to the text encoders too. The network then calls them in each step, on tokens, to
            which `fit` and `sample` convert texts; precomputed embeddings are no longer accepted.

    Returns:
        The paths of the layers.

    Raises:
        ValueError: if no layer matches, or LoRA is already enabled.
    """
    check_integer("lora.enable", "rank", rank)
    if alpha is not None:
        check_number("lora.enable", "alpha", alpha, 0.0)
    if enabled(model):
        raise ValueError(
            f"lora.enable: LoRA is already on, in {len(enabled(model))} layers; `lora.merge` or `lora.remove` it first"
        )
    found = find(model, where, text)
    if not found:
        known = list(find(model, "", text))
        shown = known[:10] + [f"... {len(known) - 10} more"] * (len(known) > 10)
        raise ValueError(f"lora.enable: `where` must match the path of a layer, {shown}; received: {where!r}")
    follow_ema(model)
    _enable(model, [(layer, rank, rank if alpha is None else alpha) for layer in found.values()])
    return list(found)


def enabled(model: keras.layers.Layer) -> list[keras.layers.Layer]:
    """The layers that have A and B."""
    return [layer for layer in _layers(_network(model)) if layer.lora_enabled]


@deprecated.arguments(averages="ema")
def merge(model: keras.layers.Layer, ema: bool = True) -> None:
    """Adds scale A B to the kernels and removes A and B: the network computes the same, and is trainable again.

    Args:
        model: a `DiffusionModel` or its network.
        ema: whether to merge the averages of A and B, if the model has averages that have been updated. Those of other
            weights, such as the vectors of a token, then become these weights.

    Raises:
        ValueError: if kernels are quantized: the sum would be rounded to whole numbers, and small changes be lost.
    """
    if quantized := [layer.name for layer in enabled(model) if layer.quantization_mode is not None]:
        raise ValueError(
            f"lora.merge: {len(quantized)} layers with A and B are quantized, and the sum would be rounded anew; keep "
            "A and B, which are saved with the model, or merge before `quantize`"
        )
    if ema:
        follow_ema(model)
    for layer in enabled(model):
        a, b = _numbers(layer.lora_kernel_a), _numbers(layer.lora_kernel_b)
        change = np.float32(layer.lora_alpha / layer.lora_rank) * (a @ b)
        layer._kernel.assign(_numbers(layer._kernel) + change)
    remove(model)


def remove(model: keras.layers.Layer) -> None:
    """Removes A and B: the network is exactly as after `enable`, when B was zero, and trainable again."""
    for layer in enabled(model):
        layer.disable_lora()
    release(model)
    changed(model)


def freeze(model: keras.layers.Layer) -> None:
    """Freezes all weights except A, B, and the vectors of trained tokens."""
    for weight in _network(model).trainable_variables:
        if not getattr(weight, "adapts", False):
            weight.trainable, weight.frozen, weight.averaged = False, True, False


def release(model: keras.layers.Layer) -> None:
    """Undoes `freeze`, unless LoRA or trained tokens remain."""
    weights = _network(model).weights
    if any(getattr(weight, "adapts", False) for weight in weights):
        return
    for weight in weights:
        if getattr(weight, "frozen", False):
            weight.trainable, weight.frozen, weight.averaged = True, False, True


def changed(model: keras.layers.Layer) -> None:
    """Must be called when the trainable weights change: resets averages, graphs and compiled steps of a model."""
    for part in _network(model)._flatten_layers():
        if hasattr(part, "encoders") and hasattr(part, "changed"):  # a text condition
            part.changed()
    if hasattr(model, "reset_ema") and model.built:
        model.reset_ema()
        model._take_rows_anew()


def plan(network: keras.layers.Layer) -> list[list[float]]:
    """[index, rank, alpha] of each layer with A and B, for `restore`."""
    layers = enumerate(_layers(network))
    return [[i, layer.lora_rank, layer.lora_alpha] for i, layer in layers if layer.lora_enabled]


def restore(model: keras.layers.Layer, planned: list[list[float]]) -> None:
    """Adds A and B to the same layers of a network of the same architecture."""
    layers = list(_layers(_network(model)))
    _enable(model, [(layers[int(i)], int(rank), alpha) for i, rank, alpha in planned])


def ema_of(model: keras.layers.Layer) -> dict[int, keras.Variable]:
    """The averages of a model by the `id` of the network's weights; empty without averages, or updates."""
    averages = getattr(model, "ema_weights", None)
    moved = averages is not None and averages.moved
    return {id(weight): average for weight, average in averages.pairs(_network(model))} if moved else {}


def follow_ema(model: keras.layers.Layer) -> None:
    """Makes averages that have been updated the weights of the network, before others take their place."""
    if averages := getattr(model, "ema_weights", None):
        averages.apply(_network(model))


def _enable(model, layers) -> None:
    freeze(model)
    for layer, rank, alpha in layers:
        if layer.lora_enabled:  # from a configuration
            layer.lora_alpha = alpha
        else:
            layer.enable_lora(rank, alpha)
        for weight in (layer.lora_kernel_a, layer.lora_kernel_b):
            weight.trainable = weight.averaged = weight.adapts = True  # also in a frozen encoder
    changed(model)


def _network(model):
    return getattr(model, "network", model)


def _layers(network) -> Iterator[keras.layers.Layer]:
    """All layers that can have A and B (`kdiff.blocks.layers.LowRank`), those of frozen parts last."""
    own = list(_own_layers(network))
    yield from own
    known = {id(layer) for layer in own}
    yield from (layer for layer in _low_rank(network) if id(layer) not in known)


def _own_layers(network) -> Iterator[keras.layers.Layer]:
    """The layers that are not part of frozen parts."""
    constant = [part for part in network._flatten_layers() if getattr(part, "frozen", False)]
    inside = {id(layer) for part in constant for layer in part._flatten_layers()}
    yield from (layer for layer in _low_rank(network) if id(layer) not in inside)


def _low_rank(network) -> Iterator[keras.layers.Layer]:
    yield from (layer for layer in network._flatten_layers() if hasattr(layer, "disable_lora") and layer.built)


def _numbers(variable) -> np.ndarray:
    return np.asarray(ops.convert_to_numpy(variable), "float32")


__getattr__ = deprecated.names(__name__, averages_of="ema_of")
