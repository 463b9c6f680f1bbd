import os
import subprocess
import sys
import warnings

import keras
import numpy as np
import pytest

tf = pytest.importorskip("tensorflow", reason="the extra `data` is not installed")

from tensorflow.python.data.experimental.ops import distribute  # noqa: E402

from kdiff import data, scenes  # noqa: E402
from kdiff.data import encoding, folders, sources  # noqa: E402
from kdiff.text import Bytes  # noqa: E402

pytestmark = [pytest.mark.data, pytest.mark.once]


@pytest.fixture
def colours():
    return np.random.default_rng(0).integers(0, 256, (10, 6, 8, 3), dtype="uint8")


def values(dataset):
    """All images of one pass."""
    return np.concatenate(
        [batch["image"] if isinstance(batch, dict) else batch for batch in dataset.as_numpy_iterator()]
    )


def unshuffled(source, size=None, **options):
    return data.images(source, size, **{"batch_size": 64, "shuffle": False, "drop_remainder": False, **options})


# Digits


def test_digits_are_scaled_labelled_and_divided():
    (batch,) = unshuffled("digits", batch_size=2000, split="all", labels=True)
    assert batch["image"].shape == (1797, 8, 8, 1)
    assert batch["image"].dtype == tf.float32
    assert (batch["image"].numpy().min(), batch["image"].numpy().max()) == (-1, 1)
    assert np.unique(batch["label"]).tolist() == list(range(10))
    train, test = (values(unshuffled("digits", split=split)) for split in ("train", "test"))
    np.testing.assert_array_equal(np.concatenate([train, test]), batch["image"])


def test_digits_are_those_of_scikit_learn():
    raw = pytest.importorskip("sklearn.datasets").load_digits().images
    np.testing.assert_allclose(values(unshuffled("digits", split="all"))[..., 0], raw / 8 - 1, atol=1.01 / 255)


@pytest.mark.parametrize("size", [16, 32, (12, 20)])
def test_digits_grow_smoothly(size):
    images = values(unshuffled("digits", size, split="test"))
    assert images.shape[1:3] == (size if isinstance(size, tuple) else (size, size))
    assert images.max() <= 1
    assert len(np.unique(images)) > 100  # more shades than the 17 of the originals


# Shapes


@pytest.fixture
def few_shapes(monkeypatch):
    monkeypatch.setattr(sources, "SHAPES", {"train": 200, "test": 50})


def captions(dataset):
    return [text.decode() for batch in dataset.as_numpy_iterator() for text in batch["text"]]


def test_there_are_enough_shapes():
    assert sources.SHAPES == {"train": 20_000, "test": 2_000}


@pytest.mark.parametrize(("size", "side"), [(None, 32), (12, 12), ((16, 16), 16)])
def test_shapes_are_drawn_at_their_size(few_shapes, size, side):
    drawn, told = scenes.dataset(200, side)
    dataset = unshuffled("shapes", size, text=True)
    np.testing.assert_allclose(values(dataset), drawn / 127.5 - 1, atol=1e-6)
    assert captions(dataset) == told
    assert dataset.class_names is None
    np.testing.assert_array_equal(values(unshuffled("shapes", size)), values(dataset))


def test_the_test_shapes_are_those_held_out_of_training(few_shapes):
    for split, count in (("train", 200), ("test", 50)):
        told = captions(unshuffled("shapes", 8, split=split, text=True))
        assert len(told) == count
        assert {scenes.Scene.parse(caption).held_out for caption in told} == {split == "test"}


def test_only_the_shapes_asked_for_are_drawn(few_shapes, monkeypatch):
    parts = [captions(unshuffled("shapes", 8, split=split, text=True)) for split in ("train[:10%]", "train[20:]")]
    assert sorted(parts[0] + parts[1]) == sorted(scenes.dataset(200, 8)[1])
    drawn, draw = [], scenes._draw
    monkeypatch.setattr(scenes, "_draw", lambda some, *args: drawn.extend(some) or draw(some, *args))
    images = values(unshuffled("shapes", 8, split="train[:10%]"))
    assert len(drawn) == len(images) == 20


def test_bad_shapes(few_shapes):
    with pytest.raises(ValueError, match="captions but no `labels`"):
        data.images("shapes", labels=True)
    with pytest.raises(ValueError, match="square"):
        data.images("shapes", (8, 16))
    with pytest.raises(ValueError, match="`split` must be one of"):
        data.images("shapes", split="val")


# Arrays


def test_uint8_and_float_arrays_give_the_same(colours):
    floats = colours / 127.5 - 1
    np.testing.assert_allclose(values(unshuffled(colours)), floats, atol=1e-6)
    np.testing.assert_allclose(values(unshuffled(floats)), floats, atol=1e-6)
    np.testing.assert_allclose(values(unshuffled(floats.astype("float16"))), floats, atol=1e-3)


