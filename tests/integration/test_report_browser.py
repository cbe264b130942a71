"""The report in a real browser: no error, no request, nothing of the data becomes markup, every control works."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from benchmarks.browser import Page, browser

from sluice.log import (
    Disposition,
    DispositionRecord,
    EpisodeRecord,
    EvalRecord,
    FaultRecord,
    LogWriter,
    RewardRecord,
    RunRecord,
    VersionRecord,
)
from sluice.obs.report.build import build
from sluice.obs.report.compact import Spelled
from sluice.obs.report.folder import read_run
from sluice.types import (
    Author,
    Episode,
    Fork,
    Message,
    Outcome,
    Prompt,
    Reward,
    SamplingParams,
    Segment,
    Turn,
    Version,
    VersionSpan,
    observed,
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

EVIL = "</script><script>window.hacked=1</script><img src=x onerror=window.hacked=1><b class=evil>&lt;"
SPELLED = {
    1: b"<s>", 2: "é".encode()[:1], 3: "é".encode()[1:], 4: EVIL.encode(), 5: "\u202eabc\u0000\x1b[31m".encode(),
    6: b"\n", 7: "שלום".encode(), 8: b" plain",
}  # fmt: skip
PROMPT = Prompt("p1", "task", (Message("user", EVIL),), answer=EVIL)
OTHER = Prompt("p2", "task", (Message("user", "long"),))
LONG = 4_500


def spell(id: int) -> Spelled:
    return Spelled(SPELLED.get(id, f" w{id}".encode()) if id < 1000 else None, id == 1)


def sampled(ids: list[int], *spans: VersionSpan) -> Turn:
    logprobs = -np.linspace(0, 6, len(ids), dtype=np.float32)
    given = spans or (VersionSpan(0, len(ids), Version(0)),)
    return Turn(Author.SAMPLED, np.array(ids, np.int32), logprobs, given, SamplingParams(temperature=0.5), "stop")


def make_run(folder: Path, name: str) -> Path:
    """Three steps, two evaluations of one prompt, a group with a fork, stale tokens, a failure and a long answer."""
    with LogWriter(folder / "log") as log:
        log.append(RunRecord("digest", 0, "0.1.0"))
        for step, answer in ((0, [8, 20, 21, 22, 1]), (3, [8, 20, 31, 22, 1])):
            id = f"eval-{step:06d}.p1.0"
            segment = Segment((observed([9, 10]), sampled(answer)))
            log.append(EpisodeRecord(Episode(id, f"eval-{step:06d}", PROMPT, (segment,), Outcome.COMPLETED)))
            log.append(RewardRecord(id, Reward({"exact": step / 3}, {"exact": 1.0})))
            log.append(EvalRecord(step, Version(step), {"eval/accuracy": 0.5 + step / 10}, (id,)))
        spans = (VersionSpan(0, 3, Version(0)), VersionSpan(3, 8, Version(1)))
        main = Segment((observed([9, 4]), sampled([2, 3, 4, 5, 6, 7, 8, 1], *spans), observed([5])))
        fork = Segment((observed([10]), sampled([20, 5000])), Fork(0, 6, "sub_agent"))
        _decided(log, "g000000.0", PROMPT, (main, fork), np.linspace(-1, 1, 10, dtype=np.float32), masked=5)
        _decided(log, "g000001.0", OTHER, (Segment((sampled([8] * LONG),)),), np.array([0.5], np.float32))
        log.append(DispositionRecord("g000002.0", "g000002", Disposition.EXCLUDED, 1, f"infra_failure: {EVIL}"))
        log.append(VersionRecord(Version(1), Version(0), "c"))
        log.append(FaultRecord(EVIL, "reward of g000002.0"))
    rows = [
        {"step": step, "version/step": step, "reward/mean": step / 4, "reward/std": 0.5, "train/entropy": 1 / step,
         "train/loss": None if step == 2 else 0.1, "time/rollout": 2.0, "time/train": 1.0, "odd <b>": step}
        for step in (1, 2, 3)
    ]  # fmt: skip
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "config.json").write_text(json.dumps({"name": name, "steps": 3, "seed": 0, "note": EVIL}))
    return folder


def _decided(
    log: LogWriter, id: str, prompt: Prompt, segments: tuple[Segment, ...], advantage: Any, masked: int = 0
) -> None:
    log.append(EpisodeRecord(Episode(id, id[:7], prompt, segments, Outcome.COMPLETED, info={"note": EVIL})))
    log.append(RewardRecord(id, Reward({"exact": 1.0}, {"exact": 1.0})))
    log.append(
        DispositionRecord(id, id[:7], Disposition.TRAINED, 1, masked_tokens=masked, advantage=advantage)
    )  # fmt: skip


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_run(tmp_path_factory.mktemp("one"), EVIL)
    page = folder / "report.html"
    page.write_text(build([read_run(folder)], lambda run: spell))
    return page


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folders = [make_run(tmp_path_factory.mktemp(name), name) for name in ("first", "second")]
    page = folders[0] / "report.html"
    page.write_text(build([read_run(folder) for folder in folders], lambda run: spell))
    return page


@asynccontextmanager
async def opened(file: Path, **shape: Any) -> AsyncIterator[Page]:
    """The page, and afterwards: no problem on the console, no request but for itself, nothing hacked."""
    async with browser() as page:
        await page.open(file.as_uri(), **shape)
        await page.settle()
        assert await page.run("document.documentElement.dataset.ready") == "yes"
        yield page
        await page.settle()
        assert page.problems == []
        assert [url for url in page.requests if not url.startswith("data:")] == [file.as_uri()]
        assert await page.run("window.hacked === undefined && !document.querySelector('b.evil, img')")


def inside(file: Path, steps: Callable[[Page], Awaitable[None]], **shape: Any) -> None:
    async def all_of_it() -> None:
        async with opened(file, **shape) as page:
            await steps(page)

    asyncio.run(all_of_it())


async def choose(page: Page, name: str, wanted: str) -> None:
    """Choose in the episode browser's selector `name` the first option that begins like this."""
    done = await page.run(
        f"""(() => {{
          const labels = [...document.querySelectorAll("#episodes .bar label")];
          const select = labels.find(one => one.firstChild.textContent === {json.dumps(name)}).querySelector("select");
          const option = [...select.options].find(one => one.textContent.startsWith({json.dumps(wanted)}));
          if (!option) return [...select.options].map(one => one.textContent);
          select.value = option.value;
          select.dispatchEvent(new Event("change"));
          return true;
        }})()"""
    )
    assert done is True, done


