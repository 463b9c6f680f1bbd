"""The page on which models draw: its inputs, and what a client of it gets."""

from importlib.util import find_spec

import keras
import numpy as np
import pytest

import kdiff
from kdiff import objectives, pictures, students
from kdiff.blocks import Concat, LabelEmbedding, MLPEmbedding, OptionalCondition, SinusoidalEmbedding, TextEncoder
from kdiff.demo import drawing, load, page
from kdiff.demo.__main__ import main
from kdiff.demo.drawing import chosen_sampler, equations, frames
from kdiff.demo.inputs import edited, enlarged, fields, resized
from kdiff.demo.page import _options
from kdiff.guidance import AdaptiveProjected, ClassifierFree, Clip
from tests.helpers_taught import labelled
from tests.toys import draw_weights, images, tiny_network

pytest.importorskip("PIL", reason="the extra `plot` is not installed")
served = pytest.mark.skipif(find_spec("gradio") is None, reason="the extra `demo`, gradio, is not installed")


def conditional(**options):
    conditions = {"label": LabelEmbedding(4, dropout=0.1)}
    model = kdiff.DiffusionModel(kdiff.networks.UNet.basic(8, levels=2, conditions=conditions), ema=None, **options)
    model.build({"image": (None, 8, 8, 3), "label": (None,)})
    draw_weights(model.network, scale=0.05)
    return model


@pytest.fixture(scope="module")
def model():
    return conditional(sampler=kdiff.Sampler("ddim", steps=6))


@pytest.mark.once
def test_fields_are_made_of_the_conditions():
    conditions = {
        "label": LabelEmbedding(3, dropout=0.1),
        "sort": LabelEmbedding(2),
        "text": TextEncoder(kdiff.text.Bytes(12), 8, depth=1),
        "low": Concat("bicubic"),
        "age": OptionalCondition(MLPEmbedding(SinusoidalEmbedding(8), width=32)),
        "style": OptionalCondition(keras.layers.Dense(32)),
    }
    model = kdiff.DiffusionModel(kdiff.networks.UNet.transformer(8, levels=2, depth=1, conditions=conditions))
    shapes = {"label": (), "sort": (), "text": (12,), "low": (4, 4, 3), "age": (), "style": (3,)}
    model.build({"image": (None, 8, 8, 3), **{name: (None, *shape) for name, shape in shapes.items()}})
    kinds = {"label": "Dropdown", "sort": "Dropdown", "text": "Textbox", "low": "Image", "age": "Textbox"}
    with pytest.raises(ValueError, match="`label` has 3 labels, and these are 2 names"):
        fields(model, {"label": ["cat", "dog"]})
    found = {field.name: field for field in fields(model)}
    assert [name for name, field in found.items() if field.negative] == ["text"]
    assert {name: field.kind for name, field in found.items()} == {**kinds, "style": "Textbox"}
    assert found["label"].options["choices"] == [("none", "none"), ("0", 0), ("1", 1), ("2", 2)]
    assert found["sort"].options["choices"] == [("0", 0), ("1", 1)]
    named = fields(model, {"sort": ["cat", "dog"]})
    assert named[1].options["choices"] == [("cat", 0), ("dog", 1)]
    assert [found["label"].value(2), found["label"].value("none"), found["text"].value("")] == [2, None, None]
    np.testing.assert_array_equal(found["style"].value("1, 2,-0.5"), [1, 2, -0.5])
    with pytest.raises(ValueError, match="`style` must be so many numbers, commas between: 3; received: '1, 2'"):
        found["style"].value("1, 2")
    low = found["low"].value(np.full((16, 16, 3), 255, "uint8"))
    np.testing.assert_array_equal(low, np.ones((4, 4, 3)))
    given = {
        "label": 1,
        "sort": 0,
        "text": found["text"].value("ab"),
        "low": low,
        "age": found["age"].value("3.5"),
        "style": None,
    }
    assert model.sample(2, steps=1, **given).shape == (2, 8, 8, 3)


