"""Old names: they work, warn and name the new ones; files that were saved under them load."""

import importlib
import io
import json
import zipfile

import h5py
import keras
import numpy as np
import pytest

import kdiff
from kdiff import (
    blocks,
    deprecated,
    ema,
    evaluation,
    inversion,
    likelihood,
    lora,
    networks,
    objectives,
    reflow,
    schedules,
    tangents,
)
from kdiff.denoisers import Denoiser
from kdiff.encoders import t5
from kdiff.interop import diffusers, inversions, single_files
from kdiff.networks import MLP, UNet
from kdiff.students import student
from tests.toys import draw_weights, numpy

MOVED = [
    ("averages", "Averages", ema.EMA),
    ("averages", "Power", ema.Power),
    ("blocks", "Beside", blocks.Concat),
    ("blocks", "SteeredEmbedding", blocks.GuidanceEmbedding),
    ("blocks", "Resampler", blocks.PerceiverResampler),
    ("blocks", "SizeWaves", blocks.SizeEmbedding),
    ("encoders.t5", "RelativeBias", t5.RelativePositionBias),
    ("lora", "averages_of", lora.ema_of),
    ("networks", "Tiny", networks.AutoencoderTiny),
    ("networks.experts", "Experts", networks.experts.ExpertDenoisers),
    ("networks.unet", "WayDown", networks.unet.UNetEncoder),
    ("objectives", "Distillation", objectives.ProgressiveDistillation),
    ("objectives", "TangentConsistency", objectives.SCM),
    ("posthoc", "give", kdiff.posthoc.reconstruct),
    ("random", "fold", kdiff.random.fold_in),
    ("tangents", "Difference", tangents.FiniteDifference),
    ("tangents", "Forward", tangents.ForwardMode),
]


@pytest.mark.once
@pytest.mark.parametrize(("module", "old", "new"), MOVED)
def test_a_module_finds_old_names(module, old, new):
    module = importlib.import_module(f"kdiff.{module}")
    with pytest.warns(
        DeprecationWarning, match=rf"kdiff\.[\w.]+\.{old} is deprecated; use kdiff\.[\w.]+\.{new.__name__} instead"
    ):
        assert getattr(module, old) is new
    assert old not in module.__all__
    with pytest.raises(AttributeError, match="has no attribute 'never'"):
        module.never  # noqa: B018


@pytest.mark.once
def test_get_finds_old_names():
    for family, old, new in (
        (tangents.Tangent, "difference", tangents.FiniteDifference),
        (objectives.Objective, "tangent_consistency", objectives.SCM),
    ):
        with pytest.warns(DeprecationWarning, match=f"'{old}' is deprecated; use '"):
            assert type(family.get(old)) is new
        assert old not in family.names()


ARGUMENTS = [
    (kdiff.DiffusionModel.sample, "averages"),
    (kdiff.DiffusionModel.sample_steps, "averages"),
    (kdiff.DiffusionModel.invert, "averages"),
    (kdiff.DiffusionModel.invert_steps, "averages"),
    (kdiff.DiffusionModel.denoiser, "averages"),
    (kdiff.DiffusionModel.denoiser_in_step, "averages"),
    (kdiff.DiffusionModel.denoise, "averages"),
    (kdiff.DiffusionModel.output, "averages"),
    (kdiff.Cascade.sample, "averages"),
    (kdiff.Cascade.sample_stages, "averages"),
    (kdiff.guidance.Autoguidance.__init__, "averages"),
    (likelihood.bound, "averages"),
    (likelihood.continuous_bound, "averages"),
    (likelihood.encode, "averages"),
    (likelihood.ode, "averages"),
    (lora.merge, "averages"),
    (inversion.finish, "averages"),
    (inversion.vectors_of, "averages"),
    (reflow.pairs, "averages"),
    (diffusers.save, "averages"),
    (inversions.save, "averages"),
    (kdiff.interop.lora.save, "averages"),
    (single_files.load, "averages"),
    (objectives.Consistency.__init__, "averaged"),
    (blocks.Concat.__init__, "form"),
    (blocks.Concat.__init__, "highest"),
    (blocks.NoisedEmbedding.__init__, "highest"),
    (evaluation.Images.__init__, "form"),
    (inversion.add, "like"),
    (networks.VQ.__init__, "quantize"),
    *((kind.__init__, "steering") for kind in objectives.Taught.__subclasses__() if hasattr(kind.__init__, "renamed")),
]


