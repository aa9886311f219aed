"""Build the evaluation of a run from the `evaluation` section of its config."""

from __future__ import annotations

from typing import Any

from ds_kd.config.components import config_error
from ds_kd.config.schema import RunConfig
from ds_kd.evaluate.run import Items, load_items
from ds_kd.evaluate.tasks.encoding import Encoder
from ds_kd.evaluate.tasks.kinds import Task
from ds_kd.parallel.world import World, rank0_first
from ds_kd.recipe.models import config_of
from ds_kd.recipe.tasks.evaluation import find_longest, fit_task, make_named_task
from ds_kd.train.evaluation import Evaluation


def build_evaluation(
    cfg: RunConfig, tokenizer: Any, shared: int | None, world: World
) -> Evaluation | None:
    """Return the tasks of a run with their samples tokenised, or None if it has none.

    Args:
        tokenizer: the student's.
        shared: number of ids that student and teacher share, where it is not all of them.

    Raises:
        ConfigError: rows cannot be read, or do not suit their task; names the key.
    """
    wanted = cfg.evaluation
    if wanted is None:
        return None
    config = config_of(cfg.model)
    alone = Encoder(tokenizer, find_longest(config, tokenizer))
    beside = alone
    if cfg.teacher_model is not None:
        longest = find_longest(config_of(cfg.teacher_model), tokenizer)
        beside = alone.read_no_more(Encoder(tokenizer, longest))
    tasks: list[tuple[Task, Items]] = []
    for k, entry in enumerate(wanted.tasks):
        key = f"evaluation.tasks[{k}]"
        with config_error(f"{key}.task", entry["task"], "a task"):
            named = make_named_task(entry["task"])

        # Samples are tokenised before models are loaded, so that a wrong row is told at once.
        def load(named: Task = named, entry: dict[str, Any] = entry) -> tuple[Task, Items]:
            task = fit_task(named, entry["data"])
            encoder = beside if task.needs_teacher else alone
            return task, load_items(task, entry["data"], entry.get("limit"), encoder)

        with config_error(f"{key}.data", entry["data"], f"rows for {entry['task']}"):
            tasks.append(rank0_first(load, world))
    every = wanted.every if isinstance(wanted.every, int) else None
    vocab = shared or config.get_text_config().vocab_size
    return Evaluation(tasks, every, tokenizer, vocab, world)
