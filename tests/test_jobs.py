"""Jobs: processes that outlive who started them, say how far they are, stop when told, and go on where they were."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.conftest import Wb
from workbench import jobs, progress, runs
from workbench.errors import UserError
from workbench.jobs import Job
from workbench.models import LanguageModel


def until(id: str, what: Callable[[Job], bool], seconds: float = 90) -> Job:
    end = time.monotonic() + seconds
    while not what(job := jobs.get(id)):
        assert time.monotonic() < end, (job, job.log())
        time.sleep(0.05)
    return job


def ended(id: str) -> Job:
    return until(id, lambda job: job.state in jobs.ENDED)


def words(folder: str, *more: str) -> list[str]:
    return ["run", "patching", "--model", folder, "--task", "ioi", "--n", "3", *more]


TRAINING = ["run", "sparse-train", "--preset", "tiny", "--width", "32", "--layers", "1", "--seconds", "600"]


@pytest.fixture(autouse=True)
def one_thread(home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    yield
    for job in jobs.jobs()[0]:
        if job.state not in jobs.ENDED:
            jobs.cancel(job.id)


def test_a_job_gives_the_run_that_the_same_words_give(tiny_folder: str, tmp_path: Path) -> None:
    job = ended(jobs.start(words(tiny_folder), cwd=tmp_path).id)
    assert (job.state, job.attempts, job.why, job.stages) == ("done", 1, "", ())
    assert job.run is not None and job.seconds > 0 and job.peak > 50e6
    again = runs.run("patching", model=tiny_folder, task="ioi", n=3)
    assert again.hit and again.id == job.run
    assert jobs.jobs() == ([job], []) and job.command.startswith("wb run patching --model")
    with pytest.raises(UserError, match="is done"):
        jobs.resume(job.id)
    with pytest.raises(UserError, match="not running"):
        jobs.cancel(job.id)


def test_what_the_command_refuses_is_the_sentence_of_the_job(tiny_folder: str) -> None:
    job = ended(jobs.start(words(tiny_folder, "--direction", "sideways")).id)
    assert job.state == "failed" and "sideways" in job.why and "\n" not in job.why and job.run is None
    for given in ([], ["app"], ["runs"]):
        with pytest.raises(UserError, match="command for jobs"):
            jobs.start(given)
    for id in ("nothing", "../..", "a/b", ""):
        with pytest.raises(UserError, match="job"):
            jobs.get(id)


def test_a_killed_job_goes_on_where_it_was_and_a_cancelled_one_stops() -> None:
    id = jobs.start(TRAINING).id
    job = until(id, lambda job: job.left is not None)
    assert job.state == "running" and job.stages[0].name == "sparse-train" and job.stages[0].total == 1
    assert job.left is not None and job.left > 0 and job.seconds > 0
    with pytest.raises(UserError, match="is running"):
        jobs.resume(id)
    os.kill(spawned(job), signal.SIGKILL)
    job = until(id, lambda job: job.state != "running")
    assert job.state == "killed" and job.stages == ()
    jobs.resume(id)
    job = until(id, lambda job: bool(job.stages))
    assert job.attempts == 2
    job = jobs.cancel(id)
    assert job.state == "cancelled" and not job.stages and "interrupted" in job.log()
    assert until(id, lambda job: True).state == "cancelled"


def spawned(job: Job) -> int:
    lines = [json.loads(line) for line in (job.folder / "journal.jsonl").read_text().splitlines()]
    return int(next(line["pid"] for line in reversed(lines) if line["event"] == "process"))


def test_jobs_wait_for_each_other_and_a_waiting_one_can_be_cancelled() -> None:
    first = jobs.start(TRAINING)
    until(first.id, lambda job: job.state == "running")
    second = jobs.start([*TRAINING, "--seed", "1"])
    time.sleep(1.0)
    assert jobs.get(second.id).state == "waiting" and jobs.get(second.id).seconds == 0
    third = jobs.start([*TRAINING, "--seed", "2"])
    time.sleep(1.0)
    assert jobs.cancel(second.id).state == "cancelled"
    assert jobs.get(third.id).state == "waiting"
    jobs.cancel(first.id)
    assert until(third.id, lambda job: job.state == "running").attempts == 1


def test_a_job_outlives_who_started_it(home: Path) -> None:
    code = f"from workbench import jobs; print(jobs.start({TRAINING!r}).id)"
    id = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    job = until(id, lambda job: bool(job.stages))
    assert job.state == "running"
    note = until(id, lambda job: True).notes()
    assert note == {} or note.keys() == {"sparse-train"}


def test_a_journal_that_was_cut_off_is_read_up_to_there(tiny_folder: str) -> None:
    job = ended(jobs.start(words(tiny_folder)).id)
    with (job.folder / "journal.jsonl").open("a") as file:
        file.write('{"event": "fini')
    assert jobs.get(job.id) == job


def test_a_damaged_job_is_a_sentence_and_the_others_are_listed(tiny_folder: str) -> None:
    good, bad, other = (ended(jobs.start(words(tiny_folder, "--direction", "sideways")).id) for _ in range(3))
    (bad.folder / "job.json").write_text('{"words": 3')
    (other.folder / "progress.json").write_text("{")
    (other.folder / "out.json").write_text("")
    found, (sentence,) = jobs.jobs()
    assert {job.id for job in found} == {good.id, other.id} and bad.id in sentence and "damaged" in sentence
    with pytest.raises(UserError, match="damaged"):
        jobs.resume(bad.id)


def test_a_job_that_ended_well_while_it_was_cancelled_is_done(tiny_folder: str) -> None:
    job = ended(jobs.start(words(tiny_folder)).id)
    journal = job.folder / "journal.jsonl"
    lines = journal.read_text().splitlines(keepends=True)
    journal.write_text("".join([*lines[:-1], '{"event": "cancelled", "at": 0}\n', lines[-1]]))
    assert jobs.get(job.id) == job


# ---- progress ----


class Heard:
    def __init__(self) -> None:
        self.said: list[list[progress.Stage]] = []
        self.notes: list[tuple[str, dict[str, float]]] = []

    def stages(self, open: list[progress.Stage]) -> None:
        self.said.append(open)

    def note(self, of: str, numbers: dict[str, float]) -> None:
        self.notes.append((of, numbers))


def test_bars_and_notes_go_to_the_reporter(tiny: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "EVERY", 0.0)
    heard = Heard()
    with progress.reported_to(heard):
        for _ in progress.track(range(3), "outer"):
            with progress.track(total=2.0, desc="inner", initial=1.0) as bar:
                time.sleep(0.01)
                bar.update(0.5)
        progress.note("loss", step=1, value=2.0)
        assert list(progress.track([1, 2], "unseen", silent=True)) == [1, 2]
    inner = [said for said in heard.said if len(said) == 2]
    assert {tuple(one.name for one in said) for said in inner} == {("outer", "inner")}
    assert all(said[0].total == 3 and said[1].total == 2 for said in inner)
    last = inner[-1][1]
    assert last.n == 1.5 and last.left == pytest.approx(last.seconds, rel=0.01)  # half of it took so long
    assert heard.notes == [("loss", {"step": 1, "value": 2.0})]
    assert not any(one.name == "unseen" for said in heard.said for one in said)
    assert list(progress.track([1], "after")) == [1] and progress._open == []
    progress.note("loss", step=2)
    assert len(heard.notes) == 1


def test_a_bar_whose_block_fails_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    heard = Heard()
    with progress.reported_to(heard):
        with pytest.raises(ZeroDivisionError), progress.track(total=2, desc="bad"):
            raise ZeroDivisionError
        with pytest.raises(ZeroDivisionError):
            for _ in progress.track([1, 2], "bad"):
                raise ZeroDivisionError
    assert progress._open == []


KILLED = """
import os, signal
from tqdm import tqdm
from workbench.progress import track

