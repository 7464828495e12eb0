"""Reading a distributed checkpoint's pickle (``.metadata``) without running code from it."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata

from spark_nemo.config.errors import ConfigError

_CHECKPOINT = "torch.distributed.checkpoint."
_ALLOWED = {
    f"{_CHECKPOINT}metadata": {
        "Metadata",
        "TensorStorageMetadata",
        "BytesStorageMetadata",
        "TensorProperties",
        "ChunkStorageMetadata",
        "MetadataIndex",
        "StorageMeta",
        "_MEM_FORMAT_ENCODING",
    },
    f"{_CHECKPOINT}filesystem": {"_StorageInfo", "_StoragePrefix"},
    f"{_CHECKPOINT}planner": {"SavePlan", "WriteItem", "WriteItemType", "TensorWriteData"},
    "megatron.core.dist_checkpointing.strategies.torch": {"MCoreMetadata", "MCoreSavePlan"},
    "torch": {"Size"}
    | {name for name, value in vars(torch).items() if isinstance(value, torch.dtype)},
    "torch.serialization": {"_get_layout"},
    "pathlib": {"PosixPath", "PurePosixPath", "Path"},
    "collections": {"OrderedDict", "defaultdict"},
    "builtins": {"set", "list", "dict", "tuple", "int", "str"},
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name not in _ALLOWED.get(module, ()):
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no checkpoint needs")
        if name == "MCoreMetadata":
            # Written by megatron-core up to 0.15, and so by NeMo 2: torch's Metadata with a field
            # on optimizers. 0.16 has an empty class of this name.
            return Metadata
        return super().find_class(module, name)


def read_metadata(path: Path) -> Any:
    """Return the ``Metadata`` of a distributed checkpoint.

    Only the classes of such metadata are created. Raises ``ConfigError`` for any other.
    """
    try:
        with path.open("rb") as stream:
            return _Unpickler(stream).load()
    except FileNotFoundError as error:
        raise ConfigError(
            f"{path} is missing: this is not a complete torch_dist checkpoint"
        ) from error
    # Python does not document the errors of a damaged pickle; the pickle module names these.
    except (
        pickle.UnpicklingError,
        EOFError,
        AttributeError,
        ImportError,
        IndexError,
        KeyError,
        TypeError,
        ValueError,
        RuntimeError,
        MemoryError,
        OverflowError,
    ) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
