"""DALL-E 2: a model that makes the embedding of an image from a text, and one that makes an image of the embedding.

    unclip = UnCLIP(prior, decoder, twice, clip=clip)
    images = unclip.sample(4, text="a red circle", best_of=2, decoder={"guidance": 3.0})
    others = unclip.variations(images, 3)
    between = unclip.interpolate(images[0], images[1], 8)
    edited = unclip.difference(images[0], "a blue circle", "a red circle", [0.0, 0.25, 0.5])

Ramesh et al., "Hierarchical Text-Conditional Image Generation with CLIP Latents" (2022):

    z_i ~ prior(z_i | text),    x ~ decoder(x | z_i, text)

Each part is a `DiffusionModel` that is trained and checked alone, the prior on embeddings, such as those of a
`Contrastive`, by `networks.PriorTransformer` with the prediction "data"; the decoder on images with the embedding as a
condition, a `blocks.ImageEmbedding`; upsamplers are the later stages of a `Cascade`.
"""

import random as py_random
from collections.abc import Mapping, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from kdiff.base import Configurable, check_integer
from kdiff.blocks.resizing import resized
from kdiff.cascade import Cascade, stage_seed
from kdiff.checks import check_examples
from kdiff.codecs.base import to_unit
from kdiff.encoders import Prompt
from kdiff.encoders.base import Encoder
from kdiff.model import DiffusionModel
from kdiff.model.condition_inputs import condition_names, condition_nulls, optional_names
from kdiff.model.saving import SafeFiles
from kdiff.random import slerp
from kdiff.solvers import DDIM
from kdiff.text import is_text

__all__ = ["UnCLIP"]


