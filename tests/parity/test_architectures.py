"""Loss and gradients of every causal architecture equal plain transformers, or it is refused:
padded, packed beyond its window, and with checkpointed activations."""

from __future__ import annotations

import pytest
import torch

from ds_kd.data.collate import default_collater
from ds_kd.data.packing import PackedDataset
from ds_kd.losses.chunked import DistillationLoss
from ds_kd.losses.cross_entropy import MaskedCrossEntropy
from ds_kd.losses.divergences import KDLoss
from ds_kd.models import causal_lm, probes
from ds_kd.models.attention import attend_by_sample, is_by_sample
from tests import tiny
from tests.parity.architectures import all_architectures, build

CPU = torch.device("cpu")
#: Dense and mixtures, windows in attention and in the mask, caps, scales, biases, learned and
#: rotary positions, one shared norm and parallel blocks.
CHOSEN = [
    "cohere",
    "gemma2",
    "gpt2",
    "gpt_neox",
    "granite",
    "llama4_text",
    "mistral",
    "mixtral",
    "opt",
    "phimoe",
    "qwen3",
]


class Engine:
    """The parts of an engine that the probes use, without DeepSpeed: calls go to the module."""

    def __init__(self, module):
        self.module, self.training = module, False
        self.eval, self.train = module.eval, module.train

    def __call__(self, batch, probe):
        return self.module(batch, probe=probe)


def plain(model, rows):
    """Loss and gradients, one sample at a time, as transformers computes the logits."""
    total = 0.0
    for row in rows:
        logits = model(input_ids=torch.tensor([row["input_ids"]]), use_cache=False).logits[0]
        loss = torch.nn.functional.cross_entropy(
            logits.float(), torch.tensor(row["labels"]), ignore_index=-100, reduction="sum"
        )
        loss.backward()
        total += loss.item()
    return total, take_gradients(model)


def take_gradients(model):
    taken = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return taken


def compare(kind, model):
    """Raise an AssertionError where a way of running a batch differs from plain transformers, a
    ValueError where the probes refuse the model before it could."""
    rows = tiny.samples(5, seed=3)
    module = causal_lm.Student(
        model, DistillationLoss(MaskedCrossEntropy(), KDLoss(chunk_size=5), 0.0)
    )
    module.eval()
    engine = Engine(module)
    probes.check_head(engine, CPU, kind)
    expected, gradients = plain(model, rows)

    def check(batch, way):
        loss, _ = module(batch)
        loss.backward()
        got = take_gradients(model)
        assert loss.item() == pytest.approx(expected, rel=1e-4), f"{kind}, {way}: the loss"
        scale = max(g.abs().max().item() for g in gradients.values())
        for name, gradient in gradients.items():
            error = (got[name] - gradient).abs().max().item()
            assert error <= 1e-4 * scale, f"{kind}, {way}: the gradient of {name}"

    check(default_collater(rows), "padded")
    if model.supports_gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
        check(default_collater(rows), "checkpointed")
        model.gradient_checkpointing_disable()
        model.eval()
    attend_by_sample(model)
    probes.check_packing(engine, CPU, kind)
    packed = PackedDataset(rows, 64)
    check(default_collater([packed[k] for k in range(len(packed))]), "packed")


@pytest.mark.parametrize("kind", CHOSEN)
def test_losses_and_gradients_equal_plain_transformers(kind):
    compare(kind, build(kind))


def probe(kind, dtype):
    """Return the model after both probes, its samples to be packed."""
    model = build(kind).to(dtype)
    loss = DistillationLoss(MaskedCrossEntropy(), KDLoss(chunk_size=5), 0.0)
    engine = Engine(causal_lm.Student(model, loss).eval())
    probes.check_head(engine, CPU, kind)
    attend_by_sample(model)
    probes.check_packing(engine, CPU, kind)
    return model


@pytest.mark.parametrize("kind", ["mistral", "mixtral", "opt", "qwen3"])
def test_sound_models_pass_in_bfloat16_and_keep_attention_by_sample(kind):
    assert is_by_sample(probe(kind, torch.bfloat16))


@pytest.mark.parametrize("kind", ["mamba", "mamba2", "falcon_mamba"])
def test_state_space_models_train_in_bfloat16_although_some_hidden_states_are_wider(kind):
    model = build(kind).to(torch.bfloat16)
    loss = DistillationLoss(MaskedCrossEntropy(), KDLoss(chunk_size=5), 0.0)
    module = causal_lm.Student(model, loss).eval()
    probes.check_head(Engine(module), CPU, kind)
    total, _ = module(default_collater(tiny.samples(5, seed=3)))
    total.backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert gradients and all(torch.isfinite(gradient).all() for gradient in gradients)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("electra", "cannot be run as a body and a linear head"),
        ("rembert", "cannot be run as a body and a linear head"),
        ("xlm", "is not causal"),  # moves hidden states by four thousandths
        ("xlnet", "is not causal"),
        ("recurrent_gemma", "computes its logits in a way"),
        ("openai-gpt", "see each other"),
        ("mamba", "see each other"),
        ("xmod", "Input language unknown"),
    ],
)
def test_unsound_models_are_refused_in_bfloat16_too(kind, reason):
    with pytest.raises(ValueError, match=f"(?s)^{kind}: .*{reason}"):
        probe(kind, torch.bfloat16)


def test_a_student_that_runs_a_layer_several_times_in_a_pass_is_refused():
    loss = DistillationLoss(MaskedCrossEntropy(), KDLoss(), 0.0)
    engine = Engine(causal_lm.Student(build("hrm_text"), loss).eval())
    with pytest.raises(ValueError, match="runs HrmTextDecoderLayer 6 times in one pass"):
        probes.check_layers(engine, CPU, "student")
    engine = Engine(causal_lm.Student(build("llama"), loss).eval())
    probes.check_layers(engine, CPU, "student")


@pytest.mark.nightly
@pytest.mark.parametrize("kind", all_architectures())
def test_every_architecture_is_right_or_refused(kind):
    try:
        model = build(kind)
    except Exception as error:
        pytest.skip(f"cannot be built tiny: {error}")
    try:
        compare(kind, model)
    except ValueError as error:  # of the probes, in a sentence that names the model
        assert str(error).startswith(f"{kind}: ") or "no language-model head" in str(error)
