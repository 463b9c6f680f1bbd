"""The captioned pictures: drawn, described, held out, and read back."""

import numpy as np
import pytest

from kdiff import shapes
from kdiff.shapes import Scene, Thing

CAPTION = "a small red circle above a large blue square on a white background"


def test_a_caption_is_read_and_written():
    scene = Scene.parse(CAPTION)
    assert scene == Scene(Thing("small", "red", "circle"), "above", Thing("large", "blue", "square"), "white")
    assert scene.caption == CAPTION
    assert Scene.parse("A large orange triangle") == Scene(Thing("large", "orange", "triangle"))


@pytest.mark.parametrize("caption", ["", "a red circle", "a small pink circle", CAPTION + " and more"])
def test_other_captions_are_errors(caption):
    with pytest.raises(ValueError, match="a caption is such as"):
        Scene.parse(caption)


@pytest.mark.parametrize("size", [16, 24, 33])
@pytest.mark.parametrize("held_out", [False, True])
def test_a_picture_is_read_as_what_was_drawn(size, held_out):
    images, captions = shapes.dataset(60, size, held_out)
    assert images.shape == (60, size, size, 3)
    assert images.dtype == np.uint8
    for image, caption in zip(images, captions, strict=True):
        assert shapes.same(shapes.read(image), Scene.parse(caption)), caption
        assert shapes.same(shapes.read(image / 127.5 - 1), Scene.parse(caption)), caption


def test_a_noisy_picture_is_read():
    images, captions = shapes.dataset(100, 32)
    noisy = np.clip(images + np.random.default_rng(0).normal(0, 10, images.shape), 0, 255).astype("uint8")
    assert all(shapes.same(shapes.read(x), Scene.parse(c)) for x, c in zip(noisy, captions, strict=True))


def test_no_scene_is_read_where_there_is_none():
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3)).astype("uint8")
    assert shapes.read(noise) is None
    assert shapes.read(np.zeros((32, 32, 3), "uint8")) is None
    assert not shapes.same(None, Scene.parse(CAPTION))


def test_which_thing_is_named_first_does_not_matter():
    turned = "a large blue square below a small red circle on a white background"
    assert shapes.same(Scene.parse(CAPTION), Scene.parse(turned))
    assert not shapes.same(Scene.parse(CAPTION), Scene.parse(turned.replace("below", "above")))


def test_held_out_pairs_are_never_in_training():
    def pairs(held_out):
        scenes = [Scene.parse(caption) for caption in shapes.dataset(3000, 8, held_out)[1]]
        return {tuple(sorted([s.first[1:], s.second[1:]])) for s in scenes if s.second}, scenes

    seen, scenes = pairs(False)
    unseen, _ = pairs(True)
    assert not seen & unseen
    assert 0.05 < len(unseen) / len(seen | unseen) < 0.2
    # Each thing of the pairs held out, and each relation and background, is seen in training.
    assert {thing for pair in unseen for thing in pair} <= {thing for pair in seen for thing in pair}
    assert {s.relation for s in scenes} == {*shapes.RELATIONS, None}
    assert {s.background for s in scenes} == set(shapes.BACKGROUNDS)


def test_the_same_again_for_the_same_seed():
    images, captions = shapes.dataset(5, 16, seed=3)
    again, captions_again = shapes.dataset(5, 16, seed=3)
    np.testing.assert_array_equal(images, again)
    assert captions == captions_again
    assert captions != shapes.dataset(5, 16, seed=4)[1]
