"""A command whose stage run is complete reports it and ends before it loads anything.

A fake replaces the stage's work.
"""

from __future__ import annotations

import json
import shutil
from importlib import import_module
from pathlib import Path

import pytest

from spark_nemo.cli.main import main
from spark_nemo.run.compose import compose_config
from spark_nemo.run.run_folder import mark_done
from spark_nemo.toy.resolve import ASSETS, resolve_toy
from spark_nemo.verification.sampler import SamplingCounts

pytestmark = pytest.mark.slow

FOLDERS = {
    "sft": "sft",
    "stage1": "stage1/shard-all",
    "stage2": "stage2/single",
    "stage3": "stage3/process_aware",
}
SETTINGS = [
    "+experiment=toy",
    "stage2.method=single",
    "pipeline.rewards=[process_aware]",
    "pipeline.rl_answers=null",
    "rl.prompts_per_step=4",
    f"rl.reward.model={ASSETS / 'verifier'}",
]
DATA = {
    "stage1_problems": "stage1:10",
    "processbench": "processbench:30",
    "rl_problems": "rl:10",
    "eval_problems": "eval:4",
    "sft_examples": "sft:10",
}


class Work:
    """Fake work of a stage that writes the files the stage would write."""

    def __init__(
        self, part: str, run_dir: Path, data: dict[str, str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.part, self.run_dir, self.times, self.counts = part, run_dir, 0, SamplingCounts()
        self.data = {name: Path(shutil.copy(path, run_dir)) for name, path in data.items()}
        self.folder = run_dir / FOLDERS[part]
        name = "_sample" if part == "stage1" else "_train"
        monkeypatch.setattr(import_module(f"spark_nemo.stages.{part}"), name, self.work)
        (run_dir / "stage1/store").mkdir(parents=True)
        (run_dir / "stage1/store/a.records").write_text("labels are made of this\n")

    def work(self, *_: object) -> bool | SamplingCounts:
        self.times += 1
        (self.folder / "model").mkdir(exist_ok=True)
        (self.folder / "model/config.json").write_text("{}")
        mark_done(self.folder, {"f1": 0.5})
        return self.counts if self.part == "stage1" else True

    def command(self, *overrides: str) -> int:
        data = [f"data.{name}={path}" for name, path in self.data.items()]
        return main([self.part, *SETTINGS, *data, f"run.dir={self.run_dir}", *overrides])


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Files of the toy task, made once."""
    names = [f"data.{name}=toy:{split}" for name, split in DATA.items()]
    made = resolve_toy(
        compose_config([*SETTINGS, *names, f"run.dir={tmp_path_factory.mktemp('data')}"])
    )
    return {name: getattr(made.data, name) for name in DATA}


@pytest.fixture
def work(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    data: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> Work:
    return Work(request.param, tmp_path, data, monkeypatch)


@pytest.mark.parametrize("work", FOLDERS, indirect=True)
def test_a_complete_stage_run_is_not_repeated(
    work: Work, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line with the folder and the fix, status 0, no work; the marker keeps its figures.

    Another engine or layout does not make it another run; another seed does.
    """
    assert (
        work.command() == 0
        and work.times == 1
        and "is already complete" not in capsys.readouterr().out
    )
    for overrides in ((), ("engine.max_batch_size=7",), ("megatron.data_parallel=2",)):
        assert work.command(*overrides) == 0 and work.times == 1
        assert capsys.readouterr().out == (
            f"{work.part} is already complete in {work.folder}; "
            "to run it again, use another run.dir\n"
        )
    assert json.loads((work.folder / "DONE.json").read_text())["f1"] == 0.5
    assert work.command("run.seed=1") == 0 and work.times == 2


@pytest.mark.parametrize(
    ("work", "override"),
    [
        ("sft", "sft.epochs=9"),
        ("stage1", "stage1.solutions_per_problem=5"),
        ("stage2", "stage2.epochs=9"),
        ("stage2", "labels.balance=consensus"),
        ("stage3", "rl.steps=9"),
        ("stage3", "evaluation.samples_per_problem=9"),
        ("stage3", f"rl.reward.model={ASSETS / 'critic'}"),
    ],
    indirect=["work"],
)
def test_other_settings_reach_the_stage(work: Work, override: str) -> None:
    """With more solutions or another reward model the stage decides: it continues or fails.

    The command does not report that the run is already complete.
    """
    assert work.command() == 0 and work.command(override) == 0 and work.times == 2


@pytest.mark.parametrize(
    ("work", "name"),
    [
        ("sft", "sft_examples"),
        ("stage1", "stage1_problems"),
        ("stage2", "processbench"),
        ("stage3", "eval_problems"),
    ],
    indirect=["work"],
)
def test_a_file_is_known_by_what_it_holds(work: Work, name: str) -> None:
    """The same name with other lines is other data, and the same lines under another name are the
    same.
    """
    assert work.command() == 0
    path = work.data[name] = work.data[name].rename(work.data[name].with_stem("renamed"))
    assert work.command() == 0 and work.times == 1
    text = path.read_text()
    path.write_text(
        json.dumps(json.loads(text)[1:]) if text.startswith("[") else text.partition("\n")[2]
    )
    assert work.command() == 0 and work.times == 2


@pytest.mark.parametrize("work", ["stage2"], indirect=True)
def test_labels_from_a_store_that_grew_are_other_inputs(work: Work) -> None:
    """Stage II reads stage I's store: with more in it the part is not what the command asks for."""
    assert work.command() == 0
    with (work.run_dir / "stage1/store/a.records").open("a") as file:
        file.write("more\n")
    assert work.command() == 0 and work.times == 2


@pytest.mark.parametrize("work", ["stage3"], indirect=True)
def test_without_its_model_or_by_an_older_version_a_part_is_not_finished(work: Work) -> None:
    """The model was deleted, or the marker is of a version that did not say what it was made from:
    the stage is run, and finds its checkpoints.
    """
    assert work.command() == 0
    (work.folder / "model/config.json").unlink()
    assert work.command() == 0 and work.times == 2
    mark_done(work.folder, {"accuracy": 0.5})
    assert work.command() == 0 and work.times == 3


@pytest.mark.parametrize(
    "counts",
    [
        SamplingCounts(postponed_verifications=1),
        SamplingCounts(engine_failures={"prompt of N tokens": 1}),
    ],
)
@pytest.mark.parametrize("work", ["stage1"], indirect=True)
def test_what_an_engine_lost_is_asked_for_again(work: Work, counts: SamplingCounts) -> None:
    """Stage I ends although some requests failed; the same command asks for them, as it says in its
    log.
    """
    work.counts = counts
    assert work.command() == 0 and work.command() == 0 and work.times == 2
