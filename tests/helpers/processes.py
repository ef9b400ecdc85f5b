"""A function on several processes of one gloo group, as sharded training runs."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def on_processes(function: Callable[..., Any], *args: Any, processes: int = 2) -> list[Any]:
    """``function(*args)`` on each rank of a group: what each returned, by rank.

    The function has to be importable. A rank that hangs ends after 2 minutes, with the others.
    """
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_rank, (processes, folder, function, args), nprocs=processes)
        return [
            torch.load(Path(folder, str(rank)), weights_only=False) for rank in range(processes)
        ]


def _rank(
    rank: int, processes: int, folder: str, function: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=processes,
        timeout=timedelta(seconds=120),
    )
    torch.save(function(*args), Path(folder, str(rank)))
    dist.destroy_process_group()
