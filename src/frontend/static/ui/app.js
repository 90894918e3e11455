// The chat page: which conversation is shown, and what keys and buttons do.

import { fill, requestOf } from "./answer.js";
import { models } from "./api.js";
import { $, announce, h, toast } from "./dom.js";
import { messageView, startEdit, update } from "./messages.js";
import { openSettings, wireSettings, wireTheme } from "./settings.js";
import { closeMenu, drawList } from "./sidebar.js";
import * as store from "./store.js";

const IDEAS = [
  "Explain how a rainbow forms, in three sentences.",
  "Write a haiku about the sea.",
  "Show me a Python function that reverses a string.",
  "What should I cook with eggs and tomatoes?",
];
const AT_END_PX = 80;

let current = store.create();
/** Conversation id → {controller, conversation}: answers go on while another conversation is shown. */
const running = new Map();
let follows = true;

const act = {
  open,
  redraw: () => drawList(current.id, act),
  renamed: (fresh) => {
    if (fresh.id === current.id) current.title = fresh.title;
    const other = running.get(fresh.id);
    if (other) other.conversation.title = fresh.title;
  },
  gone: (id) => {
    running.get(id)?.controller.abort();
    running.delete(id);
    if (id === current.id) open(null);
    else act.redraw();
  },
  regenerate: () => {
    if (running.has(current.id)) return;
    while (current.messages.at(-1)?.role === "assistant") current.messages.pop();
    if (current.messages.length) answer();
  },
  edit: (index, text) => {
    running.get(current.id)?.controller.abort();
    running.delete(current.id);
    current.messages.length = index;
    send(text);
  },
  retry: (error) => (error.needsKey ? openSettings("key") : act.regenerate()),
};

function open(id) {
  current = running.get(id)?.conversation ?? store.find(id) ?? store.create();
  history.replaceState(null, "", current.messages.length ? `#${current.id}` : location.pathname);
  follows = true;
  draw();
  toggleSidebar(false);
  if (!matchMedia("(pointer: coarse)").matches) $("prompt").focus();
}

function draw() {
  $("messages").replaceChildren(...current.messages.map((message, index) => messageView(message, index, act)));
  $("welcome").hidden = current.messages.length > 0;
  document.title = current.messages.length ? `${store.titleOf(current)} · Shoal` : "Shoal · Chat";
  act.redraw();
  drawComposer();
  toEnd();
}

function drawComposer() {
  const busy = running.has(current.id);
  $("send").hidden = busy;
  $("stop").hidden = !busy;
  $("send").disabled = !$("prompt").value.trim();
}

function send(text) {
  current.messages.push({ role: "user", content: text });
  follows = true;
  answer();
}

async function answer() {
  const conversation = current;
  const message = { role: "assistant", content: "", reasoning: "", busy: true };
  const body = requestOf(conversation, store.settings(), $("model").value);
  const controller = new AbortController();
  conversation.messages.push(message);
  running.set(conversation.id, { controller, conversation });
  keep(conversation);
  history.replaceState(null, "", `#${conversation.id}`);
  draw();
  announce("Answering");
  let due = false;
  const changed = () => {
    if (due) return;
    due = true;
    requestAnimationFrame(() => {
      due = false;
      show(conversation, message);
    });
  };
  await fill(message, body, store.key(), controller.signal, changed);
  if (running.get(conversation.id)?.controller === controller) running.delete(conversation.id);
  if (conversation.messages.includes(message) && !isGone(conversation)) keep(conversation);
  show(conversation, message);
  if (conversation === current) {
    drawComposer();
    announce(message.error ? message.error.title : message.stopped ? "Stopped" : "The answer is complete");
  }
  act.redraw();
}

/** Deleted while its answer came. */
const isGone = (conversation) => store.find(conversation.id) === null;

function show(conversation, message) {
  if (conversation !== current) return;
  const item = $("messages").children[conversation.messages.indexOf(message)];
  if (item) update(item, message, act);
  if (follows) toEnd();
}

function keep(conversation) {
  const plain = { ...conversation, messages: conversation.messages.map(({ busy, ...message }) => message) };
  if (!store.save(plain)) toast("The browser has no room left: export and delete old conversations.");
  conversation.changed = plain.changed;
}

