// Copies replies and code to the clipboard, or selects them where the browser does not let a page do that.

const SHOWN = 1500; // milliseconds

export async function copyReply(turn, speech) {
  const copied = await toClipboard(turn.main.text);
  if (!copied) turn.main.select();
  say(turn.copy, copied, speech);
}

export async function copyCode(button, speech) {
  const code = button.closest(".code").querySelector("code");
  const copied = await toClipboard(code.textContent);
  if (!copied) getSelection().selectAllChildren(code);
  say(button, copied, speech);
}

function say(button, copied, speech) {
  button.textContent = copied ? "Copied" : "Selected: press Ctrl+C";
  speech.say(button.textContent);
  setTimeout(() => (button.textContent = "Copy"), SHOWN);
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
