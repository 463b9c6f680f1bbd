"""A cascade: a model that makes small pictures, and models that make each of them larger.

    cascade = Cascade([base, twice, four_times])
    images = cascade.sample(4, text="a red circle", guidance=[5.0, 1.5, 1.0])

Ho et al., "Cascaded Diffusion Models" (2021); Saharia et al., "Imagen" (2022). Each stage is a `DiffusionModel` of its
own, trained and checked alone. A super-resolution stage has the picture before it as a condition beside x_t:

    conditions={"low": Concat("bicubic", noise=Cosine(), of=operators.Downsample(4))}

`of` makes that picture of the batch in `fit`. `noise` is noise conditioning augmentation: what the stage is given has
noise of a level s that it is told of, in training a random one, so that it does not trust the mistakes of the stage
before. With z the picture that a stage is given, from x that the stage before made:

    not truncated    z ~ q(z_s | x), noise added to what that stage has finished
    truncated        z = x_s, of a run that stopped at s; the rest of its steps is saved
"""

import random as py_random
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Self

import keras
import numpy as np
from keras import ops

from kdiff import deprecated, random
from kdiff.base import Configurable, check_integer, check_number
from kdiff.blocks.concat import Concat
from kdiff.checks import check_examples, is_integer, like_bytes
from kdiff.codecs import Identity, Pixels
from kdiff.codecs.base import to_unit
from kdiff.encoders import Prompt
from kdiff.model import DiffusionModel
from kdiff.model.condition_inputs import condition_layers, condition_names, fits, optional_names, words
from kdiff.model.saving import SafeFiles
from kdiff.schedules import NoiseSchedule
from kdiff.text import is_text, strings

__all__ = ["STAGES", "Cascade", "stage_seed"]

STAGES = -2  # the stream of random numbers that the stages after the first take theirs from


class _Noising(NamedTuple):
    """How the picture for a stage is noised.

    Attributes:
        level: s; None where the stage has no noise, or says it itself.
        truncated: whether the stage before is to stop.
    """

    level: float | None
    truncated: bool


