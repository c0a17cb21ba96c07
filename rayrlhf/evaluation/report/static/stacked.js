// Seconds of each step, phase on phase.

const PHASES = ["generate", "score", "estimate", "update", "publish", "save", "other"];

function phasePlot(line, group) {
  const { columns } = line;
  const phases = PHASES.filter((phase) => (columns[`time/${phase}_s`] || []).some((value) => value));
  const steps = columns.step;
  const stage = h("div", { class: "stage" });
  const readout = h("output", { class: "readout phases", "aria-live": "off" });
  const share = shares(columns, phases);
  const title = lines.length > 1 ? `Seconds per phase: ${line.label}` : "Seconds per phase";
  const alternative = `${title}. On average ${phases.map((phase) => `${phase} ${percent(share[phase])} %`).join(", ")}.`;
  const figure = plotFigure({ title, unit: "s a step" }, readout, stage);
  let plot = null;

  function draw(width) {
    const totals = steps.map((_, i) => phases.reduce((sum, phase) => sum + (columns[`time/${phase}_s`][i] || 0), 0));
    const x = [steps[0] - 0.5, steps.at(-1) + 0.5];
    plot = frame({ width, height: 210, x, y: [0, 1.05 * Math.max(...totals, 1e-9)], right: 12 });
    plot.svg.setAttribute("aria-label", alternative);
    const base = steps.map(() => 0);
    for (const phase of phases) {
      plot.svg.append(s("path", { d: layer(columns[`time/${phase}_s`], base), style: { fill: phaseColor(phase) } }));
    }
    plot.cursor = s("g", { class: "cursor" });
    plot.svg.append(plot.cursor);
    stage.replaceChildren(plot.svg);
    show(group.at);
  }

  // Each step is a bar, with a gap where there are few; the base rises by what was drawn.
  function layer(values, base) {
    const apart = steps.length > 1 ? Math.min(...steps.slice(1).map((step, i) => step - steps[i])) : 1;
    const half = (apart / 2) * (steps.length <= 60 ? 0.88 : 1);
    let d = "";
    steps.forEach((step, i) => {
      const value = values[i] || 0;
      const [left, right] = [plot.x(step - half).toFixed(1), plot.x(step + half).toFixed(1)];
      const [low, high] = [plot.y(base[i]).toFixed(1), plot.y(base[i] + value).toFixed(1)];
      if (value) d += `M${left} ${low}H${right}V${high}H${left}Z`;
      base[i] += value;
    });
    return d;
  }

  function show(step) {
    if (!plot) return;
    const i = step === null ? -1 : steps.indexOf(step);
    plot.cursor.replaceChildren();
    if (i >= 0) plot.cursor.append(s("line", { x1: plot.x(step), x2: plot.x(step), y1: plot.box.top, y2: plot.box.bottom }));
    readout.replaceChildren(
      h("span", { class: "at" }, i < 0 ? "mean share" : `step ${step}`),
      ...phases.map((phase) => {
        const text = i < 0 ? `${percent(share[phase])} %` : seconds(columns[`time/${phase}_s`][i] || 0);
        return h("span", { class: "value" }, block(phaseColor(phase)), `${phase} `, h("b", {}, text));
      }),
    );
  }

  drawn(stage, draw);
  group.listeners.add(show);
  stepByStep(figure, readout, stage, group, () => steps, () => plot);
  return figure;
}

function phaseColor(phase) {
  return `var(--p${PHASES.indexOf(phase)})`;
}

function shares(columns, phases) {
  const sums = phases.map((phase) => columns[`time/${phase}_s`].reduce((sum, value) => sum + (value || 0), 0));
  const total = sums.reduce((a, b) => a + b, 0) || 1;
  return Object.fromEntries(phases.map((phase, i) => [phase, sums[i] / total]));
}
