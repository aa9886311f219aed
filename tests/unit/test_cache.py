"""A teacher's cache: keys of rows, files, and what is refused before a run on one starts."""

from __future__ import annotations

import dataclasses
import json
import os

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import ds_kd
from ds_kd.config.components import ConfigError
from ds_kd.data.collate import default_collater
from ds_kd.data.packing import PackedDataset
from ds_kd.data.prefixes import SharedDataset
from ds_kd.losses.buffers import Buffers
from ds_kd.losses.chunked import DistillationLoss
from ds_kd.losses.cross_entropy import MaskedCrossEntropy
from ds_kd.losses.divergences import KDLoss
from ds_kd.losses.head import Head, States
from ds_kd.losses.named.top_k import TopK as TopKLoss
from ds_kd.parallel.world import World
from ds_kd.teachers.cache.keys import find_keys, keys_of_sample
from ds_kd.teachers.cache.kinds import Hidden, Sampled, TopK
from ds_kd.teachers.cache.store import CacheError, Store
from tests import tiny
from tests.scripts import script

ALONE = World(0, 1, torch.device("cpu"), "gloo")


def bag(keys: np.ndarray) -> set[bytes]:
    return {key.tobytes() for key in keys}


def test_padding_packs_and_shared_beginnings_do_not_change_the_key_of_a_row():
    samples = tiny.branches(tiny.samples(9, seed=3, masked=(4,)))
    single = [keys_of_sample(sample) for sample in samples]
    assert [len(keys) for keys in single] == [
        sum(label != -100 for label in sample["labels"]) for sample in samples
    ]
    padded = default_collater(samples, pad_seq_len_divisible=16)
    assert np.array_equal(find_keys(padded), np.concatenate(single))
    packed = PackedDataset(samples, 64)
    assert np.array_equal(
        find_keys(default_collater([packed[0], packed[1]])),
        np.concatenate([single[k] for k in (*packed.packs[0], *packed.packs[1])]),
    )
    shared = SharedDataset(samples, 64)
    found = [find_keys(default_collater([shared[k]])) for k in range(len(shared))]
    assert set.union(*map(bag, found)) == set.union(*map(bag, single))
    filler = {"input_ids": [0], "labels": [-100], "is_filler": True}
    assert find_keys(default_collater([filler])).shape == (0, 2)


def test_rows_of_a_users_own_packs_have_the_keys_of_their_samples():
    samples = tiny.samples(6, seed=3)
    expected = np.concatenate([keys_of_sample(sample) for sample in samples])
    whole = PackedDataset(samples, 96)
    assert len(whole) == 1
    own = whole[0]
    assert np.array_equal(keys_of_sample(own), expected)
    assert np.array_equal(find_keys(default_collater([own])), expected)
    again = PackedDataset([own], 128)
    assert np.array_equal(find_keys(default_collater([again[0]])), expected)


def test_another_token_before_a_row_gives_it_another_key_and_one_after_it_does_not():
    one = {"input_ids": [5, 6, 7, 8], "labels": [-100, 7, 8, -100]}
    after = {"input_ids": [5, 6, 7, 9], "labels": [-100, 7, 9, -100]}
    before = {"input_ids": [4, 6, 7, 8], "labels": [-100, 7, 8, -100]}
    assert np.array_equal(keys_of_sample(one), keys_of_sample(after))
    assert not bag(keys_of_sample(one)) & bag(keys_of_sample(before))


