// How the scores of the answers are spread: SFT before, the arms after.

function spreadPlot(run, index, score) {
  const data = run.spread[score];
  if (!data) return null;
  const arms = Object.keys(data.arms).map((arm) => ({ arm, label: armLabel(run, arm), color: armColor(arm, index), y: data.arms[arm] }));
  const isShares = data.kind === "shares";
  const stage = h("div", { class: "stage" });
  const readout = h("output", { class: "readout", "aria-live": "off" });
  const means = arms.map(({ arm, label }) => `${label} has the mean ${number(data.means[arm])}`).join(", ");
  const title = `${score === "gold" ? "Gold" : "Reward"} scores of the answers${many ? `: ${run.name}` : ""}`;
  const alternative = `${title}. ${means}.`;
  const figure = plotFigure({ title, unit: isShares ? "share of answers" : "density" }, readout, stage);
  const group = cursorGroup();
  let plot = null;

  function draw(width) {
    const step = data.x.length > 1 ? Math.min(...data.x.slice(1).map((x, i) => x - data.x[i])) : 1;
    const edge = isShares ? step / 2 : 0;
    const high = Math.max(...arms.flatMap(({ y }) => y)) * 1.12;
    plot = frame({ width, height: 240, x: [data.x[0] - edge, data.x.at(-1) + edge], y: [0, high || 1], wholeX: false, xName: score });
    plot.svg.setAttribute("aria-label", alternative);
    arms.forEach((each, i) => (isShares ? bars(each, i, step) : curve(each)));
    if (!isShares) plot.svg.append(...names());
    plot.cursor = s("g", { class: "cursor" });
    plot.svg.append(plot.cursor);
    stage.replaceChildren(plot.svg);
    show(group.at);
  }

  function bars({ y, color }, place, step) {
    const wide = (0.82 * step) / arms.length;
    y.forEach((share, i) => {
      const left = plot.x(data.x[i] - 0.41 * step + place * wide);
      const size = Math.max(1, plot.x(wide) - plot.x(0) - 1);
      plot.svg.append(s("rect", { x: left, y: plot.y(share), width: size, height: plot.box.bottom - plot.y(share), style: { fill: color } }));
    });
  }

  function curve({ y, color, arm }) {
    const d = pathOf(data.x, y, plot.x, plot.y);
    const area = `${d}L${plot.x(data.x.at(-1))} ${plot.box.bottom}L${plot.x(data.x[0])} ${plot.box.bottom}Z`;
    plot.svg.append(s("path", { d: area, class: "area", style: { fill: color } }));
    plot.svg.append(s("path", { d, class: "line", style: { stroke: color } }));
    const mean = plot.x(data.means[arm]);
    plot.svg.append(s("line", { class: "mean", x1: mean, x2: mean, y1: plot.box.bottom, y2: plot.box.bottom - 9, style: { stroke: color } }));
  }

  // Beside the highest point of each curve, higher curves first, none over another.
  function names() {
    const taken = [];
    return arms.map(({ label, color, y }) => ({ label, color, top: y.indexOf(Math.max(...y)), peak: Math.max(...y) }))
      .sort((a, b) => b.peak - a.peak)
      .map(({ label, color, top, peak }) => {
        const half = (label.length * TEXT_WIDTH) / 2;
        const x = Math.max(plot.box.left + half, Math.min(plot.box.right - half, plot.x(data.x[top])));
        let at = plot.y(peak) - 6;
        while (taken.some((other) => Math.abs(other.x - x) < half + other.half && Math.abs(other.at - at) < 13)) at += 13;
        taken.push({ x, at, half });
        return s("text", { class: "direct halo", x, y: at, "text-anchor": "middle", style: { fill: color } }, label);
      });
  }

  function show(at) {
    if (!plot) return;
    const i = at === null ? -1 : data.x.indexOf(at);
    plot.cursor.replaceChildren();
    if (i >= 0) plot.cursor.append(s("line", { x1: plot.x(at), x2: plot.x(at), y1: plot.box.top, y2: plot.box.bottom }));
    readout.replaceChildren(
      h("span", { class: "at" }, i < 0 ? "mean" : `${score} ${number(at)}`),
      ...arms.map(({ arm, label, color, y }) => {
        const value = i < 0 ? number(data.means[arm]) : isShares ? `${percent(y[i])} %` : number(y[i]);
        return h("span", { class: "value" }, block(color), `${label} `, h("b", {}, value));
      }),
    );
  }

  drawn(stage, draw);
  group.listeners.add(show);
  stepByStep(figure, readout, stage, group, () => data.x, () => plot);
  return figure;
}
