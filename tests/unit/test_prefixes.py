"""Shared beginnings: what they are, how packs are made of them, and that nothing else changes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ds_kd.config.components import ConfigError
from ds_kd.config.load import load
from ds_kd.data.collate import default_collater
from ds_kd.data.mixture import make_mixture
from ds_kd.data.packing import PackedDataset
from ds_kd.data.prefixes import SharedDataset, lay_out, pack_by_prefix
from ds_kd.data.sampler import FILLER, WithFiller
from ds_kd.evaluate.samples import choose_questions
from ds_kd.losses.chunked import DistillationLoss
from ds_kd.losses.cross_entropy import MaskedCrossEntropy
from ds_kd.losses.divergences import KDLoss
from ds_kd.losses.head import States
from ds_kd.models import attention, causal_lm, lora, probes
from ds_kd.models.attention import attend_by_sample
from ds_kd.models.packs.tree import Tree
from ds_kd.plan.samples import data_of, describe_sharing, load_first
from tests import tiny
from tests.unit.test_packing import CPU, Engine, architecture

GUIDE = Path(__file__).parents[2] / "ds_configs" / "runs" / "llama3_2_1b_kd.yaml"
SQUAD = Path(__file__).parents[3] / "shared" / "data" / "squad_train.jsonl"
PACK = 48

#: Few words, so that samples begin alike; some are empty, some have one token, some are equal.
WORDS = st.lists(st.integers(5, 6), max_size=12)
ROWS = st.lists(st.tuples(WORDS, st.integers(0, 2**12 - 1)), min_size=1, max_size=9)


class NoTemplate:
    """The part of a tokenizer that `choose_questions` asks."""

    chat_template = None


def test_questions_that_a_run_asks_are_the_samples_of_a_pack_and_not_its_tree():
    rows = [{"input_ids": [1, 2, k], "labels": [-100, k, 9]} for k in (5, 6)]
    expected = [([1, 2], [5, 9]), ([1, 2], [6, 9])]
    for samples in (rows, PackedDataset(rows, 8), SharedDataset(rows, 8)):
        assert choose_questions(samples, NoTemplate(), 2, None) == expected


def make_samples(rows):
    """Samples of (tokens, a bit for each position that is supervised)."""
    made = []
    for number, (ids, bits) in enumerate(rows):
        labels = [*ids[1:], 7][: len(ids)]
        labels = [x if bits >> k & 1 else -100 for k, x in enumerate(labels)]
        made.append({"input_ids": ids, "labels": labels, "sample_id": f"s{number}"})
    return made


@settings(max_examples=100, deadline=None)
@given(st.lists(WORDS, min_size=1, max_size=20))
@example([[5, 6], [5, 6], [], [5], [6, 5, 5], [5, 6, 6, 6]])
def test_a_layout_holds_every_sample_along_its_path_and_every_beginning_once(samples):
    layout = lay_out([np.array(ids, np.int64) for ids in samples])
    assert [layout.tokens[path].tolist() for path in layout.paths] == samples
    beginnings = {tuple(ids[: k + 1]) for ids in samples for k in range(len(ids))}
    assert len(layout.tokens) == sum(layout.lengths) == len(beginnings)
    assert all(n > 0 for n in layout.lengths)
    assert all(parent < node for node, parent in enumerate(layout.parents))


@settings(max_examples=60, deadline=None)
@given(st.lists(WORDS, min_size=1, max_size=20), st.sampled_from([None, 1, 3]))
def test_every_token_sees_its_own_sample_up_to_itself_and_nothing_else(samples, window):
    layout = lay_out([np.array(ids, np.int64) for ids in samples])
    total = len(layout.tokens)
    expected = torch.zeros(total, total, dtype=torch.bool)
    for path in layout.paths:
        for at in range(len(path)):
            expected[path[at], path[max(0, at + 1 - (window or total)) : at + 1]] = True
    tree = Tree(layout.lengths, layout.parents)
    numbers = torch.arange(total).view(1, 1, -1, 1)
    seen = torch.zeros_like(expected)
    done: list[int] = []
    for q, k, v, mask in tree.split(numbers, numbers, numbers, window):
        q, k = q.flatten(), k.flatten()
        assert k.equal(v.flatten())
        # Without a mask: causal if there are as many queries as keys, else one query sees all.
        plain = torch.ones(len(q), len(k), dtype=torch.bool).tril(len(k) - len(q))
        assert mask is not None or len(q) in (1, len(k))
        seen[q[:, None], k] = plain if mask is None else mask[0, 0]
        done += q.tolist()
    assert done == list(range(total))
    assert seen.equal(expected)


def test_the_calls_of_attention_compute_a_small_part_of_the_whole_mask():
    # A prompt of 400 tokens, and 16 answers of 100: about 100 × 500 products for each answer.
    tree = Tree([400] + [100] * 16, [-1] + [0] * 16)
    products = sum((c.end - c.start) * sum(b - a for a, b in c.keys) for c in tree.calls)
    assert products == 400 * 400 + 16 * 100 * 500 < 2000 * 2000 / 4
    # Short nodes share a call: one for each would mostly be overhead.
    assert len(Tree([200, 3, 35, 35, 36], [-1, 0, 1, 1, 0]).calls) <= 3


@settings(max_examples=60, deadline=None)
@given(st.lists(WORDS, min_size=1, max_size=40), st.integers(0, 3))
def test_every_sample_is_in_one_pack_and_no_pack_overflows(samples, seed):
    arrays = [np.array(ids, np.int32) for ids in samples]
    packs = pack_by_prefix(arrays, 16, seed)
    assert sorted(i for chosen in packs for i in chosen) == list(range(len(samples)))
    assert all(len(lay_out([arrays[i] for i in chosen]).tokens) <= 16 for chosen in packs)
    assert packs == pack_by_prefix(arrays, 16, seed)


def test_samples_of_one_text_share_a_pack_and_short_beginnings_decide_nothing():
    texts = [list(range(100 * t, 100 * t + 40)) for t in range(6)]
    samples = [[1, 2, *texts[k % 6], 900 + k] for k in range(24)]
    packs = pack_by_prefix([np.array(ids, np.int32) for ids in samples], 96, 0)
    # 42 + 4 tokens a text, two texts a pack: every text is computed once.
    assert len(packs) == 3
    for text in range(6):
        assert len({n for n, chosen in enumerate(packs) for i in chosen if i % 6 == text}) == 1


def test_a_group_larger_than_a_pack_is_cut_and_its_beginning_repeated():
    samples = [np.array([*range(40), 100 + k, 200 + k], np.int32) for k in range(40)]
    packs = pack_by_prefix(samples, 60, 0)
    assert len(packs) == 4 and {len(chosen) for chosen in packs} == {10}


def test_a_sample_longer_than_a_pack_is_named():
    with pytest.raises(ValueError, match="sample 1 has 9 tokens; give packed_sequence_size: 9"):
        pack_by_prefix([np.arange(3), np.arange(9)], 8, 0)


def test_padding_and_columns_of_a_datasets_table_are_read_as_lists_are():
    import datasets

    rows = [
        {"input_ids": [5, 6, 0], "labels": [6, 7, -100], "num_tokens": 2, "sample_id": "a"},
        {"input_ids": [5, 6, 8], "labels": [-100, 7, 9], "num_tokens": 3, "sample_id": "b"},
    ]
    packs = [SharedDataset(data, 8) for data in (rows, datasets.Dataset.from_list(rows))]
    assert packs[0][0] == packs[1][0] == {
        "input_ids": [5, 6, 8],
        "labels": [(0, 6, 1), (1, 7, 2), (2, 9, 1)],
        "segment_lengths": [2, 1],
        "segment_parents": [-1, 0],
        "sample_ids": ["a", "b"],
        "num_tokens": 5,
    }  # fmt: skip


def test_a_batch_of_packs_joins_trees_labels_and_counts():
    one = make_samples([([5, 6], 3), ([5, 6, 6], 3)])
    two = make_samples([([5, 5], 3)])
    data = [SharedDataset(rows, 8)[0] for rows in (one, two)]
    batch = default_collater(data, pad_seq_len_divisible=8)
    assert batch["input_ids"].tolist() == [[5, 6, 6, 5, 5, 0, 0, 0]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 0, 1, 2]]
    assert batch["segment_lengths"] == [2, 1, 2, 3] and batch["segment_parents"] == [-1, 0, -1, -1]
    assert batch["supervised"].tolist() == [0, 1, 1, 3, 4]
    assert batch["supervised_once"].tolist() == [0, 1, 3, 4]
    assert batch["supervised_labels"].tolist() == [6, 6, 7, 5, 7]
    assert batch["supervised_counts"].tolist() == [2, 1, 1, 1, 1]
    assert (batch["num_labels"], batch["num_tokens"], batch["num_shared"]) == (6, 7, 2)
    filler = WithFiller([])[FILLER]
    assert default_collater([data[1], filler])["num_labels"] == 2


def run(module, batches):
    """Sums by name, the loss among them, and the gradients."""
    module.zero_grad()
    totals: dict[str, float] = {}
    for batch in batches:
        with torch.no_grad():
            target = States(module.teacher.hidden(batch), module.teacher.head())
        loss, sums = module(batch, target)
        loss.backward()
        for name, part in {"loss": loss.detach(), **sums}.items():
            totals[name] = totals.get(name, 0.0) + part.item()
    grads = {n: p.grad for n, p in module.model.named_parameters() if p.grad is not None}
    return totals, {n: g.clone() for n, g in grads.items()}


@pytest.fixture(scope="module")
def pairs():
    """A student with its teacher by architecture: once with plain attention, once by sample."""
    made = {}
    for name in ("llama", "mistral", "gemma3"):
        for by_sample in (False, True):
            loss = DistillationLoss(
                MaskedCrossEntropy(), KDLoss(temperature=2.0, chunk_size=5), 0.5
            )
            student = causal_lm.Student(architecture(name), loss).eval()
            torch.manual_seed(5)
            other = architecture(name)
            for parameter in other.parameters():
                parameter.data.mul_(1.1)
            student.teacher = causal_lm.FrozenModel(other)
            if by_sample:
                attend_by_sample(student.model)
                attend_by_sample(other)
            made[name, by_sample] = student
    return made


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3"])
@settings(max_examples=12, deadline=None)
@given(rows=ROWS, kd_ratio=st.sampled_from([0.0, 0.5, 1.0]))
@example(
    rows=[([5, 6, 6, 5], 15), ([5, 6, 6, 5], 15), ([5, 6], 2), ([5], 1), ([], 0), ([6], 1)],
    kd_ratio=1.0,
)
@example(rows=[([5] * k, 2**k - 1) for k in range(1, 9)], kd_ratio=0.5)
@example(rows=[([6, 5], 3)], kd_ratio=0.5)
def test_losses_and_gradients_equal_those_of_single_samples(pairs, name, rows, kd_ratio):
    samples = make_samples(rows)
    for by_sample in (False, True):
        pairs[name, by_sample].loss.kd_ratio = kd_ratio
    expected, expected_grads = run(
        pairs[name, False], [default_collater([each]) for each in samples]
    )
    data = SharedDataset(samples, PACK)
    batches = [default_collater([data[k] for k in range(len(data))], pad_seq_len_divisible=4)]
    got, grads = run(pairs[name, True], batches)
    assert got == {n: pytest.approx(x, rel=1e-5, abs=1e-4) for n, x in expected.items()}
    labels = sum(label != -100 for each in samples for label in each["labels"])
    # The divergence's gradient alone is a small difference of softmaxes, rounded as these are.
    floor = 1e-3 if kd_ratio < 1 else max(1, labels)
    scale = max([floor, *(g.abs().max().item() for g in expected_grads.values())])
    for n, g in expected_grads.items():
        assert (grads[n] - g).abs().max().item() <= 1e-5 * scale, n
    assert batches[0]["num_labels"] == labels


def test_equal_labels_of_one_place_may_be_given_one_by_one():
    rows = make_samples([([5, 6], 3), ([5, 6], 3), ([5, 6, 6], 1)])
    assert SharedDataset(rows, 8)[0]["labels"] == [(0, 6, 3), (1, 7, 2)]
    whole = SharedDataset(rows, 8, counts=False)[0]["labels"]
    assert whole == [(0, 6, 1)] * 3 + [(1, 7, 1)] * 2


def test_a_sample_that_is_a_pack_is_refused():
    rows = [{"input_ids": [5, 6], "labels": [6, 7], "segment_lengths": [1, 1]}]
    with pytest.raises(ValueError, match="sample 0 is a pack already; remove share_prefixes"):
        SharedDataset(rows, 8)


def test_with_activation_checkpointing_gradients_stay_the_same(pairs):
    student = pairs["llama", True]
    samples = make_samples([([5, 6, 6, 5], 15), ([5, 6, 6, 6], 15), ([5, 6], 2)])
    batch = default_collater([SharedDataset(samples, PACK)[0]])
    _, expected = run(student, [batch])
    student.model.gradient_checkpointing_enable({"use_reentrant": False})
    student.train()
    _, got = run(student, [batch])
    student.model.gradient_checkpointing_disable()
    student.eval()
    assert all(torch.allclose(got[n], g, atol=1e-6) for n, g in expected.items())


def test_gradients_of_adapters_equal_those_of_single_samples():
    model = architecture("llama")
    names = lora.find_linear_maps(model, ["*_proj"], [])
    lora.add_adapter(model, names, 4, 8.0, 0.0, False, "xavier", 0, "base")
    student = causal_lm.Student(model, DistillationLoss(MaskedCrossEntropy(), KDLoss(), 0.5))
    student.teacher = causal_lm.FrozenModel(architecture("llama"))
    for n, parameter in model.named_parameters():
        if "lora_B" in n:  # it starts at zero, and A would have no gradient
            parameter.data.normal_()
    samples = make_samples([([5, 6, 6, 5], 15), ([5, 6, 6, 6], 15), ([5, 6], 2), ([6, 5], 3)])
    _, expected = run(student, [default_collater([each]) for each in samples])
    for each in (model, student.teacher.model):
        attend_by_sample(each)
    _, got = run(student, [default_collater([SharedDataset(samples, PACK)[0]])])
    assert expected and all("lora" in n for n in expected)
    scale = max(g.abs().max().item() for g in expected.values())
    for n, g in expected.items():
        assert (got[n] - g).abs().max().item() <= 1e-5 * scale, n


@pytest.mark.parametrize("name", ["llama", "qwen3", "mistral", "gemma3", "mixtral"])
def test_the_probe_passes_where_sharing_is_right(name):
    model = architecture(name)
    attend_by_sample(model)
    probes.check_sharing(Engine(model), CPU, "model")
    assert attention.is_by_sample(model)


def test_a_model_without_plain_sdpa_is_refused():
    with pytest.raises(
        ValueError, match=r"model: Gemma2ForCausalLM computes attention by eager.*share_prefixes"
    ):
        probes.check_sharing(Engine(architecture("gemma2")), CPU, "model")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_whose_branches_see_each_other_is_refused(dtype, monkeypatch):
    model = architecture("llama").to(dtype)
    attend_by_sample(model)
    probes.check_sharing(Engine(model), CPU, "model")
    # As if a class handed on that there are segments, and not how they hang together.
    monkeypatch.setattr(
        causal_lm.attention, "Segments", lambda lengths, *_: attention_of_one_sample(lengths)
    )
    with pytest.raises(ValueError, match=r"share a beginning see each other.*share_prefixes"):
        probes.check_sharing(Engine(model), CPU, "model")


def attention_of_one_sample(lengths):
    segments = attention.Segments.__new__(attention.Segments)
    segments.lengths, segments.tree, segments._runs = [sum(lengths)], None, None
    return segments


def test_shared_beginnings_without_their_attention_are_refused():
    batch = default_collater([SharedDataset(make_samples([([5, 6], 3)]), 8)[0]])
    loss = DistillationLoss(MaskedCrossEntropy(), KDLoss(), 0.0)
    with pytest.raises(ValueError, match="need the attention sdpa; remove share_prefixes"):
        causal_lm.Student(architecture("llama"), loss)(batch)


@pytest.mark.skipif(not SQUAD.exists(), reason=f"needs the real rows of {SQUAD.name}")
def test_real_rows_share_their_texts():
    rows = [json.loads(line) for line in SQUAD.read_text().splitlines()]
    words: dict[str, int] = {}
    samples = []
    for row in rows:
        text = f"{row['context']} {row['question']}".split()
        ids = [words.setdefault(word, len(words)) for word in text]
        samples.append({"input_ids": ids, "labels": [-100] * (len(ids) - 1) + [1]})
    shared, plain = SharedDataset(samples, 1024), PackedDataset(samples, 1024)
    computed = sum(len(shared[k]["input_ids"]) for k in range(len(shared)))
    assert sum(plain.lengths) / computed >= 3.5


# ---- the key -------------------------------------------------------------------------------------

ON = "packed_sequence={packed_sequence_size: 64, share_prefixes: true}"


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["packed_sequence={share_prefixes: true}"], "write packed_sequence.packed_sequence_size"),
        ([ON, "dataloader.collate_fn=mine.join"], "dataloader.collate_fn: mine.join does not know"),
        (
            [ON, "teacher_model.attn_implementation=eager"],
            "teacher_model.attn_implementation: eager cannot compute shared beginnings; write sdpa",
        ),
    ],
)
def test_models_that_cannot_share_beginnings_are_refused_by_their_key(overrides, words):
    with pytest.raises(ConfigError, match=f"packed_sequence.share_prefixes: .*{words}"):
        load(GUIDE, overrides, allow=("mine",))


def test_a_plan_tells_what_sharing_saves_or_would_save(tmp_path):
    student = tiny.llama(tmp_path / "student")
    text = " ".join(f"w{k}" for k in range(40))
    rows = [
        {"context": text, "question": f"w{k}", "answers": {"text": [f"w{k}"]}} for k in range(20)
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    words = [
        f"model.pretrained_model_name_or_path={student}", "validation_dataset=null",
        f"dataset.dataset_name={tmp_path / 'rows.jsonl'}",
    ]  # fmt: skip
    would = describe_sharing(load(GUIDE, words))
    assert "packed_sequence.share_prefixes: true would compute 1 token for" in would[0]
    # Few packs of 64: about 42 common tokens in each and up to 7 samples.
    (told,) = describe_sharing(load(GUIDE, [*words, ON]))
    saved = float(told.split()[6])
    assert 3 < saved < 8 and "of its first 20 samples" in told
    with pytest.raises(ConfigError, match=r"packed_sequence_size: got 8, expected room .* dataset"):
        describe_sharing(load(GUIDE, [*words, ON.replace("64", "8")]))


def test_a_plan_tells_what_sharing_saves_on_a_mixture_as_the_run_draws_it(tmp_path):
    """With weights its samples are the first of the run's, to the last; without, each source has
    the share of its rows."""
    student = tiny.llama(tmp_path / "student")
    text = " ".join(f"w{k}" for k in range(40))
    for name, contexts in (("alike", [text] * 90), ("apart", [f"w{k}" for k in range(60)])):
        rows = [
            {"context": context, "question": f"w{k}", "answers": {"text": [f"w{k}"]}}
            for k, context in enumerate(contexts)
        ]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(json.dumps(row) for row in rows))

    def config(*parts: str, **more):
        sources = ", ".join(parts).replace("NAME", f"dataset_name: {tmp_path}")
        mixture = f"dataset={{_target_: ds_kd.data.mixture.make_mixture, sources: [{sources}]}}"
        words = [mixture, *(f"dataset.{key}={value}" for key, value in more.items())]
        models = f"model.pretrained_model_name_or_path={student}"
        return load(GUIDE, [models, "validation_dataset=null", *words, ON])

    weighted = config("{NAME/alike.jsonl, weight: 1}", "{NAME/apart.jsonl, weight: 3}", seed=5)
    _, found = load_first(weighted, 40)
    whole = make_mixture(tiny.tokenizer(tmp_path / "t"), **weighted.dataset.kwargs)
    assert [row["sample_id"] for row in found] == whole["sample_id"][:40]
    assert [row["input_ids"] for row in found] == [*whole["input_ids"]][:40]

    # 50 of 90 + 60 rows are 30 + 20. A limit of the mixture cuts the second source first.
    each = "{NAME/alike.jsonl}", "{NAME/apart.jsonl}"
    for more, most, counts in (({}, 50, (30, 20)), ({"limit_dataset_samples": 100}, 50, (45, 5))):
        _, found = load_first(config(*each, **more), most)
        numbers = [row["sample_id"].partition(":")[0] for row in found]
        assert (numbers.count("0"), numbers.count("1")) == counts

    # About three quarters of the samples of one source share, and of the other a quarter.
    alike, apart = "{NAME/alike.jsonl, weight: WEIGHT}", "{NAME/apart.jsonl, weight: WEIGHT}"
    several = [
        config(alike.replace("WEIGHT", a), apart.replace("WEIGHT", b)) for a, b in ("31", "13")
    ]
    saved = [float(describe_sharing(cfg)[0].split()[6]) for cfg in several]
    assert saved[0] > saved[1] > 1
    assert "mixed as in the run" in describe_sharing(several[0])[0]
    with pytest.raises(ConfigError, match=r"dataset: sources\[1\]: .*absent"):
        broken = config(*each)
        broken.dataset.kwargs["sources"][1]["dataset_name"] = f"{tmp_path}/absent.jsonl"
        describe_sharing(broken)


def test_a_plan_measures_a_mixture_and_refuses_only_what_is_wrong_in_local_files(
    tmp_path, monkeypatch
):
    student = tiny.llama(tmp_path / "student")
    squad = "ds_kd.data.squad.make_squad_dataset"
    for name, words in (("short", 5), ("long", 40)):
        row = {"context": "w3 " * words, "question": "w4", "answers": {"text": ["w5"]}}
        (tmp_path / f"{name}.jsonl").write_text(f"{json.dumps(row)}\n" * 50)
    sources = ", ".join(f"{{dataset_name: {tmp_path}/{name}.jsonl}}" for name in ("short", "long"))
    mixture = f"dataset={{_target_: ds_kd.data.mixture.make_mixture, sources: [{sources}]}}"
    models = f"model.pretrained_model_name_or_path={student}"
    cfg = load(GUIDE, [models, "validation_dataset=null", mixture])
    _, some = load_first(cfg, 64)
    lengths = [len(row["input_ids"]) for row in some]
    rows, tokens, supervised, told = data_of(cfg)
    assert rows is None and tokens == cfg.step_scheduler.local_batch_size * max(lengths)
    taught = sum(label != -100 for row in some for label in row["labels"])
    assert supervised == pytest.approx(taught / sum(lengths)) and supervised < 1
    assert told == f"nine tenths of 64 samples mixed as in the run have at most {max(lengths)}"

    def refuse(*_, **__):
        raise ValueError("cannot be read")

    # A directory of a split's name makes no source local; nor does a text too long for a name.
    monkeypatch.setattr("ds_kd.plan.samples.draw_first", refuse)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train").mkdir()
    for source in ("of/hub", "w" * 5000):
        part = {"_target_": squad, "dataset_name": source, "split": "train"}
        cfg.dataset.kwargs["sources"] = [part]
        assert load_first(cfg, 8) == (None, None)
    cfg.dataset.kwargs["sources"] = [part, {**part, "dataset_name": "short.jsonl"}]
    with pytest.raises(ConfigError, match="dataset: cannot be read"):
        load_first(cfg, 8)
    monkeypatch.setattr("ds_kd.plan.samples.draw_first", lambda *_, **__: [{"input_ids": []}])
    with pytest.raises(ConfigError, match="dataset: there is no token in its first samples"):
        data_of(cfg)
