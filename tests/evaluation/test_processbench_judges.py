"""Models on ProcessBench, as critics and as reward models, with a scripted engine."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from scripted_engine import Bytes, Scripted

from spark_nemo.cli.main import main
from spark_nemo.config import ConfigError, SamplingConfig
from spark_nemo.engines.base import Engine, EngineFailure, EngineLost
from spark_nemo.engines.served_model import ServedModel
from spark_nemo.evaluation import DataFileError, ProcessBenchCase
from spark_nemo.evaluation.processbench_judges import (
    Critic,
    RewardModelJudge,
    evaluate_processbench,
)
from spark_nemo.evaluation.saved_predictions import score_saved_predictions
from spark_nemo.grammar import prompt_set
from spark_nemo.grammar.processbench_prompt import critic_messages
from spark_nemo.toy.resolve import ASSETS

SAMPLED = SamplingConfig(temperature=1.0, top_p=0.9, max_new_tokens=50)
GREEDY = SamplingConfig(temperature=0.0, max_new_tokens=50)


def splits(*labels: int) -> dict[str, list[ProcessBenchCase]]:
    steps = ("first", "second {{question}}")
    return {
        "gsm8k": [
            ProcessBenchCase(f"gsm8k-{i}", "g", f"Q{i}?", steps, label == -1, label)
            for i, label in enumerate(labels)
        ]
    }


def data_file(folder: Path, cases: dict[str, list[ProcessBenchCase]]) -> Path:
    path = folder / "gsm8k.json"
    path.write_text(
        json.dumps(
            [
                {
                    "id": c.case_id,
                    "generator": c.generator,
                    "problem": c.problem,
                    "steps": list(c.steps),
                    "final_answer_correct": c.final_answer_correct,
                    "label": c.label,
                }
                for c in cases["gsm8k"]
            ]
        )
    )
    return path


def ask(engine: Engine, judge, cases, votes: int, output: Path, sampling: SamplingConfig = SAMPLED):
    return evaluate_processbench(
        ServedModel(engine, Bytes(), "id"), judge, cases, sampling, votes, 3, output
    )


def test_the_critic_sees_the_problem_and_tagged_paragraphs_as_they_are() -> None:
    """Paragraphs are numbered from 0, and braces in the text are not template fields."""
    [message] = critic_messages("What is {{paragraphs}}?", ["Step 1: a\n", "{{question}}"])
    text = message["content"]
    assert (
        message["role"] == "user"
        and "What is {{paragraphs}}?" in text
        and "-1" in text
        and "\\boxed{}" in text
    )
    assert (
        "<paragraph_0>\nStep 1: a\n\n</paragraph_0>\n\n<paragraph_1>\n{{question}}\n</paragraph_1>"
        in text
    )


def test_a_critics_votes_are_saved_whole_and_score_the_same_again(tmp_path: Path) -> None:
    """Majorities, a tie, a truncated reply with a box and a failed request are scored by the rules.

    Seeds are distinct, concurrent requests are bounded, and the saved file scores alike without a
    model.
    """
    said = {
        "Q0?": ["\\boxed{0}", "\\boxed{1}", "\\boxed{0}", "x"],
        "Q1?": ["\\boxed{1}", "\\boxed{-1}", "", "\\boxed{-1}..."],
        "Q2?": ["\\boxed{1}", "\\boxed{0}", EngineFailure("too long"), "?"],
        "Q3?": ["-1", "?", "", ""],
    }
    engine = Scripted(lambda prompt, count: said[re.search(r"Q\d\?", prompt)[0]][count])
    cases = splits(0, -1, 1, -1)
    score = ask(engine, Critic(), cases, 4, tmp_path / "out.json")
    assert (score.splits["gsm8k"].acc_error, score.splits["gsm8k"].acc_correct, score.votes) == (
        1.0,
        0.5,
        4,
    )
    assert score.splits["gsm8k"].num_unparsed == 1
    saved = json.loads((tmp_path / "out.json").read_text())
    assert [row["prediction"] for row in saved["cases"]] == [0, -1, 1, None]
    assert saved["cases"][0]["generated_critique"] == said["Q0?"] and saved["cases"][2][
        "errors"
    ] == ["too long"]
    assert (
        saved["kinds"] == {"boxed": 8, "no_box": 7, "engine_error": 1}
        and saved["judge"] == "critic"
    )
    assert score_saved_predictions([tmp_path / "out.json"], [data_file(tmp_path, cases)]).splits[
        "gsm8k"
    ].f1 == (score.splits["gsm8k"].f1)
    assert len(set(engine.seeds)) == 16 and engine.most == 3 and engine.closed


def test_a_reward_models_verdicts_vote_too(tmp_path: Path) -> None:
    """First wrong steps vote, failures do not, and the saved file scores alike without a model."""
    right, wrong = (
        f"Step 1: Correct\nStep 2: {step}\n**Verification: Is the answer correct (Yes/No)? {word}**"
        for step, word in (("Correct", "Yes"), ("Incorrect", "No"))
    )
    said = {"Q0?": [wrong, right, wrong], "Q1?": ["nothing", right, "Step 1: Correct..."]}
    engine = Scripted(lambda prompt, count: said[re.search(r"Q\d\?", prompt)[0]][count])
    cases = splits(1, -1)
    score = ask(
        engine, RewardModelJudge("prm", prompt_set("paper")), cases, 3, tmp_path / "out.json"
    )
    assert score.average == 1.0
    saved = json.loads((tmp_path / "out.json").read_text())
    assert [row["votes"] for row in saved["cases"]] == [["1", "-1", "1"], [None, "-1", None]]
    assert saved["kinds"] == {"verdict": 4, "parse_failure": 1, "truncated": 1}
    again = score_saved_predictions([tmp_path / "out.json"], [data_file(tmp_path, cases)])
    assert (again.average, again.votes) == (1.0, 3)


def test_a_lost_engine_gives_no_score(tmp_path: Path) -> None:
    """A pool without servers, or an engine found dead at the end, is not wrong predictions."""
    with pytest.raises(EngineLost):
        ask(
            Scripted(lambda prompt, count: EngineLost("no server")),
            Critic(),
            splits(0, -1),
            1,
            tmp_path / "o.json",
        )
    dead = Scripted(lambda prompt, count: EngineFailure("gone"))
    dead.alive = False
    with pytest.raises(EngineFailure, match="engine stopped"):
        ask(dead, Critic(), splits(0, -1), 1, tmp_path / "o.json")
    assert dead.closed and not (tmp_path / "o.json").exists()


@pytest.mark.parametrize("step", ["", " \n", "**Step 2:**"])
def test_a_step_without_content_is_named_before_anybody_is_asked(tmp_path: Path, step: str) -> None:
    """An empty step is found before the first request, not after paying for all others."""
    engine, cases = Scripted(lambda prompt, count: "?"), splits(0, -1, 1)
    cases["gsm8k"][2] = replace(cases["gsm8k"][2], steps=("first", step))
    with pytest.raises(DataFileError, match=r"case 'gsm8k-2': step 1 .* has no content"):
        ask(
            engine,
            RewardModelJudge("prm", prompt_set("paper")),
            cases,
            1,
            tmp_path / "out.json",
            GREEDY,
        )
    assert not engine.seen


def test_votes_that_could_not_differ_are_rejected(tmp_path: Path) -> None:
    """Votes without randomness are an error that names the setting to change."""
    with pytest.raises(ConfigError, match=r"stage2.eval_sampling.temperature=1.0"):
        ask(
            Scripted(lambda prompt, count: ""),
            Critic(),
            splits(0, -1),
            8,
            tmp_path / "o.json",
            GREEDY,
        )
    with pytest.raises(ConfigError, match="at least 1"):
        ask(Scripted(lambda prompt, count: ""), Critic(), splits(0, -1), 0, tmp_path / "o.json")


def test_the_command_asks_a_critic_about_all_splits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command prints the table and the line that scores again; the engine is scripted."""
    cases = splits(0, -1)
    first = data_file(tmp_path, cases)
    second = tmp_path / "math.json"
    second.write_text(first.read_text().replace("gsm8k-", "math-"))
    engine = Scripted(lambda prompt, count: "\\boxed{0}" if "Q0?" in prompt else "\\boxed{-1}")
    monkeypatch.setattr(ServedModel, "load", lambda *arguments: ServedModel(engine, Bytes(), "id"))
    command = [
        "evaluate",
        "processbench",
        "--model",
        str(ASSETS / "generator"),
        "--critic",
        "--data",
        str(first),
        str(second),
        "+experiment=toy",
        f"run.dir={tmp_path / 'run'}",
    ]
    assert main(command) == 0
    shown = capsys.readouterr().out
    assert [line.split()[0] for line in shown.splitlines()[1:4]] == ["split", "gsm8k", "math"]
    assert "average F1 100.0" in shown and len(engine.seeds) == 4
    [again] = [
        line.partition("spark-nemo ")[2].split()
        for line in shown.splitlines()
        if "score again" in line
    ]
    assert main(again) == 0 and "average F1 100.0" in capsys.readouterr().out
    assert "-critic.json" in again[3]
    for extra, message in (
        (["--votes", "4"], "every vote would be the same"),
        (["--votes", "0"], "at least 1"),
    ):
        assert main([*command, *extra]) == 2 and message in capsys.readouterr().err
    assert main([*again, "--critic"]) == 2 and "--critic has no effect" in capsys.readouterr().err
    orm = [word for word in command if word != "--critic"] + ["stage2.variant=orm"]
    assert main(orm) == 2 and "an ORM names no step" in capsys.readouterr().err
