"""The three backends side by side: the same numbers from the same seed, and models that go from one to another.

Each backend runs this file's `main` in a process of its own and leaves its results in a folder; the tests compare them.
"""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

BACKENDS = ("tensorflow", "jax", "torch")
SAVED_ON = {"jax": "tensorflow", "torch": "jax", "tensorflow": "torch"}  # each saves, and each loads another's model
missing = [name for name in BACKENDS if find_spec(name) is None]
pytestmark = pytest.mark.skipif(bool(missing), reason=f"needs all three backends; not installed: {missing}")


def main(phase: str, folder: Path) -> None:
    import keras
    import numpy as np

    import kdiff

    name = keras.backend.backend()
    x = np.load(folder / "x.npy")

    def go_on(model):
        return {
            "samples": model.sample(3, steps=4, label=[0, 1, 2]),
            "evaluation": model.evaluate(x, LABELS, batch_size=8),
            "losses": model.fit(x, LABELS, epochs=2, batch_size=8, shuffle=False).history["loss"],
        }

    if phase == "load":
        saved = SAVED_ON[name]
        np.savez(folder / f"{saved}-on-{name}.npz", **go_on(keras.saving.load_model(folder / f"{saved}.keras")))
        return

    from kdiff import random

    keras.utils.set_random_seed(3)
    network = kdiff.networks.UNet.attention(
        width=8, levels=1, depth=1, heads=2, conditions={"label": kdiff.blocks.LabelEmbedding(3, dropout=0.3)}
    )
    model = kdiff.DiffusionModel(network, "linear_beta", "velocity", times="discrete", weighting="min_snr", seed=11)
    model.compile(keras.optimizers.Adam(1e-3), metrics=["mae"])
    model.build({"image": x.shape, "label": LABELS.shape})
    initial = np.concatenate([keras.ops.convert_to_numpy(weight).ravel() for weight in network.weights])
    generator = np.random.default_rng(0)
    for weight in network.weights:
        weight.assign(0.1 * generator.standard_normal(weight.shape))
    model.reset_ema()
    history = model.fit(x, LABELS, epochs=3, batch_size=8, shuffle=False, validation_data=(x, LABELS)).history
    model.save(folder / f"{name}.keras")
    measured = kdiff.guidance.PiGDM("downsample", np.zeros((4, 4, 2)), 0.1, iterations=1)
    rules = [kdiff.guidance.ClassifierFree(2.0), measured]
    np.savez(
        folder / f"{name}.npz",
        initial=initial,
        normal=random.normal(random.key_of(5), (4, 3, 3, 2)),
        uniform=random.uniform(random.key_of(5), (4, 7)),
        keys=random.fold_in(random.key_of(2**40 + 3), np.arange(6), random.STEPS),
        times=kdiff.times.Stratified()(model.schedule, 16, random.key_of(1)),
        ddim=model.sample(3, sampler="ddim", steps=5, label=[0, 1, 2]),
        ddpm=model.sample(3, sampler="ddpm", steps=5, label=[0, 1, 2]),
        guided=model.sample(3, sampler="ddpm", steps=5, guidance=rules, label=[0, 1, 2]),
        redrawn=model.sample(3, sampler="ddim", steps=5, image=x[:3], strength=0.6, label=[0, 1, 2]),
        inverted=model.invert(x[:3], sampler="ddim", steps=5, iterations=2, label=[0, 1, 2]),
        evaluation=model.evaluate(x, LABELS, batch_size=8),
        **{metric: np.array(values) for metric, values in history.items()},
    )
    np.savez(folder / f"{name}-on-{name}.npz", **go_on(model))

    sys.path.append(str(Path(__file__).parents[1]))  # the last: kdiff is the one that is tested
    from tests.toys import compiled_run

    data = kdiff.analytic.GaussianMixture([[-1.0, 0.0], [1.0, 0.5]], 0.1)
    runs = {}
    for kind in kdiff.solvers.Solver.names().values():
        if kind.__module__.startswith("kdiff.") and not kind().learned and kind is not kdiff.solvers.DDIMInversion:
            sampler = kdiff.Sampler(kind(), "uniform_log_snr", steps=6)
            x = compiled_run(sampler, kdiff.schedules.Cosine(), (3, 2), data)
            runs[kind.__name__] = keras.ops.convert_to_numpy(x)
    np.savez(folder / f"{name}-solvers.npz", **runs)


