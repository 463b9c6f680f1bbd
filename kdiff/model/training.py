"""Keras' `fit`, `evaluate` and similar methods, on data that is checked batch by batch."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, ClassVar

import keras
from keras import tree

from kdiff import backend
from kdiff.model import feeding
from kdiff.model.saving import SafeFiles
from kdiff.model.sources import source_of

__all__ = ["CheckedTraining", "OwnLoss", "scaled"]


class CheckedTraining:
    """The part of a Keras model that takes data. A subclass defines `_new_check`, and may override the other hooks."""

    instead: ClassVar[str]  # what replaces `predict` and `export`, for their errors

    _on_trial = False  # whether the model has not yet computed on data of its shapes
    _parted: ClassVar[dict[str, bool]] = {}  # whether data for "training" or "evaluation" is a part for each process

    def _new_check(self, shapes: dict[str, tuple]) -> feeding.BatchCheck:
        """The check of data of these shapes, for which the model may not be built yet."""
        raise NotImplementedError

    def _taking(self) -> Any:
        """The object that has the conditions of the data and converts text to numbers."""
        return self

    def _codec_of_data(self) -> Any:
        """The codec of a model that will be built; None if any shape is possible."""
        return None

    def _take_shapes_anew(self, shapes: dict[str, tuple]) -> None:
        """For a model that is built but has not computed yet: the data for which it was built may have been wrong."""

    def _before_training(self) -> None:
        """Called before training in Keras."""

    def _before_evaluating(self, anew: bool) -> None:
        """Called before evaluation in Keras; `anew` if a whole evaluation begins, not a single batch."""

    def fit(self, x=None, y=None, *args, validation_data=None, **options):
        """Keras' `fit`, on data that is checked batch by batch.

        Args:
            x: images, uint8 or float32 in [-1, 1], with shape `(batch, height, width, channels)`, alone or in a
                dictionary with conditions: arrays, a `tf.data.Dataset`, a `PyDataset`, a `DataLoader`, a generator.
            y: labels, the condition "label", if `x` is an array.
            *args: as in `keras.Model.fit`.
            validation_data: data of the same kinds, or a tuple `(x, y)`.
            **options: as in `keras.Model.fit`. A `sample_weight` is one number per example, or one per position of the
                encoded data, `(batch, height, width)` or `(batch, length)`: positions with weight 0, such as the
                padding of a series, do not contribute to the loss.

        Raises:
            ValueError: if the data is empty, or a dataset is endless and `steps_per_epoch` is None; if an image has the
                wrong shape, is not finite or is out of range; if a condition is missing, unknown or of another batch
                size; if the model is not compiled.
        """
        self._check_compiled("fit")
        feeding.check_end(x, "steps_per_epoch", options)
        feeding.check_end(validation_data, "validation_steps", options)
        self.orders = feeding.Orders(x, validation_data)
        if options.pop("class_weight", None) is not None:
            raise ValueError("fit: there are no classes to weight; give `sample_weight`, one number an example")
        self._parted = {"training": backend.is_parted(x), "evaluation": backend.is_parted(validation_data)}
        sampler, size = backend.parting_sampler(x), _batch_size(args, options)
        x, check = self._checked(x, y, options.pop("sample_weight", None), parted=self._parted["training"], size=size)
        checks = [check]
        if validation_data is not None:
            size = options.get("validation_batch_size") or size
            parts = keras.utils.unpack_x_y_sample_weight(validation_data)
            validation_data, other = self._checked(*parts, check.again(), self._parted["evaluation"], size)
            checks.append(other)
        if not backend.is_first_process():
            options["verbose"] = 0
        if sampler is not None:
            options["callbacks"] = _also(options.get("callbacks"), _NewOrder(sampler))
        if not isinstance(x, (dict, keras.utils.PyDataset)):
            options.setdefault("shuffle", False)  # Keras cannot shuffle the others, and would warn
        self._prepare_training()
        with self._tried(*checks):
            return super().fit(x, None, *args, validation_data=validation_data, **options)

    def evaluate(self, x=None, y=None, *args, **options):
        """Keras' `evaluate`, on data as in `fit`."""
        if options.get("_use_cached_eval_dataset"):  # inside `fit`, whose validation data is already checked
            self._before_evaluating(True)
            return super().evaluate(x, y, *args, **options)
        if len(args) < 4:
            feeding.check_end(x, "steps", options)
        self._check_compiled("evaluate")
        self._parted = {**self._parted, "evaluation": (parted := backend.is_parted(x))}
        weight, size = options.pop("sample_weight", None), _batch_size(args, options)
        x, check = self._checked(x, y, weight, parted=parted, size=size)
        if not backend.is_first_process():
            options["verbose"] = 0
        self._before_evaluating(True)  # only now is the model certain to be built
        with self._tried(check):
            return super().evaluate(x, None, *args, **options)

    def predict(self, *args, **options):
        """Raises a NotImplementedError: the model has no single output for an input."""
        raise NotImplementedError(f"predict: {type(self).__name__} has no one output for an input: {self.instead}")

    def predict_on_batch(self, *args, **options):
        """Raises a NotImplementedError, as `predict` does."""
        self.predict()

    def export(self, *args, **options):
        """Raises a NotImplementedError: only parts of the model can be exported."""
        raise NotImplementedError(
            f"export: {type(self).__name__} is no one graph: save it, `model.save('model.keras')`, or export a network "
            f"of it; {self.instead}"
        )

    def train_on_batch(self, x, y=None, sample_weight=None, **options):
        """Keras' `train_on_batch`, with a batch as in `fit`."""
        self._check_compiled("train_on_batch")
        x, check = self._checked(x, y, sample_weight)
        self._prepare_training(anew=False)
        with self._tried(check), self._whole():
            return super().train_on_batch(x, **options)

    def test_on_batch(self, x, y=None, sample_weight=None, **options):
        """Keras' `test_on_batch`, with a batch as in `fit`."""
        self._check_compiled("test_on_batch")
        x, check = self._checked(x, y, sample_weight)
        self._before_evaluating(False)
        with self._tried(check), self._whole():
            return super().test_on_batch(x, **options)

    @contextmanager
    def _whole(self) -> Iterator[None]:
        """The scope of a batch that every process is given whole, also within a `fit` on parts."""
        before, self._parted = self._parted, {}
        try:
            yield
        finally:
            self._parted = before

    def _rows_here(self, data, use: str):
        """Of a batch for "training" or "evaluation", the rows that this process computes."""
        return data if self._parted.get(use) else backend.rows_of_process(data)

    def get_metrics_result(self):
        """Keras' own, of the whole batches."""
        with backend.mean_of_processes(self.metrics_variables):
            return super().get_metrics_result()

    def _check_compiled(self, method: str) -> None:
        backend.check_strategy(self)
        if not self.compiled:
            raise ValueError(f"{method}: no optimizer and no loss yet; call `compile()`, `model.compile('adam')`")

    @contextmanager
    def _tried(self, *checks: feeding.BatchCheck) -> Iterator[None]:
        """The scope of a call of Keras, after which the shapes are certain: the model has computed with the data."""
        with ExitStack() as stack:
            for check in checks:
                stack.enter_context(check.reported())
            yield
        self._on_trial = False

    @backend.uninterrupted
    def _prepare_training(self, anew: bool = True) -> None:
        """Creates the optimizer's variables before the first step, which TensorFlow would otherwise trace twice.

        `anew`: whether PyTorch's processes take the first one's values even if they train this model already.
        """
        self._before_training()
        backend.prepare_for_replicas(self)
        if not self.optimizer.built:
            with backend.strategy_of(self):
                self.optimizer.build(self.trainable_variables)
        backend.fuse_updates(self.optimizer)
        backend.lie_alike(self.optimizer.variables, self.trainable_variables)
        backend.share_training(self, anew)

    def _checked(
        self,
        x,
        y=None,
        sample_weight=None,
        check: feeding.BatchCheck | None = None,
        parted: bool = False,
        size: int | None = None,
    ):
        """(x, check): the data, prepared and with the check applied; the model is built for it if it was not.

        `parted`: whether each process has a part of its own; `size`: of the batches that Keras makes of arrays.
        """
        source = source_of(x, y, sample_weight).prepared(self._taking())
        shapes = source.shapes(None if self.built else self._codec_of_data())
        check = self._new_check(shapes) if check is None else check
        check.devices = 1 if parted else backend.sharers()
        source.check_shares(check.devices, size)
        check.names(shapes)
        check.size(shapes)
        checked = source.checked(check)
        if not self.built:
            self.build(shapes)
            self._on_trial = True
        elif self._on_trial:
            self._take_shapes_anew(shapes)
        return checked, check


