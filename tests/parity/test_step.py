"""One optimizer step under real ZeRO-3 equals plain PyTorch, however the batch was cut."""

from __future__ import annotations

import copy
import io
import itertools

import pytest
import torch

from tests import tiny
from tests.ranks import run_ranks

# (micro-batches per rank, samples per micro-batch)
SPLITS = [(1, 6), (2, 3), (6, 1)]
RATIOS = [0.0, 0.5, 1.0]
TEMPERATURE = 2.0
CHUNK = 5  # tokens whose logits exist at one time; divides none of the label counts but by chance
PACK = 40  # tokens, of samples of 5 to 13
# Samples 3, 4, 5 have no label: a whole masked micro-batch for 2×3 (on one rank of two), three of
# them for 6×1.
MASKED = (3, 4, 5)


def build(
    world,
    paths,
    rows,
    accumulation,
    local,
    alpha,
    optimizer,
    temperature=TEMPERATURE,
    packs=False,
    checkpointing=False,
    compiled=False,
    adapt=None,
    dtype=torch.float32,
    lr_scheduler=None,
    layer_losses=(),
    zero=None,
    whole_teacher=False,
    **extra,
):
    """A real Trainer over `rows` from the saved student and teacher; `adapt` is called with the
    student's HF model."""
    from torchdata.stateful_dataloader import StatefulDataLoader
    from transformers import AutoConfig, AutoModelForCausalLM

    from ds_kd.checkpoint.state import TrainState
    from ds_kd.config.checks.zero_file import load_zero_config
    from ds_kd.data.collate import default_collater
    from ds_kd.data.sampler import GlobalBatchSampler, WithFiller
    from ds_kd.losses.chunked import DistillationLoss
    from ds_kd.losses.cross_entropy import MaskedCrossEntropy
    from ds_kd.losses.divergences import KDLoss
    from ds_kd.models import causal_lm
    from ds_kd.models.attention import attend_by_sample
    from ds_kd.parallel import engines
    from ds_kd.parallel.sequence import Exchange
    from ds_kd.parallel.tensor import cut_layers
    from ds_kd.recipe.models import check_whole
    from ds_kd.teachers.resident import ResidentTeacher
    from ds_kd.train.batches import LoaderBatches
    from ds_kd.train.metrics import Metrics
    from ds_kd.train.parts import TakePart
    from ds_kd.train.schedule import Schedule
    from ds_kd.train.trainer import Trainer
    from ds_kd.train.validation import Validation

    config = engines.engine_config(
        load_zero_config(zero, "deepspeed.student"),
        dtype,
        local,
        accumulation,
        None,
    )

    def cut(name):
        of_model = AutoConfig.from_pretrained(paths[name])
        trains = name == "student" and adapt is None
        ranks = 1 if whole_teacher and name == "teacher" else world.tensor.size
        return config | cut_layers(of_model, ranks, trains)

    def load(path, adapt=None):
        with engines.zero3_init(config):
            loaded = AutoModelForCausalLM.from_pretrained(
                path, dtype=dtype, output_loading_info=True
            )
            model = check_whole(loaded, [])
            if adapt is not None:
                adapt(model)
        if packs or world.sequence.size > 1:
            attend_by_sample(model)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        return model

    teacher = None
    if alpha > 0:
        frozen = causal_lm.FrozenModel(load(paths["teacher"]))
        frozen.exchange = Exchange(world.sequence)
        frozen.watch(other for _, part in layer_losses for _, other in part.pairs)
        engine = engines.build_teacher(frozen, copy.deepcopy(cut("teacher")))
        teacher = ResidentTeacher(engine)
    loss = DistillationLoss(
        MaskedCrossEntropy(), KDLoss(temperature=temperature, chunk_size=CHUNK), alpha
    )
    student = load(paths["student"], adapt)
    module = causal_lm.Student(student, loss, layer_losses)
    module.exchange = Exchange(world.sequence)
    module.tensor = world.tensor
    config = cut("student")
    student = engines.build_student(module, config, optimizer, lr_scheduler)
    if compiled:
        for engine in (teacher.engine, student):
            causal_lm.compile_layers(engine.module.model)
    student.train()
    place = world.data.rank, world.data.size
    sampler = GlobalBatchSampler(len(rows), accumulation * local * world.data.size, local, *place)
    collate = TakePart(default_collater, world.sequence.rank, world.sequence.size)
    loader = StatefulDataLoader(WithFiller(rows), batch_sampler=sampler, collate_fn=collate)
    batches = LoaderBatches(loader)
    schedule = Schedule(batches.steps_per_epoch, **extra)
    metrics = Metrics(None, out=io.StringIO(), total_steps=schedule.total_steps)
    validation = Validation({"": loader}, teacher, world)
    return Trainer(
        student, teacher, batches, validation, schedule, metrics, None, TrainState(), world
    )


