"""Layers in compiled code: attention is part of it, and one version serves packs of any shape."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.utils import counters

from ds_kd.data.collate import default_collater
from ds_kd.data.packing import PackedDataset
from ds_kd.models import causal_lm
from ds_kd.models.attention import attend_by_sample, sdpa_by_sample
from ds_kd.models.packs import varlen
from tests import tiny
from tests.unit.test_packing import architecture


def launch_by_mask(query, key, value, runs, back, scale):
    """Compute what `varlen_attn` does in operations that torch.compile can follow: it aligns the
    ends of each run of queries and of keys."""
    count, others = query.shape[0], key.shape[0]
    at, other = torch.arange(count), torch.arange(others)
    owner = torch.searchsorted(runs.queries, at, right=True) - 1
    place = at - runs.queries[owner + 1] + runs.keys[owner + 1]
    mask = (other <= place[:, None]) & (other >= runs.keys[owner][:, None])
    mask = mask & (other > place[:, None] - runs.longest_key)  # as a version for each would show
    if back >= 0:
        mask = mask & (other >= place[:, None] - back)
    parts = [part.transpose(0, 1)[None] for part in (query, key, value)]
    out = F.scaled_dot_product_attention(*parts, mask, scale=scale, enable_gqa=True)
    return out[0].transpose(0, 1)


@pytest.fixture
def like_a_gpu(monkeypatch):
    monkeypatch.setattr(varlen, "DEVICES", ("cpu",))
    monkeypatch.setattr(varlen, "DTYPES", (torch.float32,))
    monkeypatch.setattr(varlen, "_works", lambda *_: True)
    monkeypatch.setattr(varlen, "_launch", launch_by_mask)


@pytest.mark.parametrize(  # mistral has a window, which has a mask in a padded row and stays apart
    ("name", "is_packed"), [("llama", False), ("llama", True), ("mistral", True)]
)
def test_attention_is_part_of_a_compiled_layer(name, is_packed, like_a_gpu):
    """No break, no new version for packs of other lengths, and the numbers of plain layers."""
    samples = sorted(tiny.samples(12), key=lambda sample: len(sample["input_ids"]))
    parts = [samples[:3], samples[3:8], samples[8:]]
    if is_packed:
        parts = [[PackedDataset(part, 64)[0]] for part in parts]
        assert len({max(part[0]["segment_lengths"]) for part in parts}) == 3
    batches = [default_collater(part) for part in parts]
    models = [causal_lm.FrozenModel(architecture(name)) for _ in range(2)]
    for model in models:
        attend_by_sample(model.model)

    torch._dynamo.reset()
    counters.clear()
    causal_lm.compile_layers(models[1].model, backend="eager")
    versions = []
    for batch in batches:
        found = [model(batch) for model in models]
        assert torch.allclose(*found, atol=1e-6)
        versions.append(counters["stats"]["unique_graphs"])
    assert not counters["graph_break"]
    assert versions[1:] == versions[:-1]


def test_keys_that_were_kept_from_before_are_refused():
    """Causal attention aligns first tokens; two queries behind four kept keys would see too few."""
    module = torch.nn.Module()
    query, key = torch.randn(1, 2, 2, 8), torch.randn(1, 2, 6, 8)
    with pytest.raises(RuntimeError, match="split"):
        sdpa_by_sample(module, query, key, key, None)
