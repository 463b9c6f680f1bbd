"""Averaged weights: the formula, and when they move."""

import keras
import numpy as np
import pytest
from keras import ops
from scipy.integrate import quad

import kdiff
from kdiff.ema import EMA, Exponential, Power
from kdiff.model.steps import COMPILED_STEPS
from tests.toys import compiled_model, images, numpy, tiny_network

FIRST, SECOND = np.float32([[1.0, -2.0]]), np.float32([[3.0, 4.0]])


@pytest.fixture
def network():
    layer = keras.layers.Dense(2, use_bias=False)
    layer.build((None, 1))
    layer.kernel.assign(FIRST)
    return layer


def test_averages_move_when_the_optimizer_has_made_an_update_and_not_else(network):
    """decay_0 = 1 / 10 and decay_1 = 2 / 11; between them the optimizer only accumulates gradients."""
    averages = EMA(Exponential(0.9))
    averages.follow(network)
    network.kernel.assign(SECOND)
    averages.update(network, 0)  # no update yet
    np.testing.assert_array_equal(numpy(averages.values[0]), FIRST)
    averages.update(network, 1)
    first = 0.1 * FIRST + 0.9 * SECOND
    np.testing.assert_allclose(numpy(averages.values[0]), first, rtol=1e-6)
    for _ in range(3):
        averages.update(network, 1)
    np.testing.assert_allclose(numpy(averages.values[0]), first, rtol=1e-6)
    averages.update(network, 2)
    np.testing.assert_allclose(numpy(averages.values[0]), (2 * first + 9 * SECOND) / 11, rtol=1e-6)
    assert int(numpy(averages.updates)) == 2


def test_the_decay_is_reached(network):
    averages = EMA(Exponential(0.3))
    averages.follow(network)
    averages.updates.assign(5)  # 6 / 15 is more
    network.kernel.assign(SECOND)
    averages.update(network, 1)
    np.testing.assert_allclose(numpy(averages.values[0]), 0.3 * FIRST + 0.7 * SECOND, rtol=1e-6)
    averages.reset(network)
    np.testing.assert_array_equal(numpy(averages.values[0]), SECOND)


def test_a_scope_computes_with_the_averages(network):
    averages = EMA(Exponential(0.9))
    averages.follow(network)
    network.kernel.assign(SECOND)
    with averages.scope(network):
        np.testing.assert_array_equal(numpy(network(np.ones((1, 1), "float32"))), FIRST)
    np.testing.assert_array_equal(numpy(network(np.ones((1, 1), "float32"))), SECOND)


def test_averages_that_were_never_moved_are_not_used():
    """In a training loop of one's own, until it calls `update_ema`; evaluation is traced with either."""
    x = np.zeros((2, 4, 4, 1), "float32")
    model = kdiff.DiffusionModel(tiny_network((4, 4, 1)))
    model.build(x.shape)
    model.compile("adam")
    for weight in model.network.weights:
        weight.assign(2.0 * weight)
    plain, loss = model.sample(1, steps=2, ema=False), model.evaluate(x, verbose=0)
    np.testing.assert_allclose(model.sample(1, steps=2), plain, atol=1e-6)
    model.update_ema()  # decay_0 = 1 / 10
    np.testing.assert_allclose(numpy(model.ema_weights.values[0]), numpy(model.network.weights[0]) * 0.95, rtol=1e-5)
    averaged = model.sample(1, steps=2)
    assert np.abs(averaged - plain).max() > 1e-4
    assert model.evaluate(x, verbose=0) != pytest.approx(loss, rel=1e-4)
    with model.ema_weights.scope(model.network):
        weights = [numpy(weight.value) for weight in model.network.weights]
    model.network.set_weights(weights)
    np.testing.assert_allclose(model.sample(1, steps=2, ema=False), averaged, atol=1e-5)


@pytest.mark.filterwarnings("ignore:Skipping variable loading for optimizer")  # the saved model has none
def test_loaded_averages_are_used_at_once(tmp_path):
    """By a loss of one's own, and by an evaluation that was traced before they were loaded."""
    x = np.linspace(-1, 1, 32, dtype="float32").reshape(2, 4, 4, 1)
    trained, model = (kdiff.DiffusionModel(tiny_network((4, 4, 1))) for _ in range(2))
    model.build(x.shape)
    model.compile("adam")
    model.evaluate(x, verbose=0)
    trained.build(x.shape)
    for weight in trained.network.weights:
        weight.assign(2.0 * weight)
    trained.update_ema()
    trained.save(tmp_path / "model.keras")
    trained.save_weights(tmp_path / "model.weights.h5")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    m = trained.schedule.at(np.float32(0.5))
    outputs = [numpy(one.output(ops.convert_to_tensor(x), m, {})) for one in (trained, loaded)]
    np.testing.assert_allclose(outputs[1], outputs[0], atol=1e-5)
    assert np.abs(outputs[0] - numpy(trained.output(ops.convert_to_tensor(x), m, {}, ema=False))).max() > 1e-3
    model.load_weights(tmp_path / "model.weights.h5")
    trained.compile("adam")
    assert model.evaluate(x, verbose=0) == pytest.approx(trained.evaluate(x, verbose=0), rel=1e-5)


