// What is set beside the chat, as requests have it: strategy, unit, weights, system prompt, seed and tools.

import { Members } from "./members.js";
import { Failure } from "./server.js";

export class Settings {
  constructor($) {
    this.$ = $;
    this.members = null;
    $("strategy").addEventListener("change", () => this.#onStrategy());
  }

  /** Set what the server has, as it describes its ensemble. */
  show(model) {
    const { $ } = this;
    const named = model.presets.map(({ id }) => id.slice(model.id.length + 1));
    $("named").replaceChildren(...["As in models.toml", ...named].map((name) => new Option(name)));
    $("named").onchange = () => this.#take([model, ...model.presets][$("named").selectedIndex]);
    $("presets").hidden = !named.length;
    $("seed").value = model.seed ?? "";
    this.#take(model);
  }

  /** The name of the model that has the preset, or null without one. */
  get preset() {
    return this.$("named").selectedIndex > 0 ? this.model : null;
  }

  /** How a member is asked alone; with a preset, that holds for it as well. */
  alone(name) {
    if (!this.preset) return {};
    return { weights: Object.fromEntries(this.members.names.map((other) => [other, Number(other === name)])) };
  }

  #take({ id, members, strategy, unit }) {
    const { $ } = this;
    this.model = id;
    const from = $("named").selectedIndex > 0 ? $("named").value : "models.toml";
    this.members = new Members($("members"), $("member"), $("preset"), members, from);
    $("system").placeholder = `As in ${from}`;
    choose("strategy", strategy);
    choose("unit", unit);
    this.#onStrategy();
  }

  get strategy() {
    return chosen("strategy");
  }

  get system() {
    return this.$("system").value;
  }

  /** The seed that was typed in, or null; what is no number is for the server to refuse. */
  get seed() {
    const text = this.$("seed").value.trim();
    if (text === "") return null;
    return Number.isNaN(Number(text)) ? text : Number(text);
  }

  /** Another seed than the last: a fixed one goes on by one, otherwise the server draws. */
  nextSeed() {
    if (typeof this.seed === "number") this.$("seed").value = this.seed + 1;
    return this.seed;
  }

  /** How the ensemble mixes; a single member has nothing to mix. */
  mixing() {
    return { strategy: this.strategy, unit: chosen("unit"), weights: this.members.asked() };
  }

  /** The tools, as a field of a request. Throws Failure where they are no JSON. */
  tools() {
    const text = this.$("tools").value.trim();
    try {
      return text ? { tools: JSON.parse(text) } : {};
    } catch (error) {
      throw new Failure(`The tools are no JSON: ${error.message}`);
    }
  }

  /** CE, also that of UniTE, is of whole distributions, so it has no words. */
  #onStrategy() {
    const word = document.querySelector('[name="unit"][value="word"]');
    word.disabled = this.strategy !== "me";
    if (word.disabled && word.checked) choose("unit", "token");
  }
}

function choose(name, value) {
  document.querySelector(`[name="${name}"][value="${value}"]`).checked = true;
}

function chosen(name) {
  return document.querySelector(`[name="${name}"]:checked`).value;
}
