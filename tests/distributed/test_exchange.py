"""The exchange of four ranks in a step, counted in bytes, and that less of it changes no result."""

from __future__ import annotations

import socket

import pytest
import torch

from benchmarks.traffic import count_bytes
from tests import tiny
from tests.parity.test_step import MASKED, PACK, build, sgd, weights
from tests.ranks import run_ranks

RANKS, NODE = 4, 2  # ranks of the job, and of each of its machines
MICRO_BATCHES = 4
NUMBERS = 96 * 32 + 2 * (3 * 32 * 32 + 3 * 32 * 64 + 2 * 32) + 32  # the head is the embedding
#: Tiny tensors are gathered too, as large ones are.
SHARDED = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}


def sizes_of(counts, kind):
    """Bytes of collectives of a kind over machines, and of those inside one."""
    found = [0, 0]
    for ranks, size in counts[kind].items():
        found[len({rank // NODE for rank in ranks}) == 1] += size
    return found


def rows_of(world, kind):
    """(samples or packs of a step of some micro-batches, whether they are packs)."""
    from ds_kd.data.prefixes import SharedDataset

    rows = tiny.samples(3 * MICRO_BATCHES * world.size, seed=5, masked=MASKED)
    if kind == "padded":
        return rows, False
    return SharedDataset(tiny.branches(rows), PACK), True


def teach_in_windows(world, paths):
    """Return for every layout (bytes gathered by the teacher for a step and whether weights are
    equal to the last bit) with micro-batches one by one, all in a window, and two in a window."""
    from ds_kd.teachers.base import ask
    from ds_kd.teachers.window import Window, agrees, divide_layers
    from ds_kd.train.batches import move_batch

    found = {}
    for kind in ("padded", "shared"):
        data, packs = rows_of(world, kind)
        local = -(-len(data) // (world.size * MICRO_BATCHES))
        trained, gathered, sizes = [], [], []
        for most in (None, 99, 2):
            trainer = build(
                world, paths, data, MICRO_BATCHES, local, 0.5, sgd, packs=packs, zero=SHARDED
            )
            teacher = trainer.teacher
            if most is not None:
                assert divide_layers(teacher.engine.module.model)
                assert agrees(teacher.engine, world.device)
                teacher.window = Window(most, 0, 0)
            batches = next(trainer.batches.after(0))
            with count_bytes() as counts:
                for output in ask(teacher, [move_batch(b, world.device) for b in batches], 1.0):
                    with output.open() as opened:
                        sizes.append(len(opened.hidden))
            gathered.append(sizes_of(counts, "gathered")[0])
            trainer.train()
            trained.append(weights(trainer.student))
        same = [all(torch.equal(trained[0][n], t[n]) for n in t) for t in trained[1:]]
        found[kind] = {"gathered": gathered, "same": same, "rows": sizes, "batches": len(batches)}
    return found


def train_inside_nodes(world, directory, paths):
    """Bytes gathered over machines and inside them by the teacher and in a step, without and with
    copies inside each machine; and whether weights, and those of a resumed run, are equal."""
    from ds_kd.checkpoint.engine import files as engine_files
    from ds_kd.parallel.nodes import count_ranks_per_node, list_hosts
    from ds_kd.recipe.tuning.gathering import Size, tune
    from ds_kd.recipe.tuning.machine import Machine
    from ds_kd.train.batches import move_batch

    socket.gethostname = lambda: f"node{world.rank // NODE}"
    machine = Machine.of(world)
    tuned, said = tune(SHARDED, Size(100_000, 10_000, 4), machine)
    found = {"per_node": count_ranks_per_node(list_hosts(world)), "said": said}
    rows, ends = tiny.samples(2 * MICRO_BATCHES * world.size, seed=5), []
    for name, zero in (("over all", SHARDED), ("inside", tuned)):
        trainer = build(world, paths, rows, 2, 1, 0.5, sgd, zero=zero)
        first, second = [next(trainer.batches.after(step)) for step in (0, 1)]
        trainer.teacher(move_batch(first[0], world.device))  # the copies are made by the first pass
        with count_bytes() as taught:
            trainer.teacher(move_batch(first[0], world.device))
        trainer._step(first, 0.0)
        engine_files.save_engine(trainer.student, directory / name, "engine")
        with count_bytes() as stepped:
            trainer._step(second, 0.0)
        found[name] = [sizes_of(each, "gathered") for each in (taught, stepped)]
        ends.append(weights(trainer.student))
        if name == "inside":  # what was copied before a checkpoint is read is old
            engine_files.load_engine(trainer.student, directory / name, "engine")
            trainer._step(second, 0.0)
            ends.append(weights(trainer.student))
    found["same"] = [all(torch.equal(ends[0][n], e[n]) for n in e) for e in ends[1:]]
    return found


def reduce_once(world, paths):
    """Bytes of the gradients' exchange in a step of some micro-batches, each and once; the largest
    difference of a weight and of the gradient norm, in fp32 and bf16, and how far weights moved."""
    from ds_kd.parallel.accumulation import Once
    from ds_kd.parallel.engines import read_gradient_norm

    found = {}
    rows = tiny.samples(MICRO_BATCHES * world.size, seed=5, masked=MASKED)
    for dtype in (torch.float32, torch.bfloat16):
        ends, sizes, norms = [], [], []
        for once in (False, True):
            trainer = build(
                world, paths, rows, MICRO_BATCHES, 1, 0.5, sgd, dtype=dtype, zero=SHARDED
            )
            trainer.reduce_once = Once(always=once)
            start = weights(trainer.student)
            with count_bytes() as counts:
                trainer.train()
            sizes.append(sizes_of(counts, "reduced")[0])
            ends.append(weights(trainer.student))
            norms.append(read_gradient_norm(trainer.student))
        far = lambda a, b: max((a[n] - b[n]).abs().max().item() for n in a)  # noqa: E731
        found[str(dtype)] = {
            "bytes": sizes,
            "error": far(*ends),
            "moved": far(start, ends[0]),
            "norms": norms,
        }
    return found


def train_with_buckets(world, paths):
    """For each dtype the numbers of a bucket of gradients, of DeepSpeed's own size and as it is
    without a `reduce_bucket_size`, and whether weights are equal to the last bit after a step."""
    whole = {**SHARDED["zero_optimization"], "reduce_bucket_size": 500_000_000}
    found, rows = [], tiny.samples(MICRO_BATCHES * world.size, seed=5, masked=MASKED)
    for dtype in (torch.float32, torch.bfloat16):
        ends, sizes = [], []
        for zero in ({"zero_optimization": whole}, SHARDED):
            trainer = build(world, paths, rows, 2, 1, 0.5, sgd, dtype=dtype, zero=zero)
            (bucket,) = trainer.student.optimizer.ipg_buckets.values()
            sizes.append(bucket.buffer.numel())
            trainer.train()
            ends.append(weights(trainer.student))
        found.append(
            {"sizes": sizes, "same": all(torch.equal(ends[0][n], ends[1][n]) for n in ends[0])}
        )
    return found


def train_after_probes(world, paths):
    """For each distance at which ZeRO-3 still keeps weights: bytes of the student that are gathered
    in a step of some micro-batches, after forwards without a backward pass; and those planned."""
    from ds_kd.models.probes import check_head
    from ds_kd.plan.shapes import Work
    from ds_kd.plan.step.traffic import count_exchanges

    found, rows = [], tiny.samples(2 * MICRO_BATCHES * world.size, seed=5)
    for distance in (10**9, 10_000, 0):
        zero = {
            "zero_optimization": {
                **SHARDED["zero_optimization"],
                "stage3_max_reuse_distance": distance,
                "stage3_max_live_parameters": distance,
            }
        }
        trainer = build(world, paths, rows, MICRO_BATCHES, 1, 0.0, sgd, zero=zero)
        check_head(trainer.student, world.device, "model")
        trainer.student.train()
        batches = trainer.batches.after(0)
        trainer._step(next(batches), 0.0)  # DeepSpeed records the order of a pass meanwhile
        with count_bytes() as counts:
            trainer._step(next(batches), 0.0)
        found.append([sum(sizes_of(counts, "gathered"))])

        shape = _shape(paths["student"])
        work = Work(16, 16, micro_batches=MICRO_BATCHES, reuse=distance)
        planned = count_exchanges(shape, None, work, world.size)
        found[-1].append(sum(each.size for each in planned if each.kind == "all_gather"))
    return found


def _shape(path):
    """The sizes of a model, no weight of which is kept whole."""
    from dataclasses import replace

    from transformers import AutoModelForCausalLM

    from ds_kd.plan.shapes import shape_of

    return replace(shape_of(AutoModelForCausalLM.from_pretrained(path), 4), small=0)


def exchange(world, directory, paths):
    return {
        "probed": train_after_probes(world, paths),
        "windows": teach_in_windows(world, paths),
        "once": reduce_once(world, paths),
        "buckets": train_with_buckets(world, paths),
        "nodes": train_inside_nodes(world, directory, paths),
    }


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {
        "student": str(tiny.llama(root / "student", seed=1)),
        "teacher": str(tiny.llama(root / "teacher", layers=3, hidden=64, tie=False, seed=2)),
    }


@pytest.fixture(scope="module")
def found(paths, tmp_path_factory):
    return run_ranks(exchange, RANKS, tmp_path_factory.mktemp("ranks"), paths)[0]


def test_a_window_of_all_micro_batches_gathers_the_teacher_once_and_changes_no_bit(found):
    for kind, case in found["windows"].items():
        one_by_one, together, pairs = case["gathered"]
        count = case["batches"]
        assert count >= 3 and 0 < together * count <= one_by_one, (kind, case)
        assert 0 < pairs * count <= one_by_one * -(-count // 2), (kind, case)
        assert case["same"] == [True, True], (kind, case)


def test_copies_inside_a_machine_keep_gathers_there_and_change_no_bit(found):
    case = found["nodes"]
    assert case["per_node"] == NODE and "zero_hpz_partition_size" in case["said"]
    (taught, stepped), (near_taught, near_stepped) = case["over all"], case["inside"]
    assert taught[0] > 0 and taught[1] == 0
    assert near_taught == [0, taught[0]]  # nothing of the teacher crosses
    # The student's first of two micro-batches' passes, forward and backward, crosses.
    assert 0 < near_stepped[0] <= stepped[0] / 4 and near_stepped[1] > 0
    assert case["same"] == [True, True], case


def test_the_student_is_gathered_once_a_micro_batch_if_its_layers_may_stay_for_backward(found):
    whole, last_layer, nothing = found["probed"]
    assert whole[0] == MICRO_BATCHES * 4 * NUMBERS
    assert nothing[0] == 2 * whole[0] > last_layer[0] > whole[0]
    for gathered, planned in found["probed"]:
        assert gathered == pytest.approx(planned, rel=0.01)  # less the last norm


def test_gradients_that_are_added_up_first_are_exchanged_once_and_the_step_is_the_same(found):
    exact, rounded = found["once"]["torch.float32"], found["once"]["torch.bfloat16"]
    for case in (exact, rounded):
        each, once = case["bytes"]
        assert 0 < once * MICRO_BATCHES <= each, case
    assert exact["error"] <= 1e-6 < 0.05 < exact["moved"], exact
    assert exact["norms"][1] == pytest.approx(exact["norms"][0], rel=1e-6)
    # A bf16 weight moves by whole roundings; gradients differ by one of theirs.
    assert rounded["error"] <= 2**-6 and rounded["moved"] > 0.05, rounded
    assert rounded["norms"][1] == pytest.approx(rounded["norms"][0], rel=1e-2)


def test_a_bucket_no_larger_than_all_gradients_changes_no_bit(found):
    for case in found["buckets"]:
        assert case == {"sizes": [500_000_000, NUMBERS], "same": True}
