"""The layers of the design, enforced: who may import whom, and where the backend and hooks live."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = ("workbench", "circuits", "saes", "papers", "app")
# importer -> what it may import of ours
ALLOWED = {
    "workbench": {"workbench"},
    "circuits": {"workbench", "circuits"},
    "saes": {"workbench", "saes"},
    "papers": {"workbench", "papers"},
    "app": set(PACKAGES),
}
BACKEND = {"transformers", "transformer_lens"}


def imports(path: Path) -> Iterator[str]:
    """Full names of the modules a file imports, wherever in the file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


def sources() -> list[Path]:
    return [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]


def test_layers_import_downwards_only() -> None:
    for path in sources():
        package = path.relative_to(ROOT).parts[0]
        for name in imports(path):
            top = name.split(".")[0]
            assert top not in PACKAGES or top in ALLOWED[package], f"{path} imports {name}"


def test_the_backend_and_hooks_live_in_one_file() -> None:
    for path in sources():
        if path == ROOT / "workbench" / "backend.py":
            continue
        assert not BACKEND & {name.split(".")[0] for name in imports(path)}, f"{path} imports the backend"
        assert "register_forward" not in path.read_text(), f"{path} registers hooks"


def test_streamlit_is_imported_only_by_the_app() -> None:
    for path in sources():
        if path.relative_to(ROOT).parts[0] != "app":
            assert "streamlit" not in {name.split(".")[0] for name in imports(path)}, f"{path} imports streamlit"


def test_nothing_reads_pickles_prints_or_seeds_globally() -> None:
    banned = {"pickle.", "torch.load(", "torch.save(", "torch.manual_seed(", "random.seed(", "np.random.seed("}
    for path in sources():
        text = path.read_text()
        if path == ROOT / "circuits" / "sparse" / "files.py":  # others' checkpoints, by the restricted unpickler
            assert text.count("torch.load(") == text.count("weights_only=True") == 1
            text = text.replace("torch.load(", "")
        assert not [word for word in banned if word in text], path


def test_modules_and_functions_stay_small() -> None:
    for path in sources():
        lines = [line for line in path.read_text().splitlines() if line.strip() and not line.strip().startswith("#")]
        assert len(lines) <= 400, f"{path} has {len(lines)} lines"
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                assert (node.end_lineno or 0) - node.lineno < 80, f"{path}: {node.name}"


def test_what_is_slow_to_import_is_imported_where_it_is_used() -> None:
    """So that `wb runs` answers at once: they take nearly twice as long as torch and all of ours together."""
    slow = ("transformers.modeling_utils", "sklearn", "scipy.stats", "torch._dynamo", "streamlit", "sae_lens")
    program = f"import sys, {', '.join(PACKAGES[:-1])}; print([name for name in {slow} if name in sys.modules])"
    shown = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    assert shown.stdout.strip() == "[]"
