// Shows what the server pushes, and opens the decision that a notification is about.
self.addEventListener("push", (event) => {
  let told = {};
  try { told = event.data.json(); } catch { /* a browser must show something all the same */ }
  const { title = "Something has happened in Esper", body = "", address = "/", tag } = told;
  event.waitUntil(self.registration.showNotification(title, { body, tag, data: { address } }));
});

self.addEventListener("notificationclick", (event) => {
  event.notification.close();
  const named = new URL(event.notification.data?.address ?? "/", self.location.origin);
  const address = named.origin === self.location.origin ? named.href : self.location.origin;
  event.waitUntil((async () => {
    const pages = await self.clients.matchAll({ type: "window", includeUncontrolled: true });
    const open = pages.find((page) => page.url === address);
    return open ? open.focus() : self.clients.openWindow(address);
  })());
});
