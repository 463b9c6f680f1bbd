"""Times that are drawn where losses are large."""

import copy
import pickle

import keras
import numpy as np
import pytest
from keras import ops
from scipy import stats

import kdiff
from kdiff import random, schedules, times
from kdiff.objectives import LossAware
from tests.test_model_parts import Scripted
from tests.toys import MIXTURE, numpy, tiny_network

DISCRETE, CONTINUOUS = schedules.LinearBeta(), schedules.Cosine()


def draw(sampler, schedule=DISCRETE, batch=64, seed=0):
    return numpy(sampler.draw(schedule, batch, random.key_of(seed)))


@pytest.mark.once
@pytest.mark.parametrize("options", [{"num_steps": 0}, {"history": 0}, {"uniform": 0.0}, {"points": "discrete"}])
def test_impossible_settings(options):
    with pytest.raises(ValueError, match=f"{next(iter(options))}` must be"):
        LossAware(**options)


def learn(sampler, schedule, index, losses):
    offset = 1.0 if schedule.num_steps else 0.5
    sampler.update(schedule, ((index + offset) / sampler.num_steps).astype("float32"), losses.astype("float32"))


@pytest.mark.once
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


@pytest.mark.once
@pytest.mark.parametrize("schedule", [schedules.LinearBeta(8), schedules.LinearBeta(40), CONTINUOUS], ids=repr)
def test_times_are_drawn_where_losses_are_large(schedule):
    """Frequencies and importance; with the importance the mean over any times is that over uniform ones."""
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


@pytest.mark.once
def test_loss_aware_times_begin_uniform_and_bear_zeros():
    schedule, sampler = schedules.LinearBeta(8), LossAware(8, history=1, points="stratified")
    assert sorted((draw(sampler, CONTINUOUS, batch=16) * 16).astype(int)) == list(range(16))
    learn(sampler, CONTINUOUS, np.arange(8), np.zeros(8))
    assert numpy(sampler.counts).min() == 1
    np.testing.assert_allclose(numpy(sampler.probabilities()), 0.125)
    assert set(np.round(draw(sampler, schedule, batch=16) * 8, 4)) == set(range(1, 9))
    assert LossAware().history == 10  # Nichol and Dhariwal 2021, section 3.3
    with pytest.raises(ValueError, match="must divide 1000"):
        draw(LossAware(3))


class Learner(keras.Model):
    """A model that reports losses from inside its own, compiled, training step."""

    def __init__(self):
        super().__init__()
        self.objective, self.dense = LossAware(8, history=2), keras.layers.Dense(1)

    def call(self, x):
        t = self.objective.draw(CONTINUOUS, ops.shape(x)[0], random.key_of(0))
        self.objective.update(CONTINUOUS, t, ops.mean(x, axis=-1) + t)
        return self.dense(x)


def test_loss_aware_times_learn_in_a_compiled_step():
    model = Learner()
    model.compile("sgd", "mse")
    x = np.ones((8, 3), "float32")
    model.fit(x, x[:, :1], epochs=3, verbose=0)
    seen = numpy(times.Uniform()(CONTINUOUS, 8, random.key_of(0)))
    np.testing.assert_array_equal(
        numpy(model.objective.counts) >= 3, [np.any((8 * seen).astype(int) == i) for i in range(8)]
    )
    assert numpy(model.objective.counts).sum() in (24, 32)  # Keras may call the model once before the first step
    filled = numpy(model.objective.past_losses)
    assert np.all((filled == 0) | ((filled >= 1) & (filled < 2)))
    assert {id(v) for v in model.objective.variables} <= {id(v) for v in model.non_trainable_variables}


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


@pytest.mark.once
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
