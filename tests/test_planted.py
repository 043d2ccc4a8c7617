"""What is planted is what is there: by patching of nodes and of edges, and by a forward pass through the true edges."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor

from circuits.graph import Graph, node_of
from circuits.patching import patching
from circuits.planted import SUITE, Planted, plant, variants
from workbench.activations import ActivationStore
from workbench.errors import UserError
from workbench.metrics import top1
from workbench.prompts import Batch
from workbench.scores import NodeScores
from workbench.sites import block

KINDS: list[dict[str, Any]] = [
    {"circuit": "copy", "hops": 1, "lookup": "before", "movers": 2},
    {"circuit": "induction", "negative": 1, "saturated": True},
    {"circuit": "induction", "width": 2, "lookup": "after"},
    {"circuit": "pointer", "loud": 3.0, "fillers": "fresh"},
    {"circuit": "inhibition", "fillers": "constant", "negative": 2},
    {"circuit": "pointer+induction", "gate": "and", "saturated": True, "loud": 2.0},
    {"circuit": "inhibition+copy", "lookup": "before", "n_values": 3, "movers": 2, "n_heads": 8},
]


def node_auc(scores: NodeScores, planted: Planted, without: frozenset[str] = frozenset()) -> float:
    """Over heads and MLPs."""
    pairs = [(n, abs(s)) for n, s in zip(scores.nodes, scores.scores.tolist(), strict=True) if n not in without]
    return float(roc_auc_score([name in planted.nodes for name, _ in pairs], [score for _, score in pairs]))


def metric(planted: Planted, batch: Batch) -> tuple[float, float]:
    """Mean metric on clean and on corrupted prompts."""
    logits = [planted.model.run(torch.stack(side), logits="last").logits for side in (batch.clean, batch.corrupted)]
    clean, corrupted = (batch.score(rows[:, -1]).mean().item() for rows in logits if rows is not None)
    return clean, corrupted


class Edges:
    """A forward pass in which every destination reads its own sum: what a kept edge carries is from this pass, what a
    cut one carries is from the corrupted prompts. Written from the definition of an edge, on the model's weights."""

    def __init__(self, planted: Planted, batch: Batch):
        self.model, self.batch = planted.model, batch
        self.graph = Graph.of(planted.model.config)
        self.everything = torch.ones(len(self.graph), dtype=torch.bool)
        self.corrupted = self._written(batch.corrupted, self.everything, None)

    def metric(self, kept: Tensor) -> float:
        resid = self._read(self._written(self.batch.clean, kept, self.corrupted), self.corrupted, kept, ["logits"])
        return self.batch.score(self.model.unembed(resid[0, :, -1])).mean().item()

    def _read(self, written: Tensor, other: Tensor | None, kept: Tensor, destinations: list[str]) -> Tensor:
        """[destination, batch, pos, d_model], from what was written so far: [source, batch, pos, d_model]."""
        columns = [self.graph.destinations.index(name) for name in destinations]
        take = self.graph.dense(kept.float())[: len(written), columns]
        mine = torch.einsum("sbpd,sn->nbpd", written, take)
        return mine if other is None else mine + torch.einsum("sbpd,sn->nbpd", other[: len(written)], 1 - take)

    def _written(self, prompts: tuple[Tensor, ...], kept: Tensor, other: Tensor | None) -> Tensor:
        tokens, c = torch.stack(prompts), self.model.config
        start = self.model.run(tokens, capture=[block(0, "hook_resid_pre")], logits="none")
        written = start[block(0, "hook_resid_pre")][None]
        late = torch.ones(tokens.shape[1], tokens.shape[1], dtype=torch.bool).triu(1)
        for layer in range(c.n_layers):
            ports = [f"a{layer}.h{h}<{port}>" for port in "qkv" for h in range(c.n_heads)]
            seen = self.model.attention_norm(layer)(self._read(written, other, kept, ports))
            weights, biases = self.model.in_weights(layer)
            rows = torch.einsum("nbpd,ned->nbpe", seen, weights.flatten(0, 1)) + biases.flatten(0, 1)[:, None, None]
            q, k, v = rows.unflatten(0, (3, c.n_heads))
            scores = (q @ k.mT / math.sqrt(c.d_head)).masked_fill(late, -torch.inf)
            z = scores.softmax(-1) @ v
            written = torch.cat([written, torch.einsum("hbpe,hed->hbpd", z, self.model.out_weight(layer))])
            mlp = self.model._block(layer).get_submodule("mlp")
            seen = self.model.mlp_norm(layer)(self._read(written, other, kept, [f"m{layer}"]))
            written = torch.cat([written, mlp(seen)])
        return written


def kept(graph: Graph, names: frozenset[str]) -> Tensor:
    return torch.tensor([name in names for name in graph.names])


