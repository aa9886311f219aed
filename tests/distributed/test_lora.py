"""LoRA under ZeRO-3: a step equals plain peft; the adapter is kept, resumed, exported, merged."""

from __future__ import annotations

import copy
import functools
import json

import pytest
import torch

from tests import tiny
from tests.distributed.test_checkpoint import TOKENS, adam, same
from tests.parity.test_step import TEMPERATURE, build, sgd, weights
from tests.ranks import run_ranks

CHOICES = {
    "all": {"match_all_linear": True},
    "wildcard": {"target_modules": ["*.layers.0.*.q_proj", "*down_proj"]},
    "excluded": {"exclude_modules": ["*mlp*", "v_proj"]},
}


def adapter(base, use_dora=False, dropout=0.0, **chosen):
    """Return a function that puts an adapter with something in it into a model."""
    from ds_kd.models import lora

    def adapt(model):
        chosen.setdefault("target_modules", [])
        chosen.setdefault("exclude_modules", [])
        names = lora.find_linear_maps(model, **chosen)
        lora.add_adapter(model, names, 4, 8.0, dropout, use_dora, "xavier", 7, str(base))

    return adapt


def one_step(world, paths, use_dora, chosen, checkpointing):
    """(largest difference from plain peft after a step of SGD at lr 1, how far it moved)."""
    from transformers import AutoModelForCausalLM

    adapt = functools.partial(adapter, paths["student"], use_dora)
    rows = tiny.samples(6 * world.data.size, seed=3, masked=(3, 4, 5))
    made = build(
        world, paths, rows, 2, 3, 0.5, sgd, checkpointing=checkpointing, adapt=adapt(**chosen)
    )
    made.train()
    reference = AutoModelForCausalLM.from_pretrained(paths["student"])
    adapt(**chosen)(reference)
    teacher = AutoModelForCausalLM.from_pretrained(paths["teacher"])
    loss, _, _ = tiny.reference_means(reference, teacher, rows, 0.5, TEMPERATURE)
    loss.backward()
    got, error, moved = weights(made.student), 0.0, 0.0
    for name, p in reference.named_parameters():
        step = p.grad if p.requires_grad else torch.zeros_like(p)
        error = max(error, (got[name] - (p - step)).abs().max().item())
        moved = max(moved, step.abs().max().item())
    return error, moved, sum(p.numel() for p in reference.parameters() if p.requires_grad)


def trained(world, paths, directory, steps, dtype, use_dora=False):
    from ds_kd.checkpoint.checkpointer import Checkpointer
    from ds_kd.checkpoint.writer import Writer

    made = build(
        world, paths, tiny.samples(11, seed=5), 1, 2, 0.5, adam, dtype=dtype, num_epochs=9,
        max_steps=steps, ckpt_every_steps=2, adapt=adapter(paths["student"], use_dora),
    )  # fmt: skip
    directory.mkdir(exist_ok=True)
    made.checkpointer = Checkpointer(
        directory,
        Writer(world, tiny.tokenizer(directory.parent / "tokenizer")),
        say=lambda *_: None,
    )
    made.checkpointer.resume(made.student, made.state)
    made.train()
    return made


def kept(world, paths, root, dtype, use_dora):
    """Return an adapter trained for 5 steps, and one stopped and resumed after 2."""
    import deepspeed
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from ds_kd.checkpoint.export import export_checkpoint
    from ds_kd.parallel.world import barrier, on_rank0

    straight = trained(world, paths, root / "straight", 5, dtype, use_dora)
    trained(world, paths, root / "cut", 2, dtype, use_dora)
    cut = trained(world, paths, root / "cut", 5, dtype, use_dora)
    out = {"resumed": same(weights(straight.student), weights(cut.student))}
    with torch.no_grad(), deepspeed.zero.GatheredParameters(list(cut.student.parameters())):
        model = cut.student.module.model.eval()
        want = model(input_ids=TOKENS, use_cache=False).logits.float()
    latest = root / "cut" / "LATEST"

    def far(model):
        return (model(input_ids=TOKENS).logits.float() - want).abs().max().item()

    def load(path):
        return AutoModelForCausalLM.from_pretrained(path, dtype=dtype)

    on_rank0(lambda: export_checkpoint(latest.resolve(), root / "exported"), world)
    barrier(world)
    with torch.no_grad():
        plain = load(paths["student"])
        out["base"] = far(plain)
        out["adapter"] = far(PeftModel.from_pretrained(plain, latest / "adapter").eval())
        out["final"] = far(load(root / "cut" / "final"))
        out["exported"] = far(load(root / "exported"))
        again = PeftModel.from_pretrained(load(paths["student"]), root / "exported" / "adapter")
        out["exported_adapter"] = far(again.eval())
        final, exported = (
            load(path).state_dict() for path in (root / "cut/final", root / "exported")
        )
        out["apart"] = max(
            (final[n].float() - exported[n].float()).abs().max().item() for n in final
        )
    sizes = [p.stat().st_size for p in (latest / "engine").rglob("*") if p.is_file()]
    out["engine_bytes"] = sum(sizes)
    out["whole_bytes"] = sum(p.numel() * 12 for p in load(paths["student"]).parameters())
    return out


