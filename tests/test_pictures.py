import errno

import keras
import numpy as np
import pytest

from kdiff import pictures

pytestmark = pytest.mark.once


@pytest.fixture
def noise():
    return np.random.default_rng(0).uniform(-2, 2, (5, 6, 4, 3)).astype("float32")


def test_to_uint8_maps_the_ends_and_the_middle():
    assert pictures.to_uint8(np.array([-3.0, -1.0, 0.0, 1.0, 3.0])).tolist() == [0, 0, 128, 255, 255]
    assert pictures.to_uint8(keras.ops.ones((2, 2))).tolist() == [[255, 255], [255, 255]]
    assert pictures.to_uint8(np.array([7], "uint8")).tolist() == [7]
    assert pictures.to_uint8(np.array([0, 7, 255])).tolist() == [0, 7, 255]
    with pytest.raises(ValueError, match=r"whole numbers must be in 0\.\.255; received 7 to 256"):
        pictures.to_uint8(np.array([7, 256]))


def test_grid_puts_each_image_in_its_cell(noise):
    picture = pictures.grid(noise, columns=2, padding=3, scale=2)
    assert picture.dtype == np.uint8
    assert picture.shape == (3 * (12 + 3) + 3, 2 * (8 + 3) + 3, 3)
    second_row_first_column = picture[3 + 15 : 15 + 15 : 2, 3:11:2]
    np.testing.assert_array_equal(second_row_first_column, pictures.to_uint8(noise[2]))
    assert (picture[:3] == 255).all()
    assert (picture[33:, 14:] == 255).all()  # the sixth cell has no image


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_grid_enlarges_tiny_images_and_is_about_square(channels):
    picture = pictures.grid(np.zeros((9, 8, 8, channels)), padding=0)
    assert picture.shape == (192, 192, channels)


LONG = "a small red circle above a large blue square on a white background"


def captioned(batch, *captions, **options):
    pytest.importorskip("PIL")
    return pictures.grid(batch, captions=captions, **options)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_captions_stand_below_their_images(channels):
    batch = np.random.default_rng(0).uniform(-1, 1, (3, 16, 16, channels))
    picture = captioned(batch, "7", LONG, "", columns=2)
    assert picture.dtype == np.uint8
    enlarged = pictures.to_uint8(batch).repeat(8, 1).repeat(8, 2)  # to 128 pixels
    np.testing.assert_array_equal(picture[8:136, 8:136], enlarged[0])
    np.testing.assert_array_equal(picture[8:136, 144:272], enlarged[1])
    np.testing.assert_array_equal(picture[-8 - 6 - 128 : -8 - 6, 8:136], enlarged[2])  # 6 below an empty caption
    first, second = picture[138 : -8 - 6 - 128 - 2, 8:136], picture[138 : -8 - 6 - 128 - 2, 144:272]
    for text in (first, second):
        assert text[..., :3].min() < 64
        assert (text[..., 3:] == 255).all()  # opaque
    assert (first[20:] == 255).all()  # one line
    rows = (second[..., 0] < 128).any(1)
    assert np.count_nonzero(rows[1:] & ~rows[:-1]) >= 4  # lines, as high as the row needs
    other = captioned(batch, "8", LONG, "", columns=2)
    assert other.shape == picture.shape
    assert set(np.argwhere(other != picture)[:, 0]) <= set(range(137, 155))


def test_captions_begin_and_end_within_their_images():
    black = np.zeros((4, 32, 32, 1))
    picture = captioned(black, *[LONG] * 4, columns=4)
    for column in range(4):
        left = 8 + column * 136
        ink = np.flatnonzero((picture[138:, left - 8 : left + 136] < 128).any((0, 2)))
        assert ink.min() >= 8
        assert ink.max() < 136
        assert abs(ink.min() + ink.max() - 143) <= 4  # in the middle


@pytest.mark.parametrize(
    "caption",
    ["", " ", "größer", "日本語 🙂", "x\x00y\n\n\tz", "\ud800", "pneumonoultramicroscopic" * 9, np.str_("a"), 7],
)
def test_captions_of_any_kind(caption):
    assert captioned(np.zeros((1, 8, 8, 3)), caption).shape[1] == 144
    assert captioned(np.zeros((1, 8, 8, 3)), caption, scale=1, padding=0).shape[1] == 8


