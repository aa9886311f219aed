"""The student's own texts: the same on one and two ranks, however they are written and a step is
cut, and after a resume in the middle of a buffer."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from tests import tiny
from tests.parity.test_step import weights, whole
from tests.ranks import run_ranks

GLOBAL, STEPS, LR = 8, 2, 0.3
SHARES = ["packed_sequence.share_prefixes=true"]
#: Cuts of a step on so many ranks: samples of a micro-batch, size of a pack, what writes, and keys.
CUTS = {
    1: [(8, 0, "replica", []), (2, 40, "replica", SHARES)],
    2: [(1, 40, "sharded", [])],
}


def make_trainer(world, paths, place, local=4, pack=0, steps=STEPS, more=(), **rollouts):
    from ds_kd.config.load import load
    from ds_kd.recipe.build import build

    rows = {"_target_": "ds_kd.data.squad.make_squad_dataset", "dataset_name": paths["rows"]}
    content = {
        "model": {"pretrained_model_name_or_path": paths["student"], "torch_dtype": "fp32"},
        "teacher_model": {"pretrained_model_name_or_path": paths["teacher"], "torch_dtype": "fp32"},
        "dataset": rows,
        "dataloader": {"shuffle": True},
        "optimizer": {"_target_": "torch.optim.SGD", "lr": LR},
        "step_scheduler": {
            "global_batch_size": GLOBAL, "local_batch_size": local, "max_steps": steps,
            "num_epochs": 9, "ckpt_every_steps": 2,
        },
        "packed_sequence": {"packed_sequence_size": pack},
        "checkpoint": {"checkpoint_dir": str(place), "save_consolidated": "false"},
        "rollouts": {"max_new_tokens": 12, "temperature": 0.9, "top_p": 0.98, **rollouts},
    }  # fmt: skip
    return build(load(content, list(more)), world)


def run(trainer):
    """Train to the end: the weights, and all that the student wrote."""
    written = []
    write = getattr(trainer.batches, "_write", None)

    def record(prompts, draws):
        found = write(prompts, draws)
        texts = zip(draws, prompts, found, strict=True)
        written.append(sorted([*d, p, f.tokens, f.is_whole] for d, p, f in texts))
        return found

    if write is not None:
        trainer.batches._write = record
    assert trainer.train()
    if trainer.metrics is not None:
        trainer.metrics.close()
    return weights(trainer.student), written


def lists(found):
    return {name: tensor.flatten().tolist() for name, tensor in found.items()}


def cut_in_every_way(world, directory, paths):
    out = []
    for local, pack, way, more in CUTS[world.size]:
        name, how = directory / f"cut{local}{pack}", {"ratio": 0.6, "samples_per_prompt": 2}
        made = make_trainer(world, paths, name, local, pack, more=more, generate=way, **how)
        got, written = run(made)
        assert made.student.training
        out.append([lists(got), written])
    return out


def write_with_an_adapter(world, directory, paths):
    """Return whether a merged copy and the sharded student with its adapter write the same."""
    adapter = ["peft={match_all_linear: true, lora_A_init: uniform}"]
    written = [
        run(make_trainer(world, paths, directory / way, 1, 40, 2, adapter, generate=way))[1]
        for way in ("replica", "sharded")
    ]
    # The adapter is zero at first, so that only later texts tell whether it was merged.
    return [written[0] == written[1], len(written[0])]


def resume_within_a_buffer(world, directory, paths):
    """Return whether a run of six steps with two buffers ends with the same weights if it is killed
    after the first save inside the second, the fourth step's."""
    from ds_kd.parallel.world import on_rank0

    how = {"reuse": 3, "samples_per_prompt": 2, "ratio": 0.7, "pack": 40, "local": 1, "steps": 6}
    place, killed = directory / "whole", directory / "killed"
    whole, written = run(make_trainer(world, paths, place, more=SHARES, **how))
    kept = json.loads((place / "step_0000004" / "rollouts.json").read_text())

    def kill():
        shutil.copytree(place / "step_0000004", killed / "step_0000004")
        (killed / "LATEST").symlink_to("step_0000004")

    on_rank0(kill, world)
    again = make_trainer(world, paths, killed, more=SHARES, **how)
    again.checkpointer.resume(again.student, again.state)
    began = again.state.step
    got, anew = run(again)
    same = all(torch.equal(got[name], whole[name]) for name in whole)
    at_end = (place / "LATEST" / "rollouts.json").exists()
    return [same, began, len(written), len(anew), kept["window"], len(kept["tokens"]), at_end]


