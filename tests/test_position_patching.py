"""Position patching against one hooked forward pass per cell, the laws of residual streams, and pairs that anyone
types."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from torch import Tensor

from circuits import position_patching as lab
from circuits import toy_weights
from circuits.position_patching import HOOKS, PositionEffects, draw_pair, read_pair, read_positions, tokenizer_of
from tests.conftest import CONFIGS
from workbench import bundle, plots, pretrained, registry, runs, texts
from workbench.activations import ActivationStore
from workbench.errors import UserError
from workbench.models import LanguageModel
from workbench.prompts import Prompt, Task
from workbench.sites import Site, block

MAKE = Callable[..., LanguageModel]
CLEAN = "When Mary and John went to the store, John gave a book to"
FLIPPED = "When Mary and John went to the store, Mary gave a book to"
THIRD = "When Sarah and John went to the store, Mary gave a book to"
AT = 9  # of the giver
SMALL = "pycode-small-dense"
LOOP: dict[str, Any] = {
    "clean": "with open(a) as b:\n    c = b.read()\nfor d in",
    "corrupted": "with open(a) as b:\n    d = b.read()\nfor c in",
    "right": "range",
    "wrong": "b",
}


def patch(model: LanguageModel, store: ActivationStore, **given: Any) -> PositionEffects:
    return lab.position_patching(model, store, **given)


def last(model: LanguageModel, tokens: Tensor, **options: Any) -> Tensor:
    logits = model.run(tokens[None], **options).logits
    assert logits is not None
    return logits[0, -1].double()


def naive(model: LanguageModel, clean: str, corrupted: str, what: str, direction: str) -> Tensor:
    """The map by one whole forward pass per cell, edited at a site, from nothing that is stored."""
    base, source = (model.tokenize(text) for text in (clean, corrupted))
    base, source = (source, base) if direction == "denoise" else (base, source)
    right, wrong = (int(model.tokenize(clean + answer)[-1]) for answer in (" Mary", " John"))

    def metric(logits: Tensor) -> float:
        return float(logits[right] - logits[wrong])

    ends = [metric(last(model, tokens)) for tokens in (base, source)]
    heads = what == "heads"
    rows = []
    for layer in range(model.config.n_layers):
        hook = block(layer, HOOKS[what])
        values = model.run(source[None], capture=[hook], logits="none")[hook]
        cells = range(model.config.n_heads if heads else len(base))
        row = []
        for cell in cells:
            site = Site(hook, head=cell) if heads else Site(hook, pos=cell)
            value = values[:, :, cell] if heads else values[:, cell]
            row.append(metric(last(model, base, edit={site: lambda _, value=value: value})))
        rows.append(row)
    return (torch.tensor(rows, dtype=torch.float64) - ends[0]) / (ends[1] - ends[0])


# ---- the map ----


@pytest.mark.parametrize("kind", list(CONFIGS))
@pytest.mark.parametrize("what", list(HOOKS))
def test_equals_one_whole_forward_pass_per_cell(kind: str, what: str, make_tiny: MAKE, store: ActivationStore) -> None:
    model = make_tiny(kind)
    direction = "noise" if what in ("attn", "heads") else "denoise"
    found = patch(model, store, clean=CLEAN, corrupted=THIRD, what=what, direction=direction)
    expected = naive(model, CLEAN, THIRD, what, direction)
    tolerance = 5e-5 / abs(found.clean - found.corrupted)  # rounding of the metric, in shares of the difference
    torch.testing.assert_close(found.effect.double(), expected, rtol=1e-3, atol=tolerance)
    assert float(expected.abs().max()) > 100 * tolerance


@pytest.mark.parametrize("direction", ["noise", "denoise"])
def test_a_residual_stream_carries_the_difference_in_at_the_token_and_out_at_the_end(
    direction: str, tiny: LanguageModel, store: ActivationStore
) -> None:
    before = patch(tiny, store, clean=CLEAN, corrupted=FLIPPED, direction=direction).effect
    after = patch(tiny, store, clean=CLEAN, corrupted=FLIPPED, direction=direction, what="resid_post").effect
    other = torch.arange(before.shape[1]) != AT
    assert float(before[0, AT]) == pytest.approx(1, abs=1e-4) and bool((before[0, other] == 0).all())
    assert float(after[-1, -1]) == 1 and bool((after[-1, :-1] == 0).all())
    torch.testing.assert_close(after[:-1], before[1:])  # one stream, read twice
    assert bool((before[:, :AT] == 0).all())  # nothing before the first difference can differ


def test_the_ends_are_the_two_prompts_and_the_metric_is_theirs(tiny: LanguageModel, store: ActivationStore) -> None:
    found = patch(tiny, store, clean=CLEAN, corrupted=FLIPPED, what="resid_post", metric="prob_diff")
    right, wrong = (int(tiny.tokenize(CLEAN + word)[-1]) for word in (" Mary", " John"))
    for text, value in ((CLEAN, found.clean), (FLIPPED, found.corrupted)):
        probs = last(tiny, tiny.tokenize(text)).softmax(-1)
        assert value == pytest.approx(float(probs[right] - probs[wrong]), abs=1e-7)
    assert float(found.metric[-1, -1]) == pytest.approx(found.clean)
    assert float(found.metric[-1, 0]) == pytest.approx(found.corrupted)
    assert (found.right, found.wrong, found.differing) == (" Mary", " John", (AT,))


def test_on_a_linear_model_both_directions_agree_and_positions_add_up(store: ActivationStore) -> None:
    """Heads that attend to everything alike, no MLPs, no norms: the logits are linear in every vector."""
    model = linear()
    given = {"clean": "bos a b c d e", "corrupted": "bos g b f d a", "right": "f", "wrong": "c"}
    for what in ("resid_pre", "attn", "heads"):
        noise, denoise = (patch(model, store, what=what, direction=one, **given).effect for one in ("noise", "denoise"))
        torch.testing.assert_close(noise, denoise, rtol=1e-3, atol=1e-4)
        assert float(noise.abs().max()) > 0.05
        if what == "resid_pre":
            torch.testing.assert_close(noise.sum(1), torch.ones(2), rtol=1e-4, atol=1e-4)


def linear() -> LanguageModel:
    words = ("bos", *"abcdefg")
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) / shape[-1] ** 0.5

    qkv = random(2, 3, 2, 16, 8)
    qkv[:, :2] = 0
    w = toy_weights.Weights(
        words=words, embed=random(8, 16), pos=random(12, 16), qkv=qkv, out=random(2, 2, 8, 16),
        w_in=torch.zeros(2, 16, 4), b_in=torch.zeros(2, 4), w_out=torch.zeros(2, 4, 16), unembed=random(16, 8),
    )  # fmt: skip
    return toy_weights.to_model(w, "linear")


@pytest.mark.parametrize("what", ["resid_pre", "mlp"])
def test_passes_of_any_size_give_the_same(
    what: str, tiny: LanguageModel, store: ActivationStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {"clean": CLEAN, "corrupted": THIRD, "what": what}
    together, before = patch(tiny, store, **given), tiny.forward_passes
    monkeypatch.setattr(lab, "TOKENS_PER_PASS", 1)
    alone = patch(tiny, store, **given)
    torch.testing.assert_close(alone.effect, together.effect, rtol=1e-3, atol=1e-4)
    assert tiny.forward_passes - before > 3 * tiny.config.n_layers


def test_what_cannot_move_anything_is_not_run(tiny: LanguageModel, store: ActivationStore) -> None:
    given = {"clean": CLEAN, "corrupted": FLIPPED, "what": "resid_post"}
    patch(tiny, store, **given)
    before, stored = tiny.forward_passes, store.stats().computed
    patch(tiny, store, **given)
    assert tiny.forward_passes - before == tiny.config.n_layers - 1 and store.stats().computed == stored
    before = tiny.forward_passes
    found = patch(tiny, store, positions="0-3", **given)
    assert tiny.forward_passes == before and bool((found.effect[:, :4] == 0).all())


def test_positions_that_are_left_out_are_empty_and_the_others_as_before(
    tiny: LanguageModel, store: ActivationStore
) -> None:
    given = {"clean": CLEAN, "corrupted": FLIPPED}
    whole, some = patch(tiny, store, **given), patch(tiny, store, positions="9, 11-12,-1", **given)
    kept = torch.tensor(some.positions)
    assert some.positions == (9, 11, 12, len(whole.clean_tokens) - 1)
    torch.testing.assert_close(some.effect[:, kept], whole.effect[:, kept], rtol=1e-3, atol=1e-5)
    assert int(some.effect.isnan().sum()) == some.effect.numel() - tiny.config.n_layers * len(kept)
    assert all(cell.at in some.positions for cell in some.strongest(99))
    every, one = (patch(tiny, store, what="heads", positions=at, **given) for at in ("", "9"))
    assert every.effect.shape == one.effect.shape == (3, 4)
    assert not torch.allclose(every.effect, one.effect, atol=1e-3)


def test_of_a_model_that_adds_a_table_of_its_tokens_the_table_is_never_patched(store: ActivationStore) -> None:
    """Where the last tokens differ, what the table adds is the base's own: the last vector moves less than all."""
    model = LanguageModel.load(SMALL)
    given: dict[str, Any] = {"clean": "with open(a", "corrupted": "with open(b", "right": ")", "wrong": ","}
    found = patch(model, store, what="resid_post", direction="noise", space=False, **given)
    base, source = (model.tokenize(given[side]) for side in ("clean", "corrupted"))
    hook = block(model.config.n_layers - 1, "hook_resid_post")
    value = model.run(source[None], capture=[hook])[hook]
    logits = last(model, base, edit={hook: lambda _: value})
    right, wrong = (model.token_ids(given[side])[0] for side in ("right", "wrong"))
    assert float(found.metric[-1, -1]) == pytest.approx(float(logits[right] - logits[wrong]), abs=1e-5)
    assert float(found.effect[-1, -1]) != pytest.approx(1, abs=1e-3)


