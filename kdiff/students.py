"""Students: models that are initialised by a teacher, and learn to sample in fewer steps.

teacher = keras.saving.load_model("teacher.keras")                   # with the prediction TrigFlow
model = student(teacher, objectives.SCM(teacher))                    # a copy with its own weights
model.compile(keras.optimizers.Adam(1e-4))
model.fit(images, epochs=20)
model.objective = "denoising"                                        # releases the teacher
model.sample(16, steps=2)

model = progressive(teacher, images, steps=(8, 4, 2, 1), epochs=5)   # distilled four times
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

import keras
from keras import ops

from kdiff.base import check_integer
from kdiff.codecs import Codec
from kdiff.model import DiffusionModel
from kdiff.objectives import Objective, ProgressiveDistillation
from kdiff.sampling import Sampler

__all__ = ["progressive", "student"]


def student(model: DiffusionModel, objective: Any, **changes: Any) -> DiffusionModel:
    """A model that is initialised by the averaged weights of another, for training with another objective.

    Args:
        model: the model that provides the weights, built.
        objective: an `Objective` or its name.
        **changes: changed arguments of `DiffusionModel`, such as `times`, `weighting` or `ema`. A `network` must have
            all layers of the model's network; additional ones, such as `blocks.Interval`, keep their initial weights.
            With another `schedule` or `prediction` the initial weights do not fit at first. The default `sampler` is
            that of the objective.

    Returns:
        The model, built but not compiled.

    Raises:
        ValueError: if the model has no weights yet, or the network lacks a weight of it.
    """
    if not isinstance(model, DiffusionModel) or not model.built:
        raise ValueError(f"student: `model` must be a DiffusionModel that has weights; received: {model!r}")
    objective = Objective.get(objective)
    own = {name: getattr(model, name) for name in model._argument_defaults() if name != "name"}
    if "network" not in changes:
        own["network"] = _copied(model.network)
    if objective.sampled_by:
        own["sampler"] = Sampler(**objective.sampled_by)
    codec = model.codec
    if codec.weights and "codec" not in changes:  # each model is saved with its own
        own["codec"] = Codec.get(keras.saving.serialize_keras_object(codec))
    made = DiffusionModel(**{**own, "objective": objective, **changes})
    built = model.get_build_config()
    made.build_from_config({name: one for name, one in built.items() if name != "frozen"})  # as a teacher is
    if made.codec is not codec and "codec" not in changes:
        made.codec.set_weights(codec.get_weights())
    _give(made.network, _values(model))
    made.reset_ema()
    return made


def progressive(
    teacher: DiffusionModel,
    x: Any,
    steps: Sequence[int] = (8, 4, 2, 1),
    *,
    optimizer: Any = "adam",
    loss: Any = "mse",
    grid: Any = "trailing",
    guidance: float | tuple[float, float] | None = None,
    changes: dict[str, Any] | None = None,
    **fit: Any,
) -> DiffusionModel:
    """Progressive distillation, in which each model is a student of the previous one.

    Salimans and Ho 2022, arXiv:2202.00512, algorithm 2. See `objectives.ProgressiveDistillation`.

    Args:
        teacher: the first teacher, which is no longer trainable afterwards.
        x: the data, as in `fit`, except generators, which can be read only once.
        steps: the number of steps of each student, each half of the previous one.
        optimizer: as in `compile`; each student has a new one.
        loss: as in `compile`.
        grid: as in `ProgressiveDistillation`.
        guidance: the classifier-free guidance scale that is distilled into the first student; or `(low, high)`, in
            which it is drawn: the students then need a `network` in `changes` with an input for it, as in
            `blocks.GuidanceEmbedding`, and the last one samples with `timestep_cond=5.0` or any other scale between.
        changes: changed arguments of the students, as in `student`, such as `{"weighting": "truncated_snr"}`.
        **fit: arguments of `fit`, such as `epochs`.

    Returns:
        The last student, an ordinary `DiffusionModel` whose default number of steps is the last of `steps`.

    Raises:
        ValueError: if each of `steps` is not half of the previous one.
    """
    steps = list(steps)
    for count in steps:
        check_integer("progressive", "steps", count)
    if not steps or any(2 * after != before for before, after in pairwise(steps)):
        raise ValueError(f"progressive: each of `steps` must be half of the one before; received: {steps}")
    optimizer, model, changes = keras.optimizers.get(optimizer), teacher, dict(changes or {})
    several = isinstance(guidance, (list, tuple))
    for count in steps:
        first = model is teacher
        objective = ProgressiveDistillation(
            model, count, grid, guidance if first or several else None, teacher_told=not first and several
        )
        learner = student(model, objective, **changes)
        changes.pop("network", None)  # the next has a copy of it
        learner.compile(type(optimizer).from_config(optimizer.get_config()), loss)
        learner.fit(x, **fit)
        learner.objective = "denoising"
        model = learner
    return model


def _copied(network: keras.layers.Layer) -> keras.layers.Layer:
    return type(network).from_config(network.get_config())


def _values(model: DiffusionModel) -> dict[tuple, Any]:
    """The value of each variable of the network, averaged if available, by its place."""
    averages = {}
    if model.ema_weights and model.ema_weights.moved:
        averages = {id(weight): average for weight, average in model.ema_weights.pairs(model.network)}
    return {place: averages.get(id(weight), weight) for place, weight in _places(model.network, (), set())}


def _places(part: Any, place: tuple, seen: set[int]) -> Iterator[tuple[tuple, keras.Variable]]:
    """The variables inside, each by the attributes, keys and indices that lead to it: names differ between copies."""
    if isinstance(part, keras.Variable):
        if id(part) not in seen:
            seen.add(id(part))
            yield place, part
        return
    if isinstance(part, keras.layers.Layer):
        if id(part) in seen:
            return
        seen.add(id(part))
        inside = {name: value for name, value in vars(part).items() if name != "_layers"}  # in the order of making
    elif isinstance(part, Mapping):
        inside = {str(name): value for name, value in part.items()}
    elif isinstance(part, (list, tuple)):
        inside = dict(enumerate(part))
    else:
        return
    for name in sorted(inside):
        yield from _places(inside[name], (*place, name), seen)


def _give(network: keras.layers.Layer, values: Mapping[tuple, Any]) -> None:
    """Assigns these values to the variables at these places."""
    places = dict(_places(network, (), set()))
    for place, value in values.items():
        if place not in places or tuple(places[place].shape) != tuple(value.shape):
            raise ValueError(
                f"student: the network must have all weights of the model that initialises it; it lacks "
                f"{'.'.join(map(str, place))}, of the shape {tuple(value.shape)}"
            )
        places[place].assign(ops.convert_to_numpy(value))
