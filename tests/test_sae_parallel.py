"""SAEs trained by two real processes, as `torchrun` starts them, are those of one. Run so, this file is one of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from saes.train import Progress
from tests.test_sae_train import rows, stream_of, training
from workbench import processes

KINDS = ("topk", "jumprelu", "standard")


def trained() -> Progress:
    progress = Progress({kind: training(kind) for kind in KINDS}, None, {})
    progress.run(stream_of(rows()))
    return progress


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    progress, rank = trained(), processes.number()
    (folder / f"{rank}.json").write_text(json.dumps({"processes": processes.count(), "curves": progress.curves}))
    for kind, one in progress.trainings.items():
        save_file(
            {name: x.detach() for name, x in one.weights.tensors().items()}, folder / f"{kind}-{rank}.safetensors"
        )


def test_two_processes_learn_what_one_does(tmp_path: Path) -> None:
    root = str(Path(__file__).parents[1])
    torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [sys.executable, "-m", *torchrun, __file__, str(tmp_path)], cwd=root, capture_output=True, text=True,
        timeout=300, env=os.environ | {"PYTHONPATH": root, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    one = trained()
    notes = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    assert notes[0]["processes"] == 2 and notes[0]["curves"] == notes[1]["curves"]
    for kind in KINDS:
        first, second = (load_file(tmp_path / f"{kind}-{rank}.safetensors") for rank in (0, 1))
        assert notes[0]["curves"][kind]["error"] == pytest.approx(one.curves[kind]["error"], rel=1e-4)
        assert notes[0]["curves"][kind]["dead"] == one.curves[kind]["dead"]
        for name, x in one.trainings[kind].weights.tensors().items():
            assert torch.equal(first[name], second[name]), (kind, name)
            torch.testing.assert_close(first[name], x.detach(), rtol=1e-3, atol=1e-4)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
