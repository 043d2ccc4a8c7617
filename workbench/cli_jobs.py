"""`wb job`: commands in processes of their own, which go on when the terminal is closed."""

from __future__ import annotations

from typing import Annotated

import typer

from workbench import jobs
from workbench.jobs import Job
from workbench.progress import duration
from workbench.tables import AsJson, show_as, table

job_cli = typer.Typer(no_args_is_help=True, help="Commands that outlive the terminal: start, watch, cancel, resume.")
Id = Annotated[str, typer.Argument(help="Id of a job: see `wb job list`.")]


@job_cli.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def start(context: typer.Context, command: Annotated[str, typer.Argument(help="run, extract or store.")]) -> None:
    """Start a command as a job: `wb job start run patching --task ioi`. Prints its id."""
    typer.echo(jobs.start([command, *context.args]).id)


@job_cli.command("list")
def list_jobs(as_json: AsJson = False) -> None:
    """All jobs, newest first."""
    found, sentences = jobs.jobs()
    for sentence in sentences:
        typer.echo(sentence, err=True)
    show_as(
        as_json,
        {"jobs": [job.to_json() for job in found]},
        lambda: (
            table(["job", "state", "done", "left", "took", "run"], [_row(job) for job in found])
            if found
            else "no jobs yet; try: wb job start run patching --task ioi"
        ),
    )


@job_cli.command()
def show(id: Id, as_json: AsJson = False) -> None:
    """One job: how far it is, and the end of its log."""
    job = jobs.get(id)
    show_as(as_json, job.to_json() | {"log": job.log(), "notes": job.notes()}, lambda: _text(job))


@job_cli.command()
def cancel(id: Id, as_json: AsJson = False) -> None:
    """Stop a job; what it has stored is kept."""
    job = jobs.cancel(id)
    show_as(as_json, job.to_json(), lambda: _text(job))


@job_cli.command()
def resume(id: Id, as_json: AsJson = False) -> None:
    """Start a job again that was cancelled, failed or was killed; it goes on where it was."""
    job = jobs.resume(id)
    show_as(as_json, job.to_json(), lambda: _text(job))


def _row(job: Job) -> list[str]:
    done = "" if job.share is None else f"{job.share:.0%}"
    return [job.id, job.state, done, duration(job.left), duration(job.seconds), job.run or job.why[:60]]


def _text(job: Job) -> str:
    lines = [f"{job.id}  {job.state}  {job.command}"]
    lines += [f"  {stage}" for stage in job.stages]
    lines.append(f"  {duration(job.seconds)} in {job.attempts} attempts, {job.peak / 1e6:,.0f} MB at most")
    lines += [f"  {job.why}"] if job.why else []
    lines += [f"  wb show {job.run}"] if job.run else []
    return "\n".join(lines)
