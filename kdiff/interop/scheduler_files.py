"""A scheduler of diffusers alone: `load_scheduler` of a file or folder, and `save_scheduler` to one.

process = load_scheduler("sd-turbo/scheduler")
x = process.sampler(denoise, process.schedule, (4, 32, 32, 3))
model = DiffusionModel(network, **process._asdict())
"""

from pathlib import Path
from typing import Any

from kdiff.interop.files import read_json, write_json
from kdiff.interop.scheduler_saving import scheduler_config
from kdiff.interop.schedulers import Process, process

__all__ = ["NAME", "load_scheduler", "save_scheduler"]

NAME = "scheduler_config.json"


def load_scheduler(path: str | Path, learned: bool = False, tokens: int | None = None) -> Process:
    """What a scheduler's file says: a schedule, a prediction, a time label and a sampler.

    Args:
        path: the file; or its folder, with `scheduler_config.json`; or a pipeline's, with the folder `scheduler`.
        learned: whether the network predicts the variance as well.
        tokens: the length of the transformer's sequence, (height / patch) (width / patch), on which the times depend
            where `use_dynamic_shifting` is true.

    Raises:
        ValueError: if the file is missing or damaged, or says what kdiff cannot do.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "scheduler" / NAME if (path / "scheduler" / NAME).exists() else path / NAME
    return process(read_json(path), path, learned, tokens)


def save_scheduler(process: Any, path: str | Path) -> None:
    """Writes a file that diffusers' `from_pretrained` of the class reads.

    Args:
        process: what `load_scheduler` gives; or anything that has its four parts, as a `DiffusionModel`.
        path: the file, if it ends in ".json"; or its folder. Files of the same name are replaced.

    Raises:
        ValueError: if diffusers has no such scheduler.
    """
    path = Path(path)
    process = Process(*(getattr(process, name) for name in Process._fields))
    write_json(path if path.suffix == ".json" else path / NAME, scheduler_config(process))
