"""The parts of a checkpoint that a rank takes over, without ranks."""

from __future__ import annotations

import pytest
import torch

from ds_kd.checkpoint.engine.cut import write_universal
from ds_kd.checkpoint.restore import find_generators
from ds_kd.parallel.layout import lay_out
from ds_kd.parallel.world import World


def world_of(rank, size, tensor):
    alone = World(rank, size, torch.device("cpu"), "gloo")
    made = lay_out(rank, size, tensor, 1, alone.everyone, lambda ranks, on_host: None)
    return World(rank, size, torch.device("cpu"), "gloo", None, made)


@pytest.mark.parametrize(
    ("size", "tensor", "saved", "expected"),
    [
        (4, 2, 2, [0, 1, 2, 3]),  # the same layout: bit for bit
        (4, 2, 1, [0, 0, 1, 1]),  # ranks of a tensor group draw the same dropout masks
        (4, 1, 2, [0, 2, 4, 6]),  # the others draw different ones
        (2, 1, 1, [0, 1]),
    ],
)
def test_ranks_that_see_the_same_tokens_take_over_the_same_generators(
    size, tensor, saved, expected
):
    found = [find_generators(world_of(rank, size, tensor), saved) for rank in range(size)]
    assert found == expected


@pytest.mark.parametrize("step", [3, torch.tensor(3.0)], ids=["host", "device"])
def test_the_states_of_every_adam_are_written_for_other_layouts(tmp_path, step):
    # DeepSpeed's Adam for the host counts steps in a plain number, torch's in a tensor.
    saved, out = tmp_path / "saved", tmp_path / "out"
    for directory in (saved, out):
        directory.mkdir()
    of_weight = {"exp_avg": torch.ones(4), "exp_avg_sq": torch.full((4,), 2.0), "step": step}
    optimizer = {
        "fp32_flat_groups": [torch.arange(4.0)],
        "optimizer_state_dict": {"state": {0: of_weight}, "param_groups": [{"lr": 1.0}]},
    }
    shapes = [{"weight": torch.Size([2, 2])}]
    start = "zero_pp_rank_0_mp_rank_00"
    torch.save({"param_shapes": shapes}, saved / f"{start}_model_states.pt")
    torch.save({"optimizer_state_dict": optimizer}, saved / f"{start}_optim_states.pt")

    write_universal(saved, out)
    kept = torch.load(out / "zero" / "optimizer_state.pt", weights_only=True)
    assert kept["optimizer_state_dict"]["state"][0]["step"] == 3
    found = torch.load(out / "zero" / "weight" / "exp_avg_sq.pt", weights_only=True)
    assert torch.equal(found["param"], torch.full((2, 2), 2.0))
