"""Hydra composition: the dataclasses hold every default, ``conf/`` and the command line say what differs."""

from __future__ import annotations

import os
from pathlib import Path

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
    raise ConfigError(f"no conf/ folder at {' or '.join(map(str, candidates))}: set SPARK_NEMO_CONF")


def compose_config(overrides: list[str]) -> SparkConfig:
    """The validated configuration for Hydra overrides such as ``+experiment=toy`` and ``rl.group_size=8``.

    Raises ``ConfigError``, one line, for an unknown key, a wrong type, an illegal value or a value without effect.
    """
    ConfigStore.instance().store(name=_STORE_NAME, node=SparkConfig)
    try:
        with initialize_config_dir(str(config_folder()), version_base="1.3"):
            tree = compose(config_name=_STORE_NAME, overrides=overrides)
        config = OmegaConf.to_object(tree)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(_one_line(error)) from error
    except yaml.YAMLError as error:
        raise ConfigError(f"a file in {config_folder()} is not YAML: {' '.join(str(error).split())}") from error
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
    suffix = "".join(f" (key: {key})" for key in sorted(keys) if not any(key in line for line in lines))
    return "; ".join(lines) + suffix
