"""A teacher's answers as a data set: those of the model itself, the same again after any stop."""

from __future__ import annotations

import json

import pytest
from transformers import AutoTokenizer

from ds_kd.data.rows.detect import samples_of
from ds_kd.evaluate.tasks.encoding import Encoder
from ds_kd.models.generate import load_student
from ds_kd.models.generation.sampling import Sampling
from ds_kd.recipe.offline.answers import (
    AnswersError,
    Options,
    _make_lines,
    claim_output,
    read_prompts,
)
from tests import tiny
from tests.scripts import script
from tests.unit.test_supervised import byte_level_bpe

TEMPLATE = (
    "{% for m in messages %}w1 {{ m.content }} {% if m.role == 'assistant' %}<eos> {% endif %}"
    "{% endfor %}{% if add_generation_prompt %}w2 {% endif %}"
)
TALK = [
    {"role": "user", "content": "w5 w6"},
    {"role": "assistant", "content": "w7"},
    {"role": "user", "content": "w8 w9"},
    {"role": "assistant", "content": "w10 w11"},
]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A teacher with and without a chat template, and files of prompts."""
    root = tmp_path_factory.mktemp("answers")
    for name in ("plain", "chat"):
        tiny.llama(root / name, layers=1, hidden=32, tie=False, seed=4)
    tokenizer = AutoTokenizer.from_pretrained(root / "chat")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(root / "chat")
    prompts = [{"prompt": " ".join(f"w{(k + i) % 60}" for i in range(1 + k % 3))} for k in range(9)]
    (root / "prompts.jsonl").write_text("\n".join(map(json.dumps, prompts)))
    talks = [{"messages": TALK}, {"messages": TALK[:3]}, {"messages": TALK[:1]}]
    (root / "talks.jsonl").write_text("\n".join(map(json.dumps, talks)))
    (root / "squad.jsonl").write_text(tiny.squad_rows(4))
    return root


def generate(root, teacher, data, name, *words):
    command = ["--teacher", str(root / teacher), "--data", str(root / f"{data}.jsonl")]
    code = script("generate_data").main([*command, "--output", str(root / name), *words])
    assert code == 0
    return [json.loads(line) for line in (root / name).read_text().splitlines()]


def test_greedy_answers_are_those_of_the_model_itself_and_cut_ones_are_left_out(place, capsys):
    rows = generate(place, "plain", "prompts", "greedy.jsonl", "--max-new-tokens", "60")
    model = load_student(place / "plain")
    expected = []
    for number, line in enumerate((place / "prompts.jsonl").read_text().splitlines()):
        reply = model(json.loads(line)["prompt"], max_new_tokens=60)
        if reply.is_whole and reply.text.strip():
            expected.append(
                {**json.loads(line), "completion": reply.text, "row": number, "draw": 0}
            )
    assert rows == expected
    told = capsys.readouterr().out
    assert f"{len(rows)} answers to 9 prompts" in told
    assert len(rows) == 9 or "left out" in told


@pytest.mark.parametrize("prefixes", [(), ("<bos>",)])
def test_rows_of_plain_prompts_are_the_tokens_that_were_asked_and_written(tmp_path, prefixes):
    """White space at a prompt's end is left to the answer, which begins with its own."""
    tokenizer = byte_level_bpe(prefixes)
    whole = {
        "Response:\n": "\nParis",
        "Q: what A: ": " Paris",
        "Answer:": " the river",
        "a\n": "\n\n1",
    }
    data = tmp_path / "prompts.jsonl"
    data.write_text("\n".join(json.dumps({"prompt": prompt}) for prompt in whole))
    options = Options(str(data), tmp_path / "out.jsonl", 1, Sampling(9, 0.0), is_plain=True)
    prompts = read_prompts(options, Encoder(tokenizer))
    written = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in whole.values()]

    eos = tokenizer.eos_token_id
    records = [{"tokens": [*tokens, eos], "is_whole": True} for tokens in written]
    items = [{"row": k, "number": 0} for k in range(len(whole))]
    _, lines = _make_lines(items, prompts, records, tokenizer)
    (tmp_path / "out.jsonl").write_text("".join(lines))
    samples = samples_of(str(tmp_path / "out.jsonl"), tokenizer, None)
    for prompt, tokens, sample in zip(prompts, written, samples, strict=True):
        assert [*sample["input_ids"], sample["labels"][-1]] == [*prompt.tokens, *tokens, eos]
        assert [label for label in sample["labels"] if label != -100] == [*tokens, eos]


