"""benchmarks/rollouts/steps.py: a step of the real trainer, and what it is compared with."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from benchmarks.rollouts import inputs, reference
from tests import tiny

ROOT = Path(__file__).parents[2]


def test_a_step_is_timed_and_agrees_with_its_definition(tmp_path):
    command = [sys.executable, "benchmarks/rollouts/steps.py", "--rehearse", "--rounds", "1"]
    command += ["--contenders", "ds_kd", "ds_kd_packed", "--output", str(tmp_path / "steps")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "steps.json").read_text("utf-8"))
    assert [row["contender"] for row in rows] == ["ds_kd", "ds_kd_packed"]
    for row in rows:
        assert 0 < row["writing s"] < row["step s"] and row["training s"] > 0
        assert row["loss"] < 1e-6 and row["gradient"] < 1e-5  # rounding alone; reference is fp64
        # Four texts of at most six tokens; each comes again whatever it is written with.
        written = row["tokens"]
        assert 4 <= written <= 24 and row["halves"] == "4 of 4"
        count, of = row["supervised"].split(" of ")
        assert count == of


@pytest.fixture
def pair(tmp_path):
    return [tiny.llama(tmp_path / name, seed=k) for k, name in enumerate(("student", "teacher"))]


def test_a_loss_that_is_divided_by_another_count_is_seen(pair, tmp_path):
    """Both differences are 1 if a step forgets half of its tokens in the division."""
    told = {"prompts": [[5, 6, 7], [8, 9]], "texts": [[10, 11, 1], [12]]}
    loss, gradient = reference._compute(*pair, told["prompts"], told["texts"], torch.float64)
    file = tmp_path / "gradient.safetensors"
    save_file({name: 2 * part.float() for name, part in gradient.items()}, file)
    dtypes = torch.float64, torch.float32
    found = reference.compare(*pair, {**told, "loss": 2 * loss}, file, *dtypes)
    assert found["loss"] == pytest.approx(1) and found["gradient"] == pytest.approx(1, abs=1e-6)
    assert found["rounded loss"] < 1e-6 and found["rounded gradient"] < 1e-5


def test_the_definition_is_the_reverse_kl_over_every_written_token(pair):
    from transformers import AutoModelForCausalLM

    prompt, text = [5, 6, 7], [10, 11, 1]
    found, _ = reference._compute(*pair, [prompt], [text], torch.float64)
    ids = torch.tensor([prompt + text])
    q, p = (
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64)(ids).logits[0].softmax(-1)
        for path in pair
    )
    # The tokens at 3, 4 and 5, the end of the text among them, are predicted one place before.
    by_hand = sum((q[k] * (q[k] / p[k]).log()).sum() for k in (2, 3, 4)) / 3
    assert found == pytest.approx(by_hand.item(), rel=1e-6)


def test_only_rows_with_an_answer_and_a_short_question_are_asked(pair, tmp_path):
    from transformers import AutoTokenizer

    _, student = inputs.make_models(tmp_path / "made", True)
    rows = inputs.make_rows(3, words=4)
    rows[1]["messages"][0]["content"] = "w2 " * 99
    rows.append({"messages": rows[0]["messages"] * 2})
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)), "utf-8")
    tokenizer = AutoTokenizer.from_pretrained(student)
    found = inputs.read_rows(file, 5, 20, tokenizer)
    assert found == [rows[0], rows[2], rows[0], rows[0], rows[2]]
    with pytest.raises(ValueError, match="no row whose first question"):
        inputs.read_rows(file, 5, 2, tokenizer)


def test_a_model_that_knows_no_end_and_one_of_fewer_layers_are_otherwise_the_same(tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    _, student = inputs.make_models(tmp_path, True)
    endless, short = inputs.without_end(student, tmp_path), inputs.cut(student, 1, tmp_path)
    models = [AutoModelForCausalLM.from_pretrained(path) for path in (student, endless, short)]
    ends = [model.generation_config.eos_token_id for model in models]
    assert ends == [1, 2, 1] and AutoTokenizer.from_pretrained(endless).eos_token_id == 2
    whole, same, part = (model.state_dict() for model in models)
    assert all(torch.equal(whole[name], same[name]) for name in whole)
    assert all(torch.equal(whole[name], part[name]) for name in part)
    assert models[2].config.num_hidden_layers == 1 and len(part) < len(whole)
