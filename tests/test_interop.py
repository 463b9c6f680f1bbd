"""Foreign files that are damaged, of another kind or say what cannot be done: an error that names the file."""

import json
import os
import pickle
import subprocess
import sys

import keras
import numpy as np
import pytest
from keras import ops

from kdiff import DiffusionModel, Sampler, guidance, predictions, random, schedules, solvers, times
from kdiff.blocks import GroupNorm, LabelEmbedding, LayerNorm, ResidualBlock, SelfAttention
from kdiff.interop import (
    configs,
    diffusers,
    files,
    grids,
    original,
    schedulers,
    transformers,
    unet_keys,
    weights,
)
from kdiff.interop.multistep import DiffusersDPMSolverPP
from kdiff.interop.scheduler_saving import scheduler_config
from kdiff.interop.solvers import DDIMKeptNoise, DiffusersPNDM, EvenSteps
from kdiff.networks.levels import Level
from kdiff.networks.unet import UNet

pytest.importorskip("safetensors", reason="the extra `interop` is not installed")

INPUT = {"image": np.ones((2, 8, 8, 3), "float32"), "time": np.array([3.0, 977.0], "float32")}


def unet(**options):
    """A U-Net that diffusers has too, with no weight zero."""
    keras.utils.set_random_seed(0)
    norm = GroupNorm(4)
    block = ResidualBlock(None, False, normalization=norm)
    mixer = SelfAttention(None, 4, norm)
    levels = [Level(8, 1, block), Level(16, 1, block, mixer)]
    network = UNet(levels, Level(16, 2, block, mixer), normalization=norm, **options)
    shapes = {"image": (None, 8, 8, 3), "time": (None,)}
    network.build(shapes | {name: (None,) for name in network.conditions})
    generator = np.random.default_rng(0)
    for weight in network.weights:
        weight.assign(ops.convert_to_numpy(weight) + 0.05 * generator.normal(size=weight.shape))
    return network


@pytest.fixture
def folder(tmp_path):
    diffusers.save(unet(), tmp_path)
    return tmp_path


def output(network, **conditions):
    return ops.convert_to_numpy(network({**INPUT, **conditions}))


def rewrite(folder, change):
    """The weights changed by `change(state)`."""
    file = folder / "diffusion_pytorch_model.safetensors"
    state = {name: np.array(array) for name, array in files.read_state(file).items()}
    change(state)
    files.write_safetensors(file, state)


def configure(folder, file="config.json", **changes):
    config = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps({**config, **changes}))


def test_save_and_load(folder):
    np.testing.assert_allclose(output(diffusers.load(folder)), output(unet()), atol=1e-5)


@pytest.mark.once
def test_save_and_load_classes(tmp_path):
    network = unet(conditions={"label": LabelEmbedding(5)})
    diffusers.save(network, tmp_path)
    label = np.array([0, 4])
    np.testing.assert_allclose(output(diffusers.load(tmp_path), label=label), output(network, label=label), atol=1e-5)


@pytest.mark.once
def test_missing_weight(folder):
    rewrite(folder, lambda state: state.pop("mid_block.resnets.0.conv1.weight"))
    with pytest.raises(ValueError, match=r"1 arrays do not match.*\n.*missing: mid_block\.resnets\.0\.conv1\.weight"):
        diffusers.load(folder)


@pytest.mark.once
def test_all_that_does_not_match_is_listed(folder):
    def change(state):
        state["more"] = np.ones(3, "float32")
        state["conv_in.bias"] = np.ones(5, "float32")
        state["conv_in.weight"] = np.ones((8, 3), "float32")
        state["conv_out.bias"][0] = np.nan
        del state["conv_out.weight"]

    rewrite(folder, change)
    with pytest.raises(ValueError, match="5 arrays") as raised:
        diffusers.load(folder)
    for words in ("missing: conv_out.weight", "not expected: more (3,)", "shape: conv_in.bias is (5,)", "not finite"):
        assert words in str(raised.value)
    with pytest.warns(UserWarning, match="5 arrays"):
        network = diffusers.load(folder, strict=False)
    np.testing.assert_array_equal(
        ops.convert_to_numpy(network.normalization.gamma), ops.convert_to_numpy(unet().normalization.gamma)
    )


