"""Bundles: what leaves one machine arrives on another as it was, or is refused in one sentence."""

from __future__ import annotations

import hashlib
import io
import json
import os
import random
import re
import shutil
import struct
import zipfile
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import nbformat
import pytest
import torch
from nbclient import NotebookClient

from tests.conftest import Wb
from tests.test_app import HOSTILE, edit, folder, save
from tests.test_plots import node_scores
from workbench import bundle, places, runs, settings, standalone
from workbench.errors import UserError
from workbench.runs import Run

ON: dict[str, Any] = {"model": "pycode-small-dense", "task": "with_as", "n": 4}
Elsewhere = Callable[[], Path]


@pytest.fixture(autouse=True)
def no_browser(monkeypatch: pytest.MonkeyPatch) -> None:
    """None is found, so that each bundle does not wait for one."""
    monkeypatch.setattr(standalone, "BROWSERS", ())


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run, computed once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WORKBENCH_HOME", str(tmp_path_factory.mktemp("made")))
        return runs.run("eap", **ON).folder


@pytest.fixture
def found(made: Path, home: Path) -> Run:
    shutil.copytree(made, home / "runs" / made.name)
    return runs.get_run(made.name)


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Elsewhere:
    """Go to another machine."""

    def go() -> Path:
        monkeypatch.setenv("WORKBENCH_HOME", str(tmp_path / "elsewhere"))
        return settings.home()

    return go


def packed(run: Run) -> bytes:
    file = io.BytesIO()
    bundle.write(run, file)
    return file.getvalue()


def members(data: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def zipped(files: dict[str, bytes], *, listed: bool = True) -> bytes:
    """A zip of these files; `listed`: its manifest is true of them, as whoever forges one would make it."""
    if listed:
        manifest = json.loads(files[bundle.MANIFEST])
        rest = {name: data for name, data in files.items() if name != bundle.MANIFEST}
        manifest["files"] = {
            name: {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)} for name, data in rest.items()
        }
        files = files | {bundle.MANIFEST: json.dumps(manifest).encode()}
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return out.getvalue()


def refusal(data: bytes) -> str:
    """The sentence with which a bundle is refused; nothing of it is left behind."""
    with pytest.raises(UserError) as caught:
        bundle.read(io.BytesIO(data))
    assert list((settings.home() / "runs").iterdir()) == []
    sentence = str(caught.value)
    assert sentence.endswith(".") and "\n" not in sentence and len(sentence) < 400
    return sentence


def forged(data: bytes, **changes: Any) -> bytes:
    """With another record, of the id that its key gives, and true digests."""
    files = members(data)
    (name,) = (name for name in files if name.endswith("/record.json"))
    record = json.loads(files.pop(name)) | changes
    id = runs._id(record["key"])
    record |= {"id": id} if "id" not in changes else {}
    files = {re.sub("^runs/[^/]+", f"runs/{id}", one): content for one, content in files.items()}
    files[f"runs/{id}/record.json"] = json.dumps(record).encode()
    files[bundle.MANIFEST] = json.dumps(json.loads(files[bundle.MANIFEST]) | {"run": id}).encode()
    return zipped(files)


# ---- there and back ----


def test_a_run_arrives_as_it_left(found: Run, elsewhere: Elsewhere) -> None:
    before = {p.name: p.read_bytes() for p in found.folder.iterdir()}
    result, data = found.result, packed(found)
    home = elsewhere()
    run = bundle.read(io.BytesIO(data))
    assert run.folder == home / "runs" / found.id and run.id == found.id
    assert {p.name: p.read_bytes() for p in run.folder.iterdir() if p.name != bundle.IMPORTED} == before
    assert torch.equal(run.result.scores, result.scores) and run.result.graph.names == result.graph.names
    assert [one.id for one in runs.all_runs()[0]] == [run.id]
    assert runs.run("eap", **ON).hit and bundle.notes(run) == []
    origin = bundle.origin(run)
    assert origin is not None and origin["sha256"] == hashlib.sha256(data).hexdigest()
    assert bundle.origin(found) is None