@pytest.mark.parametrize("labels", [np.arange(10), np.arange(10.0) / 3, np.arange(20).reshape(10, 2)])
def test_labels_stay_with_their_images(colours, labels):
    images = np.full_like(colours, 0) + np.arange(10, dtype="uint8")[:, None, None, None]
    for batch in data.images(images, batch_size=3, labels=labels).as_numpy_iterator():
        rows = np.round((batch["image"][:, 0, 0, 0] + 1) * 127.5).astype(int)
        np.testing.assert_allclose(batch["label"], labels[rows], rtol=1e-6)


def test_resizing_keeps_the_aspect_and_the_centre():
    image = np.zeros((1, 8, 16, 1), "uint8")
    image[:, :, 4:12] = 255  # the middle half is white: a square keeps just that
    np.testing.assert_array_equal(values(unshuffled(image, 4)), np.ones((1, 4, 4, 1)))
    tall = values(unshuffled(image.transpose(0, 2, 1, 3), (4, 4)))
    np.testing.assert_array_equal(tall, np.ones((1, 4, 4, 1)))


def test_downsizing_averages():
    checkers = (np.indices((32, 32)).sum(0) % 2 * 255).astype("uint8")[None, ..., None]
    np.testing.assert_allclose(values(unshuffled(checkers, 8))[:, 2:-2, 2:-2], 0, atol=0.05)


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("have", [1, 2, 3, 4])
def test_channels(have, channels):
    white = values(unshuffled(np.full((1, 4, 4, have), 255, "uint8"), channels=channels))
    np.testing.assert_array_equal(white, np.ones((1, 4, 4, channels)))


def test_transparent_pixels_become_white():
    clear = np.zeros((1, 4, 4, 4), "uint8")
    np.testing.assert_array_equal(values(unshuffled(clear, channels=3)), np.ones((1, 4, 4, 3)))
    np.testing.assert_array_equal(values(unshuffled(clear)), -np.ones((1, 4, 4, 4)))


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((3, 8, 8), "uint8"), r"\[\.\.\., None\]"),
        (np.zeros((3, 3, 8, 8), "uint8"), "channels come last"),
        (np.zeros((3, 8, 8, 1), "int64"), "int64"),
        (np.full((3, 8, 8, 1), 255.0), "127.5"),
        (np.full((3, 8, 8, 1), -1.5), r"\[-1, 1\]"),
        (np.full((3, 8, 8, 1), np.nan), "NaN"),
        (np.full((3, 8, 8, 1), np.inf), "NaN or infinite"),
        (np.zeros((0, 8, 8, 1), "uint8"), "empty"),
        (np.zeros((0, 8, 8, 1)), "empty"),
        (np.zeros((3, 8, 8, 1), "uint8"), "batch_size"),
    ],
)
def test_bad_arrays(array, message):
    with pytest.raises(ValueError, match=message):
        data.images(array, batch_size=4)


def test_floats_that_look_like_0_to_1_are_remarked_on():
    with pytest.warns(UserWarning, match=r"look like \[0, 1\]"):
        data.images(np.linspace(0, 1, 64).reshape(1, 8, 8, 1), batch_size=1)


@pytest.mark.parametrize("labels", [True, np.arange(9), np.array(["cat"] * 10), np.array(3)])
def test_bad_labels_of_arrays(colours, labels):
    with pytest.raises(ValueError, match="labels"):
        data.images(colours, batch_size=2, labels=labels)


# Text


NAMES = [f"picture {index}, «größer»" for index in range(10)]


class Count:
    """An encoder that gives the length of a text and its first letters, and counts what it was asked."""

    def __init__(self, dtype="int32"):
        self.calls, self.dtype = [], dtype

    def __call__(self, texts):
        assert all(isinstance(text, str) for text in texts)
        self.calls.append(list(texts))
        return np.array([[len(text), *text.encode()[:9]] for text in texts], self.dtype)


@pytest.mark.parametrize("kind", [list, tuple, np.array, lambda text: np.array(text, object)])
def test_text_stays_with_its_images(kind):
    images = np.zeros((10, 4, 4, 1), "uint8") + np.arange(10, dtype="uint8")[:, None, None, None]
    dataset = data.images(images, batch_size=5, text=kind(NAMES), labels=np.arange(10), split="all[:5]")
    assert dataset.element_spec["text"] == tf.TensorSpec((5,), tf.string)
    (batch,) = dataset.as_numpy_iterator()
    assert [text.decode() for text in batch["text"]] == [NAMES[label] for label in batch["label"]]
    np.testing.assert_array_equal(np.round((batch["image"][:, 0, 0, 0] + 1) * 127.5), batch["label"])


@pytest.mark.parametrize(("given", "gives"), [("int64", "int32"), ("uint8", "int32"), ("float64", "float32")])
@pytest.mark.parametrize("size", [None, 4])
def test_text_is_encoded(colours, given, gives, size):
    dataset = data.images(colours, size, 5, text=NAMES, text_encoder=Count(given), shuffle=False)
    assert dataset.element_spec["text"] == tf.TensorSpec((5, 10), gives)
    assert dataset.cardinality() == 2
    encoded = np.concatenate([batch["text"] for batch in dataset.as_numpy_iterator()])
    np.testing.assert_array_equal(encoded, Count()(NAMES))
    np.testing.assert_array_equal(values(dataset), values(data.images(colours, size, 5, shuffle=False)))


