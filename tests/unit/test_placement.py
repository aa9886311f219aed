"""Places of a teacher: those that its files allow, and the one that a machine's memory decides."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import ds_kd
from ds_kd.config.components import ConfigError
from ds_kd.models import operations
from ds_kd.parallel import engines
from ds_kd.parallel.world import World
from ds_kd.plan.placement import settle_placement
from ds_kd.recipe.resident.placement import make_teacher_zero
from tests import tiny

ALONE = World(0, 1, torch.device("cpu"), "gloo")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("placed")
    tiny.llama(root / "student", layers=1, hidden=16)
    tiny.llama(root / "teacher", hidden=64)
    tiny.llama(root / "odd", hidden=24)
    (root / "rows.jsonl").write_text(tiny.squad_rows(8))
    return root


def config(place, placement, *words, teacher="teacher"):
    values = {
        "model": {"pretrained_model_name_or_path": str(place / "student")},
        "teacher_model": {"pretrained_model_name_or_path": str(place / teacher)},
        "teacher": {"placement": placement},
        "dataset": {
            "_target_": "ds_kd.data.squad.make_squad_dataset",
            "dataset_name": str(place / "rows.jsonl"),
        },
        "checkpoint": {"checkpoint_dir": str(place / "checkpoints")},
    }
    return ds_kd.load_config(values, [*words])


def test_8_bits_share_a_scale_in_the_largest_group_that_all_widths_have(place):
    config_ = make_teacher_zero(config(place, "int8"))
    groups = config_["weight_quantization"]["quantized_initialization"]
    assert groups["group_size"] == 64 and groups["num_bits"] == 8
    assert config_["zero_optimization"]["stage"] == 3


@pytest.mark.parametrize(
    ("teacher", "words", "told"),
    [
        ("teacher", ["teacher_model.torch_dtype=bf16"], "hold F32 where teacher_model.torch_dtype"),
        ("odd", [], "has rows of 24; write zero3"),
        (
            "teacher",
            ["teacher_model.gguf_file=config.json"],
            "the model has none",
        ),
    ],
)
def test_weights_that_do_not_go_into_8_bits_are_refused_before_a_run(place, teacher, words, told):
    """The check looks into the files of architectures that it knows, the run into all others."""
    with pytest.raises(ConfigError) as caught:
        config(place, "int8", *words, teacher=teacher)
    (line,) = caught.value.problems
    assert told in line and "teacher.placement: got 'int8'" in line
    if "gguf" not in str(words):
        with pytest.raises(ConfigError) as late:
            cfg = config(place, "zero3", *words, teacher=teacher)
            make_teacher_zero(replace(cfg, teacher=replace(cfg.teacher, placement="int8")))
        assert late.value.problems[0].partition("; ")[2] == line.partition("; ")[2]


def test_a_weight_in_8_bits_reads_as_numbers_within_half_a_step_of_its_group():
    from deepspeed.inference.quantization.utils import _quantize_param

    groups = {"num_bits": 8, "group_size": 16, "group_dim": 1, "symmetric": False}
    weight = torch.randn(6, 48, generator=torch.Generator().manual_seed(0))
    parameter = torch.nn.Parameter(weight.clone(), requires_grad=False)
    assert engines.read_weight(parameter) is parameter
    _quantize_param(parameter, groups)
    by_group = weight.unflatten(1, (-1, 16))
    step = (by_group.amax(-1) - by_group.amin(-1)) / 255
    error = (engines.read_weight(parameter).unflatten(1, (-1, 16)) - by_group).abs().amax(-1)
    assert operations._size(parameter) == weight.numel() > parameter.numel()
    assert (error <= 0.501 * step).all() and error.max() > 0


def test_auto_becomes_a_place_that_is_said_and_other_places_stay(place, capsys):
    wanted = config(place, "auto")
    settled = settle_placement(wanted, ALONE)
    assert settled.teacher.placement == "replicate" and wanted.teacher.placement == "auto"
    assert "teacher.placement: replicate, 0." in capsys.readouterr().out
    assert not any("auto" in note for note in settled.notes) and len(wanted.notes) > 0
    for same in (config(place, "cpu"), replace(wanted, kd_ratio=0.0)):
        assert settle_placement(same, ALONE) is same
    assert not capsys.readouterr().out


def test_an_accelerator_with_room_keeps_a_teacher_whole_for_which_no_place_is_named(place, capsys):
    wanted, elsewhere = config(place, None), World(0, 1, torch.device("meta"), "gloo")
    assert settle_placement(wanted, elsewhere).teacher.placement == "replicate"
    assert "teacher.placement: replicate, 0." in capsys.readouterr().out
    zero = ["deepspeed.teacher={zero_optimization: {stage: 3}}"]
    writes = ["rollouts={ratio: 1.0, max_new_tokens: 4}", "kd_ratio=1.0"]
    named = [config(place, None, *words) for words in (zero, writes)]
    for same in (config(place, "zero3"), *named, replace(wanted, kd_ratio=0.0)):
        assert settle_placement(same, elsewhere) is same
    assert settle_placement(wanted, ALONE) is wanted
    # A model that cannot be planned is left to the run, which says what is wrong.
    lost = replace(wanted.teacher_model, kwargs={"pretrained_model_name_or_path": str(place)})
    assert (
        settle_placement(replace(wanted, teacher_model=lost), elsewhere).teacher == wanted.teacher
    )
    assert not capsys.readouterr().out
