"""Composition of settings: defaults in dataclasses, differences in conf/, valid experiments."""

from __future__ import annotations

from pathlib import Path

import pytest

from spark_nemo.config import ConfigError, SamplingConfig, SparkConfig
from spark_nemo.run.compose import compose_config, config_folder, config_yaml


def test_no_override_gives_the_dataclass_defaults() -> None:
    """Defaults are written in one place."""
    assert compose_config([]) == SparkConfig()


@pytest.mark.parametrize(
    "path", sorted((config_folder() / "experiment").rglob("*.yaml")), ids=lambda p: p.stem
)
def test_every_experiment_composes(path: Path) -> None:
    """Each file in conf/experiment is valid; whether its models exist is not checked."""
    name = path.relative_to(config_folder() / "experiment").with_suffix("")
    assert compose_config([f"+experiment={name}"]) != SparkConfig()


def test_the_last_override_of_a_key_wins() -> None:
    """The pipeline relies on it when it adds a job's own overrides after the user's."""
    assert compose_config(["run.seed=1", "run.seed=2"]).run.seed == 2


@pytest.mark.parametrize("override", ["run.dir=a=b", "run.dir", "rl.steps=[1,"])
def test_an_override_that_does_not_parse_is_repeated(override: str) -> None:
    """The message names the word that the user typed; Hydra's own names a grammar token."""
    with pytest.raises(ConfigError) as error:
        compose_config([override])
    assert override in str(error.value) and "\n" not in str(error.value)


def test_a_recipe_that_is_not_yaml_is_one_line_with_its_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A YAML error in a user's recipe shows the file and the line, not a traceback."""
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text("rl: {steps: 3\nrun: [\n")
    monkeypatch.setenv("SPARK_NEMO_CONF", str(tmp_path))
    with pytest.raises(ConfigError, match=r"mine\.yaml.*line 2") as error:
        compose_config(["+experiment=mine"])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("cut", [{"top_p": 0.9}, {"top_k": 20}])
def test_greedy_with_top_p_or_top_k_is_an_error(cut: dict) -> None:
    """A sampling setting without effect is an error in every section."""
    with pytest.raises(ConfigError, match=f"{next(iter(cut))}=.* has no effect"):
        SamplingConfig(temperature=0.0, **cut)


def test_the_printed_configuration_names_every_section() -> None:
    """config.yaml of a run is readable YAML."""
    text = config_yaml(compose_config(["+experiment=toy"]))
    assert all(f"{section}:" in text for section in vars(SparkConfig()))


FLOATS = {
    "engine.policy.request_timeout_s": ["engine.kind=sglang", "engine.policy.servers=1"],
    "weight_sync.max_mean_mismatch": [],
    "weight_sync.timeout_s": [],
    "rl.loss.tis_clip": [],
    "rl.reward.failures.penalty": ["rl/reward/failures=penalize"],
    "rl.loss.clip_low": ["rl/loss=clipped"],
    "rl.kl.coef": ["rl/kl=k3"],
    "rl.sampling.temperature": [],
    "evaluation.temperature": [],
    "rl.hacking.detectors.inflation": [],
    "stage1.max_failure_rate": [],
    "sft.optimizer.lr": [],
    "stage2.optimizer.beta2": [],
    "rl.optimizer.weight_decay": [],
}


@pytest.mark.parametrize("value", ["nan", "inf"])
@pytest.mark.parametrize("name", FLOATS)
def test_a_number_that_is_not_finite_is_an_error_with_its_name(name: str, value: str) -> None:
    """Every comparison with NaN is false: as a limit it would let everything through, as a penalty
    it would become a reward. Settings of every kind; the check walks the whole tree, so new ones
    are covered too.
    """
    with pytest.raises(ConfigError, match=f"{name.rpartition('.')[2]}={value}"):
        compose_config([*FLOATS[name], f"{name}={value}"])


@pytest.mark.parametrize(
    "settings",
    ["lr=0", "eps=0", "weight_decay=-0.1", "clip_grad=-1", "beta1=1", "beta2=-0.5", "min_lr=1"],
)
def test_an_invalid_optimizer_is_an_error(settings: str) -> None:
    """Each would train, and badly: Adam with beta1=1 never moves, a negative decay lets weights
    grow.
    """
    with pytest.raises(ConfigError, match=f"optimizer.{settings.partition('=')[0]}="):
        compose_config(["rl.optimizer.decay=linear", f"rl.optimizer.{settings}"])
