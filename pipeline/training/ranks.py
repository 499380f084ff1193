"""What the processes of one training tell each other over `torch.distributed`; alone, each call is a plain function."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def rank() -> int:
    """Return the number of this process."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def gather(values: Tensor) -> Tensor:
    """The `values` float64 [n] of every rank, [ranks, n], on the CPU of every rank; waits for the device."""
    if world_size() == 1:
        return values.cpu()[None]
    mine = _moved(values)
    every = [torch.empty_like(mine) for _ in range(world_size())]
    dist.all_gather(every, mine)
    return torch.stack(every).cpu()


def from_first(numbers: tuple[int, ...]) -> tuple[int, ...]:
    """The numbers that rank 0 gives; every rank gives as many."""
    if world_size() == 1:
        return numbers
    told = _moved(torch.tensor(numbers))
    dist.broadcast(told, 0)
    return tuple(int(number) for number in told)


def _moved(values: Tensor) -> Tensor:
    """To where the process group exchanges tensors."""
    return values.to("cuda" if dist.get_backend() == "nccl" else "cpu")
