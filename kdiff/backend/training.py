"""Keras' training loops, made safe: an error or Ctrl-C leaves a model at its previous or last complete step."""

import contextlib
import functools
from collections.abc import Callable, Iterator

import keras

from kdiff.backend.running import BACKEND, uninterrupted

__all__ = ["SafeTraining"]


# The parts of the state of the JAX trainer, in order. Evaluation has no optimizer, prediction also no metrics.
_PARTS = ("trainable_variables", "non_trainable_variables", "optimizer_variables", "metrics_variables")


class _SafeJAXTraining:
    """Keeps the state that only Keras' JAX trainer holds during an epoch, so that the model can recover it.

    The trainer takes the values from the variables before it requests a batch, donates the arrays to the compiled step,
    and returns the results to the model afterwards: a failure in between would lose every weight.
    """

    def _keep(self, state: tuple) -> None:
        parts = _PARTS if len(state) == len(_PARTS) else [part for part in _PARTS if part != "optimizer_variables"]
        self._jax_state = dict(zip(parts, state, strict=False))
        self._jax_state_synced = False

    def _get_jax_state(self, purge_model_variables: bool = False, **parts: bool) -> tuple:
        state = super()._get_jax_state(**parts)
        self._keep(state)
        if purge_model_variables:
            self._purge_model_variables(**{name: wanted for name, wanted in parts.items() if name in _PARTS})
        return state

    def _make_function(self, step_function: Callable, concatenate_outputs: bool = False) -> Callable:
        return super()._make_function(self._safe(step_function), concatenate_outputs)

    def _safe(self, step: Callable) -> Callable:
        """A step on one batch, after which the model has its results, or after a failure the previous state.

        On a CPU the arrays are not donated, as they would be lost with the step, and its end is awaited, as errors come
        late. On an accelerator they are donated, to save memory.
        """
        import jax

        on_cpu = jax.default_backend() == "cpu"
        if on_cpu and hasattr(step, "lower") and keras.distribution.distribution() is None:
            step = jax.jit(step.__wrapped__)

        @uninterrupted
        def whole(state, data):
            result, state = step(state, data)
            if on_cpu:
                jax.block_until_ready(state)
            self._keep(state)
            return result, state

        return whole

    @contextlib.contextmanager
    def _restored(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self.jax_state_sync()
            self._jax_state = None
            raise


def _restoring(name: str) -> Callable:
    def method(self, *args, **kwargs):
        with self._restored():
            return getattr(super(_SafeJAXTraining, self), name)(*args, **kwargs)

    return functools.wraps(getattr(keras.Model, name))(method)


for _name in ("fit", "evaluate", "predict", "train_on_batch", "test_on_batch", "predict_on_batch"):
    setattr(_SafeJAXTraining, _name, _restoring(_name))


class _NothingToKeep:
    """TensorFlow and PyTorch update variables in place."""


SafeTraining = _SafeJAXTraining if BACKEND == "jax" else _NothingToKeep
