"""Config groups: the options of a choice such as ``rl/reward``, each with its own settings.

A choice is made with a slash (``rl/reward=step_average``), its settings are set with dots
(``rl.reward.votes=3``). The settings of an option that is not chosen do not exist.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, TypeVar

from .errors import ConfigError


@dataclass
class Choice:
    """Settings of one option of a config group."""

    name: str = ""
    """Name of the option. Set by the choice, never on its own."""


AnyChoice = TypeVar("AnyChoice", bound=Choice)


@dataclass(frozen=True, slots=True)
class Option:
    """One option of a config group."""

    settings: Choice
    """The option's settings with their defaults."""
    brings: Mapping[str, str] = field(default_factory=dict)
    """Options of other groups that are the default with this one, by group."""
    needs_step_labels: bool = False
    """True for a reward or advantage that a reward model without step labels cannot serve."""
    reads_answer_keys: bool = False
    """True for a declared baseline that trains on answers."""
    function: Callable[..., Any] | None = None
    """Code of the option: of a reward or an advantage."""


GROUPS: dict[str, dict[str, Option]] = {}
"""Options by group and name; the setting ``rl.reward`` belongs to the group ``rl/reward``."""


def register_option(
    group: str,
    settings: Choice,
    *,
    brings: Mapping[str, str] | None = None,
    needs_step_labels: bool = False,
    reads_answer_keys: bool = False,
) -> None:
    """Make ``group=settings.name`` a legal choice. A second registration replaces the first."""
    GROUPS.setdefault(group, {})[settings.name] = Option(
        settings, brings or {}, needs_step_labels, reads_answer_keys
    )


def register_function(group: str, name: str, function: Callable[..., Any]) -> None:
    """Give an option its code."""
    GROUPS[group][name] = replace(option(group, name), function=function)


def option(group: str, name: str) -> Option:
    """Return an option. Raises ``ConfigError`` naming the legal ones."""
    options = GROUPS[group]
    if name not in options:
        raise ConfigError(f"{group}={name}: choose one of {', '.join(sorted(options))}")
    return options[name]


def choose(group: str, name: str, **settings: Any) -> Choice:
    """Return the settings of an option, with ``settings`` in the place of its defaults."""
    return replace(option(group, name).settings, **settings)


def declared_in(settings: type, name: str) -> type:
    """Return the class of the hierarchy of ``settings`` that declares the field ``name``."""
    return next(each for each in settings.__mro__ if name in inspect.get_annotations(each))


def carried_over(old: Choice, new: AnyChoice) -> AnyChoice:
    """Return a copy of ``new`` with the values of ``old`` for the settings that both share.

    Two options share a setting when they inherit it from the same class: two settings that only
    have the same name mean different things.
    """
    values: dict[str, Any] = {}
    for each in fields(new):
        name = each.name
        shared = name != "name" and any(one.name == name for one in fields(old))
        if shared and declared_in(type(old), name) is declared_in(type(new), name):
            values[name] = getattr(old, name)
        else:
            values[name] = getattr(new, name)
    return type(new)(**values)
