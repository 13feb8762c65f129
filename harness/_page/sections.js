// The sections that are pictures: curves, axes, costs, classes, partitions.

const SHOWN = 8; // lines that are drawn until somebody chooses others
const BANDS = { interval: "95 % interval", deviation: "standard deviation", range: "lowest to highest", none: "none" };
const COSTS = {
  traffic: ["Traffic, up and down", (g) => sum(doc.costs.up_bytes[g], doc.costs.down_bytes[g]), traffic],
  up: ["Traffic up", (g) => doc.costs.up_bytes[g], traffic],
  down: ["Traffic down", (g) => doc.costs.down_bytes[g], traffic],
  steps: ["Steps, local and server", (g) => sum(doc.costs.steps[g], doc.costs.server_steps[g]), compact],
  local: ["Local steps", (g) => doc.costs.steps[g], compact],
  server: ["Server steps", (g) => doc.costs.server_steps[g], compact],
  seconds: ["Wall-clock time", (g) => doc.costs.seconds[g], duration],
};
const boundsOf = (metric) => (metric.unit === "%" ? [0, 100] : [-Infinity, Infinity]);
const sum = (a, b) => (a === null && b === null ? null : (a ?? 0) + (b ?? 0));

// A labelled choice. options: [[key, text]].
function choice(name, title, options, value) {
  const set = (event) => change({ [name]: event.target.value });
  return el("label", null, title, " ", el("select", { data: { key: `choice:${name}` }, onchange: set }, options.map(([key, text]) => el("option", { value: key, selected: key === value }, text))));
}

// The names that are drawn: those that were chosen, else the best few.
function drawnNames(ranked) {
  return new Set(state.shown ? ranked.filter((name) => state.shown.has(name)) : ranked.slice(0, SHOWN));
}

// Names with their lines: each button shows or hides one.
function legend(ranked, drawn) {
  const only = (names) => change({ shown: names });
  const toggle = (name) => { const next = new Set(drawn); next.has(name) ? next.delete(name) : next.add(name); only(next); };
  const items = ranked.map((name) => el("button", { type: "button", class: "legend-item", "aria-pressed": String(drawn.has(name)), data: { key: `line:${name}` }, onclick: () => toggle(name) }, swatch(model.styles.get(name) ?? styleOf(0)), el("span", null, name)));
  const few = ranked.length > SHOWN ? [el("button", { type: "button", class: "quiet", data: { key: "lines:best" }, onclick: () => only(null) }, `Best ${SHOWN}`)] : [];
  return el("div", { class: "legend", role: "group", "aria-label": "Lines" }, items, el("span", { class: "legend-all" }, few,
    el("button", { type: "button", class: "quiet", data: { key: "lines:all" }, onclick: () => only(new Set(ranked)) }, "All"),
    el("button", { type: "button", class: "quiet", data: { key: "lines:none" }, onclick: () => only(new Set()) }, "None")));
}

// Names with their styles, where nothing can be chosen.
function stillLegend(items, line = true) {
  const once = new Map(items.map(({ name, style }) => [name, style]));
  return el("div", { class: "legend still" }, [...once].map(([name, style]) => el("span", { class: "legend-item" }, swatch(style, line), el("span", null, name))));
}

// Panels side by side, each drawn when it comes into sight. items: [{ title, draw(width) }].
function panels(items, height = 300) {
  const across = Math.max(1, Math.min(items.length, 3, Math.floor((room() + 16) / 350)));
  const width = Math.floor((room() - 16 * (across - 1)) / across) - 26; // less the panel's own padding
  const nodes = items.map(({ title, draw, table }) => {
    const place = el("div", { class: "chart", vars: { "min-height": `${height}px` } });
    const node = el("figure", { class: "panel" }, el("figcaption", null, title), place);
    later(place, () => {
      place.replaceChildren(draw(Math.max(240, width), height));
      if (table) node.append(disclosure("Values as a table", table));
    });
    return node;
  });
  return el("div", { class: "panels", vars: { "--across": String(across) } }, nodes);
}

