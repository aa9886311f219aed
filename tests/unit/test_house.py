"""The rules that keep the map in docs/code.md true. Each failure names the offending line."""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "ds_kd"
#: Rooms from the top of the house to its ground; an import may only lead down.
LEVELS = (
    ("__main__",),
    ("plan",),
    ("recipe",),
    ("train",),
    ("teachers", "checkpoint", "evaluate"),
    ("models",),
    ("config", "losses"),
    ("data",),
    ("script", "command_line"),
    ("parallel", "quiet", "writing"),
    ("process", "hub"),
    ("errors", "files"),
)
LEVEL = {room: level for level, rooms in enumerate(LEVELS) for room in rooms}
READS_CONFIG = {"__main__", "config", "recipe", "plan"}
HAS_ENGINES = {"parallel", "checkpoint"}
#: Names of functions that return the noun they name, though its first word looks like a participle.
NOUNS = {"ending_of", "closing_message", "training_dtype", "scaled_logits_error"}
ARTICLES = {"The", "A", "An", "All", "Every", "That", "From"}
QUESTION_WORDS = {"What", "Where", "Whether", "Of", "How", "Which", "Who", "When", "Why"}
#: A sentence may begin with Where or When if that clause says under which condition it holds.
NOUN_CLAUSE = re.compile(r"(?:What|Whether|Of|How|Which|Who|Why) ")


