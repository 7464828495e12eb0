"""``spark-nemo data`` and ``explain`` on a store written by hand, with what can go wrong in it."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from spark_nemo.cli.data import label_files
from spark_nemo.cli.main import main
from spark_nemo.grammar import GRAMMAR_VERSION, prompt_set
from spark_nemo.records import (
    ParseFailure,
    Problem,
    Solution,
    Truncated,
    Verdict,
    Verification,
    content_key,
)
from spark_nemo.records.store import RecordStore
from spark_nemo.verification.store_reader import label_store

SAMPLING = {"temperature": 1.0, "top_p": 1.0, "max_new_tokens": 9}
MADE_BY = {
    "run.seed": 0,
    "the grammar": GRAMMAR_VERSION,
    "stage1.prompt_set": prompt_set("compact").version,
    "models.generator": "aaaa",
    "models.verifier": "bbbb",
    "stage1.generator_sampling": SAMPLING,
    "stage1.verifier_sampling": SAMPLING,
}
BY = [GRAMMAR_VERSION, MADE_BY["stage1.prompt_set"]]
TEXT = "Step 1: 1+1=2\nStep 2: 2+1=3\nAnswer: 3"
RIGHT = (
    "## Step 1: add\nIt is 2.\n**This step is correct.**\n"
    "## Step 2: add\nIt is 3.\n**This step is correct.**\n"
    "**Verification: Is the answer correct (Yes/No)? Yes**"
)
OUTCOMES = [
    Verdict((True, True), True),
    Verdict((True, False), False),
    Verdict((True, True), True),
    ParseFailure("step_count: 3 steps judged, 2 in the solution"),
    Truncated(9),
]


def solution(number: int, text: str = TEXT, reason: str = "stop") -> Solution:
    problem = Problem(f"p{number}", f"What is {number}?")
    key = content_key("solution", problem.question, [*BY, "aaaa", SAMPLING], 0, 1)
    return Solution(key, problem.problem_id, problem.question, text, reason, 10)


def verification(of: Solution, vote: int) -> Verification:
    key = content_key("verification", of.key, [*BY, "bbbb", SAMPLING], 0, vote)
    return Verification(key, of.key, vote, f"{RIGHT} by vote {vote}", OUTCOMES[vote], 20)


SOLUTIONS = [solution(0), solution(1), solution(2, "no steps"), solution(3, TEXT, "length")]
VOTES = [verification(SOLUTIONS[0], vote) for vote in range(5)] + [verification(SOLUTIONS[1], 0)]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder with stage I's store and stage II's labels, as the stages write them."""
    with RecordStore(tmp_path / "stage1/store", "shard-all", fsync_every=100) as store:
        for record in SOLUTIONS:
            store.append(record.key, "solution", asdict(record))
        for vote in VOTES:
            store.append(vote.key, "verification", vote.to_json(), parent=vote.solution_key)
        store.append(
            "c0ffee", "critique", {"text": "doubtful", "num_tokens": 3}, parent=VOTES[1].key
        )
        labelled, _ = label_store("step_consistency", store, 0)
    (tmp_path / "stage1/fingerprint.json").write_text(json.dumps(MADE_BY))
    (tmp_path / "stage1/stats-shard-all.json").write_text(
        json.dumps({"engine_failures": {"over N tokens": 2}})
    )
    folder = tmp_path / "stage2/step_consistency"
    folder.mkdir(parents=True)
    (folder / "labels.jsonl").write_text(
        "".join(json.dumps(asdict(label)) + "\n" for label in labelled)
    )
    return tmp_path


def output(capsys: pytest.CaptureFixture[str], *arguments: object, status: int = 0) -> str:
    assert main([str(argument) for argument in arguments]) == status
    captured = capsys.readouterr()
    return captured.err if status == 2 else captured.out


def shard(run: Path) -> Path:
    (path,) = (run / "stage1/store").glob("*.records")
    return path


