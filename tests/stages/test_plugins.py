"""A reward and an advantage that are defined outside the package train the toy task."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from spark_nemo.config import ConfigError
from spark_nemo.run.compose import compose_config
from spark_nemo.toy.resolve import ASSETS

REPO = Path(__file__).parents[2]
PAGE = REPO / "docs/how_to_add_a_reward.md"
SMALL = [
    "+experiment=toy",
    "plugins=[my_designs]",
    f"rl.reward.model={ASSETS / 'verifier'}",
    "rl.steps=2",
    "rl.prompts_per_step=4",
    "rl.group_size=4",
    "rl.eval_every=2",
    "data.rl_problems=toy:rl:40",
    "data.eval_problems=toy:eval:10",
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with the module that the page shows."""
    code = re.search(r"^```python\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    assert code is not None
    (tmp_path / "my_designs.py").write_text(code[1])
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize(
    ("choices", "design"),
    [
        (["rl/reward=brief", "rl.reward.step_cost=0.02"], "brief"),
        (["rl/advantage=first_error", "rl.advantage.share=0.25"], "first_error"),
    ],
)
def test_a_design_of_the_users_own_trains(folder: Path, choices: list[str], design: str) -> None:
    """Two steps of the page's own example, started like a user would start them."""
    done = subprocess.run(
        [sys.executable, "-m", "spark_nemo.cli.main", "stage3", *SMALL, *choices, "run.dir=run"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(REPO)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    result = folder / "run/stage3" / design
    rows = [json.loads(line) for line in (result / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 2 and (result / "model/config.json").exists()
    config = (folder / "run/stage3" / design / "DONE.json").read_text()
    assert "accuracy" in config


def test_a_plugin_that_cannot_be_imported_is_one_line() -> None:
    """The error names the module and the folder to be in."""
    with pytest.raises(ConfigError, match="plugins=no_such_module") as error:
        compose_config(["plugins=[no_such_module]"])
    assert "\n" not in str(error.value)
