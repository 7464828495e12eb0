"""Errors that a user can fix: shown as one line, without a traceback."""

from __future__ import annotations

from spark_nemo.config import ConfigError
from spark_nemo.engines.base import EngineFailure
from spark_nemo.engines.tokenizer import TokenizerError
from spark_nemo.megatron import NonFiniteGradient
from spark_nemo.records.rows import DataFileError
from spark_nemo.records.store import StoreFull
from spark_nemo.report import SummaryError
from spark_nemo.rewards import FailureRateExceeded
from spark_nemo.run.local_executor import JobFailed
from spark_nemo.verification.stage1_monitor import TooManyFailures

USER_ERRORS = (
    ConfigError,
    DataFileError,
    EngineFailure,
    FailureRateExceeded,
    JobFailed,
    NonFiniteGradient,
    OSError,
    StoreFull,
    SummaryError,
    TokenizerError,
    TooManyFailures,
)
