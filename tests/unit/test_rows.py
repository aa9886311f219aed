"""Rows in files as people bring them: several, by pattern, compressed, mixed; and what is told."""

from __future__ import annotations

import contextlib
import gzip
import json
import time
from pathlib import Path

import pytest
import torch
import yaml

from ds_kd.config.checks.data import check_data
from ds_kd.config.components import ConfigError
from ds_kd.config.load import load
from ds_kd.data.chat import ChatDataset
from ds_kd.data.mixture import make_mixture
from ds_kd.data.rows.detect import known_data_sets
from ds_kd.data.rows.frames import is_cut_off
from ds_kd.data.rows.source import load_rows
from ds_kd.data.rows.tables import open_table, read_table
from ds_kd.data.squad import make_squad_dataset
from ds_kd.data.text import make_instruction_dataset, make_sharegpt_dataset
from ds_kd.parallel.world import World
from ds_kd.recipe.data import build_samples, hold_out
from tests import tiny
from tests.unit.test_data import TEMPLATE, make_tokenizer, write
from tests.unit.test_supervised import byte_level_bpe

GUIDE = Path(__file__).parents[2] / "ds_configs" / "runs" / "llama3_2_1b_kd.yaml"
PAIRS = [{"prompt": "what", "completion": name} for name in ("it", "is", "Paris")]
TWICE = TEMPLATE.replace("m.content", "m.content + ' ' + m.content")  # another template
TEXT = {each.name.rpartition(".")[2]: each for each in known_data_sets()}


LATIN = '{"prompt": "a", "completion": "é"}\n'.encode("latin-1")


