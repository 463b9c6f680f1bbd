"""A switch by which self-attention becomes the identity, for guidance that spoils a network on purpose.

with identity_attention.switched_on("bridge"):
    worse = network(inputs)
"""

import contextlib
import re
from collections.abc import Iterator
from contextvars import ContextVar

__all__ = ["is_on", "switched_on"]

_identity: ContextVar = ContextVar("identity_attention", default=None)


@contextlib.contextmanager
def switched_on(layers: str) -> Iterator[None]:
    """Inside, self-attention whose path has a part that matches the regular expression gives each position itself.

    Raises:
        ValueError: at the end, if there was none.
    """
    pattern, seen = re.compile(layers), {}
    token = _identity.set((pattern, seen))
    try:
        yield
    finally:
        _identity.reset(token)
    if not any(seen.values()):
        raise ValueError(f"No self-attention has a path that matches {layers!r}; there are: {sorted(seen)}")


def is_on(path: str) -> bool:
    """Whether the self-attention of this path is to be the identity; called once a layer and call."""
    if _identity.get() is None:
        return False
    pattern, seen = _identity.get()
    seen[path] = pattern.search(path) is not None
    return seen[path]
