"""Prompts of samples, what becomes of a text that the student wrote, and the keys of rollouts."""

from __future__ import annotations

import io
import json
from types import SimpleNamespace

import pytest
import torch

from ds_kd.config.components import ConfigError
from ds_kd.config.load import load
from ds_kd.data.collate import default_collater
from ds_kd.data.own import DataError
from ds_kd.data.rows.detect import recognise
from ds_kd.data.sampler import GlobalBatchSampler
from ds_kd.data.text import make_prompt_dataset
from ds_kd.evaluate.comparison import read_lines
from ds_kd.models.generation.sampling import Written
from ds_kd.parallel.world import World
from ds_kd.recipe.data import build_samples
from ds_kd.train.metrics import Metrics
from ds_kd.train.prompts import find_opening, join_rollout, prompt_of
from ds_kd.train.rollouts import Policy, RolloutBatches
from tests import tiny

TEMPLATE = (
    "{% for m in messages %}w0 {% if m['role'] == 'assistant' %}w2{% else %}w1{% endif %} "
    "{{ m['content'] }} <eos> {% endfor %}{% if add_generation_prompt %}w0 w2 {% endif %}"
)
W0, W1, W2, W5, EOS = 3, 4, 5, 8, 1


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    path = tmp_path_factory.mktemp("models")
    tiny.llama(path / "student", seed=1)
    tiny.llama(path / "teacher", layers=3, seed=2)
    (path / "rows.jsonl").write_text(tiny.squad_rows(8))
    (path / "prompts.jsonl").write_text('{"prompt": "w5 w6"}\n{"prompt": "w7"}\n')
    return path


@pytest.fixture
def chatty(tmp_path):
    made = tiny.tokenizer(tmp_path / "tokenizer")
    made.chat_template = TEMPLATE
    return made


def config(place, *overrides, **sections):
    content = {
        "model": {"pretrained_model_name_or_path": str(place / "student")},
        "teacher_model": {"pretrained_model_name_or_path": str(place / "teacher")},
        "dataset": {
            "_target_": "ds_kd.data.squad.make_squad_dataset",
            "dataset_name": str(place / "rows.jsonl"),
        },
        "rollouts": {"max_new_tokens": 8},
        "checkpoint": {"checkpoint_dir": str(place / "checkpoints")},
        **sections,
    }
    return load(content, list(overrides))


def refusal(place, *overrides, **sections):
    with pytest.raises(ConfigError) as caught:
        config(place, *overrides, **sections)
    return "\n".join(caught.value.problems)


def test_a_prompt_is_what_precedes_the_last_supervised_run():
    sample = {"input_ids": [5, 6, 7, 8, 9], "labels": [-100, 7, -100, 9, 10]}
    assert prompt_of(sample, []) == [5, 6, 7, 8]
    assert prompt_of({**sample, "labels": [6, 7, 8, 9, 10]}, []) == [5]
    assert prompt_of({**sample, "labels": [-100] * 5}, []) is None
    # Padding of a sample is no part of it.
    padded = {"input_ids": [5, 6, 2, 2], "labels": [-100, 7, -100, -100], "num_tokens": 2}
    assert prompt_of(padded, []) == [5, 6]
    alone = {"input_ids": [5, 6], "labels": [-100, -100], "is_prompt": True}
    assert prompt_of(alone, [9]) == [5, 6]
    filled = {"input_ids": [5, 6, 2], "labels": [-100] * 3, "num_tokens": 2, "is_prompt": True}
    assert prompt_of(filled, []) == [5, 6]


def test_the_last_answer_of_a_conversation_is_left_to_write_and_its_header_is_given(chatty):
    from ds_kd.data.chat import tokenize_chat
    from ds_kd.data.labels import shift

    talk = [
        {"role": role, "content": f"w{k}"}
        for k, role in enumerate(["user", "assistant", "user", "assistant"], 5)
    ]
    opening = find_opening(chatty)
    assert opening == [W0, W2]
    expected = chatty.apply_chat_template(talk[:3], add_generation_prompt=True)["input_ids"]
    assert prompt_of(shift(*tokenize_chat(chatty, talk)), opening) == expected


def test_a_text_is_supervised_whole_its_end_too_and_an_empty_one_not_at_all():
    made = join_rollout([5, 6], [7, EOS], "a")
    assert made == {"input_ids": [5, 6, 7], "labels": [-100, 7, EOS], "sample_id": "a"}
    assert join_rollout([5, 6], [7], "a")["labels"] == [-100, 7]  # the limit cut it: no end
    assert join_rollout([5, 6], [], "a")["labels"] == [-100]


