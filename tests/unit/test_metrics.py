"""Where numbers go: what Weights & Biases refuses is one line that names the section."""

from __future__ import annotations

import sys
import types

import pytest

from ds_kd.metrics import Metrics


def test_wandb_that_is_not_installed_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match="wandb: the package is not installed; pip install wandb"):
        Metrics(None, wandb={"project": "p"})


def test_what_wandb_refuses_is_told(monkeypatch):
    client = types.ModuleType("wandb")
    client.init = lambda project=None: None
    monkeypatch.setitem(sys.modules, "wandb", client)
    Metrics(None, wandb={"project": "p"})
    with pytest.raises(ValueError, match=r"wandb: wandb\.init says: .*unexpected .*'projct'"):
        Metrics(None, wandb={"projct": "p"})
