"""A model that was replaced at the same path is told from the one before."""

from __future__ import annotations

import hashlib

import torch
from safetensors.torch import save_file

from ds_kd.checkpoint.settings import differences
from ds_kd.config.load import fingerprint, list_defaults, load
from ds_kd.models.files.model_files import identity_of
from ds_kd.recipe.changes import hash_samples

GUIDE = "ds_configs/runs/llama3_2_1b_kd.yaml"


def write(directory, **tensors):
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text("{}")
    save_file(tensors, directory / "model.safetensors")
    return identity_of(str(directory), {})


def test_other_weights_of_the_same_shapes_are_another_model(tmp_path):
    first = write(tmp_path / "model", weight=torch.zeros(3, 5))
    assert first == write(tmp_path / "model", weight=torch.zeros(3, 5))
    assert first == write(tmp_path / "moved", weight=torch.zeros(3, 5))
    assert first != write(tmp_path / "model", weight=torch.ones(3, 5))
    assert first != write(tmp_path / "model", wait=torch.zeros(3, 5))


def test_so_are_large_ones_of_which_only_blocks_are_read(tmp_path):
    weight = torch.zeros(6 << 20)  # 24 MiB
    first = write(tmp_path / "model", weight=weight)
    assert first != write(tmp_path / "model", weight=weight + 1)
    weight[-1] = 1
    assert first != write(tmp_path / "model", weight=weight)


def test_a_change_of_one_tensor_among_many_is_seen(tmp_path):
    names = [f"layer{k}" for k in range(40)]
    weights = {name: torch.zeros(1 << 16) for name in names}  # 10 MiB, 256 KiB each
    first = write(tmp_path / "model", **weights)
    for name in names:
        changed = {**weights, name: weights[name] + 1}
        assert first != write(tmp_path / "model", **changed), name
    assert first == write(tmp_path / "model", **weights)


def test_so_is_one_of_a_file_that_names_no_tensors(tmp_path):
    path = tmp_path / "pytorch_model.bin"
    content = bytearray(20 << 20)
    path.write_bytes(content)
    first = identity_of(str(tmp_path), {})
    content[9 << 20 : 11 << 20] = bytes([1]) * (2 << 20)
    path.write_bytes(content)
    assert identity_of(str(tmp_path), {}) != first
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 100)  # damaged
    assert identity_of(str(tmp_path), {}) is not None


def test_a_hub_model_is_known_by_its_commit(tmp_path):
    repository = tmp_path / "models--some--model"
    for commit in ("a1b2", "c3d4"):
        (repository / "snapshots" / commit).mkdir(parents=True)
        (repository / "snapshots" / commit / "config.json").write_text("{}")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("a1b2")
    options = {"cache_dir": str(tmp_path)}
    assert identity_of("some/model", options) == "commit a1b2"
    assert identity_of("some/model", {**options, "revision": "c3d4"}) == "commit c3d4"
    assert identity_of("some/other", options) is None


def test_a_checkpoint_from_before_such_names_is_not_called_different():
    present = {"model weights": "9 bytes, 1f", "rng.seed": 1}
    assert not differences({"rng.seed": 1}, present)
    assert [*differences({"model weights": "9 bytes, 2e", "rng.seed": 1}, present).values()] == [
        "model weights was '9 bytes, 2e' and is '9 bytes, 1f'"
    ]
    assert not differences({"model files": "9 bytes, 2e", "rng.seed": 1}, present)  # earlier texts


def test_a_default_that_is_written_down_is_no_change_and_is_named_where_it_was_in_force():
    plain = fingerprint(load(GUIDE, ["kd_loss_fn=null"]))
    spelt = load(GUIDE, ["kd_loss_fn={temperature: 1.0}", "rng.ranked=true", "kd_ratio=0.5"])
    assert not differences(plain, fingerprint(spelt), list_defaults(spelt))
    other = load(GUIDE, ["kd_loss_fn={temperature: 2}"])
    told = differences(plain, fingerprint(other), list_defaults(other))
    assert [*told.values()] == ["kd_loss_fn.temperature was 1.0 and is 2"]
    back = differences(fingerprint(other), plain, list_defaults(other))
    assert [*back.values()] == ["kd_loss_fn.temperature was 2 and is 1.0"]

    # On the student's own words the default is another one.
    own = load(GUIDE, ["rollouts={ratio: 1}", "kd_ratio=null"])
    assert list_defaults(own)["kd_ratio"] == own.kd_ratio == 1.0


def test_another_layout_of_ranks_is_no_changed_setting():
    names = ("dp_size", "tp_size", "cp_size", "sequence_parallel")
    layouts = [
        fingerprint(load(GUIDE, [])) | {f"distributed.{n}": v for n in names} for v in (1, 2)
    ]
    assert not differences(*layouts)


def test_an_edited_mask_is_another_data_set_and_its_tokens_are_known_as_before():
    rows = [{"input_ids": [5, 6], "labels": [6, -100]}, {"input_ids": [7], "labels": [8]}]
    edited = [{**rows[0], "labels": [-100, -100]}, rows[1]]
    present = hash_samples("training", edited)
    assert [*differences(hash_samples("training", rows), present)] == ["training labels"]

    # Checkpoints from before labels were hashed hold this text.
    tokens = hashlib.sha256(b"[[5, 6], [7]]").hexdigest()[:12]
    assert not differences({"training data": f"2 samples, {tokens}"}, present)
