// Markdown as DOM nodes: what a model writes never becomes HTML.

const INLINE = /(`+)([\s\S]+?)\1|\*\*([\s\S]+?)\*\*|(?<![\w*])\*([^*\s][^*]*?)\*(?!\w)|\[([^[\]]+)\]\(([^)\s]+)\)/;
const DEEPEST = 16; // quotes inside quotes; more stay text

/** Nodes of a text; depth: of the quotes it stands in. */
export function markdown(text, depth = 0) {
  const lines = text.split("\n");
  const found = document.createDocumentFragment();
  for (let i = 0; i < lines.length; ) {
    const [node, next] = block(lines, i, depth);
    if (node) found.append(node);
    i = next;
  }
  return found;
}

/** The block that begins at line i, and the line behind it. */
function block(lines, i, depth) {
  const line = lines[i];
  if (!line.trim()) return [null, i + 1];
  if (/^\s*```/.test(line)) return fenced(lines, i);
  const heading = /^#{1,6}\s+(.*)$/.exec(line);
  if (heading) return [element("h3", heading[1]), i + 1];
  if (/^\s*([-*_])(\s*\1){2,}\s*$/.test(line)) return [document.createElement("hr"), i + 1];
  if (/^>/.test(line) && depth < DEEPEST) return quoted(lines, i, depth);
  if (item(line)) return list(lines, i);
  if (line.includes("|") && /^\s*\|?\s*:?-+:?\s*(\|\s*:?-+:?\s*)*\|?\s*$/.test(lines[i + 1] ?? "")) return table(lines, i);
  let end = i + 1;
  while (end < lines.length && lines[end].trim() && !/^\s*(```|#{1,6}\s|>)/.test(lines[end]) && !item(lines[end])) end++;
  return [element("p", lines.slice(i, end).join("\n")), end];
}

function fenced(lines, i) {
  let end = i + 1;
  while (end < lines.length && !/^\s*```\s*$/.test(lines[end])) end++;
  const pre = document.createElement("pre");
  const code = document.createElement("code");
  code.textContent = lines.slice(i + 1, end).join("\n");
  pre.append(code);
  return [pre, end + 1];
}

function quoted(lines, i, depth) {
  let end = i;
  while (end < lines.length && /^>/.test(lines[end])) end++;
  const quote = document.createElement("blockquote");
  quote.append(markdown(lines.slice(i, end).map((line) => line.replace(/^>\s?/, "")).join("\n"), depth + 1));
  return [quote, end];
}

const item = (line) => /^(\s*)([-*+]|\d{1,9}[.)])\s+(.*)$/.exec(line);

function list(lines, i) {
  const [, indent, mark] = item(lines[i]);
  const ordered = /\d/.test(mark);
  const node = document.createElement(ordered ? "ol" : "ul");
  if (ordered) node.start = parseInt(mark, 10);
  let end = i;
  while (end < lines.length) {
    const found = item(lines[end]);
    if (!found || found[1].length < indent.length) break;
    if (found[1].length > indent.length) {
      const [inner, next] = list(lines, end);
      (node.lastElementChild ?? node).append(inner);
      end = next;
    } else if (/\d/.test(found[2]) !== ordered) {
      break;
    } else {
      node.append(element("li", found[3]));
      end++;
    }
  }
  return [node, end];
}

function table(lines, i) {
  const cells = (line) => line.trim().replace(/^\||\|$/g, "").split("|").map((cell) => cell.trim());
  const row = (line, kind) => {
    const tr = document.createElement("tr");
    tr.append(...cells(line).map((cell) => element(kind, cell)));
    return tr;
  };
  const node = document.createElement("table");
  node.append(row(lines[i], "th"));
  let end = i + 2;
  for (; end < lines.length && lines[end].includes("|"); end++) node.append(row(lines[end], "td"));
  return [node, end];
}

function element(kind, text) {
  const node = document.createElement(kind);
  inline(node, text);
  return node;
}

function inline(parent, text) {
  let found;
  while ((found = INLINE.exec(text))) {
    parent.append(text.slice(0, found.index));
    const [whole, ticks, code, strong, em, label, address] = found;
    if (ticks) {
      const node = document.createElement("code");
      node.textContent = code;
      parent.append(node);
    } else if (strong) parent.append(element("strong", strong));
    else if (em) parent.append(element("em", em));
    else parent.append(/^https?:\/\//i.test(address) ? link(label, address) : whole);
    text = text.slice(found.index + whole.length);
  }
  parent.append(text);
}

function link(label, address) {
  const node = document.createElement("a");
  node.href = address;
  node.rel = "noopener noreferrer";
  node.target = "_blank";
  node.textContent = label;
  return node;
}
