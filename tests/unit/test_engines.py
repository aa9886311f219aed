"""ZeRO files hold what they may, and DeepSpeed's own defaults never decide the mathematics."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from ds_kd.engines import build_student, engine_config
from ds_kd.zero_config import load_zero_config

ZERO = sorted((Path(__file__).parents[2] / "ds_configs" / "zero").glob("*.json"))


@pytest.mark.parametrize("path", ZERO, ids=lambda path: path.stem)
def test_every_shipped_zero_file_is_accepted(path):
    assert load_zero_config(str(path), "deepspeed.student")["zero_optimization"]["stage"] == 3


def test_what_the_yaml_decides_is_refused_naming_both_places(tmp_path):
    path = tmp_path / "zero.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 3}, "gradient_clipping": 0.5}))
    with pytest.raises(ValueError, match=r"zero\.json: gradient_clipping=0\.5 .*clip_grad_norm"):
        load_zero_config(str(path), "deepspeed.student")


def test_auto_values_of_hugging_face_style_files_are_left_to_the_yaml():
    source = {"zero_optimization": {"stage": 3, "reduce_bucket_size": "auto"}, "bf16": "auto"}
    assert load_zero_config(source, "deepspeed.student") == {"zero_optimization": {"stage": 3}}


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ({"zero_optimization": {"stage": 2}}, "stage is 2, expected 3"),
        ({"flops_profiler": {}}, "not a ZeRO, offload or communication key"),
        ("nowhere.json", "cannot be read"),
    ],
)
def test_a_wrong_zero_file_says_what_is_wrong(source, words):
    with pytest.raises(ValueError, match=words):
        load_zero_config(source, "deepspeed.student")


def test_clipping_is_written_even_when_off():
    config = engine_config(load_zero_config(None, "k"), torch.float32, 1)
    assert config["gradient_clipping"] == 0.0  # DeepSpeed's default would be 1.0


def test_an_optimizer_that_is_not_element_wise_is_refused():
    module = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match="Adafactor looks at whole matrices"):
        build_student(module, {}, lambda p: torch.optim.Adafactor(p))