@pytest.mark.parametrize("options", KINDS, ids=lambda o: f"{o['circuit']}-{len(o)}")
def test_the_truth_is_what_patching_finds(options: Mapping[str, Any], store: ActivationStore) -> None:
    """Every true node is far above every false one, and the model does the task."""
    for seed in (0, 1):
        planted = plant(seed, **options)
        batch = planted.batch(24)
        clean = planted.model.run(torch.stack(batch.clean), logits="last").logits
        assert clean is not None
        assert float(top1(clean[:, -1], batch.answers).mean()) >= 0.95
        found = patching(planted.model, batch, store)
        assert set(found.nodes) == set(Graph.of(planted.model.config).nodes)
        assert node_auc(found, planted) >= 0.98
        effect = dict(zip(found.nodes, found.scores.abs().tolist(), strict=True))
        weakest = min(effect[name] for name in planted.nodes)
        strongest = max(value for name, value in effect.items() if name not in planted.nodes)
        assert weakest > 10 * strongest, (min(planted.nodes, key=effect.__getitem__), weakest, strongest)


@pytest.mark.parametrize("options", KINDS, ids=lambda o: f"{o['circuit']}-{len(o)}")
def test_the_true_edges_alone_do_the_task(options: Mapping[str, Any]) -> None:
    planted = plant(2, **options)
    batch = planted.batch(24)
    edges = Edges(planted, batch)
    clean, corrupted = metric(planted, batch)
    assert edges.metric(edges.everything) == pytest.approx(clean, abs=1e-3)
    assert edges.metric(~edges.everything) == pytest.approx(corrupted, abs=1e-3)
    true = kept(edges.graph, planted.edges)
    assert edges.metric(true) == pytest.approx(clean, rel=0.1)
    assert edges.metric(~true) == pytest.approx(corrupted, rel=0.1)


@pytest.mark.parametrize("options", [KINDS[1], KINDS[3]], ids=["induction", "pointer"])
def test_cutting_one_edge_shows_which_are_true(options: Mapping[str, Any]) -> None:
    planted = plant(3, **options | {"n_heads": 3, "d_head": 48})
    batch = planted.batch(4)
    edges = Edges(planted, batch)
    clean, _ = metric(planted, batch)
    effects = []
    for i in range(len(edges.graph)):
        without = edges.everything.clone()
        without[i] = False
        effects.append(abs(clean - edges.metric(without)))
    true = kept(edges.graph, planted.edges)
    assert float(torch.tensor(effects)[true].min()) > 5 * float(torch.tensor(effects)[~true].max())


@pytest.mark.parametrize("options", KINDS, ids=lambda o: f"{o['circuit']}-{len(o)}")
def test_names_are_those_of_the_graph(options: Mapping[str, Any]) -> None:
    planted = plant(4, **options)
    graph = Graph.of(planted.model.config)
    assert planted.edges <= graph.index.keys() and planted.scaffold <= graph.index.keys()
    assert not planted.edges & planted.scaffold
    ends = {node_of(end) for edge in planted.edges for end in edge.split("->")} - {"input", "logits"}
    assert planted.nodes == ends == planted.roles.keys()
    assert planted.nodes < set(graph.nodes)


def test_rotation_changes_nothing_but_the_weights() -> None:
    options = {"circuit": "induction+copy", "saturated": False}
    turned, plain = plant(5, **options), plant(5, **options, rotate=False)  # type: ignore[arg-type]
    tokens = torch.stack(turned.batch(8).clean)
    one, other = turned.model.run(tokens).logits, plain.model.run(tokens).logits
    assert one is not None and other is not None
    torch.testing.assert_close(one, other, atol=2e-3, rtol=0)
    assert float((turned.model.out_weight(1) - plain.model.out_weight(1)).abs().mean()) > 1e-3
    assert turned.model.fingerprint != plain.model.fingerprint


def test_a_planted_model_is_a_model() -> None:
    """The self-check compares with plain Hugging Face, and the stream with the sum of what was written."""
    planted = plant(6, circuit="pointer")
    checked = planted.model.self_check()
    assert checked["max_logit_difference"] < 1e-3
    prompt = planted.batch(1).prompts[0]
    assert planted.model.token_strings(planted.model.tokenize(prompt.clean).tolist())[1:] == prompt.clean.split()


def test_the_seed_decides_everything() -> None:
    torch.manual_seed(0)
    state = torch.random.get_rng_state()
    one, same, other = plant(7, circuit="copy"), plant(7, circuit="copy"), plant(8, circuit="copy")
    assert torch.equal(torch.random.get_rng_state(), state)
    assert one.model.fingerprint == same.model.fingerprint != other.model.fingerprint
    assert (one.edges, one.roles, one.scaffold) == (same.edges, same.roles, same.scaffold)
    assert one.batch(5, seed=1).prompts == same.batch(5, seed=1).prompts != one.batch(5, seed=2).prompts