const valuesTable = (head, rows) => el("div", { class: "table-frame", tabIndex: 0, role: "region", "aria-label": "Values" }, el("table", { class: "grid" }, el("thead", null, el("tr", null, head.map((h) => el("th", { scope: "col" }, h)))), el("tbody", null, rows.map(([first, ...rest]) => el("tr", null, el("th", { scope: "row" }, first), rest.map((v) => el("td", { class: "num" }, v)))))));

const settingsOf = (groups) => [...new Set(groups.map((g) => g.setting))].sort((a, b) => a - b);

// ------------------------------------------------------------------------------------------------- curves

async function curves() {
  const metric = doc.metrics[state.metric], groups = chosenGroups();
  if (!doc.curves.metrics.includes(state.metric)) return [el("h2", null, "Learning curves"), el("p", { class: "lead" }, `${metric.title} has no value for every round: choose another metric above.`)];
  const [values, cells] = await Promise.all([curvesOf(state.metric), cellsOf(state.metric, state.summary)]);
  const ranked = standings(groups, cells, metric).map((row) => row.name), drawn = drawnNames(ranked), link = [];
  const tell = (v) => figure(v, metric.digits);
  const items = settingsOf(groups).map((s) => {
    const own = groups.filter((g) => g.setting === s && drawn.has(g.name)).sort((a, b) => ranked.indexOf(a.name) - ranked.indexOf(b.name));
    const series = () => own.flatMap((g) => curvesOfGroup(g, values));
    return {
      title: doc.settings[s].name,
      draw: (width, height) => lines({
        series: series(), width, height, link, tell, high: metric.high, bounds: boundsOf(metric), label: `${metric.title} by round at ${doc.settings[s].name}. Left and right arrows move through the rounds.`,
        xTitle: "rounds trained", yTitle: `${metric.title} (${metric.unit})`, x: {}, tipTitle: (x) => `Round ${x}`,
      }),
      table: () => curveTable(series().filter((line) => !line.faint), tell),
    };
  });
  return [
    el("div", { class: "section-head" }, el("div", null, el("h2", null, `${metric.title} by round`), el("p", { class: "lead" }, "A line is the mean over seeds. Point at a chart, or focus it and use the arrow keys, to read every value at a round.")),
      el("div", { class: "choices" }, choice("band", "Band", Object.entries(BANDS), state.band), choice("seeds", "Seeds", [["mean", "averaged"], ["each", "each one too"]], state.seeds))),
    legend(ranked, drawn),
    items.length ? panels(items, items.length === 1 ? 420 : 300) : el("p", { class: "empty" }, "Nothing matches the filters."),
  ];
}

// A group's mean with its band; and each seed as a thin line where that is asked for. Trials that did not finish are
// never averaged; as seeds they end in a cross.
function curvesOfGroup(g, values) {
  const style = model.styles.get(g.name);
  const own = (t) => { const line = lineOf(t, g.role); return line === undefined || !values.has(line) ? [] : [line]; };
  const done = g.trials.filter((t) => doc.trials.status[t] === "done");
  const mean = { name: g.name, style, points: average(done.flatMap(own), values, state.band) };
  if (state.seeds !== "each") return mean.points.length ? [mean] : [];
  const each = g.trials.flatMap((t) => own(t).map((line) => ({ name: g.name, style, faint: true, ended: doc.trials.status[t] !== "done", points: average([line], values, "none") })));
  return [...each.filter((s) => s.points.length), ...(mean.points.length ? [mean] : [])];
}

function curveTable(series, tell) {
  const xs = [...new Set(series.flatMap((s) => s.points.map((p) => p.x)))].sort((a, b) => a - b);
  const at = series.map((s) => new Map(s.points.map((p) => [p.x, p])));
  return valuesTable(["Round", ...series.map((s) => s.name)], xs.map((x) => [String(x), ...at.map((points) => (points.has(x) ? tell(points.get(x).y) : "–"))]));
}

// ------------------------------------------------------------------------------------------------- axes

const AXES = { "partition.alpha": "Heterogeneity (Dirichlet alpha)", participation: "Participation (share of clients per round)" };
const axisTitle = (key) => AXES[key] ?? lastPart(key);

