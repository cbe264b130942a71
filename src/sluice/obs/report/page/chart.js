// Charts: lines and stacked bars in SVG. A cursor is shared by all of them.

const MARGIN = { left: 56, right: 12, top: 20, bottom: 40 };
const HEIGHT = 216;
const charts = [];
let cursorStep = null;
let smoothing = 1;

function setCursor(step) {
  cursorStep = step;
  for (const chart of charts) chart.point();
}
function redraw() {
  for (const chart of charts) chart.draw();
}

/** Round tick values between low and high. */
function ticks(low, high, count, whole = false) {
  const span = high - low || 1;
  const power = 10 ** Math.floor(Math.log10(span / count));
  let step = power * [1, 2, 5, 10].find(factor => span / (power * factor) <= count);
  if (whole) step = Math.max(1, Math.round(step));
  const values = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) values.push(Number((i * step).toPrecision(12)));
  return values;
}
function logTicks(low, high) {
  const values = [];
  for (let power = Math.ceil(low - 1e-9); power <= high + 1e-9; power++) values.push(power);
  return values.filter((_, index) => index % Math.ceil(values.length / 5) === 0);
}

/** Mean over a window that is centred, and cut at the ends. */
function smooth(values, window) {
  if (window <= 1) return values;
  const half = Math.floor(window / 2);
  return values.map((value, index) => {
    if (!known(value)) return null;
    const near = values.slice(Math.max(0, index - half), index + half + 1).filter(known);
    return near.reduce((sum, each) => sum + each, 0) / near.length;
  });
}

function nearest(steps, step) {
  let low = 0;
  let high = steps.length - 1;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (steps[middle] <= step) low = middle;
    else high = middle;
  }
  return Math.abs(steps[low] - step) <= Math.abs(steps[high] - step) ? low : high;
}

/** What both kinds share: the frame, the scales, the cursor, the legend with values. */
class Chart {
  /** `series`: {name, index, dashed, steps, values, markers}; `spec`: {title, unit, log, zero, wide}. */
  constructor(spec, series) {
    this.spec = spec;
    this.series = series;
    this.legend = el("div", { class: "legend" });
    this.node = svg("svg", { role: "img", "aria-label": this.described(), height: HEIGHT });
    this.figure = el("figure", { class: `chart${spec.wide ? " wide" : ""}`, tabindex: 0, "aria-label": `${spec.title}. Arrow keys move the cursor.`,
      onkeydown: event => this.key(event), onblur: () => setCursor(null) },
      el("figcaption", {}, el("h3", {}, spec.title)), this.legend, this.node);
    this.node.addEventListener("pointermove", event => this.hover(event));
    this.node.addEventListener("pointerdown", event => this.hover(event));
    this.node.addEventListener("pointerleave", () => setCursor(null));
    this.steps = [...new Set(series.flatMap(one => one.steps))].sort((a, b) => a - b);
    this.width = 0;
    charts.push(this);
    new ResizeObserver(() => {
      const width = Math.round(this.figure.clientWidth - 28);
      if (width > 0 && width !== this.width) {
        this.width = width;
        this.draw();
      }
    }).observe(this.figure);
    this.point();
  }

  described() {
    const told = this.series.map(one => {
      const values = one.values.filter(known);
      return values.length ? `${one.name}${one.dashed ? ` ${one.label}` : ""}: ${number(values[0])} to ${number(values[values.length - 1])}` : one.name;
    });
    return `${this.spec.title}, ${this.spec.unit}, by ${axisName()}. ${told.join("; ")}`;
  }

  x(step) {
    const [low, high] = [this.steps[0], this.steps[this.steps.length - 1]];
    const inner = this.width - MARGIN.left - MARGIN.right;
    const pad = this.bar ? this.bar / 2 : 0;
    return MARGIN.left + pad + (high === low ? 0.5 : (step - low) / (high - low)) * (inner - 2 * pad);
  }

  y(value) {
    const scaled = this.spec.log ? Math.log10(value) : value;
    return HEIGHT - MARGIN.bottom - ((scaled - this.low) / (this.high - this.low)) * (HEIGHT - MARGIN.top - MARGIN.bottom);
  }

