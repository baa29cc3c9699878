// The run page's charts: the loss with adaptation markers, and the layers over time on a canvas.
// Both fetch increments, keep the zoom, and have a table and a sentence with the same content.
/* global uPlot */
import { visible } from "./messages.js";

const POINTS = 900;
const CIVIDIS = [
  "#00224e", "#0e306f", "#35456c", "#4f576c", "#666970", "#7d7c78", "#948e77", "#b0a473", "#d0bd66", "#f3dc4d",
];
const MARKS = {
  probation: "◐", kept: "✓", rolled_back: "▽", reverted: "▽", rolling_back: "▽", in_doubt: "?", rollback_failed: "■",
};

const lossPanel = document.getElementById("loss");
const run = lossPanel.dataset.run;
const markers = JSON.parse(document.getElementById("markers").textContent);
const get = async (path) => {
  const answer = await fetch(`/api/v1/runs/${run}/${path}`, { headers: { Accept: "application/json" } });
  if (!answer.ok) throw new Error(`${path}: ${answer.status}`);
  return answer.json();
};
const css = (name) => {
  const probe = document.createElement("span");
  probe.style.color = `var(${name})`;
  document.body.append(probe);
  const color = getComputedStyle(probe).color;
  probe.remove();
  return color;
};
const short = (value) => (value === null || value === undefined ? "—" : Number(value.toPrecision(4)).toLocaleString("en"));

// --- loss -----------------------------------------------------------------------------------------

const series = { step: [], min: [], mean: [], max: [], bad: [] };
let chart = null;
let logScale = false;
let held = false;
let heldAt = 0;
let zoomed = false;

async function readLoss() {
  const last = series.step.at(-1) ?? -1;
  const fresh = await get(`metrics?name=loss&points=${POINTS}&after_step=${last}`);
  for (const name of ["step", "min", "mean", "max"]) series[name].push(...fresh[name]);
  series.bad.push(...fresh.non_finite);
  if (series.step.length > 2 * POINTS) return readLossAgain();
  return drawLoss();
}

async function readLossAgain() {
  const whole = await get(`metrics?name=loss&points=${POINTS}`);
  for (const name of ["step", "min", "mean", "max"]) series[name] = whole[name];
  series.bad = whole.non_finite;
  drawLoss();
}

function drawLoss() {
  describeLoss();
  if (!series.step.length) return;
  const data = [series.step, series.min, series.max, series.mean];
  if (!chart) chart = makeChart(data);
  else chart.setData(data, !zoomed);
}

function makeChart(data) {
  const place = document.getElementById("loss-chart");
  const [ink, line, blue] = [css("--muted"), css("--line"), css("--cat-1")];
  const axis = { stroke: ink, grid: { stroke: line, width: 1 }, ticks: { stroke: line, width: 1 }, font: "12px system-ui" };
  const band = { stroke: "transparent", points: { show: false } };
  const made = new uPlot({
    width: place.clientWidth, height: 260, cursor: { drag: { x: true, y: false } }, legend: { live: true },
    scales: { x: { time: false }, y: { distr: logScale ? 3 : 1 } },
    axes: [{ ...axis, values: (_, ticks) => ticks.map((tick) => tick.toLocaleString("en")) }, { ...axis, size: 62 }],
    series: [
      { label: "step", value: (_, value) => (value === null ? "—" : value.toLocaleString("en")) },
      { ...band, label: "lowest", value: (_, value) => short(value) },
      { ...band, label: "highest", value: (_, value) => short(value) },
      { label: "mean loss", stroke: blue, width: 1.6, points: { show: false }, value: (_, value) => short(value) },
    ],
    bands: [{ series: [2, 1], fill: blue.replace("rgb(", "rgba(").replace(")", ", 0.18)") }],
    hooks: {
      draw: [drawMarks],
      setScale: [(plot, key) => { if (key === "x") noteZoom(plot); }],
    },
  }, data, place);
  return made;
}

function noteZoom(plot) {
  const { min, max } = plot.scales.x;
  const steps = series.step;
  zoomed = min > steps[0] || max < steps.at(-1);
}

