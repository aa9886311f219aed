"""The words of `--check` on `distributed.tp_size`: each bad layout is one error that names the
key."""

from __future__ import annotations

import json

import pytest

from ds_kd.config.components import ConfigError
from ds_kd.config.load import check_world, load
from ds_kd.config.methods.check_tensor import ARCHITECTURES, find_misfit
from tests import tiny
from tests.scripts import script
from tests.unit.test_config import GUIDE

TWO = "distributed.tp_size=2"


def problems(*overrides):
    with pytest.raises(ConfigError) as caught:
        load(GUIDE, [TWO, *overrides])
    return caught.value.problems


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("compile=true", "compile.enabled: does not go with distributed.tp_size: 2; write false"),
        ("peft={match_all_linear: true, use_dora: true}", "peft.use_dora: does not go with"),
        ("teacher.placement=int8", "write zero3, replicate or cpu"),
        ("teacher.placement=auto", "write zero3, replicate or cpu"),
        (
            "deepspeed.student={zero_optimization: {zero_hpz_partition_size: 8}}",
            "deepspeed.student: zero_hpz_partition_size: 8 does not go with",
        ),
        ("distributed.tp_size=0", "distributed.tp_size: got 0, expected an integer ≥ 1"),
        ("step_scheduler={global_batch_size: 6, local_batch_size: 4}", "write 8"),
        ("distributed.tensor_parallel_size=2", "distributed.tensor_parallel_size: write tp_size"),
        ("distributed.context_parallel_size=2", "distributed.context_parallel_size: write cp_size"),
    ],
)
def test_a_key_that_does_not_go_with_cut_matrices_is_one_error_that_says_what_to_write(
    override, told
):
    found = problems(override)
    assert len(found) == 1 and told in found[0], found


def test_no_copies_of_the_weights_by_0_or_1_fit_any_number_of_ranks():
    for size in (0, 1):
        zero = f"{{zero_optimization: {{stage: 3, zero_hpz_partition_size: {size}}}}}"
        for ranks in (1, 4):
            check_world(load(GUIDE, [f"deepspeed.teacher={zero}", TWO.replace("2", "1")]), ranks)


def test_a_cache_is_filled_without_cut_matrices_and_read_with_them(tmp_path):
    found = problems(f"teacher={{kind: cached, fill: true, directory: {tmp_path}}}")
    assert len(found) == 1 and "teacher.fill: does not go with" in found[0], found


def test_a_local_model_that_cannot_be_cut_is_told_by_its_section(tmp_path):
    model = tiny.llama(tmp_path / "model")  # four heads, of which two have keys and values
    name = f"model.pretrained_model_name_or_path={model}"
    assert load(GUIDE, [TWO, name]).distributed.tp_size == 2
    (told,) = problems(name, "distributed.tp_size=4")
    assert "expected a model that distributed.tp_size: 4 can cut" in told
    assert "its num_key_value_heads is 2; write distributed.tp_size: 2" in told

    (told,) = problems(name, "distributed.cp_size=4")
    assert "its num_attention_heads is 4, and 2 × cp_size 4 ranks need one each" in told
    assert told.endswith("write distributed.cp_size: 2")

    # The number to write fits both models.
    teacher = (
        f"teacher_model.pretrained_model_name_or_path={tiny.llama(tmp_path / 't', heads=(8, 8))}"
    )
    found = problems(name, teacher, "distributed.tp_size=16")
    assert len(found) == 2 and all(told.endswith("write distributed.tp_size: 2") for told in found)

    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "model_type": "olmo3"}))
    (told,) = problems(name)
    assert "its model_type olmo3 is none of arcee, cohere" in told
    assert "remove distributed.tp_size, as ZeRO-3 shards any model" in told


