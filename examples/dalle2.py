"""A small DALL-E 2 from scratch: CLIP, a prior and a decoder, trained on generated, captioned pictures.

    KERAS_BACKEND=jax python examples/dalle2.py

Ramesh et al., "Hierarchical Text-Conditional Image Generation with CLIP Latents" (2022). A text passes through CLIP and
the prior, which samples the embedding of a matching image; the decoder samples images for the embedding. The decoder
sees no text: its information about the caption comes from the prior. Each part is evaluated on its own: CLIP by
retrieval among 64 captions, the prior by the similarity of its embeddings to those of the true pictures, the decoder by
a program that reads its pictures. Then follow variations of a picture, interpolations of two, and a picture edited by
words. --minutes are minutes of processor time, 40 of them about half an hour on two cores; the rest takes two or three
more.
"""

import argparse
import math
import time
from pathlib import Path

import keras
import numpy as np

import kdiff
from kdiff import codecs, pictures, scenes
from kdiff.blocks import ImageEmbedding, Joint, TransformerBlock
from kdiff.encoders import CLIPText, CLIPVision, Prompt, PromptVector
from kdiff.networks import DiT, PriorTransformer

LENGTH = 16  # tokens per caption
WIDTH = 64  # the width of the embeddings
SHARES = {"clip": 0.11, "prior": 0.11, "decoder": 0.78}  # of the time


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=40, help="CPU minutes of training")
    parser.add_argument("--pictures", type=int, default=12000, help="the number of training pictures")
    parser.add_argument(
        "--things", type=int, default=1, choices=(1, 2), help="the maximum number of objects in a picture"
    )
    parser.add_argument("--batch-size", type=int, default=64, help="the batch size; half of it for the decoder")
    parser.add_argument(
        "--width", type=int, default=128, help="the width of the prior, a multiple of 16; the decoder has half"
    )
    parser.add_argument("--steps", type=int, default=20, help="sampling steps")
    parser.add_argument("--test", type=int, default=100, help="the number of pictures that are sampled and read")
    parser.add_argument("--out", type=Path, default=Path("runs") / f"dalle2-{keras.backend.backend()}")
    return parser.parse_args()


class Clock(keras.callbacks.Callback):
    """Decays the learning rate with the remaining time, and stops training at the end."""

    def __init__(self, minutes: float, rate: float):
        super().__init__()
        self.seconds, self.rate, self.steps = 60 * minutes, rate, 0

    def on_train_begin(self, logs=None):
        self.start = None  # the first step, with compilation, is not counted

    def spent(self):
        return 0.0 if self.start is None else min(1.0, (time.process_time() - self.start) / self.seconds)

    def on_train_batch_begin(self, batch, logs=None):
        if self.steps % 20 == 0:
            warm = min(1.0, (self.steps + 1) / 100)
            self.model.optimizer.learning_rate = (
                warm * self.rate * (0.01 + 0.5 * (1 + math.cos(math.pi * self.spent())))
            )
        self.steps += 1

    def on_train_batch_end(self, batch, logs=None):
        self.start = time.process_time() if self.start is None else self.start
        if self.spent() == 1.0:
            self.model.stop_training = True

    def on_epoch_end(self, epoch, logs=None):
        shown = ", ".join(f"{name} {value:.4g}" for name, value in logs.items())
        print(f"  step {self.steps}, {self.spent():.0%} of the time: {shown}", flush=True)


def drawn(count: int, things: int, size: int = 16, seed: int = 0) -> tuple[np.ndarray, list[str]]:
    """Pictures and their captions."""
    total = count * (1 if things == 2 else 6) + 100  # a fifth of them have one object
    _, captions = scenes.dataset(total, 1, seed=seed)
    kept = [i for i, caption in enumerate(captions) if things == 2 or scenes.Scene.parse(caption).second is None]
    return scenes.dataset(total, size, seed=seed, rows=kept[:count])


def train(model: keras.Model, data: dict, clock: Clock, batch_size: int) -> None:
    """Uses Muon if there are patches, as it needs a fraction of the steps of AdamW."""
    print(f"{model.name}:")
    if isinstance(getattr(model, "network", None), DiT):
        decay = {"weight_decay": 0.01, "adam_weight_decay": 0.01}
        optimizer = keras.optimizers.Muon(clock.rate, exclude_layers=["head", "table"], clipnorm=1.0, **decay)
    else:
        optimizer = keras.optimizers.AdamW(clock.rate, weight_decay=0.01, clipnorm=1.0)
    model.compile(optimizer)
    model.fit(data, batch_size=batch_size, epochs=10**6, callbacks=[clock], verbose=0)


def clip_of(captions: list[str]) -> kdiff.Contrastive:
    """Two small transformers; the text encoder is also that of the prior."""
    tokenizer = kdiff.text.BytePair.learn(captions, vocabulary_size=320, length=LENGTH)
    vision = CLIPVision(16, 4, 3, width=WIDTH, depth=3, heads=4, hidden=4 * WIDTH, projection=WIDTH)
    text = CLIPText(320, LENGTH, width=WIDTH, depth=2, heads=4, hidden=4 * WIDTH, projection=WIDTH, end=0)
    return kdiff.Contrastive(vision, text, tokenizer, name="clip")


