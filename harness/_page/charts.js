// Drawing: elements, scales, and the three kinds of picture (lines, points, cells). Text is only ever set as text.

function fill(node, props, children) {
  for (const [name, value] of Object.entries(props ?? {})) {
    if (value === undefined || value === null || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name === "vars") for (const [key, set] of Object.entries(value)) node.style.setProperty(key, set);
    else if (name === "data") Object.assign(node.dataset, value);
    else if (["value", "checked", "selected", "open", "hidden", "disabled", "tabIndex"].includes(name)) node[name] = value;
    else node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false));
  return node;
}
const el = (tag, props, ...children) => fill(document.createElement(tag), props, children);
const svg = (tag, props, ...children) => fill(document.createElementNS("http://www.w3.org/2000/svg", tag), props, children);

// A scale from values to pixels, with its ticks. log: only where all values are positive.
function scale(values, from, to, { log = false, ticks = null, room = 60 } = {}) {
  const known = values.filter(Number.isFinite);
  let low = Math.min(...known), high = Math.max(...known);
  if (!known.length) [low, high] = [0, 1];
  log = log && low > 0;
  const wide = log ? (v) => Math.log10(v) : (v) => v;
  if (low === high) [low, high] = log ? [low / 2, high * 2] : [low - (Math.abs(low) || 1) / 2, high + (Math.abs(high) || 1) / 2];
  const most = Math.max(2, Math.floor(Math.abs(to - from) / room));
  let marks = ticks ?? (log ? decades(low, high, most) : steps(low, high, most));
  if (ticks && marks.length > most) marks = marks.filter((_, i) => i % Math.ceil(marks.length / most) === 0);
  const a = wide(low), b = wide(high);
  const at = (v) => from + ((wide(v) - a) / (b - a)) * (to - from);
  return { at, low, high, log, ticks: marks.filter((v) => v >= low - 1e-9 && v <= high * (1 + 1e-9) + 1e-12) };
}

function steps(low, high, most) {
  const raw = (high - low) / most, size = 10 ** Math.floor(Math.log10(raw));
  const step = size * [1, 2, 2.5, 5, 10].find((s) => s * size >= raw * 0.999);
  const found = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) found.push(+(i * step).toPrecision(12));
  return found;
}

function decades(low, high, most) {
  for (const parts of [[1, 2, 5], [1, 3], [1]]) {
    const found = [];
    for (let e = Math.floor(Math.log10(low)); e <= Math.ceil(Math.log10(high)); e++) {
      for (const p of parts) if (p * 10 ** e >= low * 0.999 && p * 10 ** e <= high * 1.001) found.push(p * 10 ** e);
    }
    if (found.length <= most && found.length > 1) return found;
  }
  return [low, high];
}

// The limits that an axis should have so that these values sit well between round numbers.
function padded(values, log) {
  const known = values.filter((v) => Number.isFinite(v) && (!log || v > 0));
  if (!known.length) return [0, 1];
  const low = Math.min(...known), high = Math.max(...known);
  if (log) return [low / 1.15, high * 1.15];
  const room = (high - low || Math.abs(high) || 1) * 0.06;
  return [low >= 0 && low - room < 0 ? 0 : low - room, high + room];
}

// The same for a vertical axis: means and what there is of their intervals, but a wild one must not flatten the rest.
function limits(points, bounds) {
  const [low, high] = padded(points.map((p) => p.y)), reach = (high - low) * 0.75;
  const ends = points.flatMap((p) => [p.low, p.high]).filter(Number.isFinite).map((v) => Math.min(Math.max(v, low - reach), high + reach));
  const [bottom, top] = padded([...points.map((p) => p.y), ...ends]);
  return bounds ? [Math.max(bottom, bounds[0]), Math.min(top, bounds[1])] : [bottom, top];
}

