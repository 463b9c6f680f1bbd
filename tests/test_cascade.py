import keras
import numpy as np
import pytest

from kdiff import Cascade, DiffusionModel, Sampler, analytic, degradations, operators, schedules
from kdiff.blocks import Concat, Dense, LabelEmbedding, SinusoidalEmbedding, TransformerBlock
from kdiff.blocks.base import apply_layer, build_layer
from kdiff.blocks.conditions import given_to, inputs_of
from kdiff.cascade import stage_seed
from kdiff.encoders import Prompt
from kdiff.networks import DiT, UNet
from kdiff.schedules import Marginal
from kdiff.text import Bytes
from kdiff.times import LogSNR
from tests.helpers_gradients import perturb
from tests.test_encoders_prompt import t5
from tests.toys import draw_weights, images, numpy

pytestmark = pytest.mark.eager

NOISE = schedules.Cosine()
SMALL = operators.Downsample(2)
SOLVER = Sampler("dpm_solver_pp", "trailing", 24)


# --- the law: exact denoisers of Gaussian data

MEAN = np.array([0.4, -0.2, 0.1, 0.3]).reshape(2, 2, 1)
ROOT = np.random.default_rng(3).standard_normal((4, 4))
COVARIANCE = 0.2 * ROOT @ ROOT.T + 0.1 * np.eye(4)
LARGE = analytic.Gaussian(MEAN, COVARIANCE)
ROW = np.full((1, 4), 0.25)  # SMALL, as a matrix
ENLARGED = np.full((4, 4), 0.25)  # what a stage sees of the small picture that is noised after it is enlarged


class Exact(keras.layers.Layer):
    """E[x | x_t], of a picture whose level is known E[x | x_t, z], as a network with a `Concat`."""

    def __init__(self, low=None):
        super().__init__(autocast=False)
        self.low = low
        self.conditions = {} if low is None else {"low": low}
        self.condition_inputs = {} if low is None else inputs_of(low, "low")

    def build(self, shapes):
        if self.low is not None:
            build_layer(self.low, given_to(self.low, "low", shapes), None, image=shapes["image"])
        self.built = True

    def call(self, inputs, training=None):
        x = inputs["image"]
        log_snr = inputs["time"]
        m = Marginal(log_snr, *NOISE.scales(log_snr), log_snr)
        if self.low is None:
            mean, variance = float(MEAN.mean()), float((ROW @ COVARIANCE @ ROW.T)[0, 0])
            return analytic.Gaussian(np.full((1, 1, 1), mean), variance)(x, m)
        z = apply_layer(self.low, given_to(self.low, "low", inputs), None, training=training, image=x).map
        known, matrix = (z[:, :1, :1], ROW) if self.low.noise_first else (z, ENLARGED)
        return LARGE.restored(x, m, known, NOISE.at(inputs["low_level"]), matrix)


def exact(noise_first):
    options = {"prediction": "data", "time_label": LogSNR(1.0), "ema": None, "sampler": SOLVER}
    base = DiffusionModel(Exact(), NOISE, **options)
    base.build((None, 1, 1, 1))
    embedding = SinusoidalEmbedding(4)
    low = Concat("nearest", noise=NOISE, embedding=embedding, of=SMALL, noise_first=noise_first)
    large = DiffusionModel(Exact(low), NOISE, **options, codec="identity")
    base.codec = "identity"
    large.build((None, 2, 2, 1))
    return Cascade([base, large])


def covariances(level, noise_first):
    """(of x, of x and the small picture that its stage was given, before it was noised)."""
    m = NOISE.at(np.array([level], "float32"))
    alpha, sigma = float(numpy(m.alpha)[0]), float(numpy(m.sigma)[0])
    count = 1 if noise_first else 4  # observations of the small picture, each with noise of its own
    variance = (ROW @ COVARIANCE @ ROW.T)[0, 0]
    share = alpha**2 * variance / (alpha**2 * variance + sigma**2 / count)
    return COVARIANCE, share * (ROW @ COVARIANCE)[0]


