// The sections that are tables: leaderboard, trials, failures and events, search. And the table that they share.

const CHUNK = 80; // rows that are drawn at once; more follow as they come into sight

// A table whose headers sort. columns: [{ key, title, cell(row), value(row), num, down }] (down: largest first at the
// first click); rows: [{ key, ... }]; detail(row): what opens below a row; id: names it in the state.
function grid({ id, caption, columns, rows, detail, sort, sticky = true }) {
  const by = state.sort[id] ?? sort ?? null;
  const column = by && columns.find((c) => c.key === by.key);
  const ordered = column?.value ? sorted(rows, column.value, by.down) : rows;
  const body = el("tbody");
  const head = columns.map((c) => {
    const dir = by?.key === c.key ? (by.down ? "descending" : "ascending") : "none";
    if (!c.value) return el("th", { scope: "col", class: c.num ? "num" : null }, c.title);
    const turn = () => change({ sort: { ...state.sort, [id]: { key: c.key, down: by?.key === c.key ? !by.down : Boolean(c.down) } } });
    const arrow = el("span", { class: "arrow", "aria-hidden": "true" }, { ascending: "▲", descending: "▼", none: "↕" }[dir]);
    return el("th", { scope: "col", class: c.num ? "num" : null, "aria-sort": dir }, el("button", { type: "button", class: "sort", data: { key: `sort:${id}:${c.key}` }, onclick: turn, title: c.hint }, el("span", null, c.title), arrow));
  });
  const table = el("table", { class: sticky ? "grid sticky" : "grid" }, el("caption", { class: "visually-hidden" }, caption), el("thead", null, el("tr", null, head)), body);
  const more = el("p", { class: "more" });
  const append = (until) => {
    const from = body.dataset.drawn ? +body.dataset.drawn : 0;
    for (const row of ordered.slice(from, until)) body.append(...gridRow(id, columns, row, detail));
    body.dataset.drawn = drawn.set(id, Math.min(until, ordered.length)).get(id);
    more.hidden = until >= ordered.length;
    more.textContent = `${whole(ordered.length - Math.min(until, ordered.length))} more rows follow as you scroll`;
  };
  append(Math.max(CHUNK, drawn.get(id) ?? 0));
  later(more, () => append(+body.dataset.drawn + 2 * CHUNK));
  unfinished.push(() => append(ordered.length));
  if (!rows.length) body.append(el("tr", null, el("td", { class: "empty", colspan: columns.length }, "Nothing matches the filters.")));
  return [el("div", { class: "table-frame", data: { scroll: id }, tabIndex: 0, role: "region", "aria-label": caption }, table), more];
}
const drawn = new Map(); // table -> rows that are drawn, so that a redraw does not move the page
const unfinished = []; // draws all rows of the tables in sight: for printing

function gridRow(id, columns, row, detail) {
  const key = `${id}:${row.key}`, open = state.open.has(key);
  const cells = columns.map((c, i) => {
    const content = c.cell(row);
    if (i) return el("td", { class: [c.num ? "num" : "", c.css?.(row) ?? ""].join(" ").trim() || null }, content);
    const toggle = detail && el("button", {
      type: "button", class: "toggle", "aria-expanded": String(open), "aria-label": `Details of ${row.label ?? row.key}`, data: { key: `open:${key}` },
      onclick: () => { open ? state.open.delete(key) : state.open.add(key); change({}); },
    }, "›");
    return el("th", { scope: "row" }, el("div", { class: "first" }, toggle, content));
  });
  const line = el("tr", { class: open ? "open" : null }, cells);
  return open ? [line, el("tr", { class: "detail" }, el("td", { colspan: columns.length }, el("div", { class: "detail-body" }, detail(row))))] : [line];
}

// Rows by a value, best first as asked; those without a value come last either way, and equal ones keep their order.
function sorted(rows, value, down) {
  const known = (v) => v !== null && v !== undefined && !Number.isNaN(v);
  const compare = (a, b) => (typeof a === "string" || typeof b === "string" ? String(a).localeCompare(String(b), "en", { numeric: true }) : a - b);
  return rows.map((row) => [row, value(row)]).sort(([, a], [, b]) => (known(b) - known(a)) || (known(a) ? (down ? compare(b, a) : compare(a, b)) : 0)).map(([row]) => row);
}

// Setting names as stacked key and value, so that columns stay narrow.
function settingTitle(place) {
  const keys = Object.entries(place.keys);
  if (!keys.length) return [el("span", { class: "key-value" }, el("b", null, place.name))];
  return keys.map(([key, value]) => el("span", { class: "key-value" }, el("span", { class: "quiet" }, `${lastPart(key)} `), el("b", null, shown(value))));
}

