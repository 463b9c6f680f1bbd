"""Arrays of foreign files are read one by one, when they are asked for, and as float32."""

import json
import weakref

import keras
import numpy as np
import pytest
from keras import ops

from kdiff import backend
from kdiff.blocks import LabelEmbedding
from kdiff.interop import arrays, diffusers, files, original, weights
from tests.test_interop import rewrite, unet

pytestmark = pytest.mark.eager

pytest.importorskip("safetensors", reason="the extra `interop` is not installed")


@pytest.fixture
def folder(tmp_path):
    diffusers.save(unet(), tmp_path)
    return tmp_path


def read_by(monkeypatch):
    """The bytes that were in use by arrays from files at each time that another was read."""
    owners, used, read = [], [], arrays.Opened.read

    def counted(file, start, count):
        used.append(sum(owner().nbytes for owner in owners if owner() is not None))
        data = read(file, start, count)
        owners.append(weakref.ref(data))
        return data

    monkeypatch.setattr(arrays.Opened, "read", counted)
    return used


def test_one_array_at_a_time_is_in_memory(folder, monkeypatch):
    used = read_by(monkeypatch)
    network = diffusers.load(folder)
    sizes = [np.size(weight) for weight in network.weights]
    assert len(used) >= len(sizes)
    assert max(used) <= 4 * max(sizes)  # that of the last name, while its variable is given its own numbers
    assert sum(sizes) > 4 * max(sizes)


def test_what_a_file_has_is_not_drawn_at_random_first(folder, monkeypatch):
    def drawn(*arguments, **options):
        raise AssertionError("an initializer has run")

    for kind in ("GlorotUniform", "Zeros", "Ones"):
        monkeypatch.setattr(getattr(keras.initializers, kind), "__call__", drawn)
    diffusers.load(folder)


def test_what_a_file_has_not_is_drawn_at_random(folder):
    rewrite(folder, lambda state: [state.pop(f"conv_in.{name}") for name in ("weight", "bias")])
    with pytest.warns(UserWarning, match=r"missing: conv_in\.weight"):
        network = diffusers.load(folder, strict=False)
    assert np.std(ops.convert_to_numpy(network.stem.kernel)) > 0.01


def test_a_loaded_network_has_all_that_a_built_one_has(tmp_path):
    """Also random seeds, which no file has, and on PyTorch the parameters of its modules; and it trains."""
    keras.utils.set_random_seed(0)
    wanted = unet(conditions={"label": LabelEmbedding(5, dropout=0.1)})
    diffusers.save(wanted, tmp_path)
    network = diffusers.load(tmp_path)
    assert [v.path.split("/")[-1] for v in network.variables] == [v.path.split("/")[-1] for v in wanted.variables]
    assert all(variable._value is not None for variable in network.variables)
    if keras.backend.backend() == "torch":
        assert len(list(network.parameters())) == len(list(wanted.parameters()))
        for given, built in zip(network.parameters(), wanted.parameters(), strict=True):
            assert given.stride() == built.stride()  # kernels lie in memory as PyTorch's convolutions want them
    inputs = {"image": np.ones((2, 8, 8, 3), "float32"), "time": np.ones(2, "float32"), "label": np.zeros(2)}
    before = ops.convert_to_numpy(network.stem.kernel)
    network.compile("sgd", "mse")
    network.fit(inputs, np.zeros((2, 8, 8, 3), "float32"), verbose=0)
    assert not np.array_equal(before, ops.convert_to_numpy(network.stem.kernel))


def test_loaded_weights_are_not_the_arrays_they_were_given(folder):
    state = {
        name: np.array(array)
        for name, array in files.read_state(folder / "diffusion_pytorch_model.safetensors").items()
    }
    network = unet()
    weights.assign(diffusers.MODELS["UNet2DModel"].slots(network), state, "")
    empty = type(network).from_config(network.get_config())
    shapes = {"image": (None, 8, 8, 3), "time": (None,)}
    weights.fill(empty, shapes, diffusers.MODELS["UNet2DModel"].slots, state, "")
    for array in state.values():
        array[:] = 7.0
    for one in (network, empty):
        assert all(not np.any(ops.convert_to_numpy(weight) == 7.0) for weight in one.weights)


