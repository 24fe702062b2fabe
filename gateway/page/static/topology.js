// The two tiers and what flows between them, as SVG that is drawn anew only when its shape changes.

import { byteRate, count } from "./format.js";
import { describe, html, setAttribute, setText, svg } from "./svg.js";

const STATES = ["ready", "loading", "connecting", "draining", "failed", "lost", "absent"];
const STATE_WORDS = { absent: "not joined" };
// The worst first: what a box of several processes takes its colour from.
const WORST_FIRST = ["lost", "failed", "absent", "connecting", "loading", "draining", "ready"];
const MARGIN = 8;
const MIN_HEIGHT = 330;
const MAX_WIDTH = 9;
const MANY_LINKS = 40; // from here on they are drawn thin and pale
const MAX_LABELS = 12;

export function stateWord(state) {
  return STATE_WORDS[state] ?? state;
}

export function fillLegend(list) {
  const states = STATES.map((state) => html("li", {}, html("i", { class: `dot ${state}` }), stateWord(state)));
  const transports = ["nixl", "grpc"].map((transport) => {
    const line = svg("path", { d: "M0 5H26", class: `link busy ${transport}`, "stroke-width": 3 });
    return html("li", {}, svg("svg", { class: "line", width: 26, height: 10, "aria-hidden": "true" }, line), transport);
  });
  list.replaceChildren(...states, ...transports);
}

export class Topology {
  #host;
  #table;
  #shape = "";
  #boxes = { attn: [], expert: [] };
  #links = new Map();
  #seen = new Set();
  #last = null;

  constructor(host, table) {
    this.#host = host;
    this.#table = table;
    new ResizeObserver(() => {
      if (this.#last) this.update(this.#last.cluster, this.#last.rates);
    }).observe(host);
  }

  update(cluster, rates) {
    this.#last = { cluster, rates };
    this.#remember(cluster);
    const width = Math.max(300, Math.floor(this.#host.clientWidth));
    const shape = JSON.stringify([
      width,
      ["attn", "expert"].map((role) => cluster.nodes[role].map((node) => [node.name, node.group, node.states.length])),
      cluster.links.map((link) => [link.source, link.target]),
    ]);
    if (shape !== this.#shape) {
      this.#draw(cluster, width);
      this.#shape = shape;
    }
    this.#color(cluster, rates);
    this.#fillTable(cluster, rates);
  }

  // A rank that was there and is not any more is lost; one that has never been is not joined.
  #remember(cluster) {
    for (const role of ["attn", "expert"]) {
      for (const node of cluster.nodes[role]) {
        node.states.forEach((state, index) => {
          if (state !== "absent") this.#seen.add(`${role} ${node.first_rank + index}`);
        });
      }
    }
  }

  #states(role, node) {
    return node.states.map((state, index) =>
      state === "absent" && this.#seen.has(`${role} ${node.first_rank + index}`) ? "lost" : state,
    );
  }

  #draw(cluster, width) {
    const most = Math.max(cluster.nodes.attn.length, cluster.nodes.expert.length);
    const boxHeight = most > 8 ? 34 : 50;
    const boxWidth = Math.min(190, Math.floor(width * 0.34));
    const height = Math.max(Math.min(MIN_HEIGHT, most * 110), most * (boxHeight + 10)) + 2 * MARGIN;
    const drawing = svg("svg", { viewBox: `0 0 ${width} ${height}`, width, height, role: "group" });
    drawing.setAttribute("aria-label", "Attention processes on the left, expert processes on the right");
    const lines = svg("g", { class: "links" });
    const labels = svg("g", { class: "link-labels", "aria-hidden": "true" });
    drawing.append(lines);
    this.#boxes.attn = this.#drawTier(drawing, cluster, "attn", 1, boxWidth, boxHeight, height);
    const right = width - boxWidth - 1;
    this.#boxes.expert = this.#drawTier(drawing, cluster, "expert", right, boxWidth, boxHeight, height);
    drawing.append(labels);
    this.#drawLinks(cluster, lines, labels, boxWidth + 1, right);
    this.#host.replaceChildren(drawing);
  }

