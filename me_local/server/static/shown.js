// A text of pieces as it stands on the page, while it grows: as Markdown or as it was written, with who wrote what.
//
// Knows how blocks and their parts are shown, and who wrote which. Blocks that more text cannot change are left alone.

import { parse, settled } from "./markdown.js";
import { styleOf } from "./members.js";
import { patch } from "./nodes.js";

const TAGS = {
  paragraph: "p",
  quote: "blockquote",
  item: "li",
  emphasis: "em",
  strong: "strong",
  deleted: "s",
  code: "code",
};

const TO_THE_LEFT = /[\p{Script=Arabic}\p{Script=Hebrew}\p{Script=Nko}\p{Script=Syriac}\p{Script=Thaana}]/u;

export class Shown {
  /** In `element`; `bars` tells whether each paragraph has a bar of who wrote it. */
  constructor(element, { bars = true } = {}) {
    this.element = element;
    this.bars = bars;
    this.clear();
  }

  clear() {
    this.text = "";
    this.pieces = [];
    this.ends = []; // where each piece ends in the text
    this.markdown = null;
    this.#restart();
  }

  /** Take one more piece, to be seen when it is drawn. */
  add(piece) {
    this.pieces.push(piece);
    this.text += piece.text;
    this.ends.push(this.text.length);
  }

  /** Show all of the text, as Markdown or as it was written. */
  draw(markdown, complete = false) {
    if (markdown !== this.markdown || complete) this.#begin(markdown);
    const found = markdown ? parse(this.text.slice(this.from), this.from) : whole(this.text);
    const fresh = [...this.described.slice(0, this.done), ...found.map((block, i) => this.#block(block, found[i + 1]))];
    patch(this.element, this.described, fresh, this.done);
    this.described = fresh;
    if (!markdown) return;
    const count = settled(found, this.text.slice(this.from), this.from);
    this.done += count;
    if (count) this.from = found[count].start;
  }

  /** The paragraphs, each with its first words and the part of each member. */
  paragraphs() {
    const found = this.markdown ? parse(this.text) : whole(this.text);
    return found.map((block, index) => ({
      words: this.text.slice(block.start, Math.min(block.end, block.start + 60)).replaceAll("\n", " "),
      shares: this.#shares(block.start, found[index + 1]?.start),
    }));
  }

  /** Read the text from its beginning; what is right on the page stays. */
  #begin(markdown) {
    this.markdown = markdown;
    this.from = 0;
    this.done = 0;
  }

  #restart() {
    this.#begin(this.markdown);
    this.described = [];
    this.element.replaceChildren();
  }

  #block(block, next) {
    const content = this.#described(block);
    const dir = directionOf(this.text.slice(block.start, block.start + 200));
    const bars = this.bars ? [bar(this.#shares(block.start, next?.start))] : [];
    return { tag: "div", name: "block", attributes: { dir }, children: [...bars, content] };
  }

  #described(node) {
    if (node.type === "codeblock") return this.#code(node);
    if (node.type === "table") return this.#table(node);
    if (node.type === "rule") return { tag: "hr" };
    if (node.type === "plain") return { tag: "p", name: "plain", children: this.#children(node) };
    return { ...shape(node), children: this.#children(node) };
  }

  #children(node) {
    return node.children.flatMap((child) => (child.type === "text" ? this.#leaf(child) : [this.#described(child)]));
  }

  #code({ language, children }) {
    const button = { tag: "button", name: "copy-code", attributes: { type: "button" }, text: "Copy" };
    const head = { tag: "div", name: "head", children: [{ tag: "span", text: language }, button] };
    const code = { tag: "code", children: children.flatMap((leaf) => this.#leaf(leaf)) };
    const attributes = { tabindex: "0", role: "group", "aria-label": "Code" };
    return { tag: "div", name: "code", children: [head, { tag: "pre", attributes, children: [code] }] };
  }

  #table({ alignments, rows: [head, ...rows] }) {
    const row = (cells, tag, attributes) => ({
      tag: "tr",
      children: cells.map((children, i) => ({
        tag,
        name: alignments[i],
        attributes,
        children: this.#children({ children }),
      })),
    });
    const parts = [
      { tag: "thead", children: [row(head, "th", { scope: "col" })] },
      { tag: "tbody", children: rows.map((cells) => row(cells, "td")) },
    ];
    const attributes = { tabindex: "0", role: "group", "aria-label": "Table" };
    return { tag: "div", name: "scroll", attributes, children: [{ tag: "table", children: parts }] };
  }

  /** A text, parted where its pieces end. */
  #leaf({ text, at }) {
    const parts = [];
    for (let index = this.#pieceAt(at), from = at; from < at + text.length; index++) {
      const end = Math.min(this.ends[index], at + text.length);
      if (end > from) parts.push(this.#part(text.slice(from - at, end - at), this.pieces[index]));
      from = end;
    }
    return parts;
  }

  #part(text, piece) {
    return { tag: "span", name: `piece ${styleOf(piece.member)}`, text, about: piece };
  }

  /** The index of the piece that has a character. */
  #pieceAt(place) {
    let [low, high] = [0, this.ends.length];
    while (low < high) {
      const middle = (low + high) >> 1;
      if (this.ends[middle] <= place) low = middle + 1;
      else high = middle;
    }
    return low;
  }

  /** The part of each member in the pieces that begin from one place up to another, and what no one chose. */
  #shares(from, to = this.text.length) {
    const pieces = this.pieces.slice(this.#pieceAt(from), this.#pieceAt(to - 1) + 1);
    return sharesOf(pieces);
  }
}

/** The part of each member in some pieces; what a constraint left no choice in counts for nobody. */
export function sharesOf(pieces) {
  const sums = [];
  for (const { shares } of pieces) shares.forEach((share, index) => (sums[index] = (sums[index] ?? 0) + share));
  return sums.map((sum) => sum / pieces.length);
}

/** The direction of the first letter; `dir=auto` looks through the whole block for each piece that it gets. */
function directionOf(text) {
  const letter = text.match(/\p{L}/u)?.[0] ?? "";
  return TO_THE_LEFT.test(letter) ? "rtl" : "ltr";
}

function whole(text) {
  return text ? [{ type: "plain", start: 0, end: text.length, children: [{ type: "text", text, at: 0 }] }] : [];
}

/** For those who see it: figures for all are in the details of a reply. */
function bar(shares) {
  const rest = 1 - shares.reduce((sum, share) => sum + share, 0);
  const part = (share, index) => ({ tag: "span", name: styleOf(index), grow: share.toFixed(3) });
  const children = [...shares.map(part), part(rest, -1)].filter(({ grow }) => grow > 0);
  return { tag: "div", name: "who", attributes: { "aria-hidden": "true" }, children };
}

function shape(node) {
  if (node.type === "heading") return { tag: `h${Math.min(6, node.level + 2)}` };
  if (node.type === "list")
    return { tag: node.ordered ? "ol" : "ul", attributes: node.ordered ? { start: node.first } : {} };
  if (node.type === "link") return { tag: "a", attributes: linked(node.href) };
  return { tag: TAGS[node.type] };
}

function linked(href) {
  return { href, title: href, target: "_blank", rel: "noopener noreferrer" };
}