function drawMarks(plot) {
  const { ctx } = plot;
  const { left, top, width, height } = plot.bbox;
  const ratio = devicePixelRatio;
  ctx.save();
  ctx.font = `${12 * ratio}px system-ui`;
  ctx.textAlign = "center";
  for (const mark of markers) drawLine(mark.step, css("--muted"), `${MARKS[mark.state] ?? "▲"} A-${mark.number}`);
  for (const bad of series.bad.slice(-200)) drawLine(bad.step, css("--critical"), "");
  ctx.restore();

  function drawLine(step, color, words) {
    const x = plot.valToPos(step, "x", true);
    if (x < left || x > left + width) return;
    ctx.strokeStyle = color;
    ctx.fillStyle = color;
    ctx.setLineDash([4 * ratio, 3 * ratio]);
    ctx.beginPath();
    ctx.moveTo(x, top + (words ? 16 * ratio : 0));
    ctx.lineTo(x, top + height);
    ctx.stroke();
    if (words) ctx.fillText(words, Math.min(Math.max(x, left + 30 * ratio), left + width - 30 * ratio), top + 12 * ratio);
  }
}

function describeLoss() {
  const place = document.getElementById("loss-summary");
  const { step, mean, bad } = series;
  if (!step.length) {
    place.textContent = "No loss has been reported yet.";
    return;
  }
  const known = mean.filter((value) => value !== null);
  place.textContent = `From ${short(known[0])} at step ${short(step[0])} to ${short(known.at(-1))} at step ${short(step.at(-1))}; `
    + `lowest ${short(Math.min(...known))}. ${markers.length === 0 ? "No graft is" : markers.length === 1 ? "1 graft is" : `${markers.length} grafts are`} marked.`
    + (bad.length ? ` The loss was not finite ${bad.length} times, last at step ${short(bad.at(-1).step)}.` : "")
    + " Drag to zoom, double click for all.";
  fillLossTable();
}

function fillLossTable() {
  const body = document.querySelector("#loss-table tbody");
  if (!body.closest("details").open) return;
  const pace = Math.max(1, Math.floor(series.step.length / 40));
  body.replaceChildren(...series.step.map((step, i) => [step, series.min[i], series.mean[i], series.max[i]])
    .filter((_, i) => i % pace === 0 || i === series.step.length - 1)
    .map((row) => makeRow(row.map(short))));
}

function makeRow(cells, tag = "td") {
  const row = document.createElement("tr");
  for (const text of cells) {
    const cell = document.createElement(tag);
    cell.className = "number";
    cell.textContent = text;
    row.append(cell);
  }
  return row;
}

// --- heat map -------------------------------------------------------------------------------------

const canvas = document.getElementById("heat-canvas");
const tip = document.getElementById("heat-tip");
const signal = document.getElementById("heat-signal");
let heat = null;

async function readHeat() {
  const columns = Math.min(240, Math.max(60, Math.floor(canvas.parentElement.clientWidth / 5)));
  heat = await get(`heatmap?signal=${encodeURIComponent(signal.value)}&columns=${columns}`);
  drawHeat();
  describeHeat();
}

const rowHeight = () => (heat.layers.length > 60 ? Math.max(2, Math.floor(900 / heat.layers.length)) : 18);
const labelWidth = () => (rowHeight() < 10 ? 0 : Math.min(180, canvas.parentElement.clientWidth * 0.3));

function range() {
  if (["health", "dead_fraction", "saturation", "stable_rank", "graft_grad_share"].includes(heat.signal)) return [0, 1];
  const known = heat.values.flat().filter((value) => value !== null);
  return known.length ? [Math.min(...known), Math.max(...known)] : [0, 1];
}

function drawHeat() {
  const width = canvas.parentElement.clientWidth;
  const height = Math.max(24, heat.layers.length * rowHeight() + 18);
  const ratio = devicePixelRatio;
  canvas.width = width * ratio;
  canvas.height = height * ratio;
  canvas.style.height = `${height}px`;
  const ctx = canvas.getContext("2d");
  ctx.scale(ratio, ratio);
  const [low, high] = range();
  const scale = CIVIDIS.length / ((high - low) || 1);
  const columns = heat.step.length;
  if (!columns) return;
  const left = labelWidth();
  const cell = (width - left) / columns;
  const ink = css("--ink");
  heat.values.forEach((values, row) => {
    const y = row * rowHeight();
    values.forEach((value, column) => {
      if (value === null) return; // not measured: left empty
      ctx.fillStyle = CIVIDIS[Math.max(0, Math.min(CIVIDIS.length - 1, Math.floor((value - low) * scale)))];
      ctx.fillRect(left + column * cell, y, cell + 0.5, rowHeight() - (rowHeight() > 6 ? 1 : 0));
    });
  });
  if (heat.signal === "health") hatchPoor(ctx, left, cell);
  if (left) drawLabels(ctx, left, ink);
  drawHeatMarks(ctx, left, width);
}

