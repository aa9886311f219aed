"""The memory plan against what real engines keep and a real step takes."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch

from tests import tiny
from tests.parity.test_step import build
from tests.ranks import run_ranks

LENGTH, SAMPLES, VOCAB = 128, 2, 16_000


def status(name):
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise LookupError(name)


def adamw(parameters):
    return torch.optim.AdamW(parameters, lr=1e-4, fused=True)


def rows(count):
    ids = torch.randint(3, VOCAB, (count, LENGTH + 1), generator=torch.manual_seed(0)).tolist()
    return [{"input_ids": r[:-1], "labels": r[1:], "sample_id": k} for k, r in enumerate(ids)]


def measured(world, paths, dtype, checkpointing):
    """(planned states, states, planned peak, peak), bytes."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from ds_kd.checkpoint.engine_files import state_bytes
    from ds_kd.plan import memory

    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    made = build(
        world, paths, rows(2 * SAMPLES * world.size), 1, SAMPLES, 0.5, adamw, dtype=dtype,
        checkpointing=checkpointing, temperature=2.0,
    )  # fmt: skip
    made.student.module.loss.divergence.chunk_size = LENGTH
    Path("/proc/self/clear_refs").write_text("5")
    made.train()
    peak = status("VmHWM") - before
    states = state_bytes(made.student) + state_bytes(made.teacher.engine)
    shapes = []
    for name in ("student", "teacher"):
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(paths[name]))
        shapes.append(memory.shape_of(model, dtype.itemsize))
    work = memory.Work(
        SAMPLES * LENGTH, LENGTH, chunk=LENGTH, shares_softmax=False,
        checkpointing=checkpointing,
    )  # fmt: skip
    parts = memory.estimate_bytes(*shapes, work, world.size)
    planned = sum(size for name, size in parts.items() if memory.is_state(name))
    return planned, states, memory.on_device(parts), peak


def work(world, root, paths, small):
    build(world, small, tiny.samples(2 * world.size), 1, 2, 0.5, adamw).train()  # libraries' own
    return {
        f"{name} checkpointing={again}": measured(world, paths, dtype, again)
        for name, dtype, again in (
            ("fp32", torch.float32, False),
            ("bf16", torch.bfloat16, True),
        )
    }


@pytest.fixture(scope="module", params=[1, 2], ids=["1 rank", "2 ranks"])
def results(request, tmp_path_factory):
    root = tmp_path_factory.mktemp("plan")
    small = {name: str(tiny.llama(root / f"small {name}")) for name in ("student", "teacher")}
    paths = {
        "student": str(tiny.llama(root / "student", layers=4, hidden=640, vocab=VOCAB)),
        "teacher": str(tiny.llama(root / "teacher", layers=6, hidden=768, vocab=VOCAB, tie=False)),
    }
    return run_ranks(work, request.param, root, paths, small)[0]


def test_states_are_planned_within_15_percent(results):
    for name, (planned, states, _, _) in results.items():
        assert abs(planned / states - 1) < 0.15, f"{name}: {planned / 2**20} {states / 2**20} MiB"


def test_the_peak_is_planned_within_30_percent(results):
    for name, (_, _, planned, peak) in results.items():
        assert abs(planned / peak - 1) < 0.30, f"{name}: {planned / 2**20} {peak / 2**20} MiB"


@pytest.mark.parametrize(
    ("name", "arguments", "numbers"),
    [
        ("AdamW", {}, 2),
        ("AdamW", {"amsgrad": True}, 3),
        ("SGD", {"momentum": 0.9}, 1),
        ("SGD", {"momentum": 0}, 0),
        ("RMSprop", {"centered": True, "momentum": 0.9}, 3),
    ],
)
def test_the_plan_counts_what_torchs_optimizers_keep(name, arguments, numbers):
    from ds_kd.parallel.engines import optimizer_numbers

    parameter = torch.nn.Parameter(torch.zeros(7))
    parameter.grad = torch.ones(7)
    optimizer = getattr(torch.optim, name)([parameter], lr=0.1, **arguments)
    optimizer.step()
    kept = [v for v in optimizer.state[parameter].values() if torch.is_tensor(v) and v.numel() == 7]
    assert optimizer_numbers(name, arguments) == len(kept) == numbers
