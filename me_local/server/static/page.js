// The page: what its controls do, and how a conversation goes.

import { Members } from "./members.js";
import { Failure, ensemble, reply } from "./server.js";
import { Speech } from "./speech.js";
import { Turn } from "./turn.js";
import { showTips } from "./tip.js";

const KEY = "me-local-key";

const $ = (id) => document.getElementById(id);
const speech = new Speech($("spoken"));

let model = null;
let members = null;
let turns = [];
let running = null; // what stops the reply that is being made

async function start() {
  showTips($("tip"), $("turns"));
  connectControls();
  await connect();
}

function connectControls() {
  $("composer").addEventListener("submit", onSend);
  $("message").addEventListener("keydown", onMessageKey);
  document.addEventListener("keydown", (event) => event.key === "Escape" && running?.abort());
  $("stop").addEventListener("click", () => running?.abort());
  $("new").addEventListener("click", clear);
  $("fold").addEventListener("click", fold);
  $("strategy").addEventListener("change", onStrategy);
  $("key-dialog").addEventListener("cancel", (event) => event.preventDefault());
  $("key-form").addEventListener("submit", onKey);
}

/** Learn what the ensemble is, with a key where one is asked for. */
async function connect() {
  problem("");
  try {
    model = await ensemble(sessionStorage.getItem(KEY));
  } catch (failure) {
    if (failure.status === 401) askKey();
    else problem(failure.message);
    return;
  }
  if ($("key-dialog").open) $("key-dialog").close();
  showModel();
  $("message").focus();
}

function showModel() {
  members = new Members($("members"), $("member"), model.members);
  choose("strategy", model.strategy);
  choose("unit", model.unit);
  $("seed").value = model.seed ?? "";
  onStrategy();
}

function askKey() {
  $("key-problem").textContent = sessionStorage.getItem(KEY) ? "The server did not take that key." : "";
  if (!$("key-dialog").open) $("key-dialog").showModal();
  $("key").focus();
}

async function onKey(event) {
  event.preventDefault();
  sessionStorage.setItem(KEY, $("key").value);
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
  if (!model) await connect();
  if (!model) return;
  $("message").value = "";
  $("welcome").hidden = true;
  turns.at(-1)?.again.setAttribute("hidden", "");
  const turn = new Turn($("turn"), text, members.names);
  turn.again.addEventListener("click", () => answer(turn, nextSeed()));
  turn.copy.addEventListener("click", () => copy(turn));
  turns.push(turn);
  $("turns").append(turn.element);
  await answer(turn, typedSeed());
}

/** The seed that was typed in, or null; what is no number is for the server to refuse. */
function typedSeed() {
  const text = $("seed").value.trim();
  if (text === "") return null;
  return Number.isNaN(Number(text)) ? text : Number(text);
}

/** Another seed than the last: a fixed one goes on by one, otherwise the server draws. */
function nextSeed() {
  if (typeof typedSeed() === "number") $("seed").value = typedSeed() + 1;
  return typedSeed();
}

/** Have a turn answered, and show the reply while it is made. */
async function answer(turn, seed) {
  if (running) return;
  const controller = begin(turn);
  try {
    for await (const { choices: [choice] } of reply(request(seed), sessionStorage.getItem(KEY), controller.signal)) {
      if (!choice) continue;
      if (choice.member) grow(turn, { ...choice, text: choice.delta.content });
      if (choice.finish_reason) turn.finish(choice);
    }
    speech.end();
  } catch (error) {
    if (error.name === "AbortError") stopped(turn);
    else failed(turn, error);
  } finally {
    end();
  }
}

function begin(turn) {
  running = new AbortController();
  speech.begin();
  turn.begin(chosen("strategy").toUpperCase());
  turn.again.textContent = "Another reply";
  members.showShares(null);
  swap("send", "stop");
  toEnd();
  return running;
}

function grow(turn, piece) {
  const atEnd = isAtEnd();
  turn.add(piece);
  members.showShares(turn.shares);
  speech.add(piece.text);
  if (atEnd) toEnd();
}

function stopped(turn) {
  turn.stop();
  speech.end("Stopped.");
}

function failed(turn, error) {
  if (!(error instanceof Failure)) console.error(error);
  turn.fail(error instanceof Failure ? error.message : `An error of this page: ${error.message}`);
  turn.again.textContent = "Try again";
  speech.end(error.message);
  if (error.status === 401) askKey();
}

function end() {
  running = null;
  swap("stop", "send");
  toEnd();
}

/** Show one button in the place of the other, and keep the focus there. */
function swap(old, now) {
  const focused = document.activeElement === $(old);
  $(old).hidden = true;
  $(now).hidden = false;
  if (focused) $(now).focus();
}

/** What is asked: turns without a reply are left out, all but the last. */
function request(seed) {
  const messages = [];
  if ($("system").value.trim()) messages.push({ role: "system", content: $("system").value });
  for (const turn of turns.slice(0, -1)) {
    if (!turn.reply) continue;
    messages.push({ role: "user", content: turn.text }, { role: "assistant", content: turn.reply });
  }
  messages.push({ role: "user", content: turns.at(-1).text });
  const mixing = { strategy: chosen("strategy"), unit: chosen("unit"), weights: members.asked() };
  const body = { model: model.id, messages, stream: true, ...mixing };
  return seed === null ? body : { ...body, seed };
}

function clear() {
  running?.abort();
  turns = [];
  $("turns").replaceChildren();
  $("welcome").hidden = false;
  members?.showShares(null);
  $("message").focus();
}

function fold() {
  const open = $("settings").classList.toggle("open");
  $("fold").setAttribute("aria-expanded", open);
}

/** CE, also that of UniTE, is of whole distributions, so it has no words. */
function onStrategy() {
  const word = document.querySelector('[name="unit"][value="word"]');
  word.disabled = chosen("strategy") !== "me";
  if (word.disabled && word.checked) choose("unit", "token");
}

async function copy(turn) {
  const copied = await toClipboard(turn.reply);
  if (!copied) turn.select();
  turn.copy.textContent = copied ? "Copied" : "Selected: press Ctrl+C";
  speech.say(turn.copy.textContent);
  setTimeout(() => (turn.copy.textContent = "Copy"), 1500);
}

/** Whether a text went to the clipboard: browsers give it to pages of this machine and of https alone. */
async function toClipboard(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    return false;
  }
}

function problem(message) {
  $("problem").textContent = message;
}

function choose(name, value) {
  document.querySelector(`[name="${name}"][value="${value}"]`).checked = true;
}

function chosen(name) {
  return document.querySelector(`[name="${name}"]:checked`).value;
}

function isAtEnd() {
  const { scrollHeight, scrollTop, clientHeight } = $("conversation");
  return scrollHeight - scrollTop - clientHeight < 40;
}

function toEnd() {
  $("conversation").scrollTop = $("conversation").scrollHeight;
}

start();
