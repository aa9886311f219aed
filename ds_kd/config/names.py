"""Tables of names: those of NeMo-AutoModel with their translation, those that a config may call,
and those that are refused, with what to write instead."""

from ds_kd.config.keys import ComponentRules

_NEMO = "nemo_automodel.components."
MODEL = "transformers.AutoModelForCausalLM.from_pretrained"
_LOADER = "torchdata.stateful_dataloader.StatefulDataLoader"
COLLATER = "ds_kd.data.collate.default_collater"

CACHE_RECORD = "cache.json"  # what a teacher's cache is of
#: Values of teacher.placement.
ZERO3, REPLICATE, CPU, INT8, AUTO = "zero3", "replicate", "cpu", "int8", "auto"
KEPT = ("hidden", "top_k", "sampled")  # what a cache keeps: values of teacher.keep
LOSSES = "ds_kd.losses."
DIVERGENCES = f"{LOSSES}divergences."
NAMED = f"{LOSSES}named."  # divergences that kd_loss_fn.name chooses, beside KDLoss


def home_of(dotted: str) -> str:
    """Return the full name of a public name of ds_kd, and any other name unchanged.

    `ds_kd.losses.Name` is the cross-entropy or one of the divergences.
    """
    name = dotted.removeprefix(LOSSES)
    if not dotted.startswith(LOSSES) or "." in name:
        return dotted
    if name == "MaskedCrossEntropy":
        return f"{LOSSES}cross_entropy.{name}"
    return f"{DIVERGENCES}{name}"


#: NeMo-AutoModel's name → the name that takes its place here.
ALIASES = {
    "nemo_automodel.NeMoAutoModelForCausalLM.from_pretrained": MODEL,
    "nemo_automodel._transformers.NeMoAutoModelForCausalLM.from_pretrained": MODEL,
    _NEMO + "loss.masked_ce.MaskedCrossEntropy": "ds_kd.losses.MaskedCrossEntropy",
    _NEMO + "loss.kd_loss.KDLoss": "ds_kd.losses.KDLoss",
    _NEMO + "datasets.llm.squad.make_squad_dataset": "ds_kd.data.squad.make_squad_dataset",
    _NEMO + "datasets.llm.hellaswag.HellaSwag": "ds_kd.data.hellaswag.HellaSwag",
    _NEMO + "datasets.llm.chat_dataset.ChatDataset": "ds_kd.data.chat.ChatDataset",
    _NEMO + "datasets.llm.column_mapped_text_instruction_dataset."
    "ColumnMappedTextInstructionDataset": "ds_kd.data.text.make_instruction_dataset",
    _NEMO + "datasets.utils.default_collater": COLLATER,
}

#: Names outside ds_kd that a run needs. Exact: a whole `torch.*` would admit `torch.hub.load`.
ALLOWED = {
    *(
        f"torch.optim.{name}"
        for name in ("Adam", "AdamW", "SGD", "NAdam", "RAdam", "Adamax", "RMSprop")
    ),
    MODEL,
    _LOADER,
    "deepspeed.ops.adam.FusedAdam",
    "deepspeed.ops.adam.DeepSpeedCPUAdam",
}

#: Names that a user may try, and what to write instead.
UNSUPPORTED = {
    "torch.optim.Adafactor": "it looks at whole matrices and ZeRO-3 gives it flat shards; "
    "write torch.optim.AdamW",
    "torch.optim.Muon": "it looks at whole matrices and ZeRO-3 gives it flat shards; write "
    "torch.optim.AdamW",
    "torch.optim.Adagrad": "DeepSpeed replaces it by one that follows no schedule and cannot be "
    "resumed; write torch.optim.RMSprop or torch.optim.AdamW",
    "torch.optim.LBFGS": "it needs a closure and whole vectors; write torch.optim.AdamW",
    "torch.nn.CrossEntropyLoss": "ds_kd's own cross-entropy never holds whole logits; leave the "
    "section out, or write ds_kd.losses.MaskedCrossEntropy",
    "torch.nn.KLDivLoss": "write ds_kd.losses.KDLoss",
    "torch.utils.data.DataLoader": "its position cannot be saved; write "
    "torchdata.stateful_dataloader.StatefulDataLoader",
    **dict.fromkeys(
        (
            f"nemo_automodel.{name}.from_config"
            for name in (
                "NeMoAutoModelForCausalLM",
                "_transformers.NeMoAutoModelForCausalLM",
            )
        ),
        "training starts from weights; save the new model with save_pretrained, and write "
        "nemo_automodel.NeMoAutoModelForCausalLM.from_pretrained with its directory",
    ),
    "nemo_automodel.NeMoAutoModelForSeq2SeqLM.from_pretrained": "models with an encoder are not "
    "trained here; name a causal language model",
    "dion.Muon": "it looks at whole matrices and ZeRO-3 gives it flat shards; write "
    "torch.optim.AdamW",
    "flashoptim.FlashAdamW": "it keeps its own states; write torch.optim.AdamW",
    "transformer_engine.pytorch.optimizers.fused_adam.FusedAdam": "write torch.optim.AdamW, or "
    "deepspeed.ops.adam.FusedAdam",
}

