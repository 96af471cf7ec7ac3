// A message and the reply to it, as they stand on the page. What models write is only ever text.

import { percent, styleOf } from "./members.js";

const ENDS = { length: "cut at the limit", stopped: "stopped" };

/** What is known of the piece that an element shows: for the tooltip. */
export const pieceOf = new WeakMap();

export class Turn {
  constructor(template, text, names) {
    this.text = text;
    this.names = names;
    this.element = template.content.firstElementChild.cloneNode(true);
    this.#find(".asked").textContent = text;
    this.copy = this.#find(".copy");
    this.again = this.#find(".again");
    this.#find("details").addEventListener("toggle", () => this.#list());
    this.begin("");
  }

  /** Wait for a new reply; the old one goes. */
  begin(strategy) {
    this.strategy = strategy;
    this.pieces = [];
    this.sums = this.names.map(() => 0);
    this.started = null;
    this.#find(".reply").replaceChildren();
    this.#find(".notice").textContent = "";
    this.#find("details").open = false;
    this.element.dataset.state = "waiting";
    this.#figures("waiting");
  }

  /** The reply so far. */
  get reply() {
    return this.pieces.map((piece) => piece.text).join("");
  }

  /** The part of each member in the reply so far, or null. */
  get shares() {
    return this.pieces.length ? this.sums.map((sum) => sum / this.pieces.length) : null;
  }

  /** Show a piece: its text, member, probability and shares. */
  add(piece) {
    this.started ??= performance.now();
    this.element.dataset.state = "writing";
    this.pieces.push(piece);
    this.sums = this.sums.map((sum, index) => sum + piece.shares[index]);
    if (piece.text) this.#find(".reply").append(this.#span(piece));
    this.#figures();
  }

  /** Show that the reply is complete, with what the server measured. */
  finish({ finish_reason: reason, seed, timings }) {
    this.#end();
    this.#figures(ENDS[reason], `seed ${seed}`, timings.pieces_per_second);
    if (!this.reply) this.#notice("The reply is empty.");
  }

  /** Show that the reader stopped it. */
  stop() {
    this.#end();
    this.#figures(ENDS.stopped);
  }

  /** Show why there is no more of it. */
  fail(message) {
    this.#end();
    this.#figures(this.pieces.length ? "not finished" : "no reply: the conversation goes on without this message");
    this.#notice(message);
  }

  /** Select the reply, for the reader to copy it. */
  select() {
    getSelection().selectAllChildren(this.#find(".reply"));
  }

  #find(selector) {
    return this.element.querySelector(selector);
  }

  #end() {
    this.element.dataset.state = "done";
    this.copy.disabled = !this.reply;
    this.#find("details").hidden = !this.pieces.length;
  }

  #notice(message) {
    this.#find(".notice").textContent = message;
  }

  #figures(state, seed, speed) {
    const count = this.pieces.length;
    const wrote = this.shares?.map((share, index) => `${this.names[index]}\u00a0${percent(share)}`).join(", ");
    const parts = count ? [this.strategy, count === 1 ? "1 piece" : `${count} pieces`, this.#speed(speed), wrote] : [];
    this.#find(".figures").textContent = [...parts, state, seed].filter(Boolean).join(" · ");
  }

  #speed(measured) {
    const seconds = (performance.now() - this.started) / 1000;
    const speed = measured ?? (this.pieces.length - 1) / seconds;
    return Number.isFinite(speed) && speed > 0 ? `${speed.toFixed(speed < 10 ? 1 : 0)} pieces/s` : "– pieces/s";
  }

  #span(piece) {
    const span = document.createElement("span");
    span.textContent = piece.text;
    span.className = `piece ${styleOf(this.names.indexOf(piece.member))}`;
    pieceOf.set(span, { ...piece, shared: this.#shared(piece) });
    return span;
  }

  /** Who had which part in a piece of several members. */
  #shared({ shares }) {
    if (Math.max(...shares) >= 0.995) return "";
    return shares.map((share, index) => `${this.names[index]}\u00a0${percent(share)}`).join(", ");
  }

  #list() {
    if (!this.#find("details").open) return;
    this.#find("tbody").replaceChildren(...this.pieces.map((piece) => this.#line(piece)));
    this.#find("details").scrollIntoView();
  }

  #line(piece) {
    const line = document.createElement("tr");
    const member = this.#shared(piece) || piece.member;
    for (const text of [shown(piece.text), member, probability(piece)]) line.insertCell().textContent = text;
    line.firstChild.className = styleOf(this.names.indexOf(piece.member));
    return line;
  }
}

/** A probability as readers take it in: 42.3 %, and not 0.0 % where it is merely small. */
export function probability(piece) {
  const value = 100 * piece.probability;
  return value >= 0.1 || value === 0 ? `${value.toFixed(1)}\u00a0%` : "below 0.1\u00a0%";
}

/** A piece on its own, with its white space to be seen. */
function shown(text) {
  return text === "" ? "(a part of a character)" : text.replaceAll("\n", "↵").replaceAll(" ", "␣").replaceAll("\t", "⇥");
}