def test_rows_of_prompts_need_no_answers(place, chatty):
    rows = make_prompt_dataset(str(place / "prompts.jsonl"), tiny.tokenizer(place / "plain"))
    assert [row["input_ids"] for row in rows] == [[8, 9], [10]]
    assert recognise(["prompt"]).name.endswith("make_prompt_dataset")
    assert recognise(["prompt", "completion"]).name.endswith("make_instruction_dataset")
    path = place / "talks.jsonl"
    talk = [{"role": "user", "content": "w5"}]
    answered = [*talk, {"role": "assistant", "content": "w6"}]
    again = [*answered, {"role": "user", "content": "w7"}]
    path.write_text("\n".join(json.dumps({"messages": t}) for t in (talk, answered, again)))
    rows = make_prompt_dataset(str(path), chatty, column="messages")
    *short, long = [row["input_ids"] for row in rows]
    assert short == [[W0, W1, W5, EOS, W0, W2]] * 2
    # The question that is open is asked, whoever spoke before it.
    assert chatty.convert_tokens_to_ids("w7") in long and long[-2:] == [W0, W2]
    with pytest.raises(ValueError, match="no chat template for messages"):
        make_prompt_dataset(str(path), tiny.tokenizer(place / "plain"), column="messages")


def make_batches(ratio, write, size=4, reuse=1, samples_per_prompt=1, samples=None):
    samples = samples or tiny.samples(10, seed=3, masked=(2,))
    return RolloutBatches(
        samples,
        GlobalBatchSampler(len(samples), size, 2, 0, 1),
        default_collater,
        lambda made: made,
        write,
        str,
        Policy(ratio, samples_per_prompt, reuse, 7, []),
        World(0, 1, torch.device("cpu"), "gloo"),
    )


def test_texts_take_the_place_of_answers_and_are_counted_anew():
    """In the first window sample 2 has no answer; all others get two texts of three tokens."""
    write = lambda prompts, draws: [Written([9, 9, EOS], True, 1.5) for _ in draws]  # noqa: E731
    batches = make_batches(1, write, samples_per_prompt=2)
    step = next(batches.after(0))
    ids = [name for batch in step for name in batch["sample_ids"]]
    assert ids == ["s2", "s0", "s0#1", "s1", "s1#1", "s3", "s3#1"]
    assert [batch["num_labels"] for batch in step] == [3, 6, 6, 3]
    told = batches.describe()
    assert told["rollouts/length"] == 3 and told["rollouts/entropy"] == 0.5
    assert batches.describe() == {}  # told once


def test_the_samples_that_are_on_policy_differ_from_epoch_to_epoch():
    drawn = []

    def write(prompts, draws):
        drawn.extend(draws)
        return [Written([9, EOS], True) for _ in draws]

    batches = make_batches(0.5, write)
    steps = batches.after(0)
    for _ in range(2 * batches.steps_per_epoch):
        next(steps)
    first, second = ({draw.sample for draw in drawn if draw.epoch == e} for e in (0, 1))
    assert first != second and all(1 < len(epoch) < 9 for epoch in (first, second))


def test_samples_of_one_id_are_chosen_and_written_each_by_itself():
    """Rows of one source, or of one conversation, often have one id."""
    drawn = []

    def write(prompts, draws):
        drawn.extend(draws)
        return [Written([9, EOS], True) for _ in draws]

    same = [{**each, "sample_id": "source"} for each in tiny.samples(40, seed=3)]
    step = next(make_batches(0.5, write, size=40, samples=same).after(0))
    # Half of 40 samples are on-policy, 20 ± 3.2.
    assert 8 < len(drawn) < 32 and len({*drawn}) == len(drawn)
    assert {name for batch in step for name in batch["sample_ids"]} == {"source"}


def test_saved_texts_are_joined_to_the_prompts_that_they_answer_and_to_no_others():
    asked = []

    def write(prompts, draws):
        asked.append(len(prompts))
        return [Written([9, EOS], True) for _ in draws]

    before = make_batches(1, write, reuse=2)
    next(before.after(0))
    saved = json.loads(json.dumps(before.state_dict(1)))
    for seed, written in ((3, [3]), (4, [3, 3])):  # the same samples, and as many others
        again = make_batches(1, write, reuse=2, samples=tiny.samples(10, seed, (2,)))
        again.load_state_dict(saved)
        next(again.after(1))
        assert asked == written


def test_the_log_of_a_run_with_rollouts_is_read_again(tmp_path):
    batches = make_batches(1, lambda prompts, draws: [Written([9, EOS], True)] * len(draws))
    next(batches.after(0))
    told = batches.describe()
    values = {"train_loss": 1.0, "learning_rate": 0.1, "grad_norm": 1.0, "tokens_per_sec": 9.0}
    log = Metrics(tmp_path, tensorboard=False, out=io.StringIO())
    log.train(1, values | told)
    log.validation(1, {"loss": 0.5})
    log.close()
    assert read_lines(tmp_path / "metrics.jsonl") == [
        {"step": 1, **values, **told},
        {"step": 1, "val_loss": 0.5},
    ]


