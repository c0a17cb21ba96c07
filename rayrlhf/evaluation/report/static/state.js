// What all parts of the page share: the data, an arm's colour, and what the reader has switched.

const report = JSON.parse(document.getElementById("report-data").textContent);
const many = report.runs.length > 1;
const DASHES = ["", "6 3", "2 3", "9 3 2 3"];

// A long run is a band of noise without it.
const longest = Math.max(0, ...report.runs.flatMap((run) => run.ppo.map((table) => table.columns.step.length)));
const shared = { smoothing: longest > 120 ? 0.9 : 0, hidden: new Set(), listeners: new Set() };

function change(values) {
  Object.assign(shared, values);
  for (const listener of shared.listeners) listener();
}

// One colour an arm, everywhere. Several runs of one arm each are told apart by colour, otherwise by dashes.
const trainedArms = [...new Set(report.runs.flatMap((run) => run.ppo.map((table) => table.arm)))];
const otherArms = [...new Set(report.runs.flatMap((run) => run.arms.map((arm) => arm.name)))].filter(
  (arm) => arm !== "sft" && !trainedArms.includes(arm),
);
const byRun = many && trainedArms.length <= 1;

function armColor(arm, run = 0) {
  if (arm === "sft") return "var(--c0)";
  const place = byRun ? run + otherArms.indexOf(arm) + 1 : [...trainedArms, ...otherArms].indexOf(arm);
  return `var(--c${1 + (Math.max(place, 0) % 7)})`;
}

function armLabel(run, arm) {
  const known = run.arms.find((each) => each.name === arm);
  return known ? known.label : arm;
}

function seriesLabel(run, arm) {
  if (!many) return armLabel(run, arm);
  return byRun ? run.name : `${run.name} · ${armLabel(run, arm)}`;
}

// Every line over PPO steps: {key, run, arm, label, color, dash, columns}.
const lines = report.runs.flatMap((run, index) =>
  run.ppo.map((table) => ({
    key: `${index}/${table.arm}`,
    run,
    arm: table.arm,
    label: seriesLabel(run, table.arm),
    color: armColor(table.arm, index),
    dash: many && !byRun ? DASHES[index % DASHES.length] : "",
    columns: table.columns,
  })),
);

// Plots that share an axis also share a cursor: a step that is looked at in one is marked in all.
function cursorGroup() {
  const group = { at: null, listeners: new Set() };
  group.move = (at) => {
    group.at = at;
    for (const listener of group.listeners) listener(at);
  };
  return group;
}

// Exponential moving average without the bias of its start (Kingma and Ba 2015, section 3); gaps stay gaps.
function smoothed(values, weight) {
  let sum = 0;
  let mass = 0;
  return values.map((value) => {
    if (value === null) return null;
    sum = weight * sum + (1 - weight) * value;
    mass = weight * mass + (1 - weight);
    return sum / mass;
  });
}
