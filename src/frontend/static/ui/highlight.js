// Colours code: comments, strings, numbers, words of the language. One pass; good enough to read by, for any language.

import { h } from "./dom.js";

const WORDS = new Set(
  (
    "abstract and as assert async await base begin bool boolean break byte case catch char class const constexpr " +
    "continue crate def default defer del delete do double elif else elseif end enum except export extends extern " +
    "false False final finally float fn for foreach from func function global go goto if impl implements import in " +
    "instanceof int interface is lambda let local long loop match mod module mut namespace new nil None nonlocal not " +
    "null operator or package pass private protected pub public raise readonly ref return self short signed sizeof " +
    "static str string struct super switch template then this throw throws trait true True try type typedef typeof " +
    "union unsigned until use using val var virtual void volatile when where while with yield " +
    "select insert update create table join group order by having limit values into set " +
    "echo fi done esac export"
  ).split(" "),
);
const HASH = new Set(["python", "py", "sh", "bash", "shell", "zsh", "yaml", "yml", "toml", "ruby", "rb", "r", "perl", "make", "dockerfile", "ini"]);
const DASHES = new Set(["sql", "lua", "haskell", "hs", "elm"]);
const PLAIN = new Set(["text", "txt", "plain", "plaintext", "output", "console", "markdown", "md", ""]);
const LONGEST = 60_000;

const STRINGS = /"""[\s\S]*?(?:"""|$)|'''[\s\S]*?(?:'''|$)|"(?:\\.|[^"\\\n])*"?|'(?:\\.|[^'\\\n])*'?|`(?:\\.|[^`\\])*`?/y;
const NUMBER = /(?:0[xXbBoO][\da-fA-F_]+|\d[\d_]*(?:\.\d+)?(?:[eE][+-]?\d+)?)\w*/y;
const WORD = /[A-Za-z_]\w*/y;
const COMMENTS = { slashes: /\/\/[^\n]*|\/\*[\s\S]*?(?:\*\/|$)/y, hash: /#[^\n]*/y, dashes: /--[^\n]*/y };

/** Nodes for `code`. */
export function highlight(code, language) {
  const name = language.toLowerCase();
  if (PLAIN.has(name) || code.length > LONGEST) return [code];
  const comment = HASH.has(name) ? COMMENTS.hash : DASHES.has(name) ? COMMENTS.dashes : COMMENTS.slashes;
  const nodes = [];
  let plain = "";
  let at = 0;
  const take = (pattern) => {
    pattern.lastIndex = at;
    return pattern.exec(code)?.[0];
  };
  const push = (kind, text) => {
    if (plain) nodes.push(plain);
    plain = "";
    nodes.push(h("span", { class: kind }, text));
    at += text.length;
  };
  while (at < code.length) {
    let text;
    if ((text = take(comment))) push("c", text);
    else if ((text = take(STRINGS))) push("s", text);
    else if ((text = take(NUMBER))) push("n", text);
    else if ((text = take(WORD))) {
      if (WORDS.has(text)) push("k", text);
      else if (code[at + text.length] === "(") push("f", text);
      else {
        plain += text;
        at += text.length;
      }
    } else plain += code[at++];
  }
  if (plain) nodes.push(plain);
  return nodes;
}
