import errno
import shutil
import signal
import subprocess
import sys
import warnings
from types import SimpleNamespace
from typing import Any, NamedTuple

import keras
import numpy as np
import pytest

from kdiff import pictures
from kdiff.callbacks import BackupCallback, SampleCallback
from kdiff.sampling import Sampler
from kdiff.solvers import DDPM
from tests.toys import compiled_model, images, numpy, tiny_network

pytestmark = pytest.mark.eager

pytest.importorskip("PIL", reason="the extra `plot` is not installed")


class FakeStep(NamedTuple):
    index: int
    total: int
    x: Any
    x_hat: Any


class FakeModel(keras.Sequential):
    """A regression that can be sampled: the callback needs no more than `sample` and `sample_steps`."""

    calls: tuple = ()

    def sample(self, num_samples, *, sampler=None, steps=None, seed=0, batch_size=None, **conditions):
        self.calls += ((num_samples, sampler, steps, seed, conditions),)
        return np.random.default_rng(seed).uniform(-1, 1, (num_samples, 4, 4, 1)).astype("float32")

    def sample_steps(self, num_samples, *, sampler=None, steps=None, seed=0, **conditions):
        for index in range(3):
            x = keras.ops.full((num_samples, 4, 4, 1), 2.0 - index)
            yield FakeStep(index + 1, 3, x, x)


