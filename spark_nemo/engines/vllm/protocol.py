"""vLLM's ``/v1/completions`` as pure functions, token ids in and out. Observed on 0.32.0.

``prompt`` is a list of ids. ``return_token_ids`` returns the ids of the prompt and of the answer,
the terminating stop token included. The text in a reply is not read.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ..base import (
    EngineFailure,
    EngineUnavailable,
    FinishReason,
    Generation,
    GenerationRequest,
    SamplingParams,
)

JSON = dict[str, Any]
COLDEST = 0.01
"""Lowest positive temperature: vLLM raises lower ones to it, with a warning in its log only."""
_TOKEN = "token_id:"
_LEAST_LOGPROB = -9999.0
"""vLLM writes this for minus infinity."""


def has_logprobs(sampling: SamplingParams) -> bool:
    """True if vLLM can report log-probabilities after temperature and *before* a cut.

    Its two modes are before temperature (raw) and after temperature *and* top-p/top-k (processed).
    Processed is the wanted one when nothing is cut; a greedy token's is at temperature 1 in both.
    """
    return sampling.temperature == 0 or (sampling.top_p == 1 and sampling.top_k == 0)


def require_warm_enough(sampling: SamplingParams) -> None:
    """Raise ``EngineFailure`` for a temperature that vLLM would change."""
    if 0 < sampling.temperature < COLDEST:
        raise EngineFailure(
            f"temperature={sampling.temperature}: vLLM would sample at {COLDEST}; use 0 or at "
            f"least {COLDEST}"
        )


def completion_json(request: GenerationRequest, model: str) -> JSON:
    """Return the body of ``POST /v1/completions``, with every field that has a server default.

    ``ignore_eos`` switches off the model's own end-of-sequence id and, unlike in SGLang, leaves
    ``stop_token_ids`` on. Raises what ``require_warm_enough`` raises.
    """
    sampling = request.sampling
    require_warm_enough(sampling)
    greedy = sampling.temperature == 0
    body: JSON = {
        "model": model,
        "prompt": list(request.prompt_ids),
        "max_tokens": sampling.max_new_tokens,
        "n": 1,
        "temperature": sampling.temperature,
        "top_p": 1.0 if greedy else sampling.top_p,
        "top_k": 0 if greedy else sampling.top_k,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "stop_token_ids": list(sampling.stop_token_ids),
        "ignore_eos": True,
        "skip_special_tokens": False,
        "add_special_tokens": False,
        "return_token_ids": True,
        "stream": False,
    }
    if has_logprobs(sampling):
        body["logprobs"] = 0
        body["return_tokens_as_token_ids"] = True
    if sampling.seed is not None:
        body["seed"] = sampling.seed
    return body


def parse_completion(reply: object, request: GenerationRequest, weight_version: int) -> Generation:
    """Return the ``Generation`` in a 200 reply; log-probabilities are NaN unless ``has_logprobs``.

    Raises ``EngineUnavailable`` when the server aborted the request, ``EngineFailure`` naming the
    field when the reply is malformed or does not answer ``request``.
    """
    choices = _mapping(reply, "reply").get("choices")
    if not isinstance(choices, list) or len(choices) != 1:
        raise EngineFailure("choices: expected exactly one")
    choice = _mapping(choices[0], "choices[0]")
    if choice.get("prompt_token_ids") != list(request.prompt_ids):
        raise EngineFailure(
            "choices[0].prompt_token_ids: not the prompt that was sent; this server changes "
            "prompts or is too old for return_token_ids"
        )
    ids = _token_ids(choice.get("token_ids"))
    reason = _finish_reason(choice, ids, request.sampling)
    if has_logprobs(request.sampling):
        logprobs = _logprobs(choice.get("logprobs"), ids)
    else:
        logprobs = (math.nan,) * len(ids)
    return Generation(ids, logprobs, (weight_version,) * len(ids), reason)


def _finish_reason(
    choice: Mapping[str, Any], ids: tuple[int, ...], sampling: SamplingParams
) -> FinishReason:
    field = "choices[0].finish_reason"
    reason = choice.get("finish_reason")
    stop = choice.get("stop_reason")
    if reason == "abort":
        raise EngineUnavailable("the server aborted the request")
    if reason == "stop":
        if not ids or stop not in sampling.stop_token_ids or stop != ids[-1]:
            raise EngineFailure(
                f"{field}='stop' with stop_reason={stop!r}: not a stop token of the request that "
                "ends token_ids; start the server with --generation-config vllm, without sampling "
                "defaults of its own"
            )
        return FinishReason.STOP
    if reason == "length":
        if len(ids) != sampling.max_new_tokens:
            raise EngineFailure(
                f"{field}='length' after {len(ids)} of max_new_tokens={sampling.max_new_tokens}: "
                "the server's --max-model-len is smaller than max_context"
            )
        return FinishReason.LENGTH
    raise EngineFailure(f"{field}={reason!r}: expected stop, length or abort")


def _logprobs(value: object, ids: tuple[int, ...]) -> tuple[float, ...]:
    """Return one number in nats for every token; the reply names the token of each number."""
    field = "choices[0].logprobs"
    logprobs = _mapping(value, field)
    numbers = logprobs.get("token_logprobs")
    tokens = logprobs.get("tokens")
    if (
        not isinstance(numbers, list)
        or tokens != [f"{_TOKEN}{token}" for token in ids]
        or len(numbers) != len(ids)
    ):
        raise EngineFailure(f"{field}: expected one entry for each of {len(ids)} token_ids")
    for position, number in enumerate(numbers):
        if type(number) not in (int, float) or not _LEAST_LOGPROB < number < math.inf:
            raise EngineFailure(
                f"{field}.token_logprobs[{position}]={number!r}: expected a finite log-probability"
            )
    return tuple(map(float, numbers))


def top_logprob(reply: object, token: int) -> float:
    """Return the log-probability of ``token`` among the first position's top ones.

    Raises ``EngineFailure`` if it is not there.
    """
    try:
        top_logprobs = reply["choices"][0]["logprobs"]["top_logprobs"]  # type: ignore[index]
        return float(top_logprobs[0][f"{_TOKEN}{token}"])
    except (KeyError, IndexError, TypeError) as error:
        raise EngineFailure(
            f"choices[0].logprobs.top_logprobs[0] has no {_TOKEN}{token}"
        ) from error


def _token_ids(value: object) -> tuple[int, ...]:
    if not isinstance(value, list) or not all(type(token) is int and token >= 0 for token in value):
        raise EngineFailure("choices[0].token_ids: expected a list of token ids")
    return tuple(value)


def _mapping(value: object, field: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise EngineFailure(f"{field}: expected an object, got {type(value).__name__}")
    return value