@pytest.mark.parametrize(
    ("level", "noise_first", "truncated"),
    [(0.3, True, True), (0.0, True, False), (0.3, True, False), (0.5, False, False), (1.0, False, False)],
)
def test_the_cascade_has_the_joint_covariance_of_data(level, noise_first, truncated):
    cascade, count = exact(noise_first), 4000
    options = {"level": level, "truncated": truncated, "batch_size": count, "seed": 1}
    small, x = cascade.sample_stages(count, **options)
    whole, cross = covariances(level, noise_first)
    x, small = x.reshape(count, 4), small.reshape(count)
    deviation = np.sqrt(np.diag(COVARIANCE))
    scale = np.outer(deviation, deviation)
    np.testing.assert_allclose(x.mean(0), MEAN.reshape(4), atol=4 * deviation.max() / np.sqrt(count))
    error = np.abs(np.cov(x.T) - whole) / scale
    assert error.max() < 5 * np.sqrt(2 / count), error.max()
    if truncated:  # what is seen of it has noise: x_s / alpha
        variance = (ROW @ COVARIANCE @ ROW.T)[0, 0]
        m = NOISE.at(np.array([level], "float32"))
        noisy = variance + float((numpy(m.sigma) / numpy(m.alpha))[0]) ** 2
        assert abs(small.var() / noisy - 1) < 5 * np.sqrt(2 / count)
        cross = (ROW @ COVARIANCE)[0]  # with x_s / alpha, whose noise x does not know
    else:
        assert abs(small.var() / (ROW @ COVARIANCE @ ROW.T)[0, 0] - 1) < 5 * np.sqrt(2 / count)
    found = np.cov(x.T, small)[4, :4]
    assert np.abs(found - cross).max() < 5 * np.sqrt(2 / count) * deviation.max() * small.std()


# --- a cascade of networks


def labelled():
    return {"label": LabelEmbedding(3, dropout=0.1)}


def trained(**options):
    """Two small networks, of which the second makes its small pictures itself."""
    low = Concat(noise=schedules.Cosine(), of=SMALL, noise_first=True, level=0.2)
    base = DiffusionModel(UNet.residual(8, 1, 1, conditions=labelled()))
    large = DiffusionModel(UNet.residual(8, 1, 1, conditions={**labelled(), "low": low}), sampler="ddpm", **options)
    x = images(4, (8, 8, 1))
    data = {"image": numpy(SMALL(x)), "label": np.array([0, 1, 2, 0])}
    for model, batch in ((base, data), (large, {**data, "image": x})):
        model.compile("adam")
        model.fit(batch, batch_size=2, verbose=0)
        perturb(model.network)
        model.reset_ema()
    return base, large


@pytest.fixture(scope="module")
def cascade():
    return Cascade(trained())


@pytest.mark.once
def test_it_is_its_stages_one_after_the_other(cascade, tmp_path):
    base, large = cascade.stages
    options = {"label": [0, 2], "steps": [3, 2], "guidance": [2.0, None]}
    small, x = cascade.sample_stages(2, **options, seed=4, verbose=False)
    assert (small.shape, x.shape) == ((2, 4, 4, 1), (2, 8, 8, 1))
    np.testing.assert_array_equal(small, base.sample(2, label=[0, 2], steps=3, guidance=2.0, seed=4))
    given = {"low": small, "low_level": 0.2, "label": [0, 2], "steps": 2, "seed": stage_seed(4, 1)}
    assert np.abs(large.sample(2, **given) - x).max() > 1e-4  # with the noise that the layer always takes
    np.testing.assert_array_equal(cascade.sample(2, **options, seed=4), x)
    one = cascade.sample(1, **{**options, "label": 0}, seed=4)
    np.testing.assert_allclose(one, x[:1], atol=1e-5)  # sample 0 of a seed, in any batch
    same = cascade.sample(2, **{**options, "label": 0}, seed=[4, 4])
    np.testing.assert_allclose(same, np.repeat(x[:1], 2, axis=0), atol=1e-5)
    (again,) = cascade.sample_stages(2, **options, low=small, seed=4)
    np.testing.assert_array_equal(again, x)
    cascade.save(tmp_path / "cascade.keras")
    loaded = keras.saving.load_model(tmp_path / "cascade.keras")
    np.testing.assert_allclose(loaded.sample(2, **options, seed=4), x, atol=1e-4)
    assert loaded.stages[1].network.conditions["low"].of == SMALL


@pytest.mark.once
def test_the_noise_of_stages_is_independent():
    """With one seed for both it would be the same, number for number."""
    seeds = [stage_seed(7, i) for i in range(3)]
    assert seeds[0] == 7
    assert len(set(seeds)) == 3
    assert stage_seed([7, 8], 1) == [seeds[1], stage_seed(8, 1)]
    assert all(0 <= seed < 2**64 for seed in seeds)


