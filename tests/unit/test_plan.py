"""`--dry-run`: what of a run fits where, from config.json alone."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from benchmarks.plans import clusters
from ds_kd.config.load import load
from ds_kd.losses.chunked import default_chunk
from ds_kd.plan import memory as plan
from ds_kd.plan.dry_run import work_of
from ds_kd.plan.hardware import GPUS
from ds_kd.plan.new_config.starter import make_chooser
from ds_kd.plan.shapes import WORLDS, shape_of
from ds_kd.plan.step import passes as of_loss
from ds_kd.plan.step.cluster import Cluster
from ds_kd.plan.step.operations import count_by_phase, count_operations
from ds_kd.plan.step.peak import split_step
from ds_kd.plan.step.ranks import smallest_fit
from ds_kd.plan.step.time import estimate_phases
from ds_kd.plan.step.traffic import Exchange, count_exchanges
from tests import tiny
from tests.scripts import script

GUIDE = Path(__file__).parents[2] / "ds_configs" / "runs" / "llama3_2_1b_kd.yaml"
LARGE = plan.Shape(10**10, 10**10, 0, 32, 3 * 10**8, 32_000, 4096, 50_000, True, 2)
AWAY = plan.Work(1024, 1024, offload_optimizer=True, offload_weights=True, offload_teacher=True)


def bytes_in(text):
    units = {"GiB": 2**30, "MiB": 2**20}
    return [float(n) * units[u] for n, u in re.findall(r"([\d.]+) (GiB|MiB)", text)]


def test_the_memory_of_a_node_counts_each_of_its_ranks_once():
    parts = plan.estimate_bytes(LARGE, LARGE, AWAY, 16)
    one = sum(size for name, size in parts.items() if name.startswith("host "))
    # fp32 weights, two moments and gradients of 4 bytes each, the gradients once more for the
    # optimizer, two models of 2, over 16 ranks.
    assert one == 10**10 * (20 + 2 + 2) // 16
    assert plan.Machine(ranks_per_node=4).of_node(parts, 16) == 4 * one
    alone = plan.estimate_bytes(LARGE, LARGE, AWAY, 1)
    assert plan.Machine(ranks_per_node=8).of_node(alone, 1) == 16 * one


def test_a_teacher_on_a_disk_takes_no_memory():
    parts = plan.estimate_bytes(LARGE, LARGE, plan.replace(AWAY, teacher_is_on_disk=True), 16)
    assert parts["disk teacher weights"] == 2 * 10**10 // 16
    assert plan.on_host(parts) == 10**10 * (20 + 2) // 16
    assert plan.on_device(parts) + plan.on_host(parts) == sum(parts.values()) - 2 * 10**10 // 16


def test_a_run_that_fits_the_accelerator_and_not_its_host_does_not_fit():
    small = plan.Machine(room=80 * 10**9, host_room=64 * 10**9, ranks_per_node=8)
    assert small.lacks(plan.estimate_bytes(LARGE, LARGE, AWAY, 1), 1) == ["host"]
    assert smallest_fit(LARGE, LARGE, AWAY, small)[0] == 32  # 200 GB over 4 nodes
    large = plan.Machine(room=80 * 10**9, host_room=10**12, ranks_per_node=8)
    assert smallest_fit(LARGE, LARGE, AWAY, large)[0] == 1


def test_a_teacher_takes_the_first_place_for_which_there_is_memory():
    student = plan.Shape(10**9, 10**9, 0, 16, 5 * 10**7, 32_000, 2048, 50_000, True, 2)
    work = plan.Work(1024, 1024)

    def choose(gb, **more):
        return plan.choose_placement(student, LARGE, work, plan.Machine(gb * 10**9, **more), 8)[0]

    # Its 20 GB are there, are there in eighths, or are not there with all else of a step.
    assert [choose(gb) for gb in (80, 24, 12)] == ["replicate", "zero3", "cpu"]
    # A CPU has no other memory to move it to.
    assert choose(12, is_one=True) == "zero3"


def test_a_teacher_in_8_bits_takes_a_byte_and_a_sixteenth_a_weight_and_its_head_in_16_too():
    works = [plan.Work(1, 1, teacher_is_rounded=is_it) for is_it in (False, True)]
    whole, rounded = (plan.estimate_bytes(LARGE, LARGE, work, 4) for work in works)
    assert (
        rounded["teacher weights"] == 10**10 * 17 // 16 // 4 == whole["teacher weights"] * 17 / 32
    )
    head, name = 32_000 * 4096, "gathered layers and heads"
    whole, rounded = (split_step(LARGE, LARGE, work, 4)["loss"] for work in works)
    assert rounded[name] - whole[name] == head * 17 / 16  # it has arrived when the loss begins
    # A single rank has the head in place, unless it is away or in 8 bits.
    for more, width in ((None, 0), ("offload_teacher", 2), ("teacher_is_rounded", 2)):
        work = plan.Work(1, 1, **({more: True} if more else {}))
        assert split_step(LARGE, LARGE, work, 1)["loss"][name] == head * width


def test_the_bucket_of_gradients_is_there_all_the_time_and_no_larger_than_they_are():
    small = plan.replace(LARGE, trained=10**8)
    name = "gradients before they are shared out"
    for student, given, numbers in (
        (small, 0, 10**8),
        (LARGE, 0, 5 * 10**8),
        (small, 10**9, 10**9),
    ):
        phases = split_step(student, LARGE, plan.Work(1024, 1024, bucket=given), 8)
        assert phases["teacher"][name] == 2 * numbers
        # Its gradients once more, and a rank's part of them in fp32.
        filled = min(numbers, student.trained)
        assert phases["exchange"][name] == 2 * (numbers + filled) + 4 * filled // 8
        # The optimizer takes those of at most 10^9 weights at a time.
        assert phases["optimizer"][name] == 2 * numbers + 4 * min(10**9, student.trained // 8)


def test_a_loss_compares_both_models_where_the_teacher_has_no_shape_of_its_own(words):
    name, work = "logits workspace", plan.Work(1024, 1024)
    whole = split_step(LARGE, LARGE, work, 8)
    # Outputs that are read from a cache, with or without a head, and a base's are compared too.
    cached = split_step(LARGE, None, work, 8)
    base = split_step(LARGE, None, plan.replace(work, teacher_is_base=True), 8)
    assert whole["loss"][name] == cached["loss"][name] == base["loss"][name]
    alone = split_step(LARGE, None, plan.replace(work, asks_teacher=False), 8)
    assert alone["loss"][name] == 4 * 2 * 1024 * 32_000 < base["loss"][name]
    # The forward of a base gathers the student's weights.
    assert "teacher" not in cached and "teacher" not in alone
    gathered = "gathered layers and heads"
    assert base["teacher"][gathered] == base["backward"][gathered] > 0
    assert base["teacher"]["activations"] == whole["teacher"]["activations"]

    shared = ["teacher.kind=shared_base", "teacher_model=null", "peft={match_all_linear: true}"]
    given = [word for word in words if "=" in word and "teacher" not in word]
    none = ["kd_ratio=0"]
    for more, found in (([], (True, False)), (shared, (True, True)), (none, (False, False))):
        cfg = load(GUIDE, [*given, *more], config_only=True)
        work = work_of(cfg, 1, 32, 1.0)
        assert (work.asks_teacher, work.teacher_is_base) == found


def test_a_step_needs_what_its_largest_phase_does():
    work = plan.Work(4096, 4096)
    phases = split_step(LARGE, LARGE, work, 8)
    parts = plan.estimate_bytes(LARGE, LARGE, work, 8)
    added = sum(size for name, size in parts.items() if not plan.is_state(name))
    assert added == max(sum(phase.values()) for phase in phases.values())


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """The command for two directories that hold nothing but a config.json."""
    root = tmp_path_factory.mktemp("plan")
    (root / "rows.jsonl").write_text(tiny.squad_rows(40))
    models = []
    for name, layers in (("s", 2), ("t", 3)):
        path = tiny.llama(root / name, layers)
        for other in path.iterdir():
            if other.name != "config.json":
                other.unlink()
        models.append(path)
    return [
        "--config", str(GUIDE), "--ranks", "1", "--gpu-memory", "64GB",
        f"model.pretrained_model_name_or_path={models[0]}", "validation_dataset=null",
        f"teacher_model.pretrained_model_name_or_path={models[1]}",
        f"dataset.dataset_name={root / 'rows.jsonl'}",
    ]  # fmt: skip


OFFLOAD = (
    "deepspeed.student={zero_optimization: {stage: 3, offload_param: {device: cpu}, "
    "offload_optimizer: {device: cpu}}}"
)


def test_no_part_is_larger_than_its_whole_when_states_are_offloaded(words, capsys):
    assert script("plan").main([*words, OFFLOAD, "--length", "32"]) == 0
    out = capsys.readouterr().out
    lines = re.findall(r"^ +\d+: (.*)$", out, re.MULTILINE)
    assert len(lines) == len(WORLDS)
    for line in lines:
        whole, states, host = bytes_in(line)
        assert states <= whole and host > 0
        assert "fits the accelerator (--host-memory checks the host)" in line
    assert script("plan").main([*words, OFFLOAD, "--length", "32", "--host-memory", "1KB"]) == 0
    out = capsys.readouterr().out
    assert out.count("too much for the host") == len(WORLDS) and "nothing fits" in out
    assert script("plan").main([*words, "--host-memory", "much"]) == 2
    assert "--host-memory: got 'much'" in capsys.readouterr().err


def test_a_config_json_is_enough_and_the_length_can_be_given(words, capsys):
    main = script("plan").main
    cuts = ["dataset.seq_length=96", "dataset.truncation=true"]
    for more, tokens, told in (
        ([], 1024, "--length sets it"),
        (cuts, 96, "dataset.seq_length"),
        (["--length", "300"], 300, "--length"),
    ):
        assert main([*words, *more]) == 0
        out = capsys.readouterr().out
        assert told in out
        assert f"about {tokens:,} tokens" in out
        assert "steps: 4 from 40 samples" in out  # the rows can be counted without a tokenizer
    # 9 of 40 samples are held out, and 31 make 62 steps in two epochs.
    small = ["step_scheduler.global_batch_size=1", "step_scheduler.local_batch_size=1"]
    assert main([*words, *small, "validation_share=0.225"]) == 0
    assert "steps: 62 from 31 samples (validation_share holds" in capsys.readouterr().out
    run = [word for word in words if word not in ("--gpu-memory", "64GB")]
    assert script("kd").main([*run, "--check"]) == 2
    assert "a tokenizer" in capsys.readouterr().err


def test_a_chunk_size_of_zero_is_planned_as_all_tokens_of_a_micro_batch(words):
    overrides = [word for word in words if "=" in word]
    for given, chunk in (("0", 5000), ("64", 64), ("null", default_chunk("cpu"))):
        cfg = load(
            GUIDE,
            [*overrides, f"kd_loss_fn.chunk_size={given}", "dist_env.backend=gloo"],
            config_only=True,
        )
        if given != "null" or not torch.cuda.is_available():
            assert work_of(cfg, 1, 5000, 0.5).chunk == chunk


def test_gathered_bytes_follow_the_window_copies_in_nodes_and_one_exchange_of_gradients():
    def received(**values):
        work = plan.Work(1024, 1024, micro_batches=4, **values)
        found = count_exchanges(LARGE, LARGE, work, 16)
        return {each.name: each.received for each in found}

    # 10^10 weights of 2 bytes, for each of four micro-batches, of which 15 of 16 parts come over.
    plain = received()
    assert plain["teacher's weights"] == 4 * 2 * 10**10 * 15 / 16
    assert plain["gradients"] == 4 * 2 * 10**10 * 15 / 16
    assert plain["student's weights for forward"] == 4 * 2 * 10**10 * 15 / 16
    # The head stays for backward, the embedding too, and the last 3 of 32 layers: less than
    # DeepSpeed's reuse distance of 10^9 is met between their forward and the head's end.
    body = 10**10 - 2 * 32_000 * 4096
    assert plain["student's weights for backward"] == 4 * 2 * body * 29 / 32 * 15 / 16
    again = received(reuse=0)["student's weights for backward"]
    assert again == 4 * 2 * 10**10 * 15 / 16
    assert "student's weights for backward" not in received(reuse=10**11)
    assert received(window=4)["teacher's weights"] == 2 * 10**10 * 15 / 16
    assert received(hpz=8)["teacher's weights"] == 4 * 2 * 10**10 * 7 / 8
    assert received(reduces_once=True)["gradients"] == 2 * 10**10 * 15 / 16
    assert "teacher's weights" not in received(teacher_is_whole=True)
    assert not count_exchanges(LARGE, LARGE, plan.Work(1024, 1024), 1)


def test_a_collective_takes_the_slower_of_the_links_in_a_node_and_its_network():
    # H100: 450 GB/s in a node, 50 GB/s of each of 8 GPUs out of it, both at 80 %.
    exchange = Exchange("weights", "all_gather", 1e9, 16, "student")
    for network, seconds in (
        (None, 1e9 * 15 / 16 / (0.8 * 450e9)),  # half of all crosses: 0.5 GB at 320 GB/s is less
        (1e9, 0.5e9 / (0.8 * 8e9)),
    ):
        taken = Cluster(GPUS["h100"], 16, 8, network).seconds(exchange)
        assert taken == pytest.approx(seconds)
    # Two ranks 8 apart are in two nodes, whose network 8 such groups share.
    apart = plan.replace(exchange, ranks=2, stride=8)
    taken = Cluster(GPUS["h100"], 16, 8).seconds(apart)
    assert taken == pytest.approx(1e9 / 2 * 8 / (0.8 * 8 * 50e9))


def test_ranks_that_share_layers_or_samples_share_activations_logits_and_operations():
    work = plan.Work(1024, 1024)
    whole = split_step(LARGE, LARGE, work, 8)["loss"]
    split = split_step(LARGE, LARGE, plan.replace(work, sequence=4), 8)["loss"]
    assert split["activations"] == whole["activations"] // 4
    shared = split_step(LARGE, LARGE, plan.replace(work, tensor=2), 8)["loss"]
    assert shared["logits workspace"] == whole["logits workspace"] // 2
    whole = plan.estimate_bytes(LARGE, LARGE, work, 8)
    shared = plan.estimate_bytes(LARGE, LARGE, plan.replace(work, tensor=2), 8)
    assert shared["student weights"] == whole["student weights"]  # ZeRO shards each half over four
    for part in ("tensor", "sequence"):
        halved = count_operations(LARGE, LARGE, plan.replace(work, **{part: 2}))
        assert halved == count_operations(LARGE, LARGE, work) / 2


def test_a_whole_teacher_beside_a_cut_student_is_computed_on_each_of_its_ranks():
    cut = plan.Work(1024, 1024, tensor=2)
    uncut = plan.replace(cut, teacher_is_uncut=True)
    alone = plan.replace(cut, tensor=1)
    operations = [count_by_phase(LARGE, LARGE, work) for work in (cut, uncut, alone)]
    head = 2 * 1024 * LARGE.vocabulary * LARGE.hidden  # of which a rank computes half
    assert operations[1]["teacher"] == operations[2]["teacher"] - head / 2
    assert operations[1]["student"] == operations[0]["student"]
    received = [
        {each.name: each.received for each in count_exchanges(LARGE, LARGE, work, 8)}
        for work in (cut, uncut, alone)
    ]
    assert received[1]["teacher's weights"] == received[2]["teacher's weights"]
    assert "teacher's sums" in received[0] and "teacher's sums" not in received[1]
    # Forward sums two results of a layer; backward two gradients: what q, k and v read, and what
    # gate and up read.
    assert received[0]["student's sums"] == 2 * received[0]["teacher's sums"]
    sizes = [
        plan.estimate_bytes(LARGE, LARGE, plan.replace(work, teacher_is_whole=True), 8)
        for work in (cut, uncut)
    ]
    assert sizes[1]["teacher weights"] == 2 * sizes[0]["teacher weights"]


def test_a_token_meets_some_experts_and_all_of_them_are_gathered():
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=960, hidden_size=256, intermediate_size=512, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=4, num_local_experts=8, num_experts_per_tok=2,
    )  # fmt: skip
    with torch.device("meta"):
        shape = shape_of(MixtralForCausalLM(config), 4)
    # Attention 4·256², a router 8·256, two norms, and eight experts of 3·256·512.
    assert shape.layer == 4 * 256**2 + 8 * 256 + 2 * 256 + 8 * 3 * 256 * 512
    assert shape.used == pytest.approx(1 - 6 * 3 * 256 * 512 / shape.layer)
    found = count_exchanges(shape, shape, plan.Work(8, 8), 2)
    gathered = next(each.size for each in found if each.name == "teacher's weights")
    assert gathered == 4 * (shape.parameters - shape.small)


def test_no_exchange_is_negative_where_zero3_keeps_even_the_head_whole():
    tiny_one = plan.Shape(12_000, 12_000, 12_000, 2, 4_000, 96, 32, 500, True, 4, is_tied=True)
    assert all(each.size > 0 for each in count_exchanges(tiny_one, tiny_one, plan.Work(8, 8), 2))


def test_the_time_on_named_gpus_is_told_and_a_wrong_name_or_number_of_nodes_too(words, capsys):
    main = script("plan").main
    words = [word for word in words if word not in ("--gpu-memory", "64GB", "--ranks", "1")]
    sizes = ["--length", "32", "step_scheduler.global_batch_size=64"]
    assert main([*words, *sizes, "--gpu", "h100", "--ranks", "16", "--nodes", "2"]) == 0
    out = capsys.readouterr().out
    assert "time at best, on 16 × H100 SXM in 2 node(s):" in out and "tokens/s on all ranks" in out
    assert re.search(r"gradients +[\d.e-]+ GB  reduce_scatter, 16 ranks", out)
    assert "smallest that fits into 74.51 GiB" in out  # the memory of that GPU
    slow = ["--gpu", "h100", "--ranks", "16", "--nodes", "2", "--network"]
    times = []
    for network in ("hdr", "200", "25gbe"):
        assert main([*words, *sizes, *slow, network]) == 0
        times.append(re.search("time at best.*", capsys.readouterr().out)[0])
    assert times[0] == times[1] != times[2]
    assert main([*words, *sizes, *slow, "token-ring"]) == 2
    assert "--network: got 'token-ring', expected edr or hdr or ndr" in capsys.readouterr().err
    assert main([*words, *sizes, *slow, "hdr", "--ranks-per-node", "4"]) == 2
    assert "--ranks-per-node: got 4, expected 8, as 16 ranks on 2 nodes" in capsys.readouterr().err
    if not torch.cuda.is_available():
        assert main([*words, *sizes, "--ranks", "16", "--network", "ndr"]) == 2
        assert "--network: got 'ndr', expected --gpu beside it" in capsys.readouterr().err
    copies = "deepspeed.teacher={zero_optimization: {stage: 3, zero_hpz_partition_size: 6}}"
    assert main([*words, *sizes, copies, "--ranks", "16"]) == 2
    assert "got 6, expected a zero_hpz_partition_size that divides 16" in capsys.readouterr().err
    assert main([*words, *sizes, "--gpu", "h1000", "--ranks", "16"]) == 2
    assert "--gpu: got 'h1000', expected a100-40gb or a100 or h100" in capsys.readouterr().err
    assert main([*words, *sizes, "--ranks", "16", "--nodes", "3"]) == 2
    assert "--nodes: got 3, expected a number of nodes that divides 16" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("section", "passes"),
    [
        # As tests/unit/test_cuda_path.py counts them in the real code: of bf16, half of 5, 7 and 9.
        ("{name: forward_kl}", 2.5),
        ("{name: forward_kl, temperature: 2}", 3.5),
        ("{name: jsd, temperature: 2}", 4.5),
        ("[{name: reverse_kl, weight: 1}]", 3.5),
        # No kernel: of two losses, of one that looks for ids, and in fp64 above T = 8.
        ("[{name: forward_kl, weight: 0.5}, {name: reverse_kl, weight: 0.5}]", 60),
        ("{name: top_k, k: 4}", 60),
        ("{name: jsd, temperature: 9}", 60),
    ],
)
def test_the_loss_takes_the_time_of_its_kernel_or_of_the_plain_code(section, passes, words):
    def plan_loss(*more):
        overrides = [word for word in words if "=" in word]
        bf16 = ["model.torch_dtype=bf16", "teacher_model.torch_dtype=bf16"]
        cfg = load(GUIDE, [*overrides, *bf16, "kd_loss_fn._target_=null", *more], config_only=True)
        return work_of(cfg, 1, 4096, 1.0)

    work = plan_loss(f"kd_loss_fn={section}")
    assert work.passes == passes
    assert plan_loss(f"kd_loss_fn={section}", "kd_ratio=0").passes == 23.5
    if passes < 10:
        assert plan_loss(f"kd_loss_fn={section}", "model.torch_dtype=fp32").passes == 2 * passes

    # For 32,000 words and a micro-batch of 4,096 tokens, at 3.35 TB/s.
    work = plan.replace(work, micro_batches=1)
    student = estimate_phases(LARGE, LARGE, work, Cluster(GPUS["h100"], 1, 1))[1]
    assert student.memory == pytest.approx(passes * 4 * 4096 * 32_000 / 3.35e12, rel=1e-3)


def test_a_plan_assembles_the_loss_once(words, monkeypatch, capsys):
    assemble, made = of_loss.assemble_loss, []
    monkeypatch.setattr(
        of_loss, "assemble_loss", lambda *given: made.append(given) or assemble(*given)
    )
    assert script("plan").main([*words, "--length", "32", "dist_env.backend=nccl"]) == 0
    assert len(made) == 1, capsys.readouterr().out


def test_ranks_share_layers_and_samples_only_as_both_models_heads_allow(words):
    cfg = load(GUIDE, [word for word in words if "=" in word], config_only=True)
    gpus = Cluster(GPUS["h100"], 8, 8)
    chooser = make_chooser(cfg, work_of(cfg, 8, 32, 1.0), plan.Machine(), gpus, None, 8)
    layouts = [one.work for ranks in (1, 2, 4, 8) for one in chooser.list_layouts(ranks)]
    # Each model has four heads, and two of keys and values.
    shared = {(work.tensor, work.sequence) for work in layouts}
    assert shared == {(1, 1), (1, 2), (2, 1), (1, 4), (2, 2)}
    assert all(work.window == 1 and work.hpz == 1 for work in layouts if work.tensor > 1)


def test_pairs_on_clusters_are_planned_and_each_yaml_checks(tmp_path):
    clusters.write_models(tmp_path)
    small = clusters.plan_row(tmp_path, ("8B", "1B"), 8, clusters.LENGTH)
    assert small["teacher"] == "zero3" and small["again"] == "–"
    large = clusters.plan_row(tmp_path, ("405B", "70B"), 64, clusters.LENGTH)
    tight = clusters.plan_row(tmp_path, ("405B", "70B"), 32, clusters.LENGTH)
    assert large["offloaded"] == "–" != tight["offloaded"]
    text = (tmp_path / "405B-70B-32-4096.yaml").read_text()
    assert "activation_checkpointing: without it a step needs" in text
    # A sample that is too long for a rank is shared by two of them.
    long = clusters.plan_row(tmp_path, ("70B", "8B"), 8, clusters.LONG)
    assert long["cp"] == 2
    text = (tmp_path / "70B-8B-8-131072.yaml").read_text()
    assert "cp_size 2: no layout of 1 fits, and tp_size 2 needs" in text
    page = (GUIDE.parents[2] / "docs" / "scaling.md").read_text()
    for row in (small, large, long):
        assert f"| {' | '.join(map(str, row.values()))} |" in page, "benchmarks/plans/clusters.py"
    none = clusters.plan_row(tmp_path, ("405B", "70B"), 8, clusters.LENGTH)
    assert "nothing fits: " in none["teacher"]
    assert not (tmp_path / "405B-70B-8-4096.yaml").exists()
    # A run that fits takes as long as its slowest part in each phase.
    phases = estimate_phases(LARGE, LARGE, plan.Work(4096, 4096), Cluster(GPUS["h100"], 8, 8))
    assert [phase.name for phase in phases] == ["teacher", "student", "backward", "optimizer"]
