// Markdown by blocks: paragraphs, headings, lists, quotes, code, tables and rules, from text to a tree.
//
// Knows nothing of the page. What models write is meant: indented code, headings that are underlined and HTML are left
// out, so that no text changes its looks when a line behind it is half there, and lists may be indented by less than
// CommonMark wants. What is too deep or too large stays text.

import { inline } from "./inline.js";

const DEEPEST = 12; // quotes and lists within each other
const MOST_COLUMNS = 40;
const MOST_ROWS = 500;
const FENCE = /^[ \t]{0,12}(`{3,}|~{3,})(.*)$/;
const HEADING = /^ {0,3}(#{1,6})(?=[ \t]|$)/;
const QUOTE = /^ {0,3}> ?/;
const MARKER = /^([ \t]*)([-*+]|\d{1,9}[.)])(?=[ \t]|$)/;

/** The blocks of a text, each with its `start` and `end`; the text stands at `from` in the whole. */
export function parse(text, from = 0) {
  let at = from;
  const lines = text.split("\n").map((line) => {
    const placed = { text: line, at };
    at += line.length + 1;
    return placed;
  });
  return blocks(lines, 0);
}

/** The blocks that more text can change no more are all but the last, once the last one's first line is whole. */
export function settled(found, text, from = 0) {
  const last = found.at(-1);
  return last && text.indexOf("\n", last.start - from) >= 0 ? found.length - 1 : Math.max(0, found.length - 2);
}

function blocks(lines, depth) {
  const found = [];
  let index = 0;
  while (index < lines.length) {
    if (isBlank(lines[index])) {
      index++;
      continue;
    }
    const [block, next] = blockAt(lines, index, depth);
    const [first, last] = [lines[index], lines[next - 1]];
    found.push({ ...block, start: first.at, end: last.at + last.text.length });
    index = next;
  }
  return found;
}

function blockAt(lines, index, depth) {
  for (const read of depth < DEEPEST ? [fence, heading, rule, quote, list, table] : []) {
    const found = read(lines, index, depth);
    if (found) return found;
  }
  return paragraph(lines, index, depth);
}

const isBlank = (line) => line.text.trim() === "";

const cut = ({ text, at }, count) => ({ text: text.slice(count), at: at + count });

/** The columns by which a text is indented. */
function indentOf(text) {
  let columns = 0;
  for (const char of text) {
    if (char === " ") columns++;
    else if (char === "\t") columns += 4 - (columns % 4);
    else break;
  }
  return columns;
}

/** A line without its first columns, as far as they are blank. */
function outdented(line, columns) {
  let count = 0;
  for (let left = columns; left > 0 && (line.text[count] === " " || line.text[count] === "\t"); count++) {
    left -= line.text[count] === "\t" ? 4 : 1;
  }
  return cut(line, count);
}

function fence(lines, index) {
  const opened = FENCE.exec(lines[index].text);
  if (!opened || (opened[1][0] === "`" && opened[2].includes("`"))) return null;
  const columns = indentOf(lines[index].text);
  let end = index + 1;
  while (end < lines.length && !closes(lines[end].text, opened[1])) end++;
  const code = lines.slice(index + 1, end).map((line) => outdented(line, columns));
  const children = code.map(({ text, at }, i) => ({
    type: "text",
    text: i < code.length - 1 ? `${text}\n` : text,
    at,
  }));
  const language = opened[2].trim().split(/\s/, 1)[0].slice(0, 40);
  return [{ type: "codeblock", language, children }, Math.min(end + 1, lines.length)];
}

function closes(text, fence) {
  const found = FENCE.exec(text);
  return found !== null && found[1].startsWith(fence) && found[2].trim() === "";
}

function heading(lines, index) {
  const opened = HEADING.exec(lines[index].text);
  if (!opened) return null;
  let title = cut(lines[index], opened[0].length);
  title = cut(title, title.text.length - title.text.trimStart().length);
  const text = title.text.trimEnd();
  const bare = trimmedOf(text, "#");
  const closed = bare === "" || bare.endsWith(" ") || bare.endsWith("\t");
  const shown = { ...title, text: (closed ? bare : text).trimEnd() };
  return [{ type: "heading", level: opened[1].length, children: inline([shown]) }, index + 1];
}

function trimmedOf(text, char) {
  let end = text.length;
  while (text[end - 1] === char) end--;
  return text.slice(0, end);
}

function rule(lines, index) {
  return isRule(lines[index].text) ? [{ type: "rule" }, index + 1] : null;
}

function isRule(text) {
  const marks = text.replaceAll(" ", "").replaceAll("\t", "");
  return marks.length >= 3 && "-*_".includes(marks[0]) && trimmedOf(marks, marks[0]) === "";
}

function quote(lines, index, depth) {
  let end = index;
  while (end < lines.length && QUOTE.test(lines[end].text)) end++;
  if (end === index) return null;
  const inner = lines.slice(index, end).map((line) => cut(line, QUOTE.exec(line.text)[0].length));
  return [{ type: "quote", children: blocks(inner, depth + 1) }, end];
}

/** The marker of an item: its kind, its number, the columns it is indented by, and where its text begins. */
function markerOf(text) {
  const found = MARKER.exec(text);
  if (!found || isRule(text)) return null;
  const [whole, , sign] = found;
  const behind = indentOf(text.slice(whole.length));
  const space = behind >= 1 && behind <= 4 ? behind : 1;
  const indent = indentOf(text);
  const number = sign.length > 1 ? parseInt(sign, 10) : null;
  return { kind: sign.at(-1), number, indent, length: whole.length, space, column: indent + sign.length + space };
}

function list(lines, index, depth) {
  const first = markerOf(lines[index].text);
  if (!first) return null;
  const items = [];
  let [at, loose] = [index, false];
  for (let marker = first; marker;) {
    const end = endOfItem(lines, at, marker);
    items.push(itemLines(lines.slice(at, end), marker));
    at = end;
    let next = at;
    while (next < lines.length && isBlank(lines[next])) next++;
    marker = next < lines.length ? markerOf(lines[next].text) : null;
    if (marker?.kind !== first.kind || marker.indent >= first.column) break;
    loose ||= next > at;
    at = next;
  }
  const parsed = items.map((item) => blocks(item, depth + 1));
  loose ||= items.some((item, i) => item.some(isBlank) && parsed[i].filter(isParagraph).length > 1);
  const children = parsed.map((item) => ({ type: "item", children: loose ? item : item.flatMap(unwrapped) }));
  return [{ type: "list", ordered: first.number !== null, first: first.number, children }, at];
}

const isParagraph = ({ type }) => type === "paragraph";

/** A paragraph of an item without blank lines is its text. */
function unwrapped(block) {
  return isParagraph(block) ? block.children : [block];
}

/** Where an item ends: at a line that is not indented and begins something; its last line is not blank. */
function endOfItem(lines, index, marker) {
  const enough = Math.min(marker.column, marker.indent + 2);
  let end = index + 1;
  for (let at = index + 1; at < lines.length; at++) {
    if (isBlank(lines[at])) continue;
    const goesOn = end === at && !begins(lines, at) && !markerOf(lines[at].text);
    if (indentOf(lines[at].text) < enough && !goesOn) break;
    end = at + 1;
  }
  return end;
}

/** The lines of an item without what they are indented by: as its first line asks for, or the next one has it. */
function itemLines([first, ...others], { length, space, column, indent }) {
  const next = others.find((line) => !isBlank(line) && indentOf(line.text) >= Math.min(column, indent + 2));
  const columns = next ? Math.min(column, indentOf(next.text)) : column;
  return [outdented(cut(first, length), space), ...others.map((line) => outdented(line, columns))];
}

function table(lines, index) {
  const alignments = isTable(lines, index);
  if (!alignments) return null;
  let end = index + 2;
  while (end < lines.length && end < index + 2 + MOST_ROWS && !isBlank(lines[end]) && !begins(lines, end)) end++;
  const rows = [lines[index], ...lines.slice(index + 2, end)].map((line) => row(line, alignments.length));
  return [{ type: "table", alignments, rows }, end];
}

/** The trees of a row's cells, as many as there are columns. */
function row(line, columns) {
  const found = cells(line);
  return Array.from({ length: columns }, (_, column) => inline(found[column] ? [found[column]] : []));
}

/** How the columns of a table are aligned that begins at a line, or null where none does. */
function isTable(lines, index) {
  const under = lines[index + 1]?.text;
  if (!under?.includes("-") || !lines[index].text.includes("|") || !/^[ \t|:-]+$/.test(under)) return null;
  const columns = cells(lines[index + 1]).map((cell) => cell.text);
  if (!columns.every((text) => /^:?-+:?$/.test(text)) || columns.length > MOST_COLUMNS) return null;
  if (cells(lines[index]).length !== columns.length) return null;
  return columns.map((text) => (text.endsWith(":") ? (text.startsWith(":") ? "center" : "end") : "start"));
}

/** The cells of a row, trimmed. */
function cells(line) {
  const found = [];
  let from = line.text.length - line.text.trimStart().length;
  const end = line.text.trimEnd().length;
  if (line.text[from] === "|") from++;
  for (let at = from; at < end; at++) {
    if (line.text[at] === "\\") at++;
    else if (line.text[at] === "|") {
      found.push(trimmed(line, from, at));
      from = at + 1;
    }
  }
  if (from < end) found.push(trimmed(line, from, end));
  return found;
}

function trimmed(line, from, to) {
  const text = line.text.slice(from, to);
  return { text: text.trim(), at: line.at + from + text.length - text.trimStart().length };
}

/** Whether a block begins at a line that would otherwise go on with a paragraph. */
function begins(lines, index) {
  const { text } = lines[index];
  if (HEADING.test(text) || QUOTE.test(text) || isRule(text) || fence(lines.slice(index, index + 1), 0)) return true;
  const marker = markerOf(text);
  if (marker) return text.length > marker.length + 1 && (marker.number ?? 1) === 1;
  return isTable(lines, index) !== null;
}

function paragraph(lines, index, depth) {
  let end = index + 1;
  while (end < lines.length && !isBlank(lines[end]) && (depth >= DEEPEST || !begins(lines, end))) end++;
  const [first, ...others] = lines.slice(index, end);
  return [{ type: "paragraph", children: inline([outdented(first, first.text.length), ...others]) }, end];
}
