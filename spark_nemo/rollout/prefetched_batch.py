"""A scored batch as bytes, for the checkpoint of a run whose next batch is made before it is
needed.

Pickle keeps token ids and log-probabilities exact at a few bytes each. It is read with a reader
that knows the data classes of a batch by name and nothing else, and only if they still have the
fields that they had when it was written.
"""

from __future__ import annotations

import io
import json
import pickle
from dataclasses import fields

from spark_nemo.config import ConfigError
from spark_nemo.records import (
    AnswerVerdict,
    EngineError,
    FormatViolation,
    ParsedResponse,
    ParseFailure,
    Problem,
    Rollout,
    RolloutVerdict,
    Step,
    TokenSpan,
    Truncated,
    Verdict,
)
from spark_nemo.rollout.generator import RolloutBatch

IN_FLIGHT = "in_flight.bin"
_CLASSES = (
    RolloutBatch,
    Rollout,
    RolloutVerdict,
    Problem,
    TokenSpan,
    ParsedResponse,
    Step,
    Verdict,
    AnswerVerdict,
    ParseFailure,
    Truncated,
    EngineError,
    FormatViolation,
)
_BY_NAME = {(one.__module__, one.__qualname__): one for one in _CLASSES}


def batch_to_bytes(batch: RolloutBatch) -> bytes:
    """One line of JSON with the fields of each class, then the pickle."""
    return json.dumps(_fields()).encode() + b"\n" + pickle.dumps(batch, protocol=5)


def batch_from_bytes(data: bytes) -> RolloutBatch:
    """Inverse of ``batch_to_bytes``. Raises ``ConfigError`` when another version of this package
    wrote it, or when it is damaged or holds anything else.
    """
    head, _, body = data.partition(b"\n")
    try:
        fields_then = json.loads(head)
        for name, written in fields_then.items():
            if (now := _fields().get(name)) != written:
                raise ConfigError(
                    f"the checkpoint's batch in flight was written by another version of spark_nemo: "
                    f"{name} had the fields {written} and has {now}: go on with that version, or start "
                    "anew"
                )
        batch = _Reader(io.BytesIO(body)).load()
    except ConfigError:
        raise
    # What a damaged pickle raises is not documented; the pickle module names these.
    except (
        pickle.UnpicklingError,
        EOFError,
        AttributeError,
        ImportError,
        IndexError,
        KeyError,
        TypeError,
        ValueError,
        MemoryError,
        OverflowError,
    ) as error:
        raise ConfigError(f"the checkpoint's batch in flight cannot be read: {error}") from error
    if not isinstance(batch, RolloutBatch):
        raise ConfigError(
            f"the checkpoint's batch in flight is a {type(batch).__name__}, no scored batch"
        )
    return batch


def _fields() -> dict[str, list[str]]:
    return {one.__name__: [field.name for field in fields(one)] for one in _CLASSES}


class _Reader(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> object:
        # From a table: a prefix of the module would let "stages.jobs" + "subprocess.getoutput"
        # through.
        try:
            return _BY_NAME[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"{module}.{name} is no part of a scored batch") from None
