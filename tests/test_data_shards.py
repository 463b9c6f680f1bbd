"""Folders of many images in a few files: nothing is lost, mixed anew in each pass, and named like a folder's."""

import numpy as np
import pytest

pytestmark = [pytest.mark.data, pytest.mark.once]
data = pytest.importorskip("kdiff.data", exc_type=ImportError)
Image = pytest.importorskip("PIL.Image")

COUNT = 60


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Sixty pictures of one colour each, which is their number, of three classes with captions; one is broken."""
    folder = tmp_path_factory.mktemp("many")
    for number in range(COUNT):
        inside = folder / "abc"[number % 3]
        inside.mkdir(exist_ok=True)
        Image.fromarray(np.full((5, 4, 3), number, "uint8")).save(inside / f"{number}.png")
        (inside / f"{number}.txt").write_text(f"number {number}")
    (folder / "b" / "broken.png").write_bytes(b"no picture")
    return folder


@pytest.fixture(scope="module")
def sharded(folder, tmp_path_factory):
    into = tmp_path_factory.mktemp("few") / "shards"
    with pytest.warns(UserWarning, match=r"(?s)1 cannot be read.*broken\.png"):
        assert data.write_shards(folder, into, labels=True, text=True, shards=4) == COUNT
    return into


def read(source, **options):
    """The number of each picture of a pass, its label and its caption."""
    options = {"batch_size": 1, "cache": False, "labels": True, "text": True, **options}
    found = []
    for batch in data.images(source, 4, **options).as_numpy_iterator():
        number = int(np.round((batch["image"][0, 0, 0, 0] + 1) * 127.5))
        found.append((number, int(batch["label"][0]), batch["text"][0].decode()))
    return found


def test_every_picture_with_its_label_and_caption(folder, sharded):
    with pytest.warns(UserWarning, match="broken"):
        of_folder = read(folder)
    assert sorted(read(sharded)) == sorted(of_folder) == [(n, n % 3, f"number {n}") for n in range(COUNT)]
    dataset = data.images(sharded, 4, 8, labels=True, cache=False)
    assert dataset.class_names == ["a", "b", "c"]
    assert int(dataset.cardinality()) == COUNT // 8


def test_every_pass_has_another_order_that_the_seed_says(sharded):
    """And each file has some of each class."""
    two = [read(sharded, repeat=2, seed=seed) for seed in (1, 1, 2)]
    assert two[0] == two[1]
    assert two[0] != two[2]
    assert two[0][:COUNT] != two[0][COUNT:]
    one_file = read(sharded, split="train[:1]")
    assert 5 < len(one_file) < 30
    assert {label for _, label, _ in one_file} == {0, 1, 2}
    rest = read(sharded, split="train[1:]")
    assert sorted(one_file + rest) == sorted(two[0][:COUNT])


def test_files_come_in_another_order_too(sharded, monkeypatch):
    """Where the shuffle holds but two pictures, as it does of a set of millions."""
    monkeypatch.setattr(data.pipeline, "UNCACHED_SHUFFLE", 1)
    monkeypatch.setattr(data.shards, "_AT_ONCE", 1)
    passes = np.array([number for number, _, _ in read(sharded, repeat=6)]).reshape(6, COUNT)
    assert len({tuple(one) for one in passes}) > 1
    assert all(sorted(one) == list(range(COUNT)) for one in passes)


def test_what_is_not_there(folder, tmp_path):
    plain = tmp_path / "plain"
    with pytest.warns(UserWarning, match="broken"):
        data.write_shards(folder, plain, shards=2)
    with pytest.raises(ValueError, match="labels"):
        data.images(plain, 4, labels=True)
    with pytest.raises(ValueError, match="text"):
        data.images(plain, 4, text=True)
    with pytest.raises(ValueError, match="no such folder"):
        data.write_shards(tmp_path / "nowhere", plain)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no image files"):
        data.write_shards(tmp_path / "empty", tmp_path / "shards")
    assert not (tmp_path / "shards").exists()
    loose = tmp_path / "loose"
    loose.mkdir()
    Image.fromarray(np.zeros((3, 3, 3), "uint8")).save(loose / "one.png")
    with pytest.raises(ValueError, match="outside of any"):
        data.write_shards(loose, tmp_path / "shards", labels=True)
    with pytest.raises(ValueError, match="missing"):
        data.write_shards(loose, tmp_path / "shards", text=True)
