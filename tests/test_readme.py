"""What the README and the pages that it links show is run, so that it stays true."""

import re
from pathlib import Path

import keras
import numpy as np
import pytest

import kdiff

ROOT = Path(__file__).parents[1]


def blocks(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL)


def shortened(code: str, **shorter: str) -> str:
    for long, short in shorter.items():
        assert long in code, long
        code = code.replace(long, short)
    return code


def drawn_data() -> dict:
    generator = np.random.default_rng(0)
    images = generator.uniform(-1, 1, (32, 16, 16, 3)).astype("float32")
    labels = generator.integers(0, 10, 32)
    return {"keras": keras, "kdiff": kdiff, "images": images, "captions": ["a hat"] * 32, "labels": labels}


def test_links():
    """Of the README and the pages, to files that exist."""
    for page in [ROOT / "README.md", *sorted((ROOT / "examples").glob("*.md"))]:
        for link in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
            assert "://" in link or (page.parent / link).exists(), (page.name, link)


@pytest.mark.once
def test_few_steps(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    teacher = kdiff.DiffusionModel(kdiff.networks.UNet.residual(8, levels=1, depth=1), "cosine", "velocity")
    teacher.build((None, 16, 16, 3))
    teacher.save("teacher.keras")
    names = drawn_data()
    exec(shortened(blocks("examples/few_steps.md")[0], **{"epochs=20": "epochs=1"}), names)
    assert names["pictures"].shape == (16, 16, 16, 3)


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
    names = {}
    exec(shortened(blocks("README.md")[0], **shorter), names)
    assert names["threes"].shape == names["same"].shape == (16, 16, 16, 1)
    assert (tmp_path / "digits.keras").exists()
    assert (tmp_path / "schedule.png").exists()
    assert list((tmp_path / "runs/digits").glob("*.png"))


@pytest.mark.once  # more than a minute of compilation elsewhere; what it uses is tested on each backend
def test_conditions_guidance_editing():
    names = drawn_data()
    (block,) = (block for block in blocks("README.md") if "Inpaint" in block)
    block = block.replace("epochs=10", "epochs=1").replace("model.sample(4, ", "model.sample(4, steps=2, ")
    exec(block.replace("label=9)  # and", "label=9, steps=2)  # and"), names)
    assert names["boots"].shape == (4, 16, 16, 3)
    assert names["noise"].shape == (2, 16, 16, 3)


@pytest.mark.data
@pytest.mark.once  # as above
def test_guidance_page():
    names = drawn_data()
    conditions, editing, latents = blocks("examples/guidance.md")
    exec(conditions.replace("model.sample(4, ", "model.sample(4, steps=2, "), names)
    editing = shortened(editing, **{"steps=50": "steps=3", "length=10, repeats=5": "length=1, repeats=2"})
    exec(editing.replace(", **hat)", ", steps=2, **hat)"), names)
    assert names["noise"].shape == (2, 16, 16, 3)
    names["images"] = np.random.default_rng(0).integers(0, 256, (64, 32, 32, 3)).astype("uint8")
    latents = shortened(latents, **{"(32, 64, 64)": "(4, 8, 8)", "epochs=20": "epochs=1", "epochs=50": "epochs=1"})
    exec(latents.replace("sample(4)", "sample(4, steps=2)"), names)
    assert names["pictures"].shape == (4, 32, 32, 3)


@pytest.mark.once
def test_two_equations(tmp_path, monkeypatch):
    """Its asserts are those of the page."""
    pytest.importorskip("matplotlib")
    (tmp_path / "pictures").mkdir()
    monkeypatch.chdir(tmp_path)
    names = {}
    for block in blocks("examples/two_equations.md"):
        exec(block, names)
    assert {file.name for file in (tmp_path / "pictures").iterdir()} == {"schedules.png", "objectives.png"}


@pytest.mark.once
def test_objects():
    networks, functional = blocks("examples/objects.md")
    exec(networks, {})
    names = {}
    exec(functional, names)
    names["model"].build((None, 28, 28, 1))
    assert names["model"].sample(2, steps=2).shape == (2, 28, 28, 1)


@pytest.mark.data
@pytest.mark.once  # as above
@pytest.mark.parametrize("example", [0, 1])
def test_from_keras(example, tmp_path, monkeypatch):
    """The two that are trained from scratch, on the drawn shapes and with a small network."""
    monkeypatch.chdir(tmp_path)
    first, second, _ = blocks("examples/from_keras.md")
    smaller = {"epochs=50": "epochs=1", "residual(32,": "residual(8,", "steps=20)": "steps=2)", ", download=True": ""}
    load = {
        '"oxford_flowers102", image_size=64, batch_size=64': '"shapes", image_size=16, batch_size=4, split="test[:8]"'
    }
    fit = {"epochs=800": "epochs=1", "attention(64,": "attention(8,", '"all", ': '"trailing", 2, ', ", 20, ": ", 2, "}
    names = {}
    first = shortened(first, **smaller, **load).replace("callbacks=[", "callbacks=[][:0] and [")
    if example:
        first = first[: first.index("network = ")]
    exec(first, names)
    if example:
        exec(shortened(second, **fit), names)
    assert names["pictures"].shape == (16, 16, 16, 3)


@pytest.mark.once
def test_objects_of_ones_own():
    """They are defined, have names, and work with the rest."""
    names = {}
    for block in blocks("examples/extend.md"):
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
