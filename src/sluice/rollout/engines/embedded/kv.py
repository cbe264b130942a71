"""The block pool: which KV blocks are free, shared or kept for a prefix that may come again. No torch.

A block holds the keys and values of `block_tokens` consecutive tokens. A full block is *registered* under
(uid of the block before it, its own tokens), a key that is exact: no hash can collide, because the uid
stands for the whole prefix and is never used twice. Blocks nobody holds stay registered until their space
is needed, least recently used first, so samples of one prompt and later turns of one episode find them.

Block 0 is never handed out: padding tokens write their keys there.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

from sluice.errors import EngineError

ROOT = 0
"""The uid that stands for the empty prefix."""

PrefixKey: TypeAlias = tuple[int, tuple[int, ...]]


class Match(NamedTuple):
    """The longest registered prefix: its blocks in order, and the uid of the last one."""

    blocks: list[int]
    uid: int


class BlockPool:
    """Ref-counted blocks with a prefix index.

    Args:
        num_blocks: blocks that can be handed out; ids are 1..num_blocks.
        block_tokens: tokens of a block.
    """

    def __init__(self, num_blocks: int, block_tokens: int) -> None:
        self.num_blocks = num_blocks
        self.block_tokens = block_tokens
        self.epoch = 0
        """Counts invalidations: keys computed in an older epoch may not be registered."""
        self._refs = [0] * (num_blocks + 1)
        self._empty = deque(range(1, num_blocks + 1))
        self._kept: OrderedDict[int, None] = OrderedDict()
        self._index: dict[PrefixKey, tuple[int, int]] = {}
        self._key_of: dict[int, PrefixKey] = {}
        self._last_uid = ROOT

    @property
    def num_free(self) -> int:
        """Blocks that can be handed out now, kept prefixes among them."""
        return len(self._empty) + len(self._kept)

    @property
    def num_used(self) -> int:
        return self.num_blocks - self.num_free

    @property
    def num_registered(self) -> int:
        return len(self._index)

    def references(self, block: int) -> int:
        """How many sequences hold `block`."""
        return self._refs[block]

    def match(self, tokens: Sequence[int], limit: int) -> Match:
        """The longest registered prefix of `tokens[:limit]` in whole blocks. Takes no reference."""
        size, uid = self.block_tokens, ROOT
        blocks: list[int] = []
        for end in range(size, limit + 1, size):
            found = self._index.get((uid, tuple(tokens[end - size : end])))
            if found is None:
                break
            block, uid = found
            blocks.append(block)
        return Match(blocks, uid)

    def num_fresh(self, match: Match, total: int) -> int:
        """Free blocks that a sequence of `total` blocks takes when it shares `match`."""
        return total - len(match.blocks) + sum(not self._refs[block] for block in match.blocks)

    def share(self, blocks: Sequence[int]) -> None:
        """Take a reference to matched blocks. Nothing may be allocated between `match` and this."""
        for block in blocks:
            if not self._refs[block]:
                del self._kept[block]
            self._refs[block] += 1

    def allocate(self) -> int:
        """A block of its own for a sequence.

        Raises:
            EngineError: none is free; the scheduler makes room first, so this is a bug in it.
        """
        if self._empty:
            block = self._empty.popleft()
        elif self._kept:
            block, _ = self._kept.popitem(last=False)
            self._forget(block)
        else:
            raise EngineError(f"all {self.num_blocks} KV blocks are held", hint="report this as a bug")
        self._refs[block] = 1
        return block

    def register(self, block: int, before: int, tokens: Sequence[int]) -> int:
        """Make a full block findable as the successor of the prefix `before`; returns the new prefix's uid.

        When another block already holds the same prefix, that one stays and its uid is returned.
        """
        key = (before, tuple(tokens))
        found = self._index.get(key)
        if found is not None:
            return found[1]
        self._last_uid += 1
        self._index[key] = (block, self._last_uid)
        self._key_of[block] = key
        return self._last_uid

    def release(self, blocks: Sequence[int]) -> None:
        """Give up one reference to each. Later blocks are dropped first when space is needed."""
        for block in reversed(blocks):
            self._refs[block] -= 1
            if self._refs[block]:
                continue
            if block in self._key_of:
                self._kept[block] = None
            else:
                self._empty.append(block)

    def invalidate(self) -> None:
        """Forget every prefix: the weights changed. Held blocks stay with their holders."""
        self.epoch += 1
        self._index.clear()
        self._key_of.clear()
        self._empty.extend(self._kept)
        self._kept.clear()

    def _forget(self, block: int) -> None:
        key = self._key_of.pop(block)
        del self._index[key]
