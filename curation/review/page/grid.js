// The view of a grid: the next thirty questions of one label in the sample's order. Marked ones are wrong or unsure,
// and all others are right, so that a grid is saved only after its last picture was on the screen. The order is never by score, because any part of the answers must be a random sample.

import { answerAll, answers, sample } from "./answers.js";
import { makeTile, show as showPicture, want } from "./pictures.js";
import { showsScores } from "./settings.js";
import { zoom } from "./zoom.js";

const $ = (id) => document.getElementById(id);
const TILES = 30;
const PAUSE = 500; // milliseconds in which a new grid is not saved: a key pressed twice would answer what nobody saw
const CYCLE = { right: "wrong", wrong: "unsure", unsure: "right" };

let tiles = new Map(); // row -> {tile, button, image, badge, shown, mark}
let kept = new Map(); // row -> mark; they stay when the view is left
let label = null;
let busy = false;
let early = false; // whether what is on the screen is so new that it cannot be saved
let seen = false; // whether the last picture has been on the screen
let timer = null;
let after = () => {};

/** Show the next questions of the first label that has some. `queue` are the rows that are asked, in their order. */
export function showGrid(queue, next) {
  after = next;
  const open = queue.filter((row) => !answers.has(row));
  label = sample.label[open[0]];
  const rows = open.filter((row) => sample.label[row] === label).slice(0, TILES);
  if (rows.length === tiles.size && rows.every((row) => tiles.has(row))) return showMarks();
  tiles = new Map(rows.map((row) => [row, makeOne(row)]));
  seen = false;
  pause();
  $("below").textContent = "";
  $("grid-label").textContent = sample.labels[label];
  $("tiles").replaceChildren(...[...tiles.values()].map(({ tile }) => tile));
  findScroller().scrollTop = 0;
  want([]);
  showMarks();
  focusOn(0);
  $("status").textContent = `${rows.length} pictures. Mark what is not ${sample.labels[label]}.`;
}

/** Answers were given in another tab, or not saved, or scores are to be shown or hidden. Marks of questions that are
 * answered are dropped. */
export function changeGrid() {
  showMarks();
}

export function leave() {
  tiles = new Map();
  $("tiles").replaceChildren();
}

/** Bring back the marks of a grid that was undone. */
export function restoreMarks(marks) {
  for (const [row, mark] of marks) kept.set(row, mark);
}

function makeOne(row) {
  const one = { ...makeTile(row, enlarge), shown: false };
  one.button.addEventListener("click", () => cycle(row));
  one.button.addEventListener("focus", () => {
    for (const { button } of tiles.values()) button.tabIndex = button === one.button ? 0 : -1;
  });
  showPicture(one.image, row).then((fine) => {
    one.shown = fine === true;
    one.broken = fine === false;
    if (one.broken) kept.set(row, "unsure"); // nobody can say more about a picture that cannot be shown
    showMarks();
  });
  return one;
}

function cycle(row, mark = CYCLE[kept.get(row) ?? "right"]) {
  const one = tiles.get(row);
  if (!one || busy || answers.has(row) || one.broken) return;
  if (mark === "right") kept.delete(row);
  else kept.set(row, mark);
  showMarks();
  $("status").textContent = `${sample.key[row]}: ${mark}`;
}

function enlarge(row) {
  zoom(row, {
    move: (step) => {
      const rows = [...tiles.keys()];
      const next = rows[Math.min(rows.length - 1, Math.max(0, rows.indexOf(row) + step))];
      focusOn(rows.indexOf(next));
      enlarge(next);
    },
    mark: (what) => {
      cycle(row, what);
      enlarge(row);
    },
    closed: () => focusOn([...tiles.keys()].indexOf(row)),
    text: kept.get(row) ?? "",
    ahead: [...tiles.keys()].slice([...tiles.keys()].indexOf(row) + 1),
  });
}

