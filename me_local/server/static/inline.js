// Markdown within a paragraph: emphasis, code and links, from text to a tree. Knows nothing of blocks or of the page.
//
// A leaf is { type: "text", text, at }, where `at` is the place of its first character in the whole source, and its
// characters stand in a row there. What is no emphasis, code or link is text, HTML above all. The work grows with the
// length of the text, whatever it is.

const SCHEMES = ["http:", "https:", "mailto:"];
const DEEPEST = 20; // emphases within each other; what is deeper keeps its marks
const SPECIAL = /[\\`*_~[\]!<]|https?:\/\//g;
const ESCAPABLE = /[!-/:-@[-`{-~\n]/;
const SPACE = /\s/;
const PUNCTUATION = /[!-/:-@[-`{-~\p{P}\p{S}]/u;
const WORD = /[\p{L}\p{N}]/u;
const AUTOLINK = /<((?:https?:\/\/|mailto:)[^\s<>]{1,2000})>/y;
const BARE = /https?:\/\/[^\s<>`[\]]{1,2000}/y;
const AFTER_LINK = ".,;:!?'\"*_~)"; // what ends a sentence rather than an address
const SPACES = "[ \\t\\n]{0,9}";
const ADDRESS = /<([^<>\n]{0,2000})>|((?:[^\s()<>]|\([^\s()]{0,500}\)){1,2000})/.source;
const TITLE = /[ \t\n]{1,9}(?:"[^"]{0,500}"|'[^']{0,500}')/.source;
const TARGET = new RegExp(`\\(${SPACES}(?:${ADDRESS})(?:${TITLE})?${SPACES}\\)`, "y"); // of a link, with its brackets

/** The tree of lines, each { text, at }. */
export function inline(lines) {
  return new Inline(lines).tree();
}

/** Where a link may lead, in full, or null where it may not. */
export function destination(text) {
  try {
    const url = new URL(text);
    return SCHEMES.includes(url.protocol) ? url.href : null;
  } catch {
    return null;
  }
}

class Inline {
  constructor(lines) {
    this.lines = lines;
    this.text = lines.map((line) => line.text).join("\n");
    this.tokens = [];
    this.delimiters = []; // runs of * _ ~ that may yet be emphasis
    this.brackets = []; // that may yet begin a link
    this.ticks = null; // where runs of backticks stand, by their length
  }

  tree() {
    let at = 0;
    while (at < this.text.length) {
      SPECIAL.lastIndex = at;
      const next = SPECIAL.exec(this.text)?.index ?? this.text.length;
      this.#text(at, next);
      at = next < this.text.length ? this.#special(next) : next;
    }
    this.#emphasise(0);
    return new Tree(this.lines, this.text).of(this.tokens);
  }

  #text(from, to) {
    if (to > from) this.tokens.push({ kind: "text", from, to });
    return to;
  }

  /** Take what begins with a special character; gives where it ends. */
  #special(at) {
    const char = this.text[at];
    if (char === "\\")
      return ESCAPABLE.test(this.text[at + 1] ?? "") ? this.#text(at + 1, at + 2) : this.#text(at, at + 1);
    if (char === "`") return this.#code(at);
    if (char === "*" || char === "_" || char === "~") return this.#delimiter(at, char);
    if (char === "[") return this.#open(at, at + 1);
    if (char === "!") return this.text[at + 1] === "[" ? this.#open(at, at + 2) : this.#text(at, at + 1);
    if (char === "]") return this.#close(at);
    return char === "<" ? this.#autolink(at) : this.#bare(at);
  }

  #code(at) {
    const length = this.#run(at, "`");
    this.ticks ??= runsOfTicks(this.text);
    const places = this.ticks.get(length);
    while (places.length && places.at(-1) < at + length) places.pop();
    const end = places.at(-1);
    if (end === undefined) return this.#text(at, at + length);
    let [from, to] = [at + length, end];
    if (/^[ \n].*[^ \n].*[ \n]$/s.test(this.text.slice(from, to))) [from, to] = [from + 1, to - 1];
    this.tokens.push({ kind: "code", from, to });
    return end + length;
  }

  #run(at, char) {
    let end = at;
    while (this.text[end] === char) end++;
    return end - at;
  }

  #delimiter(at, char) {
    const end = at + this.#run(at, char);
    if (char === "~" && end - at !== 2) return this.#text(at, end);
    const [before, after] = [this.text[at - 1] ?? " ", this.text[end] ?? " "];
    const left = !SPACE.test(after) && (!PUNCTUATION.test(after) || SPACE.test(before) || PUNCTUATION.test(before));
    const right = !SPACE.test(before) && (!PUNCTUATION.test(before) || SPACE.test(after) || PUNCTUATION.test(after));
    const inWord = char === "_";
    const canOpen = left && (!inWord || !right || PUNCTUATION.test(before));
    const canClose = right && (!inWord || !left || PUNCTUATION.test(after));
    const token = {
      kind: "delimiter",
      char,
      length: end - at,
      from: at,
      to: end,
      canOpen,
      canClose,
      opens: [],
      closes: [],
    };
    this.tokens.push(token);
    this.delimiters.push(token);
    return end;
  }

  #open(from, to) {
    const token = { kind: "open", from, to, href: null, bottom: this.delimiters.length };
    this.tokens.push(token);
    this.brackets.push(token);
    return to;
  }

  #close(at) {
    const open = this.brackets.pop();
    TARGET.lastIndex = at + 1;
    const target = open && this.text[at + 1] === "(" && TARGET.exec(this.text);
    open && target && (open.href = destination(target[1] ?? target[2]));
    if (!open?.href) return this.#text(at, at + 1);
    this.brackets.length = 0; // no link within a link
    this.#emphasise(open.bottom);
    this.tokens.push({ kind: "close" });
    return TARGET.lastIndex;
  }

  #autolink(at) {
    AUTOLINK.lastIndex = at;
    const found = AUTOLINK.exec(this.text);
    const href = found && destination(found[1]);
    if (!href) return this.#text(at, at + 1);
    const end = AUTOLINK.lastIndex;
    this.tokens.push({ kind: "auto", href, from: at + 1, to: end - 1 });
    return end;
  }

  #bare(at) {
    BARE.lastIndex = at;
    let url = BARE.exec(this.text)?.[0] ?? "";
    while (AFTER_LINK.includes(url.at(-1) ?? " ") && !(url.endsWith(")") && isBalanced(url))) url = url.slice(0, -1);
    const href = WORD.test(this.text[at - 1] ?? " ") ? null : destination(url);
    if (!href) return this.#text(at, at + 1);
    this.tokens.push({ kind: "auto", href, from: at, to: at + url.length });
    return at + url.length;
  }

  /** Pair the delimiters behind the first `bottom` of them, as CommonMark does it, and forget them. */
  #emphasise(bottom) {
    const stack = [];
    const floors = new Map(); // below these nothing in the stack fits
    for (const run of this.delimiters.splice(bottom)) {
      if (run.canClose) pair(run, stack, floors);
      if (run.canOpen && run.to > run.from) stack.push(run);
    }
  }
}