def test_empty_texts_leave_a_step_with_nothing_supervised_and_every_batch_there():
    batches = make_batches(1, lambda prompts, draws: [Written([], False)] * len(draws))
    step = next(batches.after(0))
    assert [batch["num_labels"] for batch in step] == [0, 0]
    assert all(len(batch["input_ids"]) == 2 for batch in step)


OWN = """
def packs(tokenizer, first):
    one = {"input_ids": [5, 6, 7, 8], "labels": [-100, 7, -100, 9]}
    return [{**one, "segment_lengths": [2, 2]} if k >= first else one for k in range(40)]
"""


def test_a_users_own_packs_are_refused_where_the_student_writes(place, tmp_path, monkeypatch):
    """A pack's other texts would become the prompt of its last one, and their answers be lost."""
    (tmp_path / "own_rollouts.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(tmp_path))
    tokenizer = tiny.tokenizer(tmp_path / "tokenizer")
    world = World(0, 1, torch.device("cpu"), "gloo")

    def samples_of(first, *overrides):
        content = {
            "model": {"pretrained_model_name_or_path": str(place / "student")},
            "teacher_model": {"pretrained_model_name_or_path": str(place / "teacher")},
            "dataset": {"_target_": "own_rollouts.packs", "first": first},
            "rollouts": {"max_new_tokens": 8, "ratio": 0.5},
            "checkpoint": {"checkpoint_dir": str(place / "checkpoints")},
        }
        cfg = load(content, list(overrides), allow=("own_rollouts",))
        return build_samples(cfg, tokenizer, world)[0]

    with pytest.raises(ConfigError, match=r"dataset: got .*sample 3: .*return its texts one by on"):
        samples_of(3)
    assert samples_of(3, "rollouts.ratio=0")[3]["segment_lengths"] == [2, 2]
    # One that comes later is told when it is read.
    write = lambda prompts, draws: [Written([9, EOS], True) for _ in draws]  # noqa: E731
    late = make_batches(0.5, write, samples=samples_of(30)).after(0)
    for _ in range(7):
        assert all("segment_lengths" not in batch for batch in next(late))
    with pytest.raises(DataError, match=r"sample 30: it is a pack of its own \(segment_lengths\)"):
        next(late)


def test_the_defaults_of_a_run_with_rollouts_are_reverse_kl_alone(place):
    cfg = config(place)
    assert cfg.kd_ratio == 1 and cfg.kd_loss_fn.name.endswith("ReverseKL") and cfg.rolls_out
    cfg = config(place, "kd_loss_fn.temperature=2")
    assert cfg.kd_loss_fn.name.endswith("ReverseKL") and cfg.kd_loss_fn.kwargs["temperature"] == 2
    assert config(place, "kd_loss_fn.name=jsd").kd_loss_fn.name.endswith("JSD")
    off = config(place, "rollouts.ratio=0")
    assert off.kd_ratio == 0.5 and off.kd_loss_fn.name.endswith("KDLoss") and not off.rolls_out
    assert any("rollouts: has no effect" in note for note in off.notes)
    assert any("num_workers: has no" in n for n in config(place, "dataloader.num_workers=2").notes)


def test_a_ratio_of_0_trains_on_the_loaders_own_micro_batches(place):
    from types import SimpleNamespace

    from ds_kd.recipe.rollouts import build_batches, steps_per_epoch
    from ds_kd.train.batches import LoaderBatches

    loader = SimpleNamespace(batch_sampler=GlobalBatchSampler(10, 4, 2, 0, 1))
    off = config(place, "rollouts.ratio=0", "rollouts.reuse=3")
    world = World(0, 1, torch.device("cpu"), "gloo")
    made = build_batches(off, loader, None, None, None, None, world)
    assert isinstance(made, LoaderBatches) and steps_per_epoch(off, loader) == 3
    assert steps_per_epoch(config(place, "rollouts.reuse=3"), loader) == 9


def test_a_teacher_that_ends_with_another_token_is_warned_of(place, capsys):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from ds_kd.recipe.rollouts import warn_of_ends

    student, teacher = (
        AutoModelForCausalLM.from_pretrained(place / n) for n in ("student", "teacher")
    )
    tokenizer = AutoTokenizer.from_pretrained(place / "student")
    warn_of_ends(student, teacher, tokenizer)
    assert capsys.readouterr().out == ""
    teacher.generation_config.eos_token_id = [1, W5]
    warn_of_ends(student, teacher, tokenizer)
    assert "ends its answers with 'w5', and the student's" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["kd_ratio=0.5"], "kd_ratio: got 0.5, expected 1 with rollouts"),
        (["rollouts.samples_per_prompt=2", "rollouts.temperature=0"], "the same at temperature 0"),
        (["rollouts.generate=vllm"], "rollouts.generate: got 'vllm', expected auto or replica"),
        (["rollouts.ratio=2"], "rollouts.ratio: got 2, expected a number from 0 to 1"),
        (["rollouts.top_p=0"], "rollouts.top_p: got 0"),
        (["rollouts.max_tokens=5"], "did you mean rollouts.max_new_tokens"),
        (["rollouts.generate=sharded", "compile=true"], "cannot write with the layers of compile"),
        (["teacher.kind=cached", "teacher.directory=kept"], "the student has yet to write"),
        (["packed_sequence.packed_sequence_size=8"], "holds no prompt beside such an answer"),
    ],
)
def test_keys_that_rollouts_cannot_follow_are_refused_by_name(place, overrides, words):
    assert words in refusal(place, *overrides)


