// What happened, the facts of each run, where the time went, and the configuration.

const SIGNS = { good: "✓", note: "·", warning: "!", bad: "✕" };
const LEVELS = { good: "good", note: "note", warning: "warning", bad: "failure" };

function findingsOf(run) {
  return el("ul", { class: "findings" }, run.findings.map(one => el("li", { class: one.level },
    el("span", { class: "sign", role: "img", "aria-label": LEVELS[one.level] }, SIGNS[one.level]),
    one.text, el("span", { class: "rule" }, one.rule))));
}

function factsOf(run) {
  return el("dl", { class: "facts" }, run.facts.flatMap(([name, value]) => [el("dt", {}, name), el("dd", {}, value)]));
}

function notice(text) {
  return el("p", { class: "notice" }, text);
}

function showSummary() {
  const section = at("summary");
  at("title").textContent = SEVERAL ? `${RUNS.length} runs` : RUNS[0].name;
  if (!SEVERAL) at("state").append(el("span", { class: `state ${RUNS[0].state}` }, RUNS[0].state));
  RUNS.forEach((run, index) => {
    const body = el("div", { class: "summary" }, findingsOf(run), factsOf(run));
    const notices = run.notices.map(notice);
    if (!SEVERAL) section.append(...notices, body);
    else {
      const first = run.findings.find(one => one.text.startsWith("Held-out")) || run.findings[0];
      section.append(el("details", { class: "run", open: RUNS.length <= 2 }, el("summary", {}, swatch(index), el("b", {}, run.name), " ",
        el("span", { class: `state ${run.state}` }, run.state), first ? el("span", { class: "faint small" }, ` — ${first.text}`) : ""), ...notices, body));
    }
  });
}

// ── time ──

const PHASES = ["rollout", "train", "score", "evaluate", "publish", "checkpoint", "sft", "other"];
const phaseColour = name => (PHASES.indexOf(name) < 0 ? COLOURS - 1 : PHASES.indexOf(name));

function phasesOf(run) {
  return Object.entries(run.time).filter(([, value]) => value > 0).sort((a, b) => phaseColour(a[0]) - phaseColour(b[0]));
}

function shareOf(run) {
  const phases = phasesOf(run);
  const total = phases.reduce((sum, [, value]) => sum + value, 0);
  let x = 0;
  const bars = phases.map(([name, value]) => {
    const width = (value / total) * 100;
    const bar = svg("rect", { class: `fill ${colour(phaseColour(name))}`, x, y: 0, width, height: 10 }, svg("title", {}, `${name}: ${percent(value / total)}`));
    x += width;
    return bar;
  });
  const label = `${run.name}: ${phases.map(([name, value]) => `${name} ${percent(value / total)}`).join(", ")}`;
  return el("div", {}, SEVERAL ? el("h3", {}, run.name) : null,
    el("div", { class: "share" }, svg("svg", { viewBox: "0 0 100 10", preserveAspectRatio: "none", role: "img", "aria-label": label }, bars)),
    el("div", { class: "legend" }, phases.map(([name, value]) => el("span", {}, el("i", { class: `key box ${colour(phaseColour(name))}` }), `${name} `,
      el("b", {}, percent(value / total)), ` ${seconds(value)}`)), el("span", {}, "all ", el("b", {}, seconds(total)))));
}

function showTime() {
  const section = at("time");
  const timed = RUNS.filter(run => phasesOf(run).length);
  if (!timed.length) {
    section.append(el("p", { class: "empty" }, "No step was timed."));
    return;
  }
  for (const run of timed) section.append(shareOf(run));
  const grid = el("div", { class: "charts" });
  const cut = [];
  for (const run of timed) {
    const from = startsSlowly(run) ? 1 : 0;
    if (from) cut.push(`${SEVERAL ? `${run.name}, ` : ""}${axisName()} ${run.steps[0]}, ${seconds(allOf(run, 0))}`);
    const layers = phasesOf(run).filter(([name]) => (run.metrics[`time/${name}`] || []).slice(from).some(Boolean))
      .map(([name]) => ({ name, index: phaseColour(name), steps: run.steps.slice(from), values: run.metrics[`time/${name}`].slice(from) }));
    const title = SEVERAL ? `Seconds a step, ${run.name}` : "Seconds a step, by phase";
    grid.append(new StackChart({ title, unit: "seconds", zero: true, wide: true }, layers).figure);
  }
  const why = cut.length ? ` It is left out of the chart (${cut.join("; ")}).` : "";
  section.append(el("p", {}), grid, el("p", { class: "small faint" },
    `The first ${axisName()} also holds what came before it: model, warm start, first evaluation.${why} Nested phases are counted once.`));
}

const allOf = (run, index) => phasesOf(run).reduce((sum, [name]) => sum + ((run.metrics[`time/${name}`] || [])[index] || 0), 0);

/** Whether the first step would flatten all others. */
function startsSlowly(run) {
  const rest = run.steps.map((_, index) => allOf(run, index)).slice(1).sort((a, b) => a - b);
  return rest.length > 1 && allOf(run, 0) > 3 * rest[rest.length >> 1];
}

// ── configuration ──

function cell(value) {
  return value === undefined ? "–" : typeof value === "string" ? value : JSON.stringify(value);
}

function showConfiguration() {
  const section = at("configuration");
  const names = [...new Set(RUNS.flatMap(run => Object.keys(run.config)))];
  if (!names.length) {
    section.append(el("p", { class: "empty" }, "config.json could not be read."));
    return;
  }
  if (!SEVERAL) {
    section.append(el("details", {}, el("summary", {}, `${plural(names.length, "value")}, defaults included`), configTable(names)));
    return;
  }
  const different = names.filter(name => name === "seed" || new Set(RUNS.map(run => cell(run.config[name]))).size > 1);
  different.sort((a, b) => (b === "seed") - (a === "seed"));
  section.append(el("p", { class: "faint small" }, `${different.length} of ${names.length} values are shown: the seed, and what differs between the runs.`), configTable(different));
}

function configTable(names) {
  const head = el("tr", {}, el("th", { scope: "col" }, "key"), RUNS.map((run, index) => el("th", { scope: "col" }, SEVERAL ? swatch(index) : "", SEVERAL ? run.name : "value")));
  const rows = names.map(name => el("tr", {}, el("td", { class: "key" }, name),
    RUNS.map(run => el("td", { class: "key", "data-label": SEVERAL ? `${run.name}:` : null }, visible(cell(run.config[name]))))));
  return el("div", { class: "scroll" }, el("table", { class: "stack" }, el("thead", {}, head), el("tbody", {}, rows)));
}