class Cascade(SafeFiles, Configurable, keras.Model):
    """Models one after the other: the first makes pictures, each other one makes larger ones of those before.

    It is saved and loaded as any Keras model, `cascade.save("cascade.keras")`, with all its stages. It is not trained:
    its stages are.

    Args:
        stages: built `DiffusionModel`s, one or more. All but the first need a condition that is a `blocks.Concat`, of
            the shape of what the one before makes; if a network has several, it is the one named "low".
        name: the model's name.

    Raises:
        ValueError: if a stage has no such condition, or its shape does not fit.
    """

    def __init__(self, stages: Sequence[DiffusionModel], name: str | None = None):
        super().__init__(name=name, dtype="float32", autocast=False)
        self.stages = list(stages)
        if not self.stages or not all(isinstance(one, DiffusionModel) for one in self.stages):
            raise TypeError(f"Cascade: `stages` must be DiffusionModels, one or more; received: {stages!r}")
        self.lows = [None, *(_low_of(stage, i) for i, stage in enumerate(self.stages) if i)]
        self._check_shapes()
        self._check_apart()
        self.built = True

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments, serialised, and which texts have the encoders of which other."""
        prompts = self._prompts()
        same = [
            [list(place), list(first)]
            for i, (place, one) in enumerate(prompts)
            for first in [next(at for at, other in prompts[: i + 1] if _same_encoders(one, other))]
            if first != place
        ]
        return {**super().get_config(), **({"same": same} if same else {})}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        """The object that `get_config` described."""
        same = config.pop("same", ())
        cascade = super().from_config(config)
        prompts = dict(cascade._prompts())
        for place, first in same:
            prompts[tuple(place)].replace_encoders(prompts[tuple(first)].encoders)
        return cascade

    def _prompts(self) -> list[tuple[tuple[int, str], Prompt]]:
        """The texts that frozen encoders read, each with its place: the stage and the condition's name."""
        layers = [getattr(stage.network, "conditions", None) for stage in self.stages]
        return [
            ((i, name), layer)
            for i, some in enumerate(layers)
            if isinstance(some, dict)
            for name, layer in some.items()
            if isinstance(layer, Prompt)
        ]

    def _check_apart(self) -> None:
        """Raises a ValueError for a layer of two stages, but for frozen encoders: loading would make two of it."""
        encoders = [encoder for _, prompt in self._prompts() for encoder in prompt.encoders]
        free = {id(layer) for encoder in encoders for layer in encoder._flatten_layers()}
        seen: dict[int, int] = {}
        for i, stage in enumerate(self.stages):
            for layer in stage._flatten_layers():
                if id(layer) not in free and layer.weights and seen.setdefault(id(layer), i) != i:
                    raise ValueError(
                        f"Cascade: stages {seen[id(layer)]} and {i} have one layer, {layer!r:.200}; give each one of "
                        "its own, of a `Prompt` for the same encoders `prompt.through(prompt.layer)`"
                    )

    def _check_shapes(self) -> None:
        """Of those stages that are built; a loaded one is built before its weights are read."""
        for i, (before, stage) in enumerate(zip(self.stages, self.stages[1:], strict=False), 1):
            if not (before.built and stage.built) or before.example is None:
                continue
            wanted = stage.shapes[self.lows[i]][1:]
            if not fits(before.example, wanted):
                raise ValueError(
                    f"Cascade: stage {i} takes pictures ({words(wanted)}) as {self.lows[i]!r}, and stage {i - 1} makes "
                    f"({words(before.example)})"
                )

    def fit(self, *args, **options):
        """Raises a NotImplementedError, as `evaluate` and `predict` do: its stages have these methods."""
        raise NotImplementedError("Cascade: train and evaluate each stage alone, `cascade.stages[1].fit(images)`")

    evaluate = predict = fit

    def call(self, inputs, training=None):
        """Raises a NotImplementedError: a cascade draws."""
        raise NotImplementedError("Cascade: it has no output for an input; it draws, `cascade.sample(8)`")

    @deprecated.arguments(averages="ema")
    def sample(self, num_samples: int, **options) -> np.ndarray:
        """The pictures of the last stage; for all arguments see `sample_stages`."""
        for images in self.sample_stages(num_samples, **options):
            last = images
        return last

    @deprecated.arguments(averages="ema")
    def sample_stages(
        self,
        num_samples: int,
        *,
        sampler: Any = None,
        guidance: Any = None,
        steps: Any = None,
        schedule: Any = None,
        ema: Any = True,
        level: Any = None,
        truncated: Any = False,
        low: Any = None,
        seed: int | Sequence[int] | None = 0,
        batch_size: int = 64,
        verbose: bool = False,
        **conditions,
    ) -> Iterator[np.ndarray]:
        """Yields the pictures of each stage, as soon as it has made them: those of the last are what `sample` returns.

        Everything is checked, for all stages, before the first begins.

        Args:
            num_samples: how many.
            sampler, guidance, steps, schedule, ema: as of `DiffusionModel.sample`, for all stages; or a list, one
                a stage, the first first. Several guidance rules of a stage are a list in that list.
            level: of the noise that a stage's picture is given, in [0, 1]; for all stages after the first, or a list,
                one for each of these; None for what the stage's `Concat` says. At 0 a stage trusts it, at 1 it does not
                see it; published values are 0.1 to 0.3.
            truncated: whether the stage before stops at that level, in place of noise added to what it has finished;
                for all stages after the first, or a list. What the stage before yields is then x_s / alpha. It needs a
                `Concat` with `noise_first`.
            low: pictures in place of what the first stage makes, which is left out and yields nothing: in [-1, 1], or
                whole numbers in 0..255; one a sample, or one for all.
            seed: names the noise of all stages, of stage i that of `stage_seed(seed, i)`; of the first it is as of
                `DiffusionModel.sample`. Or a list, one a sample. None: one is drawn.
            batch_size: how many are made at once.
            verbose: show a progress bar, one a stage.
            **conditions: as of `DiffusionModel.sample`; each is given to those stages whose networks take it. A text
                for stages that share their encoders is encoded once.

        Raises:
            ValueError: if a list has another length, no stage takes a condition, or a stage's `sample` would raise.
        """
        check_integer("Cascade", "num_samples", num_samples)
        own = {"sampler": sampler, "guidance": guidance, "steps": steps, "schedule": schedule, "ema": ema}
        options = self._own_options(own)
        noisings = self._noisings(level, truncated)
        seed = py_random.randrange(2**32) if seed is None else seed
        first = 0 if low is None else 1
        if first:
            _check_low(low)
        if first == len(self.stages):
            raise ValueError("Cascade: `low` is for the stages after the first, of which there are none")
        given = self._given(conditions, first)
        if first and noisings[1].truncated:
            raise ValueError("Cascade: `truncated` is of a stage that runs, and `low` takes the place of the first")
        for i in range(first, len(self.stages)):
            options[i] |= {**given[i], "seed": stage_seed(seed, i)}
            if noisings[i].truncated:
                options[i - 1]["stop"], noisings[i] = self._stop(i, noisings[i].level, options[i - 1])
        for i in range(first, len(self.stages)):
            self._check(i, num_samples, options[i])
        return self._stages(num_samples, options, noisings, low, first, batch_size, verbose)

    def _stages(self, num_samples, options, noisings, images, first, batch_size, verbose):
        for i in range(first, len(self.stages)):
            stage, some = self.stages[i], options[i]
            if i:
                some |= self._low(i, images, noisings[i], num_samples, some["seed"])
            images = stage.sample(num_samples, **some, batch_size=batch_size, verbose=verbose)
            if some.get("stop"):
                images = images / float(_sampled(stage, some).sampled_at(some["stop"]).alpha)
            yield images

    def _own_options(self, given: dict[str, Any]) -> list[dict[str, Any]]:
        """The arguments of each stage."""
        each = {name: _each(name, value, len(self.stages), "stage") for name, value in given.items()}
        return [{name: values[i] for name, values in each.items()} for i in range(len(self.stages))]

    def _noisings(self, level, truncated) -> list[_Noising]:
        """Of the first stage none."""
        count = len(self.stages) - 1
        levels, cuts = (
            _each(name, value, count, "stage after the first")
            for name, value in (("level", level), ("truncated", truncated))
        )
        made = [_Noising(None, False)]
        for i, (one, cut) in enumerate(zip(levels, cuts, strict=True), 1):
            layer = self._beside(i)
            if (one is not None or cut) and layer.noise is None:
                raise ValueError(f"Cascade: `level` and `truncated` need noise, and stage {i} has none: {layer!r}")
            if one is not None:
                check_number("Cascade", "level", one, 0, 1)
            if cut:
                self._check_truncated(i, layer)
            made.append(_Noising(layer.level if one is None and layer.noise is not None else one, bool(cut)))
        return made

    def _check_truncated(self, i: int, layer: Concat) -> None:
        codec = self.stages[i - 1].codec
        if not (layer.noise_first and isinstance(layer.noise, NoiseSchedule)):
            raise ValueError(
                f"Cascade: `truncated` needs a schedule as `noise`, and `noise_first`, of stage {i}; it has: {layer!r}"
            )
        if not isinstance(codec, (Pixels, Identity)):
            raise ValueError(
                f"Cascade: `truncated` needs a stage {i - 1} that learns the pictures themselves; its codec: {codec!r}"
            )

    def _beside(self, i: int) -> Concat:
        return self.stages[i].network.conditions[self.lows[i]]

    def _stop(self, i: int, level: float, options: dict[str, Any]) -> tuple[float, _Noising]:
        """(the time at which stage i - 1 stops, the level that stage i is told): of one signal-to-noise ratio."""
        noise, schedule = self._beside(i).noise, _sampled(self.stages[i - 1], options)
        log_snr = noise.at(ops.convert_to_tensor([level], "float32")).log_snr
        stop = schedule.nearest(float(ops.convert_to_numpy(schedule.time(log_snr))[0]))
        if stop <= 0:
            return 0.0, _Noising(level, False)
        log_snr = schedule.at(ops.convert_to_tensor([stop], "float32")).log_snr
        return stop, _Noising(float(ops.convert_to_numpy(noise.time(log_snr))[0]), True)

    def _given(self, conditions: dict[str, Any], first: int) -> list[dict[str, Any]]:
        """The conditions of each stage, text as numbers where it is encoded by a frozen encoder."""
        taken, rows = [], {}
        for i, stage in enumerate(self.stages):
            names = (*(condition_names(stage.network) or ()), *optional_names(stage.network))
            own = {name for name in names if i and name.removeprefix(self.lows[i]) in ("", "_level", "_noise")}
            some = {name: value for name, value in conditions.items() if name in names and name not in own}
            layers = condition_layers(stage.network)
            taken.append({name: _encoded(value, layers.get(name), rows) for name, value in some.items()})
        known = {name for some in taken[first:] for name in some}
        if unknown := sorted(set(conditions) - known):
            takes = [list(condition_names(stage.network) or ()) for stage in self.stages]
            raise ValueError(
                f"Cascade: no stage takes {unknown}; the stages take {takes}, of which the picture before is given to "
                "each by the cascade"
            )
        return taken

    def _check(self, i: int, num_samples: int, options: dict[str, Any]) -> None:
        """Raises the ValueError that the stage's `sample` would raise, with the number of the stage."""
        stage = self.stages[i]
        picture = {}
        if i and stage.built:
            sizes = [1 if size is None else size for size in stage.shapes[self.lows[i]][1:]]
            picture = {self.lows[i]: np.zeros(sizes, "float32")}
        try:
            stage._run(num_samples, **options, **picture)
        except (ValueError, TypeError) as error:
            raise type(error)(f"Cascade: stage {i}: {error}") from error

    def _low(self, i: int, images, noising: _Noising, num_samples: int, seed) -> dict[str, Any]:
        """The inputs of a stage that are made of the pictures before it."""
        name, layer = self.lows[i], self._beside(i)
        images = ops.convert_to_numpy(to_unit(np.asarray(images)))
        if noising.level is None:
            return {name: images}
        row = images.shape[-3:]
        shape = row if layer.noise_first else (*self.stages[i].shapes["image"][1:-1], row[-1])
        if noising.truncated:  # it has its noise: x_s = alpha (x_s / alpha) + sigma 0
            noise = np.zeros((num_samples, *shape), "float32")
        else:
            key = random.fold_in(random.key_of(seed), 0, STAGES)
            noise = ops.convert_to_numpy(random.normal(key, (num_samples, *shape)))
        level = np.full((num_samples,), noising.level, "float32")
        return {name: images, f"{name}_level": level, f"{name}_noise": noise}