def test_a_tokenizer_encodes(few_shapes):
    tokenizer = Bytes(96)
    (batch,) = unshuffled("shapes", 8, batch_size=200, text=True, text_encoder=tokenizer).as_numpy_iterator()
    np.testing.assert_array_equal(batch["text"], tokenizer(scenes.dataset(200, 8)[1]))


@pytest.mark.parametrize("cache", [True, "file"])
def test_each_text_is_encoded_once_whatever_the_epochs(colours, tmp_path, monkeypatch, cache):
    monkeypatch.setattr(encoding, "TEXTS", 4)
    encoder = Count()
    options = {"cache": tmp_path / "cache" if cache == "file" else cache, "repeat": 2, "augment": lambda image: image}
    dataset = data.images(colours, batch_size=5, text=NAMES, text_encoder=encoder, **options)
    for _ in range(3):
        assert len(list(dataset)) == 4
    assert encoder.calls == [NAMES[:1], NAMES[:4], NAMES[4:8], NAMES[8:]]  # the first tells the shape


def test_without_a_cache_text_is_encoded_every_epoch(colours):
    encoder = Count()
    dataset = data.images(colours, batch_size=5, text=NAMES, text_encoder=encoder, cache=False)
    assert [len(list(dataset)) for _ in range(3)] == [2] * 3
    assert encoder.calls[1:] == [NAMES] * 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (True, "for an array pass captions"),
        (NAMES[:9], "one string for each of 10 images"),
        ("ten letters", "one string for each of 10 images; received: 'ten letters'"),
        (3, "one string for each of 10 images; received: 3"),
        (None, "one string for each of 10 images; received: None"),
        (np.array(NAMES).reshape(5, 2), r"\(5, 2\)"),
        (list(range(10)), "must be strings.*received: 0"),
        ([*NAMES[:9], None], "must be strings.*received: None"),
    ],
)
def test_bad_text_of_arrays(colours, text, message):
    with pytest.raises(ValueError, match=message):
        data.images(colours, batch_size=2, text=text)


@pytest.mark.parametrize(
    "encoder",
    [
        lambda texts: np.zeros((len(texts) + 1, 2)),
        lambda texts: np.array(3.0),
        lambda texts: np.array(texts),
        lambda texts: np.ones((len(texts), 2), bool),
    ],
)
def test_bad_encoders(colours, encoder):
    with pytest.raises(ValueError, match="one row for each of 1 texts"):
        data.images(colours, batch_size=2, text=NAMES, text_encoder=encoder)


def test_encoders_that_change_their_mind(colours):
    dataset = data.images(colours, batch_size=2, text=NAMES, text_encoder=lambda texts: np.zeros((len(texts),) * 2))
    with pytest.raises(tf.errors.InvalidArgumentError, match="must pad to one length"):
        list(dataset)


def test_an_encoder_is_a_function_of_text(colours):
    with pytest.raises(ValueError, match="`text_encoder` must be a function"):
        data.images(colours, batch_size=2, text=NAMES, text_encoder="clip")
    with pytest.raises(ValueError, match="`text_encoder` needs text"):
        data.images(colours, batch_size=2, text_encoder=Count())


# Splits


def test_parts_of_a_split_share_nothing(colours):
    parts = [values(unshuffled(colours, split=split)) for split in ("train[:60%]", "train[6:]")]
    assert [len(part) for part in parts] == [6, 4]
    together = np.concatenate(parts)
    assert {image.tobytes() for image in together} == {image.tobytes() for image in values(unshuffled(colours))}
    np.testing.assert_array_equal(values(unshuffled(colours, split="all[-4:]")), parts[1])


@pytest.mark.parametrize("split", ["val", "train[a:b]", "train[:5", "", None, 3])
def test_bad_splits(colours, split):
    for source in ("digits", colours):
        with pytest.raises(ValueError, match="`split` must be one of"):
            data.images(source, split=split)


def test_an_empty_split_is_an_error(colours):
    with pytest.raises(ValueError, match="empty"):
        data.images(colours, split="train[:0]")


# Batches and order


def test_each_epoch_has_a_new_order_and_a_seed_repeats_it(colours):
    first, again = (data.images(colours, batch_size=5, seed=1) for _ in range(2))
    epochs = [values(first), values(first)]
    assert not np.array_equal(*epochs)
    assert {image.tobytes() for image in epochs[0]} == {image.tobytes() for image in epochs[1]}
    np.testing.assert_array_equal([values(again), values(again)], epochs)
    assert not np.array_equal(values(data.images(colours, batch_size=5, seed=2)), epochs[0])
    data.images(colours, batch_size=5, seed=None)


def test_remainder_and_repeat(colours):
    def sizes(**options):
        return [len(batch) for batch in data.images(colours, batch_size=4, **options)]

    assert sizes() == [4, 4]
    assert sizes(drop_remainder=False) == [4, 4, 2]
    assert sizes(repeat=2) == [4] * 5
    endless = data.images(colours, batch_size=4, repeat=None)
    assert endless.cardinality() == tf.data.INFINITE_CARDINALITY
    assert len(list(endless.take(9))) == 9


