"""Translate a YAML into the schema's own keys, before anything is checked.

NeMo-AutoModel's names and other spellings are translated, with a note if a reader may look for the
effect of one. Keys that change no result are removed. Keys that would train another model (tensor
parallelism, fp8, quantised weights) stay, and the checks refuse them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ds_kd.config.components import problem
from ds_kd.config.names import (
    CHAT_WITHOUT_EFFECT,
    COLLATER,
    NEMO_COLLATERS,
    NEMO_KERNELS,
    NEMO_LOSSES,
    NOT_WITH_ZERO,
    WITHOUT_EFFECT,
)
from ds_kd.config.permissions import Permitted, translate
from ds_kd.config.text.origins import decode

_NAME = "pretrained_model_name_or_path"
_MODELS = ("model", "teacher_model")
#: Arguments of a tokenizer's section that leave the student's own as it is.
_OF_TOKENIZER = {"_target_", _NAME, "trust_remote_code"}


class Translation:
    """The values of a YAML, translated when this object is made.

    Args:
        data: the YAML's values, which are changed in place.
    """

    def __init__(self, data: dict[str, Any]):
        self.data = data
        self.notes: list[str] = []
        self.problems: list[str] = []
        steps: tuple[Callable[[], None], ...] = (
            self._translate_words, self._drop_keys_without_effect, self._translate_switches,
            self._translate_models, self._drop_tokenizer, self._translate_loaders,
            self._translate_data_sets, self._translate_loss, self._translate_schedule,
            self._note_distributed,
        )  # fmt: skip
        for step in steps:
            step()

    def section(self, name: str) -> dict[str, Any]:
        """Return a section to read or change, or an empty mapping if there is none."""
        found = self.data.get(name)
        return found if isinstance(found, dict) else {}

    def drop(self, path: str, reason: str) -> None:
        """Remove a key, with a note unless it asked for nothing."""
        *way, name = path.split(".")
        section: Any = self.data
        for part in way:
            section = section.get(part) if isinstance(section, dict) else None
        if isinstance(section, dict) and name in section:
            value = section.pop(name)
            if value is not None and value is not False:
                self.notes.append(f"{path}: accepted; {reason}")

    def _translate_words(self) -> None:
        """Read `none` as null, and drop keys that begin with `_`, which often hold anchors."""
        for name in [name for name in self.data if name.startswith("_")]:
            self.drop(name, "a name that begins with _ is not read")
        distributed = self.section("distributed")
        for part in (self.data, distributed):
            for name, value in part.items():
                if isinstance(value, str) and value.lower() == "none":
                    part[name] = None

    def _drop_keys_without_effect(self) -> None:
        for path, reason in WITHOUT_EFFECT.items():
            self.drop(path, reason)
        checkpoint = self.section("checkpoint")
        if checkpoint.get("model_save_format") == "torch_save":
            self.drop("checkpoint.model_save_format", "the student is saved as safetensors")
        if self.section("peft").get("use_triton") is True:
            self.drop("peft.use_triton", "peft's PyTorch code takes its place")
        steps = self.section("step_scheduler")
        if self.section("dataloader").get("batch_size", 0) in (None, steps.get("local_batch_size")):
            self.drop("dataloader.batch_size", "step_scheduler.local_batch_size says the same")

    def _translate_switches(self) -> None:
        """Expand the sections that null or one word switches on or off."""
        if isinstance(self.data.get("compile"), bool) or self.data.get("compile") == "auto":
            self.data["compile"] = {"enabled": self.data["compile"]}
        compiled = self.section("compile")
        for name in [name for name, value in compiled.items() if value is None]:
            del compiled[name]
        for name in ("checkpoint", "tensorboard"):
            if name in self.data and self.data[name] is None:
                self.data[name] = {"enabled": False}
        checkpoint = self.section("checkpoint")
        if checkpoint.get("save_consolidated") in (True, "true"):
            checkpoint["save_consolidated"] = "final"
        wandb = self.section("wandb")
        is_on = [decode(wandb.pop(name, True)) for name in ("enable", "enabled")]
        if False in is_on:
            self.data["wandb"] = None
        if "save_dir" in wandb:
            wandb["dir"] = wandb.pop("save_dir")

    def _translate_models(self) -> None:
        """Drop arguments of NeMo-AutoModel's `from_pretrained` that change no result."""
        for name in _MODELS:
            model = self.section(name)
            for key in [key for key in NOT_WITH_ZERO if model.get(key, key) is None]:
                del model[key]
            backend = model.get("backend")
            chosen = backend if isinstance(backend, dict) else {}
            for key in ("fake_balanced_gate", "te_fp8"):
                if chosen.get(key):
                    self.problems.append(
                        f"{name}.backend.{key}: it changes what is trained and is not offered; "
                        f"write {name}.backend=null"
                    )
            for key in NEMO_KERNELS:
                self.drop(f"{name}.{key}", "it changes speed alone, not results")
            if model.get("load_base_model") is True:
                self.drop(f"{name}.load_base_model", "the weights are always loaded")
            if model.get("num_nextn_predict_layers") == 0:
                del model["num_nextn_predict_layers"]
            self._withhold_trust(name, model)

    def _withhold_trust(self, name: str, model: dict[str, Any]) -> None:
        """Use transformers' own code: NeMo-AutoModel's recipes set trust_remote_code everywhere."""
        is_nemos = str(model.get("_target_")).startswith("nemo_automodel.")
        if is_nemos and model.get("trust_remote_code") is True and model.get(_NAME):
            if isinstance(model[_NAME], Permitted):
                return
            model["trust_remote_code"] = False
            self.notes.append(
                f"{name}.trust_remote_code: not done; transformers' own code is used, and "
                f"--allow-targets {model[_NAME]} would run that of the model's author"
            )

    def _is_student_tokenizer(self, tokenizer: Any) -> bool:
        """Return whether a tokenizer's section names the student's own tokenizer, unchanged."""
        if not isinstance(tokenizer, dict) or not set(tokenizer) <= _OF_TOKENIZER:
            return False
        name = self.section("model").get(_NAME)
        return name is not None and tokenizer.get(_NAME) == name

    def _drop_tokenizer(self) -> None:
        if self._is_student_tokenizer(self.data.get("tokenizer")):
            self.drop("tokenizer", "it is the student's own")

    def _translate_loaders(self) -> None:
        """Replace `collate_fn: {_target_: …}` of a known collater by its name."""
        for name in ("dataloader", "validation_dataloader"):
            loader, key = self.section(name), f"{name}.collate_fn"
            given = loader.get("collate_fn")
            dotted = given.get("_target_") if isinstance(given, dict) else given
            if not isinstance(dotted, str):
                continue
            if dotted in NEMO_COLLATERS:
                loader["collate_fn"] = COLLATER
                self.notes.append(
                    f"{key}: accepted; default_collater takes its place and lays packs end to end"
                )
            elif isinstance(given, dict) and translate(dotted) == COLLATER:
                loader["collate_fn"] = COLLATER
                self.notes += [
                    f"{key}.{part}: accepted; padding changes no result"
                    for part in sorted(set(given) - {"_target_"})
                ]

    def _translate_data_sets(self) -> None:
        """Drop a data set's keys about padding, shuffling and the student's tokenizer."""
        prefix = "validation_dataset_"
        named = {name: self.data.pop(name) for name in [*self.data] if name.startswith(prefix)}
        if named:
            single = self.data.get("validation_dataset")
            sets = {"main": single} if isinstance(single, dict) and "_target_" in single else single
            more = {name.removeprefix(prefix): section for name, section in named.items()}
            self.data["validation_dataset"] = {**(sets or {}), **more}

        # None of these keys changes a result: the collater pads, and the sampler shuffles.
        names = ["dataset", "validation_dataset"]
        names += [f"validation_dataset.{name}" for name in self.section("validation_dataset")]
        for name in names:
            section = self.section(name)
            if str(section.get("_target_", "")).endswith(".ChatDataset"):
                for key, reason in CHAT_WITHOUT_EFFECT.items():
                    self.drop(f"{name}.{key}", reason)
                if section.get("mask_reasoning_content") is False:
                    del section["mask_reasoning_content"]
            if self._is_student_tokenizer(section.get("tokenizer")):
                self.drop(f"{name}.tokenizer", "it is the student's own")

    def _translate_loss(self) -> None:
        """Replace a fused or chunked cross-entropy by the one of this project."""
        section = self.section("loss_fn")
        name = section.get("_target_")
        if not isinstance(name, str) or name not in NEMO_LOSSES:
            return
        section["_target_"] = "ds_kd.losses.MaskedCrossEntropy"
        for argument in NEMO_LOSSES[name]:
            section.pop(argument, None)
        if not section.get("logit_softcapping", True):
            del section["logit_softcapping"]
        short = name.rpartition(".")[2]
        self.notes.append(f"loss_fn: {short} accepted; MaskedCrossEntropy takes its place")

    def _translate_schedule(self) -> None:
        if self.section("lr_scheduler"):
            given = decode(self.section("lr_scheduler"))
            self.data["lr_scheduler"] = translate_schedule(given, self.problems, self.notes)

    def _note_distributed(self) -> None:
        """Note that ZeRO-3 takes the place of the strategy that the YAML names."""
        teacher = self.section("teacher_distributed")
        for key in set(teacher) - {"tp_size"}:
            if teacher[key] in (None, 1, "none"):
                del teacher[key]  # asks for nothing
        section = self.section("distributed")
        if not section:
            return
        if isinstance(section.get("ep_size"), int) and section["ep_size"] > 1:
            self.drop("distributed.ep_size", "ZeRO-3 shards the experts like all other weights")
        if name := section.get("_target_") or section.get("strategy"):
            short = str(name).rpartition(".")[2]
            self.notes.append(f"distributed: {short} accepted; DeepSpeed ZeRO-3 takes its place")
        if section.get("dp_size") is not None:
            self.notes.append(
                "distributed.dp_size: accepted; a run uses all ranks that are started"
            )


