"""YAMLs of the shape that NeMo-AutoModel's recipes have: those whose keys change no result load as
they stand, and of the others only what changes one is named."""

from __future__ import annotations

import json
import re

import pytest

from ds_kd.config.components import ConfigError
from ds_kd.config.load import load
from ds_kd.config.reference.keys import key_table

_PARTS = "nemo_automodel.components"
_MAPPED = (
    f"{_PARTS}.datasets.llm.column_mapped_text_instruction_dataset."
    "ColumnMappedTextInstructionDataset"
)
_COLLATE = f"{_PARTS}.datasets.utils.default_collater"
_LOADER = f"""
  _target_: torchdata.stateful_dataloader.StatefulDataLoader
  collate_fn: {_COLLATE}
"""
_FULL = f"""
recipe: TrainFinetuneRecipeForNextTokenPrediction
step_scheduler: {{global_batch_size: 16, local_batch_size: 4, ckpt_every_steps: 90, num_epochs: 2}}
dist_env: {{backend: nccl, timeout_minutes: 5}}
rng: {{_target_: {_PARTS}.training.rng.StatefulRNG, seed: 3, ranked: true}}
model:
  _target_: nemo_automodel.NeMoAutoModelForCausalLM.from_pretrained
  pretrained_model_name_or_path: somebody/small-model
compile: {{enabled: false, mode: default, fullgraph: false, dynamic: true, backend: null}}
checkpoint:
  enabled: true
  checkpoint_dir: checkpoints/
  model_save_format: torch_save
  save_consolidated: final
  dequantize_base_checkpoint: true
distributed: {{strategy: fsdp2, dp_size: none, tp_size: 1, cp_size: 1, sequence_parallel: false}}
loss_fn: {{_target_: {_PARTS}.loss.masked_ce.MaskedCrossEntropy}}
dataset:
  _target_: {_PARTS}.datasets.llm.hellaswag.HellaSwag
  path_or_dataset: somebody/endings
  split: train
dataloader: {_LOADER}  shuffle: true
validation_dataset:
  _target_: {_PARTS}.datasets.llm.hellaswag.HellaSwag
  path_or_dataset: somebody/endings
  split: validation
  num_samples_limit: 10
validation_dataloader: {_LOADER}
optimizer: {{_target_: torch.optim.Adam, betas: [0.9, 0.99], eps: 1e-8, lr: 2.0e-5}}
lr_scheduler: {{lr_decay_style: cosine, min_lr: 2.0e-6}}
ci: {{recipe_owner: somebody, time: "00:15:00", checkpoint_robustness: {{hf_kl_threshold: 1e-3}}}}
"""
_ADAPTERS = f"""
recipe: TrainFinetuneRecipeForNextTokenPrediction
step_scheduler: {{global_batch_size: 8, local_batch_size: 1, max_steps: 20, val_every_steps: 10}}
model:
  _target_: nemo_automodel.NeMoAutoModelForCausalLM.from_pretrained
  pretrained_model_name_or_path: somebody/small-model
  attn_implementation: sdpa
peft:
  _target_: {_PARTS}._peft.lora.PeftConfig
  target_modules: "*_proj"
  dim: 4
  alpha: 16
  use_triton: true
distributed: {{_target_: {_PARTS}.distributed.fsdp2.FSDP2Manager, dp_size: 1, ep_size: null}}
dataset: &rows
  _target_: {_MAPPED}
  path_or_dataset_id: ROWS
  split: train
  column_mapping: {{question: ask, answer: reply}}
  answer_only_loss_mask: true
  seq_length: 64
  padding: do_not_pad
  truncation: longest_first
packed_sequence: {{packed_sequence_size: 256}}
dataloader:
  _target_: torchdata.stateful_dataloader.StatefulDataLoader
  collate_fn: {{_target_: {_COLLATE}, pad_seq_len_divisible: 8}}
  shuffle: true
validation_dataset: *rows
optimizer: {{_target_: torch.optim.AdamW, lr: 1.0e-4}}
"""
_EXPERTS = f"""
step_scheduler: {{global_batch_size: 8, local_batch_size: 2, ckpt_every_steps: 50, num_epochs: 1}}
model:
  _target_: nemo_automodel.NeMoAutoModelForCausalLM.from_pretrained
  pretrained_model_name_or_path: somebody/model-of-experts
  backend:
    _target_: {_PARTS}.models.common.BackendConfig
    attn: te
    experts: te
    dispatcher: deepep
    fake_balanced_gate: false
distributed:
  strategy: fsdp2
  ep_size: 8
  pp_size: 1
  activation_checkpointing: true
  pipeline: {{pp_schedule: interleaved1f1b, layers_per_stage: 2}}
dataset:
  _target_: {_PARTS}.datasets.llm.squad.make_squad_dataset
  dataset_name: somebody/questions
  split: train
packed_sequence: {{packed_sequence_size: 512}}
dataloader:
  _target_: torchdata.stateful_dataloader.StatefulDataLoader
  collate_fn: {_PARTS}.datasets.utils.packed_sequence_thd_collater
optimizer: {{_target_: torch.optim.Adam, lr: 1.0e-4}}
"""
SHAPES = {"full": _FULL, "adapters": _ADAPTERS, "experts": _EXPERTS}

