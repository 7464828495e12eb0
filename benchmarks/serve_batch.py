"""Serve many requests at once on one engine, for the benchmarks in this folder."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from spark_nemo.engines import Engine, Generation, GenerationRequest


async def generate_all(engine: Engine, requests: Sequence[GenerationRequest]) -> list[Generation]:
    """Return all results in the order of ``requests``; the first failure is raised."""
    return await asyncio.gather(*(engine.generate(request) for request in requests))
