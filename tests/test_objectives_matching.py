"""Distribution matching: with the exact scores on Gaussian data, the gradients of both players are known."""

import keras
import numpy as np
import pytest
from keras import ops

from kdiff import objectives, random, students
from kdiff.networks import MLP
from tests.helpers_taught import COSINE, MEAN, C, Given, X, diffusion, exact_model
from tests.toys import mostly_once, numpy

T = 0.4
PUSH = np.float32([0.3, -0.5])


def quadrature(monkeypatch):
    """64 examples: the noise of the generator, of both scores and of the fake model's loss, each +1 and -1."""
    signs = np.array(np.meshgrid(*[[-1.0, 1.0]] * 6)).reshape(3, 2, -1).transpose(0, 2, 1).astype("float32")
    calls = []

    def normal(key, shape):
        calls.append(key)
        return ops.convert_to_tensor(signs[(len(calls) - 1) % 3])

    monkeypatch.setattr(random, "normal", normal)


def made(monkeypatch, generator=(0.0, 0.0), fake=(0.0, 0.0), **options):
    """A model of an exact generator, moved by `generator`, and an exact fake score, its x_hat moved by `fake`."""
    times = Given(np.full(64, T, "float32"))
    other = exact_model(COSINE, "data", times=times)
    other.network.bias.assign(fake)
    objective = objectives.DistributionMatching(exact_model(COSINE, "data"), other, times=times, every=1, **options)
    model = exact_model(COSINE, "data", objective)
    model.network.bias.assign(generator)
    quadrature(monkeypatch)
    model.compile(keras.optimizers.SGD(1.0))
    return model, other


def slopes(model, other, generator, fake):
    """The gradients by the biases of the two networks: what a step of SGD takes away."""
    model.train_on_batch(X)
    return [before - numpy(one.network.bias) for before, one in ((generator, model), (fake, other))]


def test_at_the_right_generator_both_gradients_vanish(monkeypatch):
    """Of the fake model's loss on the mean, over the quadrature; of the generator's in every example."""
    zero = np.zeros(2, "float32")
    for slope in slopes(*made(monkeypatch), zero, zero):
        assert np.abs(slope).max() < 2e-4


def test_a_wrong_generator_is_led_by_the_difference_of_the_scores(monkeypatch):
    """What is made is N(mean + push, c^2), and the fake score the right one of it. The x_hat of both at t differ by

        (1 - k) push,    k = alpha^2 c^2 / (alpha^2 c^2 + sigma^2),

    whatever y_t is; so the gradient of a mean over two coordinates is that, over mean |y - teacher(y_t)|.
    """
    m = COSINE.at(np.float32(T))
    alpha, sigma = float(m.alpha), float(m.sigma)
    k = alpha**2 * C**2 / (alpha**2 * C**2 + sigma**2)
    model, other = made(monkeypatch, PUSH, (1.0 - k) * PUSH)
    generator, fake = slopes(model, other, PUSH, (1.0 - k) * PUSH)
    np.testing.assert_allclose(fake, 0.0, atol=2e-4)
    signs = np.array(np.meshgrid(*[[-1.0, 1.0]] * 6)).reshape(3, 2, -1).transpose(0, 2, 1)
    y = MEAN + C * signs[0] + PUSH
    real = MEAN + k * (y + sigma / alpha * signs[1] - MEAN)
    size = np.abs(y - real).mean(axis=1, keepdims=True)
    np.testing.assert_allclose(generator, ((1.0 - k) * PUSH / size).mean(axis=0), rtol=2e-3)


