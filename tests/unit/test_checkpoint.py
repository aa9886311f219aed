"""Checkpoints, as far as they need no engine."""

from __future__ import annotations

import errno
import sys

import pytest
import torch
from deepspeed.runtime.zero.config import ZeroStageEnum

from ds_kd.checkpoint.checkpointer import Checkpointer
from ds_kd.checkpoint.engine.files import _pickle_stage_by_value, trust_pickles
from ds_kd.checkpoint.shards import ShardWriter
from ds_kd.checkpoint.writer import Writer
from ds_kd.parallel.world import World


def test_deepspeeds_stage_is_read_back_whatever_python_wrote_it(tmp_path, monkeypatch):
    # As Python 3.11.2 pickles an enum's members.
    monkeypatch.setattr(
        ZeroStageEnum, "__reduce_ex__", lambda self, _: (getattr, (type(self), self.name))
    )
    _pickle_stage_by_value()
    torch.save({"zero_stage": ZeroStageEnum.weights}, tmp_path / "states.pt")
    with trust_pickles():
        read = torch.load(tmp_path / "states.pt", weights_only=False)
    assert read["zero_stage"] is ZeroStageEnum.weights


def test_whoever_may_read_a_students_config_may_read_its_weights(tmp_path):
    writer = ShardWriter(tmp_path, shard_bytes=8)
    for name in ("first", "second"):
        writer.add(name, torch.zeros(2))
    writer.close()
    modes = {path.stat().st_mode for path in tmp_path.iterdir()}
    assert len([*tmp_path.iterdir()]) == 3 and len(modes) == 1


def test_a_save_that_outlasts_the_launchers_patience_is_told_once(tmp_path):
    world = World(0, 1, torch.device("cpu"), "gloo")
    said: list[str] = []
    keeper = Checkpointer(tmp_path, Writer(world, None), say=said.append, patience=30.0)
    for seconds in (29.0, 41.0, 50.0):
        keeper._warn(seconds, "took")
    assert len(said) == 1 and "took 41 s" in said[0] and "30 s after SIGTERM" in said[0]
    patient = Checkpointer(tmp_path, Writer(world, None), say=said.append)
    patient._warn(999.0, "took")
    assert len(said) == 1


def test_an_export_that_cannot_be_written_leaves_nothing(tmp_path, monkeypatch, capsys):
    from ds_kd.checkpoint import export
    from tests.scripts import script

    def runs_out(_, out):
        out.mkdir()
        (out / "model.safetensors").write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(export, "export_checkpoint", runs_out)
    assert script("export").main([str(tmp_path), str(tmp_path / "out")]) == 2
    assert "No space left" in capsys.readouterr().err
    assert [*tmp_path.iterdir()] == []


def test_an_export_leaves_a_users_directory_beside_it_alone(tmp_path, monkeypatch):
    from ds_kd.checkpoint import export

    mine = tmp_path / "out.part" / "notes"
    mine.parent.mkdir()
    mine.write_text("mine")
    monkeypatch.setattr(export, "export_checkpoint", lambda _, out: out.mkdir())
    export.export_to(tmp_path, tmp_path / "out")
    assert mine.read_text() == "mine" and (tmp_path / "out").is_dir()


def test_a_manifest_without_one_of_the_files_is_not_written(tmp_path):
    from ds_kd.checkpoint import manifest

    (tmp_path / "engine").mkdir()
    for name in ("state.json", "engine/one.pt"):
        (tmp_path / name).write_text(name)
    files = {"state.json": manifest.digest(tmp_path / "state.json")}
    with pytest.raises(OSError, match=r"engine/one\.pt: no rank has summed up this file"):
        manifest.write(tmp_path, files)
    assert not (tmp_path / "manifest.json").exists()


def test_an_export_shows_its_own_line_and_nothing_of_deepspeeds(tmp_path, monkeypatch, capfd):
    from ds_kd.checkpoint import export
    from tests.scripts import script

    def chatters(_, out):
        print("Detected checkpoint of type zero stage 3")
        print("Loading checkpoint shards: 100%", file=sys.stderr)
        out.mkdir()

    monkeypatch.setattr(export, "export_checkpoint", chatters)
    assert script("export").main([str(tmp_path), str(tmp_path / "out")]) == 0
    shown = capfd.readouterr()
    assert shown.out.splitlines()[0].startswith("wrote ") and not shown.err


def test_a_final_whose_checkpoints_were_deleted_is_told_before_it_is_replaced(tmp_path):
    (tmp_path / "final").mkdir()
    said: list[str] = []
    world = World(0, 1, torch.device("cpu"), "gloo")
    assert Checkpointer(tmp_path, Writer(world, None), say=said.append).resume(None, None) is None
    assert len(said) == 1 and "final is there and no checkpoint" in said[0]
    (tmp_path / "final").rmdir()
    assert Checkpointer(tmp_path, Writer(world, None), say=said.append).resume(None, None) is None
    assert len(said) == 1
