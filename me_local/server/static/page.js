// The page: what its controls do, and how a conversation goes.

import { Conversation } from "./conversation.js";
import { copyCode, copyReply } from "./copying.js";
import { History } from "./history.js";
import { Failure, ensemble, reply } from "./server.js";
import { Settings } from "./settings.js";
import { Speech } from "./speech.js";
import { Store } from "./store.js";
import { recall, remember } from "./tab.js";
import { Turn } from "./turn.js";
import { showTips } from "./tip.js";

const KEY = "me-local-key";
const OPEN = "me-local-open"; // in this tab

const $ = (id) => document.getElementById(id);
const speech = new Speech($("spoken"));
const settings = new Settings($);
const store = new Store();
const history = new History($, { open, rename, drop, packed: () => conversation.packed() });
const look = store.look({ markdown: true, colours: true });

let model = null;
let conversation = new Conversation();
let running = null; // what stops the reply that is being made
let atEnd = true; // of the conversation, so that what comes next is to be in sight

async function start() {
  showTips($("tip"), $("turns"));
  connectControls();
  showLook();
  reopen();
  await connect();
}

function connectControls() {
  $("composer").addEventListener("submit", onSend);
  $("message").addEventListener("keydown", onMessageKey);
  document.addEventListener("keydown", (event) => event.key === "Escape" && running?.abort());
  $("stop").addEventListener("click", () => running?.abort());
  $("new").addEventListener("click", () => change(new Conversation()));
  for (const [button, panel] of [
    ["fold", "settings"],
    ["fold-history", "history"],
  ]) {
    $(button).addEventListener("click", () => fold($(button), $(panel)));
  }
  $("show").addEventListener("change", onLook);
  $("turns").addEventListener("click", onTurns);
  $("key-dialog").addEventListener("cancel", (event) => event.preventDefault());
  $("key-form").addEventListener("submit", onKey);
  $("conversation").addEventListener("scroll", () => (atEnd = isAtEnd()));
  addEventListener("storage", () => history.show(store.list().found, conversation));
  addEventListener("pagehide", () => keep());
}

/** Learn what the ensemble is, with a key where one is asked for. */
async function connect() {
  try {
    model = await ensemble(recall(KEY));
  } catch (failure) {
    if (failure.status === 401) askKey();
    else problem(failure.message);
    return;
  }
  if ($("key-dialog").open) $("key-dialog").close();
  settings.show(model);
  $("message").focus();
}

function askKey() {
  $("key-problem").textContent = recall(KEY) ? "The server did not take that key." : "";
  if (!$("key-dialog").open) $("key-dialog").showModal();
  $("key").focus();
}

async function onKey(event) {
  event.preventDefault();
  remember(KEY, $("key").value);
  $("key").value = "";
  await connect();
}

function onMessageKey(event) {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  $("composer").requestSubmit();
}

async function onSend(event) {
  event.preventDefault();
  const text = $("message").value;
  if (running || !text.trim()) return;
  problem("");
  if (!model) await connect();
  if (!model) return;
  $("message").value = "";
  const turn = new Turn({ turn: $("turn"), answer: $("answer") }, text, look);
  conversation.add(turn);
  append(turn);
  keep();
  await answer(turn, settings.seed);
}

/** Put a turn at the end; only the last one can be answered once more. */
function append(turn) {
  $("welcome").hidden = true;
  $("turns").lastElementChild?.querySelector(".again").setAttribute("hidden", "");
  $("turns").append(turn.element);
}

function onTurns({ target }) {
  const turn = conversation.turns.find(({ element }) => element.contains(target));
  if (target.matches(".copy-code")) copyCode(target, speech);
  else if (target === turn?.copy) copyReply(turn, speech);
  else if (target === turn?.again) answer(turn, settings.nextSeed());
  else if (target === turn?.compare) compare(turn);
}

/** Have a turn answered by the ensemble. */
async function answer(turn, seed) {
  if (running || !model) return;
  const owner = begin();
  settings.members.showShares(null);
  await ask(turn, turn.begin(settings.members.names, model.id), settings.mixing(), seed);
  end(turn, owner);
}

/** Have a turn answered by each member alone as well, one after the other, with the seed of the ensemble. */
async function compare(turn) {
  if (running || !model) return;
  const owner = begin();
  const { signal } = running;
  const { names } = settings.members;
  for (const name of names) {
    if (signal.aborted) break;
    const answer = turn.beside(names, `${model.id}/${name}`);
    await ask(turn, answer, settings.alone(name), turn.main.kept.seed);
  }
  end(turn, owner);
}