def weights(engine, master: bool = False):
    """The student's whole parameters by HF name, on every rank."""
    from ds_kd.parallel.engines import gather

    out = {}
    for name, parameter in engine.module.model.named_parameters():
        with gather([parameter]):
            out[name] = parameter.detach().clone()
    return out


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=1.0)


def compare_with_plain_pytorch(world, directory, paths):
    from transformers import AutoModelForCausalLM

    from ds_kd.data.packing import PackedDataset
    from ds_kd.data.prefixes import SharedDataset

    teacher = AutoModelForCausalLM.from_pretrained(paths["teacher"])
    errors = {}
    plain = [(alpha, split, {}) for alpha, split in itertools.product(RATIOS, SPLITS)]
    packs = {"packs": True}
    shares = {**packs, "shares": True}
    others = [(0.5, (2, 3), {"checkpointing": True}), (0.5, (1, 2), packs), (0.5, (1, 2), shares)]
    others.append((0.0, (1, 2), {**shares, "checkpointing": True}))
    if world.size == 1:  # the compiler is slow
        others.append((0.5, (1, 2), {**packs, "compiled": True}))
    for alpha, (accumulation, local), kind in plain + others:
        rows = tiny.samples(6 * world.size, seed=world.size, masked=MASKED)
        # Three packs for one rank, five and a filler for two.
        data = PackedDataset(rows, PACK) if "packs" in kind else rows
        if "shares" in kind:
            rows = tiny.branches(rows)
            data = SharedDataset(rows, PACK)
        if "packs" in kind:
            local = -(-len(data) // world.size)
        how = {name: kind[name] for name in kind if name != "shares"}
        trainer = build(world, paths, data, accumulation, local, alpha, sgd, **how)
        before = None if trainer.teacher is None else weights(trainer.teacher.engine)
        logged = trainer.validate()
        trainer.train()
        reference = AutoModelForCausalLM.from_pretrained(paths["student"])
        loss, ce, kd = tiny.reference_means(reference, teacher, rows, alpha, TEMPERATURE)
        loss.backward()
        moved = max(p.grad.abs().max().item() for p in reference.parameters())
        got = weights(trainer.student)
        error = max(
            (got[n] - (p - p.grad)).abs().max().item() for n, p in reference.named_parameters()
        )
        parts = [abs(logged["loss"] - loss.item()), abs(logged["ce_loss"] - ce.item())]
        if alpha > 0:
            parts.append(abs(logged["kd_loss"] - kd.item()))
        case = {"error": error, "moved": moved, "logged": max(parts)}
        case["validated"] = trainer.validate()["loss"] < logged["loss"]
        if before is not None:
            after = weights(trainer.teacher.engine)
            case["teacher_same"] = all(torch.equal(before[n], after[n]) for n in before)
            case["teacher_state"] = hasattr(trainer.teacher.engine.optimizer, "optimizer")
            frozen = trainer.teacher.engine.parameters()
            case["teacher_grad"] = any(p.grad is not None for p in frozen)
            case["teacher_training"] = trainer.teacher.engine.module.model.training
        errors[f"{accumulation}x{local} alpha={alpha} {kind}"] = case
    return {
        "cases": errors,
        "refused": refused_steps(world, paths),
        "layers": compare_layers(world, paths, teacher),
        "waits": count_waits(world, paths),
    }


def count_waits(world, paths):
    """Return the steps of a run, and how often DeepSpeed had the host wait for the whole device."""
    from deepspeed.accelerator import get_accelerator

    waits, accelerator = [], get_accelerator()
    rows = tiny.samples(6 * world.size, seed=world.size)
    trainer = build(world, paths, rows, 3, 2, 0.5, sgd, num_epochs=5)
    accelerator.synchronize = lambda *_: waits.append(trainer.state.step)
    try:
        trainer.train()
    finally:
        del accelerator.synchronize  # that of its class again
    return trainer.state.step, waits


def compare_layers(world, paths, teacher):
    """The largest errors of a step with a loss of layers: of the student's weights, of the
    projectors', of what is logged, and the validation's total."""
    from transformers import AutoModelForCausalLM

    from ds_kd.data.prefixes import SharedDataset
    from ds_kd.losses.named.hidden_states import HiddenStates

    found = []
    for distance, kind in itertools.product(("cosine", "mse"), ("plain", "checkpointed", "shared")):
        part = HiddenStates([[0, 0], [0, 1]], distance)
        part.add_projectors(32, 64, seed=7)
        projectors = copy.deepcopy(part.projectors)
        rows = tiny.samples(6 * world.size, seed=world.size, masked=MASKED)
        data = rows
        if kind == "shared":
            rows = tiny.branches(rows)
            data = SharedDataset(rows, PACK)
        local = -(-len(data) // world.size)
        how = {"packs": kind == "shared", "checkpointing": kind == "checkpointed"}
        trainer = build(world, paths, data, 1, local, 0.5, sgd, layer_losses=[(0.3, part)], **how)
        logged = trainer.validate()
        trainer.train()

        # The definition: transformers' own hidden states, one sample at a time.
        reference = AutoModelForCausalLM.from_pretrained(paths["student"])
        loss, *_ = tiny.reference_means(reference, teacher, rows, 0.5, TEMPERATURE)
        between, n = 0.0, sum(label != -100 for row in rows for label in row["labels"])
        for row in rows:
            ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])
            ask = {"input_ids": ids, "use_cache": False, "output_hidden_states": True}
            own = reference(**ask).hidden_states
            other = teacher(**ask).hidden_states
            for (mine, its), projector in zip(part.pairs, projectors, strict=True):
                h_s, h_t = projector(own[mine + 1][0]), other[its + 1][0].detach()
                each = (h_s - h_t).pow(2).mean(-1)
                if distance == "cosine":
                    each = 1 - (h_s * h_t).sum(-1) / (h_s.norm(dim=-1) * h_t.norm(dim=-1))
                between = between + 0.3 * each[labels != -100].sum() / len(part.pairs)
        (loss + 0.5 * between / n).backward()
        got = weights(trainer.student)
        got |= {f"projectors.{n}": w for n, w in whole(trainer.student.module.layer_losses).items()}
        expected = dict(reference.named_parameters())
        expected |= {f"projectors.0.projectors.{n}": w for n, w in projectors.named_parameters()}
        moved = min(w.grad.abs().max() for n, w in expected.items() if n.startswith("projectors"))
        found.append({
            "case": f"{distance} {kind}",
            "names": sorted(got) == sorted(expected),
            "error": max((got[n] - (w - w.grad)).abs().max().item() for n, w in expected.items()),
            "moved": moved.item(),
            "logged": abs(logged["hidden_loss"] - (between / n).item()),
            "total": abs(logged["loss"] - (loss + 0.5 * between / n).item()),
        })  # fmt: skip
    return found


