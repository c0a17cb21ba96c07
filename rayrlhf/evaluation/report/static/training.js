// The plots over steps. What each metric means is said beside it, in the words of docs/metrics.md.

const PLOTS = [
  { metric: "reward/mean", title: "Reward", about: "The reward model's scores; demonstrations average 0.", large: true },
  { metric: "reward/gold", title: "Gold", about: "The world's exact judge, which nothing is trained on.", large: true },
  { metric: "kl/mean", title: "KL to SFT", unit: "nats a response", about: "How far the policy has gone. Past ten, read the samples.", large: true, anchorZero: true },
  { metric: "response/length_mean", title: "Response length", unit: "tokens" },
  { metric: "response/truncated_fraction", title: "Truncated", unit: "share of responses" },
  { metric: "policy/entropy", title: "Entropy", unit: "nats a token" },
  { metric: "policy/loss", title: "Policy loss" },
  { metric: "value/loss", title: "Value loss", anchorZero: true },
  { metric: "policy/clip_fraction", title: "Clip fraction", unit: "share of tokens", anchorZero: true },
  { metric: "value/explained_variance", title: "Explained variance", about: "1 is perfect, below 0 is worse than a constant." },
  { metric: "ptx/loss", title: "Pretraining loss (ptx)", unit: "nats a token" },
  { metric: "rollout/logprob_gap", title: "Log-prob gap", unit: "nats a token", about: "Between trainer and engine on the same tokens." },
  { metric: "kl/coef", title: "KL coefficient" },
  { metric: "policy/grad_norm", title: "Gradient norm", anchorZero: true },
];
const SPEED = [
  { metric: "throughput/rollout_tokens_per_s", title: "Rollout speed", unit: "tokens/s", anchorZero: true },
  { metric: "throughput/train_tokens_per_s", title: "Training speed", unit: "tokens/s", anchorZero: true },
  { metric: "weights/publish_s", title: "Weight publish", unit: "s", anchorZero: true },
];
const SUPERVISED = { pretrain: "nats a token", sft: "nats a token", reward: "ranking loss", dpo: "log 2 at step 1" };
const ROLES = ["policy", "value", "reference", "reward", "rollout", "driver"];

function plotId(metric) {
  return `plot-${metric.replace(/[^a-z0-9]+/g, "-")}`;
}

function training() {
  if (!lines.length) return section("training", "Training", null, report.runs.map((run) => absent(run.missing.training)), supervised());
  const group = cursorGroup();
  const plots = PLOTS.map((spec) => [spec, metricPlot(spec, group)]).filter(([, plot]) => plot);
  const noGold = report.runs.every((run) => run.missing.gold);
  return section("training", "Training, step by step", "A step is one round of generate, score, estimate, update, publish. Point at a plot, or focus it and press the arrow keys: the step is marked in all of them.",
    controls(),
    h("div", { class: "plots large" }, plots.filter(([spec]) => spec.large).map(([, plot]) => plot)),
    noGold && absent(report.runs[0].missing.gold),
    h("div", { class: "plots" }, plots.filter(([spec]) => !spec.large).map(([, plot]) => plot)),
    supervised());
}

function resources() {
  if (!lines.length) return null;
  const group = cursorGroup();
  const timed = lines.filter((line) => line.columns["time/step_s"] || line.columns["time/update_s"]);
  const speed = SPEED.map((spec) => metricPlot(spec, group)).filter(Boolean);
  const memory = lines.map((line) => memoryPlot(line, group)).filter(Boolean);
  if (!timed.length && !speed.length && !memory.length) return null;
  return section("cost", "Where time and memory went", null,
    h("div", { class: "plots wide" }, timed.map((line) => phasePlot(line, group))),
    h("div", { class: "plots" }, speed, memory));
}

function metricPlot(spec, group) {
  const series = lines.filter((line) => (line.columns[spec.metric] || []).some((value) => value !== null))
    .map((line) => ({ ...line, x: line.columns.step, y: line.columns[spec.metric] }));
  if (!series.length) return null;
  const targets = [...new Set(report.runs.map((run) => run.kl_target).filter((value) => value !== null))];
  const target = spec.metric === "kl/mean" && targets.length === 1 ? { value: targets[0], label: `target ${number(targets[0])}` } : null;
  return linePlot({ ...spec, id: plotId(spec.metric), series, group, target, smooth: true, height: spec.large ? 220 : 180 });
}

function memoryPlot(line, group) {
  const series = ROLES.map((role, i) => ({
    key: `${line.key}/${role}`, label: role, color: `var(--p${i})`, dash: "",
    x: line.columns.step, y: line.columns[`memory/${role}_gib`] || [],
  })).filter(({ y }) => y.some((value) => value !== null));
  const title = lines.length > 1 ? `Memory: ${line.label}` : "Memory per role";
  return series.length ? linePlot({ title, unit: "GiB of the largest rank", series, group, anchorZero: true, height: 200 }) : null;
}

// Losses of the stages before PPO, each over its own steps.
function supervised() {
  const plots = Object.entries(SUPERVISED).map(([stage, unit]) => {
    const series = report.runs.flatMap((run, index) => run.supervised
      .filter((table) => table.stage === stage && table.columns.loss)
      .map(({ columns }) => ({ key: `${index}/${stage}`, label: run.name, color: many ? `var(--c${1 + (index % 7)})` : "var(--ink)", dash: "", x: columns.step, y: columns.loss })));
    return series.length ? linePlot({ id: `plot-${stage}-loss`, title: `${stage}: loss`, unit, series, group: cursorGroup(), height: 150 }) : null;
  }).filter(Boolean);
  return plots.length ? [h("h3", { class: "part" }, "Before PPO"), h("div", { class: "plots four" }, plots)] : null;
}

function controls() {
  const smoothing = h("input", { type: "range", id: "smoothing", min: 0, max: 0.95, step: 0.05, value: shared.smoothing });
  smoothing.addEventListener("input", () => change({ smoothing: Number(smoothing.value) }));
  const toggles = lines.length > 1 && h("div", { class: "legend", role: "group", "aria-label": "Lines shown" }, lines.map(toggle));
  return h("div", { class: "controls" }, toggles, h("label", { class: "smoothing" }, "Smoothing", smoothing));
}

function toggle(line) {
  const button = h("button", { type: "button", "aria-pressed": "true" }, swatch(line.color, line.dash), line.label);
  button.addEventListener("click", () => {
    const hidden = new Set(shared.hidden);
    if (!hidden.delete(line.key)) hidden.add(line.key);
    button.setAttribute("aria-pressed", String(!hidden.has(line.key)));
    change({ hidden });
  });
  return button;
}

function paths() {
  const plots = [pathPlot("reward/mean", "reward", "Reward against KL"), pathPlot("reward/gold", "gold", "Gold against KL")].filter(Boolean);
  if (!plots.length) return null;
  return section("paths", "What the distance bought", "Each dot is a step, later ones more solid. Reward that rises with KL while gold does not is reward hacking.", h("div", { class: "plots two" }, plots));
}

function spreads() {
  const plots = report.runs.flatMap((run, index) => [spreadPlot(run, index, "reward"), spreadPlot(run, index, "gold")]).filter(Boolean);
  if (!plots.length) return null;
  return section("scores", "Scores before and after", "Of the answers to the held-out prompts, SFT beside what was trained from it.", h("div", { class: "plots two" }, plots));
}