def test_captions_may_be_bytes():
    pictures = [captioned(np.zeros((1, 8, 8, 3)), caption) for caption in ("größer", "größer".encode(), b"\xff")]
    np.testing.assert_array_equal(*pictures[:2])


def test_words_are_wrapped_and_long_ones_cut():
    def lines(text):
        return pictures._lines(text, lambda line: len(line) <= 10)

    assert lines("a small  red circle\nabove") == ["a small", "red circle", "above"]
    assert lines("a fluorescent lamp") == ["a", "fluoresce…", "lamp"]
    assert lines(" ") == []
    assert pictures._lines("word", lambda line: False) == ["…"]


@pytest.mark.parametrize("captions", [["a"], ["a", "b", "c"], "ab", 3, np.zeros((2, 1)), []])
def test_another_number_of_captions_is_an_error(tmp_path, captions):
    batch = np.zeros((2, 8, 8, 1))
    for write in (
        lambda: pictures.grid(batch, captions=captions),
        lambda: pictures.save_png(tmp_path / "a.png", batch, captions=captions),
        lambda: pictures.save_gif(tmp_path / "a.gif", [batch], captions=captions),
    ):
        with pytest.raises(ValueError, match="one string for each of 2 images"):
            write()
    assert not list(tmp_path.iterdir())


def test_captions_in_files(tmp_path):
    pil = pytest.importorskip("PIL.Image")
    batch = np.random.default_rng(0).uniform(-1, 1, (3, 8, 8, 3))
    expected = captioned(batch, "a", "b", "c", columns=3)
    path = pictures.save_png(tmp_path / "a.png", batch, 3, captions=["a", "b", "c"])
    np.testing.assert_array_equal(pictures.read_picture(path), expected)
    path = pictures.save_gif(tmp_path / "a.gif", [batch, -batch], 3, captions=["a", "b", "c"])
    with pil.open(path) as animation:
        assert (animation.n_frames, animation.size) == (2, expected.shape[1::-1])
    for write, picture in ((pictures.save_png, expected), (pictures.save_gif, [expected])):
        with pytest.raises(ValueError, match="need a batch"):
            write(tmp_path / "b.png", picture, captions=["a", "b", "c"])


@pytest.mark.parametrize("shape", [(8, 8, 3), (0, 8, 8, 3), (2, 8, 8, 2), (2, 3, 8, 8)])
def test_grid_refuses_other_shapes(shape):
    with pytest.raises(ValueError, match="count, height, width, channels"):
        pictures.grid(np.zeros(shape))


