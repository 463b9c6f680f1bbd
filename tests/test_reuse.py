"""Deep features, and keys and values of a context, used again in later steps of a run."""

import numpy as np
import pytest
from keras import ops

import kdiff
from kdiff import Sampler, guidance, networks, operators, solvers
from kdiff.blocks import LabelEmbedding, OptionalCondition
from kdiff.denoisers import Denoiser, Estimate
from kdiff.guidance import ClassifierFree
from kdiff.interop.solvers import DiffusersPNDM, EvenSteps
from kdiff.reuse import Reuse, Store, kept_in, nothing_kept
from tests.toys import draw_weights, mostly_once, numpy

TOKENS = np.random.default_rng(0).normal(size=(2, 3, 8)).astype("float32")
NETWORKS = {
    "unet": lambda: networks.UNet.transformer(8, levels=2, depth=1, heads=2, conditions={"text": OptionalCondition()}),
    "dit": lambda: networks.DiT(16, 4, 2, networks.adaptive_block(2)),
    "mmdit": lambda: networks.MMDiT(16, 4, 2, networks.adaptive_block(2), conditions={"text": OptionalCondition()}),
    "uvit": lambda: networks.UViT(16, 5, 2),
}
TOLD = {"unet", "mmdit"}
ONES = np.ones((8, 8, 1), "float32")


def made(name):
    model = kdiff.DiffusionModel(NETWORKS[name](), ema=None)
    model.build({"image": (None, 8, 8, 1), **({"text": (None, 3, 8)} if name in TOLD else {})})
    draw_weights(model.network)
    return model, {"text": TOKENS} if name in TOLD else {}


@pytest.mark.parametrize("name", mostly_once(list(NETWORKS)))
def test_samples_are_the_same_if_all_is_computed_in_every_step(name):
    """And with every second step they are near, guided or not; a run does not depend on the one before."""
    model, text = made(name)
    options = {"guidance": 3.0} if text else {}
    plain = model.sample(2, steps=4, **options, **text)
    for every, tolerance in ((1, 1e-5), (2, None), (1, 1e-5)):
        again = model.sample(2, sampler=Sampler("ddim", steps=4, reuse=Reuse(every)), **options, **text)
        if tolerance:
            np.testing.assert_allclose(again, plain, atol=tolerance)
        else:
            assert np.abs(again - plain).max() > 1e-4


def test_where_other_runs_leave_calls_out():
    """Outside of the interval of guidance and in the last step: what layers keep there can leave a compiled step."""
    network = networks.DiT(16, 2, 2, networks.adaptive_block(2), conditions={"label": LabelEmbedding(3, dropout=0.1)})
    model = kdiff.DiffusionModel(network, ema=None)
    model.build({"image": (None, 4, 4, 1), "label": (None,)})
    draw_weights(network)
    options = {"solver": "dpm_solver_pp_2s_ancestral", "steps": 2, "guidance": ClassifierFree(3.0, highest=1.2)}
    plain, same = (model.sample(2, sampler=Sampler(**options, reuse=reuse), label=1) for reuse in (None, Reuse(1)))
    np.testing.assert_allclose(same, plain, atol=3e-5)


class Faded(guidance.Guidance):
    """Tokens that change from step to step."""

    def guide(self, denoise, x, m, here):
        faded = denoise.given._replace(conditions={"text": m.t * denoise.conditions["text"]})
        estimate = Denoiser(denoise.answer, faded, denoise.nulls)(x, m)
        return estimate.guided(estimate.x_hat)


def test_guidance_that_changes_tokens():
    """Their keys and values are of the same step, if all is computed in every step."""
    model, text = made("unet")
    options = {"solver": "ddim", "steps": 3, "guidance": [Faded(), ClassifierFree(3.0)]}
    plain, same = (model.sample(2, sampler=Sampler(**options, reuse=reuse), **text) for reuse in (None, Reuse(1)))
    np.testing.assert_allclose(same, plain, atol=1e-5)


def test_what_is_computed_in_each_step(monkeypatch):
    """The U-Net of 2 levels: in the steps between, the first block down and the last two up, and no key or value.

    Those of a text are the same in all steps, but a guidance may change it.
    """
    model, _ = made("unet")
    network, ran = model.network, []
    run = network._run
    network._run = lambda layer, *rest: (ran.append(layer.name), run(layer, *rest))[1]
    once, parts = Store.once, []

    def counted(self, part, owner, x, make):
        return once(self, part, owner, x, lambda: (parts.append(part), make())[1])

    monkeypatch.setattr(Store, "once", counted)
    denoise = model.denoiser(text=ops.convert_to_tensor(TOKENS))
    kept, keys = [], []
    for step in Sampler("ddim", steps=3, reuse=Reuse(2)).steps_of(denoise, model.schedule, (2, 8, 8, 1)):
        kept.append(list(ran))
        ran.clear()
        keys.append(parts.count("context"))
        parts.clear()
        assert step.x.shape == (2, 8, 8, 1)
    everything = ["down_0", "down_1", "down_2", "bridge", "up_0", "up_1", "up_2", "up_3"]
    assert kept == [everything, ["down_0", "up_2", "up_3"], everything]
    assert keys[0] == keys[2] > 0 == keys[1]


@pytest.mark.parametrize("name", mostly_once(["dit", "mmdit", "uvit", "unet"]))
def test_a_step_that_reuses_is_as_one_that_was_given_the_same(name):
    """At the point where it was kept, what is kept gives the same answer; elsewhere another one."""
    model, text = made(name)
    inputs = {"time": np.float32([3.0, 400.0]), **text}
    x, y = np.random.default_rng(1).normal(size=(2, 2, 8, 8, 1)).astype("float32")
    plain = [numpy(model.network({"image": one, **inputs})) for one in (x, y)]
    with kept_in(Store(nothing_kept(), 1)) as store:
        fresh = numpy(model.network({"image": x, **inputs}))
    np.testing.assert_allclose(fresh, plain[0], atol=1e-6)
    assert bool(store.kept["context"]) == (name == "unet")
    for one, expected, same in ((x, plain[0], True), (y, plain[1], False)):
        with kept_in(Store(store.kept, 1)) as again:
            answer = numpy(model.network({"image": one, **inputs}))
        assert (np.abs(answer - expected).max() < 1e-4) == same
        assert all(value is store.kept["deep"][key] for key, value in again.kept["deep"].items())
    with kept_in(Store({"context": store.kept["context"], "deep": {}}, 1)):
        np.testing.assert_allclose(numpy(model.network({"image": y, **inputs})), plain[1], atol=1e-5)


@pytest.mark.once
def test_where_nothing_can_be_reused():
    sampler = Sampler("ddim", steps=2, reuse=Reuse(2))
    schedule = kdiff.schedules.Cosine()
    with pytest.raises(ValueError, match="needs a UNet, UViT, DiT or MMDiT"):
        sampler(Denoiser(lambda given, x, m: Estimate(0.5 * x)), schedule, (2, 3))
    with pytest.raises(ValueError, match=r"differentiates the network, .* Sample without `reuse`"):
        made("dit")[0].sample(1, sampler=sampler, guidance=guidance.DPS(operators.Mask(ONES), ONES))
    with pytest.raises(ValueError, match="takes no fixed steps"):
        Sampler(solvers.Adaptive(), reuse=Reuse(2))
    for solver in (solvers.PNDM(), solvers.DPMSolverFast(), EvenSteps(DiffusersPNDM())):
        with pytest.raises(ValueError, match="a different number of times in different steps"):
            Sampler(solver, reuse=Reuse(2))
    assert repr(Sampler.from_config(sampler.get_config())) == repr(sampler)
