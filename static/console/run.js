// The run page's charts: the loss, what happened, and the layers, over one axis of steps with one
// cursor. They fetch increments, keep the zoom, and have a table and a sentence with the same content.
/* global uPlot */
import { Heat } from "./heat.js";
import { Lane } from "./lane.js";
import { gettext, inWords, ngettext } from "./words.js";

const POINTS = 900;
const lossPanel = document.getElementById("loss");
const run = lossPanel.dataset.run;
const ended = lossPanel.dataset.ended === "yes";
const heldOutName = lossPanel.dataset.heldOut;

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
// Four digits: a small loss is not zero, and a step keeps all of its digits.
const short = (value) => {
  if (value === null || value === undefined) return "—";
  if (Number.isInteger(value)) return inWords(value);
  if (Math.abs(value) >= 1e-4) return inWords(value, { maximumSignificantDigits: 4 });
  const [digits, power] = value.toExponential(2).split("e-"); // as the server writes it: 1.23e−06
  return `${inWords(Number(digits), { minimumFractionDigits: 2 })}e−${power.padStart(2, "0")}`;
};
const readMarkers = () => JSON.parse(document.getElementById("markers").textContent);

// --- loss -----------------------------------------------------------------------------------------

const COLUMNS = ["step", "min", "mean", "max"];
const series = { step: [], min: [], mean: [], max: [], bad: [], width: 1 };
const heldOut = { step: [], mean: [] };
let markers = readMarkers();
let chart = null;
let logScale = null; // until a person chooses: by the values
let held = false;
let heldAt = 0;
let zoomed = false; // by dragging
let chosenWindow = "all";
let smoothing = 0.9;

// Buckets have the same width everywhere and begin at its multiples. The last one may be incomplete:
// it is fetched again, and drawn once half of its steps are there.
async function readLoss() {
  const { width } = series;
  const last = series.step.at(-1) ?? -1;
  const after = last < 0 ? -1 : Math.floor(last / width) * width - 1;
  if (last < 0) return readLossAgain();
  const fresh = await get(`metrics?name=loss&points=${POINTS}&after_step=${after}&width=${width}`);
  const kept = series.step.findIndex((step) => step > after);
  if (kept >= 0) for (const name of COLUMNS) series[name].length = kept;
  for (const name of COLUMNS) series[name].push(...fresh[name]);
  series.bad = [...series.bad.filter(({ step }) => step <= after), ...fresh.non_finite];
  await readHeldOut();
  if (series.step.length > 2 * POINTS) return readLossAgain();
  return drawLoss();
}

async function readLossAgain() {
  const all = await get("metrics?name=loss&points=1"); // one bucket, as wide as all steps
  const width = all.step.length ? Math.max(1, Math.ceil(all.width / POINTS)) : 1;
  const whole = await get(`metrics?name=loss&points=${POINTS}&width=${width}`);
  for (const name of COLUMNS) series[name] = whole[name];
  series.bad = whole.non_finite;
  series.width = width;
  await readHeldOut(true);
  drawLoss();
}

async function readHeldOut(again = false) {
  if (!heldOutName) return;
  if (again) heldOut.step = heldOut.mean = [];
  const last = heldOut.step.at(-1) ?? -1;
  const fresh = await get(`metrics?name=${encodeURIComponent(heldOutName)}&points=400&after_step=${last}`);
  heldOut.step = [...heldOut.step, ...fresh.step];
  heldOut.mean = [...heldOut.mean, ...fresh.mean];
}

function shownLength() {
  const { step, width } = series;
  const last = step.at(-1) ?? 0;
  const half = Math.floor(last / width) * width + width / 2;
  return !ended && width > 1 && last < half && step.length > 2 ? step.length - 1 : step.length;
}

function average(values) {
  let mean = null;
  return values.map((value) => {
    if (value === null) return null;
    mean = mean === null ? value : smoothing * mean + (1 - smoothing) * value;
    return mean;
  });
}

function lossData() {
  const count = shownLength();
  const [step, min, mean, max] = COLUMNS.map((name) => series[name].slice(0, count));
  const own = [step, min, max, mean, smoothing ? average(mean) : mean.map(() => null)];
  if (!heldOutName) return own;
  return heldOut.step.length ? uPlot.join([own, [heldOut.step, heldOut.mean]]) : [...own, step.map(() => null)];
}

function drawLoss() {
  describeLoss();
  if (!series.step.length) return;
  const data = lossData();
  if (logScale === null) showScale(spread(data[2]) > 30);
  if (!chart) chart = makeChart(data);
  else chart.setData(data, false);
  if (!zoomed) showWindow();
}

const edge = () => (innerWidth < 700 ? 12 : 26); // half of the last number of the axis
const gutter = () => (innerWidth < 700 ? 58 : 176);

// How far a spike stands above the usual loss. One that hides the rest makes the axis logarithmic.
function spread(losses) {
  const known = losses.filter(Number.isFinite).sort((a, b) => a - b);
  return known.length > 20 && known[0] > 0 ? known.at(-1) / known[known.length >> 1] : 1;
}