// ------------------------------------------------------------------------------------------------- the leaderboard

// One row per method and model, with its cells by setting. In the order of the leaderboard: complete first, then best.
function standings(groups, cells, metric) {
  const rows = new Map();
  for (const g of groups) {
    const row = rows.get(g.name) ?? { key: g.name, label: g.name, name: g.name, style: model.styles.get(g.name), at: new Map() };
    row.at.set(g.setting, { group: g, cell: cells[g.id] });
    rows.set(g.name, row);
  }
  for (const row of rows.values()) {
    const means = [...row.at.values()].map(({ cell }) => cell?.[0]).filter((v) => v !== undefined && v !== null);
    row.count = means.length;
    row.mean = means.length ? means.reduce((a, b) => a + b, 0) / means.length : null;
  }
  const sign = metric.high ? -1 : 1;
  return [...rows.values()].sort((a, b) => b.count - a.count || sign * ((a.mean ?? 0) - (b.mean ?? 0)) || a.name.localeCompare(b.name));
}

async function leaderboard() {
  const metric = doc.metrics[state.metric], groups = chosenGroups();
  const { cells, stats } = await scoresOf(state.metric, state.summary);
  const rows = standings(groups, cells, metric), settings = [...new Set(groups.map((g) => g.setting))].sort((a, b) => a - b);
  const long = state.layout ? state.layout === "rows" : settings.length < 2;
  const compared = stats?.baseline && groups.some((g) => cells[g.id]?.[6]);
  const board = { cells, stats, metric, against: compared && state.show === "difference" ? stats.baseline : "", all: settings.length === doc.settings.length };
  return [
    el("div", { class: "section-head" }, el("div", null, el("h2", null, titleOf()), el("p", { class: "lead" }, leadOf(groups, board))),
      compared ? segmented("show", "What the cells show", [["", "Values"], ["difference", `Difference to ${stats.baseline}`]], state.show) : "",
      segmented("layout", "Layout", [["table", "Methods × settings"], ["rows", "One row each"]], long ? "rows" : "table")),
    long ? longBoard(groups, board) : wideBoard(rows, settings, board),
    notes(groups, board),
    board.all && stats?.ranking ? panels([{ title: "Average ranks over all settings", draw: (width) => rankDiagram(stats.ranking, width) }], 120) : "",
  ];
}

function segmented(name, label, options, value) {
  return el("div", { class: "segmented", role: "group", "aria-label": label }, options.map(([key, text]) =>
    el("button", { type: "button", "aria-pressed": String(key === value), data: { key: `${name}:${key}` }, onclick: () => change({ [name]: key }) }, text)));
}

function titleOf() {
  const { title, unit } = doc.metrics[state.metric];
  const over = { last10: "mean of the last 10 rounds", last: "last round", best: "best round (chosen on the test set)", auc: "mean over all rounds (area under the curve)" }[state.summary];
  return `${title} (${unit})${state.metric.includes("_to_") ? "" : `, ${over}`}`;
}

function leadOf(groups, { metric, against }) {
  const seeds = new Set(groups.flatMap((g) => g.trials.map((t) => doc.trials.seed[t])));
  const view = doc.views.find((v) => v.key === state.view)?.title ?? "";
  const what = against ? `Difference to ${against} over pairs of equal seeds, its 95 % interval, and the corrected p: a star where the two are told apart.` : `Mean over ${counted(seeds.size, "seed")}, with the mean’s 95 % interval below it.`;
  return `${view}. ${metric.high ? "More" : "Less"} is better. ${what}`;
}

const named = (row) => el("span", { class: "name" }, swatch(row.style, false), el("span", null, row.name));

