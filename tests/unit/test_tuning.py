"""The choices of a run from its machines, models and memory, none of which changes a result."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch._dynamo.backends.common import aot_autograd

from ds_kd.config.components import ConfigError
from ds_kd.config.load import load
from ds_kd.data.collate import default_collater
from ds_kd.data.packing import PackedDataset
from ds_kd.models.causal_lm import FrozenModel, compile_layers
from ds_kd.parallel.nodes import count_ranks_per_node
from ds_kd.parallel.world import World
from ds_kd.recipe.tuning.compile import Fallback, _find_fault
from ds_kd.recipe.tuning.cuts import choose_cuts
from ds_kd.recipe.tuning.gathering import Size, count_copy, count_states, tune
from ds_kd.recipe.tuning.gradients import choose
from ds_kd.recipe.tuning.machine import Machine
from ds_kd.recipe.tuning.window import build_window
from ds_kd.teachers.window import Window, join
from tests import tiny
from tests.parity.architectures import build
from tests.parity.test_architectures import CHOSEN

CPU = torch.device("cpu")
H100 = 80 * 10**9
#: Llama 3: 70 B parameters and 1 B, in bf16.
LARGE = Size(70_553_706_496, 855_654_400, 2)
SMALL = Size(1_235_814_400, 60_821_504, 2)
ZERO = {"zero_optimization": {"stage": 3}}
ON_HOST = {"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}}


class Engine:
    """A module where an engine is asked for, without DeepSpeed."""

    def __init__(self, module):
        self.module, self.training = module, False
        self.eval, self.train = module.eval, module.train

    def __call__(self, batch, probe=None):
        return self.module(batch, probe=probe)


def keys(zero):
    return {n: v for n, v in zero["zero_optimization"].items() if n != "stage"}


def test_a_run_refuses_the_layouts_that_check_cannot_look_at(tmp_path):
    # A model from the hub has its configuration when the run starts.
    guide = "ds_configs/runs/llama3_2_1b_kd.yaml"
    cfg = load(guide, ["distributed.tp_size=2", "distributed.cp_size=4"])
    kept = {"pretrained_model_name_or_path": str(tiny.llama(tmp_path))}
    model = replace(cfg.model, kwargs=kept)
    with pytest.raises(ConfigError, match=r"num_attention_heads is 4, and 2 × cp_size 4 ranks"):
        choose_cuts(replace(cfg, model=model), model, 2)


def test_machines_are_told_by_the_names_of_their_ranks():
    assert count_ranks_per_node(["a", "a", "b", "b"]) == 2
    assert count_ranks_per_node(["a"]) == 1
    assert count_ranks_per_node(["a", "a", "b"]) is None
    assert count_ranks_per_node(["a", "b", "a", "b"]) is None  # not one after the other


def test_a_whole_layer_is_fetched_ahead_where_the_default_would_fetch_its_beginning():
    one_node = Machine(8, 8, H100, True)
    zero, said = tune(ZERO, LARGE, one_node)
    assert keys(zero) == {
        "stage3_prefetch_bucket_size": LARGE.layer,
        "stage3_max_live_parameters": 2 * LARGE.layer,
    }
    assert not said
    assert keys(tune(ZERO, SMALL, one_node)[0]) == {"stage3_prefetch_bucket_size": SMALL.layer}
    assert keys(tune(ZERO, Size(10**8, 10**7, 2), one_node)[0]) == {}


@pytest.mark.parametrize("name", ["prefetch_bucket_size", "stage3_prefetch_bucket_size"])
def test_the_keys_of_a_zero_file_stay(name):
    given = {"zero_optimization": {"stage": 3, name: 7, "zero_hpz_partition_size": 1}}
    assert tune(given, LARGE, Machine(16, 8, H100, True)) == (given, "")


@pytest.mark.parametrize(
    ("zero", "size", "machine"),
    [
        (ZERO, LARGE, Machine(1, 1, H100, True)),
        (ZERO, None, Machine(16, 8, H100, True)),
        ({"zero_optimization": {"stage": 0}}, LARGE, Machine(16, 8, H100, True)),
    ],
)
def test_nothing_is_chosen_where_nothing_is_gathered_or_known(zero, size, machine):
    assert tune(zero, size, machine) == (zero, "")


def test_several_machines_get_a_copy_of_the_weights_each_where_half_of_memory_stays_for_steps():
    two_nodes = Machine(16, 8, H100, True)
    taken = count_states(SMALL, LARGE, two_nodes)
    assert taken == pytest.approx((18 * 1.236e9 + 2 * 70.55e9) / 16, rel=1e-3)  # 10.2 GB
    zero, said = tune(ZERO, LARGE, two_nodes, taken)
    assert keys(zero)["zero_hpz_partition_size"] == 8
    assert "8 ranks of each machine, from a copy of 16 GiB a rank" in said and "write 1" in said
    zero, said = tune(ZERO, SMALL, two_nodes, taken + count_copy(LARGE, two_nodes))
    assert keys(zero)["zero_hpz_partition_size"] == 8  # 10.2 + 17.6 + 0.3 GB of 40
    assert "zero_hpz_partition_size" not in keys(tune(ZERO, SMALL, two_nodes, 0, True)[0])
    zero, said = tune(ZERO, LARGE, Machine(16, 8, H100 * 2 // 3, True), taken)
    assert "zero_hpz_partition_size" not in keys(zero)
    assert "16 GiB a rank would leave less than half of its memory for steps" in said

    offloaded = {"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}}
    quantised = {**ZERO, "weight_quantization": {}}
    uneven, single = Machine(12, None, H100, True), Machine(4, 1, H100, True)
    for zero, machine in ((offloaded, two_nodes), (quantised, two_nodes), (ZERO, uneven)):
        other = tune(zero, LARGE, machine)
        assert "zero_hpz_partition_size" not in keys(other[0]) and not other[1]
    assert "zero_hpz_partition_size" not in keys(tune(ZERO, LARGE, single)[0])


def test_a_window_takes_as_many_micro_batches_as_their_hidden_states_have_room():
    # 70 B: 8,192 numbers of 2 bytes a token, three times: 4,096 tokens take 201 MB.
    window = Window(None, H100 // 32, 8192 * 2)
    assert window.count(4096.0) == 12 and window.count(2.0**30) == 1
    assert Window(3, 0, 8192 * 2).count(4096.0) == 3


def test_gradients_are_added_up_by_themselves_where_the_first_step_has_left_room():
    def engine(dtype, offloads=False):
        weight = torch.nn.Parameter(torch.empty(2, dtype=dtype))
        weight.ds_numel = 10**9
        frozen = torch.nn.Parameter(torch.empty(2, dtype=dtype), requires_grad=False)
        module = torch.nn.ParameterList([weight, frozen])
        return SimpleNamespace(module=module, optimizer=SimpleNamespace(offload_optimizer=offloads))

    def steps(wanted, count, student, machine, *peaks):
        """Return what is chosen for each of some steps before which so many GB were the most."""
        once = choose(wanted, count, student, machine)
        return [once.decide([peak * 1e9 / 2**30, 1.0]) for peak in peaks]

    eight, one = Machine(8, 8, H100, True), Machine(1, 1, H100, True)
    bf16 = engine(torch.bfloat16)  # takes 6 GB, and 64 of 80 may be full
    # The first step shows how much the others take; the sums themselves raise the peak later.
    assert steps("auto", 4, bf16, eight, 30, 50, 63) == [False, True, True]
    assert steps("auto", 4, bf16, eight, 30, 59, 59) == [False, False, False]
    assert steps("auto", 4, engine(torch.float32), eight, 30, 59) == [False, True]
    assert steps("auto", 1, bf16, eight, 1, 1) == [False, False]
    assert steps("auto", 4, bf16, one, 1, 1) == [False, False]
    assert steps("auto", 4, engine(torch.bfloat16, offloads=True), one, 1, 1) == [False, True]
    assert steps("auto", 4, bf16, Machine(8, 8, H100, False), 1, 1) == [False, False]
    assert steps("true", 1, bf16, one, 79) == [True]
    assert steps("false", 4, bf16, eight, 1, 1) == [False, False]


@pytest.mark.parametrize("kind", CHOSEN)
def test_micro_batches_in_a_row_give_every_bit_that_they_give_one_by_one(kind):
    model = FrozenModel(build(kind))
    alone = World(0, 1, CPU, "gloo")
    rows = tiny.samples(9, seed=3, masked=(0, 1, 2))  # a micro-batch without any label
    packed = PackedDataset(rows, 30)
    padded = [default_collater(rows[start : start + 3]) for start in (0, 3, 6)]
    packs = [default_collater([packed[k]]) for k in range(len(packed))]
    expected = torch.cat([model(batch) for batch in padded])
    window = build_window(3, Engine(model), ZERO, False, alone) if kind not in LEFT_OUT else None
    if window is None:
        with pytest.raises(ConfigError, match=r"teacher\.window: got 3, and .* one micro-batch"):
            build_window(3, Engine(model), ZERO, False, alone)
        assert build_window("auto", Engine(model), ON_HOST, False, alone) is None
        assert torch.equal(torch.cat([model(batch) for batch in padded]), expected)
        return
    assert torch.equal(torch.cat([model(batch) for batch in padded]), expected)
    assert torch.equal(model(join(padded)), expected)
    assert torch.equal(model(join(packs)), torch.cat([model(batch) for batch in packs]))


#: Caps in attention, attention in chunks, and a mask of its own.
LEFT_OUT = {"gemma2", "llama4_text", "phimoe"}


def test_a_window_is_not_made_where_nothing_is_gathered():
    model, alone = FrozenModel(build("qwen3")), World(0, 1, CPU, "gloo")
    assert build_window("auto", Engine(model), ZERO, False, alone) is None
    assert build_window(1, Engine(model), ZERO, False, World(0, 2, CPU, "gloo")) is None
    assert build_window("auto", Engine(model), ON_HOST, False, alone).most is None


def fail_to_compile(*_):
    raise RuntimeError("no such instruction\nmore")


#: Backends that compile nothing, or a forward pass and not its backward.
BROKEN = {
    "whole": fail_to_compile,
    "backward": aot_autograd(fw_compiler=lambda graph, _: graph, bw_compiler=fail_to_compile),
}


@pytest.mark.parametrize("part", BROKEN)
def test_layers_that_cannot_be_compiled_run_as_they_are_and_say_so_once(part, capsys):
    model = build("qwen3")
    ids = torch.arange(3, 15)[None]
    options = {"dynamic": True, "mode": "default"}
    assert _find_fault(CPU, backend="eager", **options) == ""
    assert _find_fault(CPU, backend=BROKEN[part], **options) == "no such instruction"

    def run():
        model.zero_grad()
        logits = model(input_ids=ids, use_cache=False).logits
        logits.square().sum().backward()
        return [logits, *(p.grad.clone() for p in model.parameters())]

    expected = run()
    compile_layers(model, guard=Fallback().guard, backend=BROKEN[part])
    assert all(map(torch.equal, run(), expected))
    told = capsys.readouterr().err
    assert told.count("layers are not compiled") == 1 and "no such instruction" in told
