"""What is learned: denoising, at times that learn, and objectives of one's own. Recipes: test_effective_weight.py."""

import zipfile

import h5py
import keras
import numpy as np
import pytest
from keras import ops

import kdiff
from kdiff import predictions, random, schedules, times, weightings
from kdiff.objectives import Denoising, LossAware, Objective, Problem
from tests.test_model_parts import Scripted
from tests.test_objectives_loss_aware import teach
from tests.toys import MIXTURE, draw_weights, numpy

# Denoising


def halved(inputs):
    return 0.5 * inputs["image"]


def test_the_loss_is_that_of_the_formula():
    """w gain^2 |y_hat - y|^2, from the numbers that the seed names: so it is the same on every backend."""
    schedule, prediction, weighting = schedules.Cosine(), predictions.Noise(), weightings.MinSNR(2.0)
    model = kdiff.DiffusionModel(
        Scripted(halved), schedule, prediction, weighting=weighting, codec="identity", ema=None, seed=3
    )
    model.compile("sgd")
    x = MIXTURE.sample(16)
    step = random.fold_in(random.key_of(3), 0, random.EVALUATION)
    _, for_times, for_noise = (random.fold_in(step, number) for number in range(3))
    m, noise = schedule.at(model.times(schedule, 16, for_times)), numpy(random.normal(for_noise, (16, 2)))
    alpha, sigma, snr = (numpy(v).astype("float64") for v in (m.alpha, m.sigma, np.exp(numpy(m.log_snr))))
    x_t = alpha[:, None] * x + sigma[:, None] * noise
    losses = np.minimum(snr, 2.0) / snr * np.mean((0.5 * x_t - noise) ** 2, axis=1)
    assert model.evaluate(x, batch_size=16, verbose=0) == pytest.approx(losses.mean(), rel=1e-4)


# Objectives of one's own


class Agreement(Objective):
    """Of the module's docstring: the answers at two noise levels of the same data come together."""

    def problem(self, model, x, conditions, keys, training):
        t = model.times(model.schedule, ops.shape(x)[0], next(keys))
        noise = random.normal(next(keys), ops.shape(x))
        here, less = model.schedule.at(t), model.schedule.at(0.9 * t)

        def x_hat(m, training, averages):
            x_t = m.like(x).alpha * x + m.like(x).sigma * noise
            return model.prediction.denoise(model.output(x_t, m, conditions, training, averages), x_t, m)

        return Problem(x_hat(here, training, not training), ops.stop_gradient(x_hat(less, False, True)))


class Uncertainty(Denoising):
    """exp(-u) loss + u, with u learned for each part of time; least at u = log E[loss] (README)."""

    def __init__(self, parts=4):
        super().__init__()
        self.parts = parts
        self.u = self.add_weight(shape=(parts,), initializer="zeros", name="u")

    def problem(self, model, x, conditions, keys, training):
        problem = super().problem(model, x, conditions, keys, training)
        t = problem.drawn.t
        u = ops.take(self.u, ops.cast(ops.minimum(t * self.parts, self.parts - 1), "int32"))
        return problem._replace(weight=ops.exp(-u), extra=u)


class Distilled(Objective):
    """What another model answers."""

    def __init__(self, teacher):
        super().__init__()
        self.teacher = teacher
        self.teacher.trainable = False

    def problem(self, model, x, conditions, keys, training):
        t = model.times(model.schedule, ops.shape(x)[0], next(keys))
        x_t, m = model.schedule(x, random.normal(next(keys), ops.shape(x)), t), model.schedule.at(t)
        output = model.output(x_t, m, conditions, training, ema=not training)
        target = ops.stop_gradient(self.teacher.denoise(x_t, m, **conditions))
        return Problem(model.prediction.denoise(output, x_t, m), target)


def points(width=16, seed=0):
    point, time = keras.Input((2,), name="image"), keras.Input((), name="time")
    x = ops.concatenate([point, ops.expand_dims(time, -1) / 1000.0], axis=-1)
    return draw_weights(
        keras.Model({"image": point, "time": time}, keras.layers.Dense(2)(keras.layers.Dense(width, "silu")(x))), seed
    )


def teacher():
    model = kdiff.DiffusionModel(points(8, seed=1), codec="identity")
    model.compile("adam")
    model.fit(MIXTURE.sample(64), verbose=0)
    return model


X = MIXTURE.sample(128)


