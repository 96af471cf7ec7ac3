// The members in the settings: a slider for each weight, and how much of the reply each wrote.
// The sliders hold shares: to move one moves the others, so that they stay 100 % together.

const STYLES = 8; // as many as page.css has

/** The class that gives a member's pieces their colour and underline. */
export const styleOf = (index) => `member-${index % STYLES}`;

export const percent = (share) => `${Math.round(100 * share)}\u00a0%`;

export class Members {
  /** `members` as the server describes them: names and weights. */
  constructor(list, template, members) {
    this.names = members.map((member) => member.name);
    this.weights = members.map((member) => member.weight);
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
