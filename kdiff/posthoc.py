"""Post-hoc EMA: averages of the weights whose length is chosen after training (Karras et al. 2024, EDM2,
arXiv:2312.02696, section 3).

The best EMA length is not known before training, and it matters. During training a few power-function averages are
saved at intervals; the average of any other length is a linear combination of these snapshots:

    model = DiffusionModel(network, ema=[ema.Power(0.05), ema.Power(0.1)])
    model.compile("adam")
    model.fit(dataset, epochs=64, callbacks=[posthoc.SnapshotCallback("runs/a/averages")])

    curve = posthoc.sweep(model, "runs/a/averages", lambda model: model.evaluate(images, verbose=0))
    curve.plot("runs/a/lengths.png")
    posthoc.reconstruct(model, "runs/a/averages", curve.best)   # what `sample`, `evaluate` and `save` use from now on

Snapshot i is taken after t_i updates of an average with profile p_i, `ema.Power.density`. The average with the target
profile p is sum_i c_i snapshot_i, where c solves

    minimise the integral of (p - sum_i c_i p_i)^2,    sum_i c_i = 1,

using inner products in closed form, `ema.Power.product`. The paper lacks the constraint, which preserves weights that
hardly change in training: on random walks, with 16 snapshots, it reduces the error of the weights by a factor of
five to thirty. The remaining error decreases fast with the number of snapshots, and is largest for lengths far from
those that were saved: 32 snapshots of 0.05 and 0.1 suffice for 0.03 to 0.2.
"""

import contextlib
import os
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import keras
import numpy as np
from keras import ops

from kdiff import deprecated
from kdiff.base import check_choice, check_integer, needs
from kdiff.ema import EMA, Power
from kdiff.periodic import DIGITS, Periodic
from kdiff.writing import replacing

__all__ = ["LENGTHS", "Fit", "SnapshotCallback", "Sweep", "fit", "reconstruct", "steps", "sweep"]

LENGTHS = (0.02, 0.03, 0.04, 0.05, 0.065, 0.08, 0.1, 0.125, 0.15, 0.2, 0.25)
_NAME = re.compile(r"snapshot-(\d+)\.h5")


class SnapshotCallback(Periodic):
    """Saves the power-function averages of a model during training, for `reconstruct` and `sweep`.

    It writes `snapshot-00001000.h5`, ... to `folder`, named by the number of optimizer updates, the last at the end of
    training. Each file is written to a temporary name and then moved into place. A snapshot removes those with more
    updates from an earlier run, so a run that was killed and resumed by `BackupCallback` leaves the files of one run. A
    full disk causes a warning, and training continues.

    Args:
        folder: the folder for the files of one run, which is created if necessary.
        every: the number of epochs (or steps) between snapshots. 16 to 64 snapshots in total suffice.
        unit: "epoch", or "step" for batches.
        dtype: the type of the saved numbers, "float32" or "float16", which halves the size and costs three digits.

    Raises:
        ValueError: for an argument out of range; when training begins, if the model has no power-function average.
    """

    def __init__(self, folder: str | os.PathLike, every: int = 1, *, unit: str = "epoch", dtype: str = "float32"):
        super().__init__(every, unit)
        check_choice("SnapshotCallback", "dtype", dtype, ("float32", "float16"))
        self.folder, self.dtype = Path(folder), dtype

    def on_train_begin(self, logs: dict | None = None) -> None:
        """Checks that the model has power-function averages."""
        super().on_train_begin(logs)
        self._written = None
        averages = getattr(self.model, "ema_weights", None)
        begun_anew = averages and not averages.moved and int(ops.convert_to_numpy(averages.last_iteration))
        if begun_anew and _files(self.folder):
            raise ValueError(
                f"SnapshotCallback: the averages begin anew, as after `reconstruct` or `reset_ema`; {self.folder} has "
                "the snapshots of the training before, which those of this one would remove: give another folder"
            )
        if not _powers(self.model):
            raise ValueError(
                "SnapshotCallback: the model must keep power averages, DiffusionModel(..., ema=[ema.Power(0.05), "
                f"ema.Power(0.1)]); it was made with ema={getattr(self.model, 'ema', None)!r}"
            )

    def act(self, number: int) -> None:
        """Writes a snapshot."""
        model = self.model
        updates = int(ops.convert_to_numpy(model.ema_weights.updates))
        if updates in (0, self._written):
            return
        path = self.folder / f"snapshot-{updates:0{DIGITS['step']}d}.h5"
        try:
            with replacing(path) as new, h5py.File(new, "w") as file:
                self._write(file, model, updates)
            for step, other in _files(self.folder).items():
                if step > updates:
                    other.unlink()
        except OSError as error:
            message = f"SnapshotCallback could not write {path}, and training goes on: {error}"
            warnings.warn(message, stacklevel=2)
        self._written = updates

    def on_train_end(self, logs: dict | None = None) -> None:
        """Writes the last snapshot."""
        self.act(0)

    def _write(self, file: h5py.File, model: keras.Model, updates: int) -> None:
        powers = _powers(model)
        file.attrs.update(updates=updates, lengths=[model.ema_weights.profiles[which].length for which in powers])
        for number, which in enumerate(powers):
            for index, (_, average) in enumerate(model.ema_weights.pairs(model.network, which)):
                value = ops.convert_to_numpy(average)
                fits = np.abs(value).max(initial=0.0) <= np.finfo(self.dtype).max
                file[f"{number}/{index}"] = value.astype(self.dtype if fits else "float32")


