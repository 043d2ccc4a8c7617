"""Jobs: commands of `wb`, each in a process of its own, that outlive whoever started them.

A job is a folder under WORKBENCH_HOME/jobs:

    job.json       the words after `wb`, and the folder and time they were given in
    journal.jsonl  what happened, a line each: spawned, process, started, notes on the way, cancelled, finished
    progress.json  the bars that are open, and memory; written over
    log.txt        what the command wrote to stderr, of all attempts
    out.json       what it printed in the end
    lock           held as long as its process lives, however that ends

Few compute at once (WORKBENCH_JOBS); the others wait. One that was cancelled, failed or was killed is started again by
`resume`, and goes on where it was: that is what `workbench.parts` and the checkpoints of trainings are for.
"""

from __future__ import annotations

import datetime
import fcntl
import json
import math
import os
import re
import resource
import secrets
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, Literal

from workbench import progress, settings
from workbench.errors import UserError, unknown
from workbench.progress import Stage

State = Literal["waiting", "running", "done", "failed", "cancelled", "killed"]
COMMANDS = ("run", "extract", "batch", "store")
ENDED = ("done", "failed", "cancelled", "killed")
GRACE = 5.0  # seconds that a cancelled job has to stop by itself
TAIL = 20_000  # bytes of a log


@dataclass(frozen=True)
class Job:
    """
    id       of the job
    words    after `wb`
    state    killed: its process is gone and said nothing
    created  ISO time
    stages   open bars, the outermost first
    seconds  that its attempts have computed, without waiting and without those that were killed
    peak     bytes of memory
    run      id of the run that came of it
    why      one sentence, where it failed
    """

    id: str
    folder: Path
    words: tuple[str, ...]
    state: State
    created: str
    attempts: int
    stages: tuple[Stage, ...]
    seconds: float
    peak: int
    run: str | None
    why: str

    @property
    def command(self) -> str:
        return shlex.join(["wb", *self.words])

    @property
    def left(self) -> float | None:
        """Seconds, by the outermost bar that has an end."""
        return next((one.left for one in self.stages if one.left is not None), None)

    @property
    def share(self) -> float | None:
        """What is behind, by the same bar; all of a job that is done."""
        outer = next((one.share for one in self.stages if one.share is not None), None)
        return 1.0 if self.state == "done" else outer

    def notes(self) -> dict[str, list[dict[str, float]]]:
        """Points of curves by name, in the order they were noted."""
        found: dict[str, list[dict[str, float]]] = {}
        for line in _journal(self.folder):
            if line["event"] == "note":
                found.setdefault(line["of"], []).append(line["numbers"])
        return found

    def log(self) -> str:
        """The end of what it wrote to stderr."""
        path = self.folder / "log.txt"
        if not path.exists():
            return ""
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - TAIL))
            return file.read().decode(errors="replace")

    def to_json(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if name != "folder"} | {
            "command": self.command, "left": self.left, "folder": str(self.folder)
        }  # fmt: skip


def start(words: Sequence[str], cwd: Path | None = None) -> Job:
    """Start `wb words...` as a job. Raises UserError for a command that is none for jobs."""
    if not words or words[0] not in COMMANDS:
        raise unknown("command for jobs", words[0] if words else "", COMMANDS)
    now = datetime.datetime.now(datetime.UTC)
    name = re.sub(r"[^a-z0-9]+", "-", words[1].lower() if len(words) > 1 else words[0]).strip("-")
    folder = _root() / f"{now:%Y%m%d-%H%M%S}-{name[:40]}-{secrets.token_hex(2)}"
    folder.mkdir()
    given = {"words": list(words), "cwd": str(cwd or Path.cwd()), "created": now.isoformat(timespec="seconds")}
    (folder / "job.part").write_text(json.dumps(given))
    (folder / "job.part").rename(folder / "job.json")
    return resume(folder.name)


