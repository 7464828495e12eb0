"""From the files of a run folder to its ``Summary``. Parts that did not run are left out."""

from __future__ import annotations

import json
import platform
from collections import Counter
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from spark_nemo.config import LABEL_METHODS, REFERENCE_GUIDED, SparkConfig
from spark_nemo.config.designs import READS_ANSWER_KEYS, VARIANTS, asks_reward_model, variant_suffix
from spark_nemo.config.hacking import DETECTORS
from spark_nemo.evaluation import (
    f1_difference,
    f1_estimate,
    mean_difference,
    mean_estimate,
    score_processbench,
)
from spark_nemo.evaluation.processbench import ProcessBenchScore
from spark_nemo.evaluation.whole_solution_score import final_verdict, score_whole_solutions
from spark_nemo.records import Verdict, outcome_from_json, outcome_kind
from spark_nemo.records.store import RecordStore
from spark_nemo.report.display_names import arm_order
from spark_nemo.report.label_scores import Oracle, figure, label_scores
from spark_nemo.report.summary import (
    CurvePoint,
    Figure,
    MethodScores,
    ProbeResult,
    RoundSummary,
    ScoredSolution,
    ScoredStep,
    Stage1Summary,
    Stage2Summary,
    Stage3Summary,
    Summary,
    WholeSolutionScores,
    to_plain,
)
from spark_nemo.run.run_folder import PROCESSBENCH, WHOLE_SOLUTION
from spark_nemo.verification.meta_critique import CRITIQUE, MERGE
from spark_nemo.verification.reference import REFERENCE_VERIFICATION
from spark_nemo.verification.sampler import SOLUTION, VERIFICATION
from spark_nemo.verification.store_reader import stream_collected

_VERIFYING = (VERIFICATION, CRITIQUE, MERGE, REFERENCE_VERIFICATION)
_ARM_KEYS = {"process_aware": "spark"}
"""Keys of arms in a summary that are not their folders' names: the paper's own design with a
PRM-CoT.
"""
_SHOWN_SOLUTIONS = 16


def collect_summary(
    config: SparkConfig, oracle: Oracle | None = None, commands: Sequence[str] = ()
) -> dict[str, Any]:
    """Everything the report shows about ``run.dir``, as the plain dict of ``report.model.Summary``."""
    folder = Path(config.run.dir)
    stage1, stage2, stage3 = (
        _stage1(folder, config, oracle),
        _stage2(folder),
        _stage3(folder, config, oracle),
    )
    return to_plain(
        Summary(
            title=f"SPARK-NeMo run {folder.name}",
            seeds=[config.run.seed],
            environment=_environment(),
            stage1=stage1,
            stage2=stage2,
            stage3=stage3,
            rounds=_rounds(folder, config, oracle),
            seconds=_seconds(folder),
            tokens=_tokens(folder),
            commands=list(commands),
            reads_answer_keys=answer_key_readers(_round_folders(folder), config),
        )
    )


def _stage1(folder: Path, config: SparkConfig, oracle: Oracle | None) -> Stage1Summary | None:
    if not (folder / "stage1/store").is_dir():
        return None
    problems, failures = set(), Counter()
    solutions = verifications = 0
    with RecordStore(folder / "stage1/store") as store:
        for solution, votes in stream_collected(
            store
        ):  # one by one: a store may be far larger than memory
            problems.add(solution.problem_id)
            solutions, verifications = solutions + 1, verifications + len(votes)
            failures.update(
                outcome_kind(v.outcome) for v in votes if not isinstance(v.outcome, Verdict)
            )
    shown = any(
        json.loads(path.read_text()).get("reference_guided")
        for path in folder.glob("stage1/stats-*.json")
    )
    return Stage1Summary(
        problems=len(problems),
        solutions=solutions,
        verifications=verifications,
        failure_rates={kind: count / verifications for kind, count in sorted(failures.items())},
        label_quality=label_scores(folder, config, oracle) if oracle else {},
        answers_shown_to_baseline=shown,
    )


def _stage2(folder: Path) -> Stage2Summary | None:
    scores: dict[str, ProcessBenchScore] = {}
    for path in _by_method(folder, PROCESSBENCH):
        cases = json.loads(path.read_text())["cases"]
        scores[path.parent.name] = score_processbench(
            [c["label"] for c in cases], [c["prediction"] for c in cases]
        )
    whole = _whole_solutions(folder)
    if not scores and not whole:
        return None
    methods = {name: _method_scores(score) for name, score in scores.items()}
    gain = None
    if {"single", "step_consistency"} <= scores.keys():
        estimate = f1_difference([scores["step_consistency"].hits], [scores["single"].hits])
        gain = (estimate.low, estimate.high)
    first = next(iter(scores.values()), None)
    cases = first.num_error + first.num_correct if first else next(iter(whole.values())).cases
    return Stage2Summary(
        cases=cases,
        f1={name: m.f1.value for name, m in methods.items()},
        methods=methods,
        f1_gain_interval=gain,
        whole_solutions=whole,
    )


