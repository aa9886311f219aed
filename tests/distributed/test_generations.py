"""Answers that are written while a run trains: those of plain transformers, and without influence
on training."""

from __future__ import annotations

import io
import json

import pytest

from tests import tiny
from tests.parity.test_step import build, sgd, weights
from tests.ranks import run_ranks


def train(world, directory, paths, count, packs):
    """Weights after two epochs with a validation after each step, and the log."""
    from transformers import AutoTokenizer

    from ds_kd.checkpoint.state import seed_rank
    from ds_kd.data.packing import PackedDataset
    from ds_kd.evaluate.samples import Generations, choose_questions
    from ds_kd.train.metrics import Metrics

    rows = tiny.samples(8, seed=3, masked=(0,))
    data = PackedDataset(rows, 32) if packs else rows
    seed_rank(7, world.rank, True)
    trainer = build(
        world, paths, data, 1, 2, 0.5, sgd, packs=packs, num_epochs=2, val_every_steps=1
    )  # fmt: skip
    trainer.validate_first = True
    if world.is_main:
        trainer.metrics = Metrics(directory / f"{packs}{count}", out=io.StringIO())
    if count:
        tokenizer = AutoTokenizer.from_pretrained(paths["student"])
        questions = choose_questions(data, tokenizer, count, 128)
        models = {
            "teacher": trainer.teacher.next_tokens,
            "student": lambda batch: trainer.student(batch, probe="next_tokens"),
        }
        trainer.validation.generations = Generations(models, tokenizer, questions, world)
    assert trainer.train()
    trainer.metrics.close()
    return weights(trainer.student), trainer.validation.generations


def compare(world, directory, paths):
    import torch
    from transformers import AutoModelForCausalLM

    out = {}
    for packs in (False, True):
        plain, _ = train(world, directory, paths, 0, packs)
        watched, asked = train(world, directory, paths, 2, packs)
        before = AutoModelForCausalLM.from_pretrained(paths["student"]).state_dict()
        expected = {}
        for label in ("teacher", "student"):
            model = AutoModelForCausalLM.from_pretrained(paths[label]).eval()
            expected[label] = []
            for prompt, _ in asked.questions:
                ids = torch.tensor([prompt])
                new = model.generate(input_ids=ids, max_new_tokens=40, do_sample=False)
                expected[label].append(asked._decode(new[0, len(prompt) :].tolist()))
        out[str(packs)] = {
            "same": all(torch.equal(plain[n], watched[n]) for n in plain),
            "moved": any(not torch.equal(plain[n], before[n]) for n in plain),
            "expected": expected,
        }
    return out


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    directory = tmp_path_factory.mktemp("generations")
    paths = {
        "student": tiny.llama(directory / "student", seed=1),
        "teacher": tiny.llama(directory / "teacher", layers=3, hidden=64, tie=False, seed=2),
    }
    config = paths["student"] / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"attention_dropout": 0.2}))
    return directory, run_ranks(compare, 2, directory, paths)


@pytest.mark.parametrize("packs", ["False", "True"])
def test_answers_change_no_bit_of_training_with_dropout(found, packs):
    _, results = found
    for result in results:
        assert result[packs]["same"] and result[packs]["moved"]


@pytest.mark.parametrize("packs", ["False", "True"])
def test_answers_are_those_of_transformers_and_are_logged_with_each_validation(found, packs):
    directory, results = found
    log = (directory / f"{packs}2" / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in log]
    shown = [(r["step"], r["val_samples"]) for r in records if "val_samples" in r]
    validated = [r["step"] for r in records if "val_loss" in r]
    assert [step for step, _ in shown] == validated and validated[0] == 0 and len(validated) > 2
    first = shown[0][1]
    assert len(first) == 2 and set(first[0]) == {"prompt", "reference", "teacher", "student"}
    for label, texts in results[0][packs]["expected"].items():
        assert [each[label] for each in first] == texts
    assert all(texts[0]["teacher"] == first[0]["teacher"] for _, texts in shown)
    assert shown[-1][1] != first  # the student has learnt

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(directory / f"{packs}2"))
    events.Reload()
    assert len(events.Tensors("val_samples/text_summary")) == len(shown)