const SHAPES = {
  circle: (r) => `M${-r} 0a${r} ${r} 0 1 0 ${2 * r} 0a${r} ${r} 0 1 0 ${-2 * r} 0z`,
  square: (r) => `M${-r * 0.9} ${-r * 0.9}h${r * 1.8}v${r * 1.8}h${-r * 1.8}z`,
  triangle: (r) => `M0 ${-r * 1.15}L${r * 1.1} ${r * 0.85}H${-r * 1.1}z`,
  diamond: (r) => `M0 ${-r * 1.3}L${r * 1.1} 0L0 ${r * 1.3}L${-r * 1.1} 0z`,
  cross: (r) => turned(r, 0.785398),
  plus: (r) => turned(r, 0),
  down: (r) => `M0 ${r * 1.15}L${r * 1.1} ${-r * 0.85}H${-r * 1.1}z`,
  star: (r) => "M" + Array.from({ length: 10 }, (_, i) => polar(i % 2 ? r * 0.6 : r * 1.4, (i * Math.PI) / 5)).join("L") + "z",
};
const polar = (r, angle) => `${+(r * Math.sin(angle)).toFixed(2)} ${+(-r * Math.cos(angle)).toFixed(2)}`;
function turned(r, angle) {
  const w = r * 0.42, l = r * 1.25;
  const corners = [[w, l], [w, w], [l, w], [l, -w], [w, -w], [w, -l], [-w, -l], [-w, -w], [-l, -w], [-l, w], [-w, w], [-w, l]];
  const [c, s] = [Math.cos(angle), Math.sin(angle)];
  return "M" + corners.map(([x, y]) => `${+(x * c - y * s).toFixed(2)} ${+(x * s + y * c).toFixed(2)}`).join("L") + "z";
}
const marker = (style, x, y, r = 4) =>
  svg("path", { class: `mark c${style.colour}`, d: SHAPES[style.marker](r), transform: `translate(${+x.toFixed(1)} ${+y.toFixed(1)})` });

// A name's line and marker, small: for legends, tables and tips.
function swatch(style, line = true) {
  const parts = [marker(style, 13, 7, 3.6)];
  if (line) parts.unshift(svg("path", { class: `line c${style.colour}`, "stroke-dasharray": style.dash, d: "M1 7H25" }));
  return svg("svg", { class: "swatch", viewBox: line ? "0 0 26 14" : "6 0 14 14", width: line ? 26 : 14, height: 14, "aria-hidden": "true" }, parts);
}

let frames = 0;

// The frame of a chart: axes, grid, titles, and a place for tips. plot(x, y) draws into it.
function frame({ width, height, x, y, xTitle, yTitle, xText = compact, yText = compact, label, left = 52 }) {
  const box = { left, right: width - 18, top: 12, bottom: height - 44 };
  const xs = scale(x.values, box.left, box.right, { log: x.log, ticks: x.ticks, room: 58 });
  const ys = scale(y.values, box.bottom, box.top, { log: y.log, room: 36 });
  const rules = svg("g", { class: "rules" }), texts = svg("g", { class: "ticks" });
  for (const v of ys.ticks) {
    const at = ys.at(v);
    rules.append(svg("path", { d: `M${box.left} ${at}H${box.right}` }));
    texts.append(svg("text", { x: box.left - 8, y: at + 4, "text-anchor": "end" }, yText(v)));
  }
  for (const v of xs.ticks) {
    const at = xs.at(v);
    rules.append(svg("path", { d: `M${at} ${box.bottom}v5` }));
    texts.append(svg("text", { x: at, y: box.bottom + 19, "text-anchor": "middle" }, xText(v)));
  }
  rules.append(svg("path", { class: "base", d: `M${box.left} ${box.bottom}H${box.right}` }));
  texts.append(
    svg("text", { class: "axis-title", x: (box.left + box.right) / 2, y: height - 6, "text-anchor": "middle" }, xTitle),
    svg("text", { class: "axis-title", transform: `translate(13 ${(box.top + box.bottom) / 2}) rotate(-90)`, "text-anchor": "middle" }, yTitle),
  );
  const name = `clip${++frames}`; // what an interval has beyond the axes is not drawn
  const clip = svg("clipPath", { id: name }, svg("rect", { x: box.left - 8, y: box.top - 8, width: box.right - box.left + 16, height: box.bottom - box.top + 10 }));
  const body = svg("g", { "clip-path": `url(#${name})` }), over = svg("g", { class: "over" });
  const picture = svg("svg", { width, height, viewBox: `0 0 ${width} ${height}`, "aria-hidden": "true" }, clip, rules, texts, body, over);
  const tip = el("div", { class: "tip", hidden: true });
  const node = el("div", { class: "plot", tabIndex: 0, role: "group", "aria-roledescription": "chart", "aria-label": label }, picture, tip);
  return { node, picture, tip, body, over, box, xs, ys, height };
}

