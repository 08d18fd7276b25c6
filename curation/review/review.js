// The review page: show one image and one question, take the answer by a key, and save it before the next one.
// A question is a row of the sample: one image and one label.

const $ = (id) => document.getElementById(id);
const PREFETCH = 8; // images
const SWIPE = 60; // pixels
const PACE_ANSWERS = 30; // the pace is computed from this many answers
const PAUSE = 20000; // milliseconds; longer times between two answers are breaks and do not count for the pace
const KEYS = {
  ArrowRight: "right", r: "right", ArrowLeft: "wrong", w: "wrong", ArrowDown: "unsure", u: "unsure",
  Backspace: "undo", z: "undo", ArrowUp: "undo",
};

let sample; // the response of /api/sample; its lists have one item for each row
let answers = new Map(); // row -> answer
let queue = []; // the rows of the selected labels, in the order in which they are shown
let history = []; // the rows answered on this page, in the order of the answers
let times = []; // when they were answered, in milliseconds
let row = null; // the row that is shown; null when the queue is finished
let saving = Promise.resolve();

async function start() {
  sample = await (await fetch("/api/sample")).json();
  answers = new Map(Object.entries(sample.answers).map(([key, answer]) => [Number(key), answer]));
  const counts = sample.labels.map((_, label) => sample.label.filter((other) => other === label).length);
  const all = new Option(`All ${sample.labels.length} labels`, "");
  $("labels").replaceChildren(all, ...sample.labels.map((name, label) => new Option(`${name} (${counts[label]})`, label)));
  $("file").textContent = sample.answers_file;
  $("next").textContent = `sightline calibrate ${sample.output} --truth ${sample.answers_file}\nsightline evaluate ${sample.output} --truth ${sample.answers_file}`;
  selectLabel();
}

/** Fill the queue label by label, because people answer faster while the question stays the same. Within a label, the
 * order is the sample's. */
function selectLabel() {
  const label = $("labels").value;
  queue = sample.label
    .map((_, index) => index)
    .filter((index) => label === "" || sample.label[index] === Number(label))
    .sort((one, other) => sample.label[one] - sample.label[other] || one - other);
  show(findUnanswered() ?? null);
}

function findUnanswered(start = 0) {
  return queue.slice(start).find((index) => !answers.has(index));
}

function show(next) {
  const labelBefore = row === null ? null : sample.label[row];
  row = next;
  $("work").hidden = row === null;
  $("done").hidden = row !== null;
  if (row !== null) {
    const name = sample.labels[sample.label[row]];
    $("image").src = `/api/image/${row}`;
    $("label").textContent = name;
    $("key").textContent = sample.key[row];
    $("score").textContent = `score ${sample.score[row].toFixed(3)}`;
    const changed = labelBefore !== null && labelBefore !== sample.label[row];
    const question = document.querySelector(".question");
    question.classList.remove("changed");
    if (changed) requestAnimationFrame(() => question.classList.add("changed"));
    $("status").textContent = `Is this ${name}? ${sample.key[row]}`;
    prefetch();
  } else {
    const all = queue.length === sample.label.length;
    $("done-title").textContent = all ? "All questions are answered." : "All questions about this label are answered.";
    $("status").textContent = $("done-title").textContent;
  }
  showProgress();
}

/** Fetch the next images before they are shown. */
function prefetch() {
  const open = queue.slice(queue.indexOf(row) + 1).filter((index) => !answers.has(index));
  for (const index of open.slice(0, PREFETCH)) new Image().src = `/api/image/${index}`;
}

function showProgress() {
  const answered = queue.filter((index) => answers.has(index)).length;
  $("count").textContent = `${answered.toLocaleString()} of ${queue.length.toLocaleString()}`;
  $("bar").setAttribute("aria-valuemax", queue.length);
  $("bar").setAttribute("aria-valuenow", answered);
  $("bar").firstElementChild.style.width = `${(100 * answered) / Math.max(1, queue.length)}%`;
  const steps = times.slice(-PACE_ANSWERS).map((time, i, all) => (i ? time - all[i - 1] : 0)).filter((step) => step && step < PAUSE);
  if (steps.length < 5) {
    $("pace").textContent = "";
  } else {
    const mean = steps.reduce((sum, step) => sum + step, 0) / steps.length;
    const minutes = ((queue.length - answered) * mean) / 60000;
    const left = minutes < 1 ? "less than a minute left" : `about ${Math.round(minutes)} min left`;
    $("pace").textContent = `${Math.round(60000 / mean)} a minute, ${left}`;
  }
  $("undo").disabled = $("back").disabled = !history.length;
}

function answer(what) {
  if (what === "undo") return undo();
  if (row === null) return;
  answers.set(row, what);
  history.push(row);
  times.push(performance.now());
  flash(what);
  save(row, what);
  show(findUnanswered(queue.indexOf(row) + 1) ?? findUnanswered() ?? null);
}

function undo() {
  if (!history.length) return;
  const last = history.pop();
  times.pop();
  answers.delete(last);
  save(last, "taken back");
  if (!queue.includes(last)) {
    $("labels").value = "";
    selectLabel();
  }
  show(last);
}

/** Save answers one at a time, in order. A question whose answer cannot be saved is asked again. */
function save(index, what) {
  saving = saving.then(async () => {
    try {
      const response = await fetch("/api/answer", {
        method: "POST",
        headers: { "content-type": "application/json" },
        body: JSON.stringify({ row: index, answer: what }),
      });
      if (!response.ok) throw new Error((await response.json().catch(() => ({}))).detail ?? response.statusText);
      $("trouble").hidden = true;
    } catch (error) {
      if (what !== "taken back") answers.delete(index);
      $("trouble").textContent = `Not saved: ${error.message}. Is sightline review still running? The question will be asked again.`;
      $("trouble").hidden = false;
      if (row === null) selectLabel();
      else showProgress();
    }
  });
}

function flash(what) {
  const button = $(what);
  button.classList.add("hit");
  setTimeout(() => button.classList.remove("hit"), 120);
}

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.target.matches("select")) return;
  const what = KEYS[event.key.length === 1 ? event.key.toLowerCase() : event.key];
  if (!what || event.repeat) return;
  event.preventDefault();
  answer(what);
});
for (const what of ["right", "wrong", "unsure", "undo"]) $(what).addEventListener("click", () => answer(what));
$("back").addEventListener("click", undo);
$("labels").addEventListener("change", () => {
  selectLabel();
  $("labels").blur();
});

let pointerStart = null;
$("stage").addEventListener("pointerdown", (event) => (pointerStart = event.clientX));
$("stage").addEventListener("pointerup", (event) => {
  const moved = pointerStart === null ? 0 : event.clientX - pointerStart;
  pointerStart = null;
  if (Math.abs(moved) >= SWIPE) answer(moved > 0 ? "right" : "wrong");
});
$("image").addEventListener("error", () => {
  if (row !== null) $("status").textContent = "The image cannot be shown.";
});

start().catch((error) => {
  $("trouble").textContent = `The page could not start: ${error.message}`;
  $("trouble").hidden = false;
});