def _by_method(folder: Path, file: str) -> list[Path]:
    """The files of reward models in the order of their labels' methods, each method's PRM-CoT
    first.
    """
    paths = {path.parent.name: path for path in folder.glob(f"stage2/*/{file}")}
    names = [
        f"{method}{variant_suffix(variant)}" for method in LABEL_METHODS for variant in VARIANTS
    ]
    return [paths[name] for name in names if name in paths]


def _whole_solutions(folder: Path) -> dict[str, WholeSolutionScores]:
    """Yes or No about whole solutions, of all reward models, when one of them is an ORM: else
    nobody asks.
    """
    scores: dict[str, WholeSolutionScores] = {}
    orms = _by_method(folder, WHOLE_SOLUTION)
    for path in [*_by_method(folder, PROCESSBENCH), *orms] if orms else []:
        cases = json.loads(path.read_text())["cases"]
        score = score_whole_solutions(
            [c["label"] for c in cases],
            [final_verdict(outcome_from_json(c["outcome"])) for c in cases],
        )
        # The bootstrap of a harmonic mean of two accuracies is that of an F1, whatever the two are
        # of.
        scores[path.parent.name] = WholeSolutionScores(
            len(cases),
            figure(mean_estimate(score.hits.error)),
            figure(mean_estimate(score.hits.correct)),
            figure(f1_estimate([score.hits])),
            score.num_unparsed,
        )
    return scores


def _method_scores(score: ProcessBenchScore) -> MethodScores:
    error, correct = mean_estimate(score.hits.error), mean_estimate(score.hits.correct)
    return MethodScores(
        figure(error), figure(correct), figure(f1_estimate([score.hits])), score.num_unparsed
    )


def _rounds(folder: Path, config: SparkConfig, oracle: Oracle | None) -> list[RoundSummary]:
    """Labels and reward model of every round, when there was more than one."""
    rounds, method, folders = [], config.stage2.method, _round_folders(folder)
    for number, path in enumerate(folders if len(folders) > 1 else [], start=1):
        stage1, stage2 = _stage1(path, config, oracle), _stage2(path)
        rounds.append(
            RoundSummary(
                number,
                stage1.label_quality.get(method) if stage1 else None,
                stage2.methods[method].f1 if stage2 and method in stage2.methods else None,
            )
        )
    return rounds


def _round_folders(folder: Path) -> list[Path]:
    """Folders of the rounds; the first is the run's own."""
    return [
        folder,
        *sorted(folder.glob("round-*"), key=lambda path: int(path.name.removeprefix("round-"))),
    ]


def _stage3(folder: Path, config: SparkConfig, oracle: Oracle | None) -> Stage3Summary | None:
    found = {
        _ARM_KEYS.get(path.parent.name, path.parent.name): path.parent
        for path in sorted(folder.glob("stage3/*/evaluations.jsonl"))
    }
    arms = {name: found[name] for name in arm_order(list(found))}
    if not arms:
        return None
    evaluations = {arm: _rows(path / "evaluations.jsonl") for arm, path in arms.items()}
    ends = {
        "base": next(iter(evaluations.values()))[0],
        **{arm: rows[-1] for arm, rows in evaluations.items()},
    }
    return Stage3Summary(
        problems=len(ends["base"]["rates"]),
        samples_per_problem=config.evaluation.samples_per_problem,
        accuracy={arm: row["sampled"]["value"] for arm, row in ends.items()},
        accuracy_intervals={
            arm: (row["sampled"]["low"], row["sampled"]["high"]) for arm, row in ends.items()
        },
        greedy={arm: Figure(**row["greedy"]) for arm, row in ends.items()},
        differences={
            f"spark_minus_{other}": _difference(ends["spark"], ends[other])
            for other in ends
            if other != "spark" and "spark" in ends
        },
        curves={arm: _curve(path, evaluations[arm]) for arm, path in arms.items()},
        solutions=[
            s for arm, path in arms.items() for s in _solutions(path / "samples.jsonl", arm, oracle)
        ],
        probes={
            arm: [ProbeResult(**each) for each in rows[-1]["probes"]]
            for arm, path in arms.items()
            if (rows := _rows(path / "hacking.jsonl"))
        },
    )


def _difference(first: dict, second: dict) -> Figure:
    problems = first["rates"].keys()
    return figure(
        mean_difference(
            [first["rates"][p] for p in problems], [second["rates"][p] for p in problems]
        )
    )


def _curve(folder: Path, evaluations: list[dict]) -> list[CurvePoint]:
    accuracy = {row["step"]: row["sampled"]["value"] for row in evaluations}
    metrics = {row["step"]: row for row in _rows(folder / "metrics.jsonl")}
    points = []
    for step in sorted(accuracy.keys() | metrics.keys()):
        row = metrics.get(step, {})
        rates = {
            key.removeprefix("failure/"): value
            for key, value in row.items()
            if key.startswith("failure/")
        }
        mismatch = row.get("engine_logprob_diff_mean")
        detectors = {name: row[f"hacking/{name}"] for name in DETECTORS if f"hacking/{name}" in row}
        points.append(
            CurvePoint(
                step,
                row.get("reward"),
                accuracy.get(step),
                rates,
                row.get("entropy"),
                mismatch,
                detectors,
            )
        )
    return points