@pytest.mark.parametrize(
    "make", [Agreement, Uncertainty, lambda: Distilled(teacher())], ids=["Agreement", "Uncertainty", "Distilled"]
)
def test_objectives_of_ones_own_train_and_are_saved(make, tmp_path):
    """Compiled where the backend compiles; the loaded model has the same loss, and trains on alike."""
    model = kdiff.DiffusionModel(points(), objective=make(), codec="identity", ema=0.9)
    model.compile(keras.optimizers.Adam(3e-2))
    before, weight = model.evaluate(X, batch_size=32, verbose=0), numpy(model.network.weights[0]).copy()
    order = {"batch_size": 32, "shuffle": False, "verbose": 0}
    losses = model.fit(X, epochs=3, **order).history["loss"]
    after = model.evaluate(X, batch_size=32, verbose=0)
    assert np.isfinite(losses).all()
    assert np.abs(numpy(model.network.weights[0]) - weight).min() > 0
    if not isinstance(model.objective, Agreement):  # which is near 0 where nothing was learned
        assert after < 0.9 * before
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert repr(type(loaded.objective)) == repr(type(model.objective))
    for mine, theirs in zip(model.objective.variables, loaded.objective.variables, strict=True):
        np.testing.assert_array_equal(numpy(mine), numpy(theirs))
    assert loaded.evaluate(X, batch_size=32, verbose=0) == pytest.approx(after, rel=1e-4)
    again = [one.fit(X, **order).history["loss"][0] for one in (model, loaded)]
    assert again[0] == pytest.approx(again[1], rel=1e-4)
    assert len(model.ema_weights.values) == len(model.network.weights)


def test_an_objective_may_have_weights_that_are_trained():
    """u = log E[loss]: of the network's error E|noise - 3 t|^2 = 1 + 9 t^2, over each quarter of [0, 1]."""
    network = Scripted(lambda inputs: 0.0 * inputs["image"] + 3.0 * inputs["time"][:, None] / 1000.0)
    network.trainable = False
    model = kdiff.DiffusionModel(network, "cosine", "noise", objective=Uncertainty(4), codec="identity")
    model.compile(keras.optimizers.Adam(0.1))
    model.fit(MIXTURE.sample(1024), batch_size=64, epochs=8, verbose=0)
    assert [variable.name for variable in model.trainable_variables] == ["u"]
    ends = np.linspace(0, 1, 5)
    expected = np.log(1 + 3 * (ends[1:] ** 3 - ends[:-1] ** 3) * 4)
    # 16 examples in each part of a batch, and Adam averages some ten of them: a standard error of about 0.1.
    np.testing.assert_allclose(numpy(model.objective.u), expected, atol=0.35)


def test_another_model_is_frozen_and_saved_once(tmp_path):
    frozen = teacher()
    model = kdiff.DiffusionModel(points(), objective=Distilled(frozen), codec="identity")
    model.compile(keras.optimizers.Adam(1e-2))
    before = [numpy(weight).copy() for weight in frozen.network.weights + frozen.ema_weights.values]
    model.fit(X, batch_size=32, verbose=0)
    for weight, value in zip(frozen.network.weights + frozen.ema_weights.values, before, strict=True):
        np.testing.assert_array_equal(numpy(weight), value)
    ours = {id(variable) for variable in frozen.variables}
    assert not ours & {id(variable) for variable in model.trainable_variables}
    assert {id(variable) for variable in frozen.network.weights} <= {id(v) for v in model.non_trainable_variables}
    model.save(tmp_path / "model.keras")
    with zipfile.ZipFile(tmp_path / "model.keras") as archive, archive.open("model.weights.h5") as file:
        values = []
        h5py.File(file).visititems(lambda _, item: values.append(np.array(item)) if hasattr(item, "shape") else None)
    kernel = numpy(frozen.network.weights[0])
    assert sum(value.shape == kernel.shape and np.array_equal(value, kernel) for value in values) == 1


@pytest.mark.parametrize("weighting", [None, weightings.MinSNR(2.0)], ids=repr)
def test_the_expected_loss_is_that_of_uniform_times(weighting):
    """Also what a learned variance adds, and with a weighting. 3 %: two standard errors of 20,000 examples."""
    losses, schedule = [], schedules.LinearBeta(8, 0.05, 0.5)
    network = Scripted(lambda inputs: ops.concatenate([0.5 * inputs["image"], 0.8 + 0.0 * inputs["image"]], axis=-1))
    for objective in (Denoising(), LossAware(8, history=2)):
        model = kdiff.DiffusionModel(
            network,
            schedule,
            predictions.LearnedVariance("noise", weight=1.0),
            objective=objective,
            weighting=weighting,
            times=times.Discrete(),
            codec="identity",
            ema=None,
        )
        model.compile("sgd")
        model.build((None, 2))
        if isinstance(objective, LossAware):
            assert teach(objective, schedule).max() > 0.3
        losses.append(model.evaluate(MIXTURE.sample(20000), batch_size=20000, verbose=0))
    assert losses[0] == pytest.approx(losses[1], rel=0.03)


@pytest.mark.once
def test_wrong_objectives():
    with pytest.raises(ValueError, match=r"Unknown Objective 'denoise'.*'denoising'"):
        kdiff.DiffusionModel(points(), objective="denoise")
    with pytest.raises(ValueError, match="LossAware: `num_steps` must divide 1000"):
        kdiff.DiffusionModel(points(), "linear_beta", objective=LossAware(3))
