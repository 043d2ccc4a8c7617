"""`wb store`: what the activation store holds, and its upkeep."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from workbench.tables import Accept, AsJson, show_as, table

store_cli = typer.Typer(no_args_is_help=True, help="The activation store: what it holds, and its upkeep.")
OfModel = Annotated[str | None, typer.Option("--model", help="Only this model: name or fingerprint.")]
OfHook = Annotated[str | None, typer.Option("--hook", help="Only this hook point.")]
OfRun = Annotated[str | None, typer.Option("--run", help="Only what this run used.")]


def _stored_model(name: str | None) -> str | None:
    """The fingerprint of a model that the store knows by name or fingerprint."""
    from workbench import activations
    from workbench.errors import unknown

    rows = activations.shared().series()
    known = {row.model_name: row.model for row in rows} | {row.model: row.model for row in rows}
    if name is not None and name not in known:
        raise unknown("stored model", name, {row.model_name for row in rows})
    return None if name is None else known[name]


@store_cli.command("stats")
def store_stats(as_json: AsJson = False) -> None:
    """What the store holds, by model and hook point."""
    from workbench import activations

    store = activations.shared()
    stats, rows, pins = store.stats(), store.series(), store.pins()

    def text() -> str:
        lines = [
            f"{stats.disk_entries:,} activations, {stats.disk_bytes / 1e6:,.1f} MB of "
            f"{stats.disk_budget / 1e9:,.1f} GB on disk ({store.disk.root})"
        ]
        if rows:
            cells = [
                [row.model_name, row.hook, f"{row.entries:,}", f"{row.bytes / 1e6:,.1f}", row.used, "yes" * row.pinned]
                for row in rows
            ]
            lines.append(table(["model", "hook point", "entries", "MB", "last used", "pinned"], cells))
        return "\n".join(lines + [f"pinned: {pin}" for pin in pins])

    show_as(as_json, asdict(stats) | {"series": [asdict(row) for row in rows], "pins": pins}, text)


@store_cli.command("show")
def store_show(
    sequence: Annotated[str, typer.Argument(help="First letters of a sequence's digest.")] = "",
    hook: OfHook = None,
    run: OfRun = None,
    limit: Annotated[int, typer.Option(help="At most so many entries.")] = 20,
    as_json: AsJson = False,
) -> None:
    """Single activations: what each is, how it was computed, and which runs used it."""
    from workbench import activations

    found = activations.shared().show(sequence=sequence, hook=hook or "", run=run or "", limit=limit)

    def text() -> str:
        lines = []
        for one in found:
            lines += [
                f"{one.sequence}  {one.hook}  {one.model_name}",
                f"    {len(one.tokens)} tokens, shape {one.shape}, {one.codec}, error {one.error:.2g}; {one.numerics}, "
                f"computed {one.created} in a batch of {one.batch} on {one.threads} threads, {one.software}",
                f"    used by {', '.join(one.runs) or 'no run'}" + (f"; interventions {one.edit}" if one.edit else ""),
            ]
        return "\n".join(lines)

    show_as(as_json, {"entries": [asdict(one) for one in found]}, text)


@store_cli.command("estimate")
def store_estimate(
    model: Annotated[str, typer.Option()] = "smollm2-135m",
    task: Annotated[str, typer.Option()] = "ioi",
    n: Annotated[int, typer.Option()] = 32,
    seed: Annotated[int, typer.Option()] = 0,
    hook: Annotated[str, typer.Option(help="Name inside a block; all layers are meant.")] = "attn.hook_z",
    accept_terms: Accept = False,
    as_json: AsJson = False,
) -> None:
    """What it would cost to have one hook point of every layer for a task's prompts."""
    from workbench import activations, registry, sites
    from workbench.models import LanguageModel
    from workbench.prompts import sample

    loaded = LanguageModel.load(model, accept_terms=accept_terms)
    batch = sample(registry.get_task(task), loaded, n, seed)
    hooks = [sites.block(layer, hook) for layer in range(loaded.config.n_layers)]
    cost = activations.shared().estimate(loaded, batch.clean, hooks)
    show_as(
        as_json,
        asdict(cost),
        lambda: (
            f"{cost.missing:,} of {cost.entries:,} activations are missing: {cost.missing_bytes / 1e6:,.1f} MB, "
            f"about {cost.seconds:.1f} s, {cost.peak_bytes / 1e6:,.1f} MB of memory"
        ),
    )


@store_cli.command("verify")
def store_verify(
    recompute: Annotated[int, typer.Option(help="Compute so many entries of --model anew and compare.")] = 0,
    model: Annotated[str, typer.Option(help="Model to compute with.")] = "smollm2-135m",
    accept_terms: Accept = False,
    as_json: AsJson = False,
) -> None:
    """Read everything and compare with its checksums."""
    from workbench import activations
    from workbench.models import LanguageModel

    store = activations.shared()
    damaged = store.verify()
    anew = []
    if recompute:
        anew = store.recheck(LanguageModel.load(model, accept_terms=accept_terms), n=recompute)
    wrong = [one for one in anew if not one.difference <= one.limit]
    lines = damaged or ["every stored activation is whole"]
    if anew:
        largest = max(one.difference for one in anew)
        lines.append(f"{len(anew)} computed anew: largest relative difference {largest:.2g}")
        lines += [f"{o.sequence} at {o.hook} differs by {o.difference:.2g}, more than {o.limit:.2g}" for o in wrong]
    show_as(as_json, {"damaged": damaged, "computed_anew": [asdict(one) for one in anew]}, lambda: "\n".join(lines))
    if damaged or wrong:
        sys.exit(1)


@store_cli.command("evict")
def store_evict(
    model: OfModel = None,
    hook: OfHook = None,
    keep_mb: Annotated[float, typer.Option(help="Megabytes that may stay.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Drop stored activations, least recently used first; what is pinned stays."""
    from workbench import activations

    freed = activations.shared().evict(model=_stored_model(model), hook=hook, keep_bytes=int(keep_mb * 1e6))
    show_as(as_json, {"freed_bytes": freed}, lambda: f"freed {freed / 1e6:,.1f} MB")


@store_cli.command("pin")
def store_pin(
    model: OfModel = None,
    hook: OfHook = None,
    run: OfRun = None,
    off: Annotated[bool, typer.Option("--off", help="Take the pin back.")] = False,
    as_json: AsJson = False,
) -> None:
    """Keep the activations of a model, a hook point or a run from eviction."""
    from workbench import activations

    store = activations.shared()
    change = store.unpin if off else store.pin
    change(model=_stored_model(model) or "", hook=hook or "", run=run or "")
    pins = store.pins()
    show_as(as_json, {"pins": pins}, lambda: "\n".join(f"pinned: {pin}" for pin in pins) or "nothing is pinned")


@store_cli.command("merge")
def store_merge(
    folder: Annotated[Path, typer.Argument(help="Another store's folder, such as one node's.")], as_json: AsJson = False
) -> None:
    """Take in what another store has and this one lacks; the other stays as it is."""
    from workbench import activations

    merged = activations.shared().merge(folder)

    def text() -> str:
        words = f"{merged.taken:,} activations taken in, {merged.bytes / 1e6:,.1f} MB; {merged.here:,} were here"
        return words + (f"; {merged.damaged:,} damaged ones left out" if merged.damaged else "")

    show_as(as_json, asdict(merged), text)
