"""ZeRO files hold what they may, and DeepSpeed's own defaults never decide the mathematics."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from ds_kd.engines import build_student, engine_config
from ds_kd.recipe import _optimizer, for_host
from ds_kd.targets import Target
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


@pytest.mark.parametrize("name", ["Adam", "AdamW"])
def test_states_in_the_hosts_memory_get_deepspeeds_adam_with_the_same_steps(name):
    named = Target(f"torch.optim.{name}", {"lr": 0.1, "betas": [0.8, 0.95]}, "optimizer")
    if name == "Adam":
        named.kwargs["weight_decay"] = 0.1
    results = []
    for target in (named, for_host(named)):
        parameter = torch.nn.Parameter(torch.linspace(-1, 1, 37))
        made = _optimizer(target, [parameter], ())
        for step in range(1, 4):
            parameter.grad = torch.linspace(1, -2, 37) / step
            made.step()
        results.append((type(made).__name__, parameter.detach()))
    (_, expected), (kind, found) = results
    assert kind == "DeepSpeedCPUAdam"
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_an_optimizer_with_arguments_that_deepspeeds_lacks_stays():
    target = Target("torch.optim.AdamW", {"amsgrad": True}, "optimizer")
    assert for_host(target) is target
    sgd = Target("torch.optim.SGD", {"lr": 0.1}, "optimizer")
    assert for_host(sgd) is sgd


def test_an_optimizer_that_is_not_element_wise_is_refused():
    module = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match="Adafactor looks at whole matrices"):
        build_student(module, {}, lambda p: torch.optim.Adafactor(p))
