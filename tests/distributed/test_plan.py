"""The plan against real runs: what they keep, take at their peak and exchange in a step."""

from __future__ import annotations

import pytest
import torch

from benchmarks.plans import layouts
from tests.ranks import run_ranks

#: Layouts by the number of ranks that train them, one after the other.
LAYOUTS = {1: ("plain",), 2: ("bf16", "hpz", "experts")}
#: A CPU without arithmetic in bf16 converts its operands, which takes memory that no GPU needs.
CONVERTED = ("bf16",)


def work(world, root, paths, names):
    layouts.warm_up(world, root, paths, ())
    return {name: layouts.run_layout(world, root, paths, layouts.LAYOUTS[name]) for name in names}


@pytest.fixture(scope="module", params=[1, 2], ids=["1 rank", "2 ranks"])
def results(request, tmp_path_factory):
    root = tmp_path_factory.mktemp("plan")
    return run_ranks(work, request.param, root, layouts.write_models(root), LAYOUTS[request.param])


def ratios(results, part):
    """The plan's bytes over the run's, by layout, on rank 0."""
    return {
        name: found["plan"][part] / found["run"][part]
        for name, found in results[0].items()
        if found["run"][part]
    }


def test_states_are_planned_within_15_percent(results):
    found = ratios(results, "states")
    assert found and all(abs(ratio - 1) < 0.15 for ratio in found.values()), found


def test_the_peak_is_planned_within_30_percent(results):
    found = {name: r for name, r in ratios(results, "peak").items() if name not in CONVERTED}
    assert found and all(abs(ratio - 1) < 0.30 for ratio in found.values()), found


def test_the_exchange_of_ranks_is_planned_within_10_percent(results):
    found = ratios(results, "exchange")
    assert all(abs(ratio - 1) < 0.10 for ratio in found.values()), found
    assert len(found) == (len(results[0]) if len(results) > 1 else 0)


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
