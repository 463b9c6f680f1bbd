"""The examples that are quick enough to run, and the pages that they write."""

import re
import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """Runs a script as from the command line, but in this process, which has imported what it needs.

    What is long in it is replaced by what is short.
    """

    def run(name: str, *arguments: str, shorter: tuple = ()) -> str:
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        monkeypatch.syspath_prepend(str((EXAMPLES / name).parent))
        script = EXAMPLES / name
        if shorter:
            code = script.read_text(encoding="utf-8")
            for long, short in shorter:
                assert long in code
                code = code.replace(long, short)
            script = tmp_path / script.name
            script.write_text(code, encoding="utf-8")
        runpy.run_path(str(script), run_name="__main__")
        return capsys.readouterr().out

    return run


@pytest.mark.once
def test_the_catalogue_is_up_to_date():
    sys.path.append(str(EXAMPLES))
    from catalogue import PAGE, catalogue

    assert PAGE.read_text(encoding="utf-8") == catalogue(), "run `python examples/catalogue.py`"


@pytest.mark.data
@pytest.mark.once  # two minutes of compilation elsewhere; what it uses is tested on each backend
def test_keras_howto(tmp_path, monkeypatch):
    """Each block of the page, one after the other."""
    monkeypatch.chdir(tmp_path)
    page, names = (EXAMPLES / "keras_howto.md").read_text(encoding="utf-8"), {}
    for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        exec(block, names)
    assert names["samples"].shape == (4, 8, 8, 3)


@pytest.mark.once  # test_compositions.py trains them on every backend
def test_recipes(run, tmp_path):
    pytest.importorskip("matplotlib")
    output = run("recipes.py", "--steps", "20", "--only", "Rectified flow", "--out", str(tmp_path / "recipes.png"))
    assert "Rectified flow" in output
    assert (tmp_path / "recipes.png").stat().st_size > 10_000


@pytest.mark.data
@pytest.mark.once
def test_the_architectures():
    sys.path.append(str(EXAMPLES))
    from architectures import architectures

    from kdiff.networks import parameters

    for name, make in architectures(10).items():
        assert 5e5 < parameters(make(), (28, 28, 1)) < 2e6, name


@pytest.mark.data
@pytest.mark.once  # minutes of compilation elsewhere; what it uses is tested on each backend
def test_a_model_is_trained_measured_and_edits(run, tmp_path):
    small = ("--dataset", "digits", "--image-size", "16")
    out = ("--out", str(tmp_path))
    fewer = (("steps=20", "steps=2"), ("epochs = 10", "epochs = 1"), ("epochs=3", "epochs=1"))
    size = ("--steps", "3", "--width", "8", "--samples", "10")
    output = run("class_conditional.py", *small, *size, *out, shorter=fewer)
    assert "of the real test images" in output
    assert len([line for line in output.splitlines() if line.endswith("0%")]) == 10
    run("edit.py", str(tmp_path / "model.keras"), "--dataset", "digits", "--steps", "3", *out)
    for name in ("classes-by-scale.png", "loss.png", "edits.png"):
        assert (tmp_path / name).stat().st_size > 5_000


@pytest.mark.data
@pytest.mark.once  # minutes of compilation elsewhere; what it uses is tested on each backend
def test_text_to_image(run, tmp_path):
    first = ("--minutes", "0.01", "--batch-size", "8", "--width", "8", "--test", "6", "--out", str(tmp_path))
    fewer = (("steps=20", "steps=2"), ("steps_per_epoch=50", "steps_per_epoch=2"))
    assert "the right colours" in run("text_to_image.py", "a small blue triangle", *first, shorter=fewer)
    again = ("--model", str(tmp_path / "model.keras"))
    assert "prompts.png" in run("text_to_image.py", *again, *first, shorter=fewer)


@pytest.mark.data
@pytest.mark.once  # minutes of compilation elsewhere; what it uses is tested on each backend
@pytest.mark.parametrize(
    ("script", "page", "options"),
    [
        pytest.param("speed", "table.md", (), marks=pytest.mark.thorough),
        pytest.param("kernels", "kernels.md", (), marks=pytest.mark.thorough),
        ("kernels", "kernels.md", ("--backends", "torch")),
    ],
)
def test_the_benchmarks(run, script, page, options, tmp_path):
    pytest.importorskip("diffusers")
    run(f"benchmarks/{script}.py", "--toy", *options, "--out", str(tmp_path))
    rows = [line for line in (tmp_path / page).read_text().splitlines() if "kdiff" in line]
    assert len(rows) > 3
    assert (tmp_path / f"{'results' if script == 'speed' else script}.json").stat().st_size > 1_000


@pytest.mark.data
@pytest.mark.once
def test_wavelets_beside_pixels(run, tmp_path):
    run("benchmarks/wavelets.py", "--toy", "--out", str(tmp_path))
    rows = (tmp_path / "wavelets.md").read_text().splitlines()
    assert len([row for row in rows if "Haar(" in row]) == 3


@pytest.mark.data
@pytest.mark.once
@pytest.mark.thorough
def test_latent_diffusion(run, tmp_path):
    small = ("--image-size", "16", "--widths", "4", "8", "8", "--width", "64", "--depth", "1", "--batch-size", "16")
    short = ("--autoencoder-minutes", "0.001", "--minutes", "0.001", "--out", str(tmp_path))
    assert "times as long" in run("latent_diffusion.py", "digits", *small, *short)
    for name in ("reconstructions.png", "samples.png", "loss.png"):
        assert (tmp_path / name).stat().st_size > 5_000


@pytest.mark.once  # minutes of compilation elsewhere; what it uses is tested on each backend
def test_finetune(run, tmp_path):
    pytest.importorskip("PIL")
    small = ("--base-minutes", "0.001", "--width", "8", "--steps", "2", "--out", str(tmp_path))
    assert "The loss on the pictures was" in run("finetune.py", *small)
    tuned = ("--model", str(tmp_path / "base.keras"), "--control", "edges", *small)
    assert "with them have" in run("finetune.py", *tuned)
    for name in ("lora.png", "edges.png", "pictures.png"):
        assert (tmp_path / name).stat().st_size > 1_000
