"""SGLang's ``/generate`` as pure functions: requests and replies as JSON, without HTTP.

Observed on 0.5.21 (docs/engines.md). Token ids go in and come out, never text. Log-probabilities
are after temperature and before top-p/top-k, like the embedded engine's. The terminating stop token
is in ``output_ids``. Weight versions are strings there; here they are integers, so servers are
started with ``--weight-version 0``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from enum import StrEnum
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


class PauseMode(StrEnum):
    """Effect of ``/pause_generation`` on running requests.

    ``RETRACT`` puts them back into the queue and drops their cache: they go on under new weights
    from a fresh prefill, and the prefix cache may be flushed. ``IN_PLACE`` keeps their cache, so a
    flush is rejected. ``ABORT`` ends them with the tokens they have.
    """

    ABORT = "abort"
    RETRACT = "retract"
    IN_PLACE = "in_place"


def sampling_json(sampling: SamplingParams) -> JSON:
    """Return the ``sampling_params`` of a request.

    SGLang also stops at the model's own end-of-sequence ids; without stop tokens ``ignore_eos``
    switches that off (it would switch ``stop_token_ids`` off too). ``sampling_seed`` has an effect
    only under SGLang's deterministic inference; it is sent all the same.
    """
    params: JSON = {
        "max_new_tokens": sampling.max_new_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
    }
    if sampling.top_k:
        params["top_k"] = sampling.top_k
    if sampling.stop_token_ids:
        params["stop_token_ids"] = list(sampling.stop_token_ids)
    else:
        params["ignore_eos"] = True
    if sampling.seed is not None:
        params["sampling_seed"] = sampling.seed % 2**31
    return params


def generate_json(request: GenerationRequest, rid: str) -> JSON:
    """Return the body of ``POST /generate``."""
    return {
        "rid": rid,
        "input_ids": list(request.prompt_ids),
        "sampling_params": sampling_json(request.sampling),
        "return_logprob": True,
        "logprob_start_len": -1,  # of the new tokens only
        "stream": False,
    }


def parse_generate_reply(reply: object, request: GenerationRequest) -> Generation:
    """Return the ``Generation`` in a 200 reply, which may be an abort with the tokens so far.

    Raises ``EngineFailure`` naming the field when the reply is malformed or does not answer
    ``request``.
    """
    body = _mapping(reply, "reply")
    meta = _mapping(_field(body, "meta_info"), "meta_info")
    ids = _token_ids(_field(body, "output_ids"))
    finish = _mapping(_field(meta, "finish_reason", "meta_info."), "meta_info.finish_reason")
    reason = _finish_reason(finish, ids, request.sampling)
    versions = _versions_per_token(meta, len(ids))
    return Generation(ids, _logprobs(meta, ids), versions, reason)


def require_finished(reply: Mapping[str, Any]) -> None:
    """Raise for an aborted generation, which SGLang returns as a 200 too.

    ``EngineFailure`` when SGLang blames the request (a 4xx status code inside), else
    ``EngineUnavailable``: after a pause that aborts, a weight update or a shutdown the request can
    be served again.
    """
    finish = reply["meta_info"]["finish_reason"]
    if finish["type"] != FinishReason.ABORT:
        return
    status = finish.get("status_code")
    message = f"the server aborted the request: {finish.get('message')}"
    if isinstance(status, int) and 400 <= status < 500:
        raise EngineFailure(f"{message} ({status})")
    raise EngineUnavailable(message)


def version_number(value: object, field: str) -> int:
    """Return a weight version as an integer.

    Raises ``EngineFailure`` for other values, such as SGLang's own "default".
    """
    if isinstance(value, str) and value.isdecimal():
        return int(value)
    raise EngineFailure(
        f"{field}={value!r} is not a whole number: start the server with --weight-version 0"
    )


def _finish_reason(
    finish: Mapping[str, Any], ids: Sequence[int], sampling: SamplingParams
) -> FinishReason:
    field = "meta_info.finish_reason"
    try:
        reason = FinishReason(str(_field(finish, "type", f"{field}.")))
    except ValueError:
        raise EngineFailure(
            f"{field}.type={finish['type']!r}: expected stop, length or abort"
        ) from None
    if len(ids) > sampling.max_new_tokens:
        raise EngineFailure(
            f"output_ids has {len(ids)} tokens, more than max_new_tokens={sampling.max_new_tokens}"
        )
    if reason is FinishReason.LENGTH and len(ids) != sampling.max_new_tokens:
        raise EngineFailure(
            f"{field}.type='length' after {len(ids)} of max_new_tokens={sampling.max_new_tokens}: "
            "the server's context is smaller than max_context"
        )
    if reason is FinishReason.STOP:
        matched = finish.get("matched")
        if not ids or matched not in sampling.stop_token_ids or matched != ids[-1]:
            raise EngineFailure(
                f"{field}.matched={matched!r}: not a stop token of the request that ends "
                "output_ids; add the model's end-of-sequence ids to stop_token_ids"
            )
    return reason


def _logprobs(meta: Mapping[str, Any], ids: Sequence[int]) -> tuple[float, ...]:
    """Return the log-probabilities in nats of entries ``[logprob, token_id, text or null]``."""
    field = "meta_info.output_token_logprobs"
    entries = _field(meta, "output_token_logprobs", "meta_info.") if ids else []
    if not isinstance(entries, list) or len(entries) != len(ids):
        count = len(entries) if isinstance(entries, list) else type(entries).__name__
        raise EngineFailure(
            f"{field}: expected one entry for each of {len(ids)} output_ids, got {count}"
        )
    values = []
    for position, (entry, token) in enumerate(zip(entries, ids)):
        if (
            not isinstance(entry, list)
            or len(entry) < 2
            or not _is_number(entry[0])
            or entry[1] != token
        ):
            raise EngineFailure(
                f"{field}[{position}]={entry!r}: expected [finite logprob, {token}, ...]"
            )
        values.append(float(entry[0]))
    return tuple(values)


def _versions_per_token(meta: Mapping[str, Any], count: int) -> tuple[int, ...]:
    """Expand ``weight_versions``: ranges ``{version, start, end}`` that cover the tokens."""
    field = "meta_info.weight_versions"
    if count == 0:
        return ()
    ranges = _field(meta, "weight_versions", "meta_info.")
    versions: list[int] = []
    if not isinstance(ranges, list):
        raise EngineFailure(f"{field}={ranges!r}: expected a list of ranges")
    for position, entry in enumerate(ranges):
        item = _mapping(entry, f"{field}[{position}]")
        start = item.get("start")
        end = item.get("end")
        if start != len(versions) or not isinstance(end, int) or end < start:
            raise EngineFailure(
                f"{field}[{position}] covers {start}:{end}, expected to begin at {len(versions)}"
            )
        version = version_number(item.get("version"), f"{field}[{position}].version")
        versions += [version] * (end - start)
    if len(versions) != count:
        raise EngineFailure(f"{field} cover {len(versions)} of {count} tokens")
    return tuple(versions)


def _token_ids(value: object) -> tuple[int, ...]:
    if not isinstance(value, list) or not all(type(token) is int and token >= 0 for token in value):
        raise EngineFailure("output_ids: expected a list of token ids")
    return tuple(value)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _mapping(value: object, field: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise EngineFailure(f"{field}: expected an object, got {type(value).__name__}")
    return value


def _field(mapping: Mapping[str, Any], name: str, prefix: str = "") -> Any:
    if name not in mapping:
        raise EngineFailure(f"{prefix}{name} is missing from the server's reply")
    return mapping[name]
