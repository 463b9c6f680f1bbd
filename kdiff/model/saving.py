"""Saving of models: to files that are moved into place, with the states of random layers."""

import math
import os
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from contextvars import ContextVar
from typing import Any

import keras
import numpy as np
from keras import ops

from kdiff import backend, deprecated, lora
from kdiff.codecs import Absent
from kdiff.writing import check_space, replacing

__all__ = ["SafeFiles", "Saving"]


class SafeFiles:
    """The part of a Keras model that writes files."""

    def save(self, filepath, overwrite=True, zipped=None, **options) -> None:
        """Keras' `save`, to a file that is written beside `filepath` and then moved there.

        A kill or a full disk leaves the old file intact. Folders are created as needed.

        Raises:
            ValueError: for an HDF5 file, which cannot hold schedules, codecs and the like.
        """
        if str(filepath).endswith((".h5", ".hdf5")):
            raise ValueError(
                "save: the model is saved as 'model.keras', its weights alone by save_weights('model.weights.h5'); "
                f"received: {str(filepath)!r}"
            )
        with _new_file(filepath, overwrite) as new:
            super().save(new, overwrite, zipped, **options)

    def save_weights(self, filepath, overwrite=True, max_shard_size=None) -> None:
        """Keras' `save_weights`, to a file that is moved into place as in `save`; several files are not.

        Raises:
            OSError: if the disk has too little room for them.
        """
        several = max_shard_size is not None
        with nullcontext(filepath) if several else _new_file(filepath, overwrite) as new:
            if "://" not in str(filepath):
                check_space(new, _bytes_of(self))
            super().save_weights(new, overwrite, max_shard_size)

    def set_state_tree(self, state_tree: Mapping[str, Any]) -> None:
        """Keras' `set_state_tree`, which assigns values to variables by their names, as checkpoints of Orbax need.

        The optimizer's variables are created first. The names are those of this model if the same script has made it.

        Raises:
            ValueError: if the names are not those of this model; Keras would leave its variables as they are.
        """
        optimizer = getattr(self, "optimizer", None)
        if optimizer is not None and not optimizer.built and state_tree.get("optimizer_variables"):
            optimizer.build(self.trainable_variables)
        groups = {"trainable_variables": self.trainable_variables}
        groups |= {"non_trainable_variables": self.non_trainable_variables}
        groups |= {} if optimizer is None else {"optimizer_variables": optimizer.variables}
        for kind, variables in groups.items():
            given, own = {*_paths(state_tree.get(kind, {}))}, {variable.path for variable in variables}
            if kind in state_tree and given != own:
                raise ValueError(
                    f"set_state_tree: {kind} are found by their names, which are not those of this model; of "
                    f"{len(own)}, {len(own - given)} are missing: {sorted(own - given)[:3]}, and there are others: "
                    f"{sorted(given - own)[:3]}. Names are the same if the same script makes the model in a new "
                    "process; load there with `load_weights`, not `load_model`"
                )
        super().set_state_tree(state_tree)


def _bytes_of(model: keras.Model) -> int:
    """What its weights and its optimizer take in a file, with 4 KiB each for what HDF5 writes about them."""
    variables = [*model.variables, *(model.optimizer.variables if getattr(model, "optimizer", None) else ())]
    return sum(np.dtype("float32").itemsize * math.prod(one.shape) + 4096 for one in variables)


def _paths(nested: Mapping[str, Any], above: str = "") -> Iterator[str]:
    """The paths of the leaves."""
    for name, value in nested.items():
        path = f"{above}/{name}" if above else name
        if isinstance(value, Mapping):
            yield from _paths(value, path)
        else:
            yield path


_parts_of_another: ContextVar[frozenset[int]] = ContextVar("parts_of_another", default=frozenset())


