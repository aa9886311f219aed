"""A run that reads its teacher from a cache: its losses are those under the teacher itself."""

from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path

import pytest
import torch

from ds_kd.parallel.world import World
from tests import tiny
from tests.ranks import run_ranks

#: A padded, shuffled run, and packs whose samples share their beginnings.
LAYOUTS = {
    "padded": ["dataloader.shuffle=true", "dataloader.num_workers=1"],
    "shared": ["packed_sequence={packed_sequence_size: 32, share_prefixes: true}"],
}


#: Padded and shuffled without a worker process, which takes seconds to start.
ALONE = ["dataloader.shuffle=true"]
PLACES = ("replicate", "cpu", "int8")


def rows(count: int) -> str:
    """Questions of which every three are about one text, with answers of unequal lengths."""
    made = [
        {
            "context": " ".join(f"w{(7 * (k // 3) + i) % 60}" for i in range(5)),
            "question": f"w{60 + k} w{k}",
            "answers": {"text": [" ".join(f"w{(k + i) % 60}" for i in range(1 + k % 4))]},
        }
        for k in range(count)
    ]
    return "\n".join(map(json.dumps, made))


def config(root, name, *words):
    import ds_kd

    data = "{_target_: ds_kd.data.squad.make_squad_dataset, dataset_name: %s}"
    values = {
        "model": {"pretrained_model_name_or_path": str(root / "student")},
        "teacher_model": {"pretrained_model_name_or_path": str(root / "teacher")},
        "kd_loss_fn": {"temperature": 2.0},
        "optimizer": {"lr": 0.01},
        "checkpoint": {"enabled": False},
        "tensorboard": {"enabled": False, "log_dir": str(root / name)},
        "step_scheduler": {
            "global_batch_size": 4, "local_batch_size": 1, "num_epochs": 2, "max_steps": 6,
            "val_every_steps": 3,
        },
    }  # fmt: skip
    data = [f"dataset={data % (root / 'rows.jsonl')}"]
    data += [f"validation_{data[0]}".replace("rows.jsonl", "held.jsonl")]
    return ds_kd.load_config(values, [*data, *words])


@contextlib.contextmanager
def counting():
    """Yield a list to which every pass of a teacher adds its number of rows."""
    from ds_kd.models.causal_lm import FrozenModel

    asked = []

    def note(module, _, output):
        if isinstance(module, FrozenModel):
            asked.append(len(output))

    hook = torch.nn.modules.module.register_module_forward_hook(note)
    yield asked
    hook.remove()


def train(world, root, name, *words, at_save=lambda step: None):
    """Losses of a run, and how many rows this rank asked a teacher about; a pass may take several
    micro-batches."""
    from ds_kd.recipe.build import build
    from ds_kd.recipe.run import _resume

    cfg = config(root, name, *words)
    if cfg.checkpoint.enabled:  # as the lock of the directory has it
        Path(cfg.checkpoint.checkpoint_dir).mkdir(parents=True, exist_ok=True)
    with counting() as asked, build(cfg, world) as trainer:
        _resume(cfg, trainer, None)
        if trainer.checkpointer is not None:
            save, state = trainer.checkpointer.save, trainer.state

            def save_and_note(*given, **options):
                save(*given, **options)
                at_save(state.step)

            trainer.checkpointer.save = save_and_note
        assert trainer.train()
    lines = (root / name / "metrics.jsonl").read_text().splitlines() if world.is_main else []
    found = [json.loads(line) for line in lines]
    losses = [each.get("train_loss", each.get("val_loss")) for each in found]
    return [loss for loss in losses if loss is not None], sum(asked)


def write(world, root, name, *words, stops_after=10**9):
    from ds_kd.recipe.offline.write import plan_cache, write_cache

    calls = iter(range(10**9))
    place = [f"teacher={{kind: cached, directory: {root / name}, fill: true}}"]
    task = plan_cache(config(root, f"log_{name}", *place, *words), world)
    return task.absent.rows, write_cache(task, world, lambda: next(calls) >= stops_after)


def kill(world, root):
    """Losses of a run that fills a cache, and of runs that go on from what a kill after the save in
    the middle of its first pass leaves, and after one in its second.

    SIGKILL leaves the files as they are, so that copies of them are what the kills leave.
    """
    from ds_kd.parallel.world import on_rank0

    def words(place):
        kept = f"teacher={{kind: cached, directory: {place / 'rows'}, fill: true, dtype: fp32}}"
        saved = f"checkpoint={{checkpoint_dir: {place / 'saved'}, save_consolidated: 'false'}}"
        steps = "step_scheduler.max_steps=8", "step_scheduler.ckpt_every_steps=2"
        return *ALONE, kept, saved, "step_scheduler.local_batch_size=2", *steps

    def copy(step):
        if step in (2, 6):
            copies = lambda: shutil.copytree(root / "lives", root / f"killed{step}", symlinks=True)  # noqa: E731
            on_rank0(lambda: str(copies()), world)

    out = {"undisturbed": train(world, root, "lives/log", *words(root / "lives"), at_save=copy)}
    for step in (2, 6):
        place = f"killed{step}"
        out[place] = train(world, root, f"{place}/log", *words(root / place))
    return out


