"""The supervised part of a prompt and its answer, with the tokenizers that models really have."""

from __future__ import annotations

import json

import pytest

from ds_kd.data.chat import tokenize_chat, tokenize_prompt, tokenize_prompt_answer
from ds_kd.data.hellaswag import HellaSwag
from ds_kd.data.labels import shift
from ds_kd.data.squad import make_squad_dataset

ANSWERS = ["Paris", "the river", "1969", "a café", "42%", "東京"]


def byte_level_bpe(
    prefixes: tuple[str, ...] = (), eos: str | None = "<eos>", trims: bool | None = None
):
    """A byte-level BPE whose answers are single tokens that begin with a space, as in real ones.

    Args:
        trims: whether offsets leave out the spaces of tokens, as those of GPT-NeoX and OLMo do.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    special = ["<eos>", *prefixes]
    trainer = trainers.BpeTrainer(
        vocab_size=2000,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    text = [f"Context: it is Question: what Answer: {answer}" for answer in ANSWERS]
    core.train_from_iterator(text * 3, trainer)
    if prefixes:
        core.post_processor = processors.TemplateProcessing(
            single=" ".join([*prefixes, "$A"]),
            special_tokens=[(name, core.token_to_id(name)) for name in prefixes],
        )
    if trims is not None:
        core.post_processor = processors.ByteLevel(trim_offsets=trims)
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token=eos,
        extra_special_tokens=list(prefixes),
        bos_token=prefixes[0] if len(prefixes) == 1 else None,
    )


def learnt(tokenizer, prompt: str, answer: str) -> str:
    ids, mask = tokenize_prompt_answer(tokenizer, prompt, answer)
    return tokenizer.decode([i for i, m in zip(ids, mask, strict=True) if m])


def write(path, rows: list[dict]) -> str:
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return str(path)


def test_an_answer_that_takes_in_the_prompts_space_is_supervised_whole():
    tokenizer = byte_level_bpe()
    assert tokenizer.tokenize("Answer: Paris")[-1] == "ĠParis"  # the case in question
    for answer in ANSWERS:
        assert learnt(tokenizer, "Question: what Answer: ", answer).lstrip() == f"{answer}<eos>"


@pytest.mark.parametrize("trims", [False, True])
@pytest.mark.parametrize("answer", ["if Zq:\n    Zq\n        Zq", "    Zq", "Zq   ", "  Zq  Zq"])
def test_the_spaces_of_an_answer_are_supervised_whatever_offsets_leave_out(trims, answer):
    tokenizer = byte_level_bpe(trims=trims)
    assert learnt(tokenizer, "Zq:\n", answer) == f"{answer}<eos>"
    assert learnt(tokenizer, "Zq:  ", answer).lstrip() == f"{answer}<eos>".lstrip()


MARKED = (
    "{% for m in messages %}{{ m.role }}:{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}|"
    "{% endfor %}"
)


@pytest.mark.parametrize("trims", [False, True])
@pytest.mark.parametrize("said", ["Zq", " Zq", "   Zq", "Zq   ", "   "])
def test_tokens_of_what_a_template_marks_are_supervised_and_no_others(trims, said):
    tokenizer = byte_level_bpe(trims=trims)
    tokenizer.chat_template = MARKED
    turns = [("user", "it is"), ("assistant", said), ("user", "what"), ("assistant", "Paris")]
    ids, mask = tokenize_chat(tokenizer, [{"role": r, "content": c} for r, c in turns])
    assert tokenizer.decode(ids) == "".join(f"{r}:{c}|" for r, c in turns)
    text = tokenizer.decode([i for i, m in zip(ids, mask, strict=True) if m])
    assert text == (said if said.strip() else "") + "Paris"


def test_a_prompts_space_that_is_a_token_of_its_own_stays_the_prompts():
    tokenizer = byte_level_bpe()
    assert tokenizer.tokenize("Answer: Zq")[-3:] == ["Ġ", "Z", "q"]
    assert learnt(tokenizer, "Answer: ", "Zq") == "Zq<eos>"


@pytest.mark.parametrize("prefixes", [("<bos>",), ("<gmask>", "<sop>")])
def test_no_token_that_a_tokenizer_puts_in_front_is_supervised(prefixes):
    tokenizer = byte_level_bpe(prefixes)
    ids, _ = tokenize_prompt_answer(tokenizer, "Answer: ", "Paris")
    assert tokenizer.convert_ids_to_tokens(ids)[: len(prefixes)] == list(prefixes)
    assert learnt(tokenizer, "Answer: ", "Paris") == " Paris<eos>"


def test_hellaswag_with_two_tokens_in_front_supervises_the_ending_alone(tmp_path):
    tokenizer = byte_level_bpe(("<gmask>", "<sop>"))
    row = {"ctx": "it is", "endings": ["what", "Paris", ", the river"], "label": 1}
    path = write(tmp_path / "h.jsonl", [row, {**row, "label": 2}])
    for sample, text in zip(
        HellaSwag(path, tokenizer), ("it is| Paris<eos>", "it is|, the river<eos>"), strict=True
    ):
        ending = tokenizer.decode([label for label in sample["labels"] if label != -100])
        whole = tokenizer.decode([*sample["input_ids"], sample["labels"][-1]])
        assert whole.removesuffix(ending) + "|" + ending == "<gmask><sop>" + text


def test_without_an_eos_the_answer_alone_is_supervised():
    assert learnt(byte_level_bpe(eos=None), "Answer: ", "Paris") == " Paris"


def test_an_eos_that_the_tokenizer_adds_is_supervised_once():
    from transformers import ByT5Tokenizer

    tokenizer = ByT5Tokenizer()  # without offsets, and </s> after everything
    assert not tokenizer.is_fast
    ids, _ = tokenize_prompt_answer(tokenizer, "Answer: ", "Paris")
    assert ids.count(tokenizer.eos_token_id) == 1 and ids[-1] == tokenizer.eos_token_id
    # The prompt's last space is followed by the answer: it may be learnt, "Answer:" may not.
    assert learnt(tokenizer, "Answer: ", "Paris").lstrip() == "Paris</s>"


def test_a_prompt_that_goes_on_has_no_eos_that_the_tokenizer_adds():
    from transformers import ByT5Tokenizer

    tokenizer = ByT5Tokenizer()
    assert tokenizer("Answer:")["input_ids"][-1] == tokenizer.eos_token_id
    assert tokenizer.decode(tokenize_prompt(tokenizer, "Answer:")) == "Answer:"
    assert tokenize_prompt(tokenizer, "") == [tokenizer.eos_token_id]  # nothing else to go on from
    assert tokenizer.decode(tokenize_prompt(tokenizer, "Answer:</s>")).startswith("Answer:</s>")
    assert byte_level_bpe(eos=None)("it")["input_ids"] == tokenize_prompt(
        byte_level_bpe(eos=None), "it"
    )


@pytest.mark.parametrize("answer", ["", "  "])
def test_an_empty_answer_supervises_nothing(answer):
    ids, mask = tokenize_prompt_answer(byte_level_bpe(), "Answer: ", answer)
    assert ids and not any(mask)


def test_every_squad_row_of_a_base_model_supervises_its_answer(tmp_path):
    tokenizer = byte_level_bpe()
    rows = [
        {"context": "it is", "question": "what", "answers": {"text": [answer]}}
        for answer in ANSWERS
    ]
    data = make_squad_dataset(tokenizer, dataset_name=write(tmp_path / "q.jsonl", rows))
    found = [tokenizer.decode([x for x in s["labels"] if x != -100]).strip() for s in data]
    assert found == [f"{answer}<eos>" for answer in ANSWERS]
    # The text is read, and the part that follows it is learnt.
    for sample in data:
        for i, label in enumerate(sample["labels"][:-1]):
            assert label in (-100, sample["input_ids"][i + 1])


def test_a_cut_sample_loses_its_end_and_eos_first():
    ids, mask = tokenize_prompt_answer(byte_level_bpe(), "Answer: ", "Paris the river")
    whole, cut = shift(ids, mask), shift(ids, mask, len(ids) - 2)
    assert cut["labels"] == whole["labels"][:-1]
