"""Compare a generated answer with its references, as the official script of SQuAD does."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalize(text: str) -> str:
    """Return a text in lower case, without punctuation, articles and repeated white space."""
    bare = text.lower().translate(_PUNCTUATION)
    return " ".join(_ARTICLES.sub(" ", bare).split())


def exact_match(answer: str, reference: str) -> float:
    """Return 1 where both texts are the same after `normalize`, else 0."""
    return float(normalize(answer) == normalize(reference))


def f1(answer: str, reference: str) -> float:
    """Return the harmonic mean of precision and recall of the answer's words, after `normalize`."""
    got, wanted = normalize(answer).split(), normalize(reference).split()
    if not got or not wanted:
        return float(got == wanted)
    shared = sum((Counter(got) & Counter(wanted)).values())
    return 2 * shared / (len(got) + len(wanted))


SCORES: dict[str, Callable[[str, str], float]] = {"exact_match": exact_match, "f1": f1}


def score_best(name: str, answer: str, references: Sequence[str]) -> float:
    """Return the score of an answer against the reference that it fits best."""
    return max(SCORES[name](answer, reference) for reference in references)
