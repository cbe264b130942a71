// What became of the episodes: trained, dropped, excluded, and why.

const FATES = [["trained", 2], ["dropped", 1], ["excluded", 4], ["kept", 0]];

function showFates() {
  const section = at("fates");
  const told = RUNS.filter(run => run.fates && run.fates.steps.length);
  if (!told.length) {
    section.append(el("p", { class: "empty" }, "The log holds no step at which an episode was trained or left out."));
    showEvents(section);
    return;
  }
  section.append(el("p", { class: "small faint" },
    "Trained: at least one token was in the loss. Dropped: valid, in its group's statistics, but kept out of the loss. Excluded: its outcome does not count (a failure is never a reward of 0)."));
  const grid = el("div", { class: "charts half" });
  for (const run of told) {
    const { steps, counts, masked } = run.fates;
    const suffix = SEVERAL ? `, ${run.name}` : "";
    const layers = FATES.filter(([name]) => counts[name].some(value => value)).map(([name, index]) => ({ name, index, steps, values: counts[name] }));
    grid.append(new StackChart({ title: `Episodes a step${suffix}`, unit: "episodes", zero: true, wide: !SEVERAL && !masked.some(Boolean) }, layers).figure);
    if (masked.some(Boolean)) grid.append(new StackChart({ title: `Tokens masked as stale${suffix}`, unit: "tokens", zero: true }, [{ name: "masked", index: 3, steps, values: masked }]).figure);
  }
  section.append(grid);
  for (const run of told) section.append(reasonsOf(run));
  showEvents(section);
}

function reasonsOf(run) {
  const title = el("h3", {}, SEVERAL ? `Why not trained, ${run.name}` : "Why not trained");
  if (!run.reasons.length) return el("div", {}, el("p", {}), title, el("p", { class: "empty" }, "Every episode that was decided was trained."));
  const rows = run.reasons.map(row => {
    const shown = run.episodes && run.episodes.episodes.some(one => one.id === row.example);
    const example = shown ? el("button", { type: "button", class: "link", onclick: () => openEpisode(RUNS.indexOf(run), row.example) }, row.example) : row.example;
    const steps = row.first === null ? "–" : row.first === row.last ? number(row.first) : `${number(row.first)} – ${number(row.last)}`;
    return el("tr", {}, el("td", {}, row.kind), el("td", {}, visible(row.reason), row.text !== row.reason ? el("div", { class: "faint small" }, "e.g. ", visible(row.text.slice(0, 300))) : ""),
      el("td", { class: "num", "data-label": "episodes" }, number(row.count)), el("td", { class: "num", "data-label": `${axisName()}s` }, steps), el("td", { "data-label": "example" }, example));
  });
  const head = ["fate", "reason", "episodes", `${axisName()}s`, "example"].map((name, index) => el("th", { scope: "col", class: index === 2 || index === 3 ? "num" : null }, name));
  const left = run.reasons_left_out ? el("p", { class: "small faint" }, `${plural(run.reasons_left_out, "rarer reason")} left out.`) : null;
  return el("div", {}, el("p", {}), title, el("div", { class: "scroll" }, el("table", { class: "stack" }, el("thead", {}, el("tr", {}, head)), el("tbody", {}, rows))), left);
}

function showEvents(section) {
  const rows = RUNS.flatMap((run, index) => run.events.map(event => el("tr", {}, SEVERAL ? el("td", {}, swatch(index), run.name) : null,
    el("td", { class: "num", "data-label": axisName() }, number(event.step)), el("td", {}, new Date(event.at * 1000).toISOString().slice(0, 19).replace("T", " ")),
    el("td", {}, event.kind), el("td", {}, visible(event.text)))));
  if (!rows.length) return;
  const head = [...(SEVERAL ? ["run"] : []), axisName(), "time, UTC", "event", "what"].map(name => el("th", { scope: "col", class: name === axisName() ? "num" : null }, name));
  section.append(el("p", {}), el("h3", {}, "Resumes and faults"), el("div", { class: "scroll" }, el("table", { class: "stack" }, el("thead", {}, el("tr", {}, head)), el("tbody", {}, rows))));
}
