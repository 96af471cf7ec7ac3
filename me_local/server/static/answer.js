// One reply as it stands on the page: thoughts, text, calls of tools, figures and pieces.
//
// Knows nothing of who asks for it, and of how a text is shown.

import { partsOf, styleOf } from "./members.js";
import { make } from "./nodes.js";
import { Shown, sharesOf } from "./shown.js";

const ENDS = { length: "cut at the limit", stopped: "stopped" };
const BETWEEN_DRAWINGS = 40; // milliseconds
const EMPTY = { strategy: "", pieces: [], calls: [], finish: null, seed: null, speed: null, problem: "" };

export class Answer {
  /** Of the ensemble, or of the member that `model` names; `names` are those of all, `look` is how texts are shown. */
  constructor(template, { names, model, look }) {
    this.names = names;
    this.model = model;
    this.look = look;
    this.element = template.content.firstElementChild.cloneNode(true);
    this.#find("h2").textContent = model.includes("/")
      ? `${model.slice(model.indexOf("/") + 1)} alone`
      : "All together";
    this.shown = new Shown(this.#find(".reply"));
    this.thoughts = new Shown(this.#find(".thoughts > div"), { bars: false });
    this.#find(".pieces").addEventListener("toggle", () => this.#list());
    this.begin("");
  }

  /** Wait for a new reply; the old one goes. */
  begin(strategy, seed = null) {
    this.kept = { ...EMPTY, strategy, seed, pieces: [], calls: [] };
    this.started = null;
    this.shown.clear();
    this.thoughts.clear();
    this.#find(".calls").replaceChildren();
    this.#find(".notice").textContent = "";
    for (const details of this.element.querySelectorAll("details")) details.open = false;
    this.element.dataset.state = "waiting";
    this.#draw();
  }

  /** The reply so far, without thoughts. */
  get text() {
    return this.shown.text;
  }

  /** The part of each member in the reply so far, or null. */
  get shares() {
    return this.kept.pieces.length ? sharesOf(this.kept.pieces) : null;
  }

  /** Take a piece: its text, the index of its member, probability and shares, and whether it is a thought. */
  add(piece) {
    this.started ??= performance.now();
    this.element.dataset.state = "writing";
    this.#take(piece);
    this.timer ??= setTimeout(() => this.#draw(), BETWEEN_DRAWINGS);
  }

  /** Take a call of a tool, or more of one. */
  call({ index, id, function: { name = "", arguments: given = "" } = {} }) {
    const call = (this.kept.calls[index] ??= { id, name: "", arguments: "" });
    call.name += name;
    call.arguments += given;
    this.timer ??= setTimeout(() => this.#draw(), BETWEEN_DRAWINGS);
  }

  /** Show that the reply is complete, with what the server measured. */
  finish({ finish_reason: finish, seed, timings }) {
    this.#end({ finish, seed, speed: timings?.pieces_per_second ?? this.#measured() });
  }

  /** Show that the reader stopped it. */
  stop() {
    this.#end({ finish: "stopped" });
  }

  /** Show why there is no more of it. */
  fail(problem) {
    this.#end({ finish: "failed", problem });
  }

  /** Show a reply that was kept. */
  restore({ pieces, ...kept }) {
    this.kept = { ...EMPTY, ...kept, pieces: [] };
    for (const [text, member, probability, shares, thought] of pieces) {
      const parts = shares ?? this.names.map((_, index) => Number(index === member));
      this.#take({ text, member, probability, shares: parts, thought: Boolean(thought) });
    }
    this.#end({ finish: kept.finish ?? "stopped" });
  }

  /** What `restore` takes; shares are left out where one member has all of a piece. */
  packed() {
    const pieces = this.kept.pieces.map(({ text, member, probability, shares, thought }) => {
      const alone = shares.every((share, index) => share === Number(index === member));
      const parts = alone ? null : shares.map((share) => Number(share.toFixed(4)));
      return [text, member, probability === null ? null : Number(probability.toPrecision(4)), parts, Number(thought)];
    });
    return { model: this.model, names: this.names, ...this.kept, pieces };
  }

  /** Show the texts as `look` says. */
  redraw() {
    this.#draw(this.element.dataset.state === "done");
  }

  /** Select the reply, for the reader to copy it. */
  select() {
    getSelection().selectAllChildren(this.#find(".reply"));
  }

  #find(selector) {
    return this.element.querySelector(selector);
  }

  #take(taken) {
    const piece = { ...taken, names: this.names };
    this.kept.pieces.push(piece);
    (piece.thought ? this.thoughts : this.shown).add(piece);
  }

  #end(kept) {
    Object.assign(this.kept, { speed: this.kept.speed ?? this.#measured() }, kept);
    this.element.dataset.state = "done";
    this.#find(".pieces").hidden = !this.kept.pieces.length;
    this.#draw(true);
    const empty = this.kept.finish !== "stopped" && !this.text && !this.kept.calls.length;
    this.#find(".notice").textContent = this.kept.problem || (empty ? "The reply is empty." : "");
  }

  #draw(complete = false) {
    clearTimeout(this.timer);
    this.timer = null;
    this.shown.draw(this.look.markdown, complete);
    this.thoughts.draw(this.look.markdown, complete);
    this.#find(".thoughts").hidden = !this.thoughts.text;
    this.#find(".thoughts > summary").textContent = this.text || complete ? "Thoughts" : "Thinking…";
    this.#find(".calls").replaceChildren(...this.kept.calls.map((call) => make(described(call))));
    this.#figures();
    this.onDraw?.();
  }

  #figures() {
    const { pieces, finish, seed, strategy } = this.kept;
    const count = pieces.length === 1 ? "1 piece" : `${pieces.length} pieces`;
    const parts = pieces.length ? [strategy, count, this.#speed(), partsOf(this.shares, this.names)] : [];
    const said = finish && seed !== null ? `seed ${seed}` : "";
    this.#find(".figures").textContent = [...parts, this.#state(), said].filter(Boolean).join(" · ");
  }

  #state() {
    const { pieces, finish } = this.kept;
    if (finish === "failed")
      return pieces.length ? "not finished" : "no reply: the conversation goes on without this message";
    if (this.element.dataset.state === "waiting") return "waiting";
    return ENDS[finish];
  }

  #speed() {
    const speed = this.kept.speed ?? this.#measured();
    return speed > 0 ? `${speed.toFixed(speed < 10 ? 1 : 0)} pieces/s` : "– pieces/s";
  }

  /** Pieces per second since the first one, or null where there is no telling. */
  #measured() {
    const speed = (1000 * (this.kept.pieces.length - 1)) / (performance.now() - this.started);
    return this.started && Number.isFinite(speed) ? speed : null;
  }

