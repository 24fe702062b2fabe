// Small helpers that make elements.

const SVG = "http://www.w3.org/2000/svg";

function make(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

export function svg(name, attributes = {}, ...children) {
  return make(document.createElementNS(SVG, name), attributes, children);
}

export function html(name, attributes = {}, ...children) {
  return make(document.createElement(name), attributes, children);
}

// Changes only what differs, so that focus, selection and screen readers are left in peace.
export function setText(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

export function setAttribute(node, name, value) {
  if (node.getAttribute(name) !== String(value)) node.setAttribute(name, value);
}

const tooltip = document.getElementById("tooltip");

// Shows lines of text beside a point of the window, and keeps them inside it.
export function showTooltip(lines, x, y) {
  tooltip.replaceChildren(...lines.map((line) => html("div", {}, line)));
  tooltip.hidden = false;
  const { width, height } = tooltip.getBoundingClientRect();
  const left = x + 14 + width > innerWidth ? x - width - 14 : x + 14;
  const top = y + 14 + height > innerHeight ? y - height - 14 : y + 14;
  tooltip.style.left = `${Math.max(4, left)}px`;
  tooltip.style.top = `${Math.max(4, top)}px`;
}

export function hideTooltip() {
  tooltip.hidden = true;
}

// Gives an element a tooltip for pointers and for the keyboard; `lines` is called when it shows.
export function describe(node, lines) {
  node.addEventListener("pointermove", (event) => showTooltip(lines(), event.clientX, event.clientY));
  node.addEventListener("pointerleave", hideTooltip);
  node.addEventListener("blur", hideTooltip);
  node.addEventListener("focus", () => {
    const box = node.getBoundingClientRect();
    showTooltip(lines(), box.left + box.width / 2, box.top + box.height / 2);
  });
  node.addEventListener("keydown", (event) => {
    if (event.key === "Escape") hideTooltip();
  });
}
