"""Checks that need more than one key: keys that contradict each other, and bounds of the arguments
of `_target_` sections."""

from __future__ import annotations

import re
from pathlib import PurePath

from ds_kd.config.checks.weights import find_text_config, find_unknown_map, read_config
from ds_kd.config.checks.zero_file import load_zero_config, offloads_optimizer
from ds_kd.config.components import Component, find_wrong_arguments, problem
from ds_kd.config.keys import is_number
from ds_kd.config.losses import find_absent_layer, is_of_layers
from ds_kd.config.methods.check_adapter import check_adapter
from ds_kd.config.methods.check_cached import find_wrong_cache
from ds_kd.config.methods.check_placement import check_placement
from ds_kd.config.methods.check_rollouts import check_rollouts
from ds_kd.config.methods.check_sequence import check_sequence, find_own_collaters
from ds_kd.config.methods.check_tensor import check_tensor
from ds_kd.config.schema import CACHED, SHARED_BASE, RunConfig, StepScheduler
from ds_kd.config.signatures import signature_of
from ds_kd.config.task import WITH_TEACHER, find_wrong_entry

#: transformers' schedules by name; each takes other arguments.
_SCHEDULES = {
    "constant": "get_constant_schedule",
    "constant_with_warmup": "get_constant_schedule_with_warmup",
    "cosine": "get_cosine_schedule_with_warmup",
    "cosine_with_min_lr": "get_cosine_with_min_lr_schedule_with_warmup",
    "cosine_with_restarts": "get_cosine_with_hard_restarts_schedule_with_warmup",
    "inverse_sqrt": "get_inverse_sqrt_schedule",
    "linear": "get_linear_schedule_with_warmup",
    "polynomial": "get_polynomial_decay_schedule_with_warmup",
    "warmup_stable_decay": "get_wsd_schedule",
}
_NAMES_OF_SCHEDULE = ("warmup_type", "decay_type")  # the others are numbers
_GIVEN_TO_SCHEDULE = ("optimizer", "num_warmup_steps", "num_training_steps", "last_epoch")
#: The least that a loader's arguments may be.
_LOADER_LEAST = {
    "num_workers": 0, "timeout": 0, "prefetch_factor": 1, "batch_size": 1,
    "snapshot_every_n_steps": 1,
}  # fmt: skip
#: Hugging Face's words for how samples are padded and cut.
_WORDS = {
    "padding": ("max_length", "longest", "do_not_pad"),
    "truncation": ("longest_first", "only_first", "only_second", "do_not_truncate"),
}
#: As sbatch reads a time limit.
_TIME = re.compile(r"(\d+-)?\d+(:\d+){0,2}|UNLIMITED|INFINITE")
#: Below this time ranks may give up on one that writes a checkpoint.
_MINUTES_OF_A_SAVE = 5
#: `train`, `train[:10%]`, `train[5:]+validation`, as `datasets` reads them.
_MOST_SPLITS = 100
_SPLIT = re.compile(r"\w+(\.\w+)*(\[(-?[\d_]+%?)?:(-?[\d_]+%?)?\])?(\([^)]*\))?")


