// The event stream: websocket, gap filling over REST, and polling when there is no socket.
// The server's rows are authoritative; a socket message only delivers them sooner.

const STALE_AFTER = 25_000;
const POLL_EVERY = 5_000;
const FAILURES_BEFORE_POLLING = 3;
const LONGEST_PAUSE = 30_000;

export class Link extends EventTarget {
  constructor(since) {
    super();
    this.seqs = new Map(Object.entries(since));
    this.failures = 0;
    this.lastMessageAt = Date.now();
    this.socket = null;
    this.polling = null;
    this.timer = null;
    this.connect();
    addEventListener("online", () => this.retry());
    document.addEventListener("visibilitychange", () => {
      if (!document.hidden && this.age > STALE_AFTER) this.retry();
    });
  }

  get age() { return Date.now() - this.lastMessageAt; }

  get state() {
    if (this.age > STALE_AFTER) return "stale";
    if (this.open) return "live";
    if (this.polling) return "polling";
    return this.failures ? "reconnecting" : "connecting";
  }

  get open() { return this.socket?.readyState === WebSocket.OPEN && this.subscribed; }

  retry() {
    if (this.open && this.age < STALE_AFTER) return;
    clearTimeout(this.timer);
    this.drop();
    this.connect();
  }

  drop() {
    if (!this.socket) return;
    this.socket.onclose = null;
    this.socket.close();
    this.socket = null;
  }

  connect() {
    this.subscribed = false;
    const scheme = location.protocol === "https:" ? "wss" : "ws";
    const socket = new WebSocket(`${scheme}://${location.host}/ws/v1/stream`);
    this.socket = socket;
    socket.onopen = () => {
      for (const [topic, seq] of this.seqs) {
        socket.send(JSON.stringify({ op: "subscribe", topic, since: seq }));
      }
    };
    socket.onmessage = (event) => this.receive(JSON.parse(event.data));
    socket.onclose = () => this.lost();
    this.changed();
  }

  receive(message) {
    this.lastMessageAt = Date.now();
    if (message.op === "subscribed") {
      this.confirm(message);
    } else if (message.topic && message.type) {
      this.take(message);
    }
    this.changed();
  }

  confirm(message) {
    this.subscribed = true;
    this.failures = 0;
    clearInterval(this.polling);
    this.polling = null;
    const known = this.seqs.get(message.topic) ?? 0;
    // The server has fewer events than this page has seen: its database was created anew.
    if (message.seq < known) this.seqs.set(message.topic, message.seq);
  }

  take(message) {
    if (!message.seq) {
      this.tell("message", message); // a progress notification, which has no row
      return;
    }
    const known = this.seqs.get(message.topic) ?? 0;
    if (message.seq <= known) return;
    if (message.seq > known + 1) {
      this.fill(message.topic).catch(() => {});
      return;
    }
    this.seqs.set(message.topic, message.seq);
    this.tell("message", message);
  }

  async fill(topic) {
    let again = true;
    while (again) {
      const after = this.seqs.get(topic) ?? 0;
      const query = new URLSearchParams({ topic, after });
      const answer = await fetch(`/api/v1/events?${query}`, { headers: { Accept: "application/json" } });
      if (!answer.ok) throw new Error(`events: ${answer.status}`);
      const { results } = await answer.json();
      this.lastMessageAt = Date.now();
      for (const message of results) {
        if (message.seq <= (this.seqs.get(topic) ?? 0)) continue;
        this.seqs.set(topic, message.seq);
        this.tell("message", message);
      }
      again = results.length >= 500;
    }
  }

  lost() {
    this.subscribed = false;
    this.failures += 1;
    if (this.failures >= FAILURES_BEFORE_POLLING && !this.polling) {
      this.polling = setInterval(() => this.poll(), POLL_EVERY);
      this.poll();
    }
    const pause = Math.min(LONGEST_PAUSE, 500 * 2 ** Math.min(this.failures, 6));
    clearTimeout(this.timer);
    this.timer = setTimeout(() => this.connect(), pause * (0.5 + Math.random() / 2));
    this.changed();
  }

  async poll() {
    try {
      for (const topic of this.seqs.keys()) await this.fill(topic);
    } catch {
      // Nothing was received, so the age grows and the page shows it.
    }
    this.changed();
  }

  tell(name, detail) { this.dispatchEvent(new CustomEvent(name, { detail })); }

  changed() { this.tell("change"); }
}
