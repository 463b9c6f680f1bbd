"""Averages of any length from a few that were kept: the sums, the files, a run that goes on, the sweep."""

import h5py
import keras
import numpy as np
import pytest

import kdiff
from kdiff import posthoc
from kdiff.ema import Power
from tests.toys import compiled_model, images, numpy, tiny_network

SHAPE = (4, 4, 1)
KEPT = [Power(0.05), Power(0.1)]
STEPS = 32


def trained_model(ema=KEPT, **options):
    return compiled_model(tiny_network(SHAPE), keras.optimizers.SGD(0.3, **options), ema=ema)


def fit(model, *callbacks, epochs=4):
    """Eight steps an epoch, the same in every process."""
    data = images(32, SHAPE)
    model.fit(data, epochs=epochs, batch_size=4, shuffle=False, callbacks=list(callbacks), verbose=0)
    return model


def weights_of(model):
    return [numpy(weight).copy() for weight in model.network.weights]


def assert_close(values, others, atol):
    for one, other in zip(values, others, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=atol)


class History(keras.callbacks.Callback):
    """The weights after each step."""

    def on_train_begin(self, logs=None):
        self.weights = []

    def on_train_batch_end(self, batch, logs=None):
        self.weights.append(weights_of(self.model))

    def average(self, length, at=None):
        """By the definition: the integral of the profile over each step."""
        at = at or len(self.weights)
        parts = np.diff((np.arange(at + 1) / at) ** (Power(length).gamma + 1))
        several = zip(*self.weights[:at], strict=True)
        return [np.tensordot(parts, np.stack(values), 1) for values in several]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(model, history, folder) of a run with sixteen snapshots."""
    folder, history = tmp_path_factory.mktemp("run"), History()
    model = fit(trained_model(), history, posthoc.SnapshotCallback(folder, 2, unit="step"))
    return model, history, folder


@pytest.fixture
def other():
    """A built model of the same network with other weights, and no averages."""
    model = kdiff.DiffusionModel(tiny_network(SHAPE), ema=None)
    model.build((None, *SHAPE))
    for weight in model.network.weights:
        weight.assign(weight + 1.0)
    return model


# The sums


def random_walk(steps=20_000, snapshots=16):
    """(average, updates): of weights whose steps shrink; after how many updates there are snapshots."""
    generator = np.random.default_rng(0)
    moves = 0.1 * generator.normal(size=(steps, 50)) / np.sqrt(1 + np.arange(steps))[:, None]
    weights = generator.normal(size=50) + np.cumsum(moves, axis=0)

    def average(power, t):
        return np.diff((np.arange(t + 1) / t) ** (power.gamma + 1)) @ weights[:t]

    return average, np.linspace(steps / snapshots, steps, snapshots).astype(int)


@pytest.mark.once
@pytest.mark.parametrize(
    ("length", "most"), [(0.05, 1e-12), (0.075, 7.5e-5), (0.1, 1e-12), (0.15, 3e-4), (0.2, 1.5e-3)]
)
def test_a_sum_of_snapshots_is_the_average_that_was_wanted(length, most):
    """Within what was measured of the paper's sums, which are not made to be 1, on such a walk."""
    average, updates = random_walk()
    kept = [(t, power) for t in updates for power in KEPT]
    coefficients, error = posthoc.fit(kept, updates[-1], Power(length))
    wanted = average(Power(length), updates[-1])
    found = coefficients @ np.stack([average(power, t) for t, power in kept])
    assert np.abs(found - wanted).max() / np.abs(wanted).max() < most
    assert coefficients.sum() == pytest.approx(1.0, abs=1e-9)
    assert error < (1e-6 if length in (0.05, 0.1) else 0.05)


@pytest.mark.once
def test_the_error_of_a_fit_is_the_distance_of_the_profiles():
    kept = [(t, power) for t in (4.0, 8.0, 12.0, 16.0) for power in KEPT]
    coefficients, error = posthoc.fit(kept, 16.0, Power(0.2))
    u = (np.arange(200_000) + 0.5) * (16.0 / 200_000)
    wanted = Power(0.2).density(u, 16.0)
    rest = wanted - sum(c * power.density(u, t) for c, (t, power) in zip(coefficients, kept, strict=True))
    assert error == pytest.approx(np.sqrt(np.sum(rest**2) / np.sum(wanted**2)), rel=1e-3)


# Files


def test_what_was_kept_is_given_back(run, other):
    model, history, folder = run
    assert posthoc.steps(folder) == list(range(2, STEPS + 1, 2))
    for which, power in enumerate(KEPT):
        fitted = posthoc.reconstruct(other, folder, power.length)
        assert fitted.error < 1e-6
        assert_close(weights_of(other), [numpy(one) for one in model.ema_weights.kept[which]], 1e-6)
        assert_close(weights_of(other), history.average(power.length), 1e-5)


