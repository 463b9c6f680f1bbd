"""The compiled functions of a `DiffusionModel`, and the two from which a sampling run is made: its step, and the
encoding of what does not change over its steps.
"""

from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Any

import keras
import numpy as np

from kdiff import backend, encodings
from kdiff.denoisers import Given, rows_like
from kdiff.model.condition_inputs import condition_nulls
from kdiff.sampling import Sampler
from kdiff.schedules import NoiseSchedule

__all__ = ["COMPILED_STEPS", "Steps"]

# The number of compiled functions that a model caches: each takes 10 to 20 MB, and keeps the models it calls alive.
COMPILED_STEPS = 8


class Steps:
    """The part of `DiffusionModel` that compiles."""

    def _step(self, sampler: Sampler, schedule: NoiseSchedule, ema: bool, draw: Callable | None) -> Callable:
        """A compiled `Sampler.advance`, made once: the seed, times, conditions and arrays are its arguments.

        With a function for the noise it is not compiled.
        """
        answer, nulls = partial(self._answer, ema, schedule), condition_nulls(self.network)

        def within(given: Given):
            return encodings.kept_in(self._encodings(ema, given, nulls))

        step = partial(sampler.advance, answer, nulls, schedule, within=within)
        if draw is not None:
            self._ready(sampler.models)
            return backend.without_gradients(partial(step, draw=draw))
        key = (sampler.key(), schedule, ema, _constants(nulls))
        return self.compiled_function(key, step, (*sampler.models, schedule))  # which may have weights

    def _encoding(self, ema: bool, size: tuple[int, ...], guided: bool) -> Callable[[Given], Given] | None:
        """A function that encodes, at the start of a run, what does not change; None if there is nothing to encode.

        Args:
            ema: whether to use the averaged (EMA) weights.
            size: the shape of one sample.
            guided: whether the guidance may evaluate null conditions.
        """
        network = self.network.encoder() if hasattr(self.network, "encoder") else None
        if network is None or not network.conditions:
            return None
        nulls = condition_nulls(self.network) if guided else {}

        def encode(sets):
            with self._weights(ema):
                found = [network.constant_encodings(self._taken(one), size) for one in sets]
                given = self._taken(sets[0])
                count = None if given.keys() - nulls.keys() else 1  # the other conditions may differ from row to row
                given |= {name: rows_like(nulls[name], given[name][:count]) for name in nulls if name in given}
                return found, network.constant_encodings(given if nulls else {}, size)

        compiled = self.compiled_function(("encode", ema, size, guided, _constants(nulls)), encode)
        return lambda given: given._replace(encoded=compiled(given.sets())) if given.conditions else given

    def _taken(self, conditions):
        """The conditions that the network encodes."""
        known = self.network.encoder().condition_inputs
        return {name: rows for name, rows in conditions.items() if name in known}

    def _encodings(self, ema: bool, given: Given, nulls: Collection[str]) -> encodings.Encodings | None:
        """What `_encoding` has found, for the tensors of a step."""
        if not given.encoded:
            return None
        network = self.network.encoder()
        found = encodings.Encodings((self, ema), network, network.inputs_by_condition)
        found.given, found.nullable, (values, found.nulls) = given.conditions, nulls, given.encoded
        for conditions, made in zip(given.sets(), values, strict=True):
            found.add(conditions, made)
        return found

    def compiled_function(self, key: Any, function: Callable, others: Sequence[keras.layers.Layer] = ()) -> Callable:
        """The compiled form of a function of nested tensors that calls this model and `others`.

        It is compiled once per key, and again when the weights, the schedule or the prediction of the model change.
        """
        averaging = self._ready(others)
        models = (self, *others)
        variables = backend.unique_variables(*models)
        key = (key, averaging, tuple(map(id, variables)), self.schedule, self.prediction, self.time_label)
        made = self._compiled_steps.pop(key, None)
        if made is None:
            made = backend.compiled(function, *models, variables=variables)
        self._compiled_steps[key] = made  # the most recently used
        while len(self._compiled_steps) > COMPILED_STEPS:
            del self._compiled_steps[next(iter(self._compiled_steps))]
        return made

    def _ready(self, others: Sequence[keras.layers.Layer] = ()) -> tuple:
        """Synchronises all weights; returns whether each of the models uses its averages."""
        models = [model for model in (self, *others) if isinstance(model, keras.Model)]
        for model in models:
            backend.synchronise(model)
        return tuple(model._follow_ema() for model in models if isinstance(model, Steps))


def _constants(nulls) -> tuple:
    """The null rows, which are constants of a compiled function."""
    return tuple((name, np.asarray(null).tobytes()) for name, null in nulls.items())
