"""Files of `torch.save`: tensors are read as PyTorch reads them, and nothing that a file names is run."""

import argparse
import pickle
import sys
import zipfile
from collections import OrderedDict, defaultdict

import numpy as np
import pytest

from kdiff.interop import files, pickles

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.once


def saved(content, folder, name="weights.pt", **options):
    torch.save(content, folder / name, **options)
    return folder / name


def check_same(state, tensors):
    assert list(state) == list(tensors)
    for name, tensor in tensors.items():
        wanted = tensor.detach()
        wanted = (wanted.float() if wanted.is_floating_point() else wanted).numpy()
        assert (state[name].shape, state[name].dtype) == (wanted.shape, wanted.dtype)
        np.testing.assert_array_equal(np.asarray(state[name]), wanted)


NUMBERS = ["float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool", "complex64"]
NUMBERS += ["uint16", "uint32", "float8_e4m3fn", "float8_e5m2"]


def test_every_type_of_numbers(tmp_path):
    tensors = {name: torch.tensor([[0.0, 1.0, 1.5]]).to(getattr(torch, name)) for name in NUMBERS}
    check_same(files.read_state(saved(tensors, tmp_path)), tensors)


def test_views_parameters_and_empty_tensors(tmp_path):
    x = torch.arange(24.0).reshape(4, 6)
    tensors = {
        "transposed": x.T,
        "part": x[1:3, 2::2],
        "expanded": torch.tensor([2.0]).expand(3, 4),
        "parameter": torch.nn.Parameter(x),
        "scalar": torch.tensor(3.0),
        "empty": torch.zeros(0, 3),
        "zero of some": x[4:],
    }
    tensors["parameter with state"] = torch.nn.Parameter(x + 1)
    tensors["parameter with state"].note = "a"
    check_same(files.read_state(saved(tensors, tmp_path)), tensors)


def test_a_tensor_is_read_alone(tmp_path, monkeypatch):
    file = saved({"a": torch.ones(1000), "b": torch.zeros(10)}, tmp_path)
    state = files.read_state(file)
    read = []
    monkeypatch.setattr(
        pickles.Opened, "read", lambda self, start, count: read.append(count) or np.zeros(count, "uint8")
    )
    np.asarray(state["b"])
    assert read == [40]


class Thing(dict):
    """A class that no other process has, with items and attributes."""


def test_what_is_no_tensor_is_left_out(tmp_path):
    """As in checkpoints of DiT's train.py, of Lightning, and of loops that keep their losses."""
    thing = Thing(a=1)
    thing.more = [1, {2}]
    others = {
        "args": argparse.Namespace(lr=1e-4),
        "loss": np.float64(0.1),
        "losses": np.ones(3),
        "type": torch.float16,
        "device": torch.device("cpu"),
        "thing": thing,
        "class": Thing,
        "default": defaultdict(list, a=[1]),
        "slice": slice(1, 2),
        "epoch": 3,
        "big": 10**30,
    }
    tensors = {"w": torch.ones(2, 3)}
    check_same(files.read_state(saved({**others, **tensors}, tmp_path)), tensors)
    check_same(files.read_state(saved({**others, "state_dict": OrderedDict(tensors)}, tmp_path)), tensors)


def test_a_module_that_was_pickled_whole(tmp_path):
    module = torch.nn.Sequential(torch.nn.Linear(2, 3, bias=False), torch.nn.Sequential(torch.nn.BatchNorm1d(3)))
    module[0].register_buffer("hidden", torch.ones(1), persistent=False)
    for content in (module, {"ema": module, "model": {"w": torch.ones(1)}}):
        check_same(files.read_state(saved(content, tmp_path)), module.state_dict())


class Bomb:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


CALLS = [
    (open, "executed", "w"),
    (eval, "open('executed', 'w')"),
    (__import__, "antigravity"),
    (getattr, torch, "load"),
]


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call[0].__name__)
def test_nothing_is_run(call, tmp_path, monkeypatch):
    """What was called is an `Unknown`, and the tensors beside it are read."""
    monkeypatch.chdir(tmp_path)
    calls = {"bomb": Bomb(*(one for one in call if one is not torch)), "w": torch.ones(2)}
    np.testing.assert_array_equal(np.asarray(files.read_state(saved(calls, tmp_path))["w"]), [1, 1])
    assert not (tmp_path / "executed").exists()


def archive(folder, program, **entries):
    """A file whose pickle is made by hand."""
    with zipfile.ZipFile(folder / "weights.pt", "w") as file:
        for name, data in {"data.pkl": program, "byteorder": b"little", **entries}.items():
            file.writestr(f"archive/{name}", data)
    return folder / "weights.pt"


