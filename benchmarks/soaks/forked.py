"""Ranks that run launch/kd.py, forked from a process that has imported torch already: several times
as quick to start as the command, and as real to a SIGKILL."""

from __future__ import annotations

import functools
import multiprocessing
import os
from typing import Any

from benchmarks.arguments import ROOT

GUIDE = ROOT / "ds_configs" / "runs" / "llama3_2_1b_kd.yaml"
_PRELOADED = ["deepspeed", "datasets", "transformers.models.llama.modeling_llama"]
_PRELOADED += ["transformers.integrations.deepspeed", "ds_kd.recipe.run", "tests.scripts"]


@functools.cache
def server() -> Any:
    """Return the server of processes, which has imported what a run needs."""
    # As `quiet` sets them; here torch and DeepSpeed are there before.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    return context


def become_rank(rank: int, ranks: int, port: int, log: str) -> None:
    """Make this process, which has just been forked, one rank of a job that writes to a log."""
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 1)
    os.dup2(1, 2)
    os.chdir(ROOT)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1",
    )  # fmt: skip


def run_rank(rank: int, ranks: int, port: int, log: str, words: list[str]) -> None:
    """Run one rank of the command with these overrides, and end with its exit code."""
    from tests.scripts import script

    become_rank(rank, ranks, port, log)
    code = script("kd").main(["--config", str(GUIDE), *words])
    os._exit(code)  # as the server would go on with what it was forked for
