"""Engines: one interface, the engines behind it, and the helpers that every caller uses."""

from .async_utils import run_async
from .base import (
    Engine,
    EngineFailure,
    EngineHealth,
    EngineLost,
    EngineUnavailable,
    FinishReason,
    Generation,
    GenerationRequest,
    SamplingParams,
)
from .factory import build_engine
from .tokenizer import Tokenizer, TokenizerError

__all__ = [
    "Engine",
    "EngineFailure",
    "EngineHealth",
    "EngineLost",
    "EngineUnavailable",
    "FinishReason",
    "Generation",
    "GenerationRequest",
    "SamplingParams",
    "Tokenizer",
    "TokenizerError",
    "build_engine",
    "run_async",
]
