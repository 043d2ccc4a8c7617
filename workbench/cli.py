"""wb: the workbench on the command line.

Results go to stdout, everything else to stderr. With --json a command prints exactly one JSON object. Bad input is one
line `wb: ...` and exit status 2; what was interrupted ends with 130.
"""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Annotated

import typer

from workbench.cli_batches import batch_cli
from workbench.cli_bundles import bundle_cli
from workbench.cli_jobs import job_cli
from workbench.cli_store import store_cli
from workbench.errors import UserError
from workbench.tables import Accept, AsJson, describe, show_as, table

cli = typer.Typer(
    add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None, help=__doc__
)
cli.add_typer(store_cli, name="store")
cli.add_typer(job_cli, name="job")
cli.add_typer(bundle_cli)
cli.add_typer(batch_cli)

INTERRUPTED, KEPT = 130, "interrupted; what was stored so far is kept."
Prompts = Annotated[str | None, typer.Option("--n", help="Number of prompts; each analysis has a default.")]
Seed = Annotated[str, typer.Option(help="Seed of the prompts.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, auto (spread); default WORKBENCH_DEVICE or cpu.")]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16 or float16.")]


def main() -> None:
    """Entry point: errors of the user are one line, never a traceback."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    for noisy in ("httpx", "huggingface_hub", "transformers"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    try:
        status = cli(standalone_mode=False)
        if status == INTERRUPTED:
            _fail(KEPT, INTERRUPTED)
        sys.exit(status)
    except typer.TyperException as error:
        _fail(error.format_message())
    except UserError as error:
        _fail(str(error))
    except (typer.Abort, KeyboardInterrupt):
        _fail(KEPT, INTERRUPTED)
    except OSError as error:
        _fail(f"{error.filename or 'input/output'}: {error.strerror or error}; check space and permissions.")


def _fail(message: str, status: int = 2) -> None:
    typer.echo("wb: " + " ".join(message.split()), err=True)
    sys.exit(status)


@cli.command()
def models(as_json: AsJson = False) -> None:
    """Embedded models, and what else can be loaded."""
    from workbench import pretrained

    rows = pretrained.listing()
    more = (
        "Also any hub id (gpt2) while the hub can be reached, any local folder (./my-model), and the id of a run that "
        "trained a model."
    )
    show_as(
        as_json,
        {"models": rows, "more": more},
        lambda: table(["model", "here", "licence", "MB", "about"], [list(row.values()) for row in rows]) + "\n" + more,
    )


@cli.command()
def tasks(as_json: AsJson = False) -> None:
    """Tasks by name."""
    from workbench import registry

    rows = [
        {"name": t.name, "metric": t.metric, "version": t.version, "about": t.about} for t in registry.tasks().values()
    ]
    show_as(
        as_json,
        {"tasks": rows},
        lambda: table(["task", "metric", "version", "about"], [list(r.values()) for r in rows]),
    )


@cli.command()
def analyses(as_json: AsJson = False) -> None:
    """Analyses by name, with their parameters."""
    from workbench import registry

    found = registry.analyses().values()
    rows = [
        {
            "name": a.name,
            "version": a.version,
            "model": a.model,
            "task": a.task,
            "n": a.n if a.task else None,
            "about": a.about,
            "parameters": {
                p.name: {"kind": registry.kind_name(p.kind), "default": p.default, "help": p.help}
                for p in a.parameters.values()
            },
        }
        for a in found
    ]

    def text() -> str:
        lines = []
        for a in found:
            on = [a.model, a.task, f"n = {a.n}"] if a.task else [a.model or "no model"]
            lines.append(f"{a.name}  ({', '.join(map(str, on))})\n    {a.about}")
            lines += [
                f"    --{p.name.replace('_', '-'):<14} {p.default!s:<8} {p.help} [{registry.kind_name(p.kind)}]"
                for p in a.parameters.values()
            ]
        return "\n".join(lines)

    show_as(as_json, {"analyses": rows}, text)


@cli.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def run(
    context: typer.Context,
    analysis: Annotated[str, typer.Argument(help="What to compute: see `wb analyses`.")],
    model: Annotated[
        str | None, typer.Option(help="Embedded model, hub id or local folder; each analysis has a default.")
    ] = None,
    task: Annotated[str | None, typer.Option(help="See `wb tasks`; each analysis has a default.")] = None,
    n: Prompts = None,
    seed: Seed = "0",
    device: Device = None,
    dtype: Dtype = "float32",
    accept_terms: Accept = False,
    as_json: AsJson = False,
) -> None:
    """Run an analysis, or show what it gave before. Its own parameters follow as --name value."""
    from workbench import runs

    done = runs.run(
        analysis,
        model=model,
        task=task,
        n=None if n is None else _integer("n", n),
        seed=_integer("seed", seed),
        device=device,
        dtype=dtype,
        accept_terms=accept_terms,
        **_parameters(context.args),  # type: ignore[arg-type]
    )
    show_as(as_json, done.to_json(), lambda: describe(done))


def _integer(name: str, text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise UserError(f"{name}={text!r} is not int; give a whole number.") from None


def _parameters(words: Sequence[str]) -> dict[str, str]:
    """`--lam 0.1 --mode=paper` as a dictionary."""
    given: dict[str, str] = {}
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            raise UserError(f"{word!r} is not understood; parameters are written --name value.")
        name, equals, value = word[2:].partition("=")
        if not equals:
            if not rest or rest[0].startswith("--"):
                raise UserError(f"--{name} needs a value: --{name} VALUE.")
            value = rest.pop(0)
        given[name.replace("-", "_")] = value
    return given


def _job(context: typer.Context, path: Path | None) -> Path | None:
    """The options of a JSON file in place of the defaults; what the command line gives comes first."""
    if path is not None:
        from workbench import grid

        words = grid.read(path)
        options = {option.name for option in context.command.params}
        context.default_map = {name: value for name, value in words.items() if name in options}
        context.obj = {name: value for name, value in words.items() if name not in options}
    return path


@cli.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def extract(
    context: typer.Context,
    models: Annotated[str, typer.Option(help="Models, separated by commas.")] = "smollm2-135m",
    tasks: Annotated[str, typer.Option(help="Tasks, separated by commas.")] = "ioi",
    methods: Annotated[str, typer.Option(help="Analyses that score nodes or edges, separated by commas.")] = "eap-ig",
    job: Annotated[Path | None, typer.Option(help="JSON file of options.", callback=_job, is_eager=True)] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of circuits; default WORKBENCH_HOME/circuits.")] = None,
    n: Prompts = None,
    seed: Seed = "0",
    device: Device = None,
    dtype: Dtype = "float32",
    accept_terms: Accept = False,
    as_json: AsJson = False,
) -> None:
    """Circuits of every model, task and method, each in a folder. Started again, it goes on where it was.

    --size, --at-least and --ablation follow as in `wb run extract`; exit status 1 says that something failed.
    """
    from workbench import grid

    given = (context.obj or {}) | _parameters(context.args)
    rows = [
        row.to_json()
        for row in grid.circuits(
            grid.names("models", models),
            grid.names("tasks", tasks),
            grid.names("methods", methods),
            out=out,
            n=None if n is None else _integer("n", n),
            seed=_integer("seed", seed),
            device=device,
            dtype=dtype,
            accept_terms=accept_terms,
            **given,
        )
    ]
    failed = sum(1 for row in rows if "error" in row)
    show_as(as_json, {"circuits": rows, "failed": failed}, lambda: grid.text(rows))
    if failed:
        sys.exit(1)


@cli.command("runs")
def list_runs(as_json: AsJson = False) -> None:
    """All runs, newest first."""
    from workbench import runs

    found, unreadable = runs.all_runs()
    for sentence in unreadable:
        typer.echo(sentence, err=True)
    rows = [
        {
            "run": r.id,
            "model": r.record["model_name"],
            "n": r.record["key"].get("n", ""),
            "created": r.record["created"],
            "seconds": r.record["cost"]["seconds"],
        }
        for r in found
    ]
    show_as(
        as_json,
        {"runs": rows},
        lambda: (
            table(["run", "model", "n", "created", "seconds"], [list(r.values()) for r in rows])
            if rows
            else "no runs yet; try: wb run patching --task ioi"
        ),
    )


@cli.command()
def show(run: Annotated[str, typer.Argument(help="Id of a run: see `wb runs`.")], as_json: AsJson = False) -> None:
    """One run."""
    from workbench import runs

    done = runs.get_run(run)
    show_as(as_json, done.to_json(), lambda: describe(done))


@cli.command()
def demo(as_json: AsJson = False) -> None:
    """Circuits of a real pretrained model, by two methods on two tasks."""
    from workbench import demo as walk

    figures = walk.demo()
    show_as(as_json, figures, lambda: walk.text(figures))


@cli.command()
def app(port: Annotated[int, typer.Option(help="Port on this machine.")] = 8501, as_json: AsJson = False) -> None:
    """Open the browser app, on this machine only; runs until it is stopped."""
    main_page = Path(str(files("app"))) / "main.py"
    command = [sys.executable, "-m", "streamlit", "run", str(main_page), "--server.address", "127.0.0.1"]
    command += ["--server.port", str(port), "--browser.gatherUsageStats", "false"]
    command += ["--server.showEmailPrompt", "false"]
    url = f"http://127.0.0.1:{port}"
    show_as(as_json, {"url": url}, lambda: url)
    sys.stdout.flush()
    sys.exit(subprocess.call(command, stdout=sys.stderr))