list(track([1]))  # makes the lock
told, tell = os.pipe()
if not (child := os.fork()):
    with tqdm.get_lock():
        os.write(tell, b".")
        signal.pause()
os.read(told, 1)
os.kill(child, signal.SIGKILL)
os.waitpid(child, 0)
if not (child := os.fork()):
    os._exit(len(list(track([1, 2, 3]))))
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), len(list(track([1, 2, 3, 4]))))
"""


def test_a_fork_that_is_killed_in_a_bar_does_not_stop_the_bars_of_others() -> None:
    ran = subprocess.run([sys.executable, "-c", KILLED], capture_output=True, text=True, timeout=60)
    assert ran.stdout.split() == ["3", "4"], ran.stderr[-2000:]


# ---- the command line ----


def test_jobs_on_the_command_line(wb: Wb, tiny_folder: str) -> None:
    assert "no jobs yet" in wb("job", "list")[1]
    status, out, _ = wb("job", "start", *words(tiny_folder, "--mlps", "false"))
    id = out.strip()
    assert status == 0 and ended(id).state == "done"
    shown = json.loads(wb("job", "show", id, "--json")[1])
    assert shown["state"] == "done" and shown["notes"] == {} and "--mlps false" in shown["command"]
    (row,) = json.loads(wb("job", "list", "--json")[1])["jobs"]
    assert row["run"] == shown["run"] in wb("runs")[1]
    assert id in wb("job", "list")[1] and f"wb show {row['run']}" in wb("job", "show", id)[1]
    for given, message in (
        (("job", "cancel", id), "is not running: it is done"),
        (("job", "resume", id), "is done"),
        (("job", "show", "nowhere"), "no job is called 'nowhere'"),
        (("job", "start", "app"), "no command for jobs is called 'app'"),
    ):
        status, out, err = wb(*given)
        assert status == 2 and out == "" and message in err and err.count("\n") == 1, err
