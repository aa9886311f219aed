"""launch/evaluate.py: its numbers by hand, by plain transformers and by lm-evaluation-harness."""

from __future__ import annotations

import json
import math
import random
import re
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from ds_kd.evaluate.results import Evaluated, format_table, summarize
from ds_kd.evaluate.run import load_items
from ds_kd.evaluate.statistics import Metric, estimate, estimate_difference
from ds_kd.evaluate.tasks import kinds
from ds_kd.evaluate.tasks.builtin import BUILTIN, PLAIN_TEXT
from ds_kd.evaluate.tasks.encoding import Encoder
from ds_kd.evaluate.tasks.kinds import Generation
from ds_kd.evaluate.tasks.own import make_task
from ds_kd.evaluate.tasks.scores import exact_match, f1, normalize
from tests import harness, tiny
from tests.scripts import script

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
SOME = """the a river flows through old towns and quiet gardens where people walk slowly under tall
trees while children play music near stone bridges boats carry bread wine paper towards distant
markets every morning before rain returns from northern hills"""
WORDS = SOME.split()


# ---------------------------------------------------------------------------------- rows and models


def sentence(draw: random.Random, least: int = 3, most: int = 9) -> str:
    return " ".join(draw.choices(WORDS, k=draw.randint(least, most)))


def choice_rows(count: int) -> list[dict]:
    """Rows in HellaSwag's schema, with its artefacts."""
    draw = random.Random(1)
    return [
        {
            "ind": k,
            "activity_label": sentence(draw, 1, 2),
            "ctx_a": f"{sentence(draw)} [title] {sentence(draw)}.",
            "ctx_b": sentence(draw, 1, 2),
            "ctx": sentence(draw),
            "endings": [f"{sentence(draw, 1, 7)} [step] more." for _ in range(4)],
            "label": str(draw.randrange(4)),
        }
        for k in range(count)
    ]


def question_rows(count: int) -> list[dict]:
    draw = random.Random(2)
    return [
        {
            "context": sentence(draw, 2, 12),
            "question": sentence(draw, 2, 5),
            "answers": {"text": [sentence(draw, 1, 3), sentence(draw, 1, 2)]},
        }
        for _ in range(count)
    ]


def text_rows() -> list[dict]:
    draw = random.Random(3)
    return [{"text": sentence(draw, least, least)} for least in (3, 40, 11, 130, 25)]


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def make_model(path: Path, seed: int, kind: str = "Llama", **changes) -> Path:
    """A random model with a byte-level BPE, whose tokens begin with their space."""
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<eos>", "<pad>"]
    trainer = trainers.BpeTrainer(
        vocab_size=340, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator([sentence(random.Random(k)) for k in range(50)], trainer)
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<eos>", pad_token="<pad>"
    )
    fast.save_pretrained(path)

    torch.manual_seed(seed)
    settings = dict(
        vocab_size=len(fast), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=160,
        initializer_range=0.2, pad_token_id=1, eos_token_id=0, bos_token_id=None,
    )  # fmt: skip
    config = getattr(transformers, f"{kind}Config")(**settings | changes)
    getattr(transformers, f"{kind}ForCausalLM")(config).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder of rows, two models `one` and `two`, and tokenizers."""
    folder = tmp_path_factory.mktemp("evaluate")
    write_rows(folder / "choices.jsonl", choice_rows(24))
    write_rows(folder / "questions.jsonl", question_rows(9))
    write_rows(folder / "texts.jsonl", text_rows())
    for seed, name in enumerate(("one", "two")):
        make_model(folder / name, seed)
    return folder


def run_command(*words) -> int:
    return script("evaluate").main([*map(str, words)])


def evaluate(place: Path, task, data: str, *words, models=("one",)) -> dict:
    """The command's JSON."""
    output = place / f"{Path(str(task)).stem}-{len(list(place.iterdir()))}.json"
    named = [word for name in models for word in ("--model", place / name)]
    rows = ("--data", place / data)
    assert run_command(*named, "--task", task, *rows, "--output", output, *words) == 0
    return json.loads(output.read_text()) | {"output": output}


