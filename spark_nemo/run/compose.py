"""Compose the configuration from dataclass defaults, recipes in ``conf/``, and the command line.

Hydra reads the command line and decides which options and recipes are chosen, and in which order
they count. Merging them is done here, because Hydra knows neither of two rules:

* A key that the chosen options do not have is an error that names the nearest valid key.
* A recipe's setting goes with the option it was written for. When the command line or another
  recipe chooses a different option (``+experiment=toy rl/kl=none``), the recipe's settings that
  the new option does not share are left out. ``++rl/reward=rlvr`` does the same to the command
  line: it leaves out what the words before it set for another option. Jobs of the pipeline are
  made so.
"""

from __future__ import annotations

import difflib
import importlib
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, is_dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import yaml
from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from spark_nemo.config import ConfigError, SparkConfig
from spark_nemo.config.registry import GROUPS, Choice, declared_in, option

_ROOT = "spark"
_RECIPES = ("experiment", "engine")
"""Folders of ``conf/`` whose files are added with ``+experiment=NAME``."""


def config_folder() -> Path:
    """Return ``conf/``: $SPARK_NEMO_CONF, else the installed package's, else the checkout's."""
    package = Path(__file__).resolve().parents[1]
    named = os.environ.get("SPARK_NEMO_CONF")
    candidates = [Path(named)] if named else [package / "conf", package.parent / "conf"]
    for folder in candidates:
        if folder.is_dir():
            return folder.resolve()
    raise ConfigError(
        f"no conf/ folder at {' or '.join(map(str, candidates))}: set SPARK_NEMO_CONF"
    )


def compose_config(overrides: Sequence[str]) -> SparkConfig:
    """Return the validated configuration for Hydra overrides.

    ``overrides`` are words such as ``+experiment=toy``, ``rl/reward=step_average`` and
    ``rl.group_size=8``. Raises ``ConfigError``, one line, for an unknown or misplaced key, a wrong
    type or an illegal value.
    """
    try:
        words = OverridesParser.create().parse_overrides(list(overrides))
        _import_plugins(words)
        _check_choices(words)
        switches = [number for number, word in enumerate(words) if _is_switch(word)]
        first = switches[0] if switches else len(words)
        choices, recipes = _chosen(words)
        tree = _defaults(choices)
        for recipe in recipes:
            _merge_recipe(tree, choices, recipe)
        before = tree
        if switches:
            kept = [word for word in words if not _is_switch(word)]
            before = _defaults(_chosen(kept)[0])
        for word in words[:first]:
            _apply(tree, word, written_for=before)
        for word in words[first:]:
            _apply(tree, word, written_for=tree)
        config = OmegaConf.to_object(tree)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(_one_line(error)) from error
    except yaml.YAMLError as error:
        raise ConfigError(
            f"a file in {config_folder()} is not YAML: {' '.join(str(error).split())}"
        ) from error
    assert isinstance(config, SparkConfig)
    return config


