// Markdown to DOM nodes. What a model writes is hostile: every piece of it becomes a text node, links lead only to
// http, https and mailto, images become links, and nesting has an end. Each scan is linear, or nearly so.

import { copy, h } from "./dom.js";
import { highlight } from "./highlight.js";

const DEEPEST = 8;
const LONGEST_LINK = 2000;
const FENCE = /^ {0,3}(`{3,}|~{3,})\s*([^\s`]*)[^`]*$/;
const HEADING = /^ {0,3}(#{1,6})\s+(.*?)\s*#*\s*$/;
const RULE = /^ {0,3}(?:(?:\*\s*){3,}|(?:-\s*){3,}|(?:_\s*){3,})$/;
const ITEM = /^(\s*)([-*+]|\d{1,9}[.)])(\s+|$)/;
const QUOTE = /^ {0,3}> ?/;
const TABLE_RULE = /^\s*\|?\s*:?-+:?\s*(?:\|\s*:?-+:?\s*)*\|?\s*$/;

/** Makes `container` show `text`; blocks that stayed the same keep their nodes, as a stream grows. */
export function render(container, text) {
  const fresh = blocks(text.replace(/\r\n?/g, "\n").split("\n"));
  const shown = container.shownBlocks ?? [];
  let same = 0;
  while (same < fresh.length && same < shown.length && fresh[same].source === shown[same].source) same++;
  while (container.childNodes.length > same) container.lastChild.remove();
  for (const block of fresh.slice(same)) container.append(show(block, 0));
  container.shownBlocks = fresh;
}

/** Top-level blocks: {kind, lines, source}. */
function blocks(lines) {
  const found = [];
  let at = 0;
  const push = (kind, end, more = {}) => {
    const own = lines.slice(at, end);
    found.push({ kind, lines: own, source: kind + "\n" + own.join("\n"), ...more });
    at = end;
  };
  while (at < lines.length) {
    const line = lines[at];
    if (!line.trim()) at++;
    else if (FENCE.test(line)) pushFence(lines, at, push);
    else if (HEADING.test(line)) push("heading", at + 1);
    else if (RULE.test(line)) push("rule", at + 1);
    else if (QUOTE.test(line)) push("quote", endOf(lines, at, (each) => QUOTE.test(each)));
    else if (ITEM.test(line)) push("list", endOfList(lines, at));
    else if (line.includes("|") && TABLE_RULE.test(lines[at + 1] ?? ""))
      push("table", endOf(lines, at, (each) => each.includes("|")));
    else push("paragraph", endOf(lines, at, isProse));
  }
  return found;
}

function pushFence(lines, at, push) {
  const [, mark, language] = FENCE.exec(lines[at]);
  const closing = new RegExp(`^ {0,3}${mark[0]}{${mark.length},}\\s*$`);
  let end = at + 1;
  while (end < lines.length && !closing.test(lines[end])) end++;
  push("code", Math.min(end + 1, lines.length), { language, code: lines.slice(at + 1, end).join("\n") });
}

function endOf(lines, at, belongs) {
  let end = at + 1;
  while (end < lines.length && belongs(lines[end])) end++;
  return end;
}

function isProse(line) {
  return line.trim() !== "" && ![FENCE, HEADING, RULE, QUOTE, ITEM].some((pattern) => pattern.test(line));
}

function endOfList(lines, at) {
  const numbered = /\d/.test(ITEM.exec(lines[at])[2]);
  let end = at + 1;
  while (end < lines.length) {
    const line = lines[end];
    const item = ITEM.exec(line);
    const next = lines[end + 1] ?? "";
    if (!line.trim()) {
      if (!ITEM.test(next) && !/^\s{2,}\S/.test(next)) break;
    } else if (item && item[1].length < 2) {
      if (/\d/.test(item[2]) !== numbered || RULE.test(line)) break;
    } else if (!/^\s/.test(line) && (!isProse(line) || !lines[end - 1].trim())) break;
    end++;
  }
  return end;
}

function show(block, depth) {
  switch (block.kind) {
    case "code":
      return codeBlock(block.code, block.language);
    case "heading": {
      const [, marks, text] = HEADING.exec(block.lines[0]);
      return h(`h${Math.min(6, marks.length + 1)}`, {}, ...inline(text));
    }
    case "rule":
      return h("hr");
    case "quote":
      return h("blockquote", {}, ...inner(block.lines.map((line) => line.replace(QUOTE, "")), depth));
    case "list":
      return list(block.lines, depth);
    case "table":
      return table(block.lines);
    default:
      return h("p", {}, ...inline(block.lines.map((line) => line.trimStart()).join("\n")));
  }
}

function inner(lines, depth) {
  if (depth >= DEEPEST) return [lines.join("\n")];
  return blocks(lines).map((block) => show(block, depth + 1));
}

function list(lines, depth) {
  const first = ITEM.exec(lines[0]);
  const numbered = /\d/.test(first[2]);
  const items = [];
  for (const line of lines) {
    const item = ITEM.exec(line);
    if (item && item[1].length <= first[1].length + 1) items.push({ width: item[0].length || 2, lines: [line.slice(item[0].length)] });
    else {
      const { width, lines: own } = items.at(-1);
      const indent = Math.min(width, line.length - line.trimStart().length);
      own.push(line.slice(indent));
    }
  }
  const start = numbered ? parseInt(first[2], 10) : 1;
  const properties = numbered && start !== 1 ? { start } : {};
  return h(numbered ? "ol" : "ul", properties, ...items.map((item) => listItem(item.lines, depth)));
}

function listItem(lines, depth) {
  const task = /^\[([ xX])\]\s+/.exec(lines[0]);
  if (task) lines[0] = lines[0].slice(task[0].length);
  const children = inner(lines, depth);
  // A tight item's only paragraph needs no paragraph of its own.
  const flat = children.flatMap((child) => (child.tagName === "P" ? [...child.childNodes] : [child]));
  const loose = children.filter((child) => child.tagName === "P").length > 1;
  const box = task && h("input", { type: "checkbox", disabled: true, checked: task[1] !== " " });
  return h("li", task ? { class: "task" } : {}, box, ...(loose ? children : flat));
}

function table(lines) {
  const cells = (line) => line.trim().replace(/^\||\|$/g, "").split(/(?<!\\)\|/).map((cell) => cell.trim().replaceAll("\\|", "|"));
  const sides = cells(lines[1]).map((cell) => (cell.endsWith(":") ? (cell.startsWith(":") ? "middle" : "end") : null));
  const row = (line, tag) => h("tr", {}, ...cells(line).map((cell, n) => h(tag, { class: sides[n] }, ...inline(cell))));
  const body = lines.slice(2).map((line) => row(line, "td"));
  return h("div", { class: "table" }, h("table", {}, h("thead", {}, row(lines[0], "th")), h("tbody", {}, ...body)));
}

function codeBlock(code, language) {
  const button = h("button", { type: "button", class: "link", onclick: () => copy(code, button) }, "Copy");
  return h(
    "figure",
    { class: "code" },
    h("figcaption", {}, h("span", {}, language || "code"), button),
    h("pre", { tabindex: "0" }, h("code", {}, ...highlight(code, language))),
  );
}

const DELIMITERS = [
  ["**", "strong"],
  ["__", "strong"],
  ["~~", "del"],
  ["*", "em"],
  ["_", "em"],
];
const isWord = (character) => character !== undefined && /[\p{L}\p{N}_]/u.test(character);
const isSpace = (character) => character === undefined || /\s/.test(character);

/** Nodes for text within a block. */
function inline(text, depth = 0) {
  const nodes = [];
  const unclosed = new Set();
  let plain = "";
  let at = 0;
  const push = (node, end) => {
    if (plain) nodes.push(plain);
    plain = "";
    nodes.push(node);
    at = end;
  };
  while (at < text.length) {
    const found = depth < DEEPEST ? special(text, at, depth, unclosed) : null;
    if (found?.node) push(found.node, found.end);
    else if (found) {
      plain += found.plain;
      at = found.end;
    } else plain += text[at++];
  }
  if (plain) nodes.push(plain);
  return nodes;
}

/** What begins at `at`: {node, end} or {plain, end}; null for an ordinary character. */
function special(text, at, depth, unclosed) {
  const character = text[at];
  if (character === "\n") return { node: h("br"), end: at + 1 };
  if (character === "\\" && /[!-/:-@[-`{-~]/.test(text[at + 1] ?? "")) return { plain: text[at + 1], end: at + 2 };
  if (character === "`") return codeSpan(text, at, unclosed);
  if (character === "[" || (character === "!" && text[at + 1] === "[")) return link(text, at, depth);
  if (character === "h" && !isWord(text[at - 1])) return bareLink(text, at);
  if ("*_~".includes(character)) return emphasis(text, at, depth, unclosed);
  return null;
}