@pytest.mark.once
def test_a_scale_that_was_drawn_in_training_has_a_field():
    teacher = labelled(True)
    (_, field) = fields(students.student(teacher, objectives.LCM(teacher, 10, (2.0, 5.0))))
    assert (field.name, field.options["value"], field.optional) == ("timestep_cond", 2.0, True)


@pytest.mark.once
def test_a_condition_without_an_input_is_refused():
    conditions = {"tokens": keras.layers.Dense(8)}
    model = kdiff.DiffusionModel(kdiff.networks.UNet.transformer(8, levels=2, depth=1, conditions=conditions))
    model.build({"image": (None, 8, 8, 3), "tokens": (None, 5, 8)})
    with pytest.raises(ValueError, match=r"no input for the condition 'tokens', of the shape \(5, 8\)"):
        fields(model)


@pytest.mark.once
def test_a_map_that_is_no_picture_is_refused():
    model = kdiff.DiffusionModel(kdiff.networks.UNet.residual(8, levels=2, depth=1, conditions={"flow": Concat()}))
    model.build({"image": (None, 8, 8, 3), "flow": (None, 8, 8, 2)})
    with pytest.raises(ValueError, match=r"no input for the condition 'flow', of the shape \(8, 8, 2\)"):
        fields(model)


@pytest.mark.once
@pytest.mark.parametrize("channels", [1, 3])
def test_a_sample_in_the_editor_comes_back_and_what_is_painted_is_the_mask(channels):
    picture = pictures.to_uint8(images(1, (8, 8, channels))[0])
    large = enlarged(picture)
    assert large.shape == (320, 320, 3)
    np.testing.assert_array_equal(resized(large, picture.shape), picture)
    layer = np.zeros((320, 320, 4), "uint8")
    layer[45:75, 85:115, 3] = 255  # within the pixel (1, 2)
    again, mask = edited({"background": large, "layers": [layer]}, picture.shape)
    np.testing.assert_array_equal(again, picture)
    assert np.argwhere(mask).tolist() == [[1, 2]]
    assert edited({"background": large, "layers": [0 * layer]}, picture.shape)[1] is None
    assert edited(None, picture.shape) == edited({"background": None, "layers": []}, picture.shape) == (None, None)


@pytest.mark.once
def test_a_picture_is_cut_in_its_middle():
    picture = np.zeros((4, 12, 3), "uint8")
    picture[:, 4:8] = 200
    np.testing.assert_array_equal(resized(picture, (2, 2, 1)), np.full((2, 2, 1), 200))
    assert resized(picture, (None, None, 4)).shape == (4, 12, 4)


@pytest.mark.once
def test_a_chosen_solver_and_rule_take_the_place_of_the_models_own(model):
    assert chosen_sampler(model) == model.sampler
    heun = chosen_sampler(model, "heun", "classifier_free", 2.0)
    assert heun == kdiff.Sampler("heun", steps=6, guidance=ClassifierFree(2.0))
    own = kdiff.Sampler("ddim", "leading", 6, [ClassifierFree(3.0, rescale=0.7), Clip()])
    other = conditional(sampler=own)
    assert chosen_sampler(other, "own", "classifier_free", 5.0).guidance == (ClassifierFree(5.0, rescale=0.7), Clip())
    wanted = own.replaced(solver="euler", guidance=[AdaptiveProjected(4.0), Clip()])
    assert chosen_sampler(other, "euler", "adaptive_projected", 4.0) == wanted