async def text(page: Page, selector: str) -> str:
    return str(await page.run(f"document.querySelector({json.dumps(selector)}).textContent"))


def test_curves_follow_the_keyboard_and_the_theme_its_button(one: Path) -> None:
    async def steps(page: Page) -> None:
        assert await text(page, "h1") == EVIL
        titles = await page.run("[...document.querySelectorAll('#curves figure h3')].map(one => one.textContent)")
        assert titles == ["Held-out accuracy", "Training reward", "Entropy", "Loss"]
        await page.run("document.querySelectorAll('#curves figure')[1].focus()")
        assert await text(page, "#curves figure:nth-child(2) .legend") == "mean 0.75std 0.5"
        await page.press("Home")
        assert await text(page, "#curves figure:nth-child(2) .legend") == "mean 0.25std 0.5step 1"
        await page.press("ArrowRight")
        assert await text(page, "#curves figure:nth-child(2) .legend") == "mean 0.5std 0.5step 2"
        assert await text(page, "#curves figure:nth-child(4) .legend") == "loss –step 2", "one cursor for all charts"
        await page.press("Escape")
        await page.run("document.querySelector('details.more').open = true")
        await page.settle()
        assert "odd <b>" in await text(page, "details.more")
        back = "getComputedStyle(document.body).backgroundColor"
        light = await page.run(back)
        await page.run("document.getElementById('theme').click()")
        assert await page.run(back) == light
        await page.run("document.getElementById('theme').click()")
        assert await page.run(back) != light
        assert await text(page, "#theme") == "theme: dark"

    inside(one, steps)


def test_tokens_tell_on_hover_on_focus_and_on_tap(one: Path) -> None:
    async def steps(page: Page) -> None:
        await choose(page, "Step", "training, step 1")
        shown = await page.run("[...document.querySelectorAll('.pane .turn.sampled .tk')].map(one => one.textContent)")
        assert shown[:2] == ["‹c3›", "é"], "a character stands at the token that completes it"
        assert shown[2] == EVIL
        assert shown[3] == "⟨U+202E⟩abc⟨U+0000⟩⟨U+001B⟩[31m"
        assert shown[4:8] == ["⏎\n", "שלום", " plain", "<s>"]
        assert shown[8:10] == [" w20", "⟨5000⟩"]
        assert "Segment 2, forks from segment 1 at token 6 (sub_agent)" in await text(page, ".pane")
        await page.run("document.querySelector('.pane').scrollIntoView()")
        await page.settle()
        await page.hover(".pane .turn.sampled .tk")
        told = await text(page, ".readout")
        assert "log-prob 0p 1version 0.0temperature 0.5advantage −1weight 0: masked as stale" in told
        await page.run("document.querySelectorAll('.pane .turn.sampled .tk')[3].click()")
        told = await text(page, ".readout")
        assert "id 5position 5log-prob −2.571" in told
        assert "version 1.0" in told
        assert "weight 1author sampled" in told
        await page.press("ArrowRight")
        assert "id 6position 6" in await text(page, ".readout")
        await page.press("End")
        assert "id 5000position 8" in await text(page, ".readout")
        await page.press("Home")
        assert "weight 0author observedturn 1" in await text(page, ".readout")
        await page.run("document.querySelector('.pane details').open = true")
        await page.settle()
        assert await page.run("document.querySelectorAll('.pane details .tk').length") == 6

    inside(one, steps)