# ---- what is refused ----


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"clean": ""}, "the clean prompt is empty"),
        ({"wrong": ""}, "the wrong answer is empty"),
        ({"corrupted": "x" * 10_000_000}, r"has 10,000,000 characters, and at most 20,000"),
        ({"clean": "a\0b"}, "no text"),
        ({"corrupted": "a\ud800b"}, "no text"),
        ({"corrupted": CLEAN}, "both prompts are the same tokens"),
        (
            {"corrupted": CLEAN + " the"},
            r"14 tokens and the corrupted one 15.* 14, its end and ' the': pad or reword",
        ),
        ({"corrupted": FLIPPED.replace("store", "Mary store")}, r"position 7, ' store' and ' Mary'"),
        ({"right": "Mary John"}, r"' Mary John' is 2 tokens \[' Mary', ' John'\]; .* name another word"),
        ({"right": "zz", "space": False}, "try a leading space"),
        ({"right": "John"}, "right and wrong answer are both ' John'"),
        ({"clean": CLEAN + " ", "corrupted": FLIPPED + " ", "space": False}, "one token|is read as tokens"),
        ({"clean": "the" + " store" * 600, "corrupted": "the" + " book" * 600}, "602 tokens, but .* at most 512"),
        ({"positions": "1,x"}, "positions='x' is not understood"),
        ({"positions": "3-99"}, "not in the prompt, which has positions 0 to 13"),
        ({"positions": "5-3"}, "not in the prompt"),
        ({"positions": "-99"}, "not in the prompt"),
    ],
)
def test_a_pair_that_cannot_be_patched_is_one_sentence(
    given: dict[str, Any], says: str, tiny: LanguageModel, store: ActivationStore
) -> None:
    with pytest.raises(UserError, match=says) as refused:
        patch(tiny, store, **{"clean": CLEAN, "corrupted": FLIPPED, **given})
    assert len(str(refused.value)) < 400 and "\n" not in str(refused.value)


