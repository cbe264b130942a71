"""Screenshots of `report.html` in a real browser: light, dark, phone width, several runs, two episodes side by side.

    python -m benchmarks.report_screens OUT                # trains the demo twice first, a few minutes
    python -m benchmarks.report_screens OUT RUN [RUN...]   # of runs that are there

Fails when the page writes an error to the console, asks for anything but itself, or is wider than a phone.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.browser import Page, browser

from sluice.orchestrate.reporting import write_report

RECIPE = Path(__file__).parents[1] / "recipes" / "demo.py"
VARIANTS = (
    ["name=demo"],
    ["name=demo-async", "seed=1", "data.gate.max_lag=1", 'data.filters=[{type="spread"}]', "steps=40"],
)
"""The demo as it is, and a run that is asynchronous and drops groups without a difference."""
CHOOSE = """(choices => {
  const labels = [...document.querySelectorAll("#episodes .bar label")];
  for (const [name, wanted] of choices) {
    const select = labels.find(one => one.firstChild.textContent === name).querySelector("select");
    select.value = [...select.options].find(one => one.textContent.startsWith(wanted)).value;
    select.dispatchEvent(new Event("change"));
  }
  document.querySelector("#episodes").scrollIntoView();
})"""


@dataclass(frozen=True)
class Screen:
    """One picture: of which page, at which size, at which section, after which choices in the episode browser."""

    name: str
    page: str
    width: int
    height: int
    scheme: str = "light"
    section: str = ""
    choices: Mapping[str, str] = field(default_factory=dict[str, str])
    clicks: tuple[str, ...] = ()
    hover: str = ""


LIGHT, DARK = "light", "dark"
TOKEN = ".pane .tk.s:nth-child(4)"
GREEDY = tuple(f".pane:nth-child({side}) .chips button:last-of-type" for side in (1, 2))
SCREENS = (
    Screen("report-light", "one", 1280, 980),
    Screen("report-dark", "one", 1280, 980, DARK, "curves"),
    Screen("report-fates", "other", 1280, 900, LIGHT, "time"),
    Screen(
        "report-tokens", "other", 1280, 660, LIGHT, "episodes", {"Step": "training", "Colour by": "advantage"},
        (), TOKEN,
    ),
    Screen(
        "report-diff-dark", "one", 1280, 700, DARK, "episodes",
        {"Compare with": "held out, step 0", "Colour by": "log-prob"}, GREEDY, TOKEN,
    ),
    Screen("report-several", "several", 1280, 980, LIGHT, "curves"),
    Screen("report-several-summary", "several", 1280, 1100, DARK),
    Screen("report-phone", "one", 390, 1600),
    Screen("report-phone-episodes", "one", 390, 1100, DARK, "episodes", {"Colour by": "log-prob"}, (), TOKEN),
)  # fmt: skip


def train() -> list[Path]:
    """The runs that are shown when none are given, in `runs/` of this folder."""
    for overrides in VARIANTS:
        command = [sys.executable, "-c", "from sluice.cli import main; main()", "train", str(RECIPE), "--overwrite"]
        subprocess.run([*command, *overrides], check=True, timeout=3_600)
    return [Path("runs") / overrides[0].removeprefix("name=") for overrides in VARIANTS]


async def shoot(pages: dict[str, Path], out: Path, only: str) -> None:
    """Every screen. Raises RuntimeError for what a page must not do."""
    for screen in SCREENS:
        if only in screen.name:
            async with browser() as page:
                await take(page, screen, pages[screen.page], out)


async def take(page: Page, screen: Screen, file: Path, out: Path) -> None:
    """One screen, checked."""
    await page.open(file.as_uri(), width=screen.width, height=screen.height, scheme=screen.scheme)
    await page.settle()
    if screen.section:
        await page.run(f"document.getElementById('{screen.section}').scrollIntoView()")
    if screen.choices:
        await page.run(f"{CHOOSE}({json.dumps(list(screen.choices.items()))})")
    for selector in screen.clicks:
        await page.run(f"document.querySelector({json.dumps(selector)}).click()")
    if screen.hover:
        await page.settle()
        await page.hover(screen.hover)
    wide = await page.run("document.documentElement.scrollWidth")
    strangers = [url for url in page.requests if url != file.as_uri() and not url.startswith("data:")]
    if page.problems or strangers or wide > screen.width:
        raise RuntimeError(f"{screen.name}: console {page.problems}, requests {strangers}, {wide} pixels wide")
    path = out / f"{screen.name}.png"
    await asyncio.to_thread(path.write_bytes, await page.screenshot())
    print(path, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT", help="folder of the pictures")
    parser.add_argument("runs", nargs="*", type=Path, metavar="RUN", help="run folders; none: the demo is trained")
    parser.add_argument("--only", default="", metavar="TEXT", help="screens whose name holds this")
    arguments = parser.parse_args()
    out: Path = arguments.out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        if not arguments.runs:
            os.chdir(scratch)  # the runs are shown as runs/demo, wherever that is
        runs = arguments.runs or train()
        wanted = {"one": runs[:1], "other": runs[-1:], "several": runs}
        pages = {name: write_report(chosen, Path(scratch) / f"{name}.html") for name, chosen in wanted.items()}
        asyncio.run(shoot(pages, out, arguments.only))


if __name__ == "__main__":
    main()
