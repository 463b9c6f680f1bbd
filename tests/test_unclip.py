"""DALL-E 2 as a composition: what its parts are given, and what comes of images."""

import keras
import numpy as np
import pytest

from kdiff import Contrastive, DiffusionModel, Sampler, UnCLIP, codecs
from kdiff.blocks import Concat, ImageEmbedding, Joint, TextEncoder, TransformerBlock
from kdiff.cascade import stage_seed
from kdiff.encoders import CLIPText, CLIPVision, Prompt, PromptVector
from kdiff.guidance import ClassifierFree
from kdiff.networks import DiT, PriorTransformer, UNet
from kdiff.random import slerp
from kdiff.text import Bytes
from tests.toys import draw_weights

pytestmark = pytest.mark.eager

WORDS = ["red", "blue"]
WIDTH = 6


def clip():
    vision = CLIPVision(8, 4, 3, 8, 1, 2, 16, projection=WIDTH)
    model = Contrastive(vision, CLIPText(257, 5, 8, 1, 2, 16, projection=WIDTH), Bytes(5))
    model.build({"image": (None, 8, 8, 3), "text": (None, 5)})
    return draw_weights(model)


def prior(clip):
    text = Prompt(clip.text, clip.tokenizer, masked=True, dropout=0.1)
    vector = Joint({"text": PromptVector(WIDTH)}, keras.layers.Identity())
    network = PriorTransformer(8, 1, TransformerBlock(2, pattern="causal"), conditions={"text": text, "vector": vector})
    model = DiffusionModel(network, "cosine", "data", codec=codecs.Standard(0.1, 0.5), ema=None)
    model.build({"image": (None, WIDTH), "text": (None, *text.row)})
    for layer in (network.stem, network.head, network.token_projection, *network.blocks):
        draw_weights(layer, scale=0.5)
    return model


def decoder(**texts):
    conditions = {"embedding": ImageEmbedding(8, 2, dropout=0.1, seed=1), **texts}
    network = DiT(8, 1, 4, TransformerBlock(2, adaptive=True), conditions=conditions)
    model = DiffusionModel(network, "cosine", "velocity", ema=None)
    model.build({"image": (None, 8, 8, 3), "embedding": (None, WIDTH), **{name: (None, 5) for name in texts}})
    draw_weights(network, scale=0.15)
    return model


@pytest.fixture(scope="module")
def unclip():
    one = clip()
    return UnCLIP(prior(one), decoder(text=TextEncoder(Bytes(5), 8, 1, 2, dropout=0.5, seed=2)), clip=one)


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3)).astype("uint8")


FEW = {"steps": 3}
FINE = {"steps": 24}


def test_text_goes_through_the_prior_to_the_decoder(unclip):
    options = {"prior": {**FEW, "guidance": 2.0}, "decoder": {**FEW, "guidance": 3.0}}
    made = unclip.sample(2, text=WORDS, seed=5, **options)
    z = unclip.prior.sample(2, text=WORDS, seed=5, **options["prior"])
    seed = stage_seed(5, 1)
    wanted = unclip.decoder.sample(2, embedding=z, text=WORDS, seed=seed, **options["decoder"])
    np.testing.assert_allclose(made, wanted, atol=1e-6)
    other = unclip.decoder.sample(2, embedding=z[::-1], text=WORDS, seed=seed, **options["decoder"])
    assert np.abs(other - wanted).max() > 1e-3


@pytest.mark.once
def test_without_a_prior(unclip, images):
    """It varies images, of other sizes too, which enlarged would go beyond [-1, 1], and refuses texts."""
    alone = UnCLIP(None, unclip.decoder, clip=unclip.clip)
    options = {"decoder": FEW, "text": None}
    wanted = unclip.variations(images, 1, **options)
    np.testing.assert_allclose(alone.variations(images, 1, **options), wanted, atol=1e-6)
    sharp = np.where(np.indices((5, 5)).sum(0) % 2, 255, 0).astype("uint8")[..., None].repeat(3, -1)
    assert np.isfinite(alone.interpolate(sharp, 255 - sharp, 2, decoder=FEW, text=None)).all()
    assert UnCLIP.from_config(alone.get_config()).prior is None
    for draw in (alone.sample, alone.embeddings):
        with pytest.raises(ValueError, match="it has no prior"):
            draw(1, text="red")


