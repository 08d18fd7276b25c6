// The review page: chooses the view and the question, hands out keys, and shows progress and messages.
// A question is a row of the sample: one image and one label.

import { answers, history, isSaving, load, sample, undo } from "./answers.js";
import * as grid from "./grid.js";
import * as list from "./list.js";
import { want } from "./pictures.js";
import { onScores } from "./settings.js";
import * as single from "./single.js";
import { isZoomed, pressZoomed } from "./zoom.js";

const $ = (id) => document.getElementById(id);
const PACE_STEPS = 30; // the pace is computed from this many saves
const PAUSE = 20000; // milliseconds; longer times between two answers are breaks and do not count for the pace
const VIEWS = { one: single, grid, list };
const VIEW_KEYS = { o: "one", g: "grid", a: "list" };

let queue = []; // the rows of the selected labels, in the order in which they are asked
let view = "one";
let opened = null; // a row that was opened from the list of answers or by undo, and is asked out of its order
let back = false; // whether the list is shown again when the opened question is answered
let saves = []; // [milliseconds, number of answers] of the saves on this page

async function start() {
  await load({ changed, trouble, notice });
  const counts = sample.labels.map(() => 0);
  for (const row of asked()) counts[sample.label[row]] += 1;
  const some = sample.labels.map((name, label) => [name, label]).filter(([, label]) => counts[label]);
  const all = new Option(some.length === 1 ? "1 label" : `All ${some.length} labels`, "");
  $("labels").replaceChildren(all, ...some.map(([name, label]) => new Option(`${name} (${counts[label]})`, label)));
  $("file").textContent = sample.answers_file;
  $("next").textContent = sample.next;
  $("person").textContent = sample.said ? "disagreements" : sample.person;
  // In a grid, what nobody marks is right. What people disagree about needs a look at each question.
  $("view-grid").hidden = sample.said !== null;
  view = isView(location.hash.slice(1)) ? location.hash.slice(1) : "one";
  selectLabel();
}

function isView(name) {
  return name in VIEWS && !$(`view-${name}`).hidden;
}

function asked() {
  const all = sample.label.map((_, row) => row);
  return sample.said ? all.filter((row) => sample.said[row]) : all;
}

/** Fill the queue label by label, because people answer faster while the question stays the same. Within a label, the
 * order is the sample's, which is random: any part of a label's answers is a random sample of its questions. */
function selectLabel() {
  const label = $("labels").value;
  queue = asked()
    .filter((row) => label === "" || sample.label[row] === Number(label))
    .sort((one, other) => sample.label[one] - sample.label[other] || one - other);
  opened = null;
  show();
}

/** Show the next question, or what the chosen view shows. `focused` is the row that gets the focus in the list. */
function show(focused = null) {
  const row = opened ?? queue.find((row) => !answers.has(row)) ?? null;
  const shown = row === null && view !== "list" ? "done" : opened !== null ? "one" : view;
  for (const name of ["one", "grid", "list", "done"]) {
    if (name !== shown && name in VIEWS && !$(name).hidden) VIEWS[name].leave();
    $(name).hidden = name !== shown;
  }
  for (const name of Object.keys(VIEWS)) $(`view-${name}`).setAttribute("aria-pressed", name === (shown === "done" ? view : shown));
  if (shown === "one") single.showQuestion(row, queue.filter((other) => other !== row && !answers.has(other)), answered);
  else if (shown === "grid") grid.showGrid(queue, answered);
  else if (shown === "list") list.showList(queue, openFromList, focused);
  else showDone();
  showProgress();
}

function answered(count = 1) {
  if (count) saves.push([performance.now(), count]);
  const row = opened;
  opened = null;
  if (back) {
    back = false;
    view = "list";
    show(row);
  } else show();
}

function openFromList(row) {
  opened = row;
  back = true;
  show();
  $("stage").scrollIntoView({ block: "nearest" });
}

function setView(name) {
  opened = null;
  back = false;
  view = name;
  rememberView(name);
  show();
}

/** Keep the view in the address, so that a reload shows the same one. */
function rememberView(name) {
  window.history.replaceState(null, "", `#${name}`);
}

/** Take back the last step, and show its question again. */
function takeBack() {
  const step = undo();
  if (!step) return;
  saves.pop();
  const rows = step.changes.map(({ row }) => row);
  if (rows.some((row) => !queue.includes(row))) {
    $("labels").value = "";
    selectLabel();
  }
  if (step.marks) {
    grid.restoreMarks(step.marks);
    back = false;
    opened = null;
    view = "grid";
    rememberView(view);
  } else if (view !== "grid" || answers.has(rows[0])) opened = rows[0];
  show();
  $("status").textContent = `Taken back: ${rows.length === 1 ? sample.key[rows[0]] : `${rows.length} answers`}`;
}