#: NeMo-AutoModel's lr_decay_style → transformers' name without and with a min_lr, and how that one
#: calls it.
_DECAY_STYLES: dict[str, tuple[str, str | None, str]] = {
    "cosine": ("cosine", "cosine_with_min_lr", "min_lr"),
    "linear": ("linear", "polynomial", "lr_end"),
    "constant": ("constant_with_warmup", None, ""),
    "inverse-square-root": ("inverse_sqrt", None, ""),
}
_NEMO_SCHEDULE = {"lr_decay_style", "lr_warmup_steps", "min_lr", "_target_"}


def translate_schedule(
    section: dict[str, Any], problems: list[str], notes: list[str]
) -> dict[str, Any]:
    """Return an `lr_scheduler` section with NeMo-AutoModel's keys replaced by transformers'."""
    dotted = section.get("_target_")
    if dotted is not None and not str(dotted).startswith("nemo_automodel."):
        hint = "write lr_scheduler.name with a schedule of transformers, such as cosine"
        problems.append(problem("lr_scheduler._target_", dotted, "none", hint))
    if not _NEMO_SCHEDULE & set(section):
        return section
    rest = {name: value for name, value in section.items() if name not in _NEMO_SCHEDULE}
    style, least = section.get("lr_decay_style", "cosine"), section.get("min_lr")
    if not isinstance(style, str) or style not in _DECAY_STYLES:
        problems.append(
            f"lr_scheduler.lr_decay_style: got {style!r}, expected one of "
            f"{', '.join(_DECAY_STYLES)}, or lr_scheduler.name with transformers' own"
        )
        return rest

    # transformers has another schedule, with another argument, for a rate that decays to `min_lr`.
    plain, with_least, keyword = _DECAY_STYLES[style]
    made: dict[str, Any] = {"name": plain, "num_warmup_steps": section.get("lr_warmup_steps", 0)}
    if least is not None and not (type(least) in (int, float) and least >= 0):
        problems.append(problem("lr_scheduler.min_lr", least, "a number ≥ 0"))
    elif least and style == "constant":
        notes.append("lr_scheduler.min_lr: has no effect, as a constant rate does not decay")
    elif least and with_least is None:
        problems.append(f"lr_scheduler.min_lr: {style} does not decay to one; remove it")
    elif least:
        made["name"] = with_least
        made["scheduler_specific_kwargs"] = {keyword: least}
        if with_least == "polynomial":
            made["scheduler_specific_kwargs"]["power"] = 1.0
    return {**made, **rest}