  #drawTier(drawing, cluster, role, x, boxWidth, boxHeight, height) {
    const nodes = cluster.nodes[role];
    const pitch = (height - 2 * MARGIN) / nodes.length;
    return nodes.map((node, place) => {
      const middle = MARGIN + pitch * (place + 0.5);
      const box = svg("g", { class: "box", role: "img", tabindex: "0", transform: `translate(${x} ${middle - boxHeight / 2})` });
      box.append(svg("rect", { width: boxWidth, height: boxHeight, rx: 6 }));
      const tall = boxHeight > 40;
      const title = svg("text", { x: 12, y: tall ? 20 : 15, class: "name" }, node.name);
      const group = svg("text", { x: boxWidth - 10, y: tall ? 20 : 15, class: "group" }, node.group);
      const words = svg("text", { x: 12, y: tall ? 38 : 28, class: "words" });
      box.append(title, words, svg("rect", { class: "edge", width: 4, height: boxHeight, rx: 2 }));
      if (boxWidth >= 130) box.append(group);
      const entry = { box, words, middle, lines: [] };
      describe(box, () => entry.lines);
      drawing.append(box);
      return entry;
    });
  }

  #drawLinks(cluster, lines, labels, left, right) {
    this.#links.clear();
    const bend = (right - left) * 0.45;
    const labelled = cluster.links.length <= MAX_LABELS && right - left >= 230;
    for (const link of cluster.links) {
      const from = this.#boxes.attn[link.source].middle;
      const to = this.#boxes.expert[link.target].middle;
      const path = `M${left} ${from}C${left + bend} ${from} ${right - bend} ${to} ${right} ${to}`;
      const line = svg("path", { d: path, class: "link" });
      const label = svg("text", { x: left + (right - left) * 0.36, y: from + (to - from) * 0.3 + 4 });
      lines.append(line);
      if (labelled) labels.append(label);
      const entry = { line, label, lines: [] };
      // A wide unseen path takes the pointer, since the seen one may be hair-thin.
      const target = svg("path", { d: path, class: "link-target" });
      describe(target, () => entry.lines);
      lines.append(target);
      this.#links.set(linkName(link), entry);
    }
  }

  #color(cluster, rates) {
    const members = new Map(cluster.members.map((member) => [member.name, member]));
    const flows = nodeFlows(cluster, rates);
    for (const role of ["attn", "expert"]) {
      cluster.nodes[role].forEach((node, place) => {
        const states = this.#states(role, node);
        const entry = this.#boxes[role][place];
        const worst = WORST_FIRST.find((state) => states.includes(state)) ?? "ready";
        setAttribute(entry.box, "class", `box ${worst}`);
        const flow = flows[role][place];
        const words = stateWords(states);
        const narrow = entry.box.querySelector(".group") === null;
        setText(entry.words, flow > 0 && worst === "ready" && !narrow ? `${words} · ${byteRate(flow)}` : words);
        entry.lines = nodeLines(node, states, members.get(node.name), flow);
        setAttribute(entry.box, "aria-label", entry.lines.join(", "));
      });
    }
    this.#colorLinks(cluster, rates);
  }

  #colorLinks(cluster, rates) {
    const all = cluster.links.map((link) => linkRate(link, rates) ?? 0);
    const most = Math.max(1, ...all);
    const many = all.length > MANY_LINKS ? " many" : "";
    const widest = many ? 2.5 : MAX_WIDTH;
    cluster.links.forEach((link, index) => {
      const entry = this.#links.get(linkName(link));
      const share = all[index] / most;
      setAttribute(entry.line, "class", `link ${all[index] > 0 ? "busy" : "idle"} ${link.transport}${many}`);
      setAttribute(entry.line, "stroke-width", (0.8 + (widest - 0.8) * Math.sqrt(share)).toFixed(1));
      setText(entry.label, all[index] > 0 ? tokenRate(link, rates) : link.transport);
      entry.lines = linkLines(cluster, link, rates);
    });
  }

  #fillTable(cluster, rates) {
    if (!this.#table.closest("details").open) return;
    const rows = cluster.links.map((link) =>
      html(
        "tr",
        {},
        html("th", { scope: "row" }, cluster.nodes.attn[link.source].name),
        html("td", {}, cluster.nodes.expert[link.target].name),
        html("td", {}, link.transport),
        html("td", { class: "number" }, byteRate(rates.rate(`${linkName(link)} dispatch`))),
        html("td", { class: "number" }, byteRate(rates.rate(`${linkName(link)} combine`))),
        html("td", { class: "number" }, `${count(rates.rate(`${linkName(link)} dispatches`))}/s`),
        html("td", { class: "number" }, tokenRate(link, rates)),
      ),
    );
    this.#table.replaceChildren(...rows);
  }
}

export function linkName(link) {
  return `link ${link.source}>${link.target}`;
}

export function noteLinks(cluster, rates, seconds) {
  for (const link of cluster.links) {
    rates.note(`${linkName(link)} dispatch`, link.dispatch_bytes, seconds);
    rates.note(`${linkName(link)} combine`, link.combine_bytes, seconds);
    rates.note(`${linkName(link)} dispatches`, link.dispatches, seconds);
    rates.note(`${linkName(link)} tokens`, link.dispatch_tokens, seconds);
  }
}

// Bytes per second in both directions.
export function linkRate(link, rates) {
  const [out, back] = ["dispatch", "combine"].map((kind) => rates.rate(`${linkName(link)} ${kind}`));
  return out === null || back === null ? null : out + back;
}

function nodeFlows(cluster, rates) {
  const flows = { attn: cluster.nodes.attn.map(() => 0), expert: cluster.nodes.expert.map(() => 0) };
  for (const link of cluster.links) {
    const rate = linkRate(link, rates) ?? 0;
    flows.attn[link.source] += rate;
    flows.expert[link.target] += rate;
  }
  return flows;
}

function stateWords(states) {
  if (states.length === 1) return stateWord(states[0]);
  const present = WORST_FIRST.filter((state) => states.includes(state));
  return present.map((state) => `${states.filter((each) => each === state).length} ${stateWord(state)}`).join(", ");
}

function nodeLines(node, states, member, flow) {
  const lines = [`${node.name} (${node.group}): ${stateWords(states)}`];
  if (member?.detail) lines.push(member.detail);
  if (member?.address) lines.push(`${member.address}, ${member.device}, pid ${member.pid}`);
  if (member?.experts) lines.push(`${member.experts} experts per layer`);
  lines.push(`${byteRate(flow)} to and from the other tier`);
  return lines;
}

function linkLines(cluster, link, rates) {
  const rate = (kind) => rates.rate(`${linkName(link)} ${kind}`);
  return [
    `${cluster.nodes.attn[link.source].name} → ${cluster.nodes.expert[link.target].name} by ${link.transport}`,
    `dispatch ${byteRate(rate("dispatch"))}, combine ${byteRate(rate("combine"))}`,
    `${tokenRate(link, rates)} in ${count(rate("dispatches"))} dispatches/s`,
  ];
}

// Tokens that go out; each counts in every layer.
function tokenRate(link, rates) {
  return `${count(rates.rate(`${linkName(link)} tokens`))} tok/s`;
}