def test_prompts_without_a_difference_are_refused(make_tiny: MAKE, store: ActivationStore) -> None:
    model = make_tiny(seed=5)
    weight = model.unembed_weight  # a view: both answers get one logit
    right, wrong = (int(model.tokenize(CLEAN + word)[-1]) for word in (" Mary", " John"))
    weight[:, right] = weight[:, wrong]
    with pytest.raises(UserError, match="logit_diff is 0 on one prompt and 0 on the other"):
        patch(model, store, clean=CLEAN, corrupted=FLIPPED)


def test_an_answer_gets_a_space_only_where_it_has_none(tiny: LanguageModel) -> None:
    pairs = [
        read_pair(tiny, None, CLEAN, FLIPPED, right, " John", space)
        for right, space in (("Mary", True), (" Mary", True), (" Mary", False))
    ]
    assert len({(pair.right, pair.wrong) for pair in pairs}) == 1


def test_positions_are_read() -> None:
    assert read_positions("", 3) == [0, 1, 2] == read_positions(" 0-1 , -1,1", 3)
    assert read_positions("-3,,2", 3) == [0, 2]


# ---- tokenizers and tasks ----


def test_a_tokenizer_alone_reads_as_its_model_does(tiny_folder: str) -> None:
    odd = "  def f(x):\n\treturn x  # é 漢字 🙂 <|endoftext|>"
    for name in (SMALL, "pycode-small", tiny_folder):
        model, alone = LanguageModel.load(name), tokenizer_of(name)
        assert alone is not None and alone.n_ctx == model.config.n_ctx
        for text in (CLEAN, odd, "", *(one.text[:400] for one in texts.load("parallel").documents[:18])):
            ids = model.tokenize(text)
            assert torch.equal(alone.tokenize(text), ids)
            assert alone.token_strings(ids.tolist()) == model.token_strings(ids.tolist())


