// A plot of lines over steps. The cursor is moved by pointer, or by arrow keys once the plot has the focus.

// options: id, title, unit, about, series [{key, label, color, dash, x, y}], group, target {value, label}, smooth, height
function linePlot(options) {
  const { group, target } = options;
  const stage = h("div", { class: "stage" });
  const readout = h("output", { class: "readout", "aria-live": "off" });
  const figure = plotFigure(options, readout, stage);
  let plot = null;

  function visible() {
    return options.series.filter((line) => !shared.hidden.has(line.key));
  }

  function draw(width) {
    const shown = visible();
    const height = options.height || 190;
    const xs = extent(shown.flatMap((line) => line.x)) || [0, 1];
    const values = shown.flatMap((line) => line.y).concat(target ? [target.value] : []);
    const y = padded(extent(values) || [0, 1], options.anchorZero);
    const labels = shown.length > 1 || many ? shown.map((line) => line.label) : [];
    plot = frame({ width, height, x: xs[0] === xs[1] ? [xs[0] - 1, xs[1] + 1] : xs, y, right: labels.length ? labelRoom(labels, width) : 14 });
    plot.svg.setAttribute("aria-label", describeLines(options));
    const weight = options.smooth ? shared.smoothing : 0;
    shown.forEach((line) => drawLine(plot, line, weight));
    if (target) drawTarget(plot, target);
    if (labels.length) plot.svg.append(...endLabels(plot, shown, weight));
    plot.cursor = s("g", { class: "cursor" });
    plot.svg.append(plot.cursor);
    stage.replaceChildren(plot.svg);
    show(group.at);
  }

  function show(step) {
    if (!plot) return;
    const shown = visible();
    const marks = shown.map((line) => ({ line, i: indexAt(line.x, step) })).filter(({ i }) => i >= 0);
    plot.cursor.replaceChildren();
    if (step !== null && marks.length) {
      const place = plot.x(step);
      plot.cursor.append(s("line", { x1: place, x2: place, y1: plot.box.top, y2: plot.box.bottom }));
      for (const { line, i } of marks) {
        if (line.x[i] !== step || line.y[i] === null) continue;
        plot.cursor.append(s("circle", { cx: place, cy: plot.y(line.y[i]), r: 3.5, style: { fill: line.color } }));
      }
    }
    const last = step === null;
    const steps = shown.flatMap((line) => line.x);
    const at = last ? Math.max(...steps, 0) : step;
    readout.replaceChildren(
      h("span", { class: "at" }, `step ${number(at)}`),
      ...shown.map((line) => {
        const i = last ? line.y.findLastIndex((value) => value !== null) : line.x.indexOf(step);
        const name = shown.length > 1 ? h("span", { class: "visually-hidden" }, `${line.label} `) : null;
        return h("span", { class: "value" }, name, shown.length > 1 && swatch(line.color, line.dash), number(i < 0 ? null : line.y[i]));
      }),
    );
  }

  const redraw = drawn(stage, draw);
  shared.listeners.add(redraw);
  group.listeners.add(show);
  stepByStep(figure, readout, stage, group, () => [...new Set(visible().flatMap((line) => line.x))].sort((a, b) => a - b), () => plot);
  return figure;
}

function plotFigure({ id, title, unit, about }, readout, stage) {
  const names = h("figcaption", {}, h("h3", {}, title), unit && h("span", { class: "unit" }, unit));
  const body = h("div", {
    class: "plot-body", tabindex: 0, role: "group",
    "aria-label": `${title}. Left and right arrow keys move through it.`,
  }, readout, stage);
  return h("figure", { id, class: "plot" }, names, about && h("p", { class: "about" }, about), body);
}

function drawTarget(plot, target) {
  const y = plot.y(target.value);
  plot.svg.append(
    s("line", { class: "target", x1: plot.box.left, x2: plot.box.right, y1: y, y2: y }),
    s("text", { class: "target-name", x: plot.box.left + 4, y: y - 4 }, target.label),
  );
}

function drawLine(plot, line, weight) {
  const raw = { d: pathOf(line.x, line.y, plot.x, plot.y), class: "line", "stroke-dasharray": line.dash || null, style: { stroke: line.color } };
  if (weight > 0) {
    plot.svg.append(s("path", { ...raw, class: "line raw" }));
    raw.d = pathOf(line.x, smoothed(line.y, weight), plot.x, plot.y);
  }
  plot.svg.append(s("path", raw));
  line.y.forEach((value, i) => {
    // A value between gaps has no line to be seen by.
    const alone = (line.y[i - 1] ?? null) === null && (line.y[i + 1] ?? null) === null;
    if (value !== null && alone) plot.svg.append(s("circle", { cx: plot.x(line.x[i]), cy: plot.y(value), r: 3, style: { fill: line.color } }));
  });
}

function endLabels(plot, shown, weight) {
  const items = shown.flatMap((line) => {
    const values = weight > 0 ? smoothed(line.y, weight) : line.y;
    const last = values.findLastIndex((value) => value !== null);
    return last < 0 ? [] : [{ y: plot.y(values[last]), color: line.color, label: line.label }];
  });
  return directLabels(items, plot.box, plot.box.right + 8);
}

// The steps that the pointer, or the arrow keys, can be at.
function stepByStep(figure, readout, stage, group, steps, plotNow) {
  const body = figure.querySelector(".plot-body");
  stage.addEventListener("pointermove", (event) => {
    const plot = plotNow();
    if (!plot) return;
    const at = plot.x.back(event.clientX - stage.getBoundingClientRect().left);
    readout.setAttribute("aria-live", "off");
    group.move(nearest(steps(), at));
  });
  stage.addEventListener("pointerleave", () => group.move(null));
  body.addEventListener("blur", () => group.move(null));
  body.addEventListener("keydown", (event) => {
    const known = steps();
    const now = group.at === null ? known.length - 1 : known.indexOf(nearest(known, group.at));
    const moves = { ArrowLeft: now - (group.at === null ? 0 : 1), ArrowRight: now + 1, Home: 0, End: known.length - 1 };
    if (event.key === "Escape") group.move(null);
    if (!(event.key in moves) || !known.length) return;
    event.preventDefault();
    readout.setAttribute("aria-live", "polite");
    group.move(known[Math.max(0, Math.min(known.length - 1, moves[event.key]))]);
  });
}

function nearest(sorted, at) {
  return sorted.reduce((best, step) => (best === null || Math.abs(step - at) < Math.abs(best - at) ? step : best), null);
}

function indexAt(xs, step) {
  return step === null ? xs.length - 1 : xs.indexOf(step);
}

function describeLines({ title, unit, series, target }) {
  const parts = series.map((line) => {
    const values = line.y.filter((value) => value !== null);
    if (!values.length) return `${line.label}: no values`;
    const [low, high] = extent(values);
    return `${line.label}: ${number(values[0])} at first, ${number(values.at(-1))} at the end, between ${number(low)} and ${number(high)}`;
  });
  const goal = target ? ` ${target.label} is marked.` : "";
  return `${title}${unit ? `, ${unit}` : ""}, over steps. ${parts.join(". ")}.${goal}`;
}
