"""Whatever several clients do to one session: tokens are what the engine saw and drew, and each is trained once."""

from __future__ import annotations

import asyncio
import json
import random
from dataclasses import dataclass, field, replace

from hypothesis import given, settings
from hypothesis import strategies as st
from session_rig import ADD, USER, Script, answered, check, make, one, said

from sluice.rollout.chat.base import ChatMessage, ToolCall
from sluice.rollout.engines.base import GenerateRequest
from sluice.rollout.session import Choice, Session

SYSTEM = ChatMessage("system", "help with numbers")
ANSWERS = (
    "yes ",
    " no\n",
    "<think>\nwhich?\n</think>\n\nmaybe",
    '<tool_call>\n{"name": "add", "arguments": {"b": 1.0, "a": 2}}\n</tool_call>',
    'both\n<tool_call>\n{"name": "add", "arguments": {"a": 2}}\n</tool_call>\n'
    '<tool_call>\n{"name": "add", "arguments": {"a": 2}}\n</tool_call>',
    "<tool_call>\nbroken\n</tool_call>",
    "",
)


@dataclass
class Client:
    """Remembers a conversation the way some client library does, and goes on with it."""

    draw: random.Random
    messages: list[ChatMessage] = field(default_factory=lambda: [SYSTEM, USER])

    def remember(self, choice: Choice) -> None:
        """Reasoning dropped or not, white space trimmed or not, calls renamed and arguments written anew or not."""
        message = said(choice, reasoning=self.draw.random() < 0.5)
        if self.draw.random() < 0.5:
            message = replace(message, content=message.content.strip())
        calls = message.tool_calls
        if self.draw.random() < 0.5:
            calls = tuple(self._anew(call, n) for n, call in enumerate(calls))
        self.messages.append(replace(message, tool_calls=calls))
        self.messages += [answered(call, str(self.draw.randrange(9))) for call in calls] or [self.question()]

    def question(self) -> ChatMessage:
        return ChatMessage("user", f"and {self.draw.randrange(10**9)}?")

    def _anew(self, call: ToolCall, n: int) -> ToolCall:
        arguments = json.loads(call.arguments)
        whole = {key: int(value) for key, value in arguments.items()}
        return ToolCall(f"toolu{n}{self.draw.randrange(10**9)}", call.name, json.dumps(whole, sort_keys=True))


def scripted(draw: random.Random) -> Script:
    def write(request: GenerateRequest) -> str:
        return draw.choice(ANSWERS)

    return Script(write)


async def step(session: Session, client: Client, others: list[Client], action: str) -> None:
    draw = client.draw
    match action:
        case "continue":
            client.remember(await one(session, *client.messages, tools=(ADD,)))
        case "retry":
            await one(session, *client.messages, tools=(ADD,))
            client.remember(await one(session, *client.messages, tools=(ADD,)))
        case "parallel":
            fellow = Client(random.Random(draw.random()), list(client.messages))
            choices = await asyncio.gather(
                *(one(session, *each.messages, tools=(ADD,)) for each in (client, fellow, *others))
            )
            for each, choice in zip((client, fellow, *others), choices, strict=True):
                each.remember(choice)
            others.append(fellow)
        case "branch":
            ends = [n for n, message in enumerate(client.messages) if message.role == "assistant"]
            if ends:
                client.messages = [*client.messages[: draw.choice(ends) + 1], client.question()]
            client.remember(await one(session, *client.messages, tools=(ADD,)))
        case "compact":
            client.messages = [client.messages[0], client.question()]
            client.remember(await one(session, *client.messages, tools=(ADD,)))
        case "edit":
            at = draw.randrange(len(client.messages))
            client.messages[at] = replace(client.messages[at], content=f"edited {draw.randrange(10**9)}")
            client.remember(await one(session, *client.messages, tools=(ADD,)))
        case "sub-agent":
            sub = Client(random.Random(draw.random()), [ChatMessage("system", f"task {draw.random()}"), USER])
            sub.remember(await one(session, *sub.messages))
        case _:
            task = asyncio.create_task(one(session, *client.messages, tools=(ADD,)))
            await asyncio.sleep(0)
            task.cancel()
            await asyncio.wait([task], timeout=30)


ACTIONS = ("continue", "retry", "parallel", "branch", "compact", "edit", "sub-agent", "cancel")
BOUNDS = {"max_segments": 500}


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32), actions=st.lists(st.sampled_from(ACTIONS), min_size=1, max_size=8))
def test_tokens_are_the_engines_own_and_trained_once(seed: int, actions: list[str]) -> None:
    async def main() -> None:
        draw = random.Random(seed)
        engine = scripted(draw)
        session = make(engine, limits=BOUNDS)
        client, others = Client(random.Random(seed + 1)), list[Client]()
        before: list[list[int]] = []
        for action in actions:
            await step(session, client, others, action)
            now = [branch.ids(branch.length).tolist() for branch in session._tree]  # pyright: ignore[reportPrivateUsage]
            for old, new in zip(before, now, strict=False):
                assert new[: len(old)] == old
            before = now
        if session.counters()["turns"] == 0:
            return
        episode = session.finish()
        assert [episode.ids(n).tolist() for n in range(len(episode.segments))] == before
        assert session.counters()["turns"] == len(engine.answers)
        check(episode, engine)

    asyncio.run(main())


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32), turns=st.integers(1, 8))
def test_a_faithful_client_never_forks(seed: int, turns: int) -> None:
    async def main() -> None:
        draw = random.Random(seed)
        engine = scripted(draw)
        session = make(engine)
        client = Client(random.Random(seed + 1))
        for _ in range(turns):
            await step(session, client, [], draw.choice(("continue", "continue", "cancel")))
        if session.counters()["turns"] == 0:
            return
        episode = session.finish()
        assert len(episode.segments) == 1
        assert not [name for name in session.counters() if name.startswith("forks/")]
        check(episode, engine)

    asyncio.run(main())


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32), clients=st.integers(2, 5), turns=st.integers(1, 4))
def test_faithful_clients_side_by_side_fork_once_each(seed: int, clients: int, turns: int) -> None:
    async def main() -> None:
        draw = random.Random(seed)
        engine = scripted(draw)
        session = make(engine, limits=BOUNDS)

        async def talk(n: int) -> None:
            client = Client(random.Random(seed + n), [ChatMessage("system", f"agent {n}"), USER])
            for _ in range(turns):
                for _ in range(draw.randrange(4)):
                    await asyncio.sleep(0)
                client.remember(await one(session, *client.messages, tools=(ADD,)))

        await asyncio.gather(*(talk(n) for n in range(clients)))
        episode = session.finish()
        assert len(episode.segments) == clients
        assert session.counters()["mismatches"] == 0
        assert all(len(segment.turns) == 2 * turns for segment in episode.segments)
        check(episode, engine)

    asyncio.run(main())
