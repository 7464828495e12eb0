"""Collect the ``Summary`` of a run from its folder; stages that did not run are absent."""

from __future__ import annotations

import json
import platform
from collections import Counter
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from spark_nemo.config import LABEL_METHODS, REFERENCE_GUIDED, SparkConfig
from spark_nemo.config.designs import asks_reward_model, reads_answer_keys, variant_suffix
from spark_nemo.config.hacking import DETECTORS
from spark_nemo.config.reward import VARIANTS
from spark_nemo.evaluation import (
    f1_difference,
    f1_estimate,
    mean_difference,
    mean_estimate,
    score_processbench,
)
from spark_nemo.evaluation.processbench import ProcessBenchScore
from spark_nemo.evaluation.whole_solution_score import final_verdict, score_whole_solutions
from spark_nemo.records import (
    CRITIQUE,
    MERGE,
    REFERENCE_VERIFICATION,
    SOLUTION,
    VERIFICATION,
    Verdict,
    outcome_from_json,
    outcome_kind,
)
from spark_nemo.records.store import RecordStore
from spark_nemo.report.display_names import ordered_rl_variants, split_folder
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
from spark_nemo.verification.store_reader import stream_solutions

_VERIFYING = (VERIFICATION, CRITIQUE, MERGE, REFERENCE_VERIFICATION)
_SUMMARY_KEYS = {"process_aware": "spark"}
"""RL variants whose summary key is not their folder's name: the paper's own design."""
_SHOWN_SOLUTIONS = 16


def collect_summary(
    config: SparkConfig, oracle: Oracle | None = None, commands: Sequence[str] = ()
) -> dict[str, Any]:
    """Return everything that the report shows about ``run.dir``, as a plain dict of ``Summary``."""
    folder = Path(config.run.dir)
    summary = Summary(
        title=f"SPARK-NeMo run {folder.name}",
        seeds=[config.run.seed],
        environment=_environment(),
        stage1=_stage1(folder, config, oracle),
        stage2=_stage2(folder),
        stage3=_stage3(folder, config, oracle),
        rounds=_rounds(folder, config, oracle),
        seconds=_seconds(folder),
        tokens=_tokens(folder),
        commands=list(commands),
        reads_answer_keys=answer_key_readers(_round_folders(folder), config),
    )
    return to_plain(summary)


def answer_key_readers(folders: Sequence[Path], config: SparkConfig) -> dict[str, str]:
    """Return the stage runs that read answer keys to train, by folder, with the reason for each.

    ``folders`` are the rounds' run folders, the first round's first. Evaluation, which reads
    answers to measure, is not listed.
    """
    top = folders[0]
    found: dict[str, str] = {}
    for folder in folders:
        if _showed_answers(folder):
            found[_place(folder / "stage1", top)] = (
                "the verifier of the reference-guided baseline saw the answers"
            )
        for path in sorted(folder.glob("stage2/*/labels.json")):
            if not json.loads(path.read_text())["reads_answer_keys"]:
                continue
            if path.parent.name.startswith(REFERENCE_GUIDED):
                reason = "labels of the reference-guided baseline"
            else:
                reason = "labels balanced by ground truth"
            found[_place(path.parent, top)] = reason
    for path in sorted(top.glob("stage3/*/")):
        design, variant = split_folder(path.name)
        if reads_answer_keys(design):
            found[_place(path, top)] = "the reward is the answer key"
        elif asks_reward_model(design) and config.rl.named_reward_model is None:
            # Stage III takes its reward model from the last round.
            model = f"{config.stage2.method}{variant_suffix(variant)}"
            if _place(folders[-1] / "stage2" / model, top) in found:
                found[_place(path, top)] = f"its reward model, {model}, learned from such labels"
    return found


def _place(folder: Path, top: Path) -> str:
    return folder.relative_to(top).as_posix()


def _showed_answers(folder: Path) -> bool:
    """Return True if stage I showed answers to a verifier (the reference-guided baseline)."""
    paths = folder.glob("stage1/stats-*.json")
    return any(json.loads(path.read_text()).get("reference_guided") for path in paths)


def _stage1(folder: Path, config: SparkConfig, oracle: Oracle | None) -> Stage1Summary | None:
    if not (folder / "stage1/store").is_dir():
        return None
    problems = set()
    failures: Counter[str] = Counter()
    solutions = 0
    verifications = 0
    with RecordStore(folder / "stage1/store") as store:
        # One solution at a time: a store may be far larger than memory.
        for solution, votes in stream_solutions(store):
            problems.add(solution.problem_id)
            solutions += 1
            verifications += len(votes)
            for vote in votes:
                if not isinstance(vote.outcome, Verdict):
                    failures[outcome_kind(vote.outcome)] += 1
    return Stage1Summary(
        problems=len(problems),
        solutions=solutions,
        verifications=verifications,
        failure_rates={kind: count / verifications for kind, count in sorted(failures.items())},
        label_quality=label_scores(folder, config, oracle) if oracle else {},
        answers_shown_to_baseline=_showed_answers(folder),
    )


