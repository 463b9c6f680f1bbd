"""What `doctor` says of a machine, and the timings that it takes."""

import contextlib
import importlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest

import kdiff
from kdiff import backend
from kdiff.backend import BACKEND, machine

doctor = importlib.import_module("kdiff.doctor")  # `kdiff.doctor` is the function


def run(code: str, **environment: str | None) -> str:
    environment = {**os.environ, "PYTHONPATH": str(Path(kdiff.__file__).parents[1]), **environment}
    environment = {name: value for name, value in environment.items() if value is not None}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


@pytest.mark.once  # half a minute on each backend: a process for each network
def test_the_machine_and_a_network_on_each_backend(monkeypatch):
    """The timings are those of the network: one that is four times as deep takes longer."""
    lines, kinds = [], {}
    monkeypatch.setattr(machine, "_PACKAGES", {BACKEND: machine._PACKAGES[BACKEND]})
    for depth in (1, 8):
        network = kdiff.networks.DiT(64, depth, 2, kdiff.networks.adaptive_block(2))
        kinds[depth] = kdiff.doctor(network, np.zeros((8, 16, 16, 3), "float32"), print_fn=lines.append)
    for report in kinds.values():
        assert report.failures == {}
        assert list(report.timings) == [BACKEND]
        timing = report.timings[BACKEND]
        assert min(timing.evaluate, timing.train, timing.start) > 0
    assert kinds[8].timings[BACKEND].train > kinds[1].timings[BACKEND].train
    assert BACKEND in lines[0]
    assert sum(line.startswith(f"{BACKEND} ") and "training step" in line for line in lines) == 2


@pytest.mark.once  # a process, as above
def test_a_network_without_data_and_one_that_no_other_process_knows(monkeypatch):
    monkeypatch.setattr(machine, "_PACKAGES", {BACKEND: machine._PACKAGES[BACKEND]})
    with pytest.raises(ValueError, match="batch"):
        kdiff.doctor(kdiff.networks.MLP(8, 1), print_fn=lambda line: None)

    class Unknown(kdiff.networks.MLP):
        pass

    report = kdiff.doctor(Unknown(8, 1), np.zeros((4, 3), "float32"), print_fn=lambda line: None)
    assert report.timings == {}
    assert list(report.failures) == [BACKEND]
    assert "Unknown" in report.failures[BACKEND]


IMAGES = np.zeros((4, 8, 8, 3), "float32")
LABELS = np.arange(4, dtype="int32") % 3


def labelled():
    return kdiff.networks.DiT(16, 1, 2, conditions={"label": kdiff.blocks.LabelEmbedding(3)})


@pytest.mark.once
@pytest.mark.parametrize(
    "batch",
    [(IMAGES, LABELS), {"image": IMAGES, "label": LABELS.tolist()}, ({"encoded": IMAGES}, LABELS, np.ones(4))],
)
def test_data_is_as_for_fit(batch, monkeypatch):
    """What the processes read, of which one measures as they do."""
    monkeypatch.setattr(machine, "_PACKAGES", {BACKEND: machine._PACKAGES[BACKEND]})
    monkeypatch.setattr(doctor, "_FIRST", 0)
    monkeypatch.setattr(doctor, "_MEASURED", 1)

    def here(name, files, timeout):
        with contextlib.redirect_stdout(io.StringIO()) as said:
            doctor._measure(*map(str, files), 0.0)
        return doctor.Timing(**json.loads(said.getvalue()))

    monkeypatch.setattr(doctor, "_in_process", here)
    report = kdiff.doctor(labelled(), batch, print_fn=lambda line: None)
    assert report.failures == {}
    assert report.timings[BACKEND].train > 0


BAD = {
    "unet": ("unet", IMAGES, {}, TypeError, r"must be a Keras model or layer.*received: str"),
    "model": (None, IMAGES, {}, TypeError, r"such as the `network` of one; received: DiffusionModel"),
    "kind": (labelled, "images", {}, TypeError, "must be an array"),
    "name": (labelled, {"x": IMAGES}, {}, ValueError, "must have an 'image'"),
    "missing": (labelled, IMAGES, {}, ValueError, r"takes the conditions \['label'\]; missing"),
    "objects": (labelled, {"image": IMAGES, "label": np.array([None] * 4)}, {}, ValueError, "Python objects"),
    "rows": (labelled, (IMAGES, LABELS[:3]), {}, ValueError, "must have 4 rows"),
    "empty": (labelled, (IMAGES[:0], LABELS[:0]), {}, ValueError, "is empty"),
    "nan": (labelled, (np.full_like(IMAGES, np.nan), LABELS), {}, ValueError, "must be finite"),
    "timeout": (labelled, (IMAGES, LABELS), {"timeout": -1}, ValueError, "`timeout` must be a number"),
}


@pytest.mark.once
@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_refused_before_a_process_starts(name, monkeypatch):
    network, batch, options, kind, message = BAD[name]
    monkeypatch.setattr(subprocess, "run", lambda *arguments, **options: pytest.fail("a process was started"))
    network = kdiff.DiffusionModel(labelled()) if network is None else network() if callable(network) else network
    with pytest.raises(kind, match=message):
        kdiff.doctor(network, batch, print_fn=lambda line: None, **options)


