import errno
import os
import time

import pytest

from kdiff.writing import replacing

pytestmark = pytest.mark.once


def test_the_file_takes_its_place_when_it_is_whole(tmp_path):
    path = tmp_path / "new" / "a.weights.h5"
    for text in ("first", "second"):
        with replacing(path) as new:
            new.write_text(text)
            assert new.name.endswith(".weights.h5")  # by which writers know a format
            assert new.name.startswith(".")
            assert not path.exists() or path.read_text() == "first"
        assert path.read_text() == text
        assert os.listdir(path.parent) == [path.name]
        path.chmod(0o640)
    assert path.stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("folder", [False, True])
def test_a_failure_leaves_what_was_there(tmp_path, folder):
    path = tmp_path / "a.txt"
    path.write_text("good")

    def write():
        with replacing(path) as new:
            if folder:
                new.mkdir()
            (new / "b.txt" if folder else new).write_text("ha")
            raise OSError(errno.ENOSPC, "no space left")

    with pytest.raises(OSError, match="space"):
        write()
    assert os.listdir(tmp_path) == ["a.txt"]
    assert path.read_text() == "good"


def test_links_lead_to_the_file(tmp_path):
    (tmp_path / "store").mkdir()
    (tmp_path / "a.txt").symlink_to(tmp_path / "store" / "0123")
    with replacing(tmp_path / "a.txt") as new:
        new.write_text("text")
        assert new.suffix == ".txt"
    assert (tmp_path / "a.txt").is_symlink()
    assert (tmp_path / "store" / "0123").read_text() == "text"


def test_a_folder_keeps_what_else_is_in_it(tmp_path):
    path = tmp_path / "folder"
    (path / "inner").mkdir(parents=True)
    for name in ("a", "inner/b", "inner/c"):
        (path / name).write_text("old")
    with replacing(path) as new:
        (new / "inner").mkdir(parents=True)
        (new / "a").write_text("new")
        (new / "inner" / "b").write_text("new")
    assert [(path / name).read_text() for name in ("a", "inner/b", "inner/c")] == ["new", "new", "old"]
    assert os.listdir(tmp_path) == ["folder"]


def test_a_device_is_written_to(tmp_path):
    with replacing(os.devnull) as new:
        assert str(new) == os.devnull


def test_what_a_killed_process_left_is_removed_by_the_next(tmp_path):
    """Of the same name, and after an hour: another process may be writing."""
    kept = {".partial-9-a.txt", ".partial-123-b.txt", ".partial-5-b-a.txt", ".partial-a.txt", "a.txt.old"}
    for name in (".partial-123-a.txt", ".partial-7-.partial-7-a.txt", *kept):
        (tmp_path / name).write_text("half")
    (tmp_path / ".partial-7-a.txt").mkdir()
    (tmp_path / ".partial-7-a.txt" / "inner").write_text("half")
    for name in set(os.listdir(tmp_path)) - {".partial-9-a.txt"}:
        os.utime(tmp_path / name, (time.time() - 4000,) * 2)
    with replacing(tmp_path / "a.txt") as new:
        new.write_text("text")
    assert set(os.listdir(tmp_path)) == {"a.txt", *kept}
