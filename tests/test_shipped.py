"""What comes with the package is what its runs say: models, circuits, the twin at equal loss."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from circuits.sparse.bridge_edits import dose_response
from circuits.sparse.bridges import beside
from circuits.sparse.channels import Channels
from circuits.sparse.data import TokenStream
from circuits.sparse.prune import Pairs, ask
from circuits.sparse.pruning_run import stream_of
from circuits.sparse.shipped import DATA, names
from circuits.sparse.train import HELD_OUT, loss_of, nonzero
from circuits.sparse.training_run import SparseTraining, accuracies
from circuits.sparse.validate import geometric_mean
from workbench import places, pretrained, registry, runs
from workbench.models import LanguageModel
from workbench.prompts import sample, split

PAGE = (Path(__file__).parents[1] / "docs" / "sparse.md").read_text()
SOME = ("single_double_quote", "with_as", "for_while")


@pytest.fixture(autouse=True)
def shipped() -> None:
    places.ship(DATA / "runs")


def test_everything_that_comes_with_the_package_can_be_read() -> None:
    found, sentences = runs.all_runs()
    assert not sentences
    ids = {run.id for run in found}
    assert ids == {path.name for path in (DATA / "runs").iterdir()}
    for name, entry in names().items():
        assert entry["run"] in ids and pretrained.local()[name].about == entry["about"]
    for run in found:
        assert run.result.summary() == run.summary
    size = sum(path.stat().st_size for path in DATA.rglob("*") if path.is_file())
    assert size < 20e6


@pytest.mark.parametrize("name", names())
def test_a_model_is_as_sparse_and_as_good_as_its_run_says(name: str) -> None:
    run, model = runs.get_run(names()[name]["run"]), LanguageModel.load(name)
    counts = nonzero(model._module)
    assert counts["weights"] == run.summary["of_weights"]
    if run.summary["nonzero"] < counts["weights"]:
        assert counts["nonzero"] == run.summary["nonzero"]
    if isinstance(run.result, SparseTraining):
        for task, share in accuracies(model, SOME).items():
            assert share == pytest.approx(run.result.accuracy[task], abs=0.011), task


def test_the_twin_has_the_loss_of_the_sparse_model() -> None:
    """As their runs say, and measured again on what is written; the text has parts of this interpreter's library."""
    models = [LanguageModel.load(name) for name in ("pycode-small", "pycode-small-dense")]
    said = [float(runs.get_run(names()[m.name]["run"]).result.curve["held_out_loss"][-1]) for m in models]
    assert abs(said[0] - said[1]) <= 0.02
    bpe = models[0].tokenizer.backend_tokenizer
    assert models[1].tokenizer.get_vocab() == models[0].tokenizer.get_vocab()
    rows = TokenStream(bpe, seed=0, real=0.25, held_out=True).read(0, HELD_OUT * 128).view(HELD_OUT, 128)
    with torch.no_grad():
        found = [float(torch.stack([loss_of(m._module, part) for part in rows.split(64)]).mean()) for m in models]
    assert found == pytest.approx(said, abs=0.05) and abs(found[0] - found[1]) <= 0.03


# ---- circuits ----


def tables() -> dict[str, runs.Run]:
    """The shipped tables of circuits, by model."""
    found = (run for run in runs.all_runs()[0] if run.record["key"]["analysis"] == "sparse-tasks")
    return {run.record["model_name"]: run for run in found}


def test_the_sparse_model_needs_a_fraction_of_the_twins_edges() -> None:
    """Over the tasks that both solve, by one search for both; tasks that the current token alone answers have no edges
    in either."""
    sparse, dense = (tables()[name] for name in ("pycode-small", "pycode-small-dense"))
    keys = [{k: v for k, v in run.record["key"].items() if k != "model"} for run in (sparse, dense)]
    assert keys[0] == keys[1]
    edges = [run.result.reached for run in (sparse, dense)]
    common = sorted(edges[0].keys() & edges[1].keys())
    assert len(common) >= 8
    ratio = geometric_mean([edges[1][task] for task in common]) / geometric_mean([edges[0][task] for task in common])
    assert ratio >= 25
    quoted = re.findall(r"geometric mean of ([\d,]+) edges against ([\d,]+): ([\d.]+) times", PAGE)
    means = [geometric_mean([table[task] for task in common]) for table in edges]
    assert quoted == [(f"{means[0]:,.0f}", f"{means[1]:,.0f}", f"{ratio:.0f}")]


