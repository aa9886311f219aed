"""One page tells of several runs, without a network and whatever their texts hold."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest

from ds_kd.evaluate.report.charts import COLOURS
from tests.scripts import script

report = script("report")
HOSTILE = "<script>alert(1)</script> **bold** |cell| {{ 7 * 7 }}"

ENDS = {"": 0.0, "_low": -0.1, "_high": 0.2}


def make_run(directory, kd_ratio, slope):
    """Write what a run of six steps leaves, two ranks, validated before and after."""
    (directory / "tensorboard").mkdir(parents=True)
    (directory / "step_6").mkdir()
    (directory / "LATEST").symlink_to("step_6")
    config = {"kd_ratio": kd_ratio, "checkpoint": {"checkpoint_dir": str(directory)}}
    (directory / "LATEST" / "config.yaml").write_text(json.dumps(config))
    records = [{"step": 0, "val_loss": 4.0, "val_ce_loss": 4.0}]
    for step in range(1, 7):
        records.append(
            {"step": step, "train_loss": 4.0 - slope * step, "ce_loss": 4.0, "learning_rate": 0.01,
             "grad_norm": 1.0, "tokens_per_sec": 100.0, "time/step": 10.0, "memory": 1.5,
             "memory/rank_0": 1.5, "memory/rank_1": 2.5, "throughput/tflops_per_rank": 0.5}
        )  # fmt: skip
    answers = [{"prompt": HOSTILE, "reference": "r", "teacher": "t", "student": f"s{kd_ratio}"}]
    records += [{"step": 6, "val_samples": answers}]
    records += [{"step": 6, "val_loss": 4.0 - 6 * slope, "val_ce_loss": 3.5}]
    interval = {f"eval_squad/f1{end}": kd_ratio + d for end, d in ENDS.items()}
    records += [{"step": 6, "eval_own/exact_match": 0.125, **(interval if kd_ratio else {})}]
    log = "".join(json.dumps(record) + "\n" for record in records)
    (directory / "tensorboard" / "metrics.jsonl").write_text(log)
    return directory


class _Page(HTMLParser):
    """The tags of a page, and its visible text."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.words = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes

    def handle_data(self, data):
        self.words.append(data)


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    root = tmp_path_factory.mktemp("report")
    runs = [make_run(root / "one", 0.0, 0.1), make_run(root / "two", 0.5, 0.25)]
    output = root / "report.html"
    metric = {"acc": {"value": 0.25, "low": 0.2, "high": 0.3}}
    found = {
        "task": "hellaswag",
        "models": [{"model": name, "samples": 9, "rows": 9, "metrics": metric} for name in "ab"],
        "differences": [{"model": "b", "minus": "a", "metrics": metric}],
    }
    (root / "results.json").write_text(json.dumps(found))
    words = [*map(str, runs), "--evaluation", str(root / "results.json"), "-o", str(output)]
    assert report.main(words) == 0
    return output


def test_the_page_shows_results_differences_cost_and_answers(page):
    seen = _Page(page.read_text())
    text = " ".join(" ".join(seen.words).split())
    assert "4.0000 → 3.5000" in text and seen.tags.count("svg") == 5
    assert re.search(r"kd_ratio 0\.0 0\.5", text)
    assert "checkpoint_dir" not in text.split("the YAML of")[0]  # it differs always
    assert "s0.0" in text and "s0.5" in text
    for line in (
        "own, exact_match 0.1250 0.1250",
        "squad, f1 — 0.5000 [0.4000, 0.7000]",
        "hellaswag, 9 samples acc a 0.2500 [0.2000, 0.3000]",
        "b − a 0.2500 [0.2000, 0.3000]",
    ):
        assert line in text, line
    # Six steps of 10 s: a minute, 6,000 tokens; 0.5 TFLOP/s of two ranks for 60 s.
    cost = text.split("Cost")[1]
    for line in ("training, minutes 1 1", "tokens 6,000 6,000", "GiB 2.5 2.5", "ranks 0.06 0.06"):
        assert line in cost, line


def test_the_page_loads_nothing_and_runs_nothing_of_a_runs_texts(page):
    seen = _Page(page.read_text())
    assert not {"script", "link", "img", "iframe", "object"} & {*seen.tags}
    loads = [v for n, v in seen.attributes if n in ("src", "href", "xlink:href", "action")]
    assert all(value.startswith("#") for value in loads)
    assert any(HOSTILE in words for words in seen.words)


