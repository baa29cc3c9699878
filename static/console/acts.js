// Acts go to the REST API. The page shows "Approving…" until the server has answered.
import { bulkResult, picksOf } from "./bulk.js";
import { announce, toast, visible } from "./messages.js";
import { refreshAll, refreshDecision } from "./panels.js";
import { subscribe } from "./push.js";
import { gettext } from "./words.js";

const token = document.querySelector('meta[name="csrf-token"]').content;
// One idempotency key for each attempt: after a lost answer the same key is sent again.
const attempts = new WeakMap();

document.addEventListener("submit", (event) => {
  const form = event.target;
  if (!form.matches("[data-act], [data-api], [data-forms]")) return;
  event.preventDefault();
  const button = event.submitter ?? form.querySelector("button[type=submit]");
  if (button.getAttribute("aria-disabled") === "true" || form.dataset.busy) return;
  perform(form, button);
});

async function perform(form, button) {
  say(form, "");
  const reason = form.elements.reason;
  if (button.dataset.needsReason && !reason.value.trim() && !hasCode(form, button)) {
    say(form, button.dataset.needsReason);
    unfold(true);
    reason.focus();
    return;
  }
  const choices = [...form.elements].filter((field) => "list" in field.dataset);
  if (choices.length && !choices.some((field) => field.checked)) {
    say(form, form.dataset.needsChoice);
    choices[0].focus();
    return;
  }
  if (button.dataset.confirm && !(await confirmed(button))) return;
  const words = button.textContent;
  busy(form, button, button.dataset.doing ?? form.dataset.doing);
  try {
    await send(form, button);
  } finally {
    delete form.dataset.busy;
    for (const other of form.querySelectorAll("button")) other.disabled = false;
    if (button.isConnected) button.textContent = words;
  }
}

// On a phone the fields are folded until they are needed: the two buttons stay in sight.
function unfold(open) {
  document.body.toggleAttribute("data-unfolded", open);
  document.getElementById("acts-unfold")?.setAttribute("aria-expanded", String(open));
}
document.addEventListener("click", (event) => {
  if (event.target.closest?.("[data-unfold]")) unfold(!document.body.hasAttribute("data-unfolded"));
});

// A chosen code is a reason; "other" needs words.
function hasCode(form, button) {
  return [...form.elements].some((field) =>
    field.dataset.for && field.dataset.for === button.dataset.path && !["", "other"].includes(field.value));
}

function busy(form, button, doing) {
  form.dataset.busy = "yes";
  for (const other of form.querySelectorAll("button")) other.disabled = true;
  if (doing) button.textContent = doing;
}

function addressOf(form, button) {
  if (button.dataset.url) return button.dataset.url;
  return form.dataset.api ? `${form.dataset.api}/${button.dataset.path}` : form.dataset.act;
}

function bodyOf(form, button) {
  const body = { ...JSON.parse(form.dataset.body ?? "{}"), ...JSON.parse(button.dataset.body ?? "{}") };
  if ("changes" in form.dataset) body.changes = changesOf(form);
  if ("parameters" in form.dataset) body.parameters = parametersOf(form);
  if ("settings" in form.dataset) body.config = parametersOf(form);
  if ("picks" in form.dataset) body[form.dataset.picks] = picksOf(form);
  if ("limits" in form.dataset) body.limits = limitsOf(form);
  for (const field of form.elements) {
    if (!field.name || field.disabled && field.tagName === "BUTTON") continue;
    if ("was" in field.dataset || "parameter" in field.dataset) continue;
    if (field.dataset.for && field.dataset.for !== button.dataset.path) continue;
    if ("list" in field.dataset) {
      body[field.name] ??= [];
      if (field.checked) body[field.name].push(field.value);
    } else if (field.tagName !== "BUTTON") {
      body[field.name] = "flag" in field.dataset ? field.value === "true" : field.value.trim();
    }
  }
  for (const name of (form.dataset.times ?? "").split(" ").filter(Boolean)) body[name] = new Date(body[name]).toISOString();
  for (const name of (form.dataset.omitEmpty ?? "").split(" ")) if (body[name] === "") delete body[name];
  for (const name of (form.dataset.number ?? "").split(" ").filter(Boolean)) body[name] = Number(body[name]);
  Object.assign(body, JSON.parse(button.dataset.body ?? "{}")); // what the button says goes first
  // Tokens and launches have no reason; every other act has one, which may be empty.
  if ("secret" in form.dataset || "parameters" in form.dataset || "noReason" in form.dataset) delete body.reason;
  else body.reason ??= "";
  return body;
}

