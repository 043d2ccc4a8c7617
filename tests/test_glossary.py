"""The glossary against the code: what it names exists, and what results and pages name is in it."""

from __future__ import annotations

import ast
import importlib
import inspect
import math
import textwrap
from collections import Counter
from typing import Any

import pytest
import torch
from streamlit.testing.v1 import AppTest

from circuits import evaluate
from circuits.graph import Graph
from circuits.sparse.training_run import SOLVED
from saes.steering import languages, search
from tests.test_app import HOSTILE, page, run_page, save, text
from tests.test_app_circuit import page as circuit_page
from tests.test_plots import node_scores
from workbench import glossary, metrics, registry, runs
from workbench.activations import ActivationStore
from workbench.glossary import Term
from workbench.models import LanguageModel
from workbench.prompts import sample


def labels(app: AppTest) -> set[str]:
    return {metric.label.replace("\\", "") for metric in app.metric}


# ---- terms ----


def test_names_are_of_one_term_each_and_terms_are_sorted() -> None:
    counts = Counter(glossary.plain(name) for term in glossary.terms() for name in term.names)
    assert [name for name, n in counts.items() if n > 1] == []
    order = [term.term.casefold() for term in glossary.terms()]
    assert order == sorted(order) and len(order) > 100


@pytest.mark.parametrize("term", glossary.terms(), ids=lambda term: term.term)
def test_a_term_is_said_in_one_to_three_sentences_and_names_what_exists(term: Term) -> None:
    assert 20 < len(term.text) < 600 and term.text.endswith((".", ")"))
    assert set(term.analyses) <= set(registry.analyses())
    for name in term.code:
        assert exists(name), name


def exists(name: str) -> bool:
    parts = name.split(".")
    for n in range(len(parts), 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:n]))
        except ModuleNotFoundError:
            continue
        for part in parts[n:]:
            if not hasattr(found, part):
                return part in getattr(found, "__annotations__", {})
            found = getattr(found, part)
        return True
    return False


def test_terms_are_found_in_any_case_and_spelling() -> None:
    for name in ("faithfulness", "FAITHFULNESS", "faithfulness_95", "  Faithfulness "):
        assert glossary.find(name) is glossary.find("faithfulness") is not None
    assert glossary.find("Logit_Diff") is glossary.find("logit difference")
    assert glossary.find("eap ig") is glossary.find("EAP-IG") is not glossary.find("eap")
    assert glossary.find("") is None and glossary.find(HOSTILE) is None


def test_a_search_has_the_term_of_that_name_first_and_all_words_in_each() -> None:
    found = glossary.search("patching")
    assert found[0].term == "activation patching" and {"path patching", "edge patching"} <= {one.term for one in found}
    for term in glossary.search("mean prompts"):
        whole = glossary.plain(" ".join([*term.names, term.text, term.source]))
        assert "mean" in whole and "prompts" in whole
    assert glossary.search(HOSTILE) == []


# ---- against the code ----


def test_every_metric_has_an_entry_that_names_it() -> None:
    own = [name for name, fn in vars(metrics).items() if inspect.isfunction(fn) and not name.startswith("_")]
    assert set(metrics.METRICS) <= set(own)
    for name in own:
        found = glossary.find(name)
        assert found is not None and f"workbench.metrics.{name}" in found.code, name


def test_every_number_of_a_summary_is_in_the_glossary() -> None:
    """Fields that the summaries of registered results give by name; nested tables have names of their own."""
    for kind in {entry.result for entry in registry.analyses().values()}:
        if not kind.__module__.startswith(("workbench", "circuits", "saes", "papers")):
            continue
        tree = ast.parse(textwrap.dedent(inspect.getsource(kind.summary)))  # type: ignore[attr-defined]
        returned = [node.value for node in ast.walk(tree) if isinstance(node, ast.Return)]
        for call in (node for value in returned if value is not None for node in top_level(value)):
            assert glossary.find(call) is not None, f"{kind.__name__}: {call}"


def top_level(value: ast.expr) -> list[str]:
    """Keys of a dictionary whose values are made numbers of where they stand."""
    if not isinstance(value, ast.Dict):
        return []
    numbers = {"round", "int", "float", "len", "sum"}
    return [
        key.value
        for key, item in zip(value.keys, value.values, strict=True)
        if isinstance(key, ast.Constant)
        and isinstance(item, ast.Call)
        and isinstance(item.func, ast.Name)
        and item.func.id in numbers
    ]


def test_every_label_of_the_run_and_circuit_pages_is_in_the_glossary() -> None:
    on: dict[str, Any] = {"model": "pycode-small-dense", "task": "with_as", "n": 16}
    shown = labels(run_page(save(node_scores())))
    found = runs.run("eap", **on)
    runs.run("judge-sizes", seed=1, found=found.id, **on)
    less = {"without": found.result.nodes().nodes[0], "each": False, "subsets": 0, "random": 0}
    size = 500
    runs.run("judge", seed=1, found=found.id, size=size, **less, **on)
    shown |= labels(circuit_page(found.id, size=str(size), without=str(less["without"])))
    assert {"faithfulness", "accuracy", "top-1", "logit_diff, clean"} <= shown
    assert {label for label in shown if glossary.find(label) is None} == set()


