// The episode browser: choose a step, a prompt, an episode; or two of them side by side.

const MODES = [["author", "author"], ["logprob", "log-prob"], ["advantage", "advantage"], ["version", "version"], ["weight", "trained or not"], ["nothing", "nothing"]];
const view = { run: 0, chapter: 0, unit: 0, left: 0, other: "", right: 0, mode: "author" };
const registered = new WeakMap();
let browser = null;

const withEpisodes = () => RUNS.map((run, index) => [run, index]).filter(([run]) => run.episodes && run.episodes.chapters.length);
const chapterName = chapter => ({ eval: `held out, ${axisName()} ${chapter.step}`, train: `training, ${axisName()} ${chapter.step}`, reason: "not trained, an example of every reason" })[chapter.kind];

/** Units of a chapter: the episodes of one prompt (evaluations) or group. */
function unitsOf(run, chapter) {
  if (chapter.units) return chapter.units;
  const units = new Map();
  for (const place of chapter.episodes) {
    const episode = run.episodes.episodes[place];
    const key = chapter.kind === "eval" ? `p${episode.prompt}` : chapter.kind === "reason" ? episode.id : episode.group;
    if (!units.has(key)) units.set(key, []);
    units.get(key).push(episode);
  }
  chapter.units = [...units.values()];
  return chapter.units;
}

const promptOf = (run, episode) => run.episodes.prompts[episode.prompt];
const question = (run, episode) => promptOf(run, episode).question;
const promptKey = (run, episode) => `${promptOf(run, episode).id}\n${question(run, episode)}`;
const short = (text, length) => { const line = text.replace(/\s+/g, " ").trim(); return line.length > length ? `${line.slice(0, length - 1)}…` : line; };

function unitName(run, chapter, unit) {
  const first = unit[0];
  const name = chapter.kind === "train" ? first.group : chapter.kind === "reason" ? `${first.id}, ${short(first.fate ? first.fate.reason : first.reason, 40)}` : promptOf(run, first).id;
  return chapter.kind === "eval" ? `${short(question(run, first), 60)} (${short(name, 28)})` : `${name} — ${short(question(run, first), 48)}`;
}

function rewardClass(episode) {
  if (!known(episode.reward)) return "none";
  return episode.reward > 0 ? "right" : "wrong";
}

function chips(run, unit, chosen, choose) {
  return el("div", { class: "chips", role: "group", "aria-label": "Episodes" }, el("span", { class: "small faint" }, "reward of episode"), unit.map((episode, index) => {
    const greedy = episode.group.startsWith("greedy-") ? "greedy " : "";
    const label = known(episode.reward) ? number(episode.reward) : episode.outcome;
    return el("button", { type: "button", class: rewardClass(episode), "aria-pressed": String(index === chosen), title: episode.id, onclick: () => choose(index) },
      `${greedy}#${index + 1}: ${label}`);
  }));
}

function metaOf(episode) {
  const rows = [["reward", known(episode.reward) ? number(episode.reward) : "none"], ["outcome", episode.outcome + (episode.reason ? ` (${episode.reason})` : "")]];
  for (const [name, [value, weight]] of Object.entries(episode.components || {})) rows.push([name, weight === 1 ? number(value) : `${number(value)} × ${number(weight)}`]);
  const fate = episode.fate;
  if (fate) {
    rows.push(["fate", fate.kind + (fate.step !== null ? ` at step ${fate.step}` : "") + (fate.reason ? `: ${fate.reason}` : "")]);
    if (known(fate.adv)) rows.push(["advantage", signed(fate.adv)]);
    else if (fate.kind === "trained") rows.push(["advantage", typeof fate.adv === "string" ? "differs by token" : "not recorded"]);
  } else rows.push(["fate", episode.group.includes("-") ? "evaluation, never trained" : "not decided yet"]);
  rows.push(["policy", episode.policy], ...episode.info);
  return el("div", { class: "meta" }, rows.map(([name, value]) => el("span", {}, `${name} `, el("b", {}, visible(String(value))))));
}

