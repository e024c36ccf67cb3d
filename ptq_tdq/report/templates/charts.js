"use strict";
// Small line charts over the time step, as SVG: axes, lines, bands, dots, and a tooltip with the values at a t.
const SVG = "http://www.w3.org/2000/svg";
const tip = document.getElementById("tip");

function node(name, attributes, text) {
  const element = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes || {})) element.setAttribute(key, value);
  if (text !== undefined) element.textContent = text;
  return element;
}

const linear = (d0, d1, r0, r1) => (v) => r0 + ((v - d0) / (d1 - d0 || 1)) * (r1 - r0);
const known = (v) => v !== null && v !== undefined && Number.isFinite(v);

function ticks(lo, hi, about) {
  const raw = (hi - lo) / about, power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 2.5, 5, 10].map((m) => m * power).find((s) => s >= raw);
  const found = [];
  for (let i = Math.ceil(lo / step - 1e-9); i * step <= hi + step * 1e-9; i++) found.push(+(i * step).toPrecision(10));
  return found;
}

function format(v) {
  if (!known(v)) return "–";
  const size = Math.abs(v);
  return size === 0 ? "0" : size >= 1000 || size < 0.001 ? v.toExponential(1) : String(+v.toPrecision(3));
}

// Path through the known points of a curve; a gap where a value is missing.
function path(t, v, x, y) {
  let text = "", pen = false;
  t.forEach((at, i) => {
    if (!known(v[i])) { pen = false; return; }
    text += `${pen ? "L" : "M"}${x(at).toFixed(1)} ${y(v[i]).toFixed(1)}`;
    pen = true;
  });
  return text;
}

function band(t, lo, hi, x, y) {
  const points = t.map((at, i) => [at, lo[i], hi[i]]).filter(([, a, b]) => known(a) && known(b));
  if (!points.length) return "";
  const up = points.map(([at, , b]) => `${x(at).toFixed(1)} ${y(b).toFixed(1)}`);
  const down = points.reverse().map(([at, a]) => `${x(at).toFixed(1)} ${y(a).toFixed(1)}`);
  return `M${up.join("L")}L${down.join("L")}Z`;
}

function extent(series) {
  let lo = Infinity, hi = -Infinity;
  for (const s of series) for (const v of [...(s.v || []), ...(s.lo || []), ...(s.hi || [])]) {
    if (known(v)) { lo = Math.min(lo, v); hi = Math.max(hi, v); }
  }
  return lo > hi ? [0, 1] : lo === hi ? [lo - Math.abs(lo) * 0.1 - 1e-9, hi + Math.abs(hi) * 0.1 + 1e-9] : [lo, hi];
}

function draw(parent, s, x, y) {
  const color = `var(--${s.color})`;
  if (s.type === "band") parent.append(node("path", { d: band(s.t, s.lo, s.hi, x, y), style: `fill:${color};opacity:${s.opacity || 0.2}` }));
  else if (s.type === "dots") s.t.forEach((t, i) => known(s.v[i]) && parent.append(node("circle", { cx: x(t).toFixed(1), cy: y(s.v[i]).toFixed(1), r: 2.4, style: `fill:${color}` })));
  else parent.append(node("path", { d: path(s.t, s.v, x, y), style: `fill:none;stroke:${color};stroke-width:${s.width || 1.8};opacity:${s.opacity || 1};stroke-linejoin:round${s.dash ? ";stroke-dasharray:4 3" : ""}` }));
}

// A chart in `parent`, as wide as it is. options: {series, last (T), height, zero (y from 0), unit, axis (name of x)}
function chart(parent, options) {
  const width = Math.max(parent.clientWidth, 220), height = options.height || 170;
  const left = 42, right = 8, top = 8, bottom = 22;
  const axis = options.axis || "t";
  let [lo, hi] = extent(options.series);
  if (options.zero) lo = Math.min(lo, 0);
  const pad = (hi - lo) * 0.05;
  lo = options.zero && lo === 0 ? 0 : lo - pad;
  hi += pad;
  const x = linear(0, options.last, left, width - right), y = linear(lo, hi, height - bottom, top);
  const svg = node("svg", { viewBox: `0 0 ${width} ${height}`, height, role: "slider", tabindex: 0, "aria-label": options.label, "aria-valuemin": 0, "aria-valuemax": options.last, "aria-valuenow": 0 });
  for (const v of ticks(lo, hi, height > 200 ? 5 : 4)) {
    svg.append(node("line", { class: "grid", x1: left, x2: width - right, y1: y(v), y2: y(v) }));
    svg.append(node("text", { x: left - 6, y: y(v) + 3.5, "text-anchor": "end" }, format(v)));
  }
  for (const t of ticks(0, options.last, width > 500 ? 8 : 4)) svg.append(node("text", { x: x(t), y: height - 6, "text-anchor": t === 0 ? "start" : t === options.last ? "end" : "middle" }, t === 0 ? `${axis} = 0` : t));
  options.series.forEach((s) => draw(svg, s, x, y));
  const cross = node("line", { class: "cross", y1: top, y2: height - bottom, visibility: "hidden" });
  svg.append(cross);
  parent.replaceChildren(svg);
  hover(svg, cross, x, options, left, width - right, width);
}