@pytest.mark.parametrize("model", ["pycode-small", "pycode-small-dense"])
def test_the_pages_table_is_that_of_the_runs(model: str) -> None:
    rows = tables()[model].result.rows
    column = ["pycode-small", "pycode-small-dense"].index(model)
    written = {name: cells.split("|") for name, cells in re.findall(r"^\| `(\w+)` \|(.+)\|$", PAGE, re.M)}
    assert rows.keys() <= written.keys()
    for task, row in rows.items():
        nodes, edges, held_out, without = (cell.strip() for cell in written[task][4 * column : 4 * column + 4])
        assert (nodes, edges) == (f"{row.nodes:,}", f"{row.edges:,}"), task
        assert (held_out, without) == (f"{row.held_out:.2f}", f"{row.without:.2f}".replace("-0.00", "0.00")), task


@pytest.mark.parametrize("model", ["pycode-small", "pycode-small-dense"])
def test_a_circuit_does_what_the_table_says(model: str) -> None:
    run = tables()[model]
    module, table = LanguageModel.load(model), run.result
    assert run.record["key"]["model"] == module.fingerprint
    task = min((task for task in table.reached if table.reached[task]), key=lambda task: table.reached[task])
    row, circuit = table.rows[task], table.circuit(task, module)
    assert row.kept is not None and row.scale is not None and row.held_out is not None
    assert len(circuit) == row.edges == int(Channels(module).between(row.kept).sum())
    train, test = (sample(split(registry.get_task(task), part), module, 64, 1) for part in ("train", "test"))
    question = ask(module, train, test, stream_of(module))
    alone = question.judge.loss(row.kept.float(), row.scale)  # of other prompts, and of this machine's library
    assert alone == pytest.approx(row.held_out, abs=0.1)


def test_what_the_page_says_against_a_circuit_is_what_its_run_found() -> None:
    (folder,) = (DATA / "runs").glob("sparse-prune-*")
    run = runs.get_run(folder.name)
    found, page = run.summary, " ".join(PAGE.split())
    table = tables()["pycode-small"].result.rows["set_or_string_fixedvarname"]
    assert torch.equal(run.result.pruned.kept, table.kept) and found["n_edges"] == table.edges

    def short(x: float) -> str:
        return f"{x:.3f}".replace("0.", ".", 1)

    without, rest, other = found["loss_more_without"], found["subsets_ablated"], found["elsewhere"]
    worst = rest["adversarial"]["refitted"]
    assert not any(found[name]["reached"] for name in ("nonsense", "random_weights", "backup"))
    for said in (
        f"circuit of {found['n_nodes']} channels and {found['n_edges']} edges has {short(found['held_out_loss'])}",
        f"no circuit: least loss {short(found['nonsense']['loss'])} |",
        f"no circuit: {short(found['random_weights']['loss'])} |",
        f"just not: {short(found['backup']['loss'])}, where .15",
        "{} to {} edges; shared by two of three: ".format(*found["stability"]["edges"])
        + f"{found['stability']['same_nodes']:.2f} of nodes, {found['stability']['same_edges']:.2f} of edges".replace(
            "0.", "."
        ),
        f"{without['circuit']:.3f} more",
        "{} more in the mean of 20 draws, at most {}".format(*map(short, without["random"])),
        "of the same sites {}, at most {}".format(*map(short, without["matched"])),
        "{} in the mean, at most {}".format(*map(short, rest["0.5"])),
        f"{rest['adversarial_n']:,} others at their mean, chosen by an adversary | {short(worst)} |",
        f"{short(other['task-mean'][0])}, {short(other['zero'][0])}, {short(other['resample'][0])} |",
    ):
        assert said in page, said


# ---- the bridge ----