function wideBoard(rows, settings, { metric, stats, against, all }) {
  const shown = (found) => (against ? found?.cell?.[6] : found?.cell) ?? null; // both begin with a mean
  const domains = new Map(settings.map((s) => [s, domainOf(rows.map((row) => (against ? ended(shown(row.at.get(s))) : row.at.get(s)?.cell)), against ? undefined : boundsOf(metric))]));
  const best = new Map(settings.map((s) => {
    const means = rows.map((row) => shown(row.at.get(s))?.[0]).filter((v) => v !== undefined && v !== null);
    return [s, means.length && !against ? (metric.high ? Math.max(...means) : Math.min(...means)) : null];
  }));
  const columns = [{ key: "name", title: "Method", value: (row) => row.name, cell: named }];
  const pooled = (row, what) => (all ? stats?.pooled[row.name]?.[what] : null);
  if (settings.length > 1 && !against) {
    const complete = (row) => (row.count === settings.length ? row.mean : null);
    columns.push({
      key: "mean", title: "Mean", hint: "Mean over the settings; only for rows that have them all", num: true, down: metric.high, value: complete,
      cell: (row) => [el("span", { class: "score" }, figure(complete(row), metric.digits)), pooled(row, "mean")?.[1] == null ? "" : el("span", { class: "interval" }, spanOf(pooled(row, "mean"), metric.digits))],
    });
  }
  for (const s of settings) {
    columns.push({
      key: doc.settings[s].name, title: settingTitle(doc.settings[s]), num: true, down: metric.high,
      value: (row) => shown(row.at.get(s))?.[0],
      css: (row) => (best.get(s) !== null && row.at.get(s)?.cell?.[0] === best.get(s) ? "best" : ""),
      cell: (row) => (against ? differenceCell(row, row.at.get(s), metric, domains.get(s), against) : scoreCell(row.at.get(s), metric, domains.get(s), best.get(s))),
    });
  }
  if (settings.length > 1 && all && stats?.ranking) {
    const rank = (row) => stats.ranking.ranks[stats.ranking.names.indexOf(row.name)];
    columns.push({ key: "rank", title: "Average rank", num: true, value: rank, cell: (row) => figure(rank(row)) });
  }
  if (settings.length > 1 && all && stats?.baseline && rows.some((row) => pooled(row, "better")?.[0] != null)) {
    columns.push({ key: "better", title: `Beats ${stats.baseline}`, hint: "The chance that one of its runs is better than one of the baseline’s at the same setting", num: true, down: true, value: (row) => pooled(row, "better")?.[0], cell: (row) => chanceCell(pooled(row, "better")) });
  }
  return grid({ id: against ? "differences" : "board", caption: `Leaderboard: ${titleOf()}`, columns, rows, detail: (row) => seedsOf([...row.at.values()].map(({ group }) => group)) });
}

const spanOf = ([, low, high], digits) => `${figure(low, digits)} … ${figure(high, digits)}`;
const chanceCell = (found) => (found?.[0] == null ? "–" : [el("span", { class: "score" }, `${figure(100 * found[0], 0)} %`), found[1] === null ? "" : el("span", { class: "interval" }, `${figure(100 * found[1], 0)} … ${figure(100 * found[2], 0)}`)]);
const chance = (p) => (p >= 0.1 ? p.toFixed(2) : p >= 0.0001 ? String(+p.toPrecision(2)) : "<0.0001");
const ended = (difference) => difference && [difference[0], null, difference[1], difference[2]];

// A difference to the baseline: its interval on a scale with a mark at zero, its corrected p.
function differenceCell(row, found, metric, domain, against) {
  if (row.name === against) return el("span", { class: "quiet" }, "baseline");
  const made = found?.cell?.[6];
  if (!made) return el("span", { class: "quiet" }, found?.cell ? "no pairs" : "·");
  const [mean, low, high, p, pairs] = made, apart = p !== null && p < 0.05;
  const better = mean > 0 === metric.high;
  return [
    el("span", { class: `score${apart ? (better ? " better" : " worse") : ""}` }, `${mean > 0 ? "+" : ""}${figure(mean, metric.digits)}${apart ? " *" : ""}`),
    strip(ended(made), [Math.min(0, domain[0]), Math.max(0, domain[1])], row.style.colour, 0),
    el("span", { class: "interval" }, low === null ? `n = ${pairs}` : `${figure(low, metric.digits)} … ${figure(high, metric.digits)}`),
    el("span", { class: "interval" }, p === null ? counted(pairs, "pair") : `p = ${chance(p)}`),
  ];
}

// The limits within which intervals are drawn: theirs, but a wild one must not flatten all others.
function domainOf(cells, bounds = [-Infinity, Infinity]) {
  const known = cells.filter(Boolean), means = known.map((cell) => cell[0]);
  if (!means.length) return [0, 1];
  const low = Math.min(...means), high = Math.max(...means), reach = (high - low) * 3 || Math.abs(high) * 0.05 || 1;
  const ends = known.flatMap((cell) => [cell[2] ?? cell[0], cell[3] ?? cell[0]]);
  return [Math.max(Math.min(...ends), low - reach, bounds[0]), Math.min(Math.max(...ends), high + reach, bounds[1])];
}