@pytest.mark.parametrize("loud", [1.0, 3.0])
def test_distractors_are_as_active_as_the_circuit(loud: float) -> None:
    """Where a head writes most, distractors write as much, or more; it differs between the prompts; none is silent."""
    planted = plant(9, circuit="induction", loud=loud, fillers="fresh", n_heads=8)
    batch, c = planted.batch(24), planted.model.config
    hooks = [block(layer, "attn.hook_result") for layer in range(c.n_layers)]
    sides = [planted.model.run(torch.stack(side), capture=hooks) for side in (batch.clean, batch.corrupted)]
    found: dict[bool, list[list[float]]] = {True: [], False: []}
    for layer, hook in enumerate(hooks):
        clean, corrupted = (side[hook][:, 1:].norm(dim=-1).mean(0).amax(0) for side in sides)
        change = (sides[0][hook] - sides[1][hook]).norm(dim=-1).mean(0).amax(0)
        for h in range(c.n_heads):
            norms = [float(clean[h]), float(corrupted[h]), float(change[h])]
            found[f"a{layer}.h{h}" in planted.nodes].append(norms)
    true, false = (torch.tensor(found[is_true]) for is_true in (True, False))
    assert bool((false.median(0).values > 0.3 * loud * true.median(0).values).all())
    assert bool((false > 0.1).all()) and bool((true > 0.1).all())


def test_voters_hide_one_another_and_matter_together(store: ActivationStore) -> None:
    planted = plant(10, circuit="induction", redundant=True)
    batch = planted.batch(24)
    found = patching(planted.model, batch, store)
    effect = dict(zip(found.nodes, found.scores.abs().tolist(), strict=True))
    clean, corrupted = metric(planted, batch)
    assert len(planted.redundant) == 3 and planted.redundant < planted.nodes
    assert max(effect[name] for name in planted.redundant) < 0.05 * clean
    assert node_auc(found, planted, without=planted.redundant) >= 0.98
    edges = Edges(planted, batch)
    voters = frozenset(edge for edge in planted.edges if edge.split("->")[0] in planted.redundant)
    assert edges.metric(~kept(edges.graph, voters)) == pytest.approx(corrupted, rel=0.1)


def test_gradients_mislead_where_attention_is_saturated(store: ActivationStore) -> None:
    """What first order says of a node that acts through a saturated key all but vanishes; its exact effect does not."""
    planted = plant(11, circuit="induction", saturated=True)
    batch, model = planted.batch(16), planted.model
    (previous,) = [name for name, role in planted.roles.items() if role == "previous token"]
    layer, h = int(previous[1]), int(previous.split("h")[1])
    hook = block(layer, "attn.hook_z")
    clean = model.run(torch.stack(batch.clean), capture=[hook], grad=True, logits="last")
    assert clean.logits is not None
    (gradient,) = torch.autograd.grad(batch.score(clean.logits[:, -1]).mean(), clean[hook])
    change = clean[hook].detach() - model.run(torch.stack(batch.corrupted), capture=[hook])[hook]
    estimate = abs(float((gradient * change)[:, :, h].sum()))
    exact = abs(patching(model, batch, store).heads()[previous])
    assert exact > 4 and estimate < 0.1 * exact


def test_the_set_is_varied_and_another_seed_gives_another_set() -> None:
    assert len(SUITE) >= 30 and len({options["seed"] for options in SUITE}) == len(SUITE)
    assert {options["circuit"] for options in SUITE} >= {"copy", "induction", "pointer", "inhibition"}
    assert {options["saturated"] for options in SUITE} == {options["redundant"] for options in SUITE} == {True, False}
    assert not {options["seed"] for options in variants(seed=1)} & {options["seed"] for options in SUITE}


@pytest.mark.slow
def test_every_model_of_the_set_is_what_it_says(store: ActivationStore) -> None:
    scores = []
    for options in SUITE:
        planted = plant(**options)
        found = patching(planted.model, planted.batch(24), store)
        scores.append(node_auc(found, planted))
        effect = dict(zip(found.nodes, found.scores.abs().tolist(), strict=True))
        weakest = min(effect[name] for name in planted.nodes - planted.redundant)
        assert weakest > 10 * max(value for name, value in effect.items() if name not in planted.nodes), options
    assert sum(scores) / len(scores) >= 0.98


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"circuit": "inductoin"}, "did you mean 'induction'"),
        ({"circuit": "copy+copy+copy"}, "3 sources"),
        ({"gate": "or"}, "no gate is called 'or'"),
        ({"fillers": "random"}, "no fillers"),
        ({"n_layers": 2}, "does not fit into 2 layers"),
        ({"n_heads": 1, "d_head": 128, "movers": 4}, "does not fit"),
        ({"d_head": 8}, "d_head=8 is too small"),
        ({"n_values": 9}, "n_values=9"),
        ({"hops": -1}, "hops=-1"),
        ({"loud": 0.0}, "loud=0.0"),
        ({"redundant": True, "movers": 2}, "movers=2"),
        ({"redundant": True, "negative": 1}, "negative=1"),
        ({"lookup": "after", "saturated": True, "negative": 1}, "negative=1"),
    ],
)
def test_what_cannot_be_planted_is_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        plant(0, **options)
