"""Keras callbacks: samples that show how a diffusion model learns; a backup, with which training survives a kill."""

import contextlib
import math
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import h5py
import keras
import numpy as np

from kdiff import backend, pictures
from kdiff.base import check_integer
from kdiff.codecs import Codec
from kdiff.periodic import DIGITS, Periodic, Skipping
from kdiff.sampling import Sampler
from kdiff.solvers import Solver
from kdiff.text import is_text, strings
from kdiff.writing import replacing

__all__ = ["BACKUP", "BackupCallback", "SampleCallback"]

BACKUP = "backup.weights.h5"  # the file of `BackupCallback`


class SampleCallback(Periodic):
    """Draws samples during training, always from the same noise, so that the same images improve.

    It writes `samples-epoch-0001.png`, ... (or `samples-step-00000100.png`, ...) to `folder`. Resumed training
    continues the numbering. A failure causes a warning, and never stops training.

        model.fit(dataset, epochs=50, callbacks=[SampleCallback("runs/digits", every=5)])

    Args:
        folder: the folder for the files, which is created if necessary.
        every: the number of epochs (or steps) between grids.
        num_samples: the number of images in a grid.
        unit: "epoch", or "step" for batches.
        sampler: a `Sampler`, a `Solver` or its name; `None`: that of the model.
        steps: the number of sampling steps; `None`: that of the sampler.
        seed: the seed of the noise.
        conditions: the conditions of the samples: a dict of arrays or strings with `num_samples` rows, or of one value
            for all of them; `None` is no condition.
        size: the size of the samples, for a model that is built for any size, as in `sample`.
        draw: a function that draws samples that are not images, such as series: from the array that `sample` returns to
            images, `(count, height, width, channels)`, uint8 or in [-1, 1], or to one image of all of them, `(height,
            width, channels)`, such as `np.asarray(figure.canvas.buffer_rgba())` for a plot.
        columns: the number of images per row; `None`: an approximately square grid.
        captions: the text under each image. `None` shows the conditions that are strings or integers, joined by commas,
            if there are any, and `True` requires them; `False` shows none; or a list with one string per image.
        class_names: the names that the captions show instead of the integers 0, 1, ...
        trajectory_gif: whether to write `trajectory.gif`, from noise to images, when training ends.
        preview: a `Codec` that decodes the steps of `trajectory_gif` instead of that of the model, which may be slow.
        training_gif: whether to write `training.gif`, from the first grid in `folder` to the last, when training ends.
        tensorboard: a folder of TensorBoard logs for the grids (this needs TensorFlow), or `None`.

    Raises:
        ValueError: for an argument out of range, an unknown sampler, or conditions or captions with another number of
            rows.
        ImportError: if Pillow is missing, or TensorFlow for `tensorboard`.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        every: int = 1,
        num_samples: int = 16,
        *,
        unit: str = "epoch",
        sampler: Sampler | Solver | str | None = None,
        steps: int | None = None,
        seed: int = 0,
        conditions: Mapping[str, Any] | None = None,
        size: Sequence[int] | None = None,
        draw: Callable[[np.ndarray], np.ndarray] | None = None,
        columns: int | None = None,
        captions: bool | Sequence[str] | None = None,
        class_names: Sequence[str] | None = None,
        trajectory_gif: bool = False,
        preview: Codec | str | None = None,
        training_gif: bool = False,
        tensorboard: str | os.PathLike | None = None,
    ):
        super().__init__(every, unit)
        check_integer("SampleCallback", "num_samples", num_samples)
        check_integer("SampleCallback", "seed", seed, minimum=0)
        for name, value in (("steps", steps), ("columns", columns)):
            if value is not None:
                check_integer("SampleCallback", name, value)
        self.folder = Path(folder)
        self.num_samples = num_samples
        self.sampler = _check_sampler(sampler)
        self.steps = steps
        self.seed = seed
        self.conditions = _check_conditions(conditions, num_samples)
        self.size, self.draw = size, draw
        self.preview = None if preview is None else Codec.get(preview)
        self.columns = columns
        self.class_names = _check_names(class_names)
        self.captions = _check_captions(captions, self.conditions, self.class_names, num_samples)
        self.trajectory_gif = trajectory_gif
        self.training_gif = training_gif
        self.tensorboard = tensorboard
        pictures.pillow()
        self.folder.mkdir(parents=True, exist_ok=True)
        self._writer = _tensorboard_writer(tensorboard) if tensorboard is not None else None
        self._last: Path | None = None

    def act(self, number: int) -> None:
        """Draws samples."""
        self._try("draw samples", self._draw, number)

    def on_train_end(self, logs: dict | None = None) -> None:
        """Writes the animations that were asked for."""
        if self.trajectory_gif:
            self._try("write trajectory.gif", self._write_trajectory)
        if self.training_gif:
            self._try("write training.gif", self._write_training)

    def _try(self, what: str, task: Callable, *args: Any) -> None:
        try:
            task(*args)
        except Exception as error:  # whatever it is: hours of training matter more than a picture
            at = f" at {self.unit} {args[0]}" if args else ""
            message = f"SampleCallback could not {what}{at}, and training goes on: {type(error).__name__}: {error}"
            warnings.warn(message, stacklevel=2)

    def _draw(self, number: int) -> None:
        samples = self.model.sample(self.num_samples, **self._options())
        path = self.folder / f"samples-{self.unit}-{number:0{DIGITS[self.unit]}d}.png"
        pictures.save_png(path, *self._pictures(samples))
        self._last = path
        if self._writer is not None:
            _log_image(self._writer, path, number)

    def _write_trajectory(self) -> None:
        steps = self.model.sample_steps(self.num_samples, preview=self.preview, **self._options())
        drawn = [self._pictures(step.x) for step in steps]
        frames = [pictures.to_uint8(frame) for frame, _, _ in drawn]
        pictures.save_gif(self.folder / "trajectory.gif", frames, drawn[0][1], captions=drawn[0][2])

    def _write_training(self) -> None:
        if self._last is None:
            raise ValueError(f"no grid was drawn; `every` is {self.every}")
        paths = {int(path.stem.split("-")[-1]): path for path in self.folder.glob(f"samples-{self.unit}-*.png")}
        last = int(self._last.stem.split("-")[-1])  # those after it are of an earlier, longer run
        written = [pictures.read_picture(path) for number, path in sorted(paths.items()) if number <= last]
        alike = [picture for picture in written if picture.shape == written[-1].shape]  # not an earlier run's
        pictures.save_gif(self.folder / "training.gif", alike, fps=4)

    def _pictures(self, samples: np.ndarray) -> tuple[np.ndarray, int | None, list[str] | None]:
        """(pictures, columns, captions): of one picture of all samples there are no captions."""
        if self.draw is None:
            return samples, self.columns, self.captions
        drawn = np.asarray(self.draw(samples))
        each = drawn.ndim == 4 and len(drawn) == len(samples)
        return drawn, self.columns if each else None, self.captions if each else None

    def _options(self) -> dict[str, Any]:
        sampler = {} if self.sampler is None else {"sampler": self.sampler}
        sampler |= {} if self.size is None else {"size": self.size}
        return {**sampler, "steps": self.steps, "seed": self.seed, **self.conditions}


class BackupCallback(keras.callbacks.BackupAndRestore):
    """Keras' `BackupAndRestore`, safe at every instant: training that was killed resumes as if uninterrupted.

        model.fit(dataset, epochs=50, callbacks=[kdiff.SampleCallback("runs/a"), kdiff.BackupCallback("runs/a")])

    The same script, run again, continues after the last backup. It is a single file, `backup.weights.h5`, which is
    written to a temporary name and then moved into place, with the weights, averages, optimizer, random states, the
    epoch and step, the metrics so far (on TensorFlow, only the loss), and the number of passes over the pipelines of
    `kdiff.data.images`, which determines their order. A full disk causes a warning: the last backup is kept, and
    training continues.

    In an interrupted epoch, the steps before the backup are counted again, but only their batches are read. Training
    therefore resumes bit for bit if the backend is deterministic, dropout has a seed, and each epoch has the same
    batches in another process: those of `kdiff.data.images` (without `augment` and `repeat=None`), and data that is not
    shuffled. Keras shuffles arrays anew in `fit`: use `kdiff.data.images(array, seed=0)` instead. Callbacks that change
    the model at the end of an epoch must precede this one.

    Args:
        backup_dir: the folder of the file, which is created if necessary.
        save_freq: "epoch", or the number of steps between backups.
        delete_checkpoint: whether to delete the file when training has ended.

    Raises:
        ValueError: for another `save_freq`; when training begins, for a file that is damaged or of another model.
    """

    def __init__(self, backup_dir: str | os.PathLike, save_freq: str | int = "epoch", delete_checkpoint: bool = True):
        if save_freq != "epoch" and (type(save_freq) is not int or save_freq < 1):
            raise ValueError(
                f'BackupCallback: `save_freq` must be "epoch", or a whole number of steps; received: {save_freq!r}'
            )
        super().__init__(os.fspath(backup_dir), save_freq, delete_checkpoint=delete_checkpoint)
        self._path = Path(backup_dir) / BACKUP
        self._weights_path = str(self._path)  # Keras loads it
        self._step = 0  # steps of this epoch
        self._due = False
        self._metrics: list[np.ndarray] = []  # of the epoch that was broken off
        self._passes: Sequence[int] = ()  # over the pipelines, before this epoch

    def on_train_begin(self, logs: dict | None = None) -> None:
        """Continues after the last backup, if there is one."""
        self._step, self._due, self._metrics = 0, False, []
        self.model._initial_epoch = None  # Keras keeps that of an earlier run
        if (place := backend.of_first_process(self._read)) is not None:
            backend.share_training(self.model)
            self._go_on(*place)

    def _read(self) -> tuple | None:
        """Loads the backup, and returns its epoch, step, passes and metrics; None if there is none."""
        if not self._path.exists():
            return None
        try:
            with h5py.File(self._path) as file:
                place = file["place"]
                epoch, step, passes = (place.attrs[name] for name in ("epoch", "step", "passes"))
                metrics = [values[()] for _, values in sorted(place.items())]
            self._load_model()
        except (OSError, KeyError) as error:
            raise ValueError(f"{self._path}: not a whole backup; to begin anew, remove it: {error}") from error
        return epoch, step, passes, metrics

    def _go_on(self, epoch: int, step: int, passes: np.ndarray, metrics: list[np.ndarray]) -> None:
        self._metrics = metrics
        self.model._initial_epoch = int(epoch)
        self._step = int(step)
        self._last_batch_seen = max(self._step - 1, 0)
        if orders := getattr(self.model, "orders", None):
            orders.passes = passes
        if self._step:
            self.model.train_function = Skipping(self.model, self._step)

    def on_epoch_begin(self, epoch: int, logs: dict | None = None) -> None:
        """Restores the metrics of an epoch that was broken off."""
        self._current_epoch = epoch
        self._note_passes()
        if self._metrics:
            for variable, values in zip(self.model.metrics_variables, self._metrics, strict=False):
                variable.assign(values)
            self._metrics = []
            self.model.train_function.logs = self._metrics_result()

    def _metrics_result(self) -> dict[str, Any]:
        try:
            return self.model.get_metrics_result()
        except ValueError:  # on TensorFlow, the first step makes all metrics but that of the loss
            return {metric.name: metric.result() for metric in self.model.metrics[:1]}

    def on_train_batch_end(self, batch: int, logs: dict | None = None) -> None:
        """Writes a backup if `save_freq` is a number of steps and it is time; of the last step, when the epoch ends."""
        if batch < self._step:  # it was done before
            return
        self._step = batch + 1
        if self._should_save_on_batch(batch):
            self._due = self._step >= (self.params.get("steps") or math.inf)
            if not self._due:
                self._save_model()

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        """Writes a backup if `save_freq` is "epoch"."""
        self._step = 0
        self._note_passes()
        super().on_epoch_end(epoch, logs)
        if self._due:
            self._due = False
            self._save_model()

    def on_train_end(self, logs: dict | None = None) -> None:
        """Deletes the backup, and the folder if nothing else is in it."""
        if self.delete_checkpoint:
            self._path.unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                self._path.parent.rmdir()

    def _note_passes(self) -> None:
        if orders := getattr(self.model, "orders", None):
            self._passes = orders.passes

    def _save_model(self) -> None:
        place = {"epoch": self._current_epoch, "step": self._step, "passes": np.array(self._passes, "int64")}
        variables = self.model.metrics_variables if self._step else []
        with backend.mean_of_processes(variables):  # all processes go on with the metrics of one
            metrics = [keras.ops.convert_to_numpy(variable) for variable in variables]
        try:
            with replacing(self._path) as new:
                self.model.save_weights(new)
                with h5py.File(new, "a") as file:
                    file.create_group("place").attrs.update(place)
                    for number, values in enumerate(metrics):
                        file["place"][f"{number:03d}"] = values
        except Exception as error:  # h5py raises several kinds where the disk is full
            message = f"BackupCallback could not write {self._path}, and training goes on: {error}"
            warnings.warn(message, stacklevel=2)


def _check_sampler(sampler: Sampler | Solver | str | None) -> Sampler | Solver | None:
    return sampler if sampler is None or isinstance(sampler, Sampler) else Solver.get(sampler)


def _check_conditions(conditions: Mapping[str, Any] | None, num_samples: int) -> dict[str, np.ndarray | None]:
    """Arrays, and None as it is: no condition."""
    conditions = {name: None if value is None else np.asarray(value) for name, value in (conditions or {}).items()}
    for name, value in conditions.items():
        if np.ndim(value) and len(value) != num_samples:
            raise ValueError(
                f"SampleCallback: the condition {name!r} must be one value, or one row for each of {num_samples} "
                f"samples; received the shape {value.shape}"
            )
    return conditions


def _check_names(class_names: Sequence[str] | None) -> list[str] | None:
    if isinstance(class_names, str):
        raise ValueError(f"SampleCallback: `class_names` must be a list of strings; received: {class_names!r}")
    return None if class_names is None else [str(name) for name in class_names]


def _check_captions(
    captions: bool | Sequence[str] | None,
    conditions: Mapping[str, np.ndarray | None],
    class_names: list[str] | None,
    num_samples: int,
) -> list[str] | None:
    """What stands under each image, or `None` for nothing."""
    if captions is False:
        return None
    if captions is not None and captions is not True:
        return pictures.check_captions("SampleCallback", captions, num_samples)
    words = [_words(value, class_names, num_samples) for value in conditions.values()]
    words = [column for column in words if column is not None]
    if captions and not words:
        raise ValueError("SampleCallback: `captions=True` needs a condition of strings or of whole numbers")
    return [", ".join(row) for row in zip(*words, strict=True)] or None


def _words(value: np.ndarray | None, class_names: list[str] | None, num_samples: int) -> list[str] | None:
    """A condition in words, one per sample; `None` if there are none for it."""
    if value is None or value.ndim > 1:
        return None
    if is_text(value):
        words = strings(value)
    elif value.dtype.kind in "iu":
        names = dict(enumerate(class_names or []))
        words = [names.get(number, str(number)) for number in value.reshape(-1).tolist()]
    else:
        return None
    return words if value.ndim else words * num_samples


def _tensorboard_writer(folder: str | os.PathLike):
    from kdiff.data._tensorflow import tf

    return tf.summary.create_file_writer(os.fspath(folder))


def _log_image(writer, path: Path, step: int) -> None:
    """Adds a PNG file to the log, in a form that does not need the package tensorboard, which only shows it."""
    from kdiff.data._tensorflow import tf

    height, width, channels = pictures.read_picture(path).shape
    picture = {"encoded_image_string": path.read_bytes(), "height": height, "width": width, "colorspace": channels}
    value = tf.compat.v1.Summary.Value(tag="samples", image=tf.compat.v1.Summary.Image(**picture))
    with writer.as_default():
        tf.summary.experimental.write_raw_pb(tf.compat.v1.Summary(value=[value]).SerializeToString(), step=step)
    writer.flush()