function scoreCell(found, metric, domain, best) {
  if (!found) return el("span", { class: "quiet" }, "·");
  const { cell, group } = found, rest = lostOf(group, cell);
  if (!cell) return el("span", { class: "quiet" }, rest || "not measured");
  const top = best !== undefined && cell[0] === best;
  return [
    el("span", { class: "score" }, top ? el("span", { class: "visually-hidden" }, "best: ") : "", figure(cell[0], metric.digits), letterOf(cell)),
    strip(cell, domain, model.styles.get(group.name).colour),
    el("span", { class: "interval" }, cell[2] === null ? `n = ${seedsIn(cell)}` : `${figure(cell[2], metric.digits)} … ${figure(cell[3], metric.digits)}`),
    rest ? el("span", { class: "lost" }, rest) : "",
  ];
}

const seedsIn = (cell) => cell[4].filter((v) => v !== null).length;
const letterOf = (cell) => (cell?.[5] ? el("sup", { title: "Methods of this setting that share a letter are not told apart" }, cell[5].length > 6 ? `${cell[5].slice(0, 5)}…` : cell[5]) : "");

// A mean as a dot and its interval as a line, on the column's scale.
function strip(cell, [low, high], colour, zero = null) {
  const at = (v) => `${(100 * Math.max(0, Math.min(1, (v - low) / (high - low || 1)))).toFixed(1)}%`;
  const vars = { "--at": at(cell[0]), "--from": at(cell[2] ?? cell[0]), "--to": at(cell[3] ?? cell[0]) };
  if (zero !== null) vars["--zero"] = at(zero);
  return el("span", { class: `strip c${colour}${zero === null ? "" : " zero"}`, vars, "aria-hidden": "true" });
}

// What is missing from a cell: failed and stopped trials, and those that were not measured.
function lostOf(group, cell) {
  const at = (status) => group.trials.filter((t) => doc.trials.status[t] === status).length;
  const missing = at("done") - (cell ? seedsIn(cell) : 0);
  return [[missing, state.metric.includes("_to_") ? "not reached" : "not measured"], [at("failed"), "failed"], [at("stopped"), "stopped"]]
    .filter(([n]) => n > 0).map(([n, what]) => `${n} ${what}`).join(", ");
}

function longBoard(groups, { cells, metric, stats }) {
  const domain = domainOf(groups.map((g) => cells[g.id]), boundsOf(metric));
  const rows = groups.map((g) => ({ key: `${g.name}|${g.place.name}`, label: `${g.name} at ${g.place.name}`, name: g.name, style: model.styles.get(g.name), g, cell: cells[g.id] }));
  const cost = (name, title, text) => ({ key: name, title, num: true, value: (row) => doc.costs[name][row.g.id], cell: (row) => text(doc.costs[name][row.g.id]) });
  const several = new Set(groups.map((g) => g.setting)).size > 1;
  const columns = [
    { key: "name", title: "Method", value: (row) => row.name, cell: named },
    several && { key: "setting", title: "Setting", value: (row) => row.g.setting, cell: (row) => el("span", { class: "stack" }, settingTitle(row.g.place)) },
    { key: "value", title: metric.unit === "%" ? "Mean, %" : `Mean, ${metric.unit}`, num: true, down: metric.high, value: (row) => row.cell?.[0], cell: (row) => [el("span", { class: "score" }, figure(row.cell?.[0], metric.digits), letterOf(row.cell))] },
    { key: "interval", title: "95 % interval", num: true, value: (row) => (row.cell && row.cell[2] !== null ? row.cell[3] - row.cell[2] : null), cell: (row) => (row.cell ? [strip(row.cell, domain, row.style.colour), el("span", { class: "interval" }, row.cell[2] === null ? "–" : `${figure(row.cell[2], metric.digits)} … ${figure(row.cell[3], metric.digits)}`)] : "") },
    { key: "n", title: "Seeds", num: true, down: true, value: (row) => (row.cell ? seedsIn(row.cell) : 0), cell: (row) => [String(row.cell ? seedsIn(row.cell) : 0), lostOf(row.g, row.cell) ? el("span", { class: "lost" }, lostOf(row.g, row.cell)) : ""] },
    stats?.baseline && groups.some((g) => cells[g.id]?.[6]) && {
      key: "difference", title: `To ${stats.baseline}`, hint: `Difference to ${stats.baseline} over pairs of equal seeds`, num: true, down: metric.high, value: (row) => row.cell?.[6]?.[0],
      cell: (row) => { const made = row.cell?.[6]; return made ? [el("span", { class: "score" }, `${made[0] > 0 ? "+" : ""}${figure(made[0], metric.digits)}${made[3] !== null && made[3] < 0.05 ? " *" : ""}`), made[3] === null ? "" : el("span", { class: "interval" }, `p = ${chance(made[3])}`)] : row.name === stats.baseline ? el("span", { class: "quiet" }, "baseline") : "–"; },
    },
    cost("up_bytes", "Up", traffic), cost("down_bytes", "Down", traffic), cost("steps", "Local steps", whole), cost("server_steps", "Server steps", whole), cost("seconds", "Time", duration),
  ].filter(Boolean);
  return grid({ id: "rows", caption: `Leaderboard: ${titleOf()}`, columns, rows, sort: { key: "value", down: metric.high }, detail: (row) => seedsOf([row.g]) });
}

