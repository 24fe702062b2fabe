// The heat map's colours: from few tokens to many, for light and dark schemes.

const STOPS = [
  [237, 244, 252],
  [158, 202, 240],
  [69, 137, 214],
  [120, 60, 170],
  [214, 40, 90],
  [255, 196, 61],
];
const DARK_ZERO = [30, 41, 59];

// The colour of a share of the scale, 0 to 1.
export function color(share) {
  const dark = matchMedia("(prefers-color-scheme: dark)").matches;
  const stops = dark ? [DARK_ZERO, ...STOPS.slice(2)] : STOPS;
  const place = share * (stops.length - 1);
  const low = Math.min(stops.length - 2, Math.floor(place));
  const mixed = stops[low].map((from, i) => Math.round(from + (stops[low + 1][i] - from) * (place - low)));
  return `rgb(${mixed.join(" ")})`;
}

// The scale ends where all but a few experts are, so that one outlier does not darken the rest.
export function scaleTop(tokens, means) {
  const ratios = tokens.flatMap((row, layer) => row.map((value) => (means[layer] ? value / means[layer] : 0)));
  ratios.sort((a, b) => a - b);
  return Math.max(2, Math.ceil(ratios[Math.ceil(ratios.length * 0.995) - 1]));
}
