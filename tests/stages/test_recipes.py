"""Recipes of the paper's experiments: each is valid, has a plan, and marks values of our own."""

from __future__ import annotations

import functools
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from spark_nemo.cli.main import main
from spark_nemo.config import LABEL_METHODS, ConfigError, SparkConfig
from spark_nemo.config.designs import designs, has_own_baseline, step_advantages
from spark_nemo.config.reward import VARIANTS
from spark_nemo.planning.dry_run import dry_run
from spark_nemo.planning.known_models import BASES, PUBLISHED
from spark_nemo.run.compose import compose_config, config_folder
from spark_nemo.run.rl_variants import pipeline_rl_variants

RECIPES = sorted((config_folder() / "experiment/spark").glob("*.yaml"))
READ_ANSWER_KEYS = {"rl_rlvr", "rl_rlvr_70b", "designs", "label_reference_guided", "labels"}


def command_of(path: Path) -> list[str]:
    """The command line that a recipe names in its head."""
    found = re.search(
        r"^#   spark-nemo (\w+) \+experiment=spark/(\w+)( --dry-run)?$",
        path.read_text(),
        re.MULTILINE,
    )
    assert found and found[2] == path.stem, f"{path}: its head must name its own command"
    return [found[1], f"+experiment=spark/{path.stem}", "--dry-run"]


@functools.cache
def recipe(name: str, *more: str) -> SparkConfig:
    """The recipe, composed once: Hydra takes a fifth of a second."""
    return compose_config([f"+experiment=spark/{name}", *more])


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_has_a_plan(path: Path) -> None:
    """Proves what the command in the head of each recipe would do with --dry-run: it validates
    (layouts against the published model sizes, contexts) without any file, and says which engine to
    add: the embedded one is for small models. Exactly the declared baselines say that they read
    answer keys. Does not prove that a recipe trains well.
    """
    command = command_of(path)
    plan = dry_run(recipe(path.stem), command[0])
    assert "size unknown" not in plan
    assert ("add +engine=sglang" in plan) == (command[0] != "sft")
    assert ("trainer ranks" in plan) == (command[0] != "stage1")
    assert ("READS ANSWER KEYS" in plan) == (path.stem in READ_ANSWER_KEYS)


