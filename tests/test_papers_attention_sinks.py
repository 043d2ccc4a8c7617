"""Laws of attention sinks and massive activations: patterns and activations set by hand, and runs made another way."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from papers.attention_sinks import CONTROL, MEAN, UNCHANGED, ZERO, attention_sinks, importance
from papers.massive_activations import Entry, by_channel, elsewhere, massive_at, placing, with_means
from tests.conftest import CONFIGS
from workbench import plots, registry, texts
from workbench.activations import ActivationStore
from workbench.errors import UserError
from workbench.models import LanguageModel
from workbench.passes import Edit
from workbench.prompts import Batch, sample
from workbench.sites import Site, block


def draw(model: LanguageModel, n: int = 5) -> Batch:
    return sample(registry.get_task("ioi"), model, n, seed=0)


def nll(logits: Tensor, tokens: Tensor) -> list[float]:
    """Of every next token, one by one."""
    said = logits.double().log_softmax(-1)
    return [-float(said[i, int(token)]) for i, token in enumerate(tokens[1:])]


# ---- sinks ----


def test_the_importance_of_a_key_by_hand() -> None:
    pattern = torch.tensor([[[1.0, 0, 0], [0.5, 0.5, 0], [0.2, 0.3, 0.5]]])
    torch.testing.assert_close(importance(pattern), torch.tensor([[1.7 / 3, 0.8 / 2, 0.5]], dtype=torch.float64))
    n = 64
    alike = (torch.ones(n, n).tril() / torch.arange(1, n + 1)[:, None])[None]
    assert float(importance(alike)[0, 0]) == pytest.approx(sum(1 / t for t in range(1, n + 1)) / n)


@pytest.mark.parametrize("kind", list(CONFIGS))
def test_the_sink_metric_is_that_of_the_papers_loops(
    kind: str, make_tiny: Callable[..., LanguageModel], store: ActivationStore
) -> None:
    """Prompt by prompt, layer by layer, key by key; positions are compared where four queries see them."""
    model, threshold = make_tiny(kind), 0.19 if kind == "mistral" else 0.24  # of which the window hides the first key
    if kind == "llama":  # sharp enough for a query to attend to one key alone, the last ones to themselves
        for each in model._module.model.layers:
            each.self_attn.q_proj.weight.data *= 1e4
    batch = draw(model)
    found = attention_sinks(model, batch, store, 0, threshold=threshold)
    above, first, missing = [], torch.zeros(3, 4), torch.zeros(3, 4)
    by_position: list[list[Tensor]] = [[] for _ in range(max(map(len, batch.clean)) - 3)]
    for tokens in batch.clean:
        n = len(tokens)
        hooks = [block(layer, "attn.hook_pattern") for layer in range(3)]
        run = model.run(tokens[None], capture=hooks)
        patterns = torch.stack([run[hook][0] for hook in hooks])
        first += patterns[..., 0].sum(-1) / n / len(batch)
        missing += (1 - patterns.sum(-1)).mean(-1) / len(batch)
        above.append((patterns[..., 0].mean(-1) > threshold).float())
        for k in range(n - 3):
            by_position[k].append(patterns[:, :, k:, k].mean(-1))
    torch.testing.assert_close(found.first, first, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.on_no_key, missing.clamp_min(0), rtol=1e-3, atol=1e-5)
    assert found.sink == pytest.approx(float(torch.stack(above).mean())) and 0 < found.sink < 1
    means = torch.stack([torch.stack(some).mean(0) for some in by_position], -1)
    torch.testing.assert_close(found.highest, means.amax(-1), rtol=1e-4, atol=1e-5)
    chosen = means.gather(-1, found.strongest[..., None])[..., 0]
    torch.testing.assert_close(chosen, means.amax(-1), rtol=1e-4, atol=1e-5)
    assert found.length == sum(map(len, batch.clean)) / len(batch)
    assert (float(found.on_no_key.min()) > 0.01) == (kind == "weight_sparse")


# ---- massive activations ----


def test_an_activation_is_massive_by_both_thresholds() -> None:
    resid = torch.full((5, 40), 0.1)
    resid[0, 3], resid[2, 7], resid[4, 1] = 150.0, -101.0, 99.0
    assert massive_at(resid, 100.0, 1000.0) == [(0, 3), (2, 7)]
    assert massive_at(resid, 100.0, 1200.0) == [(0, 3)]
    assert massive_at(resid, 50.0, 900.0) == [(0, 3), (2, 7), (4, 1)]
    assert massive_at(100 * resid, 100.0, 1200.0) == [(0, 3)]  # a ratio does not depend on the scale


ENTRIES = [
    Entry(0, 0, 5, 10.0), Entry(1, 0, 5, 14.0), Entry(1, 3, 5, 2.0), Entry(2, 4, 5, 6.0), Entry(2, 0, 9, -7.0),
]  # fmt: skip


def test_means_are_by_channel_and_of_the_first_position_apart() -> None:
    assert [one.value for one in with_means(ENTRIES)] == [12.0, 12.0, 4.0, 4.0, -7.0]
    assert [one[:3] for one in with_means(ENTRIES)] == [one[:3] for one in ENTRIES]
    told = [(one.channel, one.first, one.prompts, one.mean, one.std) for one in by_channel(ENTRIES)]
    assert told == [(5, True, 2, 12.0, 2.0), (5, False, 2, 4.0, 2.0), (9, True, 1, -7.0, 0.0)]


def test_controls_stand_in_as_many_other_channels_at_the_same_positions() -> None:
    seen = set()
    for seed in range(30):
        others = elsewhere(ENTRIES, 12, torch.Generator().manual_seed(seed))
        assert [(one.prompt, one.position, one.value) for one in others] == [(*one[:2], 0.0) for one in ENTRIES]
        assert len({one.channel for one in others}) == 2
        assert others[0].channel == others[3].channel != others[4].channel
        seen |= {one.channel for one in others}
    assert seen == set(range(12)) - {5, 9}
    with pytest.raises(UserError, match="too few for a control"):
        elsewhere([Entry(0, 0, 0, 1.0), Entry(0, 0, 2, 1.0)], 3, torch.Generator())


def test_entries_are_put_in_their_places_and_nowhere_else() -> None:
    x = torch.zeros(2, 5, 12)
    found = placing(ENTRIES, [2, 0])(x)  # the rows of the pass are prompts 2 and 0
    assert found.nonzero().tolist() == [[0, 0, 9], [0, 4, 5], [1, 0, 5]]
    assert found[0, 0, 9] == -7 and found[0, 4, 5] == 6 and found[1, 0, 5] == 10 and not x.any()
    assert placing(ENTRIES, [7])(x) is x


@pytest.fixture
def planted(make_tiny: Callable[..., LanguageModel]) -> LanguageModel:
    """GPT-2 whose first position has 400 in channel 5, whatever the prompt; attention and MLPs write nothing there."""
    model = make_tiny("gpt2", seed=3)
    model._module.transformer.wpe.weight.data[0, 5] = 400.0
    model._module.transformer.wte.weight.data[:, 5] = 0.0
    for each in model._module.transformer.h:
        for part in (each.attn.c_proj, each.mlp.c_proj):
            part.weight.data[:, 5] = part.bias.data[5] = 0.0
    return model


def test_a_planted_activation_is_found_with_its_place_and_value(planted: LanguageModel, store: ActivationStore) -> None:
    batch = draw(planted)
    found = attention_sinks(planted, batch, store, 0)
    assert found.layer == 0 and [(p.channel, p.position) for p in found.peaks] == [(5, 0)] * 3
    (one,) = found.massive
    assert (one.channel, one.first, one.prompts, one.std) == (5, True, 5, 0.0) and one.mean == pytest.approx(400)
    for layer in range(3):
        resid = []
        for tokens in batch.clean:
            hook = block(layer, "hook_resid_post")
            resid.append(planted.run(tokens[None], capture=[hook])[hook][0].abs())
        tops = torch.stack([x.flatten().sort(descending=True).values[:3] for x in resid]).mean(0)
        torch.testing.assert_close(found.largest[layer], tops, rtol=1e-4, atol=1e-4)
        medians = [float(x.median()) for x in resid]
        assert float(found.median[layer]) == pytest.approx(sum(medians) / 5, rel=1e-4)
        assert found.peaks[layer].ratio == pytest.approx(400 / medians[0], rel=0.5)
    first = planted.token_strings(batch.clean[0][:1].tolist())
    assert found.peaks[0].token in {planted.token_strings(t[:1].tolist())[0] for t in batch.clean} and first


def test_what_becomes_of_the_loss_is_what_edited_runs_say(planted: LanguageModel, store: ActivationStore) -> None:
    """Every prompt by itself, the residual stream edited here; and a mean over equal values changes nothing."""
    batch = draw(planted)
    found = attention_sinks(planted, batch, store, 0, threshold=0.2)
    hook = block(0, "hook_resid_post")
    later = [block(layer, "attn.hook_pattern") for layer in (1, 2)]

    def run(edit: Mapping[str | Site, Edit]) -> tuple[float, float]:
        losses, sinks = [], []
        for tokens in batch.clean:
            out = planted.run(tokens[None], capture=later, edit=edit)
            assert out.logits is not None
            losses += nll(out.logits[0], tokens)
            sinks += [float((out[name][0, :, :, 0].mean(-1) > 0.2).float().mean()) for name in later]
        return sum(losses) / len(losses), sum(sinks) / len(sinks)

    def zero(x: Tensor) -> Tensor:
        x = x.clone()
        x[:, 0, 5] = 0
        return x

    edits: dict[str, dict[str | Site, Edit]] = {UNCHANGED: {}, ZERO: {hook: zero}}
    for name, edit in edits.items():
        loss, sinks = run(edit)
        assert found.losses[name] == pytest.approx(loss, abs=1e-4)
        assert found.sinks[name] == pytest.approx(sinks)
    assert found.losses[MEAN] == pytest.approx(found.losses[UNCHANGED], abs=1e-5)
    assert abs(found.losses[ZERO] - found.losses[UNCHANGED]) > 10 * abs(found.losses[CONTROL] - found.losses[UNCHANGED])
    assert list(found.losses) == list(found.sinks) == [UNCHANGED, MEAN, CONTROL, ZERO]


def test_the_first_block_is_where_most_prompts_have_them(planted: LanguageModel, store: ActivationStore) -> None:
    """The channel grows by what the MLP of block 1 adds everywhere; only from there on it is large enough."""
    module = planted._module.transformer.h[1].mlp.c_proj
    module.bias.data[5] = 300.0
    batch = draw(planted)
    found = attention_sinks(planted, batch, store, 0, magnitude=600.0, ratio=500.0)
    assert found.layer == 1 and found.massive[0].mean == pytest.approx(700) and len(found.massive) == 1
    assert attention_sinks(planted, batch, store, 0, magnitude=200.0, ratio=200.0).layer == 0
    last = attention_sinks(planted, batch, store, 0, magnitude=100.0, ratio=1.0)
    assert last.layer == 0  # of several blocks the first


def test_what_only_some_prompts_have_is_seen_and_not_changed(
    make_tiny: Callable[..., LanguageModel], store: ActivationStore, tmp_path: Path
) -> None:
    """-400 in the embedding of a token that fewer than half of the prompts hold; then 300 in that of a common one."""
    model = make_tiny("gpt2", seed=4)
    batch = draw(model)
    words = [set(tokens[1:].tolist()) for tokens in batch.clean]
    held = {word: sum(word in some for some in words) for word in set().union(*words)}
    few = max((n, word) for word, n in held.items() if n <= 2)[1]
    many = min((n, word) for word, n in held.items() if n >= 3)[1]
    model._module.transformer.wte.weight.data[few, 6] = -400.0
    found = attention_sinks(model, batch, store, 0, ratio=300.0)
    assert found.layer is None
    for peak in found.peaks:
        assert (peak.channel, peak.token) == (6, model.token_strings([few])[0]) and peak.position > 0
        assert peak.value == pytest.approx(-400, abs=5)
    model._module.transformer.wte.weight.data[many, 6] = 300.0
    found = attention_sinks(model, batch, ActivationStore(tmp_path / "other"), 0, ratio=300.0)
    assert found.layer == 0 and found.peaks[0].value < -390


def test_without_massive_activations_nothing_is_changed(tiny: LanguageModel, store: ActivationStore) -> None:
    found = attention_sinks(tiny, draw(tiny), store, 0)
    assert found.layer is None and not found.massive and not found.losses and not found.sinks
    assert found.summary()["massive_from_layer"] is None
    figure = plots.figure(found)
    assert len(figure.data) == 6 and not plots.tables(found)
    assert torch.equal(torch.tensor(figure.data[0].z).T, found.first)


def test_after_the_last_block_no_head_is_left(planted: LanguageModel, store: ActivationStore) -> None:
    planted._module.transformer.h[2].mlp.c_proj.bias.data[5] = 900.0
    planted._module.transformer.wpe.weight.data[0, 5] = 0.0
    found = attention_sinks(planted, draw(planted), store, 0, ratio=500.0)
    assert found.layer == 2 and found.sinks == {} and len(found.losses) == 4
    positions = {one.first for one in found.massive}
    assert positions == {True, False} and found.massive[0].prompts == 5  # it is at every position
    (table,) = plots.tables(found)
    assert table.columns["channel"] == ["5", "5"]


def test_another_text_is_read_in_sequences_of_one_length(tiny: LanguageModel, store: ActivationStore) -> None:
    found = attention_sinks(tiny, draw(tiny, 3), store, 4, text="parallel", length=24)
    some = torch.stack(texts.sequences(texts.load("parallel"), tiny, 24, 24 * 3, seed=4)[:3])
    run = tiny.run(some, capture=["blocks.1.attn.hook_pattern"])["blocks.1.attn.hook_pattern"]
    torch.testing.assert_close(found.first[1], run[..., 0].mean(-1).mean(0), rtol=1e-4, atol=1e-5)
    assert found.length == 24.0


def test_what_makes_no_sense_is_refused(tiny: LanguageModel, store: ActivationStore) -> None:
    batch = draw(tiny, 2)
    for given in ({"threshold": 1.0}, {"magnitude": 0.0}, {"ratio": 0.5}, {"controls": 0}):
        with pytest.raises(UserError, match="must be a share"):
            attention_sinks(tiny, batch, store, 0, **given)
    with pytest.raises(UserError, match="one token"):
        attention_sinks(tiny, replace(batch, clean=tuple(tokens[:1] for tokens in batch.clean)), store, 0)


@pytest.mark.slow
def test_a_real_model_needs_its_massive_activation_and_not_its_value(
    smollm: LanguageModel, store: ActivationStore
) -> None:
    """Sun et al. 2024, section 3, in SmolLM2-135M: one channel of the first token from block 11 on."""
    found = attention_sinks(smollm, draw(smollm, 16), store, 0)
    assert found.layer == 11 and [(one.channel, one.first, one.prompts) for one in found.massive] == [(507, True, 16)]
    assert found.massive[0].mean > 10_000 and found.massive[0].std < 0.2 * found.massive[0].mean
    assert found.losses[ZERO] > found.losses[UNCHANGED] + 5
    assert abs(found.losses[MEAN] - found.losses[UNCHANGED]) < 0.1
    assert abs(found.losses[CONTROL] - found.losses[UNCHANGED]) < 0.1
    assert found.sinks[UNCHANGED] > 0.9 > 0.85 > found.sinks[ZERO] and found.sink > 0.7