@pytest.mark.once
def test_a_decoder_of_embeddings_alone(unclip):
    alone = UnCLIP(unclip.prior, decoder())
    wanted = alone.decoder.sample(2, embedding=unclip.prior.sample(2, text=WORDS, **FEW), seed=stage_seed(0, 1), **FEW)
    np.testing.assert_allclose(alone.sample(2, text=WORDS, prior=FEW, decoder=FEW), wanted, atol=1e-6)


@pytest.mark.once
def test_the_best_of_three(unclip):
    z = unclip.embeddings(2, best_of=3, options=FEW, text=WORDS)
    every = unclip.prior.sample(6, text=np.repeat(WORDS, 3), **FEW).reshape(2, 3, WIDTH)
    products = np.einsum("nkd,nd->nk", every, unclip.clip.embed_text(WORDS))
    np.testing.assert_allclose(z, every[[0, 1], products.argmax(1)], atol=1e-6)
    assert np.ptp(products, axis=1).min() > 1e-4
    one = unclip.embeddings(2, best_of=3, options=FEW, text=WORDS[0])
    np.testing.assert_allclose(one[0], z[0], atol=1e-6)


@pytest.mark.once
def test_from_its_own_noise_an_image_is_itself(unclip, images):
    """Variations, interpolation and difference begin there."""
    x = images / 127.5 - 1
    same = unclip.variations(images, 1, eta=0.0, decoder=FINE)
    assert np.abs(same - x).mean() < 0.05  # what 24 steps of DDIM and back leave
    ends = unclip.interpolate(images[0], images[1], 2, decoder=FINE)
    np.testing.assert_allclose(ends, same, atol=1e-4)
    changed = unclip.difference(images[0], "red", "blue", [0.0, 0.5], decoder=FINE)
    np.testing.assert_allclose(changed[0], same[0], atol=1e-4)
    assert np.abs(changed[1] - changed[0]).max() > 1e-3
    other = unclip.variations(images, 1, decoder=FINE)
    assert np.abs(other - x).mean() > 0.2


@pytest.mark.once
def test_the_noise_of_an_image_is_that_of_the_given_sampler_and_schedule(unclip, images):
    """With its guidance, grid and steps; only the solver is DDIM."""
    rule = ClassifierFree(2.0)
    wanted = unclip.variations(images, 1, eta=0.0, decoder={**FINE, "guidance": rule})
    sampler = Sampler("heun", steps=FINE["steps"], guidance=rule)
    np.testing.assert_allclose(unclip.variations(images, 1, eta=0.0, decoder={"sampler": sampler}), wanted, atol=1e-6)
    same = unclip.variations(images, 1, eta=0.0, decoder={**FINE, "schedule": "rectified"})
    assert np.abs(same - (images / 127.5 - 1)).mean() < 0.05


@pytest.mark.once
def test_what_lies_between(unclip, images):
    """The embeddings and the noise on the arc."""
    z = unclip.clip.embed_image(images)
    x, options = images / 127.5 - 1, {"text": None, **FEW}
    noise = unclip.decoder.invert(x, embedding=z, **options)
    wanted = unclip.decoder.sample(
        3, embedding=slerp(*z, np.linspace(0, 1, 3)), x=slerp(*noise, np.linspace(0, 1, 3)), **options
    )
    np.testing.assert_allclose(unclip.interpolate(*images, 3, decoder=FEW), wanted, atol=1e-5)
    wanted = unclip.decoder.sample(3, embedding=slerp(*z, np.linspace(0, 1, 3)), seed=[7] * 3, **options)
    np.testing.assert_allclose(unclip.interpolate(*images, 3, noise=False, decoder=FEW, seed=7), wanted, atol=1e-5)
    texts = unclip.clip.embed_text(["a", "b"])
    way = (texts[0] - texts[1]) / np.linalg.norm(texts[0] - texts[1])
    wanted = unclip.decoder.sample(1, embedding=slerp(z[0], way, [0.3]), x=noise[:1], **options)
    np.testing.assert_allclose(unclip.difference(images[0], "a", "b", [0.3], decoder=FEW), wanted, atol=1e-4)
    others = unclip.variations(images, 2, decoder=FEW, seed=3)
    wanted = unclip.decoder.sample(4, embedding=np.repeat(z, 2, axis=0), seed=3, **options)
    np.testing.assert_allclose(others, wanted, atol=1e-5)


@pytest.mark.once
def test_it_is_saved_with_its_parts(unclip, tmp_path, images):
    unclip.save(tmp_path / "unclip.keras")
    again = keras.saving.load_model(tmp_path / "unclip.keras")
    options = {"prior": FEW, "decoder": FEW}
    np.testing.assert_allclose(
        again.sample(2, text=WORDS, **options), unclip.sample(2, text=WORDS, **options), atol=1e-5
    )
    np.testing.assert_allclose(again.clip.embed_image(images), unclip.clip.embed_image(images), atol=1e-6)


