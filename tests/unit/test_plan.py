"""`--dry-run`: what of a run fits where, from config.json alone."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from ds_kd.config.load import load
from ds_kd.losses.chunked import default_chunk
from ds_kd.plan import memory as plan
from ds_kd.plan.dry_run import work_of
from tests import tiny
from tests.scripts import script

GUIDE = Path(__file__).parents[2] / "ds_configs" / "runs" / "llama3_2_1b_kd.yaml"
LARGE = plan.Shape(10**10, 10**10, 0, 32, 3 * 10**8, 32_000, 4096, 50_000, True, 2)
AWAY = plan.Work(1024, 1024, offload_optimizer=True, offload_weights=True, offload_teacher=True)


def bytes_in(text):
    units = {"GiB": 2**30, "MiB": 2**20}
    return [float(n) * units[u] for n, u in re.findall(r"([\d.]+) (GiB|MiB)", text)]


def test_the_memory_of_a_node_counts_each_of_its_ranks_once():
    parts = plan.estimate_bytes(LARGE, LARGE, AWAY, 16)
    one = sum(size for name, size in parts.items() if name.startswith("host "))
    # fp32 weights, two moments and gradients of 4 bytes each, two models of 2, over 16 ranks.
    assert one == 10**10 * (16 + 2 + 2) // 16
    assert plan.Machine(ranks_per_node=4).of_node(parts, 16) == 4 * one
    alone = plan.estimate_bytes(LARGE, LARGE, AWAY, 1)
    assert plan.Machine(ranks_per_node=8).of_node(alone, 1) == 16 * one


def test_what_fits_the_accelerator_and_not_its_host_does_not_fit():
    small = plan.Machine(room=80 * 10**9, host_room=64 * 10**9, ranks_per_node=8)
    assert small.lacks(plan.estimate_bytes(LARGE, LARGE, AWAY, 1), 1) == ["host"]
    assert plan.smallest_fit(LARGE, LARGE, AWAY, small)[0] == 32  # 200 GB over 4 nodes
    large = plan.Machine(room=80 * 10**9, host_room=10**12, ranks_per_node=8)
    assert plan.smallest_fit(LARGE, LARGE, AWAY, large)[0] == 1


def test_a_teacher_takes_the_first_place_for_which_there_is_memory():
    student = plan.Shape(10**9, 10**9, 0, 16, 5 * 10**7, 32_000, 2048, 50_000, True, 2)
    work = plan.Work(1024, 1024)

    def choose(gb, **more):
        return plan.choose_placement(student, LARGE, work, plan.Machine(gb * 10**9, **more), 8)[0]

    # Its 20 GB are there, are there in eighths, or are not there with all else of a step.
    assert [choose(gb) for gb in (80, 24, 12)] == ["replicate", "zero3", "cpu"]
    # A CPU has no other memory to move it to.
    assert choose(12, is_one=True) == "zero3"


def test_a_teacher_in_8_bits_takes_a_byte_and_a_sixteenth_a_weight_and_its_head_in_16_too():
    whole, rounded = (
        plan.estimate_bytes(LARGE, LARGE, plan.Work(1, 1, teacher_is_rounded=is_it), 4)
        for is_it in (False, True)
    )
    assert (
        rounded["teacher weights"] == 10**10 * 17 // 16 // 4 == whole["teacher weights"] * 17 / 32
    )
    head, name = 32_000 * 4096, "gathered layers and heads"
    assert rounded[name] - whole[name] == 2 * head * 17 / 16  # one is in transit


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """The command for two directories that hold nothing but a config.json."""
    root = tmp_path_factory.mktemp("plan")
    (root / "rows.jsonl").write_text(tiny.squad_rows(40))
    models = []
    for name, layers in (("s", 2), ("t", 3)):
        path = tiny.llama(root / name, layers)
        for other in path.iterdir():
            if other.name != "config.json":
                other.unlink()
        models.append(path)
    return [
        "--config", str(GUIDE), "--ranks", "1", "--gpu-memory", "64GB",
        f"model.pretrained_model_name_or_path={models[0]}", "validation_dataset=null",
        f"teacher_model.pretrained_model_name_or_path={models[1]}",
        f"dataset.dataset_name={root / 'rows.jsonl'}",
    ]  # fmt: skip


OFFLOAD = (
    "deepspeed.student={zero_optimization: {stage: 3, offload_param: {device: cpu}, "
    "offload_optimizer: {device: cpu}}}"
)


def test_no_part_is_larger_than_its_whole_when_states_are_offloaded(words, capsys):
    assert script("plan").main([*words, OFFLOAD, "--length", "32"]) == 0
    out = capsys.readouterr().out
    lines = re.findall(r"^ +\d+: (.*)$", out, re.MULTILINE)
    assert len(lines) == len(plan.WORLDS)
    for line in lines:
        whole, states, host = bytes_in(line)
        assert states <= whole and host > 0
        assert "fits the accelerator (--host-memory checks the host)" in line
    assert script("plan").main([*words, OFFLOAD, "--length", "32", "--host-memory", "1KB"]) == 0
    out = capsys.readouterr().out
    assert out.count("too much for the host") == len(plan.WORLDS) and "nothing fits" in out
    assert script("plan").main([*words, "--host-memory", "much"]) == 2
    assert "--host-memory: got 'much'" in capsys.readouterr().err


def test_a_config_json_is_enough_and_the_length_can_be_given(words, capsys):
    main = script("plan").main
    cuts = ["dataset.seq_length=96", "dataset.truncation=true"]
    for more, tokens, told in (
        ([], 1024, "--length sets it"),
        (cuts, 96, "dataset.seq_length"),
        (["--length", "300"], 300, "--length"),
    ):
        assert main([*words, *more]) == 0
        out = capsys.readouterr().out
        assert told in out
        assert f"about {tokens:,} tokens" in out
        assert "steps: 4 from 40 samples" in out  # the rows can be counted without a tokenizer
    # Of 40 samples 9 are held out, and 31 make 62 steps in two epochs.
    small = ["step_scheduler.global_batch_size=1", "step_scheduler.local_batch_size=1"]
    assert main([*words, *small, "validation_share=0.225"]) == 0
    assert "steps: 62 from 31 samples (validation_share holds" in capsys.readouterr().out
    run = [word for word in words if word not in ("--gpu-memory", "64GB")]
    assert script("kd").main([*run, "--check"]) == 2
    assert "a tokenizer" in capsys.readouterr().err


def test_a_chunk_size_of_zero_is_planned_as_all_tokens_of_a_micro_batch(words):
    overrides = [word for word in words if "=" in word]
    for given, chunk in (("0", 5000), ("64", 64), ("null", default_chunk("cpu"))):
        cfg = load(
            GUIDE,
            [*overrides, f"kd_loss_fn.chunk_size={given}", "dist_env.backend=gloo"],
            config_only=True,
        )
        if given != "null" or not torch.cuda.is_available():
            assert work_of(cfg, 1, 5000, 0.5).chunk == chunk
