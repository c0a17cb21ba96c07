// What was run, and what came of it: the masthead, the headline table, the stages.

const MEASURES = {
  gold_win_rate: { name: "Gold win rate", unit: "% vs SFT", share: true, bar: true },
  heldout_reward_win_rate: { name: "Held-out reward", unit: "% vs SFT", share: true },
  reward_win_rate: { name: "Reward win rate", unit: "% vs SFT", share: true },
  length_controlled_win_rate: { name: "At equal length", unit: "% vs SFT", share: true },
  gold_mean: { name: "Gold", unit: "mean" },
  reward_mean: { name: "Reward", unit: "mean" },
  kl_per_response: { name: "KL to SFT", unit: "nats a response" },
  length_mean: { name: "Length", unit: "tokens" },
  pretrain_loss: { name: "Pretraining loss", unit: "nats a token" },
  cloze_accuracy: { name: "Cloze", unit: "% right", share: true },
  distinct_2: { name: "Distinct-2", unit: "share" },
};

function masthead() {
  const [run] = report.runs;
  const warnings = report.runs.reduce((sum, each) => sum + each.findings.length, 0);
  const facts = many ? [count(report.runs.length, "run")] : runFacts(run);
  const looked = report.runs.some((run) => run.looked > 0);
  const link = looked && h("a", { href: "#warnings", class: warnings ? "sign" : "calm" }, warnings ? count(warnings, "warning") : "no warnings");
  return h("div", { class: "masthead" },
    h("p", { class: "kicker" }, many ? "Comparison of runs" : "Report of a run"),
    h("h1", {}, report.runs.map((each) => each.name).join(" · ")),
    report.runs.map((each) => each.reading && h("p", { class: "reading" }, many && h("b", {}, `${each.name}. `), each.reading)),
    h("ul", { class: "facts" }, [...facts, link].filter(Boolean).map((fact) => h("li", {}, fact))),
    report.runs.flatMap((each) => [
      each.status === "stopped" && h("p", { class: "notice" }, `${each.name} was stopped before its end; what it left is below.`),
      ...each.notes.map((note) => h("p", { class: "notice" }, many ? `${each.name}: ${note}` : note)),
    ]),
  );
}

function runFacts(run) {
  const spent = run.stages.reduce((sum, stage) => sum + (stage.cached ? 0 : stage.seconds || 0), 0);
  return [
    { done: "finished", stopped: "stopped", failed: "failed" }[run.status] || "no summary",
    run.seed !== null && `seed ${run.seed}`,
    run.stages.length && count(run.stages.length, "stage"),
    spent > 0 && seconds(spent),
    run.prompts && `${number(run.prompts)} held-out prompts`,
  ].filter(Boolean);
}

function headlineTable() {
  const rows = report.runs.flatMap((run, index) => run.headline.map((row) => ({ ...row, run, index })));
  if (!rows.length) return absent(report.runs[0].missing.evaluation);
  const measures = Object.keys(MEASURES).filter((measure) => rows.some((row) => row.cells[measure]));
  const head = h("tr", {}, many && h("th", { scope: "col" }, "Run"), h("th", { scope: "col" }, "Arm"), measures.map((measure) =>
    h("th", { scope: "col", class: "num" }, MEASURES[measure].name, h("span", { class: "unit" }, MEASURES[measure].unit)),
  ));
  const body = rows.map((row, i) => {
    const first = i === 0 || rows[i - 1].run !== row.run;
    return h("tr", { class: first && i ? "first" : null },
      many && h("td", { class: "run-name" }, first ? [row.run.name, row.run.prompts && h("span", { class: "unit" }, `${number(row.run.prompts)} prompts`)] : ""),
      h("th", { scope: "row" }, block(armColor(row.arm, row.index)), row.label),
      measures.map((measure) => cell(row.cells[measure], MEASURES[measure])),
    );
  });
  return h("div", { class: "scroller", tabindex: 0, role: "region", "aria-label": "Headline numbers" },
    h("table", { class: "headline" }, caption(captionOf(rows)), h("thead", {}, head), h("tbody", {}, body)));
}

function captionOf(rows) {
  const evaluated = rows.filter((row) => row.held_out);
  if (!evaluated.length) return "No held-out evaluation: means over the last tenth of the training steps.";
  const [{ run }] = evaluated;
  const prompts = run.prompts && !many ? `${number(run.prompts)} held-out prompts` : "Held-out prompts";
  const heat = many || run.temperature === null ? "" : `, temperature ${number(run.temperature)}`;
  const rest = evaluated.length < rows.length ? " Arms without win rates were not evaluated: ends of their training." : "";
  return `${prompts}${heat}. Small numbers are 95 % intervals.${rest}`;
}

