// The page: asks the agent every now and then and shows what it says. What records say
// was chosen by others, also by attackers: it is only ever set as text.
"use strict";

const $ = (id) => document.getElementById(id);

function make(name, attributes = {}, ...children) {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    element.setAttribute(key, value);
  }
  element.append(...children.map((child) => (child instanceof Node ? child : String(child))));
  return element;
}

const cell = (content, kind = "") => make("td", kind ? { class: kind } : {}, content ?? "");
const VERDICTS = {
  allow: ["good", "✓", "Allowed"],
  deny: ["bad", "✕", "Denied"],
  failed: ["warn", "!", "Failed"],
  mixed: ["warn", "!", "Some denied"],
};
const LEAVES = {
  valid: ["good", "✓", "Valid"],
  due: ["warn", "!", "Renewal due"],
  late: ["bad", "!", "Renewal late"],
  expired: ["bad", "✕", "Expired"],
  missing: ["bad", "✕", "Missing"],
};
const badge = ([kind, sign, text]) => make("span", { class: `badge ${kind}` }, make("span", { "aria-hidden": "true" }, sign), text);
const verdict = (name) => badge(VERDICTS[name] ?? ["plain", "–", name || "None"]);

const two = (number) => String(number).padStart(2, "0");
function time(text, day = false) {
  const at = new Date(text);
  if (Number.isNaN(at.getTime())) {
    return String(text ?? "");
  }
  const clock = `${two(at.getHours())}:${two(at.getMinutes())}:${two(at.getSeconds())}`;
  const date = `${at.getFullYear()}-${two(at.getMonth() + 1)}-${two(at.getDate())}`;
  const today = at.toDateString() === new Date().toDateString();
  return make("time", { datetime: text, class: "nowrap" }, day || !today ? `${date} ${clock}` : clock);
}

function span(milliseconds) {
  const minutes = Math.round(Math.abs(milliseconds) / 60000);
  const [days, hours] = [Math.floor(minutes / 1440), Math.floor((minutes % 1440) / 60)];
  return days ? `${days} d ${hours} h` : hours ? `${hours} h ${minutes % 60} min` : `${minutes} min`;
}

function until(text) {
  const left = new Date(text) - Date.now();
  const when = left >= 0 ? `in ${span(left)}` : `${span(left)} ago`;
  return make("span", {}, time(text, true), make("br"), make("span", { class: "quiet" }, when));
}

function bytes(number) {
  const units = ["B", "kB", "MB", "GB", "TB"];
  let at = 0;
  while (number >= 1000 && at < units.length - 1) {
    number /= 1000;
    at += 1;
  }
  return `${at ? number.toFixed(1) : number} ${units[at]}`;
}

/** Says something to those who listen to the page; only for what they did themselves. */
function say(text) {
  $("said").textContent = text;
}

/** Shows rows that are keyed, leaving those in place that are the same: focus and
 * selection stay. */
function fill(body, entries) {
  const there = new Map([...body.children].map((row) => [row.dataset.key, row]));
  let at = body.firstElementChild;
  for (const { key, mark, row } of entries) {
    let element = there.get(key);
    there.delete(key);
    if (!element || element.dataset.mark !== mark) {
      const fresh = row();
      fresh.dataset.key = key;
      fresh.dataset.mark = mark;
      if (element) {
        at = at === element ? fresh : at;
        element.replaceWith(fresh);
      }
      element = fresh;
    }
    if (element === at) {
      at = at.nextElementSibling;
    } else {
      body.insertBefore(element, at);
    }
  }
  there.forEach((row) => row.remove());
}

/** An empty table says why. */
function note(id, text) {
  $(id).hidden = !text;
  $(id).textContent = text;
}

// What the agent says.

const tags = new Map();
let lost = null;

/** The answer, or null while it is the same as before. */
async function ask(path) {
  const headers = tags.has(path) ? { "If-None-Match": tags.get(path) } : {};
  const answer = await fetch(path, { headers, cache: "no-store", signal: AbortSignal.timeout(10000) });
  if (answer.status === 304) {
    return null;
  }
  if (answer.status === 401) {
    location.assign("/login");
    return null;
  }
  if (!answer.ok) {
    throw new Error(`${answer.status}: ${await answer.text()}`);
  }
  if (answer.headers.has("ETag")) {
    tags.set(path, answer.headers.get("ETag"));
  }
  return answer.json();
}

function trouble(text) {
  if ($("trouble").textContent !== text) {
    $("trouble").textContent = text;
  }
  $("trouble").hidden = !text;
}

let log = {};

