// Signs of trouble: the number, the step, and what to do about it.

function findings() {
  const all = report.runs.flatMap((run) => run.findings.map((finding) => ({ ...finding, run })));
  const nothing = report.runs.every((run) => run.looked === 0);
  const unchecked = [...new Set(report.runs.flatMap((run) => run.unchecked))];
  const lede = "Looked for in every arm: growth of length and of the log-prob gap, KL jumps, repetition, reward that rises while gold falls, truncation, a critic that explains nothing, quarantined engines.";
  const body = nothing ? absent("There is no trained arm to look at.") : all.length ? h("ol", { class: "findings" }, all.map(card)) : h("p", { class: "all-clear" }, "None of these was found.");
  return section("warnings", "Warnings", lede, body,
    unchecked.length > 0 && h("p", { class: "quiet" }, `Could not be looked for, since the run does not hold the numbers: ${unchecked.join(", ")}.`));
}

function card(finding) {
  const where = finding.step === null ? "on held-out prompts" : `step ${number(finding.step)}`;
  const plot = finding.plot && document.getElementById(plotId(finding.plot));
  return h("li", { class: "finding" },
    h("p", { class: "where" }, many && `${finding.run.name} · `, h("b", {}, finding.label), ` · ${where}`),
    h("h3", {}, finding.title),
    h("p", { class: "measured" }, finding.number),
    h("p", {}, finding.advice),
    plot && h("p", {}, h("a", { href: `#${plotId(finding.plot)}` }, "See the plot")));
}
