// What every page does: listens, keeps its panels fresh, sends acts, takes keys.
import "./clock.js";
import "./panels.js";
import "./acts.js";
import "./keys.js";
import { Link } from "./link.js";
import { toast } from "./messages.js";

const since = JSON.parse(document.getElementById("since")?.textContent ?? "{}");
export const link = new Link(since);

const pill = () => document.getElementById("link-pill");
const WORDS = {
  connecting: "Connecting", live: "Live", reconnecting: "Reconnecting", polling: "Polling",
};

function showLink() {
  const { state, age } = link;
  const seconds = Math.floor(age / 1000);
  const clock = `${Math.floor(seconds / 60)}:${String(seconds % 60).padStart(2, "0")}`;
  const stale = state === "stale";
  const word = stale ? `Stale ${clock}` : WORDS[state];
  const place = pill();
  place.dataset.link = state;
  place.querySelector(".word").textContent = word;
  const banner = document.getElementById("stale-banner");
  banner.hidden = !stale;
  if (stale) {
    banner.textContent = `What you see is ${clock} old: the server cannot be reached. `
      + "Approving is blocked until it can; rejecting, pausing and killing are still tried.";
  }
  document.body.dataset.link = state;
  document.dispatchEvent(new CustomEvent("esper:link", { detail: { state, clock } }));
}
link.addEventListener("change", showLink);
setInterval(showLink, 1000);
showLink();

link.addEventListener("message", ({ detail: message }) => {
  document.dispatchEvent(new CustomEvent("esper:event", { detail: message }));
  if (message.topic === "inbox" && message.data?.to === "awaiting_approval") askPerson(message.data);
});

function askPerson(data) {
  const address = `/adaptations/${encodeURIComponent(data.adaptation)}`;
  if (location.pathname === address) return;
  toast({
    text: `A-${data.number} waits for a person: graft ${data.blueprint} into ${data.layer}.`,
    link: address, linkText: "Open it", kind: "ask",
  });
}

document.addEventListener("click", (event) => {
  if (event.target.closest("#link-pill")) link.retry();
  if (event.target.closest("[data-theme-toggle]")) toggleTheme();
  // A menu closes when one clicks elsewhere.
  for (const menu of document.querySelectorAll("details.menu[open]")) {
    if (!menu.contains(event.target)) menu.open = false;
  }
});

document.addEventListener("change", (event) => {
  if (event.target.matches("[data-submit]")) event.target.form.requestSubmit();
});

function toggleTheme() {
  const root = document.documentElement;
  const dark = root.dataset.theme
    ? root.dataset.theme === "dark"
    : matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = dark ? "light" : "dark";
  document.cookie = `theme=${root.dataset.theme}; path=/; max-age=31536000; samesite=lax`;
  document.dispatchEvent(new CustomEvent("esper:theme"));
}
