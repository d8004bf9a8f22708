// Boxes that the model writes, in thousandths of the picture's sides.

const BOX = String.raw`<\|box_start\|>(?:\(\s*\d+\s*,\s*\d+\s*\)[\s,]*)+<\|box_end\|>`;
const LABEL = String.raw`<\|object_ref_start\|>((?:(?!<\|object_ref_)[\s\S])*)<\|object_ref_end\|>\s*`;
const REGION = new RegExp(`(?:${LABEL})?((?:${BOX})+)`, "g");
const UNFINISHED = /<\|box_start\|>[\d\s(),]*$/;
const MARK = /<\|(?:object_ref|box|quad)_(?:start|end)\|>/g;
const SVG = "http://www.w3.org/2000/svg";

/** {text, regions}: what is left of an answer, and its boxes [{label, points: [[x, y], ...]}]. */
export function grounding(answer) {
  const regions = [];
  const text = answer.replace(REGION, (_, label, boxes) => {
    for (const box of boxes.matchAll(new RegExp(BOX, "g"))) {
      const points = [...box[0].matchAll(/\(\s*(\d+)\s*,\s*(\d+)\s*\)/g)].map(([, x, y]) => [clamp(x), clamp(y)]);
      if (points.length <= 2) regions.push({ label: (label ?? "").trim(), points });
    }
    return label ?? boxes.replace(MARK, "");
  });
  return { text: text.replace(UNFINISHED, "").replace(MARK, ""), regions };
}

const clamp = (digits) => Math.min(1000, Number(digits));

/** Draws them over a figure's picture, instead of those drawn before. */
export function draw(figure, regions) {
  figure.querySelectorAll("svg, figcaption").forEach((node) => node.remove());
  if (!regions.length) return;
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("viewBox", "0 0 1000 1000");
  svg.setAttribute("preserveAspectRatio", "none");
  svg.setAttribute("role", "img");
  svg.setAttribute("aria-label", regions.map(spoken).join("; "));
  for (const { label, points } of regions) {
    const [[x1, y1], [x2, y2]] = points.length === 2 ? points : [points[0], points[0]];
    const box = { x: Math.min(x1, x2), y: Math.min(y1, y2), width: Math.abs(x2 - x1), height: Math.abs(y2 - y1) };
    if (points.length === 1) svg.append(shape("circle", { cx: x1, cy: y1, r: 12 }));
    else svg.append(shape("rect", box), shape("rect", box));
    if (label) figure.append(caption(label, box));
  }
  figure.append(svg);
}

const spoken = ({ label, points }) => `${label || "region"} at ${points.map((point) => point.join(", ")).join(" to ")}`;

function shape(kind, attributes) {
  const node = document.createElementNS(SVG, kind);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  return node;
}

function caption(label, { x, y, width }) {
  const node = document.createElement("figcaption");
  node.textContent = label;
  if (x + width / 2 > 500) node.style.right = `${100 - (x + width) / 10}%`;
  else node.style.left = `${x / 10}%`;
  if (y > 80) node.style.bottom = `${100 - y / 10}%`;
  else node.style.top = `${y / 10}%`;
  return node;
}
