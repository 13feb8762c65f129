// The page itself: its state, the controls above, the tabs, newer data while a sweep runs.

const byId = (id) => document.getElementById(id);
const stage = byId("main");
const room = () => { const style = getComputedStyle(stage); return stage.clientWidth - parseFloat(style.paddingLeft) - parseFloat(style.paddingRight); };
const USUAL = { tab: "board", view: "", metric: "", summary: "last10", text: "", dataset: "", setting: "", role: "", status: "", layout: "", show: "", band: "deviation", seeds: "mean", axis: "", cost: "traffic", place: "" };
const state = { ...USUAL, ...fromHash(), sort: {}, open: new Set(), shown: null };
const TABS = [
  ["board", "Leaderboard", leaderboard, () => true],
  ["curves", "Curves", curves, () => true],
  ["axes", "Axes", axes, () => true],
  ["costs", "Costs", costs, () => true],
  ["classes", "Classes", classes, () => true],
  ["partitions", "Partitions", partitions, () => true],
  ["trials", "Trials", trials, () => true],
  ["failures", "Failures", failures, () => true, () => lostTrials().length],
  ["published", "Published", published, () => doc.published > 0],
  ["search", "Search", search, () => searched().length > 0, () => searched().length],
];

// The state as it stands in the address, so that a view can be kept and shared.
function fromHash() {
  const given = Object.fromEntries(new URLSearchParams(location.hash.slice(1)));
  return Object.fromEntries(Object.entries(given).filter(([key]) => key in USUAL));
}
function toHash() {
  const words = Object.keys(USUAL).filter((key) => state[key] !== USUAL[key]).map((key) => [key, state[key]]);
  history.replaceState(null, "", words.length ? `#${new URLSearchParams(words)}` : location.pathname + location.search);
}

// The groups that the filters leave, of the view that is chosen.
function chosenGroups(instead = {}) {
  const want = { ...state, ...instead }, view = doc.views.find((v) => v.key === want.view);
  const words = want.text.toLowerCase().split(/\s+/).filter(Boolean);
  return model.groups.filter((g) =>
    (!g.role || !view || view.models === "any" || view.models === g.kind) &&
    words.every((word) => g.name.toLowerCase().includes(word)) &&
    (!want.dataset || g.place.dataset === want.dataset) && (!want.setting || g.place.name === want.setting) &&
    (!want.role || g.role === want.role) && (!want.status || g.trials.some((t) => doc.trials.status[t] === want.status)));
}

// Changes the state and draws what follows from it.
function change(by) {
  Object.assign(state, by);
  settle();
  toHash();
  controls();
  return draw();
}

// Replaces what the data does not have by what it has.
function settle() {
  const view = doc.views.find((v) => v.key === state.view) ?? doc.views[0];
  state.view = view?.key ?? "";
  if (!view?.metrics.includes(state.metric)) state.metric = view?.metrics[0] ?? "";
  if (!(state.summary in doc.summaries)) state.summary = "last10";
  const has = (name, list) => { if (state[name] && !list.includes(state[name])) state[name] = ""; };
  has("dataset", doc.settings.map((s) => s.dataset));
  has("setting", doc.settings.map((s) => s.name));
  has("role", model.groups.map((g) => g.role));
  if (!TABS.some(([key, , , there]) => key === state.tab && there())) state.tab = "board";
  for (const name of ["view", "metric"]) USUAL[name] = name === "view" ? doc.views[0]?.key ?? "" : view?.metrics[0] ?? "";
}

function options(id, list, value) {
  const node = byId(id), now = JSON.stringify(list);
  if (node.dataset.options !== now) {
    node.replaceChildren(...list.map(([key, text]) => el("option", { value: key }, text)));
    node.dataset.options = now;
  }
  node.value = value;
}

