"""A ZeRO file's values are judged before DeepSpeed sees them, by the types of its own models."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import ds_kd
from ds_kd.config.checks.zero_file import load_zero_config, place_teacher
from ds_kd.config.checks.zero_keys import OFFLOAD, OTHERS, ZERO
from ds_kd.config.components import ConfigError

GUIDE = Path(__file__).parents[2] / "ds_configs" / "runs" / "llama3_2_1b_kd.yaml"


def fields(model):
    return {part for n, field in model.model_fields.items() for part in (n, field.alias) if part}


def test_the_table_holds_the_keys_of_deepspeeds_own_models_and_their_defaults():
    from deepspeed.comm.config import CommsLoggerConfig
    from deepspeed.runtime.swap_tensor.aio_config import AIO_DEFAULT_DICT
    from deepspeed.runtime.zero import config, offload_config

    own = config.DeepSpeedZeroConfig
    param, optimizer = (
        offload_config.DeepSpeedZeroOffloadParamConfig,
        offload_config.DeepSpeedZeroOffloadOptimizerConfig,
    )
    assert fields(own) <= set(ZERO)
    assert fields(param) == set(OFFLOAD["offload_param"])
    assert fields(optimizer) == set(OFFLOAD["offload_optimizer"])
    assert fields(CommsLoggerConfig) == set(OTHERS["comms_logger"])
    assert set(AIO_DEFAULT_DICT) == set(OTHERS["aio"])
    defaults = own(stage=3).model_dump(mode="json", exclude_none=True)
    load_zero_config({"zero_optimization": defaults, "aio": AIO_DEFAULT_DICT}, "x")
    for part, model in (("offload_param", param), ("offload_optimizer", optimizer)):
        written = {**model().model_dump(mode="json", exclude_none=True), "device": "cpu"}
        load_zero_config({"zero_optimization": {part: written}}, "x")


LONG = "a" * 5000
WRONG = [
    f'{{"zero_optimization": {{"{name}": {value}}}}}'
    for name, value in [
        ("overlap_comm", '"yes"'), ("overlap_comm", "1"), ("contiguous_gradients", "null"),
        ("reduce_bucket_size", "1" + "0" * 400), ("reduce_bucket_size", "1e400"),
        ("reduce_bucket_size", "1.5"), ("sub_group_size", "[1]"), ("sub_group_size", "-1"),
        ("stage3_max_live_parameters", "true"), ("mics_shard_size", "8"), ("zenflow", "3"),
        ("leaf_module", '"x"'), ("leaf_module", '{"classes": 3}'), ("zenflow", '{"topk_ratio": 2}'),
         ("stage", "1" + "0" * 400), ("stage", "[3]"),
        ("x" * 100_000, "1"), ("offload_param", "[" + "1, " * 50_000 + "1]"),
        ("offload_param", '{"device": "cpu", "pin_memory": 3}'),
        ("offload_param", '{"device": "cpu", "buffer_count": "many"}'),
        ("offload_param", '{"device": "cpu", "ratio": 0.5}'),
        ("offload_param", '{"device": ["cpu"]}'), ("offload_param", '{"device": {"a": 1}}'),
        ("offload_optimizer", '{"device": "cpu", "ratio": 2}'),
        ("offload_optimizer", '{"device": "nvme", "nvme_path": 3}'),
        ("offload_optimizer", f'{{"device": "nvme", "nvme_path": "{LONG}"}}'),
    ]
] + [
    '{"communication_data_type": "int8"}', '{"communication_data_type": 16}',
    '{"aio": 3}', '{"aio": {"block_size": "1M"}}', '{"aio": {"blocksize": 1}}',
    '{"comms_logger": {"prof_ops": "all"}}', '{"comms_logger": [1]}',
    '{"zero_allow_untested_optimizer": "no"}', '{"zero_optimization": ' + "[" * 5000,
    '{"train_batch_size": 1' + "0" * 400 + "}", '{"' + "y" * 100_000 + '": 1}',
    '{"zero_optimization": {"reduce_bucket_size": 1' + "0" * 5000 + "}}",
    '{"zero_optimization": ' * 900 + "1" + "}" * 900,
]  # fmt: skip


@pytest.mark.parametrize("name", ["mics_shard_size", "mics_hierarchical_params_gather"])
def test_a_key_that_deepspeed_no_longer_has_is_refused(name):
    with pytest.raises(ValueError, match=f"{name} is unknown; DeepSpeed has no such key"):
        load_zero_config({"zero_optimization": {name: 8}}, "deepspeed.student")


@pytest.mark.parametrize("text", WRONG, ids=range(len(WRONG)))
def test_a_wrong_value_is_one_short_sentence(text, tmp_path):
    (tmp_path / "z.json").write_text(text)
    with pytest.raises(ValueError, match=r"deepspeed\.student: ") as caught:
        load_zero_config(str(tmp_path / "z.json"), "deepspeed.student")
    assert len(str(caught.value)) < 500 and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "zero",
    [
        {"reduce_bucket_size": 5e8, "overlap_comm": None, "zero_hpz_partition_size": 8},
        {"offload_optimizer": {"device": "cpu", "ratio": 1, "pin_memory": False}},
        {"stage3_param_persistence_threshold": 0, "sub_group_size": "auto", "offload_param": None},
    ],
)
def test_right_values_are_accepted(zero):
    load_zero_config(json.loads(json.dumps({"zero_optimization": zero})), "x")


def test_a_teachers_placement_is_a_zero_configuration_that_run_and_plan_share():
    def place(placement, offloads=False, given=None):
        return place_teacher(given, placement, offloads)["zero_optimization"]

    assert place(None)["stage"] == place("zero3")["stage"] == place("cpu")["stage"] == 3
    assert place("replicate") == {"stage": 0} and "offload_param" not in place("zero3")
    assert place("cpu") == place(None, offloads=True) == place("cpu", offloads=True)
    assert place("cpu")["offload_param"]["device"] == "cpu"
    words = ["teacher.placement=replicate", "distributed.dp_size=1"]
    assert ds_kd.load_config(GUIDE, words).teacher.placement == "replicate"
    with pytest.raises(ConfigError) as caught:
        more = ["offload_teacher_model=true", "deepspeed.teacher={zero_optimization: {stage: 3}}"]
        ds_kd.load_config(GUIDE, [*words, *more])
    told = str(caught.value)
    assert "got replicate, and deepspeed.teacher places it too; keep one" in told
    assert "offload_teacher_model: teacher.placement is replicate; write cpu" in told


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["teacher.placement=int8", "compile=true"], "teacher.placement: got int8, whose weights"),
        (["teacher.placement=int8", "offload_teacher_model=true"], "teacher.placement is int8"),
        (["teacher.placement=nvme"], "zero3 or replicate or cpu or int8 or auto"),
    ],
)
def test_a_placement_that_cannot_be_is_refused(words, told):
    with pytest.raises(ConfigError) as caught:
        ds_kd.load_config(GUIDE, [*words, "distributed.dp_size=1"])
    assert told in str(caught.value)


def test_a_placement_of_the_machine_is_noted():
    notes = ds_kd.load_config(GUIDE, ["teacher.placement=auto", "distributed.dp_size=1"]).notes
    assert any(note.startswith("teacher.placement: auto is chosen when") for note in notes)