function showScale(isLog) {
  logScale = isLog;
  document.getElementById("scale").setAttribute("aria-pressed", String(isLog));
}

function makeChart(data) {
  const place = document.getElementById("loss-chart");
  const [ink, line, blue, orange] = ["--muted", "--line", "--cat-1", "--cat-2"].map(css);
  const axis = { stroke: ink, grid: { stroke: line, width: 1 }, ticks: { stroke: line, width: 1 }, font: "12px system-ui" };
  const band = { stroke: "transparent", points: { show: false }, spanGaps: true };
  const soft = (color) => color.replace("rgb(", "rgba(").replace(")", ", 0.35)");
  const value = (_, number) => short(number);
  return new uPlot({
    width: place.clientWidth, height: 260, padding: [8, edge(), 0, 0],
    cursor: { drag: { x: true, y: false } }, legend: { live: true },
    scales: { x: { time: false }, y: { distr: logScale ? 3 : 1 } },
    axes: [{ ...axis, label: gettext("step"), labelSize: 16, labelFont: axis.font, values: (_, ticks) => ticks.map((tick) => inWords(tick)) }, { ...axis, size: gutter() }],
    series: [
      { label: gettext("step"), value: (_, step) => (step === null ? "—" : inWords(step)) },
      { ...band, label: gettext("lowest"), value },
      { ...band, label: gettext("highest"), value },
      { label: gettext("training loss"), stroke: smoothing ? soft(blue) : blue, width: 1.4, points: { show: false }, spanGaps: true, value },
      { label: gettext("average %(weight)s", { weight: smoothing ? inWords(smoothing) : "" }), show: Boolean(smoothing), stroke: blue, width: 2, points: { show: false }, spanGaps: true, value },
      ...(heldOutName ? [{ label: gettext("held-out (%(name)s)", { name: heldOutName }), stroke: orange, width: 1.8, dash: [6, 3],
        points: { show: heldOut.step.length < 60, size: 5, fill: orange }, spanGaps: true, value }] : []),
    ],
    bands: [{ series: [2, 1], fill: soft(blue).replace("0.35", "0.16") }],
    hooks: {
      draw: [drawLines],
      setScale: [(plot, key) => { if (key === "x") follow(plot); }],
      setCursor: [(plot) => showCursor(plot)],
      setSelect: [() => { zoomed = true; }],
      ready: [(plot) => plot.over.addEventListener("dblclick", () => { zoomed = false; showWindow(); })],
    },
  }, data, place);
}

// The window that a person has chosen. The newest steps stay in it while the run goes on.
function showWindow() {
  const first = series.step[0];
  const last = Math.max(series.step[shownLength() - 1], heldOut.step.at(-1) ?? 0);
  const start = { all: first, "start": first + 0.1 * (last - first) }[chosenWindow] ?? Math.max(first, last - Number(chosenWindow));
  chart.setScale("x", { min: start, max: Math.max(last, start + 1) });
}

function drawLines(plot) {
  const { ctx } = plot;
  const { left, top, width, height } = plot.bbox;
  const ratio = devicePixelRatio;
  ctx.save();
  ctx.setLineDash([3 * ratio, 4 * ratio]);
  for (const { step } of markers.filter(({ kind }) => kind === "adaptation")) line(step, css("--line-strong"));
  for (const { step } of series.bad.slice(-200)) line(step, css("--critical"));
  ctx.restore();

  function line(step, color) {
    const x = plot.valToPos(step, "x", true);
    if (x < left || x > left + width) return;
    ctx.strokeStyle = color;
    ctx.beginPath();
    ctx.moveTo(x, top);
    ctx.lineTo(x, top + height);
    ctx.stroke();
  }
}

