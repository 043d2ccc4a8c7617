"""Attribution to latents: adds up to the activation's, equals ablation to first order, keeps what a basis misses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from circuits.attribution import attribution_patching
from circuits.features import ERROR, attribute, connect, feature_attribution, feature_circuit
from tests.test_attribution import draw
from workbench import bases
from workbench.activations import ActivationStore
from workbench.errors import UserError
from workbench.models import LanguageModel
from workbench.sites import block

Make = Callable[..., LanguageModel]


@dataclass(frozen=True)
class Relu:
    """An incomplete dictionary with a ReLU encoder: fewer latents than the width."""

    weight: Tensor
    n_latents: int

    def encode(self, x: Tensor) -> Tensor:
        return torch.relu(x @ self.weight)

    def decode(self, latents: Tensor) -> Tensor:
        return latents @ self.weight.T


def incomplete(model: LanguageModel) -> dict[str, Relu]:
    generator = torch.Generator().manual_seed(0)
    return {
        block(layer, "hook_mlp_out"): Relu(torch.randn(model.config.d_model, 12, generator=generator), 12)
        for layer in range(model.config.n_layers)
    }


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2"])
def test_latents_and_error_add_up_to_the_node(kind: str, make_tiny: Make, store: ActivationStore) -> None:
    """Whatever the dictionary: rotation (no error), and one that misses much."""
    model = make_tiny(kind)
    batch = draw(model)
    nodes = attribution_patching(model, batch, store)
    expected = torch.tensor(list(nodes.mlps().values()))
    for found in (
        feature_attribution(model, batch, store, basis="rotation:0"),
        attribute(model, batch, store, incomplete(model)),
    ):
        total = torch.stack([row.sum() for row in found.latents]) + found.errors
        torch.testing.assert_close(total, expected, rtol=1e-3, atol=1e-5)
    assert float(found.errors.abs().max()) > 1e-4  # the incomplete one


def test_a_complete_basis_misses_nothing(tiny: LanguageModel, store: ActivationStore) -> None:
    found = feature_attribution(tiny, draw(tiny), store, basis="neurons")
    assert not found.errors.any() and len(found.latents[0]) == tiny.config.d_mlp
    assert found.summary()["errors_share"] == 0


def test_a_neurons_score_predicts_a_small_ablation(tiny: LanguageModel, store: ActivationStore) -> None:
    batch = draw(tiny)
    found = feature_attribution(tiny, batch, store)
    name, score = found.top(1)[0]
    hook, _, which = name.rpartition("/")
    i, step, changes = int(which), 1e-2, []
    for sign in (1, -1):
        total = 0.0
        for k in range(len(batch)):
            source = tiny.run(batch.corrupted[k][None], capture=[hook])[hook]

            def nudge(x: Tensor, source: Tensor = source, sign: int = sign) -> Tensor:
                x = x.clone()
                x[..., i] += sign * step * (source[..., i] - x[..., i])
                return x

            logits = tiny.run(batch.clean[k][None], edit={hook: nudge}).logits
            assert logits is not None
            total += float(batch.select([k]).score(logits[:, -1])) / len(batch)
        changes.append(total)
    assert (changes[1] - changes[0]) / (2 * step) == pytest.approx(score, rel=0.05)


def test_many_steps_between_activations_give_the_exact_effect_of_a_site(
    tiny: LanguageModel, store: ActivationStore
) -> None:
    """Integrated gradients are complete: latents and error of one site sum to what patching the site changes."""
    batch = draw(tiny, n=2)
    hook = block(2, "hook_mlp_out")
    found = attribute(tiny, batch, store, {hook: incomplete(tiny)[hook]}, steps=16)
    truth = 0.0
    for k in range(len(batch)):
        source = tiny.run(batch.corrupted[k][None], capture=[hook])[hook]
        pair = [tiny.run(batch.clean[k][None], edit=edit).logits for edit in (None, {hook: lambda _, s=source: s})]
        one = batch.select([k])
        truth += float(one.score(pair[0][:, -1]) - one.score(pair[1][:, -1])) / len(batch)  # type: ignore[index]
    assert float(found.latents[0].sum() + found.errors[0]) == pytest.approx(truth, rel=1e-2, abs=1e-5)


def test_edges_into_the_logits_are_the_direct_part_of_the_last_site(
    tiny: LanguageModel, store: ActivationStore
) -> None:
    """After the last MLP there is no detour: the edge to the logits is the node's whole score."""
    batch = draw(tiny)
    found = feature_circuit(tiny, batch, store, basis="neurons", top=30, edges=1000)
    scored = dict(feature_attribution(tiny, batch, store).top(30))
    last = [name for name in scored if name.startswith("blocks.2.")]
    assert last
    for name in last:
        i = found.graph.index[f"{name}->logits"]
        assert found.weights is not None
        assert float(found.weights[i]) == pytest.approx(scored[name], rel=1e-3, abs=1e-6)


def test_direct_and_passed_on_add_up(make_tiny: Make, store: ActivationStore) -> None:
    """With all latents and errors of all MLPs as nodes, and attention that writes nothing, what a node passes to later
    nodes and to the logits is all its effect."""
    model = make_tiny(seed=3)
    for layer in range(3):
        if layer:
            model.out_weight(layer).zero_()
    batch = draw(model, n=2)
    found = incomplete(model)
    scored = attribute(model, batch, store, found)
    every = sum(len(row) for row in scored.latents) + len(scored.hooks)
    circuit = connect(model, batch, store, found, scored, top=every, edges=10**6)
    assert circuit.weights is not None
    sums = torch.zeros(len(circuit.graph.sources)).index_add_(0, circuit.graph.edges[:, 0], circuit.weights)
    expected = dict(scored.top(every))
    for name, total in zip(circuit.graph.sources, sums.tolist(), strict=True):
        assert total == pytest.approx(expected[name], rel=1e-2, abs=1e-5), name
    assert any(name.endswith(ERROR) for name in circuit.graph.sources)


def test_bases_by_name(tiny: LanguageModel) -> None:
    columns = bases.load(tiny, "rotation:1")[block(0, "hook_mlp_out")]
    x = torch.randn(5, tiny.config.d_model, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(columns.decode(columns.encode(x)), x, rtol=1e-4, atol=1e-5)
    for spec, message in (
        ("neuron", "did you mean 'neurons'"),
        ("rotation", "needs a seed"),
        ("neurons:3", "no argument"),
    ):
        with pytest.raises(UserError, match=message):
            bases.load(tiny, spec)