def test_importing_twice_is_harmless_and_an_import_is_exported_as_the_run_was(found: Run, elsewhere: Elsewhere) -> None:
    data = packed(found)
    elsewhere()
    run = bundle.read(io.BytesIO(data))
    stamp = (run.folder / bundle.IMPORTED).read_bytes(), run.folder.stat().st_mtime_ns
    again = bundle.read(io.BytesIO(data))
    assert stamp == ((again.folder / bundle.IMPORTED).read_bytes(), again.folder.stat().st_mtime_ns)
    assert packed(run) == data


def test_the_manifest_is_true(found: Run) -> None:
    files = members(packed(found))
    manifest = json.loads(files.pop(bundle.MANIFEST))
    assert manifest["run"] == found.id and manifest["needs"] == []
    assert {
        name: {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)} for name, data in files.items()
    } == manifest["files"]
    assert list(manifest["left_out"]) == [bundle.SVG] and "Chromium" in manifest["left_out"][bundle.SVG]
    assert files["command.txt"].decode().strip() == found.record["command"]


def test_what_a_run_was_made_of_comes_along(found: Run, elsewhere: Elsewhere) -> None:
    judged = runs.run("judge", found=found.id, size=20, subsets=0, random=0, each=False, seed=1, **ON)
    data = packed(judged)
    assert json.loads(members(data)[bundle.MANIFEST])["needs"] == [found.id] == bundle.needs(judged)
    elsewhere()
    run = bundle.read(io.BytesIO(data))
    assert {one.id for one in runs.all_runs()[0]} == {judged.id, found.id}
    shutil.rmtree(folder(found.id))
    assert [found.id in note for note in bundle.notes(run)] == [True]


