"""Generate the settings and command-line reference; MkDocs calls ``on_files`` while it builds.

The settings come from the configuration's dataclasses: name, type, default, and the docstring under
the field. The commands come from the argument parser. Nothing is written into the repository.

    python tools/reference_pages.py build/reference   # write the pages, to read them as text
"""

from __future__ import annotations

import argparse
import ast
import inspect
import itertools
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import MISSING, Field, fields, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

from spark_nemo.cli.main import build_parser
from spark_nemo.config import SparkConfig
from spark_nemo.config.registry import GROUPS


def pages() -> dict[str, str]:
    """Return the Markdown of every generated page by its path in the site."""
    return {"reference/settings.md": settings_page(), "reference/cli.md": cli_page()}


def on_files(files: Any, config: Any) -> Any:
    """Add the generated pages to the site (MkDocs hook)."""
    from mkdocs.structure.files import File

    for path, text in pages().items():
        files.append(File.generated(config, path, content=text))
    return files


def settings_page() -> str:
    """Return one table of settings per section of the configuration."""
    lines = [
        "# Settings",
        "",
        "Every setting with its default, generated from the dataclasses in `spark_nemo/config/`. "
        "Set one on the command line (`rl.steps=50`) or in an experiment file. A section whose title "
        "has a slash is a choice (`rl/reward=step_average`): its settings exist only with it.",
    ]
    seen: set[str] = set()
    for title, name, section in _sections("", SparkConfig):
        if title in seen:  # a nested choice that several options have
            continue
        seen.add(title)
        lines += ["", f"## {title}", "", inspect.cleandoc(section.__doc__ or ""), ""]
        docs = attribute_docs(section)
        hints = get_type_hints(section)
        own = [
            field
            for field in fields(section)
            if not is_dataclass(hints[field.name]) and field.name != "name"
        ]
        if own:
            lines += ["| setting | type | default | meaning |", "|---|---|---|---|"]
        for field in own:
            meaning = " ".join(docs.get(field.name, "").replace("|", "\\|").split())
            lines.append(
                f"| `{name}.{field.name}` | {_type_name(section, field)} | `{_default(field)}` "
                f"| {meaning} |"
            )
    return "\n".join(lines) + "\n"


def cli_page() -> str:
    """Return the help of every command."""
    lines = ["# Command line", ""]
    for name, parser in _commands("spark-nemo", build_parser()):
        lines += [f"## {name}", "", "```text", parser.format_help().rstrip(), "```", ""]
    return "\n".join(lines)


def attribute_docs(section: type) -> dict[str, str]:
    """Return the docstring that follows each field of a dataclass."""
    docs: dict[str, str] = {}
    for base in reversed(section.__mro__):
        if not is_dataclass(base):
            continue
        body = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0].body
        for before, statement in itertools.pairwise(body):
            is_text = isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
            if isinstance(before, ast.AnnAssign) and is_text:
                docs[before.target.id] = str(statement.value.value)
    return docs


def _sections(name: str, section: type, title: str = "") -> Iterator[tuple[str, str, type]]:
    """Yield every section that has settings of its own: its title, dotted name and dataclass."""
    hints = get_type_hints(section)
    if title or (name and not all(is_dataclass(hint) for hint in hints.values())):
        yield title or name, name, section
    for field in fields(section):
        if not is_dataclass(hints[field.name]):
            continue
        inner = f"{name}.{field.name}" if name else field.name
        group = inner.replace(".", "/")
        if group not in GROUPS:
            yield from _sections(inner, hints[field.name])
            continue
        by_settings: dict[type, list[str]] = {}
        for option_name, option in GROUPS[group].items():
            by_settings.setdefault(type(option.settings), []).append(option_name)
        for settings, names in by_settings.items():
            yield from _sections(inner, settings, f"{group}={', '.join(names)}")


def _type_name(section: type, field: Field[Any]) -> str:
    return str(field.type).replace("|", "or")


def _default(field: Field[Any]) -> str:
    value = field.default_factory() if field.default_factory is not MISSING else field.default
    if value is MISSING:
        return "required"
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return repr(value) if value == "" else str(value)


def _commands(
    name: str, parser: argparse.ArgumentParser
) -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """Yield the parser of every command below ``parser``, in order."""
    yield name, parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command, inner in action.choices.items():
                yield from _commands(f"{name} {command}", inner)


if __name__ == "__main__":
    target = Path(sys.argv[1])
    for path, text in pages().items():
        (target / path).parent.mkdir(parents=True, exist_ok=True)
        (target / path).write_text(text)
