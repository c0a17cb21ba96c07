// Held-out prompts with the answers of all arms side by side; and what training drew on its way.

function answers() {
  const held = report.runs.map((run, index) => run.answers && h("div", {}, many && h("h3", { class: "run-title" }, run.name), heldOut(run, index))).filter(Boolean);
  const drawnRows = report.runs.flatMap((run, index) => run.samples.map((sample) => ({ ...sample, run, index })));
  const [{ missing }] = report.runs;
  return section("answers", "The answers themselves", null,
    held.length ? held : absent(missing.answers),
    drawnRows.length ? sampleTable(drawnRows, held.length > 0) : absent(missing.samples));
}

function heldOut(run, index) {
  const { rows, vocabulary } = run.answers;
  const arms = run.arms.filter((arm) => rows.some((row) => row.answers[arm.name]));
  for (const row of rows) row.search = [row.prompt, ...arms.map((arm) => (row.answers[arm.name] ? textOf(row.answers[arm.name], vocabulary) : ""))].join("\n").toLowerCase();
  const judge = rows.some((row) => arms.some((arm) => (row.answers[arm.name]?.gold ?? null) !== null)) ? "gold" : "reward";
  const columns = [
    { name: "Prompt", keys: [{ id: "prompt", label: "A–Z", of: (row) => row.prompt, down: false }], cell: promptCell },
    ...arms.map((arm) => armColumn(arm, index, rows, vocabulary, judge)),
  ];
  const table = dataTable({ caption: `Held-out prompts${many ? ` of ${run.name}` : ""}: ${rows.length}, with the answer of each arm`, columns, rows });
  const shades = rows.some((row) => Object.values(row.answers).some((answer) => answer.kl));
  return [filters(run, index, arms, rows, table, judge), shades && shadeLegend(), table.element];
}

function promptCell(row) {
  return h("td", { class: "prompt" }, h("p", {}, row.prompt), h("p", { class: "meta" }, row.kind && h("span", { class: "chip" }, row.kind), h("span", { class: "quiet" }, `#${row.id}`)));
}

function armColumn(arm, index, rows, vocabulary, judge) {
  const of = (name) => (row) => row.answers[arm.name]?.[name] ?? null;
  const keys = [["reward", "reward"], ["gold", "gold"], ["sum", "KL"], ["length", "length"]]
    .filter(([name]) => !(name === "sum" && arm.name === "sft") && rows.some((row) => of(name)(row) !== null))
    .map(([name, label]) => ({ id: `${arm.name}/${name}`, label, of: of(name) }));
  return {
    name: arm.label, color: armColor(arm.name, index), keys,
    cell: (row) => answerCell(row.answers[arm.name], arm.name === "sft" ? null : row.answers.sft, vocabulary, judge),
  };
}

function answerCell(answer, sft, vocabulary, judge) {
  if (!answer) return h("td", { class: "quiet" }, "–");
  const parts = [["reward", answer.reward], ["gold", answer.gold], ["KL", sft ? answer.sum ?? null : null], ["tokens", answer.length ?? null]].filter(([, value]) => value !== null);
  const verdict = compare(answer, sft, judge);
  return h("td", {}, answerText(answer, vocabulary),
    h("p", { class: "meta" }, parts.map(([name, value]) => h("span", {}, `${name} `, h("b", {}, number(value === null || value === undefined ? value : Math.round(value * 1e3) / 1e3))))),
    (verdict || answer.truncated || answer.flags.length > 0) && h("p", { class: "meta" },
      verdict && h("span", { class: `verdict ${verdict}` }, { better: "▲ better than SFT", worse: "▼ worse than SFT", same: "= SFT" }[verdict]),
      answer.truncated && h("span", { class: "chip cut" }, "truncated"),
      answer.flags.map((flag) => h("span", { class: "chip" }, flag.replaceAll("_", " ")))));
}

function compare(answer, other, judge) {
  const [a, b] = [answer?.[judge] ?? null, other?.[judge] ?? null];
  if (a === null || b === null) return null;
  return Math.abs(a - b) < 1e-9 ? "same" : a > b ? "better" : "worse";
}

