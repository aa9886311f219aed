"""The facts in README and docs come from the code, and all that they name exists."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

from ds_kd.config.load import load
from ds_kd.config.reference.keys import key_table
from tests import tiny

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_the_table_of_keys_is_the_schemas():
    assert key_table() in (ROOT / "docs" / "config.md").read_text(), (
        "run python -m ds_kd.config.reference.keys and paste its output into docs/config.md"
    )


def test_every_file_that_a_page_names_exists():
    missing = [
        f"{page.name}: {name}"
        for page in PAGES
        for name in re.findall(
            r"\b(?:launch|ds_kd|ds_configs|tests|benchmarks)/[\w/]+\.(?:py|sh|yaml|json)\b",
            page.read_text(),
        )
        if not (ROOT / name).is_file()
    ]
    assert not missing


def test_every_link_between_pages_leads_somewhere():
    missing = [
        f"{page.name}: {link}"
        for page in PAGES
        for link in re.findall(r"\]\(([^)#:]+)[^)]*\)", page.read_text())
        if not (page.parent / link).exists()
    ]
    assert not missing


#: Starts each file as a command of its own from the root, in one process that imports torch once.
SHOW_HELP = """
import pathlib, runpy, sys
plain = sys.path[1:]
for name in sys.argv[1:]:
    for each in [each for each in sys.modules if each.split(".")[0] == "benchmarks"]:
        del sys.modules[each]
    sys.path[:], sys.argv = [str(pathlib.Path(name).parent.resolve()), *plain], [name, "--help"]
    try:
        runpy.run_path(name, run_name="__main__")
    except SystemExit as ended:
        assert not ended.code, name
