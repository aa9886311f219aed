"""Saving, resuming, exporting and damage, on two ranks in one launch."""

from __future__ import annotations

import resource
import shutil
from types import SimpleNamespace

import pytest
import torch

from tests import tiny
from tests.parity.test_step import build, weights
from tests.ranks import run_ranks

TOKENS = torch.arange(3, 15)[None]


def adam(parameters):
    return torch.optim.Adam(parameters, lr=1e-2, eps=1e-4)


def trainer(world, paths, directory, steps, every=2):
    from ds_kd.checkpoint.checkpointer import Checkpointer
    from ds_kd.checkpoint.writer import Writer
    from ds_kd.losses.named.hidden_states import HiddenStates

    rows = tiny.samples(11, seed=5)  # 3 steps an epoch, the last one partial
    # The projectors of a loss of layers are trained and saved with the student, not exported.
    layers = HiddenStates([[1, 2]])
    layers.add_projectors(32, 64, seed=1)
    made = build(
        world, paths, rows, 1, 2, 0.5, adam,
        num_epochs=9, max_steps=steps, ckpt_every_steps=every, layer_losses=[(0.5, layers)],
    )  # fmt: skip
    made.batches.loader.batch_sampler.shuffle = True
    made.checkpointer = Checkpointer(
        directory,
        Writer(world, tiny.tokenizer(directory.parent / "tokenizer")),
        "every",
        say=lambda *_: None,
    )
    return made


def train(world, paths, directory, steps, every=2):
    directory.mkdir(exist_ok=True)
    made = trainer(world, paths, directory, steps, every)
    found = made.checkpointer.resume(made.student, made.state)
    made.train()
    return made, None if found is None else found.name


def whole_logits(engine):
    import deepspeed

    with torch.no_grad(), deepspeed.zero.GatheredParameters(list(engine.module.model.parameters())):
        return engine.module.model(input_ids=TOKENS, use_cache=False).logits.clone()


def same(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


def save_resume_export_damage(world, root, paths):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from ds_kd.checkpoint.checkpointer import CheckpointError
    from ds_kd.checkpoint.export import export_checkpoint
    from ds_kd.checkpoint.shards import ShardWriter
    from ds_kd.parallel.world import barrier, on_rank0

    out = {}
    straight, _ = train(world, paths, root / "straight", 7)
    expected = weights(straight.student)

    train(world, paths, root / "cut", 4)  # 4 steps: in the middle of the second epoch
    resumed, found = train(world, paths, root / "cut", 7)
    out["found"] = found
    out["resumed_equal"] = same(expected, weights(resumed.student))
    out["state"] = [resumed.state.step, resumed.state.labels == straight.state.labels]

    final = root / "cut" / "final"
    loaded = AutoModelForCausalLM.from_pretrained(final)
    out["export_equal"] = same(expected, dict(loaded.named_parameters()))
    with torch.no_grad():
        error = (loaded(input_ids=TOKENS).logits - whole_logits(resumed.student)).abs().max()
    out["export_logits"] = error.item()
    out["tied"] = loaded.lm_head.weight is loaded.model.embed_tokens.weight
    out["tokenizer"] = len(AutoTokenizer.from_pretrained(final))

    on_rank0(lambda: export_checkpoint(root / "cut" / "LATEST", root / "offline"), world)
    offline = AutoModelForCausalLM.from_pretrained(root / "offline")
    out["offline_equal"] = same(expected, dict(offline.named_parameters()))

    def split():
        (root / "shards").mkdir()
        loaded.config.save_pretrained(root / "shards")
        writer = ShardWriter(root / "shards", shard_bytes=20_000)
        for name, parameter in loaded.named_parameters():
            writer.add(name, parameter.detach())
        writer.close()

    on_rank0(split, world)
    out["shards"] = len(list((root / "shards").glob("model-*.safetensors")))
    sharded = AutoModelForCausalLM.from_pretrained(root / "shards")
    out["shards_equal"] = same(expected, dict(sharded.named_parameters()))

    def flip():
        victim = next((root / "cut" / "step_0000007" / "engine").glob("*optim_states.pt"))
        content = bytearray(victim.read_bytes())
        content[len(content) // 2] ^= 1
        victim.write_bytes(content)

    on_rank0(flip, world)
    again = trainer(world, paths, root / "cut", 7)
    out["after_damage"] = again.checkpointer.resume(again.student, again.state).name
    out["set_aside"] = sorted(p.name for p in (root / "cut").glob("bad.*"))

    def spoil():
        for checkpoint in (root / "cut").glob("step_*"):
            (checkpoint / "manifest.json").unlink()

    on_rank0(spoil, world)
    try:
        again.checkpointer.resume(again.student, again.state)
        out["all_bad"] = ""
    except CheckpointError as error:
        out["all_bad"] = str(error)
    barrier(world)
    out |= failing_saves(world, paths, root / "full")
    return out


def failing_saves(world, paths, directory):
    """Save without room, and where only rank 1 cannot write, and return what becomes of it."""
    from ds_kd.checkpoint import checkpointer as checkpoint
    from ds_kd.checkpoint.retention import Retention

    made, _ = train(world, paths, directory, 2)
    keeper, out = made.checkpointer, {}
    step2 = directory / "step_0000002"
    out["estimate"] = keeper.writer.estimate_bytes(made.student, True)
    out["actual"] = sum(p.stat().st_size for p in step2.rglob("*.pt")) + sum(
        p.stat().st_size for p in step2.rglob("*.safetensors")
    )
    said = []
    keeper.say = said.append

    def attempt(step, **kwargs):
        made.state.step = step
        try:
            return str(keeper.save(made.student, made.state, False, **kwargs))
        except checkpoint.CheckpointError as error:
            return f"raised {error}"

    plain = shutil.disk_usage
    checkpoint.shutil.disk_usage = lambda _: SimpleNamespace(free=1000)
    out["full"] = attempt(3)
    out["full_must"] = attempt(3, must=True)
    try:
        keeper.check_room(made.student)
        out["room"] = ""
    except checkpoint.CheckpointError as error:
        out["room"] = str(error)
    checkpoint.shutil.disk_usage = plain

    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    if world.rank == 1:  # no file of this process grows beyond
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, hard))
    out["rank1"] = attempt(4)
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    if world.rank == 0:  # rank 0 writes the student too
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, hard))
    out["rank0"] = attempt(5)
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    out["left"] = sorted(p.name for p in directory.iterdir())
    out["said"] = said

    keeper.retention = Retention(last=1, best=1)
    for step, loss in ((6, 3.0), (7, 2.0), (8, 2.5), (9, None)):
        attempt(step, validation_loss=loss)
    out["kept"] = sorted(p.name for p in directory.iterdir())
    out["best"] = (directory / "BEST").resolve().name
    return out


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    root = tmp_path_factory.mktemp("checkpoint")
    paths = {
        "student": str(tiny.llama(root / "student", seed=1)),
        "teacher": str(tiny.llama(root / "teacher", layers=3, hidden=64, tie=False, seed=2)),
    }
    return run_ranks(save_resume_export_damage, 2, root, paths)[0]