def test_a_network_that_changes():
    """New weights are an error that says what to call, before anything is trained."""
    network = tiny_network((4, 4, 1))
    model = kdiff.DiffusionModel(network)
    model.compile("adam")
    x = np.zeros((2, 4, 4, 1), "float32")
    model.build(x.shape)
    model.update_ema()
    next(layer for layer in network.layers if isinstance(layer, keras.layers.Dense)).enable_lora(2)
    model.compile("adam")
    with pytest.raises(ValueError, match="reset_ema"):
        model.sample(1, steps=2)
    with pytest.raises(ValueError, match="reset_ema"):
        model.fit(x, verbose=0)
    assert int(numpy(model.step)) == 0
    model.reset_ema()
    model.fit(x, verbose=0)
    assert len(model.ema_weights.values) == len(network.weights)
    assert int(numpy(model.ema_weights.updates)) == 1


def test_compiled_steps_are_forgotten():
    model = kdiff.DiffusionModel(tiny_network((4, 4, 1)))
    model.build((None, 4, 4, 1))
    step = lambda solver: model._step(kdiff.Sampler(solver), model.schedule, True, None)  # noqa: E731
    first, last = step("ddim"), step("euler")
    for order in range(COMPILED_STEPS - 1):
        step(kdiff.solvers.DDIM(eta=(1 + order) / COMPILED_STEPS))
        assert step("euler") is last  # used again and again
    assert len(model._compiled_steps) == COMPILED_STEPS
    assert step("ddim") is not first


# Profiles


@pytest.mark.once
@pytest.mark.parametrize(
    ("length", "gamma"), [(0.05, 16.972), (0.10, 6.937), (0.15, 3.558), (0.20, 1.826), (0.25, 0.720), (12**-0.5, 0.0)]
)
def test_the_exponent_of_a_length(length, gamma):
    """Karras et al. 2024, whose sigma_rel is the standard deviation of the profile on [0, 1]."""
    power = Power(length)
    assert power.gamma == pytest.approx(gamma, abs=1e-3)
    mean = quad(lambda u: u * power.density(u, 1.0), 0, 1)[0]
    assert quad(lambda u: (u - mean) ** 2 * power.density(u, 1.0), 0, 1)[0] ** 0.5 == pytest.approx(length, abs=1e-6)


@pytest.mark.once
def test_products_of_profiles_are_integrals():
    for one, t, other, s in [
        (0.05, 3.0, 0.1, 2.0),
        (0.1, 2.0, 0.05, 3.0),
        (0.2, 5.0, 0.2, 5.0),
        (0.25, 0.5, 0.02, 4.0),
    ]:
        one, other = Power(one), Power(other)
        integral = quad(lambda u, p=one, q=other, t=t, s=s: p.density(u, t) * q.density(u, s), 0, min(s, t))[0]
        assert one.product(t, other, s) == pytest.approx(integral, rel=1e-8)
    assert one.density([-1.0, 0.6], 0.5).tolist() == [0.0, 0.0]


def test_a_power_average_is_the_integral_of_its_profile(network):
    """weight(u) is constant between two updates; the first weights, before any, do not count."""
    weights = np.random.default_rng(0).normal(size=(30, 1, 2))
    averages = EMA(Power(0.1), Power(0.25))
    averages.follow(network)
    for number, weight in enumerate(weights):
        network.kernel.assign(weight)
        averages.update(network, number + 1)
    for profile, (average,) in zip(averages.profiles, averages.kept, strict=True):
        ends = (np.arange(31) / 30) ** (profile.gamma + 1)
        np.testing.assert_allclose(numpy(average), np.tensordot(np.diff(ends), weights, 1), rtol=1e-4, atol=1e-6)
    averages.reset(network)
    assert not averages.moved
    averages.update(network, 31)
    np.testing.assert_allclose(numpy(averages.kept[1][0]), weights[-1], rtol=1e-6)


def test_steps_stay_exact_after_many_updates():
    """1 - decay in float32 would be 6 % off after ten million."""
    power = Power(0.25)
    for updates in (0, 10, 10_000_000):
        exact = -np.expm1((power.gamma + 1) * np.log1p(-1 / (updates + 1))) if updates else 1.0
        assert float(power.step(ops.convert_to_tensor(float(updates)))) == pytest.approx(exact, rel=1e-5)


def test_several_averages_are_trained_and_saved(tmp_path):
    """The first are used."""
    model = compiled_model(tiny_network((4, 4, 1)), ema=[Power(0.2), 0.5])
    model.fit(images(12, (4, 4, 1)), epochs=2, batch_size=4, verbose=0)
    first, second = ([numpy(one) for one in kept] for kept in model.ema_weights.kept)
    assert max(np.abs(a - b).max() for a, b in zip(first, second, strict=True)) > 1e-4
    with model.ema_weights.scope(model.network):
        used = [numpy(weight.value) for weight in model.network.weights]
    np.testing.assert_allclose(used[0], first[0], rtol=1e-6)
    model.save(tmp_path / "model.keras")
    twin = keras.saving.load_model(tmp_path / "model.keras")
    assert twin.ema_weights.profiles == (Power(0.2), Exponential(0.5))
    for kept, values in zip(twin.ema_weights.kept, (first, second), strict=True):
        for average, value in zip(kept, values, strict=True):
            np.testing.assert_array_equal(numpy(average), value)
    np.testing.assert_allclose(twin.sample(1, steps=2), model.sample(1, steps=2), atol=1e-6)


@pytest.mark.once
@pytest.mark.parametrize("ema", [1.0, -0.1, [], [0.9, Exponential(0.9)], True, "cubic"])
def test_what_is_no_profile(ema):
    with pytest.raises(ValueError, match=r"ema|Profile"):
        kdiff.DiffusionModel(tiny_network((4, 4, 1)), ema=ema)


@pytest.mark.once
@pytest.mark.parametrize("length", [0.0, 0.3, None])
def test_what_is_no_length(length):
    with pytest.raises(ValueError, match="length"):
        Power(length)
