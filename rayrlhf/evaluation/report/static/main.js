// The page, in the order of its story.

const page = document.getElementById("report");
const parts = [masthead(), overview(), setup(), training(), resources(), paths(), spreads(), answers()];
page.append(...parts.filter(Boolean));
page.append(findings());
page.append(h("footer", {}, "Made by ", h("code", {}, "rayrlhf report"), ". Everything is in this file; it asks no server for anything."));
document.body.append(tip, spoken);

const NAMES = { what: "Result", setup: "Setup", training: "Training", paths: "KL", scores: "Scores", answers: "Answers", cost: "Cost", warnings: "Warnings" };
document.getElementById("contents").append(...[...page.querySelectorAll(":scope > section")].map((part) => h("a", { href: `#${part.id}` }, NAMES[part.id])));

// Light and dark: what the system says, until the reader says otherwise.
const root = document.documentElement;
const themeButton = document.getElementById("theme");
const system = matchMedia("(prefers-color-scheme: dark)");

function theme() {
  return root.dataset.theme || (system.matches ? "dark" : "light");
}

function nameTheme() {
  const other = theme() === "dark" ? "light" : "dark";
  themeButton.textContent = other === "dark" ? "Dark" : "Light";
  themeButton.setAttribute("aria-label", `Switch to the ${other} theme`);
}

function remembered(value) {
  try {
    if (value) localStorage.setItem("rayrlhf-theme", value);
    return localStorage.getItem("rayrlhf-theme");
  } catch {
    return null; // a page opened from a file may not be allowed to remember
  }
}

themeButton.addEventListener("click", () => {
  root.dataset.theme = theme() === "dark" ? "light" : "dark";
  remembered(root.dataset.theme);
  nameTheme();
});
system.addEventListener("change", nameTheme);
if (["light", "dark"].includes(remembered())) root.dataset.theme = remembered();
nameTheme();
