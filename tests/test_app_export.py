"""The page that exports and imports runs."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from streamlit.testing.v1 import AppTest

from tests.test_app import HOSTILE, MAIN, edit, folder, no_cache_between_tests, save, text
from tests.test_plots import lens_result, node_scores
from workbench import bundle, runs, standalone

ON: dict[str, Any] = {"model": "pycode-small-dense", "task": "with_as", "n": 4}
__all__ = ["no_cache_between_tests"]  # a fixture


@pytest.fixture(autouse=True)
def no_browser(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(standalone, "BROWSERS", ())


def page(**query: str) -> AppTest:
    app = AppTest.from_file(str(MAIN), default_timeout=60).run()
    app.switch_page("views/export.py")
    for name, value in query.items():
        app.query_params[name] = value
    app.run()
    assert not app.exception, app.exception[0].message
    return app


def packed(id: str) -> bytes:
    file = io.BytesIO()
    bundle.write(runs.get_run(id), file)
    return file.getvalue()


def labels(app: AppTest) -> list[str]:
    return [button.label for button in app.get("download_button")]


def rows(app: AppTest) -> str:
    return "\n".join(str(table.value.to_string()) for table in app.table)


def test_a_run_is_chosen_by_its_address_and_its_bundle_described() -> None:
    first, second = save(node_scores()), save(lens_result(), "logit-lens", seed=1)
    app = page(run=first)
    assert app.selectbox(key="export run").value == first
    assert labels(app) == ["Download the bundle", "Download the page alone"]
    assert [code.value for code in app.code] == [f"wb export {first}", runs.get_run(first).record["command"]]
    size = sum(path.stat().st_size for path in folder(first).rglob("*") if path.is_file())
    assert f"{size / 1e3:,.0f} kB" in app.expander[0].label and "figure\\.html" in rows(app)
    app.selectbox(key="export run").set_value(second).run()
    assert not app.exception and app.query_params["run"] == second


def test_scores_of_edges_may_be_shown_as_a_circuit() -> None:
    found = runs.run("eap", **ON)
    app = page(run=found.id, size="20")
    assert app.selectbox(key="export size").value == 20
    assert page(run=found.id, size=HOSTILE).selectbox(key="export size").value == 0


@pytest.mark.parametrize("id", ["../../x", "<script>", HOSTILE])
def test_no_such_run_is_taken_as_none(id: str) -> None:
    newest = save(node_scores())
    app = page(run=id)
    assert app.selectbox(key="export run").value == newest and id not in text(app)


def test_without_runs_one_can_be_brought_in() -> None:
    app = page()
    assert "No runs yet" in text(app) and app.file_uploader and not labels(app)


def test_a_bundle_is_imported_and_linked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    id = save(node_scores())
    data = packed(id)
    monkeypatch.setenv("WORKBENCH_HOME", str(tmp_path / "elsewhere"))
    app = page()
    app.file_uploader[0].upload("x.zip", data, "application/zip").run()
    assert not app.exception and runs.get_run(id).summary
    assert f"It is here:** {id.replace('-', chr(92) + '-').replace('_', chr(92) + '_')}" in text(app)
    assert [link.label for link in app.get("page_link")] == ["Open the run"]
    app.run()
    assert not app.exception and app.selectbox(key="export run").value == id and "Imported 2" in text(app)


def test_what_is_refused_is_a_sentence_beside_the_rest() -> None:
    id = save(node_scores())
    edit(id, key={**runs.get_run(id).record["key"], "analysis": "of-a-plugin"})
    app = page(run=id)
    app.file_uploader[0].upload("x.zip", b"PK" + HOSTILE.encode(), "application/zip").run()
    assert not app.exception
    said = [element.value for element in app.text]
    assert any(one.startswith("This bundle is refused: ") for one in said)
    assert any(one.startswith("No analysis is called 'of-a-plugin'") for one in said)
    assert labels(app) == ["Download the bundle"]


def test_hostile_text_is_shown_and_not_rendered() -> None:
    id = save(node_scores(), command=HOSTILE, model_name=HOSTILE)
    app = page(run=id)
    assert HOSTILE in [code.value for code in app.code]
    assert all(HOSTILE not in str(one.value) for one in (*app.markdown, *app.caption, *app.title))
    assert "<script>" not in rows(app)


def test_a_damaged_record_is_a_sentence() -> None:
    id = save(node_scores())
    edit(id, key={**runs.get_run(id).record["key"], "parameters": 3})
    assert "damaged" in text(page(run=id))