def test_a_file_begun_with_other_white_space_at_its_prompts_ends_goes_on(place, monkeypatch):
    from ds_kd.recipe.offline import answers

    (place / "spaced.jsonl").write_text('{"prompt": "w5 w6 \\n"}\n{"prompt": "w7"}')
    words = ["--max-new-tokens", "60", "--temperature", "2", "--samples", "4"]
    rows = generate(place, "plain", "spaced", "spaced_out.jsonl", *words)
    assert {row["prompt"] for row in rows} == {"w5 w6", "w7"}

    # Rows that hold the prompt as it was given, as they did, are written anew from its records.
    before = [{**row, "prompt": row["prompt"].replace("w6", "w6 \n")} for row in rows]
    (place / "spaced_out.jsonl").write_text("".join(json.dumps(row) + "\n" for row in before))
    monkeypatch.setattr(answers, "write", None)
    assert generate(place, "plain", "spaced", "spaced_out.jsonl", *words) == rows


def test_a_prompt_that_a_template_takes_keeps_its_white_space(place):
    (place / "spaced.jsonl").write_text('{"prompt": "w5 w6 \\n"}')
    words = ["--max-new-tokens", "60", "--temperature", "2", "--samples", "4"]
    rows = generate(place, "chat", "spaced", "spaced_chat.jsonl", *words)
    assert {row["prompt"] for row in rows} == {"w5 w6 \n"}