def test_stats_count_every_record_and_every_failure_by_reason(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Proves the figures of --json; the table is looked at for the reasons only."""
    figures = json.loads(output(capsys, "data", "stats", run, "--json"))
    assert figures["records"] == {"critique": 1, "solution": 4, "verification": 6}
    assert figures["outcomes"]["solution"] == {"usable": 2, "unusable": 2}
    assert figures["failures"]["solution"] == {"steps_missing": 1, "finish_reason: length": 1}
    assert figures["outcomes"]["verification"] == {"verdict": 4, "parse_failure": 1, "truncated": 1}
    assert figures["failures"]["verification"] == {"parse_failure: step_count": 1, "truncated": 1}
    assert figures["votes_per_solution"] == {"1": 1, "5": 1}
    assert figures["tokens"] == {"critique": 3, "solution": 40, "verification": 120}
    assert figures["shards"] == {
        "shard-all.000000.records": {"critique": 1, "solution": 4, "verification": 6}
    }
    table = output(capsys, "data", "stats", run / "stage1/store")
    assert "parse_failure: step_count" in table and "engine failed 2 times: over N tokens" in table


def test_show_takes_a_key_or_the_beginning_of_one(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Proves the payload is shown; a beginning that fits several records or none is one line that
    says so.
    """
    shown = output(capsys, "data", "show", run, VOTES[1].key[:10])
    assert VOTES[1].key in shown and "by vote 1" in shown and f"parent: {SOLUTIONS[0].key}" in shown
    assert "no record" in output(capsys, "data", "show", run, "zzz", status=2)
    with RecordStore(run / "stage1/store", "w") as store:
        store.append("c0ffef", "critique", {})
    assert "critique c0ffee, critique c0ffef" in output(
        capsys, "data", "show", run, "c0ff", status=2
    )


def test_export_to_jsonl(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Proves columns and values of each kind; a field without a column is kept in ``extra``."""
    out = tmp_path / "out.jsonl"
    output(capsys, "data", "export", run, "--out", out)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["kind"] for row in rows] == ["solution"] * 4 + ["verification"] * 6 + ["critique"]
    assert rows[2]["usable"] is False and rows[0]["num_steps"] == 2 and rows[0]["text"] == TEXT
    assert (
        rows[5]["step_labels"] == [True, False]
        and rows[5]["answer_correct"] is False
        and rows[5]["vote"] == 1
    )
    assert rows[7]["outcome"] == "parse_failure" and rows[7]["failure"] == OUTCOMES[3].reason
    assert rows[7]["step_labels"] is None and rows[10]["parent"] == VOTES[1].key
    output(capsys, "data", "export", run, "--out", out, "--kind", "label")
    labels = [json.loads(line) for line in out.read_text().splitlines()]
    chosen = next(row for row in labels if row["solution_key"] == SOLUTIONS[0].key)
    assert (
        chosen["chosen_vote"] in (0, 2)
        and chosen["correct_votes"] == [3, 2]
        and chosen["num_votes"] == 3
    )
    assert chosen["method"] == "step_consistency" and chosen["target_text"].startswith(RIGHT)


def test_export_to_parquet_is_the_same_table(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Proves the rows of both formats are equal, types included, for every kind."""
    parquet = pytest.importorskip("pyarrow.parquet")
    for kind in ("solution", "verification", "label", "critique"):
        for name in ("out.jsonl", "out.parquet"):
            output(capsys, "data", "export", run, "--out", tmp_path / name, "--kind", kind)
        rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
        assert parquet.read_table(tmp_path / "out.parquet").to_pylist() == rows and rows


def test_export_says_what_it_cannot_do_and_leaves_no_file(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Proves each error is one line that names the way out; the missing pyarrow is simulated."""
    out = tmp_path / "x/out.parquet"
    assert ".jsonl or .parquet" in output(
        capsys, "data", "export", run, "--out", tmp_path / "x/out.csv", status=2
    )
    assert "critique" in output(
        capsys, "data", "export", run, "--out", out, "--kind", "vote", status=2
    )
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert "spark-nemo[parquet]" in output(
        capsys, "data", "export", run, "--out", out, "--kind", "solution", status=2
    )
    monkeypatch.undo()
    if pytest.importorskip("pyarrow"):
        assert "--kind" in output(capsys, "data", "export", run, "--out", out, status=2)
    assert not out.parent.exists() or not list(out.parent.iterdir())
    assert "no *.records" in output(capsys, "data", "stats", tmp_path / "x", status=2)


def test_verify_finds_nothing_in_a_sound_store(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Proves exit status 0, also with the unfinished record of a killed writer, which is a note;
    the keys are those that the content under fingerprint.json gives.
    """
    assert "0 findings, 0 notes" in output(capsys, "data", "verify", run)
    data = shard(run).read_bytes()
    (run / "stage1/store/killed.000000.records").write_bytes(data[:40])
    found = output(capsys, "data", "verify", run)
    assert "note: killed.000000.records: byte 0" in found and "0 findings, 1 notes" in found


def test_verify_names_every_fault(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Proves one line per fault: a changed byte, an orphan, a key with two contents, a key of other
    content.
    """
    path = shard(run)
    path.write_bytes(path.read_bytes().replace(b"no steps", b"no stops"))
    stray = verification(solution(9), 0)
    other = {**asdict(SOLUTIONS[0]), "text": "Step 1: another\nAnswer: 3"}
    with RecordStore(run / "stage1/store", "w2") as store:
        store.append(stray.key, "verification", stray.to_json(), parent=stray.solution_key)
        store.append(
            "feed", "verification", {**VOTES[0].to_json(), "key": "feed"}, parent=SOLUTIONS[0].key
        )
        store.append("f00d", "solution", asdict(SOLUTIONS[0]))
    with RecordStore(run / "elsewhere", "w3") as store:
        store.append(SOLUTIONS[0].key, "solution", other)
    shard_of_other = run / "elsewhere/w3.000000.records"
    shard_of_other.rename(run / "stage1/store/w3.000000.records")
    lines = output(capsys, "data", "verify", run, status=1).splitlines()
    assert len(lines) == 6 and "5 findings" in lines[-1]
    for line, words in zip(
        lines,
        (
            "do not fit their checksum",
            f"about {stray.solution_key}, which is not",
            "feed is not the key",
            f"f00d holds the payload of {SOLUTIONS[0].key}",
            "differs from the record in use",
        ),
    ):
        assert words in line and ": byte " in line


def test_verify_finds_changed_settings(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A store next to another run's fingerprint.json is reported."""
    (run / "stage1/fingerprint.json").write_text(json.dumps({**MADE_BY, "models.verifier": "cccc"}))
    assert f"{len(VOTES)} findings" in output(capsys, "data", "verify", run, status=1)


def test_explain_walks_from_a_label_to_the_models(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Proves that everything the label was made of is shown, whichever record of the chain is
    named.
    """
    for name in (
        SOLUTIONS[0].key,
        SOLUTIONS[0].key[:9],
        f"step_consistency:{SOLUTIONS[0].key[:9]}",
        VOTES[2].key,
        "c0ffee",
    ):
        shown = output(capsys, "explain", run, name)
        assert "step 2: correct (2 of 3 votes for correct, agreement 0.67)" in shown
        assert (
            "matching_votes: 2" in shown
            and "steps CI, answer No" in shown
            and "truncated (9)" in shown
        )
        assert f"critique c0ffee of {VOTES[1].key}" in shown and "doubtful" in shown
        assert TEXT in shown and "problem p0" in shown and "What is 0?" in shown
        assert f"Student Solution: {TEXT}" in shown
        assert (
            "models.verifier: bbbb" in shown
            and '"max_new_tokens": 9' in shown
            and "note:" not in shown
        )
    assert "by vote 1" not in shown
    assert "by vote 1" in output(capsys, "explain", run, SOLUTIONS[0].key, "--all")


def test_explain_says_what_it_does_not_know(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Proves the notes: no label, a solution never verified, prompts in other words, and no
    fingerprint.json at all.
    """
    shown = output(capsys, "explain", run, SOLUTIONS[2].key)
    assert "gave this solution no label" in shown and "never verified: steps_missing" in shown
    (run / "stage1/fingerprint.json").write_text(
        json.dumps({**MADE_BY, "stage1.prompt_set": "compact-g0-12345678"})
    )
    assert "sent in the words of compact-g0-12345678" in output(
        capsys, "explain", run, SOLUTIONS[0].key
    )
    (run / "stage1/fingerprint.json").unlink()
    assert "no fingerprint.json" in output(capsys, "explain", run, SOLUTIONS[0].key)
    assert "no label of this method" in output(
        capsys, "explain", run, f"single:{SOLUTIONS[0].key}", status=2
    )
    stray = verification(solution(9), 0)
    with RecordStore(run / "stage1/store", "w2") as store:
        store.append(stray.key, "verification", stray.to_json(), parent=stray.solution_key)
    assert f"its solution {stray.solution_key} is not in" in output(
        capsys, "explain", run, stray.key, status=2
    )


def test_looking_changes_nothing(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Proves that no command but export writes a file."""
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    for command in (
        ["data", "stats", run],
        ["data", "verify", run],
        ["data", "show", run, VOTES[0].key],
        ["explain", run, VOTES[0].key],
    ):
        output(capsys, *command)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_the_labels_of_several_reward_models_of_one_method_are_shown_once(tmp_path: Path) -> None:
    """A PRM and an ORM trained on the labels of a PRM-CoT have the same labels."""
    store = tmp_path / "stage1/store"
    store.mkdir(parents=True)
    names = ("single-orm", "single-prm", "step_consistency", "step_consistency-orm")
    for name in names:
        (tmp_path / "stage2" / name).mkdir(parents=True)
        (tmp_path / "stage2" / name / "labels.jsonl").write_text("")
    assert [path.parent.name for path in label_files(store)] == ["single-orm", "step_consistency"]
