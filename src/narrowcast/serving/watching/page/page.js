// The server's page: asks for `status` every two seconds and draws it. Text is only ever set as text, never as markup.
"use strict";

const PERIOD = 2000; // milliseconds between two questions
const KEPT = 90; // looks that are remembered: three minutes
const RATE = 10; // seconds over which rates are taken
const FOLDED = 4; // models whose figures are all shown
const RECENT = 60; // seconds of the recent histograms
const PARTS = [
  ["queue", "Queue", "orange"],
  ["input", "Inputs", "sky"],
  ["model", "Model", "blue"],
  ["output", "Outputs", "purple"],
  ["rest", "Rest", "grey"],
];

const looks = [];
let recent = false; // whether histograms show the last minute, and not all since the start

// ---- text -----------------------------------------------------------------------------------------------------------

const DASH = "–";
const group = new Intl.NumberFormat("en-GB", { maximumFractionDigits: 0 });

function number(value, digits = 3) {
  if (value === null || value === undefined || !Number.isFinite(value)) return DASH;
  if (value === 0) return "0";
  if (Math.abs(value) >= 1000) return group.format(value);
  return String(Number(value.toPrecision(digits)));
}

function seconds(value) {
  if (value === null || !Number.isFinite(value)) return DASH;
  if (value < 1e-3) return `${number(value * 1e6)} µs`;
  if (value < 1) return `${number(value * 1e3)} ms`;
  return `${number(value)} s`;
}

function bytes(value) {
  if (value === null) return DASH;
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let power = 0;
  while (value >= 1024 && power < units.length - 1) {
    value /= 1024;
    power += 1;
  }
  return `${number(value)} ${units[power]}`;
}

function percent(share) {
  if (share === null || !Number.isFinite(share)) return DASH;
  if (share > 0 && share < 0.001) return "< 0.1 %";
  return `${(100 * share).toFixed(share < 0.0995 && share > 0 ? 1 : 0)} %`;
}

function span(seconds) {
  const days = Math.floor(seconds / 86400);
  const hours = Math.floor(seconds / 3600) % 24;
  const minutes = Math.floor(seconds / 60) % 60;
  if (days) return `${days} d ${hours} h`;
  if (hours) return `${hours} h ${minutes} min`;
  return minutes ? `${minutes} min` : `${Math.floor(seconds)} s`;
}

const many = (count, one, more = `${one}s`) => `${group.format(count)} ${count === 1 ? one : more}`;

// ---- elements -------------------------------------------------------------------------------------------------------

const SVG = "http://www.w3.org/2000/svg";

function el(tag, attributes = {}, ...children) {
  const node = ["svg", "path", "line", "text"].includes(tag) ? document.createElementNS(SVG, tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "width%") node.style.width = `${value}%`;
    else if (value !== null && value !== false) node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.flat().filter((child) => child !== null && child !== undefined).map((child) => child instanceof Node ? child : String(child)));
  return node;
}

// Makes a tree equal to a new one and keeps the nodes that are alike, so that focus, selection and scrolling stay.
function patch(old, fresh) {
  if (old.nodeType !== fresh.nodeType || old.nodeName !== fresh.nodeName) {
    old.replaceWith(fresh);
    return;
  }
  if (old.nodeType === Node.TEXT_NODE) {
    if (old.data !== fresh.data) old.data = fresh.data;
    return;
  }
  for (const { name } of [...old.attributes]) if (!fresh.hasAttribute(name) && name !== "open") old.removeAttribute(name);
  for (const { name, value } of fresh.attributes) if (name !== "style" && old.getAttribute(name) !== value) old.setAttribute(name, value);
  if (old.style.width !== fresh.style.width) old.style.width = fresh.style.width;
  const [before, after] = [[...old.childNodes], [...fresh.childNodes]];
  after.forEach((child, place) => (place < before.length ? patch(before[place], child) : old.append(child)));
  before.slice(after.length).forEach((child) => child.remove());
}

// ---- numbers --------------------------------------------------------------------------------------------------------

const loaded = (look) => look.models.flatMap((model) => model.versions.filter((version) => version.loaded).map((version) => ({ key: `${model.name}\n${version.version}`, name: model.name, ...version.loaded })));
const counted = (look, key) => loaded(look).find((version) => version.key === key)?.counted;
const sum = (values) => values.reduce((total, value) => total + value, 0);
const refusals = (count) => sum(Object.values(count.refused));