class Fit(NamedTuple):
    """The linear combination of snapshots for an average.

    Attributes:
        coefficients: the coefficients of the averages in the snapshots, in the order of the updates; their sum is 1.
        error: the distance between the resulting and the target profile, relative to the norm of the target. The error
            of the weights is much smaller: this error times their change in training over that time.
    """

    coefficients: np.ndarray
    error: float


class Sweep(NamedTuple):
    """A metric against the length of the average.

    Attributes:
        lengths: the lengths of the averages.
        values: the metric for each length.
        errors: `Fit.error` for each length.
        at: the number of updates.
    """

    lengths: np.ndarray
    values: np.ndarray
    errors: np.ndarray
    at: int

    @property
    def best(self) -> float:
        """The length with the smallest value."""
        if np.isnan(self.values).all():
            raise ValueError("sweep: the metric was NaN for all lengths")
        return float(self.lengths[np.nanargmin(self.values)])

    def plot(self, path: str | None = None, label: str = "metric") -> Any:
        """Plots the metric against the length, with hollow markers for profile errors above 5 %, optionally to `path`.

        Returns:
            The matplotlib figure.

        Raises:
            ImportError: if matplotlib is missing (the extra `plot`).
        """
        with needs("plot", "Plots need matplotlib"):
            from matplotlib.figure import Figure

        figure = Figure(figsize=(5, 3), layout="constrained")
        axes = figure.subplots()
        axes.plot(self.lengths, self.values, color="tab:blue")
        for rough, fill in ((False, "tab:blue"), (True, "white")):
            chosen = (self.errors > 0.05) == rough
            marker = {"marker": "o", "linestyle": "", "markeredgecolor": "tab:blue", "markerfacecolor": fill}
            axes.plot(self.lengths[chosen], self.values[chosen], **marker)
        axes.axvline(self.best, color="gray", linewidth=0.8, linestyle="--")
        axes.set_xlabel("length of the average, sigma_rel")
        axes.set_ylabel(label)
        axes.set_title(f"after {self.at} updates; best: {self.best:g}", fontsize=9)
        if path is not None:
            with replacing(path) as new:
                figure.savefig(new)
        return figure


def steps(folder: str | os.PathLike) -> list[int]:
    """The numbers of updates for which there are snapshots, in increasing order."""
    return sorted(_files(folder))


def fit(kept: Sequence[tuple[float, Power]], at: float, wanted: Power) -> tuple[np.ndarray, float]:
    """(coefficients, error) of the linear combination of saved averages for the target profile `wanted`.

    Args:
        kept: (updates, profile) of each saved average.
        at: the number of updates of the target average, above 0.
        wanted: the target profile.

    Returns:
        The coefficients, float64 with shape `(len(kept),)`, and the error as in `Fit`.
    """
    kept = [(t / at, profile) for t, profile in kept]
    gram = np.array([[p.product(t, q, u) for u, q in kept] for t, p in kept])
    with_wanted = np.array([p.product(t, wanted, 1.0) for t, p in kept])
    ones = np.ones((len(kept), 1))
    system = np.block([[gram, ones], [ones.T, np.zeros((1, 1))]])  # with a Lagrange multiplier for the sum
    coefficients = np.linalg.lstsq(system, np.append(with_wanted, 1.0), rcond=None)[0][:-1]
    norm = wanted.product(1.0, wanted, 1.0)
    rest = norm - 2.0 * with_wanted @ coefficients + coefficients @ gram @ coefficients
    return coefficients, float(np.sqrt(max(rest, 0.0) / norm))


def reconstruct(model: keras.Model, folder: str | os.PathLike, length: float, at: int | None = None) -> Fit:
    """Reconstructs the average of this length, and sets both the weights and the averages of the model to it.

    The current weights are overwritten: to continue training, load a saved model or a backup.

    Args:
        model: a built `DiffusionModel` with the trained network; with any `ema`, or none.
        folder: the folder of the snapshots.
        length: sigma_rel, as in `ema.Power`.
        at: the number of updates, one of `steps(folder)`; None: the last. Only snapshots up to there are used.

    Raises:
        ValueError: if there are no snapshots, or none at `at`, or they are of another network; if a file is damaged.
    """
    weights, found = _checked(model, folder, at)
    return _reconstruct(model, weights, found, Power(length))


