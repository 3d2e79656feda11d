"use strict";
// What is where: pure functions from the recorded run to lanes, bars and figures.
const PHASES = ["queue", "prefill", "grammar", "draft", "decode", "verify", "tool", "overhead"];
const SOURCES = ["model", "forced", "copy", "dspark"];
const ROW = { top: 10, bar: 24, strip: 9, gap: 3, tool: 15, bottom: 10 };

const colour = (name) => `var(--${name})`;
const sourceColour = (source) => colour(SOURCES.includes(source) ? source : "other");
const sum = (values) => values.reduce((a, b) => a + b, 0);

function seconds(s) {
  if (s >= 100) return `${s.toFixed(0)} s`;
  if (s >= 1) return `${s.toFixed(2)} s`;
  return s >= 0.01 ? `${(s * 1000).toFixed(0)} ms` : `${(s * 1000).toFixed(s ? 1 : 0)} ms`;
}

function stepName(step) {
  const called = step.tools.map((tool) => tool.name).join(", ");
  return called || (step.kind === "mixed" ? "answer" : step.kind.replace("_", " "));
}

// The parts are measured durations; inside the model's turn their order is the usual one, since
// grammar, draft, decode and verify alternate with every pass.
function phases(step) {
  const ends = step.model_end_s ?? step.end_s;
  const parts = PHASES.slice(0, 6).map((name) => [name, step.metrics[`${name}_s`]]);
  const total = sum(parts.map(([, s]) => s));
  const room = ends - step.begin_s;
  const scale = total > room && total > 0 ? room / total : 1;
  let at = step.begin_s;
  const spans = [];
  for (const [name, s] of parts) {
    if (s > 0) spans.push({ name, begin: at, end: (at += s * scale), s });
  }
  return spans;
}

// Calls that overlap get rows of their own.
function toolRows(tools) {
  const free = [];
  return tools.map((tool) => {
    let row = free.findIndex((end) => end <= tool.begin_s + 1e-9);
    if (row < 0) row = free.length;
    free[row] = tool.end_s;
    return row;
  });
}

function lanes(run) {
  const found = new Map();
  run.steps.forEach((step, place) => {
    const key = `${step.agent}\u0000${step.conversation}`;
    if (!found.has(key)) {
      const parent = step.parent === null ? null : run.steps[step.parent];
      const depth = parent ? found.get(`${parent.agent}\u0000${parent.conversation}`).depth + 1 : 0;
      found.set(key, { agent: step.agent, model: step.model, depth, places: [], rows: 0 });
    }
    const lane = found.get(key);
    lane.places.push(place);
    lane.rows = Math.max(lane.rows, ...toolRows(step.tools).map((row) => row + 1));
  });
  const counts = {};
  let y = 28;
  return [...found.values()].map((lane) => {
    counts[lane.agent] = (counts[lane.agent] ?? 0) + 1;
    lane.nth = counts[lane.agent];
    lane.y = y;
    lane.hasTokens = lane.places.some((place) => run.steps[place].tokens.length);
    const strip = lane.hasTokens ? ROW.strip + ROW.gap : 0;
    lane.height = ROW.top + ROW.bar + ROW.gap + strip + lane.rows * (ROW.tool + 2) + ROW.bottom;
    y += lane.height;
    return lane;
  });
}

function bySource(steps) {
  const rows = new Map();
  for (const step of steps) {
    for (const [source, n] of Object.entries(step.metrics.proposed)) {
      const row = rows.get(source) ?? { source, proposed: 0, accepted: 0 };
      row.proposed += n;
      row.accepted += step.metrics.accepted[source] ?? 0;
      rows.set(source, row);
    }
  }
  const rank = (source) => (SOURCES.indexOf(source) + 9) % 9;
  return [...rows.values()].sort((a, b) => rank(a.source) - rank(b.source));
}

function ticks(from, to, width) {
  const rough = (to - from) / Math.max(2, width / 110);
  const base = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((m) => m * base).find((s) => s >= rough);
  const marks = [];
  for (let i = Math.ceil(from / step); i * step <= to; i++) marks.push(i * step);
  const unit = step < 0.01 ? [1000, "ms"] : [1, "s"];
  const digits = Math.max(0, -Math.floor(Math.log10(step * unit[0]) + 1e-9));
  return marks.map((t) => ({ t, label: `${(t * unit[0]).toFixed(digits)} ${unit[1]}` }));
}
