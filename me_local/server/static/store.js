// Keeps conversations in this browser, each under a key of its own, so that two tabs do not overwrite each other's.
//
// It is bounded, and nothing is thrown away to make room: what goes wrong is said in a line.

import { isPacked } from "./conversation.js";

const PREFIX = "me-local:";
const MOST = 200; // conversations
const LARGEST = 4_000_000; // characters of all of them; browsers give about five million
const NO_ROOM = "There is no room for more conversations: this one is not kept. Delete some.";
const LOOK = "me-local-look";

export class Store {
  /** The conversations that are kept, the latest first, and how many cannot be read. */
  list() {
    const found = [];
    let broken = 0;
    for (const key of this.#keys()) {
      const packed = parsed(localStorage.getItem(key));
      if (isPackedSafely(packed)) found.push(packed);
      else broken++;
    }
    found.sort((one, other) => other.changed - one.changed);
    return { found, broken };
  }

  /** Keep a conversation; gives why it cannot be, or "". */
  keep(packed) {
    try {
      const [key, text] = [PREFIX + packed.id, JSON.stringify(packed)];
      const others = this.#keys().filter((other) => other !== key);
      const size = others.reduce((sum, other) => sum + localStorage.getItem(other).length, text.length);
      if (others.length >= MOST || size > LARGEST) return NO_ROOM;
      localStorage.setItem(key, text);
      return "";
    } catch (error) {
      return `This browser does not keep the conversation (${error.name}). Export it, or delete others.`;
    }
  }

  drop(id) {
    try {
      localStorage.removeItem(PREFIX + id);
    } catch {
      // what cannot be reached holds nothing
    }
  }

  /** How texts were last shown, or `usual`. */
  look(usual) {
    try {
      return { ...usual, ...parsed(localStorage.getItem(LOOK)) };
    } catch {
      return usual;
    }
  }

  keepLook(look) {
    try {
      localStorage.setItem(LOOK, JSON.stringify(look));
    } catch {
      // it is as usual next time
    }
  }

  #keys() {
    try {
      return Object.keys(localStorage).filter((key) => key.startsWith(PREFIX));
    } catch {
      return [];
    }
  }
}

function parsed(text) {
  try {
    return JSON.parse(text);
  } catch {
    return null;
  }
}

function isPackedSafely(value) {
  try {
    return isPacked(value);
  } catch {
    return false;
  }
}