def sweep(
    model: keras.Model,
    folder: str | os.PathLike,
    metric: Callable[[keras.Model], float],
    lengths: Sequence[float] = LENGTHS,
    at: int | None = None,
) -> Sweep:
    """A metric of the model with the averages of several lengths. Afterwards the model is unchanged.

    Args:
        model: as in `reconstruct`; not during training.
        folder: the folder of the snapshots.
        metric: a function from the model to a number, where smaller is better.
        lengths: the lengths of the averages.
        at: as in `reconstruct`.

    Raises:
        ValueError: as in `reconstruct`.
    """
    weights, found = _checked(model, folder, at)
    powers = [Power(length) for length in lengths]
    if not powers:
        raise ValueError("sweep: `lengths` is empty")
    values, errors = [], []
    with _restored(model, weights):
        for power in powers:
            errors.append(_reconstruct(model, weights, found, power).error)
            values.append(float(metric(model)))
    return Sweep(np.array([power.length for power in powers]), np.array(values), np.array(errors), max(found))


def _powers(model: keras.Model) -> list[int]:
    """The numbers of the power averages that a model keeps."""
    averages = getattr(model, "ema_weights", None)
    profiles = averages.profiles if averages else ()
    return [which for which, profile in enumerate(profiles) if isinstance(profile, Power)]


def _files(folder: str | os.PathLike) -> dict[int, Path]:
    """The snapshots in a folder by their updates."""
    found = ((_NAME.fullmatch(path.name), path) for path in Path(folder).glob("snapshot-*.h5"))
    return {int(match[1]): path for match, path in found if match}


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[h5py.File]:
    try:
        with h5py.File(path) as file:
            yield file
    except (OSError, KeyError) as error:
        raise ValueError(f"{path}: not a whole snapshot: {error}") from error


def _checked(model: keras.Model, folder: str | os.PathLike, at: int | None) -> tuple[list, dict[int, Path]]:
    """The weights that snapshots are of, and the files, once it is known that they are of each other."""
    if not hasattr(model, "reset_ema"):
        raise TypeError(f"posthoc: a DiffusionModel is expected; received: {model!r}")
    if not model.built:
        raise ValueError("posthoc: the model has no weights yet; load it, or call `build`")
    if at is not None:
        check_integer("posthoc", "at", at)
    found = _files(folder)
    if not found:
        raise ValueError(f"posthoc: there are no snapshots in {folder}; `SnapshotCallback` writes them during `fit`")
    if at is not None and at not in found:
        raise ValueError(f"posthoc: `at` must be the updates of a snapshot, {sorted(found)}; received: {at}")
    found = {step: path for step, path in sorted(found.items()) if at is None or step <= at}
    weights = EMA.of(model.network)
    wanted = [tuple(weight.shape) for weight in weights]
    for path in found.values():
        with _opened(path) as file:
            shapes = [file[f"0/{index}"].shape for index in range(len(file["0"]))]
        if shapes != wanted:
            differ = [index for index, pair in enumerate(zip(shapes, wanted, strict=False)) if pair[0] != pair[1]]
            first = f"the first that differs is {weights[differ[0]].path}: {shapes[differ[0]]}" if differ else ""
            raise ValueError(
                f"{path}: a snapshot of another network: it has {len(shapes)} weights, the model {len(wanted)}; {first}"
            )
    return weights, found


def _reconstruct(model: keras.Model, weights: list, found: dict[int, Path], wanted: Power) -> Fit:
    kept = []
    for step, path in found.items():
        with _opened(path) as file:
            kept += [(step, Power(float(length))) for length in file.attrs["lengths"]]
    coefficients, error = fit(kept, max(found), wanted)
    sums = [np.zeros(weight.shape) for weight in weights]
    left = iter(coefficients)
    for path in found.values():
        with _opened(path) as file:
            for number in range(len(file.attrs["lengths"])):
                coefficient = next(left)
                for index, total in enumerate(sums):
                    total += coefficient * file[f"{number}/{index}"][()].astype("float64")
    for weight, total in zip(weights, sums, strict=True):
        weight.assign(total.astype("float32"))
    model.reset_ema()
    return Fit(coefficients, error)


@contextlib.contextmanager
def _restored(model: keras.Model, weights: list) -> Iterator[None]:
    """Afterwards the weights and the averages are as they were."""
    if model.ema_weights:
        model.ema_weights.pairs(model.network)  # they must fit, or others would be made
    changed = [*weights, *(model.ema_weights.variables if model.ema_weights else ())]
    values = [np.array(ops.convert_to_numpy(variable)) for variable in changed]
    try:
        yield
    finally:
        for variable, value in zip(changed, values, strict=True):
            variable.assign(value)


__getattr__ = deprecated.names(__name__, give="reconstruct")
