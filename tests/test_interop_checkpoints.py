"""The state dict inside a checkpoint: averaged weights, and never others without a word."""

import numpy as np
import pytest

from kdiff.interop import checkpoints, files, original, pickles
from kdiff.interop.weights import export
from kdiff.networks.simple_unet import SimpleUNet

pytestmark = pytest.mark.once


def one(value, *shape):
    return np.full(shape, value, "float32")


def values(content):
    state = checkpoints.state_of(content, "file")
    return {name: float(np.mean(np.asarray(array))) for name, array in state.items()}


CHECKPOINTS = {
    "a state dict": {"w": one(1), "step": 3},
    "Lightning": {"state_dict": {"w": one(1)}, "epoch": 2, "callbacks": {}, "loops": None},
    "a loop's": {
        "model_state_dict": {"w": one(1)},
        "optimizer_state_dict": {"state": {0: one(3)}},
        "loss": np.float64(1),
    },
    "DiT's train.py": {"model": {"w": one(0)}, "ema": {"w": one(1)}, "opt": {"state": {}}, "args": pickles.Unknown()},
    "k-diffusion": {"model": {"w": one(0)}, "model_ema": {"w": one(1)}, "opt": {}, "step": 1, "ema_sched": {"a": 1}},
    "averages that were off": {"model": {"w": one(1)}, "ema": None},
    "a number called so": {"model": {"w": one(1)}, "ema": 0.999},
    "lucidrains' milestone": {
        "step": 1,
        "model": {"w": one(0)},
        "ema": {"initted": one(1), "step": one(9), "online_model.w": one(0), "ema_model.w": one(1)},
        "scaler": None,
    },
    "diffusers' EMAModel": {"model": {"w": one(0)}, "ema": {"decay": 0.9, "shadow_params": [one(1)]}},
    "two deep": {"state": 1, "model": {"state_dict": {"w": one(1)}, "config": {}}},
    "DDIM's main.py": [
        {"module.w": one(0)},
        {"state": {0: {"exp_avg": one(3)}}, "param_groups": []},
        3,
        99,
        {"w": one(1)},
    ],
    "DDIM's main.py without averages": [{"module.w": one(1)}, {"state": {}, "param_groups": []}, 3, 99],
    "DataParallel": {"module.w": one(1)},
    "compiled, then DataParallel": {"state_dict": {"module._orig_mod.w": one(1)}},
}


@pytest.mark.parametrize("content", CHECKPOINTS.values(), ids=CHECKPOINTS)
def test_what_is_taken(content):
    assert values(content) == {"w": 1.0}


def test_only_what_all_names_begin_with_is_left_out():
    assert values({"module.w": one(1), "b": one(2)}) == {"module.w": 1.0, "b": 2.0}


def test_averages_in_the_order_of_the_parameters():
    """As score_sde_pytorch has them: buffers, and weights that are not trained, have none."""
    trained = {
        "sigmas": one(1, 5),
        "waves": one(2, 4),
        "a.weight": one(3, 4, 4),
        "a.bias": one(4, 4),
        "b.bias": one(5, 4),
    }
    averages = [one(30, 4, 4), one(40, 4), one(50, 4)]
    content = {"model": trained, "ema": {"decay": 0.9, "num_updates": 3, "shadow_params": averages}}
    assert values(content) == {"sigmas": 1, "waves": 2, "a.weight": 30, "a.bias": 40, "b.bias": 50}


def test_buffers_and_other_states_in_a_list():
    """A buffer has no average; a discriminator's weights are no averages of the first."""
    assert values([{"w": one(0), "b": one(2)}, 3, {"w": one(1)}]) == {"w": 1.0, "b": 2.0}
    assert values([{"w": one(0)}, {"w": one(1, 2)}]) == {"w": 0.0}


@pytest.mark.parametrize(
    ("trained", "averages"),
    [
        ({"a": one(1, 2), "b": one(2, 2)}, [one(3, 2)]),  # of which?
        ({"a": one(1, 2)}, [one(3, 2), one(4, 2)]),
        ({"a": one(1, 3)}, [one(3, 2)]),
        ({}, [one(3, 2)]),
    ],
)
def test_averages_without_names_that_could_be_others(trained, averages):
    content = {"model": trained, "ema": {"shadow_params": averages}}
    with pytest.raises(ValueError, match=rf"file: `ema` has {len(averages)} unnamed averages"):
        checkpoints.state_of(content, "file")


def test_averages_that_cannot_be_read_are_no_reason_to_take_others():
    kind = type("Unknown", (pickles.Unknown,), {"name": "ema.Helper"})
    with pytest.raises(ValueError, match=r"file: `ema` must be a state dict.*object of ema\.Helper.*found: .*'model'"):
        checkpoints.state_of({"model": {"w": one(1)}, "ema": kind()}, "file")
    with pytest.raises(ValueError, match="file: `ema` must be a state dict"):
        checkpoints.state_of({"model": {"w": one(1)}, "ema": [one(1)]}, "file")


@pytest.mark.parametrize("content", [{}, {"a": 1}, [1], 3, {"model": {"a": {"b": 1}}}])
def test_without_arrays(content):
    with pytest.raises(ValueError, match="file: must hold tensors by name; received"):
        checkpoints.state_of(content, "file")


def weights():
    """Of a small network under the names of a PyTorch tutorial."""
    network = SimpleUNet((8,), 8, 8)
    network.build({"image": (None, 8, 8, 3), "time": (None,)})
    return export(original.simple_slots(network))


def test_a_whole_checkpoint_as_a_file_and_as_a_mapping(tmp_path):
    torch = pytest.importorskip("torch")
    state = {f"module.{name}": array for name, array in weights().items()}
    content = {"model": {"w": one(1)}, "ema": state, "epoch": 3}
    tensors = {**content, "ema": {name: torch.tensor(array) for name, array in state.items()}}
    torch.save(tensors, tmp_path / "a.ckpt")
    for source in (content, tensors, tmp_path / "a.ckpt"):
        np.testing.assert_array_equal(
            np.asarray(export(original.simple_slots(original.simple_unet(source)))["out.bias"]),
            state["module.out.bias"],
        )


def test_a_list_in_a_file(tmp_path):
    torch = pytest.importorskip("torch")
    trained, averages = ({"w": torch.tensor(one(value))} for value in (0, 1))
    torch.save([trained, {"state": {}, "param_groups": [{"lr": 1e-4}]}, 3, 99, averages], tmp_path / "ckpt.pth")
    assert {name: float(np.asarray(one)) for name, one in files.read_state(tmp_path / "ckpt.pth").items()} == {"w": 1.0}


def test_shards_of_a_wrapped_module(tmp_path):
    pytest.importorskip("safetensors")
    files.write_safetensors(tmp_path / "1.safetensors", {"module.a": one(1)})
    files.write_safetensors(tmp_path / "2.safetensors", {"module.b": one(2)})
    index = {"weight_map": {"module.a": "1.safetensors", "module.b": "2.safetensors"}}
    files.write_json(tmp_path / "a.safetensors.index.json", index)
    state = files.FOLDER_READERS[".safetensors.index.json"](tmp_path / "a.safetensors.index.json")
    assert sorted(state) == ["a", "b"]
