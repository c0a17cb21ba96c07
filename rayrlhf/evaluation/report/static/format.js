// Numbers as people read them.

const MINUS = "\u2212";
const THIN = "\u2009";

function number(value, digits = 3) {
  if (value === null || value === undefined) return "–";
  if (value === 0) return "0";
  const size = Math.abs(value);
  let text;
  if (Number.isInteger(value) && size < 1e4) {
    text = String(size);
  } else if (size < 1e-3) {
    const [mantissa, exponent] = size.toExponential(1).split("e");
    text = `${mantissa.replace(/\.0$/, "")}×10${superscript(Number(exponent))}`;
  } else if (size >= 1e4) {
    text = Math.round(size).toString().replace(/\B(?=(\d{3})+$)/g, THIN);
  } else {
    const decimals = Math.max(0, Math.min(3, digits - 1 - Math.floor(Math.log10(size))));
    text = size.toFixed(decimals);
  }
  return value < 0 ? MINUS + text : text;
}

// A tick's label: no more digits than the distance between ticks asks for.
function tick(value, step) {
  if (Math.abs(value) < step / 1e6) return "0";
  const size = Math.abs(value);
  if (size < 1e-3 || size >= 1e6) return number(value, 2);
  let decimals = 0;
  while (decimals < 5 && Math.abs(step * 10 ** decimals - Math.round(step * 10 ** decimals)) > 1e-6) decimals += 1;
  const text = size >= 1e4 ? number(Math.round(size)) : size.toFixed(decimals);
  return value < 0 ? MINUS + text : text;
}

function percent(share) {
  return share === null || share === undefined ? "–" : (100 * share).toFixed(1);
}

function signed(value) {
  return (value > 0 ? "+" : "") + number(value);
}

function seconds(value) {
  if (value === null || value === undefined) return "–";
  if (value < 1) return `${Math.round(1000 * value)} ms`;
  if (value < 60) return `${value.toFixed(value < 10 ? 1 : 0)} s`;
  const minutes = Math.round(value / 60);
  if (minutes < 60) return `${minutes} min`;
  return `${Math.floor(minutes / 60)} h ${minutes % 60} min`;
}

function count(n, noun) {
  return `${n} ${noun}${n === 1 ? "" : "s"}`;
}

function superscript(exponent) {
  return [...String(exponent)].map((digit) => "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"["-0123456789".indexOf(digit)]).join("");
}