function showMarks() {
  const counts = { right: 0, wrong: 0, unsure: 0 };
  let waits = 0;
  for (const [row, { tile, button, badge, shown, broken }] of tiles) {
    const other = busy ? undefined : answers.get(row); // answered in another tab
    if (other) kept.delete(row);
    const mark = other ?? kept.get(row) ?? "right";
    if (!other) counts[mark] += 1;
    if (!shown && !broken) waits += 1;
    tile.dataset.mark = other ? "other" : mark;
    const score = showsScores() ? `score ${sample.score[row].toFixed(3)}, ` : "";
    tile.querySelector(".key").textContent = `${score}${sample.key[row]}`;
    badge.textContent = other ? `${other}, in another tab` : broken ? "no picture" : mark === "right" ? "" : mark;
    button.setAttribute("aria-label", `${sample.key[row]}: ${other ? `${other}, answered in another tab` : mark}`);
  }
  const parts = Object.entries(counts).filter(([, count]) => count).map(([name, count]) => `${count} ${name}`);
  $("save").firstChild.textContent = waits ? `${waits} pictures to come ` : parts.length ? `Save: ${parts.join(", ")} ` : "Next ";
  $("save").disabled = busy || early || waits > 0;
}

function pause() {
  early = true;
  clearTimeout(timer);
  timer = setTimeout(() => {
    early = false;
    showMarks();
  }, PAUSE);
}

/** The element that scrolls the pictures: their own box, or on a phone the whole page below its header. */
function findScroller() {
  return [$("tiles"), document.querySelector("main")].find((one) => getComputedStyle(one).overflowY === "auto");
}

/** The index of the first picture that ends below what is on the screen, or -1. */
function findCut() {
  const bottom = findScroller().getBoundingClientRect().bottom + 1; // borders may lie between two pixels
  return [...tiles.values()].findIndex(({ tile }) => tile.getBoundingClientRect().bottom > bottom);
}

/** Note whether the last picture is on the screen. Before all pictures are there, the rows may still grow. */
function look() {
  if (tiles.size && [...tiles.values()].every(({ shown, broken }) => shown || broken)) seen ||= findCut() < 0;
}

/** Scroll down by one screen: the first picture that was cut off comes to the top, and has the focus. */
function scrollDown() {
  const scroller = findScroller();
  const cut = findCut();
  const above = [...tiles.values()][cut].tile.getBoundingClientRect().top - scroller.getBoundingClientRect().top;
  const margin = 8; // pixels, for the outline of the focus
  scroller.scrollBy({ top: above > 2 * margin ? above - margin : scroller.clientHeight, behavior: "instant" });
  focusOn(cut, true);
  pause(); // a key pressed twice would answer what has only just come
  showMarks();
  $("below").textContent = "Not saved yet: there were more images below. Look through them, then save.";
  $("status").textContent = $("below").textContent;
}

async function saveGrid() {
  if ($("save").disabled) return;
  look();
  if (!seen) return scrollDown();
  $("below").textContent = "";
  const open = [...tiles.keys()].filter((row) => !answers.has(row));
  if (open.length) {
    const marks = open.filter((row) => kept.has(row)).map((row) => [row, kept.get(row)]);
    busy = true;
    showMarks();
    // Wait for the server: of a grid that could not be saved, the marks stay.
    const outcome = await answerAll(open.map((row) => ({ row, answer: kept.get(row) ?? "right" })), marks);
    busy = false;
    if (outcome === "failed") return showMarks();
    for (const row of open) kept.delete(row);
  }
  after(open.length);
}

/** Handle a key. Returns whether it was one of this view's. */
export function press(key, repeated) {
  const at = [...tiles.values()].findIndex(({ button }) => button === document.activeElement);
  const row = [...tiles.keys()][at];
  if (key === "Enter") {
    if (!repeated) saveGrid();
  } else if (key.startsWith("Arrow")) {
    const across = getComputedStyle($("tiles")).gridTemplateColumns.split(" ").length;
    const step = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -across, ArrowDown: across }[key];
    if (at < 0) focusOn(0);
    else if (at + step >= 0 && at + step < tiles.size) focusOn(at + step);
  } else if (key === "e" && row !== undefined) enlarge(row);
  else if (key === "w" && row !== undefined) cycle(row, "wrong");
  else if (key === "u" && row !== undefined) cycle(row, "unsure");
  else if (key === "r" && row !== undefined) cycle(row, "right");
  else if (key === " " && row === undefined) focusOn(0); // a focused picture is a button, which the space bar clicks
  else return false;
  return true;
}

function focusOn(index, still = index === 0 && !$("zoom").open) {
  const one = [...tiles.values()][index];
  for (const { button } of tiles.values()) button.tabIndex = -1;
  if (!one) return;
  one.button.tabIndex = 0;
  one.button.focus({ preventScroll: still });
}

$("save").addEventListener("click", saveGrid);
document.addEventListener("scroll", look, true);
