"""Features that a network computes in one step of a sampling run and reuses in the following ones.

    Sampler("ddim", steps=50, reuse=Reuse(3))        the deep part of the network in every third step only

Layers mark what can be reused by `once` and `residual`, which only compute it outside `kept_in`.
"""

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import keras
from keras import ops

from kdiff.base import Value, check_integer

__all__ = ["Reuse", "Store", "is_on", "kept_in", "nothing_kept", "once", "residual", "shallow_blocks"]

_store: ContextVar = ContextVar("reuse", default=None)


class Reuse(Value):
    """Deep features are computed in every `every`-th step of a run and reused in the steps between.

    In a `UNet` they are the input of its last `shallow` + 1 blocks; in a step that reuses them only these and the first
    `shallow` blocks run (DeepCache, Ma et al. 2023, arXiv:2312.00858, section 3.2); in a `UViT`, of the last `shallow`,
    which its long skip connections join with the first. In a `DiT` or an `MMDiT` they are the sum of the residuals of
    all blocks except the first and last `shallow` (as in Delta-DiT, Chen et al. 2024, arXiv:2406.01125), in an `MMDiT`
    those of the text too. Other networks are refused.

    Keys and values of the tokens of conditions, such as a text, are used for as many steps. With `every` = 1 the
    samples are unchanged, also under a guidance that changes the conditions from step to step. A guidance that
    differentiates the network, such as `DPS`, is refused.

    Args:
        every: the number of steps for which deep features are used.
        shallow: the number of blocks at each end of the network that run in every step.
    """

    def __init__(self, every: int = 2, shallow: int = 1):
        check_integer("Reuse", "every", every)
        check_integer("Reuse", "shallow", shallow)
        self.every, self.shallow = every, shallow

    def at(self, index: int, kept: dict[str, dict]) -> dict[str, dict]:
        """The features for step `index`, out of those of the step before."""
        return nothing_kept() if index % self.every == 0 else kept


def nothing_kept() -> dict[str, dict]:
    """The features for the first step: none."""
    return {"context": {}, "deep": {}}


class Store:
    """The features of a step, by layer and by the number of its call in the step."""

    def __init__(self, kept: dict[str, dict], shallow: int):
        self.kept, self.shallow = {part: dict(values) for part, values in kept.items()}, shallow
        self._calls: dict[str, int] = {}

    def once(self, part: str, owner: Any, x: Any, make: Callable[[], Any]) -> Any:
        """The features of this call, if they have as many rows as x; else those of `make`, which are kept."""
        name = f"{owner.path}_{id(owner)}"
        self._calls[name] = call = self._calls.get(name, -1) + 1
        name, values = f"{name}_{call}", self.kept[part]
        if name not in values or values[name][0].shape[0] != x.shape[0]:
            values[name] = make()
        return values[name]


@contextlib.contextmanager
def kept_in(store: Store | None) -> Iterator[Store | None]:
    """A context in which layers reuse the features of the store, and add those that are missing; None disables it."""
    token = _store.set(store)
    try:
        yield store
    finally:
        _store.reset(token)


def is_on() -> bool:
    """Whether layers keep features, or reuse them."""
    return _store.get() is not None


def shallow_blocks() -> int:
    """The number of blocks at each end of a network that run in every step."""
    store = _store.get()
    return 1 if store is None else store.shallow


def once(part: str, owner: Any, x: Any, make: Callable[[], tuple]) -> tuple:
    """The result of `make`, a tuple of tensors, or its result of an earlier step.

    Args:
        part: "deep", or "context", of the tokens of conditions.
        owner: the layer.
        x: a tensor with the same number of rows.
        make: a function without arguments.
    """
    store = _store.get()
    return make() if store is None else store.once(part, owner, x, make)


def residual(owner: Any, x: Any, make: Callable[[], Any]) -> Any:
    """The result of `make`, a function of x; in a step that reuses, x plus the difference in an earlier step.

    Args:
        owner: the layer.
        x: a tensor, or several, a tuple; the result has as many.
        make: a function without arguments.
    """
    store, made = _store.get(), []
    if store is None:
        return make()

    def added():
        made.append(make())
        return tuple(keras.tree.flatten(keras.tree.map_structure(ops.subtract, made[0], x)))

    given = keras.tree.flatten(x)
    more = store.once("deep", owner, given[0], added)
    if made:
        return made[0]
    return keras.tree.pack_sequence_as(x, [one + change for one, change in zip(given, more, strict=True)])