function changesOf(form) {
  const changed = [...form.elements].filter((field) => "was" in field.dataset && field.value !== field.dataset.was);
  return Object.fromEntries(changed.map((field) => [
    field.name, field.dataset.kind === "risk" ? field.value : Number(field.value),
  ]));
}

const TYPED = { number: Number, flag: (text) => text === "true", text: (text) => text };
function parametersOf(form) {
  const chosen = [...form.elements].filter((field) => "parameter" in field.dataset);
  return Object.fromEntries(chosen.map((field) => [field.name, TYPED[field.dataset.parameter](field.value)]));
}

// Pairs of fields: the lowest and the highest value of a setting.
function limitsOf(form) {
  const limits = {};
  for (const field of form.querySelectorAll("[data-limit]")) (limits[field.dataset.limit] ??= []).push(Number(field.value));
  return limits;
}

function keyFor(form, address, body) {
  const what = `${address} ${JSON.stringify(body)}`;
  const attempt = attempts.get(form);
  if (attempt?.what === what) return attempt.key;
  const key = crypto.randomUUID?.() ?? randomKey(); // only secure contexts have randomUUID
  attempts.set(form, { what, key });
  return key;
}

function randomKey() {
  const bytes = crypto.getRandomValues(new Uint8Array(16));
  return [...bytes].map((byte) => byte.toString(16).padStart(2, "0")).join("");
}

async function send(form, button) {
  const [address, body] = [addressOf(form, button), bodyOf(form, button)];
  if (form.dataset.pushKey && body.kind === "push") {
    try {
      Object.assign(body, await subscribe(form.dataset.pushKey));
    } catch (error) {
      say(form, error.message);
      return;
    }
  }
  const method = form.dataset.method ?? "POST";
  const headers = {
    Accept: "application/json", "X-CSRFToken": token, "Idempotency-Key": keyFor(form, address, body),
  };
  if (form.dataset.ifMatch) headers["If-Match"] = `"${form.dataset.ifMatch}"`;
  const options = { method, headers };
  if (method !== "DELETE") {
    headers["Content-Type"] = "application/json";
    options.body = JSON.stringify(body);
  }
  let answer;
  try {
    answer = await fetch(address, options);
  } catch {
    say(form, gettext("The server did not answer, so the result is unknown. Press the button again: the server does nothing twice."));
    return;
  }
  attempts.delete(form);
  const content = await answer.json().catch(() => ({}));
  if (answer.ok) await done(form, button, content);
  else refused(form, button, answer.status, content);
}

const DONE = {
  approve: gettext("Approved."), reject: gettext("Rejected."), claim: gettext("Claimed for ten minutes."),
  release: gettext("Released."), extend: gettext("Extended by five minutes."), cancel: gettext("Cancelled."),
  rollback: gettext("Rollback requested. The trainer confirms it."),
};

