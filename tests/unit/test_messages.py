"""Conversations: tools, calls, content in parts; what cannot be learnt is told with its row."""

from __future__ import annotations

import json

import pytest

from ds_kd.config.components import ConfigError
from ds_kd.config.load import load
from ds_kd.data.chat import ChatDataset, conversation_of
from tests.unit.test_data import MARKED, TEMPLATE, make_tokenizer, squad_row, swag_row, turns, write

WORDS = ("CALL", "TOOLS", "<tool>", "f", "g", '{"x":', '"y"}', "1}")
#: Renders tools, calls and their arguments as JSON, as real templates do.
CALLS = (
    "{% if tools %}TOOLS {% for t in tools %}{{ t.function.name }} {% endfor %}{% endif %}"
    "{% for m in messages %}<{{ m.role }}> {% if m.tool_calls is defined %}"
    "{% for c in m.tool_calls %}CALL {{ c.function.name }} {{ c.function.arguments | tojson }} "
    "{% endfor %}{% else %}{{ m.content }} {% endif %}<eos> {% endfor %}"
)
ASK, SAY = turns(("user", "a"), ("assistant", "b"))
CALL = {
    "role": "assistant",
    "content": None,
    "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}],
}
TOOL = {"type": "function", "function": {"name": "f"}}


def learnt(path: str, template: str = CALLS, **kwargs) -> list[str]:
    tokenizer = make_tokenizer(template, extra=WORDS)
    data = ChatDataset(path, tokenizer, **kwargs)
    return [tokenizer.decode([x for x in sample["labels"] if x != -100]) for sample in data]


def test_calls_of_tools_are_supervised_as_the_template_renders_them(tmp_path):
    answered = [ASK, CALL, {"role": "tool", "content": "c"}, SAY]
    path = write(
        tmp_path / "t.jsonl",
        [{"messages": answered, "tools": [TOOL]}, {"messages": [ASK, SAY], "tools": None}],
    )
    tokenizer = make_tokenizer(CALLS, extra=WORDS)
    data = ChatDataset(path, tokenizer)
    assert tokenizer.decode(data[0]["input_ids"]).startswith("TOOLS f <user> a <eos> <assistant>")
    assert learnt(path) == [
        '<assistant> CALL f {"x": 1} <eos> <assistant> b <eos>',
        "<assistant> b <eos>",
    ]


def test_tools_and_arguments_written_as_json_texts_are_read(tmp_path):
    arguments = {"name": "f", "arguments": '{"x": 1}'}
    call = {**CALL, "tool_calls": [{"type": "function", "function": arguments}]}
    path = write(tmp_path / "t.jsonl", [{"messages": [ASK, call], "tools": json.dumps([TOOL])}])
    assert learnt(path) == ['<assistant> CALL f {"x": 1} <eos>']


def test_keys_that_a_table_fills_with_null_are_not_there():
    filled = {**SAY, "tool_calls": None, "name": None}
    calls = [{"function": {"name": "f", "arguments": {"x": 1, "unit": None}}}]
    messages, tools = conversation_of(
        {"messages": [ASK, filled, {**CALL, "tool_calls": calls}], "tools": None}
    )
    assert messages[1] == SAY and tools is None
    assert messages[2]["tool_calls"] == [{"function": {"name": "f", "arguments": {"x": 1}}}]
    assert messages[2]["content"] == ""


@pytest.mark.parametrize("template", [MARKED, TEMPLATE])
def test_a_template_that_leaves_calls_out_is_refused(tmp_path, template):
    path = write(tmp_path / "t.jsonl", [{"messages": [ASK, SAY]}, {"messages": [ASK, CALL]}])
    with pytest.raises(ValueError, match=r"t\.jsonl.*line 2: .*leaves tool_calls out.*chat_templ"):
        learnt(path, template)


def test_parts_of_text_are_joined(tmp_path):
    parts = [{"type": "text", "text": "a "}, {"type": "text", "text": "c"}]
    talk = [{"role": "user", "content": parts}, {"role": "assistant", "content": parts}]
    path = write(tmp_path / "t.jsonl", [{"messages": [ASK, SAY]}, {"messages": talk}])
    assert learnt(path) == ["<assistant> b <eos>", "<assistant> a c <eos>"]