#: The keys of its KD recipe that the schema has under the same name, section by section, as its
#: sources read them: StepSchedulerConfig, CheckpointingConfig, PeftConfig, CompileConfig,
#: SlurmConfig, StatefulRNG, and for sizes of ranks parse_distributed_section.
_SAME = {
    "": "model teacher_model offload_teacher_model dataset kd_ratio kd_loss_fn peft loss_fn "
    "optimizer lr_scheduler clip_grad_norm step_scheduler dataloader packed_sequence "
    "validation_dataset validation_dataloader dist_env rng seed checkpoint distributed "
    "teacher_distributed compile slurm wandb recipe",
    "peft": "_target_ match_all_linear target_modules exclude_modules dim alpha dropout "
    "dropout_position lora_dtype moe_rank_scaling lora_A_init use_dora use_triton "
    "use_memory_efficient_lora",
    "step_scheduler": "global_batch_size local_batch_size num_epochs max_steps val_every_steps "
    "ckpt_every_steps",
    "packed_sequence": "packed_sequence_size split_across_pack",
    "dist_env": "backend timeout_minutes",
    "rng": "_target_ seed ranked",
    "checkpoint": "enabled checkpoint_dir model_save_format save_consolidated is_async",
    "distributed": "_target_ strategy dp_size dp_replicate_size tp_size cp_size pp_size ep_size "
    "sequence_parallel activation_checkpointing",
    "teacher_distributed": "tp_size",
    "compile": "enabled mode dynamic fullgraph backend",
    "slurm": "job_name nodes ntasks_per_node gpus_per_node time account partition "
    "container_image env_vars",
}


@pytest.fixture
def write(tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"ask": "w1 w2", "reply": "w3"}) + "\n")

    def written(shape):
        path = tmp_path / f"{shape}.yaml"
        path.write_text(SHAPES[shape].replace("ROWS", str(rows)))
        return path

    return written


@pytest.mark.parametrize("shape", SHAPES)
def test_a_recipe_whose_keys_change_no_result_loads_with_kd_ratio_0(write, shape):
    cfg = load(write(shape), ["kd_ratio=0"])
    assert cfg.kd_ratio == 0 and cfg.teacher_model is None
    assert any("DeepSpeed ZeRO-3 takes its place" in note for note in cfg.notes)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_recipe_is_distilled_once_a_teacher_is_named(write, shape):
    cfg = load(write(shape), ["teacher_model.pretrained_model_name_or_path=somebody/teacher"])
    assert cfg.kd_ratio == 0.5 and cfg.teacher_model is not None


def test_only_keys_that_change_a_result_are_named_of_a_recipe_that_asks_for_more(write):
    more = ["kd_ratio=0", "fp8={enabled: true}", "distributed.pp_size=2", "nvtx=true"]
    with pytest.raises(ConfigError) as caught:
        load(write("full"), more)
    keys = [line.partition("command line: ")[2].partition(":")[0] for line in caught.value.problems]
    assert sorted(keys) == ["distributed.pp_size", "fp8"]
    assert load(write("full"), [*more, "fp8=null", "distributed.pp_size=1"]).kd_ratio == 0


def test_the_table_of_keys_says_same_of_those_alone_that_its_recipe_has():
    rows = re.findall(r"^\| `([\w.]+)` \|.*\| (\S+) \|$", key_table(), flags=re.MULTILINE)
    said = {name for name, told in rows if told == "same"}
    known = {f"{section}.{key}".lstrip(".") for section in _SAME for key in _SAME[section].split()}
    assert said == known
