"""Which names a config may use: NeMo-AutoModel's, translated; a short list of others; and what is
refused, with its remedy."""

_NEMO = "nemo_automodel.components."
_MODEL = "transformers.AutoModelForCausalLM.from_pretrained"

#: NeMo-AutoModel's name → the name that takes its place here.
ALIASES = {
    "nemo_automodel.NeMoAutoModelForCausalLM.from_pretrained": _MODEL,
    "nemo_automodel._transformers.NeMoAutoModelForCausalLM.from_pretrained": _MODEL,
    _NEMO + "loss.masked_ce.MaskedCrossEntropy": "ds_kd.losses.MaskedCrossEntropy",
    _NEMO + "loss.kd_loss.KDLoss": "ds_kd.losses.KDLoss",
    _NEMO + "datasets.llm.squad.make_squad_dataset": "ds_kd.data.squad.make_squad_dataset",
    _NEMO + "datasets.llm.hellaswag.HellaSwag": "ds_kd.data.hellaswag.HellaSwag",
    _NEMO + "datasets.llm.chat_dataset.ChatDataset": "ds_kd.data.chat.ChatDataset",
    _NEMO + "datasets.utils.default_collater": "ds_kd.data.collate.default_collater",
}

#: Names outside ds_kd that a run needs. Exact: a whole `torch.*` would admit `torch.hub.load`.
ALLOWED = {
    *(
        f"torch.optim.{name}"
        for name in ("Adam", "AdamW", "SGD", "NAdam", "RAdam", "Adagrad", "Adamax", "RMSprop")
    ),
    _MODEL,
    "torchdata.stateful_dataloader.StatefulDataLoader",
    "deepspeed.ops.adam.FusedAdam",
    "deepspeed.ops.adam.DeepSpeedCPUAdam",
}

#: Names somebody will try, and what to write instead.
UNSUPPORTED = {
    "torch.optim.Adafactor": "it looks at whole matrices and ZeRO-3 gives it flat shards; "
    "write torch.optim.AdamW",
    "torch.optim.Muon": "it looks at whole matrices and ZeRO-3 gives it flat shards; write "
    "torch.optim.AdamW",
    "torch.optim.LBFGS": "it needs a closure and whole vectors; write torch.optim.AdamW",
}

#: Sections of the schema that belong to later work: refused, never silently ignored.
REFUSED_SECTIONS = {
    "peft": "LoRA is not supported yet; remove the section to train all weights",
    "offload_teacher_model": "remove it and set deepspeed.teacher: "
    "ds_configs/zero/teacher_zero3_offload.json",
    "separate_meshes": "student and teacher share all ranks here; remove it and "
    "teacher_distributed",
    "teacher_distributed": "student and teacher share all ranks here; remove it (ZeRO shards "
    "the teacher)",
    "quantization": "quantised training is not supported; remove the section",
}
