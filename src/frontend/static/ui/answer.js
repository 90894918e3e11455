// One answer while it comes: reads the stream into a message, and measures it.

import { ApiError, chat } from "./api.js";

const NUMBERS = ["temperature", "top_p", "max_tokens", "seed"];

/** The request for `conversation`'s next message; fields that are not set are left to the server. */
export function requestOf(conversation, settings, model) {
  const body = { messages: [] };
  if (model) body.model = model;
  if (settings.system.trim()) body.messages.push({ role: "system", content: settings.system });
  for (const { role, content } of conversation.messages) if (content) body.messages.push({ role, content });
  for (const name of NUMBERS) if (settings[name] !== "") body[name] = Number(settings[name]);
  return body;
}

/** Fills `message` from the stream; calls `changed` after every piece. Never throws: errors become `message.error`. */
export async function fill(message, body, key, signal, changed) {
  const sent = performance.now();
  let first = 0;
  try {
    for await (const chunk of chat(body, key, signal)) {
      const [choice] = chunk.choices;
      const { content = "", reasoning_content: thought = "" } = choice?.delta ?? {};
      if ((content || thought) && !first) message.firstMs = (first = performance.now()) - sent;
      message.content += content ?? "";
      message.reasoning += thought ?? "";
      if (choice?.finish_reason) message.reason = choice.finish_reason;
      if (chunk.usage) message.tokens = chunk.usage.completion_tokens;
      if (chunk.model) message.model = chunk.model;
      measure(message, first);
      changed();
    }
    if (!message.content && !message.reasoning) message.content = "*(an empty answer)*";
  } catch (error) {
    if (signal.aborted) message.stopped = true;
    else if (error instanceof ApiError) message.error = explain(error);
    else message.error = { title: "This page made a mistake", text: String(error), action: "Try again" };
  } finally {
    message.busy = false;
    changed();
  }
}

/** Tokens a second behind the first one, over the time since then. */
function measure(message, first) {
  const seconds = (performance.now() - first) / 1000;
  if (first && message.tokens > 1 && seconds > 0.05) message.rate = (message.tokens - 1) / seconds;
}

function explain({ message, status, code, retryAfter }) {
  if (status === 401) return { title: "The server asks for an API key", text: message, action: "Enter a key", needsKey: true };
  if (code === "context_length_exceeded")
    return { title: "The conversation is too long for this model", text: message, action: "Try again" };
  if (status === 429 || status === 503) {
    const wait = retryAfter ? ` Try again in ${retryAfter} s.` : "";
    return { title: status === 429 ? "The server is busy" : "The server cannot answer now", text: message + wait, action: "Try again" };
  }
  return { title: status ? `The server refused (${status})` : "No answer", text: message, action: "Try again" };
}
