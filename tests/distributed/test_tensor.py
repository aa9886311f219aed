"""Matrices that are cut over ranks (`distributed.tp_size`): the step, and what becomes of a run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from tests import tiny
from tests.distributed.test_checkpoint import TOKENS, same, train, weights
from tests.distributed.test_lora import kept, one_step
from tests.parity.test_step import MASKED, PACK, TEMPERATURE, build, sgd
from tests.ranks import run_ranks

#: Each case of a step: kd_ratio, kind of student, and how it is computed.
CASES = [
    *((ratio, "tied", {}) for ratio in (0.0, 0.5, 1.0)),
    (0.5, "tied", {"packs": True}),
    (0.5, "untied", {"checkpointing": True}),
    (0.5, "tied", {"once": True}),  # gradients of micro-batches are exchanged together
    # In one micro-batch a rank of two has no token of the loss, and the teacher is not cut.
    (0.5, "untied", {"few": True, "whole_teacher": True}),
]
#: The same of two groups of ranks, which have samples of their own, or parts of the same.
OF_FOUR = [(0.0, "tied", {}), (1.0, "untied", {})]
PACKS = {
    1: (0.5, "tied", {"packs": True}),
    2: (0.5, "untied", {"packs": True, "shares": True}),
}
#: Maps of an adapter: cut by their outputs, by their inputs.
ADAPTED = {"target_modules": ["*q_proj", "*down_proj", "*.layers.0.*.o_proj"]}


def _of_build(how):
    return {name: value for name, value in how.items() if name not in ("once", "few", "shares")}


@contextmanager
def count_sums() -> Iterator[list[int]]:
    """Count the gradients that maps cut by their outputs sum over ranks inside this block."""
    from deepspeed.module_inject.layers import ColumnParallel

    plain, sizes = ColumnParallel.backward, []

    def backward(ctx, gradient):
        sizes.append(gradient.numel())
        return plain(ctx, gradient)

    ColumnParallel.backward = staticmethod(backward)
    try:
        yield sizes
    finally:
        ColumnParallel.backward = staticmethod(plain)


def steps(world, root, paths, cases):
    """The largest error of a weight after a step, and what else could differ from plain PyTorch."""
    from transformers import AutoModelForCausalLM

    from ds_kd.data.packing import PackedDataset
    from ds_kd.data.prefixes import SharedDataset
    from ds_kd.parallel.accumulation import Once
    from ds_kd.parallel.engines import read_gradient_norm
    from ds_kd.parallel.tensor import count_numbers

    teacher = AutoModelForCausalLM.from_pretrained(paths["teacher"])
    found = []
    for ratio, kind, how in cases:
        rows = tiny.samples(6 * world.data.size, seed=world.data.size, masked=MASKED)
        if "few" in how:
            # The second micro-batch has no other token.
            rows[3]["labels"][-1] = rows[3]["input_ids"][0]
        data = PackedDataset(rows, PACK) if "packs" in how else rows
        if "shares" in how:
            rows = tiny.branches(rows)
            data = SharedDataset(rows, PACK)
        accumulation, local = (1, -(-len(data) // world.data.size)) if "packs" in how else (2, 3)
        models = {"student": paths[kind], "teacher": paths["teacher"]}
        made = build(world, models, data, accumulation, local, ratio, sgd, **_of_build(how))
        made.reduce_once = Once(always="once" in how)
        logged = made.validate()
        with count_sums() as sums:
            made.train()

        reference = AutoModelForCausalLM.from_pretrained(paths[kind])
        loss, *_ = tiny.reference_means(reference, teacher, rows, ratio, TEMPERATURE)
        loss.backward()
        expected = {n: (p, p.grad) for n, p in reference.named_parameters()}
        norm = torch.stack([grad.norm() for _, grad in expected.values()]).norm().item()
        got = weights(made.student)
        parameters = [*made.student.module.model.parameters()]
        cut = [p for p in parameters if count_numbers(p) > p.ds_numel]
        found.append({
            "case": [ratio, kind, *how],
            "error": max((got[n] - (p - g)).abs().max().item() for n, (p, g) in expected.items()),
            "moved": max(grad.abs().max().item() for _, grad in expected.values()),
            "norm": abs(read_gradient_norm(made.student) / norm - 1),
            "logged": abs(logged["loss"] - loss.item()),
            "cut": len(cut), "sums": len(sums) / accumulation,
            "here": sum(p.ds_tensor.numel() for p in parameters) * world.size
            / sum(map(count_numbers, parameters)),
        })  # fmt: skip
    return found


def of_two(world, root, paths, cases):
    """Steps, and a run that is stopped, resumed, and exported, on two ranks."""
    from transformers import AutoModelForCausalLM

    from ds_kd.checkpoint.export import export_checkpoint
    from ds_kd.parallel.world import on_rank0

    out = {"steps": steps(world, root, paths, cases)}
    out["lora"] = one_step(world, paths, False, ADAPTED, False)
    (root / "lora").mkdir(exist_ok=True)
    out["adapter"] = kept(world, paths, root / "lora", torch.float32, False)
    straight, _ = train(world, paths, root / "straight", 5)
    train(world, paths, root / "cut", 2)
    cut, out["found"] = train(world, paths, root / "cut", 5)
    expected = weights(straight.student)
    out["resumed"] = same(expected, weights(cut.student))
    out["losses"] = cut.validate()["loss"]

    on_rank0(lambda: export_checkpoint(root / "cut" / "LATEST", root / "exported"), world)
    ids = {"input_ids": TOKENS, "use_cache": False}
    with torch.no_grad():
        batch = {"input_ids": TOKENS, "supervised": torch.arange(TOKENS.numel())}
        error, largest = cut.student(batch, probe="logits_error")
        out["probe"] = (error / largest).item()
        for name in ("cut/final", "exported"):
            loaded = AutoModelForCausalLM.from_pretrained(root / name)
            out[name] = same(expected, dict(loaded.named_parameters()))
            out[f"{name} logits"] = loaded(**ids).logits.sum().item()
    return out


def of_four(world, root, paths, cases):
    """Steps on four ranks, two of which share matrices; a run that is stopped and resumed; one step
    of an adapter on parts of samples."""
    out = {"steps": steps(world, root, paths, cases)}
    if world.sequence.size > 1:
        out["lora"] = one_step(world, paths, False, ADAPTED, False)
        return out
    straight, _ = train(world, paths, root / "straight", 5)
    train(world, paths, root / "cut", 2)
    cut, out["found"] = train(world, paths, root / "cut", 5)
    out["resumed"] = same(weights(straight.student), weights(cut.student))
    return out


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {
        "student": str(tiny.llama(root / "tied", seed=1)),
        "tied": str(root / "tied"),
        "untied": str(tiny.llama(root / "untied", tie=False, seed=3)),
        "teacher": str(tiny.llama(root / "teacher", layers=3, hidden=64, tie=False, seed=2)),
    }


def judge(case):
    """Return whether a step of cut matrices is the step of plain PyTorch. Each of two layers has 7
    that are cut, and sums two gradients: of what q, k and v read, and of what gate and up read."""
    close = case["error"] <= 1e-6 and case["norm"] <= 1e-5 and case["logged"] <= 1e-5
    return close and case["moved"] > 1e-2 and case["cut"] == 14 and case["sums"] == 4


@pytest.fixture(scope="module")
def two(paths, tmp_path_factory):
    root = tmp_path_factory.mktemp("two")
    return root, run_ranks(of_two, 2, root, paths, CASES, tensor=2)


def test_a_step_of_cut_matrices_is_the_step_of_plain_pytorch(two):
    _, found = two
    assert found[0] == found[1]
    assert [case for case in found[0]["steps"] if not judge(case)] == []


def test_an_adapter_of_cut_maps_takes_the_step_of_plain_peft_and_is_kept_whole(two):
    _, (found, _) = two
    error, moved, _ = found["lora"]
    assert error <= 1e-6 and moved > 0.01
    run = found["adapter"]
    assert run["resumed"] and run["base"] > 1e-3
    kinds = ("adapter", "final", "exported", "exported_adapter", "apart")
    assert max(run[kind] for kind in kinds) <= 1e-4, run


def test_every_rank_keeps_its_share_of_the_weights(two):
    assert all(case["here"] <= 1.01 for case in two[1][0]["steps"])


def test_a_cut_run_goes_on_bit_for_bit_and_its_student_is_whole(two):
    _, (found, _) = two
    assert found["found"] == "step_0000002" and found["resumed"]
    assert found["cut/final"] and found["exported"] and found["probe"] <= 1e-5


@pytest.mark.parametrize("sequence", [1, 2], ids=["samples", "parts of samples"])
def test_tokens_are_divided_over_groups_of_ranks_that_share_matrices(paths, tmp_path, sequence):
    cases = [*OF_FOUR, PACKS[sequence]]
    found = run_ranks(of_four, 4, tmp_path, paths, cases, tensor=2, sequence=sequence)
    assert all(each == found[0] for each in found)
    assert [case for case in found[0]["steps"] if not judge(case)] == []
    if sequence == 1:
        assert found[0]["found"] == "step_0000002" and found[0]["resumed"]
    else:
        error, moved, _ = found[0]["lora"]
        assert error <= 1e-6 and moved > 0.01