  /** Fill the details, once they are opened. */
  #list() {
    if (!this.#find(".pieces").open) return;
    const paragraphs = this.shown.paragraphs().map(({ words, shares }) => ({
      tag: "li",
      text: `${partsOf(shares, this.names)}: ${words}`,
    }));
    this.#find(".pieces ol").replaceChildren(...paragraphs.map(make));
    this.#find(".pieces tbody").replaceChildren(...this.kept.pieces.map((piece) => make(this.#line(piece))));
    this.#find(".pieces").scrollIntoView({ block: "nearest" });
  }

  #line(piece) {
    const cells = [shown(piece.text), whoOf(piece), probability(piece)];
    const children = cells.map((text, index) => ({ tag: "td", text, name: index ? "" : styleOf(piece.member) }));
    return { tag: "tr", children };
  }
}

function described({ name, arguments: given }) {
  const title = {
    tag: "p",
    children: [
      { tag: "span", text: "Call of " },
      { tag: "b", text: name },
    ],
  };
  return { tag: "div", name: "call", children: [title, { tag: "pre", attributes: { tabindex: "0" }, text: given }] };
}

/** Who wrote a piece: the member, or the part of each in one of several. */
export function whoOf({ member, names, shares, probability: known }) {
  if (member < 0) return known === null ? "not known" : "comes in any case";
  return Math.max(...shares) >= 0.995 ? names[member] : partsOf(shares, names);
}

/** A probability as readers take it in: 42.3 %, and not 0.0 % where it is merely small. */
export function probability(piece) {
  if (piece.probability === null) return "–";
  const value = 100 * piece.probability;
  return value >= 0.1 || value === 0 ? `${value.toFixed(1)}\u00a0%` : "below 0.1\u00a0%";
}

/** A piece on its own, with its white space to be seen. */
function shown(text) {
  return text === ""
    ? "(a part of a character)"
    : text.replaceAll("\n", "↵").replaceAll(" ", "␣").replaceAll("\t", "⇥");
}
