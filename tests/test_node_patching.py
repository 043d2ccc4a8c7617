"""Nodes patched alone and together, against patching one by one, against whole runs, and by laws of what adds up."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from circuits import node_patching
from circuits.features import ERROR
from circuits.figures import patched_nodes_figure
from circuits.graph import nodes_of
from circuits.node_patching import PatchedNodes, patch_nodes
from circuits.patching import patching
from tests.conftest import Wb
from workbench import bases, registry, sites
from workbench.activations import ActivationStore
from workbench.errors import UserError
from workbench.models import LanguageModel
from workbench.prompts import Batch, sample


def drawn(model: LanguageModel, n: int = 6) -> Batch:
    return sample(registry.get_task("ioi"), model, n, seed=1)


@pytest.mark.parametrize(("kind", "direction"), [("llama", "noise"), ("llama", "denoise"), ("gemma3_text", "noise")])
def test_alone_is_what_patching_says_of_each(make_tiny: Any, store: ActivationStore, kind: str, direction: Any) -> None:
    model: LanguageModel = make_tiny(kind)
    batch, names = drawn(model), ("a0.h3", "a1.h2", "m1", "m2")
    found = patch_nodes(model, batch, store, nodes=", ".join(names), direction=direction)
    one = patching(model, batch, store, direction=direction)
    assert one.per_prompt is not None
    rows = one.per_prompt[[one.nodes.index(name) for name in names]]
    moved = found.alone - found.unpatched
    torch.testing.assert_close(moved if direction == "denoise" else -moved, rows, rtol=1e-4, atol=1e-5)
    ends = {side: batch.score(_logits(model, tokens)) for side, tokens in _sides(batch).items()}
    first, second = ("clean", "corrupted") if direction == "noise" else ("corrupted", "clean")
    torch.testing.assert_close(found.unpatched, ends[first], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.other, ends[second], rtol=1e-4, atol=1e-5)


def _sides(batch: Batch) -> dict[str, Any]:
    return {"clean": batch.clean, "corrupted": batch.corrupted}


def _logits(model: LanguageModel, tokens: Any) -> torch.Tensor:
    rows = []
    for one in tokens:
        logits = model.run(one[None]).logits
        assert logits is not None
        rows.append(logits[0, -1])
    return torch.stack(rows)


def test_all_nodes_and_what_is_put_in_make_the_other_run(tiny: LanguageModel, store: ActivationStore) -> None:
    """Everything that is written but the embeddings, which the prompts share where only a name in the middle differs:
    at the last position the residual stream is then the other run's."""
    batch = drawn(tiny)
    every = nodes_of(tiny.config.n_layers, tiny.config.n_heads)
    found = patch_nodes(tiny, batch, store, nodes=",".join(every))
    assert all(bool(a[-1] == b[-1]) for a, b in zip(batch.clean, batch.corrupted, strict=True))
    torch.testing.assert_close(found.together, found.other, rtol=1e-4, atol=1e-5)
    share, low, high = (float(x[-1]) for x in found.share())
    assert (share, low, high) == pytest.approx((1, 1, 1), abs=1e-3)


def test_together_is_one_run_with_all_edits(tiny: LanguageModel, store: ActivationStore) -> None:
    batch = drawn(tiny)
    found = patch_nodes(tiny, batch, store, nodes="a0.h1,a2.h0,m1")
    expected = []
    for clean, corrupted in zip(batch.clean, batch.corrupted, strict=True):
        hooks = ["blocks.0.attn.hook_z", "blocks.2.attn.hook_z", "blocks.1.hook_mlp_out"]
        other = tiny.run(corrupted[None], capture=hooks)

        def head(x: torch.Tensor, layer: int, index: int, other: Any = other) -> torch.Tensor:
            x = x.clone()
            x[:, :, index] = other[f"blocks.{layer}.attn.hook_z"][:, :, index]
            return x

        edit: Any = {
            hooks[0]: lambda x, head=head: head(x, 0, 1),
            hooks[1]: lambda x, head=head: head(x, 2, 0),
            hooks[2]: lambda x, other=other: other["blocks.1.hook_mlp_out"],
        }
        logits = tiny.run(clean[None], edit=edit).logits
        assert logits is not None
        expected.append(logits[0, -1])
    torch.testing.assert_close(found.together, batch.score(torch.stack(expected)), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found.together - found.unpatched, (found.alone - found.unpatched).sum(0), atol=1e-6)


