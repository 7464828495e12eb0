"""Hydra composition: the dataclasses hold every default, ``conf/`` and the command line say what
differs.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import get_type_hints

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException, OverrideParseException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from .errors import ConfigError
from .schema import SparkConfig

_STORE_NAME = "spark"


def config_folder() -> Path:
    """``conf/``: from $SPARK_NEMO_CONF, the installed package, or the checkout, in that order."""
    package = Path(__file__).resolve().parents[1]
    named = os.environ.get("SPARK_NEMO_CONF")
    candidates = [Path(named)] if named else [package / "conf", package.parent / "conf"]
    for folder in candidates:
        if folder.is_dir():
            return folder.resolve()
    raise ConfigError(
        f"no conf/ folder at {' or '.join(map(str, candidates))}: set SPARK_NEMO_CONF"
    )


def compose_config(overrides: list[str]) -> SparkConfig:
    """The validated configuration for Hydra overrides such as ``+experiment=toy`` and
    ``rl.group_size=8``.

    Raises ``ConfigError``, one line, for an unknown key, a wrong type, an illegal value or a value
    without effect.
    """
    ConfigStore.instance().store(name=_STORE_NAME, node=SparkConfig)
    try:
        with initialize_config_dir(str(config_folder()), version_base="1.3"):
            tree = compose(config_name=_STORE_NAME, overrides=overrides)
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
    """The resolved configuration as YAML, for the run folder."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


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
            return f"override {cause.override!r} cannot be read ({reason}): quote a value with special signs"
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
    """What to write instead, after Hydra's words for a wrong name; nothing where none of them is
    recognised.
    """
    if found := re.search(r"Key '(\w+)' not in '(\w+)'", message):
        names = next(
            (
                [each.name for each in fields(section)]
                for section in _sections(SparkConfig)
                if section.__name__ == found[2]
            ),
            [],
        )
        close = difflib.get_close_matches(found[1], names, n=1)
        return f": did you mean {close[0]}?" if close else f": there are {', '.join(names)}"
    if found := re.search(r"Could not override '(experiment|engine)'\. No match", message):
        return f" Write +{found[1]}=NAME"
    if found := re.search(r"Could not find '((?:experiment|engine)/(?:\w+/)?)", message):
        known = sorted(path.stem for path in (config_folder() / found[1]).glob("*.yaml"))
        return f": there are {', '.join(known)}" if known else ""
    return ""


def _sections(section: type) -> Iterator[type]:
    """The dataclass and those that its fields hold."""
    yield section
    for kind in get_type_hints(section).values():
        if is_dataclass(kind):
            yield from _sections(kind)