@pytest.mark.parametrize("kind", ["bfloat16", "float16", "float64"])
def test_other_precisions(folder, kind):
    """bfloat16 and float16 are within their rounding, and the network has float32 all the same."""
    file = folder / "diffusion_pytorch_model.safetensors"
    files.write_safetensors(file, {name: np.asarray(a).astype(kind) for name, a in files.read_state(file).items()})
    tolerance = {"bfloat16": 2**-8, "float16": 2**-10, "float64": 0.0}[kind]
    for given, wanted in zip(diffusers.load(folder).weights, unet().weights, strict=True):
        assert keras.backend.standardize_dtype(given.dtype) == "float32"
        np.testing.assert_allclose(ops.convert_to_numpy(given), ops.convert_to_numpy(wanted), tolerance, 1e-7)


def by_hand(path, entries, data):
    """A safetensors file that no library needs to have types for."""
    header = json.dumps(entries).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)
    return path


@pytest.mark.once
@pytest.mark.parametrize(("kind", "byte"), [("F8_E4M3", 0x3C), ("F8_E5M2", 0x3E), ("F8_E8M0", 0x80)])
def test_float8(kind, byte, tmp_path):
    """1.5 (by sign, exponent and fraction) and, of a type that has powers of two alone, 2."""
    file = by_hand(
        tmp_path / "a.safetensors", {"w": {"dtype": kind, "shape": [1], "data_offsets": [0, 1]}}, bytes([byte])
    )
    array = files.read_state(file)["w"]
    assert array.dtype == np.float32
    np.testing.assert_array_equal(np.asarray(array), [2.0 if kind == "F8_E8M0" else 1.5])


@pytest.mark.once
def test_a_type_without_numbers_of_its_own(tmp_path):
    file = by_hand(tmp_path / "a.safetensors", {"w": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}}, b"1")
    with pytest.raises(ValueError, match=r"a\.safetensors: the types must be in .*received: \{'w': 'F4'\}"):
        files.read_state(file)


@pytest.mark.once
def test_a_file_that_becomes_shorter(folder):
    file = folder / "diffusion_pytorch_model.safetensors"
    state = files.read_state(file)
    with open(file, "rb+") as opened:
        opened.truncate(10_000)
    with pytest.raises(ValueError, match=r"diffusion_pytorch_model\.safetensors: ends before its last array"):
        [np.asarray(array) for array in state.values()]


@pytest.mark.once
def test_a_file_may_be_removed_or_replaced_before_it_is_read(folder):
    file = folder / "diffusion_pytorch_model.safetensors"
    state, wanted = files.read_state(file), unet().stem.bias
    files.write_safetensors(file, {name: 2 * np.asarray(array) for name, array in state.items()})
    file.unlink()
    np.testing.assert_array_equal(np.asarray(state["conv_in.bias"]), ops.convert_to_numpy(wanted))


@pytest.mark.once
def test_copies_that_differ():
    keras.utils.set_random_seed(0)
    layer = keras.layers.Dense(3)
    layer.build((None, 2))
    slots = [weights.Slot(name, layer.bias) for name in ("a", "b", "c")]
    state = {"a": np.ones(3, "float32"), "b": np.ones(3, "float32"), "c": np.zeros(3, "float32")}
    with pytest.raises(ValueError, match="differs: c from a, whose copy it should be"):
        weights.assign(slots, state, "file")
    np.testing.assert_array_equal(original.read(state)[0]["a"], np.ones(3))


@pytest.mark.once
def test_large_numbers_are_finite():
    """Their sum is not."""
    layer = keras.layers.Dense(3)
    layer.build((None, 2))
    weights.assign([weights.Slot("a", layer.bias)], {"a": np.full(3, 3e38, "float32")}, "file")
    for bad in (np.inf, np.nan):
        with pytest.raises(ValueError, match="not finite: a"):
            weights.assign([weights.Slot("a", layer.bias)], {"a": np.array([0, bad, 0], "float32")}, "file")


@pytest.mark.parametrize("shape", [(), (3,), (70, 600), (600, 70, 3, 2)])
def test_a_variable_is_given_a_transposed_array(shape):
    """Of more than one block of the copy."""
    array = np.random.default_rng(0).normal(size=shape).astype("float32").T
    with backend.unallocated():
        variable = keras.Variable("zeros", array.shape)
    backend.give(variable, array)
    np.testing.assert_array_equal(ops.convert_to_numpy(variable), array)
    backend.give(variable, 2 * array)
    np.testing.assert_array_equal(ops.convert_to_numpy(variable), 2 * array)


def test_a_variable_of_another_precision_is_given_an_array():
    with backend.unallocated():
        variable = keras.Variable("zeros", (2,), "bfloat16")
    backend.give(variable, np.array([1.0, 1 + 2**-10], "float32"))
    assert keras.backend.standardize_dtype(variable.dtype) == "bfloat16"
    np.testing.assert_array_equal(ops.convert_to_numpy(variable).astype("float32"), [1, 1])