// Poor health is hatched too, because not everybody can see the colour.
function hatchPoor(ctx, left, cell) {
  if (rowHeight() < 8) return;
  ctx.strokeStyle = "#ffffff99";
  ctx.lineWidth = 1;
  heat.values.forEach((values, row) => values.forEach((value, column) => {
    if (value === null || value >= 0.4) return;
    const [x, y] = [left + column * cell, row * rowHeight()];
    ctx.beginPath();
    ctx.moveTo(x, y + rowHeight() - 2);
    ctx.lineTo(x + Math.min(cell, rowHeight()), y + 1);
    ctx.stroke();
  }));
}

function drawLabels(ctx, left, ink) {
  ctx.fillStyle = ink;
  ctx.font = "12px system-ui";
  ctx.textBaseline = "middle";
  ctx.textAlign = "right";
  heat.layers.forEach((name, row) => {
    ctx.fillText(cut(ctx, visible(name), left - 10), left - 6, row * rowHeight() + rowHeight() / 2);
  });
}

function cut(ctx, text, width) {
  if (ctx.measureText(text).width <= width) return text;
  let length = text.length;
  while (length > 3 && ctx.measureText(`…${text.slice(-length)}`).width > width) length -= 1;
  return `…${text.slice(-length)}`;
}

function drawHeatMarks(ctx, left, width) {
  const bottom = heat.layers.length * rowHeight();
  ctx.font = "11px system-ui";
  ctx.textAlign = "center";
  ctx.textBaseline = "top";
  ctx.fillStyle = css("--muted");
  ctx.fillText(short(heat.step.at(-1)), width - 24, bottom + 4);
  let first = width; // where the leftmost mark stands
  for (const mark of markers) {
    const column = heat.step.findIndex((step) => step >= mark.step);
    const row = heat.layers.indexOf(mark.layer);
    if (column < 0 || row < 0) continue;
    const x = left + (column * (width - left)) / heat.step.length;
    first = Math.min(first, x);
    ctx.strokeStyle = "#ffffff";
    ctx.fillStyle = "#000000";
    ctx.lineWidth = 2;
    ctx.beginPath();
    ctx.moveTo(x, row * rowHeight());
    ctx.lineTo(x, (row + 1) * rowHeight());
    ctx.stroke();
    ctx.fillStyle = css("--ink");
    ctx.fillText(`▲A-${mark.number}`, Math.min(Math.max(x, left + 20), width - 60), bottom + 4);
  }
  ctx.fillStyle = css("--muted");
  if (first > left + 60) ctx.fillText(short(heat.step[0]), left + 20, bottom + 4);
}

function describeHeat() {
  const place = document.getElementById("heat-summary");
  const [low, high] = range();
  showScale(low, high);
  if (!heat.step.length) {
    place.textContent = "No health frame has arrived yet.";
    return;
  }
  const latest = heat.layers.map((name, i) => [name, heat.values[i].at(-1)]).filter(([, value]) => value !== null);
  latest.sort((a, b) => a[1] - b[1]);
  const name = signal.selectedOptions[0].textContent;
  place.textContent = latest.length
    ? `Newest ${name}: lowest ${short(latest[0][1])} in ${visible(latest[0][0])}, highest ${short(latest.at(-1)[1])} in ${visible(latest.at(-1)[0])}. `
      + `${heat.layers.length} layers, steps ${short(heat.step[0])} to ${short(heat.step.at(-1))}.`
      + (heat.signal === "health" ? " Below 0.4 is hatched." : "")
    : `${name} has not been measured yet.`;
  fillHeatTable();
}

function showScale(low, high) {
  const place = document.getElementById("heat-scale");
  const space = "http://www.w3.org/2000/svg";
  const picture = document.createElementNS(space, "svg");
  picture.setAttribute("viewBox", "0 0 100 12");
  picture.setAttribute("preserveAspectRatio", "none");
  picture.setAttribute("aria-hidden", "true");
  CIVIDIS.forEach((_, i) => {
    const box = document.createElementNS(space, "rect");
    box.setAttribute("class", `h${i}`);
    box.setAttribute("x", i * 10);
    box.setAttribute("width", 10);
    box.setAttribute("height", 12);
    picture.append(box);
  });
  const words = heat.signal === "health" ? ["poor 0", "1 good"] : [short(low), short(high)];
  place.replaceChildren(words[0], picture, words[1]);
}

