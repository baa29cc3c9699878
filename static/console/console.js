// Every page: receive events, refresh panels, send acts, handle keys.
import "./clock.js";
import "./panels.js";
import "./acts.js";
import "./keys.js";
import "./palette.js";
import { Link } from "./link.js";
import { tellSystem } from "./notify.js";
import { toast } from "./messages.js";
import { gettext } from "./words.js";

const since = JSON.parse(document.getElementById("since")?.textContent ?? "{}");
const link = new Link(since);

const pill = () => document.getElementById("link-pill");
const WORDS = {
  connecting: gettext("Connecting"), live: gettext("Live"), reconnecting: gettext("Reconnecting"),
  polling: gettext("Polling"),
};

function showLink() {
  const { state, age } = link;
  const seconds = Math.floor(age / 1000);
  const clock = `${Math.floor(seconds / 60)}:${String(seconds % 60).padStart(2, "0")}`;
  const stale = state === "stale";
  const word = stale ? gettext("Stale %(clock)s", { clock }) : WORDS[state];
  const place = pill();
  place.dataset.link = state;
  place.querySelector(".word").textContent = word;
  const banner = document.getElementById("stale-banner");
  banner.hidden = !stale;
  if (stale) {
    banner.textContent = gettext("The server cannot be reached. The data on this page is %(clock)s old. Approving is blocked until the connection is back; you can still try to reject, pause and kill.", { clock });
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

// An event is in English; the page's search says the same in the page's language.
async function titleOf({ number, title }) {
  if (document.documentElement.lang === "en") return title;
  const answer = await fetch(`/search?part=list&q=A-${number}`).catch(() => null);
  if (!answer?.ok) return title;
  const found = new DOMParser().parseFromString(await answer.text(), "text/html").querySelector(".hit-words");
  return found?.textContent.replace(`A-${number} `, "") ?? title;
}

async function askPerson(data) {
  const address = `/adaptations/${encodeURIComponent(data.adaptation)}`;
  const title = gettext("%(name)s waits for a person", { name: `A-${data.number}` });
  const what = await titleOf(data);
  tellSystem({ title, body: what, address, tag: data.adaptation }).catch(() => {});
  if (location.pathname === address) return;
  toast({
    text: `${title}: ${what}.`,
    link: address, linkText: gettext("Open it"), kind: "ask",
  });
}

document.addEventListener("click", (event) => {
  if (event.target.closest("#link-pill")) link.retry();
  if (event.target.closest("[data-theme-toggle]")) toggleTheme();
  // Close a menu on a click outside it.
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