def test_each_player_has_its_own_loss_and_turn():
    """With g = 0 only fake model and discriminator learn, with weights of 1 all; and the teacher never."""
    teacher = diffusion()
    fake = students.student(teacher, "denoising", ema=None)
    judge = keras.Sequential([keras.layers.Dense(8, "silu"), keras.layers.Dense(1)])
    judge.build((None, 2))
    players = {"fake": fake.network, "judge": judge}
    for every, moves in ((1000, {"fake", "judge"}), (1, {"fake", "judge", "generator"})):
        objective = objectives.DistributionMatching(teacher, fake, 2, every=every, discriminator=judge)
        model = students.student(teacher, objective)
        parts = {**players, "generator": model.network, "teacher": teacher.network}
        old = {name: [numpy(weight).copy() for weight in part.weights] for name, part in parts.items()}
        model.compile(keras.optimizers.SGD(0.1))
        model.fit(X, batch_size=64, verbose=0)
        moved = {
            name
            for name, part in parts.items()
            if any(
                np.abs(numpy(weight) - before).max() > 0 for weight, before in zip(part.weights, old[name], strict=True)
            )
        }
        assert moved == moves
    assert model.sample(3).shape == (3, 2)


def test_the_generator_is_led_to_what_looks_real():
    """softplus(-D(y_t)) in its turn, and softplus(-D(x_t)) + softplus(D(y_t)) for D, here linear."""
    teacher = diffusion()
    judge = keras.Sequential([keras.layers.Dense(1)])
    judge.build((None, 2))
    judge.set_weights([np.float32([[0.7], [-1.2]]), np.float32([0.3])])
    fake = students.student(teacher, "denoising", ema=None)
    objective = objectives.DistributionMatching(teacher, fake, discriminator=judge)
    x, y, noise = (np.random.default_rng(i).standard_normal((5, 2)).astype("float32") for i in range(3))
    m = COSINE.at(np.full(5, 0.3, "float32"))
    alpha, sigma = float(m.alpha[0]), float(m.sigma[0])
    real, made = ((alpha * one + sigma * noise) @ [0.7, -1.2] + 0.3 for one in (x, y))
    for turn in (0.0, 1.0):
        received = objective._judged(*map(ops.convert_to_tensor, (x, y, noise)), m, turn, False)
        expected = turn * np.logaddexp(0, -made) + np.logaddexp(0, -real) + np.logaddexp(0, made)
        np.testing.assert_allclose(numpy(received), expected, rtol=1e-4)


@pytest.mark.once
def test_players_that_make_no_sense_are_refused():
    teacher = diffusion()
    fake = students.student(teacher, "denoising", ema=None)
    with pytest.raises(TypeError, match="`fake` must be a built DiffusionModel"):
        objectives.DistributionMatching(teacher)
    with pytest.raises(ValueError, match="`fake` is trained and the teacher is not"):
        objectives.DistributionMatching(teacher, teacher)
    frozen = students.student(teacher, "denoising")
    students.student(teacher, objectives.SCM(frozen), prediction="trig_flow")
    with pytest.raises(ValueError, match="is trained, but it is frozen"):
        objectives.DistributionMatching(teacher, frozen)
    with pytest.raises(ValueError, match="the discriminator has no weights yet"):
        objectives.DistributionMatching(teacher, fake, discriminator=MLP(8, 1))
    with pytest.raises(ValueError, match="has a weight of its own"):
        students.student(teacher, objectives.DistributionMatching(teacher, fake), weighting="min_snr")


@pytest.mark.parametrize("steps", mostly_once([1, 2]))
def test_the_generator_begins_where_its_run_does(steps, monkeypatch):
    """At pure noise in the first step, and in the others at noised data."""
    seen = []
    teacher = diffusion()
    fake = students.student(teacher, "denoising", ema=None)
    model = students.student(teacher, objectives.DistributionMatching(teacher, fake, steps))
    output = type(model).output

    def watched(self, x_t, m, *arguments, **options):
        if self is model:
            seen.append((numpy(x_t), numpy(m.t)))
        return output(self, x_t, m, *arguments, **options)

    monkeypatch.setattr(type(model), "output", watched)
    far = ops.convert_to_tensor(X + 1e4)
    model.objective.problem(model, far, {}, random.Keys(random.key_of(0)), True)
    ((x_t, t),) = seen
    np.testing.assert_allclose(np.unique(t), [1.0] if steps == 1 else [0.5, 1.0], atol=1e-6)
    assert np.abs(x_t[t == 1.0]).max() < 10.0
    assert (np.abs(x_t[t < 0.9]) > 100.0).all()