def test_a_browser_shows_the_curves_of_both_runs(page, tmp_path):
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no chromium to look at the page with")
    from PIL import Image

    picture = tmp_path / "page.png"
    subprocess.run(
        [browser, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}/me",
         "--window-size=1200,1600", f"--screenshot={picture}", page.as_uri()],
        capture_output=True, timeout=240, check=True,
    )  # fmt: skip
    shown = Image.open(picture).convert("RGB")
    colours = {colour for _, colour in shown.getcolors(maxcolors=1 << 24)}
    for colour in COLOURS[:2]:  # of the two runs
        assert tuple(bytes.fromhex(colour[1:])) in colours


def test_one_run_and_an_old_log_make_a_page_too(tmp_path):
    # The last line of a run that goes on may be half written.
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "train_loss": 2.0}\n{"step": 2, "tr')
    assert report.main([str(tmp_path), "-o", str(tmp_path / "a.html")]) == 0
    assert "none (step_scheduler.val_samples)" in (tmp_path / "a.html").read_text()


def test_runs_that_have_a_colour_again_are_dashed_in_charts_and_names(tmp_path):
    record = '{"step": 1, "train_loss": 2.0}\n{"step": 2, "train_loss": 1.0}\n'
    runs = [tmp_path / f"run {k}" for k in range(len(COLOURS) + 1)]
    for run in runs:
        run.mkdir()
        (run / "metrics.jsonl").write_text(record)
    assert report.main([*map(str, runs), "-o", str(tmp_path / "a.html")]) == 0
    text = (tmp_path / "a.html").read_text()
    assert text.count("stroke-dasharray: 2.") == 1
    # In the tables and above the curves.
    assert text.count("border-top-style:dotted") == text.count("border-top-style:solid") / 7 > 0


def test_a_directory_that_is_no_run_is_told(tmp_path, capsys):
    for name, text in {"empty": None, "blank": "", "torn": "{\n"}.items():
        (tmp_path / name).mkdir()
        if text is not None:
            (tmp_path / name / "metrics.jsonl").write_text(text)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "train_loss": 2.0}\n')
    for directory, output, told in (
        ("empty", "a.html", "no run there: no metrics.jsonl"),
        ("nowhere", "a.html", "no run there"),
        ("blank", "a.html", "nothing is logged yet"),
        ("torn", "a.html", "damaged"),
        (".", "no/such/a.html", "cannot be written (No such file or directory)"),
    ):
        assert report.main([str(tmp_path / directory), "-o", str(tmp_path / output)]) == 2
        error = capsys.readouterr().err
        assert told in error and "Traceback" not in error
    for name, told in (("none.json", "cannot be read"), ("metrics.jsonl", "holds no results")):
        words = [str(tmp_path), "-o", str(tmp_path / "a.html"), "--evaluation", tmp_path / name]
        assert report.main([*map(str, words)]) == 2
        assert told in capsys.readouterr().err


@pytest.mark.parametrize(
    ("output", "told"),
    [
        ("a.pdf", "expected a name that ends in .html"),
        ("report", "expected a name that ends in .html"),
        ("no/such/a.html", "cannot be written (No such file or directory)"),
        ("file/a.html", "is no directory"),
        ("folder.html", "it is a directory; give the name of a file"),
    ],
)
def test_an_output_that_is_no_place_for_a_page_is_told_before_the_runs_are_read(
    tmp_path, output, told, capsys, monkeypatch
):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.html").mkdir()
    # Reading takes minutes if runs are long.
    monkeypatch.setattr("ds_kd.evaluate.report.page.read_run", lambda _: pytest.fail("was read"))
    assert report.main([str(tmp_path), "-o", str(tmp_path / output)]) == 2
    error = capsys.readouterr().err
    assert f"--output {tmp_path / output}: " in error and told in error


def test_a_directory_that_lets_nobody_write_is_told_before_the_runs_are_read(
    tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr("ds_kd.evaluate.report.page.read_run", lambda _: pytest.fail("was read"))
    monkeypatch.setattr("os.access", lambda path, mode: path != tmp_path)  # as root may write
    assert report.main([str(tmp_path), "-o", str(tmp_path / "a.html")]) == 2
    assert "this user may not write there" in capsys.readouterr().err