@pytest.mark.once
@pytest.mark.parametrize("length", [0, 5, 200, 10_000])
def test_truncated_safetensors(folder, length):
    file = folder / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:length])
    with pytest.raises(ValueError, match=r"diffusion_pytorch_model\.safetensors: not a complete safetensors file"):
        diffusers.load(folder)


@pytest.mark.once
def test_corrupt_safetensors(folder):
    file = folder / "diffusion_pytorch_model.safetensors"
    file.write_bytes(b"\xff" * 64 + file.read_bytes()[64:])
    with pytest.raises(ValueError, match=r"diffusion_pytorch_model\.safetensors"):
        diffusers.load(folder)


@pytest.mark.once
def test_no_weights(folder):
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"no weights; expected one of .*found: \['config.json'\]"):
        diffusers.load(folder)


@pytest.mark.once
def test_no_config(tmp_path):
    with pytest.raises(ValueError, match=r"config\.json: no such file"):
        diffusers.load(tmp_path)


@pytest.mark.once
def test_config_that_is_not_json(folder):
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json: not a JSON file"):
        diffusers.load(folder)


@pytest.mark.once
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"_class_name": "UNet3DModel"}, "`_class_name` must be one of .*UNet2DModel.*received: 'UNet3DModel'"),
        ({"down_block_types": ["DownBlock2D", "KDownBlock2D"]}, "`down_block_types` must be one of .*'KDownBlock2D'"),
        ({"block_out_channels": [8, 16, 32]}, "must have one length"),
        ({"act_fn": "tanh"}, "`act_fn` must be one of .*received: 'tanh'"),
        ({"center_input_sample": True}, "`center_input_sample` must be one of .*received: True"),
        ({"new_idea": 3}, "the key `new_idea` is unknown to kdiff; received: 3"),
    ],
)
def test_config_that_cannot_be_loaded(folder, changes, words):
    configure(folder, **changes)
    with pytest.raises(ValueError, match=rf"config\.json.*{words}"):
        diffusers.load(folder)


@pytest.mark.once
def test_keys_that_change_nothing_are_read_over(folder):
    configure(folder, new_idea=None, another=False, _name_or_path="x")
    diffusers.load(folder)


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.once
@pytest.mark.parametrize("name", ["diffusion_pytorch_model.bin", "weights.pt"])
def test_pickle_is_not_run(folder, name):
    """Neither by PyTorch, which refuses it, nor where there is no PyTorch."""
    mark = folder / "executed"
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    (folder / name).write_bytes(pickle.dumps({"conv_in.weight": Bomb(mark)}))
    with pytest.raises((ValueError, ModuleNotFoundError), match=name):
        diffusers.load(folder) if name.endswith("bin") else original.dit(folder / name)
    assert not mark.exists()


@pytest.mark.once
def test_arrays_of_objects_are_not_unpickled(tmp_path):
    mark = tmp_path / "executed"
    np.savez(tmp_path / "weights.npz", bomb=np.array([Bomb(mark)], dtype=object))
    with pytest.raises(ValueError, match=r"weights\.npz: not a complete \.npz file of numbers"):
        original.guided(tmp_path / "weights.npz", 8, (1, 2))
    assert not mark.exists()


@pytest.mark.once
def test_shard_outside_of_its_folder(folder):
    (folder / "diffusion_pytorch_model.safetensors").rename(folder.parent / "elsewhere.safetensors")
    index = {"weight_map": {"conv_in.bias": "../elsewhere.safetensors"}}
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="a shard must be in the folder of its index"):
        diffusers.load(folder)


