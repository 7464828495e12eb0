"""Settings of weight sync: transport, checksums, and the first-step gate."""

from __future__ import annotations

from dataclasses import dataclass

from .errors import ConfigError, at_least, one_of, without_effect

TRANSPORTS = {"in_process", "disk", "distributed", "tensor"}
DEFAULT_BUCKET_MB = 512


@dataclass
class WeightSyncConfig:
    """Transfer of policy weights from the trainer ranks to the engines."""

    transport: str | None = None
    """Transport: in_process (embedded engine), disk (a shared folder), distributed (a NCCL or gloo
    process group) or tensor (shared-memory handles; servers on the main rank's machine). None is
    in_process with engine.kind=local and disk otherwise.
    """
    bucket_mb: int | None = None
    """Size in MiB of one bucket, and of one file on disk; None is 512. Invalid with in_process."""
    folder: str | None = None
    """Folder of the disk transport, visible to all servers. None is ``weights`` in the RL run's
    folder.
    """
    timeout_s: float = 600.0
    """Maximum seconds for a server to load one bucket, or one version from disk."""
    checksums: str = "auto"
    """Comparison of every tensor's hash after a sync. auto: if the engine reports hashes; require:
    fail if it does not; off: never.
    """
    max_mean_mismatch: float | None = 0.05
    """First-step gate: maximum mean of |engine - trainer| log-probability over the sampled tokens,
    in nats. None disables the check.
    """
    max_token_mismatch: float | None = None
    """First-step gate: maximum difference of a single token, in nats. 1e-3 is a sensible bound in
    float32, while in bfloat16 single tokens may differ by 1 nat. None disables the check.
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
        """Return ``transport``, or the engine's default if it is not set."""
        return self.transport or ("in_process" if engine_kind == "local" else "disk")

    def check_engine(self, engine_kind: str) -> None:
        """Raise ``ConfigError`` for a transport that does not fit the engine, and for settings that
        the transport would not read.
        """
        transport = self.transport_for(engine_kind)
        if (transport == "in_process") != (engine_kind == "local"):
            raise ConfigError(
                f"weight_sync.transport={transport} does not fit engine.kind={engine_kind}: "
                "in_process is for the embedded engine, the others are for servers"
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
        """``bucket_mb``, or its default if it is not set, in bytes."""
        return (self.bucket_mb or DEFAULT_BUCKET_MB) << 20
