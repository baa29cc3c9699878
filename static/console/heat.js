// Layers over steps on a canvas: one row for each layer or block, on the axis of the loss.
import { visible } from "./messages.js";
import { gettext } from "./words.js";

const CIVIDIS = [
  "#00224e", "#0e306f", "#35456c", "#4f576c", "#666970", "#7d7c78", "#948e77", "#b0a473", "#d0bd66", "#f3dc4d",
];
// Below, like, above the layer's own past; the middle is the true middle.
const CHANGE = ["#08519c", "#3182bd", "#6baed6", "#a9b6c0", "#b4b4b4", "#bdb3a6", "#e6ab5e", "#e08214", "#b35806", "#7f3b08"];
const SHARES = ["health", "dead_fraction", "saturation", "stable_rank", "graft_grad_share"];
const MOST_BLOCKS = 300;
const LONG_PAST = 0.06; // weight of the newest value in a layer's running mean and variance
const EARLY = 5; // values before a deviation is known

export class Heat {
  constructor(parts) {
    Object.assign(this, parts);
    this.canvas = document.getElementById("heat-canvas");
    this.tip = document.getElementById("heat-tip");
    this.signal = document.getElementById("heat-signal");
    this.scale = document.getElementById("heat-by");
    this.group = document.getElementById("heat-group");
    this.filter = document.getElementById("heat-filter");
    this.data = null;
    this.rows = [];
    this.signal.addEventListener("change", () => this.read());
    for (const control of [this.scale, this.group]) control.addEventListener("change", () => this.arrange());
    this.filter.addEventListener("input", () => this.arrange());
    this.canvas.addEventListener("pointermove", (event) => this.hoverAt(event));
    this.canvas.addEventListener("pointerleave", () => { this.tip.hidden = true; this.onHover(null); });
  }

  get steps() { return this.data?.step ?? []; }

  async read() {
    const columns = Math.min(240, Math.max(60, Math.floor(this.canvas.parentElement.clientWidth / 5)));
    this.data = await this.get(`heatmap?signal=${encodeURIComponent(this.signal.value)}&columns=${columns}`);
    this.arrange();
  }

  // Rows as a person wants them: filtered, by block, as values or as deviations.
  arrange() {
    if (!this.data) return;
    const wanted = this.filter.value.trim().toLowerCase();
    let rows = this.data.layers.map((name, i) => ({ name, layers: [name], values: this.data.values[i] }));
    if (wanted) rows = rows.filter(({ name }) => name.toLowerCase().includes(wanted));
    if (this.group.value === "block") rows = byBlock(rows, this.data.signal);
    if (this.scale.value === "change") rows = rows.map((row) => ({ ...row, values: deviations(row.values) }));
    this.rows = rows;
    this.draw();
    this.describe();
  }

  get rowHeight() { return this.rows.length > 60 ? Math.max(2, Math.floor(900 / this.rows.length)) : 18; }

  range() {
    if (this.scale.value === "change") return [-3, 3];
    if (SHARES.includes(this.data.signal)) return [0, 1];
    let [low, high] = [Infinity, -Infinity];
    for (const { values } of this.rows) for (const value of values) if (value !== null) {
      if (value < low) low = value;
      if (value > high) high = value;
    }
    return low <= high ? [low, high] : [0, 1];
  }

  draw() {
    if (!this.data) return;
    const { canvas, rows, rowHeight } = this;
    const width = canvas.parentElement.clientWidth;
    const height = Math.max(24, rows.length * rowHeight);
    const ratio = devicePixelRatio;
    canvas.width = width * ratio;
    canvas.height = height * ratio;
    canvas.style.height = `${height}px`;
    const ctx = canvas.getContext("2d");
    ctx.scale(ratio, ratio);
    const axis = this.axis();
    const x = (step) => axis.left + ((step - axis.min) / (axis.max - axis.min || 1)) * axis.width;
    ctx.save();
    ctx.beginPath();
    ctx.rect(axis.left, 0, axis.width, height);
    ctx.clip();
    this.drawCells(ctx, x);
    this.drawGrafts(ctx, x);
    ctx.restore();
    this.drawLabels(ctx, axis.left);
  }

