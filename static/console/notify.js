// Tells the system of decisions that wait, while a page is open and the account wants it.
// A service worker shows the message where it can: phones allow no other way.
import { gettext } from "./words.js";
export const WORKER = new URL("./notify-worker.js", import.meta.url).pathname;

export const wanted = () => document.documentElement.dataset.notify === "on";

export async function tellSystem({ title, body, address, tag }) {
  if (!wanted() || !("Notification" in window) || Notification.permission !== "granted") return false;
  if (!document.hidden) return false; // who looks at the page reads it there
  const options = { body, tag, data: { address } };
  const worker = await navigator.serviceWorker?.register(WORKER).catch(() => null);
  if (worker) {
    await worker.showNotification(title, options);
    return true;
  }
  const shown = new Notification(title, options);
  shown.onclick = () => {
    window.focus();
    location.assign(address);
  };
  return true;
}

// The browser asks when the setting is switched on, not when a page is opened.
document.addEventListener("change", async (event) => {
  const box = event.target.closest?.("[data-notify]");
  if (!box?.checked) return;
  if (!("Notification" in window)) {
    refuse(box, gettext("This browser shows no notifications, or only over HTTPS."));
  } else if (await Notification.requestPermission() !== "granted") {
    refuse(box, gettext("The browser does not allow it. Change that in its settings for this site."));
  }
});

function refuse(box, why) {
  box.checked = false;
  const note = document.createElement("p");
  note.className = "error-note";
  note.setAttribute("role", "alert");
  note.textContent = why;
  box.closest("label").after(note);
}