def config_yaml(config: SparkConfig) -> str:
    """Return the resolved configuration as YAML, for the run folder."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


@dataclass(frozen=True)
class _Recipe:
    """A file of ``conf/``, and the configuration that its settings were written for."""

    path: str
    choices: Mapping[str, str]
    settings: dict[str, Any]


def _import_plugins(words: Sequence[Override]) -> None:
    """Import the modules that the command line and its recipes name, so that they register."""
    names: list[str] = []
    for word in words:
        if word.key_or_group in _RECIPES:
            value = word.value()
            for name in value if isinstance(value, list) else [value]:
                names += _plugins_of(f"{word.key_or_group}/{name}")
        elif word.key_or_group == "plugins":
            names += word.value() or []
    if os.getcwd() not in sys.path:  # the installed command has its own folder there instead
        sys.path.insert(0, os.getcwd())
    for name in names:
        try:
            importlib.import_module(str(name))
        except ModuleNotFoundError as error:
            raise ConfigError(
                f"plugins={name}: {error}; run the command in the folder that holds the module"
            ) from error


def _plugins_of(path: str) -> list[str]:
    """Return the plugins that a recipe and the recipes it extends name."""
    if not (config_folder() / f"{path}.yaml").exists():
        return []  # Hydra reports the unknown name
    content = _load(path)
    names = list(content.get("plugins", []))
    for entry in content.get("defaults", []):
        if isinstance(entry, str) and entry.startswith("/"):
            names += _plugins_of(entry.lstrip("/"))
    return names


def _check_choices(words: Sequence[Override]) -> None:
    """Check the overrides that choose an option or a recipe."""
    for word in words:
        key = word.key_or_group
        if word.is_delete():
            raise ConfigError(f"{word.input_line}: a setting cannot be removed; set it to a value")
        if key in GROUPS:
            if word.is_add() and not word.is_force_add():
                raise ConfigError(f"{word.input_line}: write {key}={word.value()} without the +")
            _check_option(key, str(word.value()))
        elif key in _RECIPES and not word.is_add():
            raise ConfigError(f"{word.input_line}: write +{key}={word.value()}")
        elif "/" in key and key not in _RECIPES:
            near = difflib.get_close_matches(key, GROUPS, n=1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(sorted(GROUPS))}"
            raise ConfigError(f"{word.input_line}: {key} is not a choice; {hint}")


def _is_switch(word: Override) -> bool:
    return word.key_or_group in GROUPS and word.is_force_add()


def _check_option(group: str, name: str) -> None:
    options = GROUPS[group]
    if name in options:
        return
    near = difflib.get_close_matches(name, options, n=1)
    hint = f"did you mean {near[0]}?" if near else f"choose one of {', '.join(sorted(options))}"
    raise ConfigError(f"{group}={name}: not an option; {hint}")


def _chosen(words: Sequence[Override]) -> tuple[dict[str, str], list[_Recipe]]:
    """Return the option of every group, and the recipes in the order in which they count."""
    # The last choice of a group counts, as for settings; Hydra itself rejects a second one.
    groups = {word.key_or_group: str(word.value()) for word in words if word.key_or_group in GROUPS}
    added = [word.input_line for word in words if word.key_or_group in _RECIPES]
    _store()
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        chosen = [f"{group}={name}" for group, name in groups.items()]
        choices, files = _defaults_list([*added, *chosen])
    _bring(choices, groups)
    recipes = [_read(path) for path in files]
    for group in groups:
        _check_place(group, choices)
    return choices, recipes


def _store() -> None:
    """Tell Hydra the groups, their options and the default of each."""
    store = ConfigStore.instance()
    default = SparkConfig()
    root: list[Any] = ["_self_"]
    for group, options in sorted(GROUPS.items()):
        root.append({group: _default_option(default, group)})
        for name in options:
            # Empty: Hydra only decides which option is chosen.
            store.store(group=group, name=name, node={})
    store.store(name=_ROOT, node={"defaults": root})


def _default_option(default: SparkConfig, group: str) -> str:
    """Return the option that a group has by default."""
    node = default
    for part in group.split("/"):
        node = getattr(node, part, None)
    return node.name if isinstance(node, Choice) else next(iter(GROUPS[group]))


def _defaults_list(overrides: list[str]) -> tuple[dict[str, str], list[str]]:
    """Return Hydra's choices and the paths of the recipes, in order."""
    loader = GlobalHydra.instance().config_loader()
    found = loader.compute_defaults_list(_ROOT, overrides, RunMode.RUN)
    choices = {group: found.overrides.known_choices[group] for group in GROUPS}
    files = [
        each.config_path
        for each in found.defaults
        if each.config_path and each.config_path.split("/")[0] in _RECIPES
    ]
    return choices, files


def _bring(choices: dict[str, str], explicit: Mapping[str, str]) -> None:
    """Replace defaults by the options that other choices bring."""
    default = SparkConfig()
    for group in list(choices):
        for other, name in option(group, choices[group]).brings.items():
            if other not in explicit and choices[other] == _default_option(default, other):
                choices[other] = name


def _read(path: str) -> _Recipe:
    """Read a recipe, with the choices that it makes on its own."""
    choices = {group: _default_option(SparkConfig(), group) for group in GROUPS}
    choices |= _own_choices(path)
    _bring(choices, {})
    settings = _load(path)
    settings.pop("defaults", None)
    return _Recipe(path, choices, settings)


def _own_choices(path: str) -> dict[str, str]:
    """Return the options that a recipe and the recipes it extends choose."""
    choices: dict[str, str] = {}
    overridden: dict[str, str] = {}
    for entry in _load(path).get("defaults", []):
        if isinstance(entry, str) and entry.startswith("/"):
            choices |= _own_choices(entry.lstrip("/"))
        elif isinstance(entry, dict):
            for key, value in entry.items():
                overridden[key.removeprefix("override").strip().lstrip("/")] = str(value)
    return choices | {group: name for group, name in overridden.items() if group in GROUPS}


