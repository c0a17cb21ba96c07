// Scales, ticks, and the frame that all plots stand in.

const TEXT_WIDTH = 6.3; // of a character of a direct label, about

function ticks(low, high, wanted) {
  const rough = (high - low) / Math.max(1, wanted);
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 2.5, 5, 10].map((m) => m * power).find((candidate) => candidate >= rough * 0.999);
  const found = [];
  for (let value = Math.ceil(low / step - 1e-9) * step; value <= high + step * 1e-6; value += step) found.push(value);
  return { values: found, step };
}

function wholeTicks(low, high, wanted) {
  const { values, step } = ticks(low, high, wanted);
  if (step >= 1) return { values: values.filter(Number.isInteger), step };
  const whole = [];
  for (let value = Math.ceil(low); value <= high; value += 1) whole.push(value);
  return { values: whole, step: 1 };
}

function extent(values) {
  let low = Infinity;
  let high = -Infinity;
  for (const value of values) {
    if (value === null || value === undefined) continue;
    if (value < low) low = value;
    if (value > high) high = value;
  }
  return low > high ? null : [low, high];
}

// Room above and below; down to zero where zero is near, since a share of nothing means something.
function padded([low, high], anchorZero) {
  if (low === high) {
    const room = Math.abs(low) * 0.1 || 1;
    return [low >= 0 && low - room < 0 ? 0 : low - room, high + room];
  }
  const room = 0.06 * (high - low);
  const bottom = low >= 0 && (anchorZero || low < 0.35 * high) ? 0 : low - room;
  return [bottom, high <= 0 && high > 0.35 * low ? 0 : high + room];
}

function scale([low, high], [from, to]) {
  const unit = (to - from) / (high - low || 1);
  const at = (value) => from + (value - low) * unit;
  at.back = (place) => low + (place - from) / unit;
  return at;
}

// {svg, x, y, box}: gridlines, tick labels, an optional zero line and the name of the horizontal axis.
function frame({ width, height, x, y, right = 12, left = 46, wholeX = true, xName, yName, yTicks = 4, gridX = false }) {
  const box = { left, right: width - right, top: yName ? 22 : 10, bottom: height - (xName ? 36 : 22) };
  const atX = scale(x, [box.left, box.right]);
  const atY = scale(y, [box.bottom, box.top]);
  const grid = s("g", { class: "grid" });
  const vertical = ticks(y[0], y[1], yTicks);
  for (const value of vertical.values) {
    const place = atY(value);
    const zero = Math.abs(value) < vertical.step / 1e6 && y[0] < 0;
    grid.append(s("line", { class: zero ? "zero" : null, x1: box.left, x2: box.right, y1: place, y2: place }));
    grid.append(s("text", { x: box.left - 6, y: place + 3.5, "text-anchor": "end" }, tick(value, vertical.step)));
  }
  const horizontal = (wholeX ? wholeTicks : ticks)(x[0], x[1], Math.max(2, (box.right - box.left) / 60));
  for (const value of horizontal.values) {
    const place = atX(value);
    if (gridX) grid.append(s("line", { x1: place, x2: place, y1: box.top, y2: box.bottom }));
    grid.append(s("text", { x: place, y: box.bottom + 15, "text-anchor": "middle" }, tick(value, horizontal.step)));
  }
  if (xName) grid.append(s("text", { class: "axis-name", x: box.right, y: height - 4, "text-anchor": "end" }, xName));
  if (yName) grid.append(s("text", { class: "axis-name", x: 0, y: 10 }, yName));
  const svg = s("svg", { width, height, viewBox: `0 0 ${width} ${height}`, role: "img" }, grid);
  return { svg, x: atX, y: atY, box };
}

function pathOf(xs, ys, atX, atY) {
  let d = "";
  let pen = false;
  xs.forEach((x, i) => {
    if (ys[i] === null || ys[i] === undefined || x === null) {
      pen = false;
      return;
    }
    d += `${pen ? "L" : "M"}${atX(x).toFixed(1)} ${atY(ys[i]).toFixed(1)}`;
    pen = true;
  });
  return d;
}

// Names beside the ends of lines, moved apart where lines end close to each other.
function directLabels(items, box, x, gap = 13) {
  const sorted = [...items].sort((a, b) => a.y - b.y);
  sorted.forEach((item, i) => {
    item.place = Math.max(item.y, i ? sorted[i - 1].place + gap : box.top);
  });
  for (let i = sorted.length - 1; i >= 0; i -= 1) {
    const limit = i === sorted.length - 1 ? box.bottom : sorted[i + 1].place - gap;
    sorted[i].place = Math.min(sorted[i].place, limit);
  }
  return sorted.map((item) =>
    s("text", { class: "direct", x, y: item.place + 3.5, style: { fill: item.color } }, clipped(item.label, 22)),
  );
}

function clipped(text, most) {
  return text.length > most ? `${text.slice(0, most - 1)}…` : text;
}

function labelRoom(labels, width) {
  const longest = Math.max(0, ...labels.map((label) => Math.min(22, label.length)));
  return Math.min(longest * TEXT_WIDTH + 12, width * 0.38);
}
