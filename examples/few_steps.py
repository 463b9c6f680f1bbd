"""Samples in one to four steps: each method of distillation, and each that needs no teacher, on the same data.

    KERAS_BACKEND=jax python examples/few_steps.py                                     # eight Gaussians in the plane
    KERAS_BACKEND=jax python examples/few_steps.py --method progressive scm --seeds 3
    KERAS_BACKEND=jax python examples/few_steps.py --data digits --method reflow consistency

Each method begins with a diffusion model that was trained for `--steps` steps, and takes as many itself. In the plane a
table has the energy distance to data, times 1000, of samples in 1, 2 and 4 steps, and that of as much data. Of digits
it has the Frechet distance, by the features of a classifier that was trained on them, with its interval, and the share
of samples that the classifier reads as the digit that was asked for. It leaves a picture of all of them.
"""

import argparse
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
    Sampler,
    blocks,
    data,
    evaluation,
    networks,
    objectives,
    predictions,
    reflow,
    schedules,
    students,
    times,
)

STEPS = (1, 2, 4)


class Plane:
    """Eight Gaussians around a circle."""

    shape: tuple = (2,)
    codec, batch, samples = "identity", 256, 5000

    def __init__(self, steps: int, seed: int):
        self.x, self.test = self.points(self.batch * max(1, steps // 10), seed), self.points(self.samples, 1000 + seed)
        self.within = self.mean_distance(self.test, self.test)
        self.std = float(self.x.std())
        self.real = self.points(self.samples, 2000 + seed)

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
        return model.sample(self.samples, batch_size=self.samples, seed=1, **options)

    @staticmethod
    def mean_distance(a: np.ndarray, b: np.ndarray) -> float:
        parts = [
            np.sqrt(((part[:, None] - b) ** 2).sum(axis=-1)).sum(dtype="float64") for part in np.array_split(a, 50)
        ]
        return float(sum(parts)) / len(a) / len(b)

    def score(self, samples: np.ndarray) -> str:
        """The energy distance (Szekely and Rizzo 2013), times 1000."""
        between, within = self.mean_distance(samples, self.test), self.mean_distance(samples, samples)
        return f"{1000 * (2 * between - within - self.within):8.2f}"

    def draw(self, panel: Any, samples: np.ndarray) -> None:
        panel.plot(*samples[:1000].T, ".", markersize=1.5, color="black")
        panel.set(xlim=(-1.8, 1.8), ylim=(-1.8, 1.8), aspect="equal")


class Digits:
    """The 8x8 digits of scikit-learn, by class."""

    shape: tuple = (8, 8, 1)
    codec, batch, samples = "pixels", 128, 2000

    def __init__(self, steps: int, seed: int):
        train, test = (self.arrays(split) for split in ("train", "test"))
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
        self.classifier.fit(train["image"], train["label"], epochs=15, verbose=0)
        right = self.classifier.evaluate(test["image"], test["label"], verbose=0)[1]
        print(f"The classifier is right about {right:.1%} of the test digits.")
        features = evaluation.Extractor(self.classifier, evaluation.Images(channels=None), layer="features")
        self.distance = evaluation.FrechetDistance(features, reference=train["image"], held_out=test["image"])
        self.labels = np.arange(self.samples) % 10
        self.real = None

    @staticmethod
    def arrays(split: str) -> dict[str, np.ndarray]:
        batches = data.images(
            "digits", 8, 99, split=split, labels=True, shuffle=False, drop_remainder=False, repeat=False
        )
        parts = [(np.asarray(batch["image"]), np.asarray(batch["label"])) for batch in batches]
        images, labels = (np.concatenate(part) for part in zip(*parts, strict=True))
        images = images.astype("float32") / 127.5 - 1 if images.dtype == np.uint8 else images
        return {"image": images, "label": labels}

    def network(self, conditions: dict, **options: Any) -> networks.Network:
        conditions = {**conditions, "label": blocks.LabelEmbedding(10)}
        return networks.UNet.residual(32, levels=2, depth=1, multipliers=(1, 2), conditions=conditions, **options)

    def sampled(self, model: DiffusionModel, **options: Any) -> np.ndarray:
        return model.sample(self.samples, batch_size=500, seed=1, label=self.labels, **options)

    def score(self, samples: np.ndarray) -> str:
        """The Frechet distance with its interval, and the share of right ones."""
        self.distance.reset_state()
        self.distance.update_state(samples)
        report = self.distance.report()
        right = np.mean(np.argmax(self.classifier.predict(samples, verbose=0), axis=-1) == self.labels)
        low, high = report.interval
        return f"{report.value:6.2f} [{low:.2f}, {high:.2f}] {right:6.1%}"

    def draw(self, panel: Any, samples: np.ndarray) -> None:
        rows = samples[:50, :, :, 0].reshape(5, 10, 8, 8).transpose(0, 2, 1, 3).reshape(40, 80)
        panel.imshow(rows, cmap="gray", vmin=-1, vmax=1)


class Study:
    """A data set, and a number of steps that every model takes."""

    def __init__(self, dataset: Any, steps: int):
        self.data, self.steps = dataset, steps
        self.teachers: dict[str, DiffusionModel] = {}

    def fit(self, model: DiffusionModel, x: Any = None, rate: float = 1e-3, decays: bool = True) -> DiffusionModel:
        """Trains for `steps` steps, at a rate that falls to zero if it is to."""
        schedule = keras.optimizers.schedules.CosineDecay(rate, self.steps) if decays else rate
        model.compile(keras.optimizers.Adam(schedule))
        x = self.data.x if x is None else x
        count = len(x["image"] if "image" in x else x["encoded"]) if isinstance(x, dict) else len(x)
        epochs = max(1, round(self.steps / -(-count // self.data.batch)))
        model.fit(x, batch_size=self.data.batch, epochs=epochs, verbose=0)
        return model

    def new(self, kind: str) -> DiffusionModel:
        """A diffusion model of one of four kinds, as the methods need it, not trained."""
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
        embedding = blocks.MLPEmbedding(blocks.SinusoidalEmbedding(64, 1000.0), 64)
        network = self.data.network(embedding=embedding, conditions={"interval": blocks.Interval()})
        return DiffusionModel(network, codec=self.data.codec, ema=0.995, **objects)

    def teacher(self, kind: str) -> DiffusionModel:
        """The trained model of this kind."""
        if kind not in self.teachers:
            self.teachers[kind] = self.fit(self.new(kind), rate=2e-3)
        return self.teachers[kind]

    def student(self, kind: str, make: Callable[[DiffusionModel], Any], decays: bool = True, **changes: Any):
        """One that goes on from the teacher of this kind with another objective."""
        teacher = self.teacher(kind)
        return self.fit(students.student(teacher, make(teacher), **changes), decays=decays)


def progressive(study: Study) -> dict[int, DiffusionModel]:
    """Progressive distillation, 16 steps to 1, in equal parts: there is a student for each number of steps."""
    model, made, part = study.teacher("straight"), {}, max(1, study.steps // 5)
    for count in (16, 8, 4, 2, 1):
        optimizer = keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(1e-3, part))
        epochs = max(1, round(part / -(-len(_images(study.data.x)) // study.data.batch)))
        options = {"batch_size": study.data.batch, "epochs": epochs, "verbose": 0}
        model = made[count] = students.progressive(
            model, study.data.x, (count,), optimizer=optimizer, changes={"ema": 0.98}, **options
        )
    return made


def reflowed(study: Study) -> DiffusionModel:
    teacher, count = study.teacher("straight"), 20_000 if study.data.shape == (2,) else 10_000
    labels = {"label": np.arange(count) % 10} if isinstance(study.data.x, dict) else {}
    pairs = reflow.pairs(teacher, count, sampler="heun", steps=25, batch_size=1000, **labels)
    return study.fit(students.student(teacher, "reflow", times="stratified"), pairs)


def _images(x: Any) -> np.ndarray:
    return x["image"] if isinstance(x, dict) else x


METHODS: dict[str, Callable[[Study], Any]] = {
    "progressive": progressive,
    "reflow": reflowed,
    "consistency": lambda study: study.student(
        "exploding", objectives.Consistency, times=times.LogNormalSigma(float(np.log(study.data.std)) - 0.4, 2.0)
    ),
    "easy": lambda study: study.student(
        "exploding",
        lambda _: objectives.Consistency(pairs=objectives.Easy(study.steps)),
        decays=False,
        times=times.LogNormalSigma(float(np.log(study.data.std)) - 0.4, 2.0),
    ),
    "scm": lambda study: study.student("angle", lambda _: objectives.SCM(warmup=study.steps // 4)),
    "scd": lambda study: study.student("angle", lambda teacher: objectives.SCM(teacher, warmup=study.steps // 4)),
    "shortcut": lambda study: study.student("straight", lambda _: objectives.Shortcut()),
    "meanflow": lambda study: study.student("straight", lambda _: objectives.MeanFlow()),
    "lcm": lambda study: study.student("discrete", lambda teacher: objectives.LCM(teacher), ema=0.95),
    "dmd2": lambda study: study.student(
        "exploding",
        lambda teacher: objectives.DistributionMatching(
            teacher, students.student(teacher, "denoising", ema=None), times=teacher.times
        ),
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", choices=[*METHODS, "all"], nargs="+", default=["all"])
    parser.add_argument("--data", choices=("plane", "digits"), default="plane")
    parser.add_argument("--steps", type=int, default=3000, help="of training, of each model")
    parser.add_argument("--seeds", type=int, default=1, help="how often all of it is done")
    parser.add_argument("--out", type=Path, default=Path("runs") / "few-steps.png", help="a file, .png or .pdf")
    options = parser.parse_args()
    names = list(METHODS) if "all" in options.method else options.method
    rows: list[tuple[str, list[np.ndarray]]] = []
    for seed in range(options.seeds):
        keras.utils.set_random_seed(seed)
        study = Study({"plane": Plane, "digits": Digits}[options.data](options.steps, seed), options.steps)
        if study.data.real is not None:
            print(f"{'data':12} {study.data.score(study.data.real)}")
        shown = []
        for name in ("teacher", *names):
            begun = time.monotonic()
            if name == "teacher":
                models, sampler = study.teacher("straight"), Sampler("euler")
            else:
                models, sampler = METHODS[name](study), None
            trained = time.monotonic() - begun
            counts = (*STEPS, 50) if name == "teacher" else STEPS
            made = []
            for count in counts:
                model = models[count] if isinstance(models, dict) else models
                made.append(study.data.sampled(model, sampler=sampler, steps=count))
            scores = "  ".join(study.data.score(samples) for samples in made)
            print(f"{name:12} {scores}   {trained:4.0f} s   steps {counts}", flush=True)
            shown.append((name, made[: len(STEPS)]))
        rows = rows or shown

    figure = Figure(figsize=(2.2 * len(rows), 2.2 * len(STEPS)), layout="constrained")
    panels = figure.subplots(len(STEPS), len(rows), squeeze=False)
    for column, (name, made) in enumerate(rows):
        for row, samples in enumerate(made):
            study.data.draw(panels[row][column], samples)
            panels[row][column].set(xticks=[], yticks=[])
        panels[0][column].set_title(name)
    for row, count in enumerate(STEPS):
        panels[row][0].set_ylabel(f"{count} step{'s' * (count > 1)}")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(options.out, dpi=110)
    print(f"Drawn in {options.out.resolve()}")


if __name__ == "__main__":
    main()