@functools.cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Yield (line, dotted name) of everything that a file imports."""
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, name.name) for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.lineno, node.module or ""
            yield from ((node.lineno, f"{node.module}.{name.name}") for name in node.names)


def files() -> Iterator[tuple[str, Path]]:
    """Yield (room, file) of the whole package."""
    for path in sorted(PACKAGE.rglob("*.py")):
        room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if room != "__init__":
            yield room, path


def room_of(name: str) -> str | None:
    parts = name.split(".")
    return parts[1] if parts[0] == "ds_kd" and len(parts) > 1 and parts[1] in LEVEL else None


def test_every_room_has_its_level():
    assert {room for room, _ in files()} <= set(LEVEL)


def test_imports_between_rooms_lead_down():
    upwards = [
        f"{path.relative_to(PACKAGE)}:{line} imports {name}"
        for room, path in files()
        for line, name in imports(path)
        if (other := room_of(name)) and other != room and LEVEL[other] <= LEVEL[room]
    ]
    assert not upwards


def test_no_two_files_import_each_other_in_a_circle():
    paths = [*(path for _, path in files()), *(PACKAGE.parent / "benchmarks").rglob("*.py")]
    modules = {".".join(p.relative_to(PACKAGE.parent).with_suffix("").parts): p for p in paths}
    arrows = {
        name: {found for _, found in imports(path) if found in modules and found != name}
        for name, path in modules.items()
    }
    # A file that imports nothing that is left can be taken away; a circle is what then remains.
    while leaves := {name for name, found in arrows.items() if not found & set(arrows)}:
        arrows = {name: found for name, found in arrows.items() if name not in leaves}
    assert not arrows


def test_only_config_recipe_and_plan_read_the_config():
    readers = [
        f"{path.relative_to(PACKAGE)}:{line}"
        for room, path in files()
        for line, name in imports(path)
        if room_of(name) == "config" and room not in READS_CONFIG
    ]
    assert not readers


def test_deepspeed_stays_in_the_rooms_of_engines():
    guilty = [
        f"{path.relative_to(PACKAGE)}:{line}"
        for room, path in files()
        for line, name in imports(path)
        if name.split(".")[0] == "deepspeed" and room not in HAS_ENGINES
    ]
    assert not guilty


def test_config_and_errors_import_no_torch():
    guilty = [
        f"{path.relative_to(PACKAGE)}:{line}"
        for room, path in files()
        for line, name in imports(path)
        if room in ("config", "errors")
        and name.split(".")[0] in ("torch", "transformers", "deepspeed", "datasets")
    ]
    assert not guilty


def test_rooms_files_and_functions_stay_small():
    rooms: dict[Path, int] = {}
    for path in [*(path for _, path in files()), *(PACKAGE.parent / "benchmarks").rglob("*.py")]:
        rooms[path.parent] = rooms.get(path.parent, 0) + (path.name != "__init__.py")
        assert len(path.read_text().splitlines()) <= 400, path
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.FunctionDef):
                lines = (node.end_lineno or 0) - node.lineno + 1
                assert lines <= 50, f"{path}:{node.lineno} {node.name} has {lines} lines"
    assert max(rooms.values()) <= 11


def test_scripts_and_benchmarks_have_short_functions_too():
    root = PACKAGE.parent
    long = [
        f"{path.relative_to(root)}:{node.lineno} {node.name}"
        for path in [*(root / "launch").glob("*.py"), *(root / "benchmarks").rglob("*.py")]
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.FunctionDef)
        if (node.end_lineno or 0) - node.lineno >= 50
    ]
    assert not long


def test_docstrings_begin_with_a_verb_or_a_noun_not_with_a_question_word():
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
    guilty = [
        f"{path.relative_to(PACKAGE)}: {text.splitlines()[0]}"
        for _, path in files()
        for node in ast.walk(tree_of(path))
        if isinstance(node, kinds) and (text := ast.get_docstring(node))
        if text.split()[0] in QUESTION_WORDS
    ]
    assert not guilty


def test_docstrings_of_functions_begin_with_a_verb_and_not_with_the_thing_returned():
    root = PACKAGE.parent
    paths = [
        path for place in ("ds_kd", "launch", "benchmarks") for path in (root / place).rglob("*.py")
    ]
    guilty = [
        f"{path.relative_to(root)}:{node.lineno} {node.name}: {text.splitlines()[0]}"
        for path in paths
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.FunctionDef) and (text := ast.get_docstring(node))
        if not any(ast.unparse(each).endswith("property") for each in node.decorator_list)
        if text.split()[0] in ARTICLES or not text[0].isalpha()
    ]
    assert not guilty


def test_long_bodies_have_paragraphs_and_a_comment_that_says_why():
    guilty = []
    for _, path in files():
        lines = path.read_text().splitlines()
        for node in ast.walk(tree_of(path)):
            if not isinstance(node, ast.FunctionDef):
                continue
            code = node.body[1:] if ast.get_docstring(node) else node.body
            body = lines[code[0].lineno - 1 : node.end_lineno] if code else []
            has_paragraphs = any(not line.strip() for line in body)
            has_comment = any(line.strip().startswith("#") for line in body)
            if len(body) >= 20 and not (has_paragraphs and has_comment):
                guilty.append(f"{path.relative_to(PACKAGE)}:{node.lineno} {node.name}")
    assert not guilty


def test_functions_are_not_named_by_participles():
    root = PACKAGE.parent
    guilty = [
        f"{path.relative_to(root)}:{node.lineno} {node.name}"
        for place in ("ds_kd", "launch", "benchmarks")
        for path in (root / place).rglob("*.py")
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.FunctionDef) and node.name not in NOUNS
        if not any("property" in ast.unparse(each) for each in node.decorator_list)
        if (word := node.name.strip("_").split("_")[0]).endswith(("ed", "ing")) and word != "seed"
    ]
    assert not guilty


def test_text_files_are_utf_8_whatever_the_locale():
    guilty = []
    for path in (*PACKAGE.rglob("*.py"), *PACKAGE.parent.joinpath("launch").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call) or any(k.arg == "encoding" for k in node.keywords):
                continue
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            values = [a.value for a in node.args if isinstance(a, ast.Constant)]
            modes = [value for value in values if isinstance(value, str)]
            opens = name == "open" and (isinstance(node.func, ast.Name) or modes)
            opens = opens and not any("b" in mode for mode in modes)
            least = {"read_text": 1, "write_text": 2}.get(name, 0)
            if opens or len(node.args) < least:
                guilty.append(f"{path.name}:{node.lineno} {ast.unparse(node):.60}")
    assert not guilty


def sentences_in_code(path: Path) -> Iterator[tuple[int, str]]:
    """Yield (line, sentence) of docstrings, and (line, first sentence) of comments."""
    for node in ast.walk(tree_of(path)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
            text = ast.get_docstring(node) or ""
            line = 1 if isinstance(node, ast.Module) else node.lineno
            parts = (part for block in text.split("\n\n") for part in block.split(". "))
            yield from ((line, " ".join(part.split())) for part in parts)
    before = ""
    for number, line in enumerate(path.read_text().splitlines(), 1):
        text = line.strip()
        if text.startswith("#") and not before.startswith("#"):
            yield number, text.lstrip("#: ")
        before = text


def sentences_in_page(path: Path) -> Iterator[tuple[int, str]]:
    """Yield (number of the block, sentence) of a page's headings, paragraphs and rows."""
    text = re.sub(r"```.*?```", "", path.read_text(), flags=re.S)
    for number, block in enumerate(re.split(r"\n\s*\n|\n(?=[*|#-])|\| ", text)):
        for sentence in block.split(". "):
            yield number, " ".join(sentence.split()).lstrip("#*- ")


def test_no_sentence_begins_with_a_noun_clause():
    root = PACKAGE.parent
    places = ("ds_kd", "launch", "benchmarks", "tests")
    code = [path for place in places for path in (root / place).rglob("*.py")]
    pages = [root / "README.md", root / "CONTRIBUTING.md", *(root / "docs").glob("*.md")]
    read = [(sentences_in_code, code), (sentences_in_page, pages)]
    guilty = [
        f"{path.relative_to(root)}:{number}: {sentence[:80]}"
        for sentences, paths in read
        for path in paths
        for number, sentence in sentences(path)
        if NOUN_CLAUSE.match(sentence) and "?" not in sentence  # an example of a question
    ]
    assert not guilty


def test_names_of_tests_begin_with_no_noun_clause():
    guilty = [
        f"{path.name}:{node.lineno} {node.name}"
        for path in (PACKAGE.parent / "tests").rglob("test_*.py")
        for node in tree_of(path).body
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
        if NOUN_CLAUSE.match(node.name.removeprefix("test_").replace("_", " ").capitalize())
    ]
    assert not guilty