@pytest.mark.once
def test_a_negative_text_is_that_of_guidance():
    conditions = {"text": TextEncoder(kdiff.text.Bytes(12), 8, depth=1, pooled=True, dropout=0.1)}
    model = kdiff.DiffusionModel(kdiff.networks.UNet.basic(8, levels=2, conditions=conditions), ema=None)
    model.build({"image": (None, 8, 8, 3), "text": (None, 12)})
    draw_weights(model.network, scale=0.05)
    given = {"text": "cat", "sampler": "euler", "steps": 2, "rule": "classifier_free", "guidance": 3.0}
    given |= {"num_samples": 2, "seed": 4, "image": None, "strength": 0.5}
    without, negative = (_options(model, fields(model), {**given, "negative_text": text}) for text in ("", "dog"))
    assert without["sampler"].guidance == (ClassifierFree(3.0),)
    assert negative["sampler"].guidance == (ClassifierFree(3.0, negative={"text": "dog"}),)
    ends = [list(frames(model, **options))[-1].estimate for options in (without, negative)]
    assert (ends[0] != ends[1]).any()


@pytest.mark.once
def test_equations_are_those_of_every_object_of_the_run(model):
    text = equations(model, chosen_sampler(model, "heun", "adaptive_projected", 4.0))
    for shown in ("Cosine()", "Velocity()", "Heun(", "AdaptiveProjected(scale=4.0)", "v = alpha noise - sigma x"):
        assert shown in text
    assert "min(1, radius / |d|)" in text
    assert text.count("<section>") == 4


def test_frames_end_at_the_samples(model, monkeypatch):
    shown = list(frames(model, 3, label=1, seed=5))
    assert [frame.words.split("**")[1] for frame in shown] == [f"Step {i} of 6" for i in range(1, 7)]
    samples = model.sample(3, label=1, seed=5)
    np.testing.assert_array_equal(shown[-1].estimate, pictures.grid(samples))
    np.testing.assert_array_equal(shown[-1].first, pictures.to_uint8(samples[0]))
    assert len({frame.film.shape for frame in shown}) == 1
    assert len({frame.noisy.tobytes() for frame in shown}) == 6
    monkeypatch.setattr(drawing, "SHOWN", 3)  # of a long run not every step
    few = list(frames(model, 3, label=1, seed=5))
    assert [frame.words.split("**")[1] for frame in few] == [f"Step {i} of 6" for i in (1, 4, 6)]
    np.testing.assert_array_equal(few[-1].film, shown[-1].film)


@pytest.mark.once
def test_noisy_pictures_are_of_unit_size_on_any_schedule():
    """ "variance_exploding" begins with a sigma of 80, of which no more than 1 would be left where x is clipped."""
    model = kdiff.DiffusionModel(tiny_network(), "variance_exploding", "karras", ema=None)
    model.build((None, 8, 8, 1))
    first = next(frames(model, 1, steps=6))
    assert first.noisy.std() > 60  # of 255


@pytest.mark.once
def test_models_of_one_file_name_are_shown_apart(model, tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr("kdiff.demo.__main__.launch", lambda models, *_, **options: shown.extend(models))
    paths = [tmp_path / folder / "model.keras" for folder in "ab"] + [tmp_path / "other.keras"]
    for path in paths:
        path.parent.mkdir(exist_ok=True)
        model.save(path)
    main(list(map(str, paths)))
    assert shown == [str(paths[0]), str(paths[1]), "other"]


@pytest.mark.once
def test_what_cannot_be_shown_is_a_sentence(tmp_path, capsys):
    with pytest.raises(ValueError, match="no such file or folder"):
        load(tmp_path / "nothing.keras")
    (tmp_path / "broken.keras").write_bytes(b"no model")
    with pytest.raises(ValueError, match=r"broken\.keras: this model cannot be loaded"):
        load(tmp_path / "broken.keras")
    keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)]).save(tmp_path / "dense.keras")
    with pytest.raises(ValueError, match="shows a DiffusionModel; this is of the type Sequential"):
        load(tmp_path / "dense.keras")
    points = kdiff.DiffusionModel(kdiff.networks.MLP(), codec="identity")
    points.build((None, 2))
    points.save(tmp_path / "points.keras")
    with pytest.raises(ValueError, match=r"models of pictures, .* this has: \(2,\)"):
        load(tmp_path / "points.keras")
    with pytest.raises(SystemExit):
        main([str(tmp_path / "nothing.keras")])
    assert "error: " in (printed := capsys.readouterr().err)
    assert "Traceback" not in printed