def told(name: str) -> str:
    found = glossary.find(name)
    assert found is not None
    return found.text


def test_what_the_texts_say_of_numbers_is_what_is_computed() -> None:
    """Thresholds and ends that texts name, from the code that has them."""
    assert f"more than {languages.PURE}" in told("strict success")
    assert f"less than {languages.MOST_REPEATED}" in told("strict success")
    assert search.ACTIVE_IN == 0.5 and search.ACTIVE_ON_NOISE == 0.1 and "half" in told("LangFIR")
    assert f"{SOLVED:.0%}".replace("%", " %") in told("solved task") and f"{evaluate.BOOTSTRAP:,}" in told("bootstrap")
    assert evaluate.areas([0.0, 1.0], [0.5, 1.0]) == (0.75, 0.25)  # CPR under the curve, CMD between it and 1
    assert languages.harmonic(1.0, 0.0) == 0 and "0 where one of them is" in told("harmonic mean score")
    both = torch.tensor([[2.0, 0.0]]), [torch.tensor([0])], [torch.tensor([1])]
    assert float(metrics.logit_diff(*both)) == 2 and "minus" in told("logit difference")
    even = torch.zeros(1, 2), *both[1:]
    assert float(metrics.binary_loss(*even)) == pytest.approx(math.log(2)) and "ln 2" in told("binary loss")
    assert float(metrics.logit_diff(*even)) == float(metrics.prob_diff(*even)) == 0 and "0 when right" in told("metric")


def test_faithfulness_is_normalised_as_its_text_says(tiny: LanguageModel, store: ActivationStore) -> None:
    """(m(C) - m(0)) / (m(M) - m(0)), of means over prompts."""
    batch, graph = sample(registry.get_task("ioi"), tiny, 4, 0), Graph.of(tiny.config)
    kept = torch.rand(1, len(graph), generator=torch.Generator().manual_seed(0)) < 0.5
    found = evaluate.faithfulness(tiny, batch, store, graph, kept)
    assert float(found.value[0]) == pytest.approx(
        (float(found.metric[0]) - found.nothing) / (found.whole - found.nothing), rel=1e-3
    )
    assert told("faithfulness").startswith("(m(C) - m(0)) / (m(M) - m(0))")


# ---- cards ----


@pytest.mark.parametrize("name", registry.analyses())
def test_a_card_has_the_prose_and_not_the_parameters(name: str) -> None:
    entry = registry.get_analysis(name)
    card = glossary.card(entry)
    assert card.about == entry.about and card.manual and card.about not in card.prose
    assert [one.name for one in card.parameters] == list(entry.parameters)
    doc = " ".join((inspect.getdoc(entry.fn) or "").split())
    for line in filter(None, (line.strip() for line in card.prose.splitlines())):
        assert line in doc
    listed = [line.split("  ")[0].strip() for line in card.prose.splitlines() if "  " in line.strip()]
    assert not set(listed) & entry.parameters.keys()


def test_a_card_says_where_an_analysis_fails() -> None:
    assert "Raises UserError for models that norm" in glossary.card(registry.get_analysis("cd-t")).prose
    assert "not causal" in glossary.card(registry.get_analysis("sae-codes")).manual


# ---- the page ----


def test_the_page_shows_every_term_and_a_card_for_every_analysis() -> None:
    app = page("glossary")
    shown = text(app).replace("\\", "")
    for term in glossary.terms():
        assert f"**{term.term}**" in shown.replace("\u2060", ""), term.term
    expanders = [expander.label.replace("\\", "") for expander in app.expander]
    assert [label.split("**")[1] for label in expanders] == list(registry.analyses())
    assert {link.label for link in app.page_link} >= {"Start it"}


def test_a_term_in_the_address_comes_first_with_its_analyses() -> None:
    app = page("glossary", term="FAITHFULNESS")
    assert app.markdown[0].value.startswith("**faithfulness**") and app.text_input[0].value == "FAITHFULNESS"
    assert [link.label for link in app.page_link][:3] == ["judge", "judge-sizes", "extract"]
    app.text_input[0].set_value("loss recovered").run()
    assert app.markdown[0].value.startswith("**loss recovered**")


@pytest.mark.parametrize("term", [HOSTILE, "x" * 10_000, "../../x", "\x00", "%", "[a](b)"])
def test_a_hostile_term_is_no_term(term: str) -> None:
    app = page("glossary", term=term)
    for element in (*app.markdown, *app.caption, *app.title):
        assert not getattr(element.proto, "allow_html", False)
        assert "<script>" not in element.value and "evil.example" not in element.value
    assert len(app.expander) == len(registry.analyses())