@pytest.mark.parametrize("cache", [True, False, "file"])
def test_caching_changes_nothing(colours, tmp_path, cache):
    dataset = unshuffled(colours, 4, cache=tmp_path / "new" / "cache" if cache == "file" else cache)
    np.testing.assert_array_equal(values(dataset), values(dataset))
    assert len(values(data.images(colours, 4, 2, cache=cache is True))) == 10
    assert any(tmp_path.rglob("cache*")) == (cache == "file")


def test_a_cache_is_whole_or_not_there(colours, tmp_path):
    """A kill, here an error, leaves nothing that is taken for a cache, nor a lock."""

    class Broken(Exception):
        pass

    class Killed(Count):
        def __call__(self, texts):
            if len(texts) == len(NAMES):
                raise Broken
            return super().__call__(texts)

    options = {"text": NAMES, "cache": tmp_path / "new" / "cache", "batch_size": 5}
    with pytest.raises(tf.errors.OpError, match="Broken"):
        data.images(colours, text_encoder=Killed(), **options)
    assert not list((tmp_path / "new").iterdir())
    (tmp_path / "new" / "cache_0.lockfile").touch()  # what tf.data itself leaves
    left = tmp_path / "new" / ".partial-a1b2-cache"  # and what kdiff does, where a process is killed
    left.mkdir()
    os.utime(left, (0, 0))
    dataset = data.images(colours, text_encoder=Count(), **options)
    assert not left.exists()
    next(dataset.as_numpy_iterator())  # nor need an epoch be whole
    assert len(values(data.images(colours, text_encoder=Count(), **options))) == 10


@pytest.mark.once
def test_the_order_is_not_of_tensorflows_seed(colours):
    """A process that goes on may have another; 0 is an error in TensorFlow where a dataset's seed is a tensor."""
    orders = []
    for seed in (0, 7):
        keras.utils.set_random_seed(seed)
        orders.append([batch for batch in data.images(colours, batch_size=3, seed=1).as_numpy_iterator()])
    for a, b in zip(*orders, strict=True):
        np.testing.assert_array_equal(a, b)


def test_the_number_of_the_pass_says_its_order(colours):
    first, other = (data.images(colours, batch_size=5, seed=1, repeat=2) for _ in range(2))
    epochs = [values(first) for _ in range(3)]
    assert first.order.passes == 6
    other.order.passes = 4
    np.testing.assert_array_equal(values(other.map(lambda images: images)), epochs[2])
    iter(other)  # Keras makes some that it does not use
    assert other.order.passes == 6