function turnBox(run, episode, segment, number, tokens, scale, register, marks) {
  const turn = segment.turns[number];
  const mine = tokens.filter(token => token.turn === number);
  const about = turn.v ? `sampled · ${plural(turn.n, "token")} · version ${[...new Set(turn.v.map(span => span[2]))].join(", ")}${turn.finish ? ` · ended by ${turn.finish}` : ""}` : `observed · ${plural(turn.n, "token")}`;
  const box = el("div", { class: "text", dir: "auto" });
  drawTokens(box, mine, scale, register, marks);
  return el("div", { class: `turn ${turn.v ? "sampled" : "observed"}` }, el("div", { class: "who" }, about), box);
}

function segmentBox(run, episode, which, scale, register, marks) {
  const segment = episode.segments[which];
  const all = unpack(run, episode);
  const node = el("div", { class: "segment" });
  if (episode.segments.length > 1 || segment.fork) {
    const [parent, position, reason] = segment.fork || [];
    node.append(el("p", { class: "what" }, `Segment ${which + 1}${segment.fork ? `, forks from segment ${parent + 1} at token ${position} (${reason}); the ${position} tokens before are context, trained there` : ""}`));
    if (segment.fork && position) node.append(shared(run, episode, parent, position, register));
  }
  segment.turns.forEach((_, number) => node.append(turnBox(run, episode, segment, number, all[which], scale, register, marks)));
  return node;
}

/** The tokens that a fork shares with its parent, shown when asked for. */
function shared(run, episode, parent, position, register) {
  const box = el("div", { class: "text by-nothing", dir: "auto" });
  const node = el("details", {}, el("summary", {}, `${plural(position, "shared token")}`), box);
  node.addEventListener("toggle", () => {
    if (!node.open || box.children.length) return;
    const context = whole(run, episode, parent).slice(0, position).map(token => ({ ...token, state: "context of this segment" }));
    drawTokens(box, context, scaleOf([context]), register);
  });
  return node;
}
function whole(run, episode, which) {
  const fork = episode.segments[which].fork;
  const own = unpack(run, episode)[which];
  return fork ? [...whole(run, episode, fork[0]).slice(0, fork[1]), ...own] : own;
}

// ── the token that is looked at ──

function pick(node) {
  const token = registered.get(node);
  if (!token) return;
  for (const other of browser.querySelectorAll(".tk.on")) other.classList.remove("on");
  node.classList.add("on");
  browser.querySelector(".readout").replaceChildren(...readoutOf(token));
}

function move(event) {
  const here = event.target.closest(".tk");
  if (!here || !registered.has(here)) return;
  const all = [...here.closest(".pane").querySelectorAll(".tk")].filter(node => registered.has(node));
  const index = all.indexOf(here);
  let to = { ArrowLeft: index - 1, ArrowRight: index + 1, Home: 0, End: all.length - 1 }[event.key];
  if (event.key === "ArrowUp" || event.key === "ArrowDown") to = lineAway(all, index, event.key === "ArrowUp" ? -1 : 1);
  if (to === undefined) return;
  event.preventDefault();
  const next = all[Math.max(0, Math.min(all.length - 1, to))];
  here.tabIndex = -1;
  next.tabIndex = 0;
  next.focus();
}

/** The token above or below: the nearest one on the next line. */
function lineAway(all, index, direction) {
  const from = all[index].getBoundingClientRect();
  let line = null;
  let best = index;
  let distance = Infinity;
  for (let i = index + direction; i >= 0 && i < all.length; i += direction) {
    const box = all[i].getBoundingClientRect();
    if (Math.abs(box.top - from.top) < 4) continue;
    if (line !== null && Math.abs(box.top - line) > 4) break;
    line = box.top;
    if (Math.abs(box.left - from.left) < distance) [best, distance] = [i, Math.abs(box.left - from.left)];
  }
  return best;
}

// ── choosing ──

const select = (label, options, value, choose) => el("label", {}, label, el("select", { onchange: event => choose(event.target.value) },
  options.map(([key, name, group]) => el("option", { value: key, selected: String(key) === String(value) }, name))));