/** Show a reply while it is made. */
async function ask(turn, answer, mixing, seed) {
  const { signal } = running;
  answer.begin(answer.model === model.id ? settings.strategy.toUpperCase() : "");
  answer.onDraw = () => drawn(answer);
  speech.begin();
  toEnd();
  try {
    const body = request(turn, answer.model, mixing, seed);
    for await (const {
      choices: [choice],
    } of reply(body, recall(KEY), signal)) {
      if (choice) take(answer, choice);
    }
    speech.end();
  } catch (error) {
    if (error.name === "AbortError") stopped(answer);
    else failed(answer, error);
  }
}

function request(turn, name, mixing, seed) {
  const messages = conversation.messages(turn, settings.system);
  const body = { model: settings.preset ?? name, messages, stream: true, ...mixing, ...settings.tools() };
  return seed === null ? body : { ...body, seed };
}

/** Take a chunk of a reply: a thought, a piece of the text, or a call of a tool. */
function take(answer, choice) {
  const { delta, member, probability = null, shares = answer.names.map(() => 0) } = choice;
  const piece = { member: answer.names.indexOf(member ?? ""), probability, shares };
  const { reasoning_content: thought, content = "" } = delta;
  if (thought) answer.add({ ...piece, text: thought, thought: true });
  else if (content || member !== undefined) answer.add({ ...piece, text: content, thought: false });
  speech.add(thought ? "" : content);
  for (const call of delta.tool_calls ?? []) answer.call(call);
  if (choice.finish_reason) answer.finish(choice);
}

/** Let a reply be stopped; gives the conversation that it is of. */
function begin() {
  running = new AbortController();
  swap("send", "stop");
  return conversation;
}

/** Keep the end of the conversation in sight, for those who have it there. */
function drawn(answer) {
  if (answer.model === model.id) settings.members.showShares(answer.shares);
  if (atEnd) toEnd();
}

function stopped(answer) {
  answer.stop();
  speech.end("Stopped.");
}

function failed(answer, error) {
  if (!(error instanceof Failure)) console.error(error);
  const message = error instanceof Failure ? error.message : `An error of this page: ${error.message}`;
  answer.fail(message);
  speech.end(message);
  if (error.status === 401) askKey();
}

function end(turn, owner) {
  running = null;
  turn.end();
  swap("stop", "send");
  keep(owner);
}

/** Show one button in the place of the other, and keep the focus there. */
function swap(old, now) {
  const focused = document.activeElement === $(old);
  $(old).hidden = true;
  $(now).hidden = false;
  if (focused) $(now).focus();
}

/** Keep a conversation, and show what there is. */
function keep(kept = conversation) {
  if (kept.turns.length) problem(store.keep(kept.packed()));
  remember(OPEN, conversation.id);
  showHistory();
}

function showHistory() {
  const { found, broken } = store.list();
  history.show(found, conversation);
  if (broken) problem(`${broken} of the kept conversations cannot be read: left as they are.`);
}

/** Show another conversation. */
function change(other) {
  running?.abort();
  conversation = other;
  $("turns").replaceChildren();
  for (const turn of other.turns) append(turn);
  $("welcome").hidden = other.turns.length > 0;
  settings.members?.showShares(null);
  remember(OPEN, other.id);
  problem("");
  showHistory();
  toEnd();
  $("message").focus();
}

/** Go on with the conversation that this tab had open. */
function reopen() {
  showHistory();
  const id = recall(OPEN);
  if (store.list().found.some((packed) => packed.id === id)) open(id);
}

function open(id) {
  const packed = store.list().found.find((one) => one.id === id);
  if (!packed) return;
  const opened = new Conversation(packed.id, packed.title);
  for (const { text, answers } of packed.turns) {
    const turn = new Turn({ turn: $("turn"), answer: $("answer") }, text, look);
    turn.restore(answers);
    opened.add(turn);
  }
  change(opened);
}

function rename(title) {
  conversation.title = title || conversation.title;
  keep();
}

function drop() {
  store.drop(conversation.id);
  conversation.turns = []; // so that a reply that is stopped does not bring it back
  change(new Conversation());
}

function onLook() {
  look.colours = $("colours").checked;
  look.markdown = $("markdown").checked;
  store.keepLook(look);
  showLook();
  for (const turn of conversation.turns) turn.redraw();
}

function showLook() {
  $("colours").checked = look.colours;
  $("markdown").checked = look.markdown;
  document.body.classList.toggle("uncoloured", !look.colours);
}

function fold(button, panel) {
  button.setAttribute("aria-expanded", panel.classList.toggle("open"));
}

function problem(message) {
  $("problem").textContent = message;
}

function isAtEnd() {
  const { scrollHeight, scrollTop, clientHeight } = $("conversation");
  return scrollHeight - scrollTop - clientHeight < 40;
}

function toEnd() {
  $("conversation").scrollTop = $("conversation").scrollHeight;
}

start();