def compare(world, root):
    out, fp32 = {}, "teacher.dtype=fp32"
    for name, layout in LAYOUTS.items():
        kept = f"teacher={{kind: cached, directory: {root / name}}}"
        halfway = write(world, root, name, *layout, fp32, stops_after=2) if name == "padded" else 0
        out[name] = {
            "halfway": halfway,
            "whole": write(world, root, name, *layout, fp32),
            "resident": train(world, root, f"r_{name}", *layout),
            "cached": train(world, root, f"c_{name}", *layout, kept, "teacher_model=null"),
        }
    # Rows that were written for packs serve padded samples; a run may fill a cache itself.
    padded = LAYOUTS["padded"]
    packs = f"teacher={{kind: cached, directory: {root / 'shared'}}}"
    filled = f"teacher={{kind: cached, directory: {root / 'filled'}, fill: true}}"
    out["other"] = train(world, root, "other", *padded, packs)
    out["fills"] = train(world, root, "fill1", *padded, filled)
    out["reads"] = train(world, root, "fill2", *padded, filled)
    loss = "kd_loss_fn={name: top_k, k: 6, temperature: 2.0}"
    likeliest = (
        f"teacher={{kind: cached, directory: {root / 'top'}, fill: true, keep: top_k, k: 9}}"
    )
    out["top_k"] = [
        train(world, root, f"top{k}", *padded, loss, *kind)[0]
        for k, kind in enumerate(((), (likeliest,)))
    ]
    for place in PLACES:
        out[place] = train(world, root, place, *ALONE, f"teacher.placement={place}")
    alone = f"teacher={{kind: cached, directory: {root / 'alone'}}}"
    out["of_one_rank"] = train(world, root, "of_one_rank", *ALONE, alone)
    out["killed"] = kill(world, root)
    out["answers"] = answer(world, root, "answers2.jsonl")
    out["views"] = verify_with_other_views(world, root)
    return out


def verify_with_other_views(world, root):
    """Return what comes of a comparison with the teacher where rank 1 has not seen the files that
    another run has just written, and of one with rows that are another teacher's."""
    import numpy as np
    from safetensors.torch import load_file

    from ds_kd.config.components import ConfigError
    from ds_kd.recipe.build import build_teacher
    from ds_kd.recipe.offline.teacher import build_kind, verify
    from ds_kd.recipe.offline.write import plan_cache
    from ds_kd.teachers.cache.store import Store
    from ds_kd.teachers.cached import CachedTeacher

    kept = f"teacher={{kind: cached, directory: {root / 'padded'}, fill: true, dtype: fp32}}"
    task = plan_cache(config(root, "views", *ALONE, kept), world)
    other, kind = Store(root / "nothing"), build_kind(root / "padded", task.record, world)
    live = build_teacher(task.cfg, [], world)
    cached = CachedTeacher(task.store if world.is_main else other, kind)
    out = [verify(live, cached, task.sets, root / "padded", world)]
    for path in (root / "padded").glob("part-*") if world.is_main else ():
        part = load_file(path)
        keys, hidden = part["keys"].numpy().view(np.uint64), part["hidden"]
        other.add(keys, {"hidden": hidden + 0.1 * torch.randn_like(hidden)})
    try:
        verify(live, CachedTeacher(other, kind), task.sets, root / "padded", world)
    except ConfigError as error:
        out.append("away from the stored one" in str(error))
    return out


def write_alone(world, root):
    """Write a cache twice: whether it is whole each time, and the rows that a teacher was asked."""
    _, is_whole = write(world, root, "alone", *ALONE, "teacher.dtype=fp32")
    with counting() as asked:
        _, is_whole_again = write(world, root, "alone", *ALONE, "teacher.dtype=fp32")
    return is_whole, is_whole_again, sum(asked)


def read_alone(world, root):
    """Losses of one rank under a teacher that runs, and on the cache of two ranks."""
    kept = f"teacher={{kind: cached, directory: {root / 'padded'}}}"
    return train(world, root, "r_alone", *ALONE), train(world, root, "c_alone", *ALONE, kept)