function fillHeatTable() {
  const table = document.getElementById("heat-table");
  if (!table.closest("details").open) return;
  const count = Math.min(8, heat.step.length);
  const chosen = [...Array(count).keys()].map((i) => Math.round((i * (heat.step.length - 1)) / Math.max(1, count - 1)));
  table.querySelector("thead").replaceChildren(makeRow(["layer", ...chosen.map((i) => `step ${short(heat.step[i])}`)], "th"));
  table.querySelector("tbody").replaceChildren(...heat.layers.map((name, row) => makeRow(
    [visible(name), ...chosen.map((i) => short(heat.values[row][i]))],
  )));
}

canvas.addEventListener("pointermove", (event) => {
  if (!heat?.step.length) return;
  const left = labelWidth();
  const box = canvas.getBoundingClientRect();
  const row = Math.floor((event.clientY - box.top) / rowHeight());
  const column = Math.floor(((event.clientX - box.left - left) / (box.width - left)) * heat.step.length);
  const value = heat.values[row]?.[column];
  tip.hidden = value === undefined;
  if (tip.hidden) return;
  tip.textContent = `${visible(heat.layers[row])}, step ${short(heat.step[column])}: ${value === null ? "not measured" : short(value)}`;
  tip.style.left = `${Math.min(event.clientX - box.left + 12, box.width - 220)}px`;
  tip.style.top = `${(row + 1) * rowHeight() + 4}px`;
});
canvas.addEventListener("pointerleave", () => { tip.hidden = true; });

// --- updates --------------------------------------------------------------------------------------

const showProblem = (id, what) => () => {
  document.getElementById(id).textContent = `${what} could not be loaded. The page tries again.`;
};
const updateLoss = () => readLoss().catch(showProblem("loss-summary", "The loss"));
const updateHeat = () => readHeat().catch(showProblem("heat-summary", "The health frames"));

document.addEventListener("esper:event", ({ detail: { type, topic, data } }) => {
  if (topic !== `run:${run}`) return;
  if (type === "run.progress") showProgress(data);
  if (type === "adaptation.changed") mark(data);
  // A resumed trainer went back to its checkpoint: the values after it are no longer valid.
  if (type === "run.resumed") readLossAgain().catch(showProblem("loss-summary", "The loss"));
});

function showProgress({ step, loss }) {
  const set = (name, text) => {
    const place = document.querySelector(`[data-live="${name}"]`);
    if (place) place.textContent = text;
  };
  if (typeof step === "number") {
    set("step", step.toLocaleString("en"));
    const bar = document.querySelector("[data-live-progress]");
    if (bar) bar.value = step;
    if (held) document.getElementById("held").textContent = `paused at step ${short(heldAt)}, ${short(step - heldAt)} new steps`;
  }
  if (loss !== null && loss !== undefined) set("loss", typeof loss === "number" ? short(loss) : loss);
}

function mark(data) {
  const known = markers.find((item) => item.uid === data.adaptation);
  if (known) known.state = data.to;
  else if (data.to === "probation") {
    markers.push({ number: data.number, uid: data.adaptation, step: data.step, state: data.to, layer: data.layer });
  }
  chart?.redraw();
}

document.getElementById("hold").addEventListener("click", ({ currentTarget: button }) => {
  held = !held;
  heldAt = series.step.at(-1) ?? 0;
  button.setAttribute("aria-pressed", String(held));
  button.textContent = held ? "Resume updates" : "Pause updates";
  document.getElementById("held").textContent = held ? `paused at step ${short(heldAt)}` : "";
  if (!held) updateLoss();
});
document.getElementById("scale").addEventListener("click", ({ currentTarget: button }) => {
  logScale = !logScale;
  button.setAttribute("aria-pressed", String(logScale));
  remake();
});
document.getElementById("whole").addEventListener("click", () => {
  zoomed = false;
  chart?.setData(chart.data, true);
});
for (const details of document.querySelectorAll("#loss details, #heat details")) {
  details.addEventListener("toggle", () => { fillLossTable(); if (heat) fillHeatTable(); });
}
signal.addEventListener("change", updateHeat);

function remake() {
  chart?.destroy();
  chart = null;
  zoomed = false;
  drawLoss();
  if (heat) drawHeat();
}
document.addEventListener("esper:theme", remake);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", remake);
let resizing = 0;
addEventListener("resize", () => {
  clearTimeout(resizing);
  resizing = setTimeout(() => {
    chart?.setSize({ width: document.getElementById("loss-chart").clientWidth, height: 260 });
    if (heat) drawHeat();
  }, 150);
});

updateLoss();
updateHeat();
if (lossPanel.dataset.ended === "no") {
  setInterval(() => { if (!held && !document.hidden) updateLoss(); }, 2_000);
  setInterval(() => { if (!held && !document.hidden) updateHeat(); }, 10_000);
}
