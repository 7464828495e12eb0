"""The whole pipeline twice, the second time with every answer replaced: what was trained must be
the same bits.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from world import SMALL, VERIFIER, environment, rows, run

import spark_nemo
from spark_nemo.records import SOLUTION, VERIFICATION
from spark_nemo.records.store import RecordStore
from spark_nemo.toy.problem_files import split_problems, write_processbench

pytestmark = pytest.mark.slow
POISON = "-1"
RL = ["rl.steps=2", "rl.save_every=2", "rl.eval_every=2"]


def write_world(folder: Path, *, poisoned: bool) -> list[str]:
    """Every file of a run, with answers in every possible place: as keys, in problem files (where
    no stage may look), and as labels of the evaluation cases. Overrides that name them.
    """
    folder.mkdir()
    for split, count in (("stage1", 8), ("rl", 8), ("eval", 8)):
        lines = []
        for problem in split_problems(split, count, 0):
            answer = POISON if poisoned else str(problem.values[-1])
            lines.append(
                json.dumps(
                    {
                        "problem_id": problem.record().problem_id,
                        "question": problem.question,
                        "answer": answer,
                        "final_answer": answer,
                        "solution": f"The answer is {answer}.",
                        "ground_truth": answer,
                        "correct_answer": answer,
                        "reward_model": {"ground_truth": f'["{answer}"]', "style": "rule"},
                    }
                )
            )
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    cases = json.loads(write_processbench(16, folder).read_text())
    for case in cases if poisoned else ():
        case["label"] = 0 if case["label"] == -1 else -1
        case["final_answer_correct"] = not case["final_answer_correct"]
    (folder / "cases.json").write_text(json.dumps(cases))
    return [
        f"data.stage1_problems={folder}/stage1.jsonl",
        f"data.rl_problems={folder}/rl.jsonl",
        f"data.eval_problems={folder}/eval.jsonl",
        f"data.processbench={folder}/cases.json",
    ]


def trained(folder: Path) -> Iterator[tuple[str, object]]:
    """Everything in a run folder that was trained on or by training: name and content."""
    if (folder / "stage1/store").is_dir():
        with RecordStore(folder / "stage1/store") as store:
            for kind in (SOLUTION, VERIFICATION):
                yield f"stage1/store, {kind}", dict(store.iter(kind))
    for pattern in ("stage2/*/labels.jsonl", "stage?/*/metrics.jsonl", "stage3/*/samples.jsonl"):
        for path in sorted(folder.glob(pattern)):
            yield str(path.relative_to(folder)), rows(path)
    for path in sorted(folder.glob("stage?/*/model/*.safetensors")):
        yield str(path.relative_to(folder)), path.read_bytes()


def differing(one: Path, other: Path) -> list[str]:
    """Names of what differs between the training of two runs, or is missing in one."""
    first, second = dict(trained(one)), dict(trained(other))
    return [
        name for name in sorted(first.keys() | second.keys()) if first.get(name) != second.get(name)
    ]


def side_by_side(*calls) -> list:
    """Results of functions that wait for processes, run at the same time."""
    with ThreadPoolExecutor(len(calls)) as threads:
        return [future.result() for future in [threads.submit(call) for call in calls]]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A pipeline with true answers and one with poisoned ones, both with the baseline that is meant
    to read them.
    """
    top = tmp_path_factory.mktemp("answers")

    def pipeline(name: str) -> Path:
        files = write_world(top / f"{name}-data", poisoned=name == "poisoned")
        keys = top / f"{name}-data/rl.jsonl"
        done = run(
            "pipeline",
            top / name,
            *files,
            *RL,
            f"pipeline.rl_answers={keys}",
            "pipeline.parallel_jobs=1",
            "pipeline.label_methods=[step_consistency]",
            "pipeline.rewards=[process_aware,rlvr]",
        )
        assert done.returncode == 0, done.stderr
        return top / name

    honest, poisoned = side_by_side(lambda: pipeline("honest"), lambda: pipeline("poisoned"))
    return {"honest": honest, "poisoned": poisoned}


def test_poisoned_answers_change_no_label_no_number_and_no_weight(folders: dict[str, Path]) -> None:
    """Proves stages I to III read no answer on the reference-free path, bit for bit: the store, the
    labels, every logged number of training, the weights of reward model and policy. Only the
    declared baseline differs.

    Does not prove it for settings that the toy task does not use; test_answer_wall looks at the
    code.
    """
    names = dict(trained(folders["honest"]))
    for part in (
        "stage1/store, solution",
        "stage1/store, verification",
        "stage2/step_consistency/labels.jsonl",
        "stage2/step_consistency/model/model.safetensors",
        "stage3/process_aware/metrics.jsonl",
        "stage3/process_aware/model/model.safetensors",
    ):
        assert names[part], part
    assert [name for name in differing(*folders.values()) if "rlvr" not in name] == []


def test_the_poison_reached_evaluation_and_the_declared_baseline(folders: dict[str, Path]) -> None:
    """Proves the test above could fail: the evaluations of the same models come out otherwise (no
    answer is right any more), and training that does read answers has other weights.
    """
    honest, poisoned = folders["honest"], folders["poisoned"]
    for reward in ("process_aware", "rlvr"):
        before, after = (
            rows(folder / f"stage3/{reward}/evaluations.jsonl") for folder in (honest, poisoned)
        )
        assert before[0]["sampled"]["value"] > 0 and all(
            row["sampled"]["value"] == 0 for row in after
        )
    scores = [
        json.loads((f / "stage2/step_consistency/processbench.json").read_text())
        for f in (honest, poisoned)
    ]
    assert scores[0] != scores[1]
    assert "stage3/rlvr/model/model.safetensors" in differing(honest, poisoned)


def test_one_answer_read_in_training_code_is_noticed(tmp_path: Path) -> None:
    """Proves the comparison's teeth: stage III with a reward that looks at one answer of one
    problem has other weights when that answer is poisoned, and the same without the leak.
    """

    def leaky(name: str) -> Path:
        files = write_world(tmp_path / f"{name}-data", poisoned=name == "poisoned")
        command = [
            sys.executable,
            str(Path(__file__).with_name("leaky_stage3.py")),
            *SMALL,
            *files,
            *RL,
            f"run.dir={tmp_path / name}",
            f"rl.reward.model={VERIFIER}",
        ]
        here = {**environment(), "PYTHONPATH": str(Path(spark_nemo.__file__).parents[1])}
        done = subprocess.run(
            command, env=here, capture_output=True, text=True, timeout=300, check=False
        )
        assert done.returncode == 0, done.stderr
        return tmp_path / name

    honest, poisoned = side_by_side(lambda: leaky("honest"), lambda: leaky("poisoned"))
    assert "stage3/process_aware/model/model.safetensors" in differing(honest, poisoned)