class UnCLIP(SafeFiles, Configurable, keras.Model):
    """A prior, a decoder and upsamplers, as one object that draws. It is not trained: its parts are.

    It is saved and loaded as any Keras model, `unclip.save("unclip.keras")`, with all its parts.

    Args:
        prior: a built `DiffusionModel` of embeddings, (batch, width); None where images alone are to be varied.
        decoder: a built `DiffusionModel` of images with the embedding as a condition.
        upsamplers: `DiffusionModel`s as the later stages of a `Cascade`, none or more.
        clip: what embeds images and texts, with the methods `embed_image(images)` and `embed_text(texts)`, such as a
            `Contrastive`, or an `encoders.Pair`; None where neither `best_of` nor images are asked for.
        embedding: the name of the decoder's condition.
        name: the model's name.

    Raises:
        ValueError: if the decoder has no such condition, or it has another width than the prior's embeddings.
    """

    def __init__(
        self,
        prior: DiffusionModel | None,
        decoder: DiffusionModel,
        *upsamplers: DiffusionModel,
        clip: Any = None,
        embedding: str = "embedding",
        name: str | None = None,
    ):
        super().__init__(name=name, dtype="float32", autocast=False)
        for model in (prior, decoder):
            if not isinstance(model, DiffusionModel) and (model is not None or model is decoder):
                raise TypeError(f"UnCLIP: `prior` and `decoder` must be DiffusionModels; received: {model!r}")
        self.prior, self.decoder, self.upsamplers = prior, decoder, list(upsamplers)
        self.clip, self.embedding = clip, embedding
        self.cascade = Cascade([decoder, *upsamplers]) if upsamplers else None
        if embedding not in (condition_names(decoder.network) or ()):
            raise ValueError(
                f"UnCLIP: the decoder must have the condition {embedding!r}; it has: {condition_names(decoder.network)}"
            )
        if prior is not None and prior.built and decoder.built:
            made, wanted = prior.example or prior.shapes["image"][1:], decoder.shapes[embedding][1:]
            if tuple(made) != tuple(wanted):
                raise ValueError(f"UnCLIP: the prior makes {made}, and the decoder takes {wanted} as {embedding!r}")
        self.built = True

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments, serialised, and for each frozen encoder the first that is the same."""
        upsamplers = [keras.saving.serialize_keras_object(one) for one in self.upsamplers]
        ids = [id(encoder) for encoder in self._encoders()]
        return {**Configurable.get_config(self), "upsamplers": upsamplers, "same": [ids.index(one) for one in ids]}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "UnCLIP":
        """The object that `get_config` described."""
        made = {name: keras.saving.deserialize_keras_object(value) for name, value in config.items()}
        same = made.pop("same")
        unclip = cls(made.pop("prior"), made.pop("decoder"), *made.pop("upsamplers"), **made)
        encoders = unclip._encoders()
        wanted = iter([encoders[first] for first in same][len(unclip._encoder_of_clip()) :])
        for prompt in unclip._prompts():
            own = [next(wanted) for _ in prompt.encoders]
            if any(a is not b for a, b in zip(own, prompt.encoders, strict=True)):
                prompt.replace_encoders(own)
        return unclip

    def _encoder_of_clip(self) -> list[Encoder]:
        return [one for one in [getattr(self.clip, "text", None)] if isinstance(one, Encoder)]

    def _prompts(self) -> list[Prompt]:
        """The conditions of all parts that are texts which frozen encoders read, and that of `clip`."""
        layers = [getattr(model.network, "conditions", None) for model in self._models]
        found = [layer for some in layers if isinstance(some, dict) for layer in some.values()]
        found.append(getattr(self.clip, "text", None))
        return [layer for layer in found if isinstance(layer, Prompt)]

    def _encoders(self) -> list[Encoder]:
        """The encoders of text of all parts, of which several may be the same."""
        return [*self._encoder_of_clip(), *(encoder for prompt in self._prompts() for encoder in prompt.encoders)]

    def fit(self, *args, **options):
        """Raises a NotImplementedError, as `evaluate` and `predict` do: its parts have these methods."""
        raise NotImplementedError("UnCLIP: train and evaluate each part alone: `prior.fit`, `decoder.fit`")

    evaluate = predict = fit

    def call(self, inputs, training=None):
        """Raises a NotImplementedError: it draws."""
        raise NotImplementedError("UnCLIP: it has no output for an input; it draws, `unclip.sample(8, text=...)`")

    # From text

    def sample(
        self,
        num_samples: int,
        *,
        best_of: int = 1,
        prior: Mapping[str, Any] | None = None,
        decoder: Mapping[str, Any] | None = None,
        upsampling: Mapping[str, Any] | None = None,
        seed: int | None = 0,
        batch_size: int = 64,
        verbose: bool = False,
        **conditions,
    ) -> np.ndarray:
        """Images of embeddings that the prior draws.

        Args:
            num_samples: how many.
            best_of: how many embeddings the prior draws for each, of which the one with the largest product with the
                text's embedding is kept (section 2.2 has two).
            prior, decoder: arguments of that model's `sample`, such as {"guidance": 4.0, "steps": 25}.
            upsampling: arguments of `Cascade.sample`.
            seed: names the noise of the prior; the decoder's is that of `cascade.stage_seed(seed, 1)`. Or a list, one a
                sample. None: one is drawn.
            batch_size: how many are made at once.
            verbose: show progress bars.
            **conditions: as of `DiffusionModel.sample`, text among them; each is given to those parts that take it.

        Returns:
            A float32 array, in [-1, 1].
        """
        self._check_prior()
        self._check_names(conditions, self._models)
        seed = _seed(seed)
        options = {"seed": seed, "batch_size": batch_size, "verbose": verbose}
        z = self.embeddings(num_samples, best_of=best_of, options=prior, **options, **self._of(self.prior, conditions))
        conditions = {name: value for one in self._stages for name, value in self._of(one, conditions).items()}
        return self._images(z, conditions, decoder, upsampling, **{**options, "seed": stage_seed(seed, 1)})

    def embeddings(
        self,
        num_samples: int,
        *,
        best_of: int = 1,
        options: Mapping[str, Any] | None = None,
        seed: int | None = 0,
        batch_size: int = 64,
        verbose: bool = False,
        **conditions,
    ) -> np.ndarray:
        """Embeddings of images that the prior draws, (num_samples, width); `options` are arguments of its `sample`."""
        self._check_prior()
        for name, value in {"num_samples": num_samples, "best_of": best_of}.items():
            check_integer("UnCLIP", name, value)
        if best_of > 1 and (self.clip is None or not is_text(conditions.get("text"))):
            raise ValueError("UnCLIP: `best_of` above 1 needs a `clip`, and a `text` of strings")
        rows = self.prior.condition_rows(conditions, num_samples)
        rows = {name: np.repeat(value, best_of, axis=0) for name, value in rows.items()}
        if best_of > 1 and np.ndim(seed):  # of a seed's candidates the first is what it has alone
            seed = [one if k == 0 else stage_seed(one, k + 1) for one in seed for k in range(best_of)]
        options = {**(options or {}), "seed": seed, "batch_size": batch_size, "verbose": verbose}
        z = self.prior.sample(num_samples * best_of, **options, **rows)
        if best_of == 1:
            return z
        text = np.atleast_1d(np.asarray(conditions["text"], dtype=object))
        text = np.broadcast_to(self.clip.embed_text(list(text)), (num_samples, z.shape[-1]))
        z = z.reshape(num_samples, best_of, -1)
        best = np.argmax(np.einsum("nkd,nd->nk", z, text), axis=1)
        return z[np.arange(num_samples), best]

    # From images

    def variations(
        self,
        images: Any,
        count: int = 4,
        *,
        eta: float | None = None,
        decoder: Mapping[str, Any] | None = None,
        upsampling: Mapping[str, Any] | None = None,
        seed: int | None = 0,
        batch_size: int = 64,
        **conditions,
    ) -> np.ndarray:
        """Images of the same embedding, `count` one after the other for each image (section 3.1).

        Args:
            images: one, or several in a batch: whole numbers, or floating-point ones in [-1, 1].
            count: how many of each.
            eta: None for new noise; in [0, 1] they begin from the noise that the decoder makes the image itself of, by
                `invert`, and are drawn by `DDIM(eta)`: at 0 they are the image again, and the larger, the freer.
            decoder, upsampling, seed, batch_size: as of `sample`.
            **conditions: of the decoder and the upsamplers, none if left out.
        """
        images, z = self._given(images, batch_size)
        z, decoder = np.repeat(z, count, axis=0), dict(decoder or {})
        if eta is not None:
            noise = self._inverted(images, z[::count], decoder, conditions, batch_size)
            decoder |= {"x": np.repeat(noise, count, axis=0), "sampler": self._sampler(decoder, eta)}
        return self._images(z, conditions, decoder, upsampling, seed=seed, batch_size=batch_size)

    def interpolate(
        self,
        a: Any,
        b: Any,
        count: int = 8,
        *,
        noise: bool = True,
        decoder: Mapping[str, Any] | None = None,
        upsampling: Mapping[str, Any] | None = None,
        seed: int | None = 0,
        batch_size: int = 64,
        **conditions,
    ) -> np.ndarray:
        """Images from `a` to `b`, whose embeddings, and noise, lie on the arc between theirs (section 3.2).

        Args:
            a, b: one image each.
            count: how many, both ends included.
            noise: whether the noise goes from that of `a` to that of `b`, by `invert`; otherwise all have the same.
            decoder, upsampling, seed, batch_size, conditions: as of `variations`.
        """
        check_integer("UnCLIP", "count", count, 2)
        images, z = self._given(np.stack([self._one(a), self._one(b)]), batch_size)
        fractions, decoder = np.linspace(0, 1, count), dict(decoder or {})
        if noise:
            ends = self._inverted(images, z, decoder, conditions, batch_size)
            decoder |= {"x": slerp(*ends, fractions), "sampler": self._sampler(decoder, 0.0)}
        seeds = [_seed(seed)] * count  # the same noise for all
        return self._images(slerp(*z, fractions), conditions, decoder, upsampling, seed=seeds, batch_size=batch_size)

    def difference(
        self,
        image: Any,
        after: str,
        before: str = "",
        fractions: Sequence[float] = (0.0, 0.15, 0.3, 0.45),
        *,
        decoder: Mapping[str, Any] | None = None,
        upsampling: Mapping[str, Any] | None = None,
        seed: int | None = 0,
        batch_size: int = 64,
        **conditions,
    ) -> np.ndarray:
        """The image as one text would have it in place of another (section 3.3, "text diffs"):

            d = (z_after - z_before) / |z_after - z_before|,    z = slerp(z_i, |z_i| d, fraction)

        from the noise that the decoder makes the image itself of.

        Args:
            image: one image.
            after: the text that says what it is to be.
            before: the text that says what it is.
            fractions: how far to go, one image each; the paper goes to 0.25 to 0.5.
            decoder, upsampling, seed, batch_size, conditions: as of `variations`.
        """
        images, z = self._given(self._one(image)[None], batch_size)
        texts = np.asarray(self.clip.embed_text([after, before]))
        way = texts[0] - texts[1]
        length = np.linalg.norm(way)
        if length < 1e-6:
            raise ValueError(f"UnCLIP: `after` and `before` must differ; received: {after!r} and {before!r}")
        fractions, decoder = np.asarray(fractions, "float64"), dict(decoder or {})
        noise = self._inverted(images, z, decoder, conditions, batch_size)
        decoder |= {"x": np.repeat(noise, len(fractions), axis=0), "sampler": self._sampler(decoder, 0.0)}
        z = slerp(z[0], np.linalg.norm(z[0]) / length * way, fractions)
        return self._images(z, conditions, decoder, upsampling, seed=seed, batch_size=batch_size)

    # Parts

    def _check_prior(self) -> None:
        if self.prior is None:
            raise ValueError("UnCLIP: it has no prior, which makes embeddings of texts; there are `variations`")

    @property
    def _models(self) -> list[DiffusionModel]:
        return [*([] if self.prior is None else [self.prior]), *self._stages]

    @property
    def _stages(self) -> list[DiffusionModel]:
        return [self.decoder, *self.upsamplers]

    def _check_names(self, conditions, models) -> None:
        known = {name for model in models for name in _names(model)} - {self.embedding}
        if unknown := sorted(set(conditions) - known):
            raise ValueError(f"UnCLIP: no part takes {unknown}; the conditions of all parts are {sorted(known)}")

    @staticmethod
    def _of(model: DiffusionModel, conditions) -> dict[str, Any]:
        """Those that the model takes."""
        return {name: value for name, value in conditions.items() if name in _names(model)}

    def _images(self, z, conditions, decoder, upsampling, *, seed, batch_size=64, verbose=False) -> np.ndarray:
        """The images of embeddings."""
        self._check_names(conditions, self._stages)
        options = {"seed": seed, "batch_size": batch_size, "verbose": verbose}
        given = {**self._decoded_of(conditions), self.embedding: z}
        images = self.decoder.sample(len(z), **{**options, **(decoder or {})}, **given)
        if self.cascade is None:
            return images
        given = {name: value for model in self.upsamplers for name, value in self._of(model, conditions).items()}
        return self.cascade.sample(len(z), low=images, **{**options, **(upsampling or {})}, **given)

    def _decoded_of(self, conditions) -> dict[str, Any]:
        """The decoder's conditions, those that are left out as none where it has learned to do without."""
        nulls = condition_nulls(self.decoder.network)
        absent = dict.fromkeys(name for name in condition_names(self.decoder.network) if name in nulls)
        return {**absent, **self._of(self.decoder, conditions)}

    @staticmethod
    def _one(image: Any) -> np.ndarray:
        image = np.asarray(image)
        return image[0] if image.ndim == 4 and len(image) == 1 else image

    def _given(self, images: Any, batch_size: int) -> tuple[np.ndarray, np.ndarray]:
        """(images of the decoder's size, in [-1, 1]; their embeddings)."""
        if self.clip is None:
            raise ValueError("UnCLIP: images are embedded by a `clip`, which it does not have")
        images = np.asarray(images)
        images = images[None] if images.ndim == 3 else images
        check_examples(images, 1.0, "images")
        images = to_unit(ops.convert_to_tensor(images))
        shapes = getattr(self.clip, "shapes", None)
        seen = self._sized(images, None if shapes is None else shapes["image"][1:-1])
        return self._sized(images, self.decoder.example[:-1]), self.clip.embed_image(seen, batch_size)

    @staticmethod
    def _sized(images, size) -> np.ndarray:
        """Of that size, where it is known; bicubic weights, some of which are negative, lead out of [-1, 1]."""
        known = size is not None and None not in size
        images = resized(images, tuple(size), "bicubic") if known else images
        return np.clip(ops.convert_to_numpy(images), -1.0, 1.0)

    def _inverted(self, images, z, options, conditions, batch_size) -> np.ndarray:
        """The noise of which the decoder makes the images."""
        kept = {name: options[name] for name in ("guidance", "steps", "ema") if name in options}
        given = {**self._decoded_of(conditions), self.embedding: z}
        return self.decoder.invert(images, sampler=self._sampler(options, 0.0), batch_size=batch_size, **kept, **given)

    def _sampler(self, options, eta: float) -> Any:
        """The decoder's sampler, by DDIM."""
        sampler = self.decoder.sampler
        return sampler.replaced(solver=DDIM(eta), **({"steps": options["steps"]} if "steps" in options else {}))


def _seed(seed: Any) -> Any:
    """The seed; for None one that is drawn, of which those of all parts are made."""
    return py_random.randrange(2**32) if seed is None else seed


def _names(model: DiffusionModel) -> tuple[str, ...]:
    return (*(condition_names(model.network) or ()), *optional_names(model.network))
