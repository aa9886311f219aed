"""Check where a teacher that runs is to lie, against the other keys that place models and against
its files."""

from __future__ import annotations

from ds_kd.config.checks.weights import read_config, read_matrices
from ds_kd.config.components import Component, problem
from ds_kd.config.names import AUTO, CPU, INT8
from ds_kd.config.schema import RunConfig

EXPECTED = "a place that this teacher can take"
_GROUPS = (64, 32, 16)  # numbers of a row that share a scale in 8 bits
_DTYPES = {"bf16": "BF16", "bfloat16": "BF16", "fp32": "F32", "float32": "F32"}


def check_placement(cfg: RunConfig, problems: list[str]) -> None:
    """Add a line to `problems` for each key that contradicts the teacher's place."""
    placement = cfg.teacher.placement
    if placement is not None and cfg.deepspeed.teacher is not None:
        problems.append(
            f"teacher.placement: got {placement}, and deepspeed.teacher places it too; keep one"
        )

    # Two keys may place a model, and DeepSpeed cannot do everything that they say.
    if placement not in (None, CPU) and cfg.offload_teacher_model:
        problems.append(
            f"offload_teacher_model: teacher.placement is {placement}; write cpu, or remove one"
        )
    if placement == INT8 and cfg.compile.enabled == "true":
        problems.append(
            "teacher.placement: got int8, whose weights torch.compile does not read; write zero3, "
            "or compile.enabled: auto, which leaves this teacher out"
        )
    is_read = placement == INT8 and cfg.loads_teacher
    reason = _find_odd_files(cfg.teacher_model) if is_read and cfg.teacher_model else ""
    if reason:
        problems.append(problem("teacher.placement", INT8, EXPECTED, reason))


def _find_odd_files(teacher: Component) -> str:
    """Return why the files of a local teacher do not go into 8 bits, or an empty text."""
    if teacher.kwargs.get("gguf_file") is not None:
        return explain_int8(teacher, "", {})
    matrices = read_matrices(teacher)
    if matrices is None:  # left to the run
        return ""
    # As `recipe.models.training_dtype` decides, which needs torch.
    given, config = teacher.kwargs, read_config(teacher)
    word = str(given.get("torch_dtype", given.get("dtype", "auto"))).removeprefix("torch.")
    is_kept = "bfloat16" in (config.get("dtype"), config.get("torch_dtype"))
    return explain_int8(teacher, _DTYPES.get(word, "BF16" if is_kept else "F32"), matrices)


def explain_int8(teacher: Component, wanted: str, matrices: dict[str, tuple[str, int]]) -> str:
    """Return why a teacher cannot be kept in 8 bits, or an empty text.

    Args:
        wanted: dtype of the run, as safetensors writes it.
        matrices: dtype and width of its matrices in its files, by name.
    """
    if not matrices:
        return "int8 reads safetensors files; the model has none"
    if others := sorted({dtype for dtype, _ in matrices.values()} - {wanted}):
        return (
            f"int8 needs files in the dtype of the run, and those of "
            f"{teacher.kwargs['pretrained_model_name_or_path']} hold {others[0]} where "
            f"{teacher.key}.torch_dtype is {wanted}; write the same"
        )
    if group_of(matrices) is None:
        odd, width = next((n, w) for n, (_, w) in matrices.items() if w % _GROUPS[-1])
        return (
            f"int8 divides rows into groups of {_GROUPS[-1]} numbers or more, and {odd} has rows "
            f"of {width}; write zero3"
        )
    return ""


def group_of(matrices: dict[str, tuple[str, int]]) -> int | None:
    """Return the numbers of the largest group into which the rows of all matrices are divided, or
    None if there is none."""
    return next((g for g in _GROUPS if all(w % g == 0 for _, w in matrices.values())), None)


def is_unplaced(cfg: RunConfig) -> bool:
    """Return whether no key says where the teacher lies: an accelerator that has the memory then
    keeps it whole. With rollouts the student's copy needs that room."""
    is_cut = (cfg.distributed.tp_size or 1) > 1
    named = cfg.teacher.placement, cfg.deepspeed.teacher
    return named == (None, None) and not (cfg.offload_teacher_model or is_cut or cfg.rolls_out)


def note_on_placement(cfg: RunConfig) -> list[str]:
    """Return a note on a place that only the machine of the run tells."""
    if cfg.teacher.placement != AUTO or not cfg.loads_teacher:
        return []
    return [
        "teacher.placement: auto is chosen when the run starts, by the memory there; python "
        "launch/plan.py --gpu-memory SIZE tells it before"
    ]
