// Short messages to the person. Text only: outside text is never parsed as HTML.
import { gettext } from "./words.js";

const STAYS = { note: 6_000, ask: 60_000 };

export function toast({ text, link, linkText, kind = "note" }) {
  const box = document.createElement("div");
  box.className = `toast ${kind}`;
  const line = document.createElement("p");
  line.textContent = visible(text);
  box.append(line);
  const row = document.createElement("div");
  row.className = "row";
  if (link) {
    const anchor = document.createElement("a");
    anchor.className = "button small primary";
    anchor.href = link;
    anchor.textContent = linkText;
    row.append(anchor);
  }
  const close = document.createElement("button");
  close.type = "button";
  close.className = "button small";
  close.textContent = gettext("Close");
  close.addEventListener("click", () => box.remove());
  row.append(close);
  box.append(row);
  const bar = document.querySelector(".actionbar:has(form)");
  const place = document.getElementById("toasts");
  place.style.setProperty("--under", `${bar?.offsetHeight ?? 0}px`); // never over the buttons
  place.append(box);
  setTimeout(() => box.remove(), STAYS[kind]);
}

let announced = 0;
export function announce(text, { urgent = false } = {}) {
  const place = document.getElementById("announcer");
  if (!urgent && Date.now() - announced < 5_000) return;
  announced = Date.now();
  place.setAttribute("aria-live", urgent ? "assertive" : "polite");
  place.textContent = text;
}

// Makes characters visible that reorder a line or hide, and isolates words that are written from
// right to left, which would reorder the numbers around them (the templates do the same).
const RIGHT_TO_LEFT = /[\u0590-\u08ff\ufb1d-\ufdff\ufe70-\ufefc](?:[\d_. -]*[\u0590-\u08ff\ufb1d-\ufdff\ufe70-\ufefc])*/gu;
export function visible(text) {
  return String(text).replace(/[\p{Cf}\p{Cc}\p{Co}\p{Cn}]/gu, (char) => {
    const code = char.codePointAt(0).toString(16).toUpperCase().padStart(4, "0");
    return `⟨U+${code}⟩`;
  }).replace(RIGHT_TO_LEFT, "\u2068$&\u2069");
}