@pytest.mark.once
def test_shard_that_is_missing(folder):
    file = folder / "diffusion_pytorch_model.safetensors"
    index = {"weight_map": dict.fromkeys(files.read_state(file), "one.safetensors")}
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    file.unlink()
    with pytest.raises(ValueError, match=r"one\.safetensors: no such file"):
        diffusers.load(folder)


@pytest.mark.once
def test_lists_in_lists(folder):
    (folder / "config.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match=r"config\.json: not a JSON file"):
        diffusers.load(folder)


def test_a_network_that_the_weights_are_not_of_takes_no_memory(folder):
    configure(folder, block_out_channels=[8, 60_000])  # 32 billion numbers a kernel
    with pytest.raises(ValueError, match=r"shape: down_blocks\.1\.attentions\.0\.to_q\.weight is \(16, 16\)"):
        diffusers.load(folder)


@pytest.mark.once
def test_numbers_that_are_not_floating_point(tmp_path):
    state = {"out.weight": np.ones((3, 8, 1, 1), "int64"), "out.bias": np.ones(3, bool)}
    state |= {f"{name}.conv1.weight": np.ones((8, 3, 3, 3), "complex64") for name in ("enc1", "mid")}
    state["time_mlp.1.weight"] = np.ones((12, 12), "float16")
    np.savez(tmp_path / "weights.npz", **state)
    for source in (state, tmp_path / "weights.npz"):
        with pytest.raises(ValueError, match="arrays do not match") as raised:
            original.simple_unet(source)
        for words in ("type: out.weight is int64", "type: out.bias is bool", "type: mid.conv1.weight is complex64"):
            assert words in str(raised.value)
        assert "type: time_mlp" not in str(raised.value)


@pytest.mark.once
@pytest.mark.parametrize("kind", ["sparse", "meta", "quantised"])
def test_tensors_without_plain_numbers(kind, tmp_path):
    torch = pytest.importorskip("torch")
    x = torch.ones(2, 2)
    tensor = {
        "sparse": x.to_sparse,
        "meta": lambda: x.to("meta"),
        "quantised": lambda: torch.quantize_per_tensor(x, 1.0, 0, torch.qint8),
    }[kind]()
    words = {"meta": "on no device"}.get(kind, kind)
    with pytest.raises(ValueError, match=f"the state dict: w must be a plain tensor; it is {words}"):
        original.read({"w": tensor})
    np.testing.assert_array_equal(original.read({"w": torch.nn.Parameter(x)})[0]["w"], np.ones((2, 2)))


@pytest.mark.once
def test_a_shard_with_what_another_should_have(folder):
    state = files.read_state(folder / "diffusion_pytorch_model.safetensors")
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    files.write_safetensors(folder / "a.safetensors", state)
    files.write_safetensors(folder / "b.safetensors", {"conv_in.bias": np.asarray(state["conv_in.bias"]) + 1})
    index = {"weight_map": dict.fromkeys(state, "a.safetensors")}
    index["weight_map"]["conv_out.bias"] = "b.safetensors"
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"a\.safetensors has conv_out\.bias, which `weight_map` places in b\."):
        diffusers.load(folder)


@pytest.mark.once
def test_a_list_of_a_million_blocks():
    """The number in a name is not how many there are."""
    shapes = {"x_embedder.proj": (8, 3, 2, 2), "final_layer.linear": (12, 8), "y_embedder.embedding_table": (3, 8)}
    state = {f"{name}.weight": np.ones(shape, "float32") for name, shape in shapes.items()}
    with pytest.raises(ValueError, match=r"not expected: blocks\.999999999\.attn\.qkv\.weight"):
        original.dit({**state, "blocks.0.x": np.ones(1), "blocks.999999999.attn.qkv.weight": np.ones(1)}, 2, 4)


@pytest.mark.once
def test_original_without_its_first_layer():
    with pytest.raises(ValueError, match=r"`x_embedder\.proj\.weight` is missing"):
        original.dit({"y": np.ones(3)})


# --- every key