def _batch_size(args: tuple, options: dict[str, Any]) -> int:
    """Of `fit` or `evaluate`: their first argument after the data."""
    return (args[0] if args else options.get("batch_size")) or 32


def _also(callbacks: Any, one: keras.callbacks.Callback) -> Any:
    """The callbacks that `fit` was given, None, one or several, and another."""
    if isinstance(callbacks, keras.callbacks.CallbackList):
        callbacks.append(one)
        return callbacks
    return [one, *([] if callbacks is None else tree.flatten(callbacks))]


class _NewOrder(keras.callbacks.Callback):
    """Tells PyTorch's `DistributedSampler` the epoch, of which its order is a function."""

    def __init__(self, sampler: Any):
        super().__init__()
        self.sampler = sampler

    def on_epoch_begin(self, epoch: int, logs: dict | None = None) -> None:
        self.sampler.set_epoch(epoch)


def scaled(optimizer: Any, low: bool, options: dict[str, Any]) -> keras.optimizers.Optimizer:
    """The optimizer, with loss scaling if `low`, that is in float16, unless the options of `compile` disable it."""
    optimizer = keras.optimizers.get(optimizer)
    if not low or not options.get("auto_scale_loss", True):
        return optimizer
    if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        return optimizer
    return keras.optimizers.LossScaleOptimizer(optimizer)


