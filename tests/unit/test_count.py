"""The counts and predictions of `benchmarks/plans/count.py`, against numbers by hand and the
plan's."""

from __future__ import annotations

from dataclasses import astuple

import pytest
import torch

from benchmarks.plans import predict
from benchmarks.plans.cost import Cost, Totals
from benchmarks.plans.predict import Run
from ds_kd.plan.hardware import GPUS
from ds_kd.plan.step.operations import count_operations

H100 = GPUS["h100"]


def test_operations_between_products_are_joined():
    """Tensors of [8, 8] in fp32, 256 bytes each: one by one 2 + 2 + 3, joined what another group
    made."""
    x, weight = (torch.empty(8, 8, device="meta") for _ in range(2))
    with torch.no_grad(), Cost(8, 8) as cost:
        doubled = x * 2  # reads x; its result is read by the group itself and by none else
        shifted = doubled + 1  # is read by the product, and so written
        product = shifted @ weight
        _ = product + x  # reads both, once more as another group; nobody reads the result
    totals = cost.by_phase[""]
    assert totals.launches == 4 and totals.groups == 3 and totals.products == 3 * 256
    assert totals.rest == (2 + 2 + 3) * 256
    assert totals.joined == (1 + 1 + 2) * 256


def test_a_step_of_3b_to_1b_costs_a_gpu_so_much():
    """A change that makes a step cost more is seen here."""
    lengths = [4096]
    cost = predict.count_pair("3B-1B", lengths, predict.make_loss())
    parts = cost.by_phase.values()
    assert cost.passes == 2.5 and cost.waits == 0 and cost.launches <= 3002
    assert sum(part.products for part in parts) == pytest.approx(57.3e9, rel=1e-3)
    assert sum(part.rest for part in parts) < 124e9 and sum(part.joined for part in parts) < 48.1e9
    assert sum(part.groups for part in parts) <= 957

    # The plan's operations, from the models' shapes alone: 62.9 TFLOP.
    work = Run(H100).work(lengths)
    teacher, student = map(predict.find_shape, ("3B", "1B"))
    counted = sum(part.tflop + part.attention for part in parts)
    assert counted == pytest.approx(count_operations(student, teacher, work) / 1e12, rel=1e-3)
    assert counted == pytest.approx(62.9, rel=1e-3)

    # 56.7 TFLOP of products at 0.7 of 989, 6.2 of attention at 0.35 of it: 82 and 18 ms at least;
    # 13 ms of the optimizer, and 50 GB at 0.87 of 3.35 TB/s, 16 ms.
    seconds, mfu = predict.rate("3B-1B", cost, lengths, Run(H100), joined=True)
    assert 0.100 < seconds < 0.135 and mfu == pytest.approx(counted / 989 / seconds, rel=1e-3)
    assert predict.rate("3B-1B", cost, lengths, Run(H100), joined=False)[0] > seconds


def count_of_layers(monkeypatch, teacher: int, student: int) -> dict[str, Totals]:
    """The cost of a micro-batch of 70B → 8B with so many layers, by phase."""
    for name, layers in (("70B", teacher), ("8B", student)):
        shape = {**predict.SHAPES[name], "num_hidden_layers": layers}
        monkeypatch.setitem(predict.SHAPES, name, shape)
    cost = predict.count_pair("70B-8B", [4096], predict.make_loss())
    assert cost.passes == 2.5 and cost.waits == 0
    return cost.by_phase


def test_a_step_of_70b_to_8b_costs_gpus_so_much(monkeypatch):
    """Counted with few layers, and a further one of each, as 80 + 32 take long."""
    whole = Cost(1, 1)
    with monkeypatch.context() as patch:
        count_of_layers(patch, 1, 1)  # the first count of a process has three launches more
        few, more, most = (count_of_layers(patch, *n) for n in ((2, 2), (3, 2), (2, 3)))
    for phase in few:
        parts = [astuple(each[phase]) for each in (few, more, most)]
        whole.by_phase[phase] = Totals(
            *(a + 78 * (b - a) + 30 * (c - a) for a, b, c in zip(*parts, strict=True))
        )
    parts = whole.by_phase.values()
    assert sum(part.launches for part in parts) <= 6817
    assert sum(part.products for part in parts) == pytest.approx(391e9, rel=2e-3)
    assert sum(part.rest for part in parts) < 643e9 and sum(part.joined for part in parts) < 247e9
    assert sum(part.tflop + part.attention for part in parts) == pytest.approx(789, rel=1e-3)

    # As the table of docs/performance.md has it: all exchanges are behind the products.
    for ranks, expected in ((8, 0.561), (64, 0.565)):
        _, mfu = predict.rate("70B-8B", whole, [4096], Run(H100, ranks), joined=False)
        assert mfu == pytest.approx(expected, abs=2e-3)


def received(run: Run) -> dict[str, float]:
    """GB that a rank receives in a step of 70B → 8B, by the first word of what it is."""
    found: dict[str, float] = {}
    for each in predict.exchanges_of("70B-8B", [4096], run):
        word = each.name.split()[0]
        found[word] = found.get(word, 0.0) + each.received / 1e9
    return found


def test_ranks_of_70b_to_8b_receive_so_many_bytes():
    """The teacher has 70.55e9 parameters, 141.1 GB; a rank of 8 lacks seven eighths of them: 123.5.
    The student has 8.03e9, 16.06 GB, twice; but once the head of 1.05 GB and the last three of its
    layers, of 0.436 GB each, as they are used again within DeepSpeed's 1e9 weights."""
    once = 1.05 + 3 * 0.436
    one, eight = received(Run(H100, 8)), received(Run(H100, 8, micro_batches=8))
    assert one["teacher's"] == pytest.approx(123.5, rel=1e-3)
    assert one["student's"] == pytest.approx((2 * 16.06 - once) * 7 / 8, rel=1e-3)
    assert one["gradients"] == pytest.approx(16.06 * 7 / 8, rel=1e-3)
    assert eight["teacher's"] == pytest.approx(8 * one["teacher's"])
    assert received(Run(H100, 8, 8, window=8))["teacher's"] == pytest.approx(one["teacher's"])

    # A rank of 64 lacks 63/64; of copies inside nodes of eight it lacks 7/8, on faster links.
    far = received(Run(H100, 64))["teacher's"]
    assert far == pytest.approx(141.1 * 63 / 64, rel=1e-3)
    assert received(Run(H100, 64, copies=8))["teacher's"] == pytest.approx(one["teacher's"])

    # The first of the student's four passes of two micro-batches makes the copies.
    near = received(Run(H100, 64, 2, copies=8))["student's"]
    expected = 16.06 * 63 / 64 + (16.06 + 2 * (16.06 - once)) * 7 / 8
    assert near == pytest.approx(expected, rel=1e-3)


def test_a_prediction_waits_for_an_exchange_that_takes_longer_than_the_products():
    """Over one card of 50 GB/s for eight GPUs the teacher's 141 GB take 141·(7/8)/(0.8·50) = 3.1 s,
    and its 70.55e9 weights and 4,096 tokens 0.8 s of products."""
    cost = Cost(1, 1)
    cost.by_phase["teacher"].tflop = 2 * 70.55e9 * 4096 / 1e12
    run = Run(H100, 64, network=50e9 / 8)
    phases = {p.name: p for p in predict.predict("70B-8B", cost, [4096], run, joined=True)}
    assert phases["teacher"].seconds == pytest.approx(3.09, rel=1e-2)
    near = predict.predict("70B-8B", cost, [4096], Run(H100, 64), joined=True)[0]
    assert near.seconds == near.products == pytest.approx(0.835, rel=1e-2)