def lines(rows: list[dict]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def wrong(path: Path | str, name: str = "make_instruction_dataset", **arguments) -> str:
    """Return what the check of a config tells of a file."""
    data = TEXT[name]
    return check_data("dataset", data, {data.source: str(path), **arguments}) or ""


@pytest.mark.parametrize("name", ["", "rows.jsn", "tickets.txt", "data/tickets", "rows.jsonl.xz"])
def test_a_mistyped_path_that_could_be_a_hub_id_is_told_at_once(name):
    section = {"_target_": "ds_kd.data.text.make_text_dataset", "dataset_name": name}
    with pytest.raises(ConfigError, match=r"dataset.dataset_name: .*a directory, or a hub id"):
        load(GUIDE, [f"dataset={json.dumps(section)}"])


@pytest.mark.parametrize("name", ["rajpurkar/squad", "HuggingFaceH4/ultrachat_200k", "o/v1.5"])
def test_hub_ids_are_left_to_the_hub(name):
    section = {"_target_": "ds_kd.data.text.make_text_dataset", "dataset_name": name}
    load(GUIDE, [f"dataset={json.dumps(section)}"])


def test_a_section_without_a_target_names_the_data_set_that_its_columns_tell(tmp_path):
    section = {"dataset_name": write(tmp_path / "r.jsonl", PAIRS)}
    with pytest.raises(ConfigError, match=r"are read by ds_kd.data.text.make_instruction_dataset"):
        load(GUIDE, [f"dataset={json.dumps(section)}"])


def test_plain_text_is_told_the_form_of_its_rows():
    assert 'a .jsonl file of {"text": …} lines' in wrong("notes.txt", "make_text_dataset")


def test_a_directory_without_rows_of_these_columns_is_told(tmp_path):
    (tmp_path / "sub").mkdir()
    assert "expected a directory of rows with prompt, completion" in wrong(tmp_path)
    (tmp_path / "sub" / "info.json").write_text('{"n": 1}')
    (tmp_path / "sub" / "settings.xml").write_text("<a/>")
    (tmp_path / "sub" / "notes.txt").write_text("prompt, completion")
    assert "none of its files has them" in wrong(tmp_path)
    assert not wrong(tmp_path, "make_text_dataset")  # a text file is read as rows of `text`
    write(tmp_path / "sub" / "train.jsonl", PAIRS)
    assert not wrong(tmp_path)


def test_conversations_for_a_model_without_a_template_are_told_by_the_check(tmp_path):
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    rows = write(tmp_path / "talk.jsonl", [{"messages": talk}])
    model = tmp_path / "model"
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(model)
    tiny.weightless(model)
    chat = f"{{_target_: ds_kd.data.chat.ChatDataset, path_or_dataset_id: {rows}}}"
    mixed = f"{{_target_: ds_kd.data.mixture.make_mixture, sources: [{{dataset_name: {rows}}}]}}"
    names = [f"{name}.pretrained_model_name_or_path={model}" for name in ("model", "teacher_model")]
    for section, key in ((chat, "dataset"), (mixed, r"dataset.sources\[0\]")):
        with pytest.raises(
            ConfigError, match=rf"{key}.chat_template: missing, as the tokenizer of"
        ):
            load(GUIDE, [*names, f"dataset={section}"])
    # The training set's template is also that of data to validate with, and not the reverse.
    both = [*names, f"dataset={chat}", f"validation_dataset={chat}"]
    load(GUIDE, [*both, "dataset.chat_template='{{ messages }}'"])
    with pytest.raises(ConfigError, match=r"- .*dataset.chat_template: missing, as"):
        load(GUIDE, [*both, "validation_dataset.chat_template='{{ messages }}'"])
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(model)
    load(GUIDE, [*names, f"dataset={chat}"])


# ---- several files


def test_a_list_and_a_pattern_of_files_are_read_in_their_order(tmp_path):
    for name, row in zip(("a", "b", "c"), PAIRS, strict=True):
        write(tmp_path / f"{name}.jsonl", [row])
    paths = [str(tmp_path / f"{name}.jsonl") for name in "cab"]
    assert load_rows(paths, "train", ())["completion"][:] == ["Paris", "it", "is"]
    assert load_rows(f"{tmp_path}/*.jsonl", "train", ())["completion"][:] == ["it", "is", "Paris"]
    assert load_rows(f"{tmp_path}/*.jsonl", "train[1:]", ())["completion"][:] == ["is", "Paris"]


def test_a_bad_row_of_several_files_is_told_with_its_own_file(tmp_path):
    write(tmp_path / "a.jsonl", PAIRS)
    write(tmp_path / "b.jsonl", [PAIRS[0], {"prompt": "w", "completion": None}])
    with pytest.raises(ValueError, match=r"b.jsonl', line 2: completion is None"):
        make_instruction_dataset(f"{tmp_path}/*.jsonl", byte_level_bpe())


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("{}/*.txt", "no file matches"),
        (["{}/a.jsonl", "{}/a.jsonl"], "a.jsonl is named twice"),
        (["{}/*.jsonl", "{}/./a.jsonl"], "a.jsonl is named twice"),
        (["{}/a.jsonl", "{}/c.csv"], "several formats"),
        (["{}/a.jsonl", "{}/none.jsonl"], "no such file: .*none.jsonl"),
        ("{}/*", "read.me is not a .json"),
        ("x" * 5000 + ".jsonl", "name too long"),
        ([], r"it is \[\], expected a file"),
        (5, "it is 5, expected a file"),
    ],
)
def test_files_that_cannot_be_read_together_are_told(tmp_path, source, said):
    write(tmp_path / "a.jsonl", PAIRS)
    (tmp_path / "c.csv").write_text("prompt,completion\na,b\n")
    (tmp_path / "read.me").write_text("")
    fill = lambda name: name.format(tmp_path) if isinstance(name, str) else name  # noqa: E731
    source = [fill(name) for name in source] if isinstance(source, list) else fill(source)
    with pytest.raises(ValueError, match=rf"(?i:{said})"):
        load_rows(source, "train", ())
    section = {"_target_": "ds_kd.data.text.make_instruction_dataset", "dataset_name": source}
    with pytest.raises(ConfigError, match=rf"dataset.dataset_name: .*(?i:{said})"):
        load(GUIDE, [f"dataset={json.dumps(section)}"])


# ---- as programs write them


def test_compressed_rows_and_those_with_a_mark_at_the_start_are_read(tmp_path):
    import zstandard

    content = lines(PAIRS).encode()
    (tmp_path / "g.jsonl.gz").write_bytes(gzip.compress(content))
    (tmp_path / "z.jsonl.zst").write_bytes(zstandard.compress(content))
    (tmp_path / "b.jsonl").write_bytes(b"\xef\xbb\xbf" + content.replace(b"\n", b"\r\n"))
    for path in tmp_path.iterdir():
        assert wrong(path) == ""
        assert len(make_instruction_dataset(str(path), byte_level_bpe())) == 3
    (tmp_path / "g.jsonl.gz").write_bytes(content)
    (tmp_path / "z.jsonl.zst").write_bytes(content)
    for name in ("g.jsonl.gz", "z.jsonl.zst"):
        assert "not compressed as its name says" in wrong(tmp_path / name)


