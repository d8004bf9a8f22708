// The page: a conversation, those before it, and what is typed.

import { grounding } from "./boxes.js";
import { hasCamera, isClip, photograph, picture } from "./pictures.js";
import { ServerError, complete, modelName } from "./server.js";
import * as store from "./store.js";
import * as view from "./view.js";

const at = (id) => document.getElementById(id);
const SETTINGS = ["system", "temperature", "top_p", "max_tokens", "seed", "theme"];

let talk = store.newTalk();
let pictures = []; // data: URIs of the next question
let running = null; // AbortController
let model = null;

// --- asking ---

function body() {
  const messages = talk.messages
    .filter((message) => !message.coming && !message.error)
    .map(({ role, text, pictures }) => ({
      role,
      content: pictures?.length
        ? [...pictures.map(part), { type: "text", text }]
        : text,
    }));
  const system = at("system").value.trim();
  const asked = { model, messages: system ? [{ role: "system", content: system }, ...messages] : messages };
  for (const name of ["temperature", "top_p", "max_tokens", "seed"])
    if (at(name).value !== "") asked[name] = Number(at(name).value);
  return asked;
}

function part(url) {
  const type = isClip(url) ? "video_url" : "image_url";
  return { type, [type]: { url } };
}

async function ask() {
  const mine = talk;
  const message = { role: "assistant", text: "", coming: true };
  const asked = body();
  talk.messages.push(message);
  const node = append(message);
  const stopping = (running = new AbortController());
  show();
  const start = performance.now();
  try {
    model ?? (await connect());
    asked.model = model;
    for await (const chunk of complete(asked, at("key").value, stopping.signal)) {
      const choice = chunk.choices[0];
      if (choice?.delta.content) {
        message.firstToken ??= (performance.now() - start) / 1000;
        message.text += choice.delta.content;
        later(() => follow(() => view.update(node, message)));
      }
      message.finish = choice?.finish_reason ?? message.finish;
      message.timings = chunk.timings ?? message.timings;
    }
  } catch (error) {
    if (error.name === "AbortError") message.finish = "stopped";
    else message.error = told(error);
  }
  delete message.coming;
  if (running === stopping) running = null;
  follow(() => view.update(node, message));
  if (talk === mine) at("status").textContent = message.error ?? `Answer: ${grounding(message.text).text}`;
  show();
  await keep(mine);
}

function told(error) {
  if (error.status === 404) model = null; // another may be served by now
  if (!(error instanceof ServerError)) return `The page has failed: ${error.message}`;
  if (error.status !== 401) return error.message;
  toggle("settings", true);
  at("key").focus();
  return "The server wants a key: write it into the settings.";
}

let waiting = null;
/** Once a frame. */
function later(act) {
  if (waiting === null) requestAnimationFrame(() => (waiting(), (waiting = null)));
  waiting = act;
}

async function submit() {
  const text = at("question").value.trim();
  if (running || (!text && !pictures.length)) return;
  const message = { role: "user", text, pictures };
  talk.messages.push(message);
  talk.title ||= text.slice(0, 80) || (isClip(pictures[0]) ? "A clip" : "A picture");
  append(message);
  pictures = [];
  at("question").value = "";
  showPictures();
  keep(talk);
  await ask();
}

async function retry() {
  if (running) return;
  while (talk.messages.at(-1)?.role === "assistant") talk.messages.pop();
  render();
  await ask();
}

// --- showing ---

function append(message) {
  at("log").querySelector(".welcome")?.remove();
  const node = message.role === "user" ? view.question(message) : view.answer(message, retry);
  follow(() => {
    at("log").append(node);
    if (message.role === "assistant") view.update(node, message);
  });
  return node;
}

/** Keeps the end in sight where it is. */
function follow(change) {
  const log = at("log");
  const below = log.scrollHeight - log.scrollTop - log.clientHeight < 80;
  change();
  log.querySelectorAll(".again").forEach((button, i, all) => (button.hidden = i < all.length - 1));
  if (below) log.scrollTop = log.scrollHeight;
}

function render() {
  at("log").replaceChildren();
  if (!talk.messages.length) {
    const welcome = document.createElement("p");
    welcome.className = "welcome";
    welcome.textContent = "Drop, paste or choose a picture or a clip, and ask about it.";
    at("log").append(welcome);
  }
  talk.messages.forEach(append);
  at("log").scrollTop = at("log").scrollHeight;
  show();
}

function show() {
  at("stop").hidden = !running;
  at("send").hidden = Boolean(running);
}

function showPictures() {
  at("pictures").replaceChildren(
    ...pictures.map((uri, i) => {
      const node = view.figure(uri, i);
      const drop = document.createElement("button");
      drop.type = "button";
      drop.textContent = "×";
      drop.setAttribute("aria-label", `Remove ${view.nameOf(uri, i).toLowerCase()}`);
      drop.onclick = () => ((pictures = pictures.filter((_, j) => j !== i)), showPictures());
      node.append(drop);
      return node;
    }),
  );
}

