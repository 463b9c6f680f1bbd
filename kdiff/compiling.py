"""Compiled programs kept on the disk, so that another process need not compile them again."""

import os
from pathlib import Path

from kdiff import backend

__all__ = ["compilation_cache"]


def compilation_cache(folder: str | os.PathLike) -> None:
    """Keeps compiled programs in a folder, from now on, and finds those that an earlier process left there.

        kdiff.compilation_cache("~/.cache/kdiff")          # at the top of the script

    - JAX: the programs of training and sampling steps, by JAX's own cache, as with JAX_COMPILATION_CACHE_DIR; here also
      those that take less than a second to compile. What remains of the start is tracing in Python.
    - PyTorch: what `compile(jit_compile=True)` generates, as with TORCHINDUCTOR_CACHE_DIR. PyTorch keeps it anyway, in
      a temporary folder. Layers that run one by one are not compiled.
    - TensorFlow: graphs are traced anew in each process, and there is nothing to keep; warns. On a GPU, with
      `jit_compile=True`, XLA has TF_XLA_FLAGS=--tf_xla_persistent_cache_directory=..., set before Python starts.

    A program is found again if the function, the shapes, the version of the backend and the kind of machine are the
    same. Nothing is ever deleted from the folder.

    Args:
        folder: made if it is not there.
    """
    folder = Path(folder).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    backend.keep_programs(str(folder.resolve()))
