"""Samples in one to four steps: each method of distillation, and each that needs no teacher, on the same data.

    KERAS_BACKEND=jax python examples/few_steps.py --seeds 0 1 2                       # eight Gaussians in the plane
    KERAS_BACKEND=jax python examples/few_steps.py --method progressive scm
    KERAS_BACKEND=jax python examples/few_steps.py --data digits --steps 1500
    KERAS_BACKEND=jax python examples/few_steps.py --data fashion_mnist --steps 1500 --method reflow consistency

Each method but `ict` begins with a diffusion model, its teacher, that was trained for `--steps` steps. In the plane it
takes as many itself, `ict` twice as many, and a table has the energy distance to data, times 1000, of samples in 1, 2
and 4 steps, and that of as much data. Of pictures it takes as long as its teacher did, counted in passes through the
network, a backward pass as two, and `ict` as long as both; the table has the Frechet distance, by the features of a
classifier that was trained on them, with its interval, and the share of samples that the classifier reads as the class
that was asked for.

The folder `--out` keeps teachers and results, so that methods can be run one after the other: the table and the
pictures have all that lie there. `fashion_mnist` is a TensorFlow Dataset, which has to lie in `--data-dir`.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
from keras import layers
from matplotlib.figure import Figure

from kdiff import (
    DiffusionModel,
    blocks,
    data,
    evaluation,
    networks,
    objectives,
    pictures,
    predictions,
    reflow,
    schedules,
    students,
    times,
)

STEPS = (1, 2, 4)


class Plane:
    """Eight Gaussians around a circle; `floor` is the score of data."""

    shape: tuple = (2,)
    codec, batch, parts, samples = "identity", 256, 4, 5000
    title, panel, columns = "energy distance, times 1000", (1.7, 1.7), 8
    c_scm, c_huber = 1.0, 1.0  # large, so that the mean over the noise counts, which in few dimensions a norm distorts

    def __init__(self, steps: int, seed: int):
        self.x, self.seed = self.points(self.batch * max(1, steps // 10), seed), seed
        self.std = float(self.x.std())
        test, real = (self.points(self.parts * self.samples, more + seed) for more in (1000, 2000))
        self.test = [(part, self.mean_distance(part, part)) for part in np.split(test, self.parts)]
        self.floor = self.score(real)

    @staticmethod
    def points(count: int, seed: int) -> np.ndarray:
        generator = np.random.default_rng(seed)
        angle = 2 * np.pi * generator.integers(8, size=count) / 8
        centres = 1.2 * np.stack([np.cos(angle), np.sin(angle)], axis=-1)
        return (centres + 0.1 * generator.normal(size=(count, 2))).astype("float32")

    def network(self, **options: Any) -> networks.Network:
        """A small network, whose waves of time are as slow as all methods want them."""
        block = blocks.FeedForward(1, normalization=blocks.AdaptiveNorm(blocks.LayerNorm(affine=False)))
        return networks.MLP(64, 3, block, **options)

    def sampled(self, model: DiffusionModel, **options: Any) -> np.ndarray:
        return model.sample(self.parts * self.samples, batch_size=self.samples, seed=1 + self.seed, **options)

    @staticmethod
    def mean_distance(a: np.ndarray, b: np.ndarray) -> float:
        """The mean of |a - b| over all pairs, by |a|^2 - 2 a b + |b|^2."""
        squares = [(part**2).sum(axis=1) for part in (a, b)]
        between = squares[0][:, None] - 2 * a @ b.T + squares[1]
        return float(np.sqrt(np.maximum(between, 0)).mean(dtype="float64"))

    def score(self, samples: np.ndarray) -> list[float]:
        """The energy distance (Szekely and Rizzo 2013), times 1000: the mean of four, each of 5000 samples."""
        return [
            float(
                np.mean(
                    [
                        1000 * (2 * self.mean_distance(part, test) - self.mean_distance(part, part) - within)
                        for part, (test, within) in zip(np.split(samples, self.parts), self.test, strict=True)
                    ]
                )
            )
        ]

    def draw(self, panel: Any, samples: np.ndarray) -> None:
        panel.plot(*samples[:1000].T, ".", markersize=1.5, color="black")
        panel.set(xlim=(-1.8, 1.8), ylim=(-1.8, 1.8), aspect="equal")


class Pictures:
    """Grey pictures of ten classes, of a size that a small network learns in minutes; `floor` is that of test data."""

    source, size, epochs = "", 0, 0
    codec, batch, samples = "pixels", 64, 2000
    title, panel, columns = "Frechet distance", (4.2, 0.92), 3
    c_scm, c_huber = 0.1, None

    def __init__(self, steps: int, seed: int, data_dir: Path | None = None):
        self.seed, self.shape = seed, (self.size, self.size, 1)
        train, test = (self.arrays(split, data_dir) for split in ("train", "test"))
        self.x, self.std = train, float(train["image"].std())
        self.classifier = keras.Sequential(
            [
                keras.Input(self.shape),
                *(layers.Conv2D(32, 3, activation="relu"), layers.Conv2D(64, 3, 2, activation="relu")),
                *(layers.Flatten(), layers.Dropout(0.3), layers.Dense(48, activation="relu", name="features")),
                layers.Dense(10),
            ]
        )
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        self.classifier.compile(keras.optimizers.Adam(2e-3), loss, metrics=["accuracy"])
        self.classifier.fit(train["image"], train["label"], batch_size=64, epochs=self.epochs, verbose=0)
        features = evaluation.Extractor(self.classifier, evaluation.Images(channels=None), layer="features")
        self.distance = evaluation.FrechetDistance(features, reference=train["image"][:10_000])
        self.labels = test["label"][: self.samples]
        self.floor = self.score(test["image"][: self.samples])
        self.labels = np.arange(self.samples) % 10

    @classmethod
    def arrays(cls, split: str, data_dir: Path | None) -> dict[str, np.ndarray]:
        whole = {"shuffle": False, "drop_remainder": False, "cache": False}
        batches = data.images(cls.source, cls.size, 500, split=split, labels=True, data_dir=data_dir, **whole)
        parts = [(np.asarray(batch["image"]), np.asarray(batch["label"])) for batch in batches]
        images, labels = (np.concatenate(part) for part in zip(*parts, strict=True))
        images = images.astype("float32") / 127.5 - 1 if images.dtype == np.uint8 else images
        return {"image": images, "label": labels}

    def network(self, conditions: dict, **options: Any) -> networks.Network:
        """A small U-Net, whose labels are left out at times, so that it can be guided."""
        conditions = {**conditions, "label": blocks.LabelEmbedding(10, dropout=0.1)}
        return networks.UNet.residual(16, levels=2, depth=1, multipliers=(1, 2), conditions=conditions, **options)

    def sampled(self, model: DiffusionModel, **options: Any) -> np.ndarray:
        return model.sample(self.samples, batch_size=500, seed=1 + self.seed, label=self.labels, **options)

    def score(self, samples: np.ndarray) -> list[float]:
        """The Frechet distance, the ends of its interval, and the share of right ones."""
        self.distance.reset_state()
        self.distance.update_state(samples)
        report = self.distance.report()
        right = np.mean(np.argmax(self.classifier.predict(samples, verbose=0), axis=-1) == self.labels)
        return [float(report.value), *map(float, report.interval), float(right)]

    def draw(self, panel: Any, samples: np.ndarray) -> None:
        panel.imshow(pictures.grid(samples[:20], 10, padding=1, scale=2)[..., 0], cmap="gray", vmin=0, vmax=255)
        for spine in panel.spines.values():
            spine.set_visible(False)


class Digits(Pictures):
    """The 8x8 digits of scikit-learn."""

    source, size, epochs = "digits", 8, 40


class Fashion(Pictures):
    """Fashion-MNIST, its 28x28 pictures resized to 16x16."""

    source, size, epochs = "fashion_mnist", 16, 2


DATA = {"plane": Plane, "digits": Digits, "fashion_mnist": Fashion}


class Study:
    """A data set, and a number of steps that every model takes."""

    def __init__(self, dataset: Any, steps: int, folder: Path | None = None, seed: int = 0):
        self.data, self.steps, self.folder, self.seed = dataset, steps, folder, seed
        self.teachers: dict[str, DiffusionModel] = {}

    @property
    def pictures(self) -> bool:
        return isinstance(self.data.x, dict)

    def length(self, passes: float, less: float = 0.0) -> int:
        """Steps of `passes` passes through the network each: as many as a teacher's; or of pictures as long as they.

        `less` is what else was passed through the network, in steps of a teacher.
        """
        return max(5, round((self.steps - less) * 3 / passes)) if self.pictures else self.steps

    def turns(self, steps: int, x: Any = None) -> tuple[Any, dict[str, Any]]:
        """(data, arguments of `fit`) for this number of steps: whole epochs of a part of the data."""
        x, batch = self.data.x if x is None else x, self.data.batch
        count = len(next(iter(x.values()))) if isinstance(x, dict) else len(x)
        epochs = -(-steps // max(1, count // batch))
        part = batch * max(1, round(steps / epochs))
        x = {name: rows[:part] for name, rows in x.items()} if isinstance(x, dict) else x[:part]
        return x, {"batch_size": batch, "epochs": epochs, "verbose": 0}

    def fit(self, model: DiffusionModel, steps: int, x: Any = None, rate: float = 1e-3) -> DiffusionModel:
        """Trains, at a rate that falls to zero."""
        model.compile(keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(rate, steps)))
        x, turns = self.turns(steps, x)
        model.fit(x, **turns)
        return model

    def new(self, kind: str, **changes: Any) -> DiffusionModel:
        """A diffusion model of one of four kinds, as the methods need it, not trained; `changes` are its arguments."""
        trigonometric = {
            "prediction": predictions.TrigFlow(self.data.std),
            "times": times.LogNormalSigma(float(np.log(self.data.std)) - 0.3, 1.4),
        }
        objects = {
            # EDM's noise levels, known by their logarithms: consistency compares two of them.
            "exploding": {
                "schedule": schedules.VarianceExploding(0.002, 80.0),
                "time_label": times.LogSNR(-1.0),
                **trigonometric,
            },
            # sCM's, known by their angle, t: a network that learns from its derivative must see them slowly.
            "angle": {"schedule": schedules.Cosine(), "time_label": times.Scaled(10.0), **trigonometric},
            "straight": {
                "schedule": schedules.Rectified(),
                "prediction": "flow",
                "times": times.LogitNormal(),
                "time_label": times.Scaled(10.0),
            },
            "discrete": {"schedule": schedules.ScaledLinearBeta(1000), "prediction": "velocity", "times": "discrete"},
        }[kind]
        embedding = blocks.GuidanceEmbedding(blocks.SinusoidalEmbedding(64, 1000.0), "timestep_cond", 32, 64)
        network = self.data.network(embedding=embedding, conditions={"interval": blocks.Interval()})
        return DiffusionModel(network, **{"codec": self.data.codec, "ema": 0.995, **objects, **changes})

    def teacher(self, kind: str) -> DiffusionModel:
        """The trained model of this kind."""
        if kind not in self.teachers:
            file = (
                self.folder
                and self.folder / f"{type(self.data).__name__.lower()}-{kind}-{self.steps}-{self.seed}.keras"
            )
            if file and file.exists():
                self.teachers[kind] = keras.saving.load_model(file)
            else:
                self.teachers[kind] = self.fit(self.new(kind), self.steps, rate=2e-3)
            if file and not file.exists():
                self.teachers[kind].save(file)
        return self.teachers[kind]

    def student(
        self, kind: str, make: Callable[..., Any], passes: float, rate: float = 1e-3, **changes: Any
    ) -> DiffusionModel:
        """One that goes on from the teacher of this kind with the objective `make(teacher, steps)`."""
        teacher, steps = self.teacher(kind), self.length(passes)
        return self.fit(students.student(teacher, make(teacher, steps), **changes), steps, rate=rate)


def progressive(study: Study) -> dict[int, DiffusionModel]:
    """Progressive distillation, 16 steps to 1: there is a student for each number of steps; the last learn longest."""
    model, made, steps = study.teacher("straight"), {}, study.length(5)
    for count, share in {16: 0.1, 8: 0.1, 4: 0.15, 2: 0.25, 1: 0.4}.items():
        part = max(1, round(share * steps))
        optimizer = keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(2e-3, part))
        x, turns = study.turns(part)
        model = made[count] = students.progressive(
            model, x, (count,), optimizer=optimizer, changes={"ema": 0.98}, **turns
        )
    return made


def reflowed(study: Study) -> DiffusionModel:
    """Reflow on pairs of 16 steps of a solver of second order."""
    teacher, count = study.teacher("straight"), 10_000 if study.pictures else 20_000
    labels = {"label": np.arange(count) % 10} if study.pictures else {}
    pairs = reflow.pairs(teacher, count, sampler="heun", steps=16, batch_size=1000, **labels)
    steps = study.length(3, less=31 * count / study.data.batch / 3)
    return study.fit(students.student(teacher, "reflow", times="stratified"), steps, pairs)


def wide(study: Study) -> times.TimeSampler:
    """Noise levels of EDM, of which the largest, where sampling begins, are not too rare."""
    return times.LogNormalSigma(float(np.log(study.data.std)) - 0.4, 2.0)


def consistent(study: Study, make: Callable[..., Any], passes: float, **options: Any) -> DiffusionModel:
    return study.student("exploding", make, passes, times=wide(study), **options)


def improved(study: Study) -> DiffusionModel:
    """iCT, from drawn weights: no teacher, and neighbours on a grid that is refined in training."""
    steps = study.steps + study.length(4)
    objective = objectives.Consistency(pairs=objectives.Discretised(steps), c=study.data.c_huber)
    model = study.new("exploding", objective=objective, times=wide(study), sampler="consistency")
    return study.fit(model, steps)


def tangential(study: Study, taught: bool) -> DiffusionModel:
    """sCM, which is noisy: at a low rate, with or without the velocity of a teacher."""

    def make(teacher, steps):
        return objectives.SCM(teacher if taught else None, warmup=steps // 4, c=study.data.c_scm)

    return study.student("angle", make, 6 if taught else 5, rate=5e-4 if taught else 1e-3)


def latent(study: Study) -> DiffusionModel:
    """LCM; of pictures told the scale of guidance, which one that has no conditions cannot have."""
    guidance = (1.0, 3.0) if study.pictures else None
    return study.student(
        "discrete", lambda teacher, _: objectives.LCM(teacher, guidance=guidance), 6 if study.pictures else 5, ema=0.95
    )


def matched(study: Study) -> DiffusionModel:
    def make(teacher, _):
        fake = students.student(teacher, "denoising", ema=None)
        return objectives.DistributionMatching(teacher, fake, times=teacher.times)

    return study.student("exploding", make, 8)


METHODS: dict[str, tuple[str | None, Callable[[Study], Any]]] = {  # with the kind of its teacher
    "progressive": ("straight", progressive),
    "reflow": ("straight", reflowed),
    "consistency": (
        "exploding",
        lambda study: consistent(study, lambda teacher, _: objectives.Consistency(teacher), 6),
    ),
    "easy": (
        "exploding",
        lambda study: consistent(
            study,
            lambda _, steps: objectives.Consistency(pairs=objectives.Easy(steps), c=study.data.c_huber),
            4,
        ),
    ),
    "ict": (None, improved),
    "scm": ("angle", lambda study: tangential(study, False)),
    "scd": ("angle", lambda study: tangential(study, True)),
    "shortcut": ("straight", lambda study: study.student("straight", lambda *_: objectives.Shortcut(), 3.5)),
    "meanflow": (
        "straight",
        lambda study: study.student("straight", lambda *_: objectives.MeanFlow(), 3.5),
    ),
    "lcm": ("discrete", latent),
    "dmd2": ("exploding", matched),
}
TEACHERS = {
    "straight": "teacher",
    "exploding": "teacher of noise levels",
    "angle": "teacher of angles",
    "discrete": "discrete teacher",
}
GUIDED = "lcm, guided"  # the same network, told another scale
ROWS = ("data", *TEACHERS.values(), *METHODS, GUIDED)


class Results:
    """What was found of each method, in files of a folder, one for each."""

    def __init__(self, folder: Path, data: str, steps: int):
        self.folder, self.kind = folder, f"{data}-{steps}"
        folder.mkdir(parents=True, exist_ok=True)

    def add(self, name: str, seed: int, seconds: float, steps: int, scores: dict[int, list], shown: list) -> None:
        """Of one method and seed; `shown` has a few samples for each number of steps of `STEPS`."""
        file = self.folder / f"{self.kind}-{name}-{seed}.json"
        file.write_text(json.dumps({"seconds": seconds, "steps": steps, "scores": scores}), encoding="utf-8")
        if seed == 0 and shown:
            np.save(self.folder / f"{self.kind}-{name}.npy", np.stack([samples[:1000] for samples in shown]))

    def has(self, name: str, seed: int) -> bool:
        return (self.folder / f"{self.kind}-{name}-{seed}.json").exists()

    def all(self) -> dict[str, list[dict]]:
        """By method, of all seeds."""
        found = {
            name: [
                json.loads(file.read_text(encoding="utf-8"))
                for file in sorted(self.folder.glob(f"{self.kind}-{name}-[0-9]*.json"))
            ]
            for name in ROWS
        }
        return {name: one for name, one in found.items() if one}

    def table(self) -> str:
        """In Markdown: the mean of the seeds, and half of what is between the least and the most."""
        lines = ["| | 1 step | 2 steps | 4 steps | training steps | seconds |", "|---|---|---|---|---|---|"]
        for name, seeds in self.all().items():
            cells = [_cell([one["scores"][str(count)] for one in seeds]) for count in STEPS if count in _counts(seeds)]
            rest = [f"{np.mean([one[part] for one in seeds]):.0f}" for part in ("steps", "seconds")]
            lines.append(f"| {name} | {' | '.join([*cells, *[''] * (len(STEPS) - len(cells)), *rest])} |")
        return "\n".join(lines)

    def plot(self, file: Path, title: str) -> None:
        """Distances by the number of steps."""
        figure = Figure(figsize=(6.4, 4.4), layout="constrained")
        axes = figure.subplots()
        teachers, methods = list(TEACHERS.values()), [*METHODS, GUIDED]
        for name, seeds in self.all().items():
            counts = _counts(seeds)
            means = [np.mean([one["scores"][str(count)][0] for one in seeds]) for count in counts]
            if name == "data":
                axes.axhline(means[0], color="gray", linestyle=":", label="data")
            elif name in teachers:
                line = ("-", "--", "-.", ":")[teachers.index(name)]
                axes.plot(counts, means, color="black", linestyle=line, label=name)
            else:
                number = methods.index(name)
                marker = "os^vDPX*<>ph"[number]
                axes.plot(counts, means, color=f"C{number % 10}", marker=marker, markersize=5, label=name)
        counts = (1, 2, 4, 8, 16, 50)
        axes.set(xscale="log", yscale="log", xlabel="steps", ylabel=title)
        axes.set_xticks(counts, [str(count) for count in counts])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small", ncols=2)
        figure.savefig(file, dpi=100)

    def draw(self, file: Path, dataset: Any, columns: int) -> None:
        """Samples of all methods, those of one method one below the other."""
        names = [name for name in self.all() if (self.folder / f"{self.kind}-{name}.npy").exists()]
        lines = -(-len(names) // columns)
        wide, high = dataset.panel
        figure = Figure(figsize=(wide * columns, high * len(STEPS) * lines), layout="constrained")
        panels = figure.subplots(len(STEPS) * lines, columns, squeeze=False)
        for panel in panels.flat:
            panel.set(xticks=[], yticks=[])
            panel.axis("off")
        for number, name in enumerate(names):
            line, column = divmod(number, columns)
            for row, samples in enumerate(np.load(self.folder / f"{self.kind}-{name}.npy")):
                panel = panels[len(STEPS) * line + row][column]
                panel.axis("on")
                dataset.draw(panel, samples)
                panel.set(xticks=[], yticks=[])
                panel.set_ylabel(f"{STEPS[row]} step{'s' * (STEPS[row] > 1)}" if column == 0 else "")
            panels[len(STEPS) * line][column].set_title(name, fontsize=9)
        figure.savefig(file, dpi=80)


def _counts(seeds: list[dict]) -> list[int]:
    return [int(count) for count in seeds[0]["scores"]]


def _cell(scores: list[list[float]]) -> str:
    values = [score[0] for score in scores]
    spread = f" +- {(max(values) - min(values)) / 2:.2f}" if len(values) > 1 else ""
    if len(scores[0]) == 1:
        return f"{np.mean(values):.2f}{spread}"
    low, high, right = np.mean([score[1:] for score in scores], axis=0)
    return f"{np.mean(values):.2f} [{low:.2f}, {high:.2f}], {right:.1%}"


def evaluated(results: Results, dataset: Any, name: str, begun: float, models: Any, counts: tuple, **told: Any) -> None:
    """Keeps what a model, or one for each number of steps, reaches."""
    seconds, scores, shown = time.monotonic() - begun, {}, []
    several = models if isinstance(models, dict) else dict.fromkeys(counts, models)
    for count in counts:
        shown.append(dataset.sampled(several[count], steps=count, **told))
        scores[count] = dataset.score(shown[-1])
    trained = sum(int(model.step.value) for model in {id(model): model for model in several.values()}.values())
    results.add(name, dataset.seed, seconds, trained, scores, shown[: len(STEPS)])
    print(f"{name:24} {'   '.join(_cell([one]) for one in scores.values())}   {seconds:4.0f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", choices=[*METHODS, "all"], nargs="+", default=["all"])
    parser.add_argument("--data", choices=list(DATA), default="plane")
    parser.add_argument("--data-dir", type=Path, help="the folder of TensorFlow Datasets")
    parser.add_argument("--steps", type=int, default=4000, help="of training, of each teacher")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="all of it is done for each")
    parser.add_argument("--out", type=Path, default=Path("runs") / "few_steps", help="a folder")
    options = parser.parse_args()
    results = Results(options.out, options.data, options.steps)
    names = list(METHODS) if "all" in options.method else options.method
    for seed in options.seeds:
        keras.utils.set_random_seed(seed)
        more = {} if options.data == "plane" else {"data_dir": options.data_dir}
        dataset = DATA[options.data](options.steps, seed, **more)
        study = Study(dataset, options.steps, options.out, seed)
        results.add("data", seed, 0, 0, {1: dataset.floor}, [])
        for name in names:
            kind, method = METHODS[name]
            begun = time.monotonic()
            teacher = None if kind is None else study.teacher(kind)
            if teacher is not None and not results.has(TEACHERS[kind], seed):
                evaluated(results, dataset, TEACHERS[kind], begun, teacher, (1, 2, 4, 8, 16, 50), sampler="ddim")
            begun = time.monotonic()
            models = method(study)
            if name == "lcm" and study.pictures:
                evaluated(results, dataset, GUIDED, begun, models, STEPS, timestep_cond=2.0)
                evaluated(results, dataset, name, begun, models, STEPS, timestep_cond=1.0)
            else:
                evaluated(results, dataset, name, begun, models, (1,) if name == "dmd2" else STEPS)

    print(results.table())
    results.plot(options.out / f"{options.data}-distance.png", dataset.title)
    results.draw(options.out / f"{options.data}-samples.png", dataset, dataset.columns)
    print(f"Drawn in {options.out.resolve()}")


if __name__ == "__main__":
    main()