@pytest.mark.parametrize(
    "options",
    [
        {"batch_size": 0},
        {"batch_size": 2.0},
        {"image_size": 0},
        {"image_size": (8, 8, 8)},
        {"image_size": "big"},
        {"channels": 2},
        {"repeat": 0},
        {"seed": -1},
        {"augment": "flip"},
        {"augment": [None, 3]},
        {"labels": "yes"},
        {"text": True},
        {"text": ["seven"]},
        {"text_encoder": len},
    ],
)
def test_bad_arguments_are_named(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        data.images("digits", **options)


def test_channels_of_latents_are_not_colours():
    latents = np.zeros((2, 8, 8, 16), "float32")
    assert values(unshuffled(latents)).shape == (2, 8, 8, 16)
    with pytest.raises(ValueError, match="channels"):
        unshuffled(latents, channels=3)


# Augmentation


class Darken(keras.layers.Layer):
    """A layer of one's own, that computes with Keras' backend."""

    def call(self, images):
        return keras.ops.maximum(images - 10.0, 0.0)


def same_image(count=8):
    return np.repeat(np.random.default_rng(0).integers(0, 256, (1, 8, 8, 3), dtype="uint8"), count, 0)


def random_layers():
    layers = keras.layers
    generator = tf.random.Generator.from_seed(
        1
    )  # tf.random.uniform starts over in each epoch once a global seed is set.
    flip, shift = (
        (lambda: layers.RandomFlip("horizontal", seed=1)),
        (lambda: layers.RandomTranslation(0.3, 0.3, seed=1)),
    )
    return {
        "layer": shift,
        "noise": lambda: layers.GaussianNoise(1.0, seed=1),
        "list": lambda: [flip(), shift()],
        "sequential": lambda: keras.Sequential([flip(), shift()]),
        "pipeline": lambda: layers.Pipeline([flip(), shift()]),
        "function": lambda: lambda image: image * generator.uniform(()),
    }


@pytest.mark.parametrize("name", random_layers())
def test_random_augmentation_differs_between_images_and_epochs(name):
    dataset = data.images(same_image(), batch_size=8, augment=random_layers()[name]())
    first, second = values(dataset), values(dataset)
    assert len({image.tobytes() for image in first}) > 4
    assert not np.array_equal(first, second)
    assert dataset.element_spec.shape == (8, 8, 8, 3)


@pytest.mark.parametrize("name", ["layer", "noise", "list"])
def test_seeded_augmentation_repeats(name):
    first, again = (values(data.images(same_image(), batch_size=8, augment=random_layers()[name]())) for _ in range(2))
    np.testing.assert_array_equal(first, again)
    unordered = data.images(same_image(), batch_size=8, augment=random_layers()[name](), seed=None)
    assert values(unordered).shape == first.shape


def test_keras_cv_layers():
    layers = pytest.importorskip("keras_cv", reason="the extra `data` is not installed").layers
    augment = [layers.RandomFlip("horizontal"), layers.RandomCutout(0.5, 0.5)]
    dataset = data.images(same_image(), batch_size=8, augment=augment)
    first, second = values(dataset), values(dataset)
    assert len({image.tobytes() for image in first}) > 4
    assert not np.array_equal(first, second)


def test_augmentation_sees_0_to_255(colours):
    brighter = data.images(colours, batch_size=2, shuffle=False, augment=lambda image: image + 51.0)
    np.testing.assert_allclose(values(brighter), np.minimum(colours / 127.5 - 1 + 0.4, 1), atol=1e-5)
    own = data.images(colours, batch_size=2, shuffle=False, augment=Darken())
    np.testing.assert_allclose(values(own), np.maximum(colours.astype(float) - 10, 0) / 127.5 - 1, atol=1e-5)


def test_augmentation_may_crop(colours):
    dataset = data.images(colours, batch_size=2, augment=keras.layers.RandomCrop(4, 5), labels=np.arange(10))
    assert dataset.element_spec["image"].shape == (2, 4, 5, 3)
    assert values(dataset).shape == (10, 4, 5, 3)


# Folders


@pytest.fixture
def folder(tmp_path, colours):
    image = pytest.importorskip("PIL.Image", reason="the extra `data` is not installed")
    for index, pixels in enumerate(colours[:6]):
        path = tmp_path / "pets" / ("cat" if index % 2 else "dog") / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.fromarray(pixels).save(path)
    (tmp_path / "pets" / "notes.txt").write_text("not an image")
    (tmp_path / "pets" / ".hidden.png").write_text("not an image")
    return tmp_path / "pets"


def test_folder(folder, colours):
    assert {image.tobytes() for image in values(unshuffled(folder))} == {
        image.tobytes() for image in values(unshuffled(colours[:6]))
    }
    assert values(unshuffled(str(folder), 4, channels=1)).shape == (6, 4, 4, 1)


def test_class_folders_are_labels(folder, colours):
    dataset = unshuffled(folder, labels=True)
    assert dataset.class_names == ["cat", "dog"]
    (batch,) = dataset.as_numpy_iterator()
    assert batch["label"].tolist() == [0, 0, 0, 1, 1, 1]
    np.testing.assert_allclose(batch["image"][3], colours[0] / 127.5 - 1, atol=1e-6)
    assert unshuffled(folder).class_names is None


def test_splits_of_folders(folder):
    assert len(values(unshuffled(folder, split="train[:50%]"))) == 3
    assert len(values(unshuffled(folder, split="cat"))) == 3
    assert len(values(unshuffled(folder, split="dog[:1]"))) == 1
    with pytest.raises(ValueError, match="split"):
        unshuffled(folder, split="test")


@pytest.fixture
def captioned(folder):
    for path in folder.rglob("[0-9].png"):
        text = f" {path.parent.name} №{path.stem}\n"
        path.with_suffix(".txt").write_text(text, "utf-8-sig" if path.stem == "0" else "utf-8")
    return folder


def test_captions_lie_beside_their_images(captioned):
    (captioned / "cat" / "broken.png").write_text("no picture")  # and so no caption is missed
    with pytest.warns(UserWarning, match="1 of 7 files"):
        dataset = unshuffled(captioned, labels=True, text=True)
    told = ["cat №1", "cat №3", "cat №5", "dog №0", "dog №2", "dog №4"]
    assert captions(dataset) == told
    assert captions(unshuffled(captioned, 4, split="dog[1:]", text=True)) == ["dog №0", "dog №2"]
    (batch,) = unshuffled(captioned / "cat", text=True, text_encoder=Count()).as_numpy_iterator()
    np.testing.assert_array_equal(batch["text"], Count()(told[:3]))


def test_missing_captions_are_named(captioned):
    (captioned / "cat" / "3.txt").unlink()
    with pytest.raises(ValueError, match=r"of 6 such files.* 1 are missing: cat.3\.txt$"):
        unshuffled(captioned, text=True)
    for path in captioned.rglob("*/*.txt"):
        path.unlink()
    with pytest.raises(ValueError, match=r" 6 are missing: cat.1\.txt, .*\.\.\.$"):
        unshuffled(captioned, text=True)
    (captioned / "cat" / "1.txt").write_bytes(b"\xff")
    with pytest.raises(ValueError, match=r"1\.txt is not UTF-8"):
        folders.read_caption(captioned / "cat" / "1.txt")
    with pytest.raises(ValueError, match="text"):
        unshuffled(captioned, text=["a"] * 6)


def test_broken_files_are_named_and_skipped(folder):
    (folder / "cat" / "text.png").write_text("no picture")
    (folder / "dog" / "cut.png").write_bytes((folder / "dog" / "0.png").read_bytes()[:-60])
    (folder / "dog" / "nothing.jpg").touch()
    with pytest.warns(UserWarning, match="3 of 9 files") as caught:
        dataset = unshuffled(folder, labels=True)
    for name in ("text.png", "cut.png", "nothing.jpg"):
        assert name in str(caught[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(values(dataset)) == 6


@pytest.mark.once
def test_of_a_large_folder_only_a_sample_is_read_beforehand(captioned, colours, monkeypatch):
    """A file that turns out broken later is replaced by the next one, with its label and caption; none is lost."""
    read, decode = [], folders.decode
    monkeypatch.setattr(folders, "CHECKED", 4)
    monkeypatch.setattr(folders, "SAMPLED", 2)
    monkeypatch.setattr(folders, "decode", lambda path: (read.append(path.name), decode(path))[1])
    dataset = unshuffled(captioned, (6, 8), labels=True, text=True, cache=False)
    assert len(read) == 2
    assert "3.png" not in read
    (captioned / "cat" / "3.png").write_text("no picture")
    with pytest.warns(UserWarning, match=r"3.png cannot be read, and is replaced by the next: cannot identify"):
        (batch,) = dataset.as_numpy_iterator()
    assert batch["label"].tolist() == [0, 0, 0, 1, 1, 1]
    order = [1, 5, 5, 0, 2, 4]
    np.testing.assert_allclose(batch["image"], colours[order] / 127.5 - 1, atol=1e-6)
    kinds = ["cat"] * 3 + ["dog"] * 3
    files = [captioned / kind / f"{i}.txt" for kind, i in zip(kinds, order, strict=True)]
    assert [text.decode() for text in batch["text"]] == [folders.read_caption(file) for file in files]


@pytest.mark.once
def test_of_a_large_folder_whose_images_differ_in_size(folder, monkeypatch):
    from PIL import Image

    monkeypatch.setattr(folders, "CHECKED", 4)
    monkeypatch.setattr(folders, "SAMPLED", 2)
    dataset = unshuffled(folder, cache=False)
    Image.new("RGB", (5, 5)).save(folder / "cat" / "1.png")
    with pytest.raises(Exception, match=r"most have \(6, 8\), .*1\.png has \(5, 5\); pass an `image_size`"):
        values(dataset)
    assert values(unshuffled(folder, 4, cache=False)).shape == (6, 4, 4, 3)


@pytest.mark.once
def test_every_pass_over_a_folder_that_is_not_cached_has_another_order(folder, colours):
    """Of all images, and of the seed; nothing else is held in memory for it."""

    def orders(seed, passes=3):
        dataset = data.images(folder, batch_size=6, cache=False, seed=seed)
        batches = [batch for _ in range(passes) for batch in dataset.as_numpy_iterator()]
        places = {image.tobytes(): i for i, image in enumerate(values(unshuffled(folder)))}
        return [[places[image.tobytes()] for image in batch] for batch in batches]

    first = orders(0)
    assert all(sorted(order) == list(range(6)) for order in first)
    assert len({tuple(order) for order in first}) == 3
    assert orders(0) == first
    assert orders(1) != first


def test_more_than_8_bits_are_reported(folder):
    from PIL import Image

    Image.fromarray(np.full((6, 8), 40_000, "uint16")).save(folder / "dog" / "deep.png")
    with pytest.warns(UserWarning, match="deep.png: its pixels have the mode 'I;16'"):
        assert len(values(unshuffled(folder))) == 6


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK"])
def test_modes_of_files(tmp_path, mode):
    from PIL import Image

    Image.new("RGB", (4, 4), "white").convert(mode).save(tmp_path / ("a.tif" if mode == "CMYK" else "a.png"))
    np.testing.assert_array_equal(values(unshuffled(tmp_path)), np.ones((1, 4, 4, 3)))


def test_images_of_different_sizes_need_a_size(folder):
    from PIL import Image

    Image.new("RGB", (5, 5)).save(folder / "cat" / "small.png")
    with pytest.raises(ValueError, match="image_size"):
        unshuffled(folder)
    assert values(unshuffled(folder, 4)).shape == (7, 4, 4, 3)


def test_rotated_photographs_are_put_upright(tmp_path):
    from PIL import Image

    photo = Image.new("L", (4, 2))
    exif = photo.getexif()
    exif[0x0112] = 6  # the camera was turned by a quarter
    photo.save(tmp_path / "photo.jpg", exif=exif)
    assert values(unshuffled(tmp_path)).shape == (1, 4, 2, 3)


def test_folders_that_hold_nothing(folder, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no image files"):
        data.images(tmp_path / "empty")
    with pytest.raises(ValueError, match="no such folder"):
        data.images(tmp_path / "missing")
    (tmp_path / "empty" / "a.png").write_text("no picture")
    with pytest.raises(ValueError, match=r"1 of 1 files.*\n.*a\.png"):
        data.images(tmp_path / "empty")
    with pytest.raises(ValueError, match=r"one subfolder per class.*a\.png"):
        data.images(tmp_path / "empty", labels=True)
    with pytest.raises(ValueError, match="labels"):
        data.images(folder, labels=np.arange(6))


def test_what_is_hidden_is_no_class(folder):
    (folder / ".ipynb_checkpoints").mkdir()
    (folder / "cat" / ".cache").mkdir()
    for place in (".ipynb_checkpoints", "cat/.cache"):
        (folder / place / "0.png").write_bytes((folder / "dog" / "0.png").read_bytes())
    dataset = unshuffled(folder, labels=True)
    assert dataset.class_names == ["cat", "dog"]
    assert len(values(dataset)) == 6


def test_links_are_followed(folder, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (folder / "cat" / "1.png").rename(tmp_path / "elsewhere" / "1.png")
    (folder / "bird").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "around").symlink_to(folder)  # and this is not the end
    dataset = unshuffled(folder, labels=True)
    assert dataset.class_names == ["bird", "cat", "dog"]
    assert next(dataset.as_numpy_iterator())["label"].tolist() == [0, 1, 1, 2, 2, 2]
    (folder / "fish").symlink_to(tmp_path / "missing")
    with pytest.raises(ValueError, match=r"fish is a link to .*missing, which does not exist"):
        unshuffled(folder, labels=True)


def test_a_folder_that_cannot_be_read_is_named(folder, monkeypatch):
    scandir = os.scandir  # root may read all

    def denied(path):
        if os.path.basename(path) == "dog":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(folders.os, "scandir", denied)
    with pytest.raises(ValueError, match=r"the folder .*dog cannot be read: .*Permission denied"):
        unshuffled(folder, labels=True)


def test_names_need_not_be_utf_8(folder, colours):
    try:
        (folder / "cat").rename(folder / os.fsdecode(b"ca\xff"))
        (folder / "dog" / "0.png").rename(folder / "dog" / os.fsdecode(b"\xe9.png"))
    except OSError:
        pytest.skip("the file system has no such names")
    dataset = unshuffled(folder, labels=True)
    assert dataset.class_names == [os.fsdecode(b"ca\xff"), "dog"]
    assert len(values(dataset)) == 6


def test_postscript_is_skipped(folder):
    (folder / "cat" / "9.jpg").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n")
    (folder / "cat" / "9.eps").write_bytes((folder / "cat" / "9.jpg").read_bytes())
    with pytest.warns(UserWarning, match=r"1 of 7 files.*\n  cat.9\.jpg: cannot identify"):
        assert len(values(unshuffled(folder))) == 6


# TensorFlow Datasets


@pytest.fixture(scope="module")
def tfds_folder(tmp_path_factory):
    tfds = pytest.importorskip("tensorflow_datasets", reason="the extra `data` is not installed")
    folder = tmp_path_factory.mktemp("tfds")
    images = np.random.default_rng(0).integers(0, 256, (6, 5, 5, 1), dtype="uint8")
    rows = [(index, {"image": image, "label": index % 2}) for index, image in enumerate(images)]
    tfds.dataset_builders.store_as_tfds_dataset(
        name="tiny_pets",
        version="1.0.0",
        data_dir=folder,
        features=tfds.features.FeaturesDict(
            {"image": tfds.features.Image(shape=(5, 5, 1)), "label": tfds.features.ClassLabel(names=["cat", "dog"])}
        ),
        split_datasets={"train": rows[:4], "test": rows[4:]},
        disable_shuffling=True,
    )
    kinds = (
        tfds.features.Text(),
        tfds.features.Sequence(tfds.features.Text()),
        tfds.features.Sequence({"text": tfds.features.Text(), "id": np.int64}),
    )
    rows = "grün", ["grün", "blue"], [{"text": "grün", "id": 1}, {"text": "blue", "id": 2}]
    none = "", [], []
    for name, kind, *texts in zip(("text", "caption", "captions"), kinds, rows, none, strict=True):
        tfds.dataset_builders.store_as_tfds_dataset(
            name=f"with_{name}",
            version="1.0.0",
            data_dir=folder,
            features=tfds.features.FeaturesDict({"image": tfds.features.Image(shape=(5, 5, 1)), name: kind}),
            split_datasets={
                "train": [(index, {"image": images[index], name: text}) for index, text in enumerate(texts)]
            },
            disable_shuffling=True,
        )
    features = tfds.features.FeaturesDict({"image": tfds.features.Image(shape=(5, 5, 1), dtype=np.uint16)})
    deep = [(0, {"image": images[0].astype("uint16")})]
    tfds.dataset_builders.store_as_tfds_dataset(
        name="deep", version="1.0.0", data_dir=folder, features=features, split_datasets={"train": deep}
    )
    return folder, images


def test_tfds(tfds_folder):
    folder, images = tfds_folder
    dataset = unshuffled("tiny_pets", data_dir=folder, labels=True)
    assert dataset.class_names == ["cat", "dog"]
    assert [batch["label"].tolist() for batch in dataset.as_numpy_iterator()] == [[0, 1, 0, 1]]
    np.testing.assert_allclose(values(dataset), images[:4] / 127.5 - 1, atol=1e-6)
    test = unshuffled("tiny_pets", 10, data_dir=str(folder), split="test[:1]", download=True)  # it is there already
    assert values(test).shape == (1, 10, 10, 1)


@pytest.mark.parametrize("feature", ["text", "caption", "captions"])
def test_captions_of_tfds(tfds_folder, feature):
    folder, images = tfds_folder
    dataset = unshuffled(f"with_{feature}", data_dir=folder, text=True)
    assert captions(dataset) == ["grün", ""]
    np.testing.assert_allclose(values(dataset), images[:2] / 127.5 - 1, atol=1e-6)
    encoded = unshuffled(f"with_{feature}", data_dir=folder, text=True, text_encoder=Bytes(6))
    (batch,) = encoded.as_numpy_iterator()
    np.testing.assert_array_equal(batch["text"], Bytes(6)(["grün", ""]))
    assert isinstance(next(iter(unshuffled(f"with_{feature}", data_dir=folder))), tf.Tensor)


def test_bad_tfds(tfds_folder):
    folder, _ = tfds_folder
    with pytest.raises(ValueError, match=r"split.*'test', 'train'"):
        data.images("tiny_pets", data_dir=folder, split="val")
    with pytest.raises(ValueError, match=r"'no_such_set'.*\['digits', 'shapes'\].*data_dir"):
        data.images("no_such_set", data_dir=folder)
    with pytest.raises(ValueError, match="download=True"):
        data.images("mnist", data_dir=folder)
    with pytest.raises(ValueError, match="labels"):
        data.images("tiny_pets", data_dir=folder, labels=np.arange(4))
    with pytest.raises(ValueError, match="no feature 'label'"):
        data.images("deep", data_dir=folder, labels=True)
    with pytest.raises(ValueError, match=r"no text in a feature of .*\['image', 'label'\]"):
        data.images("tiny_pets", data_dir=folder, text=True)
    with pytest.raises(ValueError, match="text"):
        data.images("with_text", data_dir=folder, text=["a", "b"])
    with pytest.raises(ValueError, match="uint16"):
        data.images("deep", data_dir=folder)


# Several hosts


@pytest.mark.parametrize(
    "options",
    [{"cache": False}, {"shuffle": False}, {"shuffle": False, "cache": "file", "drop_remainder": False}],
    ids=["shuffled", "unshuffled", "cached"],
)
@pytest.mark.parametrize("kind", ["array", "folder", "shards", "tfds"])
def test_hosts_share_the_images_out(kind, options, folder, tfds_folder, colours, tmp_path):
    """By the rewriting of `tf.distribute`, which by default looks for files, even where none can be left out.

    Keras' JAX backend shares out the batches themselves.
    """
    source, whole = colours[:6], colours[:6]
    if kind in ("folder", "shards"):
        source = folder
    if kind == "shards":
        source = tmp_path / "shards"
        data.write_shards(folder, source, shards=2)
    if kind == "tfds":
        source, whole = "tiny_pets", tfds_folder[1][:4]
        options = {**options, "data_dir": tfds_folder[0]}
    if options.get("cache") == "file":
        options = {**options, "cache": tmp_path / "cache"}
    found = []
    for host in range(2):
        dataset = data.images(source, whole.shape[1:3], 2, **options)
        part = values(distribute._AutoShardDataset(dataset.rebatch(1), 2, host, num_replicas=2))
        assert len(part) == len(whole) // 2
        found += [np.round((image + 1) * 127.5).astype("uint8").tobytes() for image in part]
    assert sorted(found) == sorted(image.tobytes() for image in whole)


# Packages


def test_missing_packages_name_the_extra(monkeypatch, folder):
    for module, source in (("sklearn.datasets", "digits"), ("tensorflow_datasets", "mnist"), ("PIL", folder)):
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(ImportError, match=r"pip install \"kdiff\["):
            data.images(source)


def test_missing_tensorflow_names_the_extra():
    code = "import sys; sys.modules['tensorflow'] = None; import kdiff.data"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={"KERAS_BACKEND": "jax"})
    if "No module named 'jax" in result.stderr:
        pytest.skip("the extra `jax` is not installed")
    assert 'pip install "kdiff[data]"' in result.stderr


def test_embedded_sets_are_listed():
    assert data.EMBEDDED == sources.EMBEDDED
    assert {"digits", "shapes"} <= set(data.EMBEDDED)


# Training


def test_fit_takes_it():
    model = keras.Sequential([keras.layers.Input((8, 8, 1)), keras.layers.Conv2D(1, 3, padding="same")])
    model.compile("sgd", "mse")
    dataset = data.images("digits", labels=True, augment=keras.layers.RandomTranslation(0.1, 0.1), split="train[:128]")
    model.fit(dataset.map(lambda batch: (batch["image"], batch["image"])), epochs=2, verbose=0)
