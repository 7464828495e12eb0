"""Settings of the engines and server pools, and of sampling."""

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
    """Sampling parameters of one kind of request."""

    temperature: float = 1.0
    """Sampling temperature; 0 is greedy."""
    top_p: float = 1.0
    """Nucleus sampling: draw from the smallest set of tokens with this total probability."""
    max_new_tokens: int = 2048
    """Maximum tokens of a response."""
    top_k: int | None = None
    """Draw from the k most probable tokens only; top_p then applies to them. None is all."""

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
        """Return the settings that results depend on, for content keys; top_k only if it is set."""
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
    """Servers of one role: running servers by their ``urls``, or a number of ``servers`` to launch.

    None means "not set". A role that a run does not query needs neither. Times are in seconds.
    """

    urls: list[str] = field(default_factory=list)
    """``http://host:port`` of each running server; $SPARK_NEMO_API_KEY is their API key, if any."""
    servers: int | None = None
    """Number of servers to launch on this machine."""
    tensor_parallel: int | None = None
    """GPUs of one server; 1 when not set. With urls, read only by weight_sync.transport=distributed
    and tensor.
    """
    first_gpu: int | None = None
    """Server i takes tensor_parallel GPUs from first_gpu + i x tensor_parallel on. When not set,
    every server begins with GPU 0.
    """
    server_args: list[str] = field(default_factory=list)
    """Additional command-line arguments of the server, one word each."""
    server_env: dict[str, str] = field(default_factory=dict)
    """Environment variables of the server."""
    python: str | None = None
    """Python interpreter of the server's environment; the current interpreter when not set."""
    host: str | None = None
    """Address to bind to, on a private interface; 127.0.0.1 when not set. 0.0.0.0 is invalid."""
    router: bool | None = None
    """Send requests through sglang-router, installed with the server; False when not set."""
    request_timeout_s: float | None = None
    """Seconds for one attempt of a request, counted from when it gets one of the server's slots.
    When not set: 600, plus 0.25 for each token that the request may sample.
    """
    probe_timeout_s: float | None = None
    """Seconds without an answer to a health check after which a server counts as hung; 30 when not
    set.
    """
    start_timeout_s: float | None = None
    """Maximum seconds from a server's launch to its first answer; 900 when not set."""
    pool_down_timeout_s: float | None = None
    """Seconds that requests and weight updates wait while every server of the pool is down; then
    the run stops. When not set: 120, or start_timeout_s for servers that Slurm starts and restarts.
    """
    max_restarts: int | None = None
    """Maximum restarts of one server within an hour; 3 when not set."""

    def check(self, name: str) -> None:
        """Raise ``ConfigError`` for values that contradict each other; ``name`` is the pool's."""
        if bool(self.urls) == (self.servers is not None):
            raise ConfigError(
                f"{name}: set either {name}.servers (number to launch here) "
                f"or {name}.urls (running servers)"
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
                raise ConfigError(f"{name}.urls: {url!r} is not http://host:port")
        if len(set(self.urls)) < len(self.urls):
            raise ConfigError(f"{name}.urls: name each server once")
        if self.host in ("0.0.0.0", "::", ""):
            raise ConfigError(
                f"{name}.host={self.host!r} would offer the model to every network: "
                "name one address"
            )
        self._check_words(name)

    def _check_words(self, name: str) -> None:
        """Raise ``ConfigError`` for server arguments that the launcher sets, or that show a key."""
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
        """Return this pool with the addresses of servers that Slurm launched.

        The settings of clients stay. Slurm restarts its servers itself, which a client cannot
        observe, so a pool that is down gets the time of a server start to come back.
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
    """local: embedded engine, for small models. sglang, vllm: servers in the pools ``policy`` and
    ``verifier``.
    """
    max_batch_size: int = 256
    """Maximum sequences that one engine decodes together (a server's running requests)."""
    max_context: int = 4096
    """Maximum prompt plus response tokens of a sequence."""
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
        """Return the pool of a role. Raises ``ConfigError`` for a role that does not exist."""
        one_of("pool", role, set(POOLS))
        return self.policy if role == "policy" else self.verifier

    def require(self, role: str) -> None:
        """Raise ``ConfigError`` if no server is configured for a role that the run needs."""
        if self.kind != "local":
            self.pool(role).check(f"engine.{role}")

    def num_engines(self, role: str) -> int:
        """Number of engines of a role; each takes ``max_batch_size`` requests at once."""
        pool = self.pool(role)
        return 1 if self.kind == "local" else pool.servers or max(1, len(pool.urls))

    def slots(self, role: str) -> int:
        """Number of sequences that a role's engines decode together."""
        return self.max_batch_size * self.num_engines(role)