HOSTILE = [None, True, 0, -1, 10**24, 1e-300, float("inf"), float("nan"), "x", [], [0.5], [[1]], {"a": 1}]
TABLES_OF_KEYS = {name: scheduler.keys for name, scheduler in schedulers.KINDS.items()}


@pytest.mark.once
@pytest.mark.parametrize("name", TABLES_OF_KEYS)
def test_no_value_of_a_scheduler_is_an_error_without_a_name(name):
    for key in TABLES_OF_KEYS[name]:
        for value in HOSTILE:
            try:
                process = schedulers.process({"_class_name": name, key: value}, "file.json")
            except ValueError as error:
                assert str(error).startswith("file.json: "), (key, value)  # noqa: PT017
            else:
                assert process.schedule.num_steps in (None, 1000)


@pytest.mark.once
@pytest.mark.parametrize("keys", [unet_keys.UNET_2D, unet_keys.UNET_2D_CONDITION, transformers.DIT])
def test_no_value_of_a_network_is_an_error_without_a_name(keys):
    for key in keys:
        for value in HOSTILE:
            try:
                config = configs.complete({key: value}, keys, "file.json")
            except ValueError as error:
                assert str(error).startswith("file.json: "), (key, value)  # noqa: PT017
            else:
                assert keys[key].rule.holds(config[key])
    assert all(key.rule.holds(key.default) for key in keys.values())


DPM = {"_class_name": "DPMSolverMultistepScheduler"}
WORDS = [
    ({"_class_name": "PNDMScheduler", "rescale_betas": True}, "`rescale_betas` is unknown to kdiff; received: True"),
    ({"_class_name": "DDPMScheduler", "predict_epsilon": False}, "`predict_epsilon` is from an old version"),
    ({"_class_name": "LMSDiscreteScheduler", "num_train_timesteps": 10**24}, r"a whole number in \[1, 100000\]"),
    ({"_class_name": "DDIMScheduler", "clip_sample": 1}, r"`clip_sample` must be .*True, False.*received: 1"),
    ({"_class_name": "DDIMScheduler", "trained_betas": [0.1, 0.2]}, "is 1000, but `trained_betas` has 2"),
    ({"_class_name": "DDIMScheduler", "timestep_spacing": "even"}, r"one of \['leading', 'trailing', 'linspace'\]"),
    ({**DPM, "use_karras_sigmas": True, "use_exponential_sigmas": True}, "at most one of"),
    ({**DPM, "algorithm_type": "dpmsolver"}, "must be 'sigma_min' for `algorithm_type` 'dpmsolver'"),
    ({**DPM, "lambda_min_clipped": "low"}, "`lambda_min_clipped` must be a number"),
    ({**DPM, "prediction_type": "flow_prediction"}, "`use_flow_sigmas` must be true where"),
    ({**DPM, "prediction_type": "v_prediction", "use_flow_sigmas": True}, "must not be 'v_prediction' where"),
    ({"_class_name": "UniPCMultistepScheduler", "use_flow_sigmas": True}, "must not be 'epsilon' where `use_flow_s"),
    ({**DPM, "use_karras_sigmas": True, "beta_schedule": "squaredcos_cap_v2"}, "diffusers has them at one time"),
    ({"_class_name": "EulerDiscreteScheduler", "sigma_max": 80.0}, "`sigma_min` and `sigma_max` must be None, unless"),
    ({"_class_name": "FlowMatchEulerDiscreteScheduler", "use_dynamic_shifting": True}, "give `tokens`, the length"),
    ({"_class_name": "DDPMScheduler", "variance_type": "fixed_large_log"}, "`variance_type` must be one of"),
    ({"_class_name": "DDPMScheduler", "variance_type": "learned_range"}, "twice as many channels"),
    (
        {"_class_name": "DDIMScheduler", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
        "`prediction_type` must be 'v_prediction' or 'sample'",
    ),
    ({"_class_name": "DDIMScheduler", "beta_start": 0.0}, "`betas` must lie in"),
]


@pytest.mark.once
@pytest.mark.parametrize(("config", "words"), WORDS)
def test_schedulers_that_cannot_be_loaded(config, words):
    with pytest.raises(ValueError, match=f"^file.json: .*{words}"):
        schedulers.process(config, "file.json")


# As they stand in folders of the Hub: of SDXL, SD 2.1, SD 1.5, SDXL-turbo and google/ddpm-*, written by many versions.
TABLE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "trained_betas": None}
CARRIED = [
    (
        {**TABLE, "_class_name": "EulerDiscreteScheduler", "timestep_spacing": "leading", "steps_offset": 1},
        {"clip_sample": False, "sample_max_value": 1.0, "set_alpha_to_one": False, "skip_prk_steps": True},
    ),
    (
        {**TABLE, "_class_name": "DDIMScheduler", "prediction_type": "v_prediction", "set_alpha_to_one": False},
        {"skip_prk_steps": True, "tensor_format": "np", "lambda_min_clipped": -5.1, "solver_order": 3},
    ),
    ({**TABLE, "_class_name": "PNDMScheduler", "skip_prk_steps": True}, {"clip_sample": True, "clip_sample_range": 2}),
    (
        {**TABLE, "_class_name": "EulerAncestralDiscreteScheduler", "timestep_spacing": "trailing"},
        {"interpolation_type": "log_linear", "use_karras_sigmas": True, "algorithm_type": "dpmsolver"},
    ),
    (
        {"_class_name": "DDPMScheduler", "variance_type": "fixed_small"},
        {"predict_epsilon": True, "set_alpha_to_one": 0},
    ),
]


