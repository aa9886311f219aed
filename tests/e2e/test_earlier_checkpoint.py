"""A checkpoint that an earlier arrangement of the code wrote goes on as it would have there."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

from tests.e2e.test_run import ROOT, environment

EARLIER = Path(__file__).parent / "before_the_move"


def test_a_run_from_before_the_move_ends_with_the_same_weights(tmp_path):
    shutil.copytree(EARLIER, tmp_path / "earlier")
    result = subprocess.run(
        [sys.executable, str(ROOT / "launch" / "kd.py"), "--config", "run.yaml"],
        cwd=tmp_path / "earlier",
        env=environment() | {"DS_ACCELERATOR": "cpu"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert "resumed from run/step_0000003 at step 3" in result.stdout
    assert "resuming, but training" not in result.stdout  # its labels were not hashed yet
    assert "step 4/6" in result.stdout and "step 3/6" not in result.stdout
    expected = load_file(EARLIER / "expected.safetensors")
    got = load_file(tmp_path / "earlier" / "run" / "final" / "model.safetensors")
    assert expected.keys() == got.keys()
    # Bitwise on the processor that made them; another one adds up in another order.
    for name, tensor in expected.items():
        assert torch.allclose(got[name], tensor, rtol=0, atol=1e-5), name