function codeSpan(text, at, unclosed) {
  let ticks = 1;
  while (text[at + ticks] === "`") ticks++;
  const mark = "`".repeat(ticks);
  if (unclosed.has(mark)) return { plain: mark, end: at + ticks };
  for (let end = at + ticks; (end = text.indexOf(mark, end)) !== -1; ) {
    let length = ticks;
    while (text[end + length] === "`") length++;
    if (length === ticks) return { node: h("code", {}, text.slice(at + ticks, end).trim()), end: end + ticks };
    end += length;
  }
  unclosed.add(mark);
  return { plain: mark, end: at + ticks };
}

function link(text, at, depth) {
  const open = text[at] === "!" ? at + 1 : at;
  const limit = Math.min(text.length, open + LONGEST_LINK);
  let close = open + 1;
  for (let nested = 1; close < limit; close++) {
    if (text[close] === "[") nested++;
    else if (text[close] === "]" && --nested === 0) break;
  }
  if (text[close] !== "]" || text[close + 1] !== "(") return null;
  const end = text.indexOf(")", close);
  if (end === -1 || end > close + LONGEST_LINK) return null;
  const [target] = text.slice(close + 2, end).trim().split(/\s+/, 1);
  const label = text.slice(open + 1, close);
  const node = anchor(target, inline(label || target, depth + 1));
  return node && { node, end: end + 1 };
}

