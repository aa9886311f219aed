"""Make a question-answering dataset from Python's own documentation, without a network.

    python launch/make_docs_dataset.py --output quickstart/data [--train 600 --validation 24]

Writes `train.jsonl` and `validation.jsonl`, rows of `id, title, messages`: a conversation about a
passage. Two sources: the language reference behind `help()` (`pydoc_data.topics`) and the
docstrings of the standard library. A passage is a run of neighbouring sentences; a question asks
for one of them, and the answer is that sentence, word for word:

    What does shutil.copyfile do?                         "shutil.copyfile: " and what follows it
    What does the documentation of X say about "name"?    the one sentence that mentions "name"
    Which sentence begins with "…"?                       any other

A training row asks for every sentence of its passage, so that four tokens in ten belong to an
answer; with one question for each passage it would be two. A validation row asks one question of
the first kind, about a module that no training row is about.

Everything is sorted by content, so one Python version always writes the same files. Exit code 2 if
Python has too little text.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import inspect
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ds_kd.process import prepare

# Modules that are written in Python and can be imported without output from version 3.10 on.
NAMES = """
abc argparse ast asyncio.events asyncio.locks asyncio.queues asyncio.streams asyncio.tasks base64
bdb bisect calendar cmd code codecs codeop collections collections.abc compileall
concurrent.futures._base configparser contextlib copy csv ctypes.util dataclasses datetime decimal
difflib dis doctest email.charset email.headerregistry email.message email.utils enum filecmp
fileinput fnmatch fractions ftplib functools getpass gettext glob gzip hashlib heapq html.parser
http.client http.cookiejar http.cookies http.server imaplib importlib.abc importlib.machinery
importlib.util inspect io ipaddress json json.decoder json.encoder linecache locale logging
logging.config logging.handlers lzma mailbox mimetypes modulefinder multiprocessing.managers
multiprocessing.pool multiprocessing.shared_memory netrc numbers opcode operator optparse os
pathlib pdb pickle pickletools pkgutil platform plistlib poplib posixpath pprint profile pstats
pyclbr pydoc queue quopri random reprlib runpy sched secrets selectors shelve shlex shutil smtplib
socket socketserver sqlite3.dbapi2 ssl statistics string subprocess symtable sysconfig tarfile
tempfile textwrap threading timeit tokenize trace traceback tracemalloc types unittest.async_case
unittest.case unittest.loader unittest.mock unittest.runner unittest.suite urllib.error
urllib.parse urllib.request urllib.robotparser uuid venv warnings wave weakref webbrowser
wsgiref.handlers wsgiref.headers wsgiref.simple_server xml.dom.minidom xml.dom.pulldom
xml.etree.ElementTree xml.sax.handler xml.sax.saxutils xml.sax.xmlreader xmlrpc.client
xmlrpc.server zipapp zipfile
"""
MODULES = NAMES.split()

PASSAGE_WORDS = (30, 90)
ANSWER_WORDS = (5, 50)
HELD_OUT_ANSWER_WORDS = (5, 25)  # launch/compare.py lets the models answer in 40 tokens
INSTRUCTION = "Answer with a sentence of the text."

# A word in quotes, or one with an underscore.
NAME = re.compile(r"[\"“`']([A-Za-z_][\w.]*(?:\(\))?)[\"”`']|\b(\w+_\w+)\b")
# Blanks between a full stop and a capital letter or a quoted name, but not after "e.g." or "i.e.".
BETWEEN_SENTENCES = re.compile(r"(?<=[a-z0-9\)\"”][.!?])(?<!\be\.g\.)(?<!\bi\.e\.)\s+(?=[A-Z\"“*])")
MARKUP = re.compile(r"::=|>>>|\.\. |^[=*\-~^+]{3,}|\|\s", re.MULTILINE)

Row = dict[str, Any]


class DatasetError(Exception):
    """The dataset cannot be made; the message is for the user."""


# --------------------------------------------------------------------------------------- sentences


def paragraphs(text: str) -> list[str]:
    """Return the paragraphs of prose, without headings, code, grammars, lists, tables, doctests."""
    found = []
    for block in filter(None, re.split(r"\n\s*\n", inspect.cleandoc(text))):
        is_set_apart = block.startswith(("   ", "\t", "* ", "- "))
        prose = " ".join(block.split())
        is_sentence = prose[-1:] in (".", ":") and prose.count(" ") >= 3
        if is_sentence and not is_set_apart and not MARKUP.search(block):
            found.append(prose)
    return found


def sentences(paragraph: str) -> list[str]:
    return [part for part in BETWEEN_SENTENCES.split(paragraph) if part]


def words(text: str) -> int:
    return len(text.split())


def digest(text: str) -> str:
    """Return a hash of a text, to sort texts by."""
    return hashlib.sha256(text.encode()).hexdigest()


def runs_of(text: str) -> Iterator[list[str]]:
    """Yield runs of neighbouring sentences, PASSAGE_WORDS long, without a common sentence."""
    low, high = PASSAGE_WORDS
    runs: list[list[str]] = [[]]
    for sentence in (s for p in paragraphs(text) for s in sentences(p)):
        if words(" ".join([*runs[-1], sentence])) > high:
            runs.append([])
        runs[-1].append(sentence)
    yield from (run for run in runs if low <= words(" ".join(run)) <= high)


# ----------------------------------------------------------------------------------------- sources


def topics() -> Iterator[tuple[str, str]]:
    """Yield (heading, text) of each section of the language reference."""
    from pydoc_data.topics import topics as by_name

    for name in sorted(by_name):
        text = by_name[name].strip()
        heading = text.splitlines()[0].strip(' *"')
        # The text is split at its underlined headings, those of subsections included.
        parts = re.split(r"^([^\n]+)\n[*=\-~]{3,}\n", text, flags=re.MULTILINE)
        for title, body in zip(parts[1::2], parts[2::2], strict=True):
            yield title.strip() or heading, body
        if parts[0].strip():
            yield heading, parts[0]


def docstrings(module_name: str) -> Iterator[tuple[str, str, bool]]:
    """Yield (dotted name, docstring, whether it is a function) of a module's public definitions."""
    try:
        module = importlib.import_module(module_name)
    except ImportError:  # this build of Python lacks an extension
        return
    for name, member in sorted(vars(module).items()):
        if name.startswith("_") or getattr(member, "__module__", None) != module_name:
            continue
        if inspect.isfunction(member):
            yield f"{module_name}.{name}", member.__doc__ or "", True
        elif inspect.isclass(member):
            yield f"{module_name}.{name}", member.__doc__ or "", False
            for method, function in sorted(vars(member).items()):
                if not method.startswith("_") and inspect.isfunction(function):
                    yield f"{module_name}.{name}.{method}", function.__doc__ or "", True
    yield module_name, module.__doc__ or "", False


