"""The export is ready to be pushed: its card says what the student is and how it was made."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from ds_kd.checkpoint.state import TrainState
from ds_kd.config.load import load
from ds_kd.recipe.card import write_card
from tests import tiny
from tests.unit.test_retention import save, start

ROWS = "ds_kd.data.squad.make_squad_dataset"


@pytest.fixture
def run(tmp_path):
    """A config of two local models, and the path of its log."""
    for name in ("small", "large"):
        tiny.llama(tmp_path / name)
    (tmp_path / "rows.jsonl").write_text(tiny.squad_rows(4))
    config = {
        "model": {"pretrained_model_name_or_path": str(tmp_path / "small"), "token": "hf_abcdef"},
        "teacher_model": {"pretrained_model_name_or_path": str(tmp_path / "large")},
        "dataset": {"_target_": ROWS, "dataset_name": str(tmp_path / "rows.jsonl")},
        "kd_ratio": 0.25,
        "kd_loss_fn": {"_target_": "ds_kd.losses.KDLoss", "temperature": 2},
        "optimizer": {"_target_": "torch.optim.AdamW", "lr": 0.01},
        "lr_scheduler": {"name": "cosine", "num_warmup_steps": 3},
        "checkpoint": {"checkpoint_dir": str(tmp_path / "run")},
    }
    log = tmp_path / "run" / "tensorboard" / "metrics.jsonl"
    log.parent.mkdir(parents=True)
    return config, log


def test_the_card_tells_models_data_loss_settings_numbers_and_command(run, monkeypatch):
    config, log = run
    records = [
        {"step": 0, "val_loss": 9.0, "val_ce_loss": 8.25, "val_top1_agreement": 0.125},
        {"step": 1, "train_loss": 8.0},
        {"step": 4, "val_loss": 7.0, "val_ce_loss": 4.5, "val_top1_agreement": 0.5},
        {"step": 8, "val_loss": 1.0, "val_ce_loss": 1.75, "val_top1_agreement": 0.75},
    ]
    log.write_text("".join(json.dumps(record) + "\n" for record in records))
    words = [
        "/home/me/launch/kd.py",
        "--local_rank=1",
        "--config",
        "a b.yaml",
        "model.token=hf_abcdef",
    ]
    monkeypatch.setattr(sys, "argv", words)
    text = write_card(load(config), 2, TrainState(step=4, tokens=1234, labels=56))
    for part in (
        "# small, distilled from large",
        f"| started from | {log.parents[2] / 'small'} |",
        f"| teacher | {log.parents[2] / 'large'} |",
        f"{ROWS}(dataset_name={log.parents[2] / 'rows.jsonl'})",
        "| loss | 0.75 · CE + 0.25 · KDLoss, temperature 2 |",
        "torch.optim.AdamW(lr=0.01)",
        "cosine, 3 steps of warm-up",
        "| tokens | 1,234, of which 56 supervised |",
        "| ranks | 2 |",
        "transformers 5",
        "| | before | after step 4 |",  # the validation of step 8 is of another student
        "| CE, nats per token | 8.2500 | 4.5000 |",
        "| top-1 agreement | 0.1250 | 0.5000 |",
        "python launch/kd.py --config 'a b.yaml' 'model.token=***'",
        "temperature: 2",  # of the YAML
    ):
        assert part in text, part
    assert "hf_abcdef" not in text and "1.7500" not in text

    # Local paths are no names of the hub, which would refuse them; the licence is to be filled in.
    card = ModelCard(text)
    assert card.data.base_model is None and card.data.datasets is None
    assert card.data.license == "unknown" and "license: unknown  # fill in" in text
    assert card.data.library_name == "transformers"
    assert card.data.pipeline_tag == "text-generation"


def test_models_and_data_of_the_hub_are_linked(run):
    guide = Path(__file__).parents[2] / "ds_configs" / "runs" / "llama3_2_1b_kd.yaml"
    cfg = load(guide, ["model.torch_dtype=bf16", "kd_ratio=1"])
    card = ModelCard(write_card(cfg, 1, TrainState()))
    assert card.data.base_model == "meta-llama/Llama-3.2-1B"
    assert card.data.datasets == ["rajpurkar/squad"]
    assert "distilled from meta-llama/Llama-3.2-3B" in card.text
    # Under pytest no script of ours runs, and nothing was validated.
    assert "from Python" in card.text and "The run did not validate." in card.text


def test_a_card_that_its_user_has_filled_in_stays_until_the_student_is_another(tmp_path):
    save(tmp_path, 2)
    (tmp_path / "step_0000002/model/README.md").write_text("license: unknown")
    card = tmp_path / "final" / "README.md"
    card.write_text("license: mit")
    start(tmp_path)  # as the same command does again
    assert card.read_text() == "license: mit"
    (tmp_path / "final" / "config.json").write_text("{ }")
    start(tmp_path)
    assert card.read_text() == "license: unknown"


def test_the_card_tells_the_loss_with_its_arguments_and_a_sum_with_its_weights(run):
    config, _ = run
    parts = [{"name": "jsd", "beta": 0.3, "weight": 2}, {"temperature": 4, "weight": 0.5}]
    for section, told in (
        (parts, "(2 · JSD (beta 0.3), temperature 1 + 0.5 · KDLoss, temperature 4)"),
        ({"name": "jsd", "beta": 0.3}, "JSD (beta 0.3), temperature 1"),
    ):
        text = write_card(load(config | {"kd_loss_fn": section}), 1, TrainState())
        assert f"| loss | 0.75 · CE + 0.25 · {told} |" in text
