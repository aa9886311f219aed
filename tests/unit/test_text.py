"""Rows as people have them: prompts and completions, plain text, ShareGPT."""

from __future__ import annotations

import json

import pytest

from ds_kd.config.components import ConfigError
from ds_kd.config.load import load
from ds_kd.data.text import make_instruction_dataset, make_sharegpt_dataset, make_text_dataset
from tests.unit.test_data import TEMPLATE, make_tokenizer, write
from tests.unit.test_supervised import byte_level_bpe


def read(data, tokenizer) -> list[tuple[str, str]]:
    """(what is read, what is learnt) of every sample."""
    return [
        (
            tokenizer.decode(sample["input_ids"]),
            tokenizer.decode([x for x in sample["labels"] if x != -100]),
        )
        for sample in data
    ]


@pytest.mark.parametrize("prompt, completion", [("it is", "Paris"), ("it is ", "Paris"),
                                                ("it is", " Paris")])  # fmt: skip
def test_a_prompt_and_its_completion_have_one_space_between(tmp_path, prompt, completion):
    tokenizer = byte_level_bpe()
    path = write(tmp_path / "p.jsonl", [{"prompt": prompt, "completion": completion}])
    data = make_instruction_dataset(path, tokenizer)
    assert read(data, tokenizer) == [("it is Paris", " Paris<eos>")]


def test_columns_are_mapped_and_a_context_may_be_missing(tmp_path):
    tokenizer = byte_level_bpe()
    rows = [{"c": "it is", "q": "what", "a": "Paris"}, {"c": None, "q": "what", "a": "1969"}]
    path = write(tmp_path / "p.jsonl", rows)
    mapping = {"answer": "a", "question": "q", "context": "c"}
    data = make_instruction_dataset(path, tokenizer, mapping)
    assert read(data, tokenizer) == [
        ("it is what Paris", " Paris<eos>"),
        ("what 1969", " 1969<eos>"),
    ]
    data = make_instruction_dataset(path, tokenizer, mapping, answer_only_loss_mask=False)
    assert all(-100 not in sample["labels"] for sample in data)


def test_with_a_template_context_question_and_answer_are_turns(tmp_path):
    tokenizer = make_tokenizer(TEMPLATE)
    path = write(tmp_path / "p.jsonl", [{"c": "a", "q": "b", "a": "c"}])
    data = make_instruction_dataset(
        path, tokenizer, {"context": "c", "question": "q", "answer": "a"}
    )
    assert read(data, tokenizer) == [
        ("<system> a <eos> <user> b <eos> <assistant> c", "<assistant> c <eos>")
    ]


def test_every_token_of_plain_text_is_supervised(tmp_path):
    tokenizer = byte_level_bpe(("<bos>",))
    path = write(tmp_path / "t.jsonl", [{"body": "it is Paris"}])
    data = make_text_dataset(path, tokenizer, column="body")
    assert read(data, tokenizer) == [("<bos>it is Paris", "it is Paris<eos>")]
    cut = make_text_dataset(path, tokenizer, column="body", seq_length=2, truncation=True)
    assert len(cut[0]["input_ids"]) == len(cut[0]["labels"]) == 2


def test_sharegpts_words_are_read(tmp_path):
    tokenizer = make_tokenizer(TEMPLATE)
    talk = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    path = write(tmp_path / "s.jsonl", [{"conversations": talk}])
    data = make_sharegpt_dataset(path, tokenizer)
    assert read(data, tokenizer) == [("<user> a <eos> <assistant> b", "<assistant> b <eos>")]


@pytest.mark.parametrize(
    "make, row, kwargs, said",
    [
        (
            make_instruction_dataset,
            {"prompt": "a", "completion": None},
            {},
            "line 1: completion is",
        ),
        (make_instruction_dataset, {"prompt": "a"}, {}, "no column completion"),
        (make_instruction_dataset, {"a": "a"}, {"column_mapping": {"answer": "a"}}, "give answer"),
        (make_text_dataset, {"text": 5}, {}, "line 1: text is 5"),
        (make_text_dataset, {"text": "a"}, {"truncation": True}, "truncation needs seq_length"),
    ],
)
def test_files_that_cannot_be_read_are_named(tmp_path, make, row, kwargs, said):
    path = write(tmp_path / "r.jsonl", [row])
    with pytest.raises(ValueError, match=said):
        make(path, make_tokenizer(), **kwargs)


NEMO = (
    "nemo_automodel.components.datasets.llm.column_mapped_text_instruction_dataset."
    "ColumnMappedTextInstructionDataset"
)


def test_nemos_column_mapped_data_set_is_known_to_the_check(tmp_path):
    rows = write(tmp_path / "r.jsonl", [{"q": "a", "a": "b"}])
    section = {
        "_target_": NEMO,
        "path_or_dataset_id": rows,
        "split": "train",
        "column_mapping": {"question": "q", "answer": "a"},
        "answer_only_loss_mask": True,
        "start_of_turn_token": "<|assistant|>",
    }
    models = {n: {"pretrained_model_name_or_path": "of/hub"} for n in ("model", "teacher_model")}
    path = tmp_path / "c.yaml"
    path.write_text(json.dumps({**models, "dataset": section}))
    assert load(path, []).dataset.name == "ds_kd.data.text.make_instruction_dataset"
    # A mistake in the mapping is told under its own key, with the columns that there are.
    for wrong, said in (
        (".answer=answer", r"got .*'answer': 'answer'.*, expected columns of .*first row has q, a"),
        ("={prompt: q}", "got {'prompt': 'q'}, expected .*give answer, and context or question"),
    ):
        with pytest.raises(ConfigError, match=rf"dataset\.column_mapping: {said}"):
            load(path, [f"dataset.column_mapping{wrong}"])
    with pytest.raises(ConfigError, match=r"_id: .*has q, a; dataset\.column_mapping names others"):
        load(path, ["dataset.column_mapping=null"])
    # One of two names of the rows may be dropped; two are too many, and none is too few.
    renamed = ["dataset.path_or_dataset_id=null", f"dataset.dataset_name={rows}"]
    assert load(path, renamed).dataset.kwargs["path_or_dataset_id"] == rows
    assert load(path, ["dataset.dataset_name=null"]).dataset.kwargs["path_or_dataset_id"] == rows
    with pytest.raises(ConfigError, match="are both given"):
        load(path, renamed[1:])
    with pytest.raises(ConfigError, match=r"dataset\.dataset_name: missing"):
        load(path, renamed[:1])
    talk = {"conversations": [{"from": "human", "value": "a"}]}
    other = write(tmp_path / "s.jsonl", [talk])
    section = f"{{_target_: ds_kd.data.text.make_sharegpt_dataset, dataset_name: {other}}}"
    path.write_text("".join(f"{n}: {json.dumps(v)}\n" for n, v in models.items()) +
                    f"dataset: {section}\n")  # fmt: skip
    with pytest.raises(ConfigError, match="line 1: a conversation without an assistant turn"):
        load(path, [])