def test_any_other_length_is_near_the_one_that_was_not_kept(run, other):
    _, history, folder = run
    moved = max(np.abs(a - b).max() for a, b in zip(history.average(0.05), history.average(0.15), strict=True))
    for length, at in ((0.07, None), (0.15, None), (0.12, 20)):
        fitted = posthoc.reconstruct(other, folder, length, at=at)
        assert len(fitted.coefficients) == (at or STEPS)
        assert_close(weights_of(other), history.average(length, at), 0.01 * moved)


def test_a_model_computes_with_what_it_is_given(run, tmp_path):
    """With averages of its own, before they are used; saved and loaded."""
    _, history, folder = run
    model = fit(trained_model(), epochs=1)
    before = model.sample(2, steps=2)
    posthoc.reconstruct(model, folder, 0.1)
    assert_close(weights_of(model), history.average(0.1), 1e-5)
    samples = model.sample(2, steps=2)
    assert np.abs(samples - before).max() > 1e-4
    np.testing.assert_allclose(model.sample(2, steps=2, ema=False), samples, atol=1e-6)
    model.save(tmp_path / "model.keras")
    np.testing.assert_allclose(keras.saving.load_model(tmp_path / "model.keras").sample(2, steps=2), samples, atol=1e-6)


def test_half_precision(tmp_path):
    """Of the network, whose averages are float32, and of the files."""
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        model = fit(trained_model(), posthoc.SnapshotCallback(tmp_path, dtype="float16"), epochs=2)
    finally:
        keras.config.set_dtype_policy(before)
    average = [numpy(one) for one in model.ema_weights.kept[1]]
    posthoc.reconstruct(model, tmp_path, 0.1)
    assert_close(weights_of(model), average, 1e-3)
    with h5py.File(tmp_path / "snapshot-00000016.h5") as file:
        assert file["1/0"].dtype == "float16"


def test_snapshots_count_updates_and_the_last_is_of_the_end(tmp_path):
    """Of two steps each, with gradient accumulation; the number in `every` is of steps."""
    model = fit(trained_model(gradient_accumulation_steps=2), posthoc.SnapshotCallback(tmp_path, 6, unit="step"))
    assert posthoc.steps(tmp_path) == [3, 6, 9, 12, 15, 16]
    assert int(numpy(model.ema_weights.updates)) == 16


class Killed(keras.callbacks.Callback):
    def __init__(self, step):
        super().__init__()
        self.left = step

    def on_train_batch_end(self, batch, logs=None):
        self.left -= 1
        if not self.left:
            raise KeyboardInterrupt


def test_a_killed_run_leaves_the_snapshots_of_one_that_was_not(run, other, tmp_path):
    """The one at step 14 is of after the backup: it is made again."""
    callbacks = [posthoc.SnapshotCallback(tmp_path, 2, unit="step"), kdiff.BackupCallback(tmp_path / "b", 5)]
    with pytest.raises(KeyboardInterrupt):
        fit(trained_model(), *callbacks, Killed(15))
    assert posthoc.steps(tmp_path)[-1] == 14
    fit(trained_model(), *callbacks)
    assert posthoc.steps(tmp_path) == posthoc.steps(run[2])
    for at in (14, None):
        posthoc.reconstruct(other, run[2], 0.1, at=at)
        unbroken = weights_of(other)
        posthoc.reconstruct(other, tmp_path, 0.1, at=at)
        assert_close(weights_of(other), unbroken, 1e-6)


def test_a_new_run_takes_the_place_of_an_old_one(tmp_path):
    model = fit(trained_model(), posthoc.SnapshotCallback(tmp_path), epochs=2)
    assert posthoc.steps(tmp_path) == [8, 16]
    fit(model, posthoc.SnapshotCallback(tmp_path), epochs=1)  # the same, trained on
    assert posthoc.steps(tmp_path) == [8, 16, 24]
    fit(trained_model(), posthoc.SnapshotCallback(tmp_path), epochs=1)
    assert posthoc.steps(tmp_path) == [8]


