// What everything else stands on: the data, elements, numbers, bytes.

const DATA = JSON.parse(document.getElementById("data").textContent);
const RUNS = DATA.runs;
const SEVERAL = RUNS.length > 1;
const COLOURS = 8;

/** An element. Text goes in as text nodes, so nothing in the data is ever read as HTML. */
const el = (tag, attributes = {}, ...children) => build(document.createElement(tag), attributes, children);
const svg = (tag, attributes = {}, ...children) =>
  build(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);
function build(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else node.setAttribute(name, value === true ? "" : value);
  }
  for (const child of children.flat()) if (child !== null && child !== undefined) node.append(child);
  return node;
}
const at = id => document.getElementById(id);
const known = value => typeof value === "number" && Number.isFinite(value);

/** A short number: 12,345 · 1.23M · 0.0412 · 9.0e−8. */
function number(value, digits = 3) {
  if (!known(value)) return "–";
  const size = Math.abs(value);
  if (size === 0) return "0";
  if (size >= 1e6) {
    const [scale, letter] = size >= 1e12 ? [1e12, "T"] : size >= 1e9 ? [1e9, "G"] : [1e6, "M"];
    return `${Number((value / scale).toPrecision(digits))}${letter}`.replace("-", "−");
  }
  if (size < 1e-3) return value.toExponential(1).replace(/-/g, "−").replace("+", "");
  if (Number.isInteger(value) || size >= 1000) return Math.round(value).toLocaleString("en-US").replace("-", "−");
  return String(Number(value.toPrecision(digits))).replace("-", "−");
}
/** A number with its sign. */
const signed = value => (known(value) && value > 0 ? `+${number(value)}` : number(value));
const percent = share => (share > 0 && share < 0.0005 ? "< 0.1 %" : `${share >= 0.0995 || share === 0 ? Math.round(share * 100) : (share * 100).toFixed(1)} %`);
function seconds(value) {
  if (!known(value)) return "–";
  if (value < 60) return `${number(value, value < 10 ? 2 : 3)} s`;
  const whole = Math.round(value);
  if (whole < 3600) return `${Math.floor(whole / 60)} min ${whole % 60} s`;
  return `${Math.floor(whole / 3600)} h ${Math.floor((whole % 3600) / 60)} min`;
}
const plural = (count, word) => `${count.toLocaleString("en-US")} ${word}${count === 1 ? "" : "s"}`;

function bytesOf(text) {
  const raw = atob(text);
  const bytes = new Uint8Array(raw.length);
  for (let i = 0; i < raw.length; i++) bytes[i] = raw.charCodeAt(i);
  return bytes;
}
/** Little-endian arrays in base64. */
function array(text, width) {
  const view = new DataView(bytesOf(text).buffer);
  const read = { f4: i => view.getFloat32(i, true), u2: i => view.getUint16(i, true), u4: i => view.getUint32(i, true) }[width];
  const size = width === "u2" ? 2 : 4;
  return Array.from({ length: view.byteLength / size }, (_, index) => read(index * size));
}

/** Characters that would be invisible, or would steer the text around them, as marks. */
const HIDDEN = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u00ad\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb]|[\ud800-\udbff](?![\udc00-\udfff])|(?<![\ud800-\udbff])[\udc00-\udfff]|\n|\t/g;
function visible(text) {
  const nodes = [];
  let last = 0;
  for (const found of text.matchAll(HIDDEN)) {
    if (found.index > last) nodes.push(text.slice(last, found.index));
    const code = found[0].charCodeAt(0);
    const shown = code === 10 ? "⏎" : code === 9 ? "⇥" : `⟨U+${code.toString(16).toUpperCase().padStart(4, "0")}⟩`;
    nodes.push(el("i", { class: "mark" }, shown));
    if (code === 10 || code === 9) nodes.push(found[0]);
    last = found.index + 1;
  }
  if (last < text.length) nodes.push(text.slice(last));
  return nodes;
}

const colour = index => `k${index % COLOURS}`;
const swatch = index => el("span", { class: `swatch ${colour(index)}`, "aria-hidden": "true" });
const axisName = () => (RUNS.every(run => run.updates === 1) ? "step" : "batch");
