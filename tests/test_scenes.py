"""The captioned pictures: drawn, described, held out, and read back."""

import itertools

import numpy as np
import pytest

from kdiff import scenes
from kdiff.scenes import Scene, Thing

pytestmark = pytest.mark.once

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


def plainly_drawn(scene, size, generator=None):
    """Each sample of the picture gets a colour, in turn."""
    samples = size * scenes.EDGE
    y, x = (np.mgrid[:samples, :samples] + 0.5) / samples
    picture = np.tile(np.array(scenes.BACKGROUNDS[scene.background], "float64"), (samples, samples, 1))
    moves = np.zeros((2, 2)) if generator is None else generator.uniform(-0.04, 0.04, (2, 2))
    places = [(scene.first, 0.5 + 3 * moves[0])]
    if scene.second:
        step = 0.25 * np.array(scenes.RELATIONS[scene.relation])
        places = [(scene.first, 0.5 + step + moves[0]), (scene.second, 0.5 - step + moves[1])]
    for thing, centre in places:
        half = scenes.SIZES[thing.size]
        inside = scenes.SHAPES[thing.shape]((x - centre[0]) / half, (y - centre[1]) / half)
        picture[inside] = scenes.COLOURS[thing.colour]
    return np.round(picture.reshape(size, scenes.EDGE, size, scenes.EDGE, 3).mean((1, 3))).astype("uint8")


@pytest.mark.parametrize("size", [1, 8, 16, 33])
def test_a_picture_is_the_mean_of_its_samples(size):
    _, captions = scenes.dataset(60, 8)
    for seed, scene in enumerate(map(Scene.parse, captions)):
        np.testing.assert_array_equal(scene.draw(size), plainly_drawn(scene, size), scene.caption)
        expected = plainly_drawn(scene, size, np.random.default_rng(seed))
        np.testing.assert_array_equal(scene.draw(size, np.random.default_rng(seed)), expected, scene.caption)


def test_many_are_drawn_as_one(monkeypatch):
    images, captions = scenes.dataset(50, 16)
    generator = np.random.default_rng([0, False])
    monkeypatch.setattr(scenes, "SAMPLES", 7 * 64**2)  # seven at once
    np.testing.assert_array_equal(scenes.dataset(50, 16)[0], images)
    for _ in itertools.islice((s for s in scenes._random_scenes(generator) if not s.held_out), 50):
        pass
    alone = [plainly_drawn(Scene.parse(caption), 16, generator) for caption in captions]
    np.testing.assert_array_equal(alone, images)


@pytest.mark.parametrize("size", [16, 24, 33])
@pytest.mark.parametrize("held_out", [False, True])
def test_a_picture_is_read_as_what_was_drawn(size, held_out):
    images, captions = scenes.dataset(60, size, held_out)
    assert images.shape == (60, size, size, 3)
    assert images.dtype == np.uint8
    for image, caption in zip(images, captions, strict=True):
        assert scenes.same(scenes.read(image), Scene.parse(caption)), caption
        assert scenes.same(scenes.read(image / 127.5 - 1), Scene.parse(caption)), caption


def test_a_noisy_picture_is_read():
    images, captions = scenes.dataset(100, 32)
    noisy = np.clip(images + np.random.default_rng(0).normal(0, 10, images.shape), 0, 255).astype("uint8")
    assert all(scenes.same(scenes.read(x), Scene.parse(c)) for x, c in zip(noisy, captions, strict=True))


def test_no_scene_is_read_where_there_is_none():
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3)).astype("uint8")
    assert scenes.read(noise) is None
    assert scenes.read(np.zeros((32, 32, 3), "uint8")) is None
    assert not scenes.same(None, Scene.parse(CAPTION))


def test_which_thing_is_named_first_does_not_matter():
    turned = "a large blue square below a small red circle on a white background"
    assert scenes.same(Scene.parse(CAPTION), Scene.parse(turned))
    assert not scenes.same(Scene.parse(CAPTION), Scene.parse(turned.replace("below", "above")))


def test_held_out_pairs_are_never_in_training():
    def pairs(held_out):
        listed = [Scene.parse(caption) for caption in scenes.dataset(3000, 8, held_out)[1]]
        return {tuple(sorted([s.first[1:], s.second[1:]])) for s in listed if s.second}, listed

    seen, listed = pairs(False)
    unseen, _ = pairs(True)
    assert not seen & unseen
    assert 0.05 < len(unseen) / len(seen | unseen) < 0.2
    # Each thing of the pairs held out, and each relation and background, is seen in training.
    assert {thing for pair in unseen for thing in pair} <= {thing for pair in seen for thing in pair}
    assert {s.relation for s in listed} == {*scenes.RELATIONS, None}
    assert {s.background for s in listed} == set(scenes.BACKGROUNDS)


def test_the_same_again_for_the_same_seed():
    images, captions = scenes.dataset(5, 16, seed=3)
    again, captions_again = scenes.dataset(5, 16, seed=3)
    np.testing.assert_array_equal(images, again)
    assert captions == captions_again
    assert captions != scenes.dataset(5, 16, seed=4)[1]


def test_some_rows_are_those_of_the_whole():
    images, captions = scenes.dataset(20, 16, held_out=True)
    some, their_captions = scenes.dataset(20, 16, held_out=True, rows=[3, 19, 3])
    np.testing.assert_array_equal(some, images[[3, 19, 3]])
    assert their_captions == [captions[row] for row in (3, 19, 3)]
    none, no_captions = scenes.dataset(20, 16, rows=[])
    assert none.shape == (0, 16, 16, 3)
    assert no_captions == []


@pytest.mark.parametrize("options", [{"count": 0}, {"count": 2.5}, {"count": 1, "image_size": 0}])
def test_bad_numbers(options):
    with pytest.raises(ValueError, match=list(options)[-1]):
        scenes.dataset(**options)


def test_two_colours_around_one_place_are_no_scene():
    """Of which one has no pixel that is nearer to its own centre; and no number is divided by 0."""
    red, blue = (scenes.COLOURS[name] for name in ("red", "blue"))
    image = np.zeros((16, 16, 3), "uint8")
    image[4:12, 4:12], image[5:11, 5:11], image[7:9, 7:9] = red, 0, blue
    with np.errstate(all="raise"):
        assert scenes.read(image) is None