// The values at a t, for a pointer and for the arrow keys.
function hover(svg, cross, x, options, left, right, width) {
  const axis = options.axis || "t";
  let t = 0;
  const show = (at, event) => {
    t = Math.round(Math.min(Math.max(at, 0), options.last));
    const box = svg.getBoundingClientRect(), place = event || { clientX: box.left + (x(t) / width) * box.width, clientY: box.top };
    cross.setAttribute("x1", x(t)); cross.setAttribute("x2", x(t)); cross.setAttribute("visibility", "visible");
    const rows = options.series.filter((s) => s.label).map((s) => s.type === "band"
      ? [s.label, `${format(value(s.t, s.lo, t))} to ${format(value(s.t, s.hi, t))}`] : [s.label, format(value(s.t, s.v, t) * (s.times || 1)) + (options.unit || "")]);
    showTip(place, `${axis} = ${t}`, rows);
    svg.setAttribute("aria-valuenow", t);
    svg.setAttribute("aria-valuetext", [`${axis} = ${t}`, ...rows.map((row) => row.join(" "))].join(", "));
  };
  const hide = () => { cross.setAttribute("visibility", "hidden"); hideTip(); };
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect(), at = ((event.clientX - box.left) / box.width) * width;
    show(((at - left) / (right - left)) * options.last, event);
  });
  svg.addEventListener("keydown", (event) => {
    const step = options.last / 40, to = { ArrowLeft: t - step, ArrowDown: t - step, ArrowRight: t + step, ArrowUp: t + step, Home: 0, End: options.last }[event.key];
    if (event.key === "Escape") hide();
    if (to === undefined) return;
    event.preventDefault();
    show(to);
  });
  svg.addEventListener("pointerleave", hide);
  svg.addEventListener("blur", hide);
}

// Value of a curve at t, linear between its points.
function value(ts, vs, t) {
  let i = ts.findIndex((at) => at >= t);
  if (i < 0) i = ts.length - 1;
  if (i === 0 || ts[i] === t) return vs[i];
  const share = Math.min(1, (t - ts[i - 1]) / (ts[i] - ts[i - 1]));
  return known(vs[i]) && known(vs[i - 1]) ? vs[i - 1] + (vs[i] - vs[i - 1]) * share : vs[i];
}

function showTip(event, title, rows) {
  tip.replaceChildren();
  const head = document.createElement("b");
  head.textContent = title;
  tip.append(head);
  for (const [label, text] of rows) {
    const line = document.createElement("div"), key = document.createElement("span");
    key.className = "k"; key.textContent = `${label}: `;
    line.append(key, text);
    tip.append(line);
  }
  tip.hidden = false;
  const { width, height } = tip.getBoundingClientRect();
  const place = (at, size, room) => (at + 14 + size > room ? Math.max(4, at - size - 14) : at + 14);
  tip.style.left = `${place(event.clientX, width, innerWidth)}px`;
  tip.style.top = `${place(event.clientY, height, innerHeight)}px`;
}

function hideTip() { tip.hidden = true; }

function legend(parent, series) {
  parent.replaceChildren(...series.filter((s) => s.label).map((s) => {
    const item = document.createElement("span"), mark = document.createElement("i");
    mark.className = s.type === "band" ? "band" : s.type === "dots" ? "dots" : s.dash ? "dash" : "";
    mark.style.color = `var(--${s.color})`;
    if (s.type === "band") { mark.style.background = `var(--${s.color})`; mark.style.opacity = Math.min(1, (s.opacity || 0.2) * 1.8); } else mark.style.borderColor = `var(--${s.color})`;
    item.append(mark, s.label);
    return item;
  }));
}

// A curve without axes for a cell of the table.
function spark(series, last, width = 120, height = 30) {
  const [lo, hi] = extent(series);
  const x = linear(0, last, 1, width - 1), y = linear(lo, hi, height - 2, 2);
  const svg = node("svg", { class: "spark", viewBox: `0 0 ${width} ${height}`, width, height, preserveAspectRatio: "none", "aria-hidden": "true" });
  series.forEach((s) => draw(svg, { width: 1.4, ...s }, x, y));
  return svg;
}