def test_a_compressed_file_that_was_cut_off_is_told_wherever_that_was(tmp_path):
    import zstandard

    half = lines(PAIRS).encode()
    packed = [zstandard.ZstdCompressor(write_checksum=sums).compress(half) for sums in (0, 1)]
    skipped = (0x184D2A53).to_bytes(4, "little") + (5).to_bytes(4, "little") + b"other"
    whole = skipped + packed[0] + packed[1] + zstandard.compress(b"\n" * 300_000)
    path = tmp_path / "z.jsonl.zst"
    path.write_bytes(whole)
    assert wrong(path) == "" and not is_cut_off(path)
    ends = {len(skipped), len(skipped) + len(packed[0]), len(skipped + packed[0] + packed[1])}
    for length in {*range(5, len(whole))} - ends:  # between frames a file may end
        path.write_bytes(whole[:length])
        with contextlib.suppress(zstandard.ZstdError):  # not even the header of a frame is whole
            assert is_cut_off(path), length
    path.write_bytes(whole[:-1])
    assert "its end is missing" in wrong(path)
    path.write_bytes(zstandard.compress(half[:-9]) + zstandard.compress(half[-9:]))
    assert wrong(path) == ""  # a row that two frames share
    path.write_bytes(whole)
    path.with_suffix(".gz").write_bytes(gzip.compress(half)[:-9])
    assert "Compressed file ended before" in wrong(path.with_suffix(".gz"))


def test_all_columns_of_csv_are_text_numbers_and_empty_cells_too(tmp_path):
    path = tmp_path / "c.csv"
    path.write_text('prompt,completion\n"what, then",1969\n"two\nlines",NA\n')
    assert wrong(path) == ""
    rows = load_rows(str(path), "train", ("prompt",))
    assert rows["completion"][:] == ["1969", "NA"] and rows["prompt"][1] == "two\nlines"
    (tmp_path / "t.tsv").write_text("prompt\tcompletion\na\tb\n")
    assert load_rows(str(tmp_path / "t.tsv"), "train", ())["completion"][:] == ["b"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"prompt": "a", "prompt": "b", "completion": "c"}\n', "the key prompt stands twice"),
        (lines(PAIRS[:2]) + '{"prompt": "a",\n', "line 3: not JSON"),
        (lines(PAIRS[:2]) + "[1]\n", "line 3 is list"),
        (lines(PAIRS[:2]).encode("utf-16"), "UTF-16; save it as UTF-8"),
        (lines(PAIRS).encode() + LATIN, "byte 0xe9 is not of UTF-8"),
    ],
)
def test_the_check_tells_the_faults_of_a_files_text(tmp_path, content, said):
    path = tmp_path / "r.jsonl"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert said in wrong(path)


def test_a_byte_of_another_encoding_is_told_with_its_line(tmp_path):
    (tmp_path / "r.jsonl").write_bytes(lines(PAIRS * 20).encode() + LATIN)
    with pytest.raises(ValueError, match=r"r.jsonl', line 61: byte 0xe9 is not of UTF-8"):
        make_instruction_dataset(str(tmp_path / "r.jsonl"), byte_level_bpe())


def test_a_column_that_stands_twice_in_csv_is_refused(tmp_path):
    (tmp_path / "c.csv").write_text("prompt,prompt,completion\na,b,c\n")
    assert "the column prompt stands twice" in wrong(tmp_path / "c.csv")
    with pytest.raises(ValueError, match="the column prompt stands twice"):
        load_rows(str(tmp_path / "c.csv"), "train", ())