def resume(id: str) -> Job:
    """Start the process of a job, again if it ended. Raises UserError if it is running, or done."""
    folder = _folder(id)
    given = _given(folder)
    with (folder / "lock").open("a") as lock, (folder / "log.txt").open("ab") as log:
        end = time.monotonic() + 0.5  # who looks whether it is alive holds the lock for an instant
        while not _take(lock):
            if time.monotonic() > end:
                raise UserError(f"job {id} is running; cancel it first.")
            time.sleep(0.01)
        if get(id, alive=False).state == "done":
            raise UserError(f"job {id} is done; open its run.")
        (folder / "progress.json").unlink(missing_ok=True)
        _write(folder, "spawned")
        # The process inherits the lock, and with the process it goes.
        with _out(folder).open("wb") as out:
            subprocess.Popen(
                [sys.executable, "-m", "workbench.jobs", id], cwd=given["cwd"], stdin=subprocess.DEVNULL, stdout=out,
                stderr=log, start_new_session=True, pass_fds=[lock.fileno()],
                env=os.environ | {"WORKBENCH_HOME": str(settings.home())},
            )  # fmt: skip
    return get(id)


def cancel(id: str) -> Job:
    """Stop the process of a job; what it has stored is kept. Raises UserError if there is none."""
    job = get(id)
    if job.state in ENDED:
        raise UserError(f"job {id} is not running: it is {job.state}.")
    _write(job.folder, "cancelled")
    while (said := _since_spawned(job.folder).get("process")) is None and _alive(job.folder):
        time.sleep(0.02)  # it has just been spawned
    for how, seconds in ((signal.SIGTERM, GRACE), (signal.SIGKILL, math.inf)):
        end = time.monotonic() + seconds
        if said is not None and _alive(job.folder):
            with suppress(ProcessLookupError):
                os.killpg(said["pid"], how)
        while _alive(job.folder) and time.monotonic() < end:
            time.sleep(0.02)
    return get(id)


def get(id: str, *, alive: bool | None = None) -> Job:
    """A job as it is now. Raises UserError if there is none of this id."""
    folder = _folder(id)
    given = _given(folder)
    alive = _alive(folder) if alive is None else alive  # first: what it writes before its end is read after it
    state = _state(_since_spawned(folder), alive)
    lines = [line for line in _journal(folder) if line["event"] != "note"]
    try:
        now = json.loads((folder / "progress.json").read_text())
    except (OSError, ValueError):
        now = {"stages": [], "peak": 0}
    ends = [line for line in lines if line["event"] == "finished"]
    started = [line["at"] for line in lines if line["event"] == "started"]
    seconds = sum(line["seconds"] for line in ends)
    if state == "running":
        seconds += time.time() - started[-1]
    run = None
    if state == "done":
        with suppress(OSError, ValueError):
            run = json.loads(_out(folder).read_text()).get("run")
    why = _last(folder) if state in ("failed", "killed") else ""
    return Job(
        id, folder, tuple(given["words"]), state, given["created"], len(started),
        tuple(Stage(**one) for one in now["stages"]) if state == "running" else (), seconds,
        max([now["peak"], *(line["peak"] for line in ends)]), run, why,
    )  # fmt: skip


def jobs() -> tuple[list[Job], list[str]]:
    """All jobs, newest first, and a sentence for each that cannot be read."""
    found, sentences = [], []
    for path in sorted(_root().glob("*/job.json"), reverse=True):
        try:
            found.append(get(path.parent.name))
        except UserError as error:
            sentences.append(str(error))
    return found, sentences


def _state(events: Mapping[str, dict[str, Any]], alive: bool) -> State:
    if alive:
        return "running" if "started" in events else "waiting"
    if "finished" in events and not events["finished"]["status"]:
        return "done"
    if "cancelled" in events:
        return "cancelled"
    return "failed" if "finished" in events else "killed"


def _since_spawned(folder: Path) -> dict[str, dict[str, Any]]:
    """What happened in the last attempt, by event."""
    events: dict[str, dict[str, Any]] = {}
    for line in _journal(folder):
        if line["event"] == "spawned":
            events.clear()
        events[line["event"]] = line
    return events