@pytest.mark.once
@pytest.mark.parametrize(("config", "carried"), CARRIED)
def test_keys_of_another_scheduler_are_read_over(config, carried):
    """A file that diffusers made of another scheduler's has its keys."""
    assert schedulers.process({**config, **carried}, "") == schedulers.process(config, "")


# --- what stands around the SimpleUNet of tutorials

TABLES = {
    "linear": (lambda: schedules.LinearBeta(1000), np.linspace(1e-4, 0.02, 1000)),
    "cosine": (lambda: schedules.CosineBeta(1000, min_beta=1e-4, max_beta=0.9999), None),
}


def wave(x, i):
    """A network that needs no weights."""
    return 0.7 * np.tanh(x) + np.sin(0.02 * i)[:, None, None, None]


@pytest.mark.once
@pytest.mark.parametrize("kind", TABLES)
def test_the_process_of_tutorials(kind):
    """q_sample, the posterior, the loss and 50 steps of DDIM on their grid, by the names in `original.simple_unet`."""
    image, time = keras.Input((4, 4, 3), name="image"), keras.Input((), name="time")
    output = 0.7 * ops.tanh(image) + ops.reshape(ops.sin(0.02 * time), (-1, 1, 1, 1))
    network = keras.Model({"image": image, "time": time}, output)
    make, betas = TABLES[kind]
    schedule = make()
    if betas is None:
        f = np.cos((np.linspace(0, 1, 1001) + 0.008) / 1.008 * np.pi / 2) ** 2
        betas = np.clip(1 - f[1:] / f[:-1], 1e-4, 0.9999)
    after = np.cumprod(1 - betas)
    before = np.append(1, after[:-1])
    model = DiffusionModel(network, schedule, "noise", times="discrete", time_label="index", codec="identity", ema=None)
    model.build((None, 4, 4, 3))
    x, noise, i = *np.random.default_rng(0).normal(size=(2, 2, 4, 4, 3)).astype("float32"), np.array([0, 700])
    t = ((i + 1) / 1000).astype("float32")

    def rows(values):
        return values[i][:, None, None, None]

    x_t = rows(after) ** 0.5 * x + rows(1 - after) ** 0.5 * noise
    np.testing.assert_allclose(ops.convert_to_numpy(schedule(x, noise, t)), x_t, atol=1e-5)
    mean, variance = schedule.posterior(x, x_t, schedule.at(t), schedule.at((i / 1000).astype("float32")))
    wanted = rows(betas * before**0.5 / (1 - after)) * x + rows((1 - before) * (1 - betas) ** 0.5 / (1 - after)) * x_t
    np.testing.assert_allclose(ops.convert_to_numpy(mean), wanted, atol=1e-5)
    wanted = rows(betas * (1 - before) / (1 - after))
    np.testing.assert_allclose(ops.convert_to_numpy(variance), wanted, atol=1e-5)

    keys = [random.key_of(2), random.key_of(3)]
    problem = model.objective.problem(model, ops.convert_to_tensor(x), {}, iter(keys), False)
    i = np.round(1000 * ops.convert_to_numpy(model.times(schedule, 2, keys[0]))).astype(int) - 1
    noise = ops.convert_to_numpy(random.normal(keys[1], x.shape))
    x_t = rows(after) ** 0.5 * x + rows(1 - after) ** 0.5 * noise
    output, target = (ops.convert_to_numpy(value) for value in (problem.output, problem.target))
    assert problem.weight is None or np.allclose(ops.convert_to_numpy(problem.weight), 1)
    assert np.mean((output - target) ** 2) == pytest.approx(np.mean((wave(x_t, i) - noise) ** 2), abs=1e-5)

    steps = np.linspace(0, 999, 50).astype(int)[::-1]
    wanted = x.astype("float64")
    for now, then in zip(steps, [*steps[1:], None], strict=True):
        kept, noisy = (1.0, 0.0) if then is None else (after[then] ** 0.5, (1 - after[then]) ** 0.5)
        predicted = wave(wanted, np.full(2, now))
        wanted = kept * (wanted - (1 - after[now]) ** 0.5 * predicted) / after[now] ** 0.5 + noisy * predicted
    grid = times.Times([*(steps + 1) / 1000, 0])
    given = model.sample(2, x=x, sampler=Sampler("ddim", grid))
    assert np.abs(given - wanted).max() < 1e-5 * np.abs(wanted).max()