@pytest.mark.parametrize("options", [{"columns": 0}, {"padding": -1}, {"scale": 1.5}])
def test_grid_refuses_bad_options(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        pictures.grid(np.zeros((2, 8, 8, 1)), **options)


def test_nan_is_an_error_not_a_colour():
    with pytest.raises(ValueError, match="NaN"):
        pictures.grid(np.full((1, 4, 4, 1), np.nan))


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_png_is_lossless(tmp_path, channels):
    pytest.importorskip("PIL")
    batch = np.random.default_rng(0).uniform(-1, 1, (4, 5, 6, channels))
    path = pictures.save_png(tmp_path / "new" / "grid.png", batch, columns=4)
    np.testing.assert_array_equal(pictures.read_picture(path), pictures.grid(batch, columns=4))
    pictures.save_png(path, pictures.grid(batch))
    np.testing.assert_array_equal(pictures.read_picture(path), pictures.grid(batch))


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_gif_has_every_frame_and_its_durations(tmp_path, channels):
    pil = pytest.importorskip("PIL.Image")
    frames = [np.full((2, 8, 8, channels), value) for value in (-1.0, 0.0, 1.0)]
    path = pictures.save_gif(tmp_path / "new" / "a.gif", iter(frames), columns=1, fps=10, hold=1)
    with pil.open(path) as animation:
        assert animation.n_frames == 3
        assert animation.info["loop"] == 0
        durations = []
        for frame in range(3):
            animation.seek(frame)
            durations.append(animation.info["duration"])
        assert durations == [100, 100, 1000]


def test_gif_refuses_bad_arguments(tmp_path):
    pytest.importorskip("PIL")
    frames = [np.zeros((1, 8, 8, 1))]
    with pytest.raises(ValueError, match="frames"):
        pictures.save_gif(tmp_path / "a.gif", [])
    with pytest.raises(ValueError, match="fps"):
        pictures.save_gif(tmp_path / "a.gif", frames, fps=0)
    with pytest.raises(ValueError, match="hold"):
        pictures.save_gif(tmp_path / "a.gif", frames, hold=-1)


@pytest.mark.parametrize("losses", [{"loss": [3.0, 2.0], "val_loss": [2.5, 2.0], "lr": [1, 1]}, {"loss": [-1.0]}])
def test_loss_plot(tmp_path, losses):
    pytest.importorskip("matplotlib")
    history = keras.callbacks.History()
    history.history = losses
    for given in (losses, history):
        path = pictures.loss_plot(tmp_path / "new" / "loss.png", given)
        assert pictures.read_picture(path).std() > 0


@pytest.mark.parametrize("history", [{}, {"lr": [1.0]}, {"loss": []}, [1.0]])
def test_loss_plot_refuses_what_holds_no_losses(tmp_path, history):
    with pytest.raises(ValueError, match="history"):
        pictures.loss_plot(tmp_path / "loss.png", history)


@pytest.mark.parametrize(("module", "write"), [("PIL", pictures.save_png), ("matplotlib.figure", pictures.loss_plot)])
def test_a_missing_package_is_named_with_its_extra(tmp_path, monkeypatch, module, write):
    monkeypatch.setitem(__import__("sys").modules, module, None)
    given = {"loss": [1.0]} if write is pictures.loss_plot else np.zeros((1, 8, 8, 1))
    with pytest.raises(ImportError, match=r"kdiff\[plot\]"):
        write(tmp_path / "a.png", given)


def test_captions_need_pillow(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "PIL", None)
    with pytest.raises(ImportError, match=r"kdiff\[plot\]"):
        pictures.grid(np.zeros((1, 8, 8, 1)), captions=["never seen before"])


@pytest.mark.parametrize("name", ["a.png", "a.gif", "loss.png"])
def test_a_full_disk_leaves_the_good_picture(tmp_path, monkeypatch, name):
    image, figure = pytest.importorskip("PIL.Image"), pytest.importorskip("matplotlib.figure")
    write = {
        "a.png": lambda path: pictures.save_png(path, np.zeros((1, 8, 8, 1))),
        "a.gif": lambda path: pictures.save_gif(path, [np.zeros((1, 8, 8, 1)), np.ones((1, 8, 8, 1))]),
        "loss.png": lambda path: pictures.loss_plot(path, {"loss": [1.0, 2.0]}),
    }[name]
    good = write(tmp_path / name).read_bytes()

    def full(self, path, *args, **options):
        with open(path, "wb") as file:
            file.write(b"GIF89a")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(image.Image, "save", full)
    monkeypatch.setattr(figure.Figure, "savefig", full)
    with pytest.raises(OSError, match="No space"):
        write(tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_bytes() == good


POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n"


def test_postscript_is_no_picture_whatever_its_name(tmp_path):
    pil = pytest.importorskip("PIL.Image")
    (tmp_path / "cat.jpg").write_bytes(POSTSCRIPT)
    with pil.open(tmp_path / "cat.jpg") as image:
        assert image.format == "EPS"  # for which Pillow would start Ghostscript
    with pytest.raises(OSError, match="cannot identify"):
        pictures.read_picture(tmp_path / "cat.jpg")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_pictures_have_a_limit(tmp_path, monkeypatch):
    pil = pytest.importorskip("PIL.Image")
    path = pictures.save_png(tmp_path / "a.png", np.zeros((5, 4, 1), "uint8"))
    monkeypatch.setattr(pil, "MAX_IMAGE_PIXELS", 19)
    with pytest.raises(
        ValueError, match=r"it has 4 x 5 pixels, more than the limit of 19.* PIL.Image.MAX_IMAGE_PIXELS"
    ):
        pictures.read_picture(path)
    for limit in (20, None):
        monkeypatch.setattr(pil, "MAX_IMAGE_PIXELS", limit)
        assert pictures.read_picture(path).shape == (5, 4, 1)
