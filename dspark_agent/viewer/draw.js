// The page itself: draws the visible part of the run, and answers mouse and keyboard.
const run = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);
const LANES = lanes(run);
const END = Math.max(...run.steps.map((step) => step.end_s), 1e-6);
const LABEL = 190;
const HEIGHT = LANES.at(-1).y + LANES.at(-1).height;
const view = { from: 0, to: END, chosen: 0, hits: [] };

function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [key, value] of Object.entries(attributes)) {
    if (key === "style") node.style.cssText = value;
    else node.setAttribute(key, value);
  }
  node.append(...children.filter((child) => child !== null));
  return node;
}
const esc = (text) => String(text).replace(/[&<>"']/g, (c) => `&#${c.charCodeAt(0)};`);
const swatch = (c) => el("i", { class: "swatch", style: `background:${c}` });
const percent = (a, b) => (!b ? "-" : a > 0 && a / b < 0.005 ? "< 1 %" : `${Math.round((100 * a) / b)} %`);

// -- chart ---------------------------------------------------------------------------------------

function drawChart() {
  const width = Math.max(400, $("chart").clientWidth);
  const plot = width - LABEL - 16;
  const x = (t) => LABEL + ((t - view.from) / (view.to - view.from)) * plot;
  const out = [`<clipPath id="plot"><rect x="${LABEL}" y="0" width="${plot + 8}" height="${HEIGHT}"/></clipPath>`];
  view.hits = [];
  for (const { t, label } of ticks(view.from, view.to, plot)) {
    out.push(`<line class="tick" x1="${x(t)}" x2="${x(t)}" y1="22" y2="${HEIGHT}"/>`);
    out.push(`<text x="${x(t)}" y="15" text-anchor="middle">${label}</text>`);
  }
  LANES.forEach((lane) => {
    const indent = 16 + lane.depth * 14;
    const name = lane.nth > 1 ? `${lane.agent} #${lane.nth}` : lane.agent;
    out.push(`<line class="tick" x1="0" x2="${width}" y1="${lane.y}" y2="${lane.y}"/>`);
    out.push(`<text class="name" x="${indent}" y="${lane.y + 26}">${esc(clip(name, 22 - 2 * lane.depth))}</text>`);
    out.push(`<text x="${indent}" y="${lane.y + 41}">${esc(clip(lane.model, 25 - 2 * lane.depth))}</text>`);
  });
  out.push('<g clip-path="url(#plot)">');
  LANES.forEach((lane) => lane.places.forEach((place) => drawStep(out, lane, place, x)));
  out.push("</g>");
  $("chart").innerHTML = `<svg height="${HEIGHT}" viewBox="0 0 ${width} ${HEIGHT}">${out.join("")}</svg>`;
}

const clip = (text, n) => (text.length > n ? `${text.slice(0, n - 1)}…` : text);

function rect(out, hit, x0, x1, y, h, fill, extra = "") {
  const w = Math.max(x1 - x0, 0.75);
  const id = view.hits.push(hit) - 1;
  out.push(`<rect data-hit="${id}" x="${x0}" y="${y}" width="${w}" height="${h}" fill="${fill}" ${extra}/>`);
}

function drawStep(out, lane, place, x) {
  const step = run.steps[place];
  if (step.end_s < view.from || step.begin_s > view.to) return;
  const y = lane.y + ROW.top;
  const [x0, x1] = [x(step.begin_s), x(step.end_s)];
  out.push(`<g class="step" data-step="${place}">`);
  rect(out, { place }, x0, x1, y, ROW.bar, step.error ? colour("bad") : colour("overhead"), 'rx="3"');
  for (const span of phases(step)) {
    rect(out, { place, span }, x(span.begin), x(span.end), y, ROW.bar, colour(span.name));
  }
  if (step.tools.length) {
    const begin = Math.min(...step.tools.map((tool) => tool.begin_s));
    const end = Math.max(...step.tools.map((tool) => tool.end_s));
    const span = { name: "tool", begin, end, s: end - begin };
    rect(out, { place, span }, x(begin), x(end), y, ROW.bar, colour("tool"));
  }
  drawLabel(out, step, x0, x1, y);
  let below = y + ROW.bar + ROW.gap;
  if (lane.hasTokens) {
    drawTokens(out, step, place, x, below);
    below += ROW.strip + ROW.gap;
  }
  const rows = toolRows(step.tools);
  step.tools.forEach((tool, i) => {
    const [a, b, top] = [x(tool.begin_s), x(tool.end_s), below + rows[i] * (ROW.tool + 2)];
    const fill = ["success", "waiting"].includes(tool.outcome) ? colour("tool") : colour("bad");
    rect(out, { place, tool }, a, b, top, ROW.tool, fill, 'rx="3" fill-opacity=".8"');
    if (b - a > 50) label(out, clip(tool.name, (b - a) / 7), Math.max(a, LABEL) + 5, top + 11.5);
  });
  if (place === view.chosen) {
    out.push(`<rect class="chosen" x="${x0 - 1}" y="${y - 2}" width="${Math.max(x1 - x0, 1) + 2}" height="${ROW.bar + 4}" rx="4"/>`);
  }
  out.push("</g>");
}

function drawLabel(out, step, x0, x1, y) {
  const left = Math.max(x0, LABEL);
  const room = (x1 - left - 10) / 7.2;
  if (room >= 2) label(out, clip(`${step.index + 1} ${stepName(step)}`, room), left + 6, y + 16);
}

function label(out, text, x, y) {
  out.push(`<text class="in" x="${x}" y="${y}">${esc(text)}</text>`);
}

// All tokens are as wide: what the grammar forces takes no time, and is to be seen all the same.
// Runs narrower than a pixel share one: the widest of them gives its colour.
function drawTokens(out, step, place, x, y) {
  const width = ((step.model_end_s ?? step.end_s) - step.begin_s) / sum(step.tokens.map((run) => run.tokens));
  let waiting = null;
  let at = step.begin_s;
  const flush = () => waiting && rect(out, { place, tokens: waiting.run }, waiting.a, waiting.b, y, ROW.strip, sourceColour(waiting.run.source));
  for (const tokens of step.tokens) {
    const [a, b] = [x(at), x((at += tokens.tokens * width))];
    if (b < LABEL || a > x(view.to)) continue;
    if (waiting && b - waiting.a < 1) {
      if (b - a > waiting.b - waiting.a) waiting.run = tokens;
      waiting.b = b;
      continue;
    }
    flush();
    waiting = { a, b, run: tokens };
  }
  flush();
}

function zoom(factor, centre = (view.from + view.to) / 2) {
  const span = Math.min(END, Math.max((view.to - view.from) * factor, END / 1e5));
  const share = (centre - view.from) / (view.to - view.from);
  show(centre - share * span, span);
}

function show(from, span) {
  view.from = Math.min(Math.max(0, from), END - span);
  view.to = view.from + span;
  drawChart();
}

function timeAt(clientX) {
  const box = $("chart").getBoundingClientRect();
  return view.from + ((clientX - box.left - LABEL) / (box.width - LABEL - 16)) * (view.to - view.from);
}

// -- figures -------------------------------------------------------------------------------------

function tile(name, value, note) {
  return el("dl", { class: "tile", style: "margin:0" }, el("dt", {}, name), el("dd", {}, value, el("small", {}, note)));
}

function drawTotals() {
  const of = (field) => sum(run.steps.map((step) => step.metrics[field]));
  const outer = run.steps.filter((step) => step.parent === null);
  const tools = sum(outer.map((step) => step.metrics.tool_s));
  const model = of("total_s") - of("tool_s");
  const written = of("new_tokens");
  const [fresh, cached] = [of("prefill_new_tokens"), of("prefill_cached_tokens")];
  const drafts = bySource(run.steps).filter((row) => row.source !== "model");
  const [accepted, proposed] = [sum(drafts.map((d) => d.accepted)), sum(drafts.map((d) => d.proposed))];
  const models = [...new Set(run.steps.map((step) => step.model))].join(", ");
  const agents = [...new Set(run.steps.map((step) => step.agent))];
  $("title").textContent = agents.length > 1 ? `${agents.length} agents` : `Run of ${agents[0]}`;
  document.title = `${$("title").textContent} - dspark-agent trace`;
  $("subtitle").textContent = `${models} · ${new Date(run.started_at).toLocaleString()}`;
  const failed = run.steps.filter((step) => step.error).length;
  $("tiles").append(
    tile("Wall clock", seconds(END), `${run.steps.length} steps${failed ? `, ${failed} failed` : ""}`),
    tile("Model, all steps", seconds(model), `${seconds(of("prefill_s"))} prefill, ${seconds(of("decode_s"))} decode`),
    tile("Tools, all steps", seconds(tools), `${sum(run.steps.map((step) => step.tools.length))} calls`),
    tile("Tokens written", String(written), `${model ? (written / model).toFixed(0) : 0} a second of model time`),
    tile("Prompt tokens cached", percent(cached, cached + fresh), `${fresh} computed, ${cached} re-used`),
    tile("Accepted of proposed", percent(accepted, proposed), `${accepted} of ${proposed} drafted or forced`),
  );
}

function drawLegends() {
  const used = PHASES.filter((name) => run.steps.some((step) => step.metrics[`${name}_s`] > 0));
  $("phase-legend").append(...used.map((name) => el("span", {}, swatch(colour(name)), name)));
  const sources = bySource(run.steps);
  if (!sources.length) return;
  $("source-legend").append(el("b", {}, "Tokens by source"), el("span", {}, "accepted/proposed"), ...sources.map((row) =>
    el("span", {}, swatch(sourceColour(row.source)), `${row.source} ${row.accepted}/${row.proposed}`)));
}

function mix(step) {
  const rows = bySource([step]);
  const total = sum(rows.map((row) => row.accepted));
  return el("div", { class: "mix" }, ...rows.map((row) =>
    el("span", { style: `width:${(100 * row.accepted) / (total || 1)}%;background:${sourceColour(row.source)}` })));
}

function drawTable() {
  const heads = ["Step", "Total", "First", "Prefill", "Decode", "Tools", "Tokens", "Sources"];
  const rows = run.steps.map((step, place) => {
    const m = step.metrics;
    const state = step.error ? ` ${step.error}` : step.is_refused ? " refused" : "";
    const name = el("td", {}, `${step.index + 1} ${clip(stepName(step), 28)}`, el("span", { class: "agent" }, step.agent), el("span", { class: "bad" }, state));
    const cells = [step.end_s - step.begin_s, m.ttft_s, m.prefill_s, m.decode_s, m.tool_s].map((s) => el("td", {}, s ? seconds(s) : "-"));
    return el("tr", { "data-step": place, tabindex: 0 }, name, ...cells, el("td", {}, String(m.new_tokens)), el("td", {}, mix(step)));
  });
  $("steps").append(el("thead", {}, el("tr", {}, ...heads.map((head) => el("th", {}, head)))), el("tbody", {}, ...rows));
}

function account(step) {
  const m = step.metrics;
  const rows = PHASES.filter((name) => m[`${name}_s`] > 0).map((name) => [name, m[`${name}_s`]]);
  const total = step.end_s - step.begin_s;
  return el("table", {}, ...rows.map(([name, s]) => el("tr", {},
    el("td", {}, swatch(colour(name)), name), el("td", {}, seconds(s)), el("td", {}, percent(s, total)))));
}

function drawDetail() {
  const step = run.steps[view.chosen];
  const m = step.metrics;
  const facts = `${step.agent} · ${step.kind.replace("_", " ")} · attempt ${step.attempt} · ` +
    `${m.prefill_new_tokens} new + ${m.prefill_cached_tokens} cached prompt tokens · ${m.cycles} passes`;
  const body = el("div", { class: "body" }, el("p", {}, facts),
    step.error ? el("p", { class: "bad" }, `ended by ${step.error}`) : null,
    step.retry_reason ? el("p", { class: "bad" }, `taken again: ${step.retry_reason}`) : null,
    el("h3", {}, "Account"), account(step));
  const sources = bySource([step]);
  if (sources.length) {
    body.append(el("h3", {}, "Tokens by source"), el("table", {}, el("tr", {}, ...["Source", "Accepted", "Proposed", "Rate"].map((head) => el("th", {}, head))),
      ...sources.map((row) => el("tr", {}, el("td", {}, swatch(sourceColour(row.source)), row.source),
        el("td", {}, String(row.accepted)), el("td", {}, String(row.proposed)), el("td", {}, percent(row.accepted, row.proposed))))));
  }
  if (step.tokens.some((run) => run.text)) {
    body.append(el("h3", {}, "What it wrote"), el("pre", {}, ...step.tokens.map((run) =>
      el("mark", { style: `--c:${sourceColour(run.source)}`, title: `${run.source}, ${run.tokens} tokens` }, run.text ?? ""))));
  } else if (step.text) {
    body.append(el("h3", {}, "What it wrote"), el("pre", {}, step.text));
  }
  for (const tool of step.tools) {
    body.append(el("h3", {}, `${tool.name} · ${seconds(tool.end_s - tool.begin_s)} · ${tool.outcome}`));
    if (tool.arguments) body.append(el("pre", {}, tool.arguments));
    if (tool.result) body.append(el("pre", { style: "margin-top:6px" }, tool.result));
  }
  $("detail").replaceChildren(el("div", { class: "bar" }, el("h2", {}, `Step ${step.index + 1}: ${stepName(step)}`)), body);
}

function choose(place, reveal = false) {
  view.chosen = place;
  for (const row of $("steps").tBodies[0].rows) {
    row.setAttribute("aria-selected", String(Number(row.dataset.step) === place));
  }
  if (reveal) $("steps").tBodies[0].rows[place].scrollIntoView({ block: "nearest" });
  drawDetail();
  drawChart();
}
