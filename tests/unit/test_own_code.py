"""Code of the user's own that fails is told with its file and line, and without a traceback."""

from __future__ import annotations

import json
import sys

import pytest
import torch

from ds_kd.config.components import ConfigError, resolve
from ds_kd.config.load import load
from ds_kd.config.permissions import Permitted
from ds_kd.data.own import DataError
from ds_kd.errors import OwnCodeError, UserError
from ds_kd.losses.head import Head, States
from ds_kd.parallel.world import World
from ds_kd.recipe.data import build_loader, samples_of
from ds_kd.recipe.loss.build import assemble_loss
from ds_kd.script import run_script
from tests import tiny

ALONE = World(0, 1, torch.device("cpu"), "gloo")
MODULE = """
from ds_kd.losses.divergences import Divergence
def data(tokenizer):
    return [{"input_ids": [5, 6, 7], "labels": [6, 7, 8]}] * 4
def divergence(student, teacher, labels):
    valid = labels != -100
    log_q, log_p = student[valid].log_softmax(-1), teacher[valid].log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum()
def of_thirteen(student, teacher, labels):
    return view(student)
def view(logits):
    return logits.view(-1, 13).sum()
def make_of_thirteen():
    return of_thirteen
def make_absent():
    return {}["absent"]
def make_refused():
    raise ValueError("no such k")
class Fails(Divergence):
    name = "fails"
    def value(self, log_p, log_q):
        return {}["value"]
def make_late():
    def loss(student, teacher, labels):
        if len(labels) > 12:
            raise RuntimeError("too many tokens")
        return divergence(student, teacher, labels)
    return loss
def collate(samples):
    return samples[0]["text"]
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A config whose sections name functions of a module of the user's."""
    name = f"code_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))

    def make(*overrides: str):
        models = ("model", "teacher_model")
        sections = {part: {"pretrained_model_name_or_path": "of/hub"} for part in models}
        path = tmp_path / "c.yaml"
        path.write_text(json.dumps({**sections, "dataset": {"_target_": f"{name}.data"}}))
        return load(path, [each.replace("OWN", name) for each in overrides], allow=(name,))

    yield make
    sys.modules.pop(name, None)


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("make_of_thirteen", r"fails on a small example \(6 tokens\): RuntimeError: shape .* "
                             r"\(/\S+\.py:12 in view, called at /\S+\.py:10 in of_thirteen\)"),
        ("make_absent", r"KeyError: 'absent' \(/\S+\.py:16 in make_absent\)"),
        ("make_refused", r"ValueError: no such k \(/\S+\.py:18 in make_refused\)"),
        ("Fails", r"KeyError: 'value' \(/\S+\.py:22 in value\)"),
    ],
)  # fmt: skip
def test_a_loss_that_fails_at_the_start_is_told_with_its_line(own, target, said):
    cfg = own(f"kd_loss_fn._target_=OWN.{target}")
    with pytest.raises(ConfigError, match=f"kd_loss_fn: .*{said}") as caught:
        assemble_loss(cfg, 96, None, ALONE)
    assert "ds_kd/" not in str(caught.value)


def test_a_loss_that_fails_in_a_step_is_told_with_its_line(own):
    loss = assemble_loss(own("kd_loss_fn._target_=OWN.make_late"), 96, None, ALONE)
    states = [States(torch.randn(13, 8).requires_grad_(), Head(torch.randn(96, 8))) for _ in "ab"]
    said = r"a loss fails: RuntimeError: too many tokens \(/\S+\.py:26 in loss\)"
    with pytest.raises(OwnCodeError, match=said):
        loss(states[0], torch.arange(13), states[1])


def test_an_error_of_our_own_in_a_step_keeps_its_traceback(own):
    loss = assemble_loss(own("kd_loss_fn._target_=OWN.make_late"), 96, None, ALONE)
    state = States(torch.randn(13, 8).requires_grad_(), Head(torch.randn(96, 8)))
    with pytest.raises(RuntimeError) as caught:  # of torch, called by lines of ds_kd
        loss(state, torch.arange(7), state)
    assert not isinstance(caught.value, UserError)


def test_memory_that_is_used_up_inside_a_loss_is_told_as_that(own, monkeypatch, capsys):
    loss = assemble_loss(own("kd_loss_fn._target_=OWN.make_late"), 96, None, ALONE)

    def use_up(*_):
        raise RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(loss.divergence, "loss", use_up)
    states = [States(torch.randn(3, 8).requires_grad_(), Head(torch.randn(96, 8))) for _ in "ab"]
    assert run_script(lambda: loss(states[0], torch.arange(3), states[1]) and 0) == 1
    assert "no more memory" in capsys.readouterr().err


@pytest.mark.parametrize("workers", [0, 1])
def test_a_collater_that_fails_is_told_with_its_line(own, tmp_path, workers):
    cfg = own(
        "dataloader.collate_fn=OWN.collate", f"dataloader.num_workers={workers}",
        "step_scheduler={global_batch_size: 2, local_batch_size: 2}",
    )  # fmt: skip
    samples = samples_of(cfg.dataset, tiny.tokenizer(tmp_path / "tokenizer"), ALONE)
    loader, _ = build_loader(cfg, samples, cfg.dataloader, ALONE, training=True)
    with pytest.raises(DataError) as caught:
        next(iter(loader))
    told = caught.value.text()
    assert told.startswith("collate_fn: KeyError: 'text' (/")
    assert told.endswith(".py:30 in collate)") and "\n" not in told


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "import torch\nabsent\n",
            r"NameError: name 'absent' .* \(/\S+/broken\.py:2 in <module>\)",
        ),
        ("import no_such_package\n", r"ModuleNotFoundError: .*no_such_package.*broken\.py:1 in"),
        ("def a(:\n", r"SyntaxError: \D+ \(/\S+/broken\.py:1\)"),
    ],
)
def test_a_module_that_cannot_be_imported_is_told_with_its_line(tmp_path, monkeypatch, text, said):
    (tmp_path / "broken.py").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ConfigError, match=r"broken\.f cannot be imported: " + said):
        resolve(Permitted("broken.f"))
