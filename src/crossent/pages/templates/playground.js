"use strict";
// From logits to gradient: the numbers of crossent.cross_entropy, in double precision.
const start = JSON.parse(document.getElementById("data").textContent);
const state = { logits: [...start.logits], target: start.target, temperature: 1, smoothing: 0 };
const names = [...start.classes];
const byId = (id) => document.getElementById(id);
const RANGE = 30; // logits that can be dragged to, either way
const LOW = -8, HIGH = 8; // logits in the chart

function compute({ logits, target, temperature, smoothing }) {
  const z = logits.map((x) => x / temperature), n = z.length;
  const m = Math.max(...z), top = z.indexOf(m);
  const exps = z.map((x) => Math.exp(x - m));
  const rest = exps.reduce((sum, e, c) => (c === top ? sum : sum + e), 0); // without the maximum
  const logSum = Math.log1p(rest);
  const p = exps.map((e) => e / (1 + rest));
  const others = p.map((q, c) => (c === top ? rest / (1 + rest) : 1 - q)); // 1 - p, uncancelled
  const y = z.map((_, c) => (1 - smoothing) * (c === target ? 1 : 0) + smoothing / n);
  const nll = z.map((x) => m - x + logSum);
  const loss = nll.reduce((sum, l, c) => sum + (y[c] === 0 ? 0 : y[c] * l), 0);
  const gradient = p.map((q, c) => (q * (1 - y[c]) - y[c] * others[c]) / temperature);
  const jacobian = p.map((q, i) => p.map((r, j) => (q * (i === j ? others[i] : -r)) / temperature));
  return { m, exps, p, y, nll, loss, gradient, jacobian, lse: m + logSum };
}

// The same as a program in float32 without care would: every step rounded, nothing shifted.
function naive({ logits, target, temperature, smoothing }) {
  const f = Math.fround;
  const exps = logits.map((x) => f(Math.exp(f(f(x) / f(temperature)))));
  const sum = exps.reduce((s, e) => f(s + e), 0), n = logits.length;
  return exps.reduce((loss, e, c) => {
    const y = (1 - smoothing) * (c === target ? 1 : 0) + smoothing / n;
    return y === 0 ? loss : f(loss - f(y * f(Math.log(f(e / sum)))));
  }, 0);
}

function show(value) {
  if (!Number.isFinite(value)) return String(value);
  const size = Math.abs(value);
  return value === 0 || (size >= 1e-3 && size < 1e5) ? value.toFixed(4) : value.toExponential(2);
}
function put(output, value) {
  output.textContent = show(value);
  output.dataset.value = String(value);
}
function cell(value, kind = "number") {
  const td = document.createElement("td");
  td.className = kind;
  put(td, value);
  return td;
}
function svg(tag, attributes, text) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  if (text !== undefined) node.textContent = text;
  return node;
}

// Rows of the table and choices of the target: made anew when classes come or go.
function build() {
  const body = byId("classes").tBodies[0];
  body.replaceChildren();
  byId("target").replaceChildren();
  state.logits.forEach((_, c) => {
    const row = body.insertRow();
    const name = document.createElement("th");
    name.scope = "row";
    name.textContent = names[c];
    const slider = document.createElement("input");
    Object.assign(slider, { type: "range", min: -RANGE, max: RANGE, step: 0.01 });
    slider.setAttribute("aria-label", `logit of ${names[c]}`);
    slider.addEventListener("input", () => { state.logits[c] = Number(slider.value); draw(); });
    row.append(name, document.createElement("td"));
    row.cells[1].append(slider);
    const option = document.createElement("option");
    option.value = c;
    option.textContent = names[c];
    byId("target").append(option);
  });
  draw();
}

function draw() {
  const r = compute(state);
  byId("target").value = state.target;
  for (const name of ["temperature", "smoothing"]) {
    byId(name).value = state[name];
    byId(`${name}-value`).textContent = state[name].toFixed(2);
  }
  put(byId("loss"), r.loss);
  put(byId("lse"), r.lse);
  put(byId("naive"), naive(state));
  state.logits.forEach((z, c) => {
    const row = byId("classes").tBodies[0].rows[c];
    row.querySelector("input").value = z;
    while (row.cells.length > 2) row.deleteCell(2);
    row.append(...[z, r.exps[c], r.p[c], r.y[c], r.nll[c], r.gradient[c]].map((v) => cell(v)));
  });
  const body = byId("jacobian").tBodies[0];
  body.replaceChildren();
  r.jacobian.forEach((line, i) => {
    const row = body.insertRow(), name = document.createElement("th");
    name.scope = "row";
    name.textContent = names[i];
    row.append(name, ...line.map((v) => cell(v, `number ${v < 0 ? "cell-negative" : "cell-positive"}`)));
  });
  chart(r);
}

