// Countdowns and "3 min ago", by the server's clock, because the browser's may be wrong.
import { announce } from "./messages.js";
import { gettext, language } from "./words.js";

let offset = 0;

// The Date header of any answer is exact to a second, which is enough here.
async function readServerClock() {
  const answer = await fetch("/healthz", { method: "HEAD", cache: "no-store" });
  const date = Date.parse(answer.headers.get("Date") ?? "");
  if (!Number.isNaN(date)) {
    const skew = date - Date.now();
    offset = Math.abs(skew) > 1500 ? skew : 0;
  }
}
readServerClock().catch(() => {});

const serverNow = () => Date.now() + offset;

const UNITS = [[86_400, gettext("d")], [3_600, gettext("h")], [60, "min"]];
function length(seconds) {
  for (const [size, unit] of UNITS) {
    if (seconds >= size) return `${Math.floor(seconds / size)} ${unit}`;
  }
  return `${Math.floor(seconds)} s`;
}

function ago(time) {
  const seconds = (serverNow() - time) / 1000;
  // The server's time is known to a second: a recent event must not appear to be in the future.
  if (Math.abs(seconds) < 5) return gettext("just now");
  return seconds < 0
    ? gettext("in %(time)s", { time: length(-seconds) })
    : gettext("%(time)s ago", { time: length(seconds) });
}

function setText(place, text) {
  if (place.textContent !== text) place.textContent = text;
}

const warned = new Set();
function count(place) {
  const left = Math.max(0, Math.floor((Date.parse(place.dataset.until) - serverNow()) / 1000));
  if (Number.isNaN(left)) return;
  setText(place, `${Math.floor(left / 60)}:${String(left % 60).padStart(2, "0")}`);
  place.dataset.near = left < 60 ? "yes" : "no";
  if (!place.hasAttribute("data-expires")) return;
  if (left < 60 && left > 0 && !warned.has(place.dataset.until)) {
    warned.add(place.dataset.until);
    announce(gettext("Less than a minute is left to decide."), { urgent: true });
  }
  if (left === 0) document.dispatchEvent(new CustomEvent("esper:expired"));
}

// The tip of a time says it in the reader's zone and in UTC.
function zoned(place) {
  const at = new Date(place.dateTime);
  if (Number.isNaN(at.getTime())) return;
  place.dataset.zoned = "yes";
  const timeZone = document.documentElement.dataset.zone; // of the account; undefined: the browser's
  const here = at.toLocaleString(language === "en" ? "en-GB" : language, { dateStyle: "medium", timeStyle: "long", timeZone });
  place.title = `${here} · ${at.toISOString().slice(0, 19).replace("T", " ")} UTC`;
}

function tick() {
  for (const place of document.querySelectorAll("[data-until]")) count(place);
  for (const place of document.querySelectorAll("time[data-ago]")) {
    setText(place, ago(Date.parse(place.dateTime)));
    if (!place.dataset.zoned) zoned(place);
  }
}
setInterval(tick, 1000);
