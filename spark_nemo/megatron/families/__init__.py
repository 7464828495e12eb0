"""Model families: which Hugging Face tensors make which Megatron parameters. A new family is one
more file here.
"""

from __future__ import annotations

from spark_nemo.config.errors import ConfigError

from .llama import LLAMA
from .parts import Experts, RopeScaling
from .qwen2 import QWEN2
from .qwen3 import QWEN3
from .qwen3_moe import QWEN3_MOE
from .table import Family, Rule, Table, Transform

FAMILIES = {family.model_type: family for family in (QWEN2, QWEN3, LLAMA, QWEN3_MOE)}

__all__ = [
    "FAMILIES",
    "Experts",
    "Family",
    "RopeScaling",
    "Rule",
    "Table",
    "Transform",
    "family_of",
]


def family_of(model_type: str, source: str) -> Family:
    """The family of a config.json's ``model_type``. ``ConfigError`` for one that has no file here."""
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise ConfigError(
            f"{source}: model_type={model_type!r} is not supported, only {', '.join(FAMILIES)} "
            "(add a file to megatron/families)"
        )
    return FAMILIES[model_type]