@pytest.mark.once
@pytest.mark.parametrize(("function", "old"), ARGUMENTS, ids=lambda value: getattr(value, "__qualname__", value))
def test_functions_accept_old_arguments(function, old):
    """What they would do without the mechanism, an error for the old name, they do not."""
    new = function.renamed[old]
    with pytest.raises(TypeError, match=f"received both `{new}` and its old name `{old}`"):
        function(**{old: 1, new: 1})


@pytest.mark.once
def test_old_arguments_are_passed_on():
    @deprecated.arguments(old="new")
    def function(a, new=1):
        return a, new

    with pytest.warns(
        DeprecationWarning, match="function: the argument `old` is deprecated; use `new` instead"
    ) as said:
        assert function(1, old=2) == (1, 2)
    assert said[0].filename == __file__
    with pytest.raises(TypeError, match="unexpected keyword"):
        function(1, other=2)
    with pytest.warns(DeprecationWarning, match="use `ema`"):
        assert objectives.Consistency(pairs=objectives.Easy(9), averaged=True).get_config()["ema"] is True


def vector_model(conditions=None, **options):
    model = kdiff.DiffusionModel(MLP(8, 1, conditions=conditions), ema=0.9, **options)
    model.build((None, 2))
    return model


def moved(model):
    """The weights, and averages that differ from them."""
    draw_weights(model.network)
    model.reset_ema()
    draw_weights(model.network, 1)
    model.update_ema()
    return model


def test_a_model_and_a_denoiser_have_old_members():
    model = moved(vector_model())
    with pytest.warns(DeprecationWarning, match=r"DiffusionModel\.averages is deprecated; use `ema_weights`"):
        assert model.averages is model.ema_weights
    with pytest.warns(DeprecationWarning, match="use `update_ema`"):
        model.update_averages()
    with pytest.warns(DeprecationWarning, match="use `reset_ema`"):
        model.reset_averages()
    assert not model.ema_weights.moved
    with pytest.warns(DeprecationWarning, match="the argument `averages` is deprecated; use `ema`"):
        plain = model.sample(2, steps=2, averages=False)
    np.testing.assert_array_equal(plain, model.sample(2, steps=2, ema=False))
    denoise = Denoiser.of(lambda x, m: x)
    for old, new in (("each", "batched"), ("linearised", "vjp"), ("without", "unconditional")):
        with pytest.warns(DeprecationWarning, match=f"use `{new}`"):
            assert getattr(denoise, old) == getattr(denoise, new)


# Files. Those of before are made of those of now by the names of before.

CLASSES = {
    "kdiff.ema>": "kdiff.averages>",
    "kdiff.blocks>Concat": "kdiff.blocks>Beside",
    "PerceiverResampler": "Resampler",
    "SizeEmbedding": "SizeWaves",
    '"interpolation"': '"form"',
    '"max_level"': '"highest"',
    "GuidanceEmbedding": "SteeredEmbedding",
    "kdiff.objectives>SCM": "kdiff.objectives>TangentConsistency",
    "ProgressiveDistillation": "Distillation",
    "FiniteDifference": "Difference",
    "ForwardMode": "Forward",
    '"guidance_input"': '"steering"',
}


def with_old_paths(weights):
    """A file of weights whose layers have the names of before, which are returned."""
    with h5py.File(weights, "a") as file:
        found = []
        file.visit(lambda path: found.append(path))
        parts = {new: old for new, old in deprecated.PATHS.items()}
        hits = [path for path in found if path.rpartition("/")[2].rstrip("_0123456789") in parts]
        for path in sorted(hits, key=len, reverse=True):  # the inner first
            parent, _, name = path.rpartition("/")
            stem = name.rstrip("_0123456789")
            file.move(path, f"{parent}/{parts[stem]}{name[len(stem) :]}")
    return {parts[path.rpartition("/")[2].rstrip("_0123456789")] for path in hits}