/** What the shown prompt can be compared with: other chapters, of any run, that have an episode of it. */
function others(run, unit) {
  const key = promptKey(run, unit[0]);
  return withEpisodes().flatMap(([other, which]) => other.episodes.chapters.map((chapter, place) => {
    if (other === run && place === view.chapter) return null;
    const found = unitsOf(other, chapter).find(one => promptKey(other, one[0]) === key);
    return found ? { key: `${which}.${place}`, name: `${SEVERAL ? `${other.name}, ` : ""}${chapterName(chapter)}`, run: other, unit: found } : null;
  })).filter(Boolean);
}

function openEpisode(run, id) {
  const { chapters, episodes } = RUNS[run].episodes;
  const chapter = chapters.findIndex(one => one.episodes.some(place => episodes[place].id === id));
  if (chapter < 0) return;
  const unit = unitsOf(RUNS[run], chapters[chapter]).findIndex(one => one.some(episode => episode.id === id));
  Object.assign(view, { run, chapter, unit, other: "", left: unitsOf(RUNS[run], chapters[chapter])[unit].findIndex(episode => episode.id === id) });
  showBrowser();
  at("episodes").scrollIntoView();
}

const set = changes => { Object.assign(view, changes); showBrowser(); };

function legendOf(mode, scale) {
  const sample = (names, text) => el("span", { class: `tk s ${names}` }, text);
  if (mode === "logprob") return [sample("l0", "> −0.1"), sample("l1", "> −0.5"), sample("l2", "> −1.2"), sample("l3", "> −2.5"), sample("l4", "> −5"), sample("l5", "less"), "nats"];
  if (mode === "advantage") return [sample("n3", `−${number(scale.adv)}`), sample("n1", "negative"), sample("", "0"), sample("p1", "positive"), sample("p3", `+${number(scale.adv)}`)];
  if (mode === "version") return scale.versions.slice(0, 8).map((version, index) => sample(`v${index % 4}`, version));
  if (mode === "weight") return [sample("trained", "in the loss"), sample("untrained", "not in the loss")];
  if (mode === "author") return [sample("", "sampled by the model"), el("span", { class: "tk o" }, "observed")];
  return [];
}

function pane(run, episode, unit, chosen, choose, marks, title) {
  const scale = scaleOf(unpack(run, episode));
  const node = el("div", { class: "pane" });
  let first = true;
  const register = (token, data) => {
    registered.set(token, data);
    if (first) token.tabIndex = 0;
    first = false;
  };
  node.append(title ? el("h3", {}, title) : "", chips(run, unit, chosen, choose), metaOf(episode));
  const answer = promptOf(run, episode).answer;
  if (answer) node.append(el("p", { class: "ground" }, el("span", { class: "faint" }, "ground truth "), visible(answer)));
  episode.segments.forEach((_, which) => node.append(segmentBox(run, episode, which, scale, register, marks)));
  if (!episode.segments.some(segment => segment.turns.length)) node.append(el("p", { class: "empty" }, "This episode has no tokens."));
  return [node, scale];
}

