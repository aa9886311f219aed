"""Data: what is supervised, what a batch holds, who sees which sample when."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ds_kd.data.chat import ChatDataset, tokenize_chat, tokenize_prompt_answer, with_template
from ds_kd.data.collate import default_collater
from ds_kd.data.hellaswag import HellaSwag
from ds_kd.data.labels import shift
from ds_kd.data.rows.source import load_rows
from ds_kd.data.sampler import FILLER, GlobalBatchSampler, WithFiller
from ds_kd.data.squad import make_squad_dataset

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
needs_real_rows = pytest.mark.skipif(not SHARED.is_dir(), reason=f"no real rows at {SHARED}")

# Every turn is `<role> content <eos>`: three tokens around one word, so masks can be counted by
# hand.
TEMPLATE = "{% for m in messages %}<{{ m.role }}> {{ m.content }} <eos> {% endfor %}"
MARKED = (
    "{% for m in messages %}<{{ m.role }}> {% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }} <eos>"
    "{% endgeneration %} {% else %}{{ m.content }} <eos> {% endif %}{% endfor %}"
)
WORDS = ["<unk>", "<bos>", "<eos>", "<system>", "<user>", "<assistant>", "a", "b", "c", "d"]
UNK, BOS, EOS, SYSTEM, USER, ASSISTANT, A, B, C, D = range(len(WORDS))


def make_tokenizer(template: str | None = None, bos: bool = False, extra: tuple[str, ...] = ()):
    """One token per word; padding *is* EOS."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(
        models.WordLevel({w: i for i, w in enumerate([*WORDS, *extra])}, unk_token="<unk>")
    )
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if bos:
        core.post_processor = processors.TemplateProcessing(
            single="<bos> $A", special_tokens=[("<bos>", BOS)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        unk_token="<unk>",
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<eos>",
        chat_template=template,
    )


def real_text_tokenizer(template: str | None = None, bos: bool = False):
    """A byte-level BPE learnt from shared rows: any text comes back, spaces merge rightwards."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<bos>", "<eos>", "<system>", "<user>", "<assistant>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator([r["context"] for r in read("squad_validation.jsonl")[:40]], trainer)
    if bos:
        core.post_processor = processors.TemplateProcessing(
            single="<bos> $A", special_tokens=[("<bos>", 0)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<eos>",
        chat_template=template,
    )


def read(name: str) -> list[dict]:
    return [json.loads(line) for line in (SHARED / name).read_text().splitlines()]


def write(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def turns(*pairs: tuple[str, str]) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in pairs]


def supervised(sample: dict) -> list[int]:
    return [label for label in sample["labels"] if label != -100]


def squad_row(context="a", question="b", texts=("c",), **more) -> dict:
    return {
        "context": context,
        "question": question,
        "answers": {"text": list(texts), "answer_start": [0]},
        **more,
    }


# ---- the one label shift


def test_position_i_predicts_token_i_plus_1_where_that_token_is_supervised():
    # tokens 10 11 12 13, the last two supervised: position 1 predicts 12, position 2 predicts 13.
    assert shift([10, 11, 12, 13], [False, False, True, True]) == {
        "input_ids": [10, 11, 12],
        "labels": [-100, 12, 13],
    }


def test_the_cut_counts_positions_after_the_shift():
    assert shift([10, 11, 12, 13], [False, False, True, True], seq_length=2) == {
        "input_ids": [10, 11],
        "labels": [-100, 12],
    }


# ---- plain form


def test_plain_form_supervises_the_answer_and_eos_after_it():
    assert tokenize_prompt_answer(make_tokenizer(), "a b", " c d") == (
        [A, B, C, D, EOS],
        [False, False, True, True, True],
    )


def test_a_bos_that_the_tokenizer_adds_belongs_to_the_prompt():
    ids, mask = tokenize_prompt_answer(make_tokenizer(bos=True), "a b", " c")
    assert (ids, mask) == ([BOS, A, B, C, EOS], [False, False, False, True, True])


def test_a_bos_written_in_the_prompt_is_counted_once():
    ids, mask = tokenize_prompt_answer(make_tokenizer(), "<bos> a", " c")
    assert (ids, mask) == ([BOS, A, C, EOS], [False, False, True, True])


# ---- chat form


def test_without_marks_an_assistant_turn_is_supervised_with_its_header_and_closing_token():
    ids, mask = tokenize_chat(make_tokenizer(TEMPLATE), turns(("user", "a"), ("assistant", "b")))
    assert ids == [USER, A, EOS, ASSISTANT, B, EOS]
    assert mask == [False] * 3 + [True] * 3


def test_generation_marks_of_the_template_decide_where_it_has_them():
    ids, mask = tokenize_chat(make_tokenizer(MARKED), turns(("user", "a"), ("assistant", "b")))
    assert ids == [USER, A, EOS, ASSISTANT, B, EOS]
    assert mask == [False] * 4 + [True] * 2  # the header lies outside the mark


@pytest.mark.parametrize("template, each", [(TEMPLATE, 3), (MARKED, 2)])
def test_every_assistant_turn_of_a_long_conversation_is_supervised(template, each):
    talk = turns(
        ("system", "d"), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")
    )
    _, mask = tokenize_chat(make_tokenizer(template), talk)
    quiet = 3 - each
    assert mask == [False] * (6 + quiet) + [True] * each + [False] * (3 + quiet) + [True] * each


def test_the_real_eos_stays_trainable_although_it_is_also_the_padding_token():
    tokenizer = make_tokenizer(TEMPLATE)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == EOS
    sample = shift(*tokenize_chat(tokenizer, turns(("user", "a"), ("assistant", "b"))))
    assert sample["input_ids"] == [USER, A, EOS, ASSISTANT, B]
    assert sample["labels"] == [-100, -100, ASSISTANT, B, EOS]
    longer = {"input_ids": [A] * 7, "labels": [A] * 7, "sample_id": "long"}
    batch = default_collater([{**sample, "sample_id": "short"}, longer], pad_token_id=EOS)
    assert batch["labels"][0].tolist() == [-100, -100, ASSISTANT, B, EOS, -100, -100]


def test_a_template_that_rewrites_earlier_turns_is_refused_with_the_remedy():
    # drops assistant turns that are not the last, as reasoning templates drop earlier thoughts
    rewriting = (
        "{% for m in messages %}{% if loop.last or m.role != 'assistant' %}"
        "<{{ m.role }}> {{ m.content }} <eos> {% endif %}{% endfor %}"
    )
    talk = turns(("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))
    with pytest.raises(ValueError, match=r"first 2 messages.*\{% generation %\}"):
        tokenize_chat(make_tokenizer(rewriting), talk)


@pytest.mark.parametrize(
    "talk, said",
    [
        (turns(("user", "a")), "without an assistant turn"),
        ([{"role": "user"}, {"role": "assistant", "content": "b"}], "`role` and a `content`"),
        (turns(("system", "a"), ("assistant", "b")), "no system turns here"),
    ],
)
def test_a_conversation_that_cannot_be_used_is_named_with_its_row(tmp_path, talk, said):
    refusing = (
        "{% if messages[0].role == 'system' %}"
        "{{ raise_exception('no system turns here') }}{% endif %}" + TEMPLATE
    )
    good = turns(("user", "a"), ("assistant", "b"))
    path = write(tmp_path / "talks.jsonl", [{"messages": good}, {"messages": talk}])
    with pytest.raises(ValueError, match=f"talks.jsonl.*line 2.*{said}"):
        ChatDataset(path, make_tokenizer(refusing))


def test_chat_dataset_cuts_and_limits_and_names_its_samples(tmp_path):
    talk = turns(("user", "a"), ("assistant", "b"))
    path = write(tmp_path / "talks.jsonl", [{"messages": talk, "id": f"talk{i}"} for i in range(3)])
    data = ChatDataset(
        path, make_tokenizer(TEMPLATE), seq_length=4, truncation=True, limit_dataset_samples=2
    )
    assert len(data) == 2
    assert data[1] == {
        "input_ids": [USER, A, EOS, ASSISTANT],
        "labels": [-100, -100, ASSISTANT, B],
        "sample_id": "talk1",
    }


def test_chat_dataset_needs_a_template(tmp_path):
    path = write(tmp_path / "talks.jsonl", [{"messages": turns(("assistant", "b"))}])
    with pytest.raises(ValueError, match="no chat template; give chat_template"):
        ChatDataset(path, make_tokenizer())


def test_a_template_is_text_or_a_file_and_a_mistyped_file_is_not_taken_for_text(tmp_path):
    (tmp_path / "chat.jinja").write_text(MARKED)
    for given, expected in (
        (TEMPLATE, TEMPLATE),
        (str(tmp_path / "chat.jinja"), MARKED),
        (None, None),
    ):
        tokenizer = make_tokenizer()
        assert with_template(tokenizer, given).chat_template == expected
        assert tokenizer.chat_template is None
    with pytest.raises(ValueError, match=r"chta\.jinja.*neither a file nor Jinja"):
        with_template(make_tokenizer(), str(tmp_path / "chta.jinja"))


# ---- SQuAD

SQUAD_WORDS = ("Context:", "Question:", "Answer:")
CONTEXT, QUESTION, ANSWER = range(len(WORDS), len(WORDS) + 3)


def test_squad_prompt_and_answer_in_plain_form(tmp_path):
    path = write(tmp_path / "q.jsonl", [squad_row(texts=["  c d ", "d"], id="x7")])
    data = make_squad_dataset(make_tokenizer(bos=True, extra=SQUAD_WORDS), dataset_name=path)
    # <bos> Context: a Question: b Answer: | c d : the first answer, stripped
    assert data[0] == {
        "input_ids": [BOS, CONTEXT, A, QUESTION, B, ANSWER, C, D],
        "labels": [-100] * 5 + [C, D, EOS],
        "sample_id": "x7",
    }


def test_squad_prompt_and_answer_in_chat_form(tmp_path):
    path = write(tmp_path / "q.jsonl", [squad_row()])
    data = make_squad_dataset(
        make_tokenizer(extra=SQUAD_WORDS), dataset_name=path, chat_template=TEMPLATE
    )
    assert data[0] == {
        "input_ids": [USER, CONTEXT, A, QUESTION, B, ANSWER, EOS, ASSISTANT, C],
        "labels": [-100] * 6 + [ASSISTANT, C, EOS],
        "sample_id": "0",
    }


def test_the_answer_is_stripped(tmp_path):
    path = write(tmp_path / "q.jsonl", [squad_row(texts=["  c "])])
    tells = (
        "{% for m in messages %}{{ 'd' if m.role == 'assistant' and m.content != 'c' else 'a' }} "
    )
    data = make_squad_dataset(
        make_tokenizer(), dataset_name=path, chat_template=tells + "{% endfor %}"
    )
    assert supervised(data[0]) == [A]  # the template saw exactly "c"


def test_a_question_without_an_answer_supervises_nothing_and_is_kept(tmp_path):
    path = write(tmp_path / "q.jsonl", [squad_row(), squad_row(texts=[])])
    data = make_squad_dataset(make_tokenizer(extra=SQUAD_WORDS), dataset_name=path)
    assert len(data) == 2
    assert data[1]["input_ids"] == [CONTEXT, A, QUESTION, B]
    assert supervised(data[1]) == []


def test_truncation_cuts_to_seq_length_and_keeps_samples_that_lose_every_label(tmp_path):
    path = write(tmp_path / "q.jsonl", [squad_row()])
    data = make_squad_dataset(
        make_tokenizer(extra=SQUAD_WORDS), dataset_name=path, seq_length=3, truncation=True
    )
    assert data[0]["input_ids"] == [CONTEXT, A, QUESTION]
    assert data[0]["labels"] == [-100] * 3


@pytest.mark.parametrize("padding", [False, None, "do_not_pad", "longest", True])
def test_every_padding_but_max_length_is_left_to_the_collater(tmp_path, padding):
    path = write(tmp_path / "q.jsonl", [squad_row()])
    data = make_squad_dataset(
        make_tokenizer(extra=SQUAD_WORDS), dataset_name=path, seq_length=9, padding=padding
    )
    assert len(data[0]["input_ids"]) == 6


def test_padding_to_max_length_adds_no_label_and_no_real_token(tmp_path):
    path = write(tmp_path / "q.jsonl", [squad_row()])
    data = make_squad_dataset(
        make_tokenizer(extra=SQUAD_WORDS), dataset_name=path, seq_length=9, padding="max_length"
    )
    assert data[0]["input_ids"] == [CONTEXT, A, QUESTION, B, ANSWER, C] + [EOS] * 3
    assert data[0]["labels"] == [-100] * 4 + [C, EOS] + [-100] * 3
    batch = default_collater([data[0]])
    assert (batch["num_tokens"], batch["num_labels"]) == (6, 2)


@pytest.mark.parametrize(
    "wrong, said",
    [
        ({"fp8": True}, "fp8"),
        ({"truncation": True}, "seq_length"),
        ({"padding": "max_length"}, "seq_length"),
    ],
)
def test_squad_refuses_what_it_cannot_do(tmp_path, wrong, said):
    path = write(tmp_path / "q.jsonl", [squad_row()])
    with pytest.raises(ValueError, match=said):
        make_squad_dataset(make_tokenizer(), dataset_name=path, **wrong)


@needs_real_rows
@pytest.mark.parametrize("bos", [False, True])
def test_real_squad_rows_in_plain_form_supervise_the_whole_answer_and_eos(bos):
    tokenizer = real_text_tokenizer(bos=bos)
    data = make_squad_dataset(
        tokenizer, dataset_name=str(SHARED / "squad_validation.jsonl"), limit_dataset_samples=50
    )
    for sample, row in zip(data, read("squad_validation.jsonl"), strict=False):
        answer = row["answers"]["text"][0].strip()
        # A token may hold the prompt's last space besides.
        assert tokenizer.decode(supervised(sample)) in (f"{answer}<eos>", f" {answer}<eos>")
        assert sample["sample_id"] == row["id"]
        whole = f"Context: {row['context']} Question: {row['question']} Answer: {answer}"
        assert tokenizer.decode(sample["input_ids"], skip_special_tokens=True) == whole


@needs_real_rows
def test_real_squad_rows_in_chat_form_supervise_the_assistants_turn():
    tokenizer = real_text_tokenizer(
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}<eos>{% endfor %}"
    )
    data = make_squad_dataset(
        tokenizer, dataset_name=str(SHARED / "squad_validation.jsonl"), split="validation[:50]"
    )
    assert len(data) == 50
    for sample, row in zip(data, read("squad_validation.jsonl"), strict=False):
        assert (
            tokenizer.decode(supervised(sample))
            == f"<assistant>{row['answers']['text'][0].strip()}<eos>"
        )


# ---- HellaSwag


def swag_row(label, **more) -> dict:
    return {"ctx": "a b", "endings": ["a", "b", "c d", "d"], "label": label, **more}


@pytest.mark.parametrize("label", ["2", 2])
@pytest.mark.parametrize("bos", [False, True])
def test_hellaswag_supervises_the_right_ending_without_the_endings_bos(tmp_path, label, bos):
    path = write(tmp_path / "h.jsonl", [swag_row(label, ind=41)])
    first = [BOS] if bos else []
    assert HellaSwag(path, make_tokenizer(bos=bos))[0] == {
        "input_ids": [*first, A, B, C, D],
        "labels": [-100] * (1 + bos) + [C, D, EOS],
        "sample_id": "41",
    }


@pytest.mark.parametrize("label", ["4", "-1", "", None])
def test_a_label_that_names_no_ending_is_refused_with_its_row(tmp_path, label):
    path = write(tmp_path / "h.jsonl", [swag_row("0"), swag_row(label)])
    with pytest.raises(ValueError, match=r"h\.jsonl.*line 2.*none of 4 endings"):
        HellaSwag(path, make_tokenizer())


def test_hellaswag_runs_no_foreign_code():
    with pytest.raises(ValueError, match="trust_remote_code"):
        HellaSwag("anything", make_tokenizer(), trust_remote_code=True)


@needs_real_rows
def test_real_hellaswag_rows_supervise_the_gold_ending():
    tokenizer = real_text_tokenizer(bos=True)
    data = HellaSwag(
        str(SHARED / "hellaswag_validation.jsonl"),
        tokenizer,
        split="validation",
        num_samples_limit=64,
    )
    assert len(data) == 64
    for sample, row in zip(data, read("hellaswag_validation.jsonl"), strict=False):
        ending = row["endings"][int(row["label"])]
        assert tokenizer.decode(supervised(sample)) in (f"{ending}<eos>", f" {ending}<eos>")
        assert sample["sample_id"] == str(row["ind"])
        assert sample["input_ids"].count(tokenizer.bos_token_id) == 1


# ---- collater

SHORT = {"input_ids": [5, 6], "labels": [-100, 7], "sample_id": "s"}
LONG = {"input_ids": [1, 2, 3], "labels": [2, -100, 4], "sample_id": 9}


def test_a_batch_is_padded_right_and_lists_its_supervised_positions():
    batch = default_collater([SHORT, LONG], pad_token_id=8)
    assert batch["input_ids"].tolist() == [[5, 6, 8], [1, 2, 3]]
    assert batch["labels"].tolist() == [[-100, 7, -100], [2, -100, 4]]
    # flat positions, three a row: (0, 1) → 1, (1, 0) → 3, (1, 2) → 5
    assert batch["supervised"].tolist() == [1, 3, 5]
    assert batch["supervised_labels"].tolist() == [7, 2, 4]
    assert (batch["num_labels"], batch["num_tokens"]) == (3, 5)
    assert batch["sample_ids"] == ["s", "9"]
    assert {
        str(batch[k].dtype) for k in ("input_ids", "labels", "supervised", "supervised_labels")
    } == {"torch.int64"}


@pytest.mark.parametrize("divisible, length", [(None, 3), (1, 3), (3, 3), (4, 4), (8, 8)])
def test_the_padded_length_is_rounded_up(divisible, length):
    assert default_collater([SHORT, LONG], pad_seq_len_divisible=divisible)["labels"].shape == (
        2,
        length,
    )


def test_a_filler_adds_neither_label_nor_token_nor_id():
    batch = default_collater([WithFiller([SHORT])[FILLER]])
    assert batch["input_ids"].shape == (1, 1)
    assert (batch["num_labels"], batch["num_tokens"], batch["sample_ids"]) == (0, 0, [])
    assert batch["supervised"].numel() == batch["supervised_labels"].numel() == 0


# ---- sampler


def global_batches(
    samples: int, size: int, local: int, world: int, epoch: int = 0, **kwargs
) -> list[list[int]]:
    """Return what all ranks together see, step by step; checks that the ranks run in step."""
    ranks = [
        GlobalBatchSampler(samples, size, local, rank, world, **kwargs) for rank in range(world)
    ]
    for sampler in ranks:
        sampler.seek(epoch, 0)
    seen = [list(sampler) for sampler in ranks]
    assert {len(micro_batches) for micro_batches in seen} == {len(ranks[0])}
    steps, at = [], 0
    for step in range(ranks[0].steps_per_epoch):
        count = ranks[0].micro_batches(step)
        rows = [seen[rank][at + m] for m in range(count) for rank in range(world)]
        assert all(1 <= len(row) <= local for row in rows)
        steps.append([i for row in rows for i in row if i != FILLER])
        at += count
    assert at == len(ranks[0])
    return steps


SPLITS = [(1, 12), (1, 4), (1, 1), (2, 6), (2, 3), (2, 1), (3, 4), (3, 2), (3, 1), (4, 3), (4, 1)]


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("world, local", SPLITS)
def test_the_global_order_does_not_depend_on_how_it_is_cut(world, local, shuffle):
    # 29 = 2·12 + 5: the last global batch is partial
    one = global_batches(29, 12, 12, 1, epoch=3, shuffle=shuffle, seed=7)
    cut = global_batches(29, 12, local, world, epoch=3, shuffle=shuffle, seed=7)
    assert cut == one
    assert [len(step) for step in cut] == [12, 12, 5]
    assert sorted(i for step in cut for i in step) == list(range(29))


def test_shuffling_changes_with_epoch_and_seed_and_repeats_for_the_same():
    def order(epoch: int, seed: int) -> list[list[int]]:
        return global_batches(40, 8, 2, 2, epoch, shuffle=True, seed=seed)

    assert order(0, 1) == order(0, 1)
    assert len({str(order(epoch, seed)) for epoch, seed in ((0, 1), (1, 1), (0, 5), (9, 5))}) == 4


def test_ranks_without_a_sample_left_get_a_filler():
    # 5 samples, G 4, L 1, 4 ranks: the second step has the sample 4 for rank 0 and nothing for the
    # others
    seen = [list(GlobalBatchSampler(5, 4, 1, rank, 4)) for rank in range(4)]
    assert seen == [[[0], [4]], [[1], [FILLER]], [[2], [FILLER]], [[3], [FILLER]]]


def test_a_partial_global_batch_has_no_more_micro_batches_than_it_needs():
    # G 8 of L 2 on one rank: 4 micro-batches a step; 3 samples left need 2
    sampler = GlobalBatchSampler(11, 8, 2, 0, 1)
    assert [sampler.micro_batches(step) for step in range(sampler.steps_per_epoch)] == [4, 2]
    assert list(sampler)[-2:] == [[8, 9], [10]]


def test_drop_last_leaves_the_partial_global_batch_out():
    assert global_batches(11, 4, 2, 2, drop_last=True) == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_evaluation_covers_every_sample_once():
    steps = global_batches(10, 2 * 3, 2, 3)
    assert [i for step in steps for i in step] == list(range(10))


@pytest.mark.parametrize("step", [0, 1, 2])
def test_seek_equals_skipping(step):
    def sampler() -> GlobalBatchSampler:
        return GlobalBatchSampler(23, 8, 2, 1, 2, shuffle=True, seed=3)

    whole = sampler()
    whole.seek(2, 0)
    skipped = sum(whole.micro_batches(s) for s in range(step))
    there = sampler()
    there.seek(2, step)
    assert list(there) == list(whole)[skipped:]
    assert len(there) == len(whole) == 6  # a whole epoch, wherever it starts


def test_seek_leaves_an_iterator_alone_that_exists_already():
    sampler = GlobalBatchSampler(8, 2, 2, 0, 1)
    batches = iter(sampler)
    sampler.seek(0, 3)
    assert next(batches) == [0, 1]


@pytest.mark.parametrize(
    "numbers, said",
    [
        ((0, 4, 2, 0, 2), "0 samples.*4"),
        ((9, 6, 2, 0, 2), "global_batch_size 6.*local_batch_size 2.*2 ranks"),
        ((9, 4, 0, 0, 2), "local_batch_size 0"),
        ((9, 0, 2, 0, 2), "global_batch_size 0"),
    ],
)
def test_numbers_that_do_not_fit_are_named(numbers, said):
    with pytest.raises(ValueError, match=said):
        GlobalBatchSampler(*numbers)


def test_drop_last_with_less_than_one_global_batch_is_refused():
    with pytest.raises(ValueError, match="3 samples make no global batch of 4"):
        GlobalBatchSampler(3, 4, 2, 0, 2, drop_last=True)


@pytest.mark.parametrize("workers", [0, 2])
def test_the_stateful_data_loader_follows_the_sampler_and_its_seek(workers):
    from torchdata.stateful_dataloader import StatefulDataLoader

    data = [{"input_ids": [i], "labels": [i], "sample_id": str(i)} for i in range(13)]
    sampler = GlobalBatchSampler(13, 8, 2, 1, 2, shuffle=True, seed=1)
    loader = StatefulDataLoader(
        WithFiller(data), batch_sampler=sampler, collate_fn=default_collater, num_workers=workers
    )

    def expected(epoch: int, step: int) -> list[list[str]]:
        sampler.seek(epoch, step)
        return [[str(i) for i in indices if i != FILLER] for indices in sampler]

    def loaded(epoch: int, step: int, most: int | None = None) -> list[list[str]]:
        sampler.seek(epoch, step)
        batches = iter(loader)
        return (
            [next(batches)["sample_ids"] for _ in range(most)]
            if most
            else [b["sample_ids"] for b in batches]
        )

    assert len(loader) == 4
    assert loaded(0, 0) == expected(0, 0)
    assert loaded(0, 0, most=2) == expected(0, 0)[:2]  # left in the middle, as by max_steps
    assert loaded(1, 1) == expected(1, 1)
    assert loaded(1, 0) == expected(1, 0) != expected(0, 0)


# ---- where rows come from

TEN = [{"n": i} for i in range(10)]


def numbers(source, split="train", limit=None) -> list[int]:
    return list(load_rows(str(source), split, ("n",), limit)["n"])


def sources(tmp_path: Path) -> dict[str, Path]:
    """The same ten rows in every form that is read."""
    import datasets

    made = datasets.Dataset.from_list(TEN)
    (tmp_path / "splits").mkdir()
    paths = {
        "jsonl": tmp_path / "ten.jsonl",
        "json": tmp_path / "ten.json",
        "parquet": tmp_path / "ten.parquet",
        "saved": tmp_path / "saved",
        "saved splits": tmp_path / "saved_splits",
        "directory": tmp_path / "splits",
    }
    write(paths["jsonl"], TEN)
    paths["json"].write_text(json.dumps(TEN))
    made.to_parquet(str(paths["parquet"]))
    made.save_to_disk(str(paths["saved"]))
    datasets.DatasetDict(train=made).save_to_disk(str(paths["saved splits"]))
    write(paths["directory"] / "train.jsonl", TEN)
    return paths


def test_every_form_serves_splits_slices_and_limits(tmp_path):
    for form, path in sources(tmp_path).items():
        assert numbers(path) == list(range(10)), form
        assert numbers(path, "train[:3]") == [0, 1, 2], form
        assert numbers(path, "train[80%:]") == [8, 9], form
        assert numbers(path, "train[2:]", limit=2) == [2, 3], form
        assert numbers(path, limit=99) == list(range(10)), form


def test_a_single_file_serves_whatever_split_is_named(tmp_path):
    path = write(tmp_path / "ten.jsonl", TEN)
    assert numbers(path, "validation") == numbers(path, "anything") == list(range(10))


def test_an_unknown_split_is_refused_with_those_there_are(tmp_path):
    paths = sources(tmp_path)
    for form in ("directory", "saved splits"):
        with pytest.raises(ValueError, match=r"split 'test'.*\['train'\]"):
            numbers(paths[form], "test")


def test_content_that_cannot_be_read_is_named_with_what_is_wrong(tmp_path):
    cases = {
        "bad.jsonl": ('{"n": 1}\n{"n": \n', "line 2: not JSON"),
        "bad.json": ("not json", "line 1: not JSON"),
        "bad.parquet": ("no", "Parquet"),
        "empty.jsonl": ("", "no rows"),
        "blank.jsonl": ("\n\n", "no rows"),
    }
    for name, (text, said) in cases.items():
        (tmp_path / name).write_text(text)
        with pytest.raises(ValueError, match=rf"{name}.*split 'train'.*{said}"):
            numbers(tmp_path / name)


def test_absent_data_are_named(tmp_path):
    (tmp_path / "empty").mkdir()
    for name, said in (
        ("no.jsonl", "no such file"),
        ("no", "no such file or dir"),
        ("empty", "data files"),
    ):
        with pytest.raises(ValueError, match=rf"{tmp_path / name}', split 'train'.*{said}"):
            numbers(tmp_path / name)


def test_missing_columns_are_named_with_those_found(tmp_path):
    path = write(tmp_path / "q.jsonl", [{"context": "a", "text": "b"}])
    with pytest.raises(
        ValueError, match="no column question, answers; found context, text, needed context, "
    ):
        load_rows(path, "train", ("context", "question", "answers"))


@pytest.mark.parametrize("limit", [0, -1, 1.5, "3", True])
def test_a_limit_that_is_not_a_positive_integer_is_refused(tmp_path, limit):
    with pytest.raises(ValueError, match="integer ≥ 1"):
        numbers(write(tmp_path / "ten.jsonl", TEN), limit=limit)


def test_a_hub_that_cannot_be_reached_points_to_local_files(monkeypatch, tmp_path):
    import datasets
    import huggingface_hub

    monkeypatch.chdir(tmp_path)
    # what HF_HUB_OFFLINE=1 sets: no retries to wait for
    for module in (datasets.config, huggingface_hub.constants):
        monkeypatch.setattr(module, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        ValueError, match=r"nobody/nothing', split 'train'.*local \.json, \.jsonl or \.parquet"
    ):
        load_rows("nobody/nothing", "train", ("n",))
