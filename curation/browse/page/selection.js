// The images that are selected, and what becomes of them. The order in which they were selected is kept.

import * as api from "./api.js";
import * as grid from "./grid.js";

const $ = (id) => document.getElementById(id);
const chosen = new Set(); // positions
let anchor = 0; // the index from which a range starts
let anchorOf = null; // the result that it is in
let known = { result: null, positions: null };
let failed = () => {};
let search = () => {};
let undo = null; // the answers that were saved last
let polling = null;
let version = null; // that of the output that the positions in `chosen` were last looked up in

export const has = (position) => chosen.has(position);

/** Prepare. `fail` shows an error, `like` searches for images like some positions. */
export function prepare(fail, like) {
  failed = fail;
  search = like;
}

function changed() {
  const count = chosen.size;
  $("selection").hidden = !count;
  $("selected").textContent = `${count.toLocaleString()} selected`;
  $("more-like").disabled = count > 100;
  $("more-like").title = count > 100 ? "Of up to 100 images" : "";
  $("status").textContent = count ? `${count.toLocaleString()} selected` : "Nothing is selected";
  grid.markTiles();
}

/** Look up where the selected images are in another version of the output. Returns how many are no longer there. */
export async function follow(latest) {
  const positions = latest === version ? [] : [...chosen];
  const now = positions.length ? await api.moved(positions) : [];
  version = latest;
  let gone = 0;
  for (const [index, position] of positions.entries()) {
    if (now[index] === position || !chosen.delete(position)) continue;
    if (now[index] < 0) gone += 1;
    else chosen.add(now[index]);
  }
  if (positions.length) changed();
  return gone;
}

function setAnchor(result, index) {
  anchor = index;
  anchorOf = result;
}

export async function toggle(result, index) {
  const row = await attempt(() => grid.fetchRow(index));
  if (!row) return;
  if (!chosen.delete(row.position)) chosen.add(row.position);
  setAnchor(result, index);
  changed();
}

/** Select from where the selection was changed last to an index. */
export function selectTo(result, index) {
  return selectRange(result, anchorOf === result ? anchor : index, index);
}

export async function selectRange(result, from, to) {
  const [first, stop] = [Math.min(from, to), Math.max(from, to) + 1];
  const positions = await attempt(() => readPositions(result));
  if (!positions) return;
  for (const position of positions.subarray(first, stop)) chosen.add(position);
  setAnchor(result, to);
  changed();
}

export async function selectAll(result) {
  if (result) await selectRange(result, 0, result.count - 1);
}

async function readPositions(result) {
  if (known.result !== result) known = { result, positions: await api.positions(result.result) };
  return known.positions;
}

export function clear() {
  if (!chosen.size) return false;
  chosen.clear();
  changed();
  return true;
}

async function attempt(what) {
  try {
    return await what();
  } catch (error) {
    failed(error);
    return null;
  }
}

const images = (count) => `${count.toLocaleString()} ${count === 1 ? "image" : "images"}`;

const answers = (count) => `${count.toLocaleString()} ${count === 1 ? "answer is" : "answers are"}`;

function say(element, lines, wrong = false) {
  element.hidden = false;
  element.classList.toggle("wrong", wrong);
  element.replaceChildren(...lines.map((line) => {
    const one = document.createElement(line.startsWith("sightline ") ? "code" : "span");
    one.textContent = line;
    return one;
  }));
}

async function saveList() {
  const blob = await attempt(() => api.list([...chosen]));
  if (!blob) return;
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = "selection.txt";
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}

function openAnswers() {
  const previous = $("answer-label").value;
  $("answer-label").replaceChildren(...Object.keys(api.about.thresholds).map((label) => new Option(label, label)));
  if (previous) $("answer-label").value = previous;
  $("answers-title").textContent = `Answer for ${images(chosen.size)}`;
  $("answers-said").hidden = $("answers-undo").hidden = true;
  $("answers").showModal();
}

async function saveAnswers() {
  const positions = [...chosen];
  const label = $("answer-label").value;
  const answer = document.querySelector("input[name=answer]:checked").value;
  $("answers-save").disabled = true;
  try {
    const { saved, file, next } = await api.answer(positions, label, answer);
    undo = { positions, label };
    say($("answers-said"), [`${answers(saved)} in ${file}. Next commands:`, ...next]);
    $("answers-undo").hidden = false;
  } catch (error) {
    say($("answers-said"), [error.message], true);
  }
  $("answers-save").disabled = false;
}

async function takeBack() {
  if (!undo) return;
  try {
    const { saved } = await api.answer(undo.positions, undo.label, "taken back");
    undo = null;
    $("answers-undo").hidden = true;
    say($("answers-said"), [`${answers(saved)} taken back. Earlier answers about them count again.`]);
  } catch (error) {
    say($("answers-said"), [error.message], true);
  }
}

function openExport() {
  if (!$("export-target").length) $("export-target").append(...api.about.targets.map((target) => new Option(target, target)));
  $("exports-title").textContent = `Export ${images(chosen.size)}`;
  $("export-said").hidden = true;
  $("export-thumbnails").parentElement.hidden = !api.about.thumbnails;
  $("exports").showModal();
  $("export-to").focus();
  attempt(api.readExport).then((found) => found?.state === "running" && showExport(found)); // begun on another page
}

async function startExport() {
  $("export-start").disabled = true;
  try {
    showExport(await api.startExport([...chosen], $("export-target").value, $("export-to").value, $("export-thumbnails").checked));
  } catch (error) {
    say($("export-said"), [error.message], true);
    $("export-start").disabled = false;
  }
}

async function cancelExport() {
  $("export-cancel").disabled = true;
  try {
    await api.cancelExport();
  } catch (error) {
    say($("export-said"), [error.message], true);
    $("export-cancel").disabled = false;
  }
}

function showExport({ state, rows, lines }) {
  clearTimeout(polling);
  const running = state === "running";
  if ($("export-cancel").hidden === running) $("export-cancel").disabled = false;
  $("export-cancel").hidden = !running;
  if (state === "running") {
    say($("export-said"), [`${images(rows)} so far …`]);
    polling = setTimeout(async () => {
      try {
        showExport(await api.readExport());
      } catch (error) {
        showExport({ state: "failed", rows, lines: [error.message] });
      }
    }, 300);
  } else {
    say($("export-said"), lines, state === "failed");
    $("export-start").disabled = false;
  }
}

$("more-like").addEventListener("click", () => search([...chosen]));
$("save-list").addEventListener("click", saveList);
$("answer").addEventListener("click", openAnswers);
$("answers-save").addEventListener("click", saveAnswers);
$("answers-undo").addEventListener("click", takeBack);
$("export").addEventListener("click", openExport);
$("export-start").addEventListener("click", startExport);
$("export-cancel").addEventListener("click", cancelExport);
$("clear").addEventListener("click", clear);
for (const form of document.querySelectorAll("dialog form")) {
  form.addEventListener("submit", (event) => {
    event.preventDefault(); // Enter in a field presses the main button, and closes nothing
    form.querySelector(".main-button").click();
  });
}
for (const dialog of document.querySelectorAll("dialog")) {
  dialog.querySelector(".close").addEventListener("click", () => dialog.close());
  dialog.addEventListener("click", (event) => event.target === dialog && dialog.close());
}