def make_rows(count: int, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    keys = np.random.default_rng(seed).integers(0, 2**63, (count, 2)).astype(np.uint64)
    return keys, {"hidden": torch.randn(count, 6, generator=generator).bfloat16()}


def test_rows_come_back_from_several_files_and_from_memory_bit_for_bit(tmp_path):
    keys, fields = make_rows(30)
    writer, other = Store(tmp_path), Store(tmp_path)
    writer.add(keys[:10], {"hidden": fields["hidden"][:10]})
    writer.add(
        np.concatenate([keys[:12], keys[10:12]]), {"hidden": fields["hidden"][[*range(12), 10, 11]]}
    )
    writer.flush()
    other.add(keys[10:20], {"hidden": fields["hidden"][10:20]})
    other.flush()
    writer.refresh()
    writer.add(keys[20:], {"hidden": fields["hidden"][20:]})  # not yet in a file
    order = torch.randperm(30, generator=torch.Generator().manual_seed(1))
    found = writer.read(keys[order.numpy()])["hidden"]
    assert torch.equal(found, fields["hidden"][order]) and found.dtype == torch.bfloat16
    assert other.lacks(keys).tolist() == [True] * 10 + [False] * 10 + [True] * 10
    # Rows that others have written by now are found when they are read.
    assert torch.equal(other.read(keys[:20])["hidden"], fields["hidden"][:20])
    with pytest.raises(CacheError, match="lacks 10 of 20 rows"):
        other.read(keys[10:])


def test_the_remains_of_a_killed_writer_are_passed_over_and_its_rows_are_absent(tmp_path):
    keys, fields = make_rows(4)
    (tmp_path / f".part-1.safetensors.{os.getpid()}").write_bytes(b"half of a file")
    store = Store(tmp_path)
    assert len(store) == 0 and store.lacks(keys).all()
    store.add(keys, fields)
    store.flush()
    assert not Store(tmp_path).lacks(keys).any()


def test_a_flipped_bit_and_a_cut_file_are_told_with_the_files_name(tmp_path):
    keys, fields = make_rows(5)
    store = Store(tmp_path)
    store.add(keys, fields)
    store.flush()
    (path,) = tmp_path.glob("part-*")
    whole = path.read_bytes()
    at = whole.index(fields["hidden"][3].view(torch.uint8).numpy().tobytes())
    path.write_bytes(whole[: at + 2] + bytes([whole[at + 2] ^ 1]) + whole[at + 3 :])
    damaged = Store(tmp_path)
    assert torch.equal(damaged.read(keys[:3])["hidden"], fields["hidden"][:3])
    with pytest.raises(CacheError, match=f"{path.name}: this file of the cache is damaged; delete"):
        damaged.read(keys)
    path.write_bytes(whole[:-20])
    with pytest.raises(CacheError, match=path.name):
        Store(tmp_path)


def test_others_may_read_a_cache_and_one_who_may_not_is_told_so(tmp_path, monkeypatch):
    keys, fields = make_rows(2)
    store = Store(tmp_path)
    store.add(keys, fields)
    mask = os.umask(0o027)
    try:
        store.flush()
    finally:
        os.umask(mask)
    (path,) = tmp_path.glob("part-*")
    assert path.stat().st_mode & 0o777 == 0o640
    if os.geteuid() == 0:  # whom no mode keeps from reading
        path.write_bytes(b"")
        monkeypatch.setattr(os, "access", lambda *_: False)
    path.chmod(0)
    with pytest.raises(CacheError, match="may not read this file of the cache; chmod a"):
        Store(tmp_path)


def test_a_hidden_state_beyond_fp16_is_told_and_not_kept_as_infinity():
    head = Head(torch.zeros(3, 1))
    output = States(torch.tensor([[7e4]]), head)
    with pytest.raises(CacheError, match=r"7e.04 is too large for float16; write bf16 or fp32"):
        Hidden(head, torch.float16).make(output, np.zeros((1, 2), np.uint64))
    kept = Hidden(head, torch.bfloat16).make(output, np.zeros((1, 2), np.uint64))
    assert kept["hidden"].item() == 70144.0


def make_models(tokens: int, vocab: int = 40):
    """Hidden states of both models with a head, wide enough that their distributions differ."""
    generator = torch.Generator().manual_seed(5)
    rand = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    student = States(rand(tokens, 8).requires_grad_(), Head(rand(vocab, 8)))
    return student, States(rand(tokens, 8), Head(rand(vocab, 8)))


def differentiate(divergence, student, teacher):
    """Value and gradient of a loss, and the names of what it gives."""
    labels = torch.zeros(len(student.hidden), dtype=torch.int64)
    value, sums = DistillationLoss(MaskedCrossEntropy(), divergence, 1.0)(student, labels, teacher)
    (gradient,) = torch.autograd.grad(value, student.hidden)
    return value.item(), gradient, {*sums}


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_likeliest_ids_and_the_rest_give_top_k_its_loss_and_gradient(temperature, tmp_path):
    student, teacher = make_models(300)  # more than are looked at in one go
    keys, _ = make_rows(300)
    kind = TopK(12, temperature, 40, torch.device("cpu"))
    fields = kind.make(teacher, keys)
    assert {name: list(value.shape) for name, value in fields.items()} == {
        "ids": [300, 12], "log_p": [300, 12], "rest": [300, 1],
    }  # fmt: skip
    store = Store(tmp_path)
    store.add(keys, fields)
    store.flush()
    fields = store.read(keys)
    for k in (12, 5):
        loss = TopKLoss(k=k, temperature=temperature)
        value, gradient, _ = differentiate(loss, student, kind.read(fields))
        exact, expected, _ = differentiate(loss, student, teacher)
        assert value == pytest.approx(exact, rel=1e-5)
        assert torch.allclose(gradient, expected, atol=1e-5)
    # Validation measures nothing on a distribution of which a part is made up.
    with torch.no_grad():
        labels, loss = torch.zeros(300, dtype=torch.int64), TopKLoss(temperature=temperature, k=5)
        whole = DistillationLoss(MaskedCrossEntropy(), loss, 0.5)
        _, sums = whole(student, labels, kind.read(fields))
        assert {*whole(student, labels, teacher)[1]} - {*sums} >= {"kl_at_t1"}
    assert len(kind.read(None).logits(slice(0, 9), 40, "t", Buffers(4, torch.float32, "cpu"))) == 0


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_the_mean_gradient_of_draws_is_that_of_the_whole_distribution(temperature):
    one, guide = make_models(1)
    rows = 4000
    keys, _ = make_rows(rows, seed=2)
    student = States(one.hidden.detach().repeat(rows, 1).requires_grad_(), one.head)
    teacher = States(guide.hidden.repeat(rows, 1), guide.head)
    kind = Sampled(6, temperature, 40, torch.device("cpu"))
    fields = kind.make(teacher, keys)
    assert fields["ids"].shape == (rows, 6) and torch.equal(
        fields["ids"], kind.make(teacher, keys)["ids"]
    )
    loss = KDLoss(temperature=temperature)
    value, found, _ = differentiate(loss, student, kind.read(fields))
    _, exact, _ = differentiate(loss, student, teacher)
    # Rows are draws of one distribution, so their spread tells how far their mean may be off.
    error = (found - exact).mean(0).abs()
    sigma = found.std(0) / rows**0.5
    assert np.isfinite(value) and (sigma > 0).all()
    assert (error <= 4 * sigma).all(), (error / sigma).max()


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Models, rows and a whole cache, written by the command on one rank."""
    root = tmp_path_factory.mktemp("cache")
    for name, seed in (("student", 1), ("teacher", 2), ("other", 3)):
        tiny.llama(root / name, layers=1, hidden=16, seed=seed)
    (root / "rows.jsonl").write_text(tiny.squad_rows(6))
    (root / "more.jsonl").write_text(tiny.squad_rows(8))
    return root


def config(root, *words, rows="rows", **values):
    data = {"_target_": "ds_kd.data.squad.make_squad_dataset"}
    base = {
        "model": {"pretrained_model_name_or_path": str(root / "student"), "torch_dtype": "fp32"},
        "teacher_model": {"pretrained_model_name_or_path": str(root / "teacher")},
        "dataset": {**data, "dataset_name": str(root / f"{rows}.jsonl")},
        "teacher": {"kind": "cached", "directory": str(root / "cache")},
        "step_scheduler": {"global_batch_size": 2},
    }
    return ds_kd.load_config({**base, **values}, list(words))


def open_cache(cfg):
    """Do what a run does before its models are built; the teacher may not be loaded."""
    from ds_kd.recipe.data import build_samples
    from ds_kd.recipe.models import tokenizer_of
    from ds_kd.recipe.offline.rows import list_asked
    from ds_kd.recipe.offline.teacher import build_cached

    def load():
        raise AssertionError("the teacher is loaded")

    tokenizer = tokenizer_of(cfg.model, ALONE)
    samples, held_out = build_samples(cfg, tokenizer, ALONE)
    return build_cached(cfg, tokenizer, list_asked(cfg, samples, held_out), load, ALONE)


@pytest.fixture(scope="module")
def kept(place):
    """A cache of all rows, as the command would write it but for the numbers."""
    from transformers import AutoModelForCausalLM

    from ds_kd.models.causal_lm import FrozenModel
    from ds_kd.recipe.data import build_samples
    from ds_kd.recipe.models import tokenizer_of
    from ds_kd.recipe.offline.record import make_record, write_record
    from ds_kd.recipe.offline.rows import list_asked
    from ds_kd.recipe.offline.teacher import _note_verified
    from ds_kd.teachers.cache.store import write_file

    cfg = config(place, teacher={"kind": "cached", "directory": f"{place}/cache", "fill": True})
    tokenizer = tokenizer_of(cfg.model, ALONE)
    module = FrozenModel(AutoModelForCausalLM.from_pretrained(place / "teacher"))
    (place / "cache").mkdir()
    write_file(place / "cache" / "head.safetensors", {"weight": module.head().weight.clone()})
    write_record(place / "cache", make_record(cfg, module.head(), tokenizer, ALONE))
    store = Store(place / "cache")
    for data in list_asked(cfg, *build_samples(cfg, tokenizer, ALONE)).values():
        for sample in data:
            keys = keys_of_sample(sample)
            store.add(keys, {"hidden": torch.randn(len(keys), 16).half()})
    store.flush()
    _note_verified(place / "cache", ALONE)
    return place


def test_a_full_cache_opens_without_its_teacher_and_gives_what_was_stored(kept):
    for words in ([], ["teacher_model=null"], ["teacher.fill=true"]):
        teacher = open_cache(config(kept, *words))
        samples = [{"input_ids": [3], "labels": [-100], "is_filler": True}]
        assert teacher(default_collater(samples)).hidden.shape == (0, 16)
        (path,) = (kept / "cache").glob("part-*")
        part = load_file(path)
        keys = part["keys"].numpy().view(np.uint64)
        output = teacher.read(keys[::-1].copy())
        assert torch.equal(output.hidden, part["hidden"].flip(0).float())


DRAWS = {"keep": "sampled", "k": 12, "temperature": 2.0, "shared": tiny.VOCAB}


@pytest.mark.parametrize(
    ("record", "words", "told"),
    [
        (DRAWS, ["teacher.k=9"], r"teacher\.k: got 9, expected 12, what"),
        (DRAWS, ["kd_loss_fn.temperature=3"], r"temperature: got 3\.0, expected 2, what"),
        ({**DRAWS, "shared": 90}, [], "a cache for a head of this student's size"),
        (
            {"weights": "int8"},
            ["teacher.fill=true"],
            "teacher.placement: got .*, expected int8, as",
        ),
    ],
)
def test_a_cache_that_keeps_something_else_is_refused_by_its_key(kept, record, words, told):
    path = kept / "cache" / "cache.json"
    text = path.read_text()
    path.write_text(json.dumps({**json.loads(text), **record}))
    given = ["teacher.keep=sampled", "teacher.k=12", "kd_loss_fn.temperature=2"]
    try:
        with pytest.raises(ConfigError, match=told):
            open_cache(config(kept, *(given if "keep" in record else []), *words))
    finally:
        path.write_text(text)


def test_a_note_that_cannot_be_written_beside_a_cache_ends_no_run(tmp_path):
    from ds_kd.recipe.offline.teacher import _note_verified

    (tmp_path / "verified.json").mkdir()  # as a disk that can only be read refuses the file
    _note_verified(tmp_path, ALONE)


def test_software_that_has_not_run_the_teacher_yet_compares_it_if_it_is_at_hand(kept):
    path = kept / "cache" / "verified.json"
    told = json.loads(path.read_text())
    path.write_text(json.dumps([text.replace("torch", "another torch") for text in told]))
    try:
        with pytest.raises(AssertionError, match="the teacher is loaded"):
            open_cache(config(kept))
        open_cache(config(kept, "teacher_model=null"))
    finally:
        path.write_text(json.dumps(told))


def test_absent_samples_are_named_before_the_first_step(kept):
    with pytest.raises(ConfigError) as caught:
        open_cache(config(kept, rows="more"))
    told = str(caught.value)
    assert "2 of 8 samples lack theirs (dataset 6, dataset 7)" in told
    assert "launch/cache_teacher.py" in told and "teacher.fill: true" in told
    assert "chat template" not in told
    record = kept / "cache" / "cache.json"
    kept_text = record.read_text()
    record.write_text(json.dumps({**json.loads(kept_text), "template": "another"}))
    try:
        with pytest.raises(ConfigError, match="made with another chat template"):
            open_cache(config(kept, rows="more"))
    finally:
        record.write_text(kept_text)


def test_another_teacher_dtype_tokenizer_and_a_damaged_record_are_refused_by_name(kept, tmp_path):
    other = {"pretrained_model_name_or_path": str(kept / "other")}
    with pytest.raises(
        ConfigError, match=r"teacher_model: got '.*/other', expected the cached one"
    ):
        open_cache(config(kept, teacher_model=other))
    with pytest.raises(ConfigError, match=r"teacher\.dtype: got 'fp32', expected float16"):
        open_cache(config(kept, "teacher.dtype=fp32"))
    with pytest.raises(ConfigError, match=r"teacher\.keep: got 'sampled', expected hidden, what"):
        open_cache(config(kept, "teacher.keep=sampled"))
    with pytest.raises(ConfigError, match="torch_dtype: got 'bfloat16', expected float32"):
        open_cache(config(kept, "teacher_model.torch_dtype=bf16"))
    words = ["<unk>", "<eos>", "<pad>", *(f"w{i}" for i in reversed(range(93)))]
    tiny.llama(tmp_path / "student", layers=1, hidden=16)
    tiny.tokenizer(tmp_path / "student", words=words)
    student = {"pretrained_model_name_or_path": str(tmp_path / "student"), "torch_dtype": "fp32"}
    with pytest.raises(ConfigError, match=r"gives ids other tokens than that of .*/teacher"):
        open_cache(config(kept, "teacher_model=null", model=student))
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "cache.json").write_text('{"teacher": 3')
    with pytest.raises(ConfigError, match=r"cache\.json cannot be read; delete the directory"):
        open_cache(config(kept, f"teacher.directory={tmp_path / 'cache'}"))


def test_two_runs_that_begin_a_cache_at_once_have_the_same_teacher(kept, tmp_path):
    """Each found no record before it loaded its teacher, which may take minutes."""
    from ds_kd.recipe.offline.record import read_record
    from ds_kd.recipe.offline.teacher import begin_cache

    own = read_record(kept / "cache")
    head = load_file(kept / "cache" / "head.safetensors")
    for name in ("teacher", "./teacher"):
        begin_cache(tmp_path, dataclasses.replace(own, teacher=name), head)
    other = dataclasses.replace(own, identity="other", teacher="large")
    with pytest.raises(ConfigError, match=r"teacher\.directory: .*begun the cache of ./teacher"):
        begin_cache(tmp_path, other, {"weight": head["weight"] * 2})
    assert read_record(tmp_path).identity == own.identity
    assert torch.equal(load_file(tmp_path / "head.safetensors")["weight"], head["weight"])


def test_the_check_names_what_a_cached_teacher_lacks(place, tmp_path):
    def told(*words, **values):
        with pytest.raises(ConfigError) as caught:
            config(place, *words, **values)
        return str(caught.value)

    assert "teacher.directory: missing; name the directory that python launch" in told(
        teacher={"kind": "cached"}
    )
    assert "expected a directory with cache.json" in told(f"teacher.directory={tmp_path}")
    assert told("teacher.directory=[a]").count("teacher.directory") == 1
    filled = {"kind": "cached", "directory": str(tmp_path), "fill": True}
    assert "teacher_model: missing; teacher.fill runs it" in told(
        "teacher_model=null", teacher=filled
    )
    kl = {"tasks": [{"task": "kl", "data": str(place / "rows.jsonl")}]}
    assert "kl asks the teacher about other rows" in told(teacher=filled, evaluation=kl)
    losses = [{"name": "forward_kl", "weight": 1}, {"name": "hidden_states", "layers": [[0, 0]]}]
    assert "keeps the last one alone" in told(
        teacher=filled, kd_loss_fn=[losses[0], {**losses[1], "weight": 1}]
    )
    draws = {**filled, "keep": "sampled", "k": 12}
    assert "expected hidden, or kd_loss_fn: {name: forward_kl}" in told(
        teacher=draws, kd_loss_fn={"name": "reverse_kl"}
    )
    assert "teacher.k: got 12, expected at least kd_loss_fn.k 64" in told(
        teacher={**draws, "keep": "top_k"}, kd_loss_fn={"name": "top_k"}
    )
    config(place, teacher=draws)
    model = str(place / "teacher")
    assert "expected a new directory, an empty one, or a cache; it holds config.json" in told(
        teacher={**filled, "directory": model}
    )
    resident = config(place, teacher={"directory": "x"})
    assert "teacher.directory: has no effect, as teacher.kind is resident" in resident.notes


def test_the_plans_tell_the_bytes_of_a_cache_and_load_no_model(kept, capsys):
    from ds_kd.plan.dry_run import plan_of

    plan = plan_of(config(kept))
    # 6 answers of two words and an end, each 16 numbers of 2 bytes, a key and a checksum.
    assert f"{6 * 3 * (32 + 24)} B for about 18 supervised tokens of training" in plan
    assert "teacher's head" in plan and "teacher weights" not in plan
    (kept / "run.yaml").write_text(config(kept, rows="more", teacher=None).text)
    command = script("cache_teacher")
    words = ["--config", str(kept / "run.yaml"), "--output", str(kept / "cache"), "--dry-run"]
    # The teacher is whole here, whatever the run that will read the cache cuts.
    assert command.main([*words, "distributed.tp_size=2", "teacher_distributed.tp_size=2"]) == 0
    out = capsys.readouterr().out
    assert "rows: 6 to compute, 18 there, each 16 numbers in float16" in out
    assert f"size: {6 * 56} B to write into {kept / 'cache'}" in out and "time: " in out
    assert command.main([*words[:2], "--dry-run"]) == 2
    assert "teacher.directory: missing" in capsys.readouterr().err
    # A directory whose name YAML would read as a number.
    assert command.main([*words[:2], "--output", "2024", "--dry-run"]) == 0
    assert "to write into 2024" in capsys.readouterr().out