"""


def test_every_benchmark_tells_its_command_and_its_options():
    files = sorted((ROOT / "benchmarks").glob("*/*.py"))
    names = [str(p.relative_to(ROOT)) for p in files if "__main__" in p.read_text()]
    done = subprocess.run(
        [sys.executable, "-c", SHOW_HELP, *names], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    told = done.stdout.split("usage: ")[1:]
    assert len(told) == len(names) > 10
    for name, text in zip(names, told, strict=True):
        assert f" {name}" in text and "options:" in text


def commands() -> list[tuple[str, str]]:
    """Return (page, command) of every `bash` fence and of every command in a sentence."""
    found = []
    for page in PAGES:
        text = page.read_text()
        fences = re.findall(r"```bash\n(.*?)```", text, flags=re.DOTALL)
        lines = [line for fence in fences for line in fence.replace("\\\n", " ").splitlines()]
        lines += re.findall(r"`((?:python|bash|deepspeed|torchrun|tensorboard) [^`]+)`", text)
        parts = [part for line in lines for part in re.sub(r"\s+#.*", "", line).split("&&")]
        found += [(page.name, " ".join(part.split())) for part in parts if part.strip()]
    return found


#: A documented command → the file and the beginning of the test that runs it, with other names.
RUN_BY = {
    "python launch/new_config.py": "unit/test_config.py::test_a_new_config_loads",
    "python launch/plan.py": "unit/test_config.py::test_a_dry_run_prints_the_plan",
    "python launch/submit.py": "unit/test_config.py::test_the_slurm_section_becomes",
    "python launch/kd.py --list-keys": "unit/test_config.py::test_keys_are_listed_by_prefix",
    "python launch/kd.py --config cfg.yaml --check": "unit/test_config_notes.py::test_checking",
    "python launch/kd.py --config cfg.yaml --show": "unit/test_show.py::test_the_command_shows",
    "python launch/kd.py --config cfg.yaml": "e2e/test_run.py::test_kd_ratio_0_runs_on_one_rank",
    "python launch/kd.py --config ds_configs/": "e2e/test_run.py::test_kd_ratio_0_runs_on_one_rank",
    "deepspeed launch/kd.py": "e2e/test_run.py::test_the_guides_yaml_runs_under_the_deepspeed",
    "deepspeed --hostfile hosts --no_ssh": "e2e/test_two_hosts.py::test_cut_matrices_on_two_hosts",
    "torchrun --nproc-per-node": "e2e/test_run.py::test_torchrun_starts_the_same_run",
    "NPROC=2 bash launch/single_node.sh": "e2e/test_signals.py::test_ctrl_c_ends_the_step",
    "bash launch/single_node.sh": "e2e/test_signals.py::test_ctrl_c_ends_the_step",
    "sbatch": "slurm/test_slurm.py::test_two_nodes_run_to_the_end",
    "python launch/prune.py": "unit/test_prune.py::test_a_pruned_model_is_the_teacher",
    "python launch/compare.py": "unit/test_quickstart_pieces.py::test_the_config_of_a_run_says",
    "python launch/evaluate.py": "unit/test_evaluate.py::test_hellaswag_agrees_with_lm",
    "torchrun --nproc-per-node 8 launch/evaluate.py": "distributed/test_evaluation.py::test_two_r",
    "python launch/generate.py": "unit/test_generate.py::test_the_command_answers_and_talks",
    "python launch/cache_teacher.py": "e2e/test_api.py::test_a_run_is_built_trained_and_closed",
    "python launch/generate_data.py": "unit/test_answers.py::test_draws_come_again_after_a_stop",
    "python launch/sweep.py": "e2e/test_sweep.py::test_the_command_leaves_out_finished_runs",
    "python launch/report.py": "unit/test_report.py::test_a_directory_that_is_no_run_is_told",
    "python launch/export.py": "unit/test_checkpoint.py::test_an_export_that_cannot_be",
    "python -m ds_kd.config.reference.json_schema": "unit/test_config.py::test_the_json_schema",
    "python -m ds_kd.config.reference.keys": "unit/test_docs.py::test_the_table_of_keys_is",
    "python -OO": "unit/test_environment.py::test_an_environment_that_no_run",
    "ds-kd": "e2e/test_wheel.py::test_the_wheel_has_all_and_runs",
    "python -m ds_kd": "e2e/test_wheel.py::test_the_wheel_has_all_and_runs",
    "PYTHONPATH=. python launch/kd.py": "unit/test_declaration.py::test_a_data_set_from_outside",
    "python benchmarks/rollouts/steps.py": "e2e/test_rollout_benchmark.py::test_a_step_is_timed",
    "PYTHONPATH=. deepspeed launch/kd.py": "e2e/test_run.py::test_torchrun_starts_the_same_run",
}
#: A documented command → the reason why no test runs it.
NOT_RUN = {
    "bash launch/quickstart.sh": "it downloads a teacher of 135 M parameters and takes minutes",
    "python launch/fetch_teacher.py": "it downloads a teacher of 135 M parameters",
    "bash launch/test.sh": "it runs these tests",
    "bash launch/setup.sh": "it installs packages; launch/test.sh calls it before the tests",
    "source": "it is the shell's own",
    "ruff": "it is run before every commit",
    "mypy": "it is run before every commit",
    "deepspeed --hostfile hosts launch/kd.py": "it needs ssh; the command without ssh is run",
    "python benchmarks/": "it takes hours, or a GPU",
    "torchrun --nproc-per-node 2 benchmarks/": "it takes minutes and the quickstart's models",
    "deepspeed --module ds_kd": "the launcher with launch/kd.py is run, and so is python -m ds_kd",
    "pip install": "it needs a package index",
    "hf ": "it needs the hub",
    "tensorboard": "it serves a page until it is stopped",
}


def test_every_documented_command_is_run_by_a_test_or_marked_why_not():
    unknown = [
        f"{page}: {command}"
        for page, command in commands()
        if not command.startswith((*RUN_BY, *NOT_RUN))
    ]
    assert not unknown
    documented = [command for _, command in commands()]
    table = (*RUN_BY, *NOT_RUN)
    stale = [name for name in table if not any(c.startswith(name) for c in documented)]
    assert not stale


def test_the_tests_that_run_documented_commands_exist():
    missing = []
    for command, place in RUN_BY.items():
        path, name = place.split("::")
        if f"def {name}" not in (ROOT / "tests" / path).read_text():
            missing.append(f"{command}: {place}")
    assert not missing


def test_the_map_of_the_code_names_every_room():
    page = (ROOT / "docs" / "code.md").read_text()
    rooms = {path.parent.name for path in (ROOT / "ds_kd").glob("*/**/__init__.py")}
    assert {room for room in rooms if f"{room}/" not in page} == set()


def test_sections_of_the_readme_can_be_used_as_they_are_typed(tmp_path):
    """Those of each block together, in a run of two models; a shared base has no teacher_model."""
    tiny.llama(tmp_path / "model")
    (tmp_path / "rows.jsonl").write_text(tiny.squad_rows(10))
    blocks = re.findall(r"```yaml\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(blocks) == 4
    model = {"pretrained_model_name_or_path": str(tmp_path / "model")}
    rows = {
        "_target_": "ds_kd.data.squad.make_squad_dataset",
        "dataset_name": str(tmp_path / "rows.jsonl"),
    }
    for block in blocks:
        lines = [line for line in block.splitlines() if line.strip()]
        keys = [line.partition(":")[0] for line in lines]
        assert len({*keys}) == len(keys)  # YAML takes the last of several
        run = {"model": model, "teacher_model": model, "dataset": rows}
        if "shared_base" in block:
            del run["teacher_model"]
        text = "".join(f"{key}: {json.dumps(value)}\n" for key, value in run.items())
        (tmp_path / "cfg.yaml").write_text(text + block)
        load(tmp_path / "cfg.yaml", [f"checkpoint.checkpoint_dir={tmp_path}/run"])
