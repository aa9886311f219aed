"""A run that reads its teacher from a cache: its losses are those under the teacher itself."""

from __future__ import annotations

import json

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


def train(world, root, name, *words):
    """Losses of a run, and how often its ranks ran a teacher."""
    from ds_kd.models.causal_lm import FrozenModel
    from ds_kd.recipe.build import build

    forwards = []
    note = lambda module, *_: forwards.append(1) if isinstance(module, FrozenModel) else None  # noqa: E731
    hook = torch.nn.modules.module.register_module_forward_hook(note)
    with build(config(root, name, *words), world) as trainer:
        assert trainer.train()
    hook.remove()
    lines = (root / name / "metrics.jsonl").read_text().splitlines() if world.is_main else []
    found = [json.loads(line) for line in lines]
    losses = [each.get("train_loss", each.get("val_loss")) for each in found]
    return [loss for loss in losses if loss is not None], len(forwards)


def write(world, root, name, *words, stops_after=10**9):
    from ds_kd.recipe.offline.write import plan_cache, write_cache

    calls = iter(range(10**9))
    place = [f"teacher={{kind: cached, directory: {root / name}, fill: true}}"]
    task = plan_cache(config(root, f"log_{name}", *place, *words), world)
    return task.absent.rows, write_cache(task, world, lambda: next(calls) >= stops_after)


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
    # What was written for packs serves padded samples; a run may fill a cache itself.
    padded = LAYOUTS["padded"]
    packs = f"teacher={{kind: cached, directory: {root / 'shared'}}}"
    filled = f"teacher={{kind: cached, directory: {root / 'filled'}, fill: true}}"
    out["other"] = train(world, root, "other", *padded, packs)
    out["fills"] = train(world, root, "fill1", *padded, filled)
    out["reads"] = train(world, root, "fill2", *padded, filled)
    out["answers"] = answer(world, root, "answers2.jsonl")
    return out


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
    return {**run_ranks(compare, 2, root)[0], "root": root}


@pytest.mark.parametrize("name", LAYOUTS)
def test_losses_on_a_cache_in_fp32_are_those_under_the_teacher_itself(results, name):
    (expected, forwards), (losses, none) = results[name]["resident"], results[name]["cached"]
    assert len(expected) == 8 and forwards > 0 == none
    # A sample that is shuffled has other neighbours in the second pass than when it was stored.
    of_first_pass = slice(0, 5 if name == "padded" else 8)
    assert losses[of_first_pass] == expected[of_first_pass]
    assert losses == pytest.approx(expected, rel=1e-6)


def test_a_cache_that_was_stopped_goes_on_with_what_is_absent(results):
    (absent, is_whole), (left, is_whole_then) = (results["padded"][k] for k in ("halfway", "whole"))
    assert 0 < left < absent and not is_whole and is_whole_then


def test_rows_that_were_written_for_packs_serve_padded_samples(results):
    losses, forwards = results["other"]
    assert losses == pytest.approx(results["padded"]["resident"][0], rel=1e-6) and not forwards


def test_a_run_fills_its_cache_in_the_first_epoch_and_the_next_run_asks_no_teacher(results):
    (losses, forwards), (again, none) = results["fills"], results["reads"]
    assert losses != results["padded"]["resident"][0]  # 16 bits are kept
    assert losses == pytest.approx(results["padded"]["resident"][0], rel=1e-3)
    assert again == pytest.approx(losses, rel=1e-6)
    assert 0 < forwards < results["padded"]["resident"][1] and none == 0


def test_a_teachers_answers_are_the_same_on_one_rank_and_on_two(results):
    alone = World(0, 1, torch.device("cpu"), "gloo")
    assert answer(alone, results["root"], "answers1.jsonl") == results["answers"] != ""
