"""Mutated configs: refused by a ConfigError or accepted and buildable; nothing else is ever raised,
imported or waited for."""

from __future__ import annotations

import contextlib
import copy
import importlib.abc
import os
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ds_kd.config.components import ConfigError, bind, instantiate
from ds_kd.config.load import load
from ds_kd.losses.chunked import DistillationLoss
from ds_kd.recipe.optimizer import build_schedule
from tests import tiny

ROOT = Path(__file__).parents[2]
EXAMPLES = int(os.environ.get("DS_KD_FUZZ_EXAMPLES", "700"))
GUIDE = yaml.safe_load((ROOT / "ds_configs" / "runs" / "llama3_2_1b_kd.yaml").read_text())
MORE = {
    "peft": {"target_modules": ["*_proj"], "dim": 4},
    "lr_scheduler": {"name": "cosine", "num_warmup_steps": 2},
    "packed_sequence": {"packed_sequence_size": 64},
    "compile": {"enabled": False},
    "clip_grad_norm": {"max_norm": 1.0},
    "deepspeed": {"student": {"zero_optimization": {"stage": 3}}},
    "slurm": {"nodes": 1, "env_vars": {"A": "b"}},
    "wandb": {"project": "p"},
    "seed": 3,
}
OUTCOMES = {True: 0, False: 0}  # accepted, refused
BASES = [GUIDE, {**GUIDE, **MORE}]
NAMES = [
    "os.system", "subprocess.run", "builtins.eval", "torch.load", "torch.hub.load",
    "torch.os.system", "torch.optim.os.system", "transformers.utils.os.system", "pickle.loads",
    "transformers.AutoModelForCausalLM.__init__", "ds_kd.losses.torch.load", "file.py:attr",
    "ds_kd.recipe.build", "ds_kd.data.rows.source.os.remove", "this", "antigravity.webbrowser.open",
    "torch.optim.SGD", "torch.optim.NAdam", "torch.optim.Adafactor", "ds_kd.losses.KDLoss",
    "deepspeed.ops.adam.FusedAdam", "ds_kd.data.hellaswag.HellaSwag", "ds_kd.data.chat.ChatDataset",
    "nemo_automodel.components.loss.kd_loss.KDLoss", "nemo_automodel.nothing",
]  # fmt: skip
REFERENCES = [
    "${kd_ratio}", "${model}", "${oc.env:HOME}", "${oc.env:NO_SUCH,1}", "${oc.create:{a: 1}}", "${",
    "${optimizer.lr}", "${.lr}", "${..seed}", "${a[0]}", "$(id)", "`id`", "${oc.select:model}",
]  # fmt: skip
SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 70), st.sampled_from([2**31, 2**63, -(2**70)]),
    st.floats(), st.text(max_size=8), st.sampled_from(NAMES), st.sampled_from(REFERENCES),
    st.sampled_from(["../../etc/passwd", "/etc/passwd", "/dev/zero", "a" * 5000, "\x00", "none"]),
)  # fmt: skip
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.sampled_from(["a", "_target_", "lr", "stage"]), inner, max_size=3),
    ),
    max_leaves=5,
)
PLAUSIBLE = st.sampled_from([None, True, False, 0, 1, 2, 32, 0.5, 1e-5, "bf16", "auto", "train"])
EDITS = st.tuples(
    st.sampled_from(["set", "set", "set", "delete", "delete", "rename", "add", "wrap"]),
    st.integers(0, 10_000),
    PLAUSIBLE | PLAUSIBLE | VALUES,
)
TYPOS = st.lists(
    st.tuples(st.integers(0, 10_000), st.sampled_from("\t\n :{}[]&*!|>%@`'\"#\x07é")), max_size=2
)


def places(tree, out=None):
    """(owner, key) of everything in a tree."""
    out = [] if out is None else out
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    for name, value in items:
        out.append((tree, name))
        if isinstance(value, (dict, list)):
            places(value, out)
    return out


