"""Load a student from its directory and have it write text.

student = load_student("checkpoints/final")
print(student("Translate to French: I love coding!").text)
print(student([{"role": "user", "content": "What is a list?"}]).text)
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.generation.streamers import BaseStreamer

from ds_kd.data.chat import tokenize_prompt
from ds_kd.errors import UserError, first_line
from ds_kd.models.files.damage import name_damage
from ds_kd.models.files.model_files import explain_no_tokenizer

NEW_TOKENS = 256
#: A directory below that holds the student of a run, or of a checkpoint, if any does.
_NEARBY = ("final", "model")


class StudentError(UserError):
    """A directory holds no model to generate with, or a prompt does not suit the model."""

    exit_code = 2


@dataclass(frozen=True)
class Reply:
    """The answer of a model.

    Args:
        text: the new text alone, without special tokens.
        tokens: the new tokens, the end-of-text token included.
        is_whole: the model ended it; otherwise the limit of tokens did.
    """

    text: str
    tokens: list[int]
    is_whole: bool


class LoadedStudent:
    """A model and its tokenizer, to be called with a prompt.

    Args:
        model: a Hugging Face causal language model in eval mode.
        tokenizer: its tokenizer.
        name: the directory, for messages.
    """

    def __init__(self, model: Any, tokenizer: Any, name: str):
        self.model, self.tokenizer, self.name = model, tokenizer, name

    @property
    def chats(self) -> bool:
        """Return whether the tokenizer has a chat template."""
        return self.tokenizer.chat_template is not None

    def __call__(
        self,
        prompt: str | list[dict[str, Any]],
        chat: bool = False,
        max_new_tokens: int = NEW_TOKENS,
        temperature: float = 0.0,
        seed: int = 0,
        on_text: Callable[[str], None] | None = None,
    ) -> Reply:
        """Return what the model writes after a prompt.

        Args:
            prompt: a text, or the messages of a conversation (`role` and `content`), which go
                through the chat template.
            chat: send a text through the chat template too, as one message of the user.
            max_new_tokens: the limit, which the model's own length may lower.
            temperature: of sampling; 0 takes the likeliest token each time.
            seed: of sampling.
            on_text: called with each new piece of text as it is written.

        Raises:
            StudentError: there is no chat template, or the model has no room after the prompt.
        """
        ids = self.encode(prompt, chat)
        return self.write_after(ids, max_new_tokens, temperature, seed, on_text)

    def encode(self, prompt: str | list[dict[str, Any]], chat: bool = False) -> list[int]:
        """Return the tokens of a prompt, to the point where the answer begins.

        Raises:
            StudentError: there is no chat template, it refuses these messages, or a text is not
                UTF-8.
        """
        _check_text(prompt)
        if isinstance(prompt, str) and not chat:
            return tokenize_prompt(self.tokenizer, prompt)
        if not self.chats:
            raise StudentError(
                f"{self.name}: its tokenizer has no chat template, so it was not made for "
                f"conversations; give a plain text (--prompt without --chat)"
            )
        turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        try:
            encoded = self.tokenizer.apply_chat_template(
                turns, add_generation_prompt=True, tokenize=True, return_dict=True
            )
        except Exception as error:  # jinja's errors, and any that the template raises
            told = first_line(error)
            raise StudentError(f"{self.name}: its chat template says: {told}") from error
        return list(encoded["input_ids"])

    @torch.no_grad()
    def write_after(
        self,
        prompt: list[int],
        max_new_tokens: int = NEW_TOKENS,
        temperature: float = 0.0,
        seed: int = 0,
        on_text: Callable[[str], None] | None = None,
    ) -> Reply:
        """Return what the model writes after the tokens of a prompt; see `__call__`.

        Raises:
            StudentError: the prompt is empty, or the model has no room after it.
        """
        limit = min(max_new_tokens, self._count_room(prompt))
        ends = find_ends(self.model, self.tokenizer)
        ids = torch.tensor([prompt], device=self.model.device)
        pad = self.tokenizer.pad_token_id
        given: dict[str, Any] = {"do_sample": False}
        if temperature > 0:
            given = {"do_sample": True, "temperature": temperature}

        # A caller's own random numbers stay as they are.
        devices = [self.model.device] if self.model.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(seed)
            out = self.model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=limit,
                eos_token_id=ends or None,
                pad_token_id=pad if pad is not None else next(iter(ends), 0),
                streamer=None if on_text is None else _Pieces(self._decode, on_text),
                **given,
            )
        tokens = out[0, len(prompt) :].tolist()
        return Reply(self._decode(tokens), tokens, bool(tokens) and tokens[-1] in ends)

    def _decode(self, tokens: list[int]) -> str:
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True))

    def _count_room(self, prompt: list[int]) -> int:
        """Return the number of tokens that the model can write after the prompt.

        Raises:
            StudentError: there are none, or there is no prompt.
        """
        if not prompt:
            raise StudentError("the prompt is empty; give a text to go on from")
        longest = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        room = NEW_TOKENS * len(prompt) if longest is None else longest - len(prompt)
        if room < 1:
            raise StudentError(
                f"the prompt has {len(prompt)} tokens and {self.name} takes {longest} with its "
                f"answer; give a shorter one"
            )
        return room


def _check_text(prompt: Any) -> None:
    """Refuse a text that is not UTF-8, such as a shell may give, with a StudentError."""
    try:
        json.dumps(prompt, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError:
        raise StudentError("the prompt is not UTF-8, as no model reads other text") from None


def find_ends(model: Any, tokenizer: Any) -> list[int]:
    """Return the tokens that end a text: the model's, and the tokenizer's, with which it was
    trained."""
    named = getattr(model.generation_config, "eos_token_id", None)
    ends = named if isinstance(named, list) else [named]
    return sorted({end for end in (*ends, tokenizer.eos_token_id) if end is not None})


class _Pieces(BaseStreamer):
    """Hands on new text as soon as it is certain: the pieces together are the whole text.

    A token may be part of a character, and its text may depend on those before it, so all tokens
    are decoded each time.
    """

    def __init__(self, decode: Callable[[list[int]], str], on_text: Callable[[str], None]):
        self._decode, self._on_text = decode, on_text
        self._tokens: list[int] | None = None  # the first that `generate` puts is the prompt
        self._told = 0

    def put(self, value: Any) -> None:
        if self._tokens is None:
            self._tokens = []
            return
        self._tokens += value.flatten().tolist()
        text = self._decode(self._tokens)
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):
            self._tell(text)

    def end(self) -> None:
        self._tell(self._decode(self._tokens or []))

    def _tell(self, text: str) -> None:
        if text[self._told :]:
            self._on_text(text[self._told :])
        self._told = max(self._told, len(text))


def load_student(directory: str | Path, device: str | None = None) -> LoadedStudent:
    """Return the model of a directory that a run, `launch/export.py` or transformers wrote.

    Args:
        device: of torch; a GPU by default, if there is one. On a CPU weights are float32, as those
            of half the size are slower there.

    Raises:
        StudentError: the directory holds no whole model with its tokenizer.
    """
    place = Path(directory)
    _check_directory(place)
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype: Any = torch.float32 if where.type == "cpu" else "auto"
    try:
        # Code of the model's repository is not run, and transformers must not ask on the terminal.
        with name_damage(str(place)):
            tokenizer = AutoTokenizer.from_pretrained(place, trust_remote_code=False)
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                place, dtype=dtype, trust_remote_code=False, output_loading_info=True
            )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        told = explain_no_tokenizer(str(place)) or f"cannot be loaded: {first_line(error)}"
        raise StudentError(f"{place}: {told}") from error
    model, report = loaded
    if absent := sorted(report["missing_keys"]):  # transformers would make them up
        raise StudentError(f"{place}: its files lack weights: {', '.join(absent[:3])}")
    return LoadedStudent(model.to(where).eval(), tokenizer, str(place))


def _check_directory(place: Path) -> None:
    """Refuse a directory without a model, with a hint at the one that was meant.

    Raises:
        StudentError: says what is there.
    """
    if (place / "config.json").is_file():
        return
    if not place.is_dir():
        raise StudentError(
            f"{place}: no such directory; give the one that a run writes (checkpoint_dir/final)"
        )

    # Those that a user may well have meant lead to the right one.
    for name in _NEARBY:
        if (place / name / "config.json").is_file() and any((place / name).glob("*.safetensors")):
            raise StudentError(f"{place}: no model there; did you mean {place / name}?")
    if (place / "manifest.json").is_file():
        raise StudentError(
            f"{place}: a checkpoint without a model for transformers; "
            f"python launch/export.py {place} OUT writes it"
        )
    if (place / "adapter_config.json").is_file():
        raise StudentError(
            f"{place}: an adapter without its model; give the directory above, which holds the "
            f"merged model"
        )
    raise StudentError(f"{place}: no Hugging Face model there (no config.json)")
