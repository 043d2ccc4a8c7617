"""Home and the pages that lead from a question to what answers it: circuits, sparse models, steering."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import pytest
from streamlit.testing.v1 import AppTest

from circuits import judging
from circuits.sparse.shipped import DATA
from saes.steering.evaluate import Verdict
from saes.steering.language_steering import LanguageSteering, Recipe
from saes.steering.side_effects import Bits
from saes.steering.sweep import Cell
from tests.conftest import CONFIGS
from tests.test_app import HOSTILE, MAIN, edit, folder, save, text
from tests.test_plots import lens_result, node_scores
from workbench import health, places, pretrained, registry, runs, settings
from workbench.models import LanguageModel

ON: dict[str, Any] = {"model": "pycode-small-dense", "task": "with_as", "n": 16}


def page(name: str, **query: str | list[str]) -> AppTest:
    app = AppTest.from_file(str(MAIN), default_timeout=120).run()
    app.switch_page(f"views/{name}.py")
    for key, value in query.items():
        app.query_params[key] = value
    app.run()
    assert not app.exception, app.exception[0].message
    return app


def links(app: AppTest) -> list[str]:
    return [str(link.label) for link in app.get("page_link")]


# ---- home ----


def test_home_leads_three_ways_and_to_what_was_computed_last() -> None:
    app = page("home")
    assert app.title[0].value == "Workbench"
    assert [label for label in links(app) if label.startswith("**")] == [
        "**Find a circuit**", "**Read a sparse model**", "**Steer a language**"
    ]  # fmt: skip
    save(lens_result(), "logit-lens", seed=1)
    save(node_scores(), seed=2)
    app = page("home")
    found = links(app)
    newest = next(i for i, label in enumerate(found) if label.startswith("patching"))
    assert found[newest + 1] == "circuit" and "logit\\-lens" in found[newest + 2]
    assert found.count("circuit") == 1 and "All 2 runs" in found  # a lens finds no circuit


def test_home_says_how_the_machine_is_and_which_models_were_checked() -> None:
    assert "none was yet" in text(page("home"))
    record = {
        "model": HOSTILE, "numerics": "float32-sdpa-cpu", "max_logit_difference": 1e-5, "residual_sum_error": 2e-7,
        "versions": {"torch": "1.0", "transformers": "1.0"},
    }  # fmt: skip
    folder = settings.home() / "self-checks"
    pretrained.write_json(folder / "a.json", record)
    (folder / "b.json").write_text("{")
    pretrained.write_json(folder / "c.json", record | {"residual_sum_error": "small"})
    (check,) = health.checks()
    assert (check.model, check.logits, check.residual, check.current) == (HOSTILE, 1e-5, 2e-7, False)
    app = page("home")
    assert app.dataframe[0].value["model"].tolist() == [HOSTILE]
    facts = health.facts()
    assert facts["device"] == "cpu" and float(facts["disk"].split()[0].replace(",", "")) > 0


# ---- graphs of scored nodes ----


def test_scored_nodes_are_a_circuit_where_the_model_is_known() -> None:
    run = runs.run("patching", **ON)
    graph = judging.graph_of(run)
    assert graph is not None and graph.same_as(runs.run("eap", **ON).result.graph)
    nodes = set(judging.circuit_of(run, 5, graph).nodes)
    scores = run.result
    best = sorted(zip(scores.nodes, scores.scores.abs().tolist(), strict=True), key=lambda item: -item[1])[:5]
    assert nodes == {name for name, _ in best}
    app = page("circuit", run=run.id, size="5")
    assert {name for name in app.selectbox[0].options} == nodes
    assert app.selectbox[0].value == best[0][0]  # the strongest is the first to be asked about
    edit(run.id, model_name="not-here")
    assert judging.graph_of(runs.get_run(run.id)) is None
    assert not page("circuit", run=run.id).selectbox


def test_scores_of_some_heads_alone_are_of_the_whole_graph() -> None:
    """As a method scores them that looks at what comes before a layer: later layers are still between it and logits."""
    run, whole = runs.run("patching", **ON), runs.run("eap", **ON).result.graph
    part = replace(run.result, nodes=run.result.nodes[:5], scores=run.result.scores[:5], per_prompt=None)
    id = save(part)
    edit(id, model_name=ON["model"])
    graph = judging.graph_of(runs.get_run(id))
    assert graph is not None and graph.same_as(whole)


@pytest.mark.parametrize("kind", [kind for kind in CONFIGS if not kind.startswith("weight_sparse")])
def test_the_shape_of_a_model_is_read_from_its_configuration(
    kind: str, make_tiny: Callable[..., LanguageModel], tmp_path: Path
) -> None:
    model = make_tiny(kind)
    model._module.save_pretrained(tmp_path)
    config = model.config
    assert pretrained.shape(str(tmp_path)) == (config.n_layers, config.n_heads, config.parallel_attn_mlp)


def test_what_a_configuration_does_not_say(tmp_path: Path) -> None:
    config = LanguageModel.load("pycode-small").config  # in a format of its own
    assert pretrained.shape("pycode-small") == (config.n_layers, config.n_heads, config.parallel_attn_mlp)
    assert pretrained.shape("smollm2-135m") is None  # not fetched for this
    for config, shape in (
        ({"model_type": "gpt_neox", "n_layer": 2, "n_head": 3}, (2, 3, True)),  # the library's default
        ({"model_type": "gpt_neox", "n_layer": 2, "n_head": 3, "use_parallel_residual": False}, (2, 3, False)),
        ({"model_type": "llama", "num_hidden_layers": 2}, None),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config))
        assert pretrained.shape(str(tmp_path)) == shape


# ---- discovery ----


def test_a_method_is_started_and_its_circuit_found_again() -> None:
    query = {"model": ON["model"], "task": ON["task"], "n": "16", "method": "eap"}
    app = page("discovery", **query)
    assert {button.label for button in app.button} == {"Find it", "Compare them"}
    assert "Its circuit" not in links(app)
    runs.run("eap", **ON)
    app = page("discovery", **query)
    assert {button.label for button in app.button} == {"Compare them"}
    assert links(app)[0] == "Its circuit" and any(label.startswith("eap · 16 prompts") for label in links(app))
    assert app.selectbox(key="task").value == "with_as"


def test_methods_are_compared_on_the_page() -> None:
    on = ON | {"n": 8}
    runs.run("compare", methods="eap,patching", **on)
    app = page(
        "discovery", model=on["model"], task=on["task"], n="8", methods=["patching", "eap"]
    )  # whatever the order
    (table,) = [frame for frame in app.dataframe if "method" in frame.value]
    assert table.value["method"].tolist() == ["eap", "patching"] and app.get("plotly_chart")


@pytest.mark.parametrize("model", ["./../../etc", "/etc", "~/x"])
def test_a_path_is_for_the_terminal(model: str) -> None:
    app = page("discovery", model=model)
    assert "is a path, and the app opens none" in text(app) and not app.button


# ---- sparse models ----


@pytest.fixture
def shipped() -> None:
    places.ship(DATA / "runs")


@pytest.mark.usefixtures("shipped")
def test_a_sparse_model_its_tasks_and_one_circuit_at_any_size() -> None:
    app = page("sparse")
    assert app.selectbox(key="sparse model").value == "pycode-small"
    shown = {metric.label: metric.value for metric in app.metric}
    assert shown["weights"] == "139,264" and shown["tasks solved"] == "18 of 20"
    assert {button.label for button in app.button} >= {"Prune it with all controls"}
    other = page("sparse", **{"sparse task": "class_init"})  # of 370 channels, which nobody has read
    assert {button.label for button in other.button} >= {"Read it", "Prune it with all controls"}
    tasks = next(run for run in runs.all_runs()[0] if run.id.startswith("sparse-tasks") and run.record["model_name"] == "pycode-small")  # noqa: E501  # fmt: skip
    task = "set_or_string_fixedvarname"
    found = runs.run("sparse-circuit", model="pycode-small", task=task, n=32, found=tasks.id).result
    app = page("sparse", **{"sparse task": task})
    shown = {metric.label: metric.value for metric in app.metric}
    assert shown["edges"] == str(tasks.result.rows[task].edges) == "23"
    app.select_slider[0].set_value(10).run()
    assert not app.exception and app.query_params["size"] == "10"
    i = found.sizes.tolist().index(10)
    shown = {metric.label: metric.value for metric in app.metric}
    assert shown["edges"] == str(int(found.edges[i])) and shown["of the whole model"] == f"{found.whole:.3f}"
    assert [metric.value for metric in app.metric if metric.label == "held-out loss"][
        1
    ] == f"{float(found.loss[i]):.3f}"
    for size in ("-1", "7", HOSTILE):
        assert page("sparse", size=size, node=HOSTILE, **{"sparse task": task}).query_params["size"] == "26"


def test_without_sparse_models_there_is_a_way_to_one() -> None:
    app = page("sparse")
    assert "Open the form" in {button.label for button in app.button}


# ---- steering ----


def steered(examples: int = 2) -> LanguageSteering:
    def verdict(strict: float) -> Verdict:
        return Verdict(60, 0.9, (0.8, 0.95), 0.9, 0.1, {"fr": 54}, strict, (0.5, 0.7), fidelity=0.5, score=0.6)

    recipe = Recipe(
        "gemma-3-270m", "gemma-3-270m", "blocks.9.hook_resid_post", 7, 1.5, 2.0, "add", "all", 1.0, "fr", "en"
    )
    cells = tuple(Cell("latent", "blocks.9.hook_resid_post", 7, float(s), 0.5, verdict(0.1 * s)) for s in (1, 2))
    texts = {
        name: tuple((f"prompt {i}", f"{name} wrote {i} {HOSTILE}") for i in range(examples))
        for name in ("none", "latent", "DiffMean")
    }
    table = {name: verdict(0.6) for name in texts}
    return LanguageSteering(recipe, cells, table, texts, {"fr": Bits(1.0, 0.9, 1.1)}, 0.98, 100, "how it was computed")


def test_a_finished_search_is_shown_and_judged_blind() -> None:
    id = save(steered(), "language-steering")
    edit(id, key={**runs.get_run(id).record["key"], "parameters": {"target": "fr"}})
    app = page("steering", run=id)
    shown = {metric.label: metric.value for metric in app.metric}
    assert shown == {"plain success": "0.90", "strict success": "0.60", "fidelity": "0.50", "score": "0.60"}
    codes = [code.value for code in app.code]
    assert sorted(code.split(" wrote")[0] for code in codes if " wrote 0" in code) == ["DiffMean", "latent", "none"]
    letters = [caption.value for caption in app.caption if caption.value in ("A", "B", "C")]
    assert letters == ["A", "B", "C"]
    order = [code.split(" wrote")[0] for code in codes if " wrote 0" in code]
    app.toggle(key="blind named").set_value(True).run()
    named = [caption.value.split(" · ")[1] for caption in app.caption if caption.value[:4] in ("A · ", "B · ", "C · ")]
    assert [name.replace("unsteered", "none") for name in named] == order
    (link,) = [link for link in app.get("page_link") if link.label == "Play with it"]
    query = {name: value for name, (value,) in parse_qs(link.proto.query_string).items()}
    recipe = steered().recipe
    assert (query["sae"], query["hook"], query["latent"]) == (recipe.sae, recipe.hook, str(recipe.latent))
    read = registry.bind(registry.get_analysis("steer"), query)
    assert (read["strengths"], read["unit"], read["decay"]) == ("1.5", recipe.unit, recipe.decay)
    assert (read["kind"], read["scope"]) == (recipe.kind, recipe.scope)


def test_terms_come_before_a_search() -> None:
    app = page("steering")
    assert "Search" not in {button.label for button in app.button}
    app.checkbox(key="steering terms").set_value(True).run()
    assert "Search" in {button.label for button in app.button}


@pytest.mark.parametrize("id", ["../../x", HOSTILE, "none"])
def test_no_such_search_is_a_sentence(id: str) -> None:
    assert "no run is called" in text(page("steering", run=id)).lower()


def test_a_damaged_search_is_a_sentence() -> None:
    id = save(steered(), "language-steering")  # whose record does not say to which language
    assert "is damaged (KeyError: 'target')" in text(page("steering"))
    shutil.rmtree(folder(id))
    assert "damaged" not in text(page("steering"))


def test_another_analysis_run_is_no_search() -> None:
    assert "choose one of language-steering" in text(page("steering", run=save(node_scores())))


def test_what_a_search_would_be_of_is_its_address() -> None:
    query = {"steering target": "Japanese", "steering model": "smollm2-135m", "steering sae": "smollm2-135m-20"}
    (button,) = [one for one in page("steering", **query).button if one.label == "Search"]
    for part in ("--target=ja", "--model=smollm2-135m", "--sae=smollm2-135m-20"):
        assert part in button.help.replace("\\", "")
    hostile = page("steering", **{"steering target": HOSTILE, "steering model": HOSTILE, "steering sae": "/etc"})
    assert "is a path" in text(hostile)
