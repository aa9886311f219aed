"""ds_kd: knowledge distillation of LLMs on DeepSpeed.

    import ds_kd

    cfg = ds_kd.load_config("cfg.yaml", ["kd_ratio=0.3"])     # or a mapping in place of the file
    with ds_kd.build(cfg) as trainer:                         # on every rank; resumes
        summary = trainer.train()                         # steps, losses, whether it is finished
    student = ds_kd.load_student("checkpoints/final")         # on one process
    print(student("Translate to French: I love coding!").text)

`import ds_kd` imports neither torch nor DeepSpeed; each function imports what it needs.
"""

from __future__ import annotations

from typing import Any

__version__ = "0.1.0"
__all__ = ["build", "load_config", "load_student"]


def load_config(
    source: Any, overrides: list[str] | None = None, allow: tuple[str, ...] = ()
) -> Any:
    """Return the checked `RunConfig` of a YAML file or mapping.

    Args:
        source: path of a YAML, or its content as a mapping.
        overrides: `key.sub=value`, as on the command line.
        allow: prefixes of `_target_` names to permit.

    Raises:
        ds_kd.config.components.ConfigError: everything that is wrong with it.
    """
    from ds_kd.config.load import load

    return load(source, overrides, allow)


def build(cfg: Any, listens: bool = False) -> Any:
    """Return the `Trainer` of a checked config, at its last checkpoint if there is one.

    Joins the job that the launcher describes in the environment; without one it is a single rank.
    The checkpoint directory is this run's alone until the trainer is closed, which a `with` does.

    Args:
        cfg: from `load_config`.
        listens: SIGTERM, SIGUSR1, SIGHUP and Ctrl-C end the run after its step, saved (in the main
            thread).

    Raises:
        ds_kd.errors.UserError: something that the config names does not exist or does not fit, a
            run that is finished had other settings, or the ranks cannot meet.
    """
    from ds_kd.plan.placement import settle_placement
    from ds_kd.recipe.run import open_run

    return open_run(cfg, listens, settle_placement)


def load_student(directory: Any, device: str | None = None) -> Any:
    """Return a student that writes text: `load_student("checkpoints/final")("A prompt").text`.

    Args:
        directory: written by a run (`checkpoint_dir/final`), by `launch/export.py` or transformers.
        device: of torch; a GPU by default, if there is one.

    Raises:
        ds_kd.errors.UserError: the directory holds no whole model with its tokenizer.
    """
    from ds_kd.models.generate import load_student

    return load_student(directory, device)