def whole(module):
    """A module's whole parameters by name, on every rank."""
    import deepspeed

    with deepspeed.zero.GatheredParameters([*module.parameters()]):
        return {name: p.detach().clone() for name, p in module.named_parameters()}


def refused_steps(world, paths):
    """The messages of a step without any label and of a step whose loss is not finite."""
    from ds_kd.errors import TrainingError

    def message(rows, optimizer):
        trainer = build(world, paths, rows, 1, 2, 0.5, optimizer, num_epochs=3)
        try:
            trainer.train()
        except TrainingError as error:
            return str(error)
        return "none"

    rows = tiny.samples(2 * world.size)
    masked = tiny.samples(2 * world.size, masked=tuple(range(2 * world.size)))

    def nan_gradient():
        """The message, and whether the weights stayed."""
        trainer = build(world, paths, rows, 1, 2, 0.5, sgd)
        loss = trainer.student.module.loss

        def spoiled(student, *rest):
            value, sums = loss(student, *rest)
            # Adds 0; its slope there is not finite.
            return value + torch.sqrt(student.hidden.sum() * 0.0), sums

        trainer.student.module.loss = spoiled
        before = weights(trainer.student)
        try:
            trainer.train()
        except TrainingError as error:
            after = weights(trainer.student)
            return [str(error), all(torch.equal(before[n], after[n]) for n in before)]
        return ["none", False]

    def infinite_loss():
        """Steps of infinite loss and finite gradient, one of which may be left out: (skipped,
        message, whether the weights stayed, what the step left out says)."""
        trainer = build(world, paths, rows, 1, 2, 0.5, sgd, num_epochs=3)
        trainer.max_skipped = 1
        loss = trainer.student.module.loss

        def endless(*inputs):
            value, sums = loss(*inputs)
            return value + float("inf"), sums

        trainer.student.module.loss = endless
        before = weights(trainer.student)
        try:
            trainer.train()
        except TrainingError as error:
            after = weights(trainer.student)
            same = all(torch.equal(before[n], after[n]) for n in before)
            return [trainer.state.skipped, str(error), same, trainer.metrics.out.getvalue()]
        return []

    def measured():
        """Return whether a teacher that only validation looks at leaves training as it was, and
        what is logged of it."""
        plain, trainer = (build(world, paths, rows, 1, 2, 0.0, sgd) for _ in range(2))
        other = build(world, paths, rows, 1, 2, 0.5, sgd)
        trainer.validation.teacher = other.teacher
        seen = trainer.validate()
        expected = other.validate()
        trainer.train()
        plain.train()
        one, two = weights(plain.student), weights(trainer.student)
        return [
            all(torch.equal(one[n], two[n]) for n in one),
            seen,
            expected,
            trainer.metrics.out.getvalue(),
        ]

    def skipping():
        """Two spoiled steps where one may be left out: (steps done, skipped, message, same)."""
        trainer = build(world, paths, rows, 1, 2, 0.5, sgd, num_epochs=3)
        trainer.max_skipped = 1
        loss = trainer.student.module.loss
        trainer.student.module.loss = lambda *inputs: [
            part * float("nan") if k == 0 else part for k, part in enumerate(loss(*inputs))
        ]
        before = weights(trainer.student)
        try:
            trainer.train()
        except TrainingError as error:
            after = weights(trainer.student)
            state = trainer.state
            same = all(torch.equal(before[n], after[n]) for n in before)
            return [state.step, state.skipped, str(error), same]
        return []

    diverging = message(rows, lambda p: torch.optim.SGD(p, lr=1e30))
    return [
        message(masked, sgd),
        diverging,
        nan_gradient(),
        skipping(),
        infinite_loss(),
        measured(),
    ]


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {
        "student": str(tiny.llama(root / "student", seed=1)),
        "teacher": str(tiny.llama(root / "teacher", layers=3, hidden=64, tie=False, seed=2)),
    }