# ---------------------------------------------------------------------------------------- passages


class Passage(NamedTuple):
    """A run of sentences about one subject.

    Args:
        source: its module or section; all passages of a source are in one split.
        subject: the name of the subject in questions.
        sentences: the sentences.
        opening: the question about the first sentence, if that one defines the subject.
    """

    source: str
    subject: str
    sentences: list[str]
    opening: str | None

    @property
    def text(self) -> str:
        return " ".join(self.sentences)


def passages() -> list[Passage]:
    """Return all passages, sorted by content; no sentence that is asked for is in two of them.

    Docstrings are often copied from class to class, so only the first of such passages is kept.
    """
    seen: set[str] = set()
    unique = []
    for passage in _all_passages():
        texts = {passage.text} | {passage.sentences[i] for i in answers(passage, ANSWER_WORDS)}
        if len(texts) > 1 and not texts & seen:
            unique.append(passage)
            seen |= texts
    return sorted(unique, key=lambda passage: digest(passage.text))


def _all_passages() -> Iterator[Passage]:
    for heading, text in topics():
        subject = heading.strip().replace('"', "")
        for run in runs_of(text):
            yield Passage(f"“{subject}”", f"“{subject}”", run, None)
    for module in MODULES:
        for name, text, is_callable in docstrings(module):
            opening = f"What does {name} do?" if is_callable else f"What is {name}?"
            for part, run in enumerate(runs_of(text)):
                opens = part == 0
                if opens:  # the name begins the passage, and so the answer
                    run = [f"{name}: {run[0]}", *run[1:]]
                yield Passage(module.split(".")[0], name, run, opening if opens else None)


def answers(passage: Passage, length: tuple[int, int]) -> list[int]:
    """Return the numbers of the sentences that can be answers: whole, of this length, and
    unique."""
    low, high = length
    return [
        index
        for index, sentence in enumerate(passage.sentences)
        if sentence[-1] in ".!?"
        and not sentence.removeprefix(f"{passage.subject}: ")[0].islower()
        and low <= words(sentence) <= high
        and passage.text.count(sentence) == 1
    ]