def test_what_comes_with_the_package_is_named_and_not_packed(
    found: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    judged = runs.run("judge", found=found.id, size=20, subsets=0, random=0, each=False, seed=1, **ON)
    shutil.move(found.folder, tmp_path / "shipped" / found.id)
    monkeypatch.setattr(places, "_shipped", [tmp_path / "shipped"])
    planned = bundle.plan(judged)
    assert "comes with the package" in planned.left_out[f"runs/{found.id}"]
    assert {name.split("/")[1] for name in planned.files} == {judged.id}


def test_another_result_of_the_same_run_is_not_overwritten(found: Run, elsewhere: Elsewhere) -> None:
    data = packed(found)
    elsewhere()
    own = bundle.read(io.BytesIO(data))
    edit(own.id, created="2020-01-01T00:00:00+00:00")  # when it was found is not what it found
    bundle.read(io.BytesIO(data))
    edit(own.id, result=own.record["result"] | {"unit": "other"})
    kept = (own.folder / "record.json").read_bytes()
    with pytest.raises(UserError, match="another result"):
        bundle.read(io.BytesIO(data))
    assert (own.folder / "record.json").read_bytes() == kept


def test_an_analysis_that_is_not_known_here_is_imported_and_said(found: Run, elsewhere: Elsewhere) -> None:
    key = found.record["key"] | {"analysis": "of-a-plugin"}
    data = forged(packed(found), key=key)
    elsewhere()
    run = bundle.read(io.BytesIO(data))
    assert run.id.startswith("of-a-plugin-with_as-")
    assert [note[:22] for note in bundle.notes(run)] == ["no analysis is called "]
    out = json.loads(members(packed(run))[bundle.MANIFEST])
    assert out["left_out"][bundle.PAGE].startswith("no analysis is called 'of-a-plugin'")


def test_the_command_line(found: Run, wb: Wb, elsewhere: Elsewhere, tmp_path: Path) -> None:
    path = tmp_path / "a.zip"
    status, out, _ = wb("export", found.id, "--out", str(path), "--json")
    assert status == 0 and json.loads(out)["bytes"] == path.stat().st_size
    assert wb("export", found.id, "--out", str(path))[0] == 2 and os.listdir(tmp_path).count("a.zip") == 1
    elsewhere()
    status, out, _ = wb("import", str(path))
    assert status == 0 and out.startswith(f"{found.id}  imported 2")
    assert wb("import", str(tmp_path / "none.zip"))[0] == 2


# ---- for who has no workbench ----


class Loads(HTMLParser):
    """What a page has the browser load, and the elements in it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.tags: list[str] = []
        self.policy = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        given = dict(attributes)
        self.loads += [str(value) for name, value in attributes if name in ("src", "href", "data", "action", "srcset")]
        self.loads += [name for name in given if name.startswith("on")]
        self.policy = self.policy or given.get("content") or "" if given.get("http-equiv") else self.policy


def test_the_page_loads_nothing_and_may_not(found: Run) -> None:
    text = standalone.page(found)
    page = Loads(text)
    assert page.loads == [] and page.tags.count("script") == 3 and "link" not in page.tags
    scripts = re.findall(r"<script>(.*?)</script>", text, re.S)
    allowed = re.findall(r"'sha256-([^']+)'", page.policy)
    assert allowed == [standalone._hash(script) for script in scripts] and page.policy.startswith("default-src 'none'")
    assert not re.search(r"url\(|@import|https?://", text.replace(scripts[0], ""))
    assert "prefers-color-scheme: dark" in text and found.record["command"] in text


def test_hostile_text_is_text(elsewhere: Elsewhere) -> None:
    bad = "</script><script>alert(1)</script>" + HOSTILE
    id = save(replace(node_scores(), unit=bad, definition=bad), command=bad, model_name=bad, environment={bad: bad})
    edit(id, task=runs.get_run(id).record["task"] | {"metric": bad, bad: bad})
    text = standalone.page(runs.get_run(id))
    page = Loads(text)
    assert page.loads == [] and page.tags.count("script") == 3 and not {"img", "a"} & set(page.tags)
    assert text.count("<script") == 3
    data = packed(runs.get_run(id))
    cells = nbformat.reads(members(data)["notebook.ipynb"].decode(), as_version=4).cells
    for cell in cells:  # a program whose strings are the record's
        if cell.cell_type == "code":
            compile(cell.source, "cell", "exec")
    assert not [cell for cell in cells if "alert" in cell.source and repr(bad) not in cell.source]
    elsewhere()
    assert bundle.read(io.BytesIO(data)).record["command"] == bad


def test_a_parameter_that_would_be_a_program_is_refused() -> None:
    id = save(node_scores())
    key = runs.get_run(id).record["key"]
    edit(id, key=key | {"parameters": {"x=__import__('os')": 1}})
    with pytest.raises(UserError, match="damaged"):
        packed(runs.get_run(id))


def test_the_notebook_runs_where_it_is_unpacked(
    found: Run, elsewhere: Elsewhere, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with zipfile.ZipFile(io.BytesIO(packed(found))) as archive:
        archive.extractall(tmp_path / "unpacked")
    home = elsewhere()
    monkeypatch.setenv("IPYTHONDIR", str(home / "ipython"))
    notebook = nbformat.read(tmp_path / "unpacked" / "notebook.ipynb", as_version=4)
    nbformat.validate(notebook)
    at = {"metadata": {"path": str(tmp_path / "unpacked")}}
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources=at).execute()
    said = "".join(out.get("text", "") for out in notebook.cells[-1].outputs)
    assert said == f"{found.record['command']}\nTrue True\n"
    assert (home / "runs" / found.id / bundle.IMPORTED).is_file()


@pytest.mark.browser
@pytest.mark.skipif(not shutil.which("chromium"), reason="needs Chromium: apt-get install chromium")
def test_a_browser_draws_the_figure_the_same_twice(found: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(standalone, "BROWSERS", ("chromium",))
    text = standalone.page(found)
    drawn = standalone.svg(text)
    assert drawn.startswith("<svg") and "a2.h4" in drawn and drawn == standalone.svg(text)


# ---- what is refused ----


def test_a_change_of_any_file_is_refused(found: Run, elsewhere: Elsewhere) -> None:
    files = members(packed(found))
    elsewhere()
    for name in files.keys() - {bundle.MANIFEST}:
        changed = bytearray(files[name])
        changed[len(changed) // 2] ^= 1
        assert f"{name} is not what was exported" in refusal(zipped(files | {name: bytes(changed)}, listed=False))
        assert "is missing" in refusal(zipped({n: d for n, d in files.items() if n != name}, listed=False))
        longer = refusal(zipped(files | {name: files[name] + b" "}, listed=False))
        assert f"{name} is not what was exported" in longer
    assert bundle.MANIFEST in refusal(zipped({n: d for n, d in files.items() if n != bundle.MANIFEST}, listed=False))


@pytest.mark.parametrize(
    "name",
    ["../x.json", "/etc/x.json", "runs/../../x.json", "runs\\x.json", "runs/a-0123456789ab/../record.json",
     "runs/ID/files/../../x.json", "runs/ID/files/.x.json", "runs/ID/files/x.pkl", "runs/ID/imported.json",
     "runs/ID/files//x.json", "runs/ID/files/x\0.json", "runs/ID/files/", "figure.html/x.json", "C:x.json", HOSTILE],
)  # fmt: skip
def test_names_that_no_bundle_holds_are_refused(name: str, found: Run, elsewhere: Elsewhere) -> None:
    files, name = members(packed(found)), name.replace("ID", found.id)
    home = elsewhere()
    # zipfile would cut the name at a NUL when it writes.
    data = zipped(files | {name.replace("\0", "\1"): b"{}"}).replace(b"x\1.json", b"x\0.json")
    assert "nothing that a bundle holds" in refusal(data)
    assert not [path for path in home.parent.rglob("x*.json")]


def test_a_link_is_refused(found: Run, elsewhere: Elsewhere) -> None:
    files = members(packed(found))
    elsewhere()
    name = f"runs/{found.id}/files/x.json"
    data = bytearray(zipped(files | {name: b"/etc/passwd"}))
    at = data.rindex(name.encode()) - 46  # its entry in the directory, whose attributes are at 38
    assert data[at : at + 4] == b"PK\1\2"
    data[at + 38 : at + 42] = struct.pack("<I", 0o120777 << 16)
    assert f"{name!r} is nothing that a bundle holds" in refusal(bytes(data))


def test_the_same_name_twice_is_refused(found: Run, elsewhere: Elsewhere) -> None:
    data = io.BytesIO(packed(found))
    elsewhere()
    with zipfile.ZipFile(data, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr("command.txt", "rm")
    assert "same name" in refusal(data.getvalue())


def test_bombs_are_refused_before_they_are_unpacked(
    found: Run, elsewhere: Elsewhere, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = members(packed(found))
    elsewhere()
    # A file that says it is of 3 GB: the sizes are in the directory at the end, which alone is looked at.
    data, at = bytearray(zipped(files)), 0
    at = data.rindex(b"PK\1\2")
    data[at + 24 : at + 28] = struct.pack("<I", 3 * 10**9)
    assert "more than 2 GB" in refusal(bytes(data))
    many = {f"runs/{found.id}/files/{i}.json": b"" for i in range(bundle.MOST_FILES + 10)}
    assert "1,000 files" in refusal(zipped(files | many))
    # Too many to be counted: a directory larger than any that is written.
    end = len(data) - 22
    data[end + 12 : end + 16] = struct.pack("<I", 2 * 10**8)
    assert "1,000 files" in refusal(bytes(data))
    # One that unpacks to more than it says.
    name = f"runs/{found.id}/record.json"
    told = json.loads(files[bundle.MANIFEST])
    told["files"][name]["bytes"] = 10
    assert "digest differs" in refusal(zipped(files | {bundle.MANIFEST: json.dumps(told).encode()}, listed=False))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"id": "eap-with_as-000000000000"}, "another id"),
        ({"created": "yesterday"}, "not one that a run writes"),
        ({"created": "2026-01-01T00:00:00"}, "not one that a run writes"),  # which sorts with no other
        ({"summary": {"top_heads": [["a0.h0", 10**400]]}}, "cannot be read"),
        ({"command": 3}, "not one that a run writes"),
        ({"summary": []}, "not one that a run writes"),
        ({"result": {"tensor": "../x"}}, "not one that a run writes"),
        ({"result": {"scores": {"tensor": "nowhere"}}}, "not one that a run writes"),
    ],
)
def test_records_that_no_run_writes_are_refused(
    changes: dict[str, Any], says: str, found: Run, elsewhere: Elsewhere
) -> None:
    data = forged(packed(found), **changes)
    elsewhere()
    assert says in refusal(data)


def test_an_id_that_is_not_of_the_key_is_refused(found: Run, elsewhere: Elsewhere) -> None:
    other = found.id[:-12] + "0" * 12
    data = zipped({name: text.replace(found.id.encode(), other.encode()) if name.endswith(".json") else text
                   for name, text in ((name.replace(found.id, other), text)
                                      for name, text in members(packed(found)).items())})  # fmt: skip
    elsewhere()
    assert "another id than its key gives" in refusal(data)


def test_a_run_of_a_later_version_is_refused(found: Run, elsewhere: Elsewhere) -> None:
    data = packed(found)
    files = members(data)
    elsewhere()
    later = runs.RECORD_VERSION + 1
    assert f"format {later}" in refusal(forged(data, key=found.record["key"] | {"record_version": later}))
    manifest = json.loads(files[bundle.MANIFEST]) | {"format": bundle.FORMAT + 1}
    assert f"format {bundle.FORMAT + 1}" in refusal(zipped(files | {bundle.MANIFEST: json.dumps(manifest).encode()}))


def test_a_number_of_prompts_that_is_none_is_refused(found: Run, elsewhere: Elsewhere) -> None:
    data = forged(packed(found), key=found.record["key"] | {"n": float("inf")})
    elsewhere()
    assert "not one that a run writes" in refusal(data)


@pytest.mark.parametrize("text", ["{", "[" * 10**5, "[]", '{"key": 1}', '{"key": {"record_version": 1}}', "null", "\0"])
def test_files_that_are_no_json_of_ours_are_refused(text: str, found: Run, elsewhere: Elsewhere) -> None:
    files = members(packed(found))
    elsewhere()
    assert "cannot be read" in refusal(zipped(files | {f"runs/{found.id}/record.json": text.encode()}))
    assert "cannot be read" in refusal(zipped(files | {bundle.MANIFEST: text.encode()}, listed=False))


def test_arrays_that_cannot_be_read_are_refused(found: Run, elsewhere: Elsewhere) -> None:
    files = members(packed(found))
    elsewhere()
    for name in ("arrays", "activations"):
        assert "cannot be read" in refusal(zipped(files | {f"runs/{found.id}/{name}.safetensors": b"\xff" * 64}))


def test_whatever_a_bundle_is_cut_or_changed_to_is_a_sentence(found: Run, elsewhere: Elsewhere) -> None:
    files = members(packed(found))
    small = zipped({name: data for name, data in files.items() if name != bundle.PAGE})
    elsewhere()
    rng, refused = random.Random(0), 0
    for _ in range(300):
        data = bytearray(small)
        if rng.random() < 0.3:
            del data[rng.randrange(len(data)) :]
        for _ in range(rng.choice([1, 1, 30])):
            # Half of the changes in the directory, which is what is trusted to find the rest.
            low = max(0, len(data) - 700) if rng.random() < 0.5 else 0
            if data:
                data[rng.randrange(low, len(data))] = rng.randrange(256)
        try:
            run = bundle.read(io.BytesIO(bytes(data)))
        except UserError:
            refused += 1
        else:  # a byte that nobody reads, of a date
            assert run.record == found.record
            shutil.rmtree(run.folder)
    assert refused > 200


def test_what_a_bundle_may_not_hold_is_not_exported(found: Run) -> None:
    (found.folder / "files").mkdir()
    (found.folder / "files" / "x.pkl").write_bytes(b"x")
    with pytest.raises(UserError, match="nothing that a bundle may hold"):
        packed(found)