function toggle(id, open = at(id).hidden) {
  at(id).hidden = !open;
  at(`open-${id}`).setAttribute("aria-expanded", String(open));
  if (open && matchMedia("(max-width: 44rem)").matches)
    for (const other of ["talks", "settings"]) if (other !== id) toggle(other, false);
}

// --- conversations ---

const removed = new Set(); // ids: what still comes of these is not kept

async function keep(kept) {
  if (removed.has(kept.id)) return;
  kept.time = Date.now();
  try {
    await store.save(structuredClone(kept));
  } catch {
    at("status").textContent = "This browser keeps no more conversations.";
  }
  await list();
}

async function list() {
  const talks = await store.all().catch(() => []);
  at("talks").firstElementChild.replaceChildren(...talks.map(entry));
}

function entry(found) {
  const node = document.createElement("li");
  const open = document.createElement("button");
  open.className = "quiet";
  open.textContent = found.title;
  open.setAttribute("aria-current", String(found.id === talk.id));
  open.onclick = async () => (found.id === talk.id ? closeOnPhone() : change((await store.get(found.id)) ?? found));
  const rename = small("Rename", found, async () => {
    const title = prompt("Name of the conversation", found.title)?.trim();
    if (!title) return;
    await store.save({ ...(await store.get(found.id)), title });
    if (found.id === talk.id) talk.title = title;
    await list();
  });
  const drop = small("Delete", found, async () => {
    if (!confirm(`Delete “${found.title}”? It is kept nowhere else.`)) return;
    removed.add(found.id);
    await store.remove(found.id);
    if (found.id === talk.id) change(store.newTalk());
    await list();
  });
  node.append(open, rename, drop);
  return node;
}

function small(word, found, act) {
  const node = document.createElement("button");
  node.className = "quiet";
  node.textContent = word === "Delete" ? "×" : "✎";
  node.title = word;
  node.setAttribute("aria-label", `${word} ${found.title}`);
  node.onclick = act;
  return node;
}

function change(next) {
  running?.abort();
  running = null;
  talk = next;
  if (talk.messages.at(-1)?.role === "user") talk.messages.push({ role: "assistant", text: "", finish: "stopped" });
  localStorage.setItem("talk", talk.id);
  render();
  list();
  closeOnPhone();
}

function closeOnPhone() {
  if (matchMedia("(max-width: 44rem)").matches) toggle("talks", false);
}

// --- pictures ---

async function add(files) {
  const wrong = [];
  for (const file of files) {
    try {
      pictures.push(await picture(file));
    } catch (error) {
      wrong.push(error.message);
    }
  }
  showPictures();
  wrong.forEach(complain);
  at("question").focus();
}

function complain(text) {
  at("status").textContent = text;
  const node = document.createElement("p");
  node.className = "wrong";
  node.textContent = text;
  at("pictures").append(node);
}

// --- beginnings ---

async function connect() {
  model = await modelName(at("key").value);
  at("model").textContent = model;
}

function restoreSettings() {
  for (const name of SETTINGS) {
    at(name).value = localStorage.getItem(name) ?? "";
    at(name).onchange = () => (localStorage.setItem(name, at(name).value), colours());
  }
  at("key").value = sessionStorage.getItem("key") ?? "";
  at("key").onchange = () => (sessionStorage.setItem("key", at("key").value), connect().catch(() => {}));
  colours();
}

function colours() {
  document.documentElement.dataset.theme = at("theme").value;
}

at("ask").onsubmit = (event) => (event.preventDefault(), submit());
at("question").onkeydown = (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) (event.preventDefault(), submit());
};
at("question").oninput = () => {
  at("question").style.height = "auto";
  at("question").style.height = `${at("question").scrollHeight + 2}px`;
};
document.addEventListener("keydown", (event) => event.key === "Escape" && running?.abort());
at("stop").onclick = () => running?.abort();
at("new").onclick = () => change(store.newTalk());
at("open-talks").onclick = () => toggle("talks");
at("open-settings").onclick = () => toggle("settings");
at("choose").onclick = () => at("files").click();
for (const id of ["files", "capture"])
  at(id).onchange = async () => (await add([...at(id).files]), (at(id).value = ""));
at("take").onclick = async () => {
  if (!hasCamera()) return at("capture").click();
  try {
    const shot = await photograph(at("camera"));
    if (shot) pictures.push(shot);
    showPictures();
  } catch (error) {
    complain(error.message);
  }
};
document.addEventListener("paste", (event) => {
  const files = [...(event.clipboardData?.files ?? [])];
  if (files.length) (event.preventDefault(), add(files));
});
for (const name of ["dragover", "dragleave", "drop"])
  document.addEventListener(name, (event) => {
    if (!event.dataTransfer.types.includes("Files")) return;
    event.preventDefault();
    at("ask").classList.toggle("over", name === "dragover");
    if (name === "drop") add([...event.dataTransfer.files]);
  });

restoreSettings();
const before = await store.all().catch(() => []);
change(before.find((found) => found.id === localStorage.getItem("talk")) ?? store.newTalk());
await connect().catch((error) => error.status === 401 && told(error));
