// The list of conversations: open, rename, export, delete.

import { $, download, h, toast } from "./dom.js";
import * as store from "./store.js";

let menu = null;

/** Draws the list; `act` has open(id) and gone(id). */
export function drawList(currentId, act) {
  closeMenu();
  const wanted = $("search").value.trim().toLowerCase();
  const entries = store.conversations().filter((each) => matches(each, wanted));
  $("conversations").replaceChildren(...entries.map((each) => entry(each, each.id === currentId, act)));
  if (!entries.length) $("conversations").append(h("li", { class: "note" }, wanted ? "Nothing found." : "Nothing here yet."));
}

function matches(conversation, wanted) {
  if (!wanted) return true;
  if (store.titleOf(conversation).toLowerCase().includes(wanted)) return true;
  return conversation.messages.some((message) => message.content.toLowerCase().includes(wanted));
}

function entry(conversation, current, act) {
  const title = store.titleOf(conversation);
  const opener = h(
    "button",
    { type: "button", class: "entry", "aria-current": current ? "true" : null, title, onclick: () => act.open(conversation.id) },
    title,
  );
  const more = h(
    "button",
    { type: "button", class: "icon more", "aria-label": `More for ${title}`, "aria-haspopup": "menu", "aria-expanded": "false" },
    "⋯",
  );
  const item = h("li", {}, opener, more);
  more.addEventListener("click", () => (menu?.owner === more ? closeMenu() : openMenu(more, item, conversation, act)));
  return item;
}

function openMenu(owner, item, conversation, act) {
  closeMenu();
  const name = store.titleOf(conversation).replace(/[^\p{L}\p{N}]+/gu, "-").slice(0, 50) || "chat";
  const choice = (label, choose) =>
    h("button", { type: "button", role: "menuitem", onclick: () => (closeMenu(), choose()) }, label);
  const box = h(
    "div",
    { class: "menu", role: "menu" },
    choice("Rename", () => rename(item, conversation, act)),
    choice("Export as JSON", () => download(`${name}.json`, "application/json", JSON.stringify(conversation, null, 2))),
    choice("Export as Markdown", () => download(`${name}.md`, "text/markdown", store.asMarkdown(conversation))),
    choice("Delete", () => erase(conversation, act)),
  );
  box.addEventListener("keydown", (event) => walkMenu(event, box, owner));
  item.append(box);
  owner.setAttribute("aria-expanded", "true");
  menu = { owner, box };
  box.firstChild.focus();
  const room = $("sidebar").getBoundingClientRect().bottom - owner.getBoundingClientRect().bottom;
  box.classList.toggle("up", room < box.offsetHeight + 8);
}

function walkMenu(event, box, owner) {
  const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
  if (step) {
    const all = [...box.children];
    all.at((all.indexOf(document.activeElement) + step) % all.length).focus();
  } else if (event.key === "Escape" || event.key === "Tab") {
    closeMenu();
    owner.focus();
  } else return;
  event.preventDefault();
  event.stopPropagation();
}

export function closeMenu() {
  menu?.box.remove();
  menu?.owner.setAttribute("aria-expanded", "false");
  menu = null;
}

document.addEventListener("pointerdown", (event) => {
  if (menu && !menu.box.contains(event.target) && event.target !== menu.owner) closeMenu();
});

function rename(item, conversation, act) {
  const field = h("input", { class: "rename", "aria-label": "New name", maxlength: "120" });
  field.value = store.titleOf(conversation);
  let left = false;
  const leave = (keep) => {
    if (left) return;
    left = true;
    if (keep && field.value.trim()) {
      const fresh = store.find(conversation.id) ?? conversation;
      fresh.title = field.value.trim();
      store.put(fresh);
      act.renamed(fresh);
    }
    act.redraw();
  };
  field.addEventListener("keydown", (event) => {
    if (event.key === "Enter") leave(true);
    else if (event.key === "Escape") leave(false);
    event.stopPropagation();
  });
  field.addEventListener("blur", () => leave(true));
  item.replaceChildren(field);
  field.select();
}

function erase(conversation, act) {
  const kept = store.find(conversation.id) ?? conversation;
  store.remove(conversation.id);
  act.gone(conversation.id);
  toast(`“${store.titleOf(kept)}” was deleted.`, () => {
    store.put(kept);
    act.open(kept.id);
  });
}
