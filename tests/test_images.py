import keras
import numpy as np
import pytest

from kdiff import images


@pytest.fixture
def noise():
    return np.random.default_rng(0).uniform(-2, 2, (5, 6, 4, 3)).astype("float32")


def test_to_uint8_maps_the_ends_and_the_middle():
    assert images.to_uint8(np.array([-3.0, -1.0, 0.0, 1.0, 3.0])).tolist() == [0, 0, 128, 255, 255]
    assert images.to_uint8(keras.ops.ones((2, 2))).tolist() == [[255, 255], [255, 255]]
    assert images.to_uint8(np.array([7], "uint8")).tolist() == [7]


def test_grid_puts_each_image_in_its_cell(noise):
    picture = images.grid(noise, columns=2, padding=3, scale=2)
    assert picture.dtype == np.uint8
    assert picture.shape == (3 * (12 + 3) + 3, 2 * (8 + 3) + 3, 3)
    second_row_first_column = picture[3 + 15 : 15 + 15 : 2, 3:11:2]
    np.testing.assert_array_equal(second_row_first_column, images.to_uint8(noise[2]))
    assert (picture[:3] == 255).all()
    assert (picture[33:, 14:] == 255).all()  # the sixth cell has no image


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_grid_enlarges_tiny_images_and_is_about_square(channels):
    picture = images.grid(np.zeros((9, 8, 8, channels)), padding=0)
    assert picture.shape == (192, 192, channels)


@pytest.mark.parametrize("shape", [(8, 8, 3), (0, 8, 8, 3), (2, 8, 8, 2), (2, 3, 8, 8)])
def test_grid_refuses_other_shapes(shape):
    with pytest.raises(ValueError, match="count, height, width, channels"):
        images.grid(np.zeros(shape))


@pytest.mark.parametrize("options", [{"columns": 0}, {"padding": -1}, {"scale": 1.5}])
def test_grid_refuses_bad_options(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        images.grid(np.zeros((2, 8, 8, 1)), **options)


def test_nan_is_an_error_not_a_colour():
    with pytest.raises(ValueError, match="NaN"):
        images.grid(np.full((1, 4, 4, 1), np.nan))


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_png_is_lossless(tmp_path, channels):
    pytest.importorskip("PIL")
    batch = np.random.default_rng(0).uniform(-1, 1, (4, 5, 6, channels))
    path = images.save_png(tmp_path / "new" / "grid.png", batch, columns=4)
    np.testing.assert_array_equal(images.read_picture(path), images.grid(batch, columns=4))
    images.save_png(path, images.grid(batch))
    np.testing.assert_array_equal(images.read_picture(path), images.grid(batch))


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_gif_has_every_frame_and_its_durations(tmp_path, channels):
    pil = pytest.importorskip("PIL.Image")
    frames = [np.full((2, 8, 8, channels), value) for value in (-1.0, 0.0, 1.0)]
    path = images.save_gif(tmp_path / "new" / "a.gif", iter(frames), columns=1, fps=10, hold=1)
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
        images.save_gif(tmp_path / "a.gif", [])
    with pytest.raises(ValueError, match="fps"):
        images.save_gif(tmp_path / "a.gif", frames, fps=0)
    with pytest.raises(ValueError, match="hold"):
        images.save_gif(tmp_path / "a.gif", frames, hold=-1)


@pytest.mark.parametrize("losses", [{"loss": [3.0, 2.0], "val_loss": [2.5, 2.0], "lr": [1, 1]}, {"loss": [-1.0]}])
def test_loss_plot(tmp_path, losses):
    pytest.importorskip("matplotlib")
    history = keras.callbacks.History()
    history.history = losses
    for given in (losses, history):
        path = images.loss_plot(tmp_path / "new" / "loss.png", given)
        assert images.read_picture(path).std() > 0


@pytest.mark.parametrize("history", [{}, {"lr": [1.0]}, {"loss": []}, [1.0]])
def test_loss_plot_refuses_what_holds_no_losses(tmp_path, history):
    with pytest.raises(ValueError, match="history"):
        images.loss_plot(tmp_path / "loss.png", history)


@pytest.mark.parametrize(("module", "write"), [("PIL", images.save_png), ("matplotlib.figure", images.loss_plot)])
def test_a_missing_package_is_named_with_its_extra(tmp_path, monkeypatch, module, write):
    monkeypatch.setitem(__import__("sys").modules, module, None)
    given = {"loss": [1.0]} if write is images.loss_plot else np.zeros((1, 8, 8, 1))
    with pytest.raises(ImportError, match=r"kdiff\[plot\]"):
        write(tmp_path / "a.png", given)
