"""Several processes of one test, joined by gloo."""

import datetime
import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch

TIMEOUT = 120
PRELOADED = ("torch.distributed.fsdp", "torch.distributed.checkpoint", "tests.models.tiny", "transformers")


def run_ranks(function: Callable, world_size: int, *arguments) -> list:
    """Calls `function(*arguments)` in processes that are ranks of one group; what each returned, by rank.

    The processes are forked from a server that has imported the libraries and has used none of torch's threads.

    Raises:
        RuntimeError: with a rank's traceback where one failed, or where they did not end in time.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*PRELOADED])
    results = context.SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        rendezvous = f"file://{Path(folder, 'rendezvous')}"
        processes = [
            context.Process(target=_rank, args=(function, rank, world_size, rendezvous, results, arguments))
            for rank in range(world_size)
        ]
        for process in processes:
            process.start()
        found = dict(_results(processes, results, world_size))
        for process in processes:
            process.join(TIMEOUT)
    failures = [text for _, text in sorted(found.values(), key=lambda item: item[0]) if isinstance(text, Failure)]
    if failures:
        raise RuntimeError("\n".join(map(str, failures)))
    return [found[rank][1] for rank in range(world_size)]


class Failure(str):
    """A rank's traceback."""


def _results(processes, results, world_size):
    ended, found = time.monotonic() + TIMEOUT, 0
    while found < world_size:
        if not results.empty():
            rank, value = results.get()
            found += 1
            yield rank, (rank, value)
        elif time.monotonic() > ended or all(p.exitcode is not None for p in processes):
            for process in processes:
                process.terminate()
            raise RuntimeError(f"{world_size - found} of {world_size} ranks gave no result in {TIMEOUT} s")
        else:
            time.sleep(0.02)


def _rank(function, rank, world_size, rendezvous, results, arguments):
    sizes = {"WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size)}
    # what accelerate asks for, though the group is there already
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "0",
        **sizes,
    }
    torch.set_num_threads(1)
    try:
        limit = datetime.timedelta(seconds=TIMEOUT / 2)
        torch.distributed.init_process_group(
            "gloo", init_method=rendezvous, rank=rank, world_size=world_size, timeout=limit
        )
        value = function(*arguments)
        torch.distributed.barrier()
    except BaseException:
        value = Failure(f"rank {rank}:\n{traceback.format_exc()}")
    results.put((rank, value))
    if torch.distributed.is_initialized() and not isinstance(value, Failure):
        torch.distributed.destroy_process_group()