# ---- files ----


def _root() -> Path:
    path = settings.home() / "jobs"
    settings.writable_folder(path)
    return path


def _folder(id: str) -> Path:
    folder = _root() / id
    if not re.fullmatch(r"[a-z0-9-]{1,99}", id) or not (folder / "job.json").is_file():
        raise unknown("job", id, [path.parent.name for path in _root().glob("*/job.json")])
    return folder


def _given(folder: Path) -> dict[str, Any]:
    """What the job was started with. Raises UserError if that cannot be read."""
    try:
        given = json.loads((folder / "job.json").read_text())
        return {"words": [str(word) for word in given["words"]], "cwd": given["cwd"], "created": str(given["created"])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"job {folder.name} is damaged ({type(error).__name__}); delete {folder}.") from error


def _out(folder: Path) -> Path:
    return folder / "out.json"


def _write(folder: Path, event: str, **more: Any) -> None:
    line = json.dumps({"event": event, "at": time.time(), **more}) + "\n"
    with (folder / "journal.jsonl").open("a") as file:
        file.write(line)


def _journal(folder: Path) -> Iterator[dict[str, Any]]:
    """Its lines, but one that a kill cut off."""
    path = folder / "journal.jsonl"
    for line in path.read_text().splitlines() if path.exists() else []:
        with suppress(ValueError):
            yield json.loads(line)


def _last(folder: Path) -> str:
    """The last line that says what is wrong."""
    lines = (folder / "log.txt").read_text(errors="replace").splitlines() if (folder / "log.txt").exists() else []
    said = next((line.removeprefix("wb: ") for line in reversed(lines) if line.startswith("wb: ")), "")
    return said or next((line for line in reversed(lines) if line.strip()), "")


def _take(lock: IO[Any], *, wait: bool = False) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    return True


def _alive(folder: Path) -> bool:
    with (folder / "lock").open("a") as lock:
        return not _take(lock)


# ---- the process of a job ----


class Journal:
    """Takes what `workbench.progress` reports."""

    def __init__(self, folder: Path):
        self.folder = folder

    def stages(self, open: list[Stage]) -> None:
        part = self.folder / "progress.part"
        part.write_text(json.dumps({"stages": [asdict(one) for one in open], "peak": _peak()}))
        part.rename(self.folder / "progress.json")

    def note(self, of: str, numbers: dict[str, float]) -> None:
        _write(self.folder, "note", of=of, numbers=numbers)


def _peak() -> int:
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if sys.platform == "darwin" else used * 1024


@contextmanager
def _place() -> Iterator[None]:
    """One of the few places in which jobs compute; waits until one is free."""
    with (_root() / "turn").open("a") as turn:
        _take(turn, wait=True)  # whoever waits for a place; the others wait for that
        places = [(_root() / f"place-{i}").open("a") for i in range(settings.jobs())]
        try:
            while not any(_take(place) for place in places):
                time.sleep(0.2)
            fcntl.flock(turn, fcntl.LOCK_UN)
            yield
        finally:
            for place in places:
                place.close()


def work(id: str) -> int:
    """What the process of a job does. Returns its exit status."""
    from workbench import cli

    signal.signal(signal.SIGTERM, signal.default_int_handler)
    folder = _folder(id)
    _write(folder, "process", pid=os.getpid())
    words = _given(folder)["words"]
    try:
        with _place():
            _write(folder, "started")
            began, status = time.monotonic(), 1
            sys.argv = ["wb", *words, "--json"]
            try:
                with progress.reported_to(Journal(folder)):
                    cli.main()
            except SystemExit as end:
                status = end.code if isinstance(end.code, int) else int(end.code is not None)
            finally:
                sys.stdout.flush()
                _write(folder, "finished", status=status, seconds=time.monotonic() - began, peak=_peak())
    except KeyboardInterrupt:  # while it waited
        return 2
    return status


if __name__ == "__main__":
    sys.exit(work(sys.argv[1]))