function toEnd() {
  $("scroller").scrollTop = $("scroller").scrollHeight;
}

function submit(event) {
  event?.preventDefault();
  const text = $("prompt").value.trim();
  if (!text || running.has(current.id)) return;
  $("prompt").value = "";
  fit();
  send(text);
}

const stop = () => running.get(current.id)?.controller.abort();

function editLast() {
  const index = current.messages.findLastIndex((message) => message.role === "user");
  if (index >= 0) startEdit($("messages").children[index], current.messages[index], index, act);
}

/** The field is as high as its text, up to a limit. */
function fit() {
  const area = $("prompt");
  area.style.height = "auto";
  area.style.height = `${Math.min(area.scrollHeight, innerHeight * 0.4)}px`;
  drawComposer();
}

function toggleSidebar(shown) {
  document.body.classList.toggle("sidebar-open", shown);
  $("shade").hidden = !shown;
  $("open-sidebar").setAttribute("aria-expanded", String(shown));
  if (shown) $("new-chat").focus();
}

async function drawModels() {
  const select = $("model");
  try {
    const found = await models(store.key());
    const wanted = store.settings().model;
    select.replaceChildren(...found.map(({ id }) => h("option", { value: id, selected: id === wanted }, id)));
    select.disabled = found.length < 2;
    $("welcome-model").textContent = found.length ? `You are talking to ${select.value}.` : "";
  } catch (error) {
    select.replaceChildren(h("option", { value: "" }, error.status === 401 ? "API key needed" : "No connection"));
    $("welcome-model").textContent = error.message;
    if (error.status === 401 && !$("settings").open) openSettings("key");
  }
}

const SHORTCUTS = { KeyN: () => open(null), KeyR: () => act.regenerate(), KeyS: () => openSettings() };

function onKey(event) {
  if (event.isComposing || document.querySelector("dialog[open]")) return;
  const typing = ["INPUT", "TEXTAREA", "SELECT"].includes(event.target.tagName);
  if (event.key === "Escape") {
    if (document.body.classList.contains("sidebar-open")) toggleSidebar(false);
    closeMenu();
    stop();
  } else if (event.altKey && !event.ctrlKey && !event.metaKey && SHORTCUTS[event.code]) SHORTCUTS[event.code]();
  else if (!typing && event.key === "/") $("prompt").focus();
  else if (!typing && event.key === "?") $("shortcuts").showModal();
  else return;
  event.preventDefault();
}

function wire() {
  $("composer").addEventListener("submit", submit);
  $("prompt").addEventListener("input", fit);
  $("prompt").addEventListener("keydown", (event) => {
    if (event.isComposing) return;
    if (event.key === "Enter" && !event.shiftKey) submit(event);
    else if (event.key === "ArrowUp" && !$("prompt").value) editLast();
  });
  $("stop").addEventListener("click", stop);
  $("new-chat").addEventListener("click", () => open(null));
  $("search").addEventListener("input", act.redraw);
  $("open-sidebar").addEventListener("click", () => toggleSidebar(true));
  $("close-sidebar").addEventListener("click", () => toggleSidebar(false));
  $("shade").addEventListener("click", () => toggleSidebar(false));
  $("open-shortcuts").addEventListener("click", () => $("shortcuts").showModal());
  $("to-end").addEventListener("click", toEnd);
  $("scroller").addEventListener("scroll", () => {
    const { scrollHeight, scrollTop, clientHeight } = $("scroller");
    follows = scrollHeight - scrollTop - clientHeight < AT_END_PX;
    $("to-end").hidden = follows;
  });
  $("model").addEventListener("change", () => {
    store.saveSettings({ ...store.settings(), model: $("model").value });
    $("welcome-model").textContent = `You are talking to ${$("model").value}.`;
  });
  $("ideas").append(
    ...IDEAS.map((idea) => h("button", { type: "button", onclick: () => send(idea) }, idea)),
  );
  document.addEventListener("keydown", onKey);
  addEventListener("storage", act.redraw);
  addEventListener("hashchange", () => open(location.hash.slice(1)));
  wireSettings(drawModels, act.redraw);
  wireTheme();
}

wire();
open(location.hash.slice(1));
drawModels();
