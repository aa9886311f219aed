"""A user's own data set: check its samples, and shift their labels if they are unshifted.

The contract: a list, or another object with a length and an index, of mappings with `input_ids` and
`labels` of equal length. Labels are shifted (position `i` holds the token that follows it, or -100)
or, if the config says so, unshifted as in Hugging Face's models (position `i` holds its own token).
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch.utils.data import Dataset

from ds_kd.data.labels import IGNORE_INDEX
from ds_kd.errors import UserError, describe_user_error, explain

SHIFTED, UNSHIFTED = "shifted", "unshifted"
_FIRST_SAMPLES = 16  # enough to tell shifted from unshifted labels


class DataError(UserError, ValueError):
    """A sample that cannot be trained on."""

    def text(self, excerpts: bool = False) -> str:
        # A loader's process hands on the error as a whole traceback, which ends in the message.
        last = str(self).strip().splitlines()[-1]
        return last.removeprefix(f"{type(self).__module__}.{type(self).__name__}: ")


@contextmanager
def explain_failure(place: str = "") -> Iterator[None]:
    """Turn every error of a user's code in this block into a `DataError` that names its lines.

    Args:
        place: the beginning of the message.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if explain(error) is not None:  # of memory, say: no mistake of that code
            raise
        raise DataError(f"{place}{describe_user_error(error)}") from error


@dataclass(frozen=True)
class OwnCollater:
    """A user's own `collate_fn`, whose errors name the lines of its code.

    Args:
        collate: makes a micro-batch of samples.
    """

    collate: Callable[[list[Any]], Any]

    def __call__(self, samples: list[Any]) -> Any:
        with explain_failure("collate_fn: "):
            return self.collate(samples)


class OwnSamples(Dataset):
    """A user's data set, whose samples are checked as they are read and have shifted labels.

    Args:
        dataset: has a length and an index.
        vocab_size: number of token ids.
        labels: `shifted` or `unshifted`, the form of the data set's labels.

    Raises:
        DataError: no length or index, a sample that breaks the contract, or first samples whose
            labels have the other form.
    """

    def __init__(self, dataset: Any, vocab_size: int, labels: str = SHIFTED):
        if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
            raise DataError(
                f"it is {type(dataset).__name__}, which has no length or no index, and samples are "
                "drawn by number; return a list, or a datasets.Dataset that does not stream"
            )
        if isinstance(dataset, Mapping):
            raise DataError(f"it has the splits or columns {', '.join(map(str, dataset))}, not "
                            "samples by number; return one split")  # fmt: skip
        self.dataset, self.vocab_size, self.labels = dataset, vocab_size, labels
        self._no_packs = ""  # why samples may be no packs
        self._check_direction()

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        sample = self._read_sample(index)
        return _shift(sample) if self.labels == UNSHIFTED else sample

    def refuse_packs(self, why: str) -> None:
        """Refuse samples that are packs of their own from now on, and the first ones at once.

        Args:
            why: the end of the message, which says what to do.

        Raises:
            DataError: one of the first samples is a pack.
        """
        self._no_packs = why
        for index in range(min(len(self), _FIRST_SAMPLES)):
            self._read_sample(index)

    def _read_sample(self, index: int) -> dict[str, Any]:
        """Return a checked sample with lists in place of tensors, and a `sample_id`."""
        if index >= len(self):  # Python ends an iteration by number so
            raise IndexError(index)
        with explain_failure(f"sample {index}: "):
            given = self.dataset[index]
        try:
            sample = {"sample_id": str(index), **check_sample(given, self.vocab_size)}
            if self._no_packs and "segment_lengths" in sample:
                raise DataError(f"it is a pack of its own (segment_lengths), and {self._no_packs}")
            return sample
        except DataError as error:
            raise DataError(f"sample {index}: {error}") from None

    def _check_direction(self) -> None:
        own = follows = positions = inner = 0
        for index in range(min(len(self), _FIRST_SAMPLES)):
            for label, here, following in _iterate_supervised(self._read_sample(index)):
                positions += 1
                own += label == here
                inner += following is not None
                follows += label == following

        # Only labels that all agree with the other form are refused: some tokens repeat.
        are_own = 0 < positions == own and follows < inner
        are_shifted = 0 < inner == follows and own < positions
        if self.labels == SHIFTED and are_own:
            raise DataError(
                "the labels of its first samples equal their input_ids, as Hugging Face's models "
                "take them, and a position learns the token after it; write labels: unshifted in "
                "this section"
            )
        if self.labels == UNSHIFTED and are_shifted:
            raise DataError(
                "the labels of its first samples are the tokens that follow already; remove "
                "labels: unshifted"
            )


