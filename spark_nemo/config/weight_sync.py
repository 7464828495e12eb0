"""How new policy weights reach the engines, and what is checked before they are trusted."""

from __future__ import annotations

from dataclasses import dataclass

from .errors import ConfigError, at_least, one_of, without_effect

TRANSPORTS = {"in_process", "disk", "distributed", "tensor"}
DEFAULT_BUCKET_MB = 512


@dataclass
class WeightSyncConfig:
    """The way from the trainer's ranks into the engines' memory."""

    transport: str | None = None
    """in_process (the embedded engine), disk (a folder that all see), distributed (a process group:
    NCCL or gloo) or tensor (handles of shared memory; servers on the main rank's machine). None is
    in_process with engine.kind=local and disk otherwise.
    """
    bucket_mb: int | None = None
    """MiB sent at once, and the size of a file on disk; None is 512. Not read by in_process."""
    folder: str | None = None
    """Where disk puts versions; all servers must see it. None is ``weights`` in the RL run's
    folder.
    """
    timeout_s: float = 600.0
    """Longest wait for a server to take one bucket, or one version from disk."""
    checksums: str = "auto"
    """Compare a hash of every tensor after a sync. auto: where the engine can tell; require: fail
    where not; off.
    """
    max_mean_mismatch: float | None = 0.05
    """First-step gate: the largest mean of |engine - trainer| log-probability over the sampled
    tokens, in nats, with which the run may train. None switches it off.
    """
    max_token_mismatch: float | None = None
    """The same for the largest difference of a single token: 1e-3 is a sensible bound in float32,
    while in bfloat16 single tokens may differ by 1 nat. None switches it off.
    """

    def __post_init__(self) -> None:
        if self.transport is not None:
            one_of("weight_sync.transport", self.transport, TRANSPORTS)
        one_of("weight_sync.checksums", self.checksums, {"auto", "require", "off"})
        if self.bucket_mb is not None:
            at_least("weight_sync.bucket_mb", self.bucket_mb, 1)
        if self.timeout_s <= 0:
            raise ConfigError(f"weight_sync.timeout_s={self.timeout_s}: must be positive")
        for name in ("max_mean_mismatch", "max_token_mismatch"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ConfigError(
                    f"weight_sync.{name}={value}: must be positive (null switches it off)"
                )

    def transport_for(self, engine_kind: str) -> str:
        """``transport``, resolved."""
        return self.transport or ("in_process" if engine_kind == "local" else "disk")

    def check_engine(self, engine_kind: str) -> None:
        """Raise ``ConfigError`` for a transport that the engine has no end for, and for knobs it
        would not read.
        """
        transport = self.transport_for(engine_kind)
        if (transport == "in_process") != (engine_kind == "local"):
            raise ConfigError(
                f"weight_sync.transport={transport} does not fit engine.kind={engine_kind}: in_process "
                "is for the embedded engine, the others are for servers"
            )
        if self.folder is not None and transport != "disk":
            raise without_effect(
                "weight_sync.folder", self.folder, f"with weight_sync.transport={transport}"
            )
        if self.bucket_mb is not None and transport == "in_process":
            raise without_effect(
                "weight_sync.bucket_mb", self.bucket_mb, "with weight_sync.transport=in_process"
            )

    @property
    def bucket_bytes(self) -> int:
        """``bucket_mb``, resolved, in bytes."""
        return (self.bucket_mb or DEFAULT_BUCKET_MB) << 20