function showDone() {
  want([]);
  const rest = asked().filter((row) => !answers.has(row)).length;
  $("done-title").textContent = rest ? "All questions about this label are answered." : "All questions are answered.";
  $("status").textContent = $("done-title").textContent;
  fetch("api/agreement").then((response) => response.json()).then(({ lines }) => {
    $("agreement").hidden = !lines.length;
    $("agreement").querySelector("ul").replaceChildren(...lines.map((line) => {
      const item = document.createElement("li");
      item.textContent = line;
      return item;
    }));
  }, () => {});
}

function showProgress() {
  const done = queue.filter((row) => answers.has(row)).length;
  $("count").textContent = `${done.toLocaleString()} of ${queue.length.toLocaleString()}`;
  $("bar").setAttribute("aria-valuemax", queue.length);
  $("bar").setAttribute("aria-valuenow", done);
  $("bar").firstElementChild.style.width = `${(100 * done) / Math.max(1, queue.length)}%`;
  const last = saves.slice(-PACE_STEPS - 1);
  let time = 0, count = 0;
  for (let i = 1; i < last.length; i++) {
    const step = last[i][0] - last[i - 1][0];
    if (step > PAUSE * Math.max(1, last[i][1] / 5)) continue;
    time += step;
    count += last[i][1];
  }
  if (count < 5 || !time) $("pace").textContent = "";
  else {
    const minutes = ((queue.length - done) * time) / count / 60000;
    const left = minutes < 1 ? "less than a minute left" : `about ${Math.round(minutes)} min left`;
    $("pace").textContent = `${Math.round((60000 * count) / time)} a minute, ${left}`;
  }
  for (const button of document.querySelectorAll(".undo")) button.disabled = !history.length;
}

/** Answers have changed without this page: in another tab, or because they could not be saved. */
function changed(rows) {
  showProgress();
  if (!$("grid").hidden) grid.changeGrid();
  else if (!$("list").hidden) show(findFocused());
  else if (!$("done").hidden || (!$("one").hidden && opened === null)) {
    const row = Number($("image").dataset.row);
    const next = queue.find((row) => !answers.has(row)) ?? null;
    // The question on the screen stays, unless another tab has answered it.
    if (!$("done").hidden ? next !== null : rows.has(row) && answers.has(row)) show();
    else single.describe();
  } else single.describe();
}

function findFocused() {
  const row = document.activeElement?.closest("[data-row]")?.dataset.row;
  return row === undefined ? null : Number(row);
}

function trouble(text) {
  $("trouble").textContent = text;
  $("trouble").hidden = !text;
}

function notice(text) {
  $("notice").hidden = false;
  $("notice").firstElementChild.textContent = text;
}

/** The key as a Latin letter: on a Cyrillic or Greek layout, the letter at the same place of a Latin keyboard. */
function nameKey(event) {
  const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
  const letter = /^Key[A-Z]$/.test(event.code) ? event.code[3].toLowerCase() : null;
  return letter && !/^[\x20-\x7e]$/.test(key) && !/^(Arrow|Back|Enter|Esc|Tab)/.test(key) ? letter : key;
}

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.target.matches("select, input, textarea, pre")) return;
  const key = nameKey(event);
  if (isZoomed() && !pressZoomed(event, key)) return;
  const shown = ["one", "grid", "list", "done"].find((name) => !$(name).hidden);
  if (key === "Enter" && event.target.matches("button") && !event.target.closest("#tiles")) return; // the button's own
  if (VIEWS[shown]?.press(key, event.repeat)) event.preventDefault();
  else if (["Backspace", "z"].includes(key) || (key === "ArrowUp" && shown === "one")) {
    event.preventDefault();
    if (!event.repeat) takeBack();
  } else if (isView(VIEW_KEYS[key]) && !event.repeat) setView(VIEW_KEYS[key]);
});
for (const name of Object.keys(VIEWS)) $(`view-${name}`).addEventListener("click", () => setView(name));
for (const button of document.querySelectorAll(".undo")) button.addEventListener("click", takeBack);
$("labels").addEventListener("change", () => {
  selectLabel();
  $("labels").blur();
});
$("filter").addEventListener("change", () => show());
$("notice").querySelector("button").addEventListener("click", () => ($("notice").hidden = true));
onScores(() => {
  single.describe();
  if (!$("grid").hidden) grid.changeGrid();
  if (!$("list").hidden) show();
});
window.addEventListener("beforeunload", (event) => {
  if (isSaving()) event.preventDefault();
});

start().catch((error) => trouble(`The page could not start: ${error.message}`));
