"""What is learned: denoising, at times that learn, and objectives of one's own. Recipes: test_effective_weight.py."""

import copy
import pickle
import zipfile

import h5py
import keras
import numpy as np
import pytest
from keras import ops
from scipy import stats

import kdiff
from kdiff import predictions, random, schedules, times, weightings
from kdiff.objectives import Denoising, LossAware, Objective, Problem
from tests.test_model_parts import Scripted
from tests.toys import MIXTURE, draw_weights, numpy, tiny_network

DISCRETE, CONTINUOUS = schedules.LinearBeta(), schedules.Cosine()


def draw(sampler, schedule=DISCRETE, batch=64, seed=0):
    return numpy(sampler.draw(schedule, batch, random.key_of(seed)))


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
    step = random.fold(random.key_of(3), 0, random.EVALUATION)
    _, for_times, for_noise = (random.fold(step, number) for number in range(3))
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
        t = problem.notes
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
        output = model.output(x_t, m, conditions, training, averages=not training)
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
    assert len(model.averages.values) == len(model.network.weights)


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
    before = [numpy(weight).copy() for weight in frozen.network.weights + frozen.averages.values]
    model.fit(X, batch_size=32, verbose=0)
    for weight, value in zip(frozen.network.weights + frozen.averages.values, before, strict=True):
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


def test_wrong_objectives():
    with pytest.raises(ValueError, match=r"Unknown Objective 'denoise'.*'denoising'"):
        kdiff.DiffusionModel(points(), objective="denoise")
    with pytest.raises(ValueError, match="LossAware: `num_steps` must divide 1000"):
        kdiff.DiffusionModel(points(), "linear_beta", objective=LossAware(3))


# Loss-aware times


def learn(sampler, schedule, index, losses):
    offset = 1.0 if schedule.num_steps else 0.5
    sampler.update(schedule, ((index + offset) / sampler.num_steps).astype("float32"), losses.astype("float32"))


@pytest.mark.parametrize("schedule", [schedules.LinearBeta(8), CONTINUOUS], ids=repr)
def test_history_is_that_of_one_loss_at_a_time(schedule):
    """Also where a time occurs twice in a batch, or more often than there are places; what is not finite is left."""
    sampler, generator = LossAware(8, history=3), np.random.default_rng(0)
    queues = [[] for _ in range(8)]
    for step in range(18):
        index = generator.integers(0, 8, 8) if step % 3 else np.full(8, step % 8)
        losses = generator.uniform(0.1, 5.0, 8)
        losses[0] = [np.nan, np.inf, 1.0][step % 3]
        learn(sampler, schedule, index, losses)
        for i, loss in zip(index, losses, strict=True):
            queues[i] += [loss] if np.isfinite(loss) else []
        kept = [np.sort(queue[-3:]) for queue in queues]
        for i, row in enumerate(numpy(sampler.past_losses)):
            np.testing.assert_allclose(np.sort(row)[3 - len(kept[i]) :], kept[i], rtol=1e-6)
        np.testing.assert_array_equal(numpy(sampler.counts), [len(queue) for queue in queues])
        p = np.full(8, 1 / 8)
        if min(map(len, queues)) >= 3:  # the paper's, with the uniform share of the authors' code
            p = np.sqrt([np.mean(row**2) for row in kept])
            p = 0.999 * p / p.sum() + 0.001 / 8
        np.testing.assert_allclose(numpy(sampler.probabilities()), p, rtol=1e-5)
    assert p.max() > 1.3 / 8  # it has learnt


def teach(sampler, schedule):
    """Losses of 8 steps that differ by up to a thousand times, in a history of 2; returns the probabilities."""
    losses = 10.0 ** np.random.default_rng(3).uniform(-2, 1, (2, 8))
    for row in losses:
        learn(sampler, schedule, np.arange(8), row)
    p = np.sqrt(np.mean(losses**2, axis=0))
    return 0.999 * p / p.sum() + 0.001 / 8


@pytest.mark.parametrize("schedule", [schedules.LinearBeta(8), schedules.LinearBeta(40), CONTINUOUS], ids=repr)
def test_times_are_drawn_where_losses_are_large(schedule):
    """Frequencies, and importance; with the importance the mean over any times is that over uniform ones."""
    sampler = LossAware(8, history=2)
    p = teach(sampler, schedule)
    t = draw(sampler, schedule, batch=4000)
    if schedule.num_steps:
        np.testing.assert_allclose(t * schedule.num_steps, np.round(t * schedule.num_steps), atol=1e-4)
        assert t.min() > 0
    index = (np.ceil(t * 8 - 1e-4) - 1 if schedule.num_steps else np.floor(t * 8)).astype(int)
    assert stats.chisquare(np.bincount(index, minlength=8), 4000 * p).pvalue > 1e-3
    np.testing.assert_allclose(numpy(sampler.importance(schedule, t)), 1 / (8 * p[index]), rtol=1e-4)
    within = (t * 8 - index)[index == p.argmax()]
    parts = (schedule.num_steps or 40) // 8  # uniform within the part, or one of its steps
    shares = np.bincount(np.clip(np.ceil(within * parts - 1e-3) - 1, 0, parts - 1).astype(int), minlength=parts)
    assert parts == 1 or stats.chisquare(shares).pvalue > 1e-3
    even = LossAware(8, history=2, points="systematic")
    teach(even, schedule)
    t = draw(even, schedule, batch=4000)
    # Points in equal spaces miss the share of each step by at most one, of 1 / (8 p 4000).
    mean = np.mean((np.arange(1, schedule.num_steps + 1) / schedule.num_steps) ** 2) if schedule.num_steps else 1 / 3
    assert np.mean(numpy(even.importance(schedule, t)) * t**2) == pytest.approx(mean, abs=np.sum(1 / p) / 8 / 4000)


