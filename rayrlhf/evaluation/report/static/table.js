// A table whose rows are sorted by buttons in its head, filtered from outside, and shown a page at a time.

const PAGE = 20;

// columns: [{name, color, keys: [{id, label, of(row)}], cell(row)}]
function dataTable({ caption, columns, rows }) {
  const order = { id: null, of: null, down: true };
  let kept = rows;
  let page = 0;
  const buttons = [];
  const heads = columns.map((column) => head(column));
  const body = h("tbody", { role: "rowgroup" });
  const status = h("p", { class: "count", role: "status" });
  const back = h("button", { type: "button", onclick: () => turn(-1) }, "Previous");
  const next = h("button", { type: "button", onclick: () => turn(1) }, "Next");
  const captioned = h("caption", {}, h("span", {}, caption));
  const scroller = h("div", { class: "scroller rows", tabindex: 0, role: "region", "aria-label": caption },
    h("table", { class: "answers", role: "table" }, captioned, h("thead", { role: "rowgroup" }, h("tr", { role: "row" }, heads)), body));

  function head(column) {
    const cellButtons = column.keys.map((key) => {
      const button = h("button", { type: "button", class: "sort", "aria-label": `Sort by ${column.name} ${key.label}`, onclick: () => sort(key) },
        key.label, h("span", { class: "arrow", "aria-hidden": "true" }));
      buttons.push({ key, button });
      return button;
    });
    const name = h("span", { class: "column" }, column.color && block(column.color), column.name);
    return h("th", { scope: "col", role: "columnheader", class: column.number ? "num" : null, "aria-sort": cellButtons.length ? "none" : null }, name, h("span", { class: "sorts" }, cellButtons));
  }

  function sort(key) {
    order.down = order.id === key.id ? !order.down : key.down !== false;
    order.id = key.id;
    order.of = key.of;
    heads.forEach((cell, i) => {
      const mine = columns[i].keys.some(({ id }) => id === key.id);
      if (columns[i].keys.length) cell.setAttribute("aria-sort", mine ? (order.down ? "descending" : "ascending") : "none");
    });
    for (const { key: other, button } of buttons) {
      button.classList.toggle("chosen", other.id === key.id);
      button.querySelector(".arrow").textContent = other.id === key.id ? (order.down ? "↓" : "↑") : "";
    }
    page = 0;
    show();
  }

  function turn(by) {
    page += by;
    show();
    scroller.scrollTop = 0;
    scroller.scrollIntoView({ block: "nearest" });
  }

  // Rows without a value come last, whichever way the others are sorted.
  function compare(a, b) {
    const [x, y] = [order.of(a), order.of(b)];
    const [noX, noY] = [x === null || x === undefined, y === null || y === undefined];
    if (noX || noY) return noX - noY;
    const sign = order.down ? -1 : 1;
    return sign * (typeof x === "string" ? x.localeCompare(y) : x - y);
  }

  function show() {
    const sorted = order.of ? [...kept].sort(compare) : kept;
    const pages = Math.max(1, Math.ceil(sorted.length / PAGE));
    page = Math.max(0, Math.min(page, pages - 1));
    const from = page * PAGE;
    const part = sorted.slice(from, from + PAGE);
    body.replaceChildren(...part.map((row) => h("tr", { role: "row" }, columns.map((column) => named(column, row)))));
    status.textContent = sorted.length ? `${from + 1}–${from + part.length} of ${sorted.length}${kept.length < rows.length ? `, filtered from ${rows.length}` : ""}` : `none of ${rows.length}`;
    back.disabled = page === 0;
    next.disabled = page >= pages - 1;
  }

  // On a phone a row is a card, whose parts need their column's name; the roles keep it a table for screen readers.
  function named(column, row) {
    return fill(column.cell(row), { role: "cell", "data-column": column.name }, []);
  }

  function filter(keep) {
    kept = rows.filter(keep);
    page = 0;
    show();
  }

  show();
  const pager = h("div", { class: "pager" }, status, h("div", { class: "turns" }, back, next));
  return { element: h("div", { class: "data-table" }, pager, scroller), filter };
}

function choice(id, label, options) {
  const select = h("select", { id }, options.map(([value, text]) => h("option", { value }, text)));
  return { element: h("div", { class: "field" }, h("label", { for: id }, label), select), select };
}

function searchBox(id, label) {
  const input = h("input", { type: "search", id, autocomplete: "off", placeholder: "words in prompt or answers" });
  return { element: h("div", { class: "field grow" }, h("label", { for: id }, label), input), input };
}

// Calls apply() when any of the controls changes; typing waits for a pause.
function whenChanged(controls, apply) {
  let timer = 0;
  for (const control of controls) {
    control.addEventListener("input", () => {
      clearTimeout(timer);
      if (control.type === "search") timer = setTimeout(apply, 120);
      else apply();
    });
  }
}
