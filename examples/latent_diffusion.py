"""Latent diffusion from scratch: an autoencoder, and a diffusion transformer on its latents.

    KERAS_BACKEND=jax python examples/latent_diffusion.py FOLDER        # of images, searched recursively
    KERAS_BACKEND=jax python examples/latent_diffusion.py FOLDER --captions        # of photo.txt beside photo.jpg
    KERAS_BACKEND=jax python examples/latent_diffusion.py cifar10 --labels --image-size 32 --download

It trains the autoencoder (absolute error, edges, frequency bands and local statistics, and in the second half of its
time a patch discriminator), encodes every picture once, trains a DiT on the latents, and samples. It writes
reconstructions and samples, and prints how much faster training is than that of the same network on pixels: at 64 x 64
a batch of 32 took 0.95 s on latents and 5.46 s on pixels, with patches of 4, on one busy core (PyTorch).

With captions, which need the extra `text`, it draws --prompts, by default captions of the subfolder "test" if there is
one. It then draws all captions of that subfolder, which the model has never seen, puts the nearest training picture and
the test picture under eight of the samples (nearest.png), and counts how many are nearer to the test picture of their
caption than to any other picture of train or test. `emoji.py` beside this file writes such a folder.
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
    parser.add_argument("--captions", action="store_true", help="condition on captions: photo.txt beside photo.jpg")
    parser.add_argument("--prompts", nargs="+", help="captions to draw, instead of some of the data")
    parser.add_argument("--image-size", type=int, default=64, help="a multiple of 16")
    parser.add_argument("--flips", action="store_true", help="mirror half of the pictures")
    parser.add_argument(
        "--widths", type=int, nargs="+", default=[16, 32, 64], help="the widths of the levels of the autoencoder"
    )
    parser.add_argument("--channels", type=int, default=4, help="the channels of the latents")
    parser.add_argument("--width", type=int, default=192, help="the width of the DiT, a multiple of 64")
    parser.add_argument("--depth", type=int, default=6, help="the depth of the DiT")
    parser.add_argument("--patch", type=int, default=2, help="its patches of the latents; 4 is four times as fast")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--adversarial", type=float, default=0.3, help="the weight of the discriminator, 0 for none")
    parser.add_argument("--prediction", default="velocity", help="of the DiT; data for flat pictures, such as emoji")
    parser.add_argument("--autoencoder", type=Path, help="one saved by this program, instead of training one")
    parser.add_argument(
        "--model", type=Path, help="a model saved by this program, to draw with instead of training one"
    )
    parser.add_argument("--autoencoder-minutes", type=float, default=15)
    parser.add_argument("--pixels", action="store_true", help="train the DiT on the pixels, without an autoencoder")
    parser.add_argument(
        "--shift", type=float, default=0.0, help="added to the log-SNR; below 0 for large, flat pictures"
    )
    parser.add_argument("--rate", type=float, default=1e-3, help="the first learning rate of the DiT")
    parser.add_argument("--minutes", type=float, default=20, help="minutes of training the DiT")
    parser.add_argument("--guidance", type=float, default=2.0, help="the scale of guidance for labels and captions")
    parser.add_argument("--columns", type=int, default=8, help="the samples in a row of the picture")
    parser.add_argument("--seed", type=int, default=1, help="of the samples")
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
    phases = [(None, 2e-3), (PatchDiscriminator(32, 2), 5e-4)] if options.adversarial else [(None, 2e-3)]
    for discriminator, rate in phases:
        trainer = AutoencoderTrainer(
            autoencoder, terms=terms, discriminator=discriminator, adversarial=options.adversarial
        )
        trainer.compile(keras.optimizers.Adam(rate, beta_1=0.5, clipnorm=1.0))
        clock = Clock(options.autoencoder_minutes / len(phases), rate)
        trainer.fit(dataset, epochs=10**6, steps_per_epoch=20, callbacks=[clock, watch], verbose=2)
        made = np.concatenate([shown[:8], trainer.reconstruct(shown[:8]), shown[8:], trainer.reconstruct(shown[8:])])
        name = "reconstructions.png" if discriminator else "reconstructions-before.png"
        pictures.save_png(options.out / name, made, 8)
        edges = [np.abs(np.diff(one, axis=2)).mean() for one in (trainer.reconstruct(shown), shown)]
        print(f"{name}: edges have {edges[0] / edges[1]:.2f} times the strength of those in the pictures")
    autoencoder.save(options.out / "autoencoder.keras")
    return autoencoder


def model_of(options: argparse.Namespace, codec, conditions: dict) -> kdiff.DiffusionModel:
    """A DiT whose adaptive normalisation follows the time and one vector of the label or caption."""
    block = networks.adaptive_block(max(1, options.width // 64))
    schedule = kdiff.schedules.Shifted("cosine", options.shift) if options.shift else "cosine"
    network = networks.DiT(options.width, options.depth, options.patch, block, conditions=conditions)
    model = kdiff.DiffusionModel(network, schedule, options.prediction, codec=codec, sampler=SAMPLER, ema=0.995)
    model.compile(keras.optimizers.Muon(options.rate, exclude_layers=["head", "table"], clipnorm=1.0))
    return model


def conditions_of(options: argparse.Namespace) -> tuple[dict, dict]:
    """The layers of the conditions, and the arguments of `data.images` that give them."""
    if options.captions:
        dataset = load(options, 1, text=True)
        captions = [batch["text"].numpy()[0].decode() for batch in dataset]
        tokenizer = kdiff.text.BytePair.learn(captions, vocabulary_size=512, length=16)
        encoder = kdiff.blocks.TextEncoder(tokenizer, options.width, depth=1, pooled=True)
        return {"text": encoder}, {"text": True, "text_encoder": tokenizer}
    if options.labels:
        count = len(load(options, labels=True).class_names)
        return {"label": kdiff.blocks.LabelEmbedding(count, dropout=0.1)}, {"labels": True}
    return {}, {}


def seconds_a_batch(model: kdiff.DiffusionModel, dataset) -> float:
    """The time per training batch, without the first, which compiles."""
    model.fit(dataset.take(2), verbose=0)
    start = time.monotonic()
    model.fit(dataset.take(4), verbose=0)
    return (time.monotonic() - start) / 4


def train(options: argparse.Namespace) -> kdiff.DiffusionModel:
    conditions, source = conditions_of(options)
    codec = "pixels" if options.pixels else latent_codec(options, conditions, source)
    model = model_of(options, codec, conditions)
    if options.pixels:
        endless = load(options, repeat=None, **source)
    else:
        endless = load(options, codec=codec, flips=options.flips, repeat=None, **source)
    clock = Clock(options.minutes, options.rate)
    history = model.fit(endless, epochs=10**6, steps_per_epoch=20, callbacks=[clock], verbose=2)
    pictures.loss_plot(options.out / "loss.png", history)
    model.save(options.out / "model.keras")
    return model


def latent_codec(options: argparse.Namespace, conditions: dict, source: dict) -> codecs.Latent:
    """The codec of a trained autoencoder; prints what it saves."""
    autoencoder = keras.saving.load_model(options.autoencoder) if options.autoencoder else train_autoencoder(options)
    codec = codecs.Latent.fitted(autoencoder, load(options), batches=20)
    latents = load(options, codec=codec, flips=options.flips, **source)
    first = next(iter(latents))["encoded"].numpy()
    print(f"{codec!r}\nlatents {first.shape[1:]}, mean {first.mean():.2f}, std {first.std():.2f}")
    fast = seconds_a_batch(model_of(options, codec, conditions), latents)
    slow = seconds_a_batch(model_of(options, "pixels", conditions), load(options, **source))
    print(f"A batch takes {fast:.2f} s on latents and {slow:.2f} s on pixels, {slow / fast:.1f} times as long")
    return codec


def asked(options: argparse.Namespace, model: kdiff.DiffusionModel) -> tuple[int, dict]:
    """The number of samples, and the arguments of `sample` for them."""
    if options.prompts or options.captions:
        prompts = options.prompts or list(captioned(options, "test" if has_test(options) else "train")[1][:48])
        return len(prompts), {"text": prompts, "guidance": options.guidance}
    if options.labels:
        labels = np.repeat(np.arange(model.network.conditions["label"].num_classes), 8)
        return len(labels), {"label": labels, "guidance": options.guidance}
    return 6 * options.columns, {}


def has_test(options: argparse.Namespace) -> bool:
    return (Path(options.dataset) / "test").is_dir()


def captioned(options: argparse.Namespace, split: str) -> tuple[np.ndarray, np.ndarray]:
    """All pictures and captions of a split, in one order."""
    batches = list(load(options, 1, split=split, text=True, shuffle=False))
    images = np.concatenate([batch["image"].numpy() for batch in batches])
    return images, np.array([batch["text"].numpy()[0].decode() for batch in batches])


def nearest(samples: np.ndarray, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each sample the index of the nearest image, or mirrored image, and its root mean square distance."""
    both = np.concatenate([images, images[:, :, ::-1]]).reshape(2 * len(images), -1)
    found = [np.sqrt(np.square(both - one.reshape(-1)).mean(-1)) for one in samples]
    return np.array([np.argmin(row) % len(images) for row in found]), np.array([row.min() for row in found])