function reachable(error) {
  if (error) {
    lost ??= new Date();
    const since = `${two(lost.getHours())}:${two(lost.getMinutes())}:${two(lost.getSeconds())}`;
    trouble(
      error instanceof TypeError || error.name === "TimeoutError"
        ? `The agent does not answer since ${since}. What is shown is from before; the page tries again by itself.`
        : `The agent could not answer at ${since}: ${error.message}`,
    );
    return;
  }
  lost = null;
  const damage = log.damage ? `The audit log is damaged, see postern audit verify: ${log.damage}` : "";
  trouble(log.error ? `The audit log cannot be read: ${log.error}` : damage);
}

const reading = () => (log.current || log.error ? "" : "The audit log is being read…");

// The map.

let map = { nodes: [], edges: [] };
let chosen = null;

function choose(id) {
  chosen = chosen === id ? null : id;
  showMap();
  say(chosen ? `Only what touches ${chosen} is shown.` : "All services are shown.");
}

function showMap() {
  if (!map.nodes.some((node) => node.id === chosen)) {
    chosen = null;
  }
  const { left } = draw($("drawing"), map.nodes, map.edges, chosen, choose);
  const none = map.edges.length === 0;
  $("drawing").toggleAttribute("hidden", none);
  $("drawing-region").hidden = false;
  note("map-empty", none ? reading() || "Nothing was called yet. A connection appears here when it ends, a request when it is answered." : "");
  const more = left > 0 ? ` The drawing leaves out ${count(left)} quieter edges; the table has all.` : "";
  const gone = map.leftOut > 0 ? ` ${count(map.leftOut)} long unused edges were forgotten.` : "";
  $("map-note").replaceChildren(...(log.since ? ["From the audit log since ", time(log.since), `.${more}${gone}`] : []));
  $("deselect").hidden = chosen === null;
  const edges = map.edges
    .filter((edge) => chosen === null || edge.source === chosen || edge.destination === chosen)
    .sort((a, b) => b.rate - a.rate || b.denied - a.denied || (a.source + a.destination < b.source + b.destination ? -1 : 1));
  fill(
    $("edges"),
    edges.map((edge) => ({
      key: JSON.stringify([edge.source, edge.destination, edge.transport]),
      mark: JSON.stringify(edge),
      row: () => edgeRow(edge),
    })),
  );
}

function edgeRow(edge) {
  const decided = make("td", {}, verdict(edge.verdict));
  for (const policy of edge.policies) {
    decided.append(make("div", { class: "quiet break" }, policy));
  }
  const calls = Math.max(edge.requests, edge.connections);
  return make(
    "tr",
    {},
    make("th", { scope: "row", class: "break" }, edge.source),
    cell(edge.destination, "break"),
    cell(TRANSPORTS[edge.transport] ?? edge.transport),
    decided,
    cell(edge.rate > 0 ? `${rate(edge.rate)}/s` : "0", "number"),
    cell(count(edge.denied), "number"),
    cell(count(edge.errors), "number"),
    cell(count(calls), "number"),
    cell(bytes(edge.sent + edge.received), "number"),
  );
}

// Decisions.

let limit = 100;
const KINDS = { connection: "Connection", request: "Request", bypass: "Past the agent", token: "Token", agent: "Agent", gap: "Gap", retention: "Retention", reopened: "Reopened" };

function query() {
  const asked = new URLSearchParams({ limit });
  for (const [name, value] of new FormData($("filters"))) {
    if (value) {
      // What people type is in their own time zone.
      asked.set(name, name === "since" || name === "until" ? new Date(value).toISOString() : value.trim());
    }
  }
  return asked;
}

const filtered = () => [...query().keys()].length > 1;

function decisionRow(row) {
  const details = make("button", { type: "button", "aria-label": `Details of record ${row.seq}` }, "Details");
  details.addEventListener("click", () => open(row.seq));
  const way = row.transport ? make("div", { class: "quiet" }, TRANSPORTS[row.transport] ?? row.transport) : "";
  return make(
    "tr",
    {},
    make("th", { scope: "row" }, time(row.time)),
    make("td", {}, KINDS[row.kind] ?? row.kind, way),
    make("td", {}, row.verdict ? verdict(row.verdict) : ""),
    cell(row.source, "break"),
    cell(row.destination, "break"),
    cell(row.what, "wide"),
    cell(row.policy, "break"),
    cell(row.process, "break"),
    make("td", {}, details),
  );
}

function showDecisions(found) {
  fill(
    $("rows"),
    found.rows.map((row) => ({ key: String(row.seq), mark: "", row: () => decisionRow(row) })),
  );
  const none = found.rows.length === 0;
  note("rows-empty", none ? reading() || (filtered() ? "No kept record fits these filters." : "Nothing was decided yet.") : "");
  $("more").hidden = !found.more || limit >= 500;
  $("decisions-note").textContent = `Newest first; the latest ${count(found.kept)} are kept for this page. Older ones are in the audit log.`;
}