  drawCells(ctx, x) {
    const { steps, rows, rowHeight } = this;
    const palette = this.scale.value === "change" ? CHANGE : CIVIDIS;
    const [low, high] = this.range();
    const scale = palette.length / ((high - low) || 1);
    const usual = steps.length > 1 ? steps.at(-1) - steps.at(-2) : 1;
    const edges = [...steps.map(x), x((steps.at(-1) ?? 0) + usual)];
    const poor = this.data.signal === "health" && this.scale.value === "value" && rowHeight >= 8;
    ctx.lineWidth = 1;
    ctx.strokeStyle = "#ffffff99";
    rows.forEach(({ values }, row) => values.forEach((value, column) => {
      if (value === null) return; // not measured: left empty
      const [left, y, wide] = [edges[column], row * rowHeight, edges[column + 1] - edges[column]];
      ctx.fillStyle = palette[Math.max(0, Math.min(palette.length - 1, Math.floor((value - low) * scale)))];
      ctx.fillRect(left, y, wide + 0.5, rowHeight - (rowHeight > 6 ? 1 : 0));
      if (!poor || value >= 0.4) return;
      ctx.beginPath(); // hatched too, because not everybody can see the colour
      ctx.moveTo(left, y + rowHeight - 2);
      ctx.lineTo(left + Math.min(wide, rowHeight), y + 1);
      ctx.stroke();
    }));
  }

  drawGrafts(ctx, x) {
    for (const mark of this.markers()) {
      const row = this.rows.findIndex(({ layers }) => layers.includes(mark.layer));
      if (mark.kind !== "adaptation" || row < 0) continue;
      const [at, y, tall] = [x(mark.step), row * this.rowHeight, Math.max(6, this.rowHeight - 1)];
      ctx.fillStyle = "#ffffff";
      ctx.fillRect(at - 2.5, y, 5, tall);
      ctx.fillStyle = "#d00070";
      ctx.fillRect(at - 1.5, y, 3, tall);
    }
  }

  drawLabels(ctx, left) {
    ctx.fillStyle = this.css("--ink");
    ctx.font = "12px system-ui";
    ctx.textBaseline = "middle";
    ctx.textAlign = "right";
    const pace = Math.ceil(14 / this.rowHeight); // of many thin rows some are named
    const [start, end] = sharedEnds(this.rows.map(({ name }) => name));
    const counted = ({ layers }) => (layers.length > 1 && left > 100 ? ` (${layers.length})` : "");
    const fit = this.rows.every((row) => ctx.measureText(visible(row.name) + counted(row)).width <= left - 10);
    this.rows.forEach((one, row) => {
      if (row % pace) return;
      const { name } = one;
      // All whole, or all without what they share: a mixture reads like two kinds of layers.
      const text = visible(fit ? name : name.slice(start, name.length - end)) + counted(one);
      const middle = row * this.rowHeight + this.rowHeight * Math.min(pace, 2) / 2;
      ctx.fillText(cut(ctx, text, left - 10), left - 6, Math.max(7, middle));
    });
  }

  describe() {
    const place = document.getElementById("heat-summary");
    const [low, high] = this.range();
    this.showScale(low, high);
    if (!this.steps.length) {
      place.textContent = gettext("No health frame has arrived yet.");
      return;
    }
    const latest = this.rows.map(({ name, values }) => [name, values.at(-1)]).filter(([, value]) => value !== null);
    latest.sort((a, b) => a[1] - b[1]);
    const change = this.scale.value === "change";
    const signal = this.signal.selectedOptions[0].textContent;
    const name = change ? gettext("%(signal)s, deviation from the layer's own past", { signal }) : signal;
    if (!this.rows.length) place.textContent = gettext("No layer has this in its name.");
    else if (!latest.length) place.textContent = gettext("%(name)s has not been measured yet.", { name });
    else place.textContent = this.sentences(name, latest, change).filter(Boolean).join(" ");
    this.fillTable();
  }

  sentences(name, latest, change) {
    const { short } = this;
    return [
      gettext("Newest %(name)s: lowest %(low)s in %(lowest)s, highest %(high)s in %(highest)s.", {
        name, low: short(latest[0][1]), lowest: visible(latest[0][0]),
        high: short(latest.at(-1)[1]), highest: visible(latest.at(-1)[0]),
      }),
      gettext("%(rows)s of %(layers)s layers or blocks, steps %(first)s to %(last)s.", {
        rows: this.rows.length, layers: this.data.layers.length,
        first: short(this.steps[0]), last: short(this.steps.at(-1)),
      }),
      this.data.signal === "health" && !change && gettext("Below 0.4 is hatched."),
      this.markers().length && gettext("Grafts are marked in their layer."),
    ];
  }

  showScale(low, high) {
    const place = document.getElementById("heat-scale");
    const space = "http://www.w3.org/2000/svg";
    const picture = document.createElementNS(space, "svg");
    picture.setAttribute("viewBox", "0 0 100 12");
    picture.setAttribute("preserveAspectRatio", "none");
    picture.setAttribute("aria-hidden", "true");
    const palette = this.scale.value === "change" ? CHANGE : CIVIDIS;
    palette.forEach((color, i) => {
      const box = document.createElementNS(space, "rect");
      box.setAttribute("fill", color);
      box.setAttribute("x", i * 10);
      box.setAttribute("width", 10);
      box.setAttribute("height", 12);
      picture.append(box);
    });
    const words = this.scale.value === "change" ? [gettext("3 σ below"), gettext("3 σ above its past")]
      : this.data.signal === "health" ? [gettext("poor 0"), gettext("1 good")] : [this.short(low), this.short(high)];
    place.replaceChildren(words[0], picture, words[1]);
  }

