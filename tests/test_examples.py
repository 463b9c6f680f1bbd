"""The examples that are quick enough to run, and the pages that they write."""

import re
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest

from kdiff import scenes
from tests.test_evaluation_efficientnet import drawn_state

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


def run_page(name: str, **shorter: str) -> dict:
    """What the blocks of a page define, run one after the other."""
    page, names = (EXAMPLES / name).read_text(encoding="utf-8"), {}
    for long, short in shorter.items():
        assert long in page
        page = page.replace(long, short)
    for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        exec(block, names)
    return names


@pytest.mark.once
@pytest.mark.parametrize("name", ["learn.py", "two_equations.md"])
def test_notebooks_are_up_to_date(name):
    pytest.importorskip("jupytext")
    sys.path.append(str(EXAMPLES))
    import nbformat
    from notebooks import notebook_of

    def cells(notebook):
        return [(cell.cell_type, cell.source) for cell in notebook.cells]

    written = nbformat.read((EXAMPLES / name).with_suffix(".ipynb"), nbformat.NO_CONVERT)
    assert cells(written) == cells(notebook_of(name)), "run `python examples/notebooks.py`"


@pytest.mark.data
@pytest.mark.once  # minutes of compilation elsewhere; what it uses is tested on each backend
def test_the_narrative_is_run(tmp_path, monkeypatch):
    """The notebook's cells, with one epoch and fewer steps."""
    nbformat = pytest.importorskip("nbformat")
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    notebook = nbformat.read(EXAMPLES / "learn.ipynb", nbformat.NO_CONVERT)
    assert "image/png" in str(notebook.cells)  # it was written with its pictures
    code = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "code")
    for long, short in {"EPOCHS = 16": "EPOCHS = 1", "steps=15": "steps=3", "(3, 5, 10, 20, 50)": "(2, 3)"}.items():
        assert long in code
        code = code.replace(long, short)
    names = {}
    exec(code, names)
    assert abs(float(names["by_hand"]) - names["by_model"]) < 0.1  # means over 256 pictures of other times and noise
    names = {path.name for path in (tmp_path / "runs/learn").iterdir()}
    assert names >= {"data.png", "forward.png", "steps.png", "samples.png", "errors.png", "few-steps.png", "loss.png"}


