"""Continuous batching: which tokens of which sequences the next forward pass computes. No torch.

There is no prefill and no decode phase. Each step gives every running sequence a *chunk*: the tokens whose
keys and values are missing. For a sequence that is drawing, that is its newest token; for one just
admitted, its context less the cached prefix; for one preempted or paused, context and drawn tokens alike.

    waiting ──admit (row, blocks, shared prefix)──► running ──step──► finished
       ▲                                               │
       └──────── preempt / pause: drop KV, keep tokens ┘

A forward pass writes the keys of all its tokens before any of them attends, layer by layer. So a full block
is registered when it is scheduled, and the other samples of a prompt share it within the same step.

Both lists are in order of arrival, and whoever runs arrived before whoever waits: the queue is served from
its head, and the youngest running sequence goes back to that head.

Nothing can deadlock: a request is accepted only if it fits the pool alone, the oldest running sequence is
never preempted by a younger one, and the queue's head is admitted whenever nothing runs.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from sluice.errors import EngineError
from sluice.rollout.engines.embedded.kv import ROOT, BlockPool
from sluice.rollout.engines.embedded.sequence import Sequence


class Chunk(NamedTuple):
    """Compute `seq.tokens[start:end]`. A chunk that reaches the last token draws the next one."""

    seq: Sequence
    start: int
    end: int
    draws: bool


class Scheduler:
    """Owns the queue, the running set, the block pool and the block table.

    Args:
        pool: the KV blocks.
        max_running: most sequences in one step.
        prefill_tokens: most tokens of one step besides the newest token of each drawing sequence.
        context_length: longest sequence.

    Attributes:
        table: block ids of the running sequences, shape `[max_running, blocks of the longest sequence]`.
    """

    def __init__(self, pool: BlockPool, *, max_running: int, prefill_tokens: int, context_length: int) -> None:
        self.pool = pool
        self.max_running = max_running
        self.prefill_tokens = prefill_tokens
        longest = min(-(-context_length // pool.block_tokens), pool.num_blocks)
        self.table: NDArray[np.int64] = np.zeros((max_running, longest), dtype=np.int64)
        self.running: list[Sequence] = []
        self.waiting: deque[Sequence] = deque()
        self.num_preemptions = 0
        self.num_cached_tokens = 0
        self._rows = list(range(max_running))[::-1]

    @property
    def idle(self) -> bool:
        return not self.running and not self.waiting

    def __iter__(self) -> Iterator[Sequence]:
        """Every sequence, running ones first."""
        yield from self.running
        yield from self.waiting

    def add(self, seq: Sequence) -> None:
        self.waiting.append(seq)

    def remove(self, seq: Sequence) -> None:
        """Take a sequence out, wherever it is, and free its KV."""
        if seq.row >= 0:
            self.running.remove(seq)
            self._drop_kv(seq)
        else:
            self.waiting.remove(seq)

    def retract(self) -> None:
        """Send every running sequence back to the queue without its KV. Its tokens stay."""
        while self.running:
            self._retract_youngest()

    def schedule(self) -> list[Chunk]:
        """The chunks of the next step; counts their tokens as computed. Empty only when idle.

        Raises:
            EngineError: something waits, but nothing runs and nothing can be admitted.
        """
        chunks: list[Chunk] = []
        budget = self.prefill_tokens
        preempted = self.num_preemptions
        at = 0
        while at < len(self.running):
            seq = self.running[at]
            if not self._grow(seq):
                continue  # the youngest went back to the queue, perhaps this one
            at += 1
            count = seq.num_missing
            if count > 1:
                count = min(count, budget)
                budget -= count
            if count:
                chunks.append(self._chunk(seq, count))
        while self.waiting and budget and len(self.running) < self.max_running:
            if self.num_preemptions > preempted or not self._admit(self.waiting[0]):
                break
            seq = self.waiting.popleft()
            self.running.append(seq)
            count = min(seq.num_missing, budget)
            budget -= count
            chunks.append(self._chunk(seq, count))
        if not chunks and not self.idle:
            raise EngineError(
                f"nothing can be scheduled: {len(self.waiting)} waiting, {len(self.running)} running, "
                f"{self.pool.num_free} of {self.pool.num_blocks} KV blocks free",
                hint="report this as a bug",
            )
        return chunks

    def _chunk(self, seq: Sequence, count: int) -> Chunk:
        start, end = seq.computed, seq.computed + count
        seq.computed = end
        self._register(seq)
        return Chunk(seq, start, end, end == len(seq.tokens))

    def _num_blocks(self, num_tokens: int) -> int:
        return -(-num_tokens // self.pool.block_tokens)

    def _grow(self, seq: Sequence) -> bool:
        """Give a running sequence the blocks its tokens need. False when somebody was preempted instead."""
        while len(seq.blocks) * self.pool.block_tokens < len(seq.tokens):
            if not self.pool.num_free:
                self._retract_youngest()
                self.num_preemptions += 1
                return False
            self._append_block(seq)
        return True

    def _admit(self, seq: Sequence) -> bool:
        """Give a waiting sequence a row and all blocks of its tokens, sharing what is cached.

        While others run, one free block for each of them is left, so that an admission is not preempted in
        the very next steps. The last token is never taken from the cache: its logits are needed.
        """
        pool = self.pool
        match = pool.match(seq.tokens, len(seq.tokens) - 1)
        total = self._num_blocks(len(seq.tokens))
        if pool.num_fresh(match, total) + len(self.running) > pool.num_free:
            return False
        seq.row = self._rows.pop()
        pool.share(match.blocks)
        seq.blocks = list(match.blocks)
        self.table[seq.row, : len(seq.blocks)] = seq.blocks
        while len(seq.blocks) < total:
            self._append_block(seq)
        seq.computed = len(match.blocks) * pool.block_tokens
        seq.registered, seq.prefix, seq.epoch = len(match.blocks), match.uid, pool.epoch
        self.num_cached_tokens += seq.computed
        if seq.cached < 0:
            seq.cached = seq.computed
        return True

    def _append_block(self, seq: Sequence) -> None:
        block = self.pool.allocate()
        self.table[seq.row, len(seq.blocks)] = block
        seq.blocks.append(block)

    def _register(self, seq: Sequence) -> None:
        size = self.pool.block_tokens
        if seq.epoch != self.pool.epoch:
            return
        while (seq.registered + 1) * size <= seq.computed:
            at = seq.registered
            tokens = seq.tokens[at * size : (at + 1) * size]
            seq.prefix = self.pool.register(seq.blocks[at], seq.prefix, tokens)
            seq.registered = at + 1

    def _retract_youngest(self) -> None:
        seq = self.running.pop()
        self._drop_kv(seq)
        self.waiting.appendleft(seq)

    def _drop_kv(self, seq: Sequence) -> None:
        self.pool.release(seq.blocks)
        self._rows.append(seq.row)
        seq.row, seq.blocks, seq.computed = -1, [], 0
        seq.registered, seq.prefix = 0, ROOT
