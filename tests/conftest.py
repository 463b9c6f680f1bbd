"""Settings that must be made before Keras is imported."""

import ctypes
import gc
import os
import sys
import tempfile
from importlib.util import find_spec

import pytest

os.environ.setdefault("KERAS_BACKEND", "tensorflow")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
# Tests compile many small programs, often the same, and run each a few times.
# LLVM does little, and kernels are made in the old way, in one piece: a quarter of the CPU time of JAX's compiler.
flags = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
flags += " --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
os.environ.setdefault("XLA_FLAGS", flags)
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    programs = tempfile.TemporaryDirectory(prefix="kdiff-jax-cache-")  # removed at exit
    os.environ["JAX_COMPILATION_CACHE_DIR"] = programs.name
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")  # the programs of single operations too

# They trace many small graphs too, and Grappler's passes take longer than the run that they save.
if os.environ["KERAS_BACKEND"] == "tensorflow":
    import tensorflow as tf

    tf.config.optimizer.set_experimental_options({"disable_meta_optimizer": True})

# A process of pytest-xdist keeps to one core: the threads of networks as small as these wait more than they work.
if "PYTEST_XDIST_WORKER" in os.environ and hasattr(os, "sched_setaffinity"):
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[int(os.environ["PYTEST_XDIST_WORKER"].removeprefix("gw")) % len(cores)]})


# They import diffusers at their top, which takes seconds even where its models are missing.
collect_ignore_glob = [] if find_spec("torch") and find_spec("diffusers") else ["*_reference.py"]


def pytest_addoption(parser):
    parser.addoption("--thorough", action="store_true", help="run also the tests marked `thorough`")
    parser.addoption("--cases", type=int, help="so many of the cases of each test, evenly spaced: others on TensorFlow")


def pytest_configure(config):
    """Registers the markers by which the sessions of noxfile.py choose."""
    config.addinivalue_line("markers", "data: needs the extra `data`; skipped where it is not installed")
    config.addinivalue_line("markers", "once: says the same whatever the backend; nox runs it with one of them")
    config.addinivalue_line("markers", "thorough: takes minutes; only with --thorough, as in `nox -s thorough`")
    config.addinivalue_line("markers", "reference: compares with diffusers; skipped where it or PyTorch is missing")
    config.addinivalue_line("markers", "eager: op by op on TensorFlow, as `reference` is: see pytest_runtest_setup")


@pytest.hookimpl(trylast=True)  # after `-m` and `-k`
def pytest_collection_modifyitems(config, items):
    """Leaves out the thorough tests, unless they are asked for, and with `--cases` most cases of each test."""
    kept = [item for item in items if config.getoption("--thorough") or not item.get_closest_marker("thorough")]
    if most := config.getoption("--cases"):
        other = os.environ["KERAS_BACKEND"] == "tensorflow"  # than JAX has
        tests = {}  # the cases of a fixture of a module lie apart: all that one needs are run before the next is made
        for item in kept:
            tests.setdefault((item.path, item.originalname), []).append(item)
        steps = {test: -(-len(cases) // most) for test, cases in tests.items()}
        chosen = {case for test, cases in tests.items() for case in cases[other * steps[test] // 2 :: steps[test]]}
        kept = [item for item in kept if item in chosen]
    chosen = set(kept)
    config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
    items[:] = kept


def pytest_collection_finish():
    """What is imported by now stays: the garbage collector need not go through it, a million objects, again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="module")
def forget():
    """Gives back what the tests of a module leave; else a process grows to several gigabytes, and may be killed.

    Compiled programs refer to their model in a circle, which the garbage collector alone opens; Keras and JAX keep
    graphs and programs as long as the process lives; and the C library keeps what is freed.
    """
    yield
    import keras

    from tests import helpers_gradients

    helpers_gradients.FUNCTIONS.clear()
    if keras.backend.backend() != "torch":  # where it would import what only torch.compile needs
        keras.backend.clear_session(free_memory=False)
    if keras.backend.backend() == "jax":
        import jax

        jax.clear_caches()  # what the next module has in common with this one is read from the disk
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)


def pytest_runtest_setup(item):
    """Skips them where that is not installed.

    TensorFlow takes ten seconds to trace a training step of a small U-Net, and a fraction of one to run it. Graphs are
    the models of test_model.py, test_training.py, test_networks.py and test_backends_agree.py, the gradients of layers
    and networks, solvers and guidance; where training or sampling is but the way to an end, a test is marked `eager`.
    """
    if item.get_closest_marker("data") and find_spec("tensorflow_datasets") is None:
        pytest.skip("the extra `data` is not installed")
    if item.get_closest_marker("reference") and None in (find_spec("torch"), find_spec("diffusers")):
        pytest.skip("PyTorch or diffusers is not installed")
    if os.environ["KERAS_BACKEND"] == "tensorflow":
        op_by_op = any(item.get_closest_marker(name) for name in ("eager", "reference"))
        tf.config.run_functions_eagerly(op_by_op)
