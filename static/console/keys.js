// j and k move through rows, o opens one, g then i, h or r opens a page, ? lists the keys.
// Single-key shortcuts can be switched off, because they interfere with speech input.

const SETTING = "esper.keys";
let prefix = "";

// This browser's choice, else that of the account.
const on = () => (localStorage.getItem(SETTING) ?? document.documentElement.dataset.keys ?? "on") !== "off";
const dialog = () => document.getElementById("shortcuts");

function rows() { return [...document.querySelectorAll("main [data-row]")]; }

function move(pace) {
  const all = rows();
  if (!all.length) return;
  const at = all.findIndex((row) => row.hasAttribute("data-current"));
  const next = all[Math.min(all.length - 1, Math.max(0, at + pace))];
  for (const row of all) row.removeAttribute("data-current");
  next.setAttribute("data-current", "");
  const target = next.querySelector("[data-open]");
  target?.focus({ preventScroll: true });
  next.scrollIntoView({ block: "nearest" });
}

function open() {
  document.querySelector("main [data-row][data-current] [data-open]")?.click();
}

const GO = { i: "/inbox", h: "/", r: "/runs" };
const KEYS = { j: () => move(1), k: () => move(-1), o: open, "?": show };

function show() { if (!dialog().open) dialog().showModal(); }

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || !on()) return;
  if (event.target.closest("input, textarea, select, dialog")) return;
  if (prefix === "g" && GO[event.key]) {
    location.assign(GO[event.key]);
    return;
  }
  prefix = event.key === "g" ? "g" : "";
  KEYS[event.key]?.();
});

document.addEventListener("click", (event) => {
  if (event.target.closest("[data-shortcuts]")) show();
});
const choice = document.getElementById("keys-on");
choice.checked = on();
choice.addEventListener("change", () => localStorage.setItem(SETTING, choice.checked ? "on" : "off"));