@pytest.mark.parametrize("low", ["mixed_bfloat16", "float32"])
def test_advice_is_of_this_machine(monkeypatch, low):
    """Each finding where it holds, and not where it does not."""
    files = {"/proc/self/maps": "libc.so.6", "/sys/kernel/mm/transparent_hugepage/enabled": "always [never]"}
    files |= {"/proc/cpuinfo": "flags : fpu avx2\n", "/sys/fs/cgroup/cpu.max": "150000 100000"}
    monkeypatch.setattr(machine, "_read", lambda path: files.get(path, ""))
    monkeypatch.setattr(machine, "_has_accelerator", lambda: False)
    monkeypatch.setattr(machine.sys, "platform", "linux")
    for name in ("GLIBC_TUNABLES", "OMP_NUM_THREADS", "JAX_COMPILATION_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(keras.config, "dtype_policy", lambda: keras.DTypePolicy(low))
    assert machine.cores() <= 1.5
    said = " ".join(machine.noticed())
    assert "tcmalloc" in said
    assert "Huge pages are off" in said
    assert ("by way of float32" in said) == (low != "float32")
    files |= {"/proc/self/maps": "libtcmalloc_minimal.so.4", "/proc/cpuinfo": "flags : avx512_bf16\n"}
    files["/sys/kernel/mm/transparent_hugepage/enabled"] = "always [madvise] never"
    said = " ".join(machine.noticed())
    assert "tcmalloc" not in said
    assert "Huge pages" not in said
    assert ("mixed_bfloat16" in said) == (low == "float32")


@pytest.mark.skipif(sys.platform != "linux" or BACKEND == "jax", reason="glibc's; on JAX it saves nothing")
@pytest.mark.parametrize("given", [{}, {"MALLOC_ARENA_MAX": "2"}, {"GLIBC_TUNABLES": "glibc.malloc.tcache_count=7"}])
def test_memory_that_is_freed_is_kept_unless_the_user_has_chosen(given):
    """An array of 200 MB takes new pages once, otherwise in each thread.

    Imports may have left an arena of a thread, which every second thread then has.
    """
    code = """
import ctypes, resource, threading, kdiff
from kdiff.backend import machine
library = ctypes.CDLL(None)
library.malloc.restype, library.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
def faults(size=200_000_000):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    address = library.malloc(ctypes.c_size_t(size))
    ctypes.memset(address, 1, size)
    library.free(address)
    found.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
found = []
for _ in range(5):
    thread = threading.Thread(target=faults)
    thread.start()
    thread.join()
print(machine._KEEPS_MEMORY, *found)
"""
    names = [name for name in os.environ if name.startswith("MALLOC_")]
    kept, first, *faults = run(code, **dict.fromkeys([*names, "GLIBC_TUNABLES", "LD_PRELOAD"]) | given).split()
    assert kept == str(not given)
    again = sum(int(count) > 0.9 * int(first) for count in faults)
    if given:
        assert again == len(faults)
    elif machine.cores() <= machine._FEW_CORES:
        assert again <= len(faults) / 2


@pytest.mark.skipif(BACKEND != "jax", reason="the option is of JAX's compiler")
@pytest.mark.parametrize(("given", "cores"), [(None, 2), ("--xla_backend_optimization_level=0", 2), (None, 1)])
def test_small_convolutions_use_all_cores_unless_the_user_has_set_options(given, cores):
    """And XLA knows the option: it would end the process otherwise."""
    code = "import logging, os; logging.basicConfig(level=logging.INFO, format='%(message)s', stream=os.sys.stdout);"
    code += f"os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:{cores}]);"
    code += "import kdiff, jax; jax.numpy.zeros(3).block_until_ready(); print(os.environ.get('XLA_FLAGS'))"
    told = run(code, XLA_FLAGS=given)
    pays = machine.metadata.version("jaxlib").startswith("0.10.") and cores > 1 and given is None
    pays = pays and len(os.sched_getaffinity(0)) > 1
    assert told.split()[-1] == (machine._SMALL_CONVOLUTIONS if pays else str(given))
    assert ("small convolutions on all cores" in told) == pays


def test_compiled_programs_are_kept(tmp_path, monkeypatch):
    """On JAX they are found again, once those in memory are forgotten, in the folder of the last call alone."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "elsewhere")
    if BACKEND == "tensorflow":
        with pytest.warns(UserWarning, match="keeps no compiled programs"):
            kdiff.compilation_cache(tmp_path)
        return
    if BACKEND == "torch":
        kdiff.compilation_cache(tmp_path / "new" / "folder")
        assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "new" / "folder")
        assert (tmp_path / "new" / "folder").is_dir()
        return
    import jax

    hits = []

    def note(event, **about):
        hits.append(event)

    before = jax.config.jax_compilation_cache_dir, jax.config.jax_persistent_cache_min_compile_time_secs
    asked = backend.compiled(lambda x: 3 * keras.ops.sin(x))
    try:
        asked(np.zeros(7, "float32"))
        kdiff.compilation_cache(tmp_path / "programs")
        programs = [asked(np.full(count, 0.5, "float32")) for count in (8, 9)]
        kept = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "programs").glob("*-cache")}
        assert len(kept) >= 2
        jax.clear_caches()
        jax.monitoring.register_event_listener(note)
        again = [asked(np.full(count, 0.5, "float32")) for count in (8, 9)]
        assert {file.name: file.stat().st_mtime_ns for file in (tmp_path / "programs").glob("*-cache")} == kept
        np.testing.assert_array_equal(np.concatenate(again), np.concatenate(programs))
        assert hits.count("/jax/compilation_cache/cache_hits") >= 2
        kdiff.compilation_cache(tmp_path / "others")
        jax.clear_caches()
        asked(np.full(8, 0.5, "float32"))
        assert list((tmp_path / "others").glob("*-cache"))
    finally:
        jax.monitoring.unregister_event_listener(note)
        jax.config.update("jax_compilation_cache_dir", before[0])
        jax.config.update("jax_persistent_cache_min_compile_time_secs", before[1])
        jax.experimental.compilation_cache.compilation_cache.reset_cache()