# --- saving


@pytest.mark.once
@pytest.mark.parametrize(
    ("network", "words"),
    [
        (lambda: UNet([Level(8, 1)]), "no weights to save"),
        (lambda: keras.Sequential([keras.layers.Dense(2)]), "build it"),
        (lambda: built(UNet.residual(8, levels=2)), "one `groups` for all blocks"),
        (lambda: built(UNet([Level(8, 1, ResidualBlock(normalization=LayerNorm()))])), "'LayerNorm' would be"),
        (lambda: unet(conditions={"size": LabelEmbedding(3)}), "does not support these conditions: \\['size'\\]"),
        (lambda: unet(activation="relu"), "activation: 'relu' would be 'silu'"),
    ],
)
def test_network_that_diffusers_has_not(network, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        diffusers.save(network(), tmp_path)


def built(network):
    network.build({"image": (None, 8, 8, 3), "time": (None,)})
    return network


SAMPLERS = [
    Sampler(DDIMKeptNoise(guidance.Clip(2.0)), "leading"),
    Sampler("ddim", grids.WithFirst(times.Leading(1)), to_zero=False),
    Sampler(solvers.DDPM("large"), times.Linspace(), guidance=guidance.Clip()),
    Sampler("dpm_solver_pp", grids.WithoutLast(times.Leading(3))),
    Sampler("euler", grids.Within(times.Karras(), grids.LinspaceUnrounded())),
    Sampler(solvers.Heun("ratio"), "trailing"),
    Sampler(EvenSteps(DDIMKeptNoise(guidance.Clip())), times.Linspace()),
    Sampler(DiffusersPNDM("velocity", 1), "leading"),
    Sampler(DiffusersDPMSolverPP(3, lower_final=False), grids.WithFirst(grids.WithoutLast()), to_zero=False),
]


@pytest.mark.once
@pytest.mark.parametrize("sampler", SAMPLERS, ids=repr)
@pytest.mark.parametrize("schedule", ["linear_beta", "scaled_linear_beta", "cosine_beta"])
def test_scheduler_there_and_back(sampler, schedule):
    process = schedulers.Process(schedules.NoiseSchedule.get(schedule), predictions.Velocity(), times.Index(), sampler)
    again = schedulers.process(scheduler_config(process), "")
    assert (again.schedule, again.prediction) == (process.schedule, process.prediction)
    assert again.sampler.clone(steps=None) == sampler


def test_whole_model_there_and_back(tmp_path):
    model = DiffusionModel(unet(), "linear_beta", "noise", time_label="index", ema=None)
    model.build((None, 8, 8, 3))
    diffusers.save(model, tmp_path)
    again = diffusers.load(tmp_path)
    sampler = Sampler("ddim", "trailing", 4)
    np.testing.assert_allclose(again.sample(2, sampler=sampler), model.sample(2, sampler=sampler), atol=1e-4)
    assert again.sampler == Sampler(EvenSteps("ddim"), "trailing")  # diffusers', the same of a divisor of T
    assert len(list(again.sample_steps(1, steps=2))) == 2


@pytest.mark.once
def test_averages_are_what_is_saved(tmp_path):
    model = DiffusionModel(unet(), "linear_beta", "noise", time_label="index", ema=0.9)
    model.build((None, 8, 8, 3))
    model.update_ema()  # those that never moved are not used
    for weight in model.network.weights:
        weight.assign(weight + 1.0)
    diffusers.save(model, tmp_path)
    diffusers.save(model, tmp_path / "trained", ema=False)
    averaged, trained = diffusers.load(tmp_path).network, diffusers.load(tmp_path / "trained").network
    for a, b, c in zip(averaged.weights, trained.weights, unet().weights, strict=True):
        np.testing.assert_allclose(ops.convert_to_numpy(a), ops.convert_to_numpy(c), atol=1e-6)
        np.testing.assert_allclose(ops.convert_to_numpy(b), ops.convert_to_numpy(c) + 1.0, atol=1e-5)


@pytest.mark.once
def test_model_that_no_scheduler_describes(tmp_path):
    model = DiffusionModel(unet(), "cosine", "noise", ema=None)
    model.build((None, 8, 8, 3))
    with pytest.raises(ValueError, match="diffusers has no scheduler with Cosine"):
        diffusers.save(model, tmp_path)


@pytest.mark.once
def test_loaded_model_is_saved_by_keras(tmp_path):
    model = DiffusionModel(unet(), "linear_beta", "noise", time_label="index", ema=None)
    model.build((None, 8, 8, 3))
    diffusers.save(model, tmp_path)
    first = diffusers.load(tmp_path)
    first.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_allclose(again.sample(1, steps=2), first.sample(1, steps=2), atol=1e-5)


@pytest.mark.once
def test_rows():
    array = np.arange(24.0).reshape(12, 2)
    for rows in (weights.Rows((1, 0), 6), weights.Rows((2,), 3, 2)):
        part = rows.take(array)
        whole = rows.put(part, None)
        np.testing.assert_array_equal(rows.take(whole), part)
    np.testing.assert_array_equal(weights.Rows((1,), 3, 2).take(array)[:, 0], [4, 6, 16, 18])


@pytest.mark.once
def test_importing_kdiff_is_enough_to_load_what_was_loaded_from_diffusers(tmp_path):
    """A new process knows the grids and solvers that only interop has, though it imports kdiff alone."""
    sampler = Sampler(DDIMKeptNoise(), grids.LinspaceUnrounded(), 4)
    (tmp_path / "sampler.json").write_text(json.dumps(keras.saving.serialize_keras_object(sampler)))
    code = (
        "import json, keras, kdiff, pathlib, sys;"
        "print(keras.saving.deserialize_keras_object(json.loads(pathlib.Path(sys.argv[1]).read_text())))"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "sampler.json")]
    environment = {**os.environ, "KERAS_BACKEND": keras.backend.backend()}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == repr(sampler), done.stderr[-2000:]