  fillTable() {
    const table = document.getElementById("heat-table");
    if (!this.data || !table.closest("details").open) return;
    const count = Math.min(8, this.steps.length);
    const chosen = [...Array(count).keys()].map((i) => Math.round((i * (this.steps.length - 1)) / Math.max(1, count - 1)));
    const { short, makeRow } = this;
    table.querySelector("thead").replaceChildren(makeRow(
      [gettext("layer"), ...chosen.map((i) => gettext("step %(step)s", { step: short(this.steps[i]) }))], "th",
    ));
    table.querySelector("tbody").replaceChildren(...this.rows.map(({ name, values }) => makeRow(
      [visible(name), ...chosen.map((i) => short(values[i]))],
    )));
  }

  hoverAt(event) {
    if (!this.steps.length) return;
    const box = this.canvas.getBoundingClientRect();
    const axis = this.axis();
    const left = event.clientX - box.left;
    const row = Math.floor((event.clientY - box.top) / this.rowHeight);
    const step = axis.min + ((left - axis.left) / axis.width) * (axis.max - axis.min);
    const column = this.steps.findLastIndex((known) => known <= step);
    const value = this.rows[row]?.values[column];
    this.onHover(left >= axis.left && left <= axis.left + axis.width ? left : null);
    this.tip.hidden = value === undefined;
    if (this.tip.hidden) return;
    const said = value === null ? gettext("not measured") : `${this.short(value)}${this.scale.value === "change" ? " σ" : ""}`;
    this.tip.textContent = `${visible(this.rows[row].name)}, ${gettext("step %(step)s", { step: this.short(this.steps[column]) })}: ${said}`;
    this.tip.style.left = `${Math.max(0, Math.min(left + 12, box.width - 240))}px`;
    this.tip.style.top = `${(row + 1) * this.rowHeight + 4}px`;
  }
}

// Layers whose names begin alike, cut where at most MOST_BLOCKS remain; a block shows its worst layer
// for health, and the mean of its layers for other signals.
function byBlock(rows, signal) {
  const parts = rows.map(({ name }) => name.split("."));
  const depth = Math.max(1, ...[1, 2, 3, 4, 5, 6].filter((length) => (
    new Set(parts.map((part) => part.slice(0, length).join("."))).size <= MOST_BLOCKS)));
  const blocks = new Map();
  rows.forEach((row, i) => {
    const name = parts[i].slice(0, Math.min(depth, Math.max(1, parts[i].length - 1))).join(".");
    if (!blocks.has(name)) blocks.set(name, []);
    blocks.get(name).push(row);
  });
  return [...blocks].map(([name, members]) => ({
    name,
    layers: members.map(({ name: layer }) => layer),
    values: members[0].values.map((_, column) => {
      const known = members.map(({ values }) => values[column]).filter((value) => value !== null);
      if (!known.length) return null;
      return signal === "health" ? Math.min(...known) : known.reduce((a, b) => a + b, 0) / known.length;
    }),
  }));
}

// How many standard deviations a value lies from the layer's own past; null before there is one.
function deviations(values) {
  let [mean, variance, count] = [0, 0, 0];
  return values.map((value) => {
    if (value === null) return null;
    const spread = Math.sqrt(variance);
    const away = value - mean;
    const deviation = count < EARLY ? null : away / Math.max(spread, 1e-3 * Math.abs(mean), 1e-12);
    const weight = Math.max(LONG_PAST, 1 / (count + 1));
    mean += weight * away;
    variance = (1 - weight) * (variance + weight * away * away);
    count += 1;
    return deviation;
  });
}

// What all names have in common at both ends, in characters up to a point: it tells none from another.
function sharedEnds(names) {
  if (names.length < 2) return [0, 0];
  const parts = names.map((name) => name.split("."));
  const shortest = Math.min(...parts.map((part) => part.length)) - 1;
  const same = (at) => parts.every((part) => part.at(at) === parts[0].at(at));
  let [first, last] = [0, 0];
  while (first < shortest && same(first)) first += 1;
  while (last < shortest - first && same(-1 - last)) last += 1;
  const length = (some) => some.reduce((sum, part) => sum + part.length + 1, 0);
  return [length(parts[0].slice(0, first)), last ? length(parts[0].slice(-last)) : 0];
}

function cut(ctx, text, width) {
  if (ctx.measureText(text).width <= width) return text;
  // In the middle: a layer's number stands in front, and its kind at the end.
  let length = text.length;
  const short = () => `${text.slice(0, Math.floor(length / 2))}…${text.slice(-Math.ceil(length / 2))}`;
  while (length > 2 && ctx.measureText(short()).width > width) length -= 1;
  return short();
}
