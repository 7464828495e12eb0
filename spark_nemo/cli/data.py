"""``spark-nemo data stats|show|export|verify``: inspect a stage I store without writing to it."""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from spark_nemo.config import ConfigError
from spark_nemo.config.reward import VARIANTS
from spark_nemo.records.shards import shard_paths
from spark_nemo.records.store import RecordStore

EXAMPLES = """examples:
  spark-nemo data stats runs/first
  spark-nemo data show runs/first 0df7a6
  spark-nemo data export runs/first --kind label --out labels.parquet
  spark-nemo data verify runs/first
"""


def add_data_commands(commands: argparse._SubParsersAction) -> None:
    """Add the ``data`` command and its four subcommands."""
    data = commands.add_parser(
        "data",
        help="look into a stage I store: stats, show, export, verify",
        epilog=EXAMPLES,
        description="Look into the store of stage I. RUN is a run folder, or a store folder.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    kinds = data.add_subparsers(required=True, metavar="COMMAND")
    stats = _command(
        kinds,
        "stats",
        _stats,
        "counts by kind, outcome and shard, votes, tokens, failures by reason",
    )
    stats.add_argument("--json", action="store_true", help="print JSON instead of a table")
    show = _command(kinds, "show", _show, "print one record")
    show.add_argument("id", help="a key, or enough of its beginning to name one record")
    export = _command(kinds, "export", _export, "write records or labels as flat rows")
    export.add_argument(
        "--out", type=Path, required=True, metavar="FILE", help="name ending in .jsonl or .parquet"
    )
    export.add_argument(
        "--kind",
        help="solution, verification, label (stage II's) or any other kind there is; "
        "without it all records of the store, for .jsonl only",
    )
    _command(
        kinds,
        "verify",
        _verify,
        "read every byte and check every record; exit status 1 when something is wrong",
    )


def store_folder(run: Path) -> Path:
    """Return the store of a run folder, or the folder itself if it is a store.

    Raises ``ConfigError`` if there is neither.
    """
    for folder in (run / "stage1/store", run / "store", run):
        if folder.is_dir() and shard_paths(folder):
            return folder
    raise ConfigError(
        f"{run}: neither a run folder with stage1/store nor a store: no *.records there"
    )


def read_store_fingerprint(folder: Path) -> dict[str, object]:
    """Return the fingerprint that stage I wrote next to the store; empty if the file is missing."""
    path = folder.parent / "fingerprint.json"
    if not path.is_file():
        return {}
    return json.loads(path.read_text(encoding="utf-8"))


def label_files(folder: Path) -> list[Path]:
    """Return one labels.jsonl of every method that stage II labelled this store by."""
    if folder.parent.name != "stage1":
        return []
    by_method: dict[str, Path] = {}
    for path in sorted(folder.parent.parent.glob("stage2/*/labels.jsonl")):
        # The folder is <method> or <method>-<variant>; all variants of a method have the same
        # labels.
        method, _, variant = path.parent.name.rpartition("-")
        if variant not in VARIANTS:
            method = path.parent.name
        by_method.setdefault(method, path)
    return list(by_method.values())


def _command(
    kinds: argparse._SubParsersAction, name: str, run: object, summary: str
) -> argparse.ArgumentParser:
    command = kinds.add_parser(
        name,
        help=summary,
        description=summary,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("run_folder", type=Path, metavar="RUN", help="run folder or store folder")
    command.set_defaults(run=run, parser=command)
    return command


def _stats(arguments: argparse.Namespace) -> int:
    from spark_nemo.verification.statistics import store_statistics

    folder = store_folder(arguments.run_folder)
    with RecordStore(folder) as store:
        figures = asdict(store_statistics(store))
    figures["runs"] = {
        path.stem.removeprefix("stats-"): json.loads(path.read_text(encoding="utf-8"))
        for path in sorted(folder.parent.glob("stats-*.json"))
    }
    if arguments.json:
        print(json.dumps(figures, indent=2))
    else:
        print("\n".join(_table(figures)))
    return 0


def _table(figures: dict[str, dict]) -> Iterator[str]:
    yield f"{'records':<28}{'number':>10}{'tokens':>14}"
    for kind, number in figures["records"].items():
        yield f"{kind:<28}{number:>10}{figures['tokens'][kind]:>14}"
        for outcome, count in sorted(figures["outcomes"].get(kind, {}).items()):
            yield f"  {outcome:<26}{count:>10}{_percent(count, number):>14}"
    for kind, reasons in figures["failures"].items():
        if reasons:
            yield f"\nfailures of {kind}"
        for reason, count in reasons.items():
            yield f"  {reason:<48} {count:>10}"
    yield f"\n{'votes on a solution':<28}{'solutions':>10}"
    for votes, solutions in figures["votes_per_solution"].items():
        yield f"  {votes:<26}{solutions:>10}"
    yield "\nshards"
    for shard, kinds in figures["shards"].items():
        counts = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
        yield f"  {shard}: {counts}"
    if figures["corrupt_records"] or figures["torn_tails"]:
        yield (
            f"\n{figures['corrupt_records']} corrupt records, "
            f"{figures['torn_tails']} unfinished ones at the end of a shard: "
            "see `spark-nemo data verify`"
        )
    for name, run in figures["runs"].items():
        failures = run.pop("engine_failures", {})
        counts = ", ".join(f"{key} {value}" for key, value in run.items())
        yield f"\nlast run of {name}: {counts}"
        for reason, count in failures.items():
            yield f"  engine failed {count} times: {reason}"


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %"


def _show(arguments: argparse.Namespace) -> int:
    from spark_nemo.verification.lineage import find_record

    with RecordStore(store_folder(arguments.run_folder)) as store:
        kind, key = find_record(store, arguments.id)
        payload = dict(store.get(key, kind) or {})
        shard, offset = store.location(key, kind) or ("", 0)
        parent = store.parent(key, kind)
    text = payload.pop("text", None)
    print(f"{kind} {key}")
    print(f"  in {shard} at byte {offset}")
    if parent:
        print(f"  parent: {parent}")
    for name, value in payload.items():
        print(f"  {name}: {value if isinstance(value, str) else json.dumps(value)}")
    if text is not None:
        print(f"  text:\n{text}")
    return 0


def _export(arguments: argparse.Namespace) -> int:
    from spark_nemo.verification.export import LABEL, label_rows, store_rows, write_rows

    folder = store_folder(arguments.run_folder)
    with RecordStore(folder) as store:
        kinds = store.kinds() if arguments.kind is None else [arguments.kind]
        files = label_files(folder)
        if arguments.kind == LABEL:
            if not files:
                raise ConfigError(
                    f"{arguments.run_folder}: no stage2/*/labels.jsonl there: "
                    "run `spark-nemo stage2`"
                )
            rows = label_rows(files)
        elif arguments.kind is not None and arguments.kind not in store.kinds():
            raise ConfigError(
                f"--kind {arguments.kind}: the store has {', '.join(store.kinds())}; "
                "stage II has label"
            )
        else:
            rows = (row for kind in kinds for row in store_rows(store, kind))
        number = write_rows(arguments.out, arguments.kind, rows)
    print(f"{number} rows in {arguments.out}")
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    from spark_nemo.verification.fsck import audit_store

    folder = store_folder(arguments.run_folder)
    # Opening the store logs the problems that the audit prints.
    store_log = logging.getLogger("spark_nemo.records.store")
    level = store_log.level
    store_log.setLevel(logging.ERROR)
    wrong = 0
    notes = 0
    try:
        for finding in audit_store(folder, read_store_fingerprint(folder) or None):
            if finding.harmless:
                notes += 1
                print(f"note: {finding}", flush=True)
            else:
                wrong += 1
                print(finding, flush=True)
    finally:
        store_log.setLevel(level)
    print(f"{folder}: {len(shard_paths(folder))} shards read, {wrong} findings, {notes} notes")
    return 1 if wrong else 0
