"""A recipe as a program of its own, against steering here and transformers' own generation."""

from __future__ import annotations

import ast
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from saes.sae import SAE
from saes.steering.steer import steer
from tests.conftest import Wb
from tests.test_app import edit, folder, save
from tests.test_app_ways import steered
from tests.test_plots import node_scores
from workbench import runs
from workbench.errors import UserError
from workbench.models import LanguageModel
from workbench.runs import Run
from workbench.standalone import program

HOOK = "blocks.1.hook_resid_post"


def run_of(sae: Path, content: str | None = None) -> Run:
    """What a run that searched this SAE says of it."""
    key = {"contents": {str(sae): runs.content(str(sae)) if content is None else content}}
    return Run("language-steering-0", Path(), {"key": key}, True, 0.0, 0)


def of(sae: Path, **changes: Any) -> str:
    result = steered()
    given = {"sae": str(sae), "hook": HOOK, "latent": 7, "strength": 2.0, "unit": 3.0, "decay": 0.8, **changes}
    return program(replace(result, recipe=replace(result.recipe, **given)), run_of(sae))


def ran(source: str) -> dict[str, Any]:
    names: dict[str, Any] = {}
    exec(compile(source, "steer.py", "exec"), names)
    return names


@pytest.mark.parametrize("decay, caches", [(0.8, (True,)), (1.0, (True, False))])
def test_it_writes_what_steering_here_writes(
    tiny: LanguageModel, tiny_sae: Path, decay: float, caches: tuple[bool, ...]
) -> None:
    """By transformers' own loop, token by token or reading all again; several texts in one block."""
    names, sae = ran(of(tiny_sae, decay=decay)), SAE.load(tiny_sae)
    module, tokens = (
        tiny._module,
        torch.stack([tiny.tokenize("When Mary and John went"), tiny.tokenize("Then")[[0] * 5]]),
    )
    result = replace(steered().recipe, hook=HOOK, latent=7, strength=2.0, unit=3.0, decay=decay)
    for strength in (1.0, 0.25):
        one = result.steering(sae).at(2.0 * strength)
        expected = steer(tiny, tokens, 12, [one, one]).generated.tokens
        plain = steer(tiny, tokens, 12, [None, None]).generated.tokens
        assert not torch.equal(expected, plain)
        with names["steered"](module.model.layers[1], strength):
            for cache in caches:
                found = module.generate(
                    tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=12, do_sample=False, use_cache=cache,
                    eos_token_id=None, pad_token_id=0,
                )  # fmt: skip
                assert torch.equal(found[:, tokens.shape[1] :].cpu(), expected[:, -12:])


def test_strength_0_changes_nothing_and_nothing_is_left_behind(tiny: LanguageModel, tiny_sae: Path) -> None:
    names, module = ran(of(tiny_sae)), tiny._module
    tokens = tiny.tokenize("When Mary and John went")[None]
    plain = module(tokens).logits
    with names["steered"](module.model.layers[1], 0.0):
        assert torch.equal(module(tokens).logits, plain)
    with pytest.raises(KeyError), names["steered"](module.model.layers[1]):
        assert not torch.equal(module(tokens).logits, plain)
        raise KeyError
    assert torch.equal(module(tokens).logits, plain)


def test_a_prompt_of_one_token_is_not_steered_and_what_follows_is(tiny: LanguageModel, tiny_sae: Path) -> None:
    names, module = ran(of(tiny_sae, decay=1.0)), tiny._module
    block, token = module.model.layers[1], torch.tensor([[5]])
    with names["steered"](block):
        first = module(token, use_cache=True)
        second = module(torch.tensor([[6]]), past_key_values=first.past_key_values)
    plain = module(torch.tensor([[5, 6]])).logits
    assert torch.allclose(first.logits[0, 0], plain[0, 0], atol=1e-5)
    assert not torch.allclose(second.logits[0, 0], plain[0, 1], atol=1e-2)


def test_it_needs_torch_alone_and_says_what_was_measured(tiny_sae: Path, tmp_path: Path) -> None:
    source = of(tiny_sae)
    tops = {
        name.name.split(".")[0] for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Import)
        for name in node.names
    } | {str(node.module) for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ImportFrom)}  # fmt: skip
    assert tops == {"base64", "contextlib", "torch"}
    said = ast.get_docstring(ast.parse(source)) or ""
    assert "plain success 0.90 (95 %: 0.80 to 0.95)" in said and "strict success 0.60" in said
    (tmp_path / "steer_fr.py").write_text(source)
    call = [
        sys.executable,
        "-I",
        "-c",
        "import sys; sys.path[:0] = ['.']; import steer_fr; print(len(steer_fr.VECTOR))",
    ]
    assert subprocess.run(call, cwd=tmp_path, capture_output=True, text=True, check=True).stdout == "32\n"


def test_words_of_an_imported_run_are_no_program(tiny_sae: Path) -> None:
    hostile = '"""\nimport os\nos.remove("x")\n"""\\'
    result = steered()
    recipe = replace(result.recipe, model=hostile, target=hostile, source=hostile, sae=str(tiny_sae), hook=HOOK)
    tree = ast.parse(program(replace(result, recipe=recipe, definition=hostile), run_of(tiny_sae)))
    plain = ast.parse(of(tiny_sae))
    kinds = [[type(node) for node in ast.walk(one)] for one in (tree, plain)]
    imported = {name.name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names}
    assert kinds[0] == kinds[1] and imported == {"base64", "torch"}


@pytest.mark.parametrize("changes", [{"kind": "clamp"}, {"scope": "last"}, {"hook": "blocks.1.hook_mlp_out"}])
def test_what_adds_no_vector_to_a_block_is_refused(changes: dict[str, str], tiny_sae: Path) -> None:
    with pytest.raises(UserError, match="no file of its own"):
        of(tiny_sae, **changes)


def test_another_sae_of_the_same_name_is_refused(tiny_sae: Path) -> None:
    result = steered()
    found = replace(result, recipe=replace(result.recipe, sae=str(tiny_sae), hook=HOOK))
    assert "def steered" in program(found, run_of(tiny_sae))
    with pytest.raises(UserError, match="is another SAE here than the one that run language-steering-0 searched"):
        program(found, run_of(tiny_sae, "0123"))


def test_the_command_writes_it_and_refuses_other_runs(wb: Wb, tiny_sae: Path, tmp_path: Path) -> None:
    result = steered()
    recipe = replace(result.recipe, sae=str(tiny_sae), hook=HOOK)
    id, file = save(replace(result, recipe=recipe), "language-steering"), tmp_path / "steer_fr.py"
    edit(id, key={**runs.get_run(id).record["key"], **run_of(tiny_sae).record["key"]})
    assert folder(id).is_dir()
    status, out, _ = wb("export", id, "--program", "--out", str(file))
    assert status == 0 and str(file) in out and "def steered" in file.read_text()
    status, _, err = wb("export", id, "--program", "--out", str(file))
    assert status == 2 and "is there already" in err
    status, _, err = wb("export", save(node_scores()), "--program", "--out", str(tmp_path / "x.py"))
    assert status == 2 and "is no program" in err and not (tmp_path / "x.py").exists()
