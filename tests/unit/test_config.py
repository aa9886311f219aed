"""A config either loads as written or says everything that is wrong with it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from ds_kd.config.components import Component, ConfigError, bind, resolve
from ds_kd.config.keys import keys_of
from ds_kd.config.load import check_world, fingerprint, fingerprint_validation, load
from ds_kd.config.permissions import mark_permitted
from ds_kd.config.reference.keys import list_keys
from ds_kd.config.schema import RunConfig
from ds_kd.config.text.yaml_source import read
from ds_kd.data.rows.detect import known_data_sets
from tests import tiny
from tests.scripts import script

ROOT = Path(__file__).parents[2]
RUNS = sorted((ROOT / "ds_configs" / "runs").glob("*.yaml"))
GUIDE = ROOT / "ds_configs" / "runs" / "llama3_2_1b_kd.yaml"
SEED = ROOT.parent / "shared" / "seed" / "knowledge-distillation-guide.md"


def test_the_guides_yaml_is_kept_byte_for_byte():
    if not SEED.exists():
        pytest.skip("the guide itself (shared/seed) is not on this machine")
    block = SEED.read_text().split("```yaml\n")[1].split("```")[0]
    assert GUIDE.read_text() == block


def test_the_readmes_overrides_of_the_guides_yaml_leave_a_student_and_two_checkpoints():
    readme = (ROOT / "README.md").read_text("utf-8")
    words = re.search(r"`llama3_2_1b_kd.yaml`[^`]*add\s`([^`]+)`", readme)
    assert words is not None
    plain, cfg = load(GUIDE), load(GUIDE, words[1].split())
    assert (plain.checkpoint.save_consolidated, plain.keep_last) == ("false", None)
    assert (cfg.checkpoint.save_consolidated, cfg.keep_last) == ("final", 2)
    assert cfg.dist_env.timeout_minutes == 10


def test_every_shipped_run_but_the_guides_keeps_few_checkpoints_and_a_student():
    for path in RUNS:
        if path != GUIDE:
            shipped = yaml.safe_load(path.read_text())["checkpoint"]
            assert shipped["keep_last"] <= 2, path
            assert shipped["save_consolidated"] == "final", path


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_every_shipped_run_loads_and_binds(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # whatever the quickstart has left, or half left, in the tree
    (tmp_path / "ds_configs").symlink_to(ROOT / "ds_configs")
    (tmp_path / "quickstart" / "data").mkdir(parents=True)
    row = '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}'
    for name in ("train", "validation"):
        (tmp_path / "quickstart" / "data" / f"{name}.jsonl").write_text(row)
    (tmp_path / "study" / "data").mkdir(parents=True)
    row = '{"context": "a", "question": "b", "answers": {"text": ["c"]}}'
    for name in ("squad_train", "squad_validation"):
        (tmp_path / "study" / "data" / f"{name}.jsonl").write_text(row)
    row = '{"ctx": "a", "endings": ["b", "c", "d", "e"], "label": 0}'
    (tmp_path / "study" / "data" / "hellaswag_validation.jsonl").write_text(row)
    models = ("quickstart/student", "quickstart/teacher", "quickstart/checkpoints/final")
    for name in (*models, "study/student"):
        (tmp_path / name).mkdir(parents=True)
        tiny.weightless(tmp_path / name)
        (tmp_path / name / "tokenizer.json").write_text("{}")
        (tmp_path / name / "chat_template.jinja").write_text("{{ messages }}")
    cfg = load(path)
    bind(cfg.optimizer, params=[])
    bind(cfg.loss_fn)
    bind(cfg.kd_loss_fn)
    for dataset in (cfg.dataset, *cfg.validation_dataset.values()):
        if dataset is not None:
            bind(dataset, tokenizer=None)
    for loader in (cfg.dataloader, cfg.validation_dataloader):
        bind(loader, dataset=None, batch_sampler=None)
    bind(cfg.model)


def test_all_problems_are_reported_at_once():
    overrides = [
        "step_scheduler.global_batchsize=3",
        "step_scheduler.local_batch_size=zero",
        "kd_ratio=2",
        "distributed.pp_size=2",
        "model.torch_dtype=fp16",
        "peft={dim: 0, target_modules: q_proj, exclude_modules: [v_proj]}",
        "optimizer._target_=torch.optim.Adafactor",
    ]
    with pytest.raises(ConfigError) as caught:
        load(GUIDE, overrides)
    text = str(caught.value)
    assert len(caught.value.problems) == len(overrides) + 1  # peft has two
    for part in (
        "did you mean step_scheduler.global_batch_size?",
        "'zero', expected an integer ≥ 1",
        "kd_ratio: got 2",
        "distributed.pp_size",
        "write torch_dtype: bf16",
        "peft.dim: got 0",
        "peft: target_modules and exclude_modules are both given",
        "AdamW",
    ):
        assert part in text


@pytest.mark.parametrize(
    "section",
    ["separate_meshes", "quantization"],
)
def test_sections_that_do_not_fit_are_refused_with_a_sentence(section):
    with pytest.raises(ConfigError, match=f"{section}: .*(remove|set) "):
        load(GUIDE, [f"{section}={{a: 1}}"])


def test_an_override_reads_yaml_values_and_null_drops_a_section():
    cfg = load(
        GUIDE,
        ["validation_dataset=null", "optimizer.betas=[0.8, 0.9]", "clip_grad_norm.max_norm=2"],
    )
    assert cfg.validation_dataset == {}
    assert cfg.optimizer.kwargs["betas"] == [0.8, 0.9] and cfg.optimizer.kwargs["eps"] == 1e-8
    assert cfg.clip_grad_norm == 2.0


def test_a_key_may_be_written_with_dashes_as_options_are():
    cfg = load(GUIDE, ["kd-ratio=0.3", "step_scheduler.max-steps=7"])
    assert cfg.kd_ratio == 0.3 and cfg.step_scheduler.max_steps == 7


TASKS = "evaluation={every: end, tasks: [{task: squad, data: held.jsonl}, {task: kl}]}"


def test_an_override_may_name_an_entry_of_a_list():
    data, _, _ = read(GUIDE, [TASKS, "evaluation.tasks[0].limit=8"])
    assert data["evaluation"]["tasks"][0] == {"task": "squad", "data": "held.jsonl", "limit": 8}
    cfg = load(GUIDE, ["optimizer.betas=[0.9, 0.999]", "optimizer.betas[1]=0.95"])
    assert cfg.optimizer.kwargs["betas"] == [0.9, 0.95]
    with pytest.raises(ConfigError, match=r"command line: evaluation\.tasks.*few"):
        load(GUIDE, [TASKS, "evaluation.tasks[0].limit=few"])


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("evaluation.tasks[2].limit=8", "evaluation.tasks ends with evaluation.tasks[1]; write "),
        ("evaluation.tasks.limit=8", "write evaluation.tasks[0].limit for its first entry"),
        ("kd_ratio[0]=1", "kd_ratio is no list; write kd_ratio=[…]"),
        ("kd_ratio[x]=1", "expected key.sub=value"),
    ],
)
def test_an_override_of_a_lists_entry_that_is_not_there_is_refused(override, words):
    with pytest.raises(ConfigError) as caught:
        load(GUIDE, [TASKS, override])
    assert words in str(caught.value) and len(caught.value.problems) == 1


@pytest.mark.parametrize("bad", ["no_equals", "=3", "a..b=1"])
def test_a_malformed_override_is_refused(bad):
    with pytest.raises(ConfigError, match=r"key\.sub=value"):
        load(GUIDE, [bad])


@pytest.mark.parametrize("content", [b"a: [1", b"- 1\n- 2\n", b"\xff\xfe\x00"])
def test_a_broken_file_is_a_config_error(tmp_path, content):
    path = tmp_path / "x.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError):
        load(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"nothing\.yaml: cannot be read"):
        load(tmp_path / "nothing.yaml")


@pytest.mark.parametrize(
    "name",
    [
        "os.system",
        "subprocess.run",
        "builtins.eval",
        "torch.load",
        "torch.hub.load",
        "torch.os.system",
        "transformers.utils.os.system",
        "ds_kd.losses.torch.os.system",
        "ds_kd.losses.F",
        "ds_kd.losses.divergences.math",
        "ds_kd.config.components.importlib.import_module",
        "ds_kd.config.components.resolve",
        "ds_kd.recipe.build.build",
        "file.py:attr",
        "ds_kd.losses.KDLoss.__init__",
    ],
)
def test_names_outside_the_list_are_refused(name):
    with pytest.raises(ConfigError):
        resolve(name)


def permit(name, prefix):
    """Return the name as `load` leaves it in a config, with `--allow-targets PREFIX`."""
    return mark_permitted({"_target_": name}, (prefix,))["_target_"]


def test_a_prefix_opened_on_the_command_line_resolves():
    assert resolve(permit("math.floor", "math"))(2.5) == 2


def test_a_permission_is_given_to_one_config_and_not_to_a_text():
    name = permit("math.floor", "math")
    for other in (str(name), permit("mathematics.floor", "math")):
        with pytest.raises(ConfigError, match="not among the names a config may call"):
            resolve(other)
    change = ["optimizer._target_=math.floor"]
    assert load(GUIDE, change, allow=("math",)).optimizer.name == name
    with pytest.raises(ConfigError, match="not among the names a config may call"):
        load(GUIDE, change)


def test_a_prefix_opened_on_the_command_line_does_not_open_what_its_modules_import():
    with pytest.raises(ConfigError, match="leads through the module"):
        resolve(permit("os.path.os.system", "os.path"))


def test_secrets_never_reach_the_text_that_is_logged():
    cfg = load(GUIDE, ["wandb={project: p, api_key: hunter2}", "model.token=hunter2"])
    assert "hunter2" not in cfg.text and "project: p" in cfg.text
    assert cfg.wandb["api_key"] == "hunter2"


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("distributed._target_=os.system", "a name of NeMo-AutoModel"),
        ("dataset.x={_target_: os.system}", "inside a _target_"),
        ("dataloader.batch_size=9", "step_scheduler.local_batch_size"),
        ("dist_env.timeout_minutes=.inf", "expected a number > 0"),
        (
            "teacher_model={pretrained_model_name_or_path: a/b, trust_remote_code: true}",
            "--allow-targets a/b",
        ),
        ("kd_ratio=[1", "override kd_ratio: not valid YAML"),
    ],
)
def test_keys_that_would_be_ignored_or_unsafe_are_refused(override, words):
    with pytest.raises(ConfigError) as caught:
        load(GUIDE, [override])
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("section", "target"),
    [
        ("dataloader", "torchdata.stateful_dataloader.StatefulDataLoader"),
        ("validation_dataloader", "torchdata.stateful_dataloader.StatefulDataLoader"),
        ("optimizer", "torch.optim.AdamW"),
        ("kd_loss_fn", "ds_kd.losses.KDLoss"),
        ("loss_fn", "ds_kd.losses.MaskedCrossEntropy"),
    ],
)
def test_null_gives_an_optional_target_its_default(section, target):
    assert getattr(load(GUIDE, [f"{section}=null"]), section).name == target
    for required in ("model", "dataset"):
        with pytest.raises(ConfigError, match=f"{required}: missing"):
            load(GUIDE, [f"{required}=null"])


def test_no_steps_at_all_need_something_to_validate():
    none = "step_scheduler.max_steps=0"
    assert load(GUIDE, [none]).step_scheduler.max_steps == 0
    with pytest.raises(ConfigError, match=r"max_steps: 0 .*no validation_dataset"):
        load(GUIDE, [none, "validation_dataset=null"])


def test_null_switches_a_section_off():
    cfg = load(GUIDE, ["tensorboard=null", "checkpoint=null"])
    assert not cfg.tensorboard.enabled and not cfg.checkpoint.enabled


def test_an_unknown_argument_of_a_target_is_named_with_what_it_takes():
    for refused in (
        lambda kwargs: load(
            GUIDE, [f"kd_loss_fn.{name}={value}" for name, value in kwargs.items()]
        ),
        lambda kwargs: bind(Component("ds_kd.losses.KDLoss", kwargs, "kd_loss_fn")),
    ):
        with pytest.raises(ConfigError, match=r"temprature: .*did you mean kd_loss_fn.temperature"):
            refused({"temprature": 2})
        with pytest.raises(ConfigError, match=r"kd_loss_fn.zzz: .*takes ignore_index, temperature"):
            refused({"zzz": 2})


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("kd_loss_fn.temperature=hot", "a number"),
        ("kd_loss_fn.chunk_size=1.5", "an integer"),
        ("kd_loss_fn.fp32_upcast=1", "true or false"),
    ],
)
def test_a_value_of_another_type_is_refused_by_its_key(override, expected):
    key, _, _ = override.partition("=")
    with pytest.raises(ConfigError, match=rf"{key}: got .*expected {expected}"):
        load(GUIDE, [override])


@pytest.mark.parametrize(
    ("override", "word"),
    [
        ("dataloader.shuffle=5", "true or false"),
        ("dataloader.group_by_length=please", "true or false"),
        ("kd_ratio=null", "leave the key out"),
        ("model.torch_dtyp=bf16", "did you mean model.torch_dtype"),
        ("teacher_model.placement=int8", "is no argument of a model; write teacher.placement"),
        ("model.pretrained_model_name_or_path=ds_kd/daata", "a directory that exists"),
        ("step_scheduler.global_batch_size=18", "write 19"),
    ],
)
def test_values_that_were_once_accepted_in_silence_are_refused(override, word, monkeypatch):
    monkeypatch.chdir(ROOT)
    more = ["step_scheduler.local_batch_size=19"] if "global" in override else []
    with pytest.raises(ConfigError, match=word):
        load(GUIDE, [override, *more])


def test_batch_sizes_that_do_not_fit_the_ranks_name_one_that_would():
    cfg = load(GUIDE, ["step_scheduler.global_batch_size=32", "step_scheduler.local_batch_size=4"])
    with pytest.raises(ConfigError, match="3 ranks = 12; write 36"):
        check_world(cfg, 3)


def test_a_teacher_is_needed_unless_kd_ratio_is_0():
    with pytest.raises(ConfigError, match="teacher_model: missing"):
        load(GUIDE, ["teacher_model=null"])
    assert load(GUIDE, ["teacher_model=null", "kd_ratio=0"]).teacher_model is None


SLURM = ["slurm={nodes: 2, ntasks_per_node: 4, gpus_per_node: 4, time: '4:00:00', account: lab}"]


def test_the_slurm_section_becomes_an_sbatch_command(capsys):
    submit = script("submit")
    batch = "step_scheduler.global_batch_size=32"
    assert submit.main(["--config", str(GUIDE), *SLURM, batch, "--dry-run"]) == 0
    words = capsys.readouterr().out.split()
    assert words[:2] == ["env", "LOG_DIR=."]
    for option in ("--nodes=2", "--ntasks-per-node=4", "--gpus-per-node=4", "--time=4:00:00"):
        assert option in words
    assert words[words.index("launch/slurm.sh") + 1] == str(GUIDE.resolve())
    assert words[-1] == batch
    secret = "slurm.env_vars={WANDB_API_KEY: abc123}"
    assert submit.main(["--config", str(GUIDE), *SLURM, batch, secret, "--check"]) == 0
    out = capsys.readouterr().out
    assert "abc123" not in out and "WANDB_API_KEY=***" in out.replace("'", "")
    with pytest.raises(SystemExit) as caught:
        submit.main(["--list-keys"])
    assert caught.value.code == 2


def test_submitting_checks_the_config_against_the_ranks(capsys):
    submit = script("submit")
    assert submit.main(["--config", str(GUIDE), "--dry-run"]) == 2
    assert "slurm: the section is missing" in capsys.readouterr().err
    wrong = ["step_scheduler.global_batch_size=12", "slurm.time=3600"]
    assert submit.main(["--config", str(GUIDE), *SLURM, *wrong[:1], "--dry-run"]) == 2
    assert "step_scheduler.global_batch_size: got 12" in capsys.readouterr().err
    assert submit.main(["--config", str(GUIDE), *SLURM, *wrong[1:], "--dry-run"]) == 2
    assert "slurm.time: got 3600" in capsys.readouterr().err


SQUAD_FILE = "dataset={_target_: ds_kd.data.squad.make_squad_dataset, dataset_name: %s}"


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("rows.jsonl", '{"context": "c", "question": "q"}', "first row has context, question"),
        ("rows.json", '[{"text": "c"}]', "rows with context, question, answers.*has text"),
        ("rows.json", "", "the file is empty"),
        ("rows.jsonl", "[1, 2]", "first row is int"),
        ("rows.jsonl", "{'a': 1}", "Expecting property name"),
        ("rows.parquet", "no", "rows with context"),
        ("other.jsonl", None, "a file that exists"),
    ],
)
def test_a_data_file_without_the_needed_columns_is_told(tmp_path, name, content, words):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(ConfigError, match=f"dataset.dataset_name: .*{words}"):
        load(GUIDE, [SQUAD_FILE % (tmp_path / name)])


def test_a_data_file_with_its_columns_is_accepted(tmp_path):
    (tmp_path / "rows.jsonl").write_text(tiny.squad_rows(2))
    load(GUIDE, [SQUAD_FILE % (tmp_path / "rows.jsonl")])


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("optimizer.lr=fast", "optimizer.lr: got 'fast', expected a number"),
        ("optimizer.params=[1]", "optimizer.params: ds_kd gives it itself"),
        ("dataset.splt=train", "did you mean dataset.split"),
        ("dataloader.num_wokers=2", "did you mean dataloader.num_workers"),
        ("kd_loss_fn.temperature=0", "got 0, expected a number > 0"),
        ("loss_fn.ignore_index=-1", "got -1, expected -100"),
        ("dataset._target_=ds_kd.data.squad.nothing", "there is no ds_kd.data.squad.nothing"),
        (
            "validation_dataset={_target_: ds_kd.data.hellaswag.HellaSwag}",
            "dataset_name: missing",
        ),
        ("deepspeed.teacher=nothing.json", "deepspeed.teacher: .*cannot be read"),
        ("deepspeed.student={bf16: {enabled: true}}", r"belongs to the YAML \(model.torch_dtype"),
        ("deepspeed.student={zero_optimization: {stage: 2}}", "stage is 2, expected 3"),
        (
            "deepspeed.student={zero_optimization: {offload_param: {device: nvme}}}",
            "nvme_path is None, expected a directory",
        ),
        (
            "deepspeed.teacher={zero_optimization: {offload_optimizer: {device: cpu}}}",
            "a teacher has no optimizer; remove it, or write offload_param",
        ),
        (
            "deepspeed.student={zero_optimization: {stgae: 3}}",
            "deepspeed.student: stgae is unknown; did you mean stage",
        ),
        (
            "deepspeed.teacher={zero_optimization: {offload_param: {device: cpu, pin: 1}}}",
            "offload_param.pin is unknown; DeepSpeed has no such key; remove it",
        ),
        ("peft={rank: 8}", "peft.rank: write peft.dim"),
        (
            "dataset={_target_: ds_kd.data.squad.make_squad_dataset, truncation: maybe}",
            "got 'maybe'",
        ),
        ("slurm={time: 4h}", "slurm.time: got '4h', expected days-hours"),
        ("slurm.time=50400", "expected text; put it in quotes"),
        ("kd_ratio='0.5'", "expected a number from 0 to 1; write it without quotes"),
        ("optimizer._target_=AdamW", "did you mean torch.optim.AdamW"),
        ("modle.pretrained=3", "command line: modle: unknown key; did you mean model"),
        ("distributed.dp_size=3", "a multiple of local_batch_size 1 × 3 ranks = 3; write 33"),
        ("checkpoint.restore_from=x", "restore_from: the same checkpoint_dir resumes by itself"),
        ("packed_sequence.split_across_pack=true", "split_across_pack: got True, expected false"),
        ("model.device_map=auto", "model.device_map: ZeRO-3 places the weights"),
        ("model.quantization_config={load_in_4bit: true}", "quantised weights are not supported"),
        ("dataset.truncation=true", "dataset.seq_length: missing"),
        ("dataloader.timeout=30", "dataloader.timeout: is for worker processes"),
        ("seed=18446744073709551616", "seed: got 1844.*expected an integer from 0"),
        ("compile={enabled: true, backend: indctor}", "compile.backend: got 'indctor'"),
        ("lr_scheduler={name: constant, num_warmup_steps: 9}", "write constant_with_warmup"),
        ("lr_scheduler=cosine", "lr_scheduler: got 'cosine', expected a mapping such as {name:"),
        (
            "lr_scheduler={_target_: torch.optim.lr_scheduler.ConstantLR}",
            "lr_scheduler._target_: got .*write lr_scheduler.name",
        ),
        (
            "lr_scheduler={name: inverse_sqrt, scheduler_specific_kwargs: {timescale: 0}}",
            "timescale: got 0, expected a number ≥ 1",
        ),
        ("peft={dropout: 0.1, dropout_position: post}", "dropout_position: .*write pre"),
        (
            "loss_fn._target_=torch.nn.CrossEntropyLoss",
            "leave the section out, or write ds_kd.losses.MaskedCrossEntropy",
        ),
        ("dataset.seq_length=-5", "dataset.seq_length: got -5, expected an integer ≥ 1"),
        ("dataset.limit_dataset_samples=0", "got 0, expected an integer ≥ 1"),
        ("dataset.split='train[:'", "dataset.split: got .*expected a split such as"),
        ("dataset.dataset_name=./rows", "a directory, or a hub"),
        ("dataloader.num_workers=-1", "dataloader.num_workers: got -1, expected a number ≥ 0"),
        ("dataloader.prefetch_factor=2", "prefetch_factor: is for worker processes"),
        ("dataloader.collate_fn=5", "dataloader.collate_fn: got 5, expected a dotted name"),
        ("dataloader.worker_init_fn=ds_kd.data.no.such", "there is no ds_kd.data.no.such"),
        ("kd_loss_fn.temperature=.nan", "temperature: got nan, expected a number > 0"),
        ("kd_loss_fn.temperature=.inf", "temperature: got inf, expected a number > 0"),
        ("dist_env.timeout_minutes=1e9", "expected a number > 0 and ≤ 10080"),
        (f"checkpoint.checkpoint_dir={__file__}/run", "expected a directory; .*py is a file"),
        ("checkpoint.checkpoint_dir=/proc/run", "that can be written; /proc is the kernel's own"),
        ("model.use_liger_kernel=4", "got 4, expected true or false"),
        ("model.attn_implementation=flash", "got 'flash', expected sdpa or eager or"),
        ("model.torch_dtype=null", "model.torch_dtype: got None, expected bf16"),
        ("lr_scheduler={lr_warmup_steps: abc}", "lr_scheduler.lr_warmup_steps: got 'abc'"),
        ("lr_scheduler={min_lr: 1}", "lr_scheduler.min_lr: got 1, expected less than optimizer"),
        (
            "lr_scheduler={name: linear, scheduler_specific_kwargs: {power: 2}}",
            "the schedule linear takes none; remove them",
        ),
        (
            "lr_scheduler={name: polynomial, scheduler_specific_kwargs: {powr: 2}}",
            "did you mean lr_scheduler.scheduler_specific_kwargs.power",
        ),
        (
            "lr_scheduler={name: warmup_stable_decay}",
            "scheduler_specific_kwargs.num_decay_steps: missing",
        ),
        ("lr_scheduler={name: cosine_with_min_lr}", "give min_lr, or min_lr_rate"),
    ],
)
def test_mistakes_that_once_only_a_run_told_are_told_with_the_config(override, words):
    with pytest.raises(ConfigError, match=words):
        load(GUIDE, [override])


@pytest.mark.parametrize("override", ["optimizer.lr=null", "dataloader.num_workers=true"])
def test_a_key_is_told_of_once(override):
    with pytest.raises(ConfigError) as caught:
        load(GUIDE, [override])
    assert len(caught.value.problems) == 1


@pytest.mark.parametrize(
    "override",
    [
        "dataloader={prefetch_factor: null, snapshot_every_n_steps: null}",
        "validation_dataloader.batch_size=null",
        "deepspeed.student={zero_optimization: {param_persistence_threshold: 0, "
        "stage3_model_persistence_threshold: 1, zero_hpz_partition_size: 8}}",
        "distributed.tp_size=${oc.env:N}",
        "clip_grad_norm={max_norm: '${oc.env:N}'}",
        "lr_scheduler={lr_decay_style: cosine, min_lr: '${oc.env:SMALL}'}",
        "optimizer.betas=['${oc.env:SMALL}', 0.95]",
        "validation_dataset.num_samples_limit=${rng.seed}",
        "deepspeed.student={zero_optimization: {sub_group_size: '${oc.env:N}'}}",
        "peft={lora_dtype: null, moe_rank_scaling: false, dropout_position: post}",
        "peft={target_modules: null}",
        "fp8={enabled: false}",
        "slurm={time: 1-00:00:00}",
        "packed_sequence={packed_sequence_size: 0, split_across_pack: false}",
        "checkpoint={enabled: false, checkpoint_dir: /proc/version/x}",
        "checkpoint.checkpoint_dir=/no-such-disk/run",
        "teacher_model.pretrained_model_name_or_path=Qwen/Qwen3-0.6B",
    ],
)
def test_a_right_config_is_not_refused(override, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "Qwen" / "Qwen3-1.7B").mkdir(parents=True)  # an owner's models, or one of them
    monkeypatch.setenv("N", "1")
    monkeypatch.setenv("SMALL", "1e-6")
    load(GUIDE, ["rng.seed=${oc.env:N}", override])


def test_a_schedule_makes_the_end_of_a_run_part_of_its_course():
    end = ["step_scheduler.max_steps=5"]
    assert "step_scheduler.max_steps" not in fingerprint(load(GUIDE, end))
    with_schedule = fingerprint(load(GUIDE, [*end, "lr_scheduler={name: linear}"]))
    assert with_schedule["step_scheduler.max_steps"] == 5


def test_the_settings_of_validation_are_told_apart_from_the_course_of_a_run():
    def told(*overrides):
        cfg = load(GUIDE, [*overrides])
        return fingerprint(cfg), fingerprint_validation(cfg)

    (course, measure), none = told(), told("validation_dataset=null")
    assert none == (course, {})
    of_data = told("validation_dataset.num_samples_limit=7")
    assert of_data[0] == course and of_data[1] != measure
    for setting in ("kd_ratio=0.75", "kd_loss_fn.temperature=3.0"):
        changed = told(setting)
        assert changed[0] != course and changed[1] != measure
    changed = told("optimizer.lr=0.5", "step_scheduler.patience=2")
    assert changed[0] != course and changed[1] == measure


@pytest.mark.parametrize("split", ["train", "train[:100]", "train[10%:-5%]", "train+validation"])
def test_the_splits_of_datasets_are_accepted(split):
    load(GUIDE, [f"dataset.split='{split}'"])


HUGE = "1" + "0" * 400


@pytest.mark.parametrize(
    ("override", "words"),
    [
        (
            "deepspeed.student={zero_optimization: {offload_param: cpu}}",
            "a mapping whose device is",
        ),
        ("deepspeed.student={zero_optimization: {reduce_bucket_size: abc}}", "a whole number ≥ 0"),
        ("deepspeed.student={zero_optimization: {ofload_param: {}}}", "did you mean offload_param"),
        ("deepspeed.teacher={zero_optimization: {stage: false}}", "stage is False"),
        (f"kd_ratio={HUGE}", "kd_ratio: got 1000"),
        (f"optimizer.lr={HUGE}", "optimizer.lr: got 1000"),
        ("lr_scheduler={lr_decay_style: [cosine]}", "lr_decay_style: got"),
        ("lr_scheduler={min_lr: abc}", "lr_scheduler.min_lr: got 'abc'"),
        ("kd_ratio=0.5\nfoo: 3", "expected one value, without a line break"),
        ("slurm.container_mounts=[1, 2]", "a list of names"),
        ("model._target_=torch.optim.Adam", "model._target_: got 'torch.optim.Adam'"),
        ("kd_loss_fn._target_=ds_kd.losses.MaskedCrossEntropy", "expected ds_kd.losses.KDLoss"),
        ("loss_fn._target_=ds_kd.losses.KDLoss", "expected ds_kd.losses.MaskedCrossEntropy"),
        ("optimizer._target_=ds_kd.losses.KDLoss", "begins with torch.optim."),
        ("dataset._target_=ds_kd.losses.KDLoss", "begins with ds_kd.data."),
        ("optimizer._target_=torch.optim.Adamw", "did you mean torch.optim.AdamW?"),
        ("max-steps=3", "max_steps: unknown key; did you mean step_scheduler.max_steps?"),
        ("max_step=3", "did you mean step_scheduler.max_steps?"),
        ("temperature=3", "did you mean kd_loss_fn.temperature or rollouts.temperature?"),
    ],
)
def test_mistakes_that_a_newcomer_found_are_refused(override, words):
    with pytest.raises(ConfigError) as caught:
        load(GUIDE, [override])
    assert words in str(caught.value)


@pytest.mark.parametrize(
    "override",
    [
        "wandb.api key=hunter2",
        'model.token="hunter2',
        "wandb=[{api_key: hunter2}]",
        "slurm.env_vars=[WANDB_API_KEY=hunter2]",
        "model.pretrained_model_name_or_path=https://me:hunter2@host/x",
        "deepspeed.student={wandb: {api_key: hunter2}}",
    ],
)
def test_no_message_tells_a_secret(override):
    with pytest.raises(ConfigError) as caught:
        load(GUIDE, [override])
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("words", [["--ranks", "0"], ["--mfu", "nan"], ["--tflops", "-1"]])
def test_a_plan_for_nonsense_is_refused(words, capsys):
    with pytest.raises(SystemExit) as caught:
        script("plan").main(["--config", str(GUIDE), *words])
    assert caught.value.code == 2 and "expected a number > 0" in capsys.readouterr().err


def test_rows_nested_beyond_reading_are_told(tmp_path):
    (tmp_path / "rows.jsonl").write_text("[" * 100_000)
    with pytest.raises(ConfigError, match=r"dataset.dataset_name: .*rows with"):
        load(GUIDE, [SQUAD_FILE % (tmp_path / "rows.jsonl")])


def test_a_variable_may_give_a_number(monkeypatch):
    monkeypatch.setenv("MY_SEED", "7")
    monkeypatch.setenv("MY_LR", "3e-5")
    cfg = load(GUIDE, ["seed=${oc.env:MY_SEED}", "optimizer.lr=${oc.env:MY_LR}", "rng.seed=7"])
    assert cfg.seed == 7 and cfg.optimizer.kwargs["lr"] == 3e-5


def test_a_model_directory_without_config_or_tokenizer_is_told_by_key(tmp_path):
    key = "model.pretrained_model_name_or_path"
    with pytest.raises(ConfigError, match=f"{key}.*a config.json"):
        load(GUIDE, [f"{key}={tmp_path}"])
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match=f"{key}.*a tokenizer"):
        load(GUIDE, [f"{key}={tmp_path}"])
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"it has no weights \(no model.safetensors\)"):
        load(GUIDE, [f"{key}={tmp_path}"])
    tiny.weightless(tmp_path)
    load(GUIDE, [f"{key}={tmp_path}"])


def test_damaged_files_of_a_model_are_told_by_key(tmp_path):
    key, model = "model.pretrained_model_name_or_path", tiny.llama(tmp_path / "model", tie=False)
    config, weights = model / "config.json", model / "model.safetensors"
    content, whole = config.read_text(), weights.read_bytes()
    tensors = {name: value.clone() for name, value in load_file(weights).items()}  # not its mapping
    load(GUIDE, [f"{key}={model}"])

    def told() -> str:
        with pytest.raises(ConfigError, match=f"{key}: .* expected a directory with a whole") as e:
            load(GUIDE, [f"{key}={model}"])
        assert len(e.value.problems) == 1
        return str(e.value)

    for text, said in (
        ("{", "its config.json is not JSON: "),
        ("[]", "its config.json holds list, not a mapping"),
        ('{"model_type": "bert"}', "describes an encoder (bert), which predicts no next token"),
        ('{"quantization_config": {"quant_method": "fp8"}}', "its weights are quantised (fp8); "),
    ):
        config.write_text(text)
        assert said in told()
    config.write_text(content)
    for data, said in (
        (whole[:-4], f"has {len(whole) - 4} bytes and not {len(whole)}, as its header says"),
        (whole[:20], "model.safetensors is no whole safetensors file"),
        (b"version https://git-lfs", "model.safetensors is no whole safetensors file"),
    ):
        weights.write_bytes(data)
        assert said in told()
    for name in ("model.layers.1.mlp.down_proj.weight", "model.embed_tokens.weight"):
        save_file({n: value for n, value in tensors.items() if n != name}, weights)
        assert f"its files lack {name}" in told()

    # An index places each tensor in a file.
    weights.rename(model / "one.safetensors")
    index = model / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(tensors, "one.safetensors")}))
    assert "one.safetensors lacks model.embed_tokens.weight, which model.saf" in told()
    (model / "one.safetensors").unlink()
    assert "it has no one.safetensors, which its model.safetensors.index.json names" in told()


def test_checking_a_config_takes_no_heavy_import_and_tells_all_at_once(tmp_path):
    script = (
        "import sys; sys.path.insert(0, 'launch'); import kd\n"
        "code = kd.main(sys.argv[1:])\n"
        "heavy = {'torch', 'transformers', 'deepspeed', 'datasets'} & set(sys.modules)\n"
        "print('heavy:', sorted(heavy)); sys.exit(code)"
    )

    def check(*words):
        command = [sys.executable, "-c", script, "--config", str(GUIDE), "--check", *words]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)

    good = check()
    assert good.returncode == 0 and "nothing wrong with it" in good.stdout, good.stderr
    assert "heavy: []" in good.stdout
    bad = check("kd_ratio=2", "step_scheduler.max_stepz=3")
    assert bad.returncode == 2 and "heavy: []" in bad.stdout
    assert "kd_ratio: got 2" in bad.stderr and "did you mean step_scheduler.max_steps" in bad.stderr


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_the_json_schema_accepts_every_shipped_run_and_refuses_what_load_refuses(path):
    import jsonschema
    import yaml

    from ds_kd.config.reference.json_schema import json_schema

    schema, run = json_schema(), yaml.safe_load(path.read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    validator.validate(run)
    for wrong in (
        {"kd_ratio": 2},
        {"step_schedular": {}},
        {"rng": {"sede": 1}},
        {"dist_env": {"backend": "mpi"}},
        {"peft": {"dim": 0}},
        {"distributed": {"tp_size": 0}},
        {"kd_loss_fn": {"temprature": 2}},
        {"kd_loss_fn": {"temperature": "hot"}},
        {"loss_fn": {"temperature": 2}},
        {"dataset": {**run["dataset"], "no_such_argument": 1}},
        {"optimizer": {"_target_": "torch.optim.SGD", "betas": [0.9, 0.9]}},
        {"dataloader": {"shufle": True}},
    ):
        with pytest.raises(jsonschema.ValidationError):
            validator.validate({**run, **wrong})


NEMO = "nemo_automodel.recipes.llm.kd.KnowledgeDistillationRecipeForNextTokenPrediction"


def test_nemos_newer_spelling_of_its_example_loads():
    cfg = load(
        GUIDE,
        [
            f"recipe={{_target_: {NEMO}}}",
            "distributed={strategy: fsdp2, dp_size: none, tp_size: 1, cp_size: 1, pp_size: 1}",
            "peft={match_all_linear: true, dim: 16, alpha: 32, use_triton: true}",
            "model.attn_implementation=sdpa",
            "model.use_sdpa_patching=true",
        ],
    )
    assert "use_sdpa_patching" not in cfg.model.kwargs
    assert any("use_sdpa_patching: accepted" in note for note in cfg.notes)
    assert cfg.peft.dim == 16 and any("use_triton" in note for note in cfg.notes)
    assert any("fsdp2 accepted" in note for note in cfg.notes)


def test_nemos_settings_that_change_no_result_are_accepted_with_a_note():
    nemo = "nemo_automodel.components"
    cfg = load(
        GUIDE,
        [
            "ci={recipe_owner: x, time: '00:10:00'}",
            "checkpoint.model_save_format=torch_save",
            "compile={enabled: false, backend: null}",
            f"dataloader.collate_fn={{_target_: {nemo}.datasets.utils.default_collater, "
            "pad_seq_len_divisible: 16}",
            f"validation_dataloader.collate_fn={nemo}.datasets.utils.packed_sequence_thd_collater",
            f"loss_fn={{_target_: {nemo}.loss.linear_ce.FusedLinearCrossEntropy, reduction: sum}}",
            "distributed={strategy: fsdp2, dp_size: 2, pipeline: {a: 1}, tp_size: 1}",
            "dataset.tokenizer={_target_: nemo_automodel.NeMoAutoTokenizer.from_pretrained, "
            "pretrained_model_name_or_path: meta-llama/Llama-3.2-1B}",
            "model.backend={_target_: nemo_automodel.components.models.common.BackendConfig}",
            "step_scheduler.gc_every_steps=3",
            "checkpoint.dequantize_base_checkpoint=true",
        ],
    )
    check_world(cfg, 4)  # dp_size is of the other parallelism's making
    told = [note.partition(":")[0] for note in cfg.notes if "accepted" in note]
    for key in (
        "ci", "checkpoint.model_save_format", "dataloader.collate_fn.pad_seq_len_divisible",
        "validation_dataloader.collate_fn", "loss_fn", "distributed.dp_size", "dataset.tokenizer",
        "distributed.pipeline", "model.backend", "step_scheduler.gc_every_steps",
        "checkpoint.dequantize_base_checkpoint",
    ):  # fmt: skip
        assert told.count(key) == 1, (key, cfg.notes)
    assert cfg.dataloader.kwargs["collate_fn"] == "ds_kd.data.collate.default_collater"
    assert cfg.loss_fn.name == "ds_kd.losses.MaskedCrossEntropy"
    assert "backend" not in cfg.model.kwargs and "tokenizer" not in cfg.dataset.kwargs


def test_a_recipe_of_nemos_for_experts_and_pipelines_loads_without_its_kernels_and_toggles():
    cfg = load(
        GUIDE,
        [
            "distributed={strategy: megatron_fsdp, ep_size: 8, pipeline: {pp_schedule: 1f1b}}",
            "model.trust_remote_code=true",
            "model.load_base_model=true",
            "model.num_nextn_predict_layers=0",
            "model.backend={experts: gmm, fake_balanced_gate: false, te_fp8: null}",
            "skypilot={hf_token: '${HF_TOKEN}'}",
            "wandb={enable: false, project: x}",
            "validation_dataset=none",
            "_validation_dataset={_target_: anything}",
            "dataloader.batch_size=1",
            "dataset.tokenizer={_target_: transformers.AutoTokenizer.from_pretrained, "
            "pretrained_model_name_or_path: meta-llama/Llama-3.2-1B, trust_remote_code: true}",
            "lr_scheduler={lr_decay_style: constant, min_lr: 1e-6}",
            "autopipeline={_target_: anything}",
            "distributed_config={_target_: anything}",
            "packed_sequence.num_proc=2",
            "step_scheduler.loss_average_window_steps=5",
        ],
    )
    assert cfg.wandb is None and cfg.validation_dataset == {} and cfg.distributed.ep_size is None
    assert cfg.model.kwargs["trust_remote_code"] is False
    assert not {"load_base_model", "num_nextn_predict_layers", "backend"} & set(cfg.model.kwargs)
    told = [note.partition(":")[0] for note in cfg.notes]
    for key in (
        "distributed.ep_size", "model.trust_remote_code", "model.load_base_model", "skypilot",
        "_validation_dataset", "dataloader.batch_size", "dataset.tokenizer", "lr_scheduler.min_lr",
        "autopipeline", "distributed_config", "packed_sequence.num_proc",
    ):  # fmt: skip
        assert told.count(key) == 1, (key, cfg.notes)


def test_a_trusted_models_own_code_is_run_where_the_command_line_says_so():
    name = "meta-llama/Llama-3.2-1B"
    cfg = load(GUIDE, ["model.trust_remote_code=true"], allow=(name,))
    assert cfg.model.kwargs["trust_remote_code"] is True


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("dataset.tokenizer={_target_: a.b, pretrained_model_name_or_path: x/y}", "dataset.tok"),
        (
            "dataset.tokenizer={pretrained_model_name_or_path: meta-llama/Llama-3.2-1B, "
            "truncation_side: left}",
            "dataset.tokenizer: ",
        ),
        ("tokenizer={pretrained_model_name_or_path: x/y}", "tokenizer: "),
        ("dataloader.collate_fn={_target_: a.b}", "dataloader.collate_fn: "),
        ("fp8={enabled: true}", "fp8: "),
        ("qat={enabled: true}", "qat: "),
        ("neftune={noise_alpha: 5}", "neftune: "),
        ("distributed={pp_size: 2}", "distributed.pp_size: got 2, expected 1"),
        ("teacher_ranks=2", "teacher_ranks: a teacher runs on all ranks"),
        ("distributed={teacher_ranks: 2}", "distributed.teacher_ranks: a teacher runs on all"),
        ("model.backend={fake_balanced_gate: true}", "model.backend.fake_balanced_gate: "),
        ("model.num_nextn_predict_layers=2", "model.num_nextn_predict_layers: "),
        ("model.config={_target_: a.b}", "model.config: "),
        (
            "model={_target_: nemo_automodel.NeMoAutoModelForCausalLM.from_config}",
            "model._target_: .*from_pretrained with its directory",
        ),
        ("optimizer={_target_: dion.Muon, lr: 1}", "optimizer._target_: .*write torch.optim.AdamW"),
    ],
)
def test_nemos_settings_that_would_change_results_are_refused_once(override, key):
    with pytest.raises(ConfigError, match=key) as caught:
        load(GUIDE, [override])
    assert len(caught.value.problems) == 1


def test_nemos_examples_with_separate_meshes_say_what_cannot_run_and_load_without_it():
    theirs = [
        "separate_meshes=true",
        "teacher_distributed={strategy: fsdp2, dp_size: 1, tp_size: 2}",
        "distributed={strategy: fsdp2, dp_size: 2, pp_size: 2}",
    ]
    with pytest.raises(ConfigError) as caught:
        load(GUIDE, theirs)
    told = "\n".join(caught.value.problems)
    assert len(caught.value.problems) == 3
    assert "separate_meshes: student and teacher share all ranks" in told
    assert "teacher_distributed.tp_size: got 2, expected 1; distributed.tp_size cuts both" in told
    assert "distributed.pp_size" in told
    dropped = ["separate_meshes=null", "teacher_distributed=null", "distributed.pp_size=1"]
    assert load(GUIDE, [*theirs, *dropped]).teacher_model is not None


def test_a_dry_run_prints_the_plan_and_starts_nothing(tmp_path, capsys):
    from transformers import AutoModelForCausalLM

    models = [tiny.llama(tmp_path / name, layers) for name, layers in (("s", 2), ("t", 3))]
    (tmp_path / "rows.jsonl").write_text(tiny.squad_rows(40))
    kd, plan = script("kd"), script("plan")
    words = [
        "--config", str(GUIDE), "--ranks", "2", "--gpu-memory", "64GB",
        f"model.pretrained_model_name_or_path={models[0]}", "validation_dataset=null",
        f"teacher_model.pretrained_model_name_or_path={models[1]}",
        f"dataset.dataset_name={tmp_path / 'rows.jsonl'}",
        f"checkpoint.checkpoint_dir={tmp_path / 'run'}",
    ]  # fmt: skip
    assert plan.main(words) == 0
    out = capsys.readouterr().out
    for name, path in zip(("student", "teacher"), models, strict=True):
        count = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(path).parameters())
        assert f"{name}: {count / 1e6:.2f} M parameters" in out
    assert "plan for 2 rank(s)" in out and "steps: 4 from 40 samples" in out
    assert "smallest that fits into 59.60 GiB: 1 rank(s) as written" in out
    assert not (tmp_path / "run").exists()
    assert plan.main([*words, "dataset.split='train[:0]'"]) == 2
    told = capsys.readouterr().err
    assert "dataset.dataset_name: " in told and "no rows" in told
    few = ["dataloader.drop_last=true", "step_scheduler.global_batch_size=64"]
    assert plan.main([*words, *few]) == 2
    assert "40 samples make no global batch of 64" in capsys.readouterr().err
    assert kd.main([*words[:2], "--check", "--ranks", "3"]) == 2
    assert "global_batch_size: got 32, expected a multiple of" in capsys.readouterr().err
    assert plan.main([*words, "--gpu-memory", "lots"]) == 2
    assert "--gpu-memory: got 'lots', expected a size" in capsys.readouterr().err
    assert plan.main([*words, "--ranks", "3"]) == 2
    assert "3 ranks" in capsys.readouterr().err
    short = [word for word in words if word not in ("--gpu-memory", "64GB")]
    assert kd.main([*short, "--dry-run"]) == 0
    assert "plan for 2 rank(s)" in capsys.readouterr().out


def test_a_new_config_loads_and_fits_what_it_was_made_for(tmp_path, capsys):
    models = [tiny.llama(tmp_path / name, layers) for name, layers in (("s", 2), ("t", 3))]
    rows = tmp_path / "rows \U0001f600.jsonl"
    rows.write_text(tiny.squad_rows(4000))
    new = script("new_config")
    words = ["--student", str(models[0]), "--teacher", str(models[1]), "--gpus", "4"]
    capsys.readouterr()  # what making the models told
    assert new.main([*words, "--data", str(rows)]) == 0
    path = tmp_path / "new.yaml"
    path.write_text(capsys.readouterr().out, "utf-8")
    cfg = load(path)
    assert cfg.dataset.name == "ds_kd.data.squad.make_squad_dataset"
    steps = cfg.step_scheduler
    assert (steps.local_batch_size, steps.global_batch_size) == (16, 64)
    assert steps.val_at_start and not cfg.offload_teacher_model
    assert cfg.validation_share == 0.05  # 200 of 4,000; 3,800 make 60 steps, in three epochs 180
    assert (steps.num_epochs, steps.val_every_steps) == (3, 18)
    check_world(cfg, 4)
    assert new.main([*words, "--data", str(rows), "--gpu-memory", "100KB"]) == 2
    assert "GiB are needed on each" in capsys.readouterr().err
    offloads = ["--gpu-memory", "300KB", "--host-memory"]
    assert new.main([*words, "--data", str(rows), *offloads, "10KB"]) == 2
    assert "of host memory are needed and --host-memory says 0.0" in capsys.readouterr().err
    assert new.main([*words[:2], "--teacher", "/nowhere", "--data", str(rows)]) == 2
    told = capsys.readouterr().err
    assert "- teacher_model.pretrained_model_name_or_path: got '/nowhere'" in told
    rows.write_text('{"body": 1}')
    assert new.main([*words, "--data", str(rows)]) == 2
    assert "its first row has body" in capsys.readouterr().err
    rows.write_text('{"q": "a", "a": "b"}')
    assert new.main([*words, "--data", str(rows)]) == 2
    assert "name two of them with --columns q,a" in capsys.readouterr().err
    rows.write_text('{"q": "w5", "a": "w6 w7"}\n' * 20)
    read_as = ["--columns", "q,a", "--validation", str(rows)]
    assert new.main([*words, "--data", str(rows), *read_as]) == 0
    path.write_text(capsys.readouterr().out)
    for data in (load(path).dataset, load(path).validation_dataset[""]):
        assert data.kwargs["column_mapping"] == {"question": "q", "answer": "a"}
    assert new.main([*words, "--data", str(rows), "--columns", "q"]) == 2
    assert "--columns: got 'q', expected QUESTION,ANSWER or" in capsys.readouterr().err
    assert new.main([*words, "--data", str(rows), "--columns", "q,z"]) == 2
    assert "dataset.column_mapping: got {'question': 'q', 'answer'" in capsys.readouterr().err
    talk = '[{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]'
    rows.write_text(f'{{"conversations": {talk}}}\n' * 9)
    assert new.main([*words, "--data", str(rows)]) == 2
    told = capsys.readouterr().err
    assert "--student: got" in told and "chat_template.jinja" in told
    template = tmp_path / "chat_template.jinja"
    template.write_text("{% for turn in messages %}{{ turn.content }} {% endfor %}")
    assert new.main([*words, "--data", str(rows), "--chat-template", str(template)]) == 0
    path.write_text(capsys.readouterr().out)
    assert load(path).dataset.kwargs["chat_template"] == str(template)
    # A template of one validation set is not that of others where the training set is absent.
    held_out = '{"_target_": "ds_kd.data.text.make_sharegpt_dataset", "dataset_name": "%s"%s}'
    first = held_out % (rows, f', "chat_template": "{template}"')
    both = f"validation_dataset={{a: {first}, b: {held_out % (rows, '')}}}"
    with pytest.raises(ConfigError) as caught:
        load(path, ["dataset=null", both])
    assert "validation_dataset.b.chat_template: missing" in "\n".join(caught.value.problems)
    assert new.main([*words, "--data", str(tmp_path / "notes.txt")]) == 2
    assert '{"text": …} lines' in capsys.readouterr().err


def test_a_new_config_for_few_rows_makes_steps_of_them_and_says_so(tmp_path, capsys):
    model = str(tiny.llama(tmp_path / "model"))
    for name, count in (("rows", 50), ("held_out", 4)):
        (tmp_path / f"{name}.jsonl").write_text(tiny.squad_rows(count))
    new, path = script("new_config"), tmp_path / "new.yaml"
    words = ["--student", model, "--teacher", model, "--data", str(tmp_path / "rows.jsonl")]
    capsys.readouterr()
    assert new.main(words) == 0
    told = capsys.readouterr()
    # Eight are held out; 42 rows make 21 steps of 2 in each of three epochs.
    assert "42 rows for training make 63 optimizer steps of 2 samples in 3 epoch(s)" in told.err
    path.write_text(told.out)
    assert load(path).validation_share == 0.16 and load(path).step_scheduler.num_epochs == 3
    assert new.main([*words, "--validation", str(tmp_path / "held_out.jsonl")]) == 0
    path.write_text(capsys.readouterr().out)
    held_out = load(path).validation_dataset[""]
    assert held_out is not None and held_out.kwargs["dataset_name"].endswith("held_out.jsonl")
    (tmp_path / "rows.jsonl").write_text(tiny.squad_rows(1))
    assert new.main(words) == 2
    assert "expected at least 2 rows; it has 1" in capsys.readouterr().err


def test_a_new_config_reads_a_hub_data_set_by_its_columns_or_warns(tmp_path, capsys, monkeypatch):
    model = str(tiny.llama(tmp_path / "model"))
    new, path = script("new_config"), tmp_path / "new.yaml"
    words = ["--student", model, "--teacher", model, "--data", "somebody/rows"]
    capsys.readouterr()
    assert new.main(words) == 0
    told = capsys.readouterr()
    path.write_text(told.out)
    assert load(path).dataset.name.endswith("make_squad_dataset")
    assert "warning: --data somebody/rows: its split train cannot be loaded here" in told.err
    seen = SimpleNamespace(column_names=["text"])
    monkeypatch.setattr("ds_kd.plan.new_config.starter.load_rows", lambda *_: seen)
    assert new.main(words) == 0
    path.write_text(capsys.readouterr().out)
    assert load(path).dataset.name.endswith("make_text_dataset")
    seen.column_names = ["body", "title"]
    assert new.main(words) == 2
    assert "name two of them with --columns body,title" in capsys.readouterr().err


def test_the_json_schema_takes_what_load_takes_of_a_target():
    import jsonschema
    import yaml

    from ds_kd.config.reference.json_schema import json_schema

    run = yaml.safe_load(GUIDE.read_text())
    chats = {"_target_": "ds_kd.data.chat.ChatDataset", "dataset_name": "a.jsonl"}
    validator = jsonschema.Draft202012Validator(json_schema())
    for right in (
        {"kd_loss_fn": {"temperature": 2, "chunk_size": 512}},
        {"kd_loss_fn": {"temperature": "${oc.env:T,2}"}},
        {"kd_loss_fn": None},
        {"ci": {"recipe_owner": "x"}, "_anchor": 1, "compile": {"backend": None}},
        {"distributed": {"strategy": "fsdp2", "ep_size": 8, "pipeline": {}, "dp_size": "none"}},
        {"lr_scheduler": {"lr_decay_style": "cosine", "min_lr": 1e-6}},
        {"optimizer": {"_target_": "torch.optim.SGD", "lr": 0.1, "momentum": 0.9}},
        {"dataloader": {"shuffle": True, "num_workers": 2, "group_by_length": True}},
        {"dataset": {"_target_": "my.own.dataset", "anything": 1}},
        {"dataset": {**chats, "padding": "do_not_pad", "mask_reasoning_content": False}},
        *(
            {"dataset": {"_target_": d.name, "dataset_name": ["a", "b"], "labels": "shifted"}}
            for d in known_data_sets()
            if not d.has_parts
        ),
    ):
        validator.validate({**run, **right})


@pytest.mark.parametrize(
    ("key", "made", "is_right"),
    [
        ("validation_dataset", lambda data: {"squad": data, "other": data}, True),
        ("validation_dataset", lambda data: {"squad": data, "other": None}, True),
        ("validation_dataset", lambda data: data, True),
        ("validation_dataset_squad", lambda data: data, True),
        ("validation_dataset", lambda data: {"squad": {**data, "no_such": 1}}, False),
        ("validation_dataset", lambda data: {"squad": {"dataset_name": "a"}}, False),
        ("validation_dataset", lambda data: {"a-b": data}, False),
        ("validation_dataset", lambda data: {"squad": 3}, False),
        ("validation_dataset", lambda data: {}, False),
        ("validation_dataset", lambda data: {**data, "no_such": 1}, False),
        ("validation_dataset_squad", lambda data: {**data, "no_such": 1}, False),
        ("dataset", lambda data: {"dataset_name": "a"}, False),
    ],
)
def test_the_json_schema_takes_the_validation_sets_that_load_takes(key, made, is_right):
    import jsonschema
    import yaml

    from ds_kd.config.reference.json_schema import json_schema

    run = yaml.safe_load(GUIDE.read_text())
    run[key] = made(run["dataset"])
    assert jsonschema.Draft202012Validator(json_schema()).is_valid(run) is is_right
    if is_right:
        load(run)
    else:
        with pytest.raises(ConfigError):
            load(run)


def test_keys_are_listed_by_prefix():
    lines = list_keys("checkpoint.keep")
    assert [line.split()[0] for line in lines] == ["checkpoint.keep_last", "checkpoint.keep_best"]
    assert list_keys("nonsense") == []
    told = "\n".join(list_keys("kd_loss_fn"))
    assert "kd_loss_fn.temperature   T > 0, divides both models' logits. [of ds_kd" in told
    assert "of ds_kd.losses.KDLoss: float = 1.0]" in told
    assert "of torch.optim.SGD" in "".join(list_keys("optimizer.momentum"))
    assert "of ds_kd.data.chat.ChatDataset: str | list" in "".join(list_keys("dataset.dataset_n"))


@pytest.mark.parametrize(
    ("prefix", "words"),
    [("nope", "there are: model, "), ("chekpoint", "did you mean checkpoint?")],
)
def test_listing_keys_that_are_not_there_is_an_error_with_a_hint(prefix, words, capsys):
    assert script("kd").main(["--list-keys", prefix]) == 2
    told = capsys.readouterr().err
    assert f"no key begins with {prefix}; " in told and words in told


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--dry-run", "--gpu-memory", "80GB"], "error: launch/plan.py has --gpu-memory"),
        (["--chek"], "--chek: no such option; did you mean --check?"),
        (["--check=yes", "--dryrun"], "--dryrun: no such option; did you mean --dry-run?"),
        (["--validation_dataset"], "error: --validation_dataset expects a value"),
        (["--kd_ratio", "--check"], "error: --kd_ratio expects a value"),
        (["--dry-run", "--check"], "error: --check and --dry-run are two questions"),
    ],
)
def test_an_option_that_is_misspelt_incomplete_or_another_scripts_is_told(words, told, capsys):
    with pytest.raises(SystemExit) as caught:
        script("kd").parse(["--config", str(GUIDE), *words])
    assert caught.value.code == 2 and told in capsys.readouterr().err


def test_every_section_may_be_written_as_an_option_and_the_plans_options_are_its_own():
    kd, plan = script("kd"), script("plan")
    for name in keys_of(RunConfig):
        assert kd.parse(["-c", "x", f"--{name}", "null"]).overrides == [f"{name}=null"]
    for option in kd.OF_PLAN:
        args = plan.parse(["-c", "x", f"{option}=1"])
        assert getattr(args, option[2:].replace("-", "_")) in (1, "1")


@pytest.mark.parametrize(
    ("nemo", "least"),
    [
        ("{lr_decay_style: cosine, lr_warmup_steps: 2, min_lr: 1.0e-4}", 1e-4),
        ("{lr_decay_style: linear, lr_warmup_steps: 2, min_lr: 1.0e-4}", 1e-4),
        ("{lr_decay_style: linear, lr_warmup_steps: 2}", 0.0),
        ("{lr_decay_style: constant, lr_warmup_steps: 2}", 1e-3),
    ],
)
def test_nemos_spelling_of_a_schedule_ends_where_it_says(nemo, least):
    from transformers import get_scheduler

    wanted = load(GUIDE, [f"lr_scheduler={nemo}", "optimizer.lr=1e-3"]).lr_scheduler
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1e-3)
    scheduler = get_scheduler(
        wanted.name,
        optimizer,
        wanted.num_warmup_steps,
        10,
        wanted.scheduler_specific_kwargs or None,
    )
    rates = []
    for _ in range(10):
        optimizer.step()
        scheduler.step()
        rates.append(scheduler.get_last_lr()[0])
    assert max(rates) == rates[1] == pytest.approx(1e-3)
    assert rates[-1] == pytest.approx(least, abs=1e-9)


def test_an_unknown_decay_style_is_told():
    with pytest.raises(ConfigError, match="lr_decay_style: got 'cosin'"):
        load(GUIDE, ["lr_scheduler={lr_decay_style: cosin}"])


SQUAD = "{_target_: ds_kd.data.squad.make_squad_dataset, dataset_name: rajpurkar/squad}"


def test_several_validation_sets_each_have_a_name():
    cfg = load(GUIDE, [f"validation_dataset={{squad: {SQUAD}, other: {SQUAD}, gone: null}}"])
    assert [*cfg.validation_dataset] == ["squad", "other"] and cfg.validates
    assert cfg.validation_dataset["other"].key == "validation_dataset.other"
    nemo = load(GUIDE, ["validation_dataset=null", f"validation_dataset_qa={SQUAD}"])
    assert [*nemo.validation_dataset] == ["qa"]
    with pytest.raises(ConfigError) as caught:
        load(GUIDE, [f"validation_dataset={{a b: {SQUAD}, c: {{_target_: os.system}}, d: 3}}"])
    told = str(caught.value)
    assert "validation_dataset: got 'a b', expected a name of letters, digits and _" in told
    assert "validation_dataset.c._target_: 'os.system'" in told
    assert "validation_dataset.d: got 3, expected a mapping" in told
