// What the page knows: the document that the harness wrote, its packed parts, and small questions about them.

const MISSING = 0xffff; // the level of a value that was not measured
const COLOURS = 8, DASHES = ["", "7 4", "2 3", "9 3 2 3"];
const MARKERS = ["circle", "square", "triangle", "diamond", "cross", "plus", "down", "star"];

let doc = JSON.parse(document.getElementById("content").textContent);
let model = null;
model = arrange(doc);
const unpacked = new Map(); // packed text -> promise of what it holds

// Takes a newer document in the place of the old one.
function renew(newer) {
  doc = newer;
  model = arrange(doc);
  const kept = new Set(Object.values(doc.blocks));
  for (const text of unpacked.keys()) if (!kept.has(text)) unpacked.delete(text);
}

// The bytes of a packed part: gzip in base64.
async function bytes(text) {
  const packed = atob(text);
  const raw = new Uint8Array(packed.length);
  for (let i = 0; i < packed.length; i++) raw[i] = packed.charCodeAt(i);
  const stream = new Blob([raw]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Response(stream).arrayBuffer();
}

function once(text, read) {
  if (!unpacked.has(text)) unpacked.set(text, bytes(text).then(read));
  return unpacked.get(text);
}

// A packed part that is JSON; null where there is none.
async function part(name) {
  const text = doc.blocks[name];
  return text === undefined ? null : once(text, (buffer) => JSON.parse(new TextDecoder().decode(buffer)));
}

// What a metric came to. cells: by group, [mean, deviation, low, high, values of the trials, letters, difference] or
// null; stats: what leaderboards say of them together, or null. See scores.py.
async function scoresOf(metric, summary) {
  const found = await part(`cells.${metric}`);
  return found?.[summary] ?? found?.[""] ?? { cells: [], stats: null };
}
const cellsOf = async (metric, summary) => (await scoresOf(metric, summary)).cells;

// By number of a curve: its values, scaled as they are shown, NaN where nothing was measured. See series.pack_curves.
async function curvesOf(metric) {
  const text = doc.blocks[`curves.${metric}`];
  if (text === undefined) return new Map();
  const { scale } = doc.metrics[metric];
  const lengths = doc.curves.grid.map((grid) => doc.curves.grids[grid].length);
  return once(text, (buffer) => {
    const count = new Uint32Array(buffer, 0, 1)[0];
    const of = new Uint32Array(buffer, 4, count);
    const ends = new Float32Array(buffer, 4 + 4 * count, 2 * count);
    const levels = new Uint8Array(buffer, 4 + 12 * count);
    const half = levels.length / 2, curves = new Map();
    let at = 0;
    of.forEach((number, i) => {
      const values = new Float32Array(lengths[number]);
      let level = 0;
      for (let j = 0; j < values.length; j++, at++) {
        level = (level + levels[at] + (levels[half + at] << 8)) & 0xffff;
        values[j] = level === MISSING ? NaN : scale * (ends[i] + ends[count + i] * level);
      }
      curves.set(number, values);
    });
    return curves;
  });
}

// What a model is measured on: the global test set, a domain of it, or its own client's rows.
function kindOf(role) {
  if (role.includes("@")) return "domain";
  return /^personal(-|$)/.test(role) ? "personal" : "global";
}

// Groups as objects, with the names and styles that every section uses for them.
function arrange(content) {
  const { entry, setting, role, trials } = content.groups;
  const roles = new Map();
  entry.forEach((e, i) => role[i] && roles.set(e, (roles.get(e) ?? new Set()).add(role[i])));
  const named = (e, r) => content.entries[e].name + (r && roles.get(e).size > 1 ? ` (${r})` : "");
  const groups = entry.map((e, id) => ({
    id, entry: e, setting: setting[id], role: role[id], trials: trials[id], kind: kindOf(role[id]),
    name: named(e, role[id]), method: content.entries[e].method, place: content.settings[setting[id]],
  }));
  const byTrial = new Map();
  content.curves.trial.forEach((t, i) => byTrial.set(t, [...(byTrial.get(t) ?? []), i]));
  return { groups, styles: stylesOf(groups, content.ranks), byTrial };
}

// By name: its line and marker. The best have colours of their own; a name keeps its style when there is newer data.
function stylesOf(groups, ranks) {
  const found = model?.styles ?? new Map(), scores = new Map();
  groups.forEach((g, i) => scores.set(g.name, [...(scores.get(g.name) ?? []), ranks[i] ?? 0]));
  const mean = (name) => scores.get(name).reduce((a, b) => a + b, 0) / scores.get(name).length;
  const fresh = [...scores.keys()].filter((name) => !found.has(name)).sort((a, b) => mean(b) - mean(a) || a.localeCompare(b));
  for (const name of fresh) found.set(name, styleOf(found.size));
  return found;
}

function styleOf(i) {
  const turn = Math.floor(i / COLOURS);
  return { colour: i % COLOURS, dash: DASHES[turn % DASHES.length], marker: MARKERS[(i + 3 * turn) % MARKERS.length] };
}

// The curve of a trial's model; undefined where nothing was measured.
const lineOf = (trial, role) => model.byTrial.get(trial)?.find((i) => doc.curves.role[i] === role);

// Mean and band of several curves, point by point: [{ x, y, low, high }]. Points that one curve lacks are left out.
function average(lines, values, band) {
  const at = new Map();
  for (const line of lines) {
    const own = values.get(line);
    if (!own) continue;
    doc.curves.grids[doc.curves.grid[line]].forEach((x, j) => {
      if (Number.isFinite(own[j])) at.set(x, [...(at.get(x) ?? []), own[j]]);
    });
  }
  const most = Math.max(...[...at.values()].map((v) => v.length), 0);
  const xs = [...at.keys()].filter((x) => at.get(x).length === most).sort((a, b) => a - b);
  return xs.map((x) => ({ x, n: most, ...spread(at.get(x), band) }));
}

function spread(values, band) {
  const n = values.length, y = values.reduce((a, b) => a + b, 0) / n;
  if (n < 2 || band === "none") return { y };
  if (band === "range") return { y, low: Math.min(...values), high: Math.max(...values) };
  const deviation = Math.sqrt(values.reduce((a, v) => a + (v - y) ** 2, 0) / (n - 1));
  const half = band === "deviation" ? deviation : (deviation * (doc.student[n - 1] ?? 1.96)) / Math.sqrt(n);
  return { y, low: y - half, high: y + half };
}

// Numbers as people read them.
function figure(value, digits = 2) {
  return value === null || value === undefined || !Number.isFinite(value) ? "–" : value.toFixed(digits);
}
function compact(value, digits = 3) {
  if (value === null || value === undefined || !Number.isFinite(value)) return "–";
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size >= 1e5 || size < 1e-3) return value.toExponential(digits - 2).replace("e+", "e");
  return String(+value.toPrecision(digits));
}
function traffic(value) {
  if (value === null || value === undefined) return "–";
  const units = ["B", "kB", "MB", "GB", "TB", "PB"];
  let i = 0;
  while (Math.abs(value) >= 999.5 && i < units.length - 1) { value /= 1000; i++; }
  return `${+value.toPrecision(3)} ${units[i]}`;
}
function duration(seconds) {
  if (seconds === null || seconds === undefined) return "–";
  if (seconds < 99.5) return `${+seconds.toPrecision(3)} s`;
  const minutes = seconds / 60;
  if (minutes < 99.5) return `${+minutes.toPrecision(3)} min`;
  return `${+(minutes / 60).toPrecision(3)} h`;
}
const whole = (value) => (value === null || value === undefined ? "–" : Math.round(value).toLocaleString("en"));
const counted = (n, one, many = `${one}s`) => `${whole(n)} ${n === 1 ? one : many}`;
const shown = (value) => (typeof value === "string" ? value : JSON.stringify(value));
const lastPart = (key) => key.slice(key.lastIndexOf(".") + 1);
