// Reward against KL: where each arm went, step by step, from the SFT model.

function pathPlot(metric, score, title) {
  const paths = lines.filter((line) => line.columns[metric] && line.columns["kl/mean"]).map((line) => ({
    ...line,
    x: line.columns["kl/mean"],
    y: line.columns[metric],
    steps: line.columns.step,
  }));
  if (!paths.length) return null;
  const start = report.runs.map((run) => run.sft_point && run.sft_point[score]).find((value) => value !== null && value !== undefined);
  const group = cursorGroup();
  const stage = h("div", { class: "stage" });
  const readout = h("output", { class: "readout", "aria-live": "off" });
  const alternative = describePaths(title, paths, start);
  const figure = plotFigure({ title, unit: score }, readout, stage);
  let plot = null;

  function draw(width) {
    const shown = paths.filter((path) => !shared.hidden.has(path.key));
    const xs = extent(shown.flatMap((path) => path.x).concat(0)) || [0, 1];
    const ys = extent(shown.flatMap((path) => path.y).concat(start ?? [])) || [0, 1];
    plot = frame({
      width, height: Math.min(340, Math.max(240, width * 0.62)), x: padded(xs, true), y: padded(ys), right: 16,
      wholeX: false, xName: "KL to SFT, nats per response", gridX: true,
    });
    plot.svg.setAttribute("aria-label", alternative);
    for (const path of shown) drawPath(plot, path);
    if (start !== undefined) drawStart(plot, start);
    plot.svg.append(...pathNames(plot, shown));
    plot.cursor = s("g", { class: "cursor" });
    plot.svg.append(plot.cursor);
    stage.replaceChildren(plot.svg);
    show(group.at);
  }

  function show(step) {
    if (!plot) return;
    plot.cursor.replaceChildren();
    const shown = paths.filter((path) => !shared.hidden.has(path.key));
    const rows = shown.map((path) => ({ path, i: step === null ? lastOf(path) : path.steps.indexOf(step) }));
    for (const { path, i } of rows) {
      if (step === null || i < 0 || path.x[i] === null || path.y[i] === null) continue;
      plot.cursor.append(s("circle", { cx: plot.x(path.x[i]), cy: plot.y(path.y[i]), r: 5, class: "ring", style: { stroke: path.color } }));
    }
    readout.replaceChildren(
      h("span", { class: "at" }, step === null ? "last step" : `step ${step}`),
      ...rows.filter(({ i }) => i >= 0).map(({ path, i }) =>
        h("span", { class: "value" }, swatch(path.color, path.dash), h("span", { class: "visually-hidden" }, `${path.label} `),
          `${number(path.y[i])} at ${number(path.x[i])} nats`),
      ),
    );
  }

  const redraw = drawn(stage, draw);
  shared.listeners.add(redraw);
  group.listeners.add(show);
  const steps = () => [...new Set(paths.flatMap((path) => path.steps))].sort((a, b) => a - b);
  stepByStep(figure, readout, stage, group, steps, () => null);
  stage.addEventListener("pointermove", (event) => {
    const box = stage.getBoundingClientRect();
    group.move(closest(paths, plot, event.clientX - box.left, event.clientY - box.top));
  });
  return figure;
}

function drawPath(plot, path) {
  plot.svg.append(s("path", { class: "line thin", d: pathOf(path.x, path.y, plot.x, plot.y), "stroke-dasharray": path.dash || null, style: { stroke: path.color } }));
  const last = lastOf(path);
  path.steps.forEach((_, i) => {
    if (path.x[i] === null || path.y[i] === null) return;
    // Later steps are more solid: the direction can be seen without an arrow on every piece.
    const solid = 0.25 + 0.75 * (i / Math.max(1, path.steps.length - 1));
    const r = i === last ? 5 : 2.6;
    plot.svg.append(s("circle", { cx: plot.x(path.x[i]), cy: plot.y(path.y[i]), r, "fill-opacity": solid.toFixed(2), style: { fill: path.color } }));
  });
}

// Beside the last step of each path, on the side that has room.
function pathNames(plot, shown) {
  const taken = [];
  return shown.filter((path) => lastOf(path) >= 0).map((path) => {
    const [x, y] = [plot.x(path.x[lastOf(path)]), plot.y(path.y[lastOf(path)])];
    const wide = path.label.length * TEXT_WIDTH + 10;
    const left = x + wide > plot.box.right;
    const from = left ? x - wide : x;
    let at = Math.max(y + 4, plot.box.top + 10);
    while (taken.some((other) => Math.abs(other.at - at) < 14 && from < other.from + other.wide && other.from < from + wide)) at += 14;
    taken.push({ at, from, wide });
    return s("text", { class: "direct halo", x: left ? x - 10 : x + 10, y: at, "text-anchor": left ? "end" : "start", style: { fill: path.color } }, path.label);
  });
}

function drawStart(plot, start) {
  const [x, y] = [plot.x(0), plot.y(start)];
  plot.svg.append(
    s("rect", { class: "start", x: x - 5, y: y - 5, width: 10, height: 10, transform: `rotate(45 ${x} ${y})` }),
    s("text", { class: "direct", x: x + 11, y: y + 4, style: { fill: "var(--c0)" } }, "SFT"),
  );
}

function lastOf(path) {
  return path.y.findLastIndex((value, i) => value !== null && path.x[i] !== null);
}

function closest(paths, plot, x, y) {
  let best = null;
  let distance = Infinity;
  for (const path of paths) {
    if (shared.hidden.has(path.key)) continue;
    path.steps.forEach((step, i) => {
      if (path.x[i] === null || path.y[i] === null) return;
      const away = (plot.x(path.x[i]) - x) ** 2 + (plot.y(path.y[i]) - y) ** 2;
      if (away < distance) [best, distance] = [step, away];
    });
  }
  return best;
}

function describePaths(title, paths, start) {
  const ends = paths.map((path) => {
    const last = lastOf(path);
    return last < 0 ? `${path.label}: no values` : `${path.label} ends at ${number(path.y[last])} and ${number(path.x[last])} nats`;
  });
  return `${title}. ${start === undefined ? "" : `SFT is at ${number(start)}. `}${ends.join(". ")}.`;
}