def edited(base, edits):
    tree = copy.deepcopy(base)
    for kind, where, value in edits:
        found = places(tree)
        if not found:
            break
        owner, name = found[where % len(found)]
        if kind == "set":
            owner[name] = value
        elif kind == "delete":
            del owner[name]
        elif kind == "wrap":
            owner[name] = [owner[name]]
        elif isinstance(owner, dict):
            owner[f"{name}x" if kind == "rename" else "added"] = (
                owner.pop(name) if kind == "rename" else value
            )
    return tree


class Watch(importlib.abc.MetaPathFinder):
    """Notes what is imported, and lets the others find it."""

    #: Reading a YAML and a data file's first row needs these.
    ALLOWED = ("yaml", "omegaconf", "antlr4", "ds_kd", "pyarrow", "encodings", "_yaml")

    def __init__(self):
        self.seen = set()

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] not in self.ALLOWED:
            self.seen.add(name)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    load(ROOT / "ds_configs" / "runs" / "llama3_2_1b_kd.yaml")  # what omegaconf itself imports
    return tiny.llama(tmp_path_factory.mktemp("model") / "m")


@contextlib.contextmanager
def watching():
    watch = Watch()
    sys.meta_path.insert(0, watch)
    try:
        yield watch
    finally:
        sys.meta_path.remove(watch)


def build(cfg):
    """Make what a run makes from its config before it meets data, on the meta device."""
    from transformers import AutoConfig, AutoModelForCausalLM

    if Path(cfg.model.kwargs["pretrained_model_name_or_path"]).is_dir():
        config = AutoConfig.from_pretrained(cfg.model.kwargs["pretrained_model_name_or_path"])
        with torch.device("meta"):
            parameters = [*AutoModelForCausalLM.from_config(config).parameters()]
    else:
        parameters = [torch.nn.Parameter(torch.empty(2, 2, device="meta"))]
    if cfg.optimizer.name.startswith("deepspeed."):  # these compile an operator
        bind(cfg.optimizer, params=parameters)
    else:
        optimizer = instantiate(cfg.optimizer, params=parameters)
        schedule = build_schedule(cfg.lr_scheduler, 4)
        if schedule is not None:
            schedule(optimizer)
    DistillationLoss(instantiate(cfg.loss_fn), instantiate(cfg.kd_loss_fn), cfg.kd_ratio)
    for dataset in (cfg.dataset, *cfg.validation_dataset.values()):
        bind(dataset, tokenizer=None)
    for loader in (cfg.dataloader, cfg.validation_dataloader):
        bind(loader, ("shuffle", "group_by_length"), dataset=None, batch_sampler=None)


@settings(
    max_examples=EXAMPLES, deadline=None, derandomize=True, database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip
@given(
    base=st.sampled_from(BASES),
    edits=st.lists(EDITS, max_size=2),
    typos=st.just([]) | TYPOS,
    local=st.booleans(),
)
def test_a_mutated_config_is_refused_or_builds(base, edits, typos, local, model, tmp_path):
    tree = edited(base, edits)
    for section in ("model", "teacher_model") if local else ():
        if isinstance(tree.get(section), dict):
            tree[section]["pretrained_model_name_or_path"] = str(model)
    text = yaml.dump(tree, allow_unicode=True, sort_keys=False)
    for where, character in typos:
        text = text[: where % (len(text) + 1)] + character + text[where % (len(text) + 1) :]
    path = tmp_path / "c.yaml"
    path.write_text(text, encoding="utf-8", errors="surrogatepass")
    started = time.process_time()  # of this process: other jobs of the machine do not count
    with watching() as watch:
        try:
            cfg = load(path)
        except ConfigError as error:
            cfg = None
            assert error.problems and all(line.strip() for line in error.problems)
    assert time.process_time() - started < 2
    assert watch.seen == set()
    assert sorted(tmp_path.iterdir()) == [path]
    OUTCOMES[cfg is not None] += 1
    if cfg is not None:
        build(cfg)


def test_mutations_are_often_refused_and_often_accepted():
    if sum(OUTCOMES.values()) < EXAMPLES:
        pytest.skip("the mutations were not run")
    assert min(OUTCOMES.values()) > EXAMPLES / 20, OUTCOMES
