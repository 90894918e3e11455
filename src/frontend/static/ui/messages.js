// The messages of one conversation, and what can be done with each.

import { copy, h } from "./dom.js";
import { render } from "./markdown.js";

/** Element of a message; `act` has regenerate(), edit(index, text) and retry(). */
export function messageView(message, index, act) {
  const view = message.role === "user" ? userView(message, index, act) : assistantView(message, act);
  view.dataset.index = index;
  return view;
}

function userView(message, index, act) {
  const text = h("div", { class: "bubble" }, message.content);
  const edit = h("button", { type: "button", class: "tool", onclick: () => startEdit(item, message, index, act) }, "Edit");
  const copier = h("button", { type: "button", class: "tool", onclick: () => copy(message.content, copier) }, "Copy");
  const item = h("li", { class: "user" }, h("span", { class: "hidden" }, "You: "), text, h("div", { class: "tools" }, edit, copier));
  return item;
}

export function startEdit(item, message, index, act) {
  const area = h("textarea", { "aria-label": "Edit the message", rows: Math.min(12, message.content.split("\n").length + 1) });
  area.value = message.content;
  const before = [...item.childNodes];
  const cancel = () => {
    item.replaceChildren(...before);
    item.querySelector("button")?.focus();
  };
  const save = () => (area.value.trim() ? act.edit(index, area.value.trim()) : cancel());
  area.addEventListener("keydown", (event) => {
    if (event.key === "Escape") cancel();
    else if (event.key === "Enter" && !event.shiftKey && !event.isComposing) save();
    else return;
    event.preventDefault();
    event.stopPropagation();
  });
  item.replaceChildren(
    h(
      "div",
      { class: "editor" },
      area,
      h(
        "div",
        { class: "row" },
        h("span", { class: "note" }, "What follows is answered anew."),
        h("span", { class: "fill" }),
        h("button", { type: "button", onclick: cancel }, "Cancel"),
        h("button", { type: "button", class: "primary", onclick: save }, "Send"),
      ),
    ),
  );
  area.focus();
  area.setSelectionRange(area.value.length, area.value.length);
}

function assistantView(message, act) {
  const thoughts = h("div", { class: "markdown" });
  const summary = h("summary", {});
  const parts = {
    reasoning: h("details", { class: "reasoning", hidden: true }, summary, thoughts),
    summary,
    thoughts,
    text: h("div", { class: "markdown" }),
    error: h("div", { class: "error", role: "alert", hidden: true }),
    figures: h("span", { class: "figures" }),
    copier: h("button", { type: "button", class: "tool", onclick: () => copy(message.content, parts.copier) }, "Copy"),
    again: h("button", { type: "button", class: "tool again", title: "Alt R", onclick: () => act.regenerate() }, "Again"),
  };
  const item = h(
    "li",
    { class: "assistant" },
    h("span", { class: "hidden" }, "Assistant: "),
    parts.reasoning,
    parts.text,
    parts.error,
    h("div", { class: "tools" }, parts.copier, parts.again, parts.figures),
  );
  item.parts = parts;
  update(item, message, act);
  return item;
}

/** Shows what `message` holds by now. */
export function update(item, message, act) {
  const { reasoning, summary, thoughts, text, error, figures } = item.parts;
  item.classList.toggle("busy", Boolean(message.busy));
  item.classList.toggle("waiting", Boolean(message.busy && !message.content && !message.reasoning));
  item.setAttribute("aria-busy", message.busy ? "true" : "false");
  if (message.reasoning) {
    reasoning.hidden = false;
    summary.textContent = message.content || !message.busy ? "Thoughts" : "Thinking…";
    render(thoughts, message.reasoning);
  }
  render(text, message.content);
  error.hidden = !message.error;
  if (message.error)
    error.replaceChildren(
      h("strong", {}, message.error.title),
      h("p", {}, message.error.text),
      h("button", { type: "button", onclick: () => act.retry(message.error) }, message.error.action),
    );
  figures.textContent = figuresOf(message);
}

const ENDS = { length: "cut off: most tokens reached", abort: "aborted by the server", repetition: "ended: it repeated itself" };

function figuresOf({ tokens, firstMs, rate, reason, stopped, model }) {
  const told = [];
  if (tokens) told.push(`${tokens} token${tokens === 1 ? "" : "s"}`);
  if (rate) told.push(`${rate.toFixed(rate < 10 ? 1 : 0)} tokens/s`);
  if (firstMs != null) told.push(`first after ${firstMs < 1000 ? `${Math.round(firstMs)} ms` : `${(firstMs / 1000).toFixed(1)} s`}`);
  if (stopped) told.push("stopped");
  else if (ENDS[reason]) told.push(ENDS[reason]);
  if (told.length && model) told.push(model);
  return told.join(" · ");
}