@pytest.fixture
def model():
    model = FakeModel([keras.layers.Input((2,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse", jit_compile=False)
    return model


def fit(model, *callbacks, epochs=4, **options):
    x = np.ones((12, 2), "float32")
    return model.fit(x, x[:, :1], batch_size=4, epochs=epochs, callbacks=list(callbacks), verbose=0, **options).history


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.once
def test_a_grid_each_n_epochs_always_from_the_same_noise(model, tmp_path):
    fit(model, SampleCallback(tmp_path, every=2, num_samples=3, seed=5, columns=3))
    assert names(tmp_path) == ["samples-epoch-0002.png", "samples-epoch-0004.png"]
    assert model.calls == ((3, None, None, 5, {}),) * 2
    picture = pictures.read_picture(tmp_path / "samples-epoch-0004.png")
    np.testing.assert_array_equal(picture, pictures.grid(model.sample(3, seed=5), columns=3))


def test_a_grid_each_n_steps_across_epochs(model, tmp_path):
    fit(model, SampleCallback(tmp_path, every=4, unit="step"))  # an epoch has three steps
    assert names(tmp_path) == [f"samples-step-{step:08d}.png" for step in (4, 8, 12)]


def test_steps_that_run_together_are_not_missed(model, tmp_path):
    callback = SampleCallback(tmp_path, every=4, unit="step")
    callback.set_model(model)
    callback.on_train_begin()
    for epoch in range(2):
        callback.on_epoch_begin(epoch)
        callback.on_train_batch_end(2)  # what Keras reports with steps_per_execution=3: the last of three
        callback.on_train_batch_end(5)
    assert names(tmp_path) == [f"samples-step-{step:08d}.png" for step in (6, 9, 12)]


@pytest.mark.parametrize(
    ("unit", "second"), [("epoch", "samples-epoch-0004.png"), ("step", "samples-step-00000010.png")]
)
def test_resumed_training_goes_on_with_the_numbers(model, tmp_path, unit, second):
    every = {"epoch": 2, "step": 5}[unit]
    fit(model, SampleCallback(tmp_path, every=every, unit=unit), epochs=2)
    assert len(names(tmp_path)) == 1
    fit(model, SampleCallback(tmp_path, every=every, unit=unit), epochs=4, initial_epoch=2)
    assert names(tmp_path)[1] == second


@pytest.mark.once
def test_sampler_steps_and_conditions_reach_the_model(model, tmp_path):
    sampler = Sampler("ddpm", steps=7)
    conditions = {"label": [1, 2]}
    fit(model, SampleCallback(tmp_path, 1, 2, sampler=sampler, steps=9, conditions=conditions), epochs=1)
    _, got_sampler, steps, _, got_conditions = model.calls[0]
    assert (got_sampler, steps, got_conditions["label"].tolist()) == (sampler, 9, [1, 2])
    fit(model, SampleCallback(tmp_path, sampler="ddpm", conditions={"label": 1}), epochs=1)
    assert model.calls[1][1] == DDPM()
    assert model.calls[1][4]["label"] == 1


@pytest.mark.once
@pytest.mark.parametrize(
    ("conditions", "options", "captions"),
    [
        ({}, {}, None),
        ({"label": [1, 0]}, {}, ["1", "0"]),
        ({"label": np.array(1)}, {}, ["1", "1"]),
        ({"label": [1, 2]}, {"class_names": ["cat", "dog"]}, ["dog", "2"]),
        ({"label": [1, -1]}, {"class_names": ("cat", "dog")}, ["dog", "-1"]),
        ({"text": ["a red circle", "größer"]}, {}, ["a red circle", "größer"]),
        ({"text": "a red circle"}, {"class_names": ["cat"]}, ["a red circle"] * 2),
        ({"text": np.array([b"a", "größer".encode()], object)}, {}, ["a", "größer"]),
        ({"text": ["a", "b"], "label": 0}, {"class_names": ["cat"]}, ["a, cat", "b, cat"]),
        ({"embedding": np.zeros((2, 3)), "weight": [0.5, 1.5], "on": [True, False], "text": None}, {}, None),
        ({"embedding": np.zeros((2, 3)), "tokens": np.zeros((2, 3), int), "label": [3, 4]}, {}, ["3", "4"]),
        ({"label": [1, 0]}, {"captions": True}, ["1", "0"]),
        ({"label": [1, 0]}, {"captions": False}, None),
        ({"label": [1, 0]}, {"captions": ["one", "none"]}, ["one", "none"]),
        ({}, {"captions": ("one", "none")}, ["one", "none"]),
    ],
)
def test_captions_are_made_of_the_conditions(model, tmp_path, conditions, options, captions):
    callback = SampleCallback(tmp_path, 1, 2, conditions=conditions, **options)
    assert callback.captions == captions
    fit(model, callback, epochs=1)
    expected = pictures.grid(model.sample(2), captions=captions)
    np.testing.assert_array_equal(pictures.read_picture(tmp_path / "samples-epoch-0001.png"), expected)


@pytest.mark.once
def test_strings_and_no_condition_reach_the_model(model, tmp_path):
    conditions = {"text": ["a", "longer"], "other": "one", "label": None}
    fit(model, SampleCallback(tmp_path, 1, 2, conditions=conditions), epochs=1)
    got = model.calls[0][-1]
    assert got["text"].tolist() == ["a", "longer"]
    assert got["other"] == "one"
    assert got["label"] is None


@pytest.mark.once
def test_animations_have_the_captions(model, tmp_path):
    from PIL import Image

    fit(model, SampleCallback(tmp_path, 1, 2, conditions={"label": [3, 4]}, trajectory_gif=True, training_gif=True))
    height, width, _ = pictures.grid(np.zeros((2, 4, 4, 1)), captions=["3", "4"]).shape
    for name in ("trajectory.gif", "training.gif"):
        with Image.open(tmp_path / name) as animation:
            assert animation.size == (width, height)


@pytest.mark.once
def test_animations(model, tmp_path):
    from PIL import Image

    pictures.save_png(tmp_path / "samples-epoch-0000.png", np.zeros((1, 9, 9, 1)))  # of another run, with another size
    fit(model, SampleCallback(tmp_path, trajectory_gif=True, training_gif=True))
    with Image.open(tmp_path / "trajectory.gif") as animation:
        assert animation.n_frames == 2  # x = 2 and x = 1 look alike: Pillow joins them
    with Image.open(tmp_path / "training.gif") as animation:
        assert animation.size == pictures.read_picture(tmp_path / "samples-epoch-0004.png").shape[1::-1]


@pytest.mark.once
def test_an_animation_is_in_the_order_of_the_numbers(model, tmp_path):
    from PIL import Image

    fit(model, SampleCallback(tmp_path), epochs=1)
    (drawn,) = tmp_path.iterdir()
    black = Image.new("L", pictures.read_picture(drawn).shape[1::-1])
    for number in (9999, 10001):
        black.save(tmp_path / f"samples-epoch-{number}.png")
    drawn.unlink()
    callback = SampleCallback(tmp_path, training_gif=True)
    callback.set_model(model)
    callback.on_epoch_end(9999)
    callback.on_train_end()
    with Image.open(tmp_path / "training.gif") as animation:
        assert animation.n_frames == 2
        assert animation.convert("L").getpixel((5, 5)) == 0


@pytest.mark.data
def test_tensorboard_shows_the_grids(model, tmp_path):
    import tensorflow as tf

    fit(model, SampleCallback(tmp_path / "grids", every=2, tensorboard=tmp_path / "logs"))
    (log,) = (tmp_path / "logs").iterdir()
    values = [(event.step, v) for event in tf.compat.v1.train.summary_iterator(str(log)) for v in event.summary.value]
    assert [(step, value.tag) for step, value in values] == [(2, "samples"), (4, "samples")]
    picture = tf.io.decode_png(values[1][1].image.encoded_image_string).numpy()
    np.testing.assert_array_equal(picture, pictures.read_picture(tmp_path / "grids" / "samples-epoch-0004.png"))


def test_tensorboard_without_tensorflow_names_the_extra(tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.startswith("kdiff.data")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    with pytest.raises(ImportError, match=r"kdiff\[data\]"):
        SampleCallback(tmp_path, tensorboard=tmp_path)


def test_the_tensorboard_callback_of_keras(tmp_path):
    """Keras' own, which needs TensorFlow and the package tensorboard on every backend: losses and weights."""
    pytest.importorskip("tensorboard")
    tf = pytest.importorskip("tensorflow")
    model = compiled_model(ema=None)
    logs = keras.callbacks.TensorBoard(tmp_path, histogram_freq=1, write_graph=True)
    losses = model.fit(images(8), batch_size=4, epochs=2, verbose=0, callbacks=[logs]).history["loss"]
    (log,) = (tmp_path / "train").glob("*.v2")
    events = [event for event in tf.compat.v1.train.summary_iterator(str(log)) if event.summary.value]
    values = [(v.tag, tf.make_ndarray(v.tensor)) for event in events for v in event.summary.value]
    np.testing.assert_allclose([value for tag, value in values if tag == "epoch_loss"], losses, rtol=1e-6)
    assert sum("kernel" in tag for tag, _ in values) >= 2


def test_plot_model_of_keras(tmp_path):
    """It draws a model as one box, and its network, if it is a functional one, layer by layer."""
    pytest.importorskip("pydot")
    if shutil.which("dot") is None:
        pytest.skip("Graphviz is not installed")
    model = compiled_model()
    model.build((None, 8, 8, 1))
    for name, one in {"model": model, "network": model.network}.items():
        keras.utils.plot_model(one, str(tmp_path / f"{name}.png"), show_shapes=True, show_layer_names=True)
        height, width, _ = pictures.read_picture(tmp_path / f"{name}.png").shape
        assert height > 20
        assert width > 20
    drawn = keras.utils.model_to_dot(model.network, show_layer_names=True).to_string()
    assert all(layer.name in drawn for layer in model.network.layers)


@pytest.mark.once
def test_failures_warn_and_training_goes_on(model, tmp_path):
    def broken(*args, **options):
        raise RuntimeError("out of ink")

    model.sample = model.sample_steps = broken
    callback = SampleCallback(tmp_path, trajectory_gif=True, training_gif=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(model, callback, epochs=2)
    messages = [str(warning.message) for warning in caught if "SampleCallback" in str(warning.message)]
    assert len(messages) == 4
    assert "epoch 2" in messages[1]
    assert "RuntimeError: out of ink" in messages[1]
    assert "trajectory.gif" in messages[2]
    assert "training.gif" in messages[3]
    assert "no grid was drawn" in messages[3]
    assert int(model.optimizer.iterations) == 6


@pytest.mark.once
@pytest.mark.parametrize(
    "options",
    [
        {"every": 0},
        {"num_samples": 0},
        {"unit": "hour"},
        {"sampler": "nope"},
        {"sampler": 3},
        {"steps": 0},
        {"seed": -1},
        {"columns": 0},
        {"conditions": {"label": [1, 2, 3]}},
        {"conditions": {"text": ["a", "b", "c"]}},
        {"captions": True},
        {"captions": True, "conditions": {"embedding": np.zeros((16, 3))}},
        {"captions": ["a", "b"]},
        {"captions": "a" * 16},
        {"class_names": "cat"},
    ],
)
def test_bad_arguments_are_errors_at_once(tmp_path, options):
    with pytest.raises((ValueError, TypeError)):
        SampleCallback(tmp_path, **options)


@pytest.mark.once
def test_a_missing_pillow_is_an_error_at_once(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ImportError, match=r"kdiff\[plot\]"):
        SampleCallback(tmp_path)


@pytest.mark.once
@pytest.mark.parametrize("one", [False, True], ids=["each", "all"])
def test_samples_that_are_no_pictures_are_drawn(model, tmp_path, one):
    def draw(samples):
        assert samples.shape == (3, 4, 4, 1)
        return np.full((6, 9, 3), 40, "uint8") if one else np.full((3, 6, 9, 3), 40, "uint8")

    options = {"num_samples": 3, "columns": 3, "conditions": {"label": [1, 2, 3]}, "size": (4, 4)}
    fit(model, SampleCallback(tmp_path, every=4, draw=draw, trajectory_gif=True, **options))
    assert names(tmp_path) == ["samples-epoch-0004.png", "trajectory.gif"]
    picture = pictures.read_picture(tmp_path / "samples-epoch-0004.png")
    drawn = draw(model.sample(3))
    np.testing.assert_array_equal(picture, drawn if one else pictures.grid(drawn, 3, captions=["1", "2", "3"]))
    assert model.calls[0][-1]["size"] == (4, 4)


# Backup


class Killed(keras.callbacks.Callback):
    """Breaks a run off at a step; remembers what it was told."""

    def __init__(self, step=None):
        super().__init__()
        self.step, self.seen = step, []

    def on_train_batch_end(self, batch, logs=None):
        self.seen.append((batch, float(logs["loss"])))
        if len(self.seen) == self.step:
            raise KeyboardInterrupt


def killed(model, step, *callbacks, **options):
    with pytest.raises(KeyboardInterrupt):
        fit(model, *callbacks, Killed(step), **options)


@pytest.mark.data
def test_a_killed_run_goes_on_as_if_it_had_not_been(tmp_path):
    """Weights, averages, optimizer, random numbers, the order of the data, losses and metrics: all to the last bit."""
    images = pytest.importorskip("kdiff.data", reason="the extra `data` is not installed").images
    x = np.random.default_rng(0).integers(0, 256, (20, 4, 4, 1), dtype="uint8")
    dataset = images(x, batch_size=4)  # five steps an epoch

    def run(*callbacks):
        dataset.order.passes = 0  # as in another process
        model = compiled_model(tiny_network((4, 4, 1), dropout=0.3))
        return model, model.fit(dataset.map(lambda x: x), epochs=3, callbacks=list(callbacks), verbose=0).history

    unbroken, history = run()
    with pytest.raises(KeyboardInterrupt):
        run(BackupCallback(tmp_path, 3), Killed(14))
    last = Killed()
    model, rest = run(BackupCallback(tmp_path, 3), last)
    # TensorFlow's CPU sums in no fixed order.
    assert rest["loss"] == pytest.approx(history["loss"][2:], rel=1e-5)
    assert [batch for batch, _ in last.seen] == [0, 1, 2, 3, 4]
    losses = [loss for _, loss in last.seen]
    assert losses[0] == losses[1] != losses[2]  # two steps were done before
    for a, b in zip(unbroken.weights, model.weights, strict=True):
        np.testing.assert_allclose(numpy(a), numpy(b), rtol=1e-5, atol=1e-6, err_msg=a.path)


RUN = """
import os, signal, sys
import keras, numpy
import kdiff
from kdiff.networks import MLP

folder, steps, place = sys.argv[1], int(sys.argv[2]), sys.argv[3]
die = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
backup = kdiff.BackupCallback(folder, 2, delete_checkpoint=False)
seen, replace = [], os.replace
def count(batch, logs):
    seen.append(batch)
    if len(seen) == steps:
        if place == "step":
            die()
        os.replace = die if place == "before" else lambda *paths: (replace(*paths), die())
x = numpy.random.default_rng(0).uniform(-1, 1, (12, 3)).astype("float32")
keras.utils.set_random_seed(0)
model = kdiff.DiffusionModel(MLP(8, 1), codec="identity", seed=1)
model.compile("adam", "mse")
callbacks = [keras.callbacks.LambdaCallback(on_train_batch_end=count), backup]
model.fit(x, batch_size=4, epochs=4, shuffle=False, verbose=0, callbacks=callbacks)
numpy.savez(folder + "/end.npz", *map(keras.ops.convert_to_numpy, model.weights))
"""


@pytest.mark.thorough
def test_a_process_that_is_killed_goes_on(tmp_path):
    """By SIGKILL: between two steps, while a backup is written, and just after one has taken its place."""

    def run(folder, steps=0, place="step"):
        return subprocess.run([sys.executable, "-c", RUN, str(folder), str(steps), place], check=not steps).returncode

    run(tmp_path / "unbroken")
    for steps, place in ((3, "step"), (3, "before"), (3, "after")):  # of each process
        assert run(tmp_path / "killed", steps, place) == -signal.SIGKILL
    run(tmp_path / "killed")
    one, other = (np.load(tmp_path / name / "end.npz") for name in ("unbroken", "killed"))
    for name in one:
        np.testing.assert_allclose(one[name], other[name], rtol=1e-6, atol=1e-7)  # TensorFlow sums in no fixed order


class Orders:
    """Those of a pipeline of three batches, and of one for validation."""

    def __init__(self, passes):
        self.passes = passes


@pytest.mark.once
@pytest.mark.parametrize("save_freq", ["epoch", 2, 3])
def test_pipelines_go_on_with_the_order_that_comes_next(model, tmp_path, save_freq):
    class Passes(keras.callbacks.Callback):
        def on_train_batch_begin(self, batch, logs=None):
            if batch == 0:
                model.orders.passes = [model.orders.passes[0] + 1, *model.orders.passes[1:]]

        def on_epoch_end(self, epoch, logs=None):
            model.orders.passes = [model.orders.passes[0], model.orders.passes[1] + 1]

    model.orders = Orders([2, 0])  # two were begun before
    killed(model, 6, Passes(), BackupCallback(tmp_path, save_freq))
    model.orders = Orders([0, 0])
    seen = []
    notes = keras.callbacks.LambdaCallback(on_epoch_begin=lambda *_: seen.extend(model.orders.passes))
    fit(model, BackupCallback(tmp_path, save_freq), notes, epochs=2)
    assert seen == [3, 1]


def test_steps_keep_their_numbers_when_a_run_goes_on(model, tmp_path):
    """Of three steps in an epoch, a backup at each second, and a grid at each fifth."""
    samples, backup = tmp_path / "samples", tmp_path / "backup"
    killed(model, 5, BackupCallback(backup, 2), epochs=4)  # after the backup at step 4, the first of the second epoch
    fit(model, SampleCallback(samples, 5, unit="step"), BackupCallback(backup, 2, delete_checkpoint=False), epochs=4)
    assert int(model.optimizer.iterations) == 12
    assert names(samples) == ["samples-step-00000005.png", "samples-step-00000010.png"]
    assert names(backup) == ["backup.weights.h5"]
    assert fit(model, BackupCallback(backup, 2), epochs=4) == {}  # the run was at its end
    assert not backup.exists()
    assert len(fit(model, BackupCallback(backup, 2), epochs=4)["loss"]) == 4  # and the next begins anew


@pytest.mark.once
def test_a_backup_shares_its_folder(model, tmp_path):
    (tmp_path / "notes.txt").touch()
    fit(model, BackupCallback(tmp_path), epochs=1)
    assert names(tmp_path) == ["notes.txt"]


@pytest.mark.once
def test_a_full_disk_keeps_the_last_backup_and_training_goes_on(model, tmp_path, monkeypatch):
    killed(model, 4, BackupCallback(tmp_path))
    good = (tmp_path / "backup.weights.h5").read_bytes()

    def full(path, *_, **__):
        path.write_bytes(b"\x89HDF")
        raise errors[-1]

    monkeypatch.setattr(model, "save_weights", full)
    errors = [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("flush: No space left on device")]
    while errors:
        with pytest.warns(UserWarning, match="could not write .*backup.weights.h5, and training goes on: .*No space"):
            fit(model, BackupCallback(tmp_path, delete_checkpoint=False))
        assert names(tmp_path) == ["backup.weights.h5"]
        assert (tmp_path / "backup.weights.h5").read_bytes() == good
        errors.pop()


@pytest.mark.once
def test_hdf5_does_not_begin_a_file_that_the_disk_has_no_room_for(tmp_path, monkeypatch):
    """It would end the process by a segmentation fault."""
    model, x = compiled_model(), images(8)
    model.fit(x, verbose=0)
    model.save_weights(tmp_path / "a.weights.h5")
    good = (tmp_path / "a.weights.h5").read_bytes()
    free = SimpleNamespace(total=10**9, free=len(good) - 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
    with pytest.raises(OSError, match=r"MB are needed, and .* are free"):
        model.save_weights(tmp_path / "a.weights.h5")
    with pytest.warns(UserWarning, match=r"training goes on: .*MB are needed"):
        model.fit(x, verbose=0, callbacks=[BackupCallback(tmp_path, delete_checkpoint=False)])
    assert names(tmp_path) == ["a.weights.h5"]
    assert (tmp_path / "a.weights.h5").read_bytes() == good


@pytest.mark.once
def test_what_is_no_backup_is_an_error(model, tmp_path):
    (tmp_path / "backup.weights.h5").write_bytes(b"\x89HDF")
    with pytest.raises(ValueError, match=r"backup.weights.h5: not a whole backup; to begin anew, remove it"):
        fit(model, BackupCallback(tmp_path))
    model.save_weights(tmp_path / "backup.weights.h5")
    with pytest.raises(ValueError, match="not a whole backup"):
        fit(model, BackupCallback(tmp_path))


@pytest.mark.once
@pytest.mark.parametrize("save_freq", [0, 2.5, "batch", True, None])
def test_a_backup_has_a_frequency(tmp_path, save_freq):
    with pytest.raises(ValueError, match=f'"epoch", or a whole number of steps; received: {save_freq!r}'):
        BackupCallback(tmp_path, save_freq)
