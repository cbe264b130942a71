"""The agents of the chaos benchmark: a program that knows nothing of a run but the gateway's URL and the owner's key.

    SLUICE_OWNER_KEY=… python -m benchmarks.chaos_agent http://127.0.0.1:PORT JOURNAL [--threads 2]

Each thread leases an episode, asks the model through the OpenAI-compatible route, works out what a tool would say to
the answer, asks again, and finishes with its rewards, for ever. A request whose connection broke is sent again, as the
documentation of the gateway has it; an episode that the gateway knows no longer is left. Every finish that was
acknowledged is a line of the journal, with the mark that went with it as a reward.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import threading
import time
import traceback
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx

AGAIN_SECONDS = 0.2
"""Before another try: nothing is on offer, the connection broke, no engine is left."""
ANSWER_SECONDS = 60.0
LEFT = {401, 404, 410}
"""The gateway does not know the session, or no longer: it expired, or the run was started again."""


class Left(Exception):  # noqa: N818 - the state is the name
    """The episode is somebody else's business now."""


class Agent:
    """One thread's connection to the gateway."""

    def __init__(self, url: str, key: str) -> None:
        self._client = httpx.Client(base_url=url, timeout=ANSWER_SECONDS)
        self._key = key

    def episode(self) -> tuple[str, float]:
        """Lease one, do it, finish it. Returns its id and mark.

        Raises:
            Left: it is the gateway's or another agent's now.
        """
        opened = self._post("/sessions", {}, self._key)
        messages: list[dict[str, str]] = opened["prompt"]["messages"]
        first = self._ask(opened, messages)
        said = {"role": "user", "content": f"{tool(first)}="}
        last = self._ask(opened, [*messages, {"role": "assistant", "content": first}, said])
        mark = random.random()
        rewards = {"reward": float(last.endswith(tool(first))), "mark": mark}
        self._post(f"/sessions/{opened['episode_id']}/finish", {"rewards": rewards}, self._key)
        return opened["episode_id"], mark

    def _ask(self, opened: Mapping[str, Any], messages: list[dict[str, str]]) -> str:
        body = {"model": "actor", "messages": messages}
        answer = self._post("/v1/chat/completions", body, opened["session_key"])
        return str(answer["choices"][0]["message"]["content"] or "")

    def _post(self, path: str, body: Mapping[str, Any], key: str) -> dict[str, Any]:
        """The answer, however often it takes."""
        while True:
            try:
                reply = self._client.post(path, json=body, headers={"Authorization": f"Bearer {key}"})
            except httpx.TransportError:
                time.sleep(AGAIN_SECONDS)
                continue
            if reply.is_success:
                return reply.json()
            if reply.status_code in LEFT:
                raise Left(reply.text)
            if reply.status_code not in (429, 503):
                raise RuntimeError(f"{path} was answered {reply.status_code}: {reply.text}")
            time.sleep(AGAIN_SECONDS)


def tool(text: str) -> str:
    """What the tool says to an answer: the last digit of the sum of its digits."""
    return str(sum(int(each) for each in text if each.isdigit()) % 10)


def work(agent: Agent, journal: Path) -> None:
    """Episode after episode. What no agent should meet ends them all."""
    try:
        while True:
            with suppress(Left):
                id, mark = agent.episode()
                with journal.open("a") as lines:
                    lines.write(json.dumps({"id": id, "mark": mark}) + "\n")
    except BaseException:  # noqa: BLE001 - a thread that ended alone would not be missed
        traceback.print_exc()
        os._exit(1)


def main() -> None:
    arguments_of = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    arguments_of.add_argument("url")
    arguments_of.add_argument("journal", type=Path)
    arguments_of.add_argument("--threads", type=int, default=2)
    arguments = arguments_of.parse_args()
    agents = [Agent(arguments.url, os.environ["SLUICE_OWNER_KEY"]) for _ in range(arguments.threads)]
    threads = [threading.Thread(target=work, args=(agent, arguments.journal)) for agent in agents]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


if __name__ == "__main__":
    main()
