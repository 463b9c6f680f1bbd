"""The state dict inside a checkpoint: averaged weights before trained ones, without what is no tensor.

    {name: tensor}                                                          a state dict
    {"state_dict" | "model_state_dict" | "model" ...: ...}                  with more beside it
    {"model": ..., "ema" | "model_ema" | "ema_state_dict" ...: ...}         with averages, which are taken
    {"model": ..., "ema": {"shadow_params": [tensor, ...]}}                 averages by the order of the parameters
    {"ema": {"online_model.<name>": ..., "ema_model.<name>": ...}}          ema-pytorch
    [state dict, optimizer, epoch, step, averages of the parameters]        DDIM's main.py

A module that was pickled whole counts as its state dict. Of names that all begin with what a wrapper of PyTorch puts
before them, `module.` or `_orig_mod.`, that is left out.
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
        content: what a checkpoint holds: a mapping, with arrays, tensors and other mappings; a list that begins with
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
    """The state dict without the words that a wrapper has put before all names."""
    for wrapper in WRAPPERS:
        if state and all(name.startswith(wrapper) for name in state):
            return unwrapped({name.removeprefix(wrapper): array for name, array in state.items()})
    return state


def _found(content: Any, source: Any) -> dict[Any, Any] | None:
    """The arrays, in the form that they have; None if there are none."""
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
    """The first, with what the last has averages of: their names are those of parameters, without a wrapper's word."""
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
            f"{source}: `{name}` must be a state dict for averaged weights to be read; received: {_words(averages)}. "
            f"Save its state dict, or give a mapping that has the other weights alone; there are: {sorted(content)}"
        )
    return found


def _in_order(averages: Sequence[Any], trained: Mapping[str, Any], source: str) -> dict[str, Any]:
    """The trained weights with averages, which are those of the parameters in their order, in place of these.

    Buffers and what was not trained have no averages. Shapes tell which these are, or it is an error.
    """
    ways = [_sizes(trained.values()), _sizes(averages)]
    if _count(*ways) != 1:
        raise ValueError(
            f"{source} has {len(averages)} averages without names, and the weights beside it, {len(trained)}, do not "
            "tell which is which"
        )
    left = list(averages)
    state = {}
    for name, value in trained.items():  # the only way is the first
        state[name] = left.pop(0) if left and tuple(left[0].shape) == tuple(value.shape) else value
    return state


def _sizes(arrays: Iterable[Any]) -> list[tuple[int, ...]]:
    return [tuple(array.shape) for array in arrays]


def _count(longer: Sequence[Any], shorter: Sequence[Any]) -> int:
    """In how many ways the shorter sequence can be had from the longer by leaving things out."""
    ways = [1] + [0] * len(shorter)
    for one in longer:
        for i in range(len(shorter), 0, -1):
            ways[i] += ways[i - 1] if shorter[i - 1] == one else 0
    return ways[-1]


def _chosen(arrays: Mapping[str, Any]) -> dict[str, Any]:
    """Of arrays of ema-pytorch's module those of the averages."""
    averages = {name: value for name, value in arrays.items() if str(name).startswith("ema_model.")}
    return {name.removeprefix("ema_model."): value for name, value in averages.items()} or dict(arrays)


def _is_array(value: Any) -> bool:
    return hasattr(value, "shape") and hasattr(value, "dtype") and not isinstance(value, np.generic)


def _words(content: Any) -> str:
    if isinstance(content, Unknown):
        return f"an object of {content.name}"
    return f"a dictionary with {sorted(map(str, content))[:8]}" if isinstance(content, Mapping) else repr(type(content))
