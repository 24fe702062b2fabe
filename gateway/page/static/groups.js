// The tiles on top and the table of attention groups.

import { count, milliseconds, percent, whole } from "./format.js";
import { html, setText, svg } from "./svg.js";

// Parts of a step's time, in the order in which they are drawn.
export const PHASES = [
  ["attention_s", "attention"],
  ["dispatch_s", "dispatch"],
  ["expert_wait_s", "waiting for experts"],
  ["combine_s", "combine"],
  ["sampling_s", "sampling"],
  ["other_s", "other"],
];
const HISTORY = 60;

export function noteGroups(cluster, rates, seconds) {
  for (const group of cluster.groups) {
    if (!group.metrics) continue;
    for (const [name, total] of Object.entries(group.metrics)) {
      rates.note(`dp ${group.dp_rank} ${name}`, total, seconds);
    }
  }
}

export function fillPhases(list) {
  const items = PHASES.map(([, words], place) =>
    html("li", {}, html("i", { class: `dot phase-${place}` }), words),
  );
  list.replaceChildren(...items);
}

export function fillGroups(body, cluster, rates) {
  body.replaceChildren(...cluster.groups.map((group) => groupRow(group, rates)));
}

function groupRow(group, rates) {
  const name = (total) => `dp ${group.dp_rank} ${total}`;
  const load = group.load;
  const cells = load
    ? [kvCell(load), number(load.num_running), number(load.num_waiting)]
    : [html("td", { class: "muted", colspan: "3" }, "not ready")];
  const steps = group.metrics ? rates.rate(name("steps")) : null;
  const step = group.metrics ? rates.ratio(name("step_s"), name("steps")) : null;
  return html(
    "tr",
    {},
    html("th", { scope: "row" }, `dp ${group.dp_rank}`),
    ...cells,
    number(group.metrics ? count(rates.rate(name("output_tokens"))) : "–"),
    number(steps === null ? "–" : count(steps)),
    number(milliseconds(step)),
    html("td", {}, phaseBar(name, rates)),
  );
}

function number(value) {
  return html("td", { class: "number" }, typeof value === "number" ? whole(value) : value);
}

function kvCell(load) {
  const share = percent(load.kv_tokens_used, load.kv_tokens);
  const width = load.kv_tokens > 0 ? (100 * load.kv_tokens_used) / load.kv_tokens : 0;
  const meter = svg(
    "svg",
    { class: "meter", viewBox: "0 0 100 10", preserveAspectRatio: "none", "aria-hidden": "true" },
    svg("rect", { width: 100, height: 10, class: "meter-all" }),
    svg("rect", { width, height: 10, class: width > 90 ? "meter-used full" : "meter-used" }),
  );
  const words = `${share} of ${whole(load.kv_tokens)} tokens`;
  return html("td", { class: "kv" }, meter, html("span", {}, words));
}

function phaseBar(name, rates) {
  const parts = PHASES.map(([total]) => Math.max(0, rates.rate(name(total)) ?? 0));
  const sum = parts.reduce((a, b) => a + b, 0);
  if (sum <= 0) return html("span", { class: "muted" }, "idle");
  const bar = svg("svg", { class: "phases", viewBox: "0 0 100 10", preserveAspectRatio: "none", role: "img" });
  let x = 0;
  parts.forEach((part, place) => {
    const width = (100 * part) / sum;
    bar.append(svg("rect", { x, width, height: 10, class: `phase-${place}` }));
    x += width;
  });
  const words = PHASES.map(([, phase], place) => `${phase} ${percent(parts[place], sum)}`).join(", ");
  bar.setAttribute("aria-label", words);
  bar.append(svg("title", {}, words));
  return bar;
}

// Named numbers with the last minute of each as a line where asked for.
export class Tiles {
  #tiles = new Map();
  #list;

  constructor(list) {
    this.#list = list;
  }

  set(name, value, note = "", sample = undefined) {
    let tile = this.#tiles.get(name);
    if (!tile) {
      tile = { value: html("span", { class: "value" }), note: html("span", { class: "muted" }), samples: [] };
      tile.line = svg("polyline", { "vector-effect": "non-scaling-stroke" });
      tile.spark = svg("svg", { class: "spark", viewBox: "0 0 100 24", preserveAspectRatio: "none", "aria-hidden": "true" }, tile.line);
      const shown = html("dd", {}, tile.value, tile.note);
      if (sample !== undefined) shown.append(tile.spark);
      this.#list.append(html("div", { class: "tile" }, html("dt", {}, name), shown));
      this.#tiles.set(name, tile);
    }
    setText(tile.value, value);
    setText(tile.note, note);
    if (sample !== undefined) this.#draw(tile, sample);
  }

  #draw(tile, sample) {
    tile.samples.push(sample ?? 0);
    if (tile.samples.length > HISTORY) tile.samples.shift();
    const most = Math.max(...tile.samples, 1e-9);
    const start = HISTORY - tile.samples.length;
    const points = tile.samples.map((value, index) => {
      const x = (100 * (start + index)) / (HISTORY - 1);
      return `${x.toFixed(1)},${(22 - (20 * value) / most).toFixed(1)}`;
    });
    tile.line.setAttribute("points", points.join(" "));
  }
}
