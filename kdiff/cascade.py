"""Cascades: a model that generates small pictures, and super-resolution models that enlarge them in turn.

    cascade = Cascade([base, twice, four_times])
    images = cascade.sample(4, text="a red circle", guidance=[5.0, 1.5, 1.0])

Ho et al., "Cascaded Diffusion Models" (2021); Saharia et al., "Imagen" (2022). Each stage is a separate
`DiffusionModel`, trained and evaluated on its own. A super-resolution stage is conditioned on the picture of the
previous stage:

    conditions={"low": Concat("bicubic", noise=Cosine(), of=operators.Downsample(4))}

`of` computes that picture from the batch in `fit`. `noise` is noise conditioning augmentation: the condition has noise
of a level s, an input of the network that is random in training, so that the stage is robust to artefacts of the
previous stage. With z the noised condition and x the picture of the previous stage:

    not truncated    z ~ q(z_s | x), noise added to the finished picture
    truncated        z = x_s, from a run that stopped at s, which saves its remaining steps
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

STAGES = -2  # the stream of random numbers for the stages after the first


class _Noising(NamedTuple):
    """The noising of the picture for a stage.

    Attributes:
        level: s; None if the stage has no noise, or its `Concat` decides.
        truncated: whether the previous stage is truncated.
    """

    level: float | None
    truncated: bool


class Cascade(SafeFiles, Configurable, keras.Model):
    """A sequence of models: the first generates pictures, each other one enlarges those of the previous stage.

    It is saved and loaded like any Keras model, `cascade.save("cascade.keras")`, with all its stages. Only its stages
    are trained.

    Args:
        stages: one or more built `DiffusionModel`s. All but the first need a condition that is a `blocks.Concat`, of
            the shape of the output of the previous stage; if a network has several, the one named "low".
        name: the model's name.

    Raises:
        ValueError: if a stage has no such condition, or its shape does not fit.
    """

    def __init__(self, stages: Sequence[DiffusionModel], name: str | None = None):
        super().__init__(name=name, dtype="float32", autocast=False)
        self.stages = list(stages)
        if not self.stages or not all(isinstance(one, DiffusionModel) for one in self.stages):
            raise TypeError(f"Cascade: `stages` must be one or more DiffusionModels; received: {stages!r}")
        self.lows = [None, *(_low_of(stage, i) for i, stage in enumerate(self.stages) if i)]
        self._check_shapes()
        self._check_apart()
        self.built = True

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments, serialised, and which text conditions share encoders."""
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
        """The text conditions with frozen encoders, each with its stage and name."""
        layers = [getattr(stage.network, "conditions", None) for stage in self.stages]
        return [
            ((i, name), layer)
            for i, some in enumerate(layers)
            if isinstance(some, dict)
            for name, layer in some.items()
            if isinstance(layer, Prompt)
        ]

    def _check_apart(self) -> None:
        """Raises a ValueError if stages share a layer other than frozen encoders: loading would duplicate it."""
        encoders = [encoder for _, prompt in self._prompts() for encoder in prompt.encoders]
        free = {id(layer) for encoder in encoders for layer in encoder._flatten_layers()}
        seen: dict[int, int] = {}
        for i, stage in enumerate(self.stages):
            for layer in stage._flatten_layers():
                if id(layer) not in free and layer.weights and seen.setdefault(id(layer), i) != i:
                    raise ValueError(
                        f"Cascade: stages {seen[id(layer)]} and {i} share a layer, {layer!r:.200}; use separate ones, "
                        "or, for a `Prompt` with the same encoders, `prompt.through(prompt.layer)`"
                    )

    def _check_shapes(self) -> None:
        """Checks the built stages; a loaded stage is built before its weights are read."""
        for i, (before, stage) in enumerate(zip(self.stages, self.stages[1:], strict=False), 1):
            if not (before.built and stage.built) or before.example is None:
                continue
            wanted = stage.shapes[self.lows[i]][1:]
            if not fits(before.example, wanted):
                raise ValueError(
                    f"Cascade: stage {i} takes pictures ({words(wanted)}) as {self.lows[i]!r}, but stage {i - 1} makes "
                    f"({words(before.example)})"
                )

    def fit(self, *args, **options):
        """Raises a NotImplementedError, as do `evaluate` and `predict`: use those of its stages."""
        raise NotImplementedError("Cascade: train and evaluate each stage on its own,  `cascade.stages[1].fit(images)`")

    evaluate = predict = fit

    def call(self, inputs, training=None):
        """Raises a NotImplementedError: a cascade only samples."""
        raise NotImplementedError("Cascade: it has no output for an input; use `cascade.sample(8)`")

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
        """Yields the pictures of each stage as soon as they are finished; `sample` returns those of the last.

        All arguments are checked, for all stages, before the first runs.

        Args:
            num_samples: the number of samples.
            sampler, guidance, steps, schedule, ema: as in `DiffusionModel.sample`, for all stages; or a list, one
                per stage in order. Several guidance rules of one stage are a list in that list.
            level: of the noise on the condition of a stage, in [0, 1]; for all stages after the first, or a list, one
                for each of these; None for that of its `Concat`. At 0 a stage trusts the picture, at 1 it ignores it;
                published values are 0.1 to 0.3.
            truncated: whether the previous stage stops at that level, instead of adding noise to its finished picture;
                for all stages after the first, or a list. The previous stage then yields x_s / alpha. It needs a
                `Concat` with `noise_first`.
            low: pictures that replace those of the first stage, which is skipped and yields nothing: in [-1, 1], or
                integers in 0..255; one per sample, or one for all.
            seed: for the noise of all stages, of stage i by `stage_seed(seed, i)`; for the first as in
                `DiffusionModel.sample`. Or a list, one per sample. None draws one.
            batch_size: the number of samples drawn at once.
            verbose: show a progress bar per stage.
            **conditions: as in `DiffusionModel.sample`; each is passed to the stages whose networks take it. A text for
                stages that share their encoders is encoded once.

        Raises:
            ValueError: if a list has another length, no stage takes a condition, or the `sample` of a stage would
                raise.
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
            raise ValueError("Cascade: `low` needs a stage after the first")
        given = self._given(conditions, first)
        if first and noisings[1].truncated:
            raise ValueError("Cascade: `truncated` cannot apply to the first stage, which `low` replaces")
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
        """The noising of each stage; none for the first."""
        count = len(self.stages) - 1
        levels, cuts = (
            _each(name, value, count, "stage after the first")
            for name, value in (("level", level), ("truncated", truncated))
        )
        made = [_Noising(None, False)]
        for i, (one, cut) in enumerate(zip(levels, cuts, strict=True), 1):
            layer = self._beside(i)
            if (one is not None or cut) and layer.noise is None:
                raise ValueError(f"Cascade: `level` and `truncated` need noise, but stage {i} has none: {layer!r}")
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
                f"Cascade: `truncated` needs a schedule as `noise`, and `noise_first`, in stage {i}; it has: {layer!r}"
            )
        if not isinstance(codec, (Pixels, Identity)):
            raise ValueError(f"Cascade: `truncated` needs a stage {i - 1} that works on pixels; its codec: {codec!r}")

    def _beside(self, i: int) -> Concat:
        return self.stages[i].network.conditions[self.lows[i]]

    def _stop(self, i: int, level: float, options: dict[str, Any]) -> tuple[float, _Noising]:
        """(the time at which stage i - 1 stops, the noise level of stage i), at the same signal-to-noise ratio."""
        noise, schedule = self._beside(i).noise, _sampled(self.stages[i - 1], options)
        log_snr = noise.at(ops.convert_to_tensor([level], "float32")).log_snr
        stop = schedule.nearest(float(ops.convert_to_numpy(schedule.time(log_snr))[0]))
        if stop <= 0:
            return 0.0, _Noising(level, False)
        log_snr = schedule.at(ops.convert_to_tensor([stop], "float32")).log_snr
        return stop, _Noising(float(ops.convert_to_numpy(noise.time(log_snr))[0]), True)

    def _given(self, conditions: dict[str, Any], first: int) -> list[dict[str, Any]]:
        """The conditions of each stage, with text already encoded by frozen encoders."""
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
                f"Cascade: no stage takes {unknown}; the stages take {takes}, where the previous picture is supplied "
                "by the cascade"
            )
        return taken

    def _check(self, i: int, num_samples: int, options: dict[str, Any]) -> None:
        """Raises the ValueError that `sample` of the stage would raise, with the index of the stage."""
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
        """The inputs of a stage that come from the previous pictures."""
        name, layer = self.lows[i], self._beside(i)
        images = ops.convert_to_numpy(to_unit(np.asarray(images)))
        if noising.level is None:
            return {name: images}
        row = images.shape[-3:]
        shape = row if layer.noise_first else (*self.stages[i].shapes["image"][1:-1], row[-1])
        if noising.truncated:  # already noised: x_s = alpha (x_s / alpha) + sigma 0
            noise = np.zeros((num_samples, *shape), "float32")
        else:
            key = random.fold_in(random.key_of(seed), 0, STAGES)
            noise = ops.convert_to_numpy(random.normal(key, (num_samples, *shape)))
        level = np.full((num_samples,), noising.level, "float32")
        return {name: images, f"{name}_level": level, f"{name}_noise": noise}


def stage_seed(seed: int | Sequence[int], stage: int) -> Any:
    """The seed of a stage of a cascade: unchanged for the first, distinct for each other one.

    With the same seed the noise of two stages would be equal, and their errors would add up.

    Args:
        seed: of the cascade; or a list, one per sample.
        stage: the index of the stage, from 0.
    """
    if stage == 0:
        return seed
    if isinstance(seed, (list, tuple, range, np.ndarray)):
        return [stage_seed(int(one), stage) for one in seed]
    high, low = ops.convert_to_numpy(random.fold_in(random.key_of(seed), stage, STAGES)).astype("uint32")
    return (int(high) << 32) | int(low)


def _low_of(stage: DiffusionModel, i: int) -> str:
    """The name of the condition for the previous picture."""
    layers = getattr(stage.network, "conditions", None)
    found = [name for name, one in layers.items() if isinstance(one, Concat)] if isinstance(layers, dict) else []
    if len(found) != 1 and "low" not in found:
        raise ValueError(
            f"Cascade: the network of stage {i} must have one condition that is a blocks.Concat, or one named 'low', "
            f"for the previous picture; received: {found}"
        )
    return found[0] if len(found) == 1 else "low"


def _check_low(low: Any) -> None:
    low = np.asarray(low)
    check_examples(low, 1.0 if is_integer(low) else None, "low")
    if not is_integer(low) and like_bytes(low):
        raise ValueError(
            f"Cascade: floating-point `low` must be in [-1, 1]; received {low.min():.4g} to "
            f"{low.max():.4g}. Scale it, x / 127.5 - 1 for 0..255, or pass uint8"
        )


def _same_encoders(one: Prompt, other: Prompt) -> bool:
    return [id(encoder) for encoder in one.encoders] == [id(encoder) for encoder in other.encoders]


def _each(name: str, value: Any, count: int, of: str) -> list:
    """One value per stage."""
    if not isinstance(value, (list, tuple)):
        return [value] * count
    if len(value) != count:
        raise ValueError(
            f"Cascade: `{name}` must be one for all, or a list of {count}, one for each {of}; received {len(value)}: "
            f"{value!r}"
        )
    return list(value)


def _sampled(stage: DiffusionModel, options: dict[str, Any]) -> NoiseSchedule:
    """The schedule under which the stage is sampled."""
    return stage.schedule if options["schedule"] is None else NoiseSchedule.get(options["schedule"])


def _encoded(value: Any, layer: Any, rows: dict) -> Any:
    """The value; for text of a `Prompt` its rows, taken from `rows` if the same encoders already computed them."""
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
