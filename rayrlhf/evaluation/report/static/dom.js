// Elements from data. Strings become text nodes, never markup: what a model wrote cannot become part of the page.

const SVG = "http://www.w3.org/2000/svg";

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes || {})) {
    if (value === null || value === undefined || value === false) continue;
    if (name === "style") {
      // Property by property: the page's security policy refuses style attributes.
      for (const [property, set] of Object.entries(value)) element.style.setProperty(property, set);
    } else if (name.startsWith("on")) {
      element.addEventListener(name.slice(2), value);
    } else {
      element.setAttribute(name, value === true ? "" : String(value));
    }
  }
  element.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

function h(name, attributes, ...children) {
  return fill(document.createElement(name), attributes, children);
}

function s(name, attributes, ...children) {
  return fill(document.createElementNS(SVG, name), attributes, children);
}

function section(id, title, lede, ...children) {
  const head = h("div", { class: "section-head" }, h("h2", { id: `${id}-title` }, title), lede && h("p", { class: "lede" }, lede));
  return h("section", { id, "aria-labelledby": `${id}-title` }, head, ...children);
}

// Stays in sight when a wide table is scrolled.
function caption(text) {
  return h("caption", {}, h("span", {}, text));
}

function absent(sentence) {
  return h("p", { class: "absent" }, sentence);
}

// Calls draw(width) now and whenever the element's width changes.
function drawn(element, draw) {
  let last = 0;
  new ResizeObserver(([entry]) => {
    const width = Math.floor(entry.contentRect.width);
    if (width > 0 && width !== last) {
      last = width;
      draw(width);
    }
  }).observe(element);
  return () => last && draw(last);
}

function swatch(color, dash) {
  const line = s("line", { x1: 0, x2: 18, y1: 5, y2: 5, "stroke-width": 2.5, "stroke-dasharray": dash || null, style: { stroke: color } });
  return s("svg", { class: "swatch", width: 18, height: 10, "aria-hidden": "true" }, line);
}

function block(color) {
  return h("i", { class: "block", "aria-hidden": "true", style: { background: color } });
}
