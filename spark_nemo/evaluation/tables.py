"""Rows of Parquet files and of Hugging Face datasets, beside the JSON that ``reading`` reads
itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from spark_nemo.records.jsonl import DataFileError

HF_PREFIX = "hf:"


@dataclass(frozen=True, slots=True)
class HubName:
    """``hf:NAME[:CONFIG][:SPLIT]``; an empty CONFIG is the dataset's default, as in
    ``hf:Qwen/ProcessBench::math``.

    NAME is ``owner/name`` on the hub, or a folder. Raises ``DataFileError`` for an empty name or
    too many parts.
    """

    text: str
    name: str
    config: str | None
    split: str | None

    @classmethod
    def parse(cls, source: str | Path) -> HubName | None:
        """None for what does not begin with ``hf:``."""
        text = str(source)
        if not text.startswith(HF_PREFIX):
            return None
        name, *rest = text.removeprefix(HF_PREFIX).split(":")
        if not name or len(rest) > 2:
            raise DataFileError(
                f"{text}: write hf:owner/name, hf:owner/name:config or hf:owner/name:config:split"
            )
        config, split = (*rest, "", "")[:2]
        return cls(text, name, config or None, split or None)


def source_name(source: str | Path) -> str:
    """What names the data: a file's stem; of a Hugging Face dataset its split when given, else the
    dataset's name.
    """
    hub = HubName.parse(source)
    if hub is None:
        return Path(source).stem
    return hub.split if hub.split not in (None, "test", "train") else Path(hub.name).name


def parquet_rows(path: Path) -> Iterator[tuple[str, object]]:
    """``(file:row 3, row)`` of a Parquet file. Raises ``DataFileError`` without pyarrow or for
    another kind of file.
    """
    try:
        import pyarrow
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise DataFileError(
            f"{path}: Parquet needs pyarrow: pip install 'spark-nemo[parquet]'"
        ) from error
    try:
        rows = parquet.read_table(path).to_pylist()
    except (OSError, pyarrow.ArrowException) as error:
        raise DataFileError(f"{path}: cannot be read as parquet ({_one_line(error)})") from error
    for number, row in enumerate(rows, start=1):
        yield f"{path}:row {number}", row


def hub_rows(hub: HubName) -> Iterator[tuple[str, object]]:
    """``(hf:...:row 3, row)`` of a dataset, downloaded or from the cache of the ``datasets``
    library.

    Without a split the dataset must have one called ``test``, or one only. Raises ``DataFileError``
    when the library is missing, or when the dataset, its configuration, its split or the network
    is.
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
    # Its own errors share no base class; a missing repository or network is an OSError, a wrong
    # name a ValueError.
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise DataFileError(
            f"{hub.text}: cannot be loaded ({_one_line(error)}); without a network name a local JSONL "
            "or Parquet file"
        ) from error
    if isinstance(loaded, dict):
        name = "test" if "test" in loaded else next(iter(loaded)) if len(loaded) == 1 else None
        if name is None:
            raise DataFileError(
                f"{hub.text}: has the splits {', '.join(loaded)}: name one, as in "
                f"hf:{hub.name}:{hub.config or ''}:{next(iter(loaded))}"
            )
        loaded = loaded[name]
    for number, row in enumerate(loaded, start=1):
        yield f"{hub.text}:row {number}", row


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
