// The view of one question: one image, one label, and an answer by one key.

import { answerAll, answers, sample } from "./answers.js";
import { want, show as showPicture } from "./pictures.js";
import { showsScores } from "./settings.js";
import { zoom } from "./zoom.js";

const $ = (id) => document.getElementById(id);
const AHEAD = 8; // thumbnails fetched before they are shown
const AHEAD_LARGE = 3;
const SWIPE = 60, TAP = 10; // pixels
const KEYS = { ArrowRight: "right", r: "right", ArrowLeft: "wrong", w: "wrong", ArrowDown: "unsure", u: "unsure" };

let row = null;
let shown = false; // whether the picture of `row` is on the screen: true, false, or null if it is broken
let after = () => {}; // what comes when the question is answered

/** Show a question. `next` is called when it is answered, `ahead` are the rows that will probably come. */
export function showQuestion(question, ahead, next) {
  const changed = row !== null && sample.label[row] !== sample.label[question];
  after = next;
  if (row !== question || shown !== true) {
    row = question;
    shown = false;
    showPicture($("image"), row).then((fine) => {
      if (fine === null || row !== question) return;
      shown = fine || null;
      $("broken").hidden = fine;
    });
  }
  $("broken").hidden = shown !== null;
  for (const index of ahead.slice(0, AHEAD)) new Image().src = `api/thumbnail/${sample.review}/${index}`;
  want([row, ...ahead.slice(0, AHEAD_LARGE)]);
  const element = document.querySelector("#one .question");
  element.classList.remove("changed");
  if (changed) requestAnimationFrame(() => element.classList.add("changed"));
  describe();
  const said = answers.has(row) ? ` You said ${answers.get(row)}.` : "";
  $("status").textContent = `Is this ${sample.labels[sample.label[row]]}? ${sample.key[row]}.${said}`;
}

/** Show again what may have changed about the question: its answer, and whether scores are shown. */
export function describe() {
  if (row === null) return;
  $("label").textContent = sample.labels[sample.label[row]];
  $("key").textContent = sample.key[row];
  $("key").title = sample.key[row];
  const visible = answers.has(row) || showsScores();
  $("score").textContent = visible ? `score ${sample.score[row].toFixed(3)}` : "";
  const said = Object.entries(sample.said?.[row] ?? {});
  $("said").textContent = said.map(([name, answer]) => `${name || "without a name"}: ${answer}`).join(", ");
  for (const what of ["right", "wrong", "unsure"]) $(what).setAttribute("aria-pressed", answers.get(row) === what);
}

export function leave() {
  row = null;
}

function answer(what) {
  if (row === null) return;
  // A key that is pressed before the picture is there would be an answer about a picture that nobody has seen.
  if (shown === false || (shown === null && what !== "unsure")) {
    $("status").textContent = "The picture is not shown yet.";
    return;
  }
  const button = $(what);
  button.classList.add("hit");
  setTimeout(() => button.classList.remove("hit"), 120);
  answerAll([{ row, answer: what }]);
  after();
}

/** Handle a key. Returns whether it was one of this view's. */
export function press(key, repeated) {
  if (key === "e") zoom(row);
  else if (!KEYS[key]) return false;
  else if (!repeated) answer(KEYS[key]);
  return true;
}

for (const what of ["right", "wrong", "unsure"]) $(what).addEventListener("click", () => answer(what));
$("enlarge").addEventListener("click", () => zoom(row));

let start = null;
$("stage").addEventListener("pointerdown", (event) => (start = event));
$("stage").addEventListener("pointercancel", () => (start = null));
$("stage").addEventListener("pointerup", (event) => {
  const moved = start === null ? null : event.clientX - start.clientX;
  const down = start === null ? 0 : Math.abs(event.clientY - start.clientY);
  start = null;
  if (moved === null) return;
  if (Math.abs(moved) >= SWIPE && Math.abs(moved) > down) answer(moved > 0 ? "right" : "wrong");
  else if (Math.abs(moved) < TAP && down < TAP && shown) zoom(row);
});
