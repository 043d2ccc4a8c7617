"""Laws of the forward pass, against Hugging Face and TransformerLens."""

from __future__ import annotations

import copy
import sys
import threading
import types
from collections.abc import Callable

import pytest
import torch

from tests.conftest import CONFIGS
from workbench import sites
from workbench.architectures import FAMILIES as FAMILIES_OF_THE_TABLE
from workbench.errors import UserError
from workbench.interventions import resample, steer, zero
from workbench.models import LanguageModel, Resume
from workbench.sites import Site, block

FAMILIES = list(CONFIGS)
Make = Callable[..., LanguageModel]


def tokens_of(model: LanguageModel, batch: int = 3, pos: int = 12, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(model.config.d_vocab, (batch, pos), generator=generator)


def test_every_family_of_the_table_is_tested() -> None:
    assert set(CONFIGS) == set(FAMILIES_OF_THE_TABLE)


@pytest.mark.parametrize("kind", FAMILIES)
def test_capture_equals_hugging_face_hidden_states(kind: str, make_tiny: Make) -> None:
    model = make_tiny(kind)
    tokens = tokens_of(model)
    hooks = [block(0, "hook_resid_pre"), *(block(layer, "hook_resid_post") for layer in range(2))]
    ours = model.run(tokens, capture=[*hooks, block(2, "hook_resid_post")])
    with torch.no_grad():
        plain = model._module(tokens, output_hidden_states=True, use_cache=False)
    for hook, hidden in zip(hooks, plain.hidden_states, strict=False):
        torch.testing.assert_close(ours[hook], hidden, rtol=0, atol=1e-5)
    # the library's last hidden state comes after the final norm
    torch.testing.assert_close(model.final_norm(ours[block(2, "hook_resid_post")]), plain.hidden_states[-1])
    logits = model.unembed(ours[block(2, "hook_resid_post")], tokens)
    torch.testing.assert_close(logits, plain.logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", FAMILIES)
def test_self_check_passes_for_every_family_and_fails_for_a_wrong_table(kind: str, make_tiny: Make) -> None:
    model = make_tiny(kind)
    assert model.self_check()["residual_sum_error"] < 1e-5
    wrong = dict(model._family.hooks) | {"hook_mlp_out": model._family.hooks["mlp.hook_post"]}
    if kind != "gemma3_text":
        return
    wrong["hook_mlp_out"] = ("mlp", "out")  # before the post-norm: not what is added to the residual stream
    model._family = model._family.__class__(**{**vars(model._family), "hooks": wrong})
    with pytest.raises(UserError, match="does not add up"):
        model.self_check()


@pytest.mark.parametrize("kind", [kind for kind in FAMILIES if "sparse" not in kind])  # it has none like these
def test_every_hook_point_agrees_with_transformer_lens(kind: str, make_tiny: Make) -> None:
    """An independent implementation captures the same tensors under the same names."""
    bridge_module = pytest.importorskip("transformer_lens.model_bridge")
    model = make_tiny(kind)
    tokens = tokens_of(model, batch=2, pos=10)
    shared = [h for h in model.hook_points if not h.endswith("hook_result")]
    ours = model.run(tokens, capture=shared)
    module = copy.deepcopy(model._module)  # theirs to change
    module.set_attn_implementation("eager")
    module.config.architectures = [type(module).__name__]
    tokenizer = copy.deepcopy(model.tokenizer)
    tokenizer.init_kwargs["name_or_path"] = "tiny"
    boot = bridge_module.TransformerBridge.boot_transformers
    _, cache = boot(f"tiny-{kind}", hf_model=module, tokenizer=tokenizer).run_with_cache(tokens)
    compared = 0
    for hook in shared:
        if hook not in cache:
            continue
        theirs, mine = cache[hook], ours[hook]
        if theirs.shape != mine.shape:  # some of their hooks keep heads flat
            theirs = theirs.reshape(mine.shape)
        if hook.endswith("attn_scores"):  # masked entries differ in how minus infinity is spelled
            theirs, mine = theirs[mine.isfinite()], mine[mine.isfinite()]
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4, msg=lambda m, hook=hook: f"{hook}: {m}")
        compared += 1
    assert compared >= 8 * model.config.n_layers, f"only {compared} hook points were compared"


@pytest.mark.parametrize("kind", FAMILIES)
def test_reading_changes_nothing(kind: str, make_tiny: Make) -> None:
    model = make_tiny(kind)
    tokens = tokens_of(model)
    alone = model.run(tokens).logits
    watched = model.run(tokens, capture=model.hook_points).logits
    torch.testing.assert_close(watched, alone, rtol=0, atol=0)


@pytest.mark.parametrize("kind", FAMILIES)
def test_identity_and_strength_zero_edits_change_nothing(kind: str, make_tiny: Make) -> None:
    model = make_tiny(kind)
    tokens = tokens_of(model)
    plain = model.run(tokens).logits
    for hook in model.hook_points:
        if sites.split(hook)[1] in sites.PATTERN_HOOKS:
            continue
        edited = model.run(tokens, edit={hook: steer(torch.ones(1), 0.0)}).logits
        torch.testing.assert_close(edited, plain, rtol=0, atol=0, msg=hook)
    # an edited pattern takes the explicit attention path: equal to rounding
    edited = model.run(tokens, edit={block(1, "attn.hook_pattern"): lambda x: x}).logits
    torch.testing.assert_close(edited, plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", FAMILIES)
def test_an_edit_is_seen_by_what_comes_after_and_by_nothing_before(kind: str, make_tiny: Make) -> None:
    model = make_tiny(kind)
    tokens = tokens_of(model)
    before, after = block(0, "hook_resid_post"), block(2, "hook_resid_post")
    plain = model.run(tokens, capture=[before, after])
    for name in ("hook_resid_pre", "attn.hook_z", "attn.hook_result", "hook_attn_out", "hook_mlp_out", "attn.hook_v"):
        edited = model.run(tokens, capture=[before, after], edit={block(1, name): zero()})
        assert torch.equal(edited[before], plain[before]), name
        assert not torch.allclose(edited[after], plain[after]), name


@pytest.mark.parametrize("kind", FAMILIES)
def test_zeroing_one_head_equals_taking_its_result_away(kind: str, make_tiny: Make) -> None:
    model = make_tiny(kind)
    tokens = tokens_of(model)
    z, result = block(1, "attn.hook_z"), block(1, "attn.hook_result")
    out = block(1, "hook_resid_post")
    by_z = model.run(tokens, capture=[out], edit={Site(z, head=2): zero()})[out]
    by_result = model.run(tokens, capture=[out], edit={Site(result, head=2): zero()})[out]
    torch.testing.assert_close(by_z, by_result, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", FAMILIES)
def test_an_edit_of_the_stream_reaches_what_is_added_later_and_one_of_the_mlp_input_does_not(
    kind: str, make_tiny: Make
) -> None:
    """`hook_resid_mid` as in TransformerLens: what the block adds to. `hook_mlp_in`: what its MLP reads, alone."""
    model = make_tiny(kind)
    direction = torch.linspace(-1, 1, 32)  # no constant: LayerNorm would take it away again
    tokens, shift = tokens_of(model), steer(direction, 0.5)
    wanted = [block(1, name) for name in ("hook_mlp_in", "hook_mlp_out", "hook_resid_post")]
    plain = model.run(tokens, capture=wanted)
    by_input = model.run(tokens, capture=wanted, edit={wanted[0]: shift})
    torch.testing.assert_close(by_input[wanted[0]], plain[wanted[0]] + 0.5 * direction)
    graph = model.run(tokens, capture=wanted, grad=True)
    (slope,) = torch.autograd.grad(graph[wanted[2]].sum() - graph[wanted[1]].sum(), graph[wanted[0]], allow_unused=True)
    assert slope is None or float(slope.abs().max()) < 1e-5  # none of the gradient goes past the MLP
    change = by_input[wanted[1]] - plain[wanted[1]]
    assert float(change.abs().max()) > 1e-3
    torch.testing.assert_close(by_input[wanted[2]], plain[wanted[2]] + change, rtol=1e-4, atol=1e-5)
    if block(1, "hook_resid_mid") not in model.hook_points:  # parallel attention and MLP
        return
    by_stream = model.run(tokens, capture=wanted, edit={block(1, "hook_resid_mid"): shift})
    torch.testing.assert_close(by_stream[wanted[1]], by_input[wanted[1]])
    torch.testing.assert_close(by_stream[wanted[2]], by_input[wanted[2]] + 0.5 * direction, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", FAMILIES)
def test_ungrouped_keys_and_values_are_copies_that_change_nothing_until_edited(kind: str, make_tiny: Make) -> None:
    model = make_tiny(kind)
    c, tokens = model.config, tokens_of(model)
    k, v, z = (block(1, f"attn.hook_{name}") for name in "kvz")
    plain = model.run(tokens, capture=[k, v, z])
    apart = model.run(tokens, capture=[k, v, z], ungroup=True)
    torch.testing.assert_close(apart.logits, plain.logits, rtol=1e-5, atol=1e-5)
    groups = c.n_heads // c.n_kv_heads
    for hook in (k, v):
        torch.testing.assert_close(apart[hook], plain[hook].repeat_interleave(groups, 2))
    one = model.run(tokens, capture=[z], ungroup=True, edit={Site(v, head=2): zero()})[z]
    assert not one[:, :, 2].any() and torch.allclose(one[:, :, 3], plain[z][:, :, 3], atol=1e-6)


@pytest.mark.parametrize("kind", FAMILIES)
def test_weights_make_queries_keys_and_values_from_the_normed_stream(kind: str, make_tiny: Make) -> None:
    model = make_tiny(kind)
    hooks = [block(1, f"attn.hook_{name}") for name in "qkv"]
    found = model.run(tokens_of(model), capture=[block(1, "hook_resid_pre"), *hooks], ungroup=True)
    weight, bias = model.in_weights(1)
    normed = model.attention_norm(1)(found[block(1, "hook_resid_pre")])
    for i, hook in enumerate(hooks):
        by_hand = torch.einsum("bpm,hdm->bphd", normed, weight[i]) + bias[i]
        torch.testing.assert_close(by_hand, found[hook], rtol=1e-4, atol=1e-5)


def test_result_sums_to_attention_out(tiny: LanguageModel) -> None:
    tokens = tokens_of(tiny)
    result, out = block(1, "attn.hook_result"), block(1, "hook_attn_out")
    found = tiny.run(tokens, capture=[result, out])
    torch.testing.assert_close(found[result].sum(2), found[out], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("prefix", [0, 4])
def test_resuming_equals_running_from_the_start(kind: str, prefix: int, make_tiny: Make) -> None:
    """Starting at block 1 with stored residuals, with or without a stored prefix, gives the full run's logits."""
    model = make_tiny(kind)
    tokens = tokens_of(model, pos=14)  # longer than Gemma's window of 8
    keys = "attn.hook_rot_k" if block(0, "attn.hook_rot_k") in model.hook_points else "attn.hook_k"
    wanted = [block(layer, name) for layer in range(3) for name in ("hook_resid_pre", keys, "attn.hook_v")]
    full = model.run(tokens, capture=wanted)
    past = {
        layer: (full[block(layer, keys)][:, :prefix], full[block(layer, "attn.hook_v")][:, :prefix]) for layer in (1, 2)
    }
    start = Resume(1, full[block(1, "hook_resid_pre")][:, prefix:], past if prefix else {})
    resumed = model.run(tokens, start=start)
    assert full.logits is not None and resumed.logits is not None
    torch.testing.assert_close(resumed.logits, full.logits[:, prefix:], rtol=1e-4, atol=1e-5)


def test_captured_tensors_are_copies(tiny: LanguageModel) -> None:
    """Mutation canary: what a later step does in place does not reach what was captured before."""
    tokens = tokens_of(tiny)
    before, after = block(0, "hook_resid_post"), block(1, "hook_resid_pre")  # one and the same tensor in the model
    kept = tiny.run(tokens, capture=[before])[before]
    mutated = tiny.run(tokens, capture=[before], edit={after: lambda x: x.mul_(2)})
    assert torch.equal(mutated[before], kept)


def test_site_picks_head_and_position(tiny: LanguageModel) -> None:
    tokens = tokens_of(tiny)
    z = block(1, "attn.hook_z")
    picked = Site(z, head=3, pos=-1)
    found = tiny.run(tokens, capture=[z, picked], logits="none")
    assert torch.equal(found[picked], found[z][:, -1, 3])


def test_gradients_reach_captured_sites(tiny: LanguageModel) -> None:
    """The gradient at a site predicts the effect of a small edit there."""
    tokens = tokens_of(tiny, batch=1)
    site = Site(block(1, "attn.hook_z"), head=1)
    out = tiny.run(tokens, capture=[site], grad=True)
    assert out.logits is not None
    (slope,) = torch.autograd.grad(out.logits[0, -1, 5].double(), out[site])
    step = 1e-2 * torch.randn(slope.shape, generator=torch.Generator().manual_seed(1))
    moved = [tiny.run(tokens, edit={site: lambda x, s=sign: x + s * step}).logits for sign in (1, -1)]
    difference = float((moved[0] - moved[1])[0, -1, 5]) / 2
    assert difference == pytest.approx(float((slope * step).sum()), rel=0.02)


def test_two_threads_never_see_each_others_rows(tiny: LanguageModel) -> None:
    hook = block(2, "hook_resid_post")
    inputs = {seed: tokens_of(tiny, batch=2, pos=9 + seed % 3, seed=seed) for seed in range(6)}
    truth = {seed: tiny.run(tokens, capture=[hook])[hook] for seed, tokens in inputs.items()}
    wrong: list[int] = []

    def work(seed: int) -> None:
        for _ in range(20):
            found = tiny.run(inputs[seed], capture=[hook], edit={block(0, "hook_mlp_out"): steer(torch.ones(1), 0.0)})
            if not torch.equal(found[hook], truth[seed]):
                wrong.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in inputs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_nothing_is_left_behind_after_a_failed_run(tiny: LanguageModel) -> None:
    tokens = tokens_of(tiny)
    plain = tiny.run(tokens).logits

    def broken(x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("boom")

    for hook in (block(1, "attn.hook_z"), block(1, "hook_mlp_out")):
        with pytest.raises(RuntimeError):
            tiny.run(tokens, edit={hook: broken})
    assert torch.equal(tiny.run(tokens).logits, plain)  # type: ignore[arg-type]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in tiny._module.modules())


def test_forward_passes_are_counted_and_stop_early(tiny: LanguageModel) -> None:
    seen: list[int] = []
    handle = tiny._module.get_submodule("model.layers")[2].register_forward_hook(lambda *_: seen.append(1))
    before = tiny.forward_passes
    tiny.run(tokens_of(tiny), capture=[block(0, "hook_resid_post")], logits="none")
    handle.remove()
    assert tiny.forward_passes == before + 1 and not seen


@pytest.mark.parametrize("kind", FAMILIES)
def test_stopping_at_any_hook_point_has_seen_all_before_it(kind: str, make_tiny: Make) -> None:
    """The order in `sites` is the order of computation, so a run never stops too early."""
    model = make_tiny(kind)
    tokens = tokens_of(model, batch=1, pos=6)
    in_order = [hook for hook in model.hook_points if sites.depth(hook)[0] <= 1]
    assert sorted(in_order, key=sites.depth) == in_order
    for last in range(1, len(in_order) + 1):
        found = model.run(tokens, capture=in_order[:last], logits="none")
        assert found.activations.keys() == set(in_order[:last])


def test_resample_replaces(tiny: LanguageModel) -> None:
    a, b = tokens_of(tiny, seed=1), tokens_of(tiny, seed=2)
    hook = block(2, "hook_resid_post")
    source = tiny.run(b, capture=[hook])
    patched = tiny.run(a, edit={hook: resample(source[hook])})
    torch.testing.assert_close(patched.logits, source.logits)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"capture": ["blocks.1.hook_resid_pots"]}, "did you mean 'blocks.1.hook_resid_post'"),
        ({"capture": ["blocks.9.hook_resid_post"]}, "no hook point"),
        ({"capture": [Site("blocks.1.attn.hook_z", head=4)]}, "heads 0 to 3, not 4"),
        ({"capture": [Site("blocks.1.attn.hook_k", head=2)]}, "heads 0 to 1, not 2"),
        ({"edit": {"blocks.1.hook_mlp_out": lambda x: x[:1]}}, "must keep the shape"),
        ({"capture": ["blocks.2.hook_mlp_out"], "stop_after": "blocks.1.hook_mlp_out"}, "never be reached"),
    ],
)
def test_bad_requests_are_one_sentence(tiny: LanguageModel, arguments: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        tiny.run(tokens_of(tiny), **arguments)


def test_text_longer_than_the_context_and_empty_text_are_refused(tiny: LanguageModel) -> None:
    with pytest.raises(UserError, match="reads at most 512"):
        tiny.run(tokens_of(tiny, pos=513))
    with pytest.raises(UserError, match="neither zero"):
        tiny.run(torch.zeros(1, 0, dtype=torch.long))
    with pytest.raises(UserError, match="own tokenizer"):
        tiny.run(torch.tensor([[tiny.config.d_vocab]]))


@pytest.mark.parametrize("step", [5, pytest.param(1, marks=pytest.mark.slow)])
def test_an_interrupt_at_any_line_of_a_pass_changes_no_later_one(step: int, make_tiny: Make) -> None:
    """Ctrl-C while an edited, resumed or captured pass begins, runs or ends: what it installed is gone afterwards."""
    model = make_tiny()
    tokens, out = tokens_of(model, batch=1, pos=4), block(2, "hook_resid_post")
    truth = model.run(tokens, capture=[out])[out]
    resid = model.run(tokens, capture=[block(1, "hook_resid_pre")], logits="none")[block(1, "hook_resid_pre")]
    edit = {block(1, "attn.hook_z"): zero(), block(0, "hook_resid_post"): steer(torch.ones(32), 3.0)}

    def passes() -> None:
        model.run(tokens, capture=[out, block(1, "attn.hook_pattern"), block(1, "hook_resid_mid")], edit=edit)
        model.run(tokens, capture=[out], start=Resume(1, resid + 1))

    def interrupted_after(lines: int) -> bool:
        left = lines

        def trace(frame: types.FrameType, event: str, _: object) -> Callable[..., object] | None:
            nonlocal left
            if not frame.f_code.co_filename.endswith(
                ("backend.py", "workbench/attention.py", "workbench/models.py", "contextlib.py")
            ):
                return None
            if event == "line":
                left -= 1
                if left == 0:
                    raise KeyboardInterrupt
            return trace

        sys.settrace(trace)
        try:
            passes()
        except KeyboardInterrupt:
            return True
        finally:
            sys.settrace(None)
        return False

    lines = 1
    while interrupted_after(lines):
        assert torch.equal(model.run(tokens, capture=[out])[out], truth), f"interrupted at line {lines}"
        assert not [name for part in model._module.modules() for name in part.__dict__ if name == "workbench_taps"]
        assert not [fn for part in model._module.modules() for fn in part._forward_hooks.values()]
        lines += step
    assert lines > 500  # a pass has as many


def test_an_edit_that_runs_the_model_is_refused(tiny: LanguageModel) -> None:
    """It would see the outer pass' hooks, or take them away."""
    tokens = tokens_of(tiny)

    def nested(x: torch.Tensor) -> torch.Tensor:
        tiny.run(tokens)
        return x

    with pytest.raises(UserError, match="an edit cannot run it again"):
        tiny.run(tokens, edit={block(1, "attn.hook_z"): nested})
    tiny.run(tokens)