async function done(form, button, content) {
  // This act made the new version: the next act can use it before the panel is refreshed.
  const version = content.revision ?? content.version;
  if (form.dataset.ifMatch && Number.isInteger(version)) form.dataset.ifMatch = version;
  if (content.secret ?? content.token) showSecret(form, content.secret ?? content.token);
  const bulk = "picks" in form.dataset ? bulkResult(content) : null;
  if (bulk?.failed) say(form, `${bulk.words} ${bulk.failed}`);
  const words = bulk?.words ?? DONE[button.dataset.path] ?? button.dataset.done ?? form.dataset.done ?? gettext("Done.");
  announce(words, { urgent: true });
  toast({ text: words });
  const reason = form.elements.reason;
  if (reason && !["claim", "release", "extend"].includes(button.dataset.path)) reason.value = "";
  if (form.dataset.open) {
    location.assign(form.dataset.open + content.uid); // to what was made
    return;
  }
  form.closest("details.menu")?.removeAttribute("open");
  if (form.id === "acts") { // its buttons stay locked until the new state is on the page
    button.textContent = words;
    await refreshDecision();
  }
  refreshAll();
}

function refused(form, button, status, problem) {
  const detail = problem.detail ?? gettext("The server refused the request (%(status)s).", { status });
  say(form, detail);
  if (problem.code === "evidence-stale") offerNewEvidence(form, button);
  if (problem.code === "password-needed") askPassword(form, button);
  // The refreshed page shows the newer state; the text that was typed stays.
  if ([409, 412, 423].includes(status)) refreshAll();
  if (status === 403 && problem.code === "not-signed-in" || status === 401) location.reload();
}

function say(form, text) {
  const place = form.querySelector("[role=alert]");
  if (!place) return;
  place.textContent = visible(text);
  place.hidden = !text;
  shownAt.set(place, Date.now());
}
const shownAt = new WeakMap();
// A message belongs to the state in which it was shown: remove it when the decision has changed.
document.addEventListener("htmx:afterSwap", (event) => {
  const place = document.getElementById("acts-error");
  if (event.detail.target.id !== "panel-head" || !place || place.hidden) return;
  const decision = document.getElementById("decision");
  const seen = `${decision.dataset.state} ${decision.dataset.version}`;
  const moved = place.dataset.seen && place.dataset.seen !== seen;
  if (moved && Date.now() - shownAt.get(place) > 5_000) say(place.closest("form"), "");
  place.dataset.seen = seen;
});

function offerNewEvidence(form, button) {
  const place = form.querySelector("[role=alert]");
  const again = document.createElement("button");
  again.type = "submit";
  again.className = "button small";
  again.textContent = gettext("I have checked the new values: approve");
  if (button.dataset.path) again.dataset.path = button.dataset.path;
  if (button.dataset.url) again.dataset.url = button.dataset.url;
  again.dataset.doing = button.dataset.doing;
  again.dataset.needsReason = gettext("The evidence has drifted: say why you approve all the same. The audit log keeps the reason.");
  again.dataset.body = JSON.stringify({ ...JSON.parse(button.dataset.body ?? "{}"), accept_drift: true });
  place.append(" ", again);
}

function showSecret(form, secret) {
  const place = form.querySelector("[data-secret-place]");
  if (!place) return;
  place.hidden = false;
  place.querySelector(".secret").textContent = secret;
}

const PROOFS = {
  password: `<div class="field"><label for="step-up-password">${gettext("Password")}</label>
    <input type="password" name="password" id="step-up-password" autocomplete="current-password" required></div>`,
  code: `<div class="field"><label for="step-up-code">${gettext("Code of your authenticator app")}</label>
    <input type="text" name="code" id="step-up-code" autocomplete="one-time-code" autocapitalize="none" required maxlength="40"></div>`,
};