function bareLink(text, at) {
  const pattern = /https?:\/\/[^\s<>"'`*|]{1,2000}/y;
  pattern.lastIndex = at;
  const found = pattern.exec(text)?.[0].replace(/[.,;:!?)\]]+$/, "");
  const node = found && anchor(found, [found]);
  return node ? { node, end: at + found.length } : null;
}

function anchor(target, children) {
  let url;
  try {
    url = new URL(target);
  } catch {
    return null;
  }
  if (!["http:", "https:", "mailto:"].includes(url.protocol)) return null;
  return h("a", { href: url.href, target: "_blank", rel: "noopener noreferrer nofollow" }, ...children);
}

function emphasis(text, at, depth, unclosed) {
  const [mark, tag] = DELIMITERS.find(([each]) => text.startsWith(each, at)) ?? [];
  if (!mark) return null;
  const start = at + mark.length;
  const opens = !isSpace(text[start]) && !(mark[0] === "_" && isWord(text[at - 1]));
  if (!opens || unclosed.has(mark)) return { plain: mark, end: start };
  for (let end = start; (end = text.indexOf(mark, end + 1)) !== -1; ) {
    const closes =
      !isSpace(text[end - 1]) &&
      !(mark[0] === "_" && isWord(text[end + mark.length])) &&
      !(mark.length === 1 && (text[end + 1] === mark || text[end - 1] === mark));
    if (closes) return { node: h(tag, {}, ...inline(text.slice(start, end), depth + 1)), end: end + mark.length };
  }
  unclosed.add(mark);
  return { plain: mark, end: start };
}
