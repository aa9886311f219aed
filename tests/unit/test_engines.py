"""ZeRO files hold what they may, and DeepSpeed's own defaults never decide the mathematics."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from ds_kd.checkpoint.engine.files import complete_states
from ds_kd.config.checks.zero_file import load_zero_config
from ds_kd.config.components import Component, ConfigError
from ds_kd.parallel.engines import REDUCE_BUCKET, build_student, engine_config, size_bucket
from ds_kd.recipe.optimizer import build_optimizer, place_optimizer

ZERO = sorted((Path(__file__).parents[2] / "ds_configs" / "zero").glob("*.json"))


@pytest.mark.parametrize("path", ZERO, ids=lambda path: path.stem)
def test_every_shipped_zero_file_is_accepted(path):
    assert load_zero_config(str(path), "deepspeed.student")["zero_optimization"]["stage"] == 3


def test_engine_keys_that_the_yaml_decides_are_refused_naming_both_places(tmp_path):
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


def test_a_bucket_of_gradients_is_as_large_as_they_are_if_the_file_names_none():
    def size(trained, **zero):
        made = size_bucket({"zero_optimization": {"stage": 3, **zero}}, trained)
        return made["zero_optimization"].get("reduce_bucket_size")

    assert size(8_000) == 8_000 and size(8 * 10**9) == REDUCE_BUCKET
    assert size(8_000, reduce_bucket_size=10**9) == 10**9
    assert size(8_000, reduce_bucket_size=100) == 100


def named(name, **kwargs):
    return Component(name, kwargs, "optimizer")


@pytest.mark.parametrize("name", ["Adam", "AdamW"])
def test_states_in_the_hosts_memory_get_deepspeeds_adam_with_the_same_steps(name):
    decay = {"weight_decay": 0.1} if name == "Adam" else {}
    of_torch = named(f"torch.optim.{name}", lr=0.1, betas=[0.8, 0.95], **decay)
    results = []
    for target in (of_torch, place_optimizer(of_torch, in_host=True)):
        parameter = torch.nn.Parameter(torch.linspace(-1, 1, 37))
        made = build_optimizer(of_torch, [parameter], of_torch)
        for step in range(1, 4):
            if step == 3 and target is not of_torch:  # a run that goes on with offload switched on
                saved = made.state_dict()
                made = build_optimizer(target, [parameter], of_torch)
                made.load_state_dict(saved)
                complete_states(made)
            parameter.grad = torch.linspace(1, -2, 37) / step
            made.step()
        results.append((type(made).__name__, parameter.detach()))
    (_, expected), (kind, found) = results
    assert kind == "DeepSpeedCPUAdam"
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_an_optimizer_with_arguments_that_deepspeeds_lacks_stays():
    for target in (named("torch.optim.AdamW", amsgrad=True), named("torch.optim.SGD", lr=0.1)):
        assert place_optimizer(target, in_host=True) is target


def test_an_optimizer_that_cannot_work_where_its_states_are_is_refused():
    with pytest.raises(ConfigError, match="expected an optimizer of the accelerator"):
        place_optimizer(named("deepspeed.ops.adam.DeepSpeedCPUAdam"), in_host=False)
    with pytest.raises(ConfigError, match="expected an optimizer of the host"):
        place_optimizer(named("deepspeed.ops.adam.FusedAdam", bias_correction=False), in_host=True)


def test_where_deepspeeds_adam_cannot_be_built_torchs_stays(monkeypatch):
    def cannot(*_, **__):
        raise RuntimeError("no compiler")

    monkeypatch.setattr("deepspeed.ops.adam.DeepSpeedCPUAdam", cannot)
    of_torch = named("torch.optim.AdamW", lr=0.1)
    parameter = torch.nn.Parameter(torch.zeros(3))
    found = build_optimizer(place_optimizer(of_torch, in_host=True), [parameter], of_torch)
    assert type(found) is torch.optim.AdamW


def test_an_optimizer_that_is_not_element_wise_is_refused():
    module = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match="Adafactor looks at whole matrices"):
        build_student(module, {}, lambda p: torch.optim.Adafactor(p))


@pytest.mark.parametrize("counter", [torch.tensor(4.0), 4], ids=["of torch", "of deepspeed"])
def test_parts_that_were_loaded_with_one_counter_count_each_their_own_steps(counter):
    parameters = [torch.nn.Parameter(torch.ones(2)) for _ in range(2)]
    optimizer = torch.optim.Adam(parameters)
    for parameter in parameters:
        optimizer.state[parameter] = {
            "step": counter,
            "exp_avg": torch.zeros(2),
            "exp_avg_sq": torch.zeros(2),
        }
    complete_states(optimizer)
    for parameter in parameters:
        parameter.grad = torch.ones(2)
    optimizer.step()
    assert [float(optimizer.state[p]["step"]) for p in parameters] == [5.0, 5.0]
