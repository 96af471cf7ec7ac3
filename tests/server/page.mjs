// Uses the page in Firefox, and prints what it finds as JSON: node page.mjs FOLDER URL, with a program and texts on stdin.
import { readFileSync } from "node:fs";
import { createRequire } from "node:module";

const [folder, url, executablePath] = process.argv.slice(2);
const require = createRequire(`${folder}/`);
const puppeteer = require("puppeteer-core").default ?? require("puppeteer-core");
const axe = readFileSync(require.resolve("axe-core/axe.min.js"), "utf8");
const { outline, texts } = JSON.parse(readFileSync(0, "utf8"));
const told = { faults: [] };

const done = () => document.querySelector("article:last-of-type")?.dataset.state === "done";
const serious = (page) =>
  page.evaluate(
    `(async () => { ${axe}; return (await axe.run()).violations.map(({ id, impact }) => [id, impact]); })()`,
  );

const browser = await puppeteer.launch({ browser: "firefox", executablePath, headless: true });
try {
  const page = await browser.newPage();
  page.on("pageerror", (error) => told.faults.push(String(error)));
  page.on("dialog", (dialog) => told.faults.push(dialog.message()));
  await page.goto(url);
  await page.waitForSelector("#members li");
  told.outlines = await page.evaluate(`(async (given) => { ${outline} })(${JSON.stringify(texts)})`);
  await page.type("#seed", "1");
  await page.type("#message", "the cat sat on the mat");
  await page.keyboard.press("Enter");
  await page.waitForFunction(done);
  told.reply = await page.$eval(".reply", (reply) => reply.textContent);
  await page.reload();
  await page.waitForFunction(done);
  await page.waitForSelector("#members li");
  told.kept = await page.$eval(".reply", (reply) => reply.textContent);
  told.axe = await serious(page);
  told.ran = await page.evaluate("window.ran ?? null");
} finally {
  await browser.close();
}
console.log(JSON.stringify(told));