// A tip beside a place of a picture, on the side where the window has room for it.
function placeTip(f, x, y) {
  f.tip.hidden = false;
  const { offsetWidth: w, offsetHeight: h } = f.tip, from = f.node.getBoundingClientRect().left, wide = document.documentElement.clientWidth;
  const right = x + 16, left = x - 16 - w;
  const beside = from + right + w <= wide - 8 ? right : from + left >= 8 ? left : Math.max(8 - from, Math.min(right, wide - 8 - w - from));
  f.tip.style.left = `${beside}px`;
  f.tip.style.top = `${Math.max(0, Math.min(y - h / 2, f.height - h))}px`;
}

// Lines over x with bands or error bars, and a crosshair that tells all values at one x.
// series: [{ name, style, points: [{ x, y, low, high }], faint }], best first as the tip should list them.
function lines({ series, band = "area", link = null, tipTitle, tell, high = true, bounds, ...how }) {
  const f = frame({ ...how, x: { ...how.x, values: how.x.values ?? series.flatMap((s) => s.points.map((p) => p.x)) }, y: { values: limits(series.flatMap((s) => s.points), bounds) } });
  const { top: boxTop, bottom: boxBottom } = f.box;
  const X = (p) => +f.xs.at(p.x).toFixed(1), Y = (v) => +f.ys.at(v).toFixed(1);
  const behind = svg("g"), front = svg("g");
  const places = [...new Set(series.flatMap((s) => s.points.map((p) => p.x)))].map(f.xs.at).sort((a, b) => a - b);
  const gap = Math.min(24, ...places.slice(1).map((x, i) => 0.35 * (x - places[i])));
  const dodge = (number) => (band === "bars" ? ((number - (series.length - 1) / 2) * gap) / Math.max(5, series.length) : 0); // bars beside each other
  series.forEach((s, number) => {
    const X = (p) => +(f.xs.at(p.x) + dodge(number)).toFixed(1);
    const c = `c${s.style.colour}`, ranged = s.points.filter((p) => p.low !== undefined && p.low !== null);
    if (band === "area" && ranged.length > 1) {
      const d = `M${ranged.map((p) => `${X(p)} ${Y(p.high)}`).join("L")}L${[...ranged].reverse().map((p) => `${X(p)} ${Y(p.low)}`).join("L")}z`;
      behind.append(svg("path", { class: `band ${c}`, d }));
    } else if (band === "bars") {
      for (const p of ranged) behind.append(svg("path", { class: `line bar ${c}`, d: `M${X(p)} ${Y(p.low)}V${Y(p.high)}M${X(p) - 2.5} ${Y(p.low)}h5M${X(p) - 2.5} ${Y(p.high)}h5` }));
    }
    if (!s.points.length) return;
    const d = "M" + s.points.map((p) => `${X(p)} ${Y(p.y)}`).join("L");
    front.append(svg("path", { class: `line ${c}${s.faint ? " faint" : ""}`, "stroke-dasharray": s.style.dash, d }));
    if (s.faint) {
      if (s.ended) front.append(marker({ ...s.style, marker: "cross" }, X(s.points.at(-1)), Y(s.points.at(-1).y), 4));
      return;
    }
    const every = band === "bars" ? 1 : Math.max(1, Math.ceil(s.points.length / 6));
    s.points.forEach((p, i) => {
      if (i % every === (number * 3) % every) front.append(marker(s.style, X(p), Y(p.y), band === "bars" ? 4.2 : 3.6));
    });
  });
  f.body.append(behind, front);
  const solid = series.filter((s) => !s.faint);
  const xs = [...new Set(solid.flatMap((s) => s.points.map((p) => p.x)))].sort((a, b) => a - b);
  const seen = solid.map((s) => new Map(s.points.map((p) => [p.x, p])));
  let now = null;
  const show = (x, tips) => {
    now = x;
    f.over.replaceChildren();
    f.tip.hidden = true;
    if (x === null) return;
    const at = solid.map((s, i) => ({ s, p: seen[i].get(x) })).filter(({ p }) => p);
    if (!at.length) return;
    const px = X(at[0].p);
    f.over.append(svg("path", { class: "hair", d: `M${px} ${boxTop}V${boxBottom}` }));
    for (const { s, p } of at) f.over.append(svg("circle", { class: `dot c${s.style.colour}`, cx: px + dodge(series.indexOf(s)), cy: Y(p.y), r: 4 }));
    if (!tips) return;
    at.sort((a, b) => (high ? b.p.y - a.p.y : a.p.y - b.p.y));
    const rows = at.slice(0, 14).map(({ s, p }) => el("tr", null, el("td", null, swatch(s.style)), el("th", { scope: "row" }, s.name), el("td", { class: "num" }, tell(p.y)), el("td", { class: "num quiet" }, p.low === undefined || p.low === null ? "" : `${tell(p.low)} … ${tell(p.high)}`)));
    f.tip.replaceChildren(el("p", null, tipTitle(x)), el("table", null, el("tbody", null, rows)), at.length > 14 ? el("p", { class: "quiet" }, `and ${at.length - 14} more`) : "");
    placeTip(f, px, (boxTop + boxBottom) / 2);
    return at;
  };
  link?.push((x, from) => from !== f && show(x === null ? null : nearest(xs, x), false));
  const all = (x, tips) => { const at = show(x, tips); link?.forEach((other) => other(x, f)); return at; };
  f.picture.addEventListener("pointermove", (event) => {
    const px = event.clientX - f.picture.getBoundingClientRect().left;
    all(xs.reduce((best, x) => (Math.abs(f.xs.at(x) - px) < Math.abs(f.xs.at(best) - px) ? x : best), xs[0] ?? null), true);
  });
  f.picture.addEventListener("pointerleave", () => all(null, false));
  f.node.addEventListener("blur", () => all(null, false));
  f.node.addEventListener("keydown", (event) => {
    const size = event.shiftKey ? 10 : 1, i = xs.indexOf(now);
    const to = { ArrowRight: i + size, ArrowLeft: i < 0 ? xs.length - 1 : i - size, Home: 0, End: xs.length - 1 }[event.key];
    if (event.key === "Escape") all(null, false);
    if (to === undefined || !xs.length) return;
    event.preventDefault();
    const at = all(xs[Math.max(0, Math.min(xs.length - 1, to))], true);
    if (at) say(`${tipTitle(now)}: ${at.slice(0, 6).map(({ s, p }) => `${s.name} ${tell(p.y)}`).join(", ")}`);
  });
  return f.node;
}

