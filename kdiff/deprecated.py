"""Old names, which still work: each warns with a `DeprecationWarning` that names the new one, and loads from old files.

@arguments(averages="ema")                                    an argument of a function, method or constructor
reset_averages = member("reset_averages", "reset_ema")        a method or a property of a class
__getattr__ = names(__name__, Beside="Concat")       a class or function of a module
formerly = ("kdiff.blocks>Beside",)                           a class in a saved configuration (`base.Configurable`)
PATHS                                                         a layer in a file of weights (`find_old_paths`)
"""

import functools
import importlib
import inspect
import re
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

__all__ = ["PATHS", "arguments", "find_old_paths", "member", "names", "warn"]

_Function = TypeVar("_Function", bound=Callable[..., Any])  # a type checker sees the function itself

# Keras names a layer in a file by the attribute that holds it, or, in a list or dictionary, by its class.
PATHS = {
    "ema_weights": "averages",
    "concat": "beside",
    "guidance_embedding": "steered_embedding",
    "perceiver_resampler": "resampler",
    "progressive_distillation": "distillation",
    "scm": "tangent_consistency",
}


def warn(old: str, new: str, stacklevel: int = 3) -> None:
    """Warns of an old name; by default, at the line that called the caller."""
    warnings.warn(f"{old} is deprecated; use {new} instead", DeprecationWarning, stacklevel=stacklevel)


def arguments(**renamed: str) -> Callable[[_Function], _Function]:
    """Decorator: a function that also accepts the old name of an argument, as in `arguments(old="new")`.

    Raises:
        TypeError: when it is called, if it receives both names.
    """

    def decorate(function: _Function) -> _Function:
        @functools.wraps(function)
        def call(*args: Any, **options: Any) -> Any:
            for old in renamed.keys() & options.keys():
                if renamed[old] in options:
                    raise TypeError(f"{function.__qualname__} received both `{renamed[old]}` and its old name `{old}`")
                warn(f"{function.__qualname__}: the argument `{old}`", f"`{renamed[old]}`")
                options[renamed[old]] = options.pop(old)
            return function(*args, **options)

        call.__signature__ = inspect.signature(function)  # Keras reads that of constructors, and follows no wrapper
        call.renamed = renamed
        return call

    return decorate


def member(old: str, new: str) -> property:
    """A property that gives the attribute or method `new` under its old name."""

    def get(self: Any) -> Any:
        warn(f"{type(self).__name__}.{old}", f"`{new}`")
        return getattr(self, new)

    get.__doc__ = f"The old name of `{new}`."
    return property(get)


def names(module: str, of: str | None = None, **renamed: str) -> Callable[[str], Any]:
    """A module's `__getattr__`, which finds the old names of what is now in the module `of`, by default the same."""

    def find(name: str) -> Any:
        if name not in renamed:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        warn(f"{module}.{name}", f"{of or module}.{renamed[name]}")
        return getattr(importlib.import_module(of or module), renamed[name])

    return find


def find_old_paths(store: Any) -> None:
    """Has a Keras weight file that is being loaded find layers under the old names of `PATHS`, if it lacks the new."""
    if not hasattr(store, "has_path"):  # a dictionary of one layer's own variables
        return
    get = store.get

    def old(path: str) -> str:
        parts = (re.fullmatch(r"(.*?)((?:_\d+)?)", part) for part in path.split("/"))
        return "/".join(PATHS.get(part[1], part[1]) + part[2] for part in parts)

    store.get = lambda path: get(path if store.has_path(path) else old(path))
