"""SGLang servers: which ones, how they are started, how weights reach them."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from sluice.config.base import OptionalAddress, Part, Url

Flag = bool | int | float | str | list[str]
"""A value passed on to a server: `true` is the bare flag, `false` leaves it out, a list is several words."""


class EngineGroup(Part):
    """Servers that are started alike."""

    role: Literal["regular", "prefill", "decode"] = "regular"
    """`prefill` and `decode` servers answer together; a recipe has both or neither."""
    engines: int = Field(default=1, ge=1)
    """Servers of this group."""
    tp: int = Field(default=1, ge=1)
    """Tensor-parallel ranks of one server."""
    dp: int = Field(default=1, ge=1)
    """Data-parallel replicas inside one server."""
    ep: int = Field(default=1, ge=1)
    """Expert-parallel ranks of one server."""
    pp: int = Field(default=1, ge=1)
    """Pipeline stages of one server."""
    nodes: int = Field(default=1, ge=1)
    """Hosts that one server spans; this host starts rank `node_rank`, the others theirs with the same recipe."""
    node_rank: int = Field(default=0, ge=0)
    """This host's rank in a server of several hosts; only rank 0 is talked to."""
    dist_init_addr: OptionalAddress = ""
    """`host:port` where the ranks of a server of several hosts meet."""
    devices: tuple[str, ...] = ()
    """Accelerators of each server of the group, as CUDA_VISIBLE_DEVICES has them: `["0,1", "2,3"]`; empty
    leaves the environment as it is."""
    args: dict[str, Flag] = Field(default_factory=dict)
    """Any other server argument, without dashes: `{"mem-fraction-static": 0.8}`. An unknown one is the
    server's own error, shown as such."""

    @property
    def accelerators(self) -> int:
        """That one server takes."""
        return self.tp * self.pp * self.dp

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.devices and len(self.devices) != self.engines:
            raise ValueError(f"devices names {len(self.devices)} sets for {self.engines} engines")
        if self.nodes > 1 and not self.dist_init_addr:
            raise ValueError("nodes > 1 needs dist_init_addr, where the ranks meet: host:port")
        if self.node_rank >= self.nodes:
            raise ValueError(f"node_rank = {self.node_rank} is beyond nodes = {self.nodes}")
        return self


class SGLangConfig(Part):
    """SGLang servers, started here or attached to by URL."""

    urls: tuple[Url, ...] = ()
    """Running servers to attach to. Empty: servers are started as `groups` says."""
    groups: tuple[EngineGroup, ...] = Field(default=(EngineGroup(),), min_length=1)
    """Servers to start; ignored when `urls` are given."""
    python: Path | None = None
    """Interpreter of the engines' own environment; None takes the one that `sluice engines install` made."""
    build: Literal["auto", "cpu", "cuda", "rocm"] = "auto"
    """Which environment and which defaults; `auto` goes by the run's device."""
    env: dict[str, str] = Field(default_factory=dict)
    """Environment variables of the servers, over this process's own."""
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = "auto"
    """Precision of weights and cache; `auto` is float32 on a CPU, else the model's own."""
    memory_fraction: float | None = Field(default=None, gt=0, lt=1)
    """Share of the device's memory for weights and KV cache; None leaves SGLang's default."""
    deterministic: bool = False
    """Batch-invariant kernels (GPU only): equal requests give equal tokens in any batch."""
    quantization: str = ""
    """`fp8`, for example; empty serves the weights as they are."""
    speculative: dict[str, Flag] = Field(default_factory=dict)
    """Speculative decoding, in SGLang's words without the prefix: `{"algorithm": "EAGLE", "num-steps": 3}`."""
    routed_experts: bool = False
    """Bring the experts that each token was routed to into the log (mixture-of-experts models)."""
    transfer_backend: str = "mooncake"
    """How KV travels from prefill to decode: `mooncake`, `mooncake_tcp` (any host, CPU too), `nixl`."""
    start_seconds: float = Field(default=900.0, gt=0)
    """Deadline of a server's start-up."""
    restarts: int = Field(default=3, ge=0)
    """How often a server that died is started again before the run gives it up."""

    sync: Literal["tensor", "disk"] = "tensor"
    """How weights reach a server: tensors over shared memory or CUDA IPC (same host), or a folder both read."""
    bucket_bytes: int = Field(default=512 * 1024**2, ge=1024)
    """Tensors are sent in buckets of about this size."""
    api_key_env: str = ""
    """Environment variable that holds the servers' bearer token, when they want one. The token itself is in
    no recipe, log or run folder."""
    request_seconds: float = Field(default=600.0, gt=0)
    """Deadline of one generation."""
    control_seconds: float = Field(default=120.0, gt=0)
    """Deadline of any other call: handshake, pause, weight update."""
    max_concurrent: int = Field(default=256, ge=1)
    """Requests in flight at a server."""

    @property
    def uniform(self) -> bool:
        """Whether the servers to start are of one kind, on a host each, so that there may be more or fewer of them."""
        group = self.groups[0]
        return not self.urls and len(self.groups) == 1 and group.role == "regular" and group.nodes == 1

    @model_validator(mode="after")
    def _fits(self) -> Self:
        roles = {group.role for group in self.groups}
        if roles & {"prefill", "decode"} and not {"prefill", "decode"} <= roles:
            raise ValueError(f"groups have the role {next(iter(roles - {'regular'}))!r} alone; prefill needs decode")
        if {"regular", "prefill"} <= roles:
            raise ValueError("groups mix regular engines with prefill and decode engines; use one or the other")
        return self
