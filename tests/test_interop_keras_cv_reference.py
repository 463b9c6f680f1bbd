"""KerasCV's own models of Stable Diffusion, with fewer channels, and the files that they write, old and new."""

import functools
import importlib.util
import re
import sys
from pathlib import Path
from unittest import mock

import keras
import numpy as np
import pytest
from keras import ops
from keras.src.legacy.saving import legacy_h5_format

from kdiff.interop import autoencoders, keras_cv, prompts
from tests.test_encoders_tokenizers import MERGES, WORDS

pytestmark = [pytest.mark.reference, pytest.mark.filterwarnings("ignore")]
if importlib.util.find_spec("keras_cv") is None:
    pytest.skip("KerasCV is not installed", allow_module_level=True)
pytest.importorskip("tokenizers")
h5py = pytest.importorskip("h5py")

from kdiff.encoders import JSONTokenizer  # noqa: E402

LENGTH = 8
X = np.random.default_rng(0).standard_normal((2, 8, 8, 4)).astype("float32")
LATENTS = X / np.float32(0.18215)  # of the autoencoder itself: a codec clips what it decodes
TIMES = np.array([7.0, 981.0], "float32")
TEXTS = ["a red cat", ""]
# Its sources with few channels: heads of version 2 have 64, or as many as there are.
SMALL = {"320": "32", "640": "64", "1280": "128", "40": "4", "80": "8", "160": "16", "768": "128"}
AUTOENCODER = {"128": "32", "256": "64", "512": "128"}
HEADS = {"(5, 64,": "(1, 32,", "(10, 64,": "(1, 64,", "(20, 64,": "(2, 64,", "(768, 12,": "(768, 2,"}
DEPTH = {"range(12)": "range(2)", "range(23)": "range(1)"}
# Stable Diffusion's own numbers, where KerasCV has others: see `kdiff.interop.keras_cv`.
NORM = "self.norm = keras.layers.GroupNormalization(epsilon=1e-5)"
EXACT = {
    NORM: NORM.replace("1e-5", "1e-6"),
    "return x * 0.5 * gate * (1 + tanh_res)": "return x * keras.activations.gelu(gate, approximate=False)",
    "activation=ops.gelu)": "activation=lambda x: ops.gelu(x, approximate=False))",
}


def classes(names, numbers, exact):
    """The classes of modules of KerasCV, with these numbers in place of its own, without the import of all KerasCV."""
    folder = Path(importlib.util.find_spec("keras_cv").origin).parent / "src" / "models" / "stable_diffusion"
    source = "\n".join((folder / f"{name}.py").read_text(encoding="utf-8") for name in ("padded_conv2d", *names))
    source = re.sub(r"from keras_cv\S* import (\([^)]*\)|.*)", "", source)
    source = re.sub(r"@keras_cv_export.*", "", source)
    for theirs, ours in {**HEADS, **DEPTH, **exact}.items():
        source = source.replace(theirs, ours)
    source = re.sub(r"(?<![\w.])\d+(?![\w.])", lambda found: numbers.get(found[0], found[0]), source)
    space = {"keras": keras, "ops": ops}
    exec(source, space)
    return space


def perturbed(model):
    generator = np.random.default_rng(0)
    for weight in model.weights:
        scale = 0.05 if weight.ndim > 1 else 0.2
        weight.assign(ops.convert_to_numpy(weight) + scale * generator.standard_normal(weight.shape))
    return model


def parts(version, exact=EXACT, names=("text", "unet", "decoder", "encoder")):
    """The models of these file names."""
    two = "V2" if version == 2 else ""
    text = classes(["text_encoder"], SMALL, exact)[f"TextEncoder{two}"]
    unet = classes(["diffusion_model"], SMALL, exact)[f"DiffusionModel{two}"]
    epsilon = {"epsilon=1e-5": "epsilon=1e-6"} if exact else {}
    halves = classes(["resnet_block", "attention_block", "decoder", "image_encoder"], AUTOENCODER, epsilon)
    none = {"download_weights": False}
    made = {
        "text": lambda: text(LENGTH, len(WORDS), **none),
        "unet": lambda: unet(64, 64, LENGTH, **none),
        "decoder": lambda: halves["Decoder"](64, 64, **none),
        "encoder": lambda: halves["ImageEncoder"](**none),
    }
    return {name: perturbed(made[name]()) for name in names}


def written(models, folder, old):
    """The paths of the files, of Keras 2's form or of Keras 3's."""
    paths = []
    for name, model in models.items():
        paths.append(folder / (f"{name}.h5" if old else f"{name}.weights.h5"))
        if old:
            with h5py.File(paths[-1], "w") as file:
                legacy_h5_format.save_weights_to_hdf5_group(file, model)
        else:
            model.save_weights(paths[-1])
    return paths


def waves(times):
    frequencies = np.exp(-np.log(10000) * np.arange(16) / 16)
    angles = times[:, None] * frequencies
    return np.concatenate([np.cos(angles), np.sin(angles)], 1).astype("float32")


