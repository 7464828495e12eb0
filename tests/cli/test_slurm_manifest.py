"""``spark-nemo slurm-manifest``, which the scripts in ``slurm/`` read.

``tests/slurm`` tests the scripts.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from spark_nemo.cli.main import main

TOY = [
    "+experiment=toy",
    "data.stage1_problems=toy:stage1:4",
    "data.rl_problems=toy:rl:4",
    "data.eval_problems=toy:eval:4",
    "data.processbench=toy:processbench:12",
    "rl.prompts_per_step=4",
    "pipeline.rl_answers=toy:rl:4",
]


def plan(
    capsys: pytest.CaptureFixture[str], stage: str, *overrides: str, options: tuple[str, ...] = ()
) -> dict:
    """Values by name, each a list in the order of the output."""
    assert main(["slurm-manifest", "--stage", stage, *options, "--", *TOY, *overrides]) == 0
    values: dict[str, list[str]] = {}
    for line in capsys.readouterr().out.splitlines():
        name, _, value = line.partition("=")
        values.setdefault(name, []).append(value)
    return values


def test_the_chain_and_its_folder(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """The jobs to submit and the ranks to place; config.yaml is written.

    Other settings for the same folder are an error.
    """
    run = tmp_path / "a run"
    said = plan(capsys, "pipeline", f"run.dir='{run}'", "megatron.data_parallel=2")
    assert said["RUN_DIR"] == [str(run)] and said["WORLD_SIZE"] == ["2"]
    assert said["REWARD_MODEL"] == [
        f"{m}\tstage2.method={m}" for m in ("step_consistency", "single", "outcome_consistency")
    ]
    assert said["RL_VARIANT"] == [
        "process_aware\tstep_consistency\t++rl/reward=process_aware",
        "rlvr\t-\t++rl/reward=rlvr\tdata.rl_answers=${pipeline.rl_answers}",
    ]
    assert all(Path(path).exists() for path in said["NEEDS"])
    assert (
        main(
            ["slurm-manifest", "--stage", "pipeline", "--", *TOY, f"run.dir='{run}'", "rl.steps=7"]
        )
        == 2
    )
    assert "was made with" in capsys.readouterr().err


def test_every_arm_is_a_job_with_its_own_reward_model(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Folder, the model it waits for and what tells it apart, as ``spark-nemo pipeline`` would run
    it.
    """
    said = plan(
        capsys,
        "pipeline",
        f"run.dir={tmp_path}/run",
        "pipeline.rewards=[process_aware,selective,random]",
        "pipeline.rl_answers=null",
        "pipeline.variants=[prm_cot,orm]",
        "pipeline.label_methods=[step_consistency]",
        "rl.reward.queue=9",
    )
    assert (
        said["REWARD_MODEL"][1]
        == "step_consistency-orm\tstage2.method=step_consistency\tstage2.variant=orm"
    )
    assert [line.split("\t")[:2] for line in said["RL_VARIANT"]] == [
        ["process_aware", "step_consistency"],
        ["process_aware-orm", "step_consistency-orm"],
        ["selective", "step_consistency"],
        ["random", "-"],
    ]
    assert said["RL_VARIANT"][1].endswith("++rl/reward=process_aware\trl.reward.variant=orm")
    assert said["RL_VARIANT"][3].endswith("++rl/reward=random")


def test_servers_are_described_word_by_word(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Arguments and variables come one per line, so that no shell has to take them apart; the
    server's context is the engine's and what SGLang keeps for itself.
    """
    said = plan(
        capsys,
        "stage3",
        f"run.dir={tmp_path}",
        "rl/reward=random",
        "engine.kind=sglang",
        "pipeline.parallel_jobs=1",
        "engine.policy.servers=2",
        "engine.policy.server_args=['--a', 'b c']",
        "+engine.policy.server_env.X='y z'",
    )
    assert said["POLICY_SERVERS"] == ["2"] and said["POLICY_ENV"] == ["X=y z"]
    words = said["POLICY_WORD"]
    assert words[-2:] == ["--a", "b c"] and words[words.index("--context-length") + 1] == "326"
    assert "VERIFIER_WORD" not in said


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--stage", "evaluate-math", "--", *TOY], "--model"),
        (
            ["--stage", "stage1", "--model", "m", "--", *TOY],
            "--model: this stage has no such option",
        ),
        (
            ["--stage", "evaluate-math", "--model", "m", "--critic", "--", *TOY],
            "--critic: evaluate math has no such",
        ),
        (
            ["--stage", "evaluate-processbench", "--model", "m", "--k", "4", "--", *TOY],
            "--k: evaluate processbench has no",
        ),
        (["--stage", "pipeline", "--", *TOY, "pipeline.rounds=2"], "one round"),
        (["--stage", "stage3", "--", *TOY, "rl.reward.model=/nowhere"], "/nowhere"),
    ],
)
def test_what_cannot_run_is_one_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, arguments: list[str], reason: str
) -> None:
    """A plan that cannot be made ends with status 2, for the job's script to stop at."""
    assert main(["slurm-manifest", *arguments, f"run.dir={tmp_path}/run"]) == 2
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 1 and reason in error[0]


def test_an_evaluation_is_planned_with_its_own_options(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """The manifest names the file that the command writes with these options.

    The nodes must see the files of the options, not the configured ones. A dataset by name needs no
    file.
    """
    for name in ("a.json", "model"):
        (tmp_path / name).touch()
    options = (
        "--model",
        f"{tmp_path}/model",
        "--critic",
        "--votes",
        "8",
        "--data",
        f"{tmp_path}/a.json",
        "hf:a/b",
    )
    said = plan(capsys, "evaluate-processbench", f"run.dir={tmp_path}/run", options=options)
    written = f"{tmp_path.name}-model-processbench-critic-8votes"
    assert said["STAGE_RUN"] == [f"evaluate/{written}"] and said["DONE_FILE"] == [
        f"{tmp_path}/run/evaluate/{written}.json"
    ]
    assert said["NEEDS"] == [f"{tmp_path}/a.json", f"{tmp_path}/model"]


def test_the_format_sft_needs_its_base_and_its_examples(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Its part, its marker and its two inputs; a response out of format ends the job here, before
    nodes are used.
    """
    said = plan(capsys, "sft", f"run.dir={tmp_path}/run", "data.sft_examples=toy:sft:20")
    assert said["STAGE_RUN"] == ["sft"] and said["DONE_FILE"] == [
        str(tmp_path / "run/sft/DONE.json")
    ]
    assert len(said["NEEDS"]) == 2 and said["NEEDS"][1].endswith("sft-20-seed0_examples.jsonl")
    examples = Path(said["NEEDS"][1])
    examples.write_text(examples.read_text().replace("</think>", "", 1))
    command = [
        "slurm-manifest",
        "--stage",
        "sft",
        "--",
        *TOY,
        f"run.dir={tmp_path}/run",
        f"data.sft_examples={examples}",
    ]
    assert main(command) == 2
    assert (
        f"{examples}:line 1: 'response' breaks the format rule tagged_steps"
        in capsys.readouterr().err
    )