def test_two_evaluations_of_a_prompt_side_by_side(one: Path) -> None:
    async def steps(page: Page) -> None:
        await choose(page, "Step", "held out, step 3")
        await choose(page, "Compare with", "held out, step 0")
        assert await page.run("document.querySelectorAll('.panes.two .pane').length") == 2
        marked = await page.run("[...document.querySelectorAll('.pane .tk.only')].map(one => one.textContent)")
        assert marked == [" w31", " w21"]

    inside(one, steps)


def test_a_long_answer_is_drawn_when_asked_for(one: Path) -> None:
    async def steps(page: Page) -> None:
        await choose(page, "Step", "training, step 1")
        await choose(page, "Group", "g000001")
        count = "document.querySelectorAll('.pane .tk').length"
        assert await page.run(count) == 2000
        await page.run("document.querySelector('.pane .text button').click()")
        assert await page.run(count) == 4000
        await page.run("document.querySelector('.pane .text button').click()")
        assert await page.run(count) == LONG

    inside(one, steps)


def test_several_runs_are_overlaid(two: Path) -> None:
    async def steps(page: Page) -> None:
        legend = await text(page, "#curves figure:nth-child(2) .legend")
        assert legend == "first 0.75 ┄ 0.5second 0.75 ┄ 0.5mean, dashed std"
        keys = await page.run("[...document.querySelectorAll('#configuration tbody tr')].map(one => one.textContent)")
        assert keys == ["seed00", "namefirstsecond"]
        await choose(page, "Step", "held out, step 3")
        await choose(page, "Run", "second")
        await choose(page, "Compare with", "first, held out, step 3")
        assert await page.run("document.querySelectorAll('.pane .tk.only').length") == 0

    inside(two, steps)


CONTRAST = """(() => {
  const parse = text => { const [r, g, b, a = 1] = text.match(/[\\d.]+/g).map(Number); return [r, g, b, a]; };
  const over = (top, under) => [0, 1, 2].map(i => top[i] * top[3] + under[i] * (1 - top[3])).concat(1);
  const backOf = node => {
    const layers = [];
    for (let one = node; one; one = one.parentElement) layers.push(parse(getComputedStyle(one).backgroundColor));
    return layers.reverse().reduce((under, top) => over(top, under), [255, 255, 255, 1]);
  };
  const linear = v => (v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
  const light = colour => [0.2126, 0.7152, 0.0722].reduce((sum, part, i) => sum + part * linear(colour[i] / 255), 0);
  const poor = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const node = walker.currentNode.parentElement;
    const said = walker.currentNode.textContent.trim().slice(0, 20);
    if (!said || node.closest("script, noscript, .skip, option") || !node.getClientRects().length) continue;
    const style = getComputedStyle(node);
    const back = backOf(node);
    const ink = over(parse(node.closest("svg") ? style.fill : style.color), back);
    const [high, low] = [light(ink), light(back)].sort((a, b) => b - a);
    const ratio = (high + 0.05) / (low + 0.05);
    if (ratio < 4.5) poor.push(`${node.className.baseVal ?? node.className} ${said} ${ratio.toFixed(2)}`);
  }
  return [...new Set(poor)];
})()"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_is_legible_and_fits_a_phone(one: Path, scheme: str) -> None:
    async def steps(page: Page) -> None:
        for width in (1280, 390):
            await page.shape(width=width, height=900, scheme=scheme)
            await choose(page, "Step", "training, step 1")
            for mode in ("author", "log-prob", "advantage", "version", "trained", "nothing"):
                await choose(page, "Colour by", mode)
                await page.settle()
                assert await page.run(CONTRAST) == []
                assert await page.run("document.documentElement.scrollWidth") == width
            await choose(page, "Step", "held out, step 3")
            await choose(page, "Compare with", "held out, step 0")
            assert await page.run("document.documentElement.scrollWidth") == width

    inside(one, steps, scheme=scheme)