def test_a_latent_is_moved_along_what_it_decodes_to(tiny: LanguageModel, store: ActivationStore) -> None:
    """A neuron by itself; all coordinates of a rotation, or an error alone, as the tensor they are of."""
    batch, layer = drawn(tiny), 1
    post = sites.block(layer, "mlp.hook_post")
    found = patch_nodes(tiny, batch, store, nodes=f"{post}/3,{post}/5", basis="neurons")
    expected = []
    for clean, corrupted in zip(batch.clean, batch.corrupted, strict=True):
        other = tiny.run(corrupted[None], capture=[post])[post]

        def two(x: torch.Tensor, other: torch.Tensor = other) -> torch.Tensor:
            x = x.clone()
            x[..., [3, 5]] = other[..., [3, 5]]
            return x

        logits = tiny.run(clean[None], edit={post: two}).logits
        assert logits is not None
        expected.append(logits[0, -1])
    torch.testing.assert_close(found.together, batch.score(torch.stack(expected)), rtol=1e-4, atol=1e-5)
    out = sites.block(layer, "hook_mlp_out")
    every = ",".join(f"{out}/{i}" for i in range(tiny.config.d_model))
    whole = patch_nodes(tiny, batch, store, nodes=f"{every}", basis="rotation:3")
    torch.testing.assert_close(whole.together, _mlp(tiny, batch, store, layer), rtol=1e-3, atol=1e-4)
    nothing = patch_nodes(tiny, batch, store, nodes=f"{out}/{ERROR}", basis="rotation:3")  # which misses nothing
    torch.testing.assert_close(nothing.together, nothing.unpatched, rtol=1e-3, atol=1e-4)


def _mlp(model: LanguageModel, batch: Batch, store: ActivationStore, layer: int) -> torch.Tensor:
    return patch_nodes(model, batch, store, nodes=f"m{layer}").together


class Half:
    """A basis that has the first coordinates and misses the rest."""

    n_latents = 8

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        return x[..., : self.n_latents]

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.pad(latents, (0, 32 - self.n_latents))


def test_what_a_basis_has_and_misses_is_the_whole(
    tiny: LanguageModel, store: ActivationStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch, out = drawn(tiny), sites.block(1, "hook_mlp_out")
    assert tiny.config.d_model == 32
    monkeypatch.setitem(bases._loaders, "half", lambda model, argument: {out: Half()})
    every = ",".join(f"{out}/{i}" for i in [*range(8), ERROR])
    found = patch_nodes(tiny, batch, store, nodes=every, basis="half")
    torch.testing.assert_close(found.together, _mlp(tiny, batch, store, 1), rtol=1e-4, atol=1e-5)
    for some in ([*range(8)], [ERROR]):  # neither does it alone
        part = patch_nodes(tiny, batch, store, nodes=",".join(f"{out}/{i}" for i in some), basis="half")
        assert not torch.allclose(part.together, found.together, atol=1e-5)
    both = patch_nodes(tiny, batch, store, nodes=f"m1,{out}/0", basis="half")  # the whole has its part
    torch.testing.assert_close(both.together, _mlp(tiny, batch, store, 1), rtol=1e-4, atol=1e-5)


def test_shares_and_their_words_by_hand() -> None:
    found = PatchedNodes(
        ("a0.h0", "m0"), "noise", torch.tensor([2.0, 4.0]), torch.tensor([0.0, 0.0]),
        torch.tensor([[1.0, 2.0], [2.0, 4.0]]), torch.tensor([2.0, 0.0]), "by hand", "logit_diff",
    )  # fmt: skip
    share, low, high = found.share()
    assert share.tolist() == pytest.approx([0.5, 0.0, 4 / 6])  # a ratio of means, not a mean of ratios (.5)
    assert (low[0], high[0]) == pytest.approx((0.5, 0.5)) and low[2] == 0 and high[2] == 1
    told = found.summary()
    assert told["share"] == {"a0.h0": 0.5, "m0": 0.0, "together": 0.6667}
    assert told["logit_diff_unpatched"] == 3 and told["logit_diff_patched"]["together"] == 1
    drawn = patched_nodes_figure(found)
    assert list(drawn.data[0].y) == ["a0.h0", "m0", "together"] and drawn.data[0].x[0] == 0.5


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"nodes": " , "}, "no node is named"),
        ({"nodes": "a9.h0"}, "no node of this model is called 'a9.h0'"),
        ({"nodes": "input"}, "no node of this model is called 'input'"),
        ({"nodes": "blocks.0.hook_mlp_out/1"}, "is a latent, and of no basis"),
        ({"nodes": "blocks.9.hook_mlp_out/1", "basis": "rotation:0"}, "no hook point of the basis"),
        ({"nodes": "blocks.0.hook_mlp_out/32", "basis": "rotation:0"}, "give 0 to 31, or error"),
        ({"nodes": "blocks.0.hook_mlp_out/-1", "basis": "rotation:0"}, "give 0 to 31, or error"),
        ({"nodes": "a0.h0", "basis": "nothing"}, "no basis is called 'nothing'"),
    ],
)
def test_what_is_no_node_is_refused(tiny: LanguageModel, store: ActivationStore, given: Any, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        patch_nodes(tiny, drawn(tiny), store, **given)


def test_no_difference_is_no_share(
    tiny: LanguageModel, store: ActivationStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    same = node_patching._Pair.unpatched
    monkeypatch.setattr(node_patching._Pair, "unpatched", lambda self: (same(self)[0],) * 2)
    with pytest.raises(UserError, match="no difference that a node could carry"):
        patch_nodes(tiny, drawn(tiny), store)


def test_from_the_terminal(wb: Wb, tiny_folder: str) -> None:
    code, out, _ = wb("run", "patch-nodes", f"--model={tiny_folder}", "--nodes=a0.h0,m1", "--n=6")
    assert code == 0 and "a0.h0" in out and "together" in out
