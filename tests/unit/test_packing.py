"""Packs: how they are filled, and that nothing in a pack sees its neighbours."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from ds_kd.config.load import load
from ds_kd.data.collate import default_collater
from ds_kd.data.own import OwnSamples
from ds_kd.data.packing import PackedDataset, lengths_of, pack, segments_of
from ds_kd.data.sampler import FILLER, WithFiller
from ds_kd.errors import TrainingError
from ds_kd.losses.chunked import DistillationLoss
from ds_kd.losses.cross_entropy import MaskedCrossEntropy
from ds_kd.losses.divergences import KDLoss
from ds_kd.losses.head import States
from ds_kd.models import attention, causal_lm, probes
from ds_kd.models.attention import attend_by_sample
from ds_kd.parallel.world import World
from ds_kd.recipe.models import check_model, may_have_packs
from tests import tiny

SQUAD = Path(__file__).parents[3] / "shared" / "data" / "squad_train.jsonl"


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=60), st.integers(0, 5))
def test_every_sample_is_in_one_pack_and_no_pack_overflows(lengths, seed):
    packs = pack(lengths, 50, seed)
    assert sorted(index for chosen in packs for index in chosen) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in chosen) <= 50 for chosen in packs)
    # No two packs would fit into one, as for any first fit or best fit.
    loads = sorted(sum(lengths[i] for i in chosen) for chosen in packs)
    assert len(loads) < 2 or loads[0] + loads[1] > 50


def test_packs_depend_on_the_seed_and_on_nothing_else():
    lengths = [random.Random(0).randint(1, 9) for _ in range(200)]
    assert pack(lengths, 32, 1) == pack(lengths, 32, 1) != pack(lengths, 32, 2)


@pytest.mark.skipif(not SQUAD.exists(), reason=f"needs the real rows of {SQUAD.name}")
@pytest.mark.parametrize("size", [1024, 2048])
def test_real_rows_fill_their_packs(size):
    rows = [json.loads(line) for line in SQUAD.read_text().splitlines()]
    # About 1.35 tokens a word, as SmolLM2's tokenizer makes of them.
    words = [round(1.35 * len((r["context"] + r["question"]).split())) + 40 for r in rows]
    assert sum(words) / (size * len(pack(words, size, 0))) >= 0.97


def test_a_sample_longer_than_a_pack_is_named():
    with pytest.raises(ValueError, match="sample 1 has 9 tokens; give packed_sequence_size: 9"):
        pack([3, 9], 8, 0)


def test_padding_of_the_data_set_is_not_packed():
    sample = {"input_ids": [5, 6, 0, 0], "labels": [6, 7, -100, -100], "sample_id": "a"}
    packed = PackedDataset([{**sample, "num_tokens": 2}] * 2, 8)
    assert packed[0]["input_ids"] == [5, 6, 5, 6] and packed.fill == 0.5


def test_samples_of_a_users_own_packs_stay_apart_in_packs():
    own = {"input_ids": [5, 6, 7], "labels": [6, -100, 8], "segment_lengths": [2, 1]}
    packed = PackedDataset(OwnSamples([own, own], 10), 8)
    assert packed[0]["input_ids"] == [5, 6, 7] * 2
    assert packed[0]["segment_lengths"] == [2, 1, 2, 1]
    padded = {"input_ids": [5] * 10, "labels": [6] * 10, "segment_lengths": [4, 6], "num_tokens": 8}
    other = {"input_ids": [7] * 3, "labels": [8] * 3}
    packed = PackedDataset([padded, other], 11)
    assert sorted(packed[0]["segment_lengths"]) == [3, 4, 4]
    assert sum(packed[0]["segment_lengths"]) == len(packed[0]["input_ids"]) == 11
    assert segments_of(padded, 4) == [4]


def test_lengths_of_a_hugging_face_data_set():
    import datasets

    rows = datasets.Dataset.from_list([{"input_ids": [1] * n, "labels": [1] * n} for n in (3, 1)])
    assert lengths_of(rows) == [3, 1]
    assert lengths_of(rows.select([1])) == [1]
    assert lengths_of(rows.add_column("num_tokens", [2, 1])) == [2, 1]


def test_a_batch_of_packs_is_one_row_without_padding():
    packed = PackedDataset(tiny.samples(12), 40)
    batch = default_collater([packed[k] for k in range(len(packed))])
    lengths = batch["segment_lengths"]
    assert batch["input_ids"].shape == (1, sum(lengths)) and len(lengths) == 12
    assert batch["num_slots"] == batch["num_tokens"] == sum(lengths)
    assert batch["position_ids"][0].tolist() == [p for n in lengths for p in range(n)]
    assert sorted(batch["sample_ids"]) == sorted(f"s{i}" for i in range(12))


def test_a_filler_among_packs_counts_for_nothing():
    data = WithFiller(PackedDataset(tiny.samples(3), 40))
    batch = default_collater([data[0], data[FILLER]], pad_seq_len_divisible=8)
    whole = default_collater([data[0]])
    assert batch["num_labels"] == whole["num_labels"] and batch["num_tokens"] == whole["num_tokens"]
    assert batch["input_ids"].shape[1] % 8 == 0
    assert sum(batch["segment_lengths"]) == batch["num_slots"] == batch["input_ids"].shape[1]


# ---- packed ≡ unpacked ---------------------------------------------------------------------------


def architecture(name, **extra):
    """A tiny random model of a family."""
    import transformers as hf

    torch.manual_seed(0)
    common = dict(
        vocab_size=tiny.VOCAB,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        initializer_range=0.2,
        pad_token_id=2,
    )
    common |= extra
    config = {
        "llama": lambda: hf.LlamaConfig(**common),
        "qwen3": lambda: hf.Qwen3Config(**common),
        "mistral": lambda: hf.MistralConfig(**common, sliding_window=4),
        "gemma2": lambda: hf.Gemma2Config(**common, sliding_window=4, query_pre_attn_scalar=8),
        "gemma3": lambda: hf.Gemma3TextConfig(**common, sliding_window=4, query_pre_attn_scalar=8),
        "mixtral": lambda: hf.MixtralConfig(**common, num_local_experts=4),
        "phimoe": lambda: hf.PhimoeConfig(**common, num_local_experts=4, attention_bias=False),
        "gpt_oss": lambda: hf.GptOssConfig(**common, num_local_experts=4, sliding_window=4),
    }[name]()
    return hf.AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def student_of(model, chunk=5):
    loss = DistillationLoss(MaskedCrossEntropy(), KDLoss(chunk_size=chunk), 0.0)
    return causal_lm.Student(model, loss)


@pytest.mark.parametrize("name", ["llama", "qwen3", "mistral", "gemma2", "gemma3", "mixtral"])
def test_packed_losses_and_gradients_equal_those_of_single_samples(name):
    model = architecture(name)
    rows = tiny.samples(7, seed=3)
    module = student_of(model).eval()  # no dropout
    for row in rows:
        module(default_collater([row]))[0].backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters()}
    one_by_one = sum(module(default_collater([row]))[0].item() for row in rows)
    model.zero_grad()
    attend_by_sample(model)
    packed = PackedDataset(rows, 48)
    loss, _ = module(default_collater([packed[k] for k in range(len(packed))]))
    loss.backward()
    assert loss.item() == pytest.approx(one_by_one, rel=1e-5)
    scale = max(g.abs().max().item() for g in expected.values())
    for n, p in model.named_parameters():
        assert (p.grad - expected[n]).abs().max().item() <= 1e-5 * scale, n


def test_attention_by_sample_is_used_where_it_computes_the_same():
    kinds = {}
    for name in ("llama", "mistral", "gemma2"):
        model = architecture(name)
        attend_by_sample(model)
        kinds[name] = model.config._attn_implementation
    # Gemma 2 caps its attention scores, which SDPA cannot: it stays eager, with a block mask.
    assert kinds == {"llama": attention.NAME, "mistral": attention.NAME, "gemma2": "eager"}


class Engine:
    """The parts of an engine that the probes use, without DeepSpeed: calls go to the module."""

    def __init__(self, model):
        self.module = student_of(model).eval()
        self.training, self.eval, self.train = False, self.module.eval, self.module.train

    def __call__(self, batch, probe):
        return self.module(batch, probe=probe)


CPU = torch.device("cpu")


@pytest.mark.parametrize("name", ["llama", "qwen3", "mistral", "gemma2", "mixtral"])
def test_probes_pass_where_packs_are_right(name):
    model = architecture(name)
    attend_by_sample(model)
    chosen = attention.is_by_sample(model)
    probes.check_head(Engine(model), CPU, "model")
    probes.check_packing(Engine(model), CPU, "model")
    assert attention.is_by_sample(model) == chosen  # right as it was


def test_a_window_that_lives_only_in_the_mask_gets_its_mask_back():
    for window in (4, 4000):
        model = architecture("phimoe", sliding_window=window)
        attend_by_sample(model)
        assert attention.is_by_sample(model)
        probes.check_packing(Engine(model), CPU, "model")
        assert not attention.is_by_sample(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_whose_samples_see_each_other_is_refused(dtype):
    model = architecture("llama").to(dtype)
    body = model.base_model.forward
    # It forgets where samples begin, as a class that hands no arguments on does.
    model.base_model.forward = lambda position_ids=None, segments=None, **rest: body(**rest)
    attend_by_sample(model)
    with pytest.raises(ValueError, match=r"see each other.*Remove packed_sequence"):
        probes.check_packing(Engine(model), CPU, "model")


def config_of(**sections):
    models = {part: {"pretrained_model_name_or_path": "of/hub"} for part in
              ("model", "teacher_model")}  # fmt: skip
    squad = {"_target_": "ds_kd.data.squad.make_squad_dataset", "dataset_name": "of/hub"}
    return load({**models, "dataset": squad, **sections}, [], allow=("own_packs",))


def test_a_users_own_packs_are_given_to_models_alone_that_keep_them_apart():
    """Without packed_sequence too, and from an own data set or an own collater."""
    import transformers as hf

    own = {"dataset": {"_target_": "own_packs.rows"}}
    cfg = config_of(**own)
    rows = tiny.samples(2, seed=3)
    lengths = [len(row["input_ids"]) for row in rows]
    ids, labels = ([i for row in rows for i in row[name]] for name in ("input_ids", "labels"))
    pack = {"input_ids": ids, "labels": labels, "segment_lengths": lengths, "sample_id": "mine"}
    mamba = hf.MambaConfig(
        vocab_size=tiny.VOCAB,
        hidden_size=32,
        num_hidden_layers=2,
        state_size=8,
        initializer_range=0.2,
    )
    for model, apart in (
        (architecture("llama"), True),
        (architecture("gpt_oss"), False),
        (hf.MambaForCausalLM(mamba), False),
    ):
        engine = Engine(model)
        check_model(cfg, cfg.model, engine, World(0, 1, CPU, "gloo"))
        one_by_one = sum(engine.module(default_collater([row]))[0].item() for row in rows)
        if apart:
            together = engine.module(default_collater([pack]))[0].item()
            assert together == pytest.approx(one_by_one, rel=1e-5)
        else:
            words = r"samples mine\): model: in .* see each other .*Return texts one by one"
            with pytest.raises(TrainingError, match=words):
                engine.module(default_collater([pack]))


def test_only_code_of_the_users_may_give_packs_of_its_own():
    own = {"_target_": "own_packs.rows"}
    assert not may_have_packs(config_of())
    assert may_have_packs(config_of(dataset=own))
    assert may_have_packs(config_of(validation_dataset=own))
    assert may_have_packs(config_of(dataloader={"collate_fn": "own_packs.collate"}))


def test_a_mask_made_without_positions_is_refused_in_packs():
    with pytest.raises(ValueError, match=r"see each other.*Remove packed_sequence"):
        probes.check_packing(Engine(architecture("gpt_oss")), CPU, "model")


def test_a_class_that_ignores_positions_is_refused_in_packs():
    import transformers as hf

    config = hf.OpenAIGPTConfig(
        vocab_size=96, n_positions=64, n_embd=32, n_layer=2, n_head=4, initializer_range=0.2
    )
    model = hf.OpenAIGPTLMHeadModel(config).eval()
    with pytest.raises(ValueError, match=r"see each other.*Remove packed_sequence"):
        probes.check_packing(Engine(model), CPU, "model")


def test_a_soft_cap_of_any_name_is_refused():
    model = architecture("llama")
    plain = model.forward

    def capped(**arguments):
        out = plain(**arguments)
        out.logits = 30.0 * torch.tanh(out.logits / 30.0)
        return out

    model.lm_head.weight.data *= 0.01  # of logits this small the cap takes nothing
    model.forward = capped
    with pytest.raises(ValueError, match="computes its logits in a way this loss does not know"):
        probes.check_head(Engine(model), CPU, "model")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_that_is_not_causal_is_refused(dtype):
    import transformers as hf

    torch.manual_seed(0)
    config = hf.BertGenerationConfig(
        vocab_size=96,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        initializer_range=0.2,
    )
    model = hf.BertGenerationDecoder(config).to(dtype).eval()
    with pytest.raises(ValueError, match="is not causal"):
        probes.check_head(Engine(model), CPU, "model")


# ---- counted, not timed --------------------------------------------------------------------------


class Counting(TorchDispatchMode):
    """Counts host synchronisations, and rows that meet a matrix of vocabulary size."""

    def __init__(self):
        super().__init__()
        self.syncs, self.head_rows = [], 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        name = op.overloadpacket.__name__
        if name in ("_local_scalar_dense", "nonzero", "equal"):
            self.syncs.append(name)
        if name == "mm" and args[1].shape[1] == tiny.VOCAB:
            self.head_rows += args[0].shape[0]
        return op(*args, **(kwargs or {}))


@pytest.mark.parametrize("chunk", [4, 64])
def test_only_supervised_rows_meet_the_head_and_the_loss_waits_for_nothing(chunk):
    model = architecture("llama")
    module = student_of(model, chunk)
    batch = default_collater(tiny.samples(6))
    hidden = module.hidden(batch)
    with Counting() as counted:
        loss, _ = module.loss(States(hidden, module.head()), batch["supervised_labels"])
        loss.backward()
    assert counted.head_rows == batch["num_labels"] < batch["input_ids"].numel()
    assert counted.syncs == []


def test_the_last_mlp_sees_supervised_rows_only():
    model = architecture("llama")
    module = student_of(model)
    batch = default_collater(tiny.samples(6))
    seen = {}
    for number, layer in enumerate(model.base_model.layers):
        layer.mlp.gate_proj.register_forward_hook(
            lambda _, args, out, number=number: seen.update({number: out.numel() // out.shape[-1]})
        )
    module.hidden(batch)
    assert seen == {0: batch["num_slots"], 1: batch["num_slots"], 2: batch["num_labels"]}
    model(input_ids=batch["input_ids"])  # as a user calls it: whole
    assert seen[2] == batch["num_slots"]


def test_a_last_mlp_that_returns_more_than_hidden_states_stays_whole():
    model = architecture("gpt_oss").eval()  # its MLP returns the router's scores too
    row = tiny.samples(1)[0]
    loss, _ = student_of(model)(default_collater([row]))
    logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0]
    expected = MaskedCrossEntropy()(logits, torch.tensor(row["labels"]))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_with_activation_checkpointing_the_last_mlp_stays_whole_and_right():
    model = architecture("llama")
    module = student_of(model).train()
    batch = default_collater(tiny.samples(6))
    grads = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.zero_grad()
        module(batch)[0].backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    for a, b in zip(*grads, strict=True):
        assert torch.allclose(a, b, atol=1e-6)
