// The page: one state (which artifact, which error, which order), drawn from the embedded data.
const data = JSON.parse(document.getElementById("data").textContent);
const last = data.num_train_timesteps, steps = data.steps;
const state = { artifact: 0, mode: "own", sort: null, down: false, query: "", open: new Set() };
const byId = (id) => document.getElementById(id);
const current = () => data.artifacts[state.artifact];
const groupColor = (i) => `c${i % 10}`;
const artifactColor = (i) => `c${2 + (i % 8)}`; // without those of the intervals and of the best ones

function element(name, properties, ...children) {
  const made = Object.assign(document.createElement(name), properties || {});
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

const mean = (values) => { const v = (values || []).filter(known); return v.length ? v.reduce((a, b) => a + b, 0) / v.length : null; };
const greatest = (values) => { const v = (values || []).filter(known); return v.length ? Math.max(...v) : null; };
const db = (v) => (known(v) ? v.toFixed(1) : "–");
const percent = (v) => (!known(v) ? "–" : v === 0 ? "0" : v < 0.001 ? "<0.1%" : `${(100 * v).toFixed(v < 0.1 ? 1 : 0)}%`);
const brief = (name) => name.replace(/_blocks?\b/g, "");

// A layer's name that may break after its dots.
function breakable(name) {
  return name.split(/(?<=[.])/).flatMap((part, i) => (i ? [document.createElement("wbr"), part] : [part]));
}

// ---- the rows of the table ----
function rows() {
  const artifact = current(), errors = artifact.errors;
  return artifact.layers.map((layer, i) => {
    const own = errors ? errors.own[i] : null;
    let worst = null;
    (own || []).forEach((v, k) => { if (known(v) && (worst === null || v < own[worst])) worst = k; });
    const tables = layer.quantizers.map((name) => artifact.tables[name]);
    return {
      layer, i, order: i + 1, tables, own: mean(own), worst: worst === null ? null : own[worst], worstT: worst === null ? null : steps[worst],
      accumulated: errors ? mean(errors.accumulated[i]) : null, clipped: greatest(tables.flatMap((t) => t.clipped || [])),
      varies: greatest(tables.map((t) => t.varies)), off: greatest(tables.map((t) => t.off)),
    };
  });
}

const columns = [
  { key: "own", title: "Own SQNR", down: false, measured: true, hint: "Mean over the steps of the layer's own SQNR (dB): lower loses more", cell: (r) => [`${db(r.own)} `, element("span", { className: "sub", textContent: "dB" })] },
  { key: "worst", title: "Worst step", down: false, measured: true, hint: "Lowest of these, and its t", cell: (r) => [`${db(r.worst)} `, element("span", { className: "sub", textContent: `t = ${format(r.worstT)}` })] },
  { key: "accumulated", title: "Accumulated", down: false, measured: true, hint: "Mean SQNR (dB) with the whole model quantized", cell: (r) => [`${db(r.accumulated)} `, element("span", { className: "sub", textContent: "dB" })] },
  { key: "clipped", title: "Clipped", down: true, measured: true, hint: "Largest share of values outside the range, over steps and inputs", cell: (r) => [percent(r.clipped)] },
  { key: "varies", title: "Varies over t", down: true, hint: "Largest interval over t by the smallest", cell: (r) => [known(r.varies) ? `${r.varies.toFixed(2)}×` : r.tables.length ? "at run time" : "float input"] },
  { key: "off", title: "Off best", down: true, measured: true, hint: "Mean distance of the interval from the one that is best for the activation alone", cell: (r) => [percent(r.off)] },
];
const measured = data.artifacts.some((a) => a.errors);
const shown = columns.filter((c) => measured || !c.measured);

function sorted() {
  const words = state.query.toLowerCase().split(/\s+/).filter(Boolean);
  const found = rows().filter(({ layer }) => words.every((w) => `${layer.name} ${layer.kind} ${layer.unit} w${layer.weight_bits} ${layer.roles.join(" ")}`.toLowerCase().includes(w)));
  const sign = state.down ? -1 : 1;
  return found.sort((a, b) => (known(a[state.sort]) ? (known(b[state.sort]) ? sign * (a[state.sort] - b[state.sort]) : -1) : known(b[state.sort]) ? 1 : 0) || a.i - b.i);
}

function sortBy(key, toggle) {
  const column = columns.find((c) => c.key === key);
  state.down = toggle && state.sort === key ? !state.down : column ? column.down : false;
  state.sort = key;
  byId("sort").value = key;
  table();
}

// A part of the table that is drawn anew under the reader's focus.
function kept(key, part) {
  part.dataset.key = key;
  return part;
}

function table() {
  const { key } = document.activeElement.dataset;
  const head = byId("table").tHead.rows[0], body = byId("table").tBodies[0], found = sorted();
  const title = (key, text, hint) => {
    const th = element("th", { scope: "col", title: hint }, kept(`sort ${key}`, element("button", { type: "button", textContent: text, onclick: () => sortBy(key, true) })));
    if (state.sort === key) th.setAttribute("aria-sort", state.down ? "descending" : "ascending");
    return th;
  };
  const sparks = measured ? ["Own SQNR over t", "Range over t"] : ["Range over t"];
  head.replaceChildren(title("order", "Layer", "Execution order"), ...shown.map((c) => title(c.key, c.title, c.hint)), ...sparks.map((text) => element("th", { scope: "col", textContent: text })));
  body.replaceChildren(...found.flatMap((r) => {
    const row = line(r);
    return state.open.has(r.layer.name) ? [row, detail(r)] : [row];
  }));
  const all = current().layers.length;
  byId("count").textContent = found.length === all ? `${all} layers` : found.length ? `${found.length} of ${all} layers` : "No layer matches";
  found.filter((r) => state.open.has(r.layer.name)).forEach(fill);
  if (key) focusOn(key);
}

function focusOn(key) {
  const part = document.querySelector(`[data-key="${CSS.escape(key)}"]`);
  if (part) part.focus({ preventScroll: true });
}

function line(r) {
  const { layer } = r, open = state.open.has(layer.name);
  const bits = [...new Set(r.tables.map((t) => `A${t.bits}`))].join(" ");
  const toggle = () => { state.open.has(layer.name) ? state.open.delete(layer.name) : state.open.add(layer.name); table(); };
  const name = kept(`layer ${layer.name}`, element("button", { type: "button", className: "name" }, ...breakable(layer.name)));
  name.setAttribute("aria-expanded", open);
  const tags = [layer.kind, layer.shape ? layer.shape.join("×") : "of attention", layer.weight_bits ? `W${layer.weight_bits} ${bits}` : bits, ...layer.roles.map((role) => role.replace("_", " "))].join(" · ");
  const row = element("tr", { className: `row${open ? " open" : ""}`, role: "row", onclick: toggle }, element("td", { role: "cell" }, name, element("span", { className: "tags", textContent: tags })));
  row.dataset.layer = layer.name;
  for (const c of shown) {
    const cell = element("td", { role: "cell" }, ...c.cell(r));
    cell.dataset.label = c.title;
    row.append(cell);
  }
  if (measured) row.append(sparkCell("Own SQNR over t", current().errors ? [{ t: steps, v: current().errors.own[r.i], color: "inputs" }] : []));
  row.append(sparkCell("Range over t", layer.quantizers.length ? rangeSeries(layer.quantizers[0], true) : []));
  return row;
}

function sparkCell(label, series) {
  const cell = element("td", { className: "wide", role: "cell" }, series.length ? spark(series, last) : "–");
  cell.dataset.label = label;
  return cell;
}

// ---- the charts of one layer ----
function rangeSeries(name, small) {
  const seen = data.activations[name], t = current().tables[name], series = [];
  if (seen) {
    const q = seen.quantiles;
    if (!small) series.push({ type: "band", t: steps, lo: seen.lo, hi: seen.hi, color: "band", opacity: 0.14, label: "all values" });
    series.push({ type: "band", t: steps, lo: q[0], hi: q[4], color: "band", opacity: 0.3, label: small ? null : "98% of values" });
    if (!small) series.push({ type: "band", t: steps, lo: q[1], hi: q[3], color: "band", opacity: 0.45, label: "middle half" }, { t: steps, v: q[2], color: "band", width: 1.3, label: "median" });
  }
  if (t.lo) series.push({ ...t.lo, color: "learned", label: small ? null : "lowest code" }, { ...t.hi, color: "learned", label: small ? null : "highest code" });
  return series;
}

function intervalSeries(name) {
  const artifact = current(), t = artifact.tables[name], seen = data.activations[name], series = [];
  data.artifacts.forEach((other, i) => {
    const theirs = other.tables[name];
    if (i !== state.artifact && theirs && theirs.scale && theirs.bits === t.bits) series.push({ ...theirs.scale, color: artifactColor(i), width: 1.2, opacity: 0.75, label: other.name });
  });
  if (seen && t.scale) {
    const to = mean(t.scale.t.length > 2 ? steps.map((at) => value(t.scale.t, t.scale.v, at)) : t.scale.v) / mean(seen.magnitude);
    series.push({ t: steps, v: seen.magnitude.map((v) => (known(v) ? v * to : null)), times: 1 / to, color: "magnitude", dash: true, width: 1.4, label: "mean |x|, scaled" });
  }
  if (t.best) series.push({ type: "dots", t: steps, v: t.best, color: "best", label: "best at each step" });
  if (t.scale) series.push({ ...t.scale, color: "learned", width: 2.2, label: `interval s(t)${data.artifacts.length > 1 ? ` of ${artifact.name}` : ""}` });
  return series;
}

function groupSeries(name) {
  const seen = data.activations[name], series = [];
  if (!seen || !seen.by_group || seen.by_group.low.length < 2) return series;
  seen.by_group.low.forEach((low, g) => series.push(
    { t: steps, v: seen.by_group.high[g], color: groupColor(g), width: 1.2, label: data.groups[g] }, { t: steps, v: low, color: groupColor(g), width: 1.2 }));
  return series;
}

function detail(r) {
  const cell = element("td", { colSpan: 1 + shown.length + 2 });
  const row = element("tr", { className: "detail" }, cell);
  row.dataset.detail = r.layer.name;
  return row;
}

function fill(r) {
  const cell = document.querySelector(`tr[data-detail="${CSS.escape(r.layer.name)}"] > td`), jobs = [];
  const panel = (title, series, options) => {
    const place = element("div", { className: "chart" }), key = element("div", { className: "legend" });
    jobs.push(() => { legend(key, series); chart(place, { series, last, label: `${title} of ${r.layer.name}`, ...options }); });
    return element("div", { className: "panel" }, element("p", { className: "title", textContent: title }), key, place);
  };
  const errors = current().errors;
  const parts = r.layer.quantizers.map((name) => {
    const t = current().tables[name], panels = [];
    if (rangeSeries(name).length) panels.push(panel("Activation inside its range", rangeSeries(name), {}));
    if (intervalSeries(name).length) panels.push(panel("Interval against activation magnitude", intervalSeries(name), { zero: true }));
    if (groupSeries(name).length) panels.push(panel(`Middle 98% of values, one line for each ${data.condition}`, groupSeries(name), {}));
    const facts = [`${t.method}, ${t.bits} bits`, t.scale ? null : "interval found at run time", known(t.follows) ? `correlation with the best interval ${t.follows.toFixed(2)}` : null, known(t.off) ? `${percent(t.off)} off it` : null];
    return [element("h3", {}, `${name} `, element("small", { textContent: facts.filter(Boolean).join(" · ") })), element("div", { className: "multiples" }, ...panels)];
  }).flat();
  if (!parts.length) parts.push(element("h3", {}, `${r.layer.name} `, element("small", { textContent: "only the weight is quantized" })), element("div", { className: "multiples" }));
  if (errors) {
    const series = [["inputs", "activations only", "inputs"], ["own", "own: weights and activations", "learned"], ["accumulated", "accumulated", "accumulated"]].map(([key, label, color]) => ({ t: steps, v: errors[key][r.i], color, label }));
    const shownSeries = r.layer.weight_bits ? series : series.slice(1);
    parts[1].append(panel("SQNR of the output (dB)", shownSeries, { unit: " dB" }));
  }
  cell.replaceChildren(...parts);
  jobs.forEach((job) => job());
}

// ---- the heat map ----
const modeTexts = {
  own: "Own: the layer gets full-precision inputs; its inputs and weights are quantized. Which layers lose by themselves.",
  inputs: "Own, activations only: as before, but with full-precision weights. What the intervals lose.",
  accumulated: "Accumulated: the whole model is quantized. What has arrived at each layer from all before it.",
};
let heat = null;

function ramp() {
  const stops = getComputedStyle(document.documentElement).getPropertyValue("--heat").split(",").map((c) => c.trim().match(/\w\w/g).map((h) => parseInt(h, 16)));
  return (share) => {
    const at = Math.min(Math.max(share, 0), 1) * (stops.length - 1), i = Math.min(Math.floor(at), stops.length - 2);
    return `rgb(${stops[i].map((c, j) => Math.round(c + (stops[i + 1][j] - c) * (at - i))).join(" ")})`;
  };
}

function heatMap() {
  const canvas = byId("map-canvas");
  if (!canvas) return;
  const errors = current().errors, layers = current().layers, color = ramp();
  const values = (errors ? errors[state.mode].flat() : [0, 1]).filter(known).sort((a, b) => a - b);
  const at = (share) => values[Math.round(share * (values.length - 1))];
  const lo = at(0.01), hi = at(0.85), row = Math.max(7, Math.min(15, Math.round(1400 / layers.length)));
  byId("map-labels").style.setProperty("--row", `${row}px`);
  byId("map-labels").replaceChildren(...layers.map((layer) => element("button", { type: "button", textContent: brief(layer.name), title: layer.name, tabIndex: -1, onclick: () => reveal(layer.name) })));
  const dense = devicePixelRatio || 1, width = canvas.parentElement.clientWidth - byId("map-labels").offsetWidth - 32, height = row * layers.length + 22;
  canvas.style.height = `${height}px`;
  canvas.width = Math.max(1, canvas.clientWidth || width) * dense; canvas.height = height * dense;
  const pen = canvas.getContext("2d"), cell = canvas.width / dense / steps.length;
  pen.scale(dense, dense);
  const style = getComputedStyle(document.documentElement);
  layers.forEach((layer, i) => steps.forEach((t, k) => {
    const v = errors ? errors[state.mode][i][k] : null;
    pen.fillStyle = known(v) ? color((v - lo) / (hi - lo || 1)) : style.getPropertyValue("--gap");
    pen.fillRect(k * cell, i * row, Math.ceil(cell * dense) / dense, row - (row > 9 ? 1 : 0));
  }));
  pen.fillStyle = style.getPropertyValue("--muted"); pen.font = "11px system-ui, sans-serif"; pen.textBaseline = "bottom";
  const every = Math.ceil(steps.length / Math.max(2, Math.floor(canvas.clientWidth / 70)));
  steps.forEach((t, k) => { if (k % every === 0 && (k + 0.5) * cell + 20 < canvas.clientWidth) { pen.textAlign = k ? "center" : "left"; pen.fillText(k ? format(t) : `t = ${format(t)}`, k ? (k + 0.5) * cell : 0, height - 3); } });
  heat = { row, cell };
  const bar = byId("scale"), ink = bar.getContext("2d");
  for (let i = 0; i < bar.width; i++) { ink.fillStyle = color(i / (bar.width - 1)); ink.fillRect(i, 0, 1, bar.height); }
  byId("scale-low").textContent = `${db(lo)} dB`; byId("scale-high").textContent = `${db(hi)} dB and more`;
  byId("mode-text").textContent = modeTexts[state.mode];
}

function under(event) {
  const box = byId("map-canvas").getBoundingClientRect();
  const i = Math.floor((event.clientY - box.top) / heat.row), k = Math.floor((event.clientX - box.left) / heat.cell);
  return i >= 0 && i < current().layers.length && k >= 0 && k < steps.length ? [i, k] : null;
}

function reveal(name) {
  state.query = byId("search").value = "";
  state.open.add(name);
  table();
  document.querySelector(`tr[data-layer="${CSS.escape(name)}"]`).scrollIntoView({ block: "start" });
  focusOn(`layer ${name}`);
}

if (byId("map-canvas")) {
  const canvas = byId("map-canvas"), mark = (i) => [...byId("map-labels").children].forEach((b, j) => b.classList.toggle("on", i === j));
  canvas.addEventListener("pointermove", (event) => {
    const found = under(event), errors = current().errors;
    mark(found ? found[0] : -1);
    if (!found || !errors) return hideTip();
    const [i, k] = found;
    showTip(event, current().layers[i].name, [["t", format(steps[k])], ["own", `${db(errors.own[i][k])} dB`], ["activations only", `${db(errors.inputs[i][k])} dB`], ["accumulated", `${db(errors.accumulated[i][k])} dB`]]);
  });
  canvas.addEventListener("pointerleave", () => { mark(-1); hideTip(); });
  canvas.addEventListener("click", (event) => { const found = under(event); if (found) { hideTip(); reveal(current().layers[found[0]].name); } });
  byId("modes").addEventListener("click", (event) => {
    const mode = event.target.dataset.mode;
    if (!mode) return;
    state.mode = mode;
    [...byId("modes").children].forEach((b) => b.setAttribute("aria-pressed", b.dataset.mode === mode));
    heatMap();
  });
}

// ---- other charts ----
function stepsChart() {
  const place = byId("steps-chart");
  if (!place) return;
  const series = [];
  const several = data.artifacts.length > 1;
  data.artifacts.forEach((a, i) => {
    const chosen = i === state.artifact, curve = a.stored ? a.stored.learned : a.errors ? { t: steps, v: a.errors.prediction } : null;
    const look = chosen ? { color: "learned", width: 2.4 } : { color: artifactColor(i), width: 1.3, opacity: 0.75 };
    if (curve) series.push({ ...curve, ...look, label: several ? a.name : "learned intervals" });
  });
  const stored = current().stored;
  if (stored) series.unshift({ ...stored.static, color: "best", dash: true, width: 1.6, label: "best static intervals, not learned" });
  legend(document.querySelector('[data-legend="steps"]'), series);
  chart(place, { series, last, height: 260, unit: " dB", label: "SQNR of the prediction over t" });
}

function seedCharts() {
  const place = byId("seed-charts"), groups = data.seed_groups || [];
  if (!place) return;
  const group = groups.find((g) => g.includes(state.artifact)) || groups[0], first = data.artifacts[group[0]];
  const names = Object.keys(first.tables).filter((n) => group.every((i) => data.artifacts[i].tables[n] && data.artifacts[i].tables[n].scale));
  names.sort((a, b) => first.tables[b].varies - first.tables[a].varies);
  const series = (n) => group.map((i) => ({ ...data.artifacts[i].tables[n].scale, color: artifactColor(i), label: `${data.artifacts[i].name} (seed ${data.artifacts[i].seed})` }));
  if (names.length) legend(document.querySelector('[data-legend="seeds"]'), series(names[0]));
  const charts = names.slice(0, 12).map((n) => [n, element("div", { className: "chart" })]);
  place.replaceChildren(...charts.map(([n, c]) => element("div", { className: "panel" }, element("p", { className: "title", textContent: n }), c)));
  charts.forEach(([n, c]) => chart(c, { series: series(n), last, height: 140, zero: true, label: `Intervals of ${n} for several seeds` }));
}

// ---- the loss of fine-tuning ----
function finetuneChart() {
  const place = byId(`finetune-${state.artifact}`), run = current().finetune;
  if (place) chart(place, { series: [{ ...run.losses, color: "learned", label: "loss" }], last: run.losses.t.at(-1), axis: "iteration", height: 200, label: "Loss of fine-tuning over the iterations" });
}

// ---- controls ----
function everything() {
  document.querySelectorAll("[data-artifact]").forEach((part) => { part.hidden = part.dataset.artifact !== String(state.artifact); });
  document.querySelectorAll("[data-other]").forEach((part) => { part.hidden = part.dataset.other !== String(Math.max(1, state.artifact)); });
  stepsChart(); heatMap(); table(); seedCharts(); finetuneChart();
}

for (const [key, text] of [["order", "Execution order"], ...shown.map((c) => [c.key, c.title])]) byId("sort").append(element("option", { value: key, textContent: text }));
state.sort = measured ? "own" : "order";
byId("sort").value = state.sort;
byId("sort").addEventListener("change", (event) => sortBy(event.target.value, false));
byId("search").addEventListener("input", (event) => { state.query = event.target.value; table(); });
if (byId("artifact")) byId("artifact").addEventListener("change", (event) => { state.artifact = Number(event.target.value); everything(); });

const themes = [["(prefers-color-scheme: dark)", "◐", "as the system"], ["not all", "☀", "light"], ["all", "☾", "dark"]];
let theme = 0;
byId("theme").addEventListener("click", () => {
  theme = (theme + 1) % themes.length;
  byId("dark").media = themes[theme][0];
  byId("theme").textContent = themes[theme][1];
  byId("theme").setAttribute("aria-label", `Colours: ${themes[theme][2]}`);
  heatMap();
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", heatMap);

const fullPicture = document.querySelector(".pictures .full img");
document.querySelectorAll(".pictures .swap").forEach((button) => {
  const image = button.firstElementChild, own = image.src;
  const swap = (full) => { image.src = full ? fullPicture.src : own; };
  image.draggable = false;
  button.addEventListener("pointerdown", () => swap(true));
  button.addEventListener("keydown", (event) => { if (event.key === "Enter" || event.key === " ") swap(true); });
  for (const end of ["pointerup", "pointerleave", "pointercancel", "keyup", "blur"]) button.addEventListener(end, () => swap(false));
});

function follow() {
  const name = decodeURIComponent(location.hash).replace(/^#layer=/, "");
  if (current().layers.some((layer) => layer.name === name)) reveal(name);
}
addEventListener("hashchange", follow);

let width = innerWidth;
addEventListener("resize", () => { if (innerWidth !== width) { width = innerWidth; everything(); } });
everything();
follow();
