"""Training of Keras models whose call gives their loss, by Keras' own step: autoencoders, pairs of encoders."""

from typing import Any

import keras

from kdiff import backend
from kdiff.model.feeding import unpack

__all__ = ["OwnLoss"]


class OwnLoss(backend.SafeTraining):
    """The part of a Keras model that gives, of a batch, {"loss": ..., "part": ..., ...}: Keras' step takes the gradient
    of "loss"; `fit` and `evaluate` report its mean and those of the parts, numbers or arrays, in `_means`.
    """

    def batch_of(self, inputs: dict[str, Any]) -> Any:
        """What the model is called with, of a batch {"image": ..., ...}."""
        return inputs

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        """That of the call."""
        return y_pred["loss"]

    def compute_metrics(self, x, y, y_pred, sample_weight=None) -> dict[str, Any]:
        """The means of loss and parts over the epoch."""
        for mean in self._means:
            mean.update_state(y_pred[mean.name])
        return self.get_metrics_result()

    def train_step(self, *args):
        """Keras' own step. `args` are `(data,)`, on JAX `(state, data)`."""
        *state, data = args
        return super().train_step(*state, (self.batch_of(unpack(data)[0]),))

    def test_step(self, *args):
        """Keras' own step."""
        *state, data = args
        return super().test_step(*state, (self.batch_of(unpack(data)[0]),))

    def ready(self, x: Any, options: dict[str, Any]) -> None:
        """Before `fit`: the optimizer's variables, which a compiled step cannot make, and no shuffling of batches."""
        if not hasattr(x, "shape") and not isinstance(x, (dict, keras.utils.PyDataset)):
            options.setdefault("shuffle", False)  # Keras cannot shuffle the others, and would warn
        if self.compiled and not self.optimizer.built:
            with backend.strategy_of(self):
                self.optimizer.build(self.trainable_variables)

    def get_compile_config(self) -> dict[str, Any] | None:
        """The optimizers, without what belongs to a backend; None before `compile`."""
        if not self.compiled:
            return None
        used = getattr(self, "_optimizers", {"optimizer": self.optimizer})  # the arguments of `compile`, by name
        config = {name: keras.saving.serialize_keras_object(one) for name, one in used.items()}
        return {name: one and backend.portable_optimizer(one) for name, one in config.items()}

    def compile_from_config(self, config: dict[str, Any]) -> None:
        """Compiles a loaded model, and makes the optimizer's variables, which are loaded next."""
        self.compile(**keras.saving.deserialize_keras_object(config))
        if self.built:
            self.optimizer.build(self.trainable_variables)