@pytest.mark.once
def test_upsamplers(unclip):
    network = UNet.basic(4, 1, conditions={"low": Concat("bicubic")})
    twice = DiffusionModel(network, ema=None)
    twice.build({"image": (None, 16, 16, 3), "low": (None, 8, 8, 3)})
    draw_weights(network)
    whole = UnCLIP(unclip.prior, unclip.decoder, twice, clip=unclip.clip)
    small = unclip.sample(2, text=WORDS, prior=FEW, decoder=FEW)
    large = whole.sample(2, text=WORDS, prior=FEW, decoder=FEW, upsampling=FEW)
    wanted = twice.sample(2, low=small, seed=stage_seed(stage_seed(0, 1), 1), **FEW)
    np.testing.assert_allclose(large, wanted, atol=1e-5)
    assert whole.clone(embedding="embedding").upsamplers[0].network.conditions["low"].interpolation == "bicubic"


@pytest.mark.once
def test_what_it_refuses(unclip, images):
    with pytest.raises(TypeError, match="must be DiffusionModels"):
        UnCLIP(unclip.prior, unclip.clip)
    with pytest.raises(ValueError, match=r"must have the condition 'z'; it has: \('embedding', 'text'\)"):
        UnCLIP(unclip.prior, unclip.decoder, embedding="z")
    narrow = DiffusionModel(unclip.prior.network.clone(), ema=None, codec="identity")
    narrow.build({"image": (None, 5), "text": (None, *unclip.prior.network.conditions["text"].row)})
    with pytest.raises(ValueError, match=r"returns \(5,\), but the decoder takes \(6,\)"):
        UnCLIP(narrow, unclip.decoder)
    with pytest.raises(ValueError, match=r"no part takes \['label'\]"):
        unclip.sample(1, text="red", label=3)
    with pytest.raises(ValueError, match="needs a `clip`, and a `text`"):
        UnCLIP(unclip.prior, unclip.decoder).sample(1, text="red", best_of=2)
    with pytest.raises(ValueError, match="embedding images needs a `clip`"):
        UnCLIP(unclip.prior, unclip.decoder).variations(images)
    with pytest.raises(ValueError, match="`after` and `before` must differ"):
        unclip.difference(images[0], "red", "red")
    with pytest.raises(NotImplementedError, match="evaluate each part"):
        unclip.fit(images)
    with pytest.raises(NotImplementedError, match=r"use `unclip\.sample"):
        unclip(images)


@pytest.mark.once
def test_seeds_that_are_none_or_a_list(unclip, images):
    given = {"text": "red", "prior": FEW, "decoder": FEW}
    drawn = []
    for seed in (3, 3, 4):
        keras.utils.set_random_seed(seed)
        drawn += [
            unclip.sample(1, seed=None, **given),
            unclip.interpolate(*images, 2, seed=None, noise=False, decoder=FEW),
        ]
    np.testing.assert_array_equal(drawn[0], drawn[2])
    np.testing.assert_array_equal(drawn[1], drawn[3])
    assert np.abs(drawn[0] - drawn[4]).max() > 1e-3 < np.abs(drawn[1] - drawn[5]).max()
    both = unclip.sample(2, seed=[5, 6], best_of=2, **given)
    np.testing.assert_allclose(both[1:], unclip.sample(1, seed=[6], best_of=2, **given), atol=1e-5)
    rows = unclip.embeddings(2, text="red", seed=[5, 6], best_of=3, options=FEW)
    candidates = unclip.prior.sample(3, text="red", seed=[6, stage_seed(6, 2), stage_seed(6, 3)], **FEW)
    assert np.abs(candidates - rows[1]).max(-1).min() < 1e-5


@pytest.mark.once
@pytest.mark.parametrize("made", [lambda x: x.astype("float32"), lambda x: np.full(x.shape, np.nan), lambda x: x > 4])
def test_images_that_are_none(unclip, images, made):
    bad = made(images)
    for ask in (
        lambda: unclip.variations(bad),
        lambda: unclip.interpolate(*bad),
        lambda: unclip.difference(bad[0], "red", "blue"),
        lambda: unclip.clip.embed_image(bad),
        lambda: unclip.clip.classify(bad, WORDS),
    ):
        with pytest.raises(ValueError, match=r"finite|0\.\.255|uint8"):
            ask()