@pytest.mark.parametrize("ending", ["tsv", "csv", "tsv.gz", "csv.zst"])
@pytest.mark.parametrize(
    ("rows", "line", "said"),
    [
        # The second mark closes the cell that the first opens: three rows were one.
        (["a{}b", '"five inches{}b', "c{}d", 'e{}"f'], 3, 'more text follows the " that closes it'),
        (["a{}b", "c{}d", '"e{}f', "g{}h"], 4, "which nothing closes"),
        (['"She" said so.{}b'], 2, "more text follows"),  # the marks were left out
    ],
)
def test_quotes_that_do_not_pair_up_are_refused_with_their_line(tmp_path, ending, rows, line, said):
    import zstandard

    sign = "\t" if "tsv" in ending else ","
    text = "\n".join(row.format(sign) for row in ["prompt{}completion", *rows]) + "\n"
    pack = {"gz": gzip.compress, "zst": zstandard.compress}.get(ending[-3:].strip("."), bytes)
    path = tmp_path / f"r.{ending}"
    path.write_bytes(pack(text.encode()))
    with pytest.raises(ValueError, match=f"r.{ending}', split 'train': line {line}: ") as caught:
        load_rows(str(path), "train", ())
    assert said in str(caught.value) and "save the rows as .jsonl" in str(caught.value)
    assert f"line {line}: a cell opens with" in wrong(path)  # and by --check


def test_quotes_that_do_not_pair_up_far_down_a_large_file_are_refused(tmp_path):
    """Where the check, which looks at its beginning, finds nothing."""
    path = tmp_path / "large.tsv"
    row = f"{'p' * 497}\tc\n"
    path.write_text("prompt\tcompletion\n" + row * 10_000 + '"p\tc\n' * 2)
    assert wrong(path) == ""
    with pytest.raises(ValueError, match="line 10002: a cell opens"):
        load_rows(str(path), "train", ())


def test_quotes_in_their_places_are_read(tmp_path):
    path = tmp_path / "r.tsv"
    cells = ['5" and 6"', '"a ""b"" \n\tc"', '""', "it's", '""""']
    path.write_text("prompt\tcompletion\n" + "".join(f"{cell}\tx\n" for cell in cells))
    assert wrong(path) == ""
    found = load_rows(str(path), "train", ())["prompt"][:]
    assert found == ['5" and 6"', 'a "b" \n\tc', "", "it's", '"']


def test_a_header_with_a_quote_that_nothing_closes_is_refused(tmp_path):
    (tmp_path / "r.csv").write_text('"prompt,completion\na,b\n')
    assert "line 1: a cell opens with" in wrong(tmp_path / "r.csv")
    with pytest.raises(ValueError, match="line 1: a cell opens with"):
        load_rows(str(tmp_path / "r.csv"), "train", ())


def test_a_very_long_first_row_and_an_ending_in_capitals_are_read(tmp_path):
    write(tmp_path / "R.JSONL", [{"prompt": "p" * 5_000_000, "completion": "c"}])
    assert wrong(tmp_path / "R.JSONL") == ""
    assert len(load_rows(str(tmp_path / "R.JSONL"), "train", ("prompt",))) == 1


def test_a_line_that_cannot_be_read_is_told_with_its_number(tmp_path):
    path = tmp_path / "r.jsonl"
    path.write_text(lines(PAIRS * 10) + '{"prompt": "a" "completion": 1}\n')
    with pytest.raises(ValueError, match=r"line 31: not JSON: Expecting ',' delimiter"):
        load_rows(str(path), "train", ())


def test_rows_anywhere_in_a_large_file_are_looked_at_within_a_second(tmp_path):
    path, row = tmp_path / "large.jsonl", {"prompt": "p" * 2000, "completion": "c"}
    with path.open("w") as file:
        block = lines([row] * 1000)
        for _ in range(10):
            file.write(block)
        file.write(lines([{**row, "completion": 5}] * 10_000))  # one half is wrong
    started = time.process_time()
    assert "line 1" in (told := wrong(path)) and "completion is 5, expected text" in told
    assert 10_000 < int(told.rpartition("line ")[2].partition(":")[0]) <= 20_000
    assert time.process_time() - started < 1
    assert wrong(path, split="train[:100]") == wrong(path, limit_dataset_samples=100) == ""