def stage_seed(seed: int | Sequence[int], stage: int) -> Any:
    """The seed of a stage of a cascade: for the first the same, for each other one of its own.

    With the same seed the noise of two stages would be alike, number for number, and their errors would add up.

    Args:
        seed: of the cascade; or a list, one a sample.
        stage: 0 for the first.
    """
    if stage == 0:
        return seed
    if isinstance(seed, (list, tuple, range, np.ndarray)):
        return [stage_seed(int(one), stage) for one in seed]
    high, low = ops.convert_to_numpy(random.fold_in(random.key_of(seed), stage, STAGES)).astype("uint32")
    return (int(high) << 32) | int(low)


def _low_of(stage: DiffusionModel, i: int) -> str:
    """The name of the condition that is the picture before."""
    layers = getattr(stage.network, "conditions", None)
    found = [name for name, one in layers.items() if isinstance(one, Concat)] if isinstance(layers, dict) else []
    if len(found) != 1 and "low" not in found:
        raise ValueError(
            f"Cascade: the network of stage {i} must have one condition that is a blocks.Concat, or one named 'low', "
            f"for the picture before; it has: {found}"
        )
    return found[0] if len(found) == 1 else "low"


def _check_low(low: Any) -> None:
    low = np.asarray(low)
    check_examples(low, 1.0 if is_integer(low) else None, "low")
    if not is_integer(low) and like_bytes(low):
        raise ValueError(
            f"Cascade: `low` of floating-point numbers must be in [-1, 1]; received {low.min():.4g} to "
            f"{low.max():.4g}. Scale it, x / 127.5 - 1 for 0..255, or give it as uint8"
        )