class Saving(SafeFiles):
    """The part of `DiffusionModel` that saves and loads it.

    The models that are parts of another, such as the teacher of its objective, are saved without their optimizers.
    """

    def save(self, *arguments, **options) -> None:
        """As `SafeFiles.save`."""
        inner = (part for part in self._flatten_layers(include_self=False) if isinstance(part, Saving))
        token = _parts_of_another.set(frozenset(map(id, inner)))
        try:
            super().save(*arguments, **options)
        finally:
            _parts_of_another.reset(token)

    def __dir__(self):
        """Keras saves the variables of what is listed here."""
        names = super().__dir__()
        return [name for name in names if name != "optimizer"] if id(self) in _parts_of_another.get() else names

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments, serialised; a codec that is not saved is replaced by its description."""
        config = super().get_config()
        if not self.codec.saved:
            config["codec"] = keras.saving.serialize_keras_object(Absent(repr(self.codec)))
        return config

    def get_build_config(self) -> dict[str, Any] | None:
        """The shapes given to `build`, the inputs that training drew, what is frozen, and the layers that `lora.enable`
        changed, none if only a token is trained.
        """
        if self.shapes is None:
            return None
        shapes = dict(self.shapes)
        example = {} if self.example is None else {"image": (None, *self.example)}
        config = {"shapes": {"encoded": shapes.pop("image"), **example, **shapes}}
        if self.drawn_inputs:
            config["drawn_inputs"] = {name: list(ends) for name, ends in self.drawn_inputs.items()}
        if any((frozen := _frozen(self.network)).values()):
            config["frozen"] = frozen
        changed = lora.plan(self.network)
        adapted = changed or any(getattr(weight, "adapts", False) for weight in self.network.weights)
        return {**config, "lora": changed} if adapted else config

    def build_from_config(self, config: dict[str, Any]) -> None:
        """Builds a loaded model."""
        if config:
            self.build(config["shapes"])
            drawn = {name: tuple(ends) for name, ends in config.get("drawn_inputs", {}).items()}
            self.drawn_inputs = {**drawn, **self.drawn_inputs}
            if "lora" in config:
                lora.restore(self, config["lora"])
            if "frozen" in config:
                _freeze(self.network, config["frozen"])

    def get_compile_config(self) -> dict[str, Any] | None:
        """The compilation, without what depends on the machine: jit, steps per execution, PyTorch's optimizer class."""
        if id(self) in _parts_of_another.get():
            return None
        config = super().get_compile_config()
        config = {key: value for key, value in config.items() if key not in ("jit_compile", "steps_per_execution")}
        if measures := self._measures.metrics:
            config["metrics"] = [*(config["metrics"] or ()), *map(keras.saving.serialize_keras_object, measures)]
        if isinstance(config.get("optimizer"), dict):
            config["optimizer"] = backend.portable_optimizer(config["optimizer"])
        return config

    def compile_from_config(self, config: dict[str, Any]) -> None:
        """Compiles a loaded model, and creates the optimizer's variables, which are loaded next."""
        self.compile(**keras.saving.deserialize_keras_object(config))
        if self.built:
            self.optimizer.build(self.trainable_variables)

    def save_own_variables(self, store) -> None:
        """As in Keras, with the states of random layers, which Keras leaves out."""
        super().save_own_variables(store)
        for index, state in enumerate(self._random_states()):
            store[f"random_state_{index}"] = ops.convert_to_numpy(state)

    def load_own_variables(self, store) -> None:
        """As in Keras, with the states of random layers."""
        deprecated.find_old_paths(store)
        names = list(store.keys())
        super().load_own_variables({name: store[name] for name in names if not name.startswith("random_state_")})
        for index, state in enumerate(self._random_states()):
            state.assign(np.asarray(store[f"random_state_{index}"]))
        self.test_function = None  # it may have been traced without the averages, which are loaded next

    def _random_states(self) -> list:
        weights = {id(weight) for weight in self.network.weights}
        return [variable for variable in self.network.variables if id(variable) not in weights]


def _parts(network: keras.layers.Layer) -> dict[str, keras.layers.Layer]:
    """The network's layers by the path of attributes to them, outer layers first; a shared layer by its first path.

    Layers in constants, such as text encoders, are left out: these determine themselves which parts are trained.

    Indices would not identify a layer: one that replaced another is the last in its owner's list.
    """
    found: dict[str, keras.layers.Layer] = {}
    known = set()

    def walk(path, value):
        if isinstance(value, keras.layers.Layer):
            if id(value) not in known and not getattr(value, "frozen", False):
                known.add(id(value))
                found[path] = value
                walk(path, {name: one for name, one in vars(value).items() if not name.startswith("_")})
                walk(f"{path}/_", [one for one in value._layers if id(one) not in known])
        elif isinstance(value, Mapping):
            for name in sorted(value, key=str):
                walk(f"{path}/{name}", value[name])
        elif isinstance(value, (list, tuple)):
            for i, one in enumerate(value):
                walk(f"{path}/{i}", one)

    walk("", network)
    return found


def _frozen(network: keras.layers.Layer) -> dict[str, list]:
    """The layers that are not trained, and those weights of the other layers that are not trained."""
    parts = _parts(network)
    weights = [
        [path, i]
        for path, layer in parts.items()
        if layer.trainable
        for i, weight in enumerate(layer._trainable_variables)
        if not weight.trainable
    ]
    return {"layers": [path for path, layer in parts.items() if not layer.trainable], "weights": weights}


def _freeze(network: keras.layers.Layer, frozen: dict[str, list]) -> None:
    """Freezes the same layers and weights in a network of the same structure."""
    parts = _parts(network)
    for path, layer in parts.items():  # outer layers first, because they set those inside
        trainable = path not in frozen["layers"]
        if not trainable or not layer.trainable:  # an outer layer may have been frozen before those inside existed
            layer.trainable = trainable
    for path, i in frozen["weights"]:
        parts[path]._trainable_variables[i].trainable = False


def _new_file(path: Any, overwrite: bool) -> AbstractContextManager:
    """The file to write: a new one beside `path`; `path` itself if Keras must ask first, or if it is not local."""
    local = isinstance(path, (str, os.PathLike)) and "://" not in str(path)
    return replacing(path) if local and (overwrite or not os.path.exists(path)) else nullcontext(path)
