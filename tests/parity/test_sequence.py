"""A step whose samples are split over ranks equals plain PyTorch on one, whatever the layout."""

from __future__ import annotations

from contextlib import suppress

import pytest

from ds_kd.config.methods.check_sequence import UNSPLIT
from ds_kd.models import causal_lm, probes
from ds_kd.models.attention import attend_by_sample
from ds_kd.parallel.sequence import Exchange
from tests import tiny
from tests.parity.architectures import all_architectures
from tests.parity.architectures import build as build_model
from tests.parity.test_architectures import Engine
from tests.parity.test_step import MASKED, PACK, TEMPERATURE, build, sgd, weights
from tests.ranks import run_ranks

#: Shapes of attention: (heads, heads of keys and values) of the student and of the teacher.
HEADS = {"even": ((4, 2), (8, 4)), "uneven": ((6, 3), (3, 1))}


#: (shape, kd_ratio, how the step is made) on two ranks that share samples, and on four.
CASES: dict[int, list[tuple[str, float, dict]]] = {
    2: [
        ("even", 0.0, {}),
        ("uneven", 1.0, {}),
        ("uneven", 0.5, {"packs": True}),
    ],
    4: [
        *(("even", alpha, {}) for alpha in (0.0, 0.5, 1.0)),
        ("even", 0.5, {"packs": True, "shares": True}),
        ("uneven", 1.0, {"checkpointing": True}),
        ("uneven", 0.5, {"local": 1}),
    ],
}


def compare_with_plain_pytorch(world, directory, models):
    """The largest errors of a step, by case."""
    from transformers import AutoModelForCausalLM

    from ds_kd.data.packing import PackedDataset
    from ds_kd.data.prefixes import SharedDataset

    found = {}
    for name, alpha, kind in CASES[world.size]:
        paths = models[name]
        rows = tiny.samples(6 * world.data.size, seed=world.data.size, masked=MASKED)
        data = PackedDataset(rows, PACK) if "packs" in kind else rows
        if "shares" in kind:
            rows = tiny.branches(rows)
            data = SharedDataset(rows, PACK)
        per_rank = -(-len(data) // world.data.size)
        local = kind.get("local", 3 if "packs" not in kind else per_rank)
        how = {key: kind[key] for key in kind if key not in ("shares", "local")}
        trainer = build(world, paths, data, -(-per_rank // local), local, alpha, sgd, **how)
        logged = trainer.validate()
        trainer.train()
        reference, teacher = (
            AutoModelForCausalLM.from_pretrained(paths[each]) for each in ("student", "teacher")
        )
        loss, ce, kd = tiny.reference_means(reference, teacher, rows, alpha, TEMPERATURE)
        loss.backward()
        got = weights(trainer.student)
        parts = [abs(logged["loss"] - loss.item()), abs(logged["ce_loss"] - ce.item())]
        parts += [abs(logged["kd_loss"] - kd.item())] if alpha else []
        found[f"{name} alpha={alpha} {kind}"] = {
            "error": max(
                (got[n] - (p - p.grad)).abs().max().item() for n, p in reference.named_parameters()
            ),
            "moved": max(p.grad.abs().max().item() for p in reference.parameters()),
            "logged": max(parts),
        }
    return found


def use_four_ranks(world, directory, models):
    """The errors of steps, and what this rank says of a model that computes parts of samples
    otherwise on the ranks of the second sample alone."""
    cases = compare_with_plain_pytorch(world, directory, models)
    rows = tiny.samples(2 * world.data.size, seed=1)
    student = build(world, models["even"], rows, 1, 2, 0.0, sgd).student

    def double(layer, given, found):
        # A rank's part of the probe is half as long as the whole.
        return found * (1 + world.data.rank) if found.shape[1] == probes._TOKENS else found

    student.module.model.model.layers[0].mlp.register_forward_hook(double)
    try:
        probes.check_parts(student, world.device, "model", world.everyone)
    except ValueError as error:
        return cases, str(error)
    return cases, ""


def make_models(root) -> dict[str, dict[str, str]]:
    """Save student and teacher of every shape; their paths."""
    made = {}
    for name, (own, others) in HEADS.items():
        tie = name == "even"
        # Plain PyTorch in fp32 is within 4e-7 of fp64 with these weights; 1 and 2 give 1.3e-6.
        seed = 1 if tie else 5
        student = tiny.llama(
            root / f"{name}-student", hidden=32 if tie else 48, tie=tie, seed=seed, heads=own
        )
        teacher = tiny.llama(
            root / f"{name}-teacher",
            layers=3,
            hidden=64 if tie else 48,
            tie=False,
            seed=seed + 1,
            heads=others,
        )
        made[name] = {"student": str(student), "teacher": str(teacher)}
    return made


def check(cases: dict[str, dict]) -> None:
    # lr 1 SGD: the parameter difference is the gradient difference.
    for name, case in cases.items():
        assert case["moved"] > 0.05, f"{name}: the reference hardly moves"
        assert case["error"] <= 1e-6 and case["logged"] <= 1e-5, f"{name}: {case}"


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    # Two ranks to a sample, two samples at a time; test_split_samples.py has two ranks alone.
    root = tmp_path_factory.mktemp("four")
    return run_ranks(use_four_ranks, 4, root, make_models(root), sequence=2)


def test_a_step_of_split_samples_equals_plain_pytorch(four):
    cases, _ = four[0]
    assert len(cases) == len(CASES[4])
    check(cases)


def test_all_ranks_refuse_a_model_whose_parts_are_wrong_on_some(four):
    said = [told for _, told in four]
    assert all("a token that is split off from its sample is another" in each for each in said)


def find_unsplit(world, directory):
    """The architectures with a linear head whose samples the ranks cannot split."""
    found = []
    for kind in all_architectures():
        try:
            module = causal_lm.FrozenModel(build_model(kind))
        except Exception:  # of a configuration that cannot be this small
            continue
        engine, module.exchange = Engine(module), Exchange(world.sequence)
        with suppress(ValueError):
            probes.check_head(engine, world.device, kind)
            attend_by_sample(module.model)
            try:
                probes.check_parts(engine, world.device, kind, world.everyone)
            except ValueError:
                found.append(str(module.model.config.get_text_config().model_type))
    return found


@pytest.mark.nightly
def test_the_check_knows_every_architecture_whose_samples_cannot_be_split(tmp_path):
    found = run_ranks(find_unsplit, 2, tmp_path, seconds=1800, timeout_minutes=5, sequence=2)[0]
    assert {*found} == UNSPLIT
