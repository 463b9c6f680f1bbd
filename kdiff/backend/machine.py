"""What this machine has, and how each backend is set up on it: what costs time unseen."""

import ctypes
import logging
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from kdiff.backend.running import BACKEND

__all__ = ["cores", "installed", "keep_programs", "noticed", "wait_for"]

_PACKAGES = {"tensorflow": "tensorflow", "jax": "jaxlib", "torch": "torch"}
# Without it XLA computes convolutions to 64 channels and fewer on one core.
_SMALL_CONVOLUTIONS = "--xla_cpu_experimental_ynn_fusion_type=-individual_convolution"
# One arena: those of threads cannot hold large arrays, which TensorFlow's threads would get from the system every time.
_TUNABLES = ":".join(
    f"glibc.malloc.{name}={value}"
    for name, value in {"hugetlb": 1, "arena_max": 1, "trim_threshold": 4 * 10**9, "mmap_threshold": 4 * 10**9}.items()
)
_ALLOCATORS = ("tcmalloc", "jemalloc", "mimalloc")
# Options of glibc's mallopt: M_TRIM_THRESHOLD, so that nothing is returned to Linux, M_MMAP_MAX, so that nothing is
# mapped apart, and M_ARENA_MAX, for the arenas of threads cannot hold large arrays; but one arena is one lock for all.
_KEEP, _ONE_ARENA, _FEW_CORES = {-1: -1, -4: 0}, {-8: 1}, 8


def installed() -> dict[str, str]:
    """The backends that are installed, and their versions."""
    return {name: metadata.version(package) for name, package in _PACKAGES.items() if find_spec(name) is not None}