  range(values) {
    let low = Infinity;
    let high = -Infinity;
    for (const value of values) {
      if (!known(value) || (this.spec.log && value <= 0)) continue;
      const scaled = this.spec.log ? Math.log10(value) : value;
      low = Math.min(low, scaled);
      high = Math.max(high, scaled);
    }
    if (low > high) [low, high] = [0, 1];
    if (this.spec.log) return [Math.floor(low), Math.max(Math.ceil(high), Math.floor(low) + 1)];
    if (low > 0 && (this.spec.zero || low < 0.4 * high)) low = 0;
    if (high < 0 && high > 0.4 * low) high = 0;
    if (low === high) [low, high] = low === 0 ? [0, 1] : [Math.min(0, low * 1.2), Math.max(0, high * 1.2)];
    const marks = ticks(low, high, 4);
    const step = marks.length > 1 ? marks[1] - marks[0] : high - low;
    return [Math.floor(low / step + 1e-9) * step, Math.ceil(high / step - 1e-9) * step];
  }

  frame() {
    const { width } = this;
    const right = width - MARGIN.right;
    const marks = this.spec.log ? logTicks(this.low, this.high) : ticks(this.low, this.high, 4);
    const parts = marks.map(mark => {
      const value = this.spec.log ? 10 ** mark : mark;
      const y = this.y(value);
      const label = this.spec.log ? `1e${mark}`.replace("-", "−") : number(value);
      return [svg("line", { class: "grid", x1: MARGIN.left, x2: right, y1: y, y2: y }),
        svg("text", { x: MARGIN.left - 7, y: y + 4, "text-anchor": "end" }, label)];
    });
    const base = HEIGHT - MARGIN.bottom;
    parts.push(svg("line", { class: "axis", x1: MARGIN.left, x2: right, y1: base, y2: base }));
    const [first, last] = [this.steps[0], this.steps[this.steps.length - 1]];
    for (const step of ticks(first, last, Math.max(2, Math.floor(width / 75)), true)) {
      if (step < first || step > last) continue;
      parts.push(svg("text", { x: this.x(step), y: base + 16, "text-anchor": "middle" }, number(step)));
    }
    parts.push(svg("text", { x: right, y: base + 31, "text-anchor": "end" }, axisName()));
    parts.push(svg("text", { x: 0, y: 11 }, this.spec.unit + (this.spec.log ? ", log scale" : "")));
    return parts.flat();
  }

  draw() {
    if (!this.width || !this.steps.length) return;
    this.node.setAttribute("viewBox", `0 0 ${this.width} ${HEIGHT}`);
    this.prepare();
    this.cursor = svg("g");
    this.node.replaceChildren(...this.frame(), ...this.shapes(), this.cursor);
    this.point();
  }

  hover(event) {
    const box = this.node.getBoundingClientRect();
    const inner = box.width - MARGIN.left - MARGIN.right;
    const share = (event.clientX - box.left - MARGIN.left) / inner;
    const [low, high] = [this.steps[0], this.steps[this.steps.length - 1]];
    setCursor(this.steps[nearest(this.steps, low + share * (high - low))]);
  }

  key(event) {
    const last = this.steps.length - 1;
    const here = cursorStep === null ? last : nearest(this.steps, cursorStep);
    const to = { ArrowLeft: here - (cursorStep === null ? 0 : 1), ArrowRight: here + 1, Home: 0, End: last }[event.key];
    if (event.key === "Escape") setCursor(null);
    if (to === undefined) return;
    event.preventDefault();
    setCursor(this.steps[Math.max(0, Math.min(last, to))]);
  }

  /** The index of a series' value at the cursor; its last value without one. */
  place(one) {
    if (cursorStep !== null) {
      const index = nearest(one.steps, cursorStep);
      return one.steps[index] === cursorStep || one.markers ? index : -1;
    }
    for (let index = one.values.length - 1; index >= 0; index--) if (known(one.values[index])) return index;
    return -1;
  }

