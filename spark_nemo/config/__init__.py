"""Configuration: dataclasses that hold every default and refuse what would have no effect. No torch."""

from .errors import ConfigError
from .schema import (
    LABEL_METHODS,
    DataConfig,
    EngineConfig,
    EvaluationConfig,
    FailurePolicy,
    MegatronConfig,
    ModelsConfig,
    OptimizerConfig,
    PipelineConfig,
    RLConfig,
    RunConfig,
    SamplingConfig,
    SparkConfig,
    Stage1Config,
    Stage2Config,
)

__all__ = [
    "LABEL_METHODS", "ConfigError", "DataConfig", "EngineConfig", "EvaluationConfig", "FailurePolicy",
    "MegatronConfig", "ModelsConfig", "OptimizerConfig", "PipelineConfig", "RLConfig", "RunConfig", "SamplingConfig",
    "SparkConfig", "Stage1Config", "Stage2Config",
]