def _stage2(folder: Path) -> Stage2Summary | None:
    scores: dict[str, ProcessBenchScore] = {}
    for path in _by_method(folder, PROCESSBENCH):
        cases = json.loads(path.read_text())["cases"]
        scores[path.parent.name] = score_processbench(
            [case["label"] for case in cases], [case["prediction"] for case in cases]
        )
    whole_solutions = _whole_solutions(folder)
    if scores:
        first = next(iter(scores.values()))
        num_cases = first.num_error + first.num_correct
    elif whole_solutions:
        num_cases = next(iter(whole_solutions.values())).cases
    else:
        return None
    methods = {name: _method_scores(score) for name, score in scores.items()}
    gain = None
    if "single" in scores and "step_consistency" in scores:
        estimate = f1_difference([scores["step_consistency"].hits], [scores["single"].hits])
        gain = (estimate.low, estimate.high)
    return Stage2Summary(
        cases=num_cases,
        f1={name: method.f1.value for name, method in methods.items()},
        methods=methods,
        f1_gain_interval=gain,
        whole_solutions=whole_solutions,
    )


def _by_method(folder: Path, file: str) -> list[Path]:
    """Return a file of every reward model, by label method, each method's PRM-CoT first."""
    paths = {path.parent.name: path for path in folder.glob(f"stage2/*/{file}")}
    names = [
        f"{method}{variant_suffix(variant)}" for method in LABEL_METHODS for variant in VARIANTS
    ]
    return [paths[name] for name in names if name in paths]


def _whole_solutions(folder: Path) -> dict[str, WholeSolutionScores]:
    """Score every reward model on whole solutions if one of them is an ORM, else none."""
    orm_paths = _by_method(folder, WHOLE_SOLUTION)
    if not orm_paths:
        return {}
    scores: dict[str, WholeSolutionScores] = {}
    for path in [*_by_method(folder, PROCESSBENCH), *orm_paths]:
        cases = json.loads(path.read_text())["cases"]
        score = score_whole_solutions(
            [case["label"] for case in cases],
            [final_verdict(outcome_from_json(case["outcome"])) for case in cases],
        )
        scores[path.parent.name] = WholeSolutionScores(
            cases=len(cases),
            verdict_acc_error=figure(mean_estimate(score.hits.error)),
            verdict_acc_correct=figure(mean_estimate(score.hits.correct)),
            # F1 is the harmonic mean of two accuracies, so its bootstrap serves here, too.
            verdict_harmonic_mean=figure(f1_estimate([score.hits])),
            unparsed=score.num_unparsed,
        )
    return scores


def _method_scores(score: ProcessBenchScore) -> MethodScores:
    return MethodScores(
        acc_error=figure(mean_estimate(score.hits.error)),
        acc_correct=figure(mean_estimate(score.hits.correct)),
        f1=figure(f1_estimate([score.hits])),
        unparsed=score.num_unparsed,
    )


def _rounds(folder: Path, config: SparkConfig, oracle: Oracle | None) -> list[RoundSummary]:
    """Summarise labels and reward model of every round; empty for a run of one round."""
    folders = _round_folders(folder)
    if len(folders) == 1:
        return []
    method = config.stage2.method
    rounds = []
    for number, path in enumerate(folders, start=1):
        stage1 = _stage1(path, config, oracle)
        stage2 = _stage2(path)
        labels = stage1.label_quality.get(method) if stage1 else None
        f1 = stage2.methods[method].f1 if stage2 and method in stage2.methods else None
        rounds.append(RoundSummary(number, labels, f1))
    return rounds


def _round_folders(folder: Path) -> list[Path]:
    """Return the run folders of all rounds; the first round's is the run's own."""
    later = {int(path.name.removeprefix("round-")): path for path in folder.glob("round-*")}
    return [folder, *(later[number] for number in sorted(later))]


def _stage3(folder: Path, config: SparkConfig, oracle: Oracle | None) -> Stage3Summary | None:
    found = {}
    for path in sorted(folder.glob("stage3/*/evaluations.jsonl")):
        name = path.parent.name
        found[_SUMMARY_KEYS.get(name, name)] = path.parent
    if not found:
        return None
    folders = {key: found[key] for key in ordered_rl_variants(found)}
    evaluations = {key: _rows(path / "evaluations.jsonl") for key, path in folders.items()}
    # All RL variants start from one policy, whose evaluation is the first row of each.
    ends = {"base": next(iter(evaluations.values()))[0]}
    for key, rows in evaluations.items():
        ends[key] = rows[-1]

    intervals = {}
    differences = {}
    for key, row in ends.items():
        intervals[key] = (row["sampled"]["low"], row["sampled"]["high"])
        if "spark" in ends and key != "spark":
            differences[f"spark_minus_{key}"] = _difference(ends["spark"], row)
    solutions = []
    probes = {}
    for key, path in folders.items():
        solutions += _solutions(path / "samples.jsonl", key, oracle)
        hacking_rows = _rows(path / "hacking.jsonl")
        if hacking_rows:
            probes[key] = [ProbeResult(**probe) for probe in hacking_rows[-1]["probes"]]
    return Stage3Summary(
        problems=len(ends["base"]["rates"]),
        samples_per_problem=config.evaluation.samples_per_problem,
        accuracy={key: row["sampled"]["value"] for key, row in ends.items()},
        accuracy_intervals=intervals,
        greedy={key: Figure(**row["greedy"]) for key, row in ends.items()},
        differences=differences,
        curves={key: _curve(path, evaluations[key]) for key, path in folders.items()},
        solutions=solutions,
        probes=probes,
    )


