"""What is installed from a wheel works away from the repository: every file that the code reads is in it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel in it, and nothing else of ours."""
    work = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "--no-input"]
    source = work / "source"
    source.mkdir()
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout.decode()
    for name in filter(None, listed.split("\0")):  # as a fresh clone has them: nothing that was built before
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes((ROOT / name).read_bytes())
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(work), str(source)]
    subprocess.run(build, check=True)
    (wheel,) = work.glob("*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", str(work / "site"), str(wheel)], check=True)
    return work / "site"


def wb(installed: Path, home: Path, *words: str) -> str:
    code = "import workbench, sys; from workbench.cli import main; print(workbench.__file__, file=sys.stderr); main()"
    # Without `site`, whose .pth file would find what the wheel lacks in the repository.
    path = os.pathsep.join([str(installed), sysconfig.get_path("purelib")])
    environment = {**os.environ, "PYTHONPATH": path, "WORKBENCH_HOME": str(home)}
    environment.pop("WORKBENCH_DEVICE", None)
    done = subprocess.run(
        [sys.executable, "-S", "-c", code, *words],
        cwd=installed.parent,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert str(installed) in done.stderr  # and not the repository's
    return done.stdout


@pytest.mark.slow
def test_the_wheel_has_every_file_that_is_kept_beside_the_code(installed: Path) -> None:
    (wheel,) = installed.parent.glob("*.whl")
    inside = set(zipfile.ZipFile(wheel).namelist())
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split(
        "\n"
    )
    packages = ("workbench/", "circuits/", "saes/", "papers/", "app/")
    assert {name for name in listed if name.startswith(packages)} <= inside
    assert not [name for name in inside if name.startswith(("tests/", "docs/", "notebooks/"))]


@pytest.mark.slow
def test_it_works_away_from_the_repository(installed: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    names = {one["name"] for one in json.loads(wb(installed, home, "analyses", "--json"))["analyses"]}
    assert {"eap-ig", "sparse-prune", "language-steering", "attention-sinks"} <= names
    shipped = {one["run"] for one in json.loads(wb(installed, home, "runs", "--json"))["runs"]}
    assert {"sparse-tasks-7cfb2f4acddb", "train-sae-8aca63a53814"} <= shipped
    few = ("--model", "pycode-small-dense", "--task", "with_as", "--n", "4", "--json")
    found = json.loads(wb(installed, home, "run", "eap", *few))
    assert found["forward_passes"] > 0 and not found["hit"]
    assert json.loads(wb(installed, home, "run", "eap", *few))["hit"]


@pytest.mark.slow
def test_the_demo_runs_from_it(installed: Path, shared_home: Path, tmp_path: Path) -> None:
    (tmp_path / "home" / "models").mkdir(parents=True)
    (tmp_path / "home" / "models" / "smollm2-135m").symlink_to(shared_home / "models" / "smollm2-135m")
    assert "smollm2-135m" in wb(installed, tmp_path / "home", "demo")
