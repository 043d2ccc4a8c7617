"""Bundles: a run in one zip file, to be read without the workbench and taken into another one.

    wb export eap-ioi-1a2b3c4d5e6f         writes eap-ioi-1a2b3c4d5e6f.zip
    wb import eap-ioi-1a2b3c4d5e6f.zip     checks it, and puts its run among those of this machine

It holds the run's folder as it is, and those of the runs it was made of (a judged one, a model that one trained) unless
they come with the package, in `runs/ID`; and for who has no workbench

    figure.html        figure, tables and provenance as a page that needs no server and may not use a network
    figure.svg         the figure alone; drawn by a Chromium or Chrome of this machine, left out where there is none
    notebook.ipynb     opens the bundle, draws and prints the result, and asks for the run again
    command.txt        what the run was made with
    environment.json   of the machine that computed it, and of the one that exported it
    manifest.json      the run, what it needs, what was left out and why, and sha256 and bytes of each other file

What is imported is checked before it is put in place: names, sizes, digests, the format of the record, that the id is
that of the record's key, and that the result can be read. A run that is here already is never overwritten. Digests find
damage; they do not tell who made a bundle, and its numbers are as good as their sender. So a run that was imported says
so, in `imported.json` beside its record.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import stat
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any, NamedTuple

from safetensors import SafetensorError, safe_open

from workbench import places, registry, runs, settings, standalone, texts
from workbench.errors import UserError
from workbench.pretrained import write_json
from workbench.runs import Run

FORMAT = 1
MOST_BYTES, MOST_FILES = 2 * 10**9, 1000  # unpacked
MANIFEST, IMPORTED = "manifest.json", "imported.json"
PAGE, SVG = "figure.html", "figure.svg"
MADE = (PAGE, SVG, "notebook.ipynb", "command.txt", "environment.json")
_LISTED = 10**6  # bytes of the manifest, and of the zip's own directory
_BLOCK, _ROOM = 1 << 20, 10**8  # the latter for what is made, which the limit is not meant for
# No part of a name starts with a dot, and nothing is in it that runs as a program when it is opened.
_KEPT = re.compile(
    r"runs/([a-z0-9_-]{1,200})/(record\.json|(?:arrays|activations)\.safetensors|"
    r"files/(?:[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}/){0,8}[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}\.(?:jsonl?|safetensors|model|txt))"
)
_ID = re.compile(r"(?<![\w./-])[a-z0-9_-]{1,187}-[0-9a-f]{12}(?![\w-])")  # not within a path
_KINDS = {
    "id": str, "key": dict, "model_name": str, "command": str, "created": str, "task": dict, "summary": dict,
    "cost": dict, "environment": dict,
}  # fmt: skip
# What reading a record that was changed by hand may raise.
_BROKEN = (LookupError, TypeError, ValueError, AttributeError, StopIteration, RuntimeError)


# ---- what a bundle holds ----


def needs(run: Run) -> list[str]:
    """Ids of the runs that a run was made of, by its parameters and its model, and of those that these were made of."""
    found: list[str] = []
    ahead = [run]
    while ahead:
        record = ahead.pop().record
        for word in _named(record):
            for id in _ID.findall(word):
                if id not in (run.id, *found):
                    found.append(id)
                    ahead += [runs.get_run(id)] if places.folder_of(id) else []
    return sorted(found)


def _named(record: Mapping[str, Any]) -> list[str]:
    """What may name something else: the model, and parameters but those that are texts of one's own."""
    key = record["key"]
    known = registry.analyses().get(key["analysis"])
    prose = {name for name, one in known.parameters.items() if one.kind == registry.Prose} if known else set()
    words = [record["model_name"], *(value for name, value in key["parameters"].items() if name not in prose)]
    return [word for word in words if isinstance(word, str)]


class Plan(NamedTuple):
    files: dict[str, Path]  # what is there already, by its name in the bundle
    left_out: dict[str, str]  # what is not, and why


