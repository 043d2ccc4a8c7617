"""One's own text, against the model and the SAE by hand; where SAEs are and which runs speak of a latent; the text as
HTML, read again by a parser."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

from saes import try_figures, try_on, whereabouts
from saes.latents import Example, pieces
from saes.pretrained import DATA
from saes.sae import SAE
from tests.test_app import HOSTILE
from workbench import places, plots, runs
from workbench.errors import UserError
from workbench.models import LanguageModel
from workbench.runs import Run

HOOK = "blocks.1.hook_resid_post"
TEXT = "When Mary and John went to the store, John gave a drink to Mary."
SMALL: dict[str, Any] = {
    "text": "parallel", "hooks": "1", "latents": 64, "k": 4.0, "tokens": 2000, "length": 16, "batch": 64,
    "dtype": "float32",
}  # fmt: skip


@pytest.fixture
def trained() -> Run:
    """An SAE of a model that comes along, trained for a moment."""
    return runs.run("train-sae", model="pycode-small-dense", **SMALL)


# ---- the analysis ----


def test_values_are_the_saes_of_the_models_activations(tiny: LanguageModel, tiny_sae: Path) -> None:
    found = runs.run("try-on", model=tiny, sae=str(tiny_sae), which="7,3", text=TEXT).result
    sae = SAE.load(tiny_sae)
    x = tiny.run(tiny.tokenize(TEXT)[None], capture=[HOOK])[HOOK][0]
    by_hand = torch.stack([sae.encode(row) for row in x])
    assert found.asked == (7, 3) and found.latents[:2] == (7, 3) and "".join(found.tokens) == TEXT
    for latent, row in zip(found.latents, found.values, strict=True):
        assert bool(row[0].isnan())
        assert torch.allclose(row[1:], by_hand[1:, latent], atol=1e-5)
    most = by_hand[1:].amax(0)
    assert list(found.top) == sorted(range(64), key=lambda i: -float(most[i]))[:10]
    one = found.example(found.top[0])
    assert one.value == pytest.approx(float(most.max()), rel=1e-5)
    assert float(by_hand[one.position, found.top[0]]) == pytest.approx(one.value, rel=1e-5)


def test_in_parts_it_is_the_same(tiny: LanguageModel, tiny_sae: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sae, x = SAE.load(tiny_sae), torch.randn(33, 32, generator=torch.Generator().manual_seed(0))
    whole = try_on.largest(sae, x), try_on.columns(sae, x, [1, 2])
    monkeypatch.setattr(try_on, "AT_ONCE", 64 * 5)
    assert try_on.largest(sae, x) == whole[0]
    torch.testing.assert_close(try_on.columns(sae, x, [1, 2]), whole[1])


def test_the_figure_and_the_table_are_of_the_values(tiny: LanguageModel, tiny_sae: Path) -> None:
    found = runs.run("try-on", model=tiny, sae=str(tiny_sae), which="3", text=TEXT).result
    shares = plots.figure(found).data[0].z
    assert shares[0][0] is None and max(x for x in shares[1] if x is not None) == pytest.approx(1)
    (table,) = plots.tables(found)
    assert table.columns["latent"] == [str(latent) for latent in found.latents]
    assert json.loads(json.dumps(found.summary()))["top"][0][0] == found.top[0]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"text": " \n "}, "there is no text"),
        ({"text": "word " * 999}, "tokens, and tiny-llama reads 512"),
        ({"text": "A"}, "a single token"),
        ({"which": "64"}, "there is no latent 64"),
        ({"which": "3,x"}, "names no latents"),
        ({"which": "³"}, "names no latents"),
        ({"which": "9" * 5000}, "names no latents"),
        ({"hook": "blocks.0.hook_resid_post"}, "no hook point"),
    ],
)
def test_what_cannot_be_read_is_a_sentence(
    given: dict[str, Any], message: str, tiny: LanguageModel, tiny_sae: Path
) -> None:
    with pytest.raises(UserError, match=message):
        runs.run("try-on", **{"model": tiny, "sae": str(tiny_sae), "text": TEXT, **given})


def test_ten_megabytes_are_refused_before_a_tokenizer_sees_them(
    tiny: LanguageModel, tiny_sae: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LanguageModel, "tokenize", lambda *_: pytest.fail("it was tokenised"))
    with pytest.raises(UserError, match="the text has 10,000,000 characters; give at most 100,000"):
        runs.run("try-on", model=tiny, sae=str(tiny_sae), text="wo" * 5_000_000)


@pytest.mark.parametrize("text", ["", "one two", "日本語のテキスト 🎉 é", "a\n\tb  c ", HOSTILE])
def test_pieces_are_the_text(text: str, tiny: LanguageModel) -> None:
    ids = tiny.token_ids(text)
    found = pieces(tiny, ids)
    assert len(found) == len(ids) and "".join(found) == text and not any("\ufffd" in piece for piece in found)


def test_pieces_of_half_a_sign_end(tiny: LanguageModel) -> None:
    """Bytes that never become a sign are shown as what they are, and what follows is not held back by them."""
    half = tiny.token_ids("é")[:1]
    assert pieces(tiny, half * 9)[-1].endswith("\ufffd")
    assert "".join(pieces(tiny, half * 9 + tiny.token_ids(" one"))).endswith(" one")


def test_a_latent_for_french_sees_french(smollm: LanguageModel) -> None:
    places.ship(DATA / "runs")
    french, english = (
        runs.run("try-on", model=smollm, which="702", text=text).result.values[0, 1:]
        for text in ("Le train part demain matin à huit heures.", "The train leaves tomorrow morning at eight o'clock.")
    )
    assert float((french > 0).float().mean()) > 0.3 > 0.1 >= float((english > 0).float().mean())


# ---- as HTML ----


class Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def read(html: str) -> Reader:
    reader = Reader()
    reader.feed(html)
    reader.close()
    return reader


def test_a_text_as_html_is_the_text_whatever_it_is() -> None:
    tokens = (HOSTILE, '" onmouseover="x', "</span></p><script>", "&lt;", "'", "")
    found = read(try_figures.heat(Example(tokens, (float("nan"), 0.0, 2.0, 4.0, 1.0, -1.0), 3), 8.0))
    assert [tag for tag, _ in found.tags] == ["p"] + ["span"] * 6
    assert all(set(attributes) <= {"style", "title"} for _, attributes in found.tags)
    assert "".join(found.texts) == "".join(tokens).replace("\n", "↵") + "·"
    styles = [str(attributes["style"]) for _, attributes in found.tags[1:]]
    shades = [style.split("rgba(26,115,200,")[1].split(")")[0] if "rgba" in style else "0" for style in styles]
    assert list(map(float, shades)) == pytest.approx([0, 0, 0.6 / 4, 0.6 / 2, 0.6 / 8, 0])
    assert ["underline" in style and "700" in style for style in styles] == [i == 3 for i in range(6)]
    assert found.tags[4][1]["title"] == "4.000" and "not read" in str(found.tags[1][1]["title"])


def test_a_cut_text_is_around_the_strongest() -> None:
    one = Example(tuple("abcdefghij"), tuple(float(i == 4) for i in range(10)), 4)
    assert "".join(read(try_figures.heat(one, 1.0, 2)).texts) == "…cdefg…"
    silent = Example(("a", "b"), (0.0, 0.0), 0)
    assert (
        "underline" not in try_figures.heat(silent, 0.0) and "".join(read(try_figures.heat(silent, 0.0)).texts) == "ab"
    )


# ---- where SAEs are, and who speaks of a latent ----


def test_all_names_of_an_sae_are_one_place(trained: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(places, "_aliases", {"ours": f"{trained.id}/{HOOK}"})
    place = whereabouts.where("ours")[HOOK]
    assert (place.model, place.n_latents, place.transcoder) == ("pycode-small-dense", 64, False)
    assert whereabouts.where(trained.id) == whereabouts.where(f"{trained.id}/{HOOK}") == {HOOK: place}
    names = whereabouts.known()
    assert list(names) == ["ours", trained.id]
    assert whereabouts.called(names, f"{trained.id}/{HOOK}", "") == ("ours", HOOK)
    assert whereabouts.called(names, trained.id, HOOK) == (trained.id, HOOK)
    for spec, hook in (("", ""), ("nothing", ""), ("/", ""), ("../..", ""), (trained.id, "blocks.9.hook_resid_post")):
        assert whereabouts.called(names, spec, hook) == ("", "")
    (Path(place.folder) / "cfg.json").write_text("[]")
    assert whereabouts.where("ours") == {}


def test_the_saes_that_come_along_are_found_by_their_models() -> None:
    places.ship(DATA / "runs")
    assert list(whereabouts.where("gemma-3-270m")) == [f"blocks.{i}.hook_resid_post" for i in (9, 11, 13)]
    assert whereabouts.where("smollm2-135m") == whereabouts.where("smollm2-135m-20")


def test_runs_that_speak_of_a_latent_are_found_by_their_records(trained: Run) -> None:
    on: dict[str, Any] = {"model": "pycode-small-dense", "sae": trained.id}
    seen = runs.run("latents", **on, which="3,9", text="parallel", tokens=2000, length=16, examples=3)
    steered = runs.run("steer", **on, latent=9, unit=1.0, steps=2, strengths="1")
    circuit = runs.run("feature-circuit", model=on["model"], task="with_as", n=4, basis=f"sae:{trained.id}", top=10)
    path = steered.folder.parent / "latents-broken" / "record.json"
    path.parent.mkdir()
    path.write_text(json.dumps(seen.record | {"summary": None}))
    some = whereabouts.uses(runs.all_runs()[0])
    place = whereabouts.where(trained.id)[HOOK]
    assert {one.folder for one in some} == {place.folder}
    nodes = {int(name.rpartition("/")[2]) for name in circuit.result.nodes if not name.endswith("error")}
    by_run = {run.id: {one.latent for one in some if one.run == run.id} for run in (seen, steered, circuit)}
    assert by_run == {seen.id: {3, 9}, steered.id: {9}, circuit.id: nodes} and nodes
    assert {one.run for one in some} == by_run.keys()


def test_a_recipe_names_its_latent(trained: Run) -> None:
    recipe = {"sae": f"{trained.id}/{HOOK}", "hook": HOOK, "latent": 5, "target": "fr", "kind": "add", "strength": 1.5}
    key = {"analysis": "language-steering", "parameters": {}}
    run = Run("one", trained.folder, {"key": key, "summary": {"recipe": recipe}}, True, 0.0, 0)
    (found,) = whereabouts.uses([run])
    assert (found.latent, found.how) == (5, "steers to fr: add, strength 1.5")
    hybrid = {"key": key | {"analysis": "language-hybrid"}, "summary": {"recipe": recipe}}
    (found,) = whereabouts.uses([Run("two", trained.folder, hybrid, True, 0.0, 0)])
    assert (found.latent, found.how) == (5, "holds fr once the prompt is turned")
