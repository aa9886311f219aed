"""Whatever way a token, key or password enters a config, nothing that is shown or kept has it."""

from __future__ import annotations

import time

import pytest

from ds_kd.config.components import ConfigError, problem
from ds_kd.config.load import fingerprint, load
from ds_kd.config.reference.keys import every_key
from ds_kd.config.text.secrets import blank_secrets, is_secret
from tests.scripts import script

GOOD = """model: {pretrained_model_name_or_path: a/b}
kd_ratio: 0
dataset: {_target_: ds_kd.data.squad.make_squad_dataset}
"""
SECRET = "hunter2 of room 5"
FORMS = {
    "plain": "wandb: {name: x}\nrecipe: ${oc.env:MY_TOKEN}",
    "quoted": "wandb: {name: '${oc.env:MY_TOKEN}'}",
    "double-quoted": 'wandb: {name: "${oc.env:MY_TOKEN}"}',
    "within a text": "wandb: {name: 'a ${oc.env:MY_TOKEN} b'}",
    "with a default": "wandb: {name: '${oc.env:MY_TOKEN,none}'}",
    "as a default": "wandb: {api_key: '${oc.env:NO_SUCH,hunter2 of room 5}'}",
    "a secret variable's default": "wandb: {name: '${oc.env:NO_TOKEN,hunter2 of room 5}'}",
    "a default's default": "wandb: {name: '${oc.env:NO_SUCH,${oc.env:MY_TOKEN}}'}",
    "with spaces": "wandb: {name: '${ oc.env:MY_TOKEN }'}",
    "in a list": "recipe: ['${oc.env:MY_TOKEN}']",
    "in a list of mappings": "recipe: [{a: '${oc.env:MY_TOKEN}'}]",
    "in a nested mapping": "wandb: {settings: {a: {b: '${oc.env:MY_TOKEN}'}}}",
    "by reference": "recipe: {a: '${oc.env:MY_TOKEN}'}\nwandb: {name: '${recipe.a}'}",
    "by a reference to a reference": "recipe: {a: '${oc.env:MY_TOKEN}', b: '${recipe.a}'}\n"
    "wandb: {name: '${recipe.b}'}",
    "by reference to a mapping": "recipe: {a: {x: '${oc.env:MY_TOKEN}'}}\nwandb: ${recipe.a}",
    "by reference to a secret key": "wandb: {token: hunter2 of room 5, name: '${wandb.token}'}",
    "of a variable with another name": "wandb: {api_key: '${oc.env:OTHER}'}",
    "below a secret key": "wandb: {credentials: {user: '${oc.env:OTHER}'}}",
    "in a list below a secret key": "wandb: {authorization: ['${oc.env:OTHER}']}",
    "plain below a secret key": "wandb: {credentials: {user: hunter2 of room 5}}",
    "copied by hand": "wandb: {token: hunter2 of room 5, notes: 'it is hunter2 of room 5!'}",
    "an anchor": "recipe: &t hunter2 of room 5\nwandb: {passphrase: *t}",
    "a block of text": "wandb:\n  passphrase: |\n    hunter2 of room 5\n",
    "JSON in a text": 'recipe: \'{"apiKey": "hunter2 of room 5"}\'',
    "an address": "recipe: 'https://hunter2@host/x'",
    "a header": "recipe: 'Bearer hunter2'",
    "an option": "recipe: 'run --password hunter2'",
    "an option with its sign": "recipe: 'run --api-key=hunter2'",
    "the word after an option": "recipe: ['--token', hunter2]",
    "a key below a secret key": "wandb: {credentials: {hunter2: of room 5}}",
    "of a variable whose name tells nothing": "wandb: {name: '${oc.env:OTHER}'}",
    "the same, within a text": "wandb: {name: 'a ${oc.env:OTHER} b'}",
    "the same, as a default": "wandb: {name: '${oc.env:NO_SUCH,${oc.env:OTHER}}'}",
    "the same, in a list": "recipe: [{a: ['${oc.env:OTHER}']}]",
    "the same, by reference": "recipe: {a: '${oc.env:OTHER}'}\nwandb: {name: '${recipe.a}'}",
    "the same, to a mapping": "recipe: {a: {x: '${oc.env:OTHER}'}}\nwandb: ${recipe.a}",
    "the same, copied by hand": "recipe: '${oc.env:OTHER}'\nwandb: {name: hunter2 of room 5}",
}


@pytest.fixture(autouse=True)
def variables(monkeypatch):
    for name in ("MY_TOKEN", "OTHER"):
        monkeypatch.setenv(name, SECRET)


@pytest.mark.parametrize("form", FORMS)
def test_a_secret_stands_in_no_log_no_fingerprint_and_no_message(
    form, tmp_path, capsys, monkeypatch
):
    path = tmp_path / "c.yaml"
    path.write_text(f"{GOOD}{FORMS[form]}\n")
    cfg = load(path)
    assert "hunter2" in str((cfg.wandb, cfg.recipe))  # the run itself has it
    assert "hunter2" not in cfg.text and "hunter2" not in str(fingerprint(cfg))
    # Wrong in every section that holds it: each message quotes what it got.
    wrong = (
        FORMS[form].replace("wandb:", "clip_grad_norm:").replace("${wandb.", "${clip_grad_norm.")
    )
    path.write_text(f"{GOOD}{wrong.replace('recipe:', 'peft:').replace('${recipe.', '${peft.')}\n")
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    assert script("kd").main(["--config", str(path), "--check"]) == 2
    assert "hunter2" not in capsys.readouterr().err


