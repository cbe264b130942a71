// An episode's tokens: unpacked, spelled, drawn, and told about one by one.

const PAGE = 2000; // tokens drawn at once

/** Segments of an episode as lists of tokens: {place, text, sampled, lp, version, adv, state, turn, segment, position, t}. */
function unpack(run, episode) {
  if (episode.unpacked) return episode.unpacked;
  const fate = episode.fate;
  const advantages = fate && typeof fate.adv === "string" ? array(fate.adv, "f4") : null;
  let sampledSoFar = 0;
  episode.unpacked = episode.segments.map((segment, which) => {
    const places = array(segment.ids.slice(1), segment.ids[0] === "H" ? "u2" : "u4");
    const logprobs = segment.lp ? array(segment.lp, "f4") : [];
    const start = segment.fork ? segment.fork[1] : 0;
    const tokens = [];
    let used = 0;
    segment.turns.forEach((turn, number) => {
      for (let i = 0; i < turn.n; i++) {
        const token = { place: places[tokens.length], segment: which, turn: number, position: start + tokens.length, sampled: Boolean(turn.v) };
        if (turn.v) {
          token.lp = logprobs[used++];
          token.version = turn.v.find(([from, to]) => i >= from && i < to)?.[2];
          token.t = turn.t;
          token.adv = advantages ? advantages[sampledSoFar] : fate ? fate.adv : undefined;
          token.state = stateOf(fate, token.version);
          sampledSoFar++;
        } else token.state = "observed";
        tokens.push(token);
      }
    });
    spell(run, tokens);
    return tokens;
  });
  return episode.unpacked;
}

function stateOf(fate, version) {
  if (!fate) return "not in training";
  if (fate.kind !== "trained") return fate.kind;
  if (fate.masked === null) return "trained, or masked as stale";
  return fate.masked && fate.masked.includes(version) ? "masked as stale" : "trained";
}

/** A character that is spread over tokens stands at its last one; the others show their bytes. */
function spell(run, tokens) {
  const { ids, texts, hex, special } = run.episodes.tokens;
  const specials = new Set(special);
  let decoder = null;
  for (const token of tokens) {
    token.id = ids[token.place];
    token.special = specials.has(token.place);
    const text = texts[token.place];
    const bytes = hex[token.place];
    if (bytes !== undefined) {
      decoder = decoder || new TextDecoder("utf-8");
      const whole = decoder.decode(Uint8Array.from(bytes.match(/../g) || [], pair => parseInt(pair, 16)), { stream: true });
      token.bytes = bytes;
      token.text = /^\ufffd*$/.test(whole) ? null : whole;
    } else {
      decoder = null;
      token.text = text;
    }
  }
}

function spelled(token) {
  if (token.text !== null && token.text !== undefined) return visible(token.text);
  if (token.bytes) return [el("i", { class: "mark" }, `‹${token.bytes.match(/../g).join(" ")}›`)];
  return [el("i", { class: "mark" }, `⟨${token.id}⟩`)];
}

const LOGPROBS = [-0.1, -0.5, -1.2, -2.5, -5];
/** Classes by which the style colours a token, for every way of colouring. */
function classesOf(token, scale) {
  if (!token.sampled) return "tk o";
  const names = ["tk", "s"];
  const level = LOGPROBS.findIndex(limit => token.lp > limit);
  names.push(`l${level < 0 ? 5 : level}`);
  if (known(token.adv) && token.adv !== 0) names.push(`${token.adv > 0 ? "p" : "n"}${Math.min(3, Math.ceil((Math.abs(token.adv) / scale.adv) * 3))}`);
  names.push(`v${scale.versions.indexOf(token.version) % 4}`);
  names.push(token.state === "trained" ? "trained" : "untrained");
  if (token.state === "masked as stale") names.push("stale");
  if (token.special) names.push("special");
  return names.join(" ");
}

function scaleOf(all) {
  const sampled = all.flat().filter(token => token.sampled);
  return { adv: sampled.reduce((most, token) => Math.max(most, Math.abs(token.adv || 0)), 0) || 1,
    versions: [...new Set(sampled.map(token => token.version))].sort((a, b) => parseFloat(a) - parseFloat(b)) };
}

/** What is said of one token. */
function told(token) {
  const rows = [["token", token.special ? "special" : null, spelled(token)], ["id", token.id], ["position", token.position]];
  if (token.sampled) {
    rows.push(["log-prob", `${number(token.lp, 4)}`], ["p", number(Math.exp(token.lp))], ["version", token.version], ["temperature", number(token.t)],
      ["advantage", known(token.adv) ? signed(token.adv) : token.state === "not in training" ? "none" : "not recorded"], ["weight", token.state === "trained" ? "1" : `0: ${token.state}`], ["author", "sampled"]);
  } else rows.push(["weight", "0"], ["author", "observed"]);
  rows.push(["turn", token.turn + 1]);
  if (token.segment) rows.push(["segment", token.segment + 1]);
  return rows;
}

function readoutOf(token) {
  return told(token).map(([name, value, nodes]) => el("span", {}, `${name} `, el("b", {}, nodes || value), nodes && value ? ` ${value}` : ""));
}

/** Draws tokens into `box`, a page at a time. `unlike` marks the ones that the other side lacks. */
function drawTokens(box, tokens, scale, register, unlike) {
  const draw = from => {
    const part = document.createDocumentFragment();
    const to = Math.min(tokens.length, from + PAGE);
    for (let i = from; i < to; i++) {
      const node = el("span", { class: `${classesOf(tokens[i], scale)}${unlike && unlike.has(tokens[i]) ? " only" : ""}`, tabindex: -1 }, spelled(tokens[i]));
      register(node, tokens[i]);
      part.append(node);
    }
    if (to < tokens.length) {
      const next = el("button", { type: "button", onclick: () => { next.remove(); draw(to); } }, `Show ${(Math.min(PAGE, tokens.length - to)).toLocaleString("en-US")} of ${(tokens.length - to).toLocaleString("en-US")} more tokens`);
      part.append(next);
    }
    box.append(part);
  };
  draw(0);
}