@pytest.mark.parametrize("ending", ["jsonl", "json", "csv", "jsonl.gz", "jsonl.zst", "large.csv"])
@pytest.mark.parametrize("wrong_row", [16, 30, 60])
def test_every_row_of_a_small_file_is_looked_at_and_told_as_the_run_tells_it(
    tmp_path, ending, wrong_row
):
    import zstandard

    rows = [{"prompt": "two\nlines" if k % 2 else "p", "completion": "c"} for k in range(64)]
    line = wrong_row + 1
    if ending.endswith("csv"):  # a row with a line break takes two lines; the header comes first
        cells = [f'"{row["prompt"]}",c' for row in rows]
        cells[wrong_row] = "p,c,d"
        text, line = "\n".join(["prompt,completion", *cells]), 2 + wrong_row + wrong_row // 2
        if ending == "large.csv":  # its end, which may have been cut, is not judged
            text += "\n" + "p,c\n" * 1_100_000
    else:
        rows[wrong_row] = {"prompt": "p", "completion": None}
        text = lines(rows) if "jsonl" in ending else json.dumps(rows, indent=0)
        line = line if "jsonl" in ending else 2 + 4 * wrong_row
    pack = {"gz": gzip.compress, "zst": zstandard.compress}.get(ending[-3:].strip("."), bytes)
    path = tmp_path / f"r.{ending}"
    path.write_bytes(pack(text.encode()))
    said = "has more cells" if "csv" in ending else "is None, expected text"
    assert f"line {line}" in wrong(path) and said in wrong(path)
    if "csv" not in ending and wrong_row == 30:
        with pytest.raises(ValueError, match=rf"r.{ending}', line {line}: completion is "):
            make_instruction_dataset(str(path), byte_level_bpe())


def test_invalid_json_in_the_middle_of_a_small_file_is_told_with_its_line(tmp_path):
    path, good = tmp_path / "r.jsonl", lines(PAIRS * 10)
    path.write_text("\n" + good + '{"prompt": \n' + good)
    assert "line 32: not JSON: Expecting value (character 12 of it)" in wrong(path)
    path.write_text(lines(PAIRS[:1]) + "{oops}\n" + good * 5000)  # above 4 MiB
    assert "line 2: not JSON" in wrong(path)
    array = json.dumps(PAIRS * 10, indent=0)[:-2] + ",\n{oops}\n]"
    (tmp_path / "a.json").write_text(array)
    assert "line 122: not JSON" in wrong(tmp_path / "a.json")
    with pytest.raises(ValueError, match="line 122: not JSON"):
        load_rows(str(tmp_path / "a.json"), "train", ())


def test_a_row_of_parquet_that_cannot_be_learnt_from_is_told(tmp_path):
    import datasets

    path = tmp_path / "r.parquet"
    datasets.Dataset.from_list([*PAIRS, {"prompt": "a", "completion": None}]).to_parquet(path)
    assert "row 3: completion is None, expected text" in wrong(path)


def test_a_label_that_is_no_whole_number_names_no_ending(tmp_path):
    row = {"ctx": "a man", "endings": ["x", "walks."], "label": 1.7}
    path = write(tmp_path / "h.jsonl", [row])
    assert "label 1.7 names none of 2 endings" in wrong(path, "HellaSwag")


def test_a_row_without_a_name_of_its_own_is_called_by_its_number(tmp_path):
    path = write(tmp_path / "r.jsonl", [{**PAIRS[0], "id": None}, {**PAIRS[1], "id": "x"}])
    assert make_instruction_dataset(path, byte_level_bpe())["sample_id"][:] == ["0", "x"]


# ---- conversations


