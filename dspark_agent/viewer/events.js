// Mouse, keyboard and theme; then the first drawing.
function tipFor({ place, span, tokens, tool }) {
  const step = run.steps[place];
  const rows = [];
  let head = `Step ${step.index + 1}: ${stepName(step)}`;
  if (tokens) {
    head = `${tokens.tokens} ${tokens.tokens === 1 ? "token" : "tokens"} by ${tokens.source}`;
    rows.push(["took", seconds(tokens.end_s - tokens.begin_s)], ["at", seconds(tokens.end_s)]);
    if (tokens.text) rows.push(["text", clip(tokens.text, 60)]);
  } else if (tool) {
    head = tool.name;
    rows.push(["took", seconds(tool.end_s - tool.begin_s)], ["outcome", tool.outcome]);
    if (tool.arguments) rows.push(["arguments", clip(tool.arguments, 60)]);
  } else {
    for (const name of PHASES) {
      const s = step.metrics[`${name}_s`];
      if (s > 0) rows.push([span?.name === name ? `▸ ${name}` : name, seconds(s)]);
    }
    rows.push(["total", seconds(step.end_s - step.begin_s)]);
    for (const row of bySource([step])) rows.push([`${row.source} tokens`, `${row.accepted} of ${row.proposed}`]);
    if (step.error) rows.push(["ended by", step.error]);
  }
  return [el("b", {}, head), el("table", {}, ...rows.map(([a, b]) => el("tr", {}, el("td", {}, a), el("td", {}, b))))];
}

function hover(event) {
  const hit = event.target.dataset?.hit;
  $("tip").hidden = hit === undefined;
  if (hit === undefined) return;
  $("tip").replaceChildren(...tipFor(view.hits[hit]));
  const { offsetWidth: w, offsetHeight: h } = $("tip");
  $("tip").style.left = `${Math.min(event.clientX + 14, innerWidth - w - 8)}px`;
  $("tip").style.top = `${event.clientY + 18 + h > innerHeight ? event.clientY - h - 12 : event.clientY + 18}px`;
}

function stepUnder(event) {
  const step = event.target.closest("[data-step]");
  return step === null ? null : Number(step.dataset.step);
}

function listen() {
  const chart = $("chart");
  let drag = null;
  chart.addEventListener("pointermove", (event) => {
    if (drag === null) return hover(event);
    const moved = ((drag.x - event.clientX) / (chart.clientWidth - LABEL - 16)) * (view.to - view.from);
    if (Math.abs(drag.x - event.clientX) > 3) drag.moved = true;
    if (drag.moved) show(drag.from + moved, view.to - view.from);
  });
  chart.addEventListener("pointerleave", () => ($("tip").hidden = true));
  chart.addEventListener("pointerdown", (event) => {
    drag = { x: event.clientX, from: view.from, moved: false };
    $("tip").hidden = true;
  });
  addEventListener("pointerup", () => setTimeout(() => (drag = null)));
  chart.addEventListener("click", (event) => {
    const place = stepUnder(event);
    if (place !== null && !drag?.moved) choose(place, true);
  });
  chart.addEventListener("dblclick", (event) => {
    const place = stepUnder(event);
    if (place === null) return;
    const { begin_s: from, end_s: to } = run.steps[place];
    show(from - (to - from) * 0.03, Math.min(END, (to - from) * 1.06));
  });
  chart.addEventListener("wheel", (event) => {
    if (!event.ctrlKey && !event.metaKey) return;
    event.preventDefault();
    zoom(Math.exp(event.deltaY / 300), timeAt(event.clientX));
  }, { passive: false });
  chart.addEventListener("keydown", (event) => {
    const span = view.to - view.from;
    const keys = {
      "+": () => zoom(0.7), "=": () => zoom(0.7), "-": () => zoom(1 / 0.7), 0: () => show(0, END),
      ArrowLeft: () => show(view.from - span / 8, span), ArrowRight: () => show(view.from + span / 8, span),
    };
    if (keys[event.key]) {
      event.preventDefault();
      keys[event.key]();
    }
  });
  $("zoom-in").addEventListener("click", () => zoom(0.6));
  $("zoom-out").addEventListener("click", () => zoom(1 / 0.6));
  $("zoom-fit").addEventListener("click", () => show(0, END));
  $("steps").addEventListener("click", (event) => {
    const place = stepUnder(event);
    if (place !== null) choose(place);
  });
  $("steps").addEventListener("keydown", (event) => {
    const place = stepUnder(event);
    if (place !== null && event.key === "Enter") choose(place);
  });
  addEventListener("resize", drawChart);
}

function theme() {
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const set = (isDark) => (document.documentElement.dataset.theme = isDark ? "dark" : "light");
  set(location.hash === "#dark" || (location.hash !== "#light" && dark.matches));
  dark.addEventListener("change", () => set(dark.matches));
  $("theme").addEventListener("click", () => set(document.documentElement.dataset.theme !== "dark"));
}

theme();
drawTotals();
drawLegends();
drawTable();
choose(0);
listen();
document.documentElement.dataset.state = "ready";
