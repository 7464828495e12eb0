"""Command-line parsing: one-line errors, and the arguments that several subcommands share."""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Callable
from typing import NoReturn

from spark_nemo.config import ConfigError, SparkConfig
from spark_nemo.run.compose import compose_config, config_yaml
from spark_nemo.toy.resolve import resolve_toy


class CommandParser(argparse.ArgumentParser):
    """Argument parser whose errors are one line and name the nearest valid word."""

    def error(self, message: str) -> NoReturn:
        """Print one line and exit with status 2."""
        self.exit(2, f"spark-nemo: error: {_plain(message)} (see {self.prog} --help)\n")

    def nearest_option(self, option: str) -> str:
        """Return ``; did you mean --OPTION?`` for a misspelt option, or an empty string."""
        known = re.findall(r"--[a-z][\w-]*", self.format_usage())
        return _did_you_mean(option.partition("=")[0], known)


def add_command(
    commands: argparse._SubParsersAction,
    name: str,
    summary: str,
    run: Callable[[argparse.Namespace], int],
    *,
    examples: str = "",
    description: str | None = None,
) -> argparse.ArgumentParser:
    """Add a subcommand that calls ``run`` with its arguments."""
    command = commands.add_parser(
        name,
        help=summary,
        description=description or f"{summary[0].upper()}{summary[1:]}.",
        epilog=examples or None,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.set_defaults(run=run, parser=command)
    return command


def add_config_arguments(command: argparse.ArgumentParser) -> None:
    """Add overrides and ``--print-config``."""
    command.add_argument(
        "overrides",
        nargs="*",
        metavar="OVERRIDE",
        help="settings in Hydra's form: +experiment=NAME chooses an experiment, "
        "SECTION.SETTING=VALUE changes one setting",
    )
    command.add_argument(
        "--print-config", action="store_true", help="print the resolved settings and exit"
    )


def add_dry_run_argument(command: argparse.ArgumentParser) -> None:
    """Add ``--dry-run``."""
    command.add_argument(
        "--dry-run",
        action="store_true",
        help="check the settings and print what would run; start and write nothing",
    )


def parse_arguments(parser: CommandParser, argv: list[str] | None) -> argparse.Namespace:
    """Parse the command line; overrides may be on both sides of a flag.

    argparse alone takes an override after a flag for an error.
    """
    arguments, rest = parser.parse_known_args(argv)
    command: CommandParser = arguments.parser
    for word in rest:
        if word.startswith("-"):
            command.error(f"unknown option {word}{command.nearest_option(word)}")
        if not hasattr(arguments, "overrides"):
            command.error(f"unexpected argument {word}")
        arguments.overrides.append(word)
    return arguments


def configured(arguments: argparse.Namespace) -> SparkConfig | None:
    """Return the settings with toy names resolved; print them and return None if asked to."""
    config = compose_config(arguments.overrides)
    if arguments.print_config:
        print(config_yaml(config), end="")
        return None
    return resolve_toy(config)


def dry_run_only(arguments: argparse.Namespace, stage: str) -> bool:
    """Print the dry run of ``stage`` if asked to; return whether that was all."""
    if not arguments.dry_run or arguments.print_config:
        return False
    from spark_nemo.planning.dry_run import dry_run

    print(dry_run(compose_config(arguments.overrides), stage))
    return True


def require_override(word: str) -> None:
    """Raise ``ConfigError`` for a word that cannot be an override, such as a bare folder."""
    if "=" not in word and not word.startswith("~"):
        raise ConfigError(
            f"{word}: is not an override; name the run as run.dir={word}, with the overrides that "
            "its stages had"
        )


def _plain(message: str) -> str:
    """Shorten argparse's message about a misspelt word."""
    found = re.search(r"argument (\S+): invalid choice: '([^']*)' \(choose from (.*)\)", message)
    if found is None:
        return message
    argument, word, choices = found.groups()
    known = re.findall(r"[\w-]+", choices)
    what = "command" if argument in ("COMMAND", "BENCHMARK") else f"value of {argument}"
    return f"unknown {what} {word!r}{_did_you_mean(word, known) or f'; choose from {choices}'}"


def _did_you_mean(word: str, known: list[str]) -> str:
    nearest = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {nearest[0]}?" if nearest else ""
