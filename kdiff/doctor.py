"""What would make kdiff faster on this machine, and on which backend a network is fastest here."""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import keras
import numpy as np

from kdiff import backend
from kdiff.base import check_number
from kdiff.checks import as_numpy
from kdiff.codecs import Pixels
from kdiff.model import DiffusionModel
from kdiff.model.feeding import BatchCheck, data_shape, unpack
from kdiff.model.sources import source_of

__all__ = ["Report", "Timing", "doctor"]

_FIRST, _MEASURED = 2, 3  # steps that warm up, and rounds of which the fastest counts


class Timing(NamedTuple):
    """How long a network takes on a backend, in seconds.

    Attributes:
        train: a training step, with Adam and the averages.
        evaluate: the network alone, as in sampling.
        start: from the start of a process to the end of the first training step.
    """

    train: float
    evaluate: float
    start: float


class Report(NamedTuple):
    """What `doctor` has found.

    Attributes:
        advice: what would make training and sampling faster, a sentence or two each.
        timings: by the name of the backend; empty without a network.
        failures: why a backend has no timing, by its name.
    """

    advice: list[str]
    timings: dict[str, Timing]
    failures: dict[str, str]


def doctor(
    network: keras.layers.Layer | None = None,
    batch: Any = None,
    *,
    timeout: float = 600.0,
    print_fn: Callable[[str], None] = print,
) -> Report:
    """Looks at the machine and the backend, and says in plain words what would make training and sampling faster.

        kdiff.doctor()
        kdiff.doctor(kdiff.networks.DiT.b(2), {"image": np.zeros((16, 32, 32, 4)), "label": np.zeros(16, "int32")})

    With a network, a few steps are timed on each backend that is installed, in processes of their own, with the
    environment of this one: from what a script says, start it as the script is started.

    Args:
        network: a Keras model or layer as for `DiffusionModel`, which must be one that loads: of kdiff's classes, or of
            others that are registered with Keras where `import kdiff` finds them.
        batch: a batch of data as for `fit`: an array, a dictionary with conditions, or a pair with labels.
        timeout: the seconds that a backend may take.
        print_fn: called with each line.

    Raises:
        TypeError: for a network that is no layer, or is a `DiffusionModel`; for data of another kind than in `fit`.
        ValueError: for a network without a batch, a batch that `fit` would refuse, or a negative `timeout`.
    """
    check_number("doctor", "timeout", timeout, 0.0)
    if network is not None:
        batch = _checked(network, batch)
    versions = backend.installed()
    listed = ", ".join(f"{name} {version}" for name, version in versions.items())
    print_fn(f"{backend.cores():g} cores; installed: {listed}; Keras is on {backend.BACKEND}.")
    advice = list(backend.noticed())
    for one in advice or ["Nothing to advise."]:
        print_fn(f"- {one}")
    timings, failures = ({}, {}) if network is None else _timed(network, batch, list(versions), timeout, print_fn)
    return Report(advice, timings, failures)


def _checked(network, batch) -> dict[str, np.ndarray]:
    """The inputs in a batch by name, with text as numbers."""
    if not isinstance(network, keras.layers.Layer) or isinstance(network, DiffusionModel):
        raise TypeError(
            "doctor: `network` must be a Keras model or layer as for DiffusionModel, such as the `network` of one; "
            f"received: {type(network).__name__}"
        )
    if batch is None:
        raise ValueError("doctor: give a `batch` of data, such as np.zeros((16, 32, 32, 3)), to time the network on")
    source = source_of(*keras.utils.unpack_x_y_sample_weight(batch)).prepared(network)
    shapes, codec = source.shapes(), Pixels()
    check = BatchCheck(codec, data_shape(shapes, codec), network)
    inputs, _ = unpack(check(source.first()))
    return {name: as_numpy(value) for name, value in inputs.items()}


def _timed(network, batch, names, timeout, print_fn) -> tuple[dict[str, Timing], dict[str, str]]:
    timings, failures = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        files = Path(folder) / "network.json", Path(folder) / "batch.npz"
        files[0].write_text(json.dumps(keras.saving.serialize_keras_object(network)))
        np.savez(files[1], **batch)
        for name in names:
            try:
                timings[name] = _in_process(name, files, timeout)
            except (RuntimeError, subprocess.TimeoutExpired) as error:
                failures[name] = str(error)
    for name, timing in sorted(timings.items(), key=lambda pair: pair[1].train):
        step, evaluation = (f"{1000 * value:.4g} ms" for value in (timing.train, timing.evaluate))
        print_fn(f"{name:12} training step {step}, network {evaluation}; started in {timing.start:.0f} s")
    for name, why in failures.items():
        print_fn(f"{name:12} failed: {why.strip().splitlines()[-1] if why.strip() else why}")
    return timings, failures


def _in_process(name: str, files: tuple[Path, Path], timeout: float) -> Timing:
    root = str(Path(__file__).parents[1])
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "KERAS_BACKEND": name, "PYTHONPATH": path}
    code = f"from kdiff.doctor import _measure; _measure({str(files[0])!r}, {str(files[1])!r}, {time.time()!r})"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return Timing(**json.loads(done.stdout.strip().splitlines()[-1]))


def _measure(network_file: str, batch_file: str, began: float) -> None:
    """Prints the timing of a network, as JSON; in a process of its own."""
    network = keras.saving.deserialize_keras_object(json.loads(Path(network_file).read_text()))
    batch = dict(np.load(batch_file))
    model = DiffusionModel(network)
    model.compile("adam")
    model.train_on_batch(batch)
    start = time.time() - began
    m = model.schedule.at(np.float32(0.5))
    conditions = {name: value for name, value in batch.items() if name not in ("image", "encoded")}
    count = len(next(iter(batch.values())))
    x = np.random.default_rng(0).standard_normal((count, *model.shapes["image"][1:])).astype("float32")
    conditions = model.condition_rows(conditions, count)

    def evaluate(x, conditions):
        return model.denoise(x, m, ema=False, **conditions)

    asked = model.compiled_function("doctor", evaluate)
    jobs = {
        "train": lambda: model.train_on_batch(batch),
        "evaluate": lambda: backend.wait_for(asked(x, conditions)),
    }
    seconds = {name: _fastest(job) for name, job in jobs.items()}
    print(json.dumps({**seconds, "start": start}))


def _fastest(job: Callable[[], Any]) -> float:
    """The seconds of a job: the least of some rounds, each of half a second or one call."""
    for _ in range(_FIRST):
        job()
    rounds = []
    for _ in range(_MEASURED):
        begun, count = time.perf_counter(), 0
        while not count or time.perf_counter() - begun < 0.5:
            job()
            count += 1
        rounds.append((time.perf_counter() - begun) / count)
    return min(rounds)