def test_a_full_disk_is_a_warning(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.warns(UserWarning, match="training goes on"):
        model = fit(trained_model(), posthoc.SnapshotCallback(tmp_path / "file"), epochs=1)
    assert int(numpy(model.ema_weights.updates)) == 8


# The sweep


def test_a_sweep_leaves_the_model_as_it_was(run):
    model, history, folder = run
    wanted = history.average(0.1)
    before, samples = weights_of(model), model.sample(1, steps=2)

    def metric(model):
        return sum(np.sum((a - b) ** 2) for a, b in zip(weights_of(model), wanted, strict=True))

    curve = posthoc.sweep(model, folder, metric, (0.05, 0.1, 0.2))
    assert curve.best == 0.1
    assert curve.at == STEPS
    assert curve.values[1] < 1e-6 < min(curve.values[0], curve.values[2])
    assert curve.errors[1] < 1e-6 < curve.errors[2] < 0.05
    with pytest.raises(ZeroDivisionError):
        posthoc.sweep(model, folder, lambda model: 1 / 0)
    assert_close(weights_of(model), before, 0.0)
    np.testing.assert_allclose(model.sample(1, steps=2), samples, atol=1e-6)
    assert int(numpy(model.ema_weights.updates)) == STEPS


@pytest.mark.once
def test_the_plot_of_a_sweep(tmp_path):
    pytest.importorskip("matplotlib", reason="the extra `plot` is not installed")
    curve = posthoc.Sweep(np.array([0.05, 0.1, 0.25]), np.array([2.0, 1.0, 3.0]), np.array([0.0, 0.0, 0.3]), 100)
    figure = curve.plot(tmp_path / "lengths.png", label="FD")
    assert (tmp_path / "lengths.png").stat().st_size > 5_000
    line, exact, rough, _ = figure.axes[0].lines
    assert line.get_xydata().tolist() == [[0.05, 2.0], [0.1, 1.0], [0.25, 3.0]]
    assert exact.get_xdata().tolist() == [0.05, 0.1]
    assert rough.get_xdata().tolist() == [0.25]
    assert rough.get_markerfacecolor() == "white"


# What is wrong


@pytest.mark.once
def test_a_model_without_power_averages(tmp_path):
    model = trained_model(ema=0.9)
    with pytest.raises(ValueError, match=r"ema=0\.9"):
        fit(model, posthoc.SnapshotCallback(tmp_path))
    assert int(numpy(model.step)) == 0


@pytest.mark.once
def test_what_is_no_run(run, other, tmp_path):
    _, _, folder = run
    unbuilt = kdiff.DiffusionModel(tiny_network(SHAPE))
    larger = kdiff.DiffusionModel(tiny_network(SHAPE, classes=3))
    larger.build({"image": (None, *SHAPE), "label": (None,)})
    before = weights_of(other)
    for model, place, at, words in [
        (other, tmp_path, None, "SnapshotCallback"),
        (other, folder, 3, r"received: 3"),
        (other, folder, 0, "`at`"),
        (unbuilt, folder, None, "build"),
        (larger, folder, None, "another network"),
    ]:
        with pytest.raises(ValueError, match=words):
            posthoc.reconstruct(model, place, 0.1, at)
    (tmp_path / "snapshot-00000002.h5").write_bytes((folder / "snapshot-00000002.h5").read_bytes()[:3000])
    with pytest.raises(ValueError, match="not a whole snapshot"):
        posthoc.reconstruct(other, tmp_path, 0.1)
    with pytest.raises(ValueError, match="lengths"):
        posthoc.sweep(other, folder, float, [])
    with pytest.raises(ValueError, match="float64"):
        posthoc.SnapshotCallback(tmp_path, dtype="float64")
    assert_close(weights_of(other), before, 0.0)


@pytest.mark.once
def test_training_that_goes_on_after_give_does_not_remove_the_snapshots(tmp_path):
    model = fit(trained_model(), posthoc.SnapshotCallback(tmp_path), epochs=2)
    posthoc.reconstruct(model, tmp_path, 0.07)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ValueError, match=r"begin anew.*another folder"):
        fit(model, posthoc.SnapshotCallback(tmp_path), epochs=1)
    assert sorted(tmp_path.iterdir()) == before
    fit(model, posthoc.SnapshotCallback(tmp_path / "other"), epochs=1)
    assert len(list((tmp_path / "other").iterdir())) == 1
    plain = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
    with pytest.raises(TypeError, match="DiffusionModel is expected"):
        posthoc.reconstruct(plain, tmp_path, 0.07)
    plain.compile("sgd", "mse")
    with pytest.raises(ValueError, match="must keep power averages"):
        plain.fit(np.zeros((2, 3)), np.zeros((2, 1)), callbacks=[posthoc.SnapshotCallback(tmp_path)], verbose=0)
    with pytest.raises(ValueError, match="NaN for all lengths"):
        _ = posthoc.Sweep(np.ones(1), np.full(1, np.nan), np.zeros(1), 3).best
