"""Work done by several processes that torch.distributed has joined; forked, so nothing is imported again."""

from __future__ import annotations

import multiprocessing
import pickle
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import distributed

SECONDS = 120  # after which a process hangs


def in_processes(count: int, folder: Path, work: Callable[[int], Any]) -> list[Any]:
    """What ``work(rank)`` gives or raises in each process; None for one that was killed."""
    context = multiprocessing.get_context("fork")
    pipes = [context.Pipe(duplex=False) for _ in range(count)]
    store = f"file://{folder}/store-{len(list(folder.iterdir()))}"
    children = [context.Process(target=_run, args=(i, count, store, work, pipes[i][1])) for i in range(count)]
    for child in children:
        child.start()
    found = []
    try:
        for (reader, writer), _ in zip(pipes, children, strict=True):
            writer.close()
            assert reader.poll(SECONDS), "a process hangs"
            try:
                found.append(pickle.loads(reader.recv_bytes()))
            except EOFError:
                found.append(None)
    finally:
        for child in children:
            child.join(SECONDS / 10)
            child.kill()
    return found


def _run(rank: int, count: int, store: str, work: Callable[[int], Any], pipe: Connection) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=count)
    try:
        result = work(rank)
    except Exception as error:
        traceback.print_exc()
        result = error
    pipe.send_bytes(pickle.dumps(result))
    distributed.destroy_process_group()
