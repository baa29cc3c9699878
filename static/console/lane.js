// What happened at which step, as buttons on the axis of the charts. Those that lie together are one
// cluster, with their number and the colour of the worst of them.
import { visible } from "./messages.js";
import { gettext, inWords } from "./words.js";

const NEAR = 44; // pixels; a cluster with its number is about 40 wide
const TONES = ["off", "standby", "good", "normal", "caution", "serious", "critical"];
const ROWS = { adaptation: 0, remedy: 0, finding: 1 };

export class Lane {
  constructor({ axis, onZoom }) {
    this.axis = axis;
    this.onZoom = onZoom;
    this.place = document.getElementById("lane");
    this.list = document.getElementById("lane-list");
  }

  draw(markers) {
    const axis = this.axis();
    const focused = document.activeElement?.dataset?.lane;
    const shown = [];
    for (const row of [0, 1]) {
      const own = markers.filter(({ kind }) => ROWS[kind] === row)
        .map((mark) => ({ ...mark, x: axis.left + ((mark.step - axis.min) / (axis.max - axis.min || 1)) * axis.width }))
        .filter(({ x }) => x >= axis.left - 1 && x <= axis.left + axis.width + 1)
        .sort((a, b) => a.x - b.x);
      for (const cluster of clusters(own)) shown.push(this.makeButton(cluster, row));
    }
    this.place.querySelectorAll(".event").forEach((old) => old.remove());
    this.place.append(...shown);
    if (focused) this.place.querySelector(`[data-lane="${CSS.escape(focused)}"]`)?.focus();
  }

  makeButton(cluster, row) {
    const one = cluster.length === 1 ? cluster[0] : null;
    const button = document.createElement(one ? "a" : "button");
    const worst = cluster.reduce((a, b) => (TONES.indexOf(b.tone) > TONES.indexOf(a.tone) ? b : a));
    button.className = "event";
    button.dataset.tone = worst.tone;
    button.dataset.row = row;
    button.dataset.lane = cluster[0].id;
    button.style.left = `${(cluster[0].x + cluster.at(-1).x) / 2}px`;
    const words = one ? say(one) : gettext("%(number)s events from step %(first)s to %(last)s", {
      number: cluster.length, first: inWords(cluster[0].step), last: inWords(cluster.at(-1).step),
    });
    button.title = one ? words : `${words}: ${cluster.slice(0, 6).map(({ label }) => visible(label)).join("; ")}`;
    button.setAttribute("aria-label", words);
    button.append(shape(worst.shape), one ? "" : String(cluster.length));
    if (one) button.href = one.href;
    else {
      button.type = "button";
      button.addEventListener("click", () => this.open(cluster));
    }
    return button;
  }

  // A cluster opens into a list of its events, and the charts zoom to them.
  open(cluster) {
    const [first, last] = [cluster[0].step, cluster.at(-1).step];
    this.list.replaceChildren(...cluster.map((mark) => {
      const item = document.createElement("li");
      const link = document.createElement("a");
      link.href = mark.href;
      link.textContent = say(mark);
      const status = document.createElement("span");
      status.className = "status";
      status.dataset.tone = mark.tone;
      status.append(shape(mark.shape));
      item.append(status, " ", link);
      return item;
    }));
    if (last > first) {
      const margin = Math.max(1, (last - first) * 0.15);
      this.onZoom(first - margin, last + margin);
    }
  }
}

const say = ({ step, label, word }) => `${gettext("step %(step)s", { step: inWords(step) })}: ${visible(label)}, ${word}`;

function clusters(marks) {
  const found = [];
  for (const mark of marks) {
    const last = found.at(-1);
    if (last && mark.x - last[0].x < NEAR) last.push(mark);
    else found.push([mark]);
  }
  return found;
}

function shape(name) {
  const space = "http://www.w3.org/2000/svg";
  const picture = document.createElementNS(space, "svg");
  picture.setAttribute("class", "shape");
  picture.setAttribute("viewBox", "0 0 12 12");
  picture.setAttribute("aria-hidden", "true");
  const use = document.createElementNS(space, "use");
  use.setAttribute("href", `${document.getElementById("lane").dataset.shapes}#${name}`);
  picture.append(use);
  return picture;
}