def plan(run: Run) -> Plan:
    """The files of the runs that a bundle will hold. Raises UserError for what no bundle may hold."""
    own = settings.home() / "runs"
    folders, left_out = {run.id: run.folder}, {}
    for id in needs(run):
        folder = places.folder_of(id)
        if folder is None:
            left_out[f"runs/{id}"] = "this run is not on the machine that exported"
        elif folder.parent != own:
            left_out[f"runs/{id}"] = "this run comes with the package"
        else:
            folders[id] = folder
    for word in _named(run.record):
        if word.startswith(texts.PATHS):
            left_out[word] = "a path of the machine that computed"
    files = {
        f"runs/{id}/{path.relative_to(folder).as_posix()}": path
        for id, folder in folders.items()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path != folder / IMPORTED
    }
    for name, path in files.items():
        if not _KEPT.fullmatch(name) or path.is_symlink():
            raise UserError(f"{path} is nothing that a bundle may hold; move it out of the run's folder.")
    total = sum(path.stat().st_size for path in files.values())
    if total > MOST_BYTES or len(files) > MOST_FILES:
        raise UserError(
            f"run {run.id} and what it needs are {total / 1e9:.1f} GB in {len(files):,} files, and a bundle holds "
            f"{MOST_BYTES / 1e9:.0f} GB in {MOST_FILES:,} at most; copy {run.folder} instead."
        )
    return Plan(files, left_out)


def write(run: Run, file: Path | IO[bytes]) -> dict[str, Any]:
    """Make a bundle, and return its manifest. The same run gives the same bytes on the same machine."""
    planned = plan(run)
    left_out = dict(planned.left_out)
    try:
        made = {
            "command.txt": run.record["command"] + "\n",
            "environment.json": json.dumps(
                {"computed": run.record["environment"], "exported": runs.environment()}, indent=1
            ),
        }
        try:
            made |= {PAGE: standalone.page(run), "notebook.ipynb": standalone.notebook(run)}
        except UserError as error:  # of an analysis that is not known here, or in another version
            left_out |= dict.fromkeys((PAGE, SVG, "notebook.ipynb"), str(error))
        else:
            try:
                made[SVG] = standalone.svg(made[PAGE])
            except UserError as error:
                left_out[SVG] = str(error)
    except _BROKEN as error:
        raise UserError(
            f"run {run.id} is damaged ({type(error).__name__}: {error}); delete {run.folder} and run it again."
        ) from error
    listed: dict[str, dict[str, Any]] = {}
    with zipfile.ZipFile(file, "w") as archive:
        for name, path in planned.files.items():
            with path.open("rb") as source:
                listed[name] = _add(archive, name, source)
        for name in (name for name in MADE if name in made):
            listed[name] = _add(archive, name, io.BytesIO(made[name].encode("utf-8", "replace")))
        manifest = {
            "format": FORMAT, "run": run.id, "needs": needs(run), "left_out": left_out, "files": listed,
        }  # fmt: skip
        _add(archive, MANIFEST, io.BytesIO(json.dumps(manifest, indent=1).encode()))
    return manifest


def _add(archive: zipfile.ZipFile, name: str, source: IO[bytes]) -> dict[str, Any]:
    entry = zipfile.ZipInfo(name)  # of 1980, so that the time of export is not in the bytes
    entry.compress_type = zipfile.ZIP_DEFLATED
    entry.external_attr = (stat.S_IFREG | 0o644) << 16
    with archive.open(entry, "w") as target:
        return _copy(source, target)


def _copy(source: IO[bytes], target: IO[bytes], most: int = MOST_BYTES) -> dict[str, Any]:
    digest, size = hashlib.sha256(), 0
    while block := source.read(_BLOCK):
        size += len(block)
        if size > most:
            break
        digest.update(block)
        target.write(block)
    return {"sha256": digest.hexdigest(), "bytes": size}


# ---- import ----


def read(source: str | Path | IO[bytes]) -> Run:
    """Check a bundle, a file or a folder it was unpacked in, and put its runs where those of this machine are.

    Of a folder only what is imported is looked at: the notebook in it may have been run. Raises UserError, in one
    sentence, for whatever is not as `write` writes it, and for a run that is here already with another result.
    """
    root = settings.home() / "runs"
    settings.writable_folder(root)
    try:
        with _opened(source) as bundle, tempfile.TemporaryDirectory(dir=root, prefix=".import-") as at:
            aside = Path(at) / "runs"
            manifest = _manifest(bundle)
            for name, told in manifest["files"].items():
                if name in bundle.names:
                    _unpack(name, told, bundle, Path(at))
            ids = {match[1]: None for name in manifest["files"] if (match := _KEPT.fullmatch(name))}
            # Last its own run: once that is here, so is what it needs.
            order = sorted(ids, key=lambda id: id == manifest["run"])
            for id in order:
                _check(aside / id, id)
            for id in [id for id in order if not _here(aside / id, id)]:
                now = datetime.now(UTC).isoformat(timespec="seconds")
                said = {"imported": now, "bundle": manifest["run"], "sha256": bundle.digest}
                write_json(aside / id / IMPORTED, said)
                os.rename(aside / id, root / id)
    except UserError:
        raise
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, ValueError) as error:
        raise _refused(f"it is no zip file that can be read ({error})") from error
    return runs.get_run(manifest["run"])