async function axes() {
  const metric = doc.metrics[state.metric];
  const keys = [...doc.axes].sort((a, b) => Object.keys(AXES).indexOf(b) - Object.keys(AXES).indexOf(a));
  const head = (extra) => el("div", { class: "section-head" }, el("div", null, el("h2", null, "Along an axis"), el("p", { class: "lead" }, "How the metric changes with heterogeneity, participation, or any other setting that has several values. Bars are 95 % intervals of the mean.")), extra);
  if (!keys.length) return [head(""), el("p", { class: "empty" }, "No setting of this sweep has several numeric values: there is no axis to draw over.")];
  const key = keys.includes(state.axis) ? state.axis : ["partition.alpha", "participation"].find((k) => keys.includes(k)) ?? keys[0];
  const cells = await cellsOf(state.metric, state.summary);
  const groups = chosenGroups({ setting: "" }).filter((g) => cells[g.id]), own = key.startsWith("hyper.");
  const panelsBy = new Map(), ranked = standings(groups, cells, metric).map((row) => row.name);
  for (const g of groups) {
    const from = own ? doc.entries[g.entry].keys : g.place.keys, x = from[key];
    if (typeof x !== "number") continue;
    const rest = Object.entries(from).filter(([k]) => k !== key).map(([k, v]) => `${lastPart(k)}=${shown(v)}`);
    const title = own ? g.place.name : rest.join(", ") || g.place.dataset;
    const name = own ? [g.method, ...rest, g.role && `(${g.role})`].filter(Boolean).join(" ") : g.name;
    const lines_ = panelsBy.get(title) ?? panelsBy.set(title, new Map()).get(title);
    const line = lines_.get(name) ?? lines_.set(name, { name, style: model.styles.get(g.name), points: [] }).get(name);
    line.points.push({ x, y: cells[g.id][0], low: cells[g.id][2], high: cells[g.id][3] });
  }
  const names = own ? [...new Set([...panelsBy.values()].flatMap((p) => [...p.keys()]))] : ranked;
  const drawn = own ? new Set(names) : drawnNames(names), tell = (v) => figure(v, metric.digits);
  const items = [...panelsBy].map(([title, found]) => {
    const series = [...found.values()].filter((s) => drawn.has(s.name)).map((s) => ({ ...s, points: s.points.sort((a, b) => a.x - b.x) })).sort((a, b) => names.indexOf(a.name) - names.indexOf(b.name));
    const xs = [...new Set(series.flatMap((s) => s.points.map((p) => p.x)))].sort((a, b) => a - b);
    const log = xs.length > 1 && xs[0] > 0 && xs.at(-1) / xs[0] >= 8;
    return {
      title,
      draw: (width, height) => lines({
        series, width, height, tell, band: "bars", high: metric.high, bounds: boundsOf(metric), label: `${metric.title} over ${axisTitle(key)}, ${title}. Left and right arrows move along the axis.`,
        xTitle: axisTitle(key) + (log ? ", logarithmic" : ""), yTitle: `${metric.title} (${metric.unit})`, x: { log, ticks: xs.length <= 10 ? xs : null, values: padded(xs, log) }, xText: (v) => compact(v), tipTitle: (x) => `${lastPart(key)} = ${compact(x)}`,
      }),
      table: () => valuesTable([lastPart(key), ...series.map((s) => s.name)], xs.map((x) => [compact(x), ...series.map((s) => { const p = s.points.find((q) => q.x === x); return p ? tell(p.y) : "–"; })])),
    };
  });
  return [
    head(el("div", { class: "choices" }, choice("axis", "Along", keys.map((k) => [k, axisTitle(k)]), key))),
    own ? stillLegend([...panelsBy.values()].flatMap((found) => [...found.values()])) : legend(names, drawn),
    panels(items, items.length === 1 ? 420 : 320),
  ];
}

// ------------------------------------------------------------------------------------------------- costs