def test_one_channel_of_the_bridged_model_turns_the_dense_models_answer() -> None:
    """As the shipped run says, and measured again on a few prompts: other channels do nothing."""
    run = runs.find("bridge-dose")
    assert run is not None and run.folder.parent == DATA / "runs"
    found = run.result
    at = dict(zip(found.strengths, found.mean.tolist(), strict=True))
    assert at[0.0] < 0.005 and at[1.0] > 0.5
    low, high = found.band(matched=False)
    assert float(high.max()) < 0.005
    quoted = re.findall(r"from ([\d.]+) to ([\d.]+) at strength 1 and ([\d.]+) at 2", PAGE)
    assert quoted == [(f"{at[0.0]:.3f}", f"{at[1.0]:.2f}", f"{at[2.0]:.2f}")]
    model = LanguageModel.load("pycode-bridged")
    pairs = Pairs.of(sample(split(registry.get_task("while_return_true"), "test"), model, 6, 1))
    again = dose_response(beside(model), pairs, found.node, controls=1, seed=0)
    now = dict(zip(again.strengths, again.mean.tolist(), strict=True))
    assert now[0.0] < 0.01 and now[2.0] > 0.5
    assert float(low.min()) >= 0


def test_what_the_page_says_of_the_twins_is_what_was_measured() -> None:
    kept = json.loads((Path(__file__).parent / "benchmarks" / "results" / "twins-small-cpu.json").read_text())
    page, models = " ".join(PAGE.split()), kept["models"]
    sentences = {
        "dense": "{:,.0f} edges against {:,.0f}: {:.0f} times",
        "dense, AbsTopK": "{1:,.0f} edges where the sparse model's have {0:,.0f}: {2:.1f} times",
    }
    for arm, said in sentences.items():
        common = sorted(models["sparse"]["edges"].keys() & models[arm]["edges"].keys())
        means = [geometric_mean([models[name]["edges"][task] for task in common]) for name in ("sparse", arm)]
        assert said.format(*means, means[1] / means[0]) in page
        assert kept["ratios"][arm]["value"] == pytest.approx(means[1] / means[0], abs=0.01)
        assert (
            abs(models[arm]["held_out_loss"] - models["sparse"]["held_out_loss"]) <= kept["within"] + 1e-4
        )  # losses are kept to four places
    other = models["dense, AbsTopK"]
    assert (
        f"{other['tokens'] / 1e6:.0f} million tokens" in page and f"ends at {other['held_out_loss']:.2f} nats" in page
    )
    assert other["tasks_solved"] == len(other["edges"]) == 18
    solved = sorted(set.intersection(*(set(model["edges"]) for model in models.values())))
    dense, rest = (
        geometric_mean([models[arm]["edges"][task] for task in solved]) for arm in ("dense", "dense, AbsTopK")
    )
    assert f"another {dense / rest:.1f} times over the {len(solved)} tasks that all three solve" in page
    fewer = [task for task in solved if other["edges"][task] < models["sparse"]["edges"][task]]
    assert sorted(fewer) == ["for_while", "while_return_true"]


def test_the_frontier_on_the_page_is_that_of_the_records() -> None:
    kept = [
        json.loads(path.read_text())
        for path in (Path(__file__).parent / "benchmarks" / "results").glob("frontier-*-*-cpu.json")
    ]
    assert {(row["width"], row["density"]) for row in kept} == {
        (width, 1 / part) for width in (128, 256) for part in (8, 16, 32)
    }
    common = set.intersection(*({name for name, edges in row["edges"].items() if edges} for row in kept))
    assert f"over the {len(common)} tasks of which all six have a circuit with edges" in " ".join(PAGE.split())
    for row in kept:
        rate = min(row["losses by rate"], key=row["losses by rate"].get)
        assert row["losses by rate"][rate] == row["held_out_loss"]
        edges, nodes = (geometric_mean([row[what][name] for name in common]) for what in ("edges", "nodes"))
        assert (
            f"| {row['width']} | 1/{round(1 / row['density'])} | {row['nonzero']:,} | {rate.lstrip('0')} | "
            f"{row['held_out_loss']:.3f} | {row['tasks_solved']} | {nodes:.0f} | {edges:.0f} |"
        ) in PAGE
