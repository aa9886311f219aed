"""Make a question-answering dataset from the English that every Python carries: no network needed.

    python launch/make_docs_dataset.py --output quickstart/data [--train 600 --validation 80]

Writes `train.jsonl` and `validation.jsonl` in SQuAD's schema (`id, title, context, question,
answers{text, answer_start}`). Two sources: the language reference behind `help()`
(`pydoc_data.topics`) and the docstrings of the standard library. A context is a run of neighbouring
sentences; a question asks for one of them, and the answer is that sentence, word for word:

    What does shutil.copyfile do?                            the docstring's first sentence
    What does the documentation of X say about "name"?       the one sentence that mentions "name"
    … how does the sentence that begins with "…" read?       any other

Everything is sorted by content, so one Python version always writes the same files. No context and
no answer is in both splits. Exit code 2 where Python has too little text for what is asked.
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
from typing import Any

# Written in Python, importable everywhere, quiet on import, in every version from 3.10 on.
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

CONTEXT_WORDS = (40, 120)
ANSWER_WORDS = (5, 50)
ROWS_PER_CONTEXT = 2

# A word in quotes, or one with an underscore.
NAME = re.compile(r"[\"“`']([A-Za-z_][\w.]*(?:\(\))?)[\"”`']|\b(\w+_\w+)\b")
# Blanks after a full stop that a capital letter or a quoted name follows; "e.g." goes on.
BETWEEN_SENTENCES = re.compile(r"(?<=[a-z0-9\)\"”][.!?])(?<!\be\.g\.)(?<!\bi\.e\.)\s+(?=[A-Z\"“*])")
MARKUP = re.compile(r"::=|>>>|\.\. |^[=*\-~^+]{3,}|\|\s", re.MULTILINE)

Row = dict[str, Any]


class DatasetError(Exception):
    """The dataset cannot be made; the message is for the user."""


# --------------------------------------------------------------------------------------- sentences


def paragraphs(text: str) -> list[str]:
    """The prose of `text`, a line each: no headings, code, grammars, lists, tables or doctests."""
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


def contexts(text: str) -> Iterator[list[str]]:
    """Runs of neighbouring sentences of `text`, CONTEXT_WORDS long; no sentence is in two."""
    low, high = CONTEXT_WORDS
    runs: list[list[str]] = [[]]
    for sentence in (s for p in paragraphs(text) for s in sentences(p)):
        if words(" ".join([*runs[-1], sentence])) > high:
            runs.append([])
        runs[-1].append(sentence)
    yield from (run for run in runs if low <= words(" ".join(run)) <= high)


# ----------------------------------------------------------------------------------------- sources


def topics() -> Iterator[tuple[str, str]]:
    """(heading, text) of each section of the language reference."""
    from pydoc_data.topics import topics as by_name

    for name in sorted(by_name):
        text = by_name[name].strip()
        heading = text.splitlines()[0].strip(' *"')
        # Cut at the underlined headings: the section's own and those below it.
        parts = re.split(r"^([^\n]+)\n[*=\-~]{3,}\n", text, flags=re.MULTILINE)
        for title, body in zip(parts[1::2], parts[2::2], strict=True):
            yield title.strip() or heading, body
        if parts[0].strip():
            yield heading, parts[0]


def docstrings(module_name: str) -> Iterator[tuple[str, str, bool]]:
    """(dotted name, docstring, callable or not) of what `module_name` itself defines in public."""
    try:
        module = importlib.import_module(module_name)
    except ImportError:  # a build without that extension; the rest is enough
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


# -------------------------------------------------------------------------------------------- rows


def name_only_in(index: int, run: list[str], subject: str) -> str | None:
    """A name which, in the context `run`, sentence `index` alone mentions."""
    others = " ".join([subject, *run[:index], *run[index + 1 :]])
    for quoted, plain in NAME.findall(run[index]):
        name = str(quoted or plain)
        if len(name) > 2 and name not in others:
            return name
    return None


def question(subject: str, run: list[str], index: int, opening: str | None) -> tuple[int, str]:
    """What to ask so that sentence `index` of the context `run` is the answer.

    Args:
        subject: what the context is about.
        run: the context.
        index: of the sentence asked for.
        opening: what asks for the first sentence, where that one defines the subject.

    Returns:
        (how contrived the question is, 0 to 2; the question)
    """
    if index == 0 and opening is not None:
        return 0, opening
    name = name_only_in(index, run, subject)
    if name is not None:
        return 1, f'What does the documentation of {subject} say about "{name}"?'
    start = " ".join(run[index].split()[:4])
    ask = f'how does the sentence that begins with "{start}" read?'
    return 2, f"In the documentation of {subject}, {ask}"


def is_answer(sentence: str) -> bool:
    low, high = ANSWER_WORDS
    is_whole = sentence[-1] in ".!?" and not sentence[0].islower()
    return is_whole and low <= words(sentence) <= high


def rows_of(subject: str, title: str, run: list[str], opening: str | None) -> list[Row]:
    """Rows of one context: the most natural questions first, among those the longest answers."""
    context = " ".join(run)
    candidates = [
        (*question(subject, run, i, opening), answer)
        for i, answer in enumerate(run)
        if is_answer(answer) and context.count(answer) == 1
    ]
    candidates.sort(key=lambda c: (c[0], -words(c[2]), c[1]))
    rows = []
    for _, asked, text in candidates[:ROWS_PER_CONTEXT]:
        rows.append(
            {
                "id": hashlib.sha256(f"{context}\0{asked}".encode()).hexdigest()[:16],
                "title": title,
                "context": context,
                "question": asked,
                "answers": {"text": [text], "answer_start": [context.index(text)]},
            }
        )
    return rows


def groups() -> list[list[Row]]:
    """Rows by context, in an order that content decides; no context, no answer comes twice."""
    found: list[list[Row]] = []
    for heading, text in topics():
        subject = heading.strip().replace('"', "")
        for run in contexts(text):
            found.append(rows_of(f"“{subject}”", subject, run, None))
    for module in MODULES:
        for name, text, is_callable in docstrings(module):
            opening = f"What does {name} do?" if is_callable else f"What is {name}?"
            for part, run in enumerate(contexts(text)):
                found.append(rows_of(name, name, run, opening if part == 0 else None))
    unique = without_repeats(found)
    return sorted(unique, key=lambda g: hashlib.sha256(g[0]["context"].encode()).hexdigest())


def without_repeats(found: list[list[Row]]) -> list[list[Row]]:
    """Drop each context that shares an answer with an earlier one: this keeps the splits apart.

    Docstrings are copied from class to class, whole or in part.
    """
    seen: set[str] = set()
    unique = []
    for group in found:
        texts = {row["context"] for row in group} | {row["answers"]["text"][0] for row in group}
        if group and not texts & seen:
            unique.append(group)
            seen |= texts
    return unique


def split(train: int, validation: int) -> dict[str, list[Row]]:
    """The two splits; whole contexts go to one or the other.

    Raises:
        DatasetError: there are fewer rows than asked for.
    """
    found: dict[str, list[Row]] = {"validation": [], "train": []}
    wanted = {"validation": validation, "train": train}
    for group in groups():
        name = "validation" if len(found["validation"]) < validation else "train"
        found[name] += group
    for name, rows in found.items():
        if len(rows) < wanted[name]:
            raise DatasetError(
                f"--{name} {wanted[name]}: this Python's documentation gives only {len(rows)} rows"
                + (" (python -OO removes docstrings)" if sys.flags.optimize > 1 else "")
            )
        found[name] = rows[: wanted[name]]
    return found


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
    parser.add_argument("--validation", type=int, default=80, metavar="ROWS")
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
    sys.exit(main())