// From y to another height; no head where it would be longer than the arrow.
function arrow(x, y, to) {
  const head = Math.sign(to - y) * 6;
  return `M${x} ${y}V${to}` + (Math.abs(to - y) < 6 ? "" : `m-5 ${-head}l5 ${head}l5 ${-head}`);
}
const level = (z) => 150 - (Math.min(Math.max(z, LOW), HIGH) * 130) / HIGH;
function chart(r) {
  const nodes = [svg("line", { x1: 0, x2: 720, y1: level(0), y2: level(0), class: "axis" })];
  const wide = 720 / state.logits.length;
  state.logits.forEach((z, c) => {
    const x = wide * (c + 0.5), y = level(z), zero = level(0);
    const step = level(z - 4 * r.gradient[c]);
    nodes.push(
      svg("rect", { x: x - wide / 8, width: wide / 4, y: Math.min(y, zero), height: Math.abs(y - zero), class: c === state.target ? "target" : "logit" }),
      svg("rect", { x: x + wide / 6, width: wide / 8, y: 290 - 120 * r.p[c], height: 120 * r.p[c], class: "logit" }),
      svg("path", { d: arrow(x - wide / 4, y, step), class: "arrow" }),
      svg("circle", { cx: x, cy: y, r: 8, class: "handle", "data-class": c }),
      svg("text", { x, y: 16, "text-anchor": "middle" }, `${names[c]}: ${show(z)}`),
      svg("text", { x: x + wide / 6, y: 284 - 120 * r.p[c] }, show(r.p[c])),
    );
  });
  byId("chart").replaceChildren(...nodes);
}

let held = null;
byId("chart").addEventListener("pointerdown", (event) => {
  held = event.target.dataset.class ?? null;
  if (held !== null) byId("chart").setPointerCapture(event.pointerId);
});
byId("chart").addEventListener("pointermove", (event) => {
  if (held === null) return;
  const box = byId("chart").getBoundingClientRect();
  const y = ((event.clientY - box.top) / box.height) * 300;
  state.logits[held] = Math.min(Math.max(((150 - y) * HIGH) / 130, LOW), HIGH);
  draw();
});
for (const end of ["pointerup", "pointercancel"]) byId("chart").addEventListener(end, () => { held = null; });

byId("target").addEventListener("change", (event) => { state.target = Number(event.target.value); draw(); });
for (const name of ["temperature", "smoothing"])
  byId(name).addEventListener("input", (event) => { state[name] = Number(event.target.value); draw(); });
byId("more").addEventListener("click", () => {
  if (state.logits.length >= start.most) return;
  state.logits.push(0);
  if (names.length < state.logits.length) names.push(`class ${names.length}`);
  build();
});
byId("fewer").addEventListener("click", () => {
  if (state.logits.length <= start.least) return;
  state.logits.pop();
  state.target = Math.min(state.target, state.logits.length - 1);
  build();
});

const others = (value) => state.logits.map((_, c) => (c === state.target ? value : 0));
const plain = { temperature: 1, smoothing: 0 };
const breaks = {
  overflow: () => {
    Object.assign(state, plain, { logits: others(100) });
    return "exp(100) is more than float32 holds: inf / inf is nan. With the largest logit taken off first, the largest exponential is 1 and the loss is exact.";
  },
  double: () => {
    const p = compute(state).p;
    Object.assign(state, plain, { logits: p });
    const floor = Math.log1p((p.length - 1) / Math.E);
    return `The logits are now probabilities, and the loss applies the softmax again: it can never fall below ${floor.toFixed(3)} nats, and the gradient is flat.`;
  },
  gap: () => {
    Object.assign(state, plain, { logits: others(20) });
    return "The right class leads by 20. float32 rounds 1 + 2e-9 to 1, so the naive loss is 0 and teaches nothing; log1p of the sum without the maximum keeps every digit.";
  },
  reset: () => {
    Object.assign(state, plain, { logits: [...start.logits], target: start.target });
    names.length = 0;
    names.push(...start.classes);
    return "Nothing is broken.";
  },
};
for (const [id, act] of Object.entries(breaks))
  byId(id).addEventListener("click", () => { byId("story").textContent = act(); build(); });
build();
