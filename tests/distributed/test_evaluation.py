"""Evaluation on two ranks: the command's numbers are those of one, a run's are the command's, and
no bit of training is changed."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from ds_kd.parallel.rendezvous import free_port
from tests.ranks import run_ranks
from tests.scripts import script
from tests.unit.test_evaluate import (
    choice_rows,
    make_model,
    question_rows,
    text_rows,
    write_rows,
)

TASKS = {
    "hellaswag": "choices.jsonl",
    "squad": "questions.jsonl",
    "perplexity": "texts.jsonl",
    "kl": "questions.jsonl",
}


def make_run(root: Path, name: str) -> dict:
    """A run of three steps with dropout, shuffled and packed, without an evaluation."""
    model = {"_target_": "nemo_automodel.NeMoAutoModelForCausalLM.from_pretrained"}
    return {
        "model": {**model, "pretrained_model_name_or_path": str(root / "student")},
        "teacher_model": {**model, "pretrained_model_name_or_path": str(root / "teacher")},
        "dataset": {
            "_target_": "ds_kd.data.squad.make_squad_dataset",
            "dataset_name": str(root / "questions.jsonl"),
        },
        "dataloader": {"shuffle": True},
        "packed_sequence": {"packed_sequence_size": 200},
        "step_scheduler": {"global_batch_size": 2, "local_batch_size": 1, "max_steps": 3,
                           "num_epochs": 3},
        "optimizer": {"_target_": "torch.optim.AdamW", "lr": 0.01},
        "checkpoint": {"checkpoint_dir": str(root / name)},
        "dist_env": {"backend": "gloo"},
    }  # fmt: skip


def train(world, root: Path, name: str, evaluation: dict | None, stop_at: int = 0) -> None:
    import ds_kd

    given = make_run(root, name) | ({"evaluation": evaluation} if evaluation else {})
    with ds_kd.build(ds_kd.load_config(given)) as trainer:
        # Before the last step is validated or saved nobody asks; an evaluation does.
        if stop_at:
            trainer.asked_to_stop = lambda: trainer.state.step == stop_at
        assert trainer.train().finished == (not stop_at)


def meet_at(port: int) -> None:
    """Let the ranks meet anew: a rank that is early would find the store of the run before."""
    os.environ["MASTER_PORT"] = str(port)


def evaluate_on_ranks(world, root: Path) -> None:
    from ds_kd.recipe.tasks.evaluation import Options, evaluate, find_task

    for task, data in TASKS.items():
        options = Options(str(root / data), batch_size=3, output=root / f"{task}-ranks.json")
        evaluate([str(root / "student")], str(root / "teacher"), find_task(task), options, world)


def use_both_ranks(world, root: Path, ports: list[int]) -> None:
    """Evaluate; run with an evaluation, without one, and with one that a signal breaks off."""
    evaluate_on_ranks(world, root)
    tasks = [{"task": task, "data": str(root / data)} for task, data in TASKS.items()]
    train(world, root, "with", {"tasks": tasks, "every": 2})
    meet_at(ports[0])
    train(world, root, "without", None)
    meet_at(ports[1])
    train(world, root, "stopped", {"tasks": tasks[:1]}, stop_at=3)
    assert "eval_hellaswag/acc" not in records(root, "stopped")[-1]
    meet_at(ports[2])
    train(world, root, "stopped", {"tasks": tasks[:1]})


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("runs")
    make_model(root / "student", 0, attention_dropout=0.2, max_position_embeddings=512)
    make_model(root / "teacher", 1, max_position_embeddings=512)
    write_rows(root / "choices.jsonl", choice_rows(13))
    write_rows(root / "questions.jsonl", question_rows(9))
    write_rows(root / "texts.jsonl", text_rows())
    run_ranks(use_both_ranks, 2, root, [free_port() for _ in range(3)], seconds=300)
    return root


def evaluations(root: Path, name: str) -> list[dict]:
    return [r for r in records(root, name) if any(tag.startswith("eval_") for tag in r)]


def records(root: Path, name: str) -> list[dict]:
    path = root / name / "tensorboard" / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_run_evaluates_when_it_is_told_to(root):
    assert [record["step"] for record in evaluations(root, "with")] == [2, 3]


def test_an_evaluation_that_a_signal_broke_off_is_made_when_the_run_goes_on(root):
    (found,) = evaluations(root, "stopped")
    assert found["step"] == 3
    assert found["eval_hellaswag/acc"] == evaluations(root, "with")[-1]["eval_hellaswag/acc"]


def test_evaluation_changes_no_bit_of_training(root):
    kept = [
        [
            {name: v for name, v in record.items() if name.endswith(("loss", "norm"))}
            for record in records(root, name)
            if "train_loss" in record
        ]
        for name in ("with", "without")
    ]
    assert len(kept[0]) == 3 and kept[0] == kept[1]
    first, second = (
        (root / name / "final" / "model.safetensors").read_bytes() for name in ("with", "without")
    )
    assert first == second


def run_command(root: Path, model: Path, task: str, *words: str) -> dict:
    """Return what launch/evaluate.py says of a model on one rank."""
    output = root / f"{task}-{model.name}.json"
    models = ("--model", model, "--teacher", root / "teacher", "--output", output)
    rows = ("--task", task, "--data", root / TASKS[task])
    assert script("evaluate").main([*map(str, (*models, *rows, *words))]) == 0
    (found,) = json.loads(output.read_text())["models"]
    return found


def test_two_ranks_give_the_numbers_of_one(root):
    for task in TASKS:
        alone = run_command(root, root / "student", task, "--batch-size", "3")
        together = json.loads((root / f"{task}-ranks.json").read_text())
        assert together["models"] == [alone], task
        # Each rank has scored a part.
        assert len(list((root / f"{task}-ranks.samples").iterdir())) == 2


def test_the_run_finds_the_numbers_of_the_command(root):
    last = evaluations(root, "with")[-1]
    for task in TASKS:
        found = run_command(root, root / "with" / "final", task)
        for name, metric in found["metrics"].items():
            for end, key in (("", "value"), ("_low", "low"), ("_high", "high")):
                tag = f"eval_{task}/{name}{end}"
                assert last[tag] == pytest.approx(metric[key], abs=1e-5), tag
