// The overlay with a large picture of one question.

import { sample } from "./answers.js";
import { describe, show as showPicture, want } from "./pictures.js";

const $ = (id) => document.getElementById(id);
const MARKS = { w: "wrong", u: "unsure", r: "right" };

const ANSWERS = ["r", "w", "u", "ArrowRight", "ArrowLeft", "ArrowDown"];

let row = null;
let grid = null; // of a grid: {move(step), mark(what or undefined), closed(), text, ahead}

/** Show a row's picture large. `of` has what keys do in a grid; without it, keys that answer close the overlay. */
export function zoom(question, of = null) {
  if (question === null) return;
  const same = row === question && $("zoom").open;
  row = question;
  grid = of;
  $("zoom").classList.toggle("in-grid", of !== null);
  $("zoom-label").textContent = sample.labels[sample.label[row]];
  $("zoom-key").textContent = sample.key[row];
  $("zoom-mark").textContent = of?.text ?? "";
  if (!$("zoom").open) $("zoom").showModal();
  if (same) return;
  want([row, ...(of?.ahead ?? []).slice(0, 2)]);
  $("zoom-note").textContent = "";
  showPicture($("zoom-image"), row).then((fine) => fine === null || note(fine));
}

function note(fine) {
  $("zoom-note").textContent = fine ? describe($("zoom-image"), row) : "the picture cannot be shown";
}

export function isZoomed() {
  return $("zoom").open;
}

/** Handle a key while the overlay is open. Returns whether it goes on to the view behind it. */
export function pressZoomed(event, key) {
  if (key === " " && event.target === $("zoom-close")) return false; // the button's own
  if (key === "e" || key === "Enter") close();
  else if (grid && (key === "ArrowLeft" || key === "ArrowRight")) grid.move(key === "ArrowRight" ? 1 : -1);
  else if (grid && (key === " " || MARKS[key])) grid.mark(MARKS[key]);
  else if (!grid && ANSWERS.includes(key)) {
    close();
    return true; // the answer is the view's
  } else return false;
  event.preventDefault();
  return false;
}

function close() {
  $("zoom").close();
}

$("zoom").addEventListener("close", () => {
  row = null;
  grid?.closed(); // the picture that was enlarged last has the focus, not the first one
});
$("zoom-close").addEventListener("click", close);
$("zoom-stage").addEventListener("click", close);
$("zoom-image").addEventListener("picture", () => row !== null && note(true));
$("zoom-image").addEventListener("load", () => row !== null && $("zoom-image").classList.contains("shown") && note(true));