// The look that is about so many seconds old; the oldest while there is none.
function past(age) {
  const now = looks.at(-1).now;
  return looks.find((look) => now - look.now <= age) ?? looks.at(-1);
}

// What was counted between two looks; what was counted so far where a version began anew or there is no look before.
function between(now, before) {
  if (!before || now === before) return now;
  const less = (a, b) =>
    typeof a === "number"
      ? a - (b ?? 0)
      : Array.isArray(a)
        ? a.map((value, place) => less(value, b?.[place]))
        : Object.fromEntries(Object.entries(a).map(([name, value]) => [name, less(value, b?.[name])]));
  return now.executions < before.executions ? now : less(now, before);
}

// How often something happened each second lately, or null while there is but one look.
function rate(key, read) {
  const [now, before] = [looks.at(-1), past(RATE)];
  const [new_, old] = [counted(now, key), counted(before, key)];
  if (now === before || !new_ || !old) return null;
  return Math.max(0, read(new_) - read(old)) / (now.now - before.now);
}

const rates = (versions, read) => {
  const found = versions.map((version) => rate(version.key, read)).filter((value) => value !== null);
  return found.length ? sum(found) : null;
};

// The bound that a share of the requests stayed within, as words: a histogram knows no more.
function quantile(share, buckets, bounds) {
  const total = sum(buckets);
  if (!total) return DASH;
  let seen = 0;
  const place = buckets.findIndex((count) => (seen += count) >= share * total);
  return place < bounds.length ? `≤ ${seconds(bounds[place])}` : `> ${seconds(bounds.at(-1))}`;
}

function window_(version) {
  if (!recent) return version.counted;
  const before = counted(past(RECENT), version.key);
  return looks.length > 1 ? between(version.counted, before ?? version.counted) : version.counted;
}

// ---- parts of the page ----------------------------------------------------------------------------------------------

function headline(look) {
  const versions = look.models.flatMap((model) => model.versions.map((version) => ({ ...version, name: model.name })));
  const down = versions.filter((version) => version.loaded && version.state !== "READY");
  const up = new Set(versions.filter((version) => version.state === "READY").map((version) => version.name)).size;
  if (look.state === "ending") return "The server is ending: it finishes what it began";
  if (down.length) return `${down.map((version) => `${version.name} ${version.version}`).join(", ")} cannot answer`;
  return up ? `${many(up, "model")} ${up === 1 ? "answers" : "answer"}` : "No model is loaded";
}

function verdict(look) {
  const versions = loaded(look);
  const good = look.state === "ready";
  const buckets = versions.map((version) => window_(version).buckets);
  const all = look.bounds.concat(0).map((_, place) => sum(buckets.map((each) => each[place])));
  const waiting = sum(versions.map((version) => version.pending));
  const refused = rates(versions, refusals);
  const key = (name, value, word, detail) => el("div", {}, el("dt", {}, name), el("dd", {}, el("span", { class: "big" }, value), " ", el("span", { class: "word" }, word), el("span", { class: "detail" }, detail)));
  return el("section", { class: "verdict", "aria-labelledby": "headline" },
    el("p", { class: "pill" }, el("span", { "aria-hidden": "true" }, good ? "✓ " : "✗ "), look.state),
    el("h1", { id: "headline" }, headline(look)),
    el("dl", { class: "keys" },
      key("Requests", number(rates(versions, (count) => count.succeeded)), "per second", refused ? `${number(refused)} more per second refused` : "none refused"),
      key("99 % within", quantile(0.99, all, look.bounds).replace("≤ ", ""), "", `half ${quantile(0.5, all, look.bounds)}, ${recent ? "last minute" : "since the start"}`),
      key("Waiting", number(waiting), waiting === 1 ? "request" : "requests", `${many(sum(versions.map((version) => version.running)), "batch", "batches")} running on ${many(sum(versions.map((version) => version.workers)), "worker")}`)),
    history());
}

