"""Runs whose samples are split over ranks: they resume bitwise, give the numbers of whole samples,
and go on as runs of whole samples."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from ds_kd.parallel.rendezvous import free_port
from tests import tiny
from tests.distributed.test_evaluation import meet_at, records
from tests.distributed.test_lora import one_step
from tests.parity.test_sequence import CASES, check, compare_with_plain_pytorch, make_models
from tests.ranks import run_ranks

LAYERS = {"name": "hidden_states", "weight": 0.3, "layers": [[0, 1]], "distance": "mse"}


def make_run(root: Path, name: str, steps: int, split: bool) -> dict:
    """A run of packs with all that looks at hidden states or asks a model."""
    model = {"_target_": "nemo_automodel.NeMoAutoModelForCausalLM.from_pretrained"}
    data = {"_target_": "ds_kd.data.squad.make_squad_dataset",
            "dataset_name": str(root / "rows.jsonl")}  # fmt: skip
    return {
        "model": {**model, "pretrained_model_name_or_path": str(root / "student")},
        "teacher_model": {**model, "pretrained_model_name_or_path": str(root / "teacher")},
        "dataset": data,
        "validation_dataset": {**data, "limit_dataset_samples": 7},
        "kd_loss_fn": [{"weight": 1, "temperature": 2.0}, LAYERS],
        "dataloader": {"shuffle": True},
        "packed_sequence": {"packed_sequence_size": 41, "share_prefixes": True},
        "step_scheduler": {"global_batch_size": 2, "max_steps": steps, "val_samples": 1},
        "optimizer": {"_target_": "torch.optim.AdamW", "lr": 0.01},
        "evaluation": {"tasks": [{"task": "kl", "data": str(root / "rows.jsonl"), "limit": 5}]},
        "checkpoint": {"checkpoint_dir": str(root / name), "save_consolidated": True},
        "distributed": {"cp_size": 2 if split else 1},
        "dist_env": {"backend": "gloo"},
    }  # fmt: skip


def train(root: Path, name: str, steps: int, split: bool) -> None:
    import ds_kd

    with ds_kd.build(ds_kd.load_config(make_run(root, name, steps, split))) as trainer:
        assert trainer.world.data.size == (1 if split else 2)
        assert trainer.train()


def use_both_ranks(world, root: Path, paths: dict, ports: list[int]) -> dict[str, dict]:
    """A run of split samples without a break; one in two parts; the second part of that with whole
    samples. Returns how far single steps, of an adapter too, are from plain PyTorch."""
    cases = compare_with_plain_pytorch(world, root, paths)
    adapter = one_step(world, paths["uneven"], False, {"match_all_linear": True}, True)
    train(root, "straight", 4, True)
    meet_at(ports[0])
    train(root, "stopped", 2, True)
    if world.is_main:
        shutil.copytree(root / "stopped", root / "whole", symlinks=True)
    meet_at(ports[1])
    train(root, "stopped", 4, True)
    meet_at(ports[2])
    train(root, "whole", 4, False)
    return {"steps": cases, "lora": adapter}


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("runs")
    tiny.llama(root / "student", seed=1)
    tiny.llama(root / "teacher", layers=3, hidden=48, tie=False, seed=2, heads=(3, 1))
    rows = [
        {
            "context": " ".join(f"w{k * row % 80}" for k in range(3 + 5 * row % 17)),
            "question": "w7 w8",
            "answers": {"text": [" ".join(f"w{row + k}" for k in range(1 + row % 4))]},
        }
        for row in range(20)
    ]
    (root / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    ports = [free_port() for _ in range(3)]
    cases = run_ranks(use_both_ranks, 2, root, make_models(root), ports, seconds=300, sequence=2)[0]
    (root / "cases.json").write_text(json.dumps(cases))
    return root


def numbers(root: Path, name: str, step: int) -> dict[str, float]:
    """Return what a run has found at a step, without times and sizes."""
    parts = ("loss", "agreement", "entropy", "at_t1", "norm", "eval_")
    found: dict[str, float] = {}
    for record in records(root, name):
        if record["step"] == step:
            found |= {k: v for k, v in record.items() if any(part in k for part in parts)}
    return {name: value for name, value in found.items() if isinstance(value, float)}


def test_a_step_on_two_ranks_equals_plain_pytorch(root):
    cases = json.loads((root / "cases.json").read_text())
    assert len(cases["steps"]) == len(CASES[2])
    check(cases["steps"])
    error, moved, _ = cases["lora"]
    assert error <= 1e-6 and moved > 0.01


def test_a_run_that_was_stopped_goes_on_bitwise(root):
    straight, stopped = (
        (root / name / "final" / "model.safetensors").read_bytes()
        for name in ("straight", "stopped")
    )
    assert straight == stopped
    assert numbers(root, "straight", 4) == numbers(root, "stopped", 4)


def test_split_samples_give_the_numbers_of_whole_ones_and_go_on_as_such(root):
    for step in (3, 4):
        split, whole = numbers(root, "straight", step), numbers(root, "whole", step)
        assert split == pytest.approx(whole, rel=1e-4, abs=1e-5)
    # The last step validates and evaluates.
    names = ("val_loss", "hidden_loss", "val_kl_at_t1", "eval_kl/forward_kl")
    assert all(name in split for name in names), sorted(split)


def test_tokens_and_samples_are_counted_once(root):
    first, second = (
        next(r for r in records(root, name) if r["step"] == 4 and "train_loss" in r)
        for name in ("straight", "whole")
    )
    assert first["supervised"] == second["supervised"]
    rates = [r["throughput/samples_per_sec"] * r["time/step"] for r in (first, second)]
    assert rates[0] == pytest.approx(rates[1])