def under_own_base(world, paths, is_shared, packs, adapt=None):
    """Weights after two steps under the student's own base, as a second model or as its adapter
    switched off, the number of weights that the ranks hold, and the trainer."""
    from ds_kd.data.packing import PackedDataset
    from ds_kd.teachers.shared_base import SharedBaseTeacher

    torch.manual_seed(3 + world.rank)  # of the adapter's dropout
    rows = tiny.samples(12 * world.size, seed=3, masked=(3, 4, 5))
    rows, split = (PackedDataset(rows, 24), (1, 1)) if packs else (rows, (3, 2))
    made = build(
        world, {"teacher": paths["student"], **paths}, rows, *split, 0.0 if is_shared else 0.5, sgd,
        packs=packs, adapt=adapt or adapter(paths["student"], dropout=0.3), max_steps=2,
    )  # fmt: skip
    if is_shared:
        made.teacher = SharedBaseTeacher(made.student)
        made.student.module.loss.kd_ratio = 0.5
    engines = [made.student, *([] if is_shared else [made.teacher.engine])]
    torch.manual_seed(3 + world.rank)
    made.train()
    held = sum(getattr(p, "ds_numel", p.numel()) for e in engines for p in e.module.parameters())
    return weights(made.student), held, made


def own_base(world, paths):
    """(largest difference of a weight, how far one moved, weights held by two models and by one)"""
    out, paths = {}, {"student": paths["student"]}
    for packs in (False, True):
        two, both, _ = under_own_base(world, paths, False, packs)
        one, alone, _ = under_own_base(world, paths, True, packs)
        fresh = build(
            world, paths, tiny.samples(2, seed=1), 1, 1, 0.0, sgd, adapt=adapter(paths["student"])
        )
        start = weights(fresh.student)
        error = max((two[n] - one[n]).abs().max().item() for n in two)
        moved = max((one[n] - start[n]).abs().max().item() for n in one)
        out[packs] = error, moved, both, alone
    return out


def own_base_under_an_adapter(world, paths):
    """Differences from a run under a second model, the base with the frozen adapter merged: of a
    weight; how far one moved; and whether that adapter stays as it is and out of the student."""
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    from ds_kd.models import lora

    # The two adapters share a map, and each has some of its own.
    adapt = adapter(paths["student"], target_modules=["*.layers.0.*.q_proj", "v_proj"], dropout=0.3)

    def adapt_twice(model):
        adapt(model)
        lora.add_frozen_adapter(model, paths["frozen"])

    models = {"student": paths["student"], "teacher": paths["merged"]}
    two, both, _ = under_own_base(world, models, False, False, adapt)
    one, alone, made = under_own_base(world, models, True, False, adapt_twice)
    stored = load_file(f"{paths['frozen']}/adapter_model.safetensors")
    named = {f"base_model.model.{n.replace('.teacher', '')}": p for n, p in one.items()}
    base = AutoModelForCausalLM.from_pretrained(paths["student"])
    model = made.student.module.model
    plain = {name for name, _, _ in lora.plain_weights(model)}
    return {
        "error": max((two[n] - one[n]).abs().max().item() for n in {*two} & {*one}),
        "unlike": sorted(n for n in two if "lora" in n and n not in one),
        "moved": max(p.abs().max().item() for n, p in one.items() if "lora_B.default" in n),
        "held": alone / both,
        "kept": all(torch.equal(named[name], each) for name, each in stored.items()),
        "trained": sorted({n.split(".")[-2] for n in lora.adapter_parameters(model)}),
        "plain": plain == {name for name, _ in base.named_parameters()},
    }  # fmt: skip


def work(world, root, paths):
    steps = {
        f"{kind} dora={dora} checkpointing={again}": one_step(world, paths, dora, chosen, again)
        for (kind, chosen), dora, again in (
            (("all", CHOICES["all"]), False, False),
            (("wildcard", CHOICES["wildcard"]), False, True),
            (("excluded", CHOICES["excluded"]), True, False),
        )
    }
    runs = {
        name: kept(world, paths, root / name, dtype, dora)
        for name, dtype, dora in (
            ("fp32", torch.float32, False),
            ("bf16", torch.bfloat16, False),
            ("dora", torch.float32, True),
        )
        if (root / name).mkdir(exist_ok=True) is None
    }
    return {
        "steps": steps,
        "runs": runs,
        "own_base": own_base(world, paths),
        "under_adapter": own_base_under_an_adapter(world, paths),
    }