def origin(run: Run) -> dict[str, Any] | None:
    """When a run was imported, the bundle it came in and that one's sha256; None if it was not."""
    path = run.folder / IMPORTED
    if not path.is_file():
        return None
    said: dict[str, Any] = json.loads(path.read_text())
    return said


def notes(run: Run) -> list[str]:
    """A sentence for each thing that does not work with a run here: its result, and the runs that it needs."""
    said = []
    try:
        registry.get_analysis(run.record["key"]["analysis"])  # the first to say if there is none
        _ = run.result
    except UserError as error:
        said.append(str(error))
    gone = [id for id in needs(run) if places.folder_of(id) is None]
    return said + [f"{id}, which it was made of, is not on this machine." for id in gone]


def _refused(why: str) -> UserError:
    return UserError(f"this bundle is refused: {why}.")


class Opened(NamedTuple):
    names: set[str]
    open: Callable[[str], IO[bytes]]
    digest: str
    whole: bool  # a zip; of a folder it was unpacked in, only what is imported is looked at


@contextmanager
def _opened(source: str | Path | IO[bytes]) -> Iterator[Opened]:
    """Names, how to open one, and the digest of all."""
    if isinstance(source, str | Path):
        path = Path(source).expanduser()
        if path.is_dir():
            found = {p.relative_to(path).as_posix() for p in (path / MANIFEST, *path.glob("runs/**/*")) if p.is_file()}
            digest = hashlib.sha256((path / MANIFEST).read_bytes()).hexdigest() if MANIFEST in found else ""
            yield Opened(found, lambda name: (path / name).open("rb"), digest, False)
            return
        if not path.is_file():
            raise UserError(f"there is no file {path}; give a bundle that `wb export` wrote.")
        with path.open("rb") as file, _opened(file) as opened:
            yield opened
        return
    _bounded(source)
    with zipfile.ZipFile(source) as archive:
        entries = archive.infolist()
        if len(entries) > MOST_FILES + len(MADE) + 1 or sum(entry.file_size for entry in entries) > MOST_BYTES + _ROOM:
            raise _refused(f"it unpacks to more than {MOST_BYTES / 1e9:.0f} GB or {MOST_FILES:,} files")
        for entry in entries:
            kind = stat.S_IFMT(entry.external_attr >> 16)
            name = entry.orig_filename  # before zipfile makes it harmless
            if kind not in (0, stat.S_IFREG) or not (_KEPT.fullmatch(name) or name in (*MADE, MANIFEST)):
                raise _refused(f"{name[:80]!r} is nothing that a bundle holds")
        names = {entry.filename for entry in entries}
        if len({name.lower() for name in names}) < len(entries):
            raise _refused("two of its files have the same name")
        source.seek(0)
        digest = hashlib.file_digest(source, "sha256").hexdigest()  # type: ignore[arg-type]
        yield Opened(names, archive.open, digest, True)


def _bounded(file: IO[bytes]) -> None:
    """Refuse a directory of millions of files, which zipfile would read whole before it can be counted."""
    size = file.seek(0, io.SEEK_END)
    file.seek(max(0, size - 42))
    end = file.read().rjust(42, b"\0")
    if end[20:24] != b"PK\5\6":
        raise _refused("it is no zip file that `wb export` wrote")
    if end[:4] == b"PK\6\7" or int.from_bytes(end[32:36], "little") > _LISTED:
        raise _refused(f"it lists more than {MOST_FILES:,} files")


