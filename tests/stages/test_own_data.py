"""docs/own_data.md as a user follows it: own models and data, one experiment file, on the CPU."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from world import environment

from spark_nemo.toy import problem_files
from spark_nemo.toy.resolve import ASSETS

REPO = Path(__file__).parents[2]
PAGE = (REPO / "docs/own_data.md").read_text()
SMALL = [
    "stage1.solutions_per_problem=2",
    "stage1.verifications_per_solution=4",
    "stage2.batch_size=4",
    "rl.steps=2",
    "rl.prompts_per_step=4",
    "rl.group_size=4",
    "evaluation.samples_per_problem=1",
    "stage2.epochs=1",
]


def example_row(setting: str) -> dict[str, object]:
    """Return the row that the page shows for a setting."""
    line = next(line for line in PAGE.splitlines() if line.startswith("|") and setting in line)
    return json.loads(re.search(r"`(\{.*?\})` \|", line)[1])


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A folder with a user's models, data and experiment. Problems are those of the toy task, which
    its models were trained on.
    """
    for name in ("generator", "verifier"):
        shutil.copytree(ASSETS / name, tmp_path / "models" / name)
    shutil.copytree(REPO / "conf", tmp_path / "conf")
    (tmp_path / "conf/experiment/mine.yaml").write_text(
        re.search(r"```yaml\n(.*?)```", PAGE, re.DOTALL)[1]
    )
    (tmp_path / "data").mkdir()
    made = {
        "problems": problem_files.write_problems("rl", 8, 0, tmp_path / "made"),
        "eval": problem_files.write_answers("eval", 6, 0, tmp_path / "made"),
    }
    for name, path in made.items():
        shutil.copy(path, tmp_path / f"data/{name}.jsonl")
    cases = json.loads(problem_files.write_processbench(12, tmp_path / "made").read_text())
    (tmp_path / "data/cases.jsonl").write_text("".join(json.dumps(case) + "\n" for case in cases))
    return tmp_path


def spark_nemo(home: Path, *words: str) -> str:
    """Run a command of the page in the user's folder; return its output."""
    line = [sys.executable, "-m", "spark_nemo.cli.main", *words]
    paths = os.pathsep.join([str(REPO), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        line,
        cwd=home,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={**environment(), "SPARK_NEMO_CONF": str(home / "conf"), "PYTHONPATH": paths},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_rows_of_the_page_are_what_the_dry_run_reads(home: Path) -> None:
    """Every format that the page shows can be read, the SFT's too."""
    for setting, name in (
        ("data.stage1_problems", "problems"),
        ("data.eval_problems", "eval"),
        ("data.processbench", "cases"),
        ("data.sft_examples", "sft"),
    ):
        (home / f"data/{name}.jsonl").write_text(json.dumps(example_row(setting)) + "\n")
    plan = spark_nemo(home, "pipeline", "+experiment=mine", "--dry-run")
    assert "data.processbench: data/cases.jsonl (here)" in plan and "1 problems" in plan
    sft = ["data.sft_examples=data/sft.jsonl", "models.policy_base=models/verifier", "--dry-run"]
    assert "1 examples" in spark_nemo(home, "sft", "+experiment=mine", *sft)


@pytest.mark.slow
def test_models_and_data_on_disk_go_through_the_stages_of_the_page(home: Path) -> None:
    """Proves the page's commands, one after the other, in small sizes. That a model gets better is
    for others.
    """
    for stage in ("stage1", "stage2", "stage3"):
        spark_nemo(home, stage, "+experiment=mine", *SMALL)
    assert "solution" in spark_nemo(home, "data", "stats", "runs/mine")
    spark_nemo(home, "report", "+experiment=mine", *SMALL)
    assert (home / "runs/mine/report.html").exists()
    model = "runs/mine/stage3/process_aware/model"
    assert "avg@1" in spark_nemo(
        home, "evaluate", "math", "--model", model, "+experiment=mine", *SMALL
    )
