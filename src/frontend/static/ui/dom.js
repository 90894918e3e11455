// Makes elements. Text goes in as text nodes only: nothing on this page is ever parsed as HTML.

export const $ = (id) => document.getElementById(id);

/** An element with properties (`class`, `data-…`, `aria-…` and `onclick` alike) and children. */
export function h(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false && value != null) element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child != null));
  return element;
}

export function announce(text) {
  $("status").textContent = text;
}

let toastTimer = 0;

/** A line at the bottom for a few seconds; with `undo`, a button that calls it. */
export function toast(text, undo = null) {
  const box = $("toast");
  const button = box.querySelector("button");
  box.querySelector("span").textContent = text;
  button.hidden = undo === null;
  button.onclick = () => {
    box.hidden = true;
    undo?.();
  };
  box.hidden = false;
  clearTimeout(toastTimer);
  toastTimer = setTimeout(() => (box.hidden = true), 8000);
}

export async function copy(text, button) {
  const before = button.textContent;
  try {
    await navigator.clipboard.writeText(text);
    button.textContent = "Copied";
  } catch {
    button.textContent = fallbackCopy(text) ? "Copied" : "Not allowed";
  }
  announce(button.textContent);
  setTimeout(() => (button.textContent = before), 1500);
}

/** Where the page came over plain HTTP, browsers have no clipboard object. */
function fallbackCopy(text) {
  const area = h("textarea", { class: "hidden" });
  area.value = text;
  document.body.append(area);
  area.select();
  const done = document.execCommand("copy");
  area.remove();
  return done;
}

export function download(name, media, text) {
  const url = URL.createObjectURL(new Blob([text], { type: media }));
  h("a", { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 1000);
}
