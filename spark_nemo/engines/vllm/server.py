"""One vLLM server as an ``Engine``, through its OpenAI-compatible ``/v1/completions`` with token
ids.

What it serves: stage I (solutions and verifications), the PRM, and evaluation. What it does not:

* **weight updates**: ``update_weights`` refuses, so stage III's policy cannot be a vLLM server;
* **log-probabilities under top-p or top-k**: vLLM has them before temperature or after the cut, never in between; they
  are NaN, which no loss survives unnoticed. Without a cut, ``processed_logprobs`` means what ours means;
  ``check_logprobs_mode`` asks the server whether it runs in that mode;
* **pause and resume**: they exist in vLLM's development mode only; refused here;
* **weight versions**: vLLM stamps none; every token carries the version the client was made with.

Seeds are honoured by vLLM (SGLang ignores them), though not with the embedded engine's draws.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from ..base import EngineFailure, EngineHealth, Generation, GenerationRequest
from ..http import RemoteEngine
from ..http.engine import PROBE
from .protocol import completion_json, parse_completion, refuse_too_cold, top_logprob

PATH = "/v1/completions"
_SAME_NATS = 1e-3


class VllmServer(RemoteEngine):
    """A client of the server at ``url`` (``http://host:port``), owned by the first event loop that
    uses it.

    ``served_name`` is the server's ``--served-model-name``. At most ``max_in_flight`` requests are
    sent at once; ``request_timeout_s``, and ``token_timeout_s`` for each token that may be sampled,
    run from then. A request that is late or whose caller is cancelled ends with its connection,
    which makes vLLM abort it. What never reached the server, lost its connection or met a 503 is
    sent again a few times; what fails after that is ``EngineUnavailable``. ``logprobs`` are NaN
    when top-p or top-k cut the distribution.
    """

    def __init__(
        self,
        url: str,
        *,
        api_key: str | None,
        served_name: str,
        vocab_size: int,
        max_context: int,
        max_in_flight: int,
        request_timeout_s: float,
        control_timeout_s: float,
        weight_version: int = 0,
        token_timeout_s: float = 0.0,
    ) -> None:
        super().__init__(
            url,
            api_key=api_key,
            vocab_size=vocab_size,
            max_context=max_context,
            max_in_flight=max_in_flight,
            request_timeout_s=request_timeout_s,
            control_timeout_s=control_timeout_s,
            token_timeout_s=token_timeout_s,
        )
        self._served_name, self._version = served_name, weight_version

    def __repr__(self) -> str:
        return f"VllmServer({self.url})"

    def _refuse_bad(self, request: GenerationRequest) -> None:
        super()._refuse_bad(request)
        refuse_too_cold(request.sampling)

    async def _send(self, request: GenerationRequest, name: str, pooled: bool = True) -> Generation:
        """vLLM needs no ``name``: a request ends with its connection."""
        body = completion_json(request, self._served_name)
        reply = await self._http.call("POST", PATH, body, timeout_s=None, pooled=pooled)
        self._http.refuse_status(PATH, reply)
        with self._naming(PATH):
            return parse_completion(reply.content, request, self._version)

    async def check_limits(self) -> None:
        """Raise ``EngineFailure`` when the server does not serve ``served_name`` with
        ``max_context`` tokens.
        """
        content = await self._call("GET", "/v1/models")
        models = content.get("data") if isinstance(content, dict) else None
        lengths = {
            row.get("id"): row.get("max_model_len") for row in models or [] if isinstance(row, dict)
        }
        if self._served_name not in lengths:
            raise EngineFailure(
                f"{self.url} serves {', '.join(map(str, lengths)) or 'nothing'}, not "
                f"{self._served_name}: check --served-model-name"
            )
        if (longest := lengths[self._served_name]) is None or longest < self.limits.max_context:
            raise EngineFailure(
                f"{self.url}: max_context={self.limits.max_context} is over the server's "
                f"--max-model-len {longest}: lower engine.max_context or raise that"
            )

    async def check_logprobs_mode(self) -> None:
        """Raise ``EngineFailure`` unless log-probabilities are taken after temperature.

        The likeliest token's is asked for at temperatures 1 and 2 (vLLM's highest); before
        temperature they are equal.
        """
        greedy = completion_json(PROBE, self._served_name)
        (likeliest,) = parse_completion(
            await self._call("POST", PATH, greedy), PROBE, self._version
        ).token_ids
        warm, hot = [
            top_logprob(
                await self._call("POST", PATH, {**greedy, "temperature": warmth, "logprobs": 1}),
                likeliest,
            )
            for warmth in (1.0, 2.0)
        ]
        if abs(warm - hot) < _SAME_NATS:
            raise EngineFailure(
                f"{self.url}: log-probabilities are those before temperature; start it with "
                "--logprobs-mode processed_logprobs"
            )

    async def update_weights(
        self, tensors: Iterable[tuple[str, torch.Tensor]], version: int
    ) -> None:
        """Refused: stage III's policy needs engine.kind=local or sglang."""
        raise EngineFailure(
            f"{self.url}: weights of a vLLM server are not updated by this package; a policy in "
            "training needs the embedded engine or SGLang"
        )

    async def pause(self) -> None:
        """Refused: only vLLM's development mode has it."""
        raise EngineFailure(f"{self.url}: a vLLM server is not paused by this package")

    async def resume(self) -> None:
        """Nothing is ever paused."""

    async def health(self) -> EngineHealth:
        """Asks ``/health``. Never raises: a server that does not answer is not alive."""
        return EngineHealth(
            alive=await self._is_alive(),
            paused=False,
            running=len(self._tasks),
            waiting=self._waiting,
            weight_version=self._version,
            tokens_generated=self._tokens_generated,
        )

    async def _ask_health(self) -> None:
        await self._call("GET", "/health")