@pytest.mark.data
@pytest.mark.once  # two minutes of compilation elsewhere; what it uses is tested on each backend
def test_keras_howto(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run_page("keras_howto.md")["samples"].shape == (4, 8, 8, 3)


@pytest.mark.once  # minutes of compilation elsewhere; what it uses is tested on each backend
def test_five_systems():
    names = run_page("five_systems.md", **{"1000": "25"})
    for name in ("drawn", "quick", "between"):
        assert names[name].shape == (4, 16, 16, 3)
    for name in ("again", "hats", "large", "pictures", "variations"):
        assert names[name].shape == (2, 16, 16, 3)
    assert names["small"].shape == (2, 8, 8, 3)
    # DDIM draws no noise: from the ends of the arc come the two images again.
    np.testing.assert_allclose(names["between"][[0, -1]], names["again"], atol=1e-4)


@pytest.mark.once  # test_compositions.py trains them on every backend
def test_recipes(run, tmp_path):
    pytest.importorskip("matplotlib")
    output = run("recipes.py", "--steps", "20", "--only", "Rectified flow", "--out", str(tmp_path / "recipes.png"))
    assert "Rectified flow" in output
    assert (tmp_path / "recipes.png").stat().st_size > 10_000


@pytest.mark.once  # test_objectives_*.py train them on every backend
def test_few_steps(run, tmp_path):
    pytest.importorskip("matplotlib")
    small = ("--steps", "20", "--out", str(tmp_path))
    methods = ("--method", "ict", "consistency", "scm")
    output = run("few_steps.py", *methods, *small, shorter=(("256, 4, 5000", "16, 2, 100"),))
    names = ["ict", "teacher of noise levels", "consistency", "teacher of angles", "scm"]
    assert [line[:24].strip() for line in output.splitlines()[:5]] == names
    assert "| scm | " in output
    for name in ("samples", "distance"):
        assert (tmp_path / f"plane-{name}.png").stat().st_size > 10_000


@pytest.mark.data
@pytest.mark.once
def test_few_steps_of_digits(run, tmp_path):
    """A guided method; the second run takes the teacher of the first from its file."""
    pytest.importorskip("matplotlib")
    shorter = (('"digits", 8, 40', '"digits", 8, 1'), ("64, 2000", "16, 100"))
    options = ("--data", "digits", "--method", "lcm", "--steps", "8", "--out", str(tmp_path))
    output = run("few_steps.py", *options, shorter=shorter)
    kept = [line for line in output.splitlines() if line.startswith("| ")]
    assert [line.split("|")[1].strip() for line in kept[1:]] == ["data", "discrete teacher", "lcm", "lcm, guided"]
    assert "teacher" not in run("few_steps.py", *options, shorter=shorter).split("\n| ")[0]


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
    assert (tmp_path / "prompts.gif").stat().st_size > 1_000


@pytest.mark.once  # minutes of compilation elsewhere; what it uses is tested on each backend
def test_dalle2(run, tmp_path):
    pytest.importorskip("tokenizers")
    pytest.importorskip("PIL")
    small = ("--minutes", "0.001", "--pictures", "32", "--batch-size", "16", "--width", "16", "--steps", "2")
    output = run("dalle2.py", *small, "--test", "8", "--out", str(tmp_path))
    for said in ("Cosine similarity", "in pictures of true embeddings", "by the prior", "in variations of pictures"):
        assert said in output
    for name in ("decoded", "variations", "between", "edited"):
        assert (tmp_path / f"{name}.png").stat().st_size > 300


def t5_folder(folder, captions):
    """A small T5 with its tokenizer, as transformers has them in one folder."""
    sentencepiece = pytest.importorskip("sentencepiece")
    from kdiff.encoders import T5Text
    from kdiff.interop import encoders

    encoder = T5Text(128, width=8, depth=1, heads=2, head_width=4, hidden=12)
    encoder.build((None, None))
    encoders.save(encoder, folder)
    ids = {"bos_id": -1, "pad_id": 0, "eos_id": 1, "unk_id": 2, "pad_piece": "<pad>", "minloglevel": 2}
    with open(folder / "spiece.model", "wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(captions), model_writer=file, vocab_size=40, hard_vocab_limit=False, **ids
        )
    return folder


def captioned_folder(folder, count):
    """Pictures of 40 pixels, each with a caption beside it that is of no scene."""
    from PIL import Image

    folder.mkdir()
    for i, image in enumerate(scenes.dataset(count, 40)[0]):
        Image.fromarray(image).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"a face {i} years old", encoding="utf-8")
    return folder


@pytest.mark.once  # minutes of compilation elsewhere; what it uses is tested on each backend
@pytest.mark.parametrize(
    "words",
    [
        "learned",
        pytest.param("t5", marks=pytest.mark.thorough),
        pytest.param("folder", marks=[pytest.mark.data, pytest.mark.thorough]),
    ],
)
def test_imagen(run, tmp_path, words):
    pytest.importorskip("tokenizers")
    pytest.importorskip("PIL")
    pytest.importorskip("scipy")
    small = ("--minutes", "0.001", "--sizes", "8", "16", "32", "--pictures", "16", "--batch-size", "8", "--width", "32")
    small = (*small, "--steps", "1", "--test", "4", "--out", str(tmp_path))
    if words == "t5":
        small = (*small, "--t5", str(t5_folder(tmp_path / "t5", ["a small red circle on a black background"] * 4)))
    if words == "folder":
        small = (*small, "--folder", str(captioned_folder(tmp_path / "faces", 40)))
    output = run("imagen.py", *(() if words == "folder" else ("a small red circle",)), *small)
    assert ("32 pixels: of 4" in output) == (words != "folder")
    assert ("years old" in output) == (words == "folder")
    for said in ("8 to 16 pixels, level 0.05", "of the base: bicubic", "of the poor-base: bicubic", "without noise"):
        assert said in output
    for name in ("prompts-2", "levels-1", "levels-2", "augmentation"):
        assert (tmp_path / f"{name}.png").stat().st_size > 300
    assert (tmp_path / "imagen.keras").exists()