def close(found, wanted, tolerance=1e-5):
    found, wanted = (ops.convert_to_numpy(ops.stop_gradient(ops.convert_to_tensor(one))) for one in (found, wanted))
    assert found.shape == wanted.shape
    assert np.abs(found - wanted).max() < tolerance * np.abs(wanted).max()


THOROUGH = functools.partial(pytest.param, marks=pytest.mark.thorough)


@pytest.mark.once  # KerasCV's own U-Net takes minutes of compilation on JAX; it passed there and on TensorFlow
@pytest.mark.parametrize("form", ["v1_keras_2", "v2_keras_3", *map(THOROUGH, ["v2_keras_2", "v1_keras_3"])])
def test_each_part_gives_what_it_gives_there(form, tmp_path):
    version, old = int(form[1]), form.endswith("2")
    models = parts(version)
    paths = written(models, tmp_path, old)
    model = keras_cv.load(*reversed(paths), tokenizer=JSONTokenizer.clip(WORDS, MERGES, LENGTH))
    prompt = prompts.prompt_of(model.network)
    tokens = prompt.tokenizers[0](TEXTS)
    context = ops.convert_to_numpy(models["text"]([tokens, np.arange(LENGTH, dtype="int32")[None]]))
    rows = prompt.prepare(TEXTS)
    close(rows, context)
    output = model.network({"image": X, "time": TIMES, "text": rows})
    close(output, models["unet"]([X, waves(TIMES), context]))
    close(model.codec.autoencoder.decode(ops.convert_to_tensor(LATENTS)), models["decoder"](X))
    images = np.random.default_rng(1).uniform(-1, 1, (1, 16, 16, 3)).astype("float32")
    close(model.codec.encode(ops.convert_to_tensor(images)), models["encoder"](images))
    if old and version == 1:
        y = model.sample(1, text="a red cat", steps=2, guidance=3.0, height=64, width=64)
        assert np.isfinite(y).all()
        codec = autoencoders.original(keras_cv.read(paths[2], paths[3]))
        close(codec.autoencoder.decode(ops.convert_to_tensor(LATENTS)), models["decoder"](X))
        assert "context" in keras_cv.load(paths[1]).shapes


@pytest.mark.once
def test_its_approximations_are_all_that_differs(tmp_path):
    models = parts(1, {}, ["unet"])
    model = keras_cv.load(*written(models, tmp_path, True))
    context = np.random.default_rng(2).standard_normal((2, LENGTH, 128)).astype("float32")
    output = model.network({"image": X, "time": TIMES, "context": context})
    close(output, models["unet"]([X, waves(TIMES), context]), 5e-3)


@pytest.mark.once
def test_errors(tmp_path):
    text, unet, decoder, encoder = written(parts(1), tmp_path, False)
    with pytest.raises(ValueError, match=r"must be the diffusion model; received: \['text encoder'\]"):
        keras_cv.load(text)
    with pytest.raises(ValueError, match="the autoencoder needs the files of"):
        keras_cv.load(unet, decoder)
    with pytest.raises(ValueError, match="needs the file of the text encoder"):
        keras_cv.load(unet, tokenizer=JSONTokenizer.clip(WORDS, MERGES, LENGTH))
    with pytest.raises(ValueError, match="are both of the decoder"):
        keras_cv.load(decoder, encoder, decoder)
    (tmp_path / "damaged.h5").write_bytes(unet.read_bytes()[:500])
    with pytest.raises(ValueError, match="not a complete HDF5 file"):
        keras_cv.load(tmp_path / "damaged.h5")
    other = keras.Sequential([keras.layers.Input((2,)), keras.layers.Dense(3)])
    other.save_weights(tmp_path / "other.weights.h5")
    with pytest.raises(ValueError, match=r"must be one of \['diffusion model'.*'dense': 1"):
        keras_cv.load(tmp_path / "other.weights.h5")
    with pytest.raises(ValueError, match="no such file"):
        keras_cv.load(tmp_path / "nothing.h5")


@pytest.mark.thorough
@pytest.mark.once
@pytest.mark.parametrize("version", [1, 2])
def test_at_the_published_size(version, tmp_path):
    """Of the text encoder and the diffusion model; about 8 GB."""
    two, none = "V2" if version == 2 else "", {"download_weights": False}
    with mock.patch.multiple(sys.modules[__name__], HEADS={}, DEPTH={}):
        models = {
            "unet": classes(["diffusion_model"], {}, {})[f"DiffusionModel{two}"](64, 64, 77, **none),
            "text": classes(["text_encoder"], {}, {})[f"TextEncoder{two}"](77, **none),
        }
    model = keras_cv.load(*written(models, tmp_path, True))
    context = np.random.default_rng(2).standard_normal((1, 77, 1024 if two else 768)).astype("float32")
    frequencies = TIMES[:1, None] * np.exp(-np.log(10000) * np.arange(160) / 160)
    time = np.concatenate([np.cos(frequencies), np.sin(frequencies)], 1).astype("float32")
    output = model.network({"image": X[:1], "time": TIMES[:1], "context": context})
    close(output, models["unet"]([X[:1], time, context]), 5e-3)
