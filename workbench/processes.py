"""Training in several processes, one for each GPU or for each few cores, as `torchrun` starts them.

Any script that trains can be started so: `torchrun --nproc-per-node 2 script.py`. Every process holds the whole model
and reads its own rows of every batch. Gradients are averaged before a step, so that all take the same one: their
weights stay equal bit for bit, which is checked whenever training is evaluated. The first process alone evaluates,
writes and shows progress, and its clock is everybody's.

Numbers other than gradients travel between CPUs, also where training is on GPUs: nothing has to wait for these.
"""

from __future__ import annotations

import atexit
import json
import os
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from accelerate import PartialState
from torch import Tensor
from torch.distributed import PrefixStore  # type: ignore[attr-defined]
from torch.distributed.rendezvous import rendezvous

from workbench.errors import UserError


def join(device: str) -> None:
    """Meet the other processes, if `torchrun` started this one; on CUDA, take the GPU that is this one's."""
    if dist.is_torchelastic_launched() and not dist.is_initialized():
        # Under the number of this attempt: after a restart the store still has addresses of processes that are gone.
        store, rank, size = next(rendezvous("env://"))
        store = PrefixStore(f"attempt {os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
        backend = "gloo" if device == "cpu" else "cuda:nccl,cpu:gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=size)
        PartialState(cpu=device == "cpu")  # takes the GPU
        atexit.register(dist.destroy_process_group)


def count() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def number() -> int:
    """Of this process; the first is 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def share(batch: int) -> int:
    """Rows of a batch that each process reads. Raises UserError if they cannot be shared out evenly."""
    if batch % count():
        raise UserError(
            f"a batch of {batch} rows cannot be shared out evenly among {count()} processes; give it "
            f"{-(-batch // count()) * count()}, or start another number of processes."
        )
    return batch // count()


def average(tensors: Sequence[Tensor]) -> None:
    """Make each tensor its mean over processes, in place; in all of them the same bits."""
    if count() > 1 and tensors:
        flat = torch.cat([x.flatten() for x in tensors])
        dist.all_reduce(flat)
        parts = (flat / count()).split([x.numel() for x in tensors])
        for x, part in zip(tensors, parts, strict=True):
            x.copy_(part.view_as(x))


def anywhere(x: Tensor) -> Tensor:
    """Where any of the processes has True."""
    if count() == 1:
        return x
    found = x.to(torch.uint8)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return found.bool()


def first(value: Any) -> Any:
    """The first process's value, of numbers, lists and dictionaries."""
    if count() == 1:
        return value
    text = json.dumps(value).encode() if number() == 0 else b""
    size = torch.tensor([len(text)])
    dist.broadcast(size, 0)
    told = torch.zeros(int(size), dtype=torch.uint8) if number() else torch.tensor(list(text), dtype=torch.uint8)
    dist.broadcast(told, 0)
    return json.loads(bytes(told.tolist()))


def same(tensors: Sequence[Tensor]) -> None:
    """Raises UserError if these (float32) are not the first process's, by the sums of their bits."""
    if count() > 1:
        mine = torch.stack([x.detach().view(torch.int32).sum() for x in tensors]).cpu()
        firsts = mine.clone()
        dist.broadcast(firsts, 0)
        if not torch.equal(mine, firsts):
            raise UserError(
                f"the weights of process {number()} are no longer those of the first one; start all processes with "
                "the same software, on devices of one kind, and one folder for their checkpoints."
            )