@pytest.mark.once
def test_how_far_the_picture_before_is_followed_depends_on_the_level(cascade):
    def drawn(**options):
        return cascade.sample(2, label=1, steps=2, sampler="ddim", **options)

    assert np.abs(drawn(level=0.0) - drawn(level=1.0)).max() > 1e-3
    np.testing.assert_array_equal(drawn(), drawn(level=[0.2]))
    noisy, last = cascade.sample_stages(2, label=1, steps=4, level=0.5, truncated=True)
    base = cascade.stages[0]
    m = base.schedule.at(np.float32(0.5))
    np.testing.assert_allclose(noisy * float(numpy(m.alpha)), base.sample(2, label=1, steps=4, stop=0.5), atol=1e-5)
    assert np.isfinite(last).all()


@pytest.mark.once
def test_a_truncated_stage_is_told_the_level_of_another_schedule():
    """Of one signal-to-noise ratio, where the base stops: at a step of its table."""
    base, large = exact(noise_first=True).stages
    base.schedule = schedules.CosineBeta(200)
    cascade = Cascade([base, large])
    stop, noising = cascade._stop(1, 0.4, {"schedule": None})
    assert stop * 200 == pytest.approx(round(stop * 200), abs=1e-4)
    here, there = base.schedule.at(np.float32(stop)), NOISE.at(np.float32(noising.level))
    assert float(numpy(here.log_snr)) == pytest.approx(float(numpy(there.log_snr)), abs=1e-3)
    assert abs(noising.level - 0.4) < 0.01


@pytest.mark.once
def test_a_text_is_encoded_once_by_encoders_that_stages_share(tmp_path, monkeypatch):
    encoder = t5()
    prompts = [Prompt(encoder, Bytes(5), layer=layer, masked=True) for layer in (None, Dense(6))]
    low = Concat(noise=schedules.Cosine())
    networks = [DiT(8, 1, 2, TransformerBlock(2), conditions={"text": prompts[0]})]
    networks += [DiT(8, 1, 4, TransformerBlock(2), conditions={"words": prompts[1], "low": low})]
    base, large = (DiffusionModel(network, ema=None) for network in networks)
    base.build({"image": (None, 4, 4, 1), "text": (None, *prompts[0].row)})
    large.build({"image": (None, 8, 8, 1), "low": (None, 4, 4, 1), "text": (None, *prompts[1].row)})
    for network in networks:
        draw_weights(network)
    cascade = Cascade([base, large])
    rows = prompts[0].prepare(["red", "box"])
    calls = []
    monkeypatch.setattr(Prompt, "_rows", lambda self, texts: calls.append(texts) or rows[np.argsort(["red", "box"])])
    x = cascade.sample(2, text=["red", "box"], steps=2)
    assert len([texts for texts in calls if texts != [""]]) == 1  # the empty text stands for none
    prompts[1].lower = True  # makes other rows of the same text
    cascade.sample(2, text=["RED", "box"], steps=2)
    assert len([texts for texts in calls if texts != [""]]) == 3
    prompts[1].lower = False
    monkeypatch.undo()
    np.testing.assert_allclose(cascade.sample(2, text=rows, steps=2), x, atol=1e-5)
    cascade.save(tmp_path / "cascade.keras")
    loaded = keras.saving.load_model(tmp_path / "cascade.keras")
    texts = dict(loaded._prompts())
    assert texts[0, "text"].encoders[0] is texts[1, "words"].encoders[0]
    np.testing.assert_allclose(loaded.sample(2, text=["red", "box"], steps=2), x, atol=1e-4)
    assert sum(id(w) == id(texts[0, "text"].encoders[0].weights[0]) for w in loaded.weights) == 1
    assert len(loaded.weights) == len(cascade.weights)


@pytest.mark.once
def test_progress_is_shown(cascade, capsys):
    cascade.sample(1, label=1, steps=2, verbose=True)
    assert capsys.readouterr().out.count("2/2") >= 2


@pytest.mark.once
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"text": "red"}, r"no stage takes \['text'\]; the stages take \[\['label'\], \['label', 'low'\]\]"),
        ({"low_level": 0.1}, r"no stage takes \['low_level'\]"),
        ({"steps": [1, 2, 3]}, "`steps` must be one for all, or a list of 2, one for each stage; received 3"),
        ({"level": [0.1, 0.2]}, "`level` must be one for all, or a list of 1"),
        ({"level": 2.0}, r"`level` must be a number in \[0.0?, 1.0?\]|`level` must be a number in \[0, 1\]"),
        ({"sampler": ["ddim", "best"]}, "stage 1: Unknown Solver 'best'"),
        ({"label": 5}, "stage 0: .*Labels must be"),
        ({"low": np.zeros((2, 4, 4, 1)), "truncated": True}, "which `low` replaces"),
    ],
)
def test_what_it_refuses(cascade, options, message):
    with pytest.raises(ValueError, match=message):
        cascade.sample(2, **{"label": 1, "steps": 2, **options})