def test_loss_aware_times_begin_uniform_and_bear_zeros():
    schedule, sampler = schedules.LinearBeta(8), LossAware(8, history=1, points="stratified")
    assert sorted((draw(sampler, CONTINUOUS, batch=16) * 16).astype(int)) == list(range(16))
    learn(sampler, CONTINUOUS, np.arange(8), np.zeros(8))
    assert numpy(sampler.counts).min() == 1
    np.testing.assert_allclose(numpy(sampler.probabilities()), 0.125)
    assert set(np.round(draw(sampler, schedule, batch=16) * 8, 4)) == set(range(1, 9))
    with pytest.raises(ValueError, match="must divide 1000"):
        LossAware(3).draw(DISCRETE, 2, random.key_of(0))


class Learner(keras.Model):
    """A model that reports losses from inside its own, compiled, training step."""

    def __init__(self):
        super().__init__()
        self.times, self.dense = LossAware(8, history=2), keras.layers.Dense(1)

    def call(self, x):
        t = self.times.draw(CONTINUOUS, ops.shape(x)[0], random.key_of(0))
        self.times.update(CONTINUOUS, t, ops.mean(x, axis=-1) + t)
        return self.dense(x)


def test_loss_aware_times_learn_in_a_compiled_step():
    model = Learner()
    model.compile("sgd", "mse")
    x = np.ones((8, 3), "float32")
    model.fit(x, x[:, :1], epochs=3, verbose=0)
    seen = numpy(times.Uniform()(CONTINUOUS, 8, random.key_of(0)))
    np.testing.assert_array_equal(
        numpy(model.times.counts) >= 3, [np.any((8 * seen).astype(int) == i) for i in range(8)]
    )
    assert numpy(model.times.counts).sum() in (24, 32)  # Keras may call the model once before the first step
    filled = numpy(model.times.past_losses)
    assert np.all((filled == 0) | ((filled >= 1) & (filled < 2)))
    assert {id(v) for v in model.times.variables} <= {id(v) for v in model.non_trainable_variables}


def test_loss_aware_times_are_saved(tmp_path):
    model = kdiff.DiffusionModel(tiny_network(), objective=LossAware(8, history=2), ema=None)
    model.build((None, 8, 8, 1))
    teach(model.objective, CONTINUOUS)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras").objective
    assert loaded.get_config() == model.objective.get_config()
    for twin in (loaded, copy.deepcopy(model.objective), pickle.loads(pickle.dumps(model.objective))):
        np.testing.assert_array_equal(numpy(twin.past_losses), numpy(model.objective.past_losses))
        np.testing.assert_array_equal(numpy(twin.counts), numpy(model.objective.counts))
    assert repr(loaded) == "LossAware(num_steps=8, history=2)"
    assert numpy(loaded.clone().counts).sum() == 0


def test_loss_aware_times_learn_where_the_loss_is():
    """Once every step has its history, steps are drawn as the root of their mean squared loss."""

    def answer(inputs):  # of the noise: the error is larger for larger t
        return inputs["image"] * 0.0 + 3.0 * inputs["time"][:, None] / 1000.0

    sampler = LossAware(4, history=100)
    model = kdiff.DiffusionModel(
        Scripted(answer), schedules.LinearBeta(4, 0.1, 0.5), "noise", objective=sampler, codec="identity"
    )
    model.compile(keras.optimizers.SGD(0.0))
    model.fit(MIXTURE.sample(512), batch_size=64, epochs=4, verbose=0)
    t = numpy(sampler.draw(model.schedule, 20000, random.key_of(0)))
    share = np.array([np.mean(np.isclose(t, (i + 1) / 4)) for i in range(4)])
    mean = (3.0 * np.arange(1, 5) / 4) ** 2  # of L, the mean of (noise - 3 t)^2 over two coordinates:
    expected = np.sqrt((1 + mean) ** 2 + 1 + 2 * mean)  # the root of E[L]^2 + Var[L]
    np.testing.assert_allclose(share, expected / expected.sum(), atol=0.03)  # of 100 losses, two standard errors
    factor = numpy(sampler.importance(model.schedule, (np.arange(4, dtype="float32") + 1) / 4))
    np.testing.assert_allclose(factor * share * 4, 1.0, atol=0.1)
