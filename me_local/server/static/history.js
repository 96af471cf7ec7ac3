// The list of conversations, and the bar over the one that is open: its name, and to export or delete it.
//
// Knows the controls; what they do is for `on`: { open, rename, drop, format }.

import { asJson, asMarkdown, download, fileName } from "./exporting.js";

export class History {
  constructor($, on) {
    this.$ = $;
    this.on = on;
    $("title").addEventListener("change", () => on.rename($("title").value.trim()));
    $("title").addEventListener("keydown", (event) => event.key === "Enter" && $("title").blur());
    $("export-markdown").addEventListener("click", () => this.#export("md", "text/markdown", asMarkdown));
    $("export-json").addEventListener("click", () => this.#export("json", "application/json", asJson));
    $("delete").addEventListener("click", () => this.#askToDelete());
    $("delete-dialog").addEventListener("close", () => $("delete-dialog").returnValue === "yes" && on.drop());
  }

  /** Show which conversations there are, and which is open. */
  show(found, open) {
    const items = found.map(({ id, title }) => this.#item(id, title, id === open.id));
    this.$("conversations").replaceChildren(...items);
    this.$("none").hidden = found.length > 0;
    this.$("bar").hidden = open.turns.length === 0;
    if (document.activeElement !== this.$("title")) this.$("title").value = open.title;
  }

  #askToDelete() {
    this.$("delete-dialog").returnValue = "no"; // and so it stays where Escape closes it
    this.$("delete-dialog").showModal();
  }

  #item(id, title, isOpen) {
    const [item, button] = [document.createElement("li"), document.createElement("button")];
    button.type = "button";
    button.textContent = title || "Without a name";
    if (isOpen) button.setAttribute("aria-current", "true");
    button.addEventListener("click", () => this.on.open(id));
    item.append(button);
    return item;
  }

  #export(ending, type, format) {
    const packed = this.on.packed();
    download(fileName(packed.title, ending), type, format(packed));
  }
}