function notes(groups, { cells, stats }) {
  const said = [...(stats?.notes ?? ["Intervals: Student’s t."])], sizes = groups.map((g) => cells[g.id]).filter(Boolean).map(seedsIn);
  if (!stats && sizes.length && Math.min(...sizes) < 5) said.push(`Fewer than 5 seeds in some cells (n = ${Math.min(...sizes)}): their intervals are wide, and differences may be chance.`);
  const list = (texts) => el("ul", null, texts.map((text) => el("li", null, text)));
  return el("div", { class: "notes" }, list(said.slice(0, 6)), said.length > 6 ? disclosure(counted(said.length - 6, "more note"), () => list(said.slice(6))) : "");
}

// ------------------------------------------------------------------------------------------------- trials

// The seeds behind a row of the leaderboard.
function seedsOf(groups) {
  const trials = [...new Set(groups.flatMap((g) => g.trials))];
  const holder = el("div", { class: "seeds" });
  cellsOf(state.metric, state.summary).then((all) => {
    holder.append(...trialGrid("seeds:" + groups.map((g) => g.id).join("+"), trials, valuesOf(groups, all)));
  });
  return holder;
}

// By trial: what each of its models came to, [[role, value]].
function valuesOf(groups, cells) {
  const found = new Map();
  for (const g of groups) g.trials.forEach((t, i) => found.set(t, [...(found.get(t) ?? []), [g.role, cells[g.id]?.[4][i] ?? null]]));
  return found;
}

// A table of trials, each of which opens to where it comes from.
function trialGrid(id, trials, values) {
  const metric = doc.metrics[state.metric];
  const rows = trials.map((t) => ({ key: doc.trials.id[t], label: `trial ${doc.trials.id[t]}`, t }));
  const column = (name, title, cell, num) => ({ key: name, title, num, value: (row) => doc.trials[name][row.t], cell: (row) => cell(doc.trials[name][row.t]) });
  return grid({
    id, caption: "Trials", rows, sticky: false, detail: (row) => trialCard(row.t),
    columns: [
      { key: "id", title: "Trial", value: (row) => row.key, cell: (row) => el("code", null, row.key) },
      { key: "entry", title: "Method", value: (row) => entryName(row.t), cell: (row) => entryName(row.t) },
      { key: "setting", title: "Setting", value: (row) => doc.places[row.t][1], cell: (row) => settingName(row.t) },
      column("seed", "Seed", String, true),
      column("status", "Status", (status) => badge(status)),
      { key: "value", title: metric ? `${metric.title} (${metric.unit})` : "Value", num: true, down: metric?.high, value: (row) => values.get(row.t)?.[0][1], cell: (row) => modelValues(values.get(row.t) ?? [], metric) },
      column("rounds_done", "Rounds", whole, true),
      column("seconds", "Time", duration, true),
    ],
  });
}

function modelValues(values, metric) {
  const known = values.filter(([, value]) => value !== null);
  if (!known.length) return "–";
  return known.map(([role, value]) => el("span", { class: "stack" }, el("span", null, known.length > 1 ? el("span", { class: "quiet" }, `${role} `) : "", figure(value, metric.digits))));
}

const entryName = (t) => doc.entries[doc.places[t][0]]?.name ?? "search";
const settingName = (t) => doc.settings[doc.places[t][1]]?.name ?? "–";
const badge = (status) => el("span", { class: `badge ${["done", "failed", "stopped"].includes(status) ? status : "other"}` }, status);

