"""What the README shows is run, so that it stays true."""

import re
from pathlib import Path

import pytest

BLOCKS = re.findall(r"```python\n(.*?)```", (Path(__file__).parents[1] / "README.md").read_text(), re.DOTALL)


@pytest.mark.data
@pytest.mark.once  # the quickstart, which is made of them, is run on each backend by .ci/run
def test_twenty_lines(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shorter = {
        "epochs=16": "epochs=1, steps_per_epoch=3",
        "every=4": "every=1, steps=2",
        "(16, label=3)": "(16, label=3, steps=2)",
        '"trailing", 100': '"trailing", 2',
        "steps=20": "steps=2",
    }
    code = BLOCKS[0]
    for long, short in shorter.items():
        assert long in code
        code = code.replace(long, short)
    names = {}
    exec(code, names)
    assert names["threes"].shape == names["same"].shape == (16, 16, 16, 1)
    assert (tmp_path / "digits.keras").exists()
    assert (tmp_path / "schedule.png").exists()
    assert list((tmp_path / "runs/digits").glob("*.png"))


@pytest.mark.once  # more than a minute of compilation elsewhere; what it uses is tested on each backend
def test_conditions_and_editing():
    import keras
    import numpy as np

    import kdiff

    generator = np.random.default_rng(0)
    images = generator.uniform(-1, 1, (32, 16, 16, 3)).astype("float32")
    names = {"keras": keras, "kdiff": kdiff, "np": np, "images": images, "captions": ["a hat"] * 32}
    names["labels"] = generator.integers(0, 10, 32)
    (conditions,) = (block for block in BLOCKS if "TextEncoder" in block)
    (editing,) = (block for block in BLOCKS if "Inpaint(photo, mask)" in block)
    exec(conditions.replace("model.sample(4, ", "model.sample(4, steps=2, "), names)
    editing = editing.replace("steps=50", "steps=3").replace("length=10, repeats=5", "length=1, repeats=2")
    editing = editing.replace(", **hat)", ", steps=2, **hat)")
    exec(editing, names)
    assert names["noise"].shape == (2, 16, 16, 3)


@pytest.mark.once
def test_networks():
    (block,) = (block for block in BLOCKS if "DiT.xl" in block)
    exec(block, {})


@pytest.mark.data
@pytest.mark.once
def test_latent_diffusion():
    import numpy as np

    import kdiff

    (block,) = (block for block in BLOCKS if "AutoencoderTrainer" in block)
    for long, short in {"(32, 64, 64)": "(4, 8, 8)", "epochs=20": "epochs=1", "epochs=50": "epochs=1"}.items():
        assert long in block
        block = block.replace(long, short)
    names = {"kdiff": kdiff, "images": np.random.default_rng(0).integers(0, 256, (64, 32, 32, 3)).astype("uint8")}
    exec(block.replace("sample(4)", "sample(4, steps=2)"), names)
    assert names["pictures"].shape == (4, 32, 32, 3)


@pytest.mark.once
def test_objects_of_ones_own():
    """They are defined, have names, and work with the rest."""
    import keras
    import numpy as np

    import kdiff

    names = {"keras": keras, "kdiff": kdiff}
    own = BLOCKS[[block.startswith("class Quadratic") for block in BLOCKS].index(True) :]
    for block in own:
        exec(block, names)
    network = names["network"]
    model = kdiff.DiffusionModel(network, schedule="quadratic", ema=None)
    model.build((None, 4, 4, 1))
    network.head.kernel.assign(np.random.default_rng(0).standard_normal(network.head.kernel.shape))
    euler = model.sample(2, sampler="plain_euler", steps=5)
    # Song et al. 2021, eq. 14: DDIM is Euler's method in sigma / alpha.
    np.testing.assert_allclose(euler, model.sample(2, sampler="ddim", steps=5), atol=1e-3)
    data = kdiff.analytic.GaussianMixture([[-1.0, 0.0], [1.0, 0.0]], 0.01)
    sampler = kdiff.Sampler("dpm_solver_pp", "uniform_log_snr", steps=20, guidance="restraint")
    x = keras.ops.convert_to_numpy(sampler(data.conditional(np.ones(8, "int32")), kdiff.schedules.Cosine(), (8, 2)))
    assert (x[:, 0] > 0.5).all()
