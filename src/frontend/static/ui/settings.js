// The settings dialog, the theme button, export and import.

import { $, download, toast } from "./dom.js";
import * as store from "./store.js";

const FIELDS = ["system", "temperature", "top_p", "max_tokens", "seed"];
const THEMES = { auto: ["◐", "as the system"], light: ["☀", "light"], dark: ["☾", "dark"] };

export function openSettings(focus = null) {
  const values = store.settings();
  for (const name of FIELDS) $(name).value = values[name];
  $("key").value = store.key();
  $("keep-key").checked = store.keepsKey();
  $("settings").showModal();
  if (focus) $(focus).focus();
}

/** Wires the dialog; `changed` is called when it closed, `imported` after an import. */
export function wireSettings(changed, imported) {
  $("open-settings").addEventListener("click", () => openSettings());
  $("settings").addEventListener("close", () => {
    const values = Object.fromEntries(FIELDS.map((name) => [name, $(name).value]));
    store.saveSettings({ ...store.settings(), ...values });
    store.saveKey($("key").value.trim(), $("keep-key").checked);
    changed();
  });
  $("settings").querySelector("form").addEventListener("submit", (event) => {
    if (!event.target.reportValidity()) event.preventDefault();
  });
  $("export-all").addEventListener("click", () =>
    download("shoal-conversations.json", "application/json", JSON.stringify(store.conversations(), null, 2)),
  );
  $("import").addEventListener("change", async (event) => {
    const [file] = event.target.files;
    event.target.value = "";
    if (file) toast(await importFile(file));
    imported();
  });
  for (const dialog of document.querySelectorAll("dialog"))
    dialog.addEventListener("pointerdown", (event) => event.target === dialog && dialog.close());
}

async function importFile(file) {
  let found;
  try {
    found = JSON.parse(await file.text());
  } catch {
    return "This file is not JSON.";
  }
  const all = (Array.isArray(found) ? found : [found]).filter(store.isConversation);
  const kept = all.filter((conversation) => store.put(clean(conversation)));
  return kept.length ? `${kept.length} imported.` : "There are no conversations in this file.";
}

/** Only what this page writes. */
function clean({ id, title, created, changed, messages }) {
  const plain = messages.map(({ role, content, reasoning = "", tokens, model, reason }) => ({
    role: role === "user" ? "user" : "assistant",
    content,
    reasoning: String(reasoning),
    tokens: Number.isFinite(tokens) ? tokens : undefined,
    model: typeof model === "string" ? model : undefined,
    reason: typeof reason === "string" ? reason : undefined,
  }));
  return { id, title, created: Number(created) || changed, changed, messages: plain };
}

export function wireTheme() {
  const names = Object.keys(THEMES);
  let theme = document.documentElement.dataset.theme ?? "auto";
  const draw = () => {
    const [sign, words] = THEMES[theme];
    $("theme").textContent = sign;
    $("theme").setAttribute("aria-label", `Colours: ${words}`);
    $("theme").title = `Colours: ${words}`;
    if (theme === "auto") delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = theme;
  };
  $("theme").addEventListener("click", () => {
    theme = names[(names.indexOf(theme) + 1) % names.length];
    localStorage.setItem("shoal.theme", theme);
    draw();
  });
  draw();
}