// Requests per second between looks, as a line.
function history() {
  const points = looks.slice(1).map((look, place) => {
    const before = looks[place];
    const done = loaded(look).map((version) => version.counted.succeeded - (counted(before, version.key)?.succeeded ?? 0));
    return Math.max(0, sum(done)) / (look.now - before.now);
  });
  const top = Math.max(1, ...points);
  const [wide, high] = [KEPT - 2, 60];
  const at = (value, place) => `${wide - (points.length - 1 - place)} ${(high - (high * value) / top).toFixed(2)}`;
  const line = points.map((value, place) => `${place ? "L" : "M"}${at(value, place)}`).join("");
  const area = points.length > 1 ? `${line}L${wide} ${high}L${wide - points.length + 1} ${high}Z` : "";
  return el("figure", { class: "card pulse" },
    el("figcaption", {}, el("span", {}, `Requests per second, the last ${span((KEPT - 1) * (PERIOD / 1000))}`), el("span", {}, `highest ${number(points.length ? Math.max(...points) : null)}`)),
    el("svg", { viewBox: `0 0 ${wide} ${high}`, preserveAspectRatio: "none", role: "img", "aria-label": `Requests per second: now ${number(points.at(-1) ?? null)}, highest ${number(points.length ? Math.max(...points) : null)}` },
      el("path", { class: "area", d: area }), el("path", { class: "curve", d: points.length > 1 ? line : "" })));
}

function toggle() {
  const button = (words, value) => el("button", { type: "button", "data-recent": String(value), "aria-pressed": String(recent === value) }, words);
  return el("div", { class: "toggle", role: "group", "aria-label": "What the histograms count" }, button("Since the start", false), button("Last minute", true));
}

function cell(label, value, hint = null) {
  return el("td", { class: "n", "data-label": label }, el("span", { class: "value" }, value), hint ? el("span", { class: "hint" }, hint) : null);
}

function row(model, version, bounds) {
  const name = el("th", { scope: "row" }, `Version ${version.version} `, tag(version));
  const load = version.loaded;
  if (!load) return el("tr", {}, name, el("td", { colspan: 7, class: "reason" }, version.reason === "not loaded" ? "" : version.reason));
  const key = `${model.name}\n${version.version}`;
  const count = load.counted;
  const shown = window_({ ...load, key });
  const bad = count.failed + refusals(count) + count.cancelled;
  const why = Object.entries({ failed: count.failed, overran: count.overruns, ...count.refused, cancelled: count.cancelled }).filter(([, times]) => times).map(([word, times]) => `${word.replace("_", " ")} ${number(times)}`);
  return el("tr", {}, name,
    cell("Traffic", percent(load.share)),
    cell("Workers", load.workers >= load.workers_wanted ? number(load.workers) : `${number(load.workers)} of ${number(load.workers_wanted)}`, load.memory ? bytes(load.memory) : null),
    cell("Waiting", number(load.pending), `of ${number(load.queue)}`),
    cell("Requests/s", number(rate(key, (now) => now.succeeded)), `${number(count.succeeded)} in all`),
    cell("No result", number(bad), why.join(", ")),
    cell("Mean", shown.succeeded ? seconds(shown.seconds.total / shown.succeeded) : DASH),
    cell("99 % within", quantile(0.99, shown.buckets, bounds).replace("≤ ", "")));
}

function tag(version) {
  const words = { READY: "ready", LOADING: "loading", UNLOADING: "unloading" }[version.state] ?? (version.loaded ? "no worker" : "not loaded");
  return el("span", { class: version.state === "READY" ? "tag" : version.loaded ? "tag warm" : "tag idle" }, words);
}

function bars(title, note, items) {
  const largest = Math.max(...items.map(([, count]) => count), 1);
  const total = sum(items.map(([, count]) => count));
  const rows = items.map(([label, count]) =>
    el("tr", {}, el("th", { scope: "row" }, label), el("td", {}, el("span", { class: "bar c-blue", "width%": (100 * count) / largest })), el("td", { class: "n" }, count ? percent(count / total) : "")));
  return el("figure", { class: "card" }, el("figcaption", {}, el("strong", {}, title), el("span", {}, note)),
    total ? el("table", { class: "counts" }, el("caption", { class: "sr" }, `${title}: share of each`), el("tbody", {}, rows)) : el("p", { class: "muted" }, "Nothing yet."));
}