def compare(options: argparse.Namespace, model: kdiff.DiffusionModel) -> None:
    """Draws every caption of "test", and says which pictures the samples are nearest to."""
    (images, captions), (others, names) = captioned(options, "test"), captioned(options, "train")
    samples = model.sample(len(captions), text=list(captions), guidance=options.guidance, seed=2)
    pool, known = np.concatenate([images, others]), np.concatenate([captions, names])
    index, _ = nearest(samples, pool)
    right = np.mean(known[index] == captions)
    _, seen = nearest(samples, others)
    _, unseen = np.array([nearest(one[None], image[None]) for one, image in zip(samples, images, strict=True)]).T[0]
    print(f"Of {len(captions)} samples for captions of test, {right:.0%} are nearer to the picture of their caption")
    print(f"than to any of the {len(pool) - 1} others; root mean square distance {unseen.mean():.2f} to that picture,")
    print(f"{seen.mean():.2f} to the nearest training picture")
    row, _ = nearest(samples[:8], others)  # three rows: samples, nearest training pictures, test pictures
    pictures.save_png(options.out / "nearest.png", np.concatenate([samples[:8], others[row], images[:8]]), 8)


def main() -> None:
    options = arguments()
    model = keras.saving.load_model(options.model) if options.model else train(options)
    count, conditions = asked(options, model)
    steps = [step.x for step in model.sample_steps(count, seed=options.seed, **conditions)]
    pictures.save_png(options.out / "samples.png", steps[-1], options.columns, captions=options.prompts)
    pictures.save_gif(options.out / "samples.gif", steps[::-3][::-1], options.columns, fps=5)
    if options.captions and has_test(options):
        compare(options, model)
    print(f"{time.process_time() / 60:.0f} minutes of CPU time; pictures and models are in {options.out.resolve()}")


if __name__ == "__main__":
    main()
