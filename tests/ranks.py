"""Run a function on several gloo ranks of this machine, with a hard time limit."""

from __future__ import annotations

import functools
import json
import multiprocessing
import multiprocessing.forkserver
import os
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest

from ds_kd.parallel.rendezvous import free_port


def _rank(
    worker: Callable,
    rank: int,
    size: int,
    port: int,
    directory: str,
    args: tuple,
    timeout_minutes: float,
    layout: dict[str, int],
) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        DS_ACCELERATOR="cpu",
    )
    try:
        import torch

        from ds_kd.parallel import world as distributed

        torch.set_num_threads(1)
        world = distributed.divide(
            distributed.start("gloo", timeout_minutes), timeout_minutes, **layout
        )
        result = worker(world, Path(directory), *args)
        (Path(directory) / f"result{rank}.json").write_text(json.dumps(result))
        distributed.stop()
    except BaseException:
        (Path(directory) / f"error{rank}.txt").write_text(traceback.format_exc())
        raise


@functools.cache
def _server():
    """Return the process from which ranks are forked: a process that has imported once what takes
    each of them seconds."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["transformers", "datasets", "peft", "ds_kd.recipe.run", "transformers.models.llama"]
    )
    # For the server and all that it forks, also for benchmarks/soaks/kill_points.py: DeepSpeed
    # looks for an accelerator when it is imported, and torch reads then how much to log.
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DS_ACCELERATOR", "cpu")
        patch.setenv("TORCH_CPP_LOG_LEVEL", "ERROR")
        multiprocessing.forkserver.ensure_running()
    return context


def run_ranks(
    worker: Callable,
    size: int,
    directory: Path,
    *args,
    seconds: float = 600,
    timeout_minutes: float = 1,
    **layout: int,
) -> list:
    """`worker(world, directory, *args)` on `size` ranks → what each returned (JSON), in rank
    order. `layout` has the sizes of `world.divide`."""
    context = _server()
    port = free_port()
    ranks = [
        context.Process(
            target=_rank,
            args=(worker, r, size, port, str(directory), args, timeout_minutes, layout),
        )
        for r in range(size)
    ]
    for process in ranks:
        process.start()
    deadline = time.monotonic() + seconds
    for process in ranks:
        process.join(max(0.1, deadline - time.monotonic()))
    hung = [process for process in ranks if process.is_alive()]
    for process in hung:
        process.kill()
    errors = [path.read_text() for path in sorted(directory.glob("error*.txt"))]
    assert not errors, "\n".join(errors)
    assert not hung, f"{len(hung)} of {size} ranks still ran after {seconds} s"
    return [json.loads((directory / f"result{r}.json").read_text()) for r in range(size)]
