// A conversation: its turns, what of it is asked, and what of it is kept. Knows nothing of where.

const LONGEST_TITLE = 60;

export class Conversation {
  constructor(id = crypto.randomUUID?.() ?? String(Math.random()).slice(2), title = "") {
    this.id = id;
    this.title = title;
    this.turns = [];
  }

  add(turn) {
    this.title ||= turn.text.trim().split("\n", 1)[0].slice(0, LONGEST_TITLE);
    this.turns.push(turn);
  }

  /** What is asked for a reply to a turn: turns before it, those without a reply left out. */
  messages(turn, system) {
    const asked = system.trim() ? [{ role: "system", content: system }] : [];
    let role = "user";
    for (const before of this.turns.slice(0, this.turns.indexOf(turn))) {
      const said = before.messages(role);
      asked.push(...said);
      if (said.length) role = roleAfter(said[1]);
    }
    return [...asked, { role, content: turn.text }].map((message, at, all) => withId(message, all[at - 1]));
  }

  packed() {
    const turns = this.turns.map((turn) => turn.packed());
    return { version: 1, id: this.id, title: this.title, changed: Date.now(), turns };
  }
}

/** Behind a call of a tool, what is said next is its result. */
function roleAfter(said) {
  return said.tool_calls ? "tool" : "user";
}

function withId(message, before) {
  return message.role === "tool" ? { ...message, tool_call_id: before.tool_calls.at(-1).id } : message;
}

/** Whether something is what `packed` gives. */
export function isPacked(value) {
  const texts = [value?.id, value?.title];
  return texts.every((text) => typeof text === "string") && Array.isArray(value.turns) && value.turns.every(isTurn);
}

function isTurn({ text, answers }) {
  return typeof text === "string" && Array.isArray(answers) && answers.every(isAnswer);
}

function isAnswer({ model, names, pieces, calls }) {
  const lists = [names, pieces, calls].every(Array.isArray) && pieces.every(isPiece) && calls.every(isCall);
  return lists && typeof model === "string" && names.every((name) => typeof name === "string");
}

function isCall({ id, name, arguments: given }) {
  return [id, name, given].every((text) => typeof text === "string");
}

function isPiece([text, member, probability, shares]) {
  const numbers = Number.isInteger(member) && (probability === null || typeof probability === "number");
  return typeof text === "string" && numbers && (shares === null || shares.every((share) => typeof share === "number"));
}