@pytest.mark.data
@pytest.mark.once
@pytest.mark.parametrize("ablate", [False, pytest.param(True, marks=pytest.mark.thorough)])
def test_quality(run, tmp_path, ablate):
    """Two recipes, or one and its changes, with features of random weights."""
    pytest.importorskip("sklearn")
    pytest.importorskip("safetensors")
    from safetensors.numpy import save_file

    save_file(drawn_state(), tmp_path / "features.safetensors")
    small = ("--minutes", "0.0001", "--evaluations", "2", "--samples", "8", "--reference", "16", "--bits", "2")
    small = (*small, "--features", str(tmp_path / "features.safetensors"), "--out", str(tmp_path))
    chosen = ("--ablate", "codec", "weighting") if ablate else ("--recipes", "kdiff", "keras")
    shorter = (("SIZE = 32", "SIZE = 16"), ("size=128", "size=32"), ("1000, sh", "100, sh"))
    shorter = (*shorter, ("residual(32", "residual(8"), ("sample(100", "sample(4"), ("// 100", "// 4"))
    run("quality.py", "digits", *chosen, *small, shorter=shorter)
    table = (tmp_path / "table.md").read_text().splitlines()
    names = ["kdiff", "codec pixels", "weighting min_snr", "weighting sigmoid"] if ablate else ["kdiff", "keras"]
    assert [row.split("|")[1].strip() for row in table[2:]] == [*names, "real pictures"]
    assert all("nan" not in row for row in table)
    bits = [float(row.split("|")[-2].split("+-")[0]) for row in table[2:-1]]
    assert all(1.0 < value < 15.0 for value in bits)  # of models that are hardly trained, all in pixels
    assert (tmp_path / "samples.png").stat().st_size > 1000


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


@pytest.mark.data
@pytest.mark.once
def test_emoji_and_their_captions(run, tmp_path):
    """Emoji on eight colours, one in eight kept for the test; a DiT on their pixels that draws those."""
    pytest.importorskip("tokenizers")
    from PIL import Image

    (tmp_path / "emoji").mkdir()
    for code, colour in ((0x1F431, "red"), (0x1F436, "green"), (0x1F41F, "blue"), (0x1F6AB, "black")):
        picture = Image.new("RGBA", (32, 32))
        picture.paste(colour, (4, 4, 28, 28))
        picture.save(tmp_path / f"emoji/emoji_u{code:x}.png")  # the last is no animal
    size = ("--image-size", "16")
    output = run("emoji.py", str(tmp_path / "emoji"), str(tmp_path / "set"), *size)
    assert "21 pictures in train, 3 in test" in output
    cat = np.asarray(Image.open(tmp_path / "set/train/cat face on white.png"))
    assert (cat[0, 0].tolist(), cat[8, 8].tolist()) == ([255, 255, 255], [255, 0, 0])
    small = (*size, "--width", "32", "--depth", "1", "--patch", "8", "--batch-size", "4", "--minutes", "0.001")
    output = run("latent_diffusion.py", str(tmp_path / "set"), "--captions", "--pixels", *small, "--out", str(tmp_path))
    assert "Of 3 samples for captions of test" in output
    for name in ("samples.png", "samples.gif", "nearest.png", "model.keras"):
        assert (tmp_path / name).exists()


@pytest.mark.once  # minutes of compilation elsewhere; what it uses is tested on each backend
def test_finetune(run, tmp_path):
    pytest.importorskip("PIL")
    small = ("--base-minutes", "0.001", "--width", "8", "--steps", "2", "--out", str(tmp_path))
    shorter = (("on_black(18000", "on_black(200"), ("on_black(300", "on_black(20"))
    shorter = (*shorter, ("2000 + 16", "32 + 16"), ("steps=20", "steps=2"))
    assert "The loss on the pictures was" in run("finetune.py", *small, shorter=shorter)
    tuned = ("--model", str(tmp_path / "base.keras"), "--control", "edges", *small)
    assert "with them have" in run("finetune.py", *tuned, shorter=shorter)
    for name in ("lora.png", "edges.png", "pictures.png"):
        assert (tmp_path / name).stat().st_size > 1_000
