"""Configuration: dataclasses that hold every default, in config groups. No torch."""

from .designs import register_advantage, register_reward
from .engine import EngineConfig, PoolConfig, SamplingConfig
from .errors import ConfigError
from .labels import LABEL_METHODS, REFERENCE_GUIDED, REVISED_METHODS, VOTE_METHODS, LabelsConfig
from .reward import FailurePolicy, ModelReward
from .rl import RLConfig
from .schema import (
    DataConfig,
    EvaluationConfig,
    ModelsConfig,
    PipelineConfig,
    RunConfig,
    SparkConfig,
)
from .sft import FineTuningConfig, SftConfig
from .trainer import MegatronConfig, OptimizerConfig
from .verification import Stage1Config, Stage2Config
from .weight_sync import WeightSyncConfig

__all__ = [
    "LABEL_METHODS",
    "REFERENCE_GUIDED",
    "REVISED_METHODS",
    "VOTE_METHODS",
    "ConfigError",
    "DataConfig",
    "EngineConfig",
    "EvaluationConfig",
    "FailurePolicy",
    "FineTuningConfig",
    "LabelsConfig",
    "MegatronConfig",
    "ModelReward",
    "ModelsConfig",
    "OptimizerConfig",
    "PipelineConfig",
    "PoolConfig",
    "RLConfig",
    "RunConfig",
    "SamplingConfig",
    "SftConfig",
    "SparkConfig",
    "Stage1Config",
    "Stage2Config",
    "WeightSyncConfig",
    "register_advantage",
    "register_reward",
]
