"""lm-evaluation-harness on local rows, without a network."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def model_of(directory: str | Path, batch_size: int = 4) -> Any:
    """The harness's view of a model of the disk, in float32 on the CPU."""
    import torch
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return HFLM(
        pretrained=AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval(),
        tokenizer=AutoTokenizer.from_pretrained(directory),
        batch_size=batch_size,
        device="cpu",
    )


def run(model: Any, data: str | Path, limit: int | None = None, **task: Any) -> dict[str, Any]:
    """A task of the harness over a local file → its results and samples, in the rows' order."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    config = {
        "task": "local",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        **task,
    }
    found = lm_eval.simple_evaluate(
        model=model,
        tasks=[config],
        limit=limit,
        bootstrap_iters=0,
        task_manager=TaskManager(include_defaults=False),  # reading all of its own takes seconds
    )
    samples = sorted(found["samples"]["local"], key=lambda sample: sample["doc_id"])
    return {"results": found["results"]["local"], "samples": samples}


def hellaswag(model: Any, data: str | Path, limit: int | None = None) -> dict[str, Any]:
    """The harness's own HellaSwag over a local file → accuracies and all log-likelihoods."""
    from lm_eval.tasks.hellaswag.utils import process_docs

    found = run(
        model,
        data,
        limit,
        output_type="multiple_choice",
        process_docs=process_docs,
        doc_to_text="{{query}}",
        doc_to_target="{{label}}",
        doc_to_choice="choices",
        metric_list=[
            {"metric": name, "aggregation": "mean", "higher_is_better": True}
            for name in ("acc", "acc_norm")
        ],
    )
    return {
        "acc": found["results"]["acc,none"],
        "acc_norm": found["results"]["acc_norm,none"],
        "log_likelihoods": [
            [float(answer[0][0]) for answer in sample["resps"]] for sample in found["samples"]
        ],
    }
