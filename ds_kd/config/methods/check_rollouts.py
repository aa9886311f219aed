"""Check what rollouts need of the other keys."""

from __future__ import annotations

from ds_kd.config.components import problem
from ds_kd.config.schema import CACHED, RunConfig


def check_rollouts(cfg: RunConfig, data: dict, problems: list[str]) -> None:
    """Add a line to `problems` for each key that contradicts `rollouts`.

    Args:
        data: the YAML's own values. A share that it does not give is 1, unless `rollouts` is wrong,
            which is told already.
    """
    _check_data(cfg, problems)
    wanted = cfg.rollouts
    if wanted is None or not cfg.rolls_out:
        return
    if cfg.kd_ratio < 1 and data.get("kd_ratio") is not None:
        hint = "cross-entropy to the student's own words teaches it nothing; remove kd_ratio"
        problems.append(problem("kd_ratio", cfg.kd_ratio, "1 with rollouts", hint))
    if cfg.teacher.kind == CACHED:
        hint = "a cache has nothing on texts that the student has yet to write"
        problems.append(problem("teacher.kind", CACHED, "resident or shared_base", hint))
    if wanted.samples_per_prompt > 1 and wanted.temperature == 0:
        problems.append(
            f"rollouts.samples_per_prompt: all {wanted.samples_per_prompt} answers are the same at "
            "temperature 0; write 1, or a temperature > 0"
        )

    # Layers that torch.compile has compiled would be compiled anew for every length.
    if wanted.generate == "sharded" and cfg.compile.enabled == "true":
        problems.append(
            "rollouts.generate: got sharded, which cannot write with the layers of compile; write "
            "replica, or compile.enabled: false"
        )
    size = cfg.packed_sequence.packed_sequence_size
    if 0 < size <= wanted.max_new_tokens:
        problems.append(
            f"rollouts.max_new_tokens: got {wanted.max_new_tokens}, and a pack of "
            f"packed_sequence.packed_sequence_size: {size} holds no prompt beside such an answer; "
            "write fewer"
        )


def _check_data(cfg: RunConfig, problems: list[str]) -> None:
    """Check that rows without answers are used where the student writes all answers itself."""
    dataset, writes_all = cfg.dataset, cfg.rollouts is not None and cfg.rollouts.ratio == 1
    has_prompts = dataset is not None and dataset.is_without_answers
    if has_prompts and not writes_all:
        problems.append(
            f"{dataset.key}: its rows have prompts and no answers to learn; write rollouts: "
            "{ratio: 1}, so that the student writes them"
        )
    if has_prompts and cfg.validation_share is not None:
        problems.append(
            "validation_share: rows without answers cannot be validated with; remove it, or name "
            "a validation_dataset"
        )

    # A set that is there and wrong has its problem already.
    for held_out in filter(None, cfg.validation_dataset.values()):
        if held_out.is_without_answers:
            problems.append(
                f"{held_out.key}: its rows have no answers to validate with; name rows with answers"
            )
