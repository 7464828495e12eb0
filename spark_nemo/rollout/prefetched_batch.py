"""A scored batch as bytes, for the checkpoint of a run that prefetches its batches.

Pickle keeps token ids and log-probabilities exact at a few bytes each. The reader accepts only the
data classes of a batch, and only with the fields that they had when the batch was written.
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

PREFETCHED_BATCH = "prefetched_batch.bin"
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
_CLASS_BY_NAME = {(each.__module__, each.__qualname__): each for each in _CLASSES}


def batch_to_bytes(batch: RolloutBatch) -> bytes:
    """Return one line of JSON with the fields of each class, then the pickle."""
    return json.dumps(_field_names()).encode() + b"\n" + pickle.dumps(batch, protocol=5)


def batch_from_bytes(data: bytes) -> RolloutBatch:
    """Return the batch that ``batch_to_bytes`` wrote.

    Raises ``ConfigError`` when another version of this package wrote it, when it is damaged, or
    when it holds anything else.
    """
    header, _, body = data.partition(b"\n")
    try:
        _check_fields(json.loads(header))
        batch = _BatchUnpickler(io.BytesIO(body)).load()
    except ConfigError:
        raise
    # The pickle module does not document what a damaged pickle raises; it names these.
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
        raise ConfigError(f"{PREFETCHED_BATCH} of the checkpoint is damaged: {error}") from error
    if not isinstance(batch, RolloutBatch):
        raise ConfigError(
            f"{PREFETCHED_BATCH} of the checkpoint holds {type(batch).__name__}: "
            "expected RolloutBatch"
        )
    return batch


def _field_names() -> dict[str, list[str]]:
    return {each.__name__: [field.name for field in fields(each)] for each in _CLASSES}


def _check_fields(written: dict[str, list[str]]) -> None:
    current = _field_names()
    for name, names in written.items():
        if current.get(name) != names:
            raise ConfigError(
                f"{PREFETCHED_BATCH} of the checkpoint was written by another version of "
                f"spark_nemo: {name} had the fields {names} and has {current.get(name)}; "
                "resume with that version, or use another run.dir"
            )


class _BatchUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> object:
        # From a table: a check of the module's prefix would let a dotted name walk on into what
        # that module imported, as in "run.local_executor" + "subprocess.getoutput".
        try:
            return _CLASS_BY_NAME[module, name]
        except KeyError:
            raise pickle.UnpicklingError(
                f"{module}.{name} is not a data class of a batch"
            ) from None
