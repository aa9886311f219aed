"""A student that is loaded from its directory writes text, whole and piece by piece."""

from __future__ import annotations

import io
import shutil
import sys

import pytest
import torch

import ds_kd
from ds_kd.errors import UserError
from ds_kd.models.generate import StudentError, load_student
from tests import tiny
from tests.scripts import script

TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'clown' %}{{ raise_exception('no clowns') }}"
    "{% endif %}{{ m['role'] }} {{ m['content'] }} <eos> {% endfor %}"
    "{% if add_generation_prompt %}w9 {% endif %}"
)
generate = script("generate")


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return tiny.llama(tmp_path_factory.mktemp("plain") / "model")


@pytest.fixture(scope="module")
def chatty(plain, tmp_path_factory):
    """The same model with a chat template."""
    path = tmp_path_factory.mktemp("chatty") / "model"
    shutil.copytree(plain, path)
    (path / "chat_template.jinja").write_text(TEMPLATE)
    return path


def test_the_text_is_that_of_transformers_own_greedy_search(plain):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(plain)
    model = AutoModelForCausalLM.from_pretrained(plain)
    ids = tokenizer("w5 w6 w7", return_tensors="pt")["input_ids"]
    out = model.generate(input_ids=ids, max_new_tokens=12, do_sample=False)[0, 3:].tolist()
    told: list[str] = []
    reply = ds_kd.load_student(plain)("w5 w6 w7", max_new_tokens=12, on_text=told.append)
    assert reply.tokens == out and reply.is_whole == (out[-1] == 1)
    assert reply.text == tokenizer.decode(out, skip_special_tokens=True) == "".join(told)
    assert len(told) > 1


def test_pieces_wait_for_characters_that_are_not_yet_whole():
    """A byte-level tokenizer needs two tokens for é; the piece before it holds none of it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from ds_kd.models.generate import _Pieces

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({c: i for i, c in enumerate(letters)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core)
    told: list[str] = []
    pieces = _Pieces(tokenizer.decode, told.append)
    pieces.put(torch.tensor([[1, 2, 3]]))  # the prompt
    for token in tokenizer("aéb")["input_ids"]:
        pieces.put(torch.tensor([token]))
    pieces.end()
    assert told == ["a", "é", "b"]


def test_messages_and_chat_go_through_the_template_and_a_text_alone_does_not(chatty):
    student = load_student(chatty)
    by_hand = student.tokenizer("user w5 <eos> w9 ")["input_ids"]
    assert student.encode("w5", chat=True) == student.encode([{"role": "user", "content": "w5"}])
    assert student.encode("w5", chat=True) == by_hand != student.encode("w5")
    with pytest.raises(StudentError, match="its chat template says: no clowns"):
        student.encode([{"role": "clown", "content": "w5"}])


def test_sampling_is_repeatable_and_leaves_the_callers_random_numbers(plain):
    student = load_student(plain)
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    one, again, other = (
        student("w5", temperature=2.0, seed=s, max_new_tokens=8) for s in (1, 1, 2)
    )
    assert one == again != other
    assert torch.equal(torch.rand(2), expected)


def test_the_model_ends_at_the_end_of_text_that_it_was_trained_with(plain):
    """The tokenizer's eos counts even where generation_config names another."""
    student = load_student(plain)
    first = student("w5", max_new_tokens=1).tokens[0]
    student.tokenizer.eos_token = student.tokenizer.convert_ids_to_tokens(first)
    reply = student("w5", max_new_tokens=9)
    assert reply.tokens == [first] and reply.is_whole


def test_a_request_that_does_not_fit_is_told_in_a_sentence(plain, chatty, tmp_path):
    student = load_student(plain)
    with pytest.raises(UserError, match=r"128 tokens and .* takes 128 with its answer"):
        student("w5 " * 128)
    assert len(student("w5 " * 126, max_new_tokens=50).tokens) <= 2
    with pytest.raises(UserError, match="the prompt is empty"):
        student("")
    with pytest.raises(UserError, match="no chat template"):
        student("w5", chat=True)

    # Directories that are not a student say which one is, or what writes it.
    run = tmp_path / "run"
    shutil.copytree(plain, run / "final")
    (run / "step_1").mkdir()
    (run / "step_1" / "manifest.json").write_text("{}")
    (run / "adapter").mkdir()
    (run / "adapter" / "adapter_config.json").write_text("{}")
    for name, told in {
        "": "did you mean .*/run/final",
        "nowhere": "no such directory",
        "step_1": "python launch/export.py .*/step_1 OUT writes it",
        "adapter": "an adapter without its model",
        "final/model.safetensors": "no such directory",
    }.items():
        with pytest.raises(StudentError, match=told):
            load_student(run / name)
    (run / "empty").mkdir()
    with pytest.raises(StudentError, match=r"no config.json"):
        load_student(run / "empty")


def test_a_model_without_all_its_files_is_refused(plain, tmp_path):
    from safetensors.torch import load_file, save_file

    def damage(name: str) -> str:
        shutil.rmtree(tmp_path / "model", ignore_errors=True)
        shutil.copytree(plain, tmp_path / "model")
        weights = tmp_path / "model" / "model.safetensors"
        if name == "torn":
            weights.write_bytes(weights.read_bytes()[:999])
        elif name == "lacking":
            kept = load_file(weights)
            kept.pop("model.norm.weight")
            save_file(kept, weights, {"format": "pt"})
        elif name == "without words":
            for path in tmp_path.glob("model/tokenizer*"):
                path.unlink()
        else:
            (tmp_path / "model" / name).write_text("{}" if name == "config.json" else "")
        with pytest.raises(StudentError) as told:
            load_student(tmp_path / "model")
        return str(told.value)

    assert "lack weights: model.norm.weight" in damage("lacking")
    for name in ("torn", "config.json"):
        assert "cannot be loaded: " in damage(name)
    assert "no tokenizer is there; copy the files tokenizer*" in damage("without words")


def test_the_command_answers_and_talks(plain, chatty, capsys, monkeypatch):
    words = ["--model", str(plain), "--prompt", "w5", "--max-new-tokens", "5", "--temperature", "0"]
    assert generate.main(words) == 0
    assert capsys.readouterr().out == load_student(plain)("w5", max_new_tokens=5).text + "\n"

    # The second answer has the first turn before it.
    monkeypatch.setattr(sys, "stdin", io.StringIO("w5\n\nw6 w7\n"))
    assert generate.main(["--model", str(chatty), "--chat", "--max-new-tokens", "5"]) == 0
    student, turns = load_student(chatty), []
    for question in ("w5", "w6 w7"):
        turns.append({"role": "user", "content": question})
        turns.append({"role": "assistant", "content": student(turns, max_new_tokens=5).text})
    assert capsys.readouterr().out == f"{turns[1]['content']}\n{turns[3]['content']}\n"

    assert generate.main(["--model", str(plain), "--chat"]) == 2
    assert "no chat template" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        generate.main(["--model", str(plain)])
    assert "give --prompt TEXT, --chat, or both" in capsys.readouterr().err
