"""The distillation loss in the YAML: by name, as a weighted list, and what is said of mistakes."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from ds_kd.config.components import ConfigError
from ds_kd.config.load import fingerprint, fingerprint_validation, load
from ds_kd.config.reference.keys import list_keys

ROOT = Path(__file__).parents[2]
GUIDE = ROOT / "ds_configs" / "runs" / "llama3_2_1b_kd.yaml"
KD = "kd_loss_fn"
NEMO = "nemo_automodel.components.loss.kd_loss.KDLoss"
LAYERS = {"name": "hidden_states", "weight": 1, "layers": [[1, 2]]}

RIGHT = [
    None,
    {},
    {"name": None, "temperature": 2},
    {"name": "forward_kl", "temperature": 2.0, "chunk_size": 64},
    {"_target_": None, "name": "tvd"},
    {"_target_": NEMO, "name": None},
    {"name": "jsd", "beta": 0.2},
    {"name": "jsd", "beta": "${oc.env:BETA,0.2}"},
    {"_target_": "ds_kd.losses.named.mixed.JSD", "beta": 0.3},
    {"name": "top_k", "k": 5},
    {"name": "alpha_beta", "alpha": 1.5, "beta": 0.2},
    [{"name": "jsd", "weight": 0.5, "beta": 0.3}, {"weight": 2, "temperature": 2}],
    [{"_target_": "ds_kd.losses.KDLoss", "weight": 1e-3}],
    [{"weight": 1}, {"name": "hidden_states", "weight": 0.1, "layers": [[3, 7]]}],
    [{"weight": 1}, {"name": "hidden_states", "weight": 1, "layers": [[0, 0]], "distance": "mse"}],
]
WRONG = [
    ({"name": "jds"}, f"{KD}.name: got 'jds', expected forward_kl or ", "did you mean jsd?"),
    ({"name": "Reverse-KL"}, f"{KD}.name: got 'Reverse-KL'", "did you mean reverse_kl?"),
    ({"name": 3}, f"{KD}.name: got 3, expected forward_kl or ", ""),
    ("jsd", f"{KD}: got 'jsd', expected a mapping such as {{name: jsd}}", ""),
    ({"name": "jsd", "beta": 1}, f"{KD}.beta: got 1", "a number between 0 and 1, ends excluded"),
    ({"name": "jsd", "beta": 0.0}, f"{KD}.beta: got 0.0", "between 0 and 1, ends excluded"),
    ({"name": "jsd", "beta": "x"}, f"{KD}.beta: got 'x'", "expected a number"),
    ({"name": "jsd", "betta": 0.3}, f"{KD}.betta: unknown key", f"did you mean {KD}.beta?"),
    ({"name": "jsd", "skew": 0.3}, f"{KD}.skew: unknown key", "JSD takes beta, ignore_index, "),
    ({"beta": 0.3}, f"{KD}.beta: unknown key", "KDLoss takes ignore_index"),
    ({"name": "top_k", "k": 0}, f"{KD}.k: got 0, expected a number > 0", ""),
    ({"name": "top_k", "k": 2.5}, f"{KD}.k: got 2.5, expected an integer", ""),
    ({"name": "alpha_beta", "alpha": -1}, f"{KD}.alpha: got -1, expected a number > 0", ""),
    (
        {"_target_": NEMO, "name": "tvd"},
        f"name tvd and _target_ {NEMO} are both given",
        f"write {KD}._target_=null too, or remove the name",
    ),
    ({"weight": 1}, f"{KD}.weight: unknown key", ""),
    ([], f"{KD}: got [], expected a list such as [{{name: ", ""),
    ([3], f"{KD}[0]: got 3, expected a mapping such as {{name: …}}", ""),
    ([None], f"{KD}[0]: got None, expected a mapping such as {{name: …, weight: …}}", ""),
    ([{"name": "tvd"}], f"{KD}[0].weight: missing; write a number > 0", ""),
    ([{"name": "tvd", "weight": 0}], f"{KD}[0].weight: got 0, expected a number > 0", ""),
    ([{"name": "tvd", "weight": 1, "beta": 1}], f"{KD}[0].beta: unknown key", ""),
    ([{"weight": 1}, {**LAYERS, "layers": [3]}], f"{KD}[1].layers: got [3]", "[[7, 15], [15, 29]]"),
    ([{"weight": 1}, {**LAYERS, "layers": "a"}], f"{KD}[1].layers: got 'a'", "student's layer"),
    ([{"weight": 1}, {**LAYERS, "layers": [[1, -2]]}], f"{KD}[1].layers: got [[1, -2]]", "from 0"),
    ([{"weight": 1}, {**LAYERS, "distance": "l1"}], f"{KD}[1].distance: got 'l1'", "cosine or mse"),
    ([{"weight": 1}, {**LAYERS, "temperature": 2}], f"{KD}[1].temperature: unknown key", ""),
]

#: Refused too, by what no schema of a single key says.
INCOMPLETE = [
    ({"name": "hidden_states", "layers": [[1, 2]]}, f"{KD}: hidden_states compares layers", "list"),
    ([{"name": "hidden_states", "weight": 1, "layers": [[1, 2]]}], "compares layers", "forward_kl"),
    ([{"weight": 1}, {"name": "hidden_states", "weight": 1}], f"{KD}[1].layers: missing", ""),
]


def guide(section):
    return {**yaml.safe_load(GUIDE.read_text()), KD: section}


@pytest.mark.parametrize("section", RIGHT, ids=str)
def test_the_json_schema_takes_all_that_the_config_takes(section):
    import jsonschema

    from ds_kd.config.reference.json_schema import json_schema

    load(guide(section))
    jsonschema.Draft202012Validator(json_schema()).validate(guide(section))


@pytest.mark.parametrize(("section", "words", "more"), INCOMPLETE, ids=["alone", "only", "none"])
def test_a_loss_of_layers_needs_layers_and_a_divergence_beside_it(section, words, more):
    with pytest.raises(ConfigError) as caught:
        load(guide(section))
    assert len(caught.value.problems) == 1
    assert words in str(caught.value) and more in str(caught.value)


@pytest.mark.parametrize(("section", "words", "more"), WRONG, ids=[str(w[0]) for w in WRONG])
def test_the_config_explains_its_refusals_and_the_json_schema_refuses_too(section, words, more):
    import jsonschema

    from ds_kd.config.reference.json_schema import json_schema

    with pytest.raises(ConfigError) as caught:
        load(guide(section))
    assert len(caught.value.problems) == 1
    assert words in str(caught.value) and more in str(caught.value)
    assert not jsonschema.Draft202012Validator(json_schema()).is_valid(guide(section))


def test_a_name_is_the_class_and_a_list_its_parts():
    cfg = load(guide({"name": "forward_kl", "temperature": 3.0}))
    assert (cfg.kd_loss_fn.name, cfg.kd_loss_fn.kwargs) == (
        "ds_kd.losses.KDLoss", {"temperature": 3.0}
    )  # fmt: skip
    assert cfg.kd_losses == [cfg.kd_loss_fn]
    cfg = load(GUIDE, [f"{KD}=[{{name: tvd, weight: 2}}, {{name: jsd, beta: .3, weight: 1}}]"])
    assert [weight for weight, _ in cfg.kd_loss_fn.parts] == [2.0, 1.0]
    assert [part.name for part in cfg.kd_losses] == [
        "ds_kd.losses.named.overlap.TVD", "ds_kd.losses.named.mixed.JSD"
    ]  # fmt: skip
    assert cfg.kd_losses[1].kwargs == {"beta": 0.3}


def test_an_argument_called_name_of_a_loss_from_outside_is_its_own():
    cfg = load(guide({"_target_": "mine.Loss", "name": "jsd"}), allow=("mine",))
    assert (cfg.kd_loss_fn.name, cfg.kd_loss_fn.kwargs) == ("mine.Loss", {"name": "jsd"})
    assert "mine.Loss is not found here" in "".join(cfg.notes)
    parts = [{"_target_": "mine.Loss", "weight": 1.0}, {"name": "tvd", "weight": 1.0}]
    assert "mine.Loss is not found here" in "".join(load(guide(parts), allow=("mine",)).notes)


def test_a_function_that_is_the_loss_itself_is_told_what_to_name(tmp_path, monkeypatch):
    (tmp_path / "own_loss.py").write_text("def far(student_logits, teacher_logits, labels): ...")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError) as caught:
        load(guide({"_target_": "own_loss.far"}), allow=("own_loss",))
    (told,) = caught.value.problems
    assert "own_loss.far is a loss itself" in told and "without arguments that returns far" in told


def test_parts_that_want_other_chunks_are_refused():
    parts = [{"weight": 1.0, "chunk_size": size} for size in (64, 128)]
    with pytest.raises(ConfigError, match="parts have chunk_size 128 and 64, and share one"):
        load(guide(parts))


def test_another_loss_is_another_run_and_another_validation_loss():
    runs = [
        load(GUIDE, [f"{KD}._target_=null", f"{KD}.name=jsd", f"{KD}.beta=0.3"]),
        load(GUIDE, [f"{KD}=[{{name: jsd, weight: 1}}]"]),
        load(GUIDE, [f"{KD}=[{{name: jsd, weight: 2}}]"]),
    ]
    for settings in (fingerprint, fingerprint_validation):
        found = [settings(cfg) for cfg in runs]
        assert found[0] != found[1] != found[2] != found[0]


def test_the_bounds_that_all_losses_share_hold_for_each():
    parts = [{"name": "tvd", "weight": 1, "temperature": 0}, {"weight": 1, "ignore_index": 3}]
    with pytest.raises(ConfigError) as caught:
        load(guide(parts))
    first, second = caught.value.problems
    assert f"{KD}[0].temperature: got 0, expected a number > 0" in first
    assert f"{KD}[1].ignore_index: got 3, expected -100" in second


def test_the_keys_of_all_divergences_are_listed():
    told = {line.split()[0]: line for line in list_keys(KD)}
    assert "one of forward_kl, " in told[f"{KD}.name"] and "top_k" in told[f"{KD}.name"]
    assert "of alpha_beta: float = 0.7 (Power β > 0" in told[f"{KD}.beta"]
    assert "of jsd: float = 0.5 (Share β of the teacher" in told[f"{KD}.beta"]
    assert "of ds_kd.losses.KDLoss: float = 1.0" in told[f"{KD}.temperature"]
    assert "jsd" not in told[f"{KD}.temperature"]  # what all take is told once


NEW = '''"""One more."""

from typing import Any

from ds_kd.losses.divergences import Divergence


class Squared(Divergence):
    """Σ (q - p)², weighed."""

    name = "squared"
    limits = (("strength", 0, 2),)

    def __init__(self, strength: float = 1.0, **common: Any):
        super().__init__(**common)
        self.strength = self.within("strength", strength)

    def value(self, log_p, log_q):
        return self.strength * (log_q.exp() - log_p.exp()).square().sum(-1)
'''


def test_a_file_in_the_folder_is_all_that_a_new_divergence_needs(tmp_path):
    for name in ("ds_kd", "launch", "ds_configs"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "ds_kd" / "losses" / "named" / "squared.py").write_text(NEW)

    def check(strength):
        command = [sys.executable, "launch/kd.py", "--config", str(GUIDE), "--check"]
        more = [f"{KD}._target_=null", f"{KD}.name=squared", f"{KD}.strength={strength}"]
        return subprocess.run([*command, *more], cwd=tmp_path, capture_output=True, text=True)

    good, bad = check(0.5), check(3)
    assert good.returncode == 0 and "nothing wrong with it" in good.stdout, good.stderr
    assert bad.returncode == 2 and f"{KD}.strength: got 3, expected a number between" in bad.stderr
