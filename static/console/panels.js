// Panels look again when an event concerns them, at most once a second, and by themselves where a
// value has no event. The answer is morphed in: focus, scroll and open details stay.
/* global htmx, Idiomorph */

const SHORTEST_PAUSE = 1_000;
const lastLook = new WeakMap();
const waiting = new WeakMap();

document.addEventListener("DOMContentLoaded", prepare);
if (document.readyState !== "loading") prepare();

function prepare() {
  if (!window.Idiomorph || prepare.done) return;
  prepare.done = true;
  Object.assign(Idiomorph.defaults.callbacks, {
    // What a person is typing, or a module draws, is not the server's to change.
    beforeNodeMorphed: (node) => !(node instanceof Element && node.hasAttribute("data-keep")),
    beforeAttributeUpdated: (name, node) => !(name === "open" && node.tagName === "DETAILS"),
  });
}

export function refresh(panel) {
  if (waiting.has(panel)) return;
  const pause = Math.max(0, (lastLook.get(panel) ?? 0) + SHORTEST_PAUSE - Date.now());
  waiting.set(panel, setTimeout(() => {
    waiting.delete(panel);
    lastLook.set(panel, Date.now());
    if (panel.isConnected) htmx.trigger(panel, "refresh");
  }, pause));
}

export function refreshAll() {
  for (const panel of document.querySelectorAll("[data-panel]")) refresh(panel);
}

const concerns = (panel, type) => (panel.dataset.wakes ?? "").split(" ").filter(Boolean)
  .some((word) => type === word || type.startsWith(`${word}.`));

document.addEventListener("esper:event", ({ detail: { type } }) => {
  if (type === "run.progress") return; // the chart's; a table does not need four looks a second
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
    const age = Date.now() - (lastLook.get(panel) ?? performance.timeOrigin);
    if (age > Number(panel.dataset.every) * 1000) refresh(panel);
  }
}, 1000);

// Nothing moves under the pointer: a list that is hovered or focused keeps its rows until asked.
document.addEventListener("htmx:beforeSwap", (event) => {
  const panel = event.detail.target;
  if (new URL(event.detail.xhr.responseURL).pathname === "/login") {
    event.detail.shouldSwap = false;
    location.reload(); // signed out meanwhile; signing in leads back here
    return;
  }
  const rows = panel.querySelector?.("[data-rows]");
  if (!rows) return;
  if (panel.dataset.shown) { // the person has asked for it
    delete panel.dataset.shown;
    return;
  }
  if (!panel.matches(":hover") && !panel.contains(document.activeElement)) return;
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
  const parts = [added && `${added} new`, gone.length && `${gone.length} decided`].filter(Boolean);
  button.textContent = `${parts.join(", ") || "New order"} · Show`;
  button.hidden = false;
}
document.addEventListener("click", (event) => {
  const button = event.target.closest("[data-show-held]");
  if (!button) return;
  const panel = button.closest("[data-panel]");
  panel.dataset.shown = "now";
  refresh(panel);
});
