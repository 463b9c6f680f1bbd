"""Validation of foreign configurations against tables of keys: the rule for each value and its default.

A `Rule` is the type and the range of a value. `complete` checks every value of a file against the rule of its key
first, so that later code need not check again.
"""

import contextlib
import math
import reprlib
from collections.abc import Callable, Container, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import keras

from kdiff.interop.unsupported import about_folder

__all__ = [
    "FLAG",
    "LARGEST",
    "TEXT",
    "Described",
    "Key",
    "Keys",
    "Rule",
    "complete",
    "each",
    "either",
    "explained",
    "kind",
    "listed",
    "one_of",
    "only",
    "optional",
    "real",
    "shown",
    "whole",
]

LARGEST = 100_000  # a larger number of steps or channels is taken as a damaged file


class Rule(NamedTuple):
    """The set of valid values.

    Attributes:
        words: completes "must be ...".
        holds: whether a value is valid.
    """

    words: str
    holds: Callable[[Any], bool]


class Key(NamedTuple):
    """A key of a configuration.

    Attributes:
        default: its value if it is missing.
        rule: the values that can be translated.
    """

    default: Any
    rule: Rule


Keys = Mapping[str, Key]


class Described(NamedTuple):
    """A network without weights, and the shapes of its inputs by name, without `time`."""

    network: keras.Model
    shapes: dict[str, tuple]


# --- rules


def whole(low: int, high: int = LARGEST) -> Rule:
    """A whole number in [low, high]."""
    return Rule(
        f"a whole number in [{low}, {high}]",
        lambda value: isinstance(value, int) and not isinstance(value, bool) and low <= value <= high,
    )


def real(low: float, high: float) -> Rule:
    """A finite number in [low, high]."""

    def holds(value):
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        return number and low <= value <= high and math.isfinite(value)

    return Rule(f"a number in [{low}, {high}]", holds)


def one_of(*choices: Any) -> Rule:
    """One of these values; true is not 1."""
    return Rule(f"one of {list(choices)}", lambda value: any(_same(value, choice) for choice in choices))


def listed(rule: Rule, low: int = 1, high: int = 16) -> Rule:
    """A list of `low` to `high` values, each satisfying the rule."""

    def holds(value):
        return isinstance(value, (list, tuple)) and low <= len(value) <= high and all(map(rule.holds, value))

    return Rule(f"a list of {low} to {high} values, each {rule.words}", holds)


def either(*rules: Rule) -> Rule:
    """A value that satisfies one of the rules."""
    return Rule(" or ".join(rule.words for rule in rules), lambda value: any(rule.holds(value) for rule in rules))


def optional(rule: Rule) -> Rule:
    """A value that satisfies the rule, or None."""
    return either(rule, one_of(None))


FLAG = one_of(True, False)
TEXT = Rule("a text", lambda value: isinstance(value, str))


def only(value: Any, *same: Any) -> Key:
    """A key for which only this value, or an equivalent one, can be translated."""
    return Key(value, one_of(value, *same))


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(_same, a, b))
    return isinstance(a, bool) == isinstance(b, bool) and a == b


# --- configurations


def complete(config: Mapping[str, Any], keys: Keys, source: Any, foreign: Container[str] = ()) -> dict[str, Any]:
    """The configuration with its defaults, after a check of every value against its rule.

    Keys that begin with an underscore are comments. An unknown key is accepted if its value is None, False or empty.

    Args:
        config: the configuration in a file.
        keys: the rules.
        source: the file, for errors.
        foreign: keys of other classes, which diffusers ignores whatever their value.

    Raises:
        ValueError: if a key is unknown, or its value cannot be translated.
    """
    for name, value in config.items():
        if name in keys and not keys[name].rule.holds(value):
            words = keys[name].rule.words
            raise ValueError(f"{source}: `{name}` must be {words} to be loaded; received: {shown(value)}")
        empty = any(_same(value, one) for one in (None, False, [], {}))
        if name not in keys and name not in foreign and not name.startswith("_") and not empty:
            raise ValueError(f"{source}: the key `{shown(name)[1:-1]}` is unknown to kdiff; received: {shown(value)}")
    return {name: config.get(name, key.default) for name, key in keys.items()}


def each(value: Any, count: int, source: Any, name: str) -> list:
    """A value for each of `count` levels: one for all, or a list of `count`."""
    values = list(value) if isinstance(value, (list, tuple)) else [value] * count
    if len(values) != count:
        raise ValueError(f"{source}: `{name}` must be one value or {count}; received: {shown(value)}")
    return values


def kind(table: Mapping[str, Any], value: Any, source: Any, name: str) -> Any:
    """The entry of a table."""
    if not isinstance(value, str) or value not in table:
        what = about_folder(Path(source).parent) if value is None else ""
        raise ValueError(
            f"{source}: `{name}` must be one of {list(table)} to be loaded; received: {shown(value)}{what}"
        )
    return table[value]


@contextlib.contextmanager
def explained(source: Any) -> Iterator[None]:
    """Adds the name of the file to errors raised by the objects built from it."""
    try:
        yield
    except ValueError as error:
        named = str(error).startswith(str(source))
        raise error if named else ValueError(f"{source}: {error}") from error


_shown = reprlib.Repr()
_shown.maxstring = _shown.maxother = _shown.maxlong = 120


def shown(value: Any) -> str:
    """A value of a file for an error message, truncated if long or deep."""
    return _shown.repr(value)
