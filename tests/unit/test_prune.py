"""Depth pruning: which layers stay, and that nothing else of the model changes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ds_kd.models import prune as pruning
from tests import tiny
from tests.scripts import LAUNCH, script

prune = script("prune")


def logits(model, tokens: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.tensor([tokens])).logits


def load(path: Path, dtype: str | torch.dtype = "auto"):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()


@pytest.mark.parametrize(
    ("keep", "total", "layers"),
    [
        # Gap (30 - 1) / (6 - 1) = 5.8: 0, 5.8, 11.6, 17.4, 23.2, 29.
        (6, 30, [0, 6, 12, 17, 23, 29]),
        # Gap 3 / 2: the half goes up.
        (3, 4, [0, 2, 3]),
        (2, 5, [0, 4]),
        (1, 5, [0]),
        (4, 4, [0, 1, 2, 3]),
    ],
)
def test_kept_layers_are_evenly_spaced_from_first_to_last(keep, total, layers):
    assert pruning.choose_layers(str(keep), total) == layers


def test_a_pruned_model_is_the_teacher_with_the_other_layers_skipped(tmp_path):
    teacher, student = tiny.llama(tmp_path / "teacher", layers=5), tmp_path / "student"
    command = ["--teacher", str(teacher), "--output", str(student), "--keep-layers", "0,2,4"]
    assert prune.main(command) == 0
    whole, pruned = load(teacher), load(student)
    assert pruned.config.num_hidden_layers == 3
    modes = {(student / name).stat().st_mode for name in ("model.safetensors", "config.json")}
    assert len(modes) == 1  # safetensors lets the owner alone read weights

    # Oracle: a layer whose two output projections are zero adds nothing to the residual stream.
    for skipped in (1, 3):
        layer = whole.model.layers[skipped]
        torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
        torch.nn.init.zeros_(layer.mlp.down_proj.weight)
    tokens = [5, 9, 33, 70, 4]
    # Adding exact zeros changes no bit, so float32 noise is all there may be.
    torch.testing.assert_close(logits(pruned, tokens), logits(whole, tokens), atol=1e-6, rtol=1e-5)
    # The cache is addressed by layer index: a stale one breaks generation, not the forward.
    generated = pruned.generate(torch.tensor([tokens]), max_new_tokens=4, min_new_tokens=4)
    assert generated.shape == (1, 9)


def test_pruning_renumbers_the_layers_of_the_model_in_memory(tmp_path):
    model = load(tiny.llama(tmp_path / "teacher", layers=5))
    pruning.prune(model, [0, 2, 4])
    assert [layer.self_attn.layer_idx for layer in model.model.layers] == [0, 1, 2]


def test_layers_that_predictions_need_least_are_dropped_for_calibration_rows(tmp_path):
    teacher = tiny.llama(tmp_path / "teacher", layers=5)
    model = load(teacher)
    for idle in (1, 3):  # leaving out a layer that adds nothing moves no prediction
        torch.nn.init.zeros_(model.model.layers[idle].self_attn.o_proj.weight)
        torch.nn.init.zeros_(model.model.layers[idle].mlp.down_proj.weight)
    model.to(torch.bfloat16).save_pretrained(teacher)
    rows = tmp_path / "rows.jsonl"
    answer = {"text": ["the answer"], "answer_start": [0]}
    row = {"context": "a context", "question": "a question", "answers": answer}
    rows.write_text(json.dumps(row) + "\n")
    command = ["--teacher", str(teacher), "--keep-layers", "3", "--calibration", str(rows)]
    assert prune.main([*command, "--output", str(tmp_path / "student")]) == 0
    # Measured in float32, written as the teacher is stored.
    pruned, tokens = load(tmp_path / "student"), [5, 9, 33, 70, 4]
    assert pruned.config.num_hidden_layers == 3 and pruned.dtype == torch.bfloat16
    torch.testing.assert_close(logits(pruned, tokens), logits(load(teacher), tokens))


@pytest.mark.parametrize("returns_tuples", [False, True])
def test_a_layer_adds_the_divergence_of_the_model_without_it(tmp_path, returns_tuples):
    model = load(tiny.llama(tmp_path / "teacher", layers=3))
    if returns_tuples:  # as layers of some classes do
        for layer in model.model.layers:
            layer.register_forward_hook(wrapped)
            layer.register_forward_pre_hook(unpacked, with_kwargs=True)
        norm = model.model.norm
        norm.register_forward_pre_hook(lambda _m, args: (args[0][0],))
    sample = {"input_ids": [5, 9, 33, 70], "labels": [-100, 33, 70, -100]}
    measured = pruning.divergences_without(model, [sample, sample])

    # Oracle: the pruned model, at the supervised positions 1 and 2.
    p = logits(load(tmp_path / "teacher"), sample["input_ids"])[0, 1:3].log_softmax(-1)
    for left_out in range(3):
        pruned = load(tmp_path / "teacher")
        pruning.prune(pruned, [i for i in range(3) if i != left_out])
        q = logits(pruned, sample["input_ids"])[0, 1:3].log_softmax(-1)
        expected = (p.exp() * (p - q)).sum(-1).mean().item()
        assert measured[left_out] == pytest.approx(expected, rel=1e-4)
    # Nothing of the measuring is left in the model.
    torch.testing.assert_close(logits(model, [5, 9]), logits(load(tmp_path / "teacher"), [5, 9]))


def wrapped(_module, _args, output):
    return output if isinstance(output, tuple) else (output, None)


def unpacked(_module, args, kwargs):
    stream, *rest = args
    return (stream[0] if isinstance(stream, tuple) else stream, *rest), kwargs


def test_first_last_and_the_most_needed_layers_stay():
    assert pruning.choose_most_needed([0.1, 0.5, 0.2, 0.9, 0.0], 3) == [0, 3, 4]


def test_calibration_rows_that_no_data_set_reads_are_a_users_error(tmp_path, capsys):
    teacher = tiny.llama(tmp_path / "teacher")
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"other": "column"}\n')
    command = ["--teacher", str(teacher), "--keep-layers", "1", "--calibration", str(rows)]
    assert prune.main([*command, "--output", str(tmp_path / "student")]) == 2
    message = capsys.readouterr().err
    assert "--calibration" in message and "columns other" in message
    assert message.strip().count("\n") == 0


def test_settings_given_per_layer_are_pruned_too(tmp_path):
    from transformers import Qwen2Config, Qwen2ForCausalLM

    kinds = ["full_attention", "sliding_attention", "full_attention", "sliding_attention"]
    config = Qwen2Config(
        vocab_size=tiny.VOCAB,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        use_sliding_window=True,
        sliding_window=2,  # shorter than the tokens below, so that a wrong kind shows
        layer_types=kinds,
    )
    Qwen2ForCausalLM(config).save_pretrained(tmp_path / "teacher")
    tiny.tokenizer(tmp_path / "teacher")
    command = ["--teacher", str(tmp_path / "teacher"), "--keep-layers", "0,1,3"]
    assert prune.main([*command, "--output", str(tmp_path / "student")]) == 0
    assert load(tmp_path / "student").config.layer_types == [kinds[i] for i in (0, 1, 3)]


def test_a_student_can_be_written_in_another_dtype(tmp_path):
    teacher = tiny.llama(tmp_path / "teacher")
    command = ["--teacher", str(teacher), "--keep-layers", "1", "--dtype", "bf16"]
    assert prune.main([*command, "--output", str(tmp_path / "student")]) == 0
    assert load(tmp_path / "student").dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("layers", "says"),
    [
        ("3", "has 2 layers"),
        ("0", "has 2 layers"),
        ("0,2", "between 0 and 1"),
        ("1,0", "must rise"),
        ("-1,1", "between 0 and 1"),
        ("half", "give a count"),
        ("1,", "give a count"),
    ],
)
def test_layers_the_model_does_not_have_are_a_users_error(tmp_path, capsys, layers, says):
    teacher = tiny.llama(tmp_path / "teacher")
    command = ["--teacher", str(teacher), "--output", str(tmp_path / "student")]
    assert prune.main([*command, f"--keep-layers={layers}"]) == 2
    message = capsys.readouterr().err
    assert says in message and message.strip().count("\n") == 0
    assert not (tmp_path / "student").exists()


def test_a_missing_or_damaged_teacher_tokenizer_or_free_output_is_a_users_error(tmp_path, capsys):
    teacher = tiny.llama(tmp_path / "teacher")
    (tmp_path / "empty").mkdir()
    bare = tiny.llama(tmp_path / "bare")
    for file in bare.glob("tokenizer*"):
        file.unlink()
    cut = tiny.llama(tmp_path / "cut")
    weights = (cut / "model.safetensors").read_bytes()
    (cut / "model.safetensors").write_bytes(weights[:-100])
    output = tmp_path / "student"
    for source, target, says in (
        (cut, output, "incomplete metadata"),
        (tmp_path / "nowhere", output, "no such directory"),
        (tmp_path / "empty", output, "no config.json"),
        (bare, output, "tokenizer"),
        (teacher, tmp_path / "empty", "exists"),
    ):
        command = ["--teacher", str(source), "--output", str(target), "--keep-layers", "1"]
        assert prune.main(command) == 2
        message = capsys.readouterr().err
        assert says in message and message.strip().count("\n") == 0
    assert not output.exists()


def test_a_teacher_whose_files_lack_a_weight_is_refused(tmp_path, capsys):
    teacher, lost = tiny.llama(tmp_path / "teacher"), "model.layers.1.mlp.down_proj.weight"
    weights = load_file(teacher / "model.safetensors")
    del weights[lost]
    save_file(weights, teacher / "model.safetensors", {"format": "pt"})
    output = tmp_path / "student"
    command = ["--teacher", str(teacher), "--output", str(output), "--keep-layers", "2"]
    assert prune.main(command) == 2
    assert lost in capsys.readouterr().err and not output.exists()


def test_a_users_directory_beside_the_output_is_left_alone(tmp_path):
    mine = tmp_path / "student.tmp" / "notes"
    mine.parent.mkdir()
    mine.write_text("mine")
    output = ["--keep-layers", "1", "--output", str(tmp_path / "student")]
    assert prune.main(["--teacher", str(tmp_path / "mistyped"), *output]) == 2
    assert prune.main(["--teacher", str(tiny.llama(tmp_path / "teacher")), *output]) == 0
    assert mine.read_text() == "mine"
    assert {path.name for path in tmp_path.iterdir()} == {"teacher", "student", "student.tmp"}


def test_two_prunings_into_one_output_leave_each_other_alone(tmp_path, monkeypatch, capsys):
    """The first to end keeps the name, and the other one is told."""
    command = ["--teacher", str(tiny.llama(tmp_path / "teacher", layers=3)), "--output"]
    command += [str(tmp_path / "student"), "--keep-layers"]
    plain, begun = pruning.verify, []

    def verify(directory, expected):
        if not begun:  # this one has written its model, and the other one begins and ends
            begun.append(directory)
            assert prune.main([*command, "1"]) == 0
        plain(directory, expected)

    monkeypatch.setattr(pruning, "verify", verify)
    assert prune.main([*command, "2"]) == 2
    assert "student exists; remove it or give another name" in capsys.readouterr().err
    assert load(tmp_path / "student").config.num_hidden_layers == 1
    assert {path.name for path in tmp_path.iterdir()} == {"teacher", "student"}


def test_a_users_error_shows_no_traceback(tmp_path):
    command = [sys.executable, str(LAUNCH / "prune.py"), "--teacher", str(tmp_path / "nowhere")]
    command += ["--keep-layers", "1", "--output", str(tmp_path / "student")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and "Traceback" not in done.stderr