async function open(seq) {
  $("record-title").textContent = `Record ${seq}`;
  const body = $("record-body");
  body.replaceChildren("Loading…");
  $("record").showModal();
  try {
    const answer = await fetch(`/api/decisions/${seq}`, { cache: "no-store" });
    body.replaceChildren(answer.ok ? fields(await answer.json()) : await answer.text());
  } catch {
    body.replaceChildren("The agent does not answer.");
  }
}

/** A record's fields as a list of terms, nested as they are. */
function fields(value) {
  const list = make("dl", { class: "fields" });
  for (const [name, inner] of Object.entries(value)) {
    const nested = inner !== null && typeof inner === "object" && Object.keys(inner).length > 0;
    const plain = Array.isArray(inner) && inner.every((item) => item === null || typeof item !== "object");
    const shown = nested && !plain ? fields(inner) : plain ? inner.join(", ") || "none" : String(inner);
    list.append(make("dt", {}, name), make("dd", { class: nested && !plain ? "" : "mono" }, shown));
  }
  return list;
}

// Certificates and health.

function showCertificates(list) {
  fill(
    $("leaves"),
    list.map((leaf) => ({
      key: leaf.identity,
      // Times are shown as distances from now.
      mark: JSON.stringify(leaf) + Math.floor(Date.now() / 60000),
      row: () => leafRow(leaf),
    })),
  );
  note("leaves-empty", list.length ? "" : "No account of this node has a certificate: no pod here is in the mesh.");
}

function leafRow(leaf) {
  const state = make("td", {}, badge(LEAVES[leaf.state] ?? ["plain", "–", leaf.state]));
  if (leaf.error) {
    state.append(make("div", { class: "break" }, leaf.error));
  }
  const has = Boolean(leaf.serial);
  return make(
    "tr",
    {},
    make("th", { scope: "row", class: "wide" }, leaf.identity),
    state,
    make("td", {}, has ? until(leaf.notBefore) : ""),
    make("td", {}, has ? until(leaf.notAfter) : ""),
    make("td", {}, has ? until(leaf.renewAt) : ""),
    cell(leaf.issuer, "break"),
    make("td", { class: "wide mono" }, leaf.serial ?? "", make("br"), make("span", { class: "quiet" }, leaf.fingerprint ?? "")),
  );
}

function showHealth(health) {
  const { status, samples } = health;
  const value = (name, label) => {
    const found = samples.find((sample) => sample.name === name && (label === undefined || sample.labels?.name === label));
    return found?.value ?? 0;
  };
  const losses = samples.filter((sample) => sample.name === "kernel" && sample.labels?.name?.startsWith("lost_"));
  const lostEvents = losses.reduce((sum, sample) => sum + sample.value, 0);
  document.title = `Postern: ${status.node}`;
  $("node").textContent = status.node;
  $("ready").replaceChildren(badge(status.ready ? ["good", "✓", "Ready"] : ["bad", "✕", "Not ready"]));
  $("logout").hidden = !health.guarded;
  const tiles = [
    ["Version", status.version],
    ["Uptime", span(Date.now() - new Date(health.started))],
    ["Open connections", count(status.connections)],
    ["Tunnels", count(value("tunnels"))],
    ["Policies", count(status.policies)],
    ["Workloads here", count(status.workloads.length)],
    ["Workloads known", count(status.knownWorkloads)],
    ["Trust roots", count(status.roots)],
    ["Audit records", count(value("audit_records_written"))],
    ["Audit lost", count(value("audit_records_lost")), value("audit_records_lost") > 0],
    ["Kernel events lost", count(lostEvents), lostEvents > 0],
    ["Problems", count(status.problems.length), status.problems.length > 0],
  ];
  $("tiles").replaceChildren(
    ...tiles.map(([name, text, attention]) => make("div", attention ? { class: "attention" } : {}, make("dt", {}, name), make("dd", {}, text))),
  );
  const list = make("ul", {}, ...status.problems.map((problem) => make("li", {}, problem)));
  $("problems").replaceChildren(...(status.problems.length ? [make("div", { class: "error" }, make("strong", {}, "Problems"), list)] : []));
  fill(
    $("workloads"),
    status.workloads.map((workload) => ({ key: workload.pod, mark: JSON.stringify(workload), row: () => workloadRow(workload) })),
  );
  note("workloads-empty", status.workloads.length ? "" : "No pod of this node is known.");
  const fills = samples.filter((sample) => sample.name === "map_entries");
  $("maps").replaceChildren(...fills.map((sample) => mapRow(sample.labels.name, sample.value, health.limits[sample.labels.name])));
  const sinks = samples.filter((sample) => sample.labels?.sink !== undefined);
  $("sinks-card").hidden = sinks.length === 0;
  $("sinks").replaceChildren(...sinks.map((sample) => counterRow(sample.labels.sink, sample.name.replaceAll("_", " "), sample.value)));
  $("counters").replaceChildren(
    ...samples.map((sample) => {
      const labels = Object.entries(sample.labels ?? {}).map(([name, text]) => `${name}=${text}`);
      return counterRow(sample.name.replaceAll("_", " "), labels.join(" "), sample.value);
    }),
  );
}