def test_an_empty_turn_teaches_nothing_and_a_system_column_begins_the_conversation(tmp_path):
    tokenizer = make_tokenizer(TEMPLATE)
    talk = [{"from": "human", "value": "a"}, {"from": "gpt", "value": " "}]
    talk += [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    row = {"conversations": json.dumps(talk), "system": "c"}
    data = make_sharegpt_dataset(write(tmp_path / "s.jsonl", [row]), tokenizer)
    assert tokenizer.decode(data[0]["input_ids"]).startswith("<system> c <eos> <user> a <eos>")
    learnt = [label for label in data[0]["labels"] if label != -100]
    assert tokenizer.decode(learnt) == "<assistant> b <eos>"


def test_a_role_in_capitals_is_told_with_its_spelling(tmp_path):
    talk = [{"role": "User", "content": "a"}, {"role": "assistant", "content": "b"}]
    path = write(tmp_path / "c.jsonl", [{"messages": talk}])
    assert "role is 'User'" in (told := wrong(path, "ChatDataset")) and "write user" in told


# ---- a share held out, mixtures


def test_a_share_is_held_out_by_the_seed_alone_and_nothing_lost():
    samples = [{"input_ids": [k]} for k in range(40)]
    training, held_out = hold_out(samples, 0.1, 7)
    ids = [[s["input_ids"][0] for s in part] for part in (training, held_out)]
    assert len(ids[1]) == 4 and sorted(ids[0] + ids[1]) == [*range(40)]
    assert ids[0] == sorted(ids[0]) and ids[1] != [36, 37, 38, 39]
    import datasets

    rows = datasets.Dataset.from_list(samples)
    assert [part["input_ids"][:] for part in hold_out(rows, 0.1, 7)] == [
        [[k] for k in part] for part in ids
    ]
    assert [s["input_ids"][0] for s in hold_out(samples, 0.1, 8)[1]] != ids[1]
    for share in (0.01, 0.5, 0.99):  # neither part is ever empty
        assert [len(part) for part in hold_out(samples[:2], share, 0)] == [1, 1]
    with pytest.raises(ValueError, match="none would be left"):
        hold_out(samples[:1], 0.5, 0)


@pytest.fixture
def sources(tmp_path):
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    squad = {"context": "a", "question": "b", "answers": {"text": ["c"]}}
    return [
        {"dataset_name": write(tmp_path / "pairs.jsonl", PAIRS * 20)},
        {"dataset_name": write(tmp_path / "chat.jsonl", [{"messages": talk}] * 20)},
        {"_target_": "ds_kd.data.squad.make_squad_dataset", "padding": "max_length",
         "seq_length": 64, "dataset_name": write(tmp_path / "squad.jsonl", [squad] * 20)},
    ]  # fmt: skip


def test_the_chat_template_of_one_source_does_not_reach_the_others(sources):
    chat, squad = ({**part} for part in sources[1:])
    chat["chat_template"] = TEMPLATE
    tokenizer = make_tokenizer()
    made = [make_mixture(tokenizer, order) for order in ([chat, squad], [squad, chat])]
    by_kind = [[made[k]["input_ids"][n] for n in at] for k, at in enumerate(((0, 20), (20, 0)))]
    assert by_kind[0] == by_kind[1] and tokenizer.chat_template is None


def test_the_training_sets_chat_template_is_the_students_and_the_default_of_validation(sources):
    chat = {"path_or_dataset_id": sources[1]["dataset_name"]}
    mixture = {"_target_": "ds_kd.data.mixture.make_mixture",
               "sources": [sources[2], {"dataset_name": sources[1]["dataset_name"],
                                        "chat_template": TEMPLATE}]}  # fmt: skip
    other = {"_target_": "ds_kd.data.chat.ChatDataset", **chat, "chat_template": TWICE}
    same = {"_target_": "ds_kd.data.chat.ChatDataset", **chat}
    for training in ({**same, "chat_template": TEMPLATE}, mixture):
        data = {"dataset": training, "validation_dataset": {"a": other, "b": same}}
        cfg = load({**yaml.safe_load(GUIDE.read_text()), **data})
        tokenizer = make_tokenizer()
        _, held_out = build_samples(cfg, tokenizer, World(0, 1, torch.device("cpu"), "gloo"))
        assert tokenizer.chat_template == TEMPLATE
        own = ChatDataset(chat["path_or_dataset_id"], make_tokenizer(TEMPLATE))
        assert held_out["b"][0]["input_ids"] == own[0]["input_ids"]
        assert held_out["a"][0]["input_ids"] != own[0]["input_ids"]


def test_a_mixture_holds_every_sample_once_or_draws_by_weight(sources):
    tokenizer = make_tokenizer(TEMPLATE)
    whole = make_mixture(tokenizer, sources)
    assert len(whole) == 100 and len({*whole["sample_id"][:]}) == 100
    assert whole["num_tokens"][0] == len(whole["input_ids"][0])
    weighted = [{**part, "weight": weight} for part, weight in zip(sources, (2, 1, 1), strict=True)]
    mixed = make_mixture(tokenizer, weighted, seed=3)
    drawn = [name.partition(":")[0] for name in mixed["sample_id"][:]]
    # One of the shorter two gives out; about half of all is the first's.
    assert (
        20 in (drawn.count("1"), drawn.count("2")) and 0.35 < drawn.count("0") / len(drawn) < 0.65
    )
    assert make_mixture(tokenizer, weighted, seed=3)["sample_id"][:] == mixed["sample_id"][:]
    assert make_mixture(tokenizer, weighted, seed=4)["sample_id"][:] != mixed["sample_id"][:]
    longest = make_mixture(tokenizer, weighted, stopping_strategy="all_exhausted")
    assert len({*longest["sample_id"][:]}) == 100 < len(longest)
    assert len(make_mixture(tokenizer, sources, limit_dataset_samples=7)) == 7
    squad = make_squad_dataset(tokenizer, dataset_name=sources[2]["dataset_name"])
    assert whole["labels"][80][: len(squad[0]["labels"])] == squad[0]["labels"]


def test_no_share_is_held_out_of_a_mixture_whose_samples_repeat(sources):
    def read(strategy, *parts):
        section = {"_target_": "ds_kd.data.mixture.make_mixture", "sources": parts}
        section["stopping_strategy"] = strategy
        overrides = [f"dataset={json.dumps(section)}", "validation_dataset=null"]
        return load(GUIDE, [*overrides, "validation_share=0.1"])

    weighted = [{**part, "weight": 1} for part in sources]
    with pytest.raises(ConfigError, match=r"validation_share: .*all_exhausted repeats samples"):
        read("all_exhausted", *weighted)
    assert read("first_exhausted", *weighted).validation_share == 0.1
    assert read("all_exhausted", *sources).validation_share == 0.1  # without weights each is once


def test_the_parts_of_a_mixture_are_checked_like_sections(sources, tmp_path):
    def told(*parts):
        section = {"_target_": "ds_kd.data.mixture.make_mixture", "sources": parts}
        with pytest.raises(ConfigError) as error:
            load(GUIDE, [f"dataset={json.dumps(section)}"])
        return str(error.value)

    assert "dataset.sources[0].trunkation: unknown key; did you mean" in told(
        {**sources[0], "trunkation": True}
    )
    said = told({**sources[0], "wieght": 3})
    assert "sources[0].wieght: unknown key; did you mean dataset.sources[0].weight?" in said
    said = told({**sources[0], "qqq": 3})
    assert "dataset_name" in said and "weight" in said
    bad = write(tmp_path / "bad.jsonl", [{"prompt": "a", "completion": None}])
    assert "dataset.sources[1].dataset_name: got" in (
        said := told(sources[0], {"dataset_name": bad})
    )
    assert "line 1: completion is None" in said
    assert "weight is 0, expected a number > 0" in told({**sources[0], "weight": 0})
    assert "every source a weight, or none" in told({**sources[0], "weight": 1}, sources[1])
    assert "a mixture is made of" in told({"_target_": "ds_kd.data.own.OwnSamples"})
    assert "a mixture is made of" in told({"_target_": ["list"]})
    assert "give _target_, or dataset_name" in told({"dataset_name": "owner/name"})
    assert "a list of mappings" in told()
    nemo = "nemo_automodel.components.datasets.llm.squad.make_squad_dataset"
    parts = [sources[0], {**sources[2], "_target_": nemo}]
    section = {"_target_": "ds_kd.data.mixture.make_mixture", "sources": parts}
    loaded = load(GUIDE, [f"dataset={json.dumps(section)}"]).dataset.kwargs["sources"]
    assert loaded[0]["path_or_dataset_id"] == sources[0]["dataset_name"]
    assert loaded[1]["_target_"] == "ds_kd.data.squad.make_squad_dataset"


def test_rows_before_one_that_is_cut_inside_a_cell_are_read():
    text = 'a,b\n1,2\n3,"a long tex'
    assert [*read_table(open_table(text, ","), False, 1, 5)] == [("line 2", {"a": "1", "b": "2"})]
    with pytest.raises(ValueError, match='line 3: a cell opens with "'):
        [*read_table(open_table(text, ","), True, 1, 5)]