def test_save_and_resume_in_mid_epoch_equals_the_uninterrupted_run_bitwise(result):
    assert result["found"] == "step_0000004"
    assert result["resumed_equal"]
    assert result["state"] == [7, True]


def test_exported_student_loads_in_transformers_and_gives_the_engines_logits(result):
    assert result["export_equal"] and result["tied"] and result["tokenizer"] == tiny.VOCAB
    # The same weights through the same code, under ZeRO's hooks or without: rounding only.
    assert result["export_logits"] <= 1e-6


def test_export_script_rebuilds_the_student_from_the_shards_alone(result):
    assert result["offline_equal"]


def test_sharded_export_loads_whole(result):
    assert result["shards"] > 1 and result["shards_equal"]


def test_a_flipped_bit_sets_the_checkpoint_aside_and_the_one_before_is_used(result):
    assert result["after_damage"] == "step_0000006"
    assert result["set_aside"] == ["bad.step_0000007"]


def test_no_good_checkpoint_is_an_error_and_never_a_fresh_start(result):
    assert "none of 4 checkpoints is whole" in result["all_bad"]


def test_a_full_disk_is_told_and_training_goes_on_from_the_last_good_checkpoint(result):
    assert result["full"] == result["rank1"] == result["rank0"] == "None"
    assert "disk full: needed" in result["said"][0] and "training goes on" in result["said"][0]
    assert "rank 1: " in result["said"][1] and "step_0000002 is the last" in result["said"][1]
    assert result["full_must"].startswith("raised the checkpoint of step 3 cannot be written")
    assert "no room for one checkpoint" in result["room"]
    # Nothing half-written stays.
    assert result["left"] == ["BEST", "LATEST", "final", "step_0000002"]


def test_the_space_a_checkpoint_takes_is_known_before(result):
    assert 0.8 <= result["estimate"] / result["actual"] <= 1.1, result


def test_keep_last_and_keep_best_stay_and_nothing_else(result):
    assert result["kept"] == ["BEST", "LATEST", "final", "step_0000007", "step_0000009"]
    assert result["best"] == "step_0000007"