_PLACES = "ZeRO-3 places the weights; remove it"
_QUANTIZES = "quantised weights are not supported; remove it and write torch_dtype: bf16"
_AHEAD = "heads that predict several tokens ahead are not trained here; remove it"
#: Arguments of from_pretrained that contradict ZeRO-3, or would train another model.
NOT_WITH_ZERO = {
    **dict.fromkeys(("device_map", "max_memory", "tp_plan", "offload_folder"), _PLACES),
    **dict.fromkeys(
        ("num_nextn_predict_layers", "mtp_loss_scaling_factor", "mtp_use_repeated_layer"), _AHEAD
    ),
    "load_base_model": "the weights are always loaded; remove it",
    "config": "the model is the one of its own config.json; remove it, and change that file",
    **dict.fromkeys(("quantization_config", "load_in_4bit", "load_in_8bit"), _QUANTIZES),
}

#: Arguments of NeMo-AutoModel's from_pretrained that choose kernels and change no result.
NEMO_KERNELS = (
    "use_sdpa_patching", "sdpa_method", "force_hf", "backend",
    "output_hidden_states",
)  # fmt: skip

#: Its other cross-entropies, and their arguments that have no meaning here.
NEMO_LOSSES = {
    _NEMO + "loss.linear_ce.FusedLinearCrossEntropy": ("reduction",),
    _NEMO + "loss.chunked_ce.ChunkedCrossEntropy": ("reduction", "chunk_len", "compile"),
    _NEMO + "loss.te_parallel_ce.TEParallelCrossEntropy": ("reduction", "tp_group"),
}

#: Its collaters of packed samples; here the default one lays packs end to end.
NEMO_COLLATERS = (
    _NEMO + "datasets.utils.packed_sequence_thd_collater",
    _NEMO + "datasets.utils.neat_packed_collater",
)

_PLACEMENT = "ZeRO-3 places the weights"
#: Its keys that change no result, and why; accepted with a note.
WITHOUT_EFFECT = {
    "ci": "it is for NeMo-AutoModel's own tests",
    "nvtx": "no ranges are marked for a profiler",
    "skypilot": "launch/submit.py knows SLURM",
    "prewarm": "kernels are tuned when they are first called",
    "tool_call_eval": "tool calls are not evaluated",
    "longalign": "whole samples are packed",
    "benchmark": "docs/performance.md says how time is measured",
    "parallelizer": _PLACEMENT,
    "autopipeline": "there is no pipeline",
    "distributed_config": _PLACEMENT,
    "distributed.pipeline": "there is no pipeline",
    "distributed.moe": _PLACEMENT,
    "distributed.reshard_after_forward": _PLACEMENT,
    "distributed.defer_fsdp_grad_sync": "ZeRO-3 reduces every micro-batch",
    **{
        f"teacher_distributed.{name}": "ZeRO shards the teacher"
        for name in ("_target_", "strategy", "sequence_parallel", "activation_checkpointing")
    },
    "distributed.mp_policy": "model.torch_dtype decides",
    "checkpoint.dequantize_base_checkpoint": "a model of bf16 or fp32 weights is loaded as it is, "
    "and one of quantised weights is refused",
    "checkpoint.single_rank_consolidation": "rank 0 writes the student",
    "checkpoint.staging_dir": "checkpoints are staged in checkpoint_dir itself",
    "checkpoint.v4_compatible": "the student is saved as transformers saves it",
    "packed_sequence.packing_strategy": "whole samples are packed",
    "packed_sequence.num_proc": "samples are packed in one process",
    "step_scheduler.gc_every_steps": "Python collects by itself",
    "step_scheduler.log_remote_every_steps": "every step is logged",
    "step_scheduler.loss_average_window_steps": "the loss of every step is logged",
}