def test_draws_come_again_after_a_stop_and_each_is_another(place):
    words = ["--temperature", "1.5", "--samples", "3", "--max-new-tokens", "60", "--seed", "7"]
    rows = generate(place, "plain", "prompts", "drawn.jsonl", *words)
    assert len(rows) > 9 and len({row["completion"] for row in rows}) > len(rows) // 2
    # Half of what was written is lost, and a line is torn, as by a kill.
    (kept,) = (place / "drawn.samples").glob("*.jsonl")
    lines = kept.read_text().splitlines()
    kept.write_text("\n".join([*lines[: len(lines) // 2], lines[-1][:20]]))
    (place / "drawn.jsonl").unlink()
    assert generate(place, "plain", "prompts", "drawn.jsonl", *words) == rows
    assert len(kept.read_text().splitlines()) > len(lines) // 2 + 1
    words[-1] = "8"
    assert generate(place, "plain", "prompts", "other.jsonl", *words) != rows


def test_conversations_are_answered_through_the_template_and_read_again_as_data(place):
    words = ["--temperature", "2", "--max-new-tokens", "100", "--samples", "8"]
    rows = generate(place, "chat", "talks", "talked.jsonl", *words)
    befores = [TALK[:3], TALK[:3], TALK[:1]]
    assert {row["row"] for row in rows} == {0, 1, 2}
    for row in rows:
        assert row["messages"][:-1] == befores[row["row"]]
        assert row["messages"][-1]["role"] == "assistant" and row["messages"][-1]["content"]
    tokenizer = AutoTokenizer.from_pretrained(place / "chat")
    samples = samples_of(str(place / "talked.jsonl"), tokenizer, None)
    assert len(samples) == len(rows)
    answers = [[label for label in sample["labels"] if label != -100] for sample in samples]
    spoken = [tokenizer(row["messages"][-1]["content"])["input_ids"] for row in rows]
    assert all(
        text == answer[-1 - len(text) : -1] for text, answer in zip(spoken, answers, strict=True)
    )
    squad = generate(place, "chat", "squad", "squad_out.jsonl", *words)
    assert {*squad[0]} == {"context", "question", "answers", "row", "draw"}
    assert len(samples_of(str(place / "squad_out.jsonl"), tokenizer, None)) == len(squad)


def test_an_output_is_claimed_by_its_whole_name_and_until_it_is_written(tmp_path):
    one, other = ({"--teacher": [name, name], "--seed": 1} for name in "ab")
    first, twin = tmp_path / "a.jsonl", tmp_path / "a.json"
    claim_output(first, one)
    claim_output(first, other)  # nothing is there yet; the one that ends first is kept
    claim_output(first, one)
    first.write_text("{}")
    with pytest.raises(AnswersError, match="--teacher was a and is b; give another --output"):
        claim_output(first, other)
    claim_output(twin, other)
    claim_output(first, one)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--seed", "8"], "--seed was 7 and is 8"),
        (["--temperature", "1"], r"--temperature was 1\.5 and is 1\.0"),
        (["--teacher", "chat"], "--teacher was plain and is chat;"),
        (["--limit", "3"], "--limit was not given and is 3;"),
        (["--dtype", "bf16", "--plain"], "--dtype was float32 and is bfloat16, --plain was False"),
    ],
)
def test_answers_of_another_teacher_or_other_settings_are_not_replaced(
    place, words, told, capsys, monkeypatch
):
    import re

    monkeypatch.chdir(place)
    (place / "first.jsonl").write_text((place / "prompts.jsonl").read_text())
    main = script("generate_data").main
    command = ["--teacher", "plain", "--data", "first.jsonl", "--temperature", "1.5", "--seed", "7"]
    command += ["--max-new-tokens", "40", "--output", "kept.jsonl"]
    assert main(command) == 0
    before = (place / "kept.jsonl").read_bytes()
    capsys.readouterr()
    assert main([*command, *words]) == 2
    said = capsys.readouterr().err
    assert re.search(f"--output: kept.jsonl: it holds answers of other settings: {told}", said)
    assert "give another --output, or remove this one" in said
    assert (place / "kept.jsonl").read_bytes() == before

    # The same command again, and one that names the same files otherwise, are no others.
    (place / "second.jsonl").write_text((place / "prompts.jsonl").read_text())
    assert main(command) == main([*command, "--data", "second.jsonl"]) == 0
    assert (place / "kept.jsonl").read_bytes() == before


def test_a_file_that_another_program_wrote_is_not_replaced(place, capsys, monkeypatch):
    monkeypatch.chdir(place)
    (place / "own.jsonl").write_text('{"prompt": "w1"}')
    command = ["--teacher", "plain", "--data", "prompts.jsonl", "--output", "own.jsonl"]
    command += ["--max-new-tokens", "40"]
    assert script("generate_data").main(command) == 2
    assert "own.jsonl: nothing beside it tells which teacher wrote it" in capsys.readouterr().err
    assert (place / "own.jsonl").read_text() == '{"prompt": "w1"}'


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--data", "talks.jsonl"], "has no chat template for messages"),
        (["--data", "text.jsonl"], "has the columns text, expected messages or conversations or"),
        (["--data", "absent.jsonl"], "absent.jsonl"),
        (["--data", "plain/config.yaml"], "split 'train': it is not a .json"),
        (["--teacher", "nothing"], "--teacher"),
        (["--max-new-tokens", "128"], "no prompt of .* leaves room for --max-new-tokens 128"),
        (["--output", "prompts.jsonl/a.jsonl"], "--output: "),
        (["--output", "./prompts.jsonl"], "--output: prompts.jsonl: it is a file of --data"),
    ],
)
def test_a_mistake_is_told_in_a_sentence(place, words, told, capsys, monkeypatch):
    import re

    (place / "text.jsonl").write_text('{"text": "w1 w2"}')
    (place / "plain" / "config.yaml").write_text("{}")
    monkeypatch.chdir(place)
    command = ["--teacher", "plain", "--data", "prompts.jsonl", "--output", "out.jsonl", *words]
    assert script("generate_data").main(command) == 2
    assert re.search(told, capsys.readouterr().err)


def test_equal_answers_and_a_wrong_ending_are_refused_by_the_command(capsys):
    command = ["--teacher", "a", "--data", "b", "--output"]
    mistakes = ((["c.jsonl", "--samples", "2"], "are the same"), (["c"], "ends in .jsonl"))
    for more, told in mistakes:
        with pytest.raises(SystemExit) as ended:
            script("generate_data").parse([*command, *more])
        assert ended.value.code == 2 and told in capsys.readouterr().err