@pytest.mark.parametrize("name", ["policy_sft", "stage1", "rl_selective", "base"])
def test_a_dry_run_writes_nothing(
    name: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Proves the command line itself, for each subcommand that the recipes name: its plan, and no
    file.
    """
    command = command_of(next(path for path in RECIPES if path.stem == name))
    assert main([*command, f"run.dir={tmp_path}/run"]) == 0
    plan = capsys.readouterr().out
    assert f"run.dir      {tmp_path}/run" in plan and not list(tmp_path.iterdir())
    assert (
        main(
            [
                *command,
                f"run.dir={tmp_path}/run",
                "models.policy=",
                "models.policy_base=null",
                "models.generator=",
            ]
        )
        == 2
    )
    assert "is not set" in capsys.readouterr().err


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_composes_with_servers_and_fits_the_longest_prompt(path: Path) -> None:
    """Each recipe composes with +engine=sglang, and the policy's context holds prompt and response:
    2,048 and 2,048 tokens in RL as in the paper, 1,024 and 3,072 in the format SFT. Longer prompts
    in a data file are not tested; engines reject them.
    """
    config, servers = recipe(path.stem), recipe("base", "+engine=sglang").engine
    config = replace(config, engine=replace(servers, max_context=config.engine.max_context))
    context = PUBLISHED[Path(config.models.policy_base).name]["max_position_embeddings"]
    assert context == 4096 and config.rl.sampling.max_new_tokens + 2048 <= context
    assert config.sft.max_length == 1024 + 3072 <= context
    assert "sglang, policy pool: 2 to launch here" in dry_run(config, "stage1")


@pytest.mark.slow
def test_every_experiment_of_the_paper_has_a_recipe() -> None:
    """Proves none is missing: each label method, kind of reward model, reward design and baseline
    by name in a recipe of its own, the format SFT, and a 70B variant of each stage.
    """
    configs = {path.stem: recipe(path.stem) for path in RECIPES}
    assert {configs[name].stage2.method for name in configs if name.startswith("label_")} == set(
        LABEL_METHODS
    )
    assert {configs[name].stage2.variant for name in configs if name.startswith("variant_")} == set(
        VARIANTS
    )
    arms = {name: config.rl_variant for name, config in configs.items() if name.startswith("rl_")}
    assert arms == {
        name: name.removeprefix("rl_").removesuffix("_70b").replace("aware_", "aware-")
        for name in arms
    }
    assert set(arms.values()) == {*designs(), "process_aware-prm", "process_aware-orm"}
    assert {
        "policy_sft",
        "policy_sft_70b",
        "stage1_70b",
        "stage2_70b",
        "rl_process_aware_70b",
    } <= configs.keys()
    assert {variant.design for variant in pipeline_rl_variants(configs["designs"])} == set(
        designs()
    ) - set(filter(has_own_baseline, step_advantages()))


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_a_published_size_is_one_that_was_looked_up(name: str) -> None:
    """Proves the sizes in the code are those of the copies of config.json kept with their sources;
    contexts are not in those copies.
    """
    copy = json.loads(
        (Path(__file__).parents[1] / f"weight_sync/shapes/{BASES[name]}.json").read_text()
    )
    del copy["source"]
    assert {key: PUBLISHED[name].get(key) for key in copy} == copy


STATED = {
    "sft": "epochs batch_size max_length val_fraction eval_every save_every optimizer.lr",
    "stage1": "solutions_per_problem verifications_per_solution prompt_set generator_sampling "
    "verifier_sampling meta_critique revision_sampling reference_verifications",
    "labels": "max_per_verdict",
    "stage2": "method variant",
    "rl": "prompts_per_step group_size prompt_set sampling reward.variant reward.sampling "
    "reward.retries reward.failures.penalty estimator loss.aggregation kl optimizer.lr "
    "optimizer.weight_decay optimizer.beta2 optimizer.clip_grad eval_every save_every "
    "advantage.min_steps advantage.max_steps",
    "evaluation": "max_new_tokens",
}
"""Settings that the paper, its scripts or their frameworks' defaults state."""


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_an_unpublished_value_is_marked_as_our_choice(path: Path) -> None:
    """Every setting of a recipe is stated by the paper or its scripts, or has "our choice" on its
    line, on its section's line, in the comment above, or in the file's head. The stated values
    themselves are not checked.
    """
    if "every value here is our choice" in path.read_text():
        return
    stated = {f"{section}.{name}" for section, names in STATED.items() for name in names.split()}
    above, marked, keys = False, {}, []
    for line in path.read_text().splitlines():
        ours = "our choice" in line.lower()
        if line.lstrip().startswith("#"):
            above = above or (ours and line.startswith(" "))
        elif found := re.match(r"( *)(\w+):(.*)", line):
            depth = len(found[1]) // 2
            keys = [*keys[:depth], found[2]]
            name = ".".join(keys)
            marked[name] = (
                ours or above or any(marked.get(".".join(keys[:n])) for n in range(1, depth + 1))
            )
            leaf = bool(found[3].partition("#")[0].strip())
            assert not leaf or keys[0] == "pipeline" or name in stated or marked[name], (
                f"{path.name}: {name}"
            )
            above = False


def test_problems_are_counted_whatever_the_file_is(tmp_path: Path) -> None:
    """A Parquet file or a list in JSON has other lines than problems, and an evaluation more comes
    after the last step: 3 steps with one every 2 are evaluated at 0, 2 and the end.
    """
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    rows = [
        {"prompt": [{"role": "user", "content": f"{n} + 1?"}], "data_source": "made"}
        for n in range(70)
    ]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rl.parquet")
    held_out = [{"problem_id": name, "question": "?", "answer": "1"} for name in "abc"]
    (tmp_path / "eval.json").write_text(json.dumps(held_out, indent=1))
    plan = dry_run(
        compose_config(
            [
                "+experiment=toy",
                f"data.stage1_problems={tmp_path}/rl.parquet",
                f"data.eval_problems={tmp_path}/eval.json",
                "rl.steps=3",
                "rl.eval_every=2",
            ]
        )
    ).splitlines()
    assert any(line.startswith("stage I ") and " 70 problems" in line for line in plan)
    assert any(line.startswith("evaluation") and " 3 problems, 3 times" in line for line in plan)


def test_the_papers_numbers_are_in_the_base_recipe() -> None:
    """Proves the figures that the paper or its scripts state; every recipe builds on this one."""
    config = recipe("base")
    assert (config.stage1.solutions_per_problem, config.stage1.verifications_per_solution) == (
        8,
        16,
    )
    assert (config.rl.prompts_per_step, config.rl.group_size, config.rl.loss.num_minibatches) == (
        256,
        16,
        1,
    )
    assert (config.rl.optimizer.lr, config.rl.kl.coef, config.rl.kl.name) == (
        1e-6,
        0.001,
        "k3",
    )
    assert (
        config.stage1.generator_sampling.temperature,
        config.stage1.verifier_sampling.temperature,
    ) == (0.7, 0.8)
    plan = dry_run(config)
    assert "2,048 prompt + 2,048 response tokens" in plan
    assert "8 solutions, 128 verifications, at most 1,114,112 generated tokens" in plan
    assert "200 steps, 819,200 rollouts" in plan


@pytest.mark.parametrize(
    "path", [p for p in RECIPES if "  - /experiment" in p.read_text()], ids=lambda path: path.stem
)
def test_a_recipe_says_only_what_differs_and_keeps_its_own_folder(path: Path) -> None:
    """Two recipes never share a run folder, where the second would fail."""
    assert re.search(rf"dir: runs/spark/{path.stem}\b", path.read_text())
    assert len(path.read_text().splitlines()) < 25


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "rl.sampling.max_new_tokens=3073",
            "rl.sampling: 4097 tokens with 1024 for the problem, but models.policy=",
        ),
        ("evaluation.max_new_tokens=4096", "context of 4096 here: lower max_new_tokens"),
        ("engine.max_context=8192", "or raise engine.max_context"),
        ("megatron.tensor_parallel=8", "megatron.tensor_parallel"),
        ("megatron.pipeline_parallel=3", "megatron.pipeline_parallel"),
        ("stage2.variant=orm pipeline.rewards=[step_average]", "an ORM produces none"),
        ("stage2.method=single", "add it to pipeline.label_methods"),
        ("models.policy=''", "models.policy is not set"),
    ],
)
def test_an_impossible_plan_is_an_error(override: str, message: str) -> None:
    """Proves the 4,096-token context of Qwen2.5-Math-7B binds (3,072 response tokens are the most),
    and so do layouts and the parts' needs of each other.
    """
    with pytest.raises(ConfigError) as raised:
        dry_run(compose_config(["+experiment=spark/base", *override.split()]))
    assert message in str(raised.value)


def test_the_longest_response_that_fits_next_to_a_prompt_is_allowed() -> None:
    """Proves the other side of the limit: 1,024 + 3,072 = 4,096."""
    plan = dry_run(compose_config(["+experiment=spark/base", "rl.sampling.max_new_tokens=3072"]))
    assert "1,024 prompt + 3,072 response" in plan


def test_the_toy_task_has_a_plan() -> None:
    """Proves counts come from the data where they are known: 240 problems, 4 solutions, 16
    verifications of each.
    """
    plan = dry_run(compose_config(["+experiment=toy"]))
    assert (
        "240 problems: 960 solutions, 15,360 verifications" in plan
        and "embedded engine" not in plan
    )