#: Keys of its ChatDataset that say how rows are padded, shuffled or read in advance.
CHAT_WITHOUT_EFFECT = {
    "padding": "the collater pads each batch",
    "shuffle_seed": "rows are shuffled with rng.seed",
    "num_proc": "rows are read as the machine has cores",
}

#: Its sections for other programs; their values are not read, not even their `${…}`.
UNREAD = {"ci", "skypilot"}

_ON_ALL = (
    "a teacher runs on all ranks, as ranks of its own gain no time where these have enough tokens "
    "(docs/scaling.md); remove it, and see teacher.placement, teacher.window or a cache"
)
#: Other frameworks' words for the sizes of `distributed`.
_SIZES = {
    "tensor_parallel_size": "write tp_size", "tensor_model_parallel_size": "write tp_size",
    "autotp_size": "write tp_size", "context_parallel_size": "write cp_size",
    "sequence_parallel_size": "write cp_size", "pipeline_parallel_size": "write tp_size or cp_size",
    "pipeline_model_parallel_size": "write tp_size or cp_size",
}  # fmt: skip
#: Keys of NeMo-AutoModel that have no meaning here and others that may be looked for, and what to
#: do instead. They are refused unless they are off.
REFUSED_KEYS = {
    **dict.fromkeys(("teacher_ranks", "distributed.teacher_ranks", "teacher.ranks"), _ON_ALL),
    **{f"distributed.{name}": hint for name, hint in _SIZES.items()},
    "separate_meshes": "student and teacher share all ranks here (ZeRO shards the teacher); "
    "remove it",
    **{
        f"teacher_distributed.{name}": "student and teacher share all ranks here; remove it"
        for name in ("dp_size", "dp_replicate_size", "pp_size", "ep_size")
    },
    "teacher_distributed.cp_size": "distributed.cp_size splits samples for both models; remove it",
    "quantization": "quantised training is not supported; remove the section",
    "qat": "quantised training is not supported; remove the section",
    "neftune": "noise on embeddings is not offered; remove the section",
    "embedding_row_repair": "weights are trained as they are; remove the section, and repair the "
    "model's file beforehand",
    "tokenizer": "models and data use the student's own tokenizer as it was saved; remove it",
    "packed_sequence.max_packs": "write dataset.limit_dataset_samples",
    "checkpoint.restore_from": "the same checkpoint_dir resumes by itself; remove it",
    "step_scheduler.save_checkpoint_every_epoch": "write ckpt_every_steps: epoch",
    "step_scheduler.grad_acc_steps": "it follows from global_batch_size; remove it",
    "peft.rank": "write peft.dim",
    "peft.r": "write peft.dim",
    "peft.lora_alpha": "write peft.alpha",
    "peft.lora_dropout": "write peft.dropout",
    "mlflow": "metrics go to TensorBoard, metrics.jsonl and wandb; remove the section",
    "fp8": "fp8 is not supported; remove the section",
}

#: Keys of a loader's section that ds_kd takes itself.
LOADER_FLAGS = ("shuffle", "drop_last", "group_by_length")
#: Rules of the schema's `_target_` sections.
OF_MODEL = ComponentRules(
    calls=MODEL, example="{name}.pretrained_model_name_or_path: Qwen/Qwen3-0.6B"
)
OF_DATA = ComponentRules(
    may_call=("ds_kd.data.",),
    given=("tokenizer",),
    words={"labels": ("shifted", "unshifted")},  # taken by ds_kd, see `ds_kd.data.own`
    example="{name}._target_: ds_kd.data.squad.make_squad_dataset, and dataset_name",
)
OF_LOADER = ComponentRules(
    calls=_LOADER,
    may_call=(_LOADER,),
    given=("dataset", "batch_sampler", "generator"),
    flags=LOADER_FLAGS,
    kwargs={"collate_fn": COLLATER},
)
OF_OPTIMIZER = ComponentRules(
    calls="torch.optim.AdamW",
    may_call=("torch.optim.", "deepspeed.ops."),
    given=("params", "model_params"),
    kwargs={"lr": 1e-5},
)


OF_CROSS_ENTROPY = ComponentRules(
    calls=f"{LOSSES}MaskedCrossEntropy", may_call=(f"{LOSSES}cross_entropy.",), kwargs={}
)
OF_DIVERGENCE = ComponentRules(
    calls=f"{LOSSES}KDLoss", may_call=(DIVERGENCES, NAMED), kwargs={}, has_names=True
)