async function costs() {
  const metric = doc.metrics[state.metric], groups = chosenGroups();
  const [title, cost, text] = COSTS[state.cost] ?? COSTS.traffic;
  const cells = await cellsOf(state.metric, state.summary);
  const ranked = standings(groups, cells, metric).map((row) => row.name);
  const items = settingsOf(groups).map((s) => {
    const points = groups.filter((g) => g.setting === s && cells[g.id] && cost(g.id) !== null).map((g) => {
      const [y, , low, high] = cells[g.id], x = cost(g.id);
      const interval = low === null ? "" : ` (${figure(low, metric.digits)} … ${figure(high, metric.digits)})`;
      return { name: g.name, style: model.styles.get(g.name), x, y, low, high, lines: [`${metric.title}: ${figure(y, metric.digits)}${metric.unit === "%" ? " %" : ` ${metric.unit}`}${interval}`, `${title}: ${text(x)}`] };
    });
    const positive = points.map((p) => p.x).filter((x) => x > 0);
    const log = points.length > 1 && positive.length === points.length && Math.max(...positive) / Math.min(...positive) > 8;
    return {
      title: doc.settings[s].name,
      draw: (width, height) => scatter({ points, width, height, high: metric.high, bounds: boundsOf(metric), xTitle: title + (log ? ", logarithmic" : ""), yTitle: `${metric.title} (${metric.unit})`, x: { log }, xText: text, label: `${metric.title} against ${title} at ${doc.settings[s].name}. Left and right arrows move through the methods.` }).node,
      table: () => valuesTable(["Method", title, `${metric.title} (${metric.unit})`], [...points].sort((a, b) => a.x - b.x).map((p) => [p.name, text(p.x), figure(p.y, metric.digits)])),
    };
  });
  return [
    el("div", { class: "section-head" }, el("div", null, el("h2", null, "Cost against quality"), el("p", { class: "lead" }, `Mean over seeds. No method is both cheaper and ${metric.high ? "better" : "lower"} than those on the dashed front.`)),
      el("div", { class: "choices" }, choice("cost", "Cost", Object.entries(COSTS).map(([k, [t]]) => [k, t]), state.cost))),
    stillLegend(ranked.map((name) => ({ name, style: model.styles.get(name) })), false),
    items.length ? panels(items, items.length === 1 ? 460 : 330) : el("p", { class: "empty" }, "Nothing matches the filters."),
  ];
}

// ------------------------------------------------------------------------------------------------- classes

async function classes() {
  const groups = chosenGroups(), recall = await part("recall");
  const settings = settingsOf(groups).filter((s) => groups.some((g) => g.setting === s && recall[g.id]));
  const head = (extra) => el("div", { class: "section-head" }, el("div", null, el("h2", null, "Recall by class (%)"), el("p", { class: "lead" }, "How much of each class a model recognises: mean over the last 10 rounds and over seeds. Sorted by the weakest class.")), extra);
  if (!settings.length) return [head(""), el("p", { class: "empty" }, "No recalls by class were recorded for what is chosen.")];
  const s = settings.includes(+state.place) && state.place !== "" ? +state.place : settings[0];
  const rows = groups.filter((g) => g.setting === s && recall[g.id]).map((g) => ({ key: g.name, label: g.name, name: g.name, style: model.styles.get(g.name), values: recall[g.id] }));
  for (const row of rows) row.worst = Math.min(...row.values.filter((v) => v !== null));
  const count = Math.max(...rows.map((row) => row.values.length)), names = doc.classes[doc.settings[s].dataset] ?? [];
  const short = (i) => names[i] ?? String(i);
  const pick = choice("place", "Setting", settings.map((at) => [String(at), doc.settings[at].name]), String(s));
  if (count > 40) return [head(el("div", { class: "choices" }, pick)), recallCanvas(rows, count, short)];
  const heat = (v) => (v === null ? "–" : el("span", { class: `heat-cell${v >= 62 ? " over62" : ""}${v >= 73 ? " over73" : ""}`, vars: { "--v": `${v}%` } }, figure(v, count > 20 ? 0 : 1)));
  return [head(el("div", { class: "choices" }, pick)), ...grid({
    id: "classes", caption: "Recall by class", rows, sort: { key: "worst", down: true },
    columns: [
      { key: "name", title: "Method", value: (row) => row.name, cell: named },
      { key: "worst", title: "Worst", num: true, down: true, value: (row) => row.worst, cell: (row) => el("b", null, figure(row.worst, 1)) },
      ...Array.from({ length: count }, (_, i) => ({ key: `c${i}`, title: short(i), num: true, down: true, value: (row) => row.values[i], css: () => "heat-td", cell: (row) => heat(row.values[i]) })),
    ],
  })];
}

