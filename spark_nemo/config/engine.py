"""What serves the models, and how tokens are drawn from them."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields

from .errors import ConfigError, at_least, one_of, without_effect

ENGINE_KINDS = ("local", "sglang", "vllm")
POOLS = ("policy", "verifier")
_LAUNCH_ONLY = (
    "server_args",
    "server_env",
    "python",
    "host",
    "first_gpu",
    "start_timeout_s",
    "max_restarts",
)
_FOR_ROUTER = ("python", "host", "max_restarts")

START_TIMEOUT_S, POOL_DOWN_TIMEOUT_S = 900.0, 120.0
"""``start_timeout_s`` and ``pool_down_timeout_s`` of a pool where they are not set."""


@dataclass
class SamplingConfig:
    """How an engine draws tokens; ``temperature=0`` is greedy."""

    temperature: float = 1.0
    top_p: float = 1.0
    max_new_tokens: int = 2048
    top_k: int | None = None
    """Draw from the k most probable tokens only; top_p is measured on what they leave. None is all.
    """

    def __post_init__(self) -> None:
        at_least("sampling.temperature", self.temperature, 0)
        at_least("sampling.max_new_tokens", self.max_new_tokens, 1)
        check_cuts("sampling", self.top_p, self.top_k)
        for name, value, off in (("top_p", self.top_p, 1.0), ("top_k", self.top_k, None)):
            if self.temperature == 0 and value != off:
                raise without_effect(
                    f"sampling.{name}", value, "with sampling.temperature=0 (greedy)"
                )

    def fingerprint(self) -> dict[str, object]:
        """The settings that results depend on, for their keys: top_k only where it is set, for
        there are results from before it existed.
        """
        return {name: value for name, value in asdict(self).items() if value is not None}


def check_cuts(section: str, top_p: float | None, top_k: int | None) -> None:
    """Raise ``ConfigError`` for a top_p or top_k of ``section`` that cuts away everything."""
    if top_p is not None and not 0 < top_p <= 1:
        raise ConfigError(f"{section}.top_p={top_p}: must lie in (0, 1]")
    if top_k is not None and top_k < 1:
        raise ConfigError(
            f"{section}.top_k={top_k}: must be at least 1; null draws from all tokens"
        )


@dataclass
class PoolConfig:
    """Servers of one role. ``urls`` names servers that run already, ``servers`` says how many to
    launch here.

    None means "not set"; a role that a run does not ask needs neither. Times are in seconds.
    """

    urls: list[str] = field(default_factory=list)
    """``http://host:port`` of each; their key, if any, in $SPARK_NEMO_API_KEY."""
    servers: int | None = None
    """Processes to launch on this machine."""
    tensor_parallel: int | None = None
    """GPUs of one server; 1 when not set. With urls only weight_sync.transport=distributed and
    tensor read it.
    """
    first_gpu: int | None = None
    """Server i takes GPUs from first_gpu + i x tensor_parallel on; not set, every server begins
    with GPU 0.
    """
    server_args: list[str] = field(default_factory=list)
    """More of the server's own arguments, one word each."""
    server_env: dict[str, str] = field(default_factory=dict)
    """Environment variables of the server."""
    python: str | None = None
    """Interpreter of the environment that has the server; this one's when not set."""
    host: str | None = None
    """Address to bind to: 127.0.0.1 when not set, else one of a private interface. 0.0.0.0 is
    refused.
    """
    router: bool | None = None
    """Send generation through sglang-router, which must be installed there; False when not set."""
    request_timeout_s: float | None = None
    """One attempt of one request, from when it has a place among the server's; 600, and 0.25 for
    each token that it may sample, when not set.
    """
    probe_timeout_s: float | None = None
    """A server that answers no probe for so long hangs; 30 when not set."""
    start_timeout_s: float | None = None
    """From launch to the first answer; 900 when not set."""
    pool_down_timeout_s: float | None = None
    """How long requests and new weights wait when no server is left and none starts; then the run
    stops. 120 when not set; start_timeout_s for servers that Slurm starts, and starts again.
    """
    max_restarts: int | None = None
    """Restarts of one server within an hour; 3 when not set."""

    def check(self, name: str) -> None:
        """Raise ``ConfigError`` for values that cannot work together; ``name`` is the field's, for
        the message.
        """
        if bool(self.urls) == (self.servers is not None):
            raise ConfigError(
                f"{name}: set either {name}.servers (launch so many here) or {name}.urls (they run)"
            )
        if self.urls and (
            useless := [
                each
                for each in self.set_fields()
                if each in _LAUNCH_ONLY and not (self.router and each in _FOR_ROUTER)
            ]
        ):
            raise without_effect(
                f"{name}.{useless[0]}",
                getattr(self, useless[0]),
                f"with {name}.urls: the servers run",
            )
        for each in ("servers", "tensor_parallel"):
            if getattr(self, each) is not None:
                at_least(f"{name}.{each}", getattr(self, each), 1)
        for each in ("first_gpu", "max_restarts"):
            if getattr(self, each) is not None:
                at_least(f"{name}.{each}", getattr(self, each), 0)
        for each in (
            "request_timeout_s",
            "probe_timeout_s",
            "start_timeout_s",
            "pool_down_timeout_s",
        ):
            if getattr(self, each) is not None and getattr(self, each) <= 0:
                raise ConfigError(f"{name}.{each}={getattr(self, each)}: must be positive")
        for url in self.urls:
            if not url.startswith(("http://", "https://")):
                raise ConfigError(f"{name}.urls: {url!r} is no http://host:port")
        if len(set(self.urls)) < len(self.urls):
            raise ConfigError(f"{name}.urls: name each server once")
        if self.host in ("0.0.0.0", "::", ""):
            raise ConfigError(
                f"{name}.host={self.host!r} would offer the model to every network: name one address"
            )
        self._check_words(name)

    def _check_words(self, name: str) -> None:
        """What we say to the server ourselves must not be said twice, and no key belongs on a
        command line.
        """
        ours = {
            "--model-path",
            "--model",
            "--host",
            "--port",
            "--tp",
            "--tp-size",
            "--tensor-parallel-size",
            "--base-gpu-id",
            "--context-length",
            "--max-running-requests",
            "--weight-version",
            "--config",
            "--max-model-len",
            "--max-num-seqs",
            "--served-model-name",
            "--logprobs-mode",
        }
        for word in self.server_args:
            flag = word.split("=")[0]
            if flag in ("--api-key", "--admin-api-key"):
                raise ConfigError(
                    f"{name}.server_args: {flag} would show the key to every user of the machine; "
                    "launched servers get one through their environment"
                )
            if flag in ours:
                raise ConfigError(
                    f"{name}.server_args: {flag} is set by engine.* or {name}.*: use those fields"
                )

    def found_at(self, urls: list[str]) -> PoolConfig:
        """This pool when somebody else has launched its servers (Slurm, one step each): clients'
        settings stay. Who starts them again is not seen from here, so a pool that is down has the
        time of a start to come back.
        """
        clients = {
            each.name: getattr(self, each.name)
            for each in fields(self)
            if each.name not in (*_LAUNCH_ONLY, "servers", "router")
        }
        lost = self.pool_down_timeout_s or max(
            POOL_DOWN_TIMEOUT_S, self.start_timeout_s or START_TIMEOUT_S
        )
        return PoolConfig(**{**clients, "urls": urls, "pool_down_timeout_s": lost})

    def set_fields(self) -> list[str]:
        """Fields that differ from their default."""
        return [
            each.name for each in fields(self) if getattr(self, each.name) not in (None, [], {})
        ]