def test_a_wrong_share_of_rollouts_is_one_problem_and_none_of_a_key_that_is_not_given(place):
    assert len(refusal(place, "rollouts.ratio=half").splitlines()) == 1


def test_layers_that_the_models_lack_are_told_before_they_are_loaded(place):
    layers = (
        "kd_loss_fn=[{name: tvd, weight: 1},{name: hidden_states, weight: 1, layers: [[1, 3]]}]"
    )
    expected = "got [1, 3], expected a student's layer below 2 and a teacher's below 3"
    assert expected in refusal(place, layers)
    assert config(place, layers.replace("3]]", "2]]")).kd_loss_fn is not None


def test_conversations_without_answers_are_sent_to_the_data_set_that_reads_them(place):
    talks = place / "talks.jsonl"
    talks.write_text('{"messages": [{"role": "user", "content": "w5"}]}\n')
    chat = {"_target_": "ds_kd.data.chat.ChatDataset", "dataset_name": str(talks)}
    assert "make_prompt_dataset with column: messages reads it" in refusal(place, dataset=chat)
    prompts = {
        "_target_": "ds_kd.data.text.make_prompt_dataset",
        "path_or_dataset_id": str(talks),
    }
    assert "dataset.column names others: write messages" in refusal(place, dataset=prompts)
    assert config(place, dataset={**prompts, "column": "messages"}).dataset is not None


def test_rows_without_answers_are_for_a_student_that_writes_all_of_them(place):
    prompts = {
        "_target_": "ds_kd.data.text.make_prompt_dataset",
        "path_or_dataset_id": str(place / "prompts.jsonl"),
    }
    assert config(place, dataset=prompts).dataset.is_without_answers
    assert "no answers to learn" in refusal(place, "rollouts.ratio=0.5", dataset=prompts)
    assert "no answers to learn" in refusal(place, "rollouts=null", dataset=prompts)
    assert "cannot be validated" in refusal(place, "validation_share=0.5", dataset=prompts)
    assert "no answers to validate" in refusal(place, validation_dataset=prompts)


def test_the_bucket_of_gradients_is_there_while_the_student_writes():
    from ds_kd.plan.memory import Machine, Shape, Work
    from ds_kd.plan.rollouts import Writing, describe_writing

    text = SimpleNamespace(num_attention_heads=4, hidden_size=64, num_hidden_layers=2)
    config = SimpleNamespace(get_text_config=lambda: text)
    # A copy of 1 GiB, a bucket of 2 GiB or of 5e8 numbers, and 1 KiB for two tokens.
    student = Shape(2**29, 2**29, 0, 2, 2**20, 1000, 64, 1000, True, 2)
    for bucket, told in ((2**30, "3.00 GiB on a rank, too much"), (0, "1.93 GiB on a rank, fits")):
        lines = describe_writing(
            config, student, {}, Work(8, 8, bucket=bucket), Writing(1, 1, 1, (1,), 1),
            Machine(room=2**31), 1,
        )  # fmt: skip
        assert told in lines[1]


def test_the_plan_tells_what_the_student_writes_and_the_memory_for_it(place):
    from ds_kd.plan.dry_run import plan_of

    small = ["step_scheduler.global_batch_size=8", "rollouts.samples_per_prompt=2"]
    small += ["dist_env.backend=gloo", "rollouts.reuse=3"]
    told = plan_of(config(place, *small), 2, "1GB")
    assert "16 answers of up to 8 tokens" in told and "2 batch(es) of up to 8, every 3" in told
    # One of the two batches on each rank, eight tokens one after another.
    assert "8 forwards of one token after another" in told and "steps: 3 from 8 samples" in told
    assert "on a rank, fits" in told
    assert "rollouts:\n" not in plan_of(config(place, "rollouts=null"), 1).partition("plan for")[2]