def find_contradictions(cfg: RunConfig, data: dict, problems: list[str]) -> None:
    """Add a line to `problems` for each contradiction between keys."""
    steps = cfg.step_scheduler
    if cfg.dataloader is not None and "batch_size" in cfg.dataloader.kwargs:
        problems.append("dataloader.batch_size: set step_scheduler.local_batch_size instead")
    problems += filter(None, [misfit_of_batch(steps, cfg.distributed.dp_size or 1)])

    # A section that is there and wrong has its problem already, so the YAML's own keys are asked.
    if steps.max_steps == 0 and not cfg.validates and not data.get("validation_dataset"):
        problems.append(
            "step_scheduler.max_steps: 0 validates and there is no validation_dataset or "
            "validation_share; write one"
        )
    if cfg.validation_share is not None and data.get("validation_dataset"):
        problems.append("validation_share: there is a validation_dataset too; keep one")
    if cfg.validation_share is not None and _repeats(cfg.dataset):
        problems.append(
            "validation_share: dataset.stopping_strategy: all_exhausted repeats samples, and those "
            "held out would be trained on too; write first_exhausted, or name a validation_dataset"
        )
    other = data["rng"].get("seed") if isinstance(data.get("rng"), dict) else None
    if cfg.seed is not None and other is not None and other != cfg.seed:
        problems.append(f"seed: {cfg.seed} and rng.seed: {other} contradict each other; keep one")
    if cfg.slurm is not None and cfg.slurm.time and not _TIME.fullmatch(cfg.slurm.time):
        problems.append(problem("slurm.time", cfg.slurm.time, "days-hours:minutes:seconds"))

    _check_evaluation(cfg, data, problems)
    _check_sharing(cfg, problems)
    check_rollouts(cfg, data, problems)
    check_tensor(cfg, problems)
    check_sequence(cfg, problems)
    _check_teacher(cfg, data, problems)
    check_adapter(cfg, problems)
    _check_peft(cfg, problems)
    _check_losses(cfg, problems)
    _check_optimizer(cfg, problems)
    _check_zero(cfg, problems)
    _check_schedule(cfg, problems)
    for component in filter(None, (cfg.dataset, *cfg.validation_dataset.values())):
        _check_data(component, problems)
    for component in filter(None, (cfg.dataloader, cfg.validation_dataloader)):
        _check_loader(component, problems)


def _check_teacher(cfg: RunConfig, data: dict, problems: list[str]) -> None:
    """Check that there is one teacher where the loss asks for it."""
    # A section that is there and wrong has its problem already, so the YAML's own keys are asked.
    shares_base = cfg.teacher.kind == SHARED_BASE
    is_resident = data.get("teacher") in (None, {}, {"kind": "resident"})
    if cfg.kd_ratio > 0 and data.get("teacher_model") is None and is_resident:
        problems.append(
            "teacher_model: missing; name a teacher, or set kd_ratio: 0 for plain fine-tuning"
        )
    if shares_base and data.get("teacher_model") is not None:
        problems.append(
            "teacher_model: teacher.kind is shared_base, where the student's own base is the "
            "teacher; remove one of them"
        )
    if shares_base and data.get("peft") is None:
        problems.append(
            "teacher.kind: got shared_base, which needs an adapter to leave out; write peft: "
            "{match_all_linear: true}, or name a teacher_model and remove teacher.kind"
        )
    if cfg.teacher.kind == CACHED and (wrong := find_wrong_cache(cfg, data)):
        problems.append(wrong)


def _repeats(dataset: Component | None) -> bool:
    """Return whether a mixture draws by weight and repeats its shorter sources."""
    if dataset is None or dataset.kwargs.get("stopping_strategy") != "all_exhausted":
        return False
    sources = dataset.kwargs.get("sources")
    parts = sources if isinstance(sources, list) else []
    return any(isinstance(part, dict) and part.get("weight") is not None for part in parts)


