"""DiffusionModel: a schedule, a prediction and a network, trained with `fit` and sampled with `sample`.

    fit       x = codec.encode(image),   problem = objective.problem(x), such as denoising:
              t ~ times;  m = schedule.at(t);  noise ~ N(0, I);  x_t = alpha x + sigma noise
              y = prediction.target(x, noise, m),   loss = w(log_snr) gain(m)^2 |network(x_t, t) - y|^2
    sample    x = sigma(1) noise, then solver steps with x_hat = prediction.denoise(network(x_t, t), x_t, m)

In all other respects it is a `keras.Model`: `compile`, `fit`, `evaluate`, `save`, callbacks, mixed precision, gradient
accumulation and clipping work as in Keras.
"""

import inspect
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import keras
from keras import ops

from kdiff import backend, random
from kdiff.base import Configurable
from kdiff.codecs import Codec
from kdiff.denoisers import INTERVAL
from kdiff.ema import EMA, Profile, profiles_of
from kdiff.model import feeding
from kdiff.model.averaging import Averaging
from kdiff.model.condition_inputs import condition_layers, condition_names, derivations
from kdiff.model.denoising import Denoising
from kdiff.model.sampling import Sampling, as_sampler
from kdiff.model.saving import Saving
from kdiff.model.training import CheckedTraining, scaled
from kdiff.model.weights import compared, example_weights, product, squared_errors
from kdiff.objectives import Objective, Problem
from kdiff.predictions import Prediction, check_invertible
from kdiff.sampling import Sampler
from kdiff.schedules import NoiseSchedule
from kdiff.solvers import Solver
from kdiff.times import TimeLabel, TimeSampler
from kdiff.weightings import Weighting

__all__ = ["DERIVING", "RESERVED", "DiffusionModel"]

DERIVING = 7  # the random stream of conditions that are derived from the clean batch