function recallCanvas(rows, count, short) {
  const ordered = sorted(rows, (row) => row.worst, true);
  const counts = Array.from({ length: count }, (_, i) => ordered.map((row) => row.values[i] ?? 0));
  const labels = el("ol", { class: "recall-names" }, ordered.map((row) => el("li", null, row.name)));
  return el("div", { class: "recall-wide" }, labels, cells({ counts, width: room() - 260, label: "Recall by class and method. Arrow keys move through the cells.", tell: (c, m, v) => `${ordered[m].name}, class ${short(c)}: ${figure(v, 1)} %` }));
}

// ------------------------------------------------------------------------------------------------- partitions

async function partitions() {
  const deals = (await part("deals")) ?? [], groups = chosenGroups(), settings = settingsOf(groups);
  const span = (values, digits) => (values ? (values[0] === values[2] ? figure(values[1], digits) : `${figure(values[1], digits)} (${figure(values[0], digits)} … ${figure(values[2], digits)})`) : "–");
  const rows = settings.map((s) => ({ key: doc.settings[s].name, label: doc.settings[s].name, s, skew: doc.skew[s] }));
  const hashes = await part("rows");
  const wanted = new Set(groups.flatMap((g) => g.trials).map((t) => hashes[t].partition_hash));
  const skew = (key, title, digits, hint) => ({ key, title, hint, num: true, down: true, value: (row) => row.skew[key]?.[1], cell: (row) => span(row.skew[key], digits) });
  const items = deals.filter((deal) => wanted.has(deal.hash)).map((deal) => {
    const t = hashes.findIndex((row) => row.partition_hash === deal.hash), names = doc.classes[deal.dataset] ?? [];
    const more = deal.clients > deal.counts.length || deal.classes > deal.counts[0].length;
    return {
      title: `${settingName(t)}, seed ${doc.trials.seed[t]}${more ? `: the first ${deal.counts.length} of ${deal.clients} clients, ${deal.counts[0].length} of ${deal.classes} classes` : ""}`,
      draw: (width) => cells({ counts: deal.counts, width, label: `Rows of each class at each client, ${settingName(t)}. Arrow keys move through the cells.`, tell: (client, c, n) => `Client ${client}, class ${names[c] ?? c}: ${counted(n, "row")}` }),
    };
  });
  return [
    el("h2", null, "How skewed the clients are"),
    el("p", { class: "lead" }, "What the partitions came to, mean over those of all seeds, lowest and highest in brackets. One alpha of two rules is not one difficulty: compare these."),
    ...grid({
      id: "skew", caption: "Realised skew by setting", rows, sticky: false,
      columns: [
        { key: "setting", title: "Setting", value: (row) => row.s, cell: (row) => row.key },
        { key: "clients", title: "Clients", num: true, value: (row) => row.skew.clients, cell: (row) => whole(row.skew.clients) },
        skew("js", "Label skew (nats)", 3, "Jensen-Shannon divergence between a client’s label mix and the global one; 0 is none, 0.693 the most"),
        skew("classes", "Classes per client", 1), skew("size_cv", "Spread of sizes", 2, "Standard deviation of the clients’ sizes over their mean"),
        { key: "partitions", title: "Partitions", num: true, value: (row) => row.skew.partitions, cell: (row) => whole(row.skew.partitions) },
      ],
    }),
    items.length ? [el("h2", { class: "second" }, "Who holds what"), el("p", { class: "lead" }, "Clients from left to right, classes from top to bottom; the stronger the colour, the more training rows."), panels(items, 150)] : el("p", { class: "quiet" }, "Heat maps of clients and classes are drawn at the end of a sweep whose data set is at hand; none is on this page."),
  ].flat();
}