const nearest = (xs, x) => xs.reduce((best, v) => (Math.abs(v - x) < Math.abs(best - x) ? v : best), xs[0] ?? null);

// Points with error bars and the front that nothing beats. points: [{ name, style, x, y, low, high, lines: [text] }]
function scatter({ points, high, label, bounds, ...how }) {
  const f = frame({ ...how, label, x: { ...how.x, values: padded(points.map((p) => p.x), how.x.log) }, y: { values: limits(points, bounds) } });
  const X = (p) => +f.xs.at(p.x).toFixed(1), Y = (v) => +f.ys.at(v).toFixed(1);
  const order = [...points].sort((a, b) => a.x - b.x || (high ? b.y - a.y : a.y - b.y));
  const front = [];
  for (const p of order) if (!front.length || (high ? p.y > front.at(-1).y : p.y < front.at(-1).y)) front.push(p);
  if (front.length) {
    const path = front.map((p, i) => (i ? `H${X(p)}V${Y(p.y)}` : `M${X(p)} ${Y(p.y)}`)).join("");
    f.body.append(svg("path", { class: "front", d: `${path}H${f.box.right}` }));
  }
  const taken = [];
  for (const p of order) {
    if (p.low !== null && p.low !== undefined) f.body.append(svg("path", { class: `line bar c${p.style.colour}`, d: `M${X(p)} ${Y(p.low)}V${Y(p.high)}` }));
    f.body.append(marker(p.style, X(p), Y(p.y), front.includes(p) ? 6.2 : 4.6));
  }
  for (const p of front) {
    const wide = p.name.length * 6.3, after = X(p) + 10 + wide < f.box.right;
    const spot = { x0: after ? X(p) + 8 : X(p) - 10 - wide, y: Y(p.y) - 8 };
    if (taken.some((t) => Math.abs(t.y - spot.y) < 13 && t.x0 < spot.x0 + wide && spot.x0 < t.x1)) continue;
    taken.push({ ...spot, x1: spot.x0 + wide });
    f.body.append(svg("text", { class: "point-name", x: after ? X(p) + 9 : X(p) - 9, y: Y(p.y) - 8, "text-anchor": after ? "start" : "end" }, p.name));
  }
  let now = -1;
  const show = (i, speak) => {
    now = i;
    f.over.replaceChildren();
    f.tip.hidden = true;
    const p = order[i];
    if (!p) return;
    f.over.append(svg("circle", { class: `ring c${p.style.colour}`, cx: X(p), cy: Y(p.y), r: 10 }));
    f.tip.replaceChildren(el("p", null, swatch(p.style, false), " ", p.name, front.includes(p) ? el("span", { class: "tag" }, "on the front") : ""), ...p.lines.map((line) => el("p", { class: "quiet" }, line)));
    placeTip(f, X(p), Y(p.y));
    if (speak) say([p.name, ...p.lines, front.includes(p) ? "on the front" : ""].join(", "));
  };
  f.picture.addEventListener("pointermove", (event) => {
    const r = f.picture.getBoundingClientRect(), far = (p) => Math.hypot(X(p) - event.clientX + r.left, Y(p.y) - event.clientY + r.top);
    const i = order.reduce((best, p, j) => (far(p) < far(order[best]) ? j : best), 0);
    show(order.length && far(order[i]) < 40 ? i : -1, false);
  });
  f.picture.addEventListener("pointerleave", () => show(-1, false));
  f.node.addEventListener("blur", () => show(-1, false));
  f.node.addEventListener("keydown", (event) => {
    const to = { ArrowRight: now + 1, ArrowLeft: now < 0 ? order.length - 1 : now - 1, Home: 0, End: order.length - 1, Escape: -1 }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    show(event.key === "Escape" ? -1 : Math.max(0, Math.min(order.length - 1, to)), true);
  });
  return { node: f.node, front };
}