function workloadRow(workload) {
  const known = { enrolled: ["good", "✓", "Enrolled"], disabled: ["plain", "–", "Disabled"] };
  const state = known[workload.state] ? badge(known[workload.state]) : workload.state;
  const pod = make("th", { scope: "row", class: "break" }, workload.pod, make("div", { class: "quiet" }, workload.identity));
  return make("tr", {}, pod, make("td", { class: "break" }, state), cell(workload.addresses.join(", "), "break"));
}

function mapRow(name, entries, most) {
  const share = most ? entries / most : 0;
  const text = `${(share * 100).toFixed(share < 0.1 ? 2 : 0)} %`;
  const meter = make("meter", { min: 0, max: 1, low: 0.75, high: 0.9, optimum: 0, value: share, "aria-label": `Fill of ${name}` }, text);
  return make("tr", {}, make("th", { scope: "row" }, name), cell(count(entries), "number"), cell(most ? count(most) : "", "number"), make("td", { class: "nowrap" }, meter, ` ${text}`));
}

function counterRow(first, second, value) {
  return make("tr", {}, make("th", { scope: "row", class: "break" }, first), cell(second, "break"), cell(count(value), "number"));
}

// The rounds.

const JOBS = [
  { every: 2000, path: () => "/api/map", show: (answer) => ((map = answer), showMap()) },
  { every: 2000, path: () => `/api/decisions?${query()}`, show: showDecisions },
  { every: 5000, path: () => "/api/health", show: showHealth },
  { every: 15000, path: () => "/api/certificates", show: showCertificates },
];
let paused = false;
let busy = false;

async function round(now = false) {
  if (busy || document.hidden || (paused && !now)) {
    return;
  }
  busy = true;
  let error = null;
  for (const job of JOBS) {
    if (!now && job.asked && Date.now() - job.asked < job.every - 100) {
      continue;
    }
    try {
      const answer = await ask(job.path());
      if (answer) {
        log = answer.log ?? log;
        job.show(answer);
      }
      job.asked = Date.now();
    } catch (failed) {
      error = failed;
      break;
    }
  }
  reachable(error);
  busy = false;
}

/** Asks for decisions at once: a filter changed. */
async function look() {
  try {
    const path = `/api/decisions?${query()}`;
    tags.delete(path);
    const answer = await ask(path);
    if (answer && path === `/api/decisions?${query()}`) {
      showDecisions(answer);
      say(`${count(answer.rows.length)}${answer.more ? " or more" : ""} records fit.`);
    }
  } catch (error) {
    reachable(error);
  }
}

let waiting;
$("filters").addEventListener("input", () => {
  clearTimeout(waiting);
  waiting = setTimeout(look, 300);
});
// After the fields are empty.
$("filters").addEventListener("reset", () => setTimeout(look));
$("filters").addEventListener("submit", (event) => {
  event.preventDefault();
  look();
});
$("more").addEventListener("click", () => {
  limit = Math.min(limit + 100, 500);
  look();
});
$("deselect").addEventListener("click", () => {
  choose(chosen);
  focusNode($("drawing"), undefined);
});
keys($("drawing"), choose);
$("pause").addEventListener("click", () => {
  paused = !paused;
  $("pause").setAttribute("aria-pressed", String(paused));
  if (!paused) {
    round();
  }
});
$("logout").addEventListener("click", async () => {
  await fetch("/logout", { method: "POST" }).catch(() => {});
  location.assign("/login");
});

function theme(name) {
  if (name) {
    document.documentElement.dataset.theme = name;
  } else {
    delete document.documentElement.dataset.theme;
  }
}
$("theme").addEventListener("change", () => {
  theme($("theme").value);
  try {
    localStorage.setItem("theme", $("theme").value);
  } catch {
    // Not kept then.
  }
});
try {
  $("theme").value = localStorage.getItem("theme") ?? "";
  theme($("theme").value);
} catch {
  // As the system has it.
}

document.addEventListener("visibilitychange", () => round());
setInterval(round, 1000);
round();
// The first look only makes the agent begin to read its log.
setTimeout(() => round(true), 400);