def with_old_names(path, **others):
    """A saved model as an older kdiff had written it; returns the old names of its layers."""
    with zipfile.ZipFile(path) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    config = files["config.json"].decode()
    for new, old in {**CLASSES, **others}.items():
        config = config.replace(new, old)
    assert config != files["config.json"].decode()
    config = json.loads(config)
    weights = io.BytesIO(files["model.weights.h5"])
    layers = with_old_paths(weights)
    with zipfile.ZipFile(path, "w") as archive:
        for name, value in files.items():
            new = {"config.json": json.dumps(config).encode(), "model.weights.h5": weights.getvalue()}
            archive.writestr(name, new.get(name, value))
    return layers


def conditioned():
    low = {"noise": schedules.Cosine(), "of": kdiff.operators.Downsample(2)}
    conditions = {"low": blocks.Concat("nearest", **low, dropout=0.1), "other": blocks.Concat("nearest", **low)}
    embedding = blocks.GuidanceEmbedding(blocks.SinusoidalEmbedding(8), "timestep_cond", 8, 16)
    network = UNet.basic(4, 1, 1, conditions=conditions, embedding=embedding)
    model = kdiff.DiffusionModel(network, ema=[ema.Power(0.1), ema.Exponential(0.9)])
    model.build({"image": (None, 4, 4, 1), "low": (None, 2, 2, 1), "other": (None, 2, 2, 1)})
    return moved(model)


def resampled():
    sizes = blocks.Joint({"sizes": blocks.SizeEmbedding(4)}, blocks.MLPEmbedding(keras.layers.Identity(), 8))
    conditions = {"tokens": blocks.PerceiverResampler(2, 8, 8, 1, 2, 4), "added": sizes}
    block = blocks.TransformerBlock(2, adaptive=True)
    model = kdiff.DiffusionModel(networks.DiT(8, 1, 2, block, conditions=conditions), ema=0.9)
    model.build({"image": (None, 4, 4, 1), "tokens": (None, 3, 8), "sizes": (None, 6)})
    return moved(model)


SLOW = kdiff.times.Scaled(10.0)
MODELS = {
    "conditions": conditioned,
    "resampled": resampled,
    "SCM": lambda: student(
        vector_model(time_label=SLOW),
        objectives.SCM(vector_model(), tangents.FiniteDifference(0.002)),
        prediction="trig_flow",
    ),
    "ProgressiveDistillation": lambda: student(vector_model(), objectives.ProgressiveDistillation(vector_model())),
    "MeanFlow": lambda: vector_model(
        {"interval": blocks.Interval()},
        schedule="rectified",
        prediction="flow",
        objective=objectives.MeanFlow(tangent=tangents.ForwardMode()),
        time_label=SLOW,
    ),
    "Consistency": lambda: vector_model(objective=objectives.Consistency(pairs=objectives.Easy(9), ema=True)),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.filterwarnings("error:.* is deprecated; use:DeprecationWarning")
def test_an_old_model_loads(name, tmp_path):
    """With all that was in it, and without a warning: it is not the user who writes the old names."""
    model = MODELS[name]()
    model.save(tmp_path / "model.keras")
    others = {'"ema": true': '"averaged": true'} if name == "Consistency" else {}
    layers = with_old_names(tmp_path / "model.keras", **others)
    assert {"conditions": "beside", "resampled": "resampler"}.get(name, "averages") in layers
    again = keras.saving.load_model(tmp_path / "model.keras")
    assert repr(again) == repr(model)
    for a, b in zip(model.variables, again.variables, strict=True):
        np.testing.assert_array_equal(numpy(a), numpy(b))


def test_old_weights_load(tmp_path):
    """Those of a model, as backups are, and of a network alone."""
    model, others = conditioned(), conditioned()
    for whole, part, other in (("a", model, others), ("b", model.network, others.network)):
        path = tmp_path / f"{whole}.weights.h5"
        part.save_weights(path)
        with h5py.File(path) as file:
            assert "averages" not in file
        assert with_old_paths(path)
        for variable in other.variables:
            variable.assign(0 * variable)
        other.load_weights(path)
        for a, b in zip(part.weights, other.weights, strict=True):
            np.testing.assert_array_equal(numpy(a), numpy(b))