// Average ranks, the best to the left; a bar joins those that Nemenyi's test does not tell apart (Demsar 2006).
// Where names have no room the marks of the table's rows stand for them.
function rankDiagram({ names, ranks, settings, p, critical, cliques }, width) {
  const order = ranks.map((rank, i) => i).sort((a, b) => ranks[a] - ranks[b]), half = Math.ceil(order.length / 2);
  const label = (i) => `${names[i]} ${ranks[i].toFixed(2)}`, longest = Math.max(...order.map((i) => label(i).length)) * 7.9 + 14;
  const named = longest < width * 0.4, side = named ? longest : 68, bars = cliques.length * 9, height = 46 + bars + half * 20 + 8;
  const x = scale([1, names.length], side, width - side, { room: 26 });
  const node = svg("svg", { width, height, viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": `Average ranks over ${settings} settings: ${order.map(label).join(", ")}` });
  node.append(svg("path", { class: "hair solid", d: `M${side} 30H${width - side}` }));
  for (const tick of x.ticks.filter(Number.isInteger)) node.append(svg("path", { class: "hair solid", d: `M${x.at(tick)} 25v5` }), svg("text", { class: "rank-tick", x: x.at(tick), y: 19, "text-anchor": "middle" }, String(tick)));
  order.forEach((i, place) => {
    const left = place < half, row = left ? place : order.length - 1 - place, y = 46 + bars + row * 20, at = x.at(ranks[i]);
    const style = model.styles.get(names[i]) ?? styleOf(0), away = left ? -1 : 1, edge = left ? side : width - side;
    node.append(svg("path", { class: `line c${style.colour}`, d: `M${at.toFixed(1)} 30V${y}H${edge + 6 * away}` }),
      svg("text", { class: "point-name", x: edge + (named ? 10 : 24) * away, y: y + 4, "text-anchor": left ? "end" : "start" }, named ? label(i) : ranks[i].toFixed(2)));
    if (!named) node.append(marker(style, edge + 14 * away, y, 4.6));
  });
  cliques.forEach((clique, i) => {
    const at = clique.map((one) => x.at(ranks[one]));
    node.append(svg("path", { class: "clique", d: `M${Math.min(...at) - 3} ${38 + i * 9}H${Math.max(...at) + 3}` }));
  });
  const text = `${settings} settings; Friedman’s p ${p < 0.0001 ? "< 0.0001" : `= ${+p.toPrecision(2)}`} that no method differs. Bars join methods whose ranks differ by less than ${critical.toFixed(2)}: Nemenyi’s test does not tell them apart (5 %).`;
  return el("div", { class: "rank-diagram" }, node, el("p", { class: "quiet small" }, text));
}

// Cells of counts on a canvas: rows are classes, columns clients. tell(client, class, count) is the tip.
function cells({ counts, width, label, tell }) {
  const clients = counts.length, classes = counts[0].length;
  const w = Math.max(2, Math.min(22, Math.floor(width / clients))), h = Math.max(2, Math.min(16, Math.floor(220 / classes)));
  const canvas = el("canvas", { class: "heat", width: clients * w * 2, height: classes * h * 2, vars: { width: `${clients * w}px`, height: `${classes * h}px` } });
  const tip = el("div", { class: "tip", hidden: true });
  const node = el("div", { class: "plot cells", tabIndex: 0, role: "group", "aria-roledescription": "heat map", "aria-label": label }, canvas, tip);
  const top = Math.max(1, ...counts.flat());
  const paint = () => {
    const pen = canvas.getContext("2d"), style = getComputedStyle(document.documentElement);
    const ramp = [0, 1, 2, 3, 4].map((i) => style.getPropertyValue(`--heat-${i}`).trim());
    pen.setTransform(2, 0, 0, 2, 0, 0);
    pen.fillStyle = style.getPropertyValue("--sunk").trim();
    pen.fillRect(0, 0, clients * w, classes * h);
    const gap = Math.min(w, h) > 5 ? 1 : 0;
    counts.forEach((row, i) => row.forEach((n, c) => {
      if (!n) return;
      pen.fillStyle = mixed(ramp, Math.sqrt(n / top)); // the square root keeps small holdings visible
      pen.fillRect(i * w, c * h, w - gap, h - gap);
    }));
  };
  canvas.paint = paint;
  paint();
  let at = [0, 0];
  const show = (i, c, speak) => {
    at = [Math.max(0, Math.min(clients - 1, i)), Math.max(0, Math.min(classes - 1, c))];
    const text = tell(...at, counts[at[0]][at[1]]);
    tip.replaceChildren(el("p", null, text));
    placeTip({ tip, node, height: classes * h }, (at[0] + 0.5) * w, at[1] * h);
    if (speak) say(text);
  };
  canvas.addEventListener("pointermove", (event) => {
    const r = canvas.getBoundingClientRect();
    show(Math.floor(((event.clientX - r.left) / r.width) * clients), Math.floor(((event.clientY - r.top) / r.height) * classes), false);
  });
  canvas.addEventListener("pointerleave", () => { tip.hidden = true; });
  node.addEventListener("blur", () => { tip.hidden = true; });
  node.addEventListener("keydown", (event) => {
    const by = { ArrowRight: [1, 0], ArrowLeft: [-1, 0], ArrowDown: [0, 1], ArrowUp: [0, -1] }[event.key];
    if (event.key === "Escape") tip.hidden = true;
    if (!by) return;
    event.preventDefault();
    show(at[0] + by[0], at[1] + by[1], true);
  });
  return node;
}

// A colour on a ramp of hex colours, at a share of its length.
function mixed(ramp, share) {
  const place = Math.max(0, Math.min(1, share)) * (ramp.length - 1), i = Math.min(ramp.length - 2, Math.floor(place));
  const [a, b] = [ramp[i], ramp[i + 1]].map((hex) => [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16)));
  return `rgb(${a.map((v, j) => Math.round(v + (b[j] - v) * (place - i))).join(" ")})`;
}