def _same_encoders(one: Prompt, other: Prompt) -> bool:
    return [id(encoder) for encoder in one.encoders] == [id(encoder) for encoder in other.encoders]


def _each(name: str, value: Any, count: int, of: str) -> list:
    """One value a stage."""
    if not isinstance(value, (list, tuple)):
        return [value] * count
    if len(value) != count:
        raise ValueError(
            f"Cascade: `{name}` must be one for all, or a list of {count}, one for each {of}; received {len(value)}: "
            f"{value!r}"
        )
    return list(value)


def _sampled(stage: DiffusionModel, options: dict[str, Any]) -> NoiseSchedule:
    """The schedule that the stage is sampled under."""
    return stage.schedule if options["schedule"] is None else NoiseSchedule.get(options["schedule"])


def _encoded(value: Any, layer: Any, rows: dict) -> Any:
    """The value; of text for a `Prompt` its rows, from `rows` if the same encoders have made them already."""
    if value is None or not isinstance(layer, Prompt) or not is_text(value):
        return value
    one = np.ndim(value) == 0
    key = (
        *map(id, layer.encoders),
        *map(repr, layer.tokenizers),
        *(layer.masked, layer.lower, layer.inside),
        tuple(strings([value] if one else value)),
    )
    if key not in rows:
        rows[key] = layer.prepare([value] if one else value)
    return rows[key][0] if one else rows[key]
