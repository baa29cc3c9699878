// A panel is refreshed when an event concerns it, at most once a second, and on a timer where a
// value has no event. The answer is morphed in: focus, scroll position and open details stay.
/* global htmx, Idiomorph */
import { gettext } from "./words.js";

const SHORTEST_PAUSE = 1_000;
const LONGEST_WAIT = 5_000;
const refreshedAt = new WeakMap();
const waiting = new WeakMap();

document.addEventListener("DOMContentLoaded", prepare);
if (document.readyState !== "loading") prepare();

function prepare() {
  if (!window.Idiomorph || prepare.done) return;
  prepare.done = true;
  Object.assign(Idiomorph.defaults.callbacks, {
    // The server must not overwrite what a person is typing or a module has drawn.
    beforeNodeMorphed: (node) => !(node instanceof Element && node.hasAttribute("data-keep")),
    beforeAttributeUpdated: (name, node) => !(name === "open" && node.tagName === "DETAILS"),
  });
}

function refresh(panel, shortest = SHORTEST_PAUSE) {
  if (waiting.has(panel) && shortest) return;
  clearTimeout(waiting.get(panel));
  const pause = Math.max(0, (refreshedAt.get(panel) ?? 0) + shortest - Date.now());
  waiting.set(panel, setTimeout(() => {
    waiting.delete(panel);
    refreshedAt.set(panel, Date.now());
    if (panel.isConnected) htmx.trigger(panel, "refresh");
  }, pause));
}

export function refreshAll() {
  for (const panel of document.querySelectorAll("[data-panel]")) refresh(panel);
}

// What a person has just decided comes first: the requests of all panels at once would wait for
// each other, and the page would show the old state beside the answer.
export function refreshDecision() {
  const acts = document.getElementById("panel-acts");
  for (const panel of document.querySelectorAll("#panel-head, #panel-acts")) refresh(panel, 0);
  return new Promise((resolve) => {
    const shown = ({ detail }) => detail.target.id === acts?.id && end();
    const end = () => {
      document.removeEventListener("htmx:afterSwap", shown);
      resolve();
    };
    document.addEventListener("htmx:afterSwap", shown);
    setTimeout(end, LONGEST_WAIT);
  });
}

const concerns = (panel, type) => (panel.dataset.events ?? "").split(" ").filter(Boolean)
  .some((word) => type === word || type.startsWith(`${word}.`));

document.addEventListener("esper:event", ({ detail: { type } }) => {
  if (type === "run.progress") return; // only the chart uses it; a table does not need four refreshes a second
  for (const panel of document.querySelectorAll("[data-panel]")) {
    if (concerns(panel, type)) refresh(panel);
  }
});
document.addEventListener("esper:expired", () => {
  for (const panel of document.querySelectorAll("#panel-head, #panel-acts")) refresh(panel);
});

setInterval(() => {
  if (document.hidden) return;
  for (const panel of document.querySelectorAll("[data-panel][data-every]")) {
    const age = Date.now() - (refreshedAt.get(panel) ?? performance.timeOrigin);
    if (age > Number(panel.dataset.every) * 1000) refresh(panel);
  }
}, 1000);

// Rows do not move under the pointer: a hovered or focused list keeps its rows until the person asks,
// or moves the pointer away. A notice that comes up under a pointer at rest takes nothing away.
document.addEventListener("htmx:beforeSwap", (event) => {
  const panel = event.detail.target;
  if (new URL(event.detail.xhr.responseURL).pathname === "/login") {
    event.detail.shouldSwap = false;
    location.reload(); // the session has ended; signing in leads back to this page
    return;
  }
  const rows = panel.querySelector?.("[data-rows]");
  if (!rows) return;
  if (panel.dataset.shown) { // the person has asked for it
    delete panel.dataset.shown;
    return;
  }
  if (!panel.matches(":hover") && !panel.contains(document.activeElement) && !heldIn(panel)) return;
  const fresh = new DOMParser().parseFromString(event.detail.serverResponse, "text/html");
  const change = compare(rows, fresh);
  if (!change.any) return;
  event.detail.shouldSwap = false;
  offer(panel, change);
});

function compare(rows, fresh) {
  const ids = (root) => [...root.querySelectorAll("[data-row]")].map((row) => row.id);
  const [before, after] = [ids(rows), ids(fresh)];
  return {
    added: after.filter((id) => !before.includes(id)).length,
    gone: before.filter((id) => !after.includes(id)),
    any: before.join() !== after.join(),
  };
}

function offer(panel, { added, gone }) {
  for (const id of gone) document.getElementById(id).classList.add("gone");
  const button = panel.querySelector("[data-show-held]");
  if (!button) return;
  const parts = [
    added && gettext("%(number)s new", { number: added }),
    gone.length && gettext("%(number)s decided", { number: gone.length }),
  ].filter(Boolean);
  const change = parts.join(", ") || gettext("New order");
  button.textContent = gettext("%(change)s · Show", { change });
  button.hidden = false;
}

const heldIn = (panel) => panel.querySelector("[data-show-held]:not([hidden])");

function show(panel) {
  panel.dataset.shown = "now";
  refresh(panel);
}

document.addEventListener("click", (event) => {
  const button = event.target.closest("[data-show-held]");
  if (button) show(button.closest("[data-panel]"));
});
document.addEventListener("pointermove", ({ target }) => {
  for (const button of document.querySelectorAll("[data-show-held]:not([hidden])")) {
    const panel = button.closest("[data-panel]");
    if (!panel.contains(target) && !panel.contains(document.activeElement)) show(panel);
  }
});

// A table that is wider than its place can be scrolled with the keyboard too.
function makeScrollable() {
  for (const place of document.querySelectorAll(".scroll")) {
    if (place.scrollWidth > place.clientWidth + 1) place.tabIndex = 0;
    else if (!place.hasAttribute("role")) place.removeAttribute("tabindex");
  }
}
makeScrollable();
addEventListener("resize", makeScrollable);
document.addEventListener("htmx:afterSwap", makeScrollable);