// Buckets from the first to the last that holds anything, and one more on each side.
function latency(shown, bounds) {
  const used = shown.buckets.map((count, place) => (count ? place : -1)).filter((place) => place >= 0);
  const [first, last] = [Math.max(0, used[0] - 1), Math.min(bounds.length, used.at(-1) + 1)];
  const label = (place) => (place < bounds.length ? `≤ ${seconds(bounds[place])}` : `> ${seconds(bounds.at(-1))}`);
  return shown.buckets.map((count, place) => [label(place), count]).filter((_, place) => place >= first && place <= last);
}

// Batch sizes as they are; in powers of two where there are many.
function sizes(batches) {
  const found = Object.entries(batches).map(([rows, count]) => [Number(rows), count]).filter(([, count]) => count);
  if (found.length <= 10) return found.map(([rows, count]) => [many(rows, "row"), count]);
  const grouped = new Map();
  for (const [rows, count] of found) {
    const end = 2 ** Math.ceil(Math.log2(rows));
    grouped.set(end, (grouped.get(end) ?? 0) + count);
  }
  return [...grouped].map(([end, count]) => [end > 2 ? `${end / 2 + 1} to ${end} rows` : many(end, "row"), count]);
}

function times(shown) {
  const all = shown.seconds;
  const rest = Math.max(0, all.total - all.queue - all.input - all.model - all.output);
  const parts = PARTS.map(([name, words, colour]) => ({ words, colour, share: (name === "rest" ? rest : all[name]) / all.total, mean: (name === "rest" ? rest : all[name]) / shown.succeeded }));
  const title = el("figcaption", {}, el("strong", {}, "Where the time goes"), el("span", {}, shown.succeeded ? `mean ${seconds(all.total / shown.succeeded)}` : ""));
  if (!shown.succeeded) return el("figure", { class: "card" }, title, el("p", { class: "muted" }, "Nothing yet."));
  return el("figure", { class: "card" }, title,
    el("div", { class: "stackbar", "aria-hidden": "true" }, parts.filter((part) => part.share > 0.002).map((part) => el("span", { class: `c-${part.colour}`, "width%": 100 * part.share }))),
    el("table", { class: "counts parts" }, el("caption", { class: "sr" }, "Mean time of each part of a request"),
      el("tbody", {}, parts.map((part) => el("tr", {}, el("th", { scope: "row" }, el("span", { class: `swatch c-${part.colour}` }), part.words), el("td", { class: "n" }, seconds(part.mean)), el("td", { class: "n" }, percent(part.share)))))));
}

function figures(model, version, bounds) {
  const shown = window_({ ...version.loaded, key: `${model.name}\n${version.version}` });
  const alone = model.versions.filter((each) => each.loaded).length === 1;
  return el("div", { class: "panels" }, alone ? null : el("h4", {}, `Version ${version.version}`),
    bars("Time to answer", many(sum(shown.buckets), "request"), latency(shown, bounds)),
    bars("Batch sizes", `${many(shown.executions, "batch", "batches")}${shown.padding ? `, ${percent(shown.padding / (shown.rows + shown.padding))} padding` : ""}`, sizes(shown.batches)),
    times(shown));
}

// A model: its versions, then how long requests take and how they run; folded away where there are many models.
function card(model, bounds, folded) {
  const head = ["Traffic", "Workers", "Waiting", "Requests/s", "No result", "Mean", "99 % within"].map((words) => el("th", { scope: "col", class: "n" }, words));
  const shown = model.versions.filter((version) => version.loaded).map((version) => figures(model, version, bounds));
  return el("article", { class: "model", "aria-label": model.name },
    el("h3", { class: "name" }, model.name),
    el("table", { class: "stack versions-of" }, el("thead", { class: shown.length ? null : "sr" }, el("tr", {}, el("th", { scope: "col" }, "Version"), head)),
      el("tbody", {}, model.versions.map((version) => row(model, version, bounds)))),
    folded && shown.length ? el("details", {}, el("summary", {}, "Times and batches"), el("div", {}, shown)) : shown);
}

// A row with a bar for a share; without one where the machine does not say it.
function meter(words, share, value) {
  const bar = share === null ? null : el("span", { class: "bar c-green", "width%": 100 * Math.min(1, share) });
  return el("tr", {}, el("th", { scope: "row" }, words), el("td", {}, bar), el("td", { class: "n" }, value));
}

