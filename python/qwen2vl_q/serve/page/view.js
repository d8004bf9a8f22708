// What a conversation looks like.

import { draw, grounding } from "./boxes.js";
import { markdown } from "./markdown.js";
import { isClip } from "./pictures.js";

const SMALL = 320; // pixels of the longer side; smaller pictures are enlarged to it

export const nameOf = (uri, i) => `${isClip(uri) ? "Clip" : "Picture"} ${i + 1}`;

export function figure(uri, i) {
  const node = document.createElement("figure");
  if (isClip(uri)) {
    const video = document.createElement("video");
    video.src = uri;
    video.controls = video.muted = true;
    video.setAttribute("aria-label", nameOf(uri, i));
    node.append(video);
  } else {
    const img = document.createElement("img");
    img.src = uri;
    img.alt = nameOf(uri, i);
    node.append(img);
  }
  return node;
}

export function question(message) {
  const node = document.createElement("article");
  node.className = "question";
  node.setAttribute("aria-label", "Question");
  if (message.pictures.length) {
    const shown = document.createElement("div");
    shown.className = "shown";
    shown.append(...message.pictures.map(figure));
    shown.querySelectorAll("img").forEach((img) => (img.onload = () => enlarge(img)));
    node.append(shown);
  }
  const text = document.createElement("p");
  text.textContent = message.text;
  node.append(text);
  return node;
}

function enlarge(img) {
  const longer = Math.max(img.naturalWidth, img.naturalHeight);
  if (longer < SMALL) img.style.width = `${(img.naturalWidth * SMALL) / longer}px`;
}

/** An answer's node; retry: called by its button. */
export function answer(message, retry) {
  const node = document.createElement("article");
  node.className = "answer";
  node.setAttribute("aria-label", "Answer");
  const body = document.createElement("div");
  const facts = document.createElement("div");
  facts.className = "facts";
  node.append(body, facts);
  update(node, message);
  const again = document.createElement("button");
  again.className = "quiet again";
  again.textContent = "Retry";
  again.onclick = retry;
  node.retry = again;
  return node;
}

/** Shows what has come of an answer; boxes go over the picture before it. */
export function update(node, message) {
  const { text, regions } = grounding(message.text);
  const [body, facts] = node.children;
  body.className = message.coming ? "coming" : "";
  body.replaceChildren(markdown(text));
  if (message.error) {
    const wrong = document.createElement("p");
    wrong.className = "wrong";
    wrong.textContent = message.error;
    body.append(wrong);
  }
  facts.textContent = described(message);
  if (!message.coming && node.retry) facts.append(node.retry);
  const figures = lastFigures(node);
  if (figures.length) draw(figures[figures.length - 1], regions);
}

function lastFigures(node) {
  for (let before = node.previousElementSibling; before; before = before.previousElementSibling) {
    const found = before.querySelectorAll("figure");
    if (found.length) return [...found].filter((figure) => figure.querySelector("img"));
  }
  return [];
}

/** "image 5.4 s · first token 6.1 s · 41 tokens/s" */
function described({ timings, firstToken, finish }) {
  const parts = [];
  if (timings?.encode_seconds > 0.0005) parts.push(`image ${seconds(timings.encode_seconds)}`);
  if (firstToken) parts.push(`first token ${seconds(firstToken)}`);
  if (timings?.decode_tokens_per_second) parts.push(`${Math.round(timings.decode_tokens_per_second)} tokens/s`);
  if (finish === "length") parts.push("cut at its longest");
  if (finish === "stopped") parts.push("stopped");
  return parts.join(" · ");
}

const seconds = (s) => (s < 1 ? `${Math.round(s * 1000)} ms` : `${s.toFixed(1)} s`);