// Everything that is known of one trial: where it comes from and how to run it again.
function trialCard(t) {
  const card = el("div", { class: "card" }, el("p", { class: "quiet" }, "Reading …"));
  Promise.all([part("rows"), part("events")]).then(([rows, events]) => {
    const row = rows[t], own = events.filter((e) => e.trial_id === row.trial_id);
    const fact = (title, text, code) => (text === undefined || text === null || text === "" ? [] : [el("div", null, el("dt", null, title), el("dd", null, code ? el("code", null, String(text)) : String(text)))]);
    const versions = Object.entries(JSON.parse(row.versions || "{}")).map(([name, version]) => `${name} ${version}`).join(", ");
    card.replaceChildren(...[
      row.reason && el("p", { class: "reason" }, badge(row.status), " ", row.reason),
      row.drift && el("p", { class: "reason" }, "Not bit-reproducible: ", row.drift),
      copyable("The command that runs it again", row.command ?? ""),
      el("dl", { class: "facts" }, [
        ...fact("Trial", row.trial_id, true), ...fact("Sweep", row.sweep), ...fact("Stage", row.stage), ...fact("Network", row.net),
        ...fact("Started", row.started), ...fact("Took", duration(row.seconds)), ...fact("Rounds", row.rounds_done),
        ...fact("Device", row.device), ...fact("Hosts", row.hosts), ...fact("Threads", row.threads), ...fact("Peak memory", traffic(row.peak_memory_bytes ?? null)),
        ...fact("Traffic", `${traffic(row.up_bytes ?? null)} up, ${traffic(row.down_bytes ?? null)} down`), ...fact("Steps", `${whole(row.steps)} local, ${whole(row.server_steps)} on the server`),
        ...fact("Code", row.commit ? `${row.commit}${row.clean === false ? " with uncommitted changes" : ""}` : null, true), ...fact("Rules version", row.rules_version),
        ...fact("Settings, SHA-256", row.config_hash, true), ...fact("Partition, SHA-256", row.partition_hash, true), ...fact("Data, SHA-256", row.data_hash, true), ...fact("Versions", versions),
      ]),
      disclosure(`Settings (${flatten(row.config).length})`, () => el("div", { class: "settings" }, flatten(row.config).map(([key, value]) => el("div", null, el("code", null, key), el("code", { class: "value" }, shown(value)))))),
      own.length ? disclosure(`Events (${own.length})`, () => eventList(own)) : null,
    ].filter(Boolean));
  });
  return card;
}

function flatten(value, prefix = "") {
  return Object.entries(value ?? {}).flatMap(([key, inner]) => (inner && typeof inner === "object" && !Array.isArray(inner) ? flatten(inner, `${prefix}${key}.`) : [[prefix + key, inner]]));
}

// A part that is drawn when it is opened.
function disclosure(title, content) {
  const node = el("details", null, el("summary", null, title));
  node.addEventListener("toggle", () => { if (node.open && node.children.length === 1) node.append(content()); });
  return node;
}

function copyable(title, text) {
  const button = el("button", { type: "button", class: "copy" }, "Copy");
  button.addEventListener("click", async () => {
    button.textContent = (await copied(text)) ? "Copied" : "Select it and copy";
    say(button.textContent);
    setTimeout(() => { button.textContent = "Copy"; }, 2000);
  });
  return el("div", { class: "command" }, el("p", { class: "quiet" }, title), el("div", null, el("code", { tabIndex: 0 }, text), button));
}

async function copied(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch { // no clipboard for a file, in some browsers: the old way
    const field = el("textarea", { class: "visually-hidden", "aria-hidden": "true" });
    field.value = text;
    document.body.append(field);
    field.select();
    const done = document.execCommand("copy");
    field.remove();
    return done;
  }
}

async function trials() {
  const cells = await cellsOf(state.metric, state.summary);
  const values = valuesOf(chosenGroups(), cells);
  const kept = [...values.keys()].filter((t) => !state.status || doc.trials.status[t] === state.status);
  return [
    el("div", { class: "section-head" }, el("div", null, el("h2", null, counted(kept.length, "trial")), el("p", { class: "lead" }, "One row for each run: open it for its settings, its hashes, the code and versions it ran with, and the command that runs it again."))),
    ...trialGrid("trials", kept, values),
  ];
}

// ------------------------------------------------------------------------------------------------- what went wrong

const lostTrials = () => doc.trials.status.map((status, t) => t).filter((t) => doc.trials.status[t] !== "done" && doc.trials.stage[t] !== "search");