def compare_layers_on_own_texts(world, directory, paths):
    """Differences of loss and weights of a step that compares layers on the student's texts from
    the definition: transformers' own logits and hidden states, one sample at a time."""
    from transformers import AutoModelForCausalLM

    layers = "{name: hidden_states, weight: 2, layers: [[0, 0], [0, 1]], distance: mse}"
    losses = f"kd_loss_fn=[{{name: reverse_kl, weight: 0.5}}, {layers}]"
    how = {"samples_per_prompt": 2, "ratio": 0.7, "pack": 40, "local": 1, "steps": 1}
    made = make_trainer(world, paths, directory / "layers", more=[*SHARES, losses], **how)
    projectors = [p.requires_grad_() for p in whole(made.student.module.layer_losses).values()]
    got, written = run(made)
    logged = json.loads((directory / "layers/tensorboard/metrics.jsonl").read_text())["train_loss"]

    student, teacher = (
        AutoModelForCausalLM.from_pretrained(paths[name]) for name in ("student", "teacher")
    )
    loss, n = 0.0, 0
    for sample in made.batches._window.samples:
        ask = {"input_ids": torch.tensor([sample["input_ids"]]), "output_hidden_states": True}
        rows = (torch.tensor(sample["labels"]) != -100).nonzero().flatten()
        own, other = student(**ask), teacher(**ask)
        log_q, log_p = (torch.log_softmax(out.logits[0, rows], -1) for out in (own, other))
        loss = loss + 0.5 * (log_q.exp() * (log_q - log_p.detach())).sum()
        for number, projector in enumerate(projectors):
            target = other.hidden_states[number + 1][0, rows].detach()
            apart = own.hidden_states[1][0, rows] @ projector.T - target
            loss = loss + 2.0 * apart.square().mean(-1).sum() / len(projectors)
        n += len(rows)
    (loss / n).backward()
    expected = {name: p - LR * p.grad for name, p in student.named_parameters()}
    expected |= {k: p - LR * p.grad for k, p in enumerate(projectors)}
    got |= dict(enumerate(whole(made.student.module.layer_losses).values()))
    error = max((got[name] - each).abs().max().item() for name, each in expected.items())
    return [abs(logged - (loss / n).item()), error, len(got) == len(expected), len(written[0])]


def everything(world, directory, paths):
    out = {"cuts": cut_in_every_way(world, directory, paths)}
    if world.size == 1:
        out["layers"] = compare_layers_on_own_texts(world, directory, paths)
    if world.size == 2:
        out["adapter"] = write_with_an_adapter(world, directory, paths)
        out["resumed"] = resume_within_a_buffer(world, directory, paths)
    return out


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    place = tmp_path_factory.mktemp("rollouts")
    (place / "rows.jsonl").write_text(tiny.squad_rows(24))
    paths = {
        "student": str(tiny.llama(place / "student", seed=1)),
        "teacher": str(tiny.llama(place / "teacher", layers=3, hidden=64, tie=False, seed=2)),
        "rows": str(place / "rows.jsonl"),
    }
    found = {}
    for size in (1, 2):
        (place / str(size)).mkdir()
        found[size] = run_ranks(everything, size, place / str(size), paths)
    shutil.rmtree(place)
    return found


def test_texts_and_weights_are_the_same_on_one_and_two_ranks_and_however_a_step_is_cut(runs):
    """With samples, packs or packs that compute a prompt once for its two answers, one micro-batch
    or several, a copy of the student or its shards."""
    (weights_, texts), *others = [*runs[1][0]["cuts"], *runs[2][0]["cuts"]]
    for other, written in others:
        assert written == texts
        for name, values in weights_.items():
            assert torch.allclose(torch.tensor(values), torch.tensor(other[name]), 0, 1e-6)
    # About six of ten samples are on-policy; their texts differ in length, and some are cut.
    assert len(texts) == STEPS and all(4 <= len(step) < 2 * GLOBAL for step in texts)
    rows = [row for step in texts for row in step]
    assert len({len(row[5]) for row in rows}) >= 2 and {row[6] for row in rows} == {True, False}


def test_a_copy_of_the_student_has_its_adapter_merged(runs):
    assert all(rank["adapter"] == [True, 2] for rank in runs[2])


def test_a_run_that_is_killed_in_the_middle_of_a_buffer_goes_on_bitwise(runs):
    for rank in runs[2]:
        same, began, written, anew, window, texts, at_end = rank["resumed"]
        assert same and (began, written, anew, window) == (4, 2, 0, 1)
        assert texts % 2 == 0 and texts > 0 and not at_end


def test_layers_are_compared_on_the_students_texts_as_their_definition_says(runs):
    """In packs that compute a prompt once for its two answers; loss, weights and projectors."""
    loss, error, has_all, texts = runs[1][0]["layers"]
    assert loss < 1e-5 and error < 1e-5 and has_all and texts >= 8
