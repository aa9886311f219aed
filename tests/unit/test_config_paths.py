"""Hub ids and paths, packages and streams: told before anything is loaded or a network asked."""

from __future__ import annotations

import json
import subprocess
import sys
import traceback
from pathlib import Path

import pytest
import yaml
from transformers import AutoTokenizer

import ds_kd
from ds_kd.config.checks.files import find_missing_package
from ds_kd.config.checks.tokenizers import find_other_tokenizer
from ds_kd.config.components import Component, ConfigError, config_error
from ds_kd.data.own import DataError, OwnSamples
from ds_kd.models.causal_lm import common_vocab_size
from tests import tiny

GUIDE = Path(__file__).parents[2] / "ds_configs" / "runs" / "llama3_2_1b_kd.yaml"
KEY = "model.pretrained_model_name_or_path"


@pytest.mark.parametrize(
    "name",
    ["quickstart/studnet", "quickstrat/student", "studnt", "models/mine", "outputs/final",
     "student/", "my models/x", "a//b", "-x/y", "quickstart/" + "a" * 200],
)  # fmt: skip
def test_a_mistyped_path_is_told_without_asking_the_hub(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path in ("quickstart/student", "student"):
        (tmp_path / path).mkdir(parents=True)
    if name == "student/":
        (tmp_path / "student").rmdir()
    with pytest.raises(ConfigError, match=f"{KEY}: .*a directory that exists, or a hub id"):
        ds_kd.load_config(GUIDE, [f"{KEY}={name}"])


def test_a_hub_id_whose_owner_is_a_directory_here_is_noted(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "Qwen" / "Qwen3-1.7B").mkdir(parents=True)
    notes = ds_kd.load_config(GUIDE, [f"{KEY}=Qwen/Qwen3-0.6B"]).notes
    assert any("the directory Qwen holds no Qwen3-0.6B; the hub is asked" in note for note in notes)
    assert not [n for n in ds_kd.load_config(GUIDE, [f"{KEY}=gpt2"]).notes if "the hub" in n]


def test_attention_without_its_package_is_told_by_its_own_key(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    told = find_missing_package("model", {"attn_implementation": "flash_attention_2"})
    assert told is not None
    assert told.startswith("model.attn_implementation: ") and "flash_attn" in told
    assert find_missing_package("model", {"attn_implementation": "sdpa"}) is None


def test_a_stream_of_rows_is_refused_by_name():
    with pytest.raises(ConfigError, match=r"dataset\.streaming: rows are drawn") as caught:
        ds_kd.load_config(GUIDE, ["dataset.streaming=true"])
    assert len(caught.value.problems) == 1


def stream(tokenizer):
    import datasets

    return datasets.Dataset.from_dict({"input_ids": [[1]]}).to_iterable_dataset()


def test_a_data_set_that_gives_a_stream_is_refused_by_name():
    with pytest.raises(DataError, match=r"no length .* does not stream"):
        OwnSamples(stream(None), vocab_size=8)


def test_a_mapping_is_a_config_as_its_file_is():
    content = yaml.safe_load(GUIDE.read_text())
    cfg, same = ds_kd.load_config(content, ["kd_ratio=0.25"]), ds_kd.load_config(GUIDE)
    assert cfg.kd_ratio == 0.25 and cfg.optimizer == same.optimizer and cfg.dataset == same.dataset
    with pytest.raises(ConfigError, match="- kd_ratio: got 2"):
        ds_kd.load_config({**content, "kd_ratio": 2})
    with pytest.raises(ConfigError):
        ds_kd.load_config({**content, "recipe": object()})
    assert content == yaml.safe_load(GUIDE.read_text())  # nothing of it is changed


def test_a_wrong_key_is_told_once_in_a_traceback_too():
    with pytest.raises(ConfigError) as caught:
        ds_kd.load_config(GUIDE, ["kd_ratio=2"])
    assert "".join(traceback.format_exception(caught.value)).count("kd_ratio: got 2") == 1


def tokenizer_files(path: Path, words: list[str]) -> Path:
    tiny.tokenizer(path, words=["<unk>", "<eos>", "<pad>", *words])
    tiny.weightless(path)
    return path


def test_two_tokenizers_that_differ_are_told_by_the_check_in_the_words_of_the_run(tmp_path):
    student = tokenizer_files(tmp_path / "s", ["a", "b", "c"])
    teacher = tokenizer_files(tmp_path / "t", ["a", "c", "b"])
    teacher_key = KEY.replace("model.", "teacher_model.")
    models = [f"{KEY}={student}", f"{teacher_key}={teacher}"]
    with pytest.raises(ConfigError) as caught:
        ds_kd.load_config(GUIDE, models)
    with (
        pytest.raises(ConfigError) as by_run,
        config_error("teacher_model", str(teacher), "a teacher with the student's tokenizer"),
    ):
        tokenizers = [AutoTokenizer.from_pretrained(path) for path in (student, teacher)]
        common_vocab_size(*tokenizers, 6, 6)
    (told,) = caught.value.problems
    assert by_run.value.problems[0] in told and "token 'b' is 4 for the student" in told
    with pytest.raises(ConfigError, match=r"or step_scheduler\.validate_teacher: false"):
        ds_kd.load_config(GUIDE, [*models, "kd_ratio=0"])
    ds_kd.load_config(GUIDE, [*models, "kd_ratio=0", "step_scheduler.validate_teacher=false"])


def test_a_base_shared_with_the_student_needs_an_adapter_and_no_teacher_model():
    with pytest.raises(ConfigError) as caught:
        ds_kd.load_config(GUIDE, ["teacher.kind=shared_base"])
    told = "\n".join(caught.value.problems)
    assert "teacher_model: teacher.kind is shared_base" in told and "remove one of them" in told
    assert "teacher.kind: got shared_base, which needs an adapter" in told
    cfg = ds_kd.load_config(
        GUIDE, ["teacher.kind=shared_base", "teacher_model=null", "peft={match_all_linear: true}"]
    )
    assert cfg.asks_teacher and not cfg.loads_teacher


def test_a_frozen_adapter_of_the_teacher_is_checked_before_a_run(tmp_path):
    words = ["teacher_model=null", "peft={match_all_linear: true}", f"teacher.adapter={tmp_path}"]

    def told_of(*more):
        with pytest.raises(ConfigError) as caught:
            ds_kd.load_config(GUIDE, [*words, "teacher.kind=shared_base", *more])
        return "\n".join(caught.value.problems)

    with pytest.raises(
        ConfigError, match=r"teacher\.adapter: .*expected teacher\.kind: shared_base"
    ):
        ds_kd.load_config(GUIDE, words)
    assert "it has no adapter_config.json; checkpoints of a run with peft hold one" in told_of()
    (tmp_path / "adapter_model.safetensors").touch()
    for content, told in [
        ("{", "its adapter_config.json cannot be read"),
        ("[]", "holds list, not a mapping"),
        ('{"peft_type": "LOHA"}', "is of type LOHA, not LORA"),
        ('{"peft_type": "LORA", "bias": "all"}', "weights beside those of LoRA"),
    ]:
        (tmp_path / "adapter_config.json").write_text(content)
        assert told in told_of()
    made_for = '{"peft_type": "LORA", "base_model_name_or_path": "others/model"}'
    (tmp_path / "adapter_config.json").write_text(made_for)
    assert "no distributed.tp_size beside it" in told_of("distributed.tp_size=2")
    cfg = ds_kd.load_config(GUIDE, [*words, "teacher.kind=shared_base"])
    assert any("made for others/model, and the student starts" in note for note in cfg.notes)


@pytest.mark.parametrize("content", [None, "", "{", "[]", '{"model": {"vocab": [1]}}'])
def test_tokenizers_that_cannot_be_compared_are_left_to_the_run(content, tmp_path):
    student = tokenizer_files(tmp_path / "s", ["a", "b"])
    teacher = tokenizer_files(tmp_path / "t", ["a", "b", "c"])  # one more, in whatever file
    if content is not None:
        (teacher / "tokenizer.json").write_text(content)
    teacher_key = KEY.replace("model.", "teacher_model.")
    ds_kd.load_config(GUIDE, [f"{KEY}={student}", f"{teacher_key}={teacher}"])


def test_merges_are_passed_over_and_a_list_of_scores_is_a_vocabulary(tmp_path):
    def component(name: str, model: dict) -> Component:
        (tmp_path / name).mkdir()
        tree = {"added_tokens": [{"id": 2, "content": "<eos>"}], "model": model}
        (tmp_path / name / "tokenizer.json").write_text(json.dumps(tree))
        return Component("", {"pretrained_model_name_or_path": str(tmp_path / name)}, name)

    pairs = component("pairs", {"vocab": {"merges": 0, "a": 1}, "merges": [["a", "b"]]})
    same = component("same", {"merges": [], "vocab": {"a": 1, "merges": 0}})
    scores = component("scores", {"vocab": [["x", -1.0], ["b", -2.0]]})
    assert find_other_tokenizer(pairs, same, True) is None
    told = find_other_tokenizer(pairs, scores, True)
    assert told is not None and "token 'merges' is 0 for the student and absent for the" in told


def test_a_map_that_the_students_files_do_not_hold_is_told_by_the_check(tmp_path):
    student = tiny.llama(tmp_path / "student")
    with pytest.raises(ConfigError) as caught:
        ds_kd.load_config(GUIDE, [f"{KEY}={student}", "peft={target_modules: [qproj, v_proj]}"])
    assert "peft.target_modules: got ['qproj', 'v_proj'], expected names of" in str(caught.value)
    assert str(caught.value).endswith(
        "no linear map is called qproj; there are down_proj, gate_proj, k_proj, o_proj, q_proj, "
        "up_proj, v_proj; did you mean q_proj?"
    )
    right = "peft={target_modules: [v_proj, '*.q_proj']}"
    ds_kd.load_config(GUIDE, [f"{KEY}={student}", right])

    # Files whose names say nothing are left to the run.
    tiny.weightless(student)
    ds_kd.load_config(GUIDE, [f"{KEY}={student}", "peft={target_modules: [other]}"])


def test_importing_the_package_is_light():
    command = "import sys, ds_kd; print({'torch', 'deepspeed', 'transformers'} & set(sys.modules))"
    told = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True)
    assert told.stdout == "set()\n"
