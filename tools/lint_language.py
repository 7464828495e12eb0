"""Check the language rules of CONTRIBUTING.md that a program can check; part of ``make lint``.

Reads docstrings, comments, log and error messages and command-line help of Python files, comments of
YAML and shell files, and the prose of Markdown pages. Prints one line per finding and exits with 1 if there is any.

    python tools/lint_language.py                 # the whole repository
    python tools/lint_language.py spark_nemo/run  # some folders or files
    python tools/lint_language.py --count         # findings per folder
"""

from __future__ import annotations

import argparse
import ast
import io
import re
import sys
import tokenize
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

REPO = Path(__file__).resolve().parents[1]
DEFAULT_PATHS = (
    "spark_nemo",
    "tests",
    "tools",
    "benchmarks",
    "slurm",
    "conf",
    "docs",
    "README.md",
    "CONTRIBUTING.md",
    "containers/README.md",
)
BANNED = {
    r"nobody|somebody|whoever|anybody": "name the actor: the trainer, the client, the caller",
    r"refus(?:e|es|ed|ing|al|als)": "reject, unsupported, invalid or fail",
    r"anew": "again, from scratch",
    r"beside": "next to, in addition to",
    r"for ever": "indefinitely",
    r"lies": "is, is in",
    r"stands": "is",
    r"mend|mends|mended|mending": "fix, repair",
    r"strike|strikes|struck": "remove, hit",
    r"doze|dozes|dozing": "wait",
    r"room|rooms": "package, folder; space",
    r"house": "package, repository",
    r"arm|arms": "RL variant",
    r"small world": "toy task",
    r"minder|minders": "supervisor",
    r"keeper|keepers": "launcher",
    r"so many|so long|so often": "at most N, as many as, as long as",
    r"is no(?! (?:longer|more|less|such))": "is not a",
    r"said": "reported, logged, set",
}
"""Pattern of whole words (any case) to what the field writes."""
_BANNED = [
    (re.compile(rf"\b(?:{words})\b".replace(" ", r"\s+"), re.IGNORECASE), use)
    for words, use in BANNED.items()
]

BAD_BEGINNINGS = frozenset(
    ["Of", "What", "Who", "Whom", "Whose", "Those", "Which", "How", "Whether"]
    + ["Is", "Are", "Was", "Were", "Does", "Do", "Did", "Can", "Should"]
)
"""First words after which a docstring is a question or needs its context to be understood."""
_MESSAGE_CALLS = re.compile(
    r"(?:debug|info|warning|error|exception|critical|warn|log|print|fail|skip)$|(?:Error|Failure|Warning|Lost)$"
)
_HELP_KEYWORDS = frozenset({"help", "description", "epilog", "reason"})
_ALLOW = "language: allow"
"""Comment that exempts its line, for a quotation."""


class Finding(NamedTuple):
    """One place that breaks a rule."""

    path: Path
    line: int
    problem: str


def main() -> int:
    """Print the findings of the paths on the command line; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("paths", nargs="*", default=DEFAULT_PATHS, help="folders or files")
    parser.add_argument("--count", action="store_true", help="print findings per folder only")
    arguments = parser.parse_args()

    findings = [finding for path in files(arguments.paths) for finding in check(path)]
    if arguments.count:
        for folder, count in sorted(Counter(str(f.path.parent) for f in findings).items()):
            print(f"{count:5d} {folder}")
    else:
        for finding in findings:
            print(f"{finding.path}:{finding.line}: {finding.problem}")
    print(f"{len(findings)} findings", file=sys.stderr)
    return 1 if findings else 0


def files(paths: list[str] | tuple[str, ...]) -> Iterator[Path]:
    """Yield the Python and Markdown files under ``paths``, relative to the repository."""
    for name in paths:
        path = REPO / name
        found = sorted(path.rglob("*")) if path.is_dir() else [path]
        for each in found:
            if each.suffix in _READERS and each != Path(__file__).resolve():
                yield each.relative_to(REPO)


def check(path: Path) -> Iterator[Finding]:
    """Yield the findings of one file."""
    text = (REPO / path).read_text()
    exempt = {n for n, line in enumerate(text.splitlines(), 1) if _ALLOW in line}
    for first_line, prose, is_docstring in _READERS[path.suffix](text):
        if is_docstring and (words := prose.split()) and words[0] in BAD_BEGINNINGS:
            yield Finding(path, first_line, f"docstring begins with '{words[0]}'")
        for pattern, use in _BANNED:
            for match in pattern.finditer(prose):
                line = first_line + prose.count("\n", 0, match.start())
                if line not in exempt:
                    words_found = " ".join(match[0].split())
                    yield Finding(path, line, f"'{words_found}': write {use}")


def python_texts(source: str) -> Iterator[tuple[int, str, bool]]:
    """Yield (line, text, is docstring) of what a person reads in a Python file."""
    for node in ast.walk(ast.parse(source)):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            for statement in body:
                if isinstance(statement, ast.Expr) and _is_string(statement.value):
                    yield statement.lineno, _without_code(statement.value.value), True
        if isinstance(node, ast.Call) and _is_message(node):
            for argument in node.args:
                yield from _strings(argument)
        if isinstance(node, ast.keyword) and node.arg in _HELP_KEYWORDS:
            yield from _strings(node.value)
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT and _ALLOW not in token.string:
            yield token.start[0], token.string, False


def markdown_texts(source: str) -> Iterator[tuple[int, str, bool]]:
    """Yield (line, text, False) of the prose of a Markdown page, without code and links' targets."""
    in_code = False
    for number, line in enumerate(source.splitlines(), 1):
        if line.lstrip().startswith("```"):
            in_code = not in_code
        elif not in_code:
            yield number, re.sub(r"\]\([^)]*\)", "]", _without_code(line)), False


def comment_texts(source: str) -> Iterator[tuple[int, str, bool]]:
    """Yield (line, text, False) of the comments of a YAML or shell file."""
    for number, line in enumerate(source.splitlines(), 1):
        if found := re.search(r"(?:^|\s)#(.*)", line):
            yield number, _without_code(found[1]), False


def _is_message(call: ast.Call) -> bool:
    name = getattr(call.func, "attr", getattr(call.func, "id", ""))
    return bool(_MESSAGE_CALLS.search(name))


def _strings(node: ast.AST) -> Iterator[tuple[int, str, bool]]:
    for each in ast.walk(node):
        if _is_string(each):
            yield each.lineno, _without_code(each.value), False


def _is_string(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def _without_code(text: str) -> str:
    """Blank out what is in backticks: names in code are not prose."""
    return re.sub(r"``[^`]*``|`[^`\n]*`", "``", text)


_READERS = {
    ".py": python_texts,
    ".md": markdown_texts,
    ".yaml": comment_texts,
    ".sh": comment_texts,
}
"""Reader of a file's prose by its suffix."""

if __name__ == "__main__":
    sys.exit(main())
