"""A foreign configuration against a table of its keys: what it may say, and what it means if it says nothing."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import keras

__all__ = ["Described", "Key", "Keys", "complete", "each", "kind", "only"]


class Key(NamedTuple):
    """A key of a configuration.

    Attributes:
        default: its value where it is not given.
        choices: the values that can be translated; None for any.
    """

    default: Any
    choices: tuple | None = None


Keys = Mapping[str, Key]


class Described(NamedTuple):
    """A network without weights, and the shapes of its inputs by name, without `time`."""

    network: keras.Model
    shapes: dict[str, tuple]


def only(value: Any, *same: Any) -> Key:
    """A key of which nothing but this value, and others that come to the same, can be translated."""
    return Key(value, (value, *same))


def complete(config: Mapping[str, Any], keys: Keys, source: Any, ignored: Iterable[str] = ()) -> dict[str, Any]:
    """The configuration with its defaults, and nothing in it that would be lost.

    Keys that begin with an underscore are notes. A key that the table does not have may say None, False or nothing.

    Raises:
        ValueError: if a key is unknown, or its value cannot be translated.
    """
    ignored = set(ignored)
    for name, value in config.items():
        if name.startswith("_") or name in ignored:
            continue
        if name not in keys and value not in (None, False, [], {}):
            raise ValueError(f"{source}: the key `{name}` is unknown to kdiff; received: {value!r}")
        if name in keys and keys[name].choices is not None and _plain(value) not in map(_plain, keys[name].choices):
            raise ValueError(
                f"{source}: `{name}` must be one of {list(keys[name].choices)} to be loaded; received: {value!r}"
            )
    return {name: config.get(name, key.default) for name, key in keys.items()}


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def each(value: Any, count: int, source: Any, name: str) -> list:
    """A value for each of `count` levels: one for all, or a list of so many."""
    values = list(value) if isinstance(value, (list, tuple)) else [value] * count
    if len(values) != count:
        raise ValueError(f"{source}: `{name}` must be one value or {count}; received: {value!r}")
    return values


def kind(table: Mapping[str, Any], value: Any, source: Any, name: str) -> Any:
    """The entry of a table."""
    if not isinstance(value, str) or value not in table:
        raise ValueError(f"{source}: `{name}` must be one of {list(table)} to be loaded; received: {value!r}")
    return table[value]