function controls() {
  const view = doc.views.find((v) => v.key === state.view);
  const any = (text, list) => [["", text], ...[...new Set(list)].filter(Boolean).map((one) => [one, one])];
  options("view", doc.views.map((v) => [v.key, v.title]), state.view);
  options("metric", (view?.metrics ?? []).map((m) => [m, doc.metrics[m].title]), state.metric);
  options("summary", Object.entries(doc.summaries), state.summary);
  byId("summary").disabled = state.metric.includes("_to_");
  options("dataset", any("all", doc.settings.map((s) => s.dataset)), state.dataset);
  options("setting", any("all", doc.settings.map((s) => s.name)), state.setting);
  options("role", any("all", model.groups.filter((g) => !view || view.models === "any" || g.kind === view.models).map((g) => g.role)), state.role);
  options("status", any("all", doc.trials.status), state.status);
  if (document.activeElement !== byId("text")) byId("text").value = state.text;
  const active = ["text", "dataset", "setting", "role", "status"].filter((name) => state[name]).length;
  byId("filter-count").textContent = active ? String(active) : "";
  byId("clear").hidden = !active;
  const tabs = TABS.filter(([, , , there]) => there()).map(([key, title, , , count]) => el("button", {
    type: "button", role: "tab", id: `tab-${key}`, "aria-selected": String(key === state.tab), "aria-controls": "panel", tabIndex: key === state.tab ? 0 : -1, onclick: () => openTab(key),
  }, title, count?.() ? el("span", { class: "count" }, String(count())) : ""));
  const focused = document.activeElement?.id;
  byId("tabs").replaceChildren(...tabs);
  if (focused?.startsWith("tab-")) byId(focused)?.focus({ preventScroll: true });
}

function openTab(key) {
  change({ tab: key });
  byId(`tab-${key}`).scrollIntoView({ block: "nearest", inline: "nearest" });
}

// Draws the section that is open. Focus and scroll stay where they are.
let turn = 0;
async function draw() {
  const mine = ++turn, [key, title, section] = TABS.find(([name]) => name === state.tab);
  unfinished.length = 0;
  waiting.disconnect();
  const content = doc.trials.id.length ? await section() : [el("div", { class: "waiting" }, el("h2", null, "No trial has ended yet"), el("p", { class: "lead" }, "The first row comes with the first trial that ends."))];
  if (mine !== turn) return;
  const focused = document.activeElement?.dataset?.key;
  const across = new Map([...stage.querySelectorAll("[data-scroll]")].map((node) => [node.dataset.scroll, node.scrollLeft]));
  const panel = el("section", { id: "panel", role: "tabpanel", "aria-labelledby": `tab-${key}`, class: `section-${key}` }, content);
  const tall = stage.offsetHeight;
  if (stage.dataset.tab === key) stage.style.minHeight = `${tall}px`; // the page must not jump while pictures are drawn
  stage.replaceChildren(panel);
  stage.dataset.tab = key;
  document.title = `${title} · ${doc.name} · fedstill`;
  for (const node of stage.querySelectorAll("[data-scroll]")) node.scrollLeft = across.get(node.dataset.scroll) ?? 0;
  if (focused) stage.querySelector(`[data-key="${CSS.escape(focused)}"]`)?.focus({ preventScroll: true });
  requestAnimationFrame(() => { stage.style.minHeight = ""; });
  if (!performance.getEntriesByName("first-row").length && stage.querySelector("tbody tr")) performance.mark("first-row");
}

// Does something once an element comes into sight.
const soon = new WeakMap();
const waiting = new IntersectionObserver((entries) => {
  for (const { isIntersecting, target } of entries) if (isIntersecting) soon.get(target)?.();
}, { rootMargin: "600px" });
function later(node, what) {
  soon.set(node, () => { if (!node.classList.contains("more")) waiting.unobserve(node); what(); if (node.hidden) waiting.unobserve(node); });
  waiting.observe(node);
}

// Tells those who listen to the page.
const say = (text) => { byId("said").textContent = text; };

function about() {
  const count = (status) => doc.trials.status.filter((s) => s === status).length;
  const lost = ["failed", "stopped"].filter(count).map((s) => `${count(s)} ${s}`);
  const sets = [...new Set(doc.settings.map((s) => s.dataset))];
  const methods = new Set(doc.entries.map((e) => e.method)).size;
  const trials = counted(doc.trials.id.length, "trial") + (lost.length ? ` (${lost.join(", ")})` : "");
  byId("about").textContent = [trials, counted(methods, "method"), counted(doc.settings.length, "setting"), sets.join(", ")].filter(Boolean).join(" · ");
  byId("foot").textContent = `Written ${doc.written.replace("T", " ").replace(/\+00:00$/, " UTC")} by fedstill ${doc.version}. The Parquet tables of the folder are the truth; this page is a projection of them.`;
}

