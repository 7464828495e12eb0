"""Bad input ends in one line that names the field or file, exits with 2 and leaves no half-made
run.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from spark_nemo.cli.main import main
from spark_nemo.toy.resolve import ASSETS

TOY = ["+experiment=toy", "data.stage1_problems=toy:stage1:4"]


def error_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(list(arguments)) == 2
    lines = [
        line
        for line in capsys.readouterr().err.splitlines()
        if line.startswith("spark-nemo: error:")
    ]
    assert len(lines) == 1
    return lines[0]


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("rl.group_sizes=8", "group_sizes"),
        ("rl.group_size=many", "many"),
        ("rl.hacking.alarm=0.1", "rl.hacking.detectors.alarm"),
        ("rl.loss.clip_high=0.28", "rl.loss.clip_high"),
        ("stage1.shard=1", "stage1.shard"),
        ("megatron.sequence_parallel=true", "megatron.sequence_parallel"),
        ("data.rl_answers=toy:rl:10", "data.rl_answers"),
        ("models.policy=toy:giant", "models.policy"),
        ("+experiment=missing", "missing"),
    ],
)
def test_a_bad_setting_is_named(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, override: str, named: str
) -> None:
    """Unknown keys, wrong types and values without effect are rejected; a sample of settings."""
    assert named in error_of(capsys, "stage3", *TOY, f"run.dir={tmp_path}", override)


def test_a_missing_model_folder_is_named(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Each stage rejects a folder without a model before it writes results."""
    for stage, field in (("stage1", "models.generator"), ("stage3", "models.policy")):
        message = error_of(
            capsys,
            stage,
            *TOY,
            f"run.dir={tmp_path}",
            f"{field}={tmp_path}/nowhere",
            *([f"rl.reward.model={ASSETS}/verifier"] if stage == "stage3" else []),
        )
        assert "nowhere" in message
    assert not (tmp_path / "stage1/store").exists()


def test_a_model_that_the_embedded_engine_does_not_serve_is_rejected_before_any_work(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """A verifier and a reward model of another family fail the check, not the engine's loading.

    Whether servers support them is not tested here.
    """
    other = shutil.copytree(ASSETS / "verifier", tmp_path / "llama")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "model_type": "llama"}))
    for stage, field in (("stage1", "models.verifier"), ("stage3", "rl.reward.model")):
        message = error_of(capsys, stage, *TOY, f"run.dir={tmp_path}/run", f"{field}={other}")
        assert f"{field}: {other}" in message and "model_type='llama'" in message
        assert "add +engine=sglang" in message
    assert not (tmp_path / "run/stage1").exists()


def test_a_tokenizer_that_cannot_say_the_format_is_named(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Proves the format's texts are tried on the tokenizer at load; here every byte but letters is
    unknown to it.
    """
    model = shutil.copytree(ASSETS / "generator", tmp_path / "model")
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    tokenizer["added_tokens"] = [t for t in tokenizer["added_tokens"] if t["content"] != "<think>"]
    tokenizer["model"]["vocab"] = {
        k: v for k, v in tokenizer["model"]["vocab"].items() if "<" not in k
    }
    tokenizer["model"]["merges"] = [
        m for m in tokenizer["model"]["merges"] if "<" not in "".join(m)
    ]
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    message = error_of(
        capsys, "stage1", *TOY, f"run.dir={tmp_path}/run", f"models.generator={model}"
    )
    assert "<think>" in message


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("", "problems.jsonl"),
        ("{}\n", "problems.jsonl:line 1"),
        ('{"problem_id": "a", "question": "1+1?"}\nnot json\n', "problems.jsonl:line 2"),
    ],
)
def test_a_malformed_problems_file_is_named_with_its_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, text: str, place: str
) -> None:
    """Proves file and line are named for empty, incomplete and broken rows."""
    path = tmp_path / "problems.jsonl"
    path.write_text(text)
    message = error_of(
        capsys, "stage1", *TOY, f"run.dir={tmp_path}/run", f"data.stage1_problems={path}"
    )
    assert place in message


@pytest.mark.parametrize(
    ("override", "hint"),
    [
        ("rl.grup_size=8", "did you mean rl.group_size?"),
        ("rl.optimizer.learning=1", "did you mean rl.optimizer.lr?"),
        ("experiment=toy", "write +experiment=toy"),
        ("+experiment=tiny", "there are toy, "),
        ("+experiment=spark/bass", "did you mean base?"),
    ],
)
def test_a_wrong_name_is_answered_with_right_ones(
    capsys: pytest.CaptureFixture[str], override: str, hint: str
) -> None:
    """Proves the hints for keys, a forgotten plus sign and experiments; the words before them are
    Hydra's.
    """
    assert hint in error_of(capsys, "stage3", override, "--dry-run")


def test_a_report_of_nothing_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Proves that a misspelt or forgotten run folder is not answered with an empty page in a new
    folder.
    """
    assert "no stage has run there" in error_of(capsys, "report", f"run.dir={tmp_path}/typo")
    assert f"run.dir={tmp_path}" in error_of(capsys, "report", str(tmp_path))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("field", "row", "named"),
    [
        (
            "data.rl_problems",
            '{"prompt": "1+1?", "solution": "2"}',
            "it is missing; the row has prompt, solution",
        ),
        (
            "data.rl_problems",
            '{"problem_id": 1.5, "question": "1+1?"}',
            "must be a string or an integer, not float",
        ),
        ("data.eval_problems", '{"problem_id": "a", "question": "1+1?"}', "'answer' is missing"),
    ],
)
def test_a_dry_run_reads_the_data_that_are_here(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, field: str, row: str, named: str
) -> None:
    """Proves that another trainer's columns are named before a job is queued, and nothing is
    written.
    """
    path = tmp_path / "rows.jsonl"
    path.write_text(row + "\n")
    message = error_of(
        capsys, "stage3", *TOY, f"run.dir={tmp_path}/run", f"{field}={path}", "--dry-run"
    )
    assert named in message and "rows.jsonl:" in message
    assert [each.name for each in tmp_path.iterdir()] == ["rows.jsonl"]


@pytest.mark.parametrize("layout", ["megatron.tensor_parallel=3", "megatron.pipeline_parallel=3"])
def test_a_layout_that_does_not_fit_the_model_is_rejected_before_ranks_start(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, layout: str
) -> None:
    """TP must divide the heads and PP the layers.

    The launching process reports it in one line; no rank prints a traceback.
    """
    message = error_of(
        capsys, "stage3", *TOY, f"run.dir={tmp_path}", layout, f"rl.reward.model={ASSETS}/verifier"
    )
    assert layout.split("=")[0] in message


def test_a_full_disk_is_one_line_and_loses_nothing(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Proves ENOSPC in the middle of stage I leaves every stored record readable; the write itself
    is simulated.
    """
    import errno
    import os

    from spark_nemo.records import store as store_module
    from spark_nemo.records.store import RecordStore

    written, real_write = [0], os.write

    def full_after_a_while(handle: int, data: bytes) -> int:
        if b"\t{" in bytes(data[:16]):
            written[0] += 1
            if written[0] > 12:
                raise OSError(errno.ENOSPC, "No space left on device")
        return real_write(handle, data)

    monkeypatch.setattr(store_module.os, "write", full_after_a_while)
    message = error_of(capsys, "stage1", *TOY, f"run.dir={tmp_path}")
    assert str(tmp_path) in message
    monkeypatch.undo()
    with RecordStore(tmp_path / "stage1/store") as store:
        assert len(store.keys("solution") | store.keys("verification")) == 12
        assert store.corrupt_records == 0