class DiffusionModel(
    Saving, Configurable, Sampling, Denoising, Averaging, CheckedTraining, backend.SafeTraining, keras.Model
):
    """A diffusion model.

    Args:
        network: a Keras model or layer: `network({"image": x_t, "time": label, **conditions}, training=...)` returns
            a tensor with the shape of `x_t`, `(batch, ...)`. Its attribute `conditions`, a tuple of names or a
            dictionary of layers by name, as that of `UNet`, lists the conditions that it takes.
        schedule: a `NoiseSchedule` or its name.
        prediction: a `Prediction` or its name: the parametrisation of the network's output.
        times: a `TimeSampler` or its name: the distribution of training times.
        weighting: a `Weighting` or its name; None is the simple loss, the unweighted error of the output.
        time_label: a `TimeLabel` or its name: the time input of the network.
        codec: a `Codec` or its name: "pixels" for images, uint8 or in [-1, 1]; "identity" for any other data.
        objective: an `Objective` or its name: the training objective.
        sampler: a `Sampler`, a `Solver`, or the name of one: the default of `sample`.
        ema: the decay of the exponential moving average (EMA) of the weights, in [0, 1); None keeps none. In update n
            the decay is min(ema, (1 + n) / (10 + n)), so that the initial weights are quickly forgotten. Or another
            profile of `kdiff.ema`, or a list of several. Validation and sampling use the averaged weights, the first if
            there are several; `kdiff.posthoc` reconstructs others from `[Power(0.05), Power(0.1)]` after training.
        seed: the seed of the random numbers of training, which are the same on every backend.
        name: the name of the model.

    Examples:
        model = DiffusionModel(UNet.residual(width=32, levels=2))
        model.compile(keras.optimizers.Adam(1e-3))
        model.fit(images, epochs=10)                 # uint8, or float32 in [-1, 1], shape (N, height, width, channels)
        samples = model.sample(16)                   # float32 in [-1, 1], shape (16, height, width, channels)
        model.save("model.keras")
    """

    def __init__(
        self,
        network: keras.layers.Layer,
        schedule: NoiseSchedule | type[NoiseSchedule] | str = "cosine",
        prediction: Prediction | type[Prediction] | str = "velocity",
        *,
        times: TimeSampler | type[TimeSampler] | str = "stratified",
        weighting: Weighting | type[Weighting] | str | None = None,
        time_label: TimeLabel | type[TimeLabel] | str = "scaled",
        codec: Codec | type[Codec] | str = "pixels",
        objective: Objective | type[Objective] | str = "denoising",
        sampler: Sampler | Solver | type[Solver] | str = "ddim",
        ema: float | Profile | Sequence[float | Profile] | None = 0.999,
        seed: int = 0,
        name: str | None = None,
    ):
        if not isinstance(network, keras.layers.Layer):
            raise TypeError(f"DiffusionModel: `network` must be a Keras model or layer; received: {network!r}")
        # The network has its own precision. Nothing is cast here: neither examples before `encode`, nor the averages,
        # which replace float32 weights.
        super().__init__(name=name, dtype="float32", autocast=False)
        profiles_of(ema)
        random.key_of(seed)
        self.network = network
        self.schedule = NoiseSchedule.get(schedule)
        self.prediction = Prediction.get(prediction)
        self.times = TimeSampler.get(times)
        self.weighting = None if weighting is None else Weighting.get(weighting)
        self.time_label = TimeLabel.get(time_label)
        self.codec = Codec.get(codec)
        self.objective = Objective.get(objective)
        self.sampler = as_sampler(sampler)
        if self.sampler.models:
            raise ValueError(
                "DiffusionModel: the model's own `sampler` must not call other models, which would not be saved with "
                f"it; pass the guidance to `sample` instead. Received: {self.sampler!r}"
            )
        self.ema = ema
        self.seed = seed
        self.shapes: dict[str, tuple] | None = None  # the shapes of the network's inputs, including encoded data
        self.example: tuple | None = None  # the shape of an example before encoding, if it is known
        self.ema_weights: EMA | None = None  # from `build`
        self.drawn_inputs: dict[str, tuple[float, float]] = {}  # of all objectives: see `Objective`
        self._compiled_steps: dict[Any, Any] = {}
        self._compiled_problem: Callable | None = None  # on PyTorch
        self._measures = SimpleNamespace(metrics=[])
        self._check_names(condition_names(network) or ())
        check_invertible(self.prediction, self.schedule)
        self._warn_of_beginning()
        self.objective.check(self)
        self._take_objective()

    def _warn_of_beginning(self) -> None:
        """Warns if `sample` with the default sampler would raise; another may begin at less noise."""
        try:
            times = self.sampler.times(self.schedule)
        except ValueError:  # on this schedule the sampler needs another number of steps
            return
        try:
            self._check_beginning(self.schedule, times)
        except ValueError as error:
            warnings.warn(f"DiffusionModel: `sample` will fail. {error}", stacklevel=3)

    @staticmethod
    def _check_names(names: Iterable[str]) -> None:
        """Raises a ValueError for a condition with the name of an argument of `sample`."""
        if taken := set(names) & RESERVED:
            raise ValueError(
                f"DiffusionModel: conditions cannot be named {sorted(taken)}, which are arguments of `fit` or "
                f"`sample`. Reserved names: {sorted(RESERVED)}"
            )

    def __setattr__(self, name: str, value: Any) -> None:
        """`model.codec = codec` replaces the codec at any time; so for the schedule, the prediction and the objective.

        `model.objective = "denoising"` releases the models of the old objective, such as a teacher, which is then no
        longer saved.
        """
        if name not in _REPLACEABLE or not hasattr(self, name):
            super().__setattr__(name, value)
            return
        value = _REPLACEABLE[name].get(value)
        if name == "codec":
            if self.built:
                value.freeze()
        elif name != "objective":
            check_invertible(**{"prediction": self.prediction, "schedule": self.schedule, name: value})
        old = getattr(self, name)
        self._replace(name, old, value)
        try:
            self.objective.check(self)
        except (TypeError, ValueError):
            self._replace(name, value, old)
            raise
        self._take_objective()
        self._forget_graphs()

    def _take_objective(self) -> None:
        self.objective.taken()
        self.drawn_inputs = {**self.drawn_inputs, **self.objective.drawn_inputs}
        self._follow_ema_of_others()

    def _replace(self, name: str, old: Any, new: Any) -> None:
        with backend.replaced(self, old) if isinstance(old, keras.layers.Layer) else nullcontext():
            super().__setattr__(name, new)

    # Building

    @backend.uninterrupted
    def build(self, shapes: Sequence[int | None] | Mapping[str, Sequence[int | None]]) -> None:
        """Creates all weights.

        Args:
            shapes: the shape of a batch of images, or a dictionary of the shapes of all inputs by name,
                {"image": (None, 32, 32, 3), "label": (None,)}, with "encoded" instead of "image" for the shape of
                encoded data. The first axis is ignored.
        """
        if self.built:
            return
        shapes, example = self._known_shapes(shapes)
        self.codec.freeze()
        with backend.strategy_of(self):
            self._build_network(shapes)
            self.step = self._counter("step")
            self.evaluation_step = self._counter("evaluation_step")
            self.ema_weights = self._new_ema()
        self.shapes, self.example = shapes, example  # last, so that a failure leaves no shapes behind
        self.built = True

    def _build_network(self, shapes: dict[str, tuple]) -> None:
        """By its own `build`, or by a symbolic call if it has none, so that every weight exists for the averages."""
        shapes = {**shapes, "time": (None,)}
        if not self.network.built and type(self.network).build not in (keras.Model.build, keras.layers.Layer.build):
            self.network.build(shapes)
        elif not self.network.built:
            labels = {name for name, shape in shapes.items() if len(shape) == 1 and name != "time"}
            self.network(
                {
                    name: keras.KerasTensor(shape, "int32" if name in labels else "float32")
                    for name, shape in shapes.items()
                }
            )
        backend.mend_convolutions(self.network)

    def _counter(self, name: str):
        return self.add_weight(shape=(), dtype="int32", initializer="zeros", trainable=False, name=name)

    # Training

    def compile(self, optimizer: Any = "adam", loss: Any = "mse", metrics: Any = None, **options: Any) -> None:
        """Keras' `compile`; `loss` compares the network's output with its target: "mse", "mae", "huber" or any other.

        The same holds for `metrics`, except those that need the whole problem, such as `likelihood.BitsPerDim`.

        A network that computes in float16 gets loss scaling, unless `auto_scale_loss=False`. `jit_compile` and
        `steps_per_execution` depend on the machine, and are not saved with the model.
        """
        optimizer = scaled(optimizer, self.network.compute_dtype == "float16", options)
        several = isinstance(metrics, (list, tuple))
        for one in metrics if several else [metrics]:
            if hasattr(one, "update_from"):
                raise ValueError(f"compile: {one!r} needs samples: pass it to `evaluation.EvaluationCallback`")
        measures = [one for one in metrics if hasattr(one, "update_problem")] if several else []
        for measure in measures:
            measure.prepare(self)
        self._compiled_problem = None
        self._measures = SimpleNamespace(metrics=measures)  # a list would be saved with the weights
        metrics = [one for one in metrics if one not in measures] if several else metrics
        super().compile(optimizer, loss, metrics=metrics, **options)

    @property
    def metrics(self) -> list:
        """The metrics of Keras, and those that need the whole problem."""
        return [*super().metrics, *self._measures.metrics]

    @backend.uninterrupted
    def call(self, data, training: bool | None = None) -> Problem:
        """The regression problem that the objective derives from a clean batch, with the network's output.

        Args:
            data: images, or a dictionary {"image": ..., **conditions}; "encoded" instead of "image" is data that is
                already encoded by the codec.
            training: whether to use the weights (True), or their averages (False).
        """
        return (self._compiled_problem or self._problem)(data, training)

    def _problem(self, data, training) -> Problem:
        batch, _ = feeding.unpack((data,))
        keys = self._keys(training, ops.shape(batch["encoded" if "encoded" in batch else "image"])[0])
        key = next(keys)  # unused for encoded data, which so gets the same noise as its images
        if "encoded" in batch:
            x = ops.cast(batch.pop("encoded"), "float32")
        else:
            x = self.codec(batch.pop("image"), key, training=False)
        made = {name: of for name, of in derivations(self.network).items() if name not in batch}
        batch |= {name: of(x, random.fold_in(key, i, DERIVING)) for i, (name, of) in enumerate(made.items())}
        return self.objective.problem(self, x, batch, keys, bool(training))

    def _keys(self, training, rows) -> Iterator:
        """The keys of this step: those of training differ in each step, those of each evaluation are the same.

        If several devices compute parts of a batch, each uses the numbers of its `rows` in the whole batch.
        """
        stream, counter = (random.TRAINING, self.step) if training else (random.EVALUATION, self.evaluation_step)
        key = random.fold_in(random.key_of(self.seed), counter.value, stream)
        key = random.on_device(key, rows)
        if backend.has_numbers(counter.value):  # otherwise Keras calls again with numbers, in the same scope
            counter.assign_add(1)  # after its last use: on TensorFlow `value` is not a copy
        return random.Keys(key)

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        """The compiled loss of the network's output, weighted by the objective and by example, and its `extra`."""
        loss = super().compute_loss(x, *compared(y_pred, sample_weight), training=training)
        if y_pred.extra is not None:
            extra = ops.mean(product(y_pred.extra, example_weights(sample_weight)))
            loss = loss + backend.share_of_loss(extra)
        if training:
            self.objective.learn(self, y_pred, squared_errors(y_pred, sample_weight))
        return loss

    def compute_metrics(self, x, y, y_pred, sample_weight=None) -> dict[str, Any]:
        """The compiled metrics of the network's output against its target."""
        for measure in self._measures.metrics:
            measure.update_problem(self, y_pred, example_weights(sample_weight))
        return super().compute_metrics(x, *compared(y_pred, sample_weight))

    @backend.uninterrupted
    def train_step(self, *args):
        """The step of Keras, then the update of the averages. `args` are `(data,)`, or `(state, data)` on JAX."""
        *state, data = args
        x, sample_weight = feeding.unpack(self._rows_here(data, "training"))
        self._use_ema(True)  # from the first step, so that an objective that uses them is traced once
        result = super().train_step(*state, (x, None, sample_weight))
        if self.ema_weights is None:
            return result
        return backend.after_step(
            self, result, lambda: self.ema_weights.update(self.network, self.optimizer.iterations)
        )

    def make_train_function(self, force: bool = False):
        """As in Keras; on PyTorch only `call` is compiled."""
        super().make_train_function(force)
        self.train_function = self._compiled_in_parts(self.train_function)
        return self.train_function

    def make_test_function(self, force: bool = False):
        """As in Keras; on PyTorch only `call` is compiled."""
        super().make_test_function(force)
        self.test_function = self._compiled_in_parts(self.test_function)
        return self.test_function

    def _compiled_in_parts(self, step):
        plain = backend.uncompiled(step)
        if plain is not step and self._compiled_problem is None:
            self._compiled_problem = backend.with_fixed_shapes(self._problem)
        return plain

    @backend.uninterrupted
    def test_step(self, *args):
        """The step of Keras."""
        *state, data = args
        x, sample_weight = feeding.unpack(self._rows_here(data, "evaluation"))
        return super().test_step(*state, (x, None, sample_weight))

    def _take_rows_anew(self) -> None:
        """Must be called when the inputs of condition layers change, as for texts whose encoders start to learn."""
        layers = {name: layer for name, layer in condition_layers(self.network).items() if hasattr(layer, "row")}
        rows = {name: (None, *layer.row) for name, layer in layers.items() if name in (self.shapes or {})}
        self.shapes = {**self.shapes, **rows} if rows else self.shapes
        self._forget_graphs()

    def _forget_graphs(self) -> None:
        """Discards all compiled functions."""
        self.train_function = self.test_function = self._compiled_problem = None
        self._compiled_steps.clear()
        for measure in self._measures.metrics:
            measure.prepare(self)

    # Data on its way in: see `CheckedTraining`

    instead = (
        "a diffusion model samples, `sample(8)`, estimates the data of a noisy batch, `denoise(x_t, m)`, or evaluates "
        "its loss, `evaluate(x)`; its network is `model.network`"
    )

    def _taking(self) -> keras.layers.Layer:
        return self.network

    def _codec_of_data(self) -> Codec:
        return self.codec

    def _new_check(self, shapes: dict[str, tuple]) -> feeding.BatchCheck:
        certain = self.built and not self._on_trial
        shape = self.shapes["image"][1:] if certain else feeding.data_shape(shapes, self.codec)
        return feeding.BatchCheck(self.codec, shape, self.network, others=self.objective.inputs)

    def _take_shapes_anew(self, shapes: dict[str, tuple]) -> None:
        self.shapes, self.example = self._known_shapes(shapes)

    def _before_training(self) -> None:
        """Raises an error before training if the averages do not fit the network."""
        if self.ema_weights:
            self.ema_weights.pairs(self.network)
            self._use_ema(True)  # not first in a step, which PyTorch may compile
        self._follow_ema_of_others()

    def _before_evaluating(self, anew: bool) -> None:
        """Switches to the averaged weights, and to the same times and noise in each call of `evaluate`."""
        if anew:
            self.evaluation_step.assign(0)
        self._follow_ema()


_REPLACEABLE = {"codec": Codec, "schedule": NoiseSchedule, "prediction": Prediction, "objective": Objective}

_METHODS = (DiffusionModel.sample, DiffusionModel.sample_steps, DiffusionModel.invert)
# Names that no condition can have: arguments of methods that take conditions, their old names, and other inputs.
RESERVED = frozenset(
    name
    for method in (*_METHODS, DiffusionModel._run, DiffusionModel.denoise)
    for name, parameter in inspect.signature(method).parameters.items()
    if parameter.kind is not parameter.VAR_KEYWORD and name != "self"
) | {"time", "encoded", "sample_weight", "averages", INTERVAL}
