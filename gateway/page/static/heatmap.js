// How many tokens each expert got, layer by layer, on a canvas; with a tooltip for pointer and keys.
//
// Colours compare an expert with the mean of its layer, since a layer's experts share its tokens.

import { color, scaleTop } from "./colors.js";
import { whole } from "./format.js";
import { hideTooltip, showTooltip } from "./svg.js";

const LABEL_WIDTH = 34;
const TOP = 7;
const RECENT_SECONDS = 30;

export class HeatMap {
  #page;
  #history = [];
  #placement = null;
  #cell = null;
  #frame = null;

  constructor(page) {
    this.#page = page;
    new ResizeObserver(() => this.draw()).observe(page.box);
    for (const radio of page.periods) radio.addEventListener("change", () => this.draw());
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.draw());
    this.#listen(page.canvas);
  }

  setPlacement(placement) {
    this.#placement = placement;
    this.draw();
  }

  // New totals of all experts. Those of other processes than before cannot be compared.
  setTotals(totals, seconds) {
    const last = this.#history.at(-1);
    if (last && last.totals.sources.join() !== totals.sources.join()) this.#history = [];
    this.#history.push({ totals, seconds });
    this.tick(seconds);
    this.draw();
  }

  // Lets go of totals that are older than the period shown.
  tick(seconds) {
    const before = this.#history.length;
    while (this.#history.length > 1 && this.#history[1].seconds <= seconds - RECENT_SECONDS) {
      this.#history.shift();
    }
    if (before !== this.#history.length) this.draw();
  }

  #tokens() {
    const now = this.#history.at(-1)?.totals;
    if (!now) return [];
    const isRecent = this.#page.periods.find((radio) => radio.checked).value === "recent";
    if (!isRecent) return now.tokens;
    const then = this.#history[0].totals.tokens;
    return now.tokens.map((row, layer) => row.map((tokens, expert) => tokens - then[layer][expert]));
  }

  draw() {
    const page = this.#page;
    const tokens = this.#tokens();
    const total = tokens.reduce((sum, row) => sum + row.reduce((a, b) => a + b, 0), 0);
    const empty = total === 0;
    page.empty.hidden = !empty;
    page.box.hidden = page.foot.hidden = page.hottest.hidden = empty;
    if (empty) {
      page.empty.textContent = this.#emptyWords();
      this.#frame = null;
      return;
    }
    const means = tokens.map((row) => row.reduce((a, b) => a + b, 0) / row.length);
    const top = scaleTop(tokens, means);
    this.#frame = { tokens, means, top, ...this.#geometry(tokens) };
    this.#paint();
    this.#paintScale(top);
    page.hottest.textContent = this.#hottestWords(tokens, means);
  }

  #emptyWords() {
    if (!this.#history.length) return "No attention group has reported its experts' load yet.";
    const isRecent = this.#page.periods.find((radio) => radio.checked).value === "recent";
    return isRecent ? "No tokens in the last 30 s." : "No tokens yet: try a prompt.";
  }

  #geometry(tokens) {
    const [layers, experts] = [tokens.length, tokens[0].length];
    const room = Math.max(200, this.#page.box.clientWidth - LABEL_WIDTH - 2);
    const ratio = window.devicePixelRatio || 1;
    const wide = Math.max(3, Math.min(72, room / experts));
    const high = Math.max(7, Math.min(30, Math.floor(420 / layers)));
    return { layers, experts, wide, high, ratio };
  }

  #paint() {
    const { layers, experts, wide, high, ratio, tokens, means, top } = this.#frame;
    const canvas = this.#page.canvas;
    const [width, height] = [LABEL_WIDTH + experts * wide + 2, TOP + layers * high + 18];
    canvas.width = Math.ceil(width * ratio);
    canvas.height = Math.ceil(height * ratio);
    canvas.style.width = `${width}px`;
    canvas.style.height = `${height}px`;
    const context = canvas.getContext("2d");
    context.scale(ratio, ratio);
    const gap = wide >= 10 && high >= 10 ? 1 : 0;
    const colors = Array.from({ length: 256 }, (_, step) => color(step / 255));
    tokens.forEach((row, layer) => {
      row.forEach((value, expert) => {
        const share = means[layer] ? value / means[layer] / top : 0;
        context.fillStyle = colors[Math.round(255 * Math.min(1, share))];
        const { x, y, width: w, height: h } = this.#rect(layer, expert);
        context.fillRect(x, y, w - gap, h - gap);
      });
    });
    this.#paintReplicas(context);
    this.#paintLabels(context);
    if (this.#cell) this.#paintCell(context);
    const layerWords = layers === 1 ? "1 layer" : `${layers} layers`;
    canvas.setAttribute("aria-label", `Tokens of ${experts} experts in ${layerWords}. ${this.#page.hottest.textContent}`);
  }

  // Whole device pixels, so that no seam between two cells is blurred.
  #rect(layer, expert) {
    const { wide, high, ratio } = this.#frame;
    const edge = (column) => LABEL_WIDTH + Math.round(column * wide * ratio) / ratio;
    return { x: edge(expert), y: TOP + layer * high, width: edge(expert + 1) - edge(expert), height: high };
  }

  // A corner of each cell whose expert has copies; a pale one where cells are small.
  #paintReplicas(context) {
    const { layers, experts, wide, high } = this.#frame;
    let any = false;
    const isSmall = Math.min(wide, high) < 12;
    const side = isSmall ? 3 : 7;
    const corners = isSmall ? [[0, "#94a3b8b0"]] : [[0, "#fff"], [1, "#111827"]];
    for (let layer = 0; layer < layers; layer += 1) {
      for (let expert = 0; expert < experts; expert += 1) {
        if (this.#holders(layer, expert).length < 2) continue;
        any = true;
        const { x, y } = this.#rect(layer, expert);
        for (const [inset, fill] of corners) {
          context.fillStyle = fill;
          context.beginPath();
          context.moveTo(x, y);
          context.lineTo(x + side + 1.5 * !isSmall - inset, y);
          context.lineTo(x, y + side + 1.5 * !isSmall - inset);
          context.fill();
        }
      }
    }
    this.#page.replicas.hidden = !any;
  }

  #paintLabels(context) {
    const { layers, experts, wide, high } = this.#frame;
    const style = getComputedStyle(this.#page.canvas);
    context.fillStyle = style.color;
    context.font = `11px ${style.fontFamily}`;
    context.textBaseline = "middle";
    context.textAlign = "right";
    const rows = Math.ceil(13 / high);
    for (let layer = 0; layer < layers; layer += rows) {
      const id = this.#history.at(-1).totals.layer_ids[layer];
      context.fillText(id, LABEL_WIDTH - 6, TOP + (layer + 0.5) * high);
    }
    context.textAlign = "center";
    const step = [1, 2, 4, 8, 16, 32, 64].find((each) => each * wide >= 26) ?? 128;
    for (let expert = 0; expert < experts; expert += step) {
      context.fillText(expert, LABEL_WIDTH + (expert + 0.5) * wide, TOP + layers * high + 10);
    }
  }

  #paintCell(context) {
    const { x, y, width, height } = this.#rect(this.#cell.layer, this.#cell.expert);
    context.lineWidth = 2;
    context.strokeStyle = getComputedStyle(this.#page.canvas).color;
    context.strokeRect(x - 1, y - 1, width + 1, height + 1);
  }

  #paintScale(top) {
    const canvas = this.#page.scale;
    const context = canvas.getContext("2d");
    for (let x = 0; x < canvas.width; x += 1) {
      context.fillStyle = color(x / (canvas.width - 1));
      context.fillRect(x, 0, 1, canvas.height);
    }
    this.#page.top.textContent = `${top} × the layer's mean or more`;
  }

  #holders(layer, expert) {
    const placement = this.#placement;
    if (!placement) return [];
    const id = this.#history.at(-1).totals.layer_ids[layer];
    const found = placement.layers.find(([layerId]) => layerId === id);
    return found ? placement.tables[found[1]][expert] : [];
  }

  #hottestWords(tokens, means) {
    const all = tokens.map((row, layer) => {
      const most = Math.max(...row);
      return { layer, expert: row.indexOf(most), ratio: means[layer] ? most / means[layer] : 0 };
    });
    all.sort((a, b) => b.ratio - a.ratio);
    const ids = this.#history.at(-1).totals.layer_ids;
    const words = all
      .slice(0, 3)
      .map(({ layer, expert, ratio }) => `layer ${ids[layer]} expert ${expert} (${ratio.toFixed(1)} ×)`);
    return `Hottest: ${words.join(", ")}`;
  }

  #cellLines({ layer, expert }) {
    const { tokens, means } = this.#frame;
    const value = tokens[layer][expert];
    const ratio = means[layer] ? value / means[layer] : 0;
    const holders = this.#holders(layer, expert);
    const lines = [
      `layer ${this.#history.at(-1).totals.layer_ids[layer]}, expert ${expert}`,
      `${whole(value)} tokens, ${ratio.toFixed(2)} × the layer's mean`,
    ];
    if (holders.length) {
      const names = holders.map((epRank) => processNames(epRank, this.#placement.etp_size));
      lines.push(`on ${names.join(" and ")}${holders.length > 1 ? ` (${holders.length} copies)` : ""}`);
    }
    return lines;
  }

  #listen(canvas) {
    canvas.addEventListener("pointermove", (event) => {
      const cell = this.#cellAt(event.offsetX, event.offsetY);
      if (cell) showTooltip(this.#cellLines(cell), event.clientX, event.clientY);
      else hideTooltip();
    });
    canvas.addEventListener("pointerleave", hideTooltip);
    canvas.addEventListener("blur", () => this.#select(null));
    canvas.addEventListener("focus", () => this.#frame && this.#select({ layer: 0, expert: 0 }));
    canvas.addEventListener("keydown", (event) => this.#onKey(event));
  }

  #onKey(event) {
    const move = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
    if (event.key === "Escape") hideTooltip();
    if (!move || !this.#frame || !this.#cell) return;
    event.preventDefault();
    const within = (value, size) => Math.max(0, Math.min(size - 1, value));
    this.#select({
      layer: within(this.#cell.layer + move[0], this.#frame.layers),
      expert: within(this.#cell.expert + move[1], this.#frame.experts),
    });
  }

  #select(cell) {
    this.#cell = cell;
    if (this.#frame) this.#paint();
    if (!cell) return hideTooltip();
    const box = this.#page.canvas.getBoundingClientRect();
    const { x, y, width, height } = this.#rect(cell.layer, cell.expert);
    const lines = this.#cellLines(cell);
    showTooltip(lines, box.left + x + width / 2, box.top + y + height / 2);
    this.#page.canvas.setAttribute("aria-label", lines.join(", "));
  }

  #cellAt(x, y) {
    if (!this.#frame) return null;
    const { wide, high, layers, experts } = this.#frame;
    const [expert, layer] = [Math.floor((x - LABEL_WIDTH) / wide), Math.floor((y - TOP) / high)];
    return expert >= 0 && expert < experts && layer >= 0 && layer < layers ? { layer, expert } : null;
  }
}

function processNames(epRank, etpSize) {
  const first = epRank * etpSize;
  return etpSize === 1 ? `expert ${first}` : `expert ${first}–${first + etpSize - 1}`;
}
