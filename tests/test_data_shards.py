"""Folders of many images in a few files: nothing is lost, mixed anew in each pass, and named like a folder's."""

import numpy as np
import pytest

pytestmark = [pytest.mark.data, pytest.mark.once]
data = pytest.importorskip("kdiff.data", exc_type=ImportError)
Image = pytest.importorskip("PIL.Image")

from kdiff import writing  # noqa: E402

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
    """The number of each picture of a pass, and its label and its caption, where it has them."""
    options = {"batch_size": 1, "cache": False, "labels": True, "text": True, **options}
    found = []
    for batch in data.images(source, 4, **options).as_numpy_iterator():
        batch = batch if isinstance(batch, dict) else {"image": batch}
        number = int(np.round((batch["image"][0, 0, 0, 0] + 1) * 127.5))
        others = [int(batch["label"][0])] if "label" in batch else []
        found.append((number, *others, *([batch["text"][0].decode()] if "text" in batch else [])))
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
    with pytest.raises(ValueError, match="must be a folder"):
        data.write_shards(folder, plain / "shards.json")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no image files"):
        data.write_shards(tmp_path / "empty", tmp_path / "shards")
    assert not (tmp_path / "shards").exists()


def pictures(folder, *names):
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((5, 4, 3), number, "uint8")).save(folder / name)
    return folder


def test_classes_are_numbered_as_those_of_the_folder(tmp_path):
    """Where some folders hold no images, and some none that can be read."""
    source = pictures(tmp_path / "source", "cat/0.png", "dog/old/1.png", "eel/2.png")
    (source / "attic" / "empty").mkdir(parents=True)
    (source / "books").mkdir()
    (source / "books" / "notes.txt").write_text("no picture")
    (source / "cow").mkdir()
    (source / "cow" / "broken.png").write_bytes(b"no picture")
    with pytest.warns(UserWarning, match="broken"):
        data.write_shards(source, tmp_path / "shards", labels=True, shards=2)
    with pytest.warns(UserWarning, match="broken"):  # of the folder
        folder, shards = (data.images(one, 4, 1, labels=True, cache=False) for one in (source, tmp_path / "shards"))
    assert shards.class_names == folder.class_names == ["cat", "cow", "dog", "eel"]
    with pytest.warns(UserWarning, match="broken"):
        of_folder = read(source, text=False)
    assert sorted(read(tmp_path / "shards", text=False)) == sorted(of_folder) == [(0, 0), (1, 2), (2, 3)]


@pytest.mark.parametrize(
    ("options", "message"),
    [({"labels": True}, r"2 images are outside of any:\s.*x\.png"), ({"text": True}, r"2 are missing:\s.*x\.txt")],
)
def test_what_an_image_lacks_is_found_before_anything_is_written(tmp_path, monkeypatch, options, message):
    source = pictures(tmp_path / "source", *(f"a/{number}.png" for number in range(9)), "x.png", "y.png")
    for number in range(9):
        (source / "a" / f"{number}.txt").write_text("caption")
    monkeypatch.setattr(data.shards, "replacing", None)
    with pytest.raises(ValueError, match=rf"(?s){message}"):
        data.write_shards(source, tmp_path / "shards", **options)


def test_what_changes_in_the_midst_is_skipped(tmp_path, monkeypatch):
    """As captions are that are not UTF-8, which only reading shows."""
    source = pictures(tmp_path / "source", "a/0.png", "a/1.png", "a/2.png")
    (source / "a" / "0.txt").write_text("caption")
    (source / "a" / "1.txt").write_bytes(b"\xff")
    (source / "a" / "2.txt").write_text("caption")
    names = data.shards._checked_names

    def checked(*options):
        found = names(*options)
        pictures(source, "b/3.png", "4.png")
        for name in ("b/3.txt", "4.txt"):
            (source / name).write_text("caption")
        (source / "a" / "2.txt").unlink()
        return found

    monkeypatch.setattr(data.shards, "_checked_names", checked)
    with pytest.warns(UserWarning, match="4 cannot be read") as warned:
        assert data.write_shards(source, tmp_path / "shards", labels=True, text=True, shards=2) == 1
    for why in ("1.txt is not UTF-8", "No such file", "b/3.png: it is of no class", "4.png: it is of no class"):
        assert why in str(warned[0].message)


class Killed(BaseException):
    pass


@pytest.mark.parametrize("moves", range(4))
def test_a_kill_leaves_no_index_without_its_files(sharded, tmp_path, monkeypatch, moves):
    """Neither in a new folder nor in one that has shards of other images under the same names."""
    shards, old = tmp_path / "shards", pictures(tmp_path / "old", "0.png", "1.png")
    data.write_shards(old, shards, shards=3)
    source = pictures(tmp_path / "source", *(f"{number}.png" for number in range(20)))
    move, moved = writing._move, []

    def killed(new, path):
        if len(moved) == moves:
            raise Killed
        moved.append(path)
        move(new, path)

    monkeypatch.setattr(writing, "_move", killed)
    for folder in (shards, tmp_path / "new"):
        moved.clear()
        with pytest.raises(Killed):
            data.write_shards(source, folder, shards=3)
        assert not data.shards.is_sharded(folder)
    monkeypatch.undo()
    assert data.write_shards(source, shards, shards=3) == 20
    assert sorted(read(shards, labels=False, text=False)) == [(number,) for number in range(20)]
