// The tooltip of a piece: its member and its probability.

import { pieceOf, probability } from "./turn.js";

/** Show the tooltip over pieces in `area` that are pointed at or tapped. */
export function showTips(tip, area) {
  area.addEventListener("pointerover", (event) => show(tip, event.target));
  area.addEventListener("pointerleave", () => (tip.hidden = true));
  document.addEventListener("scroll", () => (tip.hidden = true), true);
  document.addEventListener("keydown", () => (tip.hidden = true));
}

function show(tip, element) {
  const piece = pieceOf.get(element);
  tip.hidden = !piece;
  if (!piece) return;
  tip.textContent = [piece.member, probability(piece), piece.shared && `(${piece.shared})`].filter(Boolean).join(" · ");
  place(tip, element.getClientRects()[0]);
}

function place(tip, over) {
  const { width, height } = tip.getBoundingClientRect();
  const left = Math.min(Math.max(8, over.left + over.width / 2 - width / 2), innerWidth - width - 8);
  const top = over.top > height + 8 ? over.top - height - 6 : over.bottom + 6;
  tip.style.left = `${left}px`;
  tip.style.top = `${top}px`;
}
