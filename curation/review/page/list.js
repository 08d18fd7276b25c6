// The view of the answers: filter them, and open one to change it.

import { answers, sample } from "./answers.js";
import { makeTile, show as showPicture, want } from "./pictures.js";
import { showsScores } from "./settings.js";

const $ = (id) => document.getElementById(id);
const PART = 120; // tiles that are added at once

let rows = [];
let open = () => {};
const seen = new IntersectionObserver((entries) => {
  for (const { isIntersecting, target } of entries) {
    if (!isIntersecting) continue;
    seen.unobserve(target);
    showPicture(target.querySelector("img"), Number(target.dataset.row));
  }
}, { root: $("list"), rootMargin: "300px" });

/** Show the questions of the queue that the filter selects. `openOne` is called with the row of a clicked one. */
export function showList(queue, openOne, focused = null) {
  open = openOne;
  const filter = $("filter").value;
  rows = queue.filter((row) => {
    const answer = answers.get(row);
    return filter === "open" ? !answer : filter === "answered" ? answer : answer === filter;
  });
  const note = filter === "open" && rows.length ? " They are asked in their order, so that the answers stay a random sample." : "";
  $("found").textContent = `${rows.length.toLocaleString()} of ${queue.length.toLocaleString()}.${note}`;
  $("status").textContent = $("found").textContent;
  $("answered").replaceChildren();
  want([]);
  do addPart();
  while (focused !== null && !$("more").hidden && !find(focused));
  find(focused)?.focus();
}

function find(row) {
  return row === null ? null : document.querySelector(`#answered [data-row="${row}"] button:enabled`);
}

function addPart() {
  const from = $("answered").childElementCount;
  for (const row of rows.slice(from, from + PART)) {
    const { tile, button, badge } = makeTile(row, null);
    const answer = answers.get(row);
    const label = sample.labels[sample.label[row]];
    tile.dataset.mark = answer ?? "open";
    badge.textContent = answer ?? "";
    const score = answer || showsScores() ? `score ${sample.score[row].toFixed(3)}, ` : "";
    const more = document.createElement("span");
    more.className = "more";
    more.textContent = more.title = `${score}${label}`;
    tile.append(more);
    button.setAttribute("aria-label", `${sample.key[row]}: ${answer ?? "not answered"}, ${score}${label}`);
    // A person who picks the next question by its picture would make the sample less random.
    button.disabled = !answer;
    button.addEventListener("click", () => open(row));
    $("answered").append(tile);
    seen.observe(tile);
  }
  $("more").hidden = $("answered").childElementCount >= rows.length;
}

export function leave() {
  seen.disconnect();
  $("answered").replaceChildren();
}

/** Handle a key. Returns whether it was one of this view's. */
export function press(key) {
  const buttons = [...document.querySelectorAll("#answered button:enabled")];
  const at = buttons.indexOf(document.activeElement);
  const across = getComputedStyle($("answered")).gridTemplateColumns.split(" ").length;
  const step = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -across, ArrowDown: across }[key];
  if (!step || !buttons.length) return false;
  buttons[at < 0 ? 0 : Math.min(buttons.length - 1, Math.max(0, at + step))].focus();
  return true;
}

$("more").addEventListener("click", addPart);
