// What screen readers say while a reply grows: whole sentences, as they are finished.

const SENTENCE = /^.*[.!?:\n](?=\s)/s;

export class Speech {
  constructor(log) {
    this.log = log;
    this.rest = "";
  }

  /** Forget what was said, so that it is not found twice on the page. */
  begin() {
    this.rest = "";
    this.log.replaceChildren();
  }

  /** Take more of a reply, and say what is whole. */
  add(text) {
    this.rest += text;
    const whole = this.rest.match(SENTENCE)?.[0];
    if (!whole) return;
    this.rest = this.rest.slice(whole.length);
    this.say(whole);
  }

  /** Say what is left, and a last word. */
  end(word = "End of the reply.") {
    this.say(this.rest);
    this.say(word);
    this.rest = "";
  }

  say(text) {
    if (!text.trim()) return;
    const line = document.createElement("p");
    line.textContent = text.trim();
    this.log.append(line);
  }
}
