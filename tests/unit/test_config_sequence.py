"""Samples that are split over ranks, in the config: what is refused, and with which words."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from ds_kd.config.components import ConfigError
from ds_kd.config.load import check_world, load
from tests import tiny

GUIDE = "ds_configs/runs/llama3_2_1b_kd.yaml"
SPLIT = "distributed={cp_size: 2, sequence_parallel: true}"


def problems_of(*overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load(GUIDE, [*overrides])
    return "\n".join(caught.value.problems)


def test_ranks_that_share_a_sample_divide_the_ranks_and_not_the_batch():
    cfg = load(GUIDE, [SPLIT, "step_scheduler={global_batch_size: 6, local_batch_size: 3}"])
    check_world(cfg, 4)  # two samples at a time
    with pytest.raises(ConfigError, match=r"cp_size 2: got 5 rank.*multiple of 2; start 6"):
        check_world(cfg, 5)
    with pytest.raises(ConfigError, match="global_batch_size: got 6"):
        check_world(cfg, 8)
    both = replace(cfg, distributed=replace(cfg.distributed, tp_size=2))
    told = r"distributed.tp_size 2 × distributed.cp_size 2: got 6 rank.*start 8$"
    with pytest.raises(ConfigError, match=told):
        check_world(both, 6)


def test_heads_are_divided_over_both_kinds_of_ranks(tmp_path):
    model = f"model.pretrained_model_name_or_path={tiny.llama(tmp_path)}"
    assert "its attention has 4 head(s), and each" in problems_of("distributed.cp_size=5", model)
    told = problems_of("distributed={cp_size: 3, tp_size: 2}", model)
    assert "its num_attention_heads is 4, and 2 × cp_size 3 ranks need one each" in told


def test_keys_and_models_that_cannot_be_split_are_refused_by_name():
    told = problems_of("distributed={sequence_parallel: true}")
    assert "distributed.sequence_parallel: got true" in told and "cp_size: 2" in told
    told = problems_of(SPLIT, "teacher_model.attn_implementation=flash_attention_2")
    assert "teacher_model.attn_implementation: flash_attention_2 sees only a part" in told
    told = problems_of(SPLIT, "dataloader.collate_fn=mine.collate")
    assert "dataloader.collate_fn: what mine.collate returns cannot be split" in told
    told = problems_of("distributed={pp_size: 2}")
    assert "DeepSpeed has no pipeline with ZeRO-3" in told and "write tp_size or cp_size" in told


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({"num_attention_heads": 1}, "its attention has 1 head(s), and each rank needs one"),
        (
            {"layer_types": ["full_attention", "linear_attention"]},
            "layers of type linear_attention",
        ),
        ({"text_config": {"n_head": 1}}, "its attention has 1 head(s)"),
        ({"model_type": "mamba"}, "computes its model_type mamba without SDPA, or with a mask"),
        ({"text_config": {"model_type": "gpt_oss"}}, "remove distributed.cp_size"),
    ],
)
def test_a_model_that_cannot_be_split_is_refused_by_its_configuration(config, told, tmp_path):
    tiny.weightless(tmp_path, json.dumps(config))
    tiny.tokenizer(tmp_path)
    model = f"model.pretrained_model_name_or_path={tmp_path}"
    found = problems_of(SPLIT, model)
    assert "expected a model that distributed.cp_size: 2 can split" in found and told in found