class OwnLoss(SafeFiles, CheckedTraining, backend.SafeTraining):
    """The part of a Keras model whose `call` returns its loss and the reported parts of it, by name.

    A subclass keeps their means in `_means`, `keras.metrics.Mean` objects with the names of the parts.
    """

    def _batch(self, inputs: dict[str, Any]) -> Any:
        """The inputs of `call` from a batch."""
        return inputs

    def compile(self, optimizer="adam", **options) -> None:
        """Keras' `compile`, without losses and metrics, which the model defines itself."""
        if given := sorted(name for name in ("loss", "metrics", "weighted_metrics") if options.get(name) is not None):
            raise ValueError(
                f"compile: {type(self).__name__} has a loss of its own, and reports its parts; it takes no {given}"
            )
        low = any(getattr(layer, "compute_dtype", None) == "float16" for layer in self._flatten_layers())
        super().compile(scaled(optimizer, low, options), **options)

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        """The loss that `call` returns."""
        return y_pred["loss"]

    def compute_metrics(self, x, y, y_pred, sample_weight=None) -> dict[str, Any]:
        """The means of the loss and its parts over the epoch."""
        for mean in self._means:
            mean.update_state(y_pred[mean.name])
        return self.get_metrics_result()

    def train_step(self, *args):
        """The step of Keras. `args` are `(data,)`, or `(state, data)` on JAX."""
        *state, data = args
        return super().train_step(*state, (self._batch(feeding.unpack(self._rows_here(data, "training"))[0]),))

    def test_step(self, *args):
        """The step of Keras."""
        *state, data = args
        return super().test_step(*state, (self._batch(feeding.unpack(self._rows_here(data, "evaluation"))[0]),))

    def get_compile_config(self) -> dict[str, Any] | None:
        """The optimizers, without what is specific to a backend; None before `compile`."""
        if not self.compiled:
            return None
        used = getattr(self, "_optimizers", {"optimizer": self.optimizer})  # the arguments of `compile`, by name
        config = {name: keras.saving.serialize_keras_object(one) for name, one in used.items()}
        return {name: one and backend.portable_optimizer(one) for name, one in config.items()}

    def compile_from_config(self, config: dict[str, Any]) -> None:
        """Compiles a loaded model, and creates the optimizer's variables, which are loaded next."""
        self.compile(**keras.saving.deserialize_keras_object(config))
        if self.built:
            self.optimizer.build(self.trainable_variables)
