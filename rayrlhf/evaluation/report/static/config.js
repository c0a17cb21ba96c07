// How it was set up: stages with their keys, versions, and every key of the config behind a search box.

function setup() {
  return section("setup", "How it was made", "Stages are named by the hash of all their inputs: the same key is the same model.",
    many && differencesTable(),
    report.runs.map((run, index) => {
      const made = [
        lineage(run),
        h("div", { class: "folds" }, configFold(run, index), versionsFold(run)),
        h("p", { class: "quiet path" }, h("code", {}, run.folder)),
      ];
      return many ? h("details", { class: "fold run" }, h("summary", {}, run.name, h("span", { class: "quiet" }, ` ${runFacts(run).join(", ")}`)), made) : made;
    }));
}

function configFold(run, index) {
  if (!run.config.length) return absent("There is no config.yaml to show.");
  const found = h("p", { class: "quiet", role: "status" }, count(run.config.length, "key"));
  const rows = run.config.map(([key, value]) => ({
    text: `${key} ${value}`.toLowerCase(),
    row: h("tr", {}, h("th", { scope: "row" }, h("code", {}, key)), h("td", {}, h("code", {}, value))),
  }));
  const search = h("input", { type: "search", id: `config-search-${index}`, placeholder: "ppo.kl, learning_rate, 0.2 …", autocomplete: "off" });
  search.addEventListener("input", () => {
    const wanted = search.value.trim().toLowerCase();
    let shown = 0;
    for (const { text, row } of rows) {
      row.hidden = !text.includes(wanted);
      shown += row.hidden ? 0 : 1;
    }
    found.textContent = `${shown} of ${count(rows.length, "key")}`;
  });
  return h("details", { class: "fold" },
    h("summary", {}, "Config", h("span", { class: "quiet" }, ` ${count(run.config.length, "key")}, resolved`)),
    h("div", { class: "filter" }, h("label", { for: `config-search-${index}` }, "Search keys and values"), search, found),
    h("div", { class: "scroller tall", tabindex: 0, role: "region", "aria-label": "Config" },
      h("table", { class: "config" }, h("caption", { class: "visually-hidden" }, "Every key of the config"), h("tbody", {}, rows.map(({ row }) => row)))));
}

function versionsFold(run) {
  const versions = Object.entries(run.versions);
  if (!versions.length) return absent("The summary names no versions.");
  return h("details", { class: "fold" },
    h("summary", {}, "Versions", h("span", { class: "quiet" }, ` ${versions.map(([name]) => name).slice(0, 3).join(", ")} …`)),
    h("dl", { class: "versions" }, versions.map(([name, version]) => h("div", {}, h("dt", {}, name), h("dd", {}, h("code", {}, version))))));
}

function differencesTable() {
  if (!report.differences.length) return absent("The configs are the same but for the name.");
  return h("div", { class: "scroller", tabindex: 0, role: "region", "aria-label": "Differences" },
    h("table", { class: "config" }, caption(`Keys of the config that differ: ${report.differences.length}`),
      h("thead", {}, h("tr", {}, h("th", { scope: "col" }, "Key"), report.runs.map((run) => h("th", { scope: "col" }, run.name)))),
      h("tbody", {}, report.differences.map(({ key, values }) =>
        h("tr", {}, h("th", { scope: "row" }, h("code", {}, key)), values.map((value) => h("td", {}, value === null ? "not set" : h("code", {}, value))))))));
}
