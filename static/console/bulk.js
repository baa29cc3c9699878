// Choosing rows to reject together. What is chosen stays chosen when the list is refreshed.
import { gettext } from "./words.js";
const form = document.getElementById("bulk-reject");
const picked = new Set();

function show() {
  const here = new Set([...document.querySelectorAll("[data-pick]")].map((box) => box.dataset.pick));
  for (const uid of picked) if (!here.has(uid)) picked.delete(uid); // decided meanwhile
  for (const box of document.querySelectorAll("[data-pick]")) box.checked = picked.has(box.dataset.pick);
  if (!form.dataset.busy) form.querySelector("button").textContent = gettext("Reject %(number)s", { number: picked.size });
  form.hidden = !picked.size && form.querySelector("[role=alert]").hidden;
}

if (form) {
  document.addEventListener("change", (event) => {
    const box = event.target.closest?.("[data-pick]");
    if (!box) return;
    if (box.checked) picked.add(box.dataset.pick);
    else picked.delete(box.dataset.pick);
    show();
  });
  document.addEventListener("htmx:afterSwap", show);
}

// What the API takes: each with the version that the person has seen.
export function picksOf(of) {
  return [...of.elements].filter((field) => field.dataset.pick && field.checked)
    .map((field) => ({ uid: field.dataset.pick, version: Number(field.dataset.version) }));
}

// Each that was not rejected is named with its reason; "done" would hide it.
export function bulkResult({ rejected, results }) {
  const failed = results.filter((one) => one.problem);
  const said = failed.map((one) => {
    const name = document.querySelector(`#row-${CSS.escape(one.uid)} [data-open]`)?.textContent ?? one.uid;
    return `${name}: ${one.problem.detail}`;
  });
  return { words: gettext("%(rejected)s of %(all)s rejected.", { rejected, all: results.length }), failed: said.join(" ") };
}