def answer(world, root, name):
    """The file of a teacher's sampled answers, made on these ranks."""
    from ds_kd.models.generation.sampling import Sampling
    from ds_kd.recipe.offline.answers import Options, generate_data

    how = Sampling(40, temperature=2.0)
    options = Options(str(root / "rows.jsonl"), root / name, samples=2, how=how, seed=3)
    generate_data(str(root / "teacher"), options, world)
    return (root / name).read_text() if world.is_main else ""


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    root = tmp_path_factory.mktemp("cached")
    tiny.llama(root / "student", layers=1, hidden=16, seed=1)
    tiny.llama(root / "teacher", layers=2, hidden=32, tie=False, seed=2)
    (root / "rows.jsonl").write_text(rows(17))
    (root / "held.jsonl").write_text(rows(24).split("\n", 17)[-1])
    written = run_ranks(write_alone, 1, root)[0]
    found, other = run_ranks(compare, 2, root)
    found["views"] = [found["views"], other["views"]]
    return {**found, "alone": run_ranks(read_alone, 1, root)[0], "root": root, "written": written}


@pytest.mark.parametrize("name", LAYOUTS)
def test_losses_on_a_cache_in_fp32_are_those_under_the_teacher_itself(results, name):
    (expected, asked), (losses, none) = results[name]["resident"], results[name]["cached"]
    assert len(expected) == 8 and asked > 0 == none
    # A sample that is shuffled has other neighbours in the second pass than when it was stored.
    of_first_pass = slice(0, 5 if name == "padded" else 8)
    assert losses[of_first_pass] == expected[of_first_pass]
    assert losses == pytest.approx(expected, rel=1e-6)


def test_a_cache_that_was_stopped_goes_on_with_what_is_absent(results):
    (absent, is_whole), (left, is_whole_then) = (results["padded"][k] for k in ("halfway", "whole"))
    assert 0 < left < absent and not is_whole and is_whole_then


def test_a_whole_cache_is_written_again_without_its_teacher(results):
    assert results["written"] == [True, True, 0]


def test_rows_that_were_written_for_packs_serve_padded_samples(results):
    losses, none = results["other"]
    assert losses == pytest.approx(results["padded"]["resident"][0], rel=1e-6) and not none


def test_a_run_fills_its_cache_in_the_first_epoch_and_the_next_run_asks_no_teacher(results):
    (losses, asked), (again, none) = results["fills"], results["reads"]
    assert losses != results["padded"]["resident"][0]  # 16 bits are kept
    assert losses == pytest.approx(results["padded"]["resident"][0], rel=1e-3)
    assert again == pytest.approx(losses, rel=1e-6)
    assert 0 < asked < results["padded"]["resident"][1] and none == 0


def test_a_run_that_is_killed_while_it_fills_its_cache_goes_on_bitwise(results):
    """Its rows of two samples depend on the neighbour's length in their last bits, so that those
    before the save must be there and must not be made anew in the second pass."""
    (whole, asked), (losses, again) = (results["killed"][k] for k in ("undisturbed", "killed2"))
    assert losses == whole and 0 < again <= asked


def test_a_killed_run_goes_on_with_a_full_cache_and_asks_no_teacher(results):
    (whole, _), (losses, none) = (results["killed"][k] for k in ("undisturbed", "killed6"))
    assert losses == whole and len(whole) == 11 and none == 0


def test_a_cache_of_two_ranks_serves_one_and_the_other_way_round(results):
    (expected, _), (losses, none) = results["alone"]
    assert losses == pytest.approx(expected, rel=1e-6) and not none
    losses, none = results["of_one_rank"]
    assert losses == pytest.approx(results["padded"]["resident"][0], rel=1e-6) and not none


def test_all_ranks_run_the_teacher_or_none_whatever_files_each_has_seen(results):
    assert [first for first, *_ in results["views"]] == [True, True]


def test_rows_that_the_teacher_does_not_give_now_are_refused_on_all_ranks(results):
    assert [rest for _, *rest in results["views"]] == [[True], [True]]


@pytest.mark.parametrize("place", ["replicate", "cpu"])
def test_wherever_a_teacher_lies_its_losses_are_the_same(results, place):
    losses, asked = results[place]
    assert losses == pytest.approx(results["padded"]["resident"][0], rel=1e-6) and asked > 0


def test_a_teacher_in_8_bits_gives_nearly_the_same_losses(results):
    expected, (losses, asked) = results["padded"]["resident"][0], results["int8"]
    assert losses != expected and losses == pytest.approx(expected, rel=0.02) and asked > 0


def test_the_loss_top_k_reads_the_likeliest_ids_alone(results):
    expected, losses = results["top_k"]
    assert losses == pytest.approx(expected, rel=1e-5) and losses != results["fills"][0]


def test_a_teachers_answers_are_the_same_on_one_rank_and_on_two(results):
    alone = World(0, 1, torch.device("cpu"), "gloo")
    assert answer(alone, results["root"], "answers1.jsonl") == results["answers"] != ""
