// The tooltip of a piece: its member and its probability. Knows of pieces what elements are about.

import { probability, whoOf } from "./answer.js";
import { aboutOf } from "./nodes.js";

/** Show the tooltip over pieces in `area` that are pointed at or tapped. */
export function showTips(tip, area) {
  area.addEventListener("pointerover", ({ target }) => show(tip, target));
  area.addEventListener("pointerleave", () => (tip.hidden = true));
  document.addEventListener("scroll", () => (tip.hidden = true), true);
  document.addEventListener("keydown", () => (tip.hidden = true));
}

function show(tip, element) {
  const piece = aboutOf(element);
  tip.hidden = !piece;
  if (!piece) return;
  tip.textContent = piece.member < 0 ? whoOf(piece) : said(piece);
  place(tip, element.getClientRects()[0]);
}

function said(piece) {
  const [parts, member] = [whoOf(piece), piece.names[piece.member]];
  return [member, probability(piece), ...(parts === member ? [] : [`(${parts})`])].join(" · ");
}

function place(tip, over) {
  const { width, height } = tip.getBoundingClientRect();
  const left = Math.min(Math.max(8, over.left + over.width / 2 - width / 2), innerWidth - width - 8);
  const top = over.top > height + 8 ? over.top - height - 6 : over.bottom + 6;
  tip.style.left = `${left}px`;
  tip.style.top = `${top}px`;
}
