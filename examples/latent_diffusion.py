"""Latent diffusion from scratch: an autoencoder, and a diffusion transformer on its latents.

    KERAS_BACKEND=jax python examples/latent_diffusion.py FOLDER --image-size 64        # of images, searched
    recursively KERAS_BACKEND=jax python examples/latent_diffusion.py cifar10 --labels --image-size 32 --download

It trains the autoencoder (absolute error, edges, frequency bands and local statistics, and in the second half of its
time a patch discriminator), encodes every picture once, trains a DiT on the latents, and samples. It writes
reconstructions and samples, and prints how much faster training is than that of the same network on pixels.
"""

import argparse
import time
from pathlib import Path

import keras
import numpy as np

import kdiff
from kdiff import autoencoding, codecs, data, networks, pictures
from kdiff.autoencoding import MSSSIM, AutoencoderTrainer, Gradients, Laplacian, PatchDiscriminator

SAMPLER = kdiff.Sampler("dpm_solver_pp", "uniform_log_snr", steps=30)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", nargs="?", default="shapes", help="an embedded set, a folder, a TensorFlow Dataset")
    parser.add_argument("--data-dir", help="the folder of TensorFlow Datasets")
    parser.add_argument("--download", action="store_true", help="download the TensorFlow Dataset if it is missing")
    parser.add_argument("--labels", action="store_true", help="condition on classes, one folder each")
    parser.add_argument("--image-size", type=int, default=64, help="a multiple of 16")
    parser.add_argument("--flips", action="store_true", help="mirror half of the pictures")
    parser.add_argument(
        "--widths", type=int, nargs="+", default=[16, 32, 64], help="the widths of the levels of the autoencoder"
    )
    parser.add_argument("--channels", type=int, default=4, help="the channels of the latents")
    parser.add_argument("--width", type=int, default=192, help="the width of the DiT, a multiple of 64")
    parser.add_argument("--depth", type=int, default=6, help="the depth of the DiT")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--autoencoder-minutes", type=float, default=15)
    parser.add_argument("--minutes", type=float, default=20, help="minutes of training the DiT")
    parser.add_argument("--out", type=Path, default=Path("runs") / f"latent-diffusion-{keras.backend.backend()}")
    return parser.parse_args()


class Clock(keras.callbacks.Callback):
    """Stops training at the end of the time, with a learning rate that decays linearly with the remaining time."""

    def __init__(self, minutes: float, rate: float):
        super().__init__()
        self.seconds, self.rate = 60 * minutes, rate

    def on_train_begin(self, logs=None):
        self.start = time.monotonic()

    def on_epoch_begin(self, epoch, logs=None):
        self.model.optimizer.learning_rate = self.rate * max(0.02, 1 - self.spent)

    def on_epoch_end(self, epoch, logs=None):
        self.model.stop_training = self.spent > 1

    @property
    def spent(self) -> float:
        return (time.monotonic() - self.start) / self.seconds


def load(options: argparse.Namespace, batch_size: int | None = None, **changes):
    source = {"data_dir": options.data_dir, "download": options.download, "channels": 3, **changes}
    return data.images(options.dataset, options.image_size, batch_size or options.batch_size, **source)


def train_autoencoder(options: argparse.Namespace) -> networks.AutoencoderKL:
    """Trains without a discriminator first, as it learns nothing from blurred pictures, then with one."""
    dataset = load(options, repeat=None)
    shown = next(iter(load(options, 16))).numpy()
    watch = autoencoding.ReconstructionCallback(options.out / "autoencoder", shown, every=5, columns=8)
    autoencoder = networks.AutoencoderKL(options.widths, options.channels, depth=1)
    terms = [Gradients(), Laplacian(3), MSSSIM(2, 7, weight=0.5)]
    for discriminator, rate in ((None, 2e-3), (PatchDiscriminator(32, 2), 5e-4)):
        trainer = AutoencoderTrainer(autoencoder, terms=terms, discriminator=discriminator, adversarial=0.3)
        trainer.compile(keras.optimizers.Adam(rate, beta_1=0.5, clipnorm=1.0))
        clock = Clock(options.autoencoder_minutes / 2, rate)
        trainer.fit(dataset, epochs=10**6, steps_per_epoch=20, callbacks=[clock, watch], verbose=2)
        made = np.concatenate([shown[:8], trainer.reconstruct(shown[:8]), shown[8:], trainer.reconstruct(shown[8:])])
        name = "reconstructions.png" if discriminator else "reconstructions-before.png"
        pictures.save_png(options.out / name, made, 8)
        edges = [np.abs(np.diff(one, axis=2)).mean() for one in (trainer.reconstruct(shown), shown)]
        print(f"{name}: edges have {edges[0] / edges[1]:.2f} times the strength of those in the pictures")
    return autoencoder


def model_of(options: argparse.Namespace, codec, class_names) -> kdiff.DiffusionModel:
    conditions = {"label": kdiff.blocks.LabelEmbedding(len(class_names), dropout=0.1)} if options.labels else {}
    block = networks.adaptive_block(options.width // 64)
    network = networks.DiT(options.width, options.depth, 2, block, conditions=conditions)
    model = kdiff.DiffusionModel(network, codec=codec, sampler=SAMPLER, ema=0.995)
    model.compile(keras.optimizers.Adam(1e-3, clipnorm=1.0))
    return model


def seconds_a_batch(model: kdiff.DiffusionModel, dataset) -> float:
    """The time per training batch, without the first, which compiles."""
    model.fit(dataset.take(2), verbose=0)
    start = time.monotonic()
    model.fit(dataset.take(4), verbose=0)
    return (time.monotonic() - start) / 4


def main() -> None:
    options = arguments()
    autoencoder = train_autoencoder(options)
    codec = codecs.Latent.fitted(autoencoder, load(options), batches=20)
    latents = load(options, labels=options.labels, codec=codec, flips=options.flips)
    first = next(iter(latents))["encoded"].numpy()
    print(f"{codec!r}\nlatents {first.shape[1:]}, mean {first.mean():.2f}, std {first.std():.2f}")

    model = model_of(options, codec, latents.class_names)
    fast = seconds_a_batch(model, latents)
    slow = seconds_a_batch(model_of(options, "pixels", latents.class_names), load(options, labels=options.labels))
    print(f"A batch takes {fast:.2f} s on latents and {slow:.2f} s on pixels, {slow / fast:.1f} times as long")

    model = model_of(options, codec, latents.class_names)
    endless = load(options, labels=options.labels, codec=codec, flips=options.flips, repeat=None)
    history = model.fit(endless, epochs=10**6, steps_per_epoch=50, callbacks=[Clock(options.minutes, 1e-3)], verbose=2)
    pictures.loss_plot(options.out / "loss.png", history)
    model.save(options.out / "model.keras")
    rows = len(latents.class_names) if options.labels else 6
    asked = {"label": np.repeat(np.arange(rows), 8), "guidance": 2.0} if options.labels else {}
    pictures.save_png(options.out / "samples.png", model.sample(8 * rows, seed=1, **asked), 8)
    print(f"In {options.out.resolve()}: reconstructions.png, samples.png, loss.png, model.keras")


if __name__ == "__main__":
    main()
