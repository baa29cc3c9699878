// Web Push: this browser is told of events also while no page of Esper is open, or none at all.
import { WORKER } from "./notify.js";
import { gettext } from "./words.js";

// What the server needs to reach this browser: the body of a new channel, without its events.
export async function subscribe(serverKey) {
  if (!("PushManager" in window) || !navigator.serviceWorker) {
    throw new Error(gettext("This browser takes no pushes, or only over HTTPS."));
  }
  if (await Notification.requestPermission() !== "granted") {
    throw new Error(gettext("The browser does not allow notifications. Change that in its settings for this site."));
  }
  const worker = await navigator.serviceWorker.register(WORKER);
  // A subscription of another account or of an older key of the server ends here.
  await (await worker.pushManager.getSubscription())?.unsubscribe();
  await active(worker);
  const options = { userVisibleOnly: true, applicationServerKey: serverKey };
  const made = await worker.pushManager.subscribe(options).catch((error) => {
    throw new Error(gettext("The browser's push service refused: %(why)s", { why: error.message }));
  });
  const { endpoint, keys } = made.toJSON();
  return { target: endpoint, keys: { p256dh: keys.p256dh, auth: keys.auth } };
}

async function active(registration) {
  const worker = registration.active ?? registration.waiting ?? registration.installing;
  while (worker.state !== "activated") {
    await new Promise((resolve) => { worker.addEventListener("statechange", resolve, { once: true }); });
  }
}

// Among several browsers, say which one is this.
async function markThisBrowser() {
  const marks = document.querySelectorAll("[data-push-endpoint]");
  if (!marks.length || !("PushManager" in window) || !navigator.serviceWorker) return;
  const scope = new URL("./", new URL(WORKER, location.origin)).href;
  const worker = await navigator.serviceWorker.getRegistration(scope);
  const own = (await worker?.pushManager.getSubscription())?.endpoint;
  for (const mark of marks) mark.hidden = mark.dataset.pushEndpoint !== own;
}
document.addEventListener("htmx:afterSwap", () => markThisBrowser().catch(() => {}));
markThisBrowser().catch(() => {});
