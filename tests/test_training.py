"""Training that is broken off: the model is as it was, or as the last whole step left it, and can be saved."""

import os
import signal
import subprocess
import sys

import keras
import numpy as np
import pytest
from keras import layers, ops

import kdiff
from kdiff.backend import BACKEND
from tests.toys import draw_weights, numpy

X = np.random.default_rng(0).uniform(-1, 1, (8, 3)).astype("float32")


class Faulty(keras.optimizers.Adam):
    """Sends Ctrl-C while it is built, when Keras calls it `built` already."""

    def add_optimizer_variables(self, *args, **kwargs):
        interrupt()
        return super().add_optimizer_variables(*args, **kwargs)


class Batches(keras.utils.PyDataset):
    """Two batches, of which the one numbered `bad` is not a number, or cannot be read."""

    def __init__(self, bad, readable):
        super().__init__()
        self.bad, self.readable = bad, readable

    num_batches = 2

    def __getitem__(self, index):
        if index == self.bad and not self.readable:
            raise OSError("the disk is gone")
        return np.full_like(X, np.nan) if index == self.bad else X


def interrupt():
    os.kill(os.getpid(), signal.SIGINT)


@pytest.fixture(autouse=True)
def interruptible():
    """A process that a shell started in the background ignores Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def fail():
    raise RuntimeError("out of luck")


def made(loss="mse", optimizer=None):
    point, time = keras.Input((3,), name="image"), keras.Input((), name="time")
    hidden = layers.Dense(4, "tanh")(ops.concatenate([point, time[:, None] / 1000.0], -1))
    network = draw_weights(keras.Model({"image": point, "time": time}, layers.Dense(3)(hidden)))
    model = kdiff.DiffusionModel(network, codec="identity")
    model.compile(optimizer or keras.optimizers.Adam(1e-2), loss)
    return model


def state(model):
    variables = (*model.network.variables, *model.ema_weights.variables, *model.optimizer.variables)
    return [numpy(variable) for variable in variables]


def assert_whole(model, before, steps, path):
    """The state is the one before, or one after so many more steps of all its parts, and can be saved."""
    assert int(numpy(model.ema_weights.updates)) == int(numpy(model.optimizer.iterations))
    if steps == 0:
        for now, then in zip(state(model), before, strict=True):
            np.testing.assert_array_equal(now, then)
    model.save(path / "model.keras")


def test_a_batch_that_is_refused_or_cannot_be_read(tmp_path):
    """The steps that came before it are made, as fit makes them; evaluate changes nothing."""
    model = made()
    model.fit(X, verbose=0)
    for method, options in (("fit", {"shuffle": False}), ("evaluate", {})):
        for bad, readable, error in ((0, True, ValueError), (1, False, OSError)):
            before, steps = state(model), int(numpy(model.optimizer.iterations))
            with pytest.raises(error, match="finite" if readable else "disk"):
                getattr(model, method)(Batches(bad, readable), verbose=0, **options)
            more = int(numpy(model.optimizer.iterations)) - steps
            assert more == 0 or (more, method) == (bad, "fit")  # TensorFlow reads ahead
            assert_whole(model, before, more, tmp_path)
    assert np.isfinite(model.fit(X, verbose=0).history["loss"]).all()


def at_run(action):
    """0, of a graph that does this whenever it runs."""
    if BACKEND == "torch":
        action()
        return 0.0
    zero = lambda *_: action() or np.float32(0)  # noqa: E731
    if BACKEND == "jax":
        import jax

        return jax.pure_callback(zero, jax.ShapeDtypeStruct((), "float32"))
    import tensorflow as tf

    return tf.ensure_shape(tf.numpy_function(zero, [], tf.float32), ())


def test_a_step_that_is_interrupted_or_fails(tmp_path):
    """An interrupt waits for the end of the step; on TensorFlow of its trace, which then is not run."""
    faults, passed = {}, []

    def loss(y, output):
        faults.get("trace", int)()
        passed.append(True)
        return ops.mean(ops.square(y - output), -1) + at_run(lambda: faults.get("run", int)() and None)

    model = made(loss)
    model.fit(X, verbose=0)
    for when, action, rows in (("run", interrupt, 8), ("run", fail, 8), ("trace", interrupt, 6), ("trace", fail, 5)):
        if (BACKEND, when, action) == ("tensorflow", "run", fail):
            continue  # a graph assigns what does not depend on the operation that fails
        before, faults[when] = state(model), action
        passed.clear()
        model.train_function = None
        with pytest.raises(KeyboardInterrupt if action is interrupt else Exception, match=r"luck|^$"):
            model.fit(X[:rows], verbose=0)  # JAX traces another size anew
        faults.clear()
        assert passed or when == "run" or action is fail
        whole = action is interrupt and (when == "run" or BACKEND != "tensorflow")
        assert_whole(model, before, whole, tmp_path)
    assert np.isfinite(model.fit(X, verbose=0).history["loss"]).all()


def test_an_interrupt_while_the_optimizer_is_built():
    model = made(optimizer=Faulty(1e-2))
    with pytest.raises(KeyboardInterrupt):
        model.fit(X, verbose=0)
    model.fit(X, verbose=0)


def test_the_second_interrupt_does_not_wait():
    reached = []

    @kdiff.backend.uninterrupted
    def long():
        interrupt()
        reached.append(1)
        interrupt()
        reached.append(2)

    with pytest.raises(KeyboardInterrupt):
        long()
    assert reached == [1]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


REPLICAS = """
import keras, numpy, tensorflow as tf
from kdiff import DiffusionModel
from kdiff.networks import MLP

cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
x = numpy.zeros((8, 3), "float32")
with strategy.scope():
    model = DiffusionModel(MLP(8, 1), codec="identity")
    model.compile("adam", "mse")
parts = lambda values: [numpy.asarray(value) for value in strategy.experimental_local_results(values)]
model.fit(x, batch_size=4, verbose=0)
assert int(parts(model.optimizer.iterations.value)[0]) == 2
target = strategy.run(tf.function(lambda: model(tf.zeros((2, 3))).target))
one, other = parts(target)
assert not numpy.intersect1d(one, other).size, "both replicas draw the same noise"
"""


@pytest.mark.thorough
@pytest.mark.skipif(BACKEND != "tensorflow", reason="replicas are TensorFlow's")
def test_replicas_draw_noise_of_their_own():
    """MirroredStrategy on two virtual CPUs, which must be set before TensorFlow starts; `fit` outside of the scope."""
    subprocess.run([sys.executable, "-c", REPLICAS], check=True)