async function failures() {
  const lost = lostTrials(), reasons = new Map();
  for (const t of lost) {
    const why = `${doc.trials.status[t]}: ${(doc.trials.reason[t] ?? "no reason recorded").replace(/\d+/g, "#")}`;
    reasons.set(why, [...(reasons.get(why) ?? []), t]);
  }
  const events = (await part("events")) ?? [];
  const rows = lost.map((t) => ({ key: doc.trials.id[t], label: `trial ${doc.trials.id[t]}`, t }));
  return [
    el("h2", null, "What did not finish"),
    el("p", { class: "lead" }, lost.length ? "A failure is a row with its reason, and is counted beside the numbers that it is missing from." : "Every trial finished."),
    reasons.size ? el("ul", { class: "reasons" }, [...reasons].sort((a, b) => b[1].length - a[1].length).map(([why, own]) => el("li", null, el("b", null, `${own.length} ×`), " ", why))) : "",
    ...(lost.length ? grid({
      id: "lost", caption: "Trials that did not finish", rows, sticky: false, detail: (row) => trialCard(row.t),
      columns: [
        { key: "id", title: "Trial", value: (row) => row.key, cell: (row) => el("code", null, row.key) },
        { key: "status", title: "Status", value: (row) => doc.trials.status[row.t], cell: (row) => badge(doc.trials.status[row.t]) },
        { key: "entry", title: "Method", value: (row) => entryName(row.t), cell: (row) => entryName(row.t) },
        { key: "setting", title: "Setting", value: (row) => doc.places[row.t][1], cell: (row) => settingName(row.t) },
        { key: "seed", title: "Seed", num: true, value: (row) => doc.trials.seed[row.t], cell: (row) => String(doc.trials.seed[row.t]) },
        { key: "rounds", title: "Rounds", num: true, value: (row) => doc.trials.rounds_done[row.t], cell: (row) => whole(doc.trials.rounds_done[row.t]) },
        { key: "reason", title: "Reason", value: (row) => doc.trials.reason[row.t] ?? "", cell: (row) => el("span", { class: "why" }, doc.trials.reason[row.t] ?? "no reason recorded") },
      ],
    }) : []),
    el("h2", { class: "second" }, "Events"),
    el("p", { class: "lead" }, events.length ? `${counted(events.length, "thing")} happened while the trials ran: ${kinds(events)}.` : "Nothing out of the ordinary was recorded while the trials ran."),
    events.length ? eventList(events) : "",
  ];
}

function kinds(events) {
  const counts = new Map();
  for (const e of events) counts.set(e.kind, (counts.get(e.kind) ?? 0) + 1);
  return [...counts].sort((a, b) => b[1] - a[1]).map(([kind, n]) => `${n} × ${String(kind).replaceAll("_", " ")}`).join(", ");
}

function eventList(events) {
  const cell = (name, title, num) => ({ key: name, title, num, value: (row) => row[name], cell: (row) => (row[name] === null || row[name] === undefined ? "–" : String(row[name]).replaceAll(name === "kind" ? "_" : "\u0000", " ")) });
  return grid({ id: "events", caption: "Events", sticky: false, rows: events.map((e, i) => ({ ...e, key: String(i) })), columns: [cell("time", "Time"), cell("kind", "What"), cell("trial_id", "Trial"), cell("round", "Round", true), cell("client", "Client", true), cell("detail", "Detail")] });
}

// ------------------------------------------------------------------------------------------------- search

const searched = () => doc.trials.stage.map((stage, t) => t).filter((t) => doc.trials.stage[t] === "search");

async function search() {
  const words = state.text.toLowerCase().split(/\s+/);
  const rows = searched().map((t) => {
    const { group = "", number = null, settings = {} } = doc.trials.search[t] ?? {};
    return { key: doc.trials.id[t], label: `trial ${doc.trials.id[t]}`, t, group, number, settings, score: doc.trials.score[t] };
  }).filter((row) => words.every((word) => row.group.toLowerCase().includes(word)) && (!state.status || doc.trials.status[row.t] === state.status));
  const best = new Map(), marked = (told) => told && JSON.stringify([told.group, told.settings]);
  const chosen = new Set(doc.trials.stage.map((stage, t) => (stage === "final" ? marked(doc.trials.search[t]) : null)).filter(Boolean));
  for (const row of rows) if (row.score !== null && !(best.get(row.group) >= row.score)) best.set(row.group, row.score);
  const isChosen = (row) => chosen.has(marked(row));
  return [
    el("h2", null, `Search: ${counted(rows.length, "draw")} in ${counted(new Set(rows.map((row) => row.group)).size, "group")}`),
    el("p", { class: "lead" }, "Trials that looked for settings. They are judged on the clients’ validation rows, have seeds of their own, and take no part in the leaderboard."),
    ...grid({
      id: "search", caption: "Trials of searches", rows, sort: { key: "group", down: false }, sticky: false, detail: (row) => trialCard(row.t),
      columns: [
        { key: "group", title: "Searched for", value: (row) => row.group, cell: (row) => row.group || "–" },
        { key: "number", title: "Draw", num: true, value: (row) => row.number, cell: (row) => whole(row.number) },
        { key: "score", title: "Validation accuracy (%)", num: true, down: true, value: (row) => row.score, css: (row) => (row.score !== null && row.score === best.get(row.group) ? "best" : ""), cell: (row) => (row.score === null ? "–" : figure(100 * row.score, 2)) },
        { key: "status", title: "Status", value: (row) => doc.trials.status[row.t], cell: (row) => badge(doc.trials.status[row.t]) },
        { key: "rounds", title: "Rounds", num: true, value: (row) => doc.trials.rounds_done[row.t], cell: (row) => whole(doc.trials.rounds_done[row.t]) },
        { key: "chosen", title: "Chosen", value: (row) => -isChosen(row), cell: (row) => (isChosen(row) ? el("span", { class: "badge done" }, "chosen") : "") },
        { key: "drawn", title: "Settings that were drawn", value: (row) => JSON.stringify(row.settings), cell: (row) => el("span", { class: "chips" }, Object.entries(row.settings).map(([key, value]) => el("span", { class: "chip" }, el("span", { class: "quiet" }, lastPart(key)), " ", shown(value)))) },
        { key: "reason", title: "Reason", value: (row) => doc.trials.reason[row.t] ?? "", cell: (row) => el("span", { class: "why" }, doc.trials.reason[row.t] ?? "") },
      ],
    }),
  ];
}