def _solutions(path: Path, arm: str, oracle: Oracle | None) -> list[ScoredSolution]:
    rows = [row for row in _rows(path) if row["steps"]] if path.exists() else []
    step = max(1, len(rows) // _SHOWN_SOLUTIONS)
    shown = []
    for row in rows[::step][:_SHOWN_SOLUTIONS]:
        labels = row["step_labels"] or [None] * len(row["steps"])
        truths = oracle(row["question"], row["steps"]) if oracle else [None] * len(row["steps"])
        verdict = final_verdict(outcome_from_json(row["outcome"])) if row["outcome"] else None
        failure = row["violation"] or (
            row["outcome"]["kind"] if row["outcome"] and verdict is None else None
        )
        shown.append(
            ScoredSolution(
                question=row["question"],
                arm=arm,
                verdict=verdict,
                reward=row["reward"],
                failure=failure,
                truly_correct=all(truths) if oracle else None,
                steps=[
                    ScoredStep(t, said, true) for t, said, true in zip(row["steps"], labels, truths)
                ],
            )
        )
    return shown


def answer_key_readers(folders: Sequence[Path], config: SparkConfig) -> dict[str, str]:
    """Part of the run by its place in the run folder, and what it read answers for; empty for a run
    without.

    ``folders`` are those of the rounds, the run's own first. Evaluation, which reads answers to
    measure, is no part.
    """
    top, found = folders[0], {}
    for folder in folders:
        for path in sorted(folder.glob("stage1/stats-*.json")):
            if json.loads(path.read_text()).get("reference_guided"):
                found[_place(folder / "stage1", top)] = (
                    "the verifier of the reference-guided baseline saw the answers"
                )
        for path in sorted(folder.glob("stage2/*/labels.json")):
            if json.loads(path.read_text())["reads_answer_keys"]:
                guided = path.parent.name.startswith(REFERENCE_GUIDED)
                found[_place(path.parent, top)] = (
                    "labels of the reference-guided baseline"
                    if guided
                    else "labels balanced by ground truth"
                )
    for path in sorted(top.glob("stage3/*/")):
        design, variant = _arm(path.name)
        if design in READS_ANSWER_KEYS:
            found[_place(path, top)] = "the reward is the answer key"
        elif asks_reward_model(design) and config.rl.reward_model is None:
            model = f"{config.stage2.method}{variant_suffix(variant)}"
            if any(_place(folder / "stage2" / model, top) in found for folder in folders[-1:]):
                found[_place(path, top)] = f"its reward model, {model}, learned from such labels"
    return found


def _arm(name: str) -> tuple[str, str | None]:
    """A folder of stage III as design and kind of reward model."""
    design, _, variant = name.rpartition("-")
    return (design, variant) if variant in VARIANTS and design else (name, None)


def _place(folder: Path, top: Path) -> str:
    return folder.relative_to(top).as_posix()


def _seconds(folder: Path) -> dict[str, float]:
    seconds: dict[str, float] = {}
    for path in (
        path for part in _round_folders(folder) for path in part.glob("stage*/*/seconds.json")
    ):
        stage = path.parent.parent.name
        seconds[stage] = seconds.get(stage, 0.0) + json.loads(path.read_text())["seconds"]
    return dict(sorted(seconds.items()))


def _tokens(folder: Path) -> dict[str, int]:
    tokens: Counter[str] = Counter()
    for number, part in enumerate(_round_folders(folder), start=1):
        if (part / "stage1/store").is_dir():
            # Not from the statistics: those know only what the last of several runs paid for. Later
            # rounds took their solutions over from the first.
            kinds = (SOLUTION, *_VERIFYING) if number == 1 else _VERIFYING
            with RecordStore(part / "stage1/store") as store:
                tokens["stage1"] += sum(
                    row["num_tokens"] for kind in kinds for _, row in store.iter(kind)
                )
        for path in part.glob("stage2/*/DONE.json"):
            tokens["stage2"] += json.loads(path.read_text())["tokens"]
    for path in folder.glob("stage3/*/metrics.jsonl"):
        tokens["stage3"] += int(
            sum(row["sampled_tokens"] + row["verifier_tokens"] for row in _rows(path))
        )
    return dict(tokens)


def _environment() -> dict[str, str]:
    packages = ("spark-nemo", "torch", "megatron-core", "transformers")
    return {"python": platform.python_version(), **{name: version(name) for name in packages}}


def _rows(path: Path) -> list[dict]:
    # What follows the last newline was torn by a kill, or is being written.
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines if line.strip()]
