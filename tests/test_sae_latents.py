"""SAEs by name, what their latents respond to and write, how good they are; each against something worked out apart."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from sae_lens.analysis.neuronpedia_integration import open_neuronpedia_feature_dashboard
from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory
from safetensors.torch import load_file, save_file
from torch import Tensor

from saes import pretrained
from saes.evaluate import quality, text_loss
from saes.latents import Seen
from saes.sae import SAE
from workbench import bases, places, runs, texts
from workbench.activations import ActivationStore
from workbench.errors import UserError
from workbench.models import LanguageModel

HOOK = "blocks.1.hook_resid_post"


@pytest.fixture
def sae(tiny_sae: Path) -> SAE:
    return SAE.load(tiny_sae)


def some(model: LanguageModel, tokens: int = 600) -> list[Tensor]:
    return texts.sequences(texts.load("parallel"), model, 16, tokens)


# ---- quality ----


def exact(sae: SAE) -> SAE:
    """An SAE that leaves nothing out: two latents for each coordinate, one for either sign."""
    eye = torch.eye(32)
    both = torch.cat([eye, -eye])
    return replace(
        sae,
        kind="standard",
        k=None,
        W_enc=both.T.contiguous(),
        b_enc=torch.zeros(64),
        W_dec=both,
        b_dec=torch.zeros(32),
    )


def test_an_sae_that_leaves_nothing_out_recovers_everything(
    tiny: LanguageModel, store: ActivationStore, sae: SAE
) -> None:
    found = quality(tiny, store, exact(sae), some(tiny))
    assert found.fvu < 1e-10 and found.recovered == pytest.approx(1, abs=1e-3)
    assert found.spliced == pytest.approx(found.loss, abs=1e-5)
    assert found.l0 == pytest.approx(32, abs=0.01)  # of each pair one
    silent = replace(exact(sae), W_dec=torch.zeros(64, 32))
    assert quality(tiny, store, silent, some(tiny)).recovered == pytest.approx(0, abs=1e-6)


def test_quality_is_what_the_formulas_say(tiny: LanguageModel, store: ActivationStore, sae: SAE) -> None:
    rows = some(tiny)
    found = quality(tiny, store, sae, rows)
    x = torch.cat([one[1:] for one in store.get(tiny, rows, [HOOK])[HOOK]])
    latents = sae.encode(x)
    assert found.rows == len(x) and found.l0 == pytest.approx(float((latents != 0).sum(-1).float().mean()))
    residual = x - sae.decode(latents)
    assert found.fvu == pytest.approx(
        float(residual.var(0, correction=0).sum() + residual.mean(0).square().sum())
        / float(x.var(0, correction=0).sum()),
        rel=1e-4,
    )
    assert found.dead == pytest.approx(float((latents.sum(0) == 0).float().mean()))
    logits = torch.cat([tiny.run(one[None]).logits[0, 1:-1] for one in rows])
    nll = F.cross_entropy(logits, torch.cat([one[2:] for one in rows]))
    assert found.loss == pytest.approx(float(nll), rel=1e-4) == pytest.approx(text_loss(tiny, rows), rel=1e-4)


# ---- names and fit ----


def test_saes_of_a_run_and_of_a_folder(tiny: LanguageModel, tiny_sae: Path) -> None:
    run = runs.run(
        "train-sae", model=tiny, text="parallel", hooks="0,blocks.1.hook_mlp_out", latents=64, k=4.0, tokens=2000,
        length=16, batch=64, dtype="float16",
    )  # fmt: skip
    found = pretrained.load(run.id)
    assert list(found) == ["blocks.0.hook_resid_post", "blocks.1.hook_mlp_out"]
    one = pretrained.load(f"{run.id}/blocks.1.hook_mlp_out")
    assert torch.equal(one["blocks.1.hook_mlp_out"].W_dec, found["blocks.1.hook_mlp_out"].W_dec)
    assert found["blocks.0.hook_resid_post"].about["model_fingerprint"] == tiny.fingerprint
    assert bases.load(tiny, f"sae:{run.id}").keys() == found.keys()
    assert pretrained.load(str(tiny_sae)).keys() == {HOOK}
    assert run.result.quality.keys() == found.keys()
    scores = runs.run("feature-attribution", model=tiny, task="ioi", n=4, basis=f"sae:{tiny_sae}").result
    assert scores.hooks == (HOOK,) and len(scores.latents[0]) == 64
    for name, message in (
        ("train-sae-x", "there is no SAE|no SAE"),
        ("", "no SAE is named"),
        (f"{run.id}/blocks.0.hook_mlp_out", "did you mean"),
        (str(tiny_sae.parent / "nothing"), "holds no SAE"),
        ("saelens:no-such-release/x", "SAELens cannot load"),
    ):
        with pytest.raises(UserError, match=message):
            pretrained.load(name)


def test_a_name_is_keyed_by_what_it_stands_for(
    tiny: LanguageModel, tiny_sae: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(places, "_aliases", {})
    ask: dict[str, Any] = {"model": tiny, "task": "ioi", "n": 4, "basis": "sae:ours"}
    with pytest.raises(UserError, match="no SAE"):
        runs.run("feature-attribution", **ask)
    places.alias("ours", str(tiny_sae))
    assert pretrained.load("ours").keys() == {HOOK}
    first = runs.run("feature-attribution", **ask)
    assert first.record["key"]["contents"] == {"sae:ours": str(tiny_sae)}
    assert "basis sae:ours" in first.record["command"] and runs.run("feature-attribution", **ask).hit
    copy = changed(tiny_sae, tiny_sae.with_name("copy"))
    places.alias("ours", str(copy))
    assert not runs.run("feature-attribution", **ask).hit
    mlp = changed(tiny_sae, tiny_sae.with_name("mlp"), {"metadata": {"hook_name": "blocks.1.hook_mlp_out"}})
    places.alias("ours", str(copy), str(mlp))
    assert pretrained.load("ours").keys() == {HOOK, "blocks.1.hook_mlp_out"}


def changed(folder: Path, to: Path, config: dict[str, Any] | None = None, **tensors: Tensor | None) -> Path:
    """A copy of an SAE's files with some things changed; None leaves a tensor out."""
    to.mkdir()
    found = json.loads((folder / "cfg.json").read_text()) | (config or {})
    (to / "cfg.json").write_text(json.dumps(found))
    weights = {k: x for k, x in (load_file(folder / "sae_weights.safetensors") | tensors).items() if x is not None}
    save_file({key: x.contiguous() for key, x in weights.items()}, to / "sae_weights.safetensors")
    return to