function isBalanced(url) {
  return url.split("(").length >= url.split(")").length;
}

function pair(closer, stack, floors) {
  const key = `${closer.char}${closer.canOpen}${closer.length % 3}`;
  while (closer.to > closer.from) {
    const floor = floors.get(key) ?? 0;
    let at = stack.length - 1;
    while (at >= floor && !fits(stack[at], closer)) at--;
    if (at < floor) {
      floors.set(key, stack.length);
      return;
    }
    const opener = stack[at];
    const marks = Math.min(opener.to - opener.from, closer.to - closer.from, 2);
    opener.opens.push({ type: typeOf(closer.char, marks), from: opener.to - marks, to: opener.to });
    opener.to -= marks;
    closer.closes.push({ from: closer.from, to: closer.from + marks });
    closer.from += marks;
    stack.length = opener.to > opener.from ? at + 1 : at;
    for (const [other, value] of floors) floors.set(other, Math.min(value, stack.length));
  }
}

function typeOf(char, marks) {
  if (char === "~") return "deleted";
  return marks === 2 ? "strong" : "emphasis";
}

/** Whether two runs go together: the rule of three of CommonMark. */
function fits(opener, closer) {
  if (opener.char !== closer.char) return false;
  if (!opener.canClose && !closer.canOpen) return true;
  return (opener.length + closer.length) % 3 !== 0 || (opener.length % 3 === 0 && closer.length % 3 === 0);
}

/** The places of runs of backticks by their length, the last first. */
function runsOfTicks(text) {
  const places = new Map();
  for (const { 0: run, index } of text.matchAll(/`+/g)) {
    if (!places.has(run.length)) places.set(run.length, []);
    places.get(run.length).push(index);
  }
  for (const list of places.values()) list.reverse();
  return places;
}

/** Makes a tree of tokens, whose opens and closes are in pairs. */
class Tree {
  constructor(lines, text) {
    this.lines = lines;
    this.text = text;
    this.line = 0; // tokens come in the order of the text, so its lines do
    this.start = 0; // of that line in the text
    this.root = [];
    this.stack = [{ children: this.root }];
    this.links = 0;
  }

  of(tokens) {
    for (const token of tokens) this.#take(token);
    return this.root;
  }

  #take(token) {
    if (token.kind === "text" || (token.kind === "open" && !token.href)) this.#leaves(token);
    else if (token.kind === "code") this.#within({ type: "code" }, token);
    else if (token.kind === "auto") this.#automatic(token);
    else if (token.kind === "open") this.#push({ type: "link", href: token.href, children: [] });
    else if (token.kind === "close") this.stack.pop();
    else this.#marks(token);
  }

  #automatic(token) {
    const within = this.stack.some((node) => node.type === "link");
    if (within) this.#leaves(token);
    else this.#within({ type: "link", href: token.href }, token);
  }

  #within(node, range) {
    this.#push({ ...node, children: [] });
    this.#leaves(range);
    this.stack.pop();
  }

  #marks(token) {
    for (const close of token.closes) {
      if (this.stack.pop().tooDeep) this.#leaves(close);
    }
    this.#leaves(token);
    for (const open of token.opens.reverse()) {
      const tooDeep = this.stack.length > DEEPEST;
      if (tooDeep) this.#leaves(open);
      if (tooDeep) this.stack.push({ tooDeep, children: this.stack.at(-1).children });
      else this.#push({ type: open.type, children: [] });
    }
  }

  #push(node) {
    this.stack.at(-1).children.push(node);
    this.stack.push(node);
  }

  /** A leaf, or more of the one before where it goes on in the source. */
  #leaf(text, at) {
    const { children } = this.stack.at(-1);
    const last = children.at(-1);
    if (last?.type === "text" && last.at + last.text.length === at) last.text += text;
    else children.push({ type: "text", text, at });
  }

  /** Text as leaves, one for each line that it is on where something stands before lines. */
  #leaves({ from, to }) {
    while (from < to) {
      while (from > this.start + this.lines[this.line].text.length) {
        this.start += this.lines[this.line].text.length + 1;
        this.line++;
      }
      const { text, at } = this.lines[this.line];
      const end = Math.min(to, this.start + text.length + 1); // with its newline
      this.#leaf(this.text.slice(from, end), at + from - this.start);
      from = end;
    }
  }
}