def misfit_of_batch(steps: StepScheduler, ranks: int) -> str:
    """Return the problem of batch sizes on this number of ranks, with a size that fits, or an empty
    text if they fit."""
    width = steps.local_batch_size * ranks
    if steps.global_batch_size % width == 0:
        return ""
    expected = f"a multiple of local_batch_size {steps.local_batch_size}"
    if ranks > 1:
        expected += f" × {ranks} ranks = {width}"
    up = -(-steps.global_batch_size // width) * width
    key = "step_scheduler.global_batch_size"
    return problem(key, steps.global_batch_size, expected, f"write {up}")


def _check_evaluation(cfg: RunConfig, data: dict, problems: list[str]) -> None:
    """Check the tasks of an evaluation: each exists once, and a distance has a teacher."""
    if cfg.evaluation is None:
        return
    entries, names = cfg.evaluation.tasks, [entry["task"] for entry in cfg.evaluation.tasks]
    # Tasks that are there and wrong have their problem already.
    given = data.get("evaluation")
    if not entries and not (isinstance(given, dict) and given.get("tasks") is not None):
        problems.append("evaluation.tasks: missing; write [{task: hellaswag, data: rows.jsonl}]")
    for k, entry in enumerate(entries):
        problems += find_wrong_entry(f"evaluation.tasks[{k}]", entry)

    # A distance is measured on rows of its own, for which the teacher has to run.
    if WITH_TEACHER in names and cfg.teacher.kind == CACHED:
        problems.append(
            "evaluation.tasks: kl asks the teacher about other rows than the cache has; remove it, "
            "or teacher.kind: cached"
        )
    elif WITH_TEACHER in names and cfg.teacher_model is None and cfg.teacher.kind != SHARED_BASE:
        problems.append(
            "evaluation.tasks: kl compares with a teacher, and there is no teacher_model; name one"
        )
    stems = [PurePath(name).stem for name in names]
    if twice := next((stem for stem in stems if stems.count(stem) > 1), None):
        problems.append(
            f"evaluation.tasks: {twice} is there twice, and both would be logged under that name"
        )


def _check_sharing(cfg: RunConfig, problems: list[str]) -> None:
    """Check that what computes shared beginnings is there: packs, their collater, plain SDPA."""
    if not cfg.packed_sequence.share_prefixes:
        return
    key = "packed_sequence.share_prefixes"
    if cfg.packed_sequence.packed_sequence_size == 0:
        problems.append(
            f"{key}: samples share their beginnings in packs; write "
            "packed_sequence.packed_sequence_size: 2048, or remove it"
        )

    # A model's own attention is only known when it is loaded; see `models.probes.check_sharing`.
    for place, name in find_own_collaters(cfg):
        problems.append(
            f"{key}: {place}: {name} does not know shared beginnings; remove one of the two keys"
        )
    for model in filter(None, (cfg.model, cfg.teacher_model)):
        given = model.kwargs.get("attn_implementation")
        if given not in (None, "sdpa"):
            problems.append(
                f"{key}: {model.key}.attn_implementation: {given} cannot compute shared "
                "beginnings; write sdpa, or remove share_prefixes"
            )


def _check_peft(cfg: RunConfig, problems: list[str]) -> None:
    """Check the choice of adapted maps and the place of dropout."""
    peft = cfg.peft
    if peft is None:
        return
    if peft.dropout and peft.dropout_position == "post":
        problems.append("peft.dropout_position: dropout is on an adapter's input; write pre")
    names = ("match_all_linear", "target_modules", "exclude_modules")
    given = [name for name in names if getattr(peft, name)]
    if len(given) > 1:
        problems.append(f"peft: {' and '.join(given)} are both given; keep one")
    elif cfg.model is not None and (unknown := find_unknown_map(cfg.model, peft)):
        problems.append(unknown)


def _check_zero(cfg: RunConfig, problems: list[str]) -> None:
    """Check the two ZeRO files against each other's engines."""
    for name, stages in (("student", (3,)), ("teacher", (0, 3))):
        # Each file is read as the run reads it.
        try:
            zero = load_zero_config(getattr(cfg.deepspeed, name), f"deepspeed.{name}", stages)
        except ValueError as error:
            problems.append(str(error))
            continue

        if name == "teacher" and offloads_optimizer(zero):
            problems.append(
                "deepspeed.teacher: offload_optimizer: a teacher has no optimizer; remove it, or "
                "write offload_param"
            )
        stage = zero["zero_optimization"]["stage"]
        if name == "teacher" and cfg.offload_teacher_model and stage == 0:
            problems.append(
                "offload_teacher_model: a teacher at stage 0 stays on the accelerator; write stage "
                "3 in deepspeed.teacher, or remove it"
            )

    check_placement(cfg, problems)


def _check_losses(cfg: RunConfig, problems: list[str]) -> None:
    """Check the bounds of a loss's arguments."""
    if cfg.kd_loss_fn is None or cfg.loss_fn is None:
        return
    for part in cfg.kd_losses:
        t, chunk = part.kwargs.get("temperature"), part.kwargs.get("chunk_size")
        if isinstance(t, (int, float)) and not (is_number(t) and t > 0):
            problems.append(problem(f"{part.key}.temperature", t, "a number > 0"))
        if isinstance(chunk, int) and chunk < 0:
            problems.append(problem(f"{part.key}.chunk_size", chunk, "an integer ≥ 0"))

        # Without a model of its own the teacher is the student's base.
        if cfg.kd_ratio > 0 and cfg.model is not None and is_of_layers(part):
            models = (cfg.model, cfg.teacher_model or cfg.model)
            counts = [find_text_config(read_config(m)).get("num_hidden_layers") for m in models]
            problems += filter(None, [find_absent_layer(part, *counts)])
    sizes = {str(part.kwargs.get("chunk_size")) for part in cfg.kd_losses} - {"None"}
    if len(sizes) > 1:
        given = " and ".join(sorted(sizes))
        problems.append(f"kd_loss_fn: parts have chunk_size {given}, and share one; keep one")
    for part in (cfg.loss_fn, *cfg.kd_losses):
        ignored = part.kwargs.get("ignore_index", -100)
        if ignored != -100:
            expected = "-100, which data sets mark and tokens are counted by"
            problems.append(problem(f"{part.key}.ignore_index", ignored, expected))


def _check_optimizer(cfg: RunConfig, problems: list[str]) -> None:
    """Check bounds that all optimizers share."""
    for name, value in (cfg.optimizer.kwargs if cfg.optimizer is not None else {}).items():
        if name == "betas":
            is_pair = isinstance(value, list) and len(value) == 2
            good = is_pair and all(is_number(beta) and 0 <= beta < 1 for beta in value)
            expected = "two numbers, from 0 to below 1"
        elif name in ("lr", "eps", "weight_decay", "momentum", "lr_decay", "alpha"):
            good, expected = is_number(value) and value >= 0, "a number ≥ 0"
        else:
            continue
        if not good:
            problems.append(problem(f"optimizer.{name}", value, expected))


def _check_schedule(cfg: RunConfig, problems: list[str]) -> None:
    """Check the arguments of the learning-rate schedule."""
    wanted = cfg.lr_scheduler
    if wanted is None:
        return
    if wanted.num_warmup_steps and wanted.warmup_ratio is not None:
        problems.append("lr_scheduler: num_warmup_steps and warmup_ratio are both given; keep one")

    # Each schedule of transformers takes other arguments, which its signature tells.
    key, given = "lr_scheduler.scheduler_specific_kwargs", wanted.scheduler_specific_kwargs
    signature = signature_of(f"transformers.optimization.{_SCHEDULES[wanted.name]}")
    if signature is not None:
        taken = signature.annotations
        component = Component(f"the schedule {wanted.name}", given, key)
        if given and not set(taken) - set(_GIVEN_TO_SCHEDULE):
            problems.append(f"{key}: {component.name} takes none; remove them")
        else:
            problems += find_wrong_arguments(
                component, taken, signature.is_open, _GIVEN_TO_SCHEDULE
            )
        lacking = [n for n in signature.required if n not in {*_GIVEN_TO_SCHEDULE, *given}]
        problems += [f"{key}.{name}: missing; {component.name} needs it" for name in lacking]

    # The bounds of those arguments stand in no signature.
    if wanted.name == "cosine_with_min_lr" and len({"min_lr", "min_lr_rate"} & set(given)) != 1:
        problems.append(f"{key}: give min_lr, or min_lr_rate as a share of optimizer.lr")
    if wanted.name == "constant" and (wanted.num_warmup_steps or wanted.warmup_ratio):
        problems.append("lr_scheduler.name: constant has no warm-up; write constant_with_warmup")
    for name, value in given.items():
        if name in _NAMES_OF_SCHEDULE or (value is None and name != "lr_end"):
            continue
        low = 1 if name == "timescale" else 0
        if not (is_number(value) and value >= low):
            problems.append(problem(f"{key}.{name}", value, f"a number ≥ {low}"))
    lr = cfg.optimizer.kwargs.get("lr") if cfg.optimizer is not None else None
    for name in ("min_lr", "lr_end"):
        least = given.get(name)
        if not (is_number(lr) and is_number(least)) or least < lr:
            continue
        if not (name == "min_lr" and least == lr > 0):
            problems.append(problem(f"{key}.{name}", least, f"less than optimizer.lr {lr}"))


def _check_data(component: Component, problems: list[str]) -> None:
    """Check bounds of the arguments that the project's data sets share."""
    if component.kwargs.get("streaming"):
        key = f"{component.key}.streaming"
        problems[:] = [line for line in problems if not line.startswith(f"{key}:")]
        problems.append(f"{key}: rows are drawn by their number, which a stream has not; remove it")
    if component.declaration is None:
        return

    # These arguments have one meaning in all data sets that declare themselves.
    for name in ("seq_length", component.declaration.limit):
        value = component.kwargs.get(name)
        if isinstance(value, (int, float)) and not value >= 1:
            problems.append(problem(f"{component.key}.{name}", value, "an integer ≥ 1"))
    for name, words in _WORDS.items():
        value = component.kwargs.get(name)
        if isinstance(value, str) and value not in words:
            expected = f"true, false or {' or '.join(words)}"
            problems.append(problem(f"{component.key}.{name}", value, expected))

    # make_squad_dataset alone refuses a length that is missing; the others have nothing to cut.
    cuts = component.kwargs.get("truncation") not in (None, False, "do_not_truncate")
    needs = cuts or component.kwargs.get("padding") == "max_length"
    if (
        needs
        and component.name.endswith(".make_squad_dataset")
        and component.kwargs.get("seq_length") is None
    ):
        problems.append(f"{component.key}.seq_length: missing; truncation and padding need it")

    split = component.kwargs.get("split")
    parts = [part.strip() for part in split.split("+")] if isinstance(split, str) else []
    if len(parts) > _MOST_SPLITS or not all(_SPLIT.fullmatch(part) for part in parts):
        expected = "a split such as train, train[:1000] or train[90%:]"
        problems.append(problem(f"{component.key}.split", split, expected))


def _check_loader(component: Component, problems: list[str]) -> None:
    """Check bounds of a loader's arguments, and those that need worker processes."""
    for name, least in _LOADER_LEAST.items():
        value = component.kwargs.get(name)
        if isinstance(value, (int, float)) and not value >= least:
            problems.append(problem(f"{component.key}.{name}", value, f"a number ≥ {least}"))
    for name in ("prefetch_factor", "persistent_workers", "timeout"):
        if component.kwargs.get(name) and not component.kwargs.get("num_workers"):
            problems.append(
                f"{component.key}.{name}: is for worker processes; set "
                f"{component.key}.num_workers, or remove it"
            )


def note_on_timeout(cfg: RunConfig) -> list[str]:
    """Return a note if ranks wait so shortly for each other that a save may end the run."""
    minutes = cfg.dist_env.timeout_minutes
    if minutes >= _MINUTES_OF_A_SAVE or not cfg.checkpoint.enabled:
        return []
    return [
        f"dist_env.timeout_minutes: {minutes:g} is short, as ranks also wait while one of them "
        f"writes a checkpoint of a large model or hashes it on a slow disk; 10 is the default"
    ]