function describeLoss() {
  const place = document.getElementById("loss-summary");
  const { step, mean, bad } = series;
  if (!step.length) {
    place.textContent = gettext("No loss has been reported yet.");
    return;
  }
  const known = mean.filter((value) => value !== null);
  const grafts = markers.filter(({ kind }) => kind === "adaptation").length;
  const others = markers.length - grafts;
  const marked = grafts
    && ngettext("%(counter)s graft is marked.", "%(counter)s grafts are marked.", grafts);
  const more = others
    && ngettext("%(counter)s finding or remedy is marked.", "%(counter)s findings and remedies are marked.", others);
  place.textContent = [
    gettext("From %(first)s at step %(from)s to %(last)s at step %(to)s; lowest %(lowest)s.", {
      first: short(known[0]), from: short(step[0]), last: short(known.at(-1)), to: short(step.at(-1)),
      lowest: short(Math.min(...known)),
    }),
    heldOut.step.length && gettext("Held-out loss %(loss)s at step %(step)s.", {
      loss: short(heldOut.mean.at(-1)), step: short(heldOut.step.at(-1)),
    }),
    marked,
    more,
    bad.length && gettext("The loss was not finite %(times)s times, last at step %(step)s.", {
      times: bad.length, step: short(bad.at(-1).step),
    }),
    series.width > 1 && gettext("Each point stands for %(steps)s steps.", { steps: short(series.width) }),
    gettext("Drag to zoom, double click to go back."),
  ].filter(Boolean).join(" ");
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

// --- one axis, one cursor -------------------------------------------------------------------------

// Where the plot lies, and which steps it shows. Before the first loss the frames give the axis.
function axis() {
  const place = document.getElementById("loss-chart");
  if (!chart) {
    const steps = heat.steps;
    return { left: gutter(), width: place.clientWidth - gutter() - edge(), min: steps[0] ?? 0, max: steps.at(-1) ?? 1 };
  }
  const { left, width } = chart.bbox;
  const { min, max } = chart.scales.x;
  return { left: left / devicePixelRatio, width: width / devicePixelRatio, min, max };
}

const heat = new Heat({ get, css, short, makeRow, axis, markers: () => markers, onHover: hover });
const lane = new Lane({ axis, onZoom: (min, max) => {
  zoomed = true;
  chart?.setScale("x", { min, max });
} });

function follow() {
  requestAnimationFrame(() => {
    heat.draw();
    lane.draw(markers);
  });
}

const lines = document.querySelectorAll(".cursor-line");
function showLines(left) {
  for (const line of lines) {
    line.hidden = left === null;
    if (left !== null) line.style.left = `${left}px`;
  }
}
function showCursor(plot) {
  const { left } = plot.cursor;
  const inside = left !== null && left >= 0;
  showLines(inside ? plot.bbox.left / devicePixelRatio + left : null);
}
function hover(left) {
  if (chart) chart.setCursor(left === null ? { left: -10, top: -10 } : { left: left - axis().left, top: 20 });
  else showLines(left);
}

// --- updates --------------------------------------------------------------------------------------

const showProblem = (id, what) => () => {
  document.getElementById(id).textContent = gettext("%(what)s could not be loaded. The page tries again.", { what });
};
const updateLoss = () => readLoss().catch(showProblem("loss-summary", gettext("The loss")));
const updateHeat = () => heat.read().catch(showProblem("heat-summary", gettext("The health frames")));

document.addEventListener("esper:event", ({ detail: { type, topic, data } }) => {
  if (topic !== `run:${run}`) return;
  if (type === "run.progress") showProgress(data);
  // A resumed trainer went back to its checkpoint: the values after it are no longer valid.
  if (type === "run.resumed") readLossAgain().catch(showProblem("loss-summary", gettext("The loss")));
});
// The markers come with the timeline, which is fetched again when something happens.
document.addEventListener("htmx:afterSwap", ({ detail: { target } }) => {
  if (target.id !== "panel-timeline") return;
  markers = readMarkers();
  lane.draw(markers);
  if (series.step.length) describeLoss(); // before that the loss is still being fetched
  chart?.redraw();
});

function showProgress({ step, loss }) {
  const set = (name, text) => {
    const place = document.querySelector(`[data-live="${name}"]`);
    if (place) place.textContent = text;
  };
  if (typeof step === "number") {
    set("step", inWords(step));
    const bar = document.querySelector("[data-live-progress]");
    if (bar) bar.value = step;
    if (held) document.getElementById("held").textContent = gettext("paused at step %(step)s, %(new)s new steps", { step: short(heldAt), new: short(step - heldAt) });
  }
  if (loss !== null && loss !== undefined) set("loss", typeof loss === "number" ? short(loss) : loss);
}

document.getElementById("hold").addEventListener("click", ({ currentTarget: button }) => {
  held = !held;
  heldAt = series.step.at(-1) ?? 0;
  button.setAttribute("aria-pressed", String(held));
  button.textContent = held ? gettext("Resume updates") : gettext("Pause updates");
  document.getElementById("held").textContent = held ? gettext("paused at step %(step)s", { step: short(heldAt) }) : "";
  if (!held) updateLoss();
});
document.getElementById("scale").addEventListener("click", () => {
  showScale(!logScale);
  remake();
});
document.getElementById("window").addEventListener("change", ({ target }) => {
  chosenWindow = target.value;
  zoomed = false;
  if (chart) showWindow();
});
document.getElementById("smoothing").addEventListener("change", ({ target }) => {
  smoothing = Number(target.value);
  remake();
});
for (const details of document.querySelectorAll("#loss details, #heat details")) {
  details.addEventListener("toggle", () => { fillLossTable(); heat.fillTable(); });
}

function remake() {
  chart?.destroy();
  chart = null;
  drawLoss();
  follow();
}
document.addEventListener("esper:theme", remake);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", remake);
let resizing = 0;
addEventListener("resize", () => {
  clearTimeout(resizing);
  resizing = setTimeout(remake, 150);
});

updateLoss().then(updateHeat);
if (!ended) {
  setInterval(() => { if (!held && !document.hidden) updateLoss(); }, 2_000);
  setInterval(() => { if (!held && !document.hidden) updateHeat(); }, 10_000);
}