@pytest.mark.once
def test_whole_numbers_are_pictures_of_a_file(cascade):
    low = np.random.default_rng(0).integers(0, 256, (2, *cascade.stages[0].example)).astype("uint8")
    given = {"label": 1, "steps": 2, "level": 0.0}
    made = cascade.sample(2, low=low, **given)
    np.testing.assert_allclose(made, cascade.sample(2, low=low / 127.5 - 1, **given), atol=1e-5)
    assert np.abs(made - cascade.sample(2, low=255 - low, **given)).max() > 1e-3  # which the stage does look at
    for bad in (low.astype("float32"), low > 4):
        with pytest.raises(ValueError, match="`low`"):
            cascade.sample(2, low=bad, **given)
    stage, name = cascade.stages[1], cascade.lows[1]
    with pytest.raises(ValueError, match=r"Concat.*0 to 255"):
        stage.sample(2, label=1, steps=2, **{name: 255.0 * np.ones_like(low) * np.eye(low.shape[1])[..., None]})


@pytest.mark.once
def test_what_is_no_cascade(cascade):
    base, large = cascade.stages
    with pytest.raises(TypeError, match="must be one or more DiffusionModels"):
        Cascade([])
    with pytest.raises(ValueError, match=r"stage 1 must have one condition that is a blocks.Concat.*received: \[\]"):
        Cascade([large, base])
    with pytest.raises(ValueError, match=r"takes pictures \(4, 4, 1\) as 'low', but stage 1 makes \(8, 8, 1\)"):
        Cascade([base, large, large])
    shared = labelled()
    low = Concat(noise=schedules.Cosine(), of=SMALL)
    two = [DiffusionModel(UNet.residual(8, 1, 1, conditions={**shared, **more})) for more in ({}, {"low": low})]
    for model, size in zip(two, (4, 8), strict=True):
        model.build({"image": (None, size, size, 1), "label": (None,)})
    with pytest.raises(ValueError, match="stages 0 and 1 share a layer"):
        Cascade(two)
    with pytest.raises(NotImplementedError, match="evaluate each stage"):
        cascade.evaluate(images(2))
    with pytest.raises(ValueError, match="`low` needs a stage after the first"):
        Cascade([base]).sample(1, label=0, low=np.zeros((1, 2, 2, 1)))


# --- the small picture of the batch


@pytest.mark.once
def test_fit_makes_the_small_picture():
    """The loss is that of the small picture given, and it may still be given."""

    def model():
        low = Concat("bicubic", of=SMALL)
        made = DiffusionModel(UNet.residual(8, 1, 1, conditions={"low": low}), seed=3)
        made.compile("sgd")
        return made

    x = images(4, (8, 8, 1))
    first, second = model(), model()
    first.build((None, 8, 8, 1))
    assert first.shapes["low"] == (None, 4, 4, 1)
    perturb(first.network)
    losses = [first.evaluate(x, verbose=0), first.evaluate({"image": x, "low": numpy(SMALL(x))}, verbose=0)]
    other = first.evaluate({"image": x, "low": -numpy(SMALL(x))}, verbose=0)
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)
    assert abs(other - losses[0]) > 1e-4
    assert np.isfinite(second.fit(x, batch_size=2, verbose=0).history["loss"]).all()
    with pytest.raises(ValueError, match=r"missing: \['low'\]"):
        second.sample(1)
    with pytest.raises(ValueError, match="whose shape must be known"):
        model().build((None, None, None, 1))
    with pytest.raises(TypeError, match=r"of\(x, key\)"):
        Concat(of=4)


def test_degradations_are_learned_from():
    of = degradations.Degradations([degradations.RandomBlur(probability=1.0), SMALL, degradations.RandomNoise(0.2)])
    model = DiffusionModel(UNet.residual(8, 1, 1, conditions={"low": Concat(of=of)}))
    model.compile("adam")
    x = images(4, (8, 8, 1))
    assert np.isfinite(model.fit(x, batch_size=2, verbose=0).history["loss"]).all()
    assert model.evaluate(x, verbose=0) == model.evaluate(x, verbose=0)
    assert model.sample(1, low=numpy(SMALL(x))[0], steps=1).shape == (1, 8, 8, 1)
