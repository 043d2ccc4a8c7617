"""Runs and the registry: keys, hits, round trips, and what happens to damaged folders."""

from __future__ import annotations

import copy
import json
import shutil
from dataclasses import dataclass, fields
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.conftest import On
from workbench import plots, prompts, registry, results, runs, settings
from workbench.activations import ActivationStore
from workbench.errors import UserError
from workbench.models import LanguageModel
from workbench.prompts import Batch, sample


def equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and torch.equal(a.nan_to_num(9e9), b.nan_to_num(9e9))
    if hasattr(a, "__dataclass_fields__"):
        return type(a) is type(b) and all(equal(getattr(a, f.name), getattr(b, f.name)) for f in fields(a))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(equal(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


@pytest.mark.parametrize("name", sorted(registry.analyses()))
def test_contract_of_every_analysis(name: str, on: On, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Deterministic, a hit the second time, round-trips, is drawn, describes itself, refuses what it does not know."""
    chosen = registry.get_analysis(name)
    assert chosen.about and all(p.help for p in chosen.parameters.values())
    few = on(name)
    first = runs.run(name, **few)
    assert not first.hit and (first.forward_passes > 0 or "batch" not in chosen.takes)
    again = runs.run(name, **few)
    assert again.hit and again.forward_passes == 0 and again.summary == first.summary
    stored = first.result
    assert plots.figure(stored).data and (plots.definition(stored) or chosen.about)
    earlier = settings.home() / "runs"
    monkeypatch.setenv("WORKBENCH_HOME", str(tmp_path / "other"))
    if "found" in few:  # another run, which it is about
        shutil.copytree(earlier / few["found"], settings.home() / "runs" / few["found"])
    fresh = runs.run(name, store=ActivationStore(tmp_path / "other-store"), **few).result
    assert isinstance(fresh, chosen.result)
    encoded, arrays = results.encode(fresh)
    assert equal(results.decode(chosen.result, json.loads(json.dumps(encoded)), arrays), fresh)
    assert equal(timeless(stored), timeless(fresh)) and equal(stored, again.result)
    json.dumps(first.to_json(), allow_nan=True)
    with pytest.raises(UserError, match="no parameter"):
        runs.run(name, bananas=3)


def timeless(result: Any) -> Any:
    """What is encoded of a result, without the seconds that anything took."""

    def without(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: without(x) for name, x in value.items() if name != "seconds"}
        return [without(x) for x in value] if isinstance(value, list) else value

    encoded, arrays = results.encode(result)
    return without(encoded), {name: x for name, x in arrays.items() if not name.endswith("seconds")}


@pytest.mark.parametrize("name", sorted(registry.tasks()))
def test_contract_of_every_task(name: str, tiny: LanguageModel, coder: LanguageModel) -> None:
    """The same prompts for the same seed, others for another; equal lengths; single-token answers that differ."""
    task = registry.get_task(name)
    model = coder if task.draw(Random(0)).whole else tiny
    batch = sample(task, model, 20, 0)
    assert batch.prompts == sample(task, model, 20, 0).prompts
    assert batch.prompts != sample(task, model, 20, 1).prompts
    assert len(set(batch.prompts)) == 20 and task.about
    for clean, corrupted, answers, wrong in zip(batch.clean, batch.corrupted, batch.answers, batch.wrong, strict=True):
        assert len(clean) == len(corrupted) and not torch.equal(clean, corrupted)
        assert not set(answers.tolist()) & set(wrong.tolist())


@pytest.mark.parametrize("change", [{"seed": 1}, {"n": 5}, {"task": "induction"}, {"direction": "denoise"}])
def test_anything_that_changes_the_result_is_another_run(change: dict[str, Any], tiny: LanguageModel) -> None:
    base = {"model": tiny, "task": "ioi", "n": 4, "seed": 0, "mlps": False}
    first = runs.run("patching", **base)
    other = runs.run("patching", **(base | change))
    assert other.id != first.id and not other.hit


def test_another_version_of_an_analysis_is_another_run(tiny: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    first = runs.run("logit-lens", model=tiny, task="ioi", n=3)
    old = registry.get_analysis("logit-lens")
    newer = type(old)(**{**{f.name: getattr(old, f.name) for f in fields(old)}, "version": old.version + 1})
    monkeypatch.setitem(registry._analyses, "logit-lens", newer)
    assert runs.run("logit-lens", model=tiny, task="ioi", n=3).id != first.id


def test_another_model_under_a_name_that_a_parameter_gives_is_another_run(
    sparse_coder: LanguageModel, bridged_coder: LanguageModel, tmp_path: Path
) -> None:
    folder = tmp_path / "dense"
    shutil.copytree(bridged_coder.name, folder)
    given: dict[str, Any] = {"model": sparse_coder, "dense": str(folder), "tokens": 1024}
    first = runs.run("sparse-bridge", **given)
    assert first.record["key"]["models"] == {str(folder): bridged_coder.fingerprint}
    (folder / "config.json").write_text((folder / "config.json").read_text() + " ")
    other = runs.run("sparse-bridge", **given)
    assert other.id != first.id and not other.hit
    assert "models" not in runs.run("logit-lens", model=bridged_coder, task="with_as", n=2).record["key"]


def test_figures_of_the_task_are_the_models_own(tiny: LanguageModel, store: ActivationStore) -> None:
    batch = sample(registry.get_task("ioi"), tiny, 8, 0)
    figures = runs.task_figures(tiny, batch, store)
    clean = torch.cat([batch.select([i]).score(tiny.run(t[None]).logits[:, -1]) for i, t in enumerate(batch.clean)])  # type: ignore[index]
    assert figures["clean_mean"] == pytest.approx(float(clean.mean()), abs=1e-4)
    assert figures["accuracy"] == float((clean > 0).double().mean())
    assert figures["drawn"] >= figures["n"] == 8


def test_damaged_and_foreign_runs_are_sentences(tiny: LanguageModel) -> None:
    run = runs.run("logit-lens", model=tiny, task="ioi", n=3)
    (run.folder / "arrays.safetensors").write_bytes(b"short")
    with pytest.raises(UserError, match=r"is damaged .* delete"):
        _ = runs.get_run(run.id).result
    record = json.loads((run.folder / "record.json").read_text())
    record["key"]["record_version"] = 99
    (run.folder / "record.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match="written in format 99"):
        runs.get_run(run.id)
    (run.folder / "record.json").write_text('{"id"')
    with pytest.raises(UserError, match="is damaged"):
        runs.get_run(run.id)
    found, (sentence,) = runs.all_runs()
    assert found == [] and "is damaged" in sentence


def test_a_run_of_an_older_version_is_not_called_damaged(tiny: LanguageModel) -> None:
    run = runs.run("logit-lens", model=tiny, task="ioi", n=3)
    record = json.loads((run.folder / "record.json").read_text())
    record["key"]["analysis_version"] = 0
    (run.folder / "record.json").write_text(json.dumps(record))
    assert runs.get_run(run.id).result is not None  # what can be read is read
    record["result"].popitem()
    (run.folder / "record.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match="is of version 0 of logit-lens, and version 1 cannot read its result"):
        _ = runs.get_run(run.id).result


@pytest.mark.parametrize("id", ["../../etc", "a/b", "", ".", "<script>", "nothing-here", "a" * 5000])
def test_ids_lead_nowhere_else(id: str) -> None:
    with pytest.raises(UserError, match="no run"):
        runs.get_run(id)


def test_parameters_are_read_from_text_or_refused() -> None:
    patching = registry.get_analysis("patching")
    assert registry.bind(patching, {"mlps": "false"}) == {"direction": "noise", "mlps": False}
    for given, message in [
        ({"mlps": "maybe"}, "mlps='maybe' is not bool"),
        ({"direction": "up"}, "not one of noise, denoise"),
        ({"mlp": True}, "did you mean 'mlps'"),
    ]:
        with pytest.raises(UserError, match=message):
            registry.bind(patching, given)


@pytest.mark.parametrize(
    ("kind", "text", "value"),
    [
        (int, "3", 3),
        (float, "0.5", 0.5),
        (int | None, "none", None),
        (int | None, "4", 4),
        (bool, "no", False),
        (str, "x", "x"),
    ],
)
def test_kinds_of_parameters(kind: Any, text: str, value: Any) -> None:
    assert registry._read(registry.Parameter("p", kind, None, ""), text) == value


@pytest.mark.parametrize(
    ("kind", "text"), [(int, "banana"), (int, "2.5"), (float, "x"), (bool, "2"), (int | None, "x")]
)
def test_wrong_kinds_are_refused(kind: Any, text: str) -> None:
    with pytest.raises(UserError, match="p="):
        registry._read(registry.Parameter("p", kind, None, ""), text)


@dataclass(frozen=True)
class Inner:
    grid: Tensor
    names: tuple[str, ...]


@dataclass(frozen=True)
class Outer:
    inner: Inner
    table: dict[str, Tensor]
    pairs: list[list[float]]
    maybe: Tensor | None
    none: Tensor | None


def test_results_round_trip_with_every_kind_of_field() -> None:
    value = Outer(Inner(torch.eye(3), ("a", "b")), {"x": torch.arange(4)}, [[1.5, 2.0], []], torch.ones(2), None)
    encoded, arrays = results.encode(value)
    assert equal(results.decode(Outer, json.loads(json.dumps(encoded)), arrays), value)


def test_sampling_refuses_what_cannot_be_drawn(tiny: LanguageModel) -> None:
    with pytest.raises(UserError, match="at least 1"):
        sample(registry.get_task("ioi"), tiny, 0, 0)
    never = registry.Task("never", 1, "logit_diff", lambda rng: sample_prompt(), "")
    with pytest.raises(UserError, match=r"only 0 of 2 never prompts pass .* different numbers of tokens"):
        sample(never, tiny, 2, 0)


def test_answers_that_merge_with_the_prompt_are_left_out(tiny: LanguageModel) -> None:
    """GPT-2 reads " 1700" as one token, so after " 17" it can never say "00"; other years remain."""
    digits = copy.deepcopy(tiny.tokenizer)
    digits.add_tokens([" 1700"])
    merged = copy.copy(tiny)
    merged.tokenizer = digits
    task = registry.get_task("greater_than")
    rows = [p for p in sample(task, tiny, 60, 0).prompts if p.clean.endswith(" 17")]
    assert rows
    for prompt in rows:
        _, _, _, with_merge = prompts._tokenise(prompt, merged)
        _, _, _, plain = prompts._tokenise(prompt, tiny)
        assert set(with_merge.tolist()) <= set(plain.tolist()) and len(with_merge)


def sample_prompt() -> Any:
    return prompts.Prompt("one two", "one two three four", (" a",), (" b",))


def test_batches_select_and_bucket(tiny: LanguageModel) -> None:
    batch: Batch = sample(registry.get_task("ioi"), tiny, 12, 0)
    seen = torch.cat(batch.buckets()).tolist()
    assert sorted(seen) == list(range(12))
    for bucket in batch.buckets():
        assert len({len(batch.clean[i]) for i in bucket.tolist()}) == 1
    assert batch.select([3, 1]).prompts == (batch.prompts[3], batch.prompts[1])


def test_home_is_a_setting(home: Path, tiny: LanguageModel) -> None:
    run = runs.run("logit-lens", model=tiny, task="ioi", n=3)
    assert run.folder.parent == home / "runs"


def test_a_run_tells_which_activations_it_used(tiny: LanguageModel, store: ActivationStore) -> None:
    run = runs.run("logit-lens", model=tiny, task="ioi", n=4, store=store)
    again = runs.get_run(run.id)
    hooks = {scope.hook for scope in again.activations}
    assert hooks == {"blocks.0.hook_resid_pre", *(f"blocks.{layer}.hook_resid_post" for layer in range(3))}
    for scope, digests in again.activations.items():
        stored = {one.sequence for one in store.show(hook=scope.hook) if run.id in one.runs}
        assert stored == {digest.hex() for digest in digests}
    assert run.record["cost"]["store"]["computed"] == sum(len(digests) for digests in again.activations.values())


def test_a_second_tool_on_the_same_activations_computes_nothing(tiny: LanguageModel, store: ActivationStore) -> None:
    """What one asked for, hook point by hook point, another finds, whatever the batches were."""
    batch = sample(registry.get_task("ioi"), tiny, 4, 0)
    z = [f"blocks.{layer}.attn.hook_z" for layer in range(3)]
    store.fill(tiny, [*reversed(batch.corrupted), *batch.clean], [*z, tiny.hook_points[-1]])
    run = runs.run("sae-codes", model=tiny, task="ioi", n=4, steps=2, trials=1, examples=2, store=store)
    assert run.forward_passes == 0 and run.record["cost"]["store"]["computed"] == 0
    assert run.record["cost"]["store"]["disk_hits"] > 0