// A row for a part of something, each written by `write`.
function part(words, used, total, write) {
  if (used === null || total === null) return meter(words, null, used === null ? DASH : write(used));
  return meter(words, used / total, `${write(used)} of ${write(total)}`);
}

function table(name, note, rows) {
  return el("figure", { class: "card" }, el("figcaption", {}, el("strong", {}, name), el("span", { class: "name" }, note)),
    el("table", { class: "counts" }, el("caption", { class: "sr" }, name), el("tbody", {}, rows)));
}

// The machine and its GPUs; nothing of a cluster, which has many, and somebody else to watch them.
function machine(look) {
  const host = look.host;
  if (host === null) return null;
  const gpus = look.gpus.map((gpu) => table(gpu.name || "GPU", gpu.uuid, [
    meter("Busy", gpu.utilization, percent(gpu.utilization)),
    part("Memory", gpu.memory_used, gpu.memory_total, bytes),
    part("Power", gpu.power, gpu.power_limit, (watts) => `${number(watts)} W`),
    meter("Energy", null, gpu.energy === null ? DASH : `${number(gpu.energy / 1000)} kJ`),
  ]));
  return el("section", { "aria-labelledby": "machine" }, el("h2", { id: "machine" }, "Machine"),
    el("div", { class: "panels" }, table("Host", "", [
      meter("Processors", host.utilization, percent(host.utilization)),
      part("Memory", host.memory_used, host.memory_total, bytes),
      part("Server", host.process_memory, host.memory_total, bytes),
    ]), cache(look.memory), gpus));
}

// The memory that models take, and what was moved for it.
function cache(memory) {
  return table("Loaded models", "", [
    part("Memory", memory.used, memory.budget, bytes),
    meter("Loads", null, number(memory.loads)),
    meter("Evictions", null, number(memory.evictions)),
  ]);
}

function draw() {
  const look = looks.at(-1);
  document.body.className = look.state === "ready" ? "met" : "missed";
  document.title = `${look.state}: narrowcast at ${location.host}`;
  const fresh = el("main", { id: "main" }, verdict(look),
    el("section", { "aria-labelledby": "models" }, el("div", { class: "heading" }, el("h2", { id: "models" }, "Models"), toggle()),
      look.models.length ? look.models.map((model) => card(model, look.bounds, look.models.length > FOLDED)) : el("p", { class: "empty" }, "The repository is empty.")),
    machine(look));
  patch(document.getElementById("main"), fresh);
  document.getElementById("what").textContent = `server at ${location.host}, up ${span(look.now - look.started)}, models run in ${{ process: "processes", thread: "threads", inline: "the event loop", ray: "replicas on a Ray cluster" }[look.placement]}`;
  document.getElementById("when").textContent = new Date(look.now * 1000).toLocaleTimeString("en-GB");
  document.getElementById("foot").replaceChildren(`narrowcast ${look.narrowcast} · `, el("a", { href: "metrics" }, "metrics"), " for Prometheus · ", el("a", { href: "status" }, "status"), " as JSON");
}

// ---- asking ---------------------------------------------------------------------------------------------------------

async function ask() {
  const silence = document.getElementById("silence");
  try {
    const answer = await fetch("status", { cache: "no-store", signal: AbortSignal.timeout(5 * PERIOD) });
    if (!answer.ok) throw new Error(`status ${answer.status}`);
    const look = await answer.json();
    if (looks.length && look.started !== looks.at(-1).started) looks.length = 0; // another server
    looks.push(look);
    if (looks.length > KEPT) looks.shift();
    silence.hidden = true;
    draw();
  } catch (error) {
    silence.textContent = `The server does not answer (${error.message}). ${looks.length ? "What is shown is old." : ""}`;
    silence.hidden = false;
  }
}

async function run() {
  if (!document.hidden) await ask();
  setTimeout(run, PERIOD);
}

document.addEventListener("click", (event) => {
  const wanted = event.target.closest?.("[data-recent]");
  if (!wanted) return;
  recent = wanted.dataset.recent === "true";
  draw();
});
document.addEventListener("visibilitychange", () => document.hidden || ask());
run();