# -------------------------------------------------------------------------------------------- rows


def name_only_in(index: int, passage: Passage) -> str | None:
    """Return a name that only sentence `index` of the passage mentions, or None."""
    run = passage.sentences
    others = " ".join([passage.subject, *run[:index], *run[index + 1 :]])
    for quoted, plain in NAME.findall(run[index]):
        name = str(quoted or plain)
        if len(name) > 2 and name not in others:
            return name
    return None


def natural_question(passage: Passage, index: int) -> str | None:
    """Return a question that sentence `index` answers, or None."""
    if index == 0 and passage.opening is not None:
        return passage.opening
    name = name_only_in(index, passage)
    if name is None:
        return None
    return f'What does the documentation of {passage.subject} say about "{name}"?'


def find_beginning(passage: Passage, index: int) -> str:
    """Return the first words of sentence `index`: three, or as many as make it unique."""
    run = [sentence.split() for sentence in passage.sentences]
    count = 3
    while sum(other[:count] == run[index][:count] for other in run) > 1 and count < len(run[index]):
        count += 1
    return " ".join(run[index][:count])


def row(passage: Passage, turns: list[tuple[str, str]]) -> Row:
    """Return a conversation of (question, answer); the passage follows the first question."""
    messages = [{"role": "system", "content": INSTRUCTION}]
    for question, answer in turns:
        messages.append({"role": "user", "content": question})
        messages.append({"role": "assistant", "content": answer})
    messages[1]["content"] += f"\n\n{passage.text}"
    return {"id": digest(passage.text)[:16], "title": passage.subject, "messages": messages}


def make_training_row(passage: Passage) -> Row:
    """Return a row that asks for every sentence: first for the definition of the subject, then in
    an order that does not help to answer."""
    turns = []
    for index in answers(passage, ANSWER_WORDS):
        asked = natural_question(passage, index)
        asked = asked or f'Which sentence begins with "{find_beginning(passage, index)}"?'
        turns.append((asked, passage.sentences[index]))
    turns.sort(key=lambda turn: (turn[0] != passage.opening, digest(turn[1])))
    return row(passage, turns)


def validation_row(passage: Passage) -> Row | None:
    """Return a row that asks for the definition of the subject, or None if there is none."""
    if passage.opening is None or 0 not in answers(passage, HELD_OUT_ANSWER_WORDS):
        return None
    return row(passage, [(passage.opening, passage.sentences[0])])


def split(train: int, validation: int) -> dict[str, list[Row]]:
    """Return the rows of both splits, which share no module or section.

    Raises:
        DatasetError: there are fewer rows than asked for.
    """
    found = passages()
    held_out: set[str] = set()
    rows: list[Row] = []
    for source in sorted({passage.source for passage in found}, key=digest):
        if len(rows) >= validation:
            break
        held_out.add(source)
        rows += filter(None, (validation_row(p) for p in found if p.source == source))
    made = {
        "train": [make_training_row(p) for p in found if p.source not in held_out],
        "validation": sorted(rows, key=lambda row: str(row["id"])),
    }
    for (name, rows), wanted in zip(made.items(), (train, validation), strict=True):
        if len(rows) < wanted:
            raise DatasetError(
                f"--{name} {wanted}: this Python's documentation gives only {len(rows)} rows"
                + (" (python -OO removes docstrings)" if sys.flags.optimize > 1 else "")
            )
        made[name] = rows[:wanted]
    return made


def write(output: Path, found: dict[str, list[Row]]) -> None:
    output.mkdir(parents=True, exist_ok=True)
    for name, rows in found.items():
        partial = output / f"{name}.jsonl.tmp"
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        partial.write_text(lines, encoding="utf-8")
        partial.replace(output / f"{name}.jsonl")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="make_docs_dataset.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--output", type=Path, required=True, help="directory to write")
    parser.add_argument("--train", type=int, default=600, metavar="ROWS")
    parser.add_argument("--validation", type=int, default=24, metavar="ROWS")
    args = parser.parse_args(argv)
    try:
        if min(args.train, args.validation) < 1:
            raise DatasetError("--train and --validation take numbers of rows, at least 1")
        found = split(args.train, args.validation)
        write(args.output, found)
    except DatasetError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"wrote {args.output}: {args.train} training and {args.validation} validation rows")
    return 0


if __name__ == "__main__":
    prepare()
    sys.exit(main())