LABELS = None
if __name__ == "__main__":
    import numpy as np

    LABELS = np.arange(16, dtype="int32") % 3
    main(sys.argv[1], Path(sys.argv[2]))


def run(phase: str, folder: Path) -> None:
    """The three backends at once, for most of it is compiling, with the kdiff that is tested here."""
    import kdiff

    runs = {}
    for backend in BACKENDS:
        environment = {**os.environ, "KERAS_BACKEND": backend, "PYTHONPATH": str(Path(kdiff.__file__).parents[1])}
        command = [sys.executable, __file__, phase, str(folder)]
        runs[backend] = subprocess.Popen(
            command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
    errors = {backend: process.communicate()[1] for backend, process in runs.items()}
    for backend, process in runs.items():
        assert process.returncode == 0, f"{backend}: {errors[backend][-4000:]}"


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    import numpy as np

    folder = tmp_path_factory.mktemp("backends")
    np.save(folder / "x.npy", np.random.default_rng(0).uniform(-1, 1, (16, 8, 8, 2)).astype("float32"))
    run("train", folder)
    run("load", folder)
    return {file.stem: dict(np.load(file)) for file in folder.glob("*.npz")}


PAIRS = [("jax", "tensorflow"), ("jax", "torch")]


@pytest.mark.parametrize(("a", "b"), PAIRS)
def test_one_seed_gives_the_same_random_numbers(results, a, b):
    import numpy as np

    np.testing.assert_array_equal(results[a]["initial"], results[b]["initial"])
    np.testing.assert_array_equal(results[a]["keys"], results[b]["keys"])
    np.testing.assert_array_equal(results[a]["uniform"], results[b]["uniform"])
    np.testing.assert_array_equal(results[a]["times"], results[b]["times"])
    # log, cos and sin differ in their last bit.
    np.testing.assert_allclose(results[a]["normal"], results[b]["normal"], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("a", "b"), PAIRS)
def test_the_same_losses(results, a, b):
    import numpy as np

    for name in ("loss", "mae", "val_loss", "val_mae", "evaluation"):
        # Three epochs of Adam, whose first steps have the sign of the gradient, multiply rounding errors.
        np.testing.assert_allclose(results[a][name], results[b][name], rtol=2e-5)


@pytest.mark.parametrize(("a", "b"), PAIRS)
@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "guided", "redrawn", "inverted"])
def test_the_same_samples(results, a, b, sampler):
    import numpy as np

    assert results[a][sampler].std() > 0.1
    np.testing.assert_allclose(results[a][sampler], results[b][sampler], atol=5e-4)


@pytest.mark.parametrize(("a", "b"), PAIRS)
def test_the_same_samples_of_every_solver(results, a, b):
    """Compiled where the backend compiles: what is a law of solvers on one backend is one on all."""
    import numpy as np

    here, there = results[f"{a}-solvers"], results[f"{b}-solvers"]
    assert here.keys() == there.keys()
    assert len(here) > 20
    for name, samples in here.items():
        assert samples.std() > 0.1
        size = max(1.0, np.abs(samples).max())  # six steps of the SDE's noise form amplify
        np.testing.assert_allclose(samples, there[name], atol=1e-4 * size, err_msg=name)


@pytest.mark.parametrize("loaded", BACKENDS)
def test_a_model_saved_on_one_backend_goes_on_another(results, loaded):
    """As the model itself goes on, on the backend that it was saved on."""
    import numpy as np

    saved = SAVED_ON[loaded]
    there, here = results[f"{saved}-on-{loaded}"], results[f"{saved}-on-{saved}"]
    np.testing.assert_allclose(there["samples"], here["samples"], atol=1e-5)
    np.testing.assert_allclose(there["evaluation"], here["evaluation"], rtol=1e-5)
    np.testing.assert_allclose(there["losses"], here["losses"], rtol=2e-5)