def prior_of(clip: kdiff.Contrastive, z: np.ndarray, options: argparse.Namespace) -> kdiff.DiffusionModel:
    """A prior from the encoded text and its embedding to the embedding of an image."""
    text = Prompt(clip.text, clip.tokenizer, masked=True, dropout=0.1, batch_size=256)
    vector = Joint({"text": PromptVector(WIDTH)}, keras.layers.Identity())
    network = PriorTransformer(options.width, 3, conditions={"text": text, "vector": vector})
    codec, sampler = codecs.Standard.fitted(z), kdiff.Sampler("ddim", "trailing", options.steps)
    return kdiff.DiffusionModel(network, "cosine", "data", codec=codec, sampler=sampler, ema=0.995, name="prior")


def decoder_of(options: argparse.Namespace) -> kdiff.DiffusionModel:
    """The embedding is added to the time and gives four tokens; narrow, with small patches, which train faster."""
    width = options.width // 2
    conditions = {"embedding": ImageEmbedding(width, 4, dropout=0.1)}
    block = TransformerBlock(heads=4, adaptive=True, gated=True)
    network = DiT(width, depth=3, patch=2, block=block, conditions=conditions)
    sampler = kdiff.Sampler("dpm_solver_pp", "trailing", options.steps, kdiff.guidance.ClassifierFree(1.5))
    return kdiff.DiffusionModel(network, "cosine", "data", sampler=sampler, ema=0.995, name="decoder")


def read_right(images: np.ndarray, captions: list[str]) -> float:
    """The share of pictures in which a program reads everything in the caption."""
    pairs = zip(images, captions, strict=True)
    return np.mean([scenes.same(scenes.read(image), scenes.Scene.parse(caption)) for image, caption in pairs])


def retrieval(clip: kdiff.Contrastive, images: np.ndarray, captions: list[str], count: int = 64) -> dict:
    """Retrieval among distinct captions."""
    _, first = np.unique(captions, return_index=True)
    chosen = np.sort(first)[:count]
    data = {"image": images[chosen], "text": [captions[i] for i in chosen]}
    return {**clip.evaluate(data, batch_size=len(chosen), verbose=0, return_dict=True), "count": len(chosen)}


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    """The mean cosine similarity of pairs."""
    return float(np.mean(np.sum(a * b, -1) / (np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1))))


def main() -> None:
    options = arguments()
    options.out.mkdir(parents=True, exist_ok=True)
    minutes = {name: share * options.minutes for name, share in SHARES.items()}
    images, captions = drawn(options.pictures, options.things)
    test, words = drawn(max(options.test, 400), options.things, seed=1)

    clip = clip_of(captions)
    train(clip, {"image": images, "text": captions}, Clock(minutes["clip"], 1e-3), options.batch_size)
    found = retrieval(clip, test, words)
    text_z, true_z = clip.embed_text(words), clip.embed_image(test)
    print(
        f"CLIP, test pictures of {found['count']} captions: image to text "
        f"{found['image_to_text']:.1%}, text to image {found['text_to_image']:.1%}"
    )

    z = clip.embed_image(images, batch_size=256)
    prior = prior_of(clip, z, options)
    train(prior, {"image": z, "text": captions}, Clock(minutes["prior"], 1e-3), options.batch_size)
    decoder = decoder_of(options)
    train(decoder, {"image": images, "embedding": z}, Clock(minutes["decoder"], 2e-3), options.batch_size // 2)

    unclip = kdiff.UnCLIP(prior, decoder, clip=clip)
    unclip.save(options.out / "unclip.keras")
    count = options.test
    test, words, text_z, true_z = test[:count], words[:count], text_z[:count], true_z[:count]
    made = unclip.embeddings(count, text=words, best_of=2)
    print(f"Cosine similarity to the embedding of the true picture: text {cosine(text_z, true_z):.3f}", end=", ")
    print(f"prior {cosine(made, true_z):.3f}")
    from_true = decoder.sample(count, embedding=true_z)
    from_text = unclip.sample(count, text=words, best_of=2)
    print("A program reads everything in the caption")
    print(f"  in pictures of true embeddings    {read_right(from_true, words):.1%}")
    print(f"  in pictures from text, by the prior {read_right(from_text, words):.1%}")
    true = test / 127.5 - 1
    rows = [true[:8], from_true[:8], from_text[:8]]
    pictures.save_png(options.out / "decoded.png", np.concatenate(rows), 8)

    some = 8
    others = unclip.variations(test[:some], 4)
    again = [words[i] for i in range(some) for _ in range(4)]
    apart = np.abs(others.reshape(some, 4, -1) - true[:some].reshape(some, 1, -1)).mean()
    print(f"  in variations of pictures         {read_right(others, again):.1%}", end="")
    print(f", which differ from them by {apart:.3f} per pixel")
    grid = np.concatenate([true[:some], *(others[i::4] for i in range(4))])  # the pictures above their variations
    pictures.save_png(options.out / "variations.png", grid, some)
    kept = unclip.variations(test[:some], 1, eta=0.0)
    print(f"From their own noise the pictures are reproduced, to {np.abs(kept - (test[:some] / 127.5 - 1)).mean():.3f}")
    between = unclip.interpolate(test[0], test[1], 8)
    pictures.save_png(options.out / "between.png", between, 8)
    thing = scenes.Scene.parse(words[0])
    after = thing._replace(first=thing.first._replace(colour="blue" if thing.first.colour != "blue" else "red"))
    edited = unclip.difference(test[0], after.caption, words[0], np.linspace(0, 0.6, 8))
    pictures.save_png(options.out / "edited.png", edited, 8)
    print(f"edited.png: from {words[0]!r} to {after.caption!r}")
    print(f"CPU minutes in total:  {time.process_time() / 60:.1f}")
    print(f"In {options.out.resolve()}: decoded.png, variations.png, between.png, edited.png, unclip.keras")


if __name__ == "__main__":
    main()
