"""Directional derivatives, and the switch by which layers use operations that support them."""

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

from keras import ops

__all__ = ["forward_mode", "forward_mode_is_on", "jvp"]

_on: ContextVar = ContextVar("forward_mode", default=False)


@contextlib.contextmanager
def forward_mode() -> Iterator[None]:
    """A context in which `dense`, `attention`, `group_norm`, `gelu_tanh` and `upsample_nearest` use plain formulas.

    Their fast forms have no directional derivative: custom gradients on JAX, an autograd.Function and the fused
    attention on PyTorch, `image.resize` on TensorFlow.
    """
    token = _on.set(True)
    try:
        yield
    finally:
        _on.reset(token)


def forward_mode_is_on() -> bool:
    """Whether plain formulas are in use."""
    return _on.get()


def jvp(function: Callable, x: Any, direction: Any) -> Any:
    """d function(x + e direction) / de at e = 0, by forward-mode differentiation, of tensors."""
    with forward_mode():
        return ops.jvp(function, (x,), (direction,))[1]