def check_sample(given: Any, vocab_size: int) -> dict[str, Any]:
    """Return the sample with plain lists of integers.

    Raises:
        DataError: keys missing, unequal lengths, ids outside the vocabulary, padding on the left.
    """
    if not isinstance(given, Mapping):
        raise DataError(f"it is {type(given).__name__}, expected a mapping with input_ids, labels")
    for name in ("input_ids", "labels"):
        if name not in given:
            raise DataError(f"no {name}; it has {', '.join(map(str, given)) or 'nothing'}")
    sample = dict(given)
    lists = ("input_ids", "labels", "segment_lengths", "attention_mask")
    sample |= {name: _read_integers(name, given[name]) for name in lists if name in given}

    # A wrong id would index outside the embedding on some rank, long after the start.
    ids, labels = sample["input_ids"], sample["labels"]
    if len(ids) != len(labels):
        raise DataError(f"{len(ids)} input_ids and {len(labels)} labels; give equally many")
    for name, wrong in (
        ("input_ids", [i for i in ids if not 0 <= i < vocab_size]),
        ("labels", [i for i in labels if i != IGNORE_INDEX and not 0 <= i < vocab_size]),
    ):
        if wrong:
            also = f", or {IGNORE_INDEX} for none" if name == "labels" else ""
            raise DataError(
                f"{name} holds {wrong[0]}; the tokenizer's ids go from 0 to {vocab_size - 1}{also}"
            )

    lengths = sample.get("segment_lengths", [len(ids)])
    if sum(lengths) != len(ids):
        raise DataError(f"segment_lengths add up to {sum(lengths)} of {len(ids)} tokens")
    mask = sample.get("attention_mask", [])
    if mask[:1] == [0] and any(mask):
        raise DataError("it is padded on the left; leave padding to the collater, or pad right")
    return sample


def _read_integers(name: str, value: Any) -> list[int]:
    """Return the integers of a list, tuple, array or tensor as a list."""
    plain = value.tolist() if hasattr(value, "tolist") else value
    try:
        return [operator.index(i) for i in plain]
    except TypeError:
        shape = getattr(value, "shape", None)
        what = f"of shape {[*shape]}" if shape is not None else f"{value!r:.60}"
        raise DataError(f"{name} is {what}, expected one list of integers") from None


def _iterate_supervised(sample: dict[str, Any]) -> Iterator[tuple[int, int, int | None]]:
    """Yield (label, its token, the next token of the segment) for every supervised position."""
    ids, labels, start = sample["input_ids"], sample["labels"], 0
    for length in sample.get("segment_lengths", [len(ids)]):
        end = start + length
        for i in range(start, end):
            if labels[i] != IGNORE_INDEX:
                yield labels[i], ids[i], ids[i + 1] if i + 1 < end else None
        start = end


def _shift(sample: dict[str, Any]) -> dict[str, Any]:
    """Return a sample with its unshifted labels shifted; each segment is one position shorter."""
    ids, labels, lengths, start = [], [], [], 0
    for length in sample.get("segment_lengths", [len(sample["input_ids"])]):
        kept = max(0, length - 1)
        ids += sample["input_ids"][start : start + kept]
        labels += sample["labels"][start + 1 : start + 1 + kept]
        lengths.append(kept)
        start += length
    made = {**sample, "input_ids": ids, "labels": labels}
    if "segment_lengths" in sample:
        made["segment_lengths"] = lengths
    if "num_tokens" in sample:
        lost = len(sample["input_ids"]) - len(ids)
        made["num_tokens"] = max(0, int(sample["num_tokens"]) - lost)
    return made
