"""The state dict inside a checkpoint: averaged weights if there are any, and only tensors.

    {name: tensor}                                                          a state dict
    {"state_dict" | "model_state_dict" | "model" ...: ...}                  among other entries
    {"model": ..., "ema" | "model_ema" | "ema_state_dict" ...: ...}         with averages, which are used
    {"model": ..., "ema": {"shadow_params": [tensor, ...]}}                 averages in the order of the parameters
    {"ema": {"online_model.<name>": ..., "ema_model.<name>": ...}}          ema-pytorch
    [state dict, optimizer, epoch, step, averages of the parameters]        DDIM's main.py

A pickled module counts as its state dict. A common prefix of all names from a PyTorch wrapper, `module.` or
`_orig_mod.`, is removed.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from kdiff.interop.arrays import State, array_of
from kdiff.interop.pickles import Unknown, module_state

__all__ = ["AVERAGED", "TRAINED", "WRAPPERS", "state_of", "unwrapped"]

AVERAGED = ("ema", "model_ema", "ema_model", "ema_state_dict", "model_ema_state_dict", "params_ema")
TRAINED = ("state_dict", "model_state_dict", "model", "module", "net", "network", "unet", "params")
WRAPPERS = ("module.", "_orig_mod.")


def state_of(content: Any, source: Any) -> State:
    """The arrays by name.

    Args:
        content: the content of a checkpoint: a mapping with arrays, tensors and other mappings; a list that begins with
            one; or a pickled module.
        source: the file, for errors.

    Raises:
        ValueError: if there are no arrays, or there are averages that cannot be read.
    """
    found = _found(content, source)
    if found is None:
        what = content.name if isinstance(content, Unknown) else _words(content)
        raise ValueError(f"{source}: must hold tensors by name; received: {what}. Save `module.state_dict()`")
    return unwrapped({str(name): array_of(value, str(name), source) for name, value in found.items()})


def unwrapped(state: State) -> State:
    """The state dict without the prefix of a wrapper."""
    for wrapper in WRAPPERS:
        if state and all(name.startswith(wrapper) for name in state):
            return unwrapped({name.removeprefix(wrapper): array for name, array in state.items()})
    return state


def _found(content: Any, source: Any) -> dict[Any, Any] | None:
    """The arrays, in their original form; None if there are none."""
    if isinstance(content, Unknown):
        return _chosen(module_state(content)) or None
    if isinstance(content, (list, tuple)):
        return _listed(content)
    if not isinstance(content, Mapping):
        return None
    for name in (name for name in AVERAGED if name in content):
        averages = _averages(content, name, source)
        if averages is not None:
            return averages
    arrays = {name: value for name, value in content.items() if _is_array(value)}
    inner = (_found(content[name], source) for name in TRAINED if name in content and not _is_array(content[name]))
    return next((one for one in inner if one is not None), None) or _chosen(arrays) or None


def _listed(content: Sequence[Any]) -> dict[Any, Any] | None:
    """The first entry, updated with the averages in the last, whose names have no wrapper prefix."""
    states = [one for one in content if isinstance(one, Mapping) and one and all(map(_is_array, one.values()))]
    if not states or states[0] is not content[0]:
        return None
    trained, averages = unwrapped(states[0]), unwrapped(states[-1])
    known = all(name in trained and trained[name].shape == one.shape for name, one in averages.items())
    return {**trained, **averages} if known else dict(trained)


def _averages(content: Mapping, name: str, source: Any) -> dict[Any, Any] | None:
    averages = content[name]
    if isinstance(averages, Mapping) and "shadow_params" in averages:
        rest = {key: value for key, value in content.items() if key not in AVERAGED}
        return _in_order(averages["shadow_params"], _found(rest, source) or {}, f"{source}: `{name}`")
    found = _found(averages, source)
    if found is None and isinstance(averages, (Unknown, Sequence)) and not isinstance(averages, str):
        raise ValueError(
            f"{source}: `{name}` must be a state dict for its averages to be read; received: {_words(averages)}. "
            f"Save its state dict, or pass a mapping with only the other weights; found: {sorted(content)}"
        )
    return found


def _in_order(averages: Sequence[Any], trained: Mapping[str, Any], source: str) -> dict[str, Any]:
    """The trained weights, with the parameters replaced by averages, which are given in the order of the parameters.

    Buffers and frozen weights have no averages. The assignment must be unambiguous from the shapes.
    """
    ways = [_sizes(trained.values()), _sizes(averages)]
    if _count(*ways) != 1:
        raise ValueError(
            f"{source} has {len(averages)} unnamed averages, whose assignment to the {len(trained)} weights is "
            "ambiguous"
        )
    left = list(averages)
    state = {}
    for name, value in trained.items():  # there is only one assignment
        state[name] = left.pop(0) if left and tuple(left[0].shape) == tuple(value.shape) else value
    return state


def _sizes(arrays: Iterable[Any]) -> list[tuple[int, ...]]:
    return [tuple(array.shape) for array in arrays]


def _count(longer: Sequence[Any], shorter: Sequence[Any]) -> int:
    """The number of ways in which the shorter sequence is a subsequence of the longer."""
    ways = [1] + [0] * len(shorter)
    for one in longer:
        for i in range(len(shorter), 0, -1):
            ways[i] += ways[i - 1] if shorter[i - 1] == one else 0
    return ways[-1]


def _chosen(arrays: Mapping[str, Any]) -> dict[str, Any]:
    """The averages among the arrays of a module of ema-pytorch."""
    averages = {name: value for name, value in arrays.items() if str(name).startswith("ema_model.")}
    return {name.removeprefix("ema_model."): value for name, value in averages.items()} or dict(arrays)


def _is_array(value: Any) -> bool:
    return hasattr(value, "shape") and hasattr(value, "dtype") and not isinstance(value, np.generic)


def _words(content: Any) -> str:
    if isinstance(content, Unknown):
        return f"an object of {content.name}"
    return f"a dictionary with {sorted(map(str, content))[:8]}" if isinstance(content, Mapping) else repr(type(content))
