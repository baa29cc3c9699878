// A launch's log. The page contains the end of the log so far and fetches what follows it.
// A notification starts a fetch at once; a timer fetches what a lost notification was for.

import { gettext } from "./words.js";

const place = document.getElementById("launch-log");
const LONGEST = 400_000; // characters that the page keeps
const LOOK_EVERY = 5_000;
let end = Number(place.dataset.end);
let looking = null;
let again = false;

// The server's template filter does the same: invisible characters must not reorder a line.
const HIDDEN = /(?!\n|\t)[\p{Cf}\p{Cc}\p{Co}\p{Cn}]/gu;
const visible = (text) => text.replace(
  HIDDEN, (char) => `⟨U+${char.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}⟩`,
);

function append(text) {
  const atEnd = place.scrollHeight - place.scrollTop - place.clientHeight < 40;
  place.append(visible(text));
  while (place.textContent.length > LONGEST && place.childNodes.length > 1) place.firstChild.remove();
  document.getElementById("log-empty").hidden = true;
  if (atEnd) place.scrollTop = place.scrollHeight; // do not move a reader who has scrolled up
}

async function fetchPages() {
  let more = true;
  while (more) {
    const answer = await fetch(`/api/v1/launches/${place.dataset.launch}/log?after=${end}`, {
      headers: { Accept: "application/json" },
    });
    if (!answer.ok) return;
    const page = await answer.json();
    if (page.start > end && end > 0) append(`… ${gettext("some lines are on the host only")} …\n`);
    if (page.text) append(page.text);
    end = page.end;
    more = page.more;
  }
}

function look() {
  if (looking) {
    again = true;
    return;
  }
  looking = fetchPages().catch(() => {}).finally(() => {
    looking = null;
    if (again) {
      again = false;
      look();
    }
  });
}

place.scrollTop = place.scrollHeight;
document.addEventListener("esper:event", ({ detail: { type } }) => {
  if (type === "launch.log" || type === "launch.changed") look();
});
setInterval(() => {
  const state = document.getElementById("launch-state")?.dataset.state;
  if (!document.hidden && !["stopped", "finished", "failed"].includes(state)) look();
}, LOOK_EVERY);