@pytest.mark.parametrize("name", ["smollm2-135m", "no-such-model", "", "gpt2", "./nothing"])
def test_there_is_no_tokenizer_of_a_model_that_is_not_here(name: str) -> None:
    assert tokenizer_of(name) is None


def test_a_broken_tokenizer_is_a_sentence(tiny_folder: str) -> None:
    (Path(tiny_folder) / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="cannot be read"):
        tokenizer_of(tiny_folder)


@pytest.mark.parametrize("name", registry.tasks())
def test_a_pair_of_every_task_can_be_patched(name: str, tiny: LanguageModel, coder: LanguageModel) -> None:
    task = registry.get_task(name)
    first = task.draw(Random(3))
    model = coder if first.whole else tiny
    pair = draw_pair(task, 3, model)
    assert pair == draw_pair(task, 3, model)
    ids = read_pair(model, None, *pair)
    assert ids.right != ids.wrong
    if not first.whole and len(first.answers) == 1:
        joint = " " if pair.space else ""
        assert (pair.clean, joint + pair.right) == (first.clean, first.answers[0])
        assert draw_pair(task, 3, None) == pair


def test_a_task_that_no_pair_of_fits_says_why(coder: LanguageModel) -> None:
    task = Task("odd", 1, "logit_diff", lambda _: Prompt("a = b", "a = b", (" c",), (" d",)), "")
    with pytest.raises(UserError, match=r"no pair of odd .* both prompts are the same tokens"):
        draw_pair(task, 0, coder)


# ---- figure ----


def result(n: int = 4, heads: bool = False) -> PositionEffects:
    effect = torch.zeros(3, n)
    effect[1, 2], effect[2, 3], effect[0, 0] = 0.75, -0.5, torch.nan
    effect[0, 2], effect[0, 1] = 0.25, 0.01
    tokens = tuple(f" t{i}" for i in range(n))
    return PositionEffects(
        effect, effect * 2 - 1, 1.0, -1.0, (*tokens[:-2], "<i>", "\n"), (*tokens[:-2], "<b>", "\n"), (n - 2,), " a",
        " b", heads, tuple(range(n)), "logit_diff", "what it is",
    )  # fmt: skip