def test_a_model_of_experts_or_of_joined_maps_is_told_why_and_may_be_a_whole_teacher(tmp_path):
    model = tiny.llama(tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    student, teacher = (
        f"{part}.pretrained_model_name_or_path={model}" for part in ("model", "teacher_model")
    )
    for changes, why in (
        ({"model_type": "qwen3_moe", "num_experts": 8}, "its num_experts is 8, and experts are"),
        ({"model_type": "phi3"}, "qkv_proj of its model_type phi3 holds several maps in one"),
    ):
        (model / "config.json").write_text(json.dumps({**config, **changes}))
        (told,) = problems(student)
        assert why in told and "remove distributed.tp_size, as ZeRO-3 shards" in told
        (told,) = problems(teacher)
        assert why in told and "write teacher_distributed.tp_size: 1, which leaves it" in told
        cfg = load(GUIDE, [TWO, teacher, "teacher_distributed.tp_size=1"])
        assert cfg.teacher_tp_size == 1


def test_a_wrapper_of_a_language_model_is_told_by_that_model(tmp_path):
    model = tiny.llama(tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    name = f"model.pretrained_model_name_or_path={model}"

    def wrap(**inner):
        outer = {"model_type": "gemma3", "vision_config": {"num_attention_heads": 3}}
        (model / "config.json").write_text(json.dumps({**outer, "text_config": inner}))

    wrap(**{**config, "model_type": "gemma3_text"})
    assert load(GUIDE, [TWO, name]).distributed.tp_size == 2
    (told,) = problems(name, "distributed.tp_size=4")
    assert "its num_key_value_heads is 2; write distributed.tp_size: 2" in told
    wrap(**{**config, "model_type": "qwen3_moe", "num_experts": 8})
    (told,) = problems(name)
    assert "its num_experts is 8, and experts are not cut" in told
    # The class knows what such a part is, so that the run tells.
    del config["model_type"]
    wrap(**config)
    assert load(GUIDE, [TWO, name]).distributed.tp_size == 2


def test_the_ranks_of_a_slurm_section_are_laid_out_before_they_are_asked_for(capsys):
    def check(*overrides):
        code = script("kd").main(["--config", str(GUIDE), "--check", TWO, *overrides])
        printed = capsys.readouterr()
        return code, printed.out + printed.err

    code, told = check("slurm={ntasks_per_node: 3}")
    expected = "slurm: nodes 1 × ntasks_per_node 3 = 3 ranks; distributed.tp_size 2: got 3 rank(s)"
    assert code == 2 and expected in told and "start 4" in told
    assert check("slurm={ntasks_per_node: 3}", "--ranks=2")[0] == 0
    code, told = check("slurm={nodes: 2}")
    assert code == 0 and "no whole groups of 2 that share samples" in told
    assert "whole groups" not in check("slurm={nodes: 2, ntasks_per_node: 2}")[1]


@pytest.mark.parametrize(
    ("override", "told"),
    [
        (
            "tp_size: 4",
            "tp_size: got 4, expected 1, or 2 as distributed.tp_size is; distributed.tp_size cuts",
        ),
        ("cp_size: 2", "cp_size: distributed.cp_size splits samples for both models; remove it"),
        ("dp_size: 2", "dp_size: student and teacher share all ranks here; remove it"),
        ("tp: 2", "tp: unknown key; known here: tp_size"),
    ],
)
def test_a_teacher_that_cannot_lie_so_is_one_error(override, told):
    found = problems(f"teacher_distributed={{{override}}}")
    assert len(found) == 1 and f"teacher_distributed.{told}" in found[0], found


def test_nemos_words_for_a_teacher_on_all_ranks_ask_for_nothing():
    nemos = "{strategy: fsdp2, dp_size: none, cp_size: 1, pp_size: 1, tp_size: 2}"
    assert load(GUIDE, [TWO, f"teacher_distributed={nemos}"]).teacher_tp_size == 2
    assert load(GUIDE, ["teacher_distributed=null"]).teacher_tp_size == 1


def test_each_architecture_that_is_offered_has_a_plan_of_transformers():
    from transformers import AutoConfig

    from ds_kd.parallel.tensor import cut_layers

    for kind in ARCHITECTURES:
        config = AutoConfig.for_model(kind)
        assert cut_layers(config, 2, trains=True)["tensor_parallel"]["autotp_size"] == 2, kind
        assert not find_misfit({"model_type": kind}, 2)