@pytest.fixture(scope="module")
def client(model, tmp_path_factory):
    """Of the page with a model that was saved and loaded, and one without conditions."""
    from gradio_client import Client

    path = tmp_path_factory.mktemp("models") / "labels.keras"
    model.save(path)
    plain = kdiff.DiffusionModel(tiny_network((8, 8, 1)))
    plain.build((None, 8, 8, 1))
    blocks = page({"labels": load(path), "plain": plain})
    assert not blocks.analytics_enabled
    _, url, _ = blocks.launch(server_name="127.0.0.1", prevent_thread_lock=True, quiet=True, show_error=True)
    assert url.startswith("http://127.0.0.1:")
    yield Client(url, verbose=False, analytics_enabled=False)
    blocks.close()


def drawn(client, api_name="/draw", **inputs):
    """The pictures of every frame."""
    job = client.submit(api_name=api_name, **inputs)
    job.result(timeout=300)
    return [pictures.read_picture(output[0]) for output in job.outputs()]


@served
def test_a_seed_gives_the_pixels_of_sample(model, client):
    shown = drawn(client, label=3, seed=7, num_samples=2, guidance=2.0, sampler="heun", steps=5)
    assert len({frame.tobytes() for frame in shown}) == len(shown) == 5
    sampler = kdiff.Sampler("heun", steps=5)
    np.testing.assert_array_equal(
        shown[-1], pictures.grid(model.sample(2, label=3, seed=7, guidance=2.0, sampler=sampler))
    )
    np.testing.assert_array_equal(
        drawn(client, label="none", num_samples=1)[-1], pictures.grid(model.sample(1, label=None), padding=0)
    )


@served
def test_a_picture_is_changed_or_painted_anew(model, client, tmp_path):
    from gradio_client import handle_file

    image = pictures.to_uint8(images(1, (8, 8, 3)))
    layer = np.zeros((320, 320, 4), "uint8")
    layer[160:, :, 3] = 255
    files = [
        pictures.save_png(tmp_path / f"{name}.png", one)
        for name, one in (("image", enlarged(image[0])), ("painted", layer), ("clear", 0 * layer))
    ]
    background, painted, clear = map(handle_file, files)
    given = {"label": 2, "num_samples": 1}
    value = {"background": background, "layers": [clear], "composite": None}
    changed = drawn(client, image=value, strength=0.5, **given)[-1]
    expected = model.sample(1, label=2, image=image, strength=0.5)
    np.testing.assert_array_equal(changed, pictures.grid(expected, padding=0))
    value = {"background": background, "layers": [painted], "composite": None}
    mask = np.repeat([0.0, 1.0], 4)[:, None] * np.ones((8, 8))
    expected = model.sample(1, label=2, image=image, strength=1.0, known=image, mask=mask)
    anew = drawn(client, image=value, strength=1.0, **given)[-1]
    np.testing.assert_array_equal(anew, pictures.grid(expected, padding=0))
    np.testing.assert_array_equal(anew[:32:8, ::8], image[0, :4])


@served
@pytest.mark.once
@pytest.mark.parametrize(
    ("inputs", "sentence"),
    [
        ({"seed": -1}, "`seed` must be a whole number of at least 0; received: -1"),
        ({"seed": None}, r"a number for each of \['seed'\]"),
        ({"label": 9}, "9 is not in the list of choices"),
    ],
)
def test_bad_input_is_a_sentence(client, inputs, sentence):
    with pytest.raises(Exception, match=sentence) as caught:
        drawn(client, **inputs)
    assert "Traceback" not in str(caught.value)


@served
@pytest.mark.once
def test_every_model_has_a_tab(client):
    assert drawn(client, "/draw_1", steps=2, num_samples=1)[-1].shape == (64, 64, 1)