def make_frozen_adapter(root, student):
    """Paths of an adapter that changes some maps, as peft writes it, and of the merged model."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(11)
    config = LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj", "down_proj"],
                        lora_dropout=0.2, init_lora_weights=False)  # fmt: skip
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(student), config)
    model.save_pretrained(root / "frozen")
    model.merge_and_unload().save_pretrained(root / "merged")
    return {"frozen": str(root / "frozen"), "merged": str(root / "merged")}


@pytest.fixture(scope="module", params=[1, 2], ids=["1 rank", "2 ranks"])
def results(request, tmp_path_factory):
    root = tmp_path_factory.mktemp("lora")
    paths = {
        "student": str(tiny.llama(root / "student", seed=1)),
        "teacher": str(tiny.llama(root / "teacher", layers=3, hidden=64, tie=False, seed=2)),
    }
    paths |= make_frozen_adapter(root, paths["student"])
    return run_ranks(work, request.param, root, paths)[0]


def test_a_step_equals_plain_peft_whichever_maps_are_chosen(results):
    for name, (error, moved, trained) in results["steps"].items():
        assert moved > 0.01 and trained > 0, f"{name}: nothing moved"
        assert error <= 1e-6, f"{name}: {error}"


def test_a_base_shared_with_the_student_teaches_as_a_second_copy_of_it_would(results):
    for packs, (error, moved, both, alone) in results["own_base"].items():
        assert moved > 0.01, f"packs {packs}: nothing moved"
        assert error <= 1e-6, f"packs {packs}: {error}"
        assert alone < 0.6 * both


def test_a_base_under_a_frozen_adapter_teaches_as_the_merged_model_would(results):
    found = results["under_adapter"]
    assert found["moved"] > 0.01 and found["error"] <= 1e-6, found
    assert found["held"] < 0.6 and found["kept"], found
    assert found["trained"] == ["default"] and found["plain"] and not found["unlike"], found


def test_an_adapter_resumes_bitwise(results):
    assert all(run["resumed"] for run in results["runs"].values()), results["runs"]


def test_adapter_merged_model_and_export_give_the_students_logits(results):
    for name, run in results["runs"].items():
        limit = 0.2 if name == "bf16" else 1e-4  # merged weights are rounded to bf16
        assert run["base"] > 4 * limit, f"{name}: the adapter does nothing"
        for what in ("adapter", "final", "exported", "exported_adapter"):
            assert run[what] <= limit, f"{name}, {what}: {run}"


def test_final_and_export_are_the_same_weights(results):
    apart = {name: run["apart"] for name, run in results["runs"].items()}
    assert apart["bf16"] == 0 and max(apart.values()) <= 1e-6, apart


def test_frozen_weights_are_not_written_again(results):
    for run in results["runs"].values():
        assert run["engine_bytes"] < run["whole_bytes"], run


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    from transformers import AutoModelForCausalLM

    path = tiny.llama(tmp_path_factory.mktemp("model") / "m", tie=False)
    return AutoModelForCausalLM.from_pretrained(path)


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"r": 5}, r"do not fit this model: size mismatch for model\.layers"),
        ({"target_modules": ["q_proj"]}, r"hold .*down_proj\.lora_A\.weight, which its config"),
        ({"target_modules": ["q_proj", "down_proj", "v_proj"]}, r"lack .*v_proj\.lora_A\.weight"),
        ({"target_modules": ["x"]}, r"not found in the base model"),
    ],
)
def test_a_frozen_adapter_of_another_model_is_refused(model, tmp_path, changed, told):
    from ds_kd.models import lora

    make_frozen_adapter(tmp_path, str(tiny.llama(tmp_path / "m", tie=False)))
    config = tmp_path / "frozen" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | changed))
    whole = copy.deepcopy(model)
    adapter(tmp_path)(whole)
    with pytest.raises(ValueError, match=told):
        lora.add_frozen_adapter(whole, str(tmp_path / "frozen"))


def test_patterns_that_match_nothing_are_named(model):
    from ds_kd.models.lora import find_linear_maps

    with pytest.raises(ValueError, match=r"called q_prj.*did you mean q_proj"):
        find_linear_maps(model, ["q_prj"], [])
    with pytest.raises(ValueError, match=r"leaves no linear map"):
        find_linear_maps(model, [], ["*_proj"])


def test_maps_are_chosen_as_nemo_chooses_them_but_never_the_head(model):
    from ds_kd.models.lora import find_linear_maps

    every = find_linear_maps(model, [], [], True)
    assert len(every) == 14 and not any("lm_head" in name for name in every)
    assert find_linear_maps(model, [], []) == every  # *_proj
    assert find_linear_maps(model, ["q_proj", "*.layers.1.*.v_proj"], []) == [
        "model.layers.0.self_attn.q_proj",
        "model.layers.1.self_attn.q_proj",
        "model.layers.1.self_attn.v_proj",
    ]
    assert not any("mlp" in name for name in find_linear_maps(model, [], ["*mlp*"]))
    assert find_linear_maps(model, [], ["lm_head", "*vision*"]) == every