def cores() -> float:
    """How many cores this process may use: a container may have a share of one."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _read("/sys/fs/cgroup/cpu.max").split()
    limit = int(quota[0]) / int(quota[1]) if len(quota) == 2 and quota[0].isdigit() else count
    return min(count, limit)


def _has_accelerator() -> bool:
    """Whether the backend has a GPU or a TPU. It starts the backend."""
    if BACKEND == "torch":
        import torch

        return torch.cuda.is_available() or torch.backends.mps.is_available()
    if BACKEND == "jax":
        import jax

        return jax.default_backend() != "cpu"
    import tensorflow as tf

    return bool(tf.config.list_physical_devices("GPU") or tf.config.list_physical_devices("TPU"))


def keep_programs(folder: str) -> None:
    """As in `kdiff.compilation_cache`."""
    if BACKEND == "jax":
        import jax
        from jax.experimental.compilation_cache import compilation_cache

        jax.config.update("jax_compilation_cache_dir", folder)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        compilation_cache.reset_cache()  # which has looked for its folder when the first program was compiled
    elif BACKEND == "torch":
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
    else:
        warnings.warn("compilation_cache: TensorFlow keeps no compiled programs on the disk", stacklevel=3)


def wait_for(x: Any) -> None:
    """Returns when the tensor is computed."""
    if BACKEND == "jax":
        x.block_until_ready()
    elif BACKEND == "torch" and x.is_cuda:
        import torch

        torch.cuda.synchronize()
    else:
        x.numpy() if BACKEND == "tensorflow" else None


def noticed() -> Iterator[str]:
    """What would make training and sampling faster here, a sentence or two each."""
    if _has_accelerator():
        yield from _on_accelerator()
        return
    yield from (found for check in _CHECKS if (found := check()) is not None)


def _on_accelerator() -> Iterator[str]:
    import keras

    if keras.config.dtype_policy().compute_dtype == "float32":
        yield (
            "Accelerators multiply 16-bit numbers several times as fast: "
            "`keras.config.set_dtype_policy('mixed_bfloat16')` before the model is made."
        )
    if (cache := _compilation_cache()) is not None:
        yield cache
    if BACKEND == "torch":
        yield "PyTorch runs layer by layer; `compile(..., jit_compile=True)` fuses them, after minutes of compiling."


def _allocator() -> str | None:
    if sys.platform != "linux" or _other_allocator() or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return None
    kept = (
        "Memory that a step frees is given back to Linux, and asked for again by the next. Another allocator takes up "
        "to a fifth off a step on JAX, and a third on TensorFlow"
    )
    if _KEEPS_MEMORY:
        kept = "kdiff has glibc keep the memory that a step frees. Another allocator may be faster still"
    return (
        f"{kept}: `apt install libtcmalloc-minimal4`, then LD_PRELOAD=libtcmalloc_minimal.so.4 before `python`; or, "
        f"with nothing to install, GLIBC_TUNABLES={_TUNABLES}."
    )


def _other_allocator() -> bool:
    return any(name in _read("/proc/self/maps") for name in _ALLOCATORS)


def _huge_pages() -> str | None:
    if "[never]" not in _read("/sys/kernel/mm/transparent_hugepage/enabled"):
        return None
    return (
        "Huge pages are off, and large arrays take many small ones: "
        "`echo madvise > /sys/kernel/mm/transparent_hugepage/enabled`, as root."
    )


def _threads() -> str | None:
    given = {name: os.environ[name] for name in ("OMP_NUM_THREADS", "TF_NUM_INTRAOP_THREADS") if name in os.environ}
    few = {name: value for name, value in given.items() if value.isdigit() and int(value) < int(cores())}
    if few:
        return f"This process may use {cores():g} cores, and is told to use fewer: {few}. Unset what is not meant."
    if BACKEND == "torch":
        import torch

        if torch.get_num_threads() > max(1, round(cores())):
            return (
                f"PyTorch has started {torch.get_num_threads()} threads for {cores():g} cores, and they wait for one "
                f"another: OMP_NUM_THREADS={max(1, round(cores()))}."
            )
    return None


def _bfloat16() -> str | None:
    import keras

    low = keras.config.dtype_policy().compute_dtype
    if low == "float32" or not (flags := _cpu_flags()):
        return None
    if low == "bfloat16" and flags & {"avx512_bf16", "amx_bf16", "bf16"}:
        return None
    return (
        f"This CPU computes in {low} by way of float32, which is slower than float32: "
        "`keras.config.set_dtype_policy('float32')`."
    )


def _sixteen_bits() -> str | None:
    import keras

    if keras.config.dtype_policy().compute_dtype != "float32" or not _cpu_flags() & {"amx_bf16", "avx512_bf16"}:
        return None
    return (
        "This CPU multiplies bfloat16 numbers faster than float32: "
        "`keras.config.set_dtype_policy('mixed_bfloat16')` before the model is made."
    )


def _compilation_cache() -> str | None:
    if BACKEND != "jax":
        return None
    import jax

    if jax.config.jax_compilation_cache_dir:
        return None
    return (
        "JAX compiles every program anew in each process: with `kdiff.compilation_cache('~/.cache/kdiff')`, or "
        "JAX_COMPILATION_CACHE_DIR, it finds those of the last one on the disk."
    )


def _convolutions() -> str | None:
    if not _has_slow_convolutions() or "ynn_fusion_type" in os.environ.get("XLA_FLAGS", ""):
        return None
    return (
        "XLA computes convolutions to 64 channels and fewer on a single core; this takes a fifth off a small U-Net's "
        f"step: XLA_FLAGS='{os.environ.get('XLA_FLAGS', '')} {_SMALL_CONVOLUTIONS}'. (kdiff sets it where XLA_FLAGS is "
        "empty, and JAX has not started.)"
    )


_CHECKS: tuple[Callable[[], str | None], ...] = (
    _allocator,
    _huge_pages,
    _threads,
    _bfloat16,
    _sixteen_bits,
    _convolutions,
    _compilation_cache,
)


def _has_slow_convolutions() -> bool:
    """XLA of jaxlib 0.10 on several cores of a CPU. Of an option that it does not know, XLA ends the process."""
    return BACKEND == "jax" and metadata.version("jaxlib").startswith("0.10.") and cores() > 1


def _mend_small_convolutions() -> None:
    """Sets XLA's option for small convolutions, which it reads when JAX starts, unless the user has set any."""
    from jax._src import xla_bridge

    platform = os.environ.get("JAX_PLATFORMS", "cpu")
    if os.environ.get("XLA_FLAGS") or xla_bridge._backends or "cpu" not in platform or not _has_slow_convolutions():
        return
    os.environ["XLA_FLAGS"] = _SMALL_CONVOLUTIONS
    logging.getLogger("kdiff").info("XLA_FLAGS=%s: small convolutions on all cores", _SMALL_CONVOLUTIONS)


def _keep_memory() -> bool:
    """Has glibc keep what is freed, for the next step needs as much, unless the user has set how memory is allocated.

    Not on JAX, where it saves nothing.
    """
    chosen = any(name.startswith("MALLOC_") for name in os.environ) or "malloc" in os.environ.get("GLIBC_TUNABLES", "")
    if BACKEND == "jax" or chosen or sys.platform != "linux" or _other_allocator():
        return False
    library = ctypes.CDLL(None)
    if not hasattr(library, "gnu_get_libc_version"):  # another C library, such as musl
        return False
    options = _KEEP | (_ONE_ARENA if cores() <= _FEW_CORES else {})
    kept = all([library.mallopt(*option) for option in options.items()])
    logging.getLogger("kdiff").info("glibc keeps memory that is freed; MALLOC_TRIM_THRESHOLD_=131072 would leave it")
    return kept


def _cpu_flags() -> set[str]:
    """Of Linux; empty elsewhere."""
    found = re.search(r"^(?:flags|Features)\s*:(.*)$", _read("/proc/cpuinfo"), re.MULTILINE)
    return set(found.group(1).split()) if found else set()


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


_KEEPS_MEMORY = _keep_memory()
if BACKEND == "jax":
    _mend_small_convolutions()
