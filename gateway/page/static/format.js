// Numbers and times in words.

const BYTES = ["B", "kB", "MB", "GB", "TB", "PB"];
const COUNTS = ["", " k", " M", " G", " T"];

function scaled(value, units) {
  let unit = 0;
  while (Math.abs(value) >= 999.5 && unit < units.length - 1) {
    value /= 1000;
    unit += 1;
  }
  const digits = Math.abs(value) < 9.95 && value % 1 ? 1 : 0;
  return [value.toFixed(digits), units[unit]];
}

export function bytes(value) {
  return scaled(value, BYTES).join(" ");
}

export function byteRate(value) {
  return value === null ? "–" : `${bytes(value)}/s`;
}

export function count(value) {
  return value === null || value === undefined ? "–" : scaled(value, COUNTS).join("");
}

export function whole(value) {
  return value.toLocaleString("en");
}

export function milliseconds(seconds) {
  if (seconds === null || !Number.isFinite(seconds)) return "–";
  const ms = seconds * 1000;
  return ms >= 1000 ? `${(ms / 1000).toFixed(1)} s` : `${ms.toFixed(ms < 10 ? 1 : 0)} ms`;
}

export function percent(part, whole) {
  return whole > 0 ? `${Math.round((100 * part) / whole)}%` : "–";
}