def test_the_value_of_a_variable_is_shown_where_its_key_or_form_tells_what_it_is(
    tmp_path, monkeypatch
):
    monkeypatch.setenv("PLACE", str(tmp_path))
    monkeypatch.setenv("RATE", "2e-5")
    monkeypatch.setenv("BACKEND", "gloo")
    monkeypatch.setenv("DATA", "some/rows")
    path = tmp_path / "c.yaml"
    path.write_text(
        GOOD.replace("dataset}", "dataset, dataset_name: '${oc.env:DATA}'}")
        + "optimizer: {lr: '${oc.env:RATE}'}\ndist_env: {backend: '${oc.env:BACKEND}'}\n"
        "checkpoint: {checkpoint_dir: '${oc.env:PLACE}/runs'}\nwandb: {x: '${oc.env:PLACE}/y'}\n"
        "recipe: {user: '${oc.env:HOME}', unset: '${oc.env:NO_SUCH,plain}'}\n"
    )
    text = load(path).text
    assert "***" not in text
    assert all(value in text for value in (str(tmp_path), "2e-5", "gloo", "some/rows", "plain"))


def test_a_value_that_is_not_shown_is_another_setting_where_it_is_another(tmp_path, monkeypatch):
    """A resumed run and a sweep compare the text; a number of a variable stays in messages."""
    path = tmp_path / "c.yaml"
    path.write_text(GOOD + "recipe: {subset: 'v-${oc.env:SUBSET}', rows: '${oc.env:ROWS}'}\n")
    monkeypatch.setenv("ROWS", "123456")
    found = []
    for subset in ("Socratic-9", "Socratic-8", "Socratic-9"):
        monkeypatch.setenv("SUBSET", subset)
        found.append(load(path).text)  # of which `fingerprint` is made
        assert subset not in found[-1]
    assert found[0] == found[2] != found[1]
    assert blank_secrets("Socratic-9 at step 123456") == "*** at step 123456"


@pytest.mark.parametrize(
    "line",
    [
        "wandb: {token: hunter2 of room 5, sede: 1}",
        "wandb: {'token': 'hunter2 of room 5', sede: 1}",
        'wandb: {"token": "hunter2, of room 5", "sede": 1}',
        "wandb: {token:\n   hunter2 of room 5, sede: 1}",
        "wandb: {auth: {a: hunter2, sede: 1}}",
        "wandb: {sede: 1}  # token: hunter2",
    ],
)
def test_the_line_that_a_terminal_shows_has_no_secret(line, tmp_path, capsys, monkeypatch):
    path = tmp_path / "c.yaml"
    path.write_text(GOOD + line.replace("wandb", "rng"))
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    assert script("kd").main(["--config", str(path), "--check"]) == 2
    told = capsys.readouterr().err
    assert "hunter2" not in told and "room" not in told and "^^^" in told


def test_a_later_error_that_quotes_a_secret_is_blanked(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(GOOD + "wandb: {api_key: 'correct horse'}\n")
    load(path)
    assert "horse" not in str(ConfigError(["wandb: 401 for the key correct horse"]))
    assert "horse" not in problem("wandb", "x" * 290 + "correct horse", "no text")


def test_a_secret_of_another_type_is_not_quoted_by_the_yaml_library(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(GOOD + "wandb: {token: !!int 'no-number-but-a-secret'}\n")
    with pytest.raises(ConfigError) as caught:
        load(path)
    assert "but-a-secret" not in str(caught.value)


@pytest.mark.parametrize(
    "name",
    [
        "token", "hf_token", "HF_TOKEN", "accessToken", "access_token", "accesstoken", "auth-token",
        "refreshToken", "api_key", "apiKey", "apikey", "x-api-key", "X-Api-Key", "WANDB_API_KEY",
        "APIKey", "AWS_ACCESS_KEY_ID", "aws_secret_access_key", "secret", "clientSecret",
        "password", "passwd", "pwd", "DB_PASS", "passphrase", "passcode", "credential",
        "credentials", "auth",
        "Authorization", "bearer", "private_key", "privateKey", "GITHUB_PAT", "jwt", "cookie",
        "key", "hub_tokens", "tokens", "token_value", "TOKEN_STR", "pass_word", "sshkey", "otp",
        "tökén",
    ],
)  # fmt: skip
def test_names_of_secrets_are_known(name):
    assert is_secret(name)


@pytest.mark.parametrize(
    "name",
    [
        "pad_token", "pad_token_id", "eos_token", "bosToken", "max_new_tokens", "num_tokens",
        "tokenizer", "tokenize", "keep_last", "keyword", "sort_key", "text_key", "messages_key",
        "author", "PWD", "passes", "monkey", "path", "secretary", "pass_rate", "image_token",
    ],
)  # fmt: skip
def test_innocent_names_are_not_blanked(name):
    assert not is_secret(name)


def test_no_key_of_the_schema_is_taken_for_a_secret():
    for name, key in every_key():
        assert not is_secret(key.name), name


@pytest.mark.parametrize(
    "text",
    ["a" * 60_000, "token" * 12_000, "a:" * 30_000, "://a:" * 12_000, "key " + " " * 60_000,
     "token: '" + "'" * 60_000, "-_" * 30_000, "Aa" * 30_000, "token:'x' " * 6_000],
    ids=range(9),
)  # fmt: skip
def test_looking_for_secrets_takes_time_linear_in_the_text(text):
    started = time.process_time()
    blank_secrets(text)
    is_secret(text)
    assert time.process_time() - started < 0.5
