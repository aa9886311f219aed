"""The real command: `deepspeed launch/kd.py` with the guide's own YAML, tiny models and local
data."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from ds_kd.checkpoint.run_lock import RunLock
from ds_kd.parallel.rendezvous import free_port
from tests import browser, tiny

ROOT = Path(__file__).parents[2]
GUIDE = "ds_configs/runs/llama3_2_1b_kd.yaml"
#: TensorBoard's page of a run on a CPU, by subject.
CHARTS = (
    "optimised loss, training and validation", "cross-entropy", "distillation loss",
    "parts of the training loss", "agreement", "acceptance", "KL at T = 1",
    "KL at T = 1 by position in the text", "entropy", "learning rate", "gradient norm",
    "tokens per second", "samples per second", "TFLOP/s of a rank",
    "share of padding and of supervised tokens", "seconds of a step, by part",
    "peak memory of each rank, GiB", "kl, forward_kl",
)  # fmt: skip


def environment() -> dict[str, str]:
    made = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return {**made, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{made['PATH']}"}


def run(command: list[str], **variables: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        command,
        cwd=ROOT,
        env=environment() | variables,
        capture_output=True,
        text=True,
        timeout=480,
        check=False,
    )


def kd_command(*overrides: str, ranks: int = 2, port: int | None = None) -> list[str]:
    start = [sys.executable]
    if ranks > 1:
        port = port or free_port()
        start = ["deepspeed", "--master_port", str(port), "--num_accelerators", str(ranks)]
    return [*start, "launch/kd.py", "--config", GUIDE, *overrides]


def kd(*overrides: str, ranks: int = 2) -> subprocess.CompletedProcess:
    return run(kd_command(*overrides, ranks=ranks))


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    made = tmp_path_factory.mktemp("e2e")
    tiny.llama(made / "student", seed=1)
    tiny.llama(made / "teacher", layers=3, hidden=64, tie=False, seed=2)
    squad = [
        {
            "id": f"q{i}",
            "context": f"w{i} w5 w9",
            "question": "w7 w8",
            "answers": {"text": [f"w{i} w3"]},
        }
        for i in range(22)
    ]
    swag = [
        {"ind": i, "ctx": f"w{i} w4", "endings": ["w1 w2", "w3"], "label": str(i % 2)}
        for i in range(5)
    ]
    for name, rows in (("squad", squad), ("swag", swag)):
        (made / f"{name}.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return made


@pytest.fixture(scope="module")
def overrides(root):
    return [
        f"model.pretrained_model_name_or_path={root / 'student'}",
        f"teacher_model.pretrained_model_name_or_path={root / 'teacher'}",
        f"dataset.dataset_name={root / 'squad.jsonl'}",
        f"validation_dataset.path_or_dataset={root / 'swag.jsonl'}",
        f"checkpoint.checkpoint_dir={root / 'run'}",
        "step_scheduler.global_batch_size=8",
        "optimizer.lr=0.01",
        "checkpoint.save_consolidated=true",
    ]


@pytest.fixture(scope="module")
def finished(overrides, root):
    """Two launches of one command: the first stops early, the second goes on to the end (2 epochs
    of 3 steps)."""
    task = {"task": "kl", "data": str(root / "swag.jsonl")}
    watched = ["step_scheduler.val_samples=1", f"evaluation={{tasks: [{json.dumps(task)}]}}"]
    first = kd(*overrides, *watched, "step_scheduler.max_steps=2")
    second = kd(*overrides, *watched)
    return first, second


def test_the_guides_yaml_runs_under_the_deepspeed_launcher(finished, root):
    first, second = finished
    assert first.returncode == 0, first.stdout + first.stderr
    assert second.returncode == 0, second.stdout + second.stderr
    assert "using gloo" in first.stdout and "ZeRO-3 takes its place" in first.stdout
    assert "step 2/2" in first.stdout and "step 6/6" in second.stdout


def test_max_steps_0_validates_and_leaves_nothing_but_metrics(overrides, root):
    directory = root / "evaluated"
    schedule = "lr_scheduler={name: polynomial, warmup_ratio: 0.1}"
    more = [f"checkpoint.checkpoint_dir={directory}", "step_scheduler.max_steps=0", schedule]
    result = kd(*overrides, *more, ranks=1)
    assert result.returncode == 0, result.stderr
    assert (
        "validation after step 0: loss" in result.stdout and "nothing was trained" in result.stdout
    )
    assert "step 1" not in result.stdout
    seen = [path.name for path in directory.iterdir() if not path.name.startswith(".")]
    assert seen == ["tensorboard"]


def test_the_same_command_resumes(finished):
    assert "resumed from" in finished[1].stdout and "at step 2" in finished[1].stdout
    assert "step 2/6" not in finished[1].stdout
    assert "resuming, but" not in finished[1].stdout  # a longer run is the same run


def test_changes_since_a_checkpoint_are_named(finished, overrides, root):
    # The same file with other words in it: only its content tells.
    rows = root / "squad.jsonl"
    before = rows.read_text()
    rows.write_text(before.replace("w7 w8", "w8 w7"))
    tiny.llama(root / "teacher", layers=3, hidden=64, tie=False, seed=9)
    result = kd(*overrides, "optimizer.lr=0.02")
    rows.write_text(before)
    tiny.llama(root / "teacher", layers=3, hidden=64, tie=False, seed=2)
    assert "resuming, but optimizer.lr was 0.01 and is 0.02" in result.stdout
    assert "resuming, but training data was '22 samples, " in result.stdout
    # The run is finished: what is there is not the student that was asked for.
    assert result.returncode == 2 and "Traceback" not in result.stderr, result.stderr
    assert "optimizer.lr was 0.01 and is 0.02" in result.stderr
    assert "another directory, or the old values" in result.stderr and "done" not in result.stdout
    assert "resuming, but teacher_model weights was " in result.stdout
    assert "resuming, but model weights was " not in result.stdout


def test_a_checkpoint_of_another_model_is_refused_without_a_traceback(finished, overrides, root):
    result = kd(*overrides, f"model.pretrained_model_name_or_path={root / 'teacher'}")
    assert result.returncode != 0 and "does not fit this model" in result.stderr
    assert "Traceback" not in result.stderr


def test_metrics_and_events_are_complete(finished, root):
    records = [
        json.loads(line)
        for line in (root / "run/tensorboard/metrics.jsonl").read_text().splitlines()
    ]
    train = [r for r in records if "train_loss" in r]
    assert [r["step"] for r in train] == [1, 2, 3, 4, 5, 6]
    tags = {
        "train_loss",
        "kd_loss",
        "ce_loss",
        "learning_rate",
        "tokens_per_sec",
        "grad_norm",
        "top1_agreement",
        "teacher_entropy",
        *("kl_at_t1", "teacher_entropy_at_t1", "student_entropy_at_t1"),
        "memory",
        "memory/rank_1",
        "throughput/samples_per_sec",
        "throughput/tflops_per_rank",
        *(f"time/{part}" for part in ("data", "teacher", "student_forward")),
        *("time/backward", "time/optimizer"),
    }
    assert tags | {"padding", "supervised"} <= set(train[0])
    last = next(record for record in reversed(records) if "val_loss" in record)
    names = ("loss", "kd_loss", "ce_loss", "top1_agreement", "top5_agreement", "acceptance_at_t1",
             "kl_at_t1", "kl_at_t1_from_0", "teacher_entropy_at_t1", "student_entropy_at_t1",
             "tokens_per_sec")  # fmt: skip
    assert {f"val_{name}" for name in names} <= set(last)
    # No sample has 64 tokens, and the same rows are evaluated as are validated with.
    assert "val_kl_at_t1_from_64" not in last
    assert last["val_kl_at_t1_from_0"] == pytest.approx(last["val_kl_at_t1"])
    assert records[-1]["eval_kl/forward_kl"] == pytest.approx(last["val_kl_at_t1"], abs=0.02)
    # the logged loss is the optimised one
    assert train[0]["train_loss"] == pytest.approx(
        0.5 * train[0]["ce_loss"] + 0.5 * train[0]["kd_loss"]
    )
    assert train[-1]["train_loss"] < train[0]["train_loss"]
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(root / "run/tensorboard"))
    events.Reload()
    assert tags <= set(events.Tags()["scalars"])
    assert {"config/text_summary", "custom_scalars__config__"} <= set(events.Tags()["tensors"])
    # A step has 8 samples, the last of an epoch 6; a part is not longer than the whole.
    for record in train:
        seconds = 8 / record["throughput/samples_per_sec"]
        assert 0 < record["time/backward"] < seconds


@pytest.mark.skipif(browser.find() is None, reason="no chromium to look at TensorBoard with")
def test_tensorboard_shows_charts_texts_and_settings_in_a_browser(finished, root, tmp_path):
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(root / "run/tensorboard")]
    with subprocess.Popen(
        [*command, "--port", "0", "--load_fast=false"], env=environment(),
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    ) as server:  # fmt: skip
        try:
            told = (re.search(r"http://\S+?:(\d+)/", line) for line in server.stderr)
            port = next(match[1] for match in told if match)
            with browser.Browser(tmp_path) as page:
                page.open(f"http://127.0.0.1:{port}/#custom_scalars")
                shown = page.wait_for(*CHARTS, "Matches (2)", "val_loss (.)")
                assert "share of the peak (MFU)" not in shown  # of a CPU none is known
                page.open(f"http://127.0.0.1:{port}/#text")
                # Prompt and answers side by side, and the YAML.
                page.wait_for("val_samples/text_summary", "reference", "teacher", "student",
                              "config/text_summary", "global_batch_size: 8")  # fmt: skip
                page.open(f"http://127.0.0.1:{port}/#hparams")
                page.wait_for("kd_loss_fn.temperature", "optimizer.lr", "val_kl_at_t1")
        finally:
            server.kill()


def test_final_loads_as_the_guide_shows(finished, root):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(root / "run/final")
    assert str(model.dtype) == "torch.bfloat16"
    ids = AutoTokenizer.from_pretrained(root / "run/final")("w1 w5", return_tensors="pt").input_ids
    assert model.generate(ids, max_new_tokens=3).shape[1] >= 3
    assert (root / "run/LATEST").resolve().name == "step_0000006"


def test_final_is_ready_to_be_pushed(finished, root):
    here = root / "run/final"
    names = {path.name for path in here.iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} <= names
    card = (here / "README.md").read_text()
    assert "| steps | 6 |" in card and "| ranks | 2 |" in card
    assert "--local_rank" not in card and f"python launch/kd.py --config {GUIDE} model." in card
    # The guide validates every few steps, and before the checkpoint that the card lies in.
    lines = (root / "run/tensorboard/metrics.jsonl").read_text().splitlines()
    last = next(r for r in map(json.loads, reversed(lines)) if "val_ce_loss" in r)
    assert last["step"] == 6 and f"{last['val_ce_loss']:.4f} |" in card


def test_final_is_real_files_and_the_runs_yaml_lies_beside_each_checkpoint(finished, root):
    assert not any(
        path.is_symlink() for path in [root / "run/final", *(root / "run/final").iterdir()]
    )
    text = (root / "run/LATEST/config.yaml").read_text()
    assert "global_batch_size: 8" in text and str(root / "squad.jsonl") in text


def test_a_second_run_in_one_directory_is_refused_and_removes_nothing(overrides, tmp_path):
    lock = RunLock(tmp_path)
    lock.take()
    (tmp_path / ".saving.step_0000001").mkdir()  # which the run that has it is just writing
    refused = kd(*overrides, f"checkpoint.checkpoint_dir={tmp_path}", ranks=2)
    lock.release()
    assert refused.returncode != 0 and "Traceback" not in refused.stderr, refused.stderr
    assert f"process {os.getpid()} on {socket.gethostname()}" in refused.stderr
    assert "another directory" in refused.stderr and (tmp_path / ".saving.step_0000001").is_dir()


def test_a_users_mistakes_exit_2_without_a_traceback(overrides, root):
    bad = kd(*overrides, "optimizer._target_=os.system", "kd_ratio=7", ranks=1)
    missing = kd(*overrides, f"dataset.dataset_name={root / 'nothing.jsonl'}", ranks=1)
    for result, words in (
        (bad, ("kd_ratio", "os.system")),
        (missing, ("dataset", "nothing.jsonl")),
    ):
        assert result.returncode == 2, result.stderr
        assert "Traceback" not in result.stderr
        assert all(word in result.stderr for word in words), result.stderr


def test_kd_ratio_0_runs_on_one_rank_without_a_teacher(overrides, root):
    result = kd(
        *overrides,
        "kd_ratio=0",
        "teacher_model=null",
        "validation_dataset=null",
        "model.torch_dtype=fp32",
        "model.use_liger_kernel=true",
        f"checkpoint.checkpoint_dir={root / 'plain'}",
        "checkpoint.save_consolidated=false",
        ranks=1,
    )
    assert result.returncode == 0, result.stderr
    told = "model.use_liger_kernel: not used; they need an NVIDIA GPU" in result.stdout
    assert told == (" on cpu" in result.stdout)
    assert "launch/export.py" in result.stdout and not (root / "plain/final").exists()


def test_torchrun_starts_the_same_run_sharing_beginnings_with_a_divergence_from_outside(
    overrides, root, tmp_path
):
    text = " ".join(f"w{k}" for k in range(20))
    rows = [
        {"context": text, "question": f"w{i}", "answers": {"text": [f"w{i}"]}} for i in range(12)
    ]
    (tmp_path / "alike.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    (tmp_path / "my_losses.py").write_text(
        "import os, pathlib, traceback\n"
        "from ds_kd.losses.divergences import Divergence\n\n\n"
        "class ReverseKL(Divergence):\n"
        "    def value(self, log_p, log_q):\n"
        "        names = [frame.name for frame in traceback.extract_stack()]\n"
        "        if '_step' in names and os.environ['RANK'] == '0':\n"
        f"            pathlib.Path('{tmp_path}/frames').write_text(' '.join(names))\n"
        "        return (log_q.exp() * (log_q - log_p)).sum(-1)\n"
    )
    command = [
        *("torchrun", "--nproc-per-node", "2", "--master-port", str(free_port())),
        *("launch/kd.py", "--config", GUIDE, *overrides, "step_scheduler.max_steps=1"),
        *(f"checkpoint.checkpoint_dir={root / 'torchrun'}", "validation_dataset=null"),
        *("kd_loss_fn._target_=my_losses.ReverseKL", "kd_loss_fn.temperature=2"),
        *("--allow-targets", "my_losses", f"dataset.dataset_name={tmp_path / 'alike.jsonl'}"),
        "packed_sequence={packed_sequence_size: 64, share_prefixes: true}",
    ]
    result = run(command, PYTHONPATH=str(tmp_path))
    assert result.returncode == 0, result.stderr
    assert "2 rank(s)" in result.stdout and "step 1/1" in result.stdout
    log = root / "torchrun/tensorboard/metrics.jsonl"
    assert json.loads(log.read_text().splitlines()[0])["shared"] > 0.5
    # Four frames from the script to the backward pass, which `_step` calls.
    frames = (tmp_path / "frames").read_text().split(" ")
    assert frames[:5] == ["<module>", "main", "train", "train", "_step"], frames


def test_packs_run_on_two_ranks_and_name_their_samples_padding(overrides, root):
    result = kd(
        *overrides,
        "packed_sequence.packed_sequence_size=64",
        "step_scheduler.global_batch_size=2",
        "step_scheduler.max_steps=1",
        f"checkpoint.checkpoint_dir={root / 'packed'}",
        "validation_dataset=null",
    )
    assert result.returncode == 0, result.stdout + result.stderr
    (record,) = (
        json.loads(line)
        for line in (root / "packed/tensorboard/metrics.jsonl").read_text().splitlines()
    )
    assert record["padding"] == 0.0


def test_an_error_that_only_one_rank_meets_is_told(overrides, root):
    command = [
        *("torchrun", "--nproc-per-node", "2", "--master-port", str(free_port())),
        *("launch/kd.py", "--config", GUIDE, *overrides),
        f"model.pretrained_model_name_or_path={root}/${{oc.env:MODEL_OF_RANK}}",
    ]
    # Rank 0 finds its model, rank 1 does not.
    script = 'export MODEL_OF_RANK=$([ "$RANK" = 0 ] && echo student || echo nothing); exec "$@"'
    command[5:6] = ["--no-python", "bash", "-c", script, "bash", sys.executable, "launch/kd.py"]
    result = run(command)
    assert result.returncode != 0
    assert "nothing" in result.stderr and "a directory that exists" in result.stderr


def test_a_port_that_is_taken_is_no_crash(overrides, tmp_path):
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        done = run(
            kd_command(
                *overrides,
                f"checkpoint.checkpoint_dir={tmp_path}",
                "step_scheduler.max_steps=1",
                port=other.getsockname()[1],
            )
        )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "step 1/1" in done.stdout