def _load(path: str) -> dict[str, Any]:
    """Return the content of a file of ``conf/``, with its interpolations as they are written."""
    content = OmegaConf.to_container(OmegaConf.load(config_folder() / f"{path}.yaml"))
    if not isinstance(content, dict):
        raise ConfigError(f"conf/{path}.yaml: must be a mapping of settings")
    return content


def _defaults(choices: Mapping[str, str]) -> DictConfig:
    """Return the tree of defaults under these choices."""
    tree = OmegaConf.structured(SparkConfig)
    for group, name in sorted(choices.items()):  # parents before their nested groups
        *parents, last = group.split("/")
        parent = reduce(lambda node, part: node[part], parents, tree)
        if last in parent:
            parent[last] = OmegaConf.structured(option(group, name).settings)
    return tree


def _check_place(group: str, choices: Mapping[str, str]) -> None:
    """Raise ``ConfigError`` if the chosen options do not have the nested choice ``group``."""
    tree = _defaults(choices)
    if _find(tree, group.replace("/", ".")):
        return
    raise ConfigError(
        f"{group}={choices[group]}: not with these options; it exists with "
        f"{_where(group.replace('/', '.')) or 'no option'}"
    )


def _merge_recipe(tree: DictConfig, choices: Mapping[str, str], recipe: _Recipe) -> None:
    """Merge the settings of a recipe that the chosen options share with the recipe's own."""
    own = tree if recipe.choices == choices else _defaults(recipe.choices)
    for key, value in _leaves(recipe.settings, own):
        _check_key(own, key, value, f"conf/{recipe.path}.yaml: ")
        if _find(tree, key) and _types_agree(own, tree, key):
            OmegaConf.update(tree, key, value, merge=True)


