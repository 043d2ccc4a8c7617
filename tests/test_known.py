"""Published circuits against what was published: sizes, differences, and numbers measured on them."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from statistics import mean, pstdev

import pytest

from circuits import known
from circuits.graph import from_eap, transformer
from workbench.errors import UserError
from workbench.scores import head_auc

EAP_IG = Path(__file__).parents[2] / "shared" / "data" / "ioi-eap-ig.json"  # beside the repository, never in it
SHAPES = {"gpt2": (12, 12), "attn-only-4l": (4, 8)}


def test_sizes_are_those_of_the_papers() -> None:
    sizes = {name: (len(c.heads), len(c.nodes) - len(c.heads)) for name, c in known.published().items()}
    assert sizes == {
        "ioi": (26, 0),
        "ioi-sae-paper": (26, 0),
        "ioi-cdt": (26, 0),
        "greater-than": (9, 8),
        "greater-than-cdt": (8, 0),
        "docstring": (6, 0),
        "docstring-heimersheim-janiak": (8, 0),
        "docstring-augmented": (11, 0),
        "docstring-sae-paper": (6, 0),
    }


def difference(a: str, b: str) -> tuple[set[str], set[str]]:
    left, right = set(known.get(a).heads), set(known.get(b).heads)
    return left - right, right - left


def test_lists_of_one_task_differ_as_their_notes_say() -> None:
    assert difference("ioi", "ioi-sae-paper") == ({"a9.h0"}, {"a11.h3"})
    assert difference("ioi", "ioi-cdt") == ({"a11.h10"}, {"a11.h0"})
    assert difference("docstring", "docstring-sae-paper") == ({"a1.h2"}, {"a1.h0"})
    assert difference("docstring", "docstring-heimersheim-janiak") == (set(), {"a0.h2", "a0.h4"})
    assert difference("docstring-heimersheim-janiak", "docstring-augmented") == (set(), {"a1.h0", "a0.h1", "a2.h3"})
    assert difference("greater-than", "greater-than-cdt") == ({"a0.h1", "a0.h3", "a0.h5"}, {"a5.h1", "a8.h8"})


@pytest.mark.parametrize("name", list(known.published()))
def test_every_node_exists_has_one_role_and_is_listed_in_order(name: str) -> None:
    circuit = known.get(name)
    graph = transformer(*SHAPES[circuit.model])
    assert [node for node in graph.nodes if node in circuit.nodes] == list(circuit.nodes)
    assert sorted(node for group in circuit.roles.values() for node in group) == sorted(circuit.nodes)


@pytest.mark.parametrize("name", list(known.published()))
def test_a_list_says_in_one_line_which_it_is(name: str) -> None:
    circuit = known.get(name)
    line = str(circuit)
    assert "\n" not in line
    for part in (name, f"v{circuit.version}", circuit.model, circuit.source, f"{len(circuit.heads)} heads"):
        assert part in line


def test_an_unknown_name_is_refused_with_the_nearest() -> None:
    with pytest.raises(UserError, match="did you mean 'greater-than'"):
        known.get("greaterthan")


def test_published_lists_cannot_be_changed() -> None:
    known.published().clear()
    with pytest.raises(TypeError):
        known.get("ioi").roles["name mover"] = ()  # type: ignore[index]
    assert len(known.get("ioi").nodes) == 26


# ---- the baselines of the SAE paper's figure are means over ACDC's tables ----

TASKS, METHODS = ("docstring", "greater-than", "ioi"), ("acdc", "hisp", "sp")

# Conmy et al. 2023 (arXiv 2304.14997), tables 2 (corrupted) and 3 (zero ablation), by metric, for each of TASKS: AUC
# over edges of each of METHODS, then AUC over nodes, in thousandths.
TABLES = {
    ("kl", "corrupted"): ("982 805 937 950 881 928", "853 693 806 890 642 827", "869 789 823 880 668 842"),
    ("kl", "zero"): ("906 805 428 837 881 420", "701 693 163 887 642 134", "539 792 486 458 671 605"),
    ("loss", "corrupted"): ("972 821 942 938 889 941", "461 706 812 766 631 811", "589 836 707 777 728 797"),
    ("loss", "zero"): ("929 821 482 825 889 398", "491 706 639 783 631 522", "447 836 393 424 728 479"),
}

# O'Neill & Bui 2024 (arXiv 2405.12522), headline figure, decoded from its drawing commands: bar and whisker for each of
# TASKS.
BARS = {
    ("acdc", "edge"): ((0.947, 0.031), (0.627, 0.160), (0.611, 0.157)),
    ("acdc", "node"): ((0.888, 0.057), (0.832, 0.057), (0.635, 0.198)),
    ("hisp", "edge"): ((0.813, 0.008), (0.700, 0.007), (0.813, 0.023)),
    ("hisp", "node"): ((0.885, 0.004), (0.637, 0.006), (0.699, 0.029)),
    ("sp", "edge"): ((0.697, 0.243), (0.605, 0.265), (0.602, 0.171)),
    ("sp", "node"): ((0.672, 0.263), (0.574, 0.281), (0.681, 0.147)),
}
LEVELS = ("edge", "node")


def entry(row: tuple[str, ...], method: str, level: str, task: str) -> float:
    column = METHODS.index(method) + 3 * LEVELS.index(level)
    return int(row[TASKS.index(task)].split()[column]) / 1000


def four(method: str, level: str, task: str) -> list[float]:
    """The method's AUC over {KL, loss} x {corrupted, zero}."""
    return [entry(row, method, level, task) for row in TABLES.values()]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("level", "task"), list(product(LEVELS, TASKS)))
def test_each_bar_is_the_unweighted_mean_over_metrics_and_ablations(method: str, level: str, task: str) -> None:
    bar, whisker = BARS[method, level][TASKS.index(task)]
    values = four(method, level, task)
    assert mean(values) == pytest.approx(bar, abs=0.0005 + 1e-9)
    assert pstdev(values) == pytest.approx(whisker, abs=0.0006)  # read off a drawing; the worst is 0.00053 away


@pytest.mark.parametrize(("level", "task"), list(product(LEVELS, TASKS)))
def test_acdc_at_its_best_setting_is_far_above_its_bar(level: str, task: str) -> None:
    best = entry(TABLES["kl", "corrupted"], "acdc", level, task)
    assert best == max(four("acdc", level, task)) > BARS["acdc", level][TASKS.index(task)][0] + 0.03


# ---- published scores against published circuits ----


@pytest.mark.skipif(
    not EAP_IG.exists(), reason=f"published EAP-IG scores are not at {EAP_IG.name} beside the repository"
)
def test_published_eap_ig_scores_of_ioi_give_the_auc_measured_on_them() -> None:
    """Head score: largest absolute score of the edges in and out. Scores: hannamw/MIB-circuit-track (Apache-2.0)."""
    edges, _ = from_eap(json.loads(EAP_IG.read_text()))
    scores = edges.nodes("max")
    assert head_auc(scores, known.get("ioi").nodes) == pytest.approx(0.953, abs=0.0005)
    assert head_auc(scores, known.get("ioi-sae-paper").nodes) == pytest.approx(0.943, abs=0.0005)
    found = {name for name, _ in scores.top(26)}
    shared = len(found & set(known.get("ioi").nodes))
    assert 2 * shared / (len(found) + 26) == pytest.approx(0.808, abs=0.0005)
