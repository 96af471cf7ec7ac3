// The members in the settings: a slider for each weight, and how much of the reply each wrote.
// The sliders hold shares: to move one moves the others, so that they stay 100 % together.

const STYLES = 8; // as many as page.css has

/** The class that gives a member's pieces their colour and underline; -1 for what no member chose. */
export const styleOf = (index) => (index < 0 ? "forced" : `member-${index % STYLES}`);

export const percent = (share) => `${Math.round(100 * share)}\u00a0%`;

/** Who had which part, in words. */
export function partsOf(shares, names) {
  return shares.map((share, index) => `${names[index]}\u00a0${percent(share)}`).join(", ");
}

export class Members {
  /** `members` as the server describes them: names and weights; `presets` is the select for weights that are ready,
   * those given of which are `from` somewhere. */
  constructor(list, template, presets, members, from) {
    this.from = from;
    this.names = members.map((member) => member.name);
    this.given = members.map((member) => member.weight);
    this.weights = this.given;
    this.presets = presets;
    presets.replaceChildren(...this.#offered().map(([name]) => new Option(name)));
    presets.disabled = this.names.length === 1;
    presets.onchange = () => this.#preset();
    this.rows = this.names.map((name, index) => this.#row(template, name, index));
    list.replaceChildren(...this.rows.map((row) => row.item));
    this.#showWeights();
    this.showShares(null);
  }

  /** Weights by name, as requests have them. */
  asked() {
    return Object.fromEntries(this.names.map((name, index) => [name, this.weights[index]]));
  }

  /** Show how much each member wrote, or null where there is nothing yet. */
  showShares(shares) {
    this.rows.forEach(({ bar, share }, index) => {
      bar.style.width = shares ? `${100 * shares[index]}%` : "0";
      share.textContent = shares ? `wrote ${percent(shares[index])}` : "wrote nothing yet";
    });
  }

  /** What the select offers: names, and their weights. */
  #offered() {
    const single = this.names.map((name, only) => [
      `Only ${name}`,
      this.names.map((_, index) => Number(index === only)),
    ]);
    const even = this.names.map(() => 1 / this.names.length);
    return [[`As in ${this.from}`, this.given], ["Even", even], ...single, ["By hand", null]];
  }

  #preset() {
    this.weights = this.#offered()[this.presets.selectedIndex][1] ?? this.weights;
    this.#showWeights();
  }

  #row(template, name, index) {
    const item = template.content.firstElementChild.cloneNode(true);
    const slider = item.querySelector("input");
    slider.setAttribute("aria-label", `Weight of ${name}`);
    slider.disabled = this.names.length === 1;
    slider.addEventListener("input", () => this.#move(index, slider.valueAsNumber / 100));
    item.querySelector(".name").textContent = name;
    item.className = styleOf(index);
    const [bar, share] = [item.querySelector(".bar > span"), item.querySelector(".share")];
    return { item, slider, shown: item.querySelector(".weight"), bar, share };
  }

  #move(moved, weight) {
    const others = 1 - this.weights[moved];
    const even = (1 - weight) / (this.names.length - 1);
    this.weights = this.weights.map((old, index) => {
      if (index === moved) return weight;
      return others > 0 ? (old * (1 - weight)) / others : even;
    });
    this.presets.selectedIndex = this.presets.length - 1;
    this.#showWeights();
  }

  #showWeights() {
    this.rows.forEach(({ slider, shown }, index) => {
      slider.value = Math.round(100 * this.weights[index]);
      slider.setAttribute("aria-valuetext", percent(this.weights[index]));
      shown.textContent = percent(this.weights[index]);
    });
  }
}
