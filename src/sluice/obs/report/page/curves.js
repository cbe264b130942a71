// Which metric is drawn where. What is named nowhere here is drawn below the others, so no metric is lost.

const CURVES = [
  { title: "Held-out accuracy", unit: "mean reward", zero: true, lines: [["eval/accuracy", "sampled"], ["eval/greedy", "greedy"]] },
  { title: "Training reward", unit: "reward", lines: [["reward/mean", "mean"], ["reward/std", "std"], ["reward/mean_with_dropped", "mean with dropped groups"]] },
  { title: "Reward components", unit: "mean, unweighted", prefix: "reward/component/" },
  { title: "Response length", unit: "tokens", zero: true, lines: [["rollout/response_tokens", "training"], ["eval/response_tokens", "held out"]] },
  { title: "Entropy", unit: "nats / token", zero: true, lines: [["train/entropy", "entropy"]] },
  { title: "KL divergence", unit: "nats / token", lines: [["train/policy_kl", "from the sampling policy"], ["train/reference_kl", "from the reference"]] },
  { title: "Gradient norm", unit: "L2", zero: true, lines: [["train/grad_norm", "norm"]] },
  { title: "Engine against trainer", unit: "nats / token", log: true, lines: [["mismatch/mean_abs", "mean |Δ|"], ["mismatch/p999", "p99.9"], ["mismatch/max_abs", "max"]] },
  { title: "Gate lag", unit: "optimizer steps", zero: true, lines: [["gate/lag_mean", "mean"], ["gate/lag_max", "max"]] },
  { title: "Loss", unit: "per normaliser", lines: [["train/loss", "loss"]] },
  { title: "Outcomes", unit: "episodes", zero: true, prefix: "rollout/", only: ["completed", "truncated", "aborted", "infra_failure"], quiet: true },
  { title: "Speed since the start", unit: "tokens / s", zero: true, lines: [["speed/rollout_tokens_per_second", "rollout"], ["speed/train_tokens_per_second", "training"]] },
];
const ELSEWHERE = name => name.startsWith("time/") || name.startsWith("version/");

function column(run, name) {
  const found = run.evaluations.metrics[name];
  if (found) return { steps: run.evaluations.steps, values: found, markers: true };
  return run.metrics[name] ? { steps: run.steps, values: run.metrics[name], markers: false } : null;
}

const same = (a, b) => a.values.length === b.values.length && a.values.every((value, index) => value === b.values[index]);

/** Whether a single component says no more than the total does. */
const onlyMean = line => RUNS.some(run => run.metrics["reward/mean"] && same(line, { values: run.metrics["reward/mean"] }));

/** The lines of one chart. One run: a colour a line. Several: a colour a run, the second line of each dashed. */
function linesOf(spec) {
  return RUNS.flatMap((run, which) => {
    const names = spec.lines || [...Object.keys(run.metrics)].filter(name => name.startsWith(spec.prefix))
      .map(name => [name, name.slice(spec.prefix.length)]).filter(([, short]) => !spec.only || spec.only.includes(short));
    const lines = [];
    names.slice(0, SEVERAL ? 2 : COLOURS).forEach(([name, label]) => {
      const values = column(run, name);
      if (!values || !values.steps.length || !values.values.some(known)) return;
      if (spec.quiet && !values.values.some(value => value)) return;
      if (lines.some(line => same(line, values))) return;
      const index = SEVERAL ? which : lines.length;
      lines.push({ ...values, index, dashed: SEVERAL && lines.length > 0, label });
    });
    return lines.map(line => ({ ...line, name: SEVERAL ? run.name : line.label }));
  });
}

function showCurves() {
  const section = at("curves");
  const used = new Set();
  const grid = el("div", { class: "charts" });
  for (const spec of CURVES) {
    const lines = linesOf(spec).filter((line, _, all) => !(spec.prefix === "reward/component/" && all.length === RUNS.length && onlyMean(line)));
    for (const run of RUNS) for (const name of Object.keys(run.metrics)) {
      const listed = spec.lines ? spec.lines.slice(0, SEVERAL ? 2 : undefined).some(([key]) => key === name)
        : name.startsWith(spec.prefix) && (!spec.only || spec.only.includes(name.slice(spec.prefix.length)));
      if (listed) used.add(name);
    }
    if (lines.length) grid.append(new LineChart(spec, lines).figure);
  }
  if (!grid.children.length) {
    section.append(el("p", { class: "empty" }, "There is nothing to draw: no step has been trained and nothing was evaluated."));
    return;
  }
  section.append(controls(), grid);
  const strides = RUNS.filter(run => run.stride > 1).map(run => `${run.name}: each point is the mean of ${run.stride} ${axisName()}s`);
  if (strides.length) section.append(el("p", { class: "small faint" }, strides.join(". "), "."));
  const rest = [...new Set(RUNS.flatMap(run => [...Object.keys(run.metrics), ...Object.keys(run.evaluations.metrics)]))]
    .filter(name => !used.has(name) && !ELSEWHERE(name) && !CURVES.some(spec => (spec.lines || []).some(([key]) => key === name && key.startsWith("eval/")))).sort();
  if (rest.length) section.append(more(rest));
}

function controls() {
  const choice = el("select", { onchange: event => { smoothing = Number(event.target.value); redraw(); } },
    ...[[1, "off"], [5, `5 ${axisName()}s`], [15, `15 ${axisName()}s`], [51, `51 ${axisName()}s`]].map(([value, label]) => el("option", { value }, label)));
  const legend = SEVERAL ? el("div", { class: "runs" }, RUNS.map((run, index) => el("span", {}, swatch(index), run.name))) : null;
  return el("div", {}, legend, el("div", { class: "bar" }, el("label", { class: "row" }, "Smoothing, centred mean", choice),
    el("span", { class: "small faint" }, "Point at a chart, or focus it and use the arrow keys: the cursor is the same in all of them.")));
}

/** All other metrics, drawn when they are asked for. */
function more(names) {
  const grid = el("div", { class: "charts" });
  const box = el("details", { class: "more" }, el("summary", {}, `${plural(names.length, "more metric")}`), grid);
  box.addEventListener("toggle", () => {
    if (!box.open || grid.children.length) return;
    for (const name of names) {
      const lines = linesOf({ lines: [[name, name]] });
      if (lines.length) grid.append(new LineChart({ title: name, unit: "value" }, lines.map(line => ({ ...line, name: SEVERAL ? line.name : "value" }))).figure);
    }
  });
  return box;
}