function showBrowser() {
  const run = RUNS[view.run];
  const chapter = run.episodes.chapters[view.chapter];
  const units = unitsOf(run, chapter);
  const unit = units[Math.min(view.unit, units.length - 1)];
  const left = Math.min(view.left, unit.length - 1);
  const options = others(run, unit);
  const other = options.find(one => one.key === view.other);
  const right = other ? Math.min(view.right, other.unit.length - 1) : 0;
  let marks = [null, null];
  if (other) marks = unlike(unpack(run, unit[left]).flat().filter(token => token.sampled), unpack(other.run, other.unit[right]).flat().filter(token => token.sampled));
  const [first, scale] = pane(run, unit[left], unit, left, index => set({ left: index }), marks[0], other ? `${SEVERAL ? `${run.name}, ` : ""}${chapterName(chapter)}` : "");
  const panes = [first];
  if (other) panes.push(pane(other.run, other.unit[right], other.unit, right, index => set({ right: index }), marks[1], other.name)[0]);
  const focused = document.activeElement?.closest?.(".bar label")?.firstChild?.textContent;
  const bar = el("div", { class: "bar" },
    SEVERAL ? select("Run", withEpisodes().map(([one, index]) => [index, one.name]), view.run, value => set({ run: Number(value), ...samePlace(RUNS[value], chapter, run, unit), left: 0 })) : null,
    select("Step", run.episodes.chapters.map((one, index) => [index, chapterName(one)]), view.chapter, value => set({ chapter: Number(value), unit: sameUnit(run, run.episodes.chapters[value], run, unit), left: 0 })),
    select(chapter.kind === "train" ? "Group" : "Prompt", units.map((one, index) => [index, unitName(run, chapter, one)]), units.indexOf(unit), value => set({ unit: Number(value), left: 0, right: 0 })),
    select("Compare with", [["", options.length ? "nothing" : "nothing: this prompt is shown once"], ...options.map(one => [one.key, one.name])], other ? other.key : "", value => set({ other: value, right: 0 })),
    select("Colour by", MODES, view.mode, value => set({ mode: value })));
  const hint = other ? el("span", {}, el("span", { class: "tk only" }, "underlined"), " tokens are in one answer only") : null;
  browser.replaceChildren(bar, el("p", { class: "scale" }, legendOf(view.mode, scale), hint),
    el("div", { class: `panes${other ? " two" : ""}` }, panes),
    el("div", { class: "readout", role: "status" }, "Point at a token, tap it, or move through them with the arrow keys."));
  browser.className = `by-${view.mode}`;
  if (focused) [...browser.querySelectorAll(".bar label")].find(label => label.firstChild.textContent === focused)?.querySelector("select")?.focus();
}

/** The place in `chapter` of `other` of the prompt that `unit` of `run` answers, else the first. */
function sameUnit(other, chapter, run, unit) {
  return Math.max(0, unitsOf(other, chapter).findIndex(one => promptKey(other, one[0]) === promptKey(run, unit[0])));
}

/** The same step and prompt of another run, as far as it has them. */
function samePlace(other, chapter, run, unit) {
  const found = Math.max(0, other.episodes.chapters.findIndex(one => chapterName(one) === chapterName(chapter)));
  return { chapter: found, unit: sameUnit(other, other.episodes.chapters[found], run, unit) };
}

function leftOut(run) {
  const { episodes, total, too_large } = run.episodes;
  const share = `${episodes.length.toLocaleString("en-US")} of ${total.toLocaleString("en-US")} episodes are in this file`;
  const large = too_large ? `; ${plural(too_large, "chosen one")} did not fit` : "";
  return `${SEVERAL ? `${run.name}: ` : ""}${share}${large}.`;
}

function showEpisodes() {
  const section = at("episodes");
  const shown = withEpisodes();
  if (!shown.length) {
    section.append(el("p", { class: "empty" }, "No episode is in this file: none is decided or evaluated yet, the log cannot be read, or --episodes 0 was given."));
    return;
  }
  browser = el("div");
  section.append(el("p", { class: "small faint" }, shown.map(([run]) => leftOut(run)).join(" "), " ", el("code", {}, "sluice report RUN --steps 10,20 --episodes 500"), " chooses others; ",
    el("code", {}, "sluice episodes RUN"), " prints all."), browser);
  const [run, index] = shown[0];
  const evaluations = run.episodes.chapters.map((chapter, place) => [chapter, place]).filter(([chapter]) => chapter.kind === "eval");
  const start = evaluations.length ? evaluations[evaluations.length - 1][1] : Math.max(0, run.episodes.chapters.findIndex(chapter => chapter.kind === "train"));
  Object.assign(view, { run: index, chapter: start });
  browser.addEventListener("pointerover", event => { if (event.pointerType === "mouse") pick(event.target.closest?.(".tk")); });
  browser.addEventListener("focusin", event => pick(event.target.closest?.(".tk")));
  browser.addEventListener("click", event => { const token = event.target.closest?.(".tk"); if (token && registered.has(token)) token.focus({ preventScroll: true }); });
  browser.addEventListener("keydown", move);
  showBrowser();
}