function filters(run, index, arms, rows, table, judge) {
  const kinds = [...new Set(rows.map((row) => row.kind).filter(Boolean))].sort();
  const flags = [...new Set(rows.flatMap((row) => Object.values(row.answers).flatMap((answer) => answer.flags)))].sort();
  const others = arms.some((arm) => arm.name === "sft") ? arms.filter((arm) => arm.name !== "sft") : [];
  const search = searchBox(`search-${index}`, "Search");
  const kind = choice(`kind-${index}`, "Kind", [["", "all kinds"], ...kinds.map((name) => [name, name])]);
  const who = choice(`who-${index}`, `Who is better (${judge})`, [["", "anyone"], ...others.flatMap((arm) => [
    [`better ${arm.name}`, `${arm.label} beats SFT`], [`worse ${arm.name}`, `SFT beats ${arm.label}`], [`same ${arm.name}`, `${arm.label} ties with SFT`]])]);
  const mark = choice(`mark-${index}`, "Marks", [["", "any"], ["cut", "an answer is truncated"], ["whole", "no answer is truncated"], ...flags.map((flag) => [`flag ${flag}`, flag.replaceAll("_", " ")])]);
  const apply = () => {
    const words = search.input.value.trim().toLowerCase();
    const [verdict, arm] = split(who.select.value);
    table.filter((row) => row.search.includes(words) && (!kind.select.value || row.kind === kind.select.value) &&
      (!verdict || compare(row.answers[arm], row.answers.sft, judge) === verdict) && marked(row, mark.select.value));
  };
  whenChanged([search.input, kind.select, who.select, mark.select], apply);
  return h("form", { class: "filters", role: "search", "aria-label": `Filter the prompts of ${run.name}`, onsubmit: (event) => event.preventDefault() },
    search.element, kinds.length > 1 && kind.element, others.length > 0 && who.element, mark.element);
}

function split(value) {
  const space = value.indexOf(" ");
  return space < 0 ? ["", ""] : [value.slice(0, space), value.slice(space + 1)];
}

function marked(row, wanted) {
  const all = Object.values(row.answers);
  if (!wanted) return true;
  if (wanted === "cut") return all.some((answer) => answer.truncated);
  if (wanted === "whole") return !all.some((answer) => answer.truncated);
  return all.some((answer) => answer.flags.includes(split(wanted)[1]));
}

function sampleTable(rows, folded) {
  const of = (name) => (row) => row[name] ?? null;
  const has = (name) => rows.some((row) => of(name)(row) !== null);
  const several = lines.length > 1;
  const columns = [
    { name: "Step", keys: [{ id: "step", label: "order", of: of("step"), down: false }], cell: (row) => h("td", { class: "num step" }, number(row.step), several && h("span", { class: "arm" }, block(armColor(row.arm, row.index)), seriesLabel(row.run, row.arm))) },
    { name: "Prompt", keys: [], cell: (row) => h("td", { class: "prompt" }, h("p", {}, row.prompt)) },
    { name: "Response", keys: has("length") ? [{ id: "length", label: "length", of: of("length") }] : [], cell: (row) => h("td", {}, h("p", { class: "answer" }, row.text || emptyAnswer()), row.truncated && h("p", { class: "meta" }, h("span", { class: "chip cut" }, "truncated"))) },
    ...[["reward", "Reward"], ["gold", "Gold"], ["kl", "KL"]].filter(([name]) => has(name)).map(([name, title]) => ({
      name: title, number: true, keys: [{ id: name, label: "sort", of: of(name) }], cell: (row) => h("td", { class: "num" }, number(of(name)(row))) })),
  ];
  const table = dataTable({ caption: "Responses drawn while training", columns, rows });
  const search = searchBox("search-samples", "Search");
  whenChanged([search.input], () => {
    const words = search.input.value.trim().toLowerCase();
    table.filter((row) => `${row.prompt}\n${row.text}`.toLowerCase().includes(words));
  });
  return h("details", { class: "fold", open: !folded }, h("summary", {}, "Drawn while training", h("span", { class: "quiet" }, ` ${count(rows.length, "response")}`)),
    h("form", { class: "filters", role: "search", "aria-label": "Filter the samples", onsubmit: (event) => event.preventDefault() }, search.element), table.element);
}
