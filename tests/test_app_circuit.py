"""The circuit page, on runs of a model that comes with the package."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from streamlit.testing.v1 import AppTest

from circuits import judging
from circuits.graph import Circuit, Graph
from saes.pretrained import DATA as SAES
from tests.test_app import HOSTILE, MAIN, edit, folder, save, text
from tests.test_plots import lens_result, node_scores
from workbench import places, runs
from workbench.runs import Run

ON: dict[str, Any] = {"model": "pycode-small-dense", "task": "with_as", "n": 16}


def page(id: str | None, **query: str) -> AppTest:
    app = AppTest.from_file(str(MAIN), default_timeout=60).run()
    app.switch_page("views/circuit.py")
    for name, value in (({} if id is None else {"run": id}) | query).items():
        app.query_params[name] = value
    app.run()
    assert not app.exception, app.exception[0].message
    return app


def metrics(app: AppTest) -> dict[str, str]:
    return {metric.label: metric.value.replace("−", "-") for metric in app.metric}


def chooser(app: AppTest) -> Any:
    return next(one for one in app.selectbox if one.label == "node")


@pytest.fixture
def found() -> Run:
    return runs.run("eap", **ON)


def test_a_circuit_from_its_scores_to_the_ablation_of_a_node(found: Run) -> None:
    app = page(found.id)
    assert "faithfulness" not in metrics(app)
    assert {button.label for button in app.button} == {
        "Measure faithfulness",
        "Measure it",
        "Ablate",
        "Judge it",
    }
    curve = runs.run("judge-sizes", seed=1, found=found.id, **ON).result
    app = page(found.id)
    size = int(app.query_params["size"])  # the smallest that is faithful
    faithful = dict(zip(curve.items.tolist(), curve.faithfulness.value.tolist(), strict=True))
    assert faithful[size] >= 0.9 > max(value for n, value in faithful.items() if n < size)
    circuit = judging.circuit_of(found, size)
    assert metrics(app)["edges"] == f"{len(circuit):,}" and metrics(app)["heads and MLPs"] == str(len(circuit.nodes))
    assert float(metrics(app)["faithfulness"]) == pytest.approx(faithful[size], abs=0.006)
    node = circuit.nodes[-1]
    less = {"without": node, "each": False, "subsets": 0, "random": 0, "size": size}
    report = runs.run("judge", seed=1, found=found.id, **less, **ON).result
    app = page(found.id, size=str(size), node=node, change=node)
    assert float(metrics(app)["faithfulness without"]) == pytest.approx(report.faithfulness, abs=0.006)
    assert "Ablate" not in {button.label for button in app.button}
    assert chooser(app).value == node and app.multiselect(key="circuit change").value == [node]


def test_a_node_has_its_evidence(found: Run) -> None:
    runs.run("direct-logit-attribution", seed=1, **ON)
    looks = runs.run("attention-patterns", seed=1, **ON)
    circuit = judging.circuit_of(found, 100)
    head, mlp = next(n for n in circuit.nodes if ".h" in n), next(n for n in circuit.nodes if n.startswith("m"))
    app = page(found.id, size="100", node=head)
    direct = runs.find("direct-logit-attribution", seed=1, **ON)
    assert direct is not None
    value = float(direct.result.scores[direct.result.nodes.index(head)])
    said = next(one.value for one in app.markdown if "to the answer directly" in one.value)
    assert f"**{value:+.3f}**".replace("-", "−") in said
    assert len(looks.result.tokens) > 3 and "Where it looks in the first prompt" in text(app)
    beside = text(page(found.id, size="100", node=mlp))
    assert "Where it looks" not in beside and "to the answer directly" in beside


@pytest.mark.parametrize("how", ["noise", "denoise"])
def test_nodes_are_patched_in_the_whole_model(found: Run, how: str) -> None:
    names = judging.circuit_of(found, 100).nodes[:2]
    app = page(found.id, size="100", change=",".join(names), how=how)
    assert "Patch" in {button.label for button in app.button}
    done = runs.run("patch-nodes", seed=1, nodes=",".join(names), direction=how, **ON).result
    app = page(found.id, size="100", change=",".join(names), how=how)
    assert float(metrics(app)["metric patched"]) == pytest.approx(float(done.together.mean()), abs=0.006)
    assert float(metrics(app)["metric unpatched"]) == pytest.approx(float(done.unpatched.mean()), abs=0.006)
    assert float(metrics(app)["share of the difference"]) == pytest.approx(float(done.share()[0][-1]), abs=0.006)
    assert app.query_params["how"] == how


def test_a_circuit_of_latents_is_patched_and_not_judged() -> None:
    run = runs.run("feature-circuit", top=12, edges=20, **ON)
    app = page(run.id)
    assert {button.label for button in app.button} == {"Patch"} and "latents and errors" in metrics(app)
    node = chooser(app).value
    done = runs.run("patch-nodes", seed=1, nodes=node, basis="neurons", **ON).result
    app = page(run.id, change=node)
    assert float(metrics(app)["metric patched"]) == pytest.approx(float(done.together.mean()), abs=0.006)


def test_the_address_arranges_the_graph_and_no_number(found: Run) -> None:
    names = judging.circuit_of(found, 100).nodes
    plain = metrics(page(found.id, size="100"))
    groups = f"first: {names[0]} {names[1]}"
    app = page(found.id, size="100", hide=names[2], groups=groups)
    assert metrics(app) == plain
    assert app.query_params["groups"] == groups and app.query_params["hide"] == names[2]
    assert f"{names[2]} not drawn" in text(app).replace("\\", "") and "edges of a group are sums" in text(app)
    drawn = json.loads(app.get("plotly_chart")[0].proto.spec)
    (labels,) = [trace["text"] for trace in drawn["data"] if trace.get("mode") == "markers+text"]
    assert "first" in labels and not {*names[:3]} & {*labels}


def test_the_slider_moves_graph_and_numbers(found: Run) -> None:
    runs.run("judge-sizes", seed=1, found=found.id, **ON)
    app = page(found.id, size="100")
    before = metrics(app)
    app.select_slider[0].set_value(500).run()
    assert not app.exception and app.query_params["size"] == "500"
    assert metrics(app)["edges"] != before["edges"] and metrics(app)["faithfulness"] != before["faithfulness"]


def test_a_found_circuit_has_no_sizes() -> None:
    run = runs.run("extract", method="eap", size=100, **ON)
    app = page(run.id)
    assert not app.select_slider and metrics(app)["edges"] == str(len(run.result))
    assert chooser(app).options == run.result.nodes


def test_scores_of_nodes_have_sizes_and_no_graph() -> None:
    app = page(save(node_scores()))
    assert app.select_slider and not app.selectbox and app.get("plotly_chart")


@pytest.mark.parametrize(
    ("id", "says"),
    [(None, "No run is chosen"), ("../../x", "No run is called"), ("<script>", "No run is called")],
)
def test_no_such_run_is_a_sentence(id: str | None, says: str) -> None:
    assert says in text(page(id))


def test_a_run_without_circuit_is_a_sentence() -> None:
    assert "found no circuit of them" in text(page(save(lens_result(), "logit-lens")))


@pytest.mark.parametrize("size", ["-1", "1e9", "x", HOSTILE])
def test_an_address_changed_by_hand_is_taken_as_none(found: Run, size: str) -> None:
    app = page(
        found.id,
        size=size,
        node=HOSTILE,
        change=f"{HOSTILE},a9.h9",
        hide=HOSTILE,
        how=HOSTILE,
        groups=f"{HOSTILE}: a0.h0",
    )
    assert app.query_params["size"] == "50" and "hide" not in app.query_params and "groups" not in app.query_params
    assert app.multiselect(key="circuit change").value == [] and app.selectbox(key="circuit how").value == "ablate"
    assert "A group cannot be called" in text(app) and "<script>" not in "".join(one.value for one in app.markdown)


def test_a_model_in_a_folder_is_for_the_terminal(found: Run) -> None:
    edit(found.id, model_name="./models/mine; rm x")
    app = page(found.id)
    assert not app.button and "--model=./models/mine; rm x'" in app.code[0].value


def test_a_damaged_record_is_a_sentence(found: Run) -> None:
    record = json.loads((folder(found.id) / "record.json").read_text())
    edit(found.id, key={**record["key"], "n": "many"})
    assert "damaged" in text(page(found.id))


def test_a_latent_of_an_sae_leads_to_its_page() -> None:
    places.ship(SAES / "runs")
    hook = "blocks.20.hook_resid_post"
    graph = Graph(
        (f"{hook}/7", f"{hook}/error"), (f"{hook}/7", f"{hook}/error", "logits"), torch.tensor([[0, 2], [1, 2]])
    )
    circuit = Circuit(graph, torch.ones(2, dtype=torch.bool), "by hand", method="feature-circuit")
    id = save(circuit, "feature-circuit")
    key = json.loads((folder(id) / "record.json").read_text())["key"]
    edit(id, key={**key, "parameters": {"basis": "sae:smollm2-135m"}})

    def ways(node: str) -> list[str]:
        shown = page(id, node=f"{hook}/{node}").get("page_link")
        return [one.proto.query_string for one in shown if one.proto.label.startswith("What this latent")]

    (query,) = ways("7")
    assert "latent=7" in query and "sae=smollm2-135m" in query and ways("error") == []