def _manifest(bundle: Opened) -> dict[str, Any]:
    """What is in the bundle, which is what it says it is."""
    if MANIFEST not in bundle.names:
        raise _refused(f"it has no {MANIFEST}")
    with bundle.open(MANIFEST) as file:
        text = file.read(_LISTED)
    try:
        manifest: dict[str, Any] = json.loads(text)
        version, run, files = manifest["format"], manifest["run"], manifest["files"]
        well = all(isinstance(told["bytes"], int) and told["bytes"] >= 0 for told in files.values())
        if not well or not all(isinstance(id, str) for id in (run, *manifest["needs"])):
            raise TypeError
    except (LookupError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise _refused(f"its {MANIFEST} cannot be read") from error
    if version != FORMAT:
        raise _refused(f"it is of format {str(version)[:20]}, and this version of the workbench reads {FORMAT}")
    kept = {name: match[1] for name in files if (match := _KEPT.fullmatch(name))}
    for name in sorted(set(files) | (bundle.names - {MANIFEST} if bundle.whole else set())):
        if name not in kept and name not in MADE:
            raise _refused(f"{name[:80]!r} is nothing that a bundle holds")
        if name not in files:
            raise _refused(f"{name!r} is not listed in its {MANIFEST}")
        if name not in bundle.names and (name in kept or bundle.whole):
            raise _refused(f"{name!r} is missing")
    if run not in kept.values() or not set(kept.values()) <= {run, *manifest["needs"]}:
        raise _refused(f"its {MANIFEST} names other runs than it holds")
    return manifest


def _unpack(name: str, told: Mapping[str, Any], bundle: Opened, folder: Path) -> None:
    target = folder / name
    target.parent.mkdir(parents=True, exist_ok=True)
    with bundle.open(name) as source, target.open("xb") as file:
        found = _copy(source, file, told["bytes"])
    if found != {"sha256": told.get("sha256"), "bytes": told["bytes"]}:
        raise _refused(f"{name} is not what was exported: its digest differs")


def _check(folder: Path, id: str) -> None:
    """Raise UserError unless a folder is that of a run as this version writes it, with the id that belongs to it."""
    try:
        record = json.loads((folder / "record.json").read_bytes(), parse_int=_int)
        key = record["key"]
        version = key["record_version"]
        known = registry.analyses().get(key["analysis"])
    except (OSError, LookupError, TypeError, ValueError, RecursionError) as error:
        raise _refused(f"the record of {id} cannot be read") from error
    if version != runs.RECORD_VERSION:
        words = f"{id} was written in format {str(version)[:20]}, and this version of the workbench reads"
        raise _refused(f"{words} {runs.RECORD_VERSION}")
    try:
        wrong = [name for name, kind in _KINDS.items() if not isinstance(record[name], kind)]
        if wrong or "result" not in record or not isinstance(key["parameters"], dict):
            raise TypeError
        # A list of runs is sorted by when, and shows how many prompts: one that cannot be would be in the way of all.
        if datetime.fromisoformat(record["created"]).tzinfo is None or not isinstance(key.get("n", 1), int):
            raise TypeError
        same = record["id"] == id == runs._id(key)
        run = Run(id, folder, record, True, 0.0, 0)
        for path in folder.rglob("*.safetensors"):
            with safe_open(path, "pt") as arrays:
                arrays.keys()
        _ = run.activations if "activations" in record else None
        if known is not None and known.version == key["analysis_version"]:
            _ = run.result
    except (*_BROKEN, OSError, SafetensorError) as error:
        raise _refused(f"the record of {id} is not one that a run writes, or its result cannot be read") from error
    if not same:
        raise _refused(f"the record in {id} has another id than its key gives")


def _int(text: str) -> int:
    """One that can be made a float, as whoever shows it may do."""
    if len(text) > 20:
        raise ValueError(f"{text[:20]}... is too long a number")
    return int(text)


def _here(folder: Path, id: str) -> bool:
    """Whether a run is on this machine already. Raises UserError if it has another result there."""
    there = places.folder_of(id)
    if there is None:
        return False
    if _outcome(folder) != _outcome(runs.get_run(id).folder):
        raise UserError(
            f"run {id} is on this machine already with another result, which stays; to have that of the bundle, move "
            f"{there} away first."
        )
    return True


def _outcome(folder: Path) -> tuple[Any, Any, dict[str, str]]:
    """What a run found, without when and at what cost."""
    record = json.loads((folder / "record.json").read_bytes())
    digests = {}
    for path in (folder / "arrays.safetensors", *sorted((folder / runs.FILES).rglob("*"))):
        if path.is_file():
            with path.open("rb") as file:
                digests[path.relative_to(folder).as_posix()] = hashlib.file_digest(file, "sha256").hexdigest()
    return record["key"], record["result"], digests