@dataclass
class EngineConfig:
    """The engines that generate and verify."""

    kind: str = "local"
    """local: embedded, small models. sglang, vllm: servers, in the pools ``policy`` and
    ``verifier``.
    """
    max_batch_size: int = 256
    """Sequences one engine decodes together (KV-cache slots; a server's running requests)."""
    max_context: int = 4096
    """Prompt plus response tokens that one slot can hold."""
    policy: PoolConfig = field(default_factory=PoolConfig)
    """Stage I's generator, stage III's policy, and the evaluation of policies."""
    verifier: PoolConfig = field(default_factory=PoolConfig)
    """Stage I's verifier, the reward model of stage III, and its evaluation."""

    def __post_init__(self) -> None:
        one_of("engine.kind", self.kind, set(ENGINE_KINDS))
        at_least("engine.max_batch_size", self.max_batch_size, 1)
        at_least("engine.max_context", self.max_context, 8)
        for role in POOLS:
            pool, name = self.pool(role), f"engine.{role}"
            useless = pool.set_fields()
            if self.kind != "local" and useless:
                pool.check(name)
            elif useless:
                raise without_effect(
                    f"{name}.{useless[0]}", getattr(pool, useless[0]), "with engine.kind=local"
                )
        if self.kind == "vllm":
            for role in POOLS:
                if self.pool(role).router:
                    raise without_effect(f"engine.{role}.router", True, "with engine.kind=vllm")

    @property
    def launches_servers(self) -> bool:
        """True if a job starts servers of its own, for the policy or for the verifier."""
        return bool(self.policy.servers or self.verifier.servers)

    def pool(self, role: str) -> PoolConfig:
        """The pool of a role. Raises ``ConfigError`` for a role that does not exist."""
        one_of("pool", role, set(POOLS))
        return self.policy if role == "policy" else self.verifier

    def require(self, role: str) -> None:
        """Raise ``ConfigError`` when nothing would serve a role that is about to be asked."""
        if self.kind != "local":
            self.pool(role).check(f"engine.{role}")

    def num_engines(self, role: str) -> int:
        """Engines behind a role; requests in flight are bounded by ``max_batch_size`` of each."""
        pool = self.pool(role)
        return 1 if self.kind == "local" else pool.servers or max(1, len(pool.urls))

    def slots(self, role: str) -> int:
        """Sequences that a role's engines decode together."""
        return self.max_batch_size * self.num_engines(role)