def _difference(first: dict, second: dict) -> Figure:
    """Return the paired difference of two evaluations' accuracies."""
    problems = list(first["rates"])
    return figure(
        mean_difference(
            [first["rates"][problem] for problem in problems],
            [second["rates"][problem] for problem in problems],
        )
    )


def _curve(folder: Path, evaluations: list[dict]) -> list[CurvePoint]:
    accuracy = {row["step"]: row["sampled"]["value"] for row in evaluations}
    metrics = {row["step"]: row for row in _rows(folder / "metrics.jsonl")}
    points = []
    for step in sorted(accuracy.keys() | metrics.keys()):
        row = metrics.get(step, {})
        failure_rates = {
            key.removeprefix("failure/"): value
            for key, value in row.items()
            if key.startswith("failure/")
        }
        detectors = {name: row[f"hacking/{name}"] for name in DETECTORS if f"hacking/{name}" in row}
        points.append(
            CurvePoint(
                step=step,
                reward=row.get("reward"),
                true_accuracy=accuracy.get(step),
                failure_rates=failure_rates,
                entropy=row.get("entropy"),
                mismatch=row.get("engine_logprob_diff_mean"),
                hacking=detectors,
            )
        )
    return points


def _solutions(path: Path, rl_variant: str, oracle: Oracle | None) -> list[ScoredSolution]:
    """Return about ``_SHOWN_SOLUTIONS`` sampled solutions, spread evenly over training."""
    rows = [row for row in _rows(path) if row["steps"]]
    stride = max(1, len(rows) // _SHOWN_SOLUTIONS)
    return [_solution(row, rl_variant, oracle) for row in rows[::stride][:_SHOWN_SOLUTIONS]]


def _solution(row: dict, rl_variant: str, oracle: Oracle | None) -> ScoredSolution:
    unknown = [None] * len(row["steps"])
    labels = row["step_labels"] or unknown
    truths = oracle(row["question"], row["steps"]) if oracle else unknown
    verdict = None
    failure = row["violation"]
    if row["outcome"]:
        verdict = final_verdict(outcome_from_json(row["outcome"]))
        if verdict is None and not failure:
            failure = row["outcome"]["kind"]
    return ScoredSolution(
        question=row["question"],
        rl_variant=rl_variant,
        verdict=verdict,
        reward=row["reward"],
        failure=failure,
        truly_correct=all(truths) if oracle else None,
        steps=[
            ScoredStep(text, label, truth)
            for text, label, truth in zip(row["steps"], labels, truths)
        ],
    )


def _seconds(folder: Path) -> dict[str, float]:
    seconds: Counter[str] = Counter()
    for round_folder in _round_folders(folder):
        for path in round_folder.glob("stage*/*/seconds.json"):
            stage = path.parent.parent.name
            seconds[stage] += json.loads(path.read_text())["seconds"]
    return dict(sorted(seconds.items()))


def _tokens(folder: Path) -> dict[str, int]:
    tokens: Counter[str] = Counter()
    for number, round_folder in enumerate(_round_folders(folder), start=1):
        if (round_folder / "stage1/store").is_dir():
            # The statistics file has only what the last of several runs generated, so the records
            # are counted. Later rounds reuse the first round's solutions.
            kinds = (SOLUTION, *_VERIFYING) if number == 1 else _VERIFYING
            with RecordStore(round_folder / "stage1/store") as store:
                for kind in kinds:
                    tokens["stage1"] += sum(row["num_tokens"] for _, row in store.iter(kind))
        for path in round_folder.glob("stage2/*/DONE.json"):
            tokens["stage2"] += json.loads(path.read_text())["tokens"]
    for path in folder.glob("stage3/*/metrics.jsonl"):
        for row in _rows(path):
            tokens["stage3"] += int(row["sampled_tokens"] + row["verifier_tokens"])
    return dict(tokens)


def _environment() -> dict[str, str]:
    packages = ("spark-nemo", "torch", "megatron-core", "transformers")
    return {"python": platform.python_version()} | {name: version(name) for name in packages}


def _rows(path: Path) -> list[dict]:
    """Read a JSONL file of the run; a file that does not exist has no rows."""
    # Text after the last newline was torn by a kill, or is still being written.
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines if line.strip()]