def _leaves(settings: dict[str, Any], like: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the settings of a recipe by dotted key; values of plain dictionaries stay whole."""
    for name, value in settings.items():
        key = f"{prefix}{name}"
        known = _is_section(like) and name in like.keys()  # noqa: SIM118
        below = like._get_node(name) if known else None
        if isinstance(value, dict) and (_is_section(below) or not known):
            yield from _leaves(value, below, f"{key}.")
        else:
            yield key, value


def _apply(tree: DictConfig, word: Override, written_for: DictConfig) -> None:
    """Set what one override says, unless it was written for an option that is not chosen."""
    key = word.key_or_group
    if key in GROUPS or key in _RECIPES:
        return
    _check_key(written_for, key, word.value(), "")
    if word.is_add() and not word.is_force_add() and not _is_entry(tree, key):
        raise ConfigError(f"{word.input_line}: {key} exists; write it without the +")
    if _find(tree, key) and _types_agree(written_for, tree, key):
        OmegaConf.update(tree, key, word.value(), merge=True)


def _check_key(tree: DictConfig, key: str, value: Any, where: str) -> None:
    """Raise ``ConfigError`` with the nearest valid key for a key that is not in the tree."""
    group = key.replace(".", "/")
    if group in GROUPS and not isinstance(value, Mapping | DictConfig):
        raise ConfigError(f"{where}{key}={value}: choose an option with {group}={value}")
    parent, _, last = key.rpartition(".")
    if last == "name" and parent.replace(".", "/") in GROUPS:
        group = parent.replace(".", "/")
        raise ConfigError(f"{where}{key}={value}: choose an option with {group}={value}")
    if _find(tree, key):
        return
    raise ConfigError(f"{where}{key}: {_nearest(tree, key)}")


def _find(tree: DictConfig, key: str) -> bool:
    """True if the tree has the key, or a plain dictionary that may hold it."""
    node: Any = tree
    for part in key.split("."):
        if not isinstance(node, DictConfig):
            return False
        if not _is_section(node):
            return True
        if part not in node.keys():  # noqa: SIM118  ``in`` is false for a value that has to be set
            return False
        node = node._get_node(part)
    return True


def _is_entry(tree: DictConfig, key: str) -> bool:
    """True for an entry of a plain dictionary, such as an environment variable."""
    return not _is_section(OmegaConf.select(tree, key.rpartition(".")[0]))


def _types_agree(old: DictConfig, new: DictConfig, key: str) -> bool:
    """True if ``key`` is declared by the same dataclass in both trees."""
    for part in key.split("."):
        if not _is_section(old):
            return True
        old_type = OmegaConf.get_type(old)
        new_type = OmegaConf.get_type(new)
        if declared_in(old_type, part) is not declared_in(new_type, part):
            return False
        old = old._get_node(part)
        new = new._get_node(part)
    return True


def _is_section(node: Any) -> bool:
    return isinstance(node, DictConfig) and is_dataclass(OmegaConf.get_type(node))


def _nearest(tree: DictConfig, key: str) -> str:
    """Say where a key exists, or which key was probably meant."""
    if elsewhere := _where(key):
        return f"exists with {elsewhere}"
    present = list(_keys(tree))
    everywhere = {*present, *(one for one, _ in _option_keys())}
    last = key.rpartition(".")[2]
    same_name = [one for one in present if one.rpartition(".")[2] == last]
    # A setting of that name deeper in the same section beats one that is spelt like it.
    section = key.rpartition(".")[0]
    near = [one for one in same_name if one.startswith(f"{section}.")][:1]
    near = near or difflib.get_close_matches(key, sorted(everywhere), n=1, cutoff=0.75)
    near = near or difflib.get_close_matches(key, same_name, n=1, cutoff=0.3)
    near = near or difflib.get_close_matches(key, sorted(everywhere), n=1)
    if not near:
        return "unknown setting; --print-config shows all of them"
    found = near[0]
    if found not in present and (where := _where(found)):
        return f"unknown setting; did you mean {found}, which exists with {where}?"
    return f"unknown setting; did you mean {found}?"


def _where(key: str) -> str:
    """Return the options that have a key, such as ``rl/kl=k1, k2, k3``."""
    by_group: dict[str, list[str]] = {}
    for one, (group, name) in _option_keys():
        if one == key:
            by_group.setdefault(group, []).append(name)
    return " or ".join(f"{group}={', '.join(names)}" for group, names in by_group.items())


def _option_keys() -> Iterator[tuple[str, tuple[str, str]]]:
    """Yield the dotted keys below every option, with the option's group and name."""
    for group, options in GROUPS.items():
        for name, each in options.items():
            prefix = group.replace("/", ".")
            for key in _keys(OmegaConf.structured(each.settings)):
                yield f"{prefix}.{key}", (group, name)


def setting_names() -> set[str]:
    """Return the dotted names of all settings and sections, those of every option included."""
    return {*_keys(OmegaConf.structured(SparkConfig)), *(key for key, _ in _option_keys())}


def _keys(section: DictConfig, prefix: str = "") -> Iterator[str]:
    """Yield all dotted keys of a tree, sections included."""
    for name in section:
        yield f"{prefix}{name}"
        node = section._get_node(name)
        if _is_section(node):
            yield from _keys(node, f"{prefix}{name}.")


def _one_line(error: BaseException) -> str:
    causes: list[BaseException] = []
    current: BaseException | None = error
    while current is not None and current not in causes:
        causes.append(current)
        current = current.__cause__ or current.__context__
    for cause in causes:
        if isinstance(cause, ConfigError):
            return str(cause)
    for cause in causes:
        if isinstance(cause, OverrideParseException):
            reason = " ".join(str(cause.message).split("\n")[0].split())
            return (
                f"override {cause.override!r} cannot be read ({reason}): "
                "quote a value with special signs"
            )
        if isinstance(cause, MissingMandatoryValue):
            return f"{cause.full_key}: has to be set"
    # Hydra wraps OmegaConf's error; the outer one names the override, the inner one the reason.
    known = [c for c in causes if isinstance(c, HydraException | OmegaConfBaseException)]
    lines = [" ".join(str(c).split("\n")[0].split()) for c in known]
    lines = [line for i, line in enumerate(lines) if "$VALUE" not in line and line not in lines[:i]]
    keys = {key for c in known if (key := getattr(c, "full_key", None))}
    suffix = "".join(
        f" (key: {key})" for key in sorted(keys) if not any(key in line for line in lines)
    )
    return "; ".join(lines) + suffix + _hint("; ".join(lines))


def _hint(message: str) -> str:
    """Return the names that exist, after Hydra's message for an unknown one."""
    for group, name in re.findall(r"Could not find '([\w/]+)/(\w+)'", message):
        if group in GROUPS:
            return f": choose one of {', '.join(sorted(GROUPS[group]))}"
        known = sorted(path.stem for path in (config_folder() / group).glob("*.yaml"))
        near = difflib.get_close_matches(name, known, n=1)
        if near:
            return f": did you mean {near[0]}?"
        return f": there are {', '.join(known)}" if known else ""
    return ""