// ------------------------------------------------------------------------------------------------- light and dark

const THEMES = { auto: ["◐", "Colours: as the system"], light: ["☀", "Colours: light"], dark: ["☾", "Colours: dark"] };
function theme(name) {
  name === "auto" ? delete document.documentElement.dataset.theme : (document.documentElement.dataset.theme = name);
  const [sign, text] = THEMES[name];
  byId("theme").replaceChildren(el("span", { "aria-hidden": "true" }, sign), el("span", { class: "visually-hidden" }, text));
  byId("theme").title = text;
  byId("theme").dataset.now = name;
  try { name === "auto" ? localStorage.removeItem("fedstill-theme") : localStorage.setItem("fedstill-theme", name); } catch { /* no storage here */ }
  document.querySelectorAll("canvas.heat").forEach((canvas) => canvas.paint());
}
function storedTheme() {
  try { const name = localStorage.getItem("fedstill-theme"); return name in THEMES ? name : "auto"; } catch { return "auto"; }
}

// ------------------------------------------------------------------------------------------------- live

async function poll() {
  const sign = byId("live");
  try {
    const answer = await fetch(`data.json?revision=${doc.revision ?? ""}`, { cache: "no-store" });
    if (answer.status === 200) {
      const pollEvery = doc.poll, before = doc.trials.id.length;
      renew({ ...(await answer.json()), poll: pollEvery });
      about();
      await change({});
      if (doc.trials.id.length > before) say(`${counted(doc.trials.id.length - before, "more trial")} ended`);
    } else if (answer.status !== 204) throw new Error(String(answer.status));
    sign.className = "live on";
    sign.replaceChildren("Live");
  } catch {
    sign.className = "live off";
    sign.replaceChildren("Not connected");
  }
  setTimeout(poll, 1000 * doc.poll);
}

// ------------------------------------------------------------------------------------------------- start

for (const name of ["view", "metric", "summary", "dataset", "setting", "role", "status"]) byId(name).addEventListener("change", (event) => change({ [name]: event.target.value, ...(name === "view" ? { metric: "", role: "" } : {}) }).then(tellCount));
byId("text").addEventListener("input", (event) => change({ text: event.target.value }).then(tellCount));
byId("clear").addEventListener("click", () => { change({ text: "", dataset: "", setting: "", role: "", status: "" }).then(tellCount); byId("text").focus(); });
function tellCount() { say(counted(new Set(chosenGroups().map((g) => g.name)).size, "row")); }

byId("tabs").addEventListener("keydown", (event) => {
  const keys = TABS.filter(([, , , there]) => there()).map(([key]) => key), at = keys.indexOf(state.tab);
  const to = { ArrowRight: (at + 1) % keys.length, ArrowLeft: (at + keys.length - 1) % keys.length, Home: 0, End: keys.length - 1 }[event.key];
  if (to === undefined) return;
  event.preventDefault();
  openTab(keys[to]);
  byId(`tab-${keys[to]}`).focus();
});
byId("theme").addEventListener("click", () => { const names = Object.keys(THEMES); theme(names[(names.indexOf(byId("theme").dataset.now) + 1) % names.length]); });
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => document.querySelectorAll("canvas.heat").forEach((canvas) => canvas.paint()));
addEventListener("hashchange", () => { Object.assign(state, USUAL, fromHash()); change({}); });
addEventListener("beforeprint", () => unfinished.forEach((complete) => complete()));
let width = 0, resized = 0;
new ResizeObserver(() => {
  if (stage.clientWidth === width) return;
  width = stage.clientWidth;
  clearTimeout(resized);
  resized = setTimeout(() => { if (stage.querySelector(".panels")) draw(); }, 150);
}).observe(stage);

theme(storedTheme());
byId("app").hidden = false;
width = stage.clientWidth;
byId("filters").open = innerWidth > 720;
settle();
about();
controls();
await draw();
if (doc.poll) {
  byId("live").hidden = false;
  setTimeout(poll, 1000 * doc.poll);
}