// ------------------------------------------------------------------------------------------------- published numbers

const FINDINGS = { inside: "done", outside: "stopped", "not comparable": "other", "not run": "other" };

async function published() {
  const found = (await part("published")) ?? [], words = state.text.toLowerCase().split(/\s+/);
  const rows = found.map((one, i) => ({ ...one, key: String(i), label: `${one.method}, ${one.source}`, difference: one.ours?.[0] == null ? null : one.ours[0] - one.value }))
    .filter((row) => words.every((word) => `${row.method} ${row.role}`.toLowerCase().includes(word)));
  const ends = rows.filter((row) => row.ours).flatMap((row) => [row.value, ...row.ours]).filter(Number.isFinite), domain = [Math.min(...ends), Math.max(...ends)];
  const ours = (row) => (row.ours?.[0] == null ? "–" : [el("span", { class: "score" }, figure(row.ours[0])), pairStrip(row, domain), el("span", { class: "interval" }, row.ours[1] === null ? "" : `${figure(row.ours[1])} … ${figure(row.ours[2])}`)]);
  return [
    el("h2", null, "Beside published numbers"),
    el("p", { class: "lead" }, "Final accuracy (%) as papers and repositories report it, and ours. Inside or outside of our 95 % interval is said only where nothing that both sides state differs."),
    ...grid({
      id: "published", caption: "Published numbers", rows, detail: (row) => publishedCard(row),
      columns: [
        { key: "method", title: "Method", value: (row) => row.method, cell: (row) => row.method + (row.role ? ` (${row.role})` : "") },
        { key: "source", title: "Source", value: (row) => `${row.source} ${row.table}`, cell: (row) => [row.source, el("span", { class: "interval" }, row.table)] },
        { key: "setting", title: "Setting there", value: (row) => row.setting, cell: (row) => el("span", { class: "why" }, row.setting) },
        { key: "value", title: "Published", num: true, down: true, value: (row) => row.value, cell: (row) => [el("span", { class: "score" }, figure(row.value)), row.sd === null ? "" : el("span", { class: "interval" }, `± ${compact(row.sd)}`)] },
        { key: "ours", title: "Ours", num: true, down: true, value: (row) => row.ours?.[0], cell: ours },
        { key: "difference", title: "Difference", num: true, down: true, value: (row) => row.difference, cell: (row) => (row.difference === null ? "–" : `${row.difference > 0 ? "+" : ""}${figure(row.difference)}`) },
        { key: "finding", title: "Verdict", value: (row) => row.finding, cell: (row) => el("span", { class: `badge ${FINDINGS[row.finding] ?? "other"}` }, row.finding) },
      ],
    }),
  ];
}

// Our mean and interval, and the published value as a mark, on one scale.
function pairStrip(row, domain) {
  const node = strip([row.ours[0], null, row.ours[1], row.ours[2]], domain, 0, row.value);
  node.classList.add("theirs");
  return node;
}

function publishedCard(row) {
  const facts = [["Our row", row.name], ["At", row.at], ["Seen in", row.read], ...row.why.map((why) => ["Because", why])];
  return el("div", { class: "card" }, el("dl", { class: "facts" }, facts.filter(([, text]) => text).map(([title, text]) => el("div", null, el("dt", null, title), el("dd", null, text)))));
}