// The act is sent again once the password, or what stands for it, was given.
function askPassword(form, button) {
  const ways = (document.documentElement.dataset.proof ?? "password").split(" ");
  if (ways.includes("provider")) {
    offerProvider(form);
    return;
  }
  const title = ways.includes("password") ? gettext("Your password again") : gettext("A code of your app");
  const dialog = document.createElement("dialog");
  dialog.setAttribute("aria-label", title);
  dialog.innerHTML = `<h3>${title}</h3>
    <p>${gettext("This act needs it, because it was not given in the last ten minutes.")}</p>
    <form class="stack" method="dialog">${ways.map((way) => PROOFS[way]).join("")}
    <p class="error-note" role="alert" hidden></p>
    <div class="row apart"><button class="button" type="button" data-cancel>${gettext("Do nothing")}</button>
    <button class="button primary" type="submit">${gettext("Go on")}</button></div></form>`;
  document.body.append(dialog);
  const [field, note] = [dialog.querySelector("input"), dialog.querySelector("[role=alert]")];
  const given = dialog.querySelector("form");
  dialog.querySelector("[data-cancel]").addEventListener("click", () => dialog.close());
  dialog.addEventListener("close", () => dialog.remove());
  dialog.querySelector("form").addEventListener("submit", async (event) => {
    event.preventDefault();
    const answer = await fetch("/step-up", {
      method: "POST", headers: { "X-CSRFToken": token }, body: new URLSearchParams(new FormData(given)),
    }).catch(() => null);
    if (answer?.ok) {
      dialog.close();
      say(form, "");
      form.requestSubmit(button.isConnected ? button : undefined);
      return;
    }
    const problem = await answer?.json().catch(() => ({})) ?? {};
    note.textContent = problem.detail ?? gettext("The server did not answer. Try again.");
    note.hidden = false;
    field.select();
  });
  dialog.showModal();
  field.focus();
}

function offerProvider(form) {
  const link = document.createElement("a");
  link.href = `/login/provider?again=1&next=${encodeURIComponent(location.pathname + location.search)}`;
  link.textContent = gettext("Sign in again, and come back to this page");
  form.querySelector("[role=alert]")?.append(" ", link);
}

// The question names the object; the button is the verb.
function confirmed(button) {
  const dialog = document.createElement("dialog");
  const title = document.createElement("h3");
  title.textContent = button.dataset.confirm;
  const text = document.createElement("p");
  text.textContent = button.dataset.confirmText;
  const row = document.createElement("form");
  row.method = "dialog";
  row.className = "row apart";
  for (const [value, words, kind] of [["", gettext("Keep it as it is"), ""], ["yes", button.dataset.confirmVerb, "danger"]]) {
    const choice = document.createElement("button");
    choice.className = `button ${kind}`;
    choice.value = value;
    choice.textContent = words;
    row.append(choice);
  }
  dialog.setAttribute("aria-label", button.dataset.confirm);
  dialog.append(title, text, row);
  document.body.append(dialog);
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => {
      resolve(dialog.returnValue === "yes");
      dialog.remove();
    });
  });
}

// On a stale page the evidence is stale too: approving is blocked, the safe acts are not.
function gate({ state, clock }) {
  const stale = state === "stale";
  for (const button of document.querySelectorAll("[data-needs-live]")) {
    if (stale) button.setAttribute("aria-disabled", "true");
    else button.removeAttribute("aria-disabled");
  }
  for (const note of document.querySelectorAll("[data-stale-note]")) {
    note.hidden = !stale;
    if (stale) note.textContent = gettext("The evidence on this page is %(clock)s old. Approving is blocked until the connection is back.", { clock });
  }
}
document.addEventListener("esper:link", ({ detail }) => gate(detail));
document.addEventListener("htmx:afterSwap", () => {
  if (document.body.dataset.link === "stale") gate({ state: "stale", clock: "too" });
});
document.addEventListener("esper:expired", () => {
  for (const button of document.querySelectorAll("#acts button")) button.disabled = true;
});

// A link to a folded panel opens it.
document.addEventListener("click", (event) => {
  const link = event.target.closest?.("a[data-opens]");
  if (!link) return;
  const panel = document.querySelector(link.getAttribute("href"));
  panel?.querySelector("details.fold")?.setAttribute("open", "");
  panel?.querySelector("input, select, button")?.focus();
});

// An address that names something folded opens it.
function openNamed() {
  const named = location.hash.length > 1 && document.getElementById(decodeURIComponent(location.hash.slice(1)));
  for (let folded = named && named.closest("details"); folded; folded = folded.parentElement.closest("details")) folded.open = true;
  if (named && named.matches("details")) named.scrollIntoView();
}
addEventListener("hashchange", openNamed);
openNamed();
