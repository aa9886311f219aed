"""Texts are drawn alike in any batch, and from the distribution that temperature and top_p name."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ds_kd.models.generation.sampling import (
    Draw,
    Sampling,
    choose,
    count_rows,
    group,
    share_of,
    uniforms,
    write,
)
from tests import tiny

PROMPTS = [[5, 9, 7], [11] * 9, [4], [30, 31, 8, 9, 3], [6, 6]]
DRAWS = [Draw(3, 0, f"s{k}") for k in range(len(PROMPTS))]
PINNED = [0.7307514535832815, 0.6631850649693128]
HOW = Sampling(max_new_tokens=12, temperature=0.8, top_p=0.95)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    from transformers import AutoModelForCausalLM

    path = tiny.llama(tmp_path_factory.mktemp("sampled") / "model")
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def test_numbers_depend_on_the_draw_and_the_position_alone_and_are_pinned():
    once, again = uniforms(DRAWS[0], 4), uniforms(DRAWS[0], 1000)
    assert (once == again[:4]).all() and again.min() >= 0 and again.max() < 1
    # The mean of numbers that are independent and uniform is within 4 of its σ = 1/√(12·n).
    assert abs(again.mean() - 0.5) < 4 / np.sqrt(12_000)
    others = [
        Draw(4, 0, "s0"), Draw(3, 1, "s0"), Draw(3, 0, "s1"), Draw(3, 0, "s0", 1),
    ]  # fmt: skip
    assert all(abs(np.corrcoef(again, uniforms(o, 1000))[0, 1]) < 0.13 for o in others)
    # A resumed run may have another version of numpy: these numbers must not change.
    assert uniforms(Draw(1111, 2, "row", 3), 2).tolist() == PINNED
    assert share_of(DRAWS[0]) not in again


def test_tokens_come_in_the_shares_of_the_softmax_at_a_temperature():
    logits = torch.tensor([[0.3, -1.0, 2.0, 0.0]])
    grid = torch.linspace(0, 1, 100_001, dtype=torch.float64)[:-1]
    for temperature in (0.5, 1.0, 4.0):
        drawn = choose(logits.expand(len(grid), -1), grid, Sampling(1, temperature))
        shares = drawn.bincount(minlength=4) / len(grid)
        assert torch.allclose(shares, (logits[0] / temperature).softmax(-1), atol=2e-5)


def test_top_p_keeps_the_fewest_likeliest_tokens_that_reach_the_share_and_equal_ones_together():
    grid = torch.linspace(0, 1, 1001, dtype=torch.float64)[:-1]
    logits = torch.tensor([0.1, 0.5, 0.1, 0.3]).log().expand(len(grid), -1)
    for top_p, kept in ((0.5, {1}), (0.51, {1, 3}), (0.8, {1, 3}), (0.85, {0, 1, 2, 3})):
        assert {*choose(logits, grid, Sampling(1, 1.0, top_p)).tolist()} == kept
    shares = choose(logits, grid, Sampling(1, 1.0, 0.8)).bincount() / len(grid)
    assert torch.allclose(shares, torch.tensor([0, 0.5, 0, 0.3]) / 0.8, atol=2e-3)


def test_extreme_logits_and_numbers_draw_a_token_that_is_possible():
    last = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    for row in ([1e4, -1e4, 1e4], [-torch.inf, 0.0, -torch.inf], [0.0, -1e4, -torch.inf]):
        logits = torch.tensor([row, row])
        for how in (Sampling(1), Sampling(1, 0.01, 0.5), Sampling(1, 0.0)):
            chosen = choose(logits, last, how)
            assert all(logits[0, token] == logits.max() for token in chosen)
    wide = torch.zeros(2, 262_144)
    assert choose(wide, last, Sampling(1)).tolist() == [0, 262_143]
    assert choose(wide, last, Sampling(1, vocab=1000)).tolist() == [0, 999]


def test_a_text_is_the_same_alone_and_in_any_batch_and_place(model):
    """In fp32 a batch changes logits by 1e-6, and these draws stay clear of every border."""
    together = write(model, PROMPTS, DRAWS, HOW, [1])
    for order in ([4, 3, 2, 1, 0], [2], [1, 4]):
        some = write(model, [PROMPTS[k] for k in order], [DRAWS[k] for k in order], HOW, [1])
        assert some == [together[k] for k in order]
    other = write(model, PROMPTS, [d._replace(number=1) for d in DRAWS], HOW, [1])
    assert other != together and len({tuple(w.tokens) for w in together}) == len(PROMPTS)


def test_a_text_is_that_of_a_plain_loop_without_padding_or_cache(model):
    for prompt, draw, got in zip(
        PROMPTS, DRAWS, write(model, PROMPTS, DRAWS, HOW, [1]), strict=True
    ):
        tokens: list[int] = []
        entropy = 0.0
        for number in uniforms(draw, HOW.max_new_tokens):
            with torch.no_grad():
                logits = model(torch.tensor([prompt + tokens])).logits[:, -1]
            q = logits[0].double().softmax(-1)
            entropy -= (q * q.log()).sum().item()
            tokens += choose(logits, torch.tensor([number]), HOW).tolist()
            if tokens[-1] == 1:
                break
        assert got.tokens == tokens and got.is_whole == (tokens[-1] == 1)
        assert got.entropy == pytest.approx(entropy, rel=1e-5)  # at T = 1, over all ids


def test_any_of_several_tokens_ends_a_text_and_torchs_generators_have_no_influence(model):
    free = write(model, PROMPTS, DRAWS, HOW, [])
    assert all(len(each.tokens) == 12 and not each.is_whole for each in free)
    ends = [free[0].tokens[4], free[1].tokens[2]]
    torch.manual_seed(5)
    before = torch.get_rng_state()
    cut = write(model, PROMPTS, DRAWS, HOW, ends)
    assert (torch.get_rng_state() == before).all()
    assert all(each.tokens[-1] in ends for each in cut[:2]) and cut[0].is_whole
    assert all(f.tokens[: len(c.tokens)] == c.tokens for f, c in zip(free, cut, strict=True))


def test_settings_in_the_models_own_file_do_not_change_its_distribution(model):
    plain = write(model, PROMPTS, DRAWS, HOW, [1])
    own = model.generation_config
    own.repetition_penalty, own.suppress_tokens, own.min_length = 1.9, [*range(3, 60)], 11
    try:
        assert write(model, PROMPTS, DRAWS, HOW, [1]) == plain
        assert model.generation_config is own
    finally:
        own.repetition_penalty = own.suppress_tokens = own.min_length = None


def test_batches_depend_on_the_prompts_alone_and_hold_limited_tokens():
    prompts = [[7] * n for n in (3, 900, 4, 5, 6, 901)] + [[8] * 3]
    batches = group(prompts, 100, 2)
    assert batches == [[5, 1], [4, 3], [2, 0], [6]]
    mixed = [3, 0, 6, 5, 1, 4, 2]
    other = group([prompts[k] for k in mixed], 100, 2)
    assert [[mixed[k] for k in batch] for batch in other] == batches
    assert [*map(len, group([[7] * 4000] * 100, 96))] == [16] * 6 + [4]
    assert [*map(len, group([[7]] * 100, 1))] == [25] * 4 and group([], 5) == []
    # Few prompts are one batch, in which a token takes as long as in several smaller ones.
    sizes = [[*map(len, group([[7]] * 24, 1, count_rows(kind)))] for kind in ("cpu", "cuda")]
    assert sizes == [[8] * 3, [24]] and [*map(len, group([[7]] * 7, 1))] == [7]
    assert group([[7] * 10**6], 5) == [[0]]