  point() {
    const value = one => {
      const index = this.place(one);
      return index < 0 ? "–" : number(one.values[index]);
    };
    const shown = this.series.filter(one => !one.dashed).map(one => {
      const second = this.series.find(other => other.dashed && other.index === one.index);
      return el("span", {}, el("i", { class: `key ${this.box ? "box" : "stroke"} ${colour(one.index)}` }), `${one.name} `,
        el("b", {}, value(one)), second ? [" ┄ ", el("b", {}, value(second))] : []);
    });
    const second = this.series.find(one => one.dashed);
    const first = second && this.series.find(one => !one.dashed && one.index === second.index);
    const names = first ? el("span", {}, `${first.label}, dashed ${second.label}`) : "";
    const where = cursorStep === null || !this.steps.length ? "" : el("span", {}, `${axisName()} ${cursorStep.toLocaleString("en-US")}`);
    this.legend.replaceChildren(...shown, names, where);
    if (!this.cursor) return;
    if (cursorStep === null || cursorStep < this.steps[0] || cursorStep > this.steps[this.steps.length - 1]) {
      this.cursor.replaceChildren();
      return;
    }
    const x = this.x(cursorStep);
    this.cursor.replaceChildren(svg("line", { class: "cursor", x1: x, x2: x, y1: MARGIN.top, y2: HEIGHT - MARGIN.bottom }), ...this.dots());
  }

  dots() {
    return [];
  }
}

class LineChart extends Chart {
  prepare() {
    this.drawn = this.series.map(one => (one.markers ? one.values : smooth(one.values, smoothing)));
    [this.low, this.high] = this.range(this.series.flatMap(one => one.values));
  }

  shapes() {
    return this.series.flatMap((one, index) => {
      const raw = one.markers || smoothing <= 1 ? null
        : svg("path", { class: `stroke ${colour(one.index)}`, d: this.path(one, one.values), "stroke-width": 1, opacity: 0.3 });
      const line = svg("path", { class: `stroke ${colour(one.index)}`, d: this.path(one, this.drawn[index]), "stroke-width": 1.8,
        "stroke-dasharray": one.dashed ? "5 4" : null, "stroke-linejoin": "round" });
      const alone = one.markers || one.values.filter(known).length === 1;
      const marks = !alone ? [] : one.values.map((value, i) => (this.fits(value)
        ? svg("circle", { class: `fill ${colour(one.index)}`, cx: this.x(one.steps[i]), cy: this.y(value), r: 3 }) : null));
      return [raw, line, ...marks].filter(Boolean);
    });
  }

  fits(value) {
    return known(value) && (!this.spec.log || value > 0);
  }

  path(one, values) {
    let broken = true;
    let path = "";
    values.forEach((value, index) => {
      if (!this.fits(value)) {
        broken = !one.markers;
        return;
      }
      path += `${broken || !path ? "M" : "L"}${this.x(one.steps[index]).toFixed(1)} ${this.y(value).toFixed(1)}`;
      broken = false;
    });
    return path || null;
  }

  dots() {
    return this.series.map(one => {
      const index = this.place(one);
      if (index < 0 || !this.fits(one.values[index])) return null;
      return svg("circle", { class: `fill ${colour(one.index)}`, cx: this.x(one.steps[index]), cy: this.y(one.values[index]), r: 3.5 });
    }).filter(Boolean);
  }
}

/** Stacked bars; every series has the same steps. */
class StackChart extends Chart {
  get box() {
    return true;
  }

  prepare() {
    const inner = this.width - MARGIN.left - MARGIN.right;
    this.bar = Math.min(inner / this.steps.length, 90);
    const sums = this.steps.map((_, index) => this.series.reduce((sum, one) => sum + (one.values[index] || 0), 0));
    [this.low, this.high] = this.range([0, ...sums]);
  }

  shapes() {
    const gap = this.bar > 5 ? 1 : 0;
    const base = this.steps.map(() => 0);
    return this.series.map(one => {
      let path = "";
      one.values.forEach((value, index) => {
        if (!value) return;
        const top = this.y(base[index] + value);
        const bottom = this.y(base[index]);
        base[index] += value;
        const left = this.x(this.steps[index]) - this.bar / 2 + gap / 2;
        path += `M${left.toFixed(2)} ${top.toFixed(2)}h${(this.bar - gap).toFixed(2)}V${bottom.toFixed(2)}h${(gap - this.bar).toFixed(2)}z`;
      });
      return svg("path", { class: `fill ${colour(one.index)}`, d: path || null });
    });
  }
}
