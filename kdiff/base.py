"""An object is determined by its constructor arguments.

Every schedule, prediction, solver, block and network of kdiff stores each constructor argument as an attribute of the
same name. Its configuration, copy, printed form and lookup by name follow from this rule, so a custom class needs only
`__init__` and its mathematical method:

    class Quadratic(NoiseSchedule):
        def __init__(self, power=2.0):
            super().__init__()
            self.power = power
        ...

    NoiseSchedule.get("quadratic")      # Quadratic()
    Quadratic(power=3.0).get_config()   # {"power": 3.0}
    repr(Quadratic(power=3.0))          # "Quadratic(power=3.0)"
"""

import contextlib
import difflib
import inspect
import re
from collections.abc import Iterator
from typing import Any, ClassVar, Self

import keras
import numpy as np

from kdiff import backend, deprecated

__all__ = ["Configurable", "Value", "check_choice", "check_integer", "check_number", "needs"]


class Configurable:
    """Mixin that derives `get_config`, `from_config`, `get`, `clone` and `repr` from the constructor's signature.

    Subclasses are registered with Keras' serialisation when they are defined: a saved model that uses one can be loaded
    after the defining module is imported.
    """

    aliases: ClassVar[dict[str, str]] = {}  # of a family: names in other libraries, in lower case letters, to ours
    formerly: ClassVar[tuple[str, ...]] = ()  # of a class: its names in old files, "kdiff.part>Name"
    named = True  # whether `get` finds the class by its name; not inherited by subclasses

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        for name in inspect.signature(cls.__init__).parameters:
            if inspect.isfunction(getattr(cls, name, None)):
                raise TypeError(f"{cls.__name__}: the argument `{name}` hides a method of that name")
        module = cls.__module__.split(".")
        package = ".".join(module[:2]) if module[0] == "kdiff" else "Custom"
        keras.saving.register_keras_serializable(package)(cls)
        keras.saving.get_custom_objects().update(dict.fromkeys(vars(cls).get("formerly", ()), cls))

    @classmethod
    def _argument_defaults(cls) -> dict[str, Any]:
        """The constructor's arguments in order, each with its default (`inspect.Parameter.empty` if it has none)."""
        parameters = list(inspect.signature(cls.__init__).parameters.values())[1:]
        named = (p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD))
        return {p.name: p.default for p in named}

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments, serialised."""
        return {name: backend.serialized(getattr(self, name)) for name in self._argument_defaults()}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        """The object that `get_config` described."""
        renamed = getattr(cls.__init__, "renamed", {})
        values = {name: keras.saving.deserialize_keras_object(value) for name, value in config.items()}
        return cls(**{renamed.get(name, name): value for name, value in values.items()})

    def clone(self, **changes: Any) -> Self:
        """A new object with the same constructor arguments, except for `changes`. Weights are not copied."""
        return type(self).from_config({**self.get_config(), **backend.serialized(changes)})

    @classmethod
    def _by_name(cls) -> Self:
        """An object with the default arguments."""
        needed = [name for name, default in cls._argument_defaults().items() if default is inspect.Parameter.empty]
        if needed:
            arguments = ", ".join(f"{name}=..." for name in needed)
            raise ValueError(f"{cls.__name__} is more than a name: give {cls.__name__}({arguments})")
        return cls()

    @classmethod
    def get(cls, identifier: Any) -> Self:
        """The object that `identifier` names.

        Args:
            identifier: an object of this family (returned as it is), a subclass (called without arguments), the
                name of a subclass in any case ("cosine_beta", "CosineBeta"), its name in another library
                ("squaredcos_cap_v2"; see `aliases`) or a serialised configuration.

        Raises:
            ValueError: if no subclass has that name, in which case the message lists the known ones; if a configuration
                is damaged.
            TypeError: if `identifier` is of another type, or a dictionary that describes no object.
        """
        if isinstance(identifier, cls):
            return identifier
        if isinstance(identifier, type) and issubclass(identifier, cls):
            return identifier._by_name()
        if isinstance(identifier, dict):
            try:
                made = keras.saving.deserialize_keras_object(identifier)
            except (AttributeError, KeyError) as error:
                raise ValueError(f"{cls.__name__}: this is no object's configuration: {identifier!r}") from error
            if not isinstance(made, dict):  # Keras returns a dictionary that describes no object as it is
                return cls.get(made)
        known = cls.names()
        if not isinstance(identifier, str):
            raise TypeError(f"{cls.__name__} expected, or one of the names {sorted(known)}; received: {identifier!r}")
        wanted = _letters(identifier.replace("++", "pp"))
        wanted = _letters(cls.aliases.get(wanted, wanted))
        for name, subclass in known.items():
            if _letters(name) == wanted:
                return subclass._by_name()
        for subclass in known.values():
            if wanted in [_letters(old.partition(">")[2]) for old in vars(subclass).get("formerly", ())]:
                deprecated.warn(f"{cls.__name__} {identifier!r}", repr(_snake_case(subclass.__name__)))
                return subclass._by_name()
        close = difflib.get_close_matches(_snake_case(identifier), known, 1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"Unknown {cls.__name__} {identifier!r}.{hint} Known: {sorted(known)}.")

    @classmethod
    def names(cls) -> dict[str, type[Self]]:
        """The public subclasses, by the names that `get` accepts."""
        return {
            _snake_case(c.__name__): c
            for c in _subclasses(cls)
            if vars(c).get("named", True) and not c.__name__.startswith("_")
        }

    def explain(self) -> None:
        """Prints a description of this object: its constructor call, equation, source, arguments and their limits."""
        print(f"{self!r}\n\n{inspect.getdoc(type(self))}")

    def __repr__(self) -> str:
        shown = (
            f"{name}={_short(getattr(self, name))}"
            for name, default in self._argument_defaults().items()
            if not _same(getattr(self, name), default)
        )
        return f"{type(self).__name__}({', '.join(shown)})"


class Value(Configurable):
    """A `Configurable` without weights, which is compared and pickled by its arguments."""

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and _same(self.get_config(), other.get_config())

    def __hash__(self) -> int:
        return hash(repr(self))

    def __reduce__(self):
        return type(self).from_config, (self.get_config(),)


def _subclasses(cls: type) -> list[type]:
    return [c for child in cls.__subclasses__() for c in (child, *_subclasses(child))]


# Words that the rules for capitals do not split correctly.
_WORDS = {
    "DiT": "Dit",
    "UViT": "Uvit",
    "UNet": "Unet",
    "NCSNpp": "Ncsnpp",
    "ConvNeXt": "Convnext",
    "PiGDM": "Pigdm",
    "UniPC": "Unipc",
    "PPSDE": "PP_SDE",
    "PP2S": "PP_2S",
    "PP3MSDE": "PP_3M_SDE",
}


def _snake_case(name: str) -> str:
    for word, plain in _WORDS.items():
        name = name.replace(word, plain)
    name = re.sub(r"(?<=[a-z0-9])(?=[A-Z][a-z])|(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name)
    return name.lower()


def _letters(name: str) -> str:
    return re.sub("[^a-z0-9]", "", name.lower())


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, np.ndarray) or isinstance(b, np.ndarray):
        return np.array_equal(a, b)
    return bool(a == b)


def _short(value: Any) -> str:
    if isinstance(value, np.ndarray) and value.size > 6:
        return f"<array of shape {value.shape}>"
    if isinstance(value, str) and len(value) > 100:
        return f"<text of {len(value)} characters>"
    return repr(value)


def check_choice(owner: str, argument: str, value: Any, choices: tuple) -> None:
    """Raises a ValueError that lists the choices unless `value` is one of them."""
    if value not in choices:
        raise ValueError(f"{owner}: `{argument}` must be one of {list(choices)}; received: {value!r}")


def check_integer(owner: str, argument: str, value: Any, minimum: int = 1) -> None:
    """Raises a ValueError unless `value` is an integer of at least `minimum`."""
    whole = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    if not whole or value < minimum:
        raise ValueError(f"{owner}: `{argument}` must be a whole number of at least {minimum}; received: {value!r}")


def check_number(owner: str, argument: str, value: Any, low: float, high: float = float("inf")) -> None:
    """Raises a ValueError unless `value` is a number in [low, high]."""
    number = isinstance(value, (int, float, np.number)) and not isinstance(value, bool)
    if not number or not low <= value <= high:
        raise ValueError(f"{owner}: `{argument}` must be a number in [{low}, {high}]; received: {value!r}")


@contextlib.contextmanager
def needs(extra: str, what: str) -> Iterator[None]:
    """If an import in the block fails, the error names the extra that installs the package, after the text `what`."""
    try:
        yield
    except ImportError as error:
        raise ImportError(f'{what}: pip install "kdiff[{extra}]"') from error
