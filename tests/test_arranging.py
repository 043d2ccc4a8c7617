"""A circuit as it is drawn: what is hidden, what is one, and that sums are kept."""

from __future__ import annotations

import pytest
import torch

from circuits.arranging import Arranged, contract, group_text, read_groups
from circuits.drawing import arranged_figure
from circuits.graph import Circuit, Graph, transformer
from workbench.errors import UserError
from workbench.plots import definition

GRAPH = transformer(2, 2)
WEIGHTS = {"input->a0.h0<q>": 1.0, "a0.h0->a1.h0<k>": 2.0, "a0.h1->a1.h0<k>": -0.5, "a0.h0->a1.h1<v>": 4.0,
           "a0.h1->m1": 0.25, "a1.h0->logits": 8.0, "a1.h1->logits": 16.0, "m1->logits": 3.0}  # fmt: skip


def circuit(weights: bool = True) -> Circuit:
    kept, values = torch.zeros(len(GRAPH), dtype=torch.bool), torch.zeros(len(GRAPH))
    for name, weight in WEIGHTS.items():
        kept[GRAPH.index[name]], values[GRAPH.index[name]] = True, weight
    return Circuit(GRAPH, kept, "by hand", weights=values if weights else None)


def edges(some: Circuit) -> dict[str, float]:
    weights = some.kept.float() if some.weights is None else some.weights
    return {some.graph.names[i]: float(weights[i]) for i in some.kept.nonzero()[:, 0].tolist()}


def test_edges_of_a_group_are_the_sums_of_its_members_and_those_inside_it_are_gone() -> None:
    found = edges(contract(circuit(), {"early": ("a0.h0", "a0.h1"), "late": ("a1.h1", "m1")}))
    assert found == {
        "input->early": 1.0, "early->a1.h0<k>": 1.5, "early->late": 4.25, "a1.h0->logits": 8.0, "late->logits": 19.0,
    }  # fmt: skip
    inside = edges(contract(circuit(), {"all": ("a0.h0", "a0.h1", "a1.h0", "a1.h1", "m1")}))
    assert inside == {"input->all": 1.0, "all->logits": 27.0}
    alike = contract(circuit(weights=False), {"early": ("a0.h0", "a0.h1")})
    assert alike.weights is None and set(edges(alike).values()) == {1.0}


def test_no_group_is_the_circuit_and_one_of_one_node_renames_it() -> None:
    assert edges(contract(circuit(), {})) == WEIGHTS
    renamed = edges(contract(circuit(), {"x": ("m1",)}))
    assert renamed == {name.replace("m1", "x"): weight for name, weight in WEIGHTS.items()}


def test_hidden_nodes_and_all_but_some_are_not_drawn() -> None:
    shown = Arranged(circuit(), hidden=("a0.h0",)).shown
    assert set(edges(shown)) == {name for name in WEIGHTS if "a0.h0" not in name}
    few = Arranged(circuit(), only=("a0.h1", "a1.h0")).shown
    assert set(edges(few)) == {"a0.h1->a1.h0<k>", "a1.h0->logits"}
    empty = Arranged(circuit(), hidden=("a1.h0",), only=("a0.h1", "a1.h0"))
    assert edges(empty.shown) == {} and arranged_figure(empty).data
    assert edges(Arranged(circuit()).shown) == WEIGHTS
    for wrong in (Arranged(circuit(), hidden=("a9.h9",)), Arranged(circuit(), only=("a9.h9",))):
        with pytest.raises(UserError, match=r"no node of this graph is called 'a9\.h9'"):
            _ = wrong.shown


def test_a_group_is_drawn_where_its_first_member_was() -> None:
    groups = {"late": ("a1.h1", "m1")}
    drawn = arranged_figure(Arranged(circuit(), groups, hidden=("a0.h0",)))
    nodes = next(trace for trace in drawn.data if trace.mode == "markers+text")
    at = dict(zip(nodes.customdata, nodes.y, strict=True))
    assert at["late"] == at["a1.h0"] > at["a0.h1"] and at["logits"] > at["late"] and "m1" not in at
    assert dict(zip(nodes.customdata, nodes.marker.symbol, strict=True))["late"] == "square"
    said = definition(Arranged(circuit(), groups, ("a0.h0",)))
    assert said == "a0.h0 not drawn; edges of a group are sums; by hand"


def test_latents_are_drawn_at_their_hook_points() -> None:
    names = ("blocks.0.mlp.hook_post/7", "blocks.2.mlp.hook_post/3", "blocks.2.hook_mlp_out/error")
    ends = torch.tensor([[0, 3], [1, 3], [2, 3], [0, 1]])
    graph = Graph(names, (*names, "logits"), ends)
    drawn = arranged_figure(Arranged(Circuit(graph, torch.ones(4, dtype=torch.bool), "by hand")))
    nodes = next(trace for trace in drawn.data if trace.mode == "markers+text")
    assert list(nodes.y) == [1, 2, 3, 4] and list(nodes.text) == ["7", "3", "error", "logits"]
    assert {one.text for one in drawn.layout.annotations} == {"0.mlp.post", "2.mlp.post", "2.mlp_out"}


def test_groups_are_read_as_they_are_written() -> None:
    groups = {"name movers": ("a1.h0", "a1.h1"), "rest": ("m0",)}
    assert read_groups(group_text(groups), GRAPH.nodes) == groups
    assert read_groups(" rest :m0,m0 ;; ", GRAPH.nodes) == {"rest": ("m0",)}
    assert read_groups("", GRAPH.nodes) == {}


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("a0.h0", "is no group; write a name"),
        ("x:", "is no group"),
        (": a0.h0", "is no group"),
        ("x: a7.h0", "no node of the circuit is called 'a7.h0'"),
        ("x: a0.h0; y: m0 a0.h0", "a0.h0 is in the groups x and y"),
        ("x: a0.h0; x: m0", "cannot be called 'x'"),
        ("m0: a0.h0", "cannot be called 'm0'"),
        ("logits: a0.h0", "cannot be called 'logits'"),
        ("<b>: a0.h0", "cannot be called '<b>'"),
        ("x" * 41 + ": a0.h0", "cannot be called"),
    ],
)
def test_what_is_no_group_is_a_sentence(text: str, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        read_groups(text, GRAPH.nodes)
