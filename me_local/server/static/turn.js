// A message and the replies to it: the ensemble's, and beside it each member's where they are compared.

import { Answer } from "./answer.js";

export class Turn {
  /** `templates` are those of a turn and of an answer; `look` is how texts are shown. */
  constructor(templates, text, look) {
    this.templates = templates;
    this.text = text;
    this.look = look;
    this.element = templates.turn.content.firstElementChild.cloneNode(true);
    this.#find(".asked").textContent = text;
    this.copy = this.#find(".copy");
    this.again = this.#find(".again");
    this.compare = this.#find(".compare");
    this.answers = [];
  }

  /** The answer of the ensemble, which the conversation goes on with. */
  get main() {
    return this.answers[0];
  }

  /** Wait for the ensemble's reply; what was there goes. */
  begin(names, model) {
    this.answers = [];
    this.#find(".answers").replaceChildren();
    this.element.dataset.state = "waiting";
    return this.#answer(names, model);
  }

  /** Wait for one more reply, beside the others; an older one of that model goes. */
  beside(names, model) {
    const [old] = this.answers.filter((answer) => answer.model === model);
    old?.element.remove();
    this.answers = this.answers.filter((answer) => answer !== old);
    this.element.dataset.state = "waiting";
    return this.#answer(names, model);
  }

  /** Show that nothing more is to come for now. */
  end() {
    this.element.dataset.state = "done";
    this.copy.disabled = !this.main?.text;
    this.again.textContent = this.main?.kept.finish === "failed" ? "Try again" : "Another reply";
    this.compare.hidden = (this.main?.names.length ?? 1) === 1;
  }

  /** Show the texts as `look` says. */
  redraw() {
    for (const answer of this.answers) answer.redraw();
  }

  /** What is said of this turn to the members: nothing where there is no reply. */
  messages(role) {
    const { text, kept } = this.main ?? { text: "", kept: { calls: [] } };
    if (!text && !kept.calls.length) return [];
    const said = { role: "assistant", content: text };
    return [{ role, content: this.text }, kept.calls.length ? { ...said, tool_calls: kept.calls.map(asCalled) } : said];
  }

  /** What `restored` takes. */
  packed() {
    return { text: this.text, answers: this.answers.map((answer) => answer.packed()) };
  }

  /** Show the answers that were kept. */
  restore(answers) {
    for (const packed of answers) this.#answer(packed.names, packed.model).restore(packed);
    this.end();
  }

  #answer(names, model) {
    const answer = new Answer(this.templates.answer, { names, model, look: this.look });
    this.answers.push(answer);
    this.#find(".answers").append(answer.element);
    this.element.classList.toggle("compared", this.answers.length > 1);
    return answer;
  }

  #find(selector) {
    return this.element.querySelector(selector);
  }
}

function asCalled({ id, name, arguments: given }) {
  return { id, type: "function", function: { name, arguments: given } };
}
