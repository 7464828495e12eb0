"""One vLLM server as an ``Engine``, by its OpenAI-compatible ``/v1/completions`` with token ids.

It serves stage I (solutions and verifications), the PRM, and evaluation. Unsupported:

* Weight updates: stage III's policy cannot be a vLLM server.
* Log-probabilities under top-p or top-k. vLLM reports them before temperature or after the cut,
  never in between. They are NaN, which no loss survives unnoticed. Without a cut,
  ``processed_logprobs`` means the same as in this package; ``check_logprobs_mode`` verifies that
  the server runs in that mode.
* Pause and resume: they exist in vLLM's development mode only.
* Weight versions: vLLM stamps none; every token carries the version the client was made with.

vLLM honours seeds (SGLang ignores them), though not with the embedded engine's draws.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from ..base import EngineFailure, EngineHealth, Generation, GenerationRequest
from ..http import RemoteEngine
from ..http.engine import PROBE
from .protocol import completion_json, parse_completion, require_warm_enough, top_logprob

PATH = "/v1/completions"
_SAME_NATS = 1e-3


class VllmServer(RemoteEngine):
    """A client of the vLLM server at ``url``; see ``RemoteEngine``.

    ``served_name`` is the server's ``--served-model-name``. A late or cancelled request ends with
    its connection, which makes vLLM abort it.
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
        request_timeout_s: float | None,
        control_timeout_s: float,
        weight_version: int = 0,
    ) -> None:
        super().__init__(
            url,
            api_key=api_key,
            vocab_size=vocab_size,
            max_context=max_context,
            max_in_flight=max_in_flight,
            request_timeout_s=request_timeout_s,
            control_timeout_s=control_timeout_s,
        )
        self._served_name = served_name
        self._version = weight_version

    def __repr__(self) -> str:
        return f"VllmServer({self.url})"

    def _check_request(self, request: GenerationRequest) -> None:
        super()._check_request(request)
        require_warm_enough(request.sampling)

    async def _send(
        self, request: GenerationRequest, request_id: str, pooled: bool = True
    ) -> Generation:
        del request_id  # vLLM ends a request with its connection
        reply = await self._http.call(
            "POST",
            PATH,
            completion_json(request, self._served_name),
            timeout_s=self._request_timeout_s,
            pooled=pooled,
        )
        self._http.require_ok(PATH, reply)
        with self._naming(PATH):
            return parse_completion(reply.content, request, self._version)

    async def check_limits(self) -> None:
        """Raise ``EngineFailure`` unless the server serves ``served_name`` with ``max_context``."""
        content = await self._call("GET", "/v1/models")
        models = content.get("data") if isinstance(content, dict) else None
        lengths = {
            model.get("id"): model.get("max_model_len")
            for model in models or []
            if isinstance(model, dict)
        }
        if self._served_name not in lengths:
            served = ", ".join(str(name) for name in lengths) or "nothing"
            raise EngineFailure(
                f"{self.url} serves {served}, not {self._served_name}: check --served-model-name"
            )
        longest = lengths[self._served_name]
        if longest is None or longest < self.limits.max_context:
            raise EngineFailure(
                f"{self.url}: max_context={self.limits.max_context} is over the server's "
                f"--max-model-len {longest}: lower engine.max_context or raise --max-model-len"
            )

    async def check_logprobs_mode(self) -> None:
        """Raise ``EngineFailure`` unless log-probabilities are taken after temperature.

        Compares the likeliest token's log-probability at temperatures 1 and 2 (vLLM's highest): if
        they are taken before temperature, they are equal.
        """
        greedy = completion_json(PROBE, self._served_name)
        reply = await self._call("POST", PATH, greedy)
        (likeliest,) = parse_completion(reply, PROBE, self._version).token_ids
        logprobs = []
        for temperature in (1.0, 2.0):
            body = {**greedy, "temperature": temperature, "logprobs": 1}
            logprobs.append(top_logprob(await self._call("POST", PATH, body), likeliest))
        if abs(logprobs[0] - logprobs[1]) < _SAME_NATS:
            raise EngineFailure(
                f"{self.url}: log-probabilities are taken before temperature; start the server "
                "with --logprobs-mode processed_logprobs"
            )

    async def update_weights(
        self, tensors: Iterable[tuple[str, torch.Tensor]], version: int
    ) -> None:
        """Raise ``EngineFailure``: stage III's policy needs engine.kind=local or sglang."""
        raise EngineFailure(
            f"{self.url}: weights of a vLLM server are not updated by this package; a policy in "
            "training needs the embedded engine or SGLang"
        )

    async def pause(self) -> None:
        """Raise ``EngineFailure``: only vLLM's development mode can pause."""
        raise EngineFailure(f"{self.url}: a vLLM server cannot be paused by this package")

    async def resume(self) -> None:
        """No effect: a vLLM server is never paused."""

    async def health(self) -> EngineHealth:
        """See ``Engine.health``. Never raises: a server that does not answer is not alive."""
        return EngineHealth(
            alive=await self._is_alive(),
            paused=False,
            running=len(self._tasks),
            waiting=0,
            weight_version=self._version,
            tokens_generated=self._tokens_generated,
        )

    async def _check_alive(self) -> None:
        await self._call("GET", "/health")
