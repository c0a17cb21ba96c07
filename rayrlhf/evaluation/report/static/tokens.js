// An answer, token by token: the shade is the KL to SFT, the number comes with the pointer or the arrow keys.

const tip = h("div", { class: "tip", hidden: true });
const spoken = h("div", { class: "visually-hidden", "aria-live": "polite" });

function answerText(answer, vocabulary) {
  if (!answer.kl) return h("p", { class: "answer" }, textOf(answer, vocabulary) || emptyAnswer());
  const tokens = answer.tokens.map((index, i) => {
    const text = vocabulary[index];
    const special = /^<\|.*\|>$/.test(text);
    return h("span", { class: `t ${special ? "special" : ""} ${shade(answer.kl[i])}`, "data-i": i }, special ? "⏎" : text);
  });
  const box = h("p", { class: "answer tokens", tabindex: 0, role: "group", "aria-label": `Answer: ${textOf(answer, vocabulary) || "empty"}. Arrow keys read the KL of each token.` }, tokens);
  follow(box, answer, vocabulary);
  return box;
}

function emptyAnswer() {
  return h("span", { class: "quiet" }, "(empty)");
}

function textOf(answer, vocabulary) {
  if (answer.text !== undefined) return answer.text;
  return (answer.tokens || []).map((index) => vocabulary[index]).join("").replace(/<\|[a-z_]+\|>/g, "").trim();
}

// Five shades a side: half a nat is already much for one token.
function shade(thousandths) {
  if (thousandths === null) return "";
  const level = [50, 150, 400, 1000, 2500].filter((limit) => Math.abs(thousandths) >= limit).length;
  return level ? `${thousandths > 0 ? "up" : "down"}${level}` : "";
}

function follow(box, answer, vocabulary) {
  let at = -1;
  const mark = (i) => {
    box.children[at]?.classList.remove("at");
    at = i;
    if (i < 0) {
      tip.hidden = true;
      return;
    }
    const token = box.children[i];
    token.classList.add("at");
    tip.replaceChildren(h("b", {}, visibleToken(vocabulary[answer.tokens[i]])), ` ${natsOf(answer.kl[i])}`, h("span", { class: "quiet" }, ` token ${i + 1} of ${answer.tokens.length}`));
    tip.hidden = false;
    const place = token.getBoundingClientRect();
    const left = Math.min(place.left, document.documentElement.clientWidth - tip.offsetWidth - 8);
    tip.style.setProperty("left", `${Math.max(8, left)}px`);
    tip.style.setProperty("top", `${place.bottom + 6}px`);
  };
  box.addEventListener("pointerover", (event) => mark(event.target.dataset?.i === undefined ? -1 : Number(event.target.dataset.i)));
  box.addEventListener("pointerleave", () => mark(-1));
  box.addEventListener("focus", () => box.matches(":focus-visible") && mark(0));
  box.addEventListener("blur", () => mark(-1));
  box.addEventListener("keydown", (event) => {
    const last = answer.tokens.length - 1;
    const next = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: last }[event.key];
    if (event.key === "Escape") mark(-1);
    if (next === undefined) return;
    event.preventDefault();
    mark(Math.max(0, Math.min(last, next)));
    spoken.textContent = tip.textContent;
  });
}

function natsOf(thousandths) {
  return thousandths === null ? "no KL" : `${signed(thousandths / 1000)} nats`;
}

function visibleToken(text) {
  return text.replaceAll(" ", "␣").replaceAll("\n", "↵") || "(empty)";
}

function shadeLegend() {
  const step = (kind) => h("span", { class: `t ${kind}` }, "\u2002");
  return h("p", { class: "shades" }, "KL of a token to SFT: ", "less likely than in SFT ",
    ["down4", "down3", "down2", "down1", "", "up1", "up2", "up3", "up4"].map(step), " more likely");
}