def test_a_role_of_ones_own_needs_a_template_of_ones_own(tmp_path):
    talk = [{"role": "d", "content": "a"}, SAY]
    path = write(tmp_path / "t.jsonl", [{"messages": talk}])
    with pytest.raises(ValueError, match=r"role is 'd'.*give chat_template"):
        learnt(path)
    assert learnt(path, chat_template=CALLS) == ["<assistant> b <eos>"]


IMAGE = {"role": "user", "content": [{"type": "image", "url": "u"}]}
BAD_TALKS = [
    ([ASK], "without an assistant turn"),
    ([], "without an assistant turn"),
    ([ASK, {"role": "assistant", "content": None}], "`role` and a `content`"),
    ([ASK, {"role": "assistant"}], "`role` and a `content`"),
    ([ASK, {"content": "b"}], "`role` and a `content`"),
    ([{"role": "human", "content": "a"}, SAY], "role is 'human'.*write user"),
    ([ASK, {"role": "gpt", "content": "a"}], "role is 'gpt'.*write assistant"),
    ([IMAGE, SAY], "content part is {'type': 'image'"),
    ([ASK, {"role": "assistant", "content": 5}], "content is 5, expected text"),
    ([ASK, {**CALL, "tool_calls": "f"}], "tool_calls is 'f'"),
    ("a: b", "messages is 'a: b', expected a list"),
]


def config(tmp_path, target: str, **section) -> list[str]:
    models = {
        part: {"pretrained_model_name_or_path": "of/hub"} for part in ("model", "teacher_model")
    }
    path = tmp_path / "c.yaml"
    path.write_text(json.dumps({**models, "dataset": {"_target_": target, **section}}))
    return [str(path)]


CHAT = "ds_kd.data.chat.ChatDataset"


@pytest.mark.parametrize("talk, said", BAD_TALKS)
def test_a_row_that_cannot_be_learnt_from_is_told_by_the_check_and_by_the_run(tmp_path, talk, said):
    path = write(tmp_path / "t.jsonl", [{"messages": [ASK, SAY]}, {"messages": talk}])
    with pytest.raises(ConfigError, match=f"path_or_dataset_id.*line 2: .*{said}"):
        load(*config(tmp_path, CHAT, path_or_dataset_id=path), [])
    with pytest.raises(ValueError, match=r"t\.jsonl.*(line 2: |JSON parse).*"):
        learnt(path)


def test_the_check_reads_arrays_and_leaves_rows_alone_that_are_not_used(tmp_path):
    rows = [{"messages": [ASK, SAY]}, {"messages": [ASK]}]
    path = tmp_path / "t.json"
    path.write_text(json.dumps(rows, indent=1))
    with pytest.raises(ConfigError, match="line 14: a conversation without"):
        load(*config(tmp_path, CHAT, path_or_dataset_id=str(path)), [])
    for unused in ({"split": "train[:1]"}, {"limit_dataset_samples": 1}):
        load(*config(tmp_path, CHAT, path_or_dataset_id=str(path), **unused), [])


@pytest.mark.parametrize(
    "target, key, row, said",
    [
        ("squad.make_squad_dataset", "dataset_name", squad_row(context=None), "context is None"),
        (
            "squad.make_squad_dataset",
            "dataset_name",
            {**squad_row(), "answers": {"text": "Paris"}},
            "answers is {'text': 'Paris'}",
        ),
        ("hellaswag.HellaSwag", "path_or_dataset", swag_row("7"), ".*names none of 4 endings"),
        (
            "hellaswag.HellaSwag",
            "path_or_dataset",
            {**swag_row("0"), "endings": "['a', 'b']"},  # a cell of CSV
            r"endings is .*, expected a list of texts",
        ),
    ],
)
def test_the_check_reads_the_first_rows_of_the_other_data_sets(tmp_path, target, key, row, said):
    good = squad_row() if "squad" in target else swag_row("0")
    path = write(tmp_path / "r.jsonl", [good, row])
    with pytest.raises(ConfigError, match=rf"dataset\.{key}: .*line 2: {said}"):
        load(*config(tmp_path, f"ds_kd.data.{target}", **{key: path}), [])
