"""What a notebook shows of what a cell ends with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import plotly.graph_objects as go
import plotly.io as pio
import pytest
import torch
from IPython.core.formatters import DisplayFormatter
from IPython.core.interactiveshell import InteractiveShell
from IPython.utils.capture import RichOutput, capture_output

from circuits.graph import Circuit, Graph, top_edges
from saes.figures import SAMPLED, _nearest
from saes.sae import SAE
from workbench import plots, runs
from workbench.models import LanguageModel

pio.renderers.default = "plotly_mimetype"  # without the script by which plotly opens a notebook


def shown(value: object) -> list[dict[str, Any]]:
    """The outputs of a cell that ends with it, by IPython's own formatter."""
    shell = InteractiveShell.instance()
    with capture_output() as captured:
        data, _ = DisplayFormatter(parent=shell).format(value)
    assert data == {}  # it displayed itself
    outputs: list[RichOutput] = captured.outputs
    return [output.data for output in outputs]


def sae(latents: int = 12, d: int = 8) -> SAE:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(latents, d, generator=generator)
    about = {"hook_name": "blocks.1.hook_resid_post", "model_name": "<b>tiny</b>"}
    return SAE("topk", rows.T.clone(), torch.zeros(latents), rows, torch.zeros(d), k=3, about=about)


def test_a_run_says_what_it_is_and_draws_its_result(tiny: LanguageModel) -> None:
    run = runs.run("eap", model=tiny, task="ioi", n=4)
    facts, figure = shown(run)
    html = facts["text/html"]
    for word in ("eap · tiny-llama · ioi, 4 prompts", run.id, f"{run.forward_passes} forward passes", "n_edges"):
        assert word in html, word
    assert plots.definition(run.result)[:40] in html
    drawn = go.Figure(figure["application/vnd.plotly.v1+json"])
    assert len(drawn.data) == len(plots.figure(run.result).data) > 0
    again = shown(runs.run("eap", model=tiny, task="ioi", n=4))
    assert f"{run.id}, found" in again[0]["text/html"]
    assert run.record["created"] not in repr(run)  # in a terminal it is a line


def test_a_run_that_cannot_be_drawn_says_why(tiny: LanguageModel) -> None:
    run = runs.run("eap", model=tiny, task="ioi", n=4)
    (run.folder / "arrays.safetensors").write_bytes(b"not tensors")
    (facts,) = shown(runs.run("eap", model=tiny, task="ioi", n=4))
    assert "is damaged" in facts["text/html"] and run.id in facts["text/html"]


def test_a_circuit_draws_its_edges(make_tiny: Callable[..., LanguageModel]) -> None:
    scores = runs.run("eap", model=make_tiny(), task="ioi", n=4).result
    circuit = top_edges(scores, 20)
    facts, figure = shown(circuit)
    assert "n_edges" in facts["text/html"] and ">20<" in facts["text/html"]
    assert go.Figure(figure["application/vnd.plotly.v1+json"]).data
    empty = Circuit(Graph.of(make_tiny().config), torch.zeros(len(scores.graph), dtype=torch.bool), "none of the edges")
    assert "none of the edges" in shown(empty)[0]["text/html"]
    hostile = shown(replace(circuit, model="<script>", definition="<img>"))[0]["text/html"]
    assert "<script>" not in hostile and "<img>" not in hostile and "&lt;script&gt;" in hostile


def test_an_sae_says_what_it_reads_and_names_are_no_markup() -> None:
    facts, figure = shown(sae())
    assert "blocks.1.hook_resid_post" in facts["text/html"] and "&lt;b&gt;tiny" in facts["text/html"]
    assert "all 12 latents" in facts["text/html"]
    own, random = go.Figure(figure["application/vnd.plotly.v1+json"]).data
    assert len(own.x) == len(random.x) == 12


@pytest.mark.parametrize("latents", [5, SAMPLED + 3])
def test_the_nearest_other_row_is_the_nearest_by_a_loop(latents: int) -> None:
    rows = torch.randn(latents, 6, generator=torch.Generator().manual_seed(1))
    found = _nearest(3.0 * rows)
    places = range(latents) if latents == 5 else (0, latents - 1)
    for i in places:
        others = [j for j in range(latents) if j != i]
        best = max(float(torch.cosine_similarity(rows[i], rows[j], dim=0)) for j in others)
        assert float(found[i if latents == 5 else (0 if i == 0 else -1)]) == pytest.approx(best, abs=1e-5)


def test_rows_that_are_alike_have_a_cosine_of_one() -> None:
    assert torch.allclose(_nearest(torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 1.0]])), torch.tensor([1.0, 1.0, 0.0]))