def test_the_map_has_layers_up_tokens_across_and_its_largest_cells_written() -> None:
    fig = plots.figure(result())
    (trace,) = fig.data
    assert trace.z[1][2] == 0.75 and trace.z[0][0] is None and trace.zmin == -0.75 == -trace.zmax
    ticks = fig.layout.xaxis.ticktext
    assert ticks[0] == "t0" and ticks[3] == "↵"
    assert "<b>" in ticks[2] and "&lt;i&gt;" in ticks[2] and "&lt;b&gt;" in ticks[2] and "<i>" not in ticks[2]
    assert [(one.x, one.y, one.text) for one in fig.layout.annotations] == [(2, 1, "+0.75"), (3, 2, "−0.50")]
    (table,) = plots.tables(result())
    assert table.columns["layer"] == ["1", "2", "0", "0"]
    assert table.columns["token"] == ["<i> / <b>", "↵", "<i> / <b>", " t1"]
    assert table.columns["share of the difference"] == ["+0.750", "−0.500", "+0.250", "+0.010"]
    assert plots.definition(result()) == "what it is"


def test_heads_are_named_and_long_prompts_keep_the_ticks_of_what_differs() -> None:
    (table,) = plots.tables(result(heads=True))
    assert table.columns["head"] == ["a1.h2", "a2.h3", "a0.h2", "a0.h1"]
    assert result(heads=True).summary()["top_heads"][:2] == [["a1.h2", 0.75], ["a2.h3", -0.5]]
    written = [(one.x, one.y) for one in plots.figure(result(heads=True)).layout.annotations]
    assert written == [(2, 1), (3, 2), (2, 0)]  # what is hardly anything stays unwritten
    fig = plots.figure(result(300))
    assert len(fig.layout.xaxis.tickvals) < 100 and {298, 299} <= set(fig.layout.xaxis.tickvals)
    nothing = replace(result(heads=True), effect=torch.zeros(3, 4))
    assert plots.tables(nothing) == [] and "top_heads" not in nothing.summary() and plots.figure(nothing).data


def test_a_run_is_found_again_and_its_prompts_are_in_its_record() -> None:
    run = runs.run("position-patching", model=SMALL, **LOOP)
    assert runs.find("position-patching", model=SMALL, **LOOP) is not None
    assert run.record["key"]["parameters"]["clean"] == LOOP["clean"] and pretrained.fingerprint(SMALL)
    assert run.summary["logit_diff_clean"] == pytest.approx(run.result.clean)


def test_the_command_of_a_run_gives_the_run_again() -> None:
    """Also where a parameter has spaces and quotes, and a text has what is the name of a run or a path."""
    words = {"clean": "/x = 1 # it's eap-ioi-0123456789ab\nfor a", "right": " in", "wrong": ":", "space": False}
    found = runs.run(
        "position-patching", model="pycode-small-dense", **words, corrupted=words["clean"][:-5] + "while a"
    )
    flags = shlex.split(found.record["command"])[3:]
    given = dict(zip([flag.removeprefix("--") for flag in flags[::2]], flags[1::2], strict=True))
    assert given["clean"] == words["clean"] and given["right"] == " in"
    again = {name: value for name, value in given.items() if name not in ("model", "seed")}
    assert runs.find("position-patching", model=given["model"], seed=int(given["seed"]), **again).id == found.id
    assert bundle.needs(found) == [] and bundle.plan(found).left_out == {}


def test_a_prompt_is_a_text_and_not_looked_up_as_a_file(tmp_path: Path) -> None:
    """Of other parameters, files that they name decide the result, and belong to the key."""
    (tmp_path / "file").write_text("one")
    name = str(tmp_path / "file")
    chosen = registry.get_analysis("position-patching")
    key = runs.key_of(chosen, None, None, 0, {"clean": f"x, {name}"}, "f00d", "float32-sdpa-cpu")
    assert "contents" not in key and key["parameters"]["clean"] == f"x, {name}"
    named = runs.key_of(registry.get_analysis("latents"), None, None, 0, {"text": name}, "f00d", "float32-sdpa-cpu")
    assert name in named["contents"]
