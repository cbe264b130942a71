"""The single-turn runner: asks once and records what came back."""

from __future__ import annotations

from dataclasses import replace

from sluice.errors import DataError
from sluice.rollout.chat.renderer import ChatRenderer
from sluice.rollout.engines.base import Engine, Finish, GenerateRequest
from sluice.rollout.runners.base import EpisodeRequest, sampled_turn
from sluice.types import Episode, Ids, Outcome, Prompt, Segment, observed

OUTCOMES = {Finish.STOP: Outcome.COMPLETED, Finish.LENGTH: Outcome.TRUNCATED, Finish.ABORT: Outcome.ABORTED}


class SingleTurn:
    """One question, one answer.

    Args:
        engine: serves the policy.
        renderer: its chat template.
        context_length: longest prompt plus answer, in tokens.
        routes: bring the experts that each position was routed to into the episode.
    """

    def __init__(self, engine: Engine, renderer: ChatRenderer, *, context_length: int, routes: bool = False) -> None:
        self._engine = engine
        self._renderer = renderer
        self._context_length = context_length
        self._routes_from = 0 if routes else None

    def admit(self, prompt: Prompt, max_new_tokens: int) -> None:
        """Raise DataError when no answer fits behind the prompt."""
        self._ids(prompt, max_new_tokens)

    async def run(self, request: EpisodeRequest) -> Episode:
        """Ask the engine once. The answer's limit is what the context leaves, if that is less."""
        sampling = request.sampling
        ids = self._ids(request.prompt, sampling.max_new_tokens)
        room = self._context_length - len(ids)
        limited = sampling if sampling.max_new_tokens <= room else replace(sampling, max_new_tokens=room)
        ask = GenerateRequest(
            request.id, ids, limited, request.noise(""), routing_key=request.id, routes_from=self._routes_from
        )
        try:
            generation = await self._engine.generate(ask)
        finally:
            await self._engine.release(request.id)
        turns = (observed(ids), sampled_turn(generation, limited))
        outcome = OUTCOMES[generation.finish]
        return Episode(request.id, request.group_id, request.prompt, (Segment(turns),), outcome)

    def _ids(self, prompt: Prompt, max_new_tokens: int) -> Ids:
        ids = self._renderer.prompt_ids(prompt)
        if len(ids) >= self._context_length:
            raise DataError(
                f"prompt {prompt.id} has {len(ids)} tokens; the context holds {self._context_length} "
                f"with the answer (up to {max_new_tokens} tokens)",
                hint="shorten or drop it, or raise rollout.context_length if the model and engine allow it",
            )
        return ids
