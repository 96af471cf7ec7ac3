// A conversation as a file: Markdown to read, JSON with everything. Knows only what `packed` gives.

/** The conversation as Markdown; thoughts are left out, and calls of tools are code. */
export function asMarkdown({ title, turns }) {
  const said = turns.flatMap(({ text, answers }) => ["## You", text, ...answers.flatMap(answered)]);
  return `${[`# ${title}`, ...said].join("\n\n")}\n`;
}

/** The conversation with all that is known of its pieces. */
export function asJson(packed) {
  return JSON.stringify(packed, null, 1);
}

function answered({ model, pieces, calls }) {
  const text = pieces.filter(([, , , , thought]) => !thought).map(([piece]) => piece);
  const called = calls.map(({ id, ...call }) => `\`\`\`json\n${JSON.stringify(call)}\n\`\`\``);
  return [`## ${model}`, text.join("").trim(), ...called].filter(Boolean);
}

/** A name that file systems take. */
export function fileName(title, ending) {
  const plain = title
    .replace(/[^\p{L}\p{N}._ -]/gu, "")
    .trim()
    .replace(/^\.+/, "")
    .slice(0, 60);
  return `${plain || "conversation"}.${ending}`;
}

/** Have the browser save a file. */
export function download(name, type, text) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([text], { type }));
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}