@pytest.fixture(scope="module", params=[1, 2], ids=["1 rank", "2 ranks"])
def results(request, paths, tmp_path_factory):
    return run_ranks(
        compare_with_plain_pytorch, request.param, tmp_path_factory.mktemp("ranks"), paths
    )[0]


@pytest.fixture(scope="module")
def cases(results):
    return results["cases"]


def test_gradients_equal_plain_pytorch_for_every_split_and_kd_ratio(cases):
    # lr 1 SGD: the parameter difference is the gradient difference.
    assert len(cases) >= len(SPLITS) * len(RATIOS) + 4
    for name, case in cases.items():
        assert case["moved"] > 0.05, (
            f"{name}: the reference hardly moves, so this would prove nothing"
        )
        assert case["error"] <= 1e-6, f"{name}: {case}"


def test_deepspeed_never_has_the_host_wait_for_the_whole_device(results):
    """Its timer of samples per second would, at each forward from the third step on."""
    steps, waits = results["waits"]
    assert steps == 5 and waits == []


def test_a_loss_of_layers_moves_student_and_projectors_as_its_definition_in_plain_pytorch(results):
    assert len(results["layers"]) == 6
    for case in results["layers"]:
        assert case["names"] and case["moved"] > 1e-3, case
        assert case["error"] <= 1e-6 and case["logged"] <= 1e-5 and case["total"] <= 1e-5, case


def test_logged_losses_are_the_optimised_token_means(cases):
    # fp32 sums of about 60 tokens: 1e-5 is rounding.
    assert all(case["logged"] <= 1e-5 for case in cases.values()), cases


def test_teacher_is_frozen_and_carries_no_optimizer(cases):
    with_teacher = [case for case in cases.values() if "teacher_same" in case]
    assert len(with_teacher) >= 8
    for case in with_teacher:
        assert case["teacher_same"] and not case["teacher_state"]
        assert not case["teacher_grad"] and not case["teacher_training"]


def test_a_step_without_labels_names_its_samples_instead_of_dividing_by_zero(results):
    assert "no supervised token" in results["refused"][0] and "s0, s1" in results["refused"][0]


def test_a_loss_that_is_not_finite_stops_every_rank_and_names_the_samples(results):
    assert "is nan" in results["refused"][1] or "is inf" in results["refused"][1]
    assert "s0, s1" in results["refused"][1]


def test_a_gradient_that_is_not_finite_stops_every_rank_before_weights_move(results):
    message, same = results["refused"][2]
    assert "gradient norm of step 1 is nan" in message and "s0, s1" in message
    assert same


def test_as_many_steps_as_allowed_are_left_out_and_the_next_stops_the_run(results):
    step, skipped, message, same = results["refused"][3]
    assert (step, skipped) == (1, 1)
    assert "of step 2 is nan" in message and same


def test_a_step_whose_loss_alone_is_not_finite_is_left_out_too(results):
    skipped, message, same, told = results["refused"][4]
    assert skipped == 1 and "step 1 left out" in told and "step 1/3" not in told
    assert "the loss of step 2 is inf" in message and "no weight was changed" in message
    assert same


def test_at_kd_ratio_0_validation_is_measured_against_a_teacher_and_training_is_as_without(results):
    same, seen, expected, told = results["refused"][5]
    assert same
    names = {"kd_loss", "top1_agreement", "teacher_entropy", "kl_at_t1", "student_entropy_at_t1"}
    assert names <= set(seen) and all(seen[name] == expected[name] for name in names)
    assert seen["loss"] == seen["ce_loss"]
    step = next(line for line in told.splitlines() if line.startswith("step"))
    assert "kd" not in step
