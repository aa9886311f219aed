"""What can be said of checkpoints without an engine."""

from __future__ import annotations

import torch
from deepspeed.runtime.zero.config import ZeroStageEnum

from ds_kd.zero_files import _pickle_stage_by_value, trusted_pickles


def test_deepspeeds_stage_is_read_back_whatever_python_wrote_it(tmp_path, monkeypatch):
    # As Python 3.11.2 pickles an enum's members.
    monkeypatch.setattr(
        ZeroStageEnum, "__reduce_ex__", lambda self, _: (getattr, (type(self), self.name))
    )
    _pickle_stage_by_value()
    torch.save({"zero_stage": ZeroStageEnum.weights}, tmp_path / "states.pt")
    with trusted_pickles():
        read = torch.load(tmp_path / "states.pt", weights_only=False)
    assert read["zero_stage"] is ZeroStageEnum.weights
