"""A run that goes on with another number of ranks, or with ranks that are laid out otherwise."""

from __future__ import annotations

import pytest
import torch

from tests import tiny
from tests.distributed.test_checkpoint import adam
from tests.parity.test_step import build, weights
from tests.ranks import run_ranks

BATCH, PER_PART = 12, 2


def part(world, directory, paths, checkpoints, steps):
    """Resume if there is something, train to `steps`; the losses of its steps, the weights."""
    from ds_kd.checkpoint.checkpointer import Checkpointer
    from ds_kd.checkpoint.writer import Writer

    rows = tiny.samples(30, seed=5)  # the third step of an epoch is half empty
    made = build(
        world, paths, rows, BATCH // world.data.size, 1, 0.5, adam, num_epochs=9, max_steps=steps
    )
    made.batches.loader.batch_sampler.shuffle = True
    losses, said = [], []
    log = made.metrics.train
    made.metrics.train = lambda step, values: (
        losses.append(values["train_loss"]) or log(step, values)
    )
    made.validation.loaders = {}
    made.checkpointer = Checkpointer(
        checkpoints,
        Writer(world, tiny.tokenizer(directory / f"tokenizer{world.rank}")),
        say=said.append,
    )
    if world.is_main:
        checkpoints.mkdir(exist_ok=True)
    found = made.checkpointer.resume(made.student, made.state)
    assert made.train()
    whole = {name: value.tolist() for name, value in weights(made.student).items()}
    return {"losses": losses, "found": found and found.name, "weights": whole, "said": said}


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {
        "student": str(tiny.llama(root / "student", seed=1)),
        "teacher": str(tiny.llama(root / "teacher", layers=3, hidden=64, tie=False, seed=2)),
    }


def test_another_layout_of_ranks_sees_the_same_batches_and_ends_at_the_same_weights(
    paths, tmp_path
):
    def run(ranks, tensor, sequence, name, steps):
        directory = tmp_path / f"{name}-{steps}"
        directory.mkdir()
        given = paths, tmp_path / name, steps
        layout = {"tensor": tensor, "sequence": sequence}
        return run_ranks(part, ranks, directory, *given, **layout)[0]

    # Ranks, over how many matrices are cut, and over how many samples are split.
    sizes = [(4, 2, 1), (1, 1, 1), (2, 1, 2), (4, 1, 1), (3, 1, 1), (2, 2, 1)]
    losses = []
    for k, layout in enumerate(sizes):
        one = run(*layout, "moved", PER_PART * (k + 1))
        assert one["found"] == (f"step_{PER_PART * k:07d}" if k else None)
        assert bool(one["said"]) == bool(k)
        losses += one["losses"]
    straight = run(2, 1, 1, "straight", PER_PART * len(sizes))
    # fp32, sums taken in another order.
    torch.testing.assert_close(losses, straight["losses"], rtol=1e-5, atol=1e-5)
    for name, value in straight["weights"].items():
        torch.testing.assert_close(
            torch.tensor(one["weights"][name]), torch.tensor(value), rtol=0, atol=1e-4
        )