def records_of(results: dict) -> list[dict]:
    """The records of the only model of an evaluation, in the rows' order."""
    (path,) = results["output"].with_suffix(".samples").glob("*.jsonl")
    lines = [json.loads(line) for line in path.read_text().splitlines()[1:] if line.strip()]
    merged: dict[int, dict] = {}
    for line in sorted(lines, key=lambda line: line["item"]):
        before, record = merged.get(line["row"]), line["record"]
        merged[line["row"]] = (
            record if before is None else {n: before[n] + record[n] for n in record}
        )
    return [merged[row] for row in sorted(merged)]


def value(results: dict, metric: str, model: int = 0) -> float:
    return results["models"][model]["metrics"][metric]["value"]


def likelihoods(directory: Path, prompts: list[tuple[str, str]]) -> list[float]:
    """Return that of each (context, ending) by plain transformers, one at a time."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    found = []
    for context, ending in prompts:
        start = len(tokenizer(context)["input_ids"])
        ids = torch.tensor([tokenizer(context + ending)["input_ids"]])
        with torch.no_grad():
            scores = model(ids).logits[0].log_softmax(-1)
        found.append(sum(scores[k - 1, ids[0, k]].item() for k in range(start, ids.shape[1])))
    return found


# ------------------------------------------------------------------- agreement with other programs


def check_hellaswag(directory: Path, data: Path, results: dict) -> None:
    theirs = harness.hellaswag(harness.model_of(directory), data)
    assert value(results, "acc") == pytest.approx(theirs["acc"], abs=1e-12)
    assert value(results, "acc_norm") == pytest.approx(theirs["acc_norm"], abs=1e-12)
    ours = [record["log_likelihoods"] for record in records_of(results)]
    np.testing.assert_allclose(ours, theirs["log_likelihoods"], atol=1e-3)


def test_hellaswag_agrees_with_lm_evaluation_harness(place):
    results = evaluate(place, "hellaswag", "choices.jsonl")
    check_hellaswag(place / "one", place / "choices.jsonl", results)


@pytest.mark.skipif(not SHARED.is_dir(), reason="real rows are not on this machine")
def test_hellaswag_agrees_with_the_harness_on_real_rows(place):
    data = write_rows(
        place / "real.jsonl",
        [json.loads(line) for line in (SHARED / "hellaswag_validation.jsonl").open()][:40],
    )
    long = make_model(place / "long", 3, max_position_embeddings=512)
    results = evaluate(place, "hellaswag", "real.jsonl", models=("long",))
    check_hellaswag(long, data, results)


def test_perplexity_of_texts_agrees_with_the_harness_beyond_the_models_length(place):
    results = evaluate(place, "perplexity", "texts.jsonl")
    metrics = ("byte_perplexity", "bits_per_byte")
    theirs = harness.run(
        harness.model_of(place / "one"),
        place / "texts.jsonl",
        output_type="loglikelihood_rolling",
        doc_to_text="",
        doc_to_target="{{text}}",
        metric_list=[{"metric": name} for name in metrics],
    )
    for name in metrics:
        assert value(results, name) == pytest.approx(theirs["results"][f"{name},none"], abs=1e-6)
    ours = [-record["loss"] for record in records_of(results)]
    expected = [sample["resps"][0][0] for sample in theirs["samples"]]
    np.testing.assert_allclose(ours, expected, atol=1e-3)
    # Per token, by hand: one of the texts is longer than the model reads at once.
    tokens = [record["tokens"] for record in records_of(results)]
    assert max(tokens) > 160
    assert value(results, "perplexity") == pytest.approx(math.exp(-sum(ours) / sum(tokens)))


def test_greedy_answers_are_those_of_the_harness(place):
    results = evaluate(place, "squad", "questions.jsonl")
    theirs = harness.run(
        harness.model_of(place / "one"),
        place / "questions.jsonl",
        output_type="generate_until",
        doc_to_text="Context: {{context}} Question: {{question}} Answer:",
        doc_to_target="{{answers.text[0]}}",
        generation_kwargs={"until": ["\n"], "max_gen_toks": 64, "do_sample": False},
        metric_list=[{"metric": "exact_match"}],
    )
    ours = [record["text"] for record in records_of(results)]
    assert ours == [sample["resps"][0][0] for sample in theirs["samples"]]


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("Llama", {}),
        ("Mistral", {"sliding_window": 12}),  # branches lie further apart than in the text
        ("Bloom", {"n_head": 4, "n_layer": 2}),  # positions enter by the mask
        ("Mamba", {"state_size": 4}),  # a branch would read the one before it
        ("Gemma2", {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 4096}),
    ],
)
def test_endings_score_as_each_does_alone(place, kind, changes):
    directory = make_model(place / f"of-{kind}", 5, kind, **changes)
    rows = choice_rows(6)
    write_rows(place / "few.jsonl", rows)
    task = place / "plain.yaml"
    task.write_text(
        "kind: multiple_choice\nprompt: '{{ctx}}'\nchoices: endings\nreference: label\n"
    )
    results = evaluate(place, task, "few.jsonl", models=(directory.name,))
    pairs = [(row["ctx"], f" {ending}") for row in rows for ending in row["endings"]]
    expected = np.array(likelihoods(directory, pairs)).reshape(-1, 4)
    ours = [record["log_likelihoods"] for record in records_of(results)]
    np.testing.assert_allclose(ours, expected, atol=1e-3)


def test_distances_are_those_of_whole_logits(place):
    from transformers import AutoModelForCausalLM

    from ds_kd.data.rows.detect import samples_of

    results = evaluate(
        place, "kl", "questions.jsonl", "--teacher", place / "two", models=("one", "two")
    )
    one, two = (
        AutoModelForCausalLM.from_pretrained(place / name, dtype=torch.float32).eval()
        for name in ("one", "two")
    )
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(place / "one")
    rows = []
    for sample in samples_of(str(place / "questions.jsonl"), tokenizer, None):
        at = torch.tensor(sample["labels"]) != -100
        with torch.no_grad():
            z_s, z_t = (m(torch.tensor([sample["input_ids"]])).logits[0, at] for m in (one, two))
        log_q, log_p = z_s.double().log_softmax(-1), z_t.double().log_softmax(-1)
        p, q = log_p.exp(), log_q.exp()
        top_p, top_q = p.topk(5).indices.tolist(), q.topk(5).indices.tolist()
        rows.append(
            torch.stack(
                [
                    (p * (log_p - log_q)).sum(-1),
                    (q * (log_q - log_p)).sum(-1),
                    1 - (p - q).abs().sum(-1) / 2,
                    (p.argmax(-1) == q.argmax(-1)).double(),
                    torch.tensor(
                        [len({*a} & {*b}) / 5 for a, b in zip(top_p, top_q, strict=True)]
                    ).double(),
                ]
            ).T
        )
    expected = torch.cat(rows).mean(0).tolist()
    metrics = ("forward_kl", "reverse_kl", "acceptance", "top1_agreement", "top5_agreement")
    assert [value(results, name) for name in metrics] == pytest.approx(expected, abs=1e-6)
    # A model does not differ from itself.
    itself = [value(results, name, 1) for name in metrics]
    assert itself[0] == itself[1] == 0.0 and itself[2:] == pytest.approx([1, 1, 1], abs=1e-6)
    assert results["differences"][0]["metrics"]["forward_kl"]["high"] < 0


# -------------------------------------------------------------------------- scores and statistics


def test_answers_are_compared_as_squads_official_script_does():
    assert normalize("  The Rhine-Gorge, a  place! ") == "rhinegorge place"
    assert exact_match("the Gorge.", "gorge") == 1.0 and exact_match("gorges", "gorge") == 0.0
    # Two of three words, and two of two wanted: precision 2/3, recall 1.
    assert f1("old stone bridge", "The stone bridge") == pytest.approx(0.8)
    assert f1("", "") == 1.0 and f1("", "stone") == 0.0 and f1("an", "stone") == 0.0
    # A word counts as often as it is in both: one of three, and one of one.
    assert f1("no no no", "no") == pytest.approx(0.5)


def test_a_bos_that_the_tokenizer_puts_in_front_is_read_and_not_scored():
    encoder = Encoder(SimpleNamespace(bos_token_id=1, eos_token_id=2), longest=2)
    # BOS 1 before the text 5 6 7; the last window sees one token again for room.
    expected = [([1, 5], [5, 6]), ([5, 6], [-100, 7])]
    assert encoder.make_windows([1, 5, 6, 7]) == encoder.make_windows([5, 6, 7]) == expected


def test_a_text_longer_than_the_model_is_scored_once_in_parts_or_refused(place):
    encoder = Encoder(AutoTokenizer.from_pretrained(place / "one"), longest=16)
    (row,) = question_rows(1)
    rows = write_rows(place / "long.jsonl", [{**row, "context": f"{SOME} {SOME}"}])
    own = make_task("own", "perplexity", "{{question}}", None, "context", {})
    uncut = Encoder(encoder.tokenizer)
    for task in (BUILTIN["kl"], BUILTIN["perplexity"], own):
        (whole,) = load_items(task, str(rows), None, uncut).items
        parts = load_items(task, str(rows), None, encoder).items
        tokens = "input_ids" if "input_ids" in whole else "tokens"
        assert max(len(part[tokens]) for part in parts) == 16

        # Each label is there once, after the same token.
        def pair(item: dict, tokens: str = tokens) -> list[tuple[int, int]]:
            pairs = zip(item[tokens], item["labels"], strict=True)
            return [(token, label) for token, label in pairs if label != -100]

        assert [each for part in parts for each in pair(part)] == pair(whole)
        assert sum(part.get("bytes", 0) for part in parts) == whole.get("bytes", 0)
    task = make_task("own", "generation", "{{question}}", None, "context", {}, new_tokens=17)
    with pytest.raises(ValueError, match=r"17 tokens are to follow .* reads at most 16"):
        load_items(task, str(rows), None, encoder)
    assert encoder.read_no_more(Encoder(None, 8)).longest == 8
    assert encoder.read_no_more(Encoder(None)).longest == 16


def test_a_model_is_judged_by_the_validation_split_of_a_directory(place):
    encoder = Encoder(AutoTokenizer.from_pretrained(place / "one"))
    splits, alone = place / "splits", place / "one split"
    for folder, name, count in (
        (splits, "train", 9),
        (splits, "validation", 4),
        (alone, "rows", 3),
    ):
        folder.mkdir(exist_ok=True)
        write_rows(folder / f"{name}.jsonl", question_rows(count))
    rows = {"train": question_rows(9), "validation": question_rows(5)}
    saved = datasets.DatasetDict({k: datasets.Dataset.from_list(v) for k, v in rows.items()})
    saved.save_to_disk(str(place / "saved"))
    for folder, count in ((splits, 4), (alone, 3), (place / "saved", 5)):
        for name in ("squad", "perplexity"):
            assert load_items(BUILTIN[name], str(folder), None, encoder).total == count


def test_rows_without_a_reference_are_left_out_unless_they_ask_for_no_answer(place):
    encoder = Encoder(AutoTokenizer.from_pretrained(place / "one"))
    rows = [{"q": "the river", "a": ["old"]}, {"q": "the bread", "a": []}]
    one, none = (write_rows(place / "some.jsonl", rows), write_rows(place / "no.jsonl", rows[1:]))
    for asks in (False, True):
        task = Generation("own", ("q", "a"), lambda r: (r["q"], r["a"]), asks_for_none=asks)
        assert load_items(task, str(one), None, encoder).rows == ([0, 1] if asks else [0])
        with pytest.raises(ValueError, match="reference answer" if asks else "anything to score"):
            load_items(task, str(none), None, encoder)


def test_texts_without_a_token_are_told_as_what_they_are(place):
    encoder = Encoder(AutoTokenizer.from_pretrained(place / "one"))
    rows = write_rows(place / "empty.jsonl", [{"text": ""}])
    with pytest.raises(ValueError, match="anything to score"):
        load_items(PLAIN_TEXT, str(rows), None, encoder)


def test_an_interval_is_about_that_of_the_normal_distribution():
    metric = Metric("acc", "acc")
    records = [{"acc": float(k % 4 == 0)} for k in range(1000)]
    found = estimate(metric, records)
    # √(p(1-p)/n) = √(0.25·0.75/1000) = 0.0137, of which 1.96 to each side.
    assert found.value == 0.25
    assert found.value - found.low == pytest.approx(1.96 * 0.0137, rel=0.15)
    assert found.high - found.value == pytest.approx(1.96 * 0.0137, rel=0.15)


def test_a_difference_is_paired():
    metric = Metric("acc", "acc")
    hard = [{"acc": float(k % 2)} for k in range(200)]
    better = [{"acc": float(k % 2 or k < 20)} for k in range(200)]
    same = estimate_difference(metric, hard, hard)
    assert (same.value, same.low, same.high) == (0.0, 0.0, 0.0)
    found = estimate_difference(metric, better, hard)
    # Ten more of 200 right: ±1.96·√(0.05·0.95/200) = ±0.030, where unpaired ones would have ±0.098.
    assert found.value == pytest.approx(0.05)
    assert 0.01 < found.low < 0.04 and 0.06 < found.high < 0.09


def test_means_over_the_tokens_of_two_tokenizers_are_not_compared():
    records = [{"loss": 2.0, "tokens": 4, "bytes": 9}, {"loss": 3.0, "tokens": 5, "bytes": 9}]
    others = [{**records[0], "tokens": 3}, records[1]]
    models = [Evaluated(name, each, [0, 1], 2) for name, each in (("a", records), ("b", others))]
    metrics = PLAIN_TEXT.metrics
    results = summarize("perplexity", metrics, models, {})
    assert [*results["differences"][0]["metrics"]] == ["byte_perplexity", "bits_per_byte"]
    assert re.search(r"b − a +— +\+0\.0000", format_table(results, metrics))


def test_a_mean_over_tokens_divides_sums_by_sums():
    metric = Metric("perplexity", "loss", "tokens", np.exp)
    records = [{"loss": 2.0, "tokens": 1}, {"loss": 2.0, "tokens": 3}]
    assert estimate(metric, records).value == pytest.approx(math.e)


# ------------------------------------------------------------------------------------------ resume


def test_a_stopped_evaluation_goes_on_and_gives_the_same_numbers(place, capfd):
    whole = evaluate(place, "hellaswag", "choices.jsonl", "--batch-size", 4)
    output = whole.pop("output")
    (path,) = output.with_suffix(".samples").glob("*.jsonl")
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:10]) + lines[10][:20])  # a kill tears a line

    again = ("--task", "hellaswag", "--data", place / "choices.jsonl", "--output", output)
    assert run_command("--model", place / "one", *again, "--batch-size", 4) == 0
    assert json.loads(output.read_text()) == whole
    # Two batches of four were whole, and one sample of the third had been written.
    written = [line for line in path.read_text().splitlines()[10:] if line.endswith("}")]
    assert len(written) == 24 - 8
    assert "24/24 samples" in capfd.readouterr().err

    # Another model, other rows, or another token that ends a text is another evaluation.
    assert run_command("--model", place / "two", *again) == 0
    assert run_command("--model", place / "one", *again, "--limit", 8) == 0
    other = place / "other end"
    shutil.copytree(place / "one", other)
    (other / "generation_config.json").write_text('{"eos_token_id": 3}')
    assert run_command("--model", other, *again) == 0
    assert len(list(output.with_suffix(".samples").iterdir())) == 4


# ----------------------------------------------------------------------------------- own tasks


def test_an_own_multiple_choice_names_columns_choices_and_the_right_one(place):
    rows = [
        {"q": row["ctx"], "a": row["endings"][0], "b": row["endings"][1], "key": "AB"[k % 2]}
        for k, row in enumerate(choice_rows(6))
    ]
    write_rows(place / "letters.jsonl", rows)
    (place / "letters.yaml").write_text(
        "kind: multiple_choice\n"
        "columns: {question: q}\n"
        "prompt: 'Question: {{question}}\n\n  Answer:'\n"
        "choices: ['{{a}}', '{{b}}']\n"
        "reference: \"'AB'.index(key)\"\n"
    )
    results = evaluate(place, place / "letters.yaml", "letters.jsonl")
    assert results["task"] == "letters"
    pairs = [(f"Question: {r['q']}\nAnswer:", f" {r[x]}") for r in rows for x in "ab"]
    expected = np.array(likelihoods(place / "one", pairs)).reshape(-1, 2)
    found = records_of(results)
    np.testing.assert_allclose([r["log_likelihoods"] for r in found], expected, atol=1e-3)
    assert [r["right"] for r in found] == [0, 1, 0, 1, 0, 1]
    assert [r["acc"] for r in found] == [
        float(scores.argmax() == k % 2) for k, scores in enumerate(expected)
    ]


def test_the_tasks_of_the_documentation_load(tmp_path):
    from ds_kd.config.task import find_columns, load_task
    from ds_kd.recipe.tasks.evaluation import find_task

    page = (Path(__file__).parents[2] / "docs" / "evaluate.md").read_text()
    fences = re.findall(r"```yaml\n(.*?)```", page, flags=re.DOTALL)
    columns = []
    for text in (text for text in fences if "kind:" in text):
        (tmp_path / "task.yaml").write_text(text)
        columns.append(find_task(str(tmp_path / "task.yaml")).columns)
        assert find_columns(load_task(tmp_path / "task.yaml")) == columns[-1]
    assert columns == [
        ("answerKey", "choices", "question"),
        ("problem", "solution"),
        ("user_text", "reply"),
    ]


def test_an_own_generation_compares_what_its_expression_finds(place):
    squad = evaluate(place, "squad", "questions.jsonl")
    texts = [record["text"] for record in records_of(squad)]
    rows = [
        {**row, "first": text.split()[0], "all": [text, "other"]}
        for row, text in zip(question_rows(9), texts, strict=True)
    ]
    write_rows(place / "known.jsonl", rows)
    common = "kind: generation\nprompt: 'Context: {{context}} Question: {{question}} Answer:'\n"
    (place / "word.yaml").write_text(
        common + "reference: first\nregex: '^\\s*(\\S+)'\nmetrics: exact_match\n"
    )
    results = evaluate(place, place / "word.yaml", "known.jsonl")
    assert results["models"][0]["metrics"].keys() == {"exact_match"}
    assert value(results, "exact_match") == 1.0
    (place / "all.yaml").write_text(common + "reference: all\n")
    results = evaluate(place, place / "all.yaml", "known.jsonl")
    assert value(results, "exact_match") == value(results, "f1") == 1.0


def test_an_expression_that_takes_endless_time_is_told_with_its_answer(monkeypatch):
    """Each letter doubles the ways in which such an expression can fail."""
    monkeypatch.setattr(kinds, "_SECONDS", 0.2)
    task = kinds.Generation("word", (), lambda row: ("", []), pattern="(?:a|aa)+$")
    item = {"references": ["aaa"]}
    started = time.monotonic()
    with pytest.raises(kinds.SearchError, match=r"regex of word: '\(\?:a\|aa\)\+\$'") as caught:
        task._judge(item, "a" * 60 + "b")
    assert time.monotonic() - started < 5
    assert "reference 'aaa'" in str(caught.value) and "answer 'aaaaaaa" in str(caught.value)
    assert task._judge(item, "aaa")["exact_match"] == 1.0


def test_an_own_perplexity_scores_the_text_after_its_prompt(place):
    (place / "answer.yaml").write_text(
        "kind: perplexity\nprompt: '{{question}}'\nreference: \"{{' ' + answers.text[0]}}\"\n"
    )
    results = evaluate(place, place / "answer.yaml", "questions.jsonl")
    pairs = [(row["question"], f" {row['answers']['text'][0]}") for row in question_rows(9)]
    expected = [-loss for loss in likelihoods(place / "one", pairs)]
    found = records_of(results)
    np.testing.assert_allclose([record["loss"] for record in found], expected, atol=1e-3)
    assert [record["bytes"] for record in found] == [len(text) for _, text in pairs]


# ------------------------------------------------------------------------------- a user's mistakes


def without_safetensors(place: Path) -> Path:
    directory = make_model(place / "pickled", 0)
    (directory / "model.safetensors").unlink()
    torch.save({}, directory / "pytorch_model.bin")
    return directory


def without_head(place: Path) -> Path:
    from transformers import BertConfig, BertModel

    path = tiny.llama(place / "headless")
    (path / "model.safetensors").unlink()
    sizes = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    BertModel(BertConfig(vocab_size=tiny.VOCAB, **sizes)).save_pretrained(path)
    return path


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--task helaswag", "--task: got 'helaswag', expected hellaswag, squad, perplexity, kl"),
        ("--task nothing.yaml", "nothing.yaml: cannot be read"),
        ("--task squad", "no column context, question, answers; found"),
        ("--data {place}/none.jsonl", "no such file: {place}/none.jsonl"),
        ("--data {place}/empty.jsonl", "empty.jsonl"),
        ("--data {place}/rows.txt", "texts are rows of their own: a .jsonl file of"),
        ("--data {place}/unlabelled.jsonl", "line 2: label '' names none of 4 endings"),
        ("--model {place}/absent", "--model: got '{place}/absent', expected a Hugging Face model"),
        ("--model {place}/absent", "before); no such directory"),
        ("--model {place}/one/config.json", "it is a file; give the directory that it lies in"),
        ("--model {pickled}", "--model: Error no file named model.safetensors"),
        ("--model {headless}", "--model: got '{headless}': "),
        ("--task kl --teacher {other}", "--teacher: the student's tokenizer"),
        ("--output {place}/one/config.json/x.json", "--output: got '{place}/one/config.json"),
    ],
)
def test_a_mistake_is_told_in_a_sentence(place, capfd, words, expected):
    (place / "empty.jsonl").write_text("")
    (place / "rows.txt").write_text("the river")
    rows = choice_rows(3)
    rows[1]["label"] = ""
    write_rows(place / "unlabelled.jsonl", rows)
    names = {"place": place, "pickled": "", "headless": "", "other": ""}
    names["pickled"] = without_safetensors(place) if "pickled" in words else ""
    names["headless"] = without_head(place) if "headless" in words else ""
    names["other"] = tiny.llama(place / "other") if "other" in words else ""
    given = words.format(**names).split()
    usual = {"--model": place / "one", "--task": "hellaswag", "--data": place / "choices.jsonl"}
    asked = [word for name, w in usual.items() if name not in given for word in (name, w)]
    assert run_command(*asked, *given) == 2
    told = capfd.readouterr().err.strip()
    assert expected.format(**names) in told
    assert "Traceback" not in told and len(told.splitlines()) <= 2, told


def test_the_same_model_is_given_once_however_it_is_written(place, capfd):
    words = ("--model", place / "one", "--model", f"{place}/one/", "--task", "perplexity")
    with pytest.raises(SystemExit):
        run_command(*words, "--data", place / "texts.jsonl")
    assert "the same model is given twice" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("section", "expected"),
    [
        ({"tasks": []}, "evaluation.tasks: got [], expected a list such as"),
        ({"tasks": [{"task": "squad"}]}, "its keys are task, data, limit"),
        ({"tasks": [{"task": "squad", "data": "x", "limit": 0}]}, "its limit is 0"),
        ({"tasks": [{"task": "sqad", "data": "{rows}"}]}, "did you mean squad?"),
        ({"tasks": [{"task": "squad", "data": "no.jsonl"}]}, "no such file: no.jsonl"),
        ({"tasks": [{"task": "no.yaml", "data": "{rows}"}]}, "tasks[0]: no.yaml: cannot be read"),
        ({"tasks": [{"task": "kl", "data": "{rows}"}]}, "kl compares with a teacher"),
        ({"tasks": [{"task": "squad", "data": "{rows}"}] * 2}, "squad is there twice"),
        (
            {"tasks": [{"task": "squad", "data": "/nonexistent"}]},
            "tasks[0].data: got '/nonexistent'",
        ),
        ({"tasks": [{"task": "hellaswag", "data": "{rows}"}]}, "expected rows with ctx, endings"),
        (
            {"tasks": [{"task": "{broken}", "data": "{rows}"}]},
            ": reference: got '{{a",
        ),
        ({"tasks": [{"task": "squad", "dta": "{rows}"}]}, "its keys are task, data, limit"),
        (
            {"tasks": [{"task": "{own}", "data": "{rows}"}]},
            "questions.jsonl', expected rows with answer, question; its first row has context",
        ),
        (
            {"tasks": [{"task": "squad", "data": "{place}/one"}]},
            "expected a directory of rows with context, question, answers; none of its files has",
        ),
        ({"every": 0}, "evaluation.every: got 0, expected an integer ≥ 1, or end"),
    ],
)
def test_a_wrong_evaluation_of_a_run_is_told_by_the_check(place, section, expected):
    from ds_kd.config.components import ConfigError
    from ds_kd.config.load import load

    (place / "broken.yaml").write_text("{kind: perplexity, reference: '{{a'}")
    (place / "other.jsonl").write_text('{"n": 1}')
    (place / "own.yaml").write_text(
        "{kind: generation, prompt: '{{q}} {{range(2)}}', columns: {q: question}, "
        "reference: answer.text}"
    )
    text = json.dumps(section).replace("{rows}", str(place / "questions.jsonl"))
    for name in ("broken", "own"):
        text = text.replace(f"{{{name}}}", str(place / f"{name}.yaml"))
    text = text.replace("{place}", str(place))
    filled = json.loads(text.replace("{other}", str(place / "other.jsonl")))
    data = {"_target_": "ds_kd.data.squad.make_squad_dataset"}
    given = {
        "model": {
            "_target_": "nemo_automodel.NeMoAutoModelForCausalLM.from_pretrained",
            "pretrained_model_name_or_path": str(place / "one"),
        },
        "dataset": {**data, "dataset_name": str(place / "questions.jsonl")},
        "kd_ratio": 0,
        "evaluation": filled,
    }
    with pytest.raises(ConfigError) as error:
        load(given)
    assert any(expected in line for line in error.value.problems), error.value.problems
    assert len(error.value.problems) == 1 or "tasks" not in section


def test_the_schema_and_the_package_know_the_same_tasks():
    from ds_kd.config import task
    from ds_kd.evaluate.tasks.builtin import BUILTIN

    assert tuple(BUILTIN) == task.BUILTIN
    assert {name: each.columns for name, each in BUILTIN.items() if each.columns} == task.COLUMNS
    assert [name for name, each in BUILTIN.items() if each.needs_teacher] == [task.WITH_TEACHER]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("kind: choice\n", "kind: got 'choice', expected multiple_choice or generation"),
        ("prompt: x\n", "kind: missing; write one of multiple_choice, generation, perplexity"),
        ("kind: generation\nprompt: x\n", "reference: missing; kind: generation needs"),
        (
            "kind: perplexity\nreference: text\nstop: ['.']\n",
            "stop: kind: perplexity does not take it",
        ),
        (
            "kind: multiple_choice\nprompt: x\nchoices: [yes, no]\nreference: ctx\n",
            "choices[0]: got True, expected text; put it in quotes",
        ),
        ("kind: perplexity\nreference: '{{ctx'\n", "reference: got '{{ctx', expected a column's"),
        ("kind: perplexity\nreference: '{{text}}'\n", "no column text; found"),
        ("kind: generation\nprompt: x\nreference: ctx\nregex: '('\n", "regex: '(' is no regular"),
        (
            "kind: generation\nprompt: x\nreference: ctx\nregex: 'a{e}'\n",
            "regex: '{e}' in 'a{e}'",
        ),
        ("kind: perplexity\nrefernce: ctx\n", "refernce: unknown key; did you mean reference?"),
        (
            "kind: multiple_choice\nprompt: x\nchoices: endings\nreference: ctx\n",
            "choices.jsonl', line 1: reference is",
        ),
    ],
)
def test_a_wrong_task_is_told_with_its_key(place, capfd, text, expected):
    task = place / "wrong.yaml"
    task.write_text(text)
    words = ("--model", place / "one", "--task", task, "--data", place / "choices.jsonl")
    assert run_command(*words) == 2
    told = capfd.readouterr().err
    assert expected in told and "Traceback" not in told, told
