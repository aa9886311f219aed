"""One SGD step of every causal architecture under a teacher of its own kind equals plain
transformers, both models being sharded by ZeRO-3 over two ranks."""

from __future__ import annotations

import traceback
from pathlib import Path

import pytest
import torch

from ds_kd.config.methods.check_tensor import ARCHITECTURES
from ds_kd.models import probes
from ds_kd.parallel.world import barrier
from tests import tiny
from tests.parity.architectures import all_architectures
from tests.parity.architectures import build as build_model
from tests.parity.test_architectures import CHOSEN
from tests.parity.test_step import TEMPERATURE, build, sgd, weights
from tests.ranks import run_ranks

ALPHA = 0.5
AT_ONCE = 24  # architectures of a launch
#: Models of images or sound around a language model whose matrices can be cut.
WRAPPERS = ("gemma3", "got_ocr2", "moss_transcribe_diarize")


def step_of_each(world, directory, kinds):
    """For each kind the largest error of a parameter over the largest gradient, padded and packed,
    or why it is refused or cannot be built."""
    return {kind: _step(world, directory / kind, kind) for kind in kinds}


def _step(world, directory, kind):
    paths = {name: directory / name for name in ("student", "teacher")}
    try:
        student, teacher = build_model(kind), build_model(kind)
    except Exception as error:  # of a configuration that cannot be this small
        return f"cannot be built: {type(error).__name__}"
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.mul_(0.9)
    if world.is_main:
        student.save_pretrained(paths["student"])
        teacher.save_pretrained(paths["teacher"])
    barrier(world)

    rows = tiny.samples(4 * world.data.size, seed=7, masked=(2,))
    try:
        loss, _, _ = tiny.reference_means(student, teacher, rows, ALPHA, TEMPERATURE)
    except Exception as error:
        return f"plain transformers fails: {type(error).__name__}: {error}"
    loss.backward()
    reference = {n: (p, p.grad) for n, p in student.named_parameters() if p.grad is not None}
    largest = max(gradient.abs().max().item() for _, gradient in reference.values())
    found = []
    for packs in (False, True):
        split = _pack(rows, packs), *_cut(packs)
        try:
            trainer = build(world, paths, *split, ALPHA, sgd, packs=packs)
        except Exception as error:
            lacks_weights = str(error).startswith("its files lack weights")
            if not (lacks_weights or _is_of_transformers(error)):
                raise
            found.append(f"refused: cannot be loaded sharded: {error}")
            continue
        try:
            probes.check_layers(trainer.student, world.device, kind)
            for engine in (trainer.teacher.engine, trainer.student):
                probes.check_head(engine, world.device, kind)
                if packs:
                    probes.check_packing(engine, world.device, kind)
        except ValueError as error:
            found.append(f"refused: {error}")
            continue
        trainer.student.eval()  # some routers draw at random while they train
        trainer.train()
        got = weights(trainer.student)
        errors = [(got[n] - (p - g)).abs().max().item() for n, (p, g) in reference.items()]
        found.append(max(errors) / largest)
    return found


def _is_of_transformers(error):
    return "transformers" in Path(traceback.extract_tb(error.__traceback__)[-1].filename).parts


def _pack(rows, packs):
    from ds_kd.data.packing import PackedDataset

    return PackedDataset(rows, 64) if packs else rows


def _cut(packs):
    """Micro-batches of a rank, and samples of one."""
    return (1, 1) if packs else (2, 2)


def judge(found):
    """Return what is wrong with an architecture's result; empty where nothing is."""
    if isinstance(found, str):
        return ""
    return [value for value in found if not (isinstance(value, str) or value <= 1e-4)]


def test_chosen_architectures_take_the_step_of_plain_transformers_on_two_ranks(tmp_path):
    found = run_ranks(step_of_each, 2, tmp_path, CHOSEN)
    assert found[0] == found[1]
    assert not {kind: bad for kind, value in found[0].items() if (bad := judge(value))}
    exact = [kind for kind, value in found[0].items() if isinstance(value[0], float)]
    assert exact == CHOSEN, found[0]


@pytest.mark.nightly
@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("first", range(0, len(all_architectures()), AT_ONCE))
def test_every_architecture_takes_the_step_of_plain_transformers_or_is_refused(
    tmp_path, first, size
):
    kinds = all_architectures()[first : first + AT_ONCE]
    found = run_ranks(step_of_each, size, tmp_path, kinds, seconds=1800, timeout_minutes=5)[0]
    print(found)
    assert not {kind: bad for kind, value in found.items() if (bad := judge(value))}


@pytest.mark.nightly
def test_every_architecture_that_is_offered_to_be_cut_takes_the_step_of_plain_transformers(
    tmp_path,
):
    given = {"seconds": 1800, "timeout_minutes": 5, "tensor": 2}
    kinds = [*ARCHITECTURES, *WRAPPERS]
    found = run_ranks(step_of_each, 2, tmp_path, kinds, **given)[0]
    exact = [kind for kind, value in found.items() if isinstance(value[0], float)]
    assert exact == kinds, found
    assert not {kind: bad for kind, value in found.items() if (bad := judge(value))}