@pytest.mark.parametrize(
    ("config", "tensors", "message"),
    [
        ({}, {"W_dec": torch.full((64, 32), torch.nan)}, "W_dec holds values that are no numbers"),
        ({}, {"b_enc": None}, "has no b_enc"),
        ({"d_sae": 63}, {}, r"W_enc has the shape \(32, 64\), and its configuration says \(32, 63\)"),
        ({"architecture": "gated"}, {}, "is of the kind 'gated'"),
        ({"normalize_activations": "layer_norm"}, {}, "normalize_activations='layer_norm', which is not read"),
    ],
)
def test_damaged_and_foreign_files_are_sentences(
    config: dict[str, Any], tensors: dict[str, Any], message: str, tiny_sae: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        SAE.load(changed(tiny_sae, tmp_path / "changed", config, **tensors))


def test_an_sae_of_something_else_is_a_sentence(tiny: LanguageModel, store: ActivationStore, sae: SAE) -> None:
    good = exact(sae)
    assert pretrained.fit(tiny, store, good)["fvu"] < 1e-6
    for other, message in (
        (replace(good, about={"hook_name": "blocks.9.hook_resid_post"}), "has no such hook point"),
        (replace(good, about={"hook_name": "blocks.1.attn.hook_q"}), "the SAE is 32 wide"),
        (replace(good, about={}), "does not say at which hook point"),
        (replace(good, b_enc=torch.full((64,), -1e4)), "it was trained on others"),
        (replace(good, W_dec=good.W_dec * 9), "it was trained on others"),
    ):
        with pytest.raises(UserError, match=message):
            pretrained.fit(tiny, store, other)


@pytest.mark.parametrize("name", ["latents", "language-latents", "language-heads", "language-steering"])
def test_no_analysis_takes_an_sae_of_something_else(name: str, tiny: LanguageModel, sae: SAE, tmp_path: Path) -> None:
    folder = tmp_path / "of-others"
    replace(sae, W_dec=sae.W_dec * 9).save(folder)
    with pytest.raises(UserError, match="it was trained on others"):
        runs.run(name, model=tiny, sae=str(folder))
    with pytest.raises(UserError, match="it was trained on others"):
        bases.load(tiny, f"sae:{folder}")


def test_fit_is_the_same_with_a_store_and_without(tiny: LanguageModel, store: ActivationStore, sae: SAE) -> None:
    kept, computed = pretrained.fit(tiny, store, sae), pretrained.fit(tiny, None, sae)
    assert kept == pytest.approx(computed, rel=1e-4) and 0.01 < kept["fvu"] < 0.9 and kept["l0"] > 1


# ---- latents ----


def test_what_a_pass_keeps_is_what_all_rows_at_once_give(sae: SAE) -> None:
    """In three parts, against the whole table: densities, histograms, the largest, and draws from the active ones."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(12, 9, 64, generator=generator).relu() * (torch.rand(12, 9, 64, generator=generator) < 0.3)
    x[:, :, 5] = 0  # never active
    seen = Seen.of(sae, 4, seed=0)
    for part in (range(5), range(5, 6), range(6, 12)):
        seen.add(part, x[part.start : part.stop])
    flat = x.flatten(0, 1)
    assert seen.rows == 108 and torch.equal(seen.active, (flat > 0).sum(0).float())
    assert torch.allclose(seen.total, flat.sum(0))
    assert torch.equal(seen.counts.sum(1), seen.active)
    best = x.amax(1).topk(4, dim=0).values
    assert torch.equal(seen.top, best)
    inside = seen.top > 0
    assert torch.equal(flat.gather(0, seen.top_at)[inside], seen.top[inside])
    sequences = seen.top_at.div(9, rounding_mode="floor")[:, 0].tolist()
    assert len(set(sequences)) == 4
    for latent in (0, 7):  # all of them are kept where there are few
        drawn = seen.drawn[:, latent]
        assert torch.equal(drawn[drawn > 0].sort().values, flat[:, latent][flat[:, latent] > 0].sort().values)
    assert torch.equal(flat.gather(0, seen.drawn_at)[seen.drawn > 0], seen.drawn[seen.drawn > 0])
    edges = seen.edges()
    values = flat[:, 3][flat[:, 3] > 0]
    by_hand = torch.histogram(values, torch.tensor(edges)).hist
    assert torch.equal(seen.counts[3], by_hand)


def test_draws_are_uniform_over_active_rows(sae: SAE) -> None:
    """Of 1,000 active rows, whatever their size: as many from the first part as from the last."""
    x = torch.zeros(10, 100, 64)
    x[:] = torch.linspace(1, 2, 100)[None, :, None]
    seen = Seen.of(sae, 30, seed=0)
    for i in range(10):
        seen.add(range(i, i + 1), x[i : i + 1])
    parts = torch.bincount(seen.drawn_at.div(100, rounding_mode="floor").flatten(), minlength=10).double()
    expected = parts.sum() / 10
    assert float(((parts - expected) ** 2 / expected).sum()) < 30  # chi squared of 9, at 1 in 2,000


def test_a_latent_by_the_model_itself(tiny: LanguageModel, store: ActivationStore, tiny_sae: Path, sae: SAE) -> None:
    found = runs.run(
        "latents", model=tiny, sae=str(tiny_sae), which="3,40", text="parallel", tokens=2000, length=16, examples=3
    ).result
    rows = some(tiny, 2000)
    values = torch.stack([sae.encode(x[1:]) for x in store.get(tiny, rows, [HOOK])[HOOK]])
    for one in found.latents:
        assert one.density == pytest.approx(float((values[:, :, one.latent] > 0).float().mean()))
        assert one.largest == pytest.approx(float(values[:, :, one.latent].max()), rel=1e-5)
        assert [example.value for example in one.top] == pytest.approx(
            values[:, :, one.latent].amax(1).topk(3).values.tolist(), rel=1e-5
        )
        means = [sum(e.value for e in bucket) / len(bucket) for bucket in one.buckets if bucket]
        assert means == sorted(means)
        # A unit of it, added before the final norm where that divides by 1, and what it does to the logits.
        resid = torch.randn(32, generator=torch.Generator().manual_seed(0))
        resid = resid / resid.square().mean().sqrt()
        step = 1e-3 * sae.W_dec[one.latent]
        orthogonal = step - resid * (step @ resid) / resid.square().sum()  # along it the norm takes back what is added
        logits = (tiny.unembed(resid + orthogonal) - tiny.unembed(resid - orthogonal)) / 2e-3
        along = (tiny.unembed(1.001 * resid) - tiny.unembed(resid)).abs().max()
        assert float(along) < 1e-3
        direct = sae.W_dec[one.latent] - resid * (sae.W_dec[one.latent] @ resid) / resid.square().sum()
        assert torch.allclose(logits, (direct * _gain(tiny)) @ tiny.unembed_weight, atol=2e-2)
        effect = (sae.W_dec[one.latent] * _gain(tiny)) @ tiny.unembed_weight
        effect = effect - effect.mean()
        assert [value for _, value in one.promoted] == pytest.approx(effect.topk(10).values.tolist(), rel=1e-3)
        assert [value for _, value in one.suppressed] == pytest.approx(
            effect.topk(10, largest=False).values.tolist(), rel=1e-3
        )
        cosine = F.cosine_similarity(sae.W_dec, sae.W_dec[one.latent][None])
        cosine[one.latent] = -2
        assert one.neighbours[0] == (int(cosine.argmax()), pytest.approx(float(cosine.max()), rel=1e-4))
    assert torch.allclose(found.density, (values > 0).flatten(0, 1).float().mean(0))


def _gain(model: LanguageModel) -> Tensor:
    weight: Tensor = model._module.model.norm.weight
    return weight.detach()


def test_latents_that_are_no_numbers_are_a_sentence(tiny: LanguageModel, tiny_sae: Path) -> None:
    for which, message in (("3,x", "names no latents"), ("64", "no latent 64"), ("3,", "names no latents")):
        with pytest.raises(UserError, match=message):
            runs.run(
                "latents",
                model=tiny,
                sae=str(tiny_sae),
                which=which,
                text="parallel",
                tokens=500,
                length=16,
                examples=1,
            )


# ---- Neuronpedia ----


def test_a_latent_has_the_page_that_saelens_opens(
    tiny: LanguageModel, tiny_sae: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The id is that of SAELens' list of released SAEs, which it puts among what is known of one."""
    id = get_pretrained_saes_directory()["gemma-2b-res-jb"].neuronpedia_id["blocks.6.hook_resid_post"]
    sae = SAE.load(tiny_sae)
    assert sae.neuronpedia(3) is None
    named = replace(sae, about={**sae.about, "neuronpedia_id": id})
    opened: list[str] = []
    monkeypatch.setattr("webbrowser.open", opened.append)
    lens = SimpleNamespace(cfg=SimpleNamespace(metadata=SimpleNamespace(neuronpedia_id=id)))
    open_neuronpedia_feature_dashboard(lens, 3)
    assert [named.neuronpedia(3)] == [url.replace("//", "//www.") for url in opened]
    with pytest.raises(UserError, match="no latent 64"):
        named.neuronpedia(64)
    for hostile in ("javascript:alert(1)", "a/b/c", "a/../b", "a/b?c", "a/b\n", None, ""):
        assert replace(sae, about={"neuronpedia_id": hostile}).neuronpedia(3) is None
    named.save(tmp_path / "named")
    few: dict[str, Any] = {"text": "parallel", "tokens": 500, "length": 16, "examples": 3, "which": "3,5"}
    result = runs.run("latents", model=tiny, sae=str(tmp_path / "named"), **few).result
    assert result.pages == (named.neuronpedia(3), named.neuronpedia(5))
    assert [one["page"] for one in result.summary()["latents"]] == list(result.pages)
    plain = runs.run("latents", model=tiny, sae=str(tiny_sae), **few)
    assert plain.result.pages == () and "page" not in plain.summary["latents"][0]
