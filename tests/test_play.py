"""What `wb run steer` writes is what `steer` and `generate` write, row by row; two who share a model do not disturb
each other."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from circuits.patching import patching
from saes.pretrained import DATA
from saes.sae import SAE
from saes.steering import play
from saes.steering.play import Played
from saes.steering.steer import Kind, Steering, positions, steer
from workbench import places, plots, registry, runs, texts
from workbench.activations import ActivationStore
from workbench.errors import UserError
from workbench.generation import generate
from workbench.models import LanguageModel
from workbench.prompts import sample

HOOK = "blocks.1.hook_resid_post"
PROMPT = "When Mary and John went to the store"


@pytest.fixture
def sae(tiny_sae: Path) -> SAE:
    return SAE.load(tiny_sae)


@pytest.fixture
def played(tiny: LanguageModel, tiny_sae: Path) -> Callable[..., Played]:
    def call(**given: Any) -> Played:
        on = {"sae": str(tiny_sae), "latent": 7, "prompt": PROMPT, "unit": 3.0, "steps": 12, "temperature": 0.8}
        result: Played = runs.run("steer", model=tiny, **{**on, **given}).result
        return result

    return call


def test_strength_0_is_unsteered_and_a_seed_is_its_text(played: Callable[..., Played]) -> None:
    found = played(strengths="0,4", samples=3)
    assert [row.text for row in found.at(0.0)] == [row.text for row in found.at(None)]
    assert [row.values for row in found.at(0.0)] == [row.values for row in found.at(None)]
    assert [row.text for row in found.at(4.0)] != [row.text for row in found.at(None)]
    assert len({row.text for row in found.at(None)}) == 3
    assert played(strengths="0,4", samples=3, seed=0, decay=1.0).rows == found.rows
    again = played(strengths="4,2", samples=1)  # others beside it, and fewer samples: the same texts
    assert [row.text for row in again.at(4.0)] == [found.at(4.0)[0].text]
    assert played(strengths="4", seed=1).at(None)[0].text not in [row.text for row in found.at(None)]


def test_each_row_is_what_steer_writes_alone(played: Callable[..., Played], tiny: LanguageModel, sae: SAE) -> None:
    found = played(strengths="0,1,-2,6", samples=2, scope="generated", decay=0.9)
    tokens = tiny.tokenize(PROMPT)[None]
    for row in found.rows:
        one = Steering(HOOK, row.strength or 0.0, sae=sae, latent=7, unit=3.0, scope="generated", decay=0.9)
        plan = None if row.strength is None else one
        alone = steer(tiny, tokens, 12, [plan], temperature=0.8, seeds=[row.sample])
        assert row.text == alone.texts[0]
        assert row.applied == row.due == alone.applied[0]
    plain = generate(tiny, tokens, 12, temperature=0.8, seeds=[1])
    assert found.at(None)[1].text == plain.texts[0] and "".join(found.at(None)[1].tokens) == plain.texts[0]


def test_values_and_surprise_are_the_unsteered_models(
    played: Callable[..., Played], tiny: LanguageModel, sae: SAE
) -> None:
    """One token at a time, from the prompt on; by an end of the text nothing is counted."""
    row = played(strengths="6").at(6.0)[0]
    ids = generate_ids(tiny, sae, 6.0)
    assert len(row.tokens) == len(row.values) == len(row.logprobs) == len(ids)
    whole = torch.cat([tiny.tokenize(PROMPT), torch.tensor(ids)])
    start = len(whole) - len(ids)
    for i in range(len(ids)):
        before = tiny.run(whole[None, : start + i]).logits
        assert before is not None
        assert row.logprobs[i] == pytest.approx(float(before[0, -1].log_softmax(-1)[ids[i]]), abs=1e-4)
        here = tiny.run(whole[None, : start + i + 1], capture=[HOOK])[HOOK][0, -1]
        assert row.values[i] == pytest.approx(float(sae.encode(here)[7]), abs=1e-4)


def generate_ids(model: LanguageModel, sae: SAE, strength: float) -> list[int]:
    one = Steering(HOOK, strength, sae=sae, latent=7, unit=3.0)
    made = steer(model, model.tokenize(PROMPT)[None], 12, [one], temperature=0.8, seeds=[0])
    ids: list[int] = made.generated.tokens[0].tolist()
    ends = [i for i, token in enumerate(ids) if token in model.end_tokens]
    return ids[: ends[0]] if ends else ids


@pytest.mark.parametrize("kind", get_args(Kind))
def test_every_kind_is_written_and_says_what_it_is(kind: Kind, played: Callable[..., Played]) -> None:
    found = played(kind=kind, other=9, strengths="1,5", unit=None if kind == "scale" else 3.0, scope="prompt")
    assert play.MEANING[kind] in found.definition and ("unit 3" in found.definition) == (kind in play.IN_UNITS)
    assert all(row.applied == row.due for row in found.rows)
    assert found.at(1.0)[0].due == positions("prompt", len_of(found), 12)
    if kind == "scale":  # times 1
        assert found.at(1.0)[0].text == found.at(None)[0].text
    assert plots.figure(found).data and len(plots.tables(found)[0].columns["text"]) == 3


def len_of(found: Played) -> int:
    return found.at(1.0)[0].due + 1


def test_the_unit_is_the_mean_where_it_is_active(played: Callable[..., Played], tiny: LanguageModel, sae: SAE) -> None:
    some = texts.sequences(texts.load("parallel"), tiny, 16)[:512]
    x = tiny.run(torch.stack(some), capture=[HOOK], logits="none")[HOOK][:, 1:]
    mean = {i: float(row[row > 0].mean()) for i in range(64) if bool(((row := sae.encode(x)[..., i]) > 0).any())}
    found = played(unit=None, steps=1)
    assert found.unit == pytest.approx(mean[7], rel=1e-4) and "its mean where it is active" in found.definition
    assert played(unit=found.unit, steps=1).rows == found.rows


def test_a_latent_that_is_never_active_has_no_unit(
    tiny: LanguageModel, store: ActivationStore, sae: SAE, tmp_path: Path
) -> None:
    sae.b_enc[11] = -1e6
    with pytest.raises(UserError, match="latent 11 is never active on 8,192 tokens of everyday sentences; give a unit"):
        play.mean_active(tiny, store, sae, 11)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"prompt": "  "}, "there is no prompt"),
        ({"prompt": "x" * 200_000}, "the prompt has 200,000 characters"),
        ({"prompt": "word " * 505}, "are more than the 512"),
        ({"prompt": "A", "scope": "prompt"}, "the first position is never steered"),
        ({"latent": 64}, "there is no latent 64"),
        ({"kind": "swap"}, "give other"),
        ({"kind": "swap", "other": 99}, "there is no latent 99"),
        ({"kind": "push"}, "kind='push'"),
        ({"strengths": "1,x"}, "are no strengths"),
        ({"strengths": ""}, "are no strengths"),
        ({"strengths": "nan"}, "are no strengths"),
        ({"strengths": ",".join(map(str, range(17)))}, "there are 17 strengths"),
        ({"unit": float("inf")}, "is no amount"),
        ({"decay": 0.0}, "decay=0"),
        ({"samples": 0}, "samples=0"),
        ({"steps": 0}, "writes nothing"),
        ({"temperature": -1.0}, "is below 0"),
    ],
)
def test_what_cannot_be_written_is_a_sentence(
    given: dict[str, Any], message: str, played: Callable[..., Played]
) -> None:
    with pytest.raises(UserError, match=message):
        played(**given)


@pytest.mark.parametrize(
    ("text", "language"),
    [("Je pense que nous devrions partir demain matin.", "fr"), ("ok", ""), ("", ""), ("12 + 34 = 46 * 7 - 9", "")],
)
def test_a_language_is_said_where_it_can_be_told(text: str, language: str) -> None:
    assert play.language_of(text) == language


def test_one_steers_and_another_patches_the_same_model(tiny: LanguageModel, sae: SAE, tmp_path: Path) -> None:
    """At the same time, again and again: each gets what it gets alone."""
    one = Steering(HOOK, 4.0, sae=sae, latent=7, unit=3.0)
    batch = sample(registry.get_task("ioi"), tiny, 4, 0)
    go = threading.Barrier(2)

    def steered() -> Any:
        return [row.text for row in play.write(tiny, one, tiny.tokenize(PROMPT), [0.0, 4.0], 10, 0.8, 2, 0)]

    def patched() -> Any:
        return patching(tiny, batch, ActivationStore(tmp_path / f"store {threading.get_ident()}")).scores

    alone = steered(), patched()
    found: dict[str, list[Any]] = {"steered": [], "patched": []}

    def repeat(name: str, fn: Callable[[], Any]) -> None:
        go.wait(30)
        for _ in range(3):
            found[name].append(fn())

    threads = [threading.Thread(target=repeat, args=pair) for pair in (("steered", steered), ("patched", patched))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found["steered"] == [alone[0]] * 3
    assert len(found["patched"]) == 3 and all(torch.equal(scores, alone[1]) for scores in found["patched"])


def test_the_more_the_more_french(smollm: LanguageModel) -> None:
    """On the default model and its SAE: the latent is more active on what it was steered to write."""
    places.ship(DATA / "runs")
    found = runs.run("steer", model=smollm, unit=23.75, strengths="0,8", steps=12).result
    assert found.at(0.0)[0].text == found.at(None)[0].text
    assert found.at(8.0)[0].value > 5 + found.at(None)[0].value