PROGRAMS = {
    "attribute of a function": b"\x80\x02ctorch._utils\n_rebuild_parameter\n}U\x01aK\x01sb.",
    "attribute of a type": b"\x80\x02ccollections\nOrderedDict\nN}U\x06updateK\x01s\x86b.",
    "new object of a function": b"\x80\x02ccollections\nOrderedDict\n)\x81.",
    "extension": b"\x80\x02\x82\x01.",
    "storage of a path": b"\x80\x02(U\x07storageU\x07float32U\x0c../../secretU\x03cpuK\x01tQ.",
    "dotted name": b"\x80\x04\x8c\x0bcollections\x8c\x1aOrderedDict.__init__.x.y.z\x93)R.",
    "cut": b"\x80\x02}",
    "nothing": b"",
}


@pytest.mark.parametrize("program", PROGRAMS.values(), ids=PROGRAMS)
def test_hostile_programs(program, tmp_path):
    before = dict(vars(OrderedDict)), dict(vars(pickles)), dict(vars(pickles.Unknown)), {}
    with pytest.raises(ValueError, match=r"weights\.pt: "):
        files.read_state(archive(tmp_path, program))
    after = vars(OrderedDict), vars(pickles), vars(pickles.Unknown), vars(pickles._parameter)
    assert before == tuple(map(dict, after))


def test_a_tensor_larger_than_its_storage(tmp_path):
    with pytest.raises(ValueError, match="larger than its storage"):
        pickles._view(pickles.Storage(None, 0, "float32", 40), "float32", 1, (5, 2), (2, 1))
    with pytest.raises(ValueError, match="strides"):
        pickles._view(pickles.Storage(None, 0, "float32", 40), "float32", 0, (5,), (-1,))
    file = saved({"w": torch.ones(1000)}, tmp_path)
    with zipfile.ZipFile(file) as whole:
        entries = {name.split("/", 1)[1]: whole.read(name) for name in whole.namelist()}
    with pytest.raises(ValueError, match=r"weights\.pt: .*larger than its storage"):
        files.read_state(archive(tmp_path, entries.pop("data.pkl"), **{**entries, "data/0": b"1234"}))


KINDS = {
    "_rebuild_sparse_tensor": lambda: torch.eye(3).to_sparse(),
    "_rebuild_meta_tensor_no_storage": lambda: torch.ones(3, device="meta"),
}


@pytest.mark.parametrize("name", KINDS)
def test_tensors_without_plain_numbers(name, tmp_path):
    with pytest.raises(ValueError, match=rf"weights\.pt: .*tensors must be plain.*`{name}`"):
        files.read_state(saved({"w": KINDS[name]()}, tmp_path))


def test_programs_of_torchscript_are_refused(tmp_path):
    torch.jit.script(torch.nn.Linear(2, 3)).save(tmp_path / "weights.pt")
    with pytest.raises(ValueError, match=r"weights\.pt: .*TorchScript; save its `state_dict\(\)`"):
        files.read_state(tmp_path / "weights.pt")


def test_the_form_before_version_1_6(tmp_path):
    tensors = {"w": torch.arange(3.0)}
    check_same(files.read_state(saved(tensors, tmp_path, _use_new_zipfile_serialization=False)), tensors)
    file = saved({**tensors, "args": argparse.Namespace()}, tmp_path, _use_new_zipfile_serialization=False)
    with pytest.raises(ValueError, match=r"weights\.pt: not a file of only tensors.*argparse\.Namespace") as raised:
        files.read_state(file)
    assert "\x1b" not in str(raised.value)
    assert "\n" not in str(raised.value)


def test_the_form_before_version_1_6_without_pytorch(tmp_path, monkeypatch):
    file = saved({"w": torch.arange(3.0)}, tmp_path, _use_new_zipfile_serialization=False)
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ModuleNotFoundError, match=r"weights\.pt: only PyTorch can read this file"):
        files.read_state(file)


def test_pickles_of_other_programs(tmp_path):
    (tmp_path / "weights.pt").write_bytes(pickle.dumps(Bomb(open, str(tmp_path / "executed"), "w")))
    with pytest.raises(ValueError, match=r"weights\.pt: not a file of only tensors"):
        files.read_state(tmp_path / "weights.pt")
    assert not (tmp_path / "executed").exists()


def test_damaged_archives(tmp_path):
    data = saved({"w": torch.ones(100)}, tmp_path).read_bytes()
    for length in (0, 10, 200, len(data) - 10):
        (tmp_path / "weights.pt").write_bytes(data[:length])
        with pytest.raises(ValueError, match=r"weights\.pt: "):
            files.read_state(tmp_path / "weights.pt")
    with zipfile.ZipFile(tmp_path / "other.pt", "w") as file:
        file.writestr("a/b", b"1")
    with pytest.raises(ValueError, match=r"other\.pt: .*no `data\.pkl`"):
        files.read_state(tmp_path / "other.pt")
