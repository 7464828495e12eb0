"""Names and rows of Hugging Face datasets."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from spark_nemo.records.rows import DataFileError, Row

HF_PREFIX = "hf:"


@dataclass(frozen=True, slots=True)
class HubName:
    """A dataset named ``hf:NAME[:CONFIG][:SPLIT]``, such as ``hf:Qwen/ProcessBench::math``.

    NAME is ``owner/name`` on the hub, or a folder; an empty CONFIG is the dataset's default.
    """

    text: str
    name: str
    config: str | None
    split: str | None

    @classmethod
    def parse(cls, source: str | Path) -> HubName | None:
        """Parse a name; None for a source that does not begin with ``hf:``.

        Raises ``DataFileError`` for an empty name or too many parts.
        """
        text = str(source)
        if not text.startswith(HF_PREFIX):
            return None
        name, *rest = text.removeprefix(HF_PREFIX).split(":")
        if not name or len(rest) > 2:
            raise DataFileError(
                f"{text}: write hf:owner/name, hf:owner/name:config or hf:owner/name:config:split"
            )
        config = rest[0] if rest else ""
        split = rest[1] if len(rest) > 1 else ""
        return cls(text, name, config or None, split or None)


def source_name(source: str | Path) -> str:
    """Return a file's stem, or a Hugging Face dataset's split or name.

    The splits ``test`` and ``train`` say nothing about the data, so the dataset's name is used.
    """
    hub = HubName.parse(source)
    if hub is None:
        return Path(source).stem
    if hub.split in (None, "test", "train"):
        return Path(hub.name).name
    return hub.split


def hub_rows(hub: HubName) -> Iterator[tuple[str, Row]]:
    """Yield ``(hf:...:row 3, row)`` of a dataset, from the hub or the ``datasets`` cache.

    Without a split in the name, the dataset must have a split called ``test``, or only one. Raises
    ``DataFileError`` when the library, the dataset, its configuration, its split or the network is
    missing.
    """
    try:
        import datasets
    except ImportError as error:
        raise DataFileError(
            f"{hub.text}: a Hugging Face dataset needs the datasets library: "
            "pip install 'spark-nemo[hf]'; or name a local JSONL or Parquet file"
        ) from error
    try:
        loaded = datasets.load_dataset(hub.name, hub.config, split=hub.split)
    # The library's errors do not share a base class: a missing repository or network is an OSError,
    # a wrong name a ValueError.
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise DataFileError(
            f"{hub.text}: cannot be loaded ({_one_line(error)}); without a network name a local "
            "JSONL or Parquet file"
        ) from error
    if isinstance(loaded, dict):
        loaded = loaded[_only_split(hub, list(loaded))]
    if not len(loaded):
        raise DataFileError(f"{hub.text}: has no rows")
    for number, row in enumerate(loaded, start=1):
        yield f"{hub.text}:row {number}", row


def _only_split(hub: HubName, splits: list[str]) -> str:
    if "test" in splits:
        return "test"
    if len(splits) == 1:
        return splits[0]
    raise DataFileError(
        f"{hub.text}: has the splits {', '.join(splits)}: name one, as in "
        f"hf:{hub.name}:{hub.config or ''}:{splits[0]}"
    )


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
