"""Every notebook runs from top to bottom, on the embedded models and those that come along."""

from __future__ import annotations

import ast
import os
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from workbench.models import LanguageModel

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))
TERMS = {"04_steer_a_language": "gemma-3-270m"}  # models whose terms one accepts first


@pytest.mark.parametrize("path", NOTEBOOKS, ids=[path.stem for path in NOTEBOOKS])
def test_a_notebook_is_committed_without_outputs_and_is_python(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert code and not any(cell.outputs or cell.execution_count for cell in code)
    for cell in code:
        ast.parse(cell.source)
    assert notebook.cells[0].source.startswith("# ")


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=[path.stem for path in NOTEBOOKS])
def test_a_notebook_runs(
    path: Path, smollm: LanguageModel, shared_home: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = TERMS.get(path.stem)
    if model is not None and model not in os.environ.get("WORKBENCH_ACCEPT_TERMS", ""):
        pytest.skip(f"WORKBENCH_ACCEPT_TERMS does not name {model}")
    if model is not None:
        with monkeypatch.context() as patch:
            patch.setenv("WORKBENCH_HOME", str(shared_home))
            LanguageModel.load(model, accept_terms=True)
    (home / "models").mkdir(parents=True)
    for name in ("smollm2-135m", *filter(None, [model])):
        os.symlink(shared_home / "models" / name, home / "models" / name)
    monkeypatch.setenv("IPYTHONDIR", str(home / "ipython"))
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=900, kernel_name="python3").execute()
    errors = [out for cell in notebook.cells for out in cell.get("outputs", []) if out.output_type == "error"]
    assert not errors
