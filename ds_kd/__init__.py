"""ds_kd: knowledge distillation of LLMs on DeepSpeed.

    import ds_kd

    cfg = ds_kd.load_config("cfg.yaml", ["kd_ratio=0.3"])     # or a mapping in place of the file
    trainer = ds_kd.build(cfg)                                # on every rank; resumes
    finished = trainer.train()

`import ds_kd` imports neither torch nor DeepSpeed; each function imports what it needs.
"""

from __future__ import annotations

from typing import Any

__version__ = "0.1.0"
__all__ = ["build", "load_config"]


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


def build(cfg: Any) -> Any:
    """Return the `Trainer` of a checked config, at its last checkpoint if there is one.

    Joins the job that the launcher describes in the environment; without one it is a single rank.

    Args:
        cfg: from `load_config`, which permits what it names.

    Raises:
        ds_kd.config.components.ConfigError: something that the config names does not exist or does
            not fit.
    """
    from ds_kd.parallel import world as distributed
    from ds_kd.recipe import build as recipe

    world = distributed.start(cfg.dist_env.backend, cfg.dist_env.timeout_minutes)
    trainer = recipe.build(cfg, world)
    if trainer.checkpointer is not None:
        trainer.checkpointer.resume(trainer.student, trainer.state)
        trainer.checkpointer.check_room(trainer.student)
    return trainer
