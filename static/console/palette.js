// Ctrl+K: a dialog that finds runs, decisions, blueprints, pages and saved views.
import { gettext } from "./words.js";
const dialog = document.getElementById("palette");
const field = document.getElementById("palette-q");
const place = document.getElementById("palette-hits");
const PAUSE_MS = 120;
let timer = 0;
let asked = 0;
let chosen = 0;

const hits = () => [...place.querySelectorAll("a")];

function choose(index) {
  const all = hits();
  if (!all.length) return;
  chosen = (index + all.length) % all.length;
  for (const [at, hit] of all.entries()) {
    hit.toggleAttribute("data-chosen", at === chosen);
    hit.setAttribute("aria-selected", at === chosen);
  }
  field.setAttribute("aria-activedescendant", all[chosen].id);
  all[chosen].scrollIntoView({ block: "nearest" });
}

async function find() {
  const mine = ++asked;
  const query = new URLSearchParams({ q: field.value, part: "list" });
  const answer = await fetch(`/search?${query}`, { headers: { Accept: "text/html" } }).catch(() => null);
  if (mine !== asked) return; // an answer to letters that were typed over
  if (!answer?.ok) {
    place.textContent = gettext("The server did not answer.");
    return;
  }
  place.innerHTML = await answer.text(); // the server's own template, which escapes
  const list = place.querySelector("ul");
  list?.setAttribute("role", "listbox");
  list?.setAttribute("aria-label", gettext("Places that fit"));
  for (const row of place.querySelectorAll("li")) row.setAttribute("role", "presentation");
  for (const hit of hits()) {
    hit.setAttribute("role", "option");
    hit.tabIndex = -1;
  }
  choose(0);
}

export function openPalette() {
  if (dialog.open) return;
  dialog.showModal();
  field.value = "";
  field.focus();
  find();
}

field.addEventListener("input", () => {
  clearTimeout(timer);
  timer = setTimeout(find, PAUSE_MS);
});
field.addEventListener("keydown", (event) => {
  if (event.key === "ArrowDown") choose(chosen + 1);
  else if (event.key === "ArrowUp") choose(chosen - 1);
  else if (event.key === "Enter") hits()[chosen]?.click();
  else return;
  event.preventDefault();
});
document.addEventListener("keydown", (event) => {
  if (!(event.ctrlKey || event.metaKey) || event.altKey || event.key.toLowerCase() !== "k") return;
  event.preventDefault();
  openPalette();
});
document.addEventListener("click", (event) => {
  const button = event.target.closest("[data-palette]");
  if (!button || event.ctrlKey || event.metaKey) return;
  event.preventDefault();
  openPalette();
});
dialog.addEventListener("click", (event) => { if (event.target === dialog) dialog.close(); });