function cell(estimate, measure) {
  if (!estimate) return h("td", { class: "num none" }, "–");
  const show = measure.share ? percent : (value) => number(value);
  const interval = estimate.lo === undefined ? null : h("span", { class: "interval" }, `${show(estimate.lo)} – ${show(estimate.hi)}`);
  return h("td", { class: "num" }, measure.bar && whisker(estimate), h("b", {}, show(estimate.value)), interval);
}

// A win rate on a line from 0 to 100 %, with its interval and the middle, where nobody wins.
function whisker({ value, lo, hi }) {
  const x = (share) => 2 + 76 * share;
  return s("svg", { class: "whisker", width: 80, height: 14, "aria-hidden": "true" },
    s("line", { class: "rail", x1: x(0), x2: x(1), y1: 7, y2: 7 }),
    s("line", { class: "half", x1: x(0.5), x2: x(0.5), y1: 1, y2: 13 }),
    lo !== undefined && s("line", { class: "range", x1: x(lo), x2: x(hi), y1: 7, y2: 7 }),
    s("circle", { cx: x(value), cy: 7, r: 3.5 }));
}

function smallTables() {
  return report.runs.flatMap((run) => {
    const prefix = many ? `${run.name}: ` : "";
    const flags = Object.keys(run.flags);
    const arms = run.arms.filter((arm) => flags.some((flag) => flag && run.flags[flag][arm.name] !== undefined));
    const accuracy = Object.entries(run.reward_accuracy);
    return [
      arms.length && simpleTable(`${prefix}share of answers that are …, in %`, ["", ...arms.map((arm) => arm.label)],
        flags.map((flag) => [flag.replaceAll("_", " "), ...arms.map((arm) => percent(run.flags[flag][arm.name]))])),
      accuracy.length && simpleTable(`${prefix}the reward model's accuracy on held-out pairs, in %`, ["source", "accuracy"],
        accuracy.map(([source, share]) => [source.replaceAll("_", " ") || "–", percent(share)])),
    ].filter(Boolean);
  });
}

function simpleTable(name, head, rows) {
  return h("div", { class: "scroller small", tabindex: 0, role: "region", "aria-label": name },
    h("table", {}, caption(name),
      h("thead", {}, h("tr", {}, head.map((column, i) => h("th", { scope: "col", class: i ? "num" : null }, column)))),
      h("tbody", {}, rows.map(([first, ...cells]) =>
        h("tr", {}, h("th", { scope: "row" }, first), cells.map((text) => h("td", { class: "num" }, text)))))));
}

// The stages as columns: what each started from stands to its left.
function lineage(run) {
  if (!run.stages.length) return absent("The summary names no stage: the run ended before its first one did.");
  const depth = {};
  for (const stage of run.stages) {
    depth[stage.name] = Math.max(0, ...Object.keys(stage.parents).map((parent) => (depth[parent] ?? 0) + 1));
  }
  const columns = [...new Set(Object.values(depth))].sort((a, b) => a - b);
  return h("ol", { class: "lineage", "aria-label": `Stages of ${run.name}` }, columns.map((column) =>
    h("li", {}, run.stages.filter((stage) => depth[stage.name] === column).map(stageCard))));
}

function stageCard(stage) {
  const from = Object.entries(stage.parents);
  const memory = Object.entries(stage.memory).map(([role, gib]) => `${role} ${gib.toFixed(2)}`);
  return h("article", { class: "stage-card" },
    h("h4", {}, stage.name, h("span", { class: "spent" }, stage.cached ? "reused" : seconds(stage.seconds))),
    stage.key && h("p", { class: "key" }, h("code", {}, stage.key)),
    stage.facts.map((fact) => h("p", {}, fact)),
    memory.length > 0 && h("p", { class: "quiet" }, `GiB: ${memory.join(", ")}`),
    from.length > 0 && h("p", { class: "quiet" }, "from ", from.map(([name], i) => `${i ? " and " : ""}${name}`)));
}

function overview() {
  const tables = smallTables();
  return section("what", "What came of it", null, headlineTable(), tables.length > 0 && h("div", { class: "pair" }, tables));
}
