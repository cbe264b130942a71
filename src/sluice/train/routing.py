"""Routing replay: tokens are trained through the experts that sampled them.

A router that sits on the edge between two experts may choose one in the engine and the other in the trainer, whose
arithmetic differs in the last bits; the log-probs then differ by far more than rounding ("Stabilizing MoE
Reinforcement Learning by Aligning Training and Inference Routers", Ma et al. 2025, arXiv 2510.11370, called R3). Here
a router is given the recorded experts instead of its own choice. It weighs them by its own logits, as its family does,
so the gradient reaches the router.

No family's router is written again. Each ends in `topk` over one row of scores a token; while a router runs, that one
call answers with the recorded experts.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from sluice.errors import TrainError
from sluice.types import MicroBatch, TrainSample

_ROUTER = re.compile(r"Top[kK]Router$")
_LAYER = re.compile(r"\.layers\.(\d+)\.")
UNKNOWN = -1
"""Expert of a position that no record has: the router chooses itself there."""


class Router(NamedTuple):
    """A router of the model: in which layer, how many experts it has and how many it chooses."""

    layer: int
    num_experts: int
    top_k: int


class RoutingReplay:
    """Directs the routers of a mixture-of-experts model by the records of what is in a pack.

    Args:
        model: its routers are directed from now on, whenever a table is in force.

    Raises:
        TrainError: the model is dense, or its routers are of a kind that cannot be directed.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._name = type(model).__name__
        self._num_layers = int(model.config.get_text_config().num_hidden_layers)
        self._table: Tensor | None = None
        self._agreed: dict[int, Tensor] = {}
        self.routers: dict[str, Router] = {}
        for path, module in model.named_modules():
            found = _LAYER.search(f".{path}.")
            if _ROUTER.search(type(module).__name__) and found:
                router = Router(int(found[1]), int(module.num_experts), int(module.top_k))  # pyright: ignore[reportArgumentType]
                self.routers[path] = router
                module.forward = partial(self._route, module.forward, router)
        if not self.routers:
            raise TrainError(
                f"train.routing_replay is on, but {self._name} has no routers that choose among experts",
                hint="set train.routing_replay = false: it is for mixture-of-experts models",
            )

    def _route(self, own: Callable[..., Any], router: Router, *args: Any, **kwargs: Any) -> Any:
        if self._table is None:
            return own(*args, **kwargs)
        choice = _Choice(router, self._table[:, router.layer])
        with choice:
            result = own(*args, **kwargs)
        if choice.agreed is None:
            raise TrainError(
                f"the router of layer {router.layer} of {self._name} does not choose by topk over its "
                f"{router.num_experts} experts, so recorded ones cannot be given to it",
                hint="set train.routing_replay = false",
            )
        self._agreed[router.layer] = choice.agreed
        return result

    # ── a pass ──────────────────────────────────────────────────────────────────────────────────────────

    @contextmanager
    def using(self, table: Tensor) -> Iterator[None]:
        """Route by `table`, `[tokens, layers, top_k]`, in the passes inside."""
        before, self._table = self._table, table
        try:
            yield
        finally:
            self._table = before

    def again(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """Contexts for `torch.utils.checkpoint`: a layer that is computed again has the table it had at first."""
        return nullcontext(), self.using(self._table) if self._table is not None else nullcontext()

    def agreement(self) -> Tensor:
        """Share of the last pass's choices, over layers and experts, that were the router's own too; `[tokens]`."""
        return torch.stack(list(self._agreed.values())).mean(dim=0)

    def recorded(self, table: Tensor) -> Tensor:
        """1 for tokens whose experts `table` knows, else 0; `[tokens]`."""
        return (table[:, [router.layer for router in self.routers.values()]] >= 0).all(dim=2).all(dim=1).float()

    def empty(self, tokens: int, device: torch.device) -> Tensor:
        """A table without any record."""
        top_k = max(router.top_k for router in self.routers.values())
        return torch.full((tokens, self._num_layers, top_k), UNKNOWN, dtype=torch.long, device=device)

    # ── records ─────────────────────────────────────────────────────────────────────────────────────────

    def table(self, micro: MicroBatch, device: torch.device) -> Tensor:
        """The recorded experts of a pack, int64 `[tokens, layers, top_k]`; `UNKNOWN` where there is no record.

        Raises:
            TrainError: a sample has no record at all, or one of another model.
        """
        rows = [self._recorded(sample) for sample in micro.samples]
        return torch.from_numpy(np.concatenate(rows).astype(np.int64)).to(device)

    def _recorded(self, sample: TrainSample) -> NDArray[np.int16]:
        top_k = max(router.top_k for router in self.routers.values())
        where = f"segment {sample.segment} of episode {sample.episode_id}"
        if not sample.routes:
            raise TrainError(
                f"train.routing_replay is on, but {where} has no record of the experts its tokens were routed to",
                hint="set rollout.sglang.routed_experts = true; a record is also lost when log/blobs was cleared: then "
                "set train.routing_replay = false",
            )
        table = np.full((len(sample), self._num_layers, top_k), UNKNOWN, np.int16)
        for routes in sample.routes:
            if (routes.layers, routes.top_k) != (self._num_layers, top_k):
                raise TrainError(
                    f"{where} has a record of {routes.layers} layers and {routes.top_k} experts a token; "
                    f"{self._name} has {self._num_layers} layers and chooses {top_k}",
                    hint="engine and trainer must run the same model",
                )
            rows = routes.experts.reshape(-1, routes.layers, routes.top_k)[: max(len(sample) - routes.start, 0)]
            table[routes.start : routes.start + len(rows)] = rows
        self._check_experts(table, where)
        return table

    def _check_experts(self, table: NDArray[np.int16], where: str) -> None:
        layers = [router.layer for router in self.routers.values()]
        experts = min(router.num_experts for router in self.routers.values())
        known = table[:, layers]
        wrong = known[(known >= experts) | (known < UNKNOWN)]
        if len(wrong):
            raise TrainError(
                f"{where} has a record that names the expert {wrong[0]}; {self._name} has {experts} in a layer",
                hint="engine and trainer must run the same model",
            )


class _Choice(TorchFunctionMode):
    """While a router runs, its choice among experts is the recorded one.

    Attributes:
        agreed: share of each token's experts that were the router's own choice too, 1 without a record; `[tokens]`.
    """

    def __init__(self, router: Router, recorded: Tensor) -> None:
        super().__init__()
        self._router = router
        self._recorded = recorded
        self.agreed: Tensor | None = None

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func not in (torch.topk, torch.Tensor.topk):
            return result
        scores, own = args[0] if args else (kwargs or {})["input"], result.indices
        if scores.shape != (len(self._recorded), self._router.num_experts) or own.shape[1] != self._router.top_k:
            return result  # a choice among groups of experts
        known = self._recorded >= 0
        experts = torch.where(known, self._recorded, own)
        same = (own[:, :, None] == experts[:, None, :]).any(dim=1)
        self.agreed = same.float().mean(dim=1)
        return torch.return_types.topk((scores.gather(1, experts), experts))  # pyright: ignore[reportCallIssue]
