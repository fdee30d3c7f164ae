"""Ranks as real processes, forked from a process that has imported everything once.

Importing torch and the host takes seconds a process; a fork takes milliseconds. The parent must stay
single-threaded: it runs no parallel operator, and every rank uses one thread. On a GPU a server forks them, since the
parent computes there too.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import pickle
import queue
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # torch imports it with the first optimizer: three seconds that every rank would spend anew
import torch.distributed as dist

from amdp_plugin.settings import read_schedule

from . import devices, one_gpu

torch.set_num_threads(1)
# More that every rank would do anew: look in all that is installed for schedules and for pydantic's plugins, read the
# source of whoever seeds, import what a span wants.
read_schedule("paci", "the tests")
torch.manual_seed(torch.initial_seed())
with torch.autograd.profiler.record_function("a span"):
    pass


def run_ranks(world: int, target: Callable[..., Any], *arguments: Any, timeout: float = 120.0) -> list[Any]:
    """Run ``target(rank, *arguments)`` on ``world`` ranks with a process group; return their results.

    Raises:
        AssertionError: with the traceback of every rank that failed, or the ranks that did not end.
    """
    results = outcomes(world, target, *arguments, timeout=timeout)
    failures = [f"rank {rank}:\n{text}" for rank, (ok, text) in enumerate(results) if not ok]
    assert not failures, "\n".join(failures)
    return [value for _, value in results]


def outcomes(
    world: int, target: Callable[..., Any], *arguments: Any, timeout: float = 120.0, without: int | None = None
) -> list[tuple[bool, Any]]:
    """As :func:`run_ranks`, but failures are results: (True, value), or (False, traceback) of every rank.

    Args:
        without: a rank that is not waited for, and killed when all others have answered.
    """
    for argument in arguments:
        if hasattr(argument, "prepare"):  # what all ranks would find anew
            argument.prepare()
    context = _context(target)
    answers = context.Queue()
    with tempfile.TemporaryDirectory() as directory:
        rendezvous = Path(directory) / "rendezvous"
        processes = [
            context.Process(target=_rank, args=(rank, world, rendezvous, answers, target, arguments), daemon=True)
            for rank in range(world)
        ]
        for process in processes:
            process.start()
        found: dict[int, tuple[bool, Any]] = {}
        end = time.monotonic() + timeout
        awaited = set(range(world)) - {without}
        while awaited - found.keys() and time.monotonic() < end:
            try:
                rank, ok, value = answers.get(timeout=0.2)
                found.setdefault(rank, (ok, pickle.loads(value) if ok else value))
            except queue.Empty:
                dead = {r for r, process in enumerate(processes) if process.exitcode not in (None, 0)}
                for rank in dead - found.keys():
                    found[rank] = (False, f"the process ended with exit code {processes[rank].exitcode}")
        if without is not None:
            processes[without].kill()
        for process in processes:
            process.join(timeout=5.0)
            process.kill()
        return [found.get(rank, (False, f"rank {rank} did not end within {timeout} s")) for rank in range(world)]


def _context(target: Callable[..., Any]) -> Any:
    context = multiprocessing.get_context(devices.start_method())
    if devices.on_gpu():
        context.set_forkserver_preload([target.__module__])  # of a session's first test: what it imports, all need
    return context


def _rank(rank: int, world: int, rendezvous: Path, answers: Any, target: Callable[..., Any], arguments: Any) -> None:
    gc.freeze()  # what was there before the fork is no garbage, and to look through it costs more than most jobs
    local = str(devices.local_rank(rank))
    os.environ.update(RANK=str(rank), LOCAL_RANK=local, WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1")
    try:
        devices.settle_rank(rank)
        dist.init_process_group(
            devices.backend(),
            init_method=f"file://{rendezvous}",
            rank=rank,
            world_size=world,
            timeout=timedelta(seconds=60),
        )
        if devices.chosen() == "cuda":
            one_gpu.install()
        answers.put((rank, True, pickle.dumps(target(rank, *arguments))))  # bytes: tensors would be shared memory
        dist.barrier()  # a rank that leaves closes connections that others may still look at
        dist.destroy_process_group()
    except BaseException:
        answers.put((rank, False, traceback.format_exc()))  # the first answer of a rank counts
    finally:
        answers.close()
        answers.join_thread()
        for child in multiprocessing.active_children():
            child.kill()  # writers of checkpoints, which would wait for ever for a parent that ends like this
        os._exit(0)
