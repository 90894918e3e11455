// What the browser keeps: conversations, settings, the key. Each conversation has an entry of its own, so that two tabs
// never write over each other's.

const CONVERSATION = "shoal.conversation.";
const SETTINGS = "shoal.settings";
const KEY = "shoal.key";

export const EMPTY_SETTINGS = { system: "", temperature: "", top_p: "", max_tokens: "", seed: "", model: "" };

function read(area, name, fallback) {
  try {
    return JSON.parse(area.getItem(name)) ?? fallback;
  } catch {
    return fallback;
  }
}

/** Newest first. Entries that are no conversation are passed over. */
export function conversations() {
  return Object.keys(localStorage)
    .filter((name) => name.startsWith(CONVERSATION))
    .map((name) => read(localStorage, name, null))
    .filter(isConversation)
    .sort((one, other) => other.changed - one.changed);
}

export function find(id) {
  const found = read(localStorage, CONVERSATION + id, null);
  return isConversation(found) ? found : null;
}

export function create() {
  const id = Array.from(crypto.getRandomValues(new Uint8Array(9)), (byte) => byte.toString(16).padStart(2, "0")).join("");
  return { id, title: "", created: Date.now(), changed: Date.now(), messages: [] };
}

/** False where the browser has no room left. */
export function save(conversation) {
  conversation.changed = Date.now();
  return put(conversation);
}

/** As `save`, without making it the newest. */
export function put(conversation) {
  try {
    localStorage.setItem(CONVERSATION + conversation.id, JSON.stringify(conversation));
    return true;
  } catch {
    return false;
  }
}

export function remove(id) {
  localStorage.removeItem(CONVERSATION + id);
}

export function isConversation(value) {
  return (
    typeof value?.id === "string" &&
    typeof value.title === "string" &&
    Number.isFinite(value.changed) &&
    Array.isArray(value.messages) &&
    value.messages.every((message) => typeof message?.content === "string" && typeof message.role === "string")
  );
}

export function titleOf(conversation) {
  if (conversation.title) return conversation.title;
  const first = conversation.messages.find((message) => message.role === "user")?.content.trim() ?? "";
  const line = first.split("\n", 1)[0];
  return line.length > 60 ? `${line.slice(0, 57)}…` : line || "New chat";
}

export const settings = () => ({ ...EMPTY_SETTINGS, ...read(localStorage, SETTINGS, {}) });

export function saveSettings(values) {
  localStorage.setItem(SETTINGS, JSON.stringify(values));
}

export const key = () => sessionStorage.getItem(KEY) ?? localStorage.getItem(KEY) ?? "";
export const keepsKey = () => localStorage.getItem(KEY) !== null;

export function saveKey(value, keep) {
  sessionStorage.removeItem(KEY);
  localStorage.removeItem(KEY);
  if (value) (keep ? localStorage : sessionStorage).setItem(KEY, value);
}

export function asMarkdown(conversation) {
  const parts = conversation.messages.map(
    (message) => `## ${message.role === "user" ? "You" : (message.model ?? "Assistant")}\n\n${message.content}\n`,
  );
  return `# ${titleOf(conversation)}\n\n${parts.join("\n")}`;
}
