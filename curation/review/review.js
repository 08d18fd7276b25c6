// The review page: one image, one question, an answer by a key, saved before it counts.

const $ = (id) => document.getElementById(id);
const AHEAD = 8; // images fetched before they are shown
const SWIPE = 60; // pixels
const RECENT = 30; // answers that the pace is taken from
const PAUSE = 20000; // milliseconds without an answer that are no work
const KEYS = {
  ArrowRight: "right", r: "right", ArrowLeft: "wrong", w: "wrong", ArrowDown: "unsure", u: "unsure",
  Backspace: "undo", z: "undo", ArrowUp: "undo",
};

let work; // what is asked
let given = new Map(); // by place, the answer
let asked = []; // the places of the labels on show, in order
let done = []; // places in the order in which they were answered here
let times = [];
let place = null;
let saving = Promise.resolve();

async function start() {
  work = await (await fetch("/api/work")).json();
  given = new Map(Object.entries(work.given).map(([at, answer]) => [Number(at), answer]));
  // Label by label, because a question that stays is answered faster; within a label as the sample was drawn.
  const counts = work.labels.map((_, label) => work.label.filter((one) => one === label).length);
  const all = new Option(`All ${work.labels.length} labels`, "");
  $("labels").replaceChildren(all, ...work.labels.map((name, label) => new Option(`${name} (${counts[label]})`, label)));
  $("file").textContent = work.answers_file;
  $("next").textContent = `sightline calibrate ${work.output} --truth ${work.answers_file}\nsightline evaluate ${work.output} --truth ${work.answers_file}`;
  choose();
}

function choose() {
  const label = $("labels").value;
  const places = work.label.map((_, at) => at);
  asked = places
    .filter((at) => label === "" || work.label[at] === Number(label))
    .sort((one, other) => work.label[one] - work.label[other] || one - other);
  show(asked.find((at) => !given.has(at)) ?? null);
}

function show(next) {
  const before = place === null ? null : work.label[place];
  place = next;
  $("work").hidden = place === null;
  $("done").hidden = place !== null;
  if (place !== null) {
    const name = work.labels[work.label[place]];
    $("image").src = `/api/image/${place}`;
    $("label").textContent = name;
    $("key").textContent = work.key[place];
    $("score").textContent = `scores ${work.score[place].toFixed(3)}`;
    const changed = before !== null && before !== work.label[place];
    const question = document.querySelector(".question");
    question.classList.remove("changed");
    if (changed) requestAnimationFrame(() => question.classList.add("changed"));
    $("status").textContent = `Is this ${name}? ${work.key[place]}`;
    prepare();
  } else {
    const all = asked.length === work.label.length;
    $("done-title").textContent = all ? "All of it is answered." : "This label is answered.";
    $("status").textContent = $("done-title").textContent;
  }
  count();
}

/** Fetch the next images, so that they are there when their turn comes. */
function prepare() {
  const open = asked.slice(asked.indexOf(place) + 1).filter((at) => !given.has(at));
  for (const at of open.slice(0, AHEAD)) new Image().src = `/api/image/${at}`;
}

function count() {
  const answered = asked.filter((at) => given.has(at)).length;
  $("count").textContent = `${answered.toLocaleString()} of ${asked.length.toLocaleString()}`;
  $("bar").setAttribute("aria-valuemax", asked.length);
  $("bar").setAttribute("aria-valuenow", answered);
  $("bar").firstElementChild.style.width = `${(100 * answered) / Math.max(1, asked.length)}%`;
  const steps = times.slice(-RECENT).map((at, i, all) => (i ? at - all[i - 1] : 0)).filter((step) => step && step < PAUSE);
  if (steps.length < 5) {
    $("pace").textContent = "";
  } else {
    const each = steps.reduce((sum, step) => sum + step, 0) / steps.length;
    const minutes = ((asked.length - answered) * each) / 60000;
    const left = minutes < 1 ? "under a minute left" : `about ${Math.round(minutes)} min left`;
    $("pace").textContent = `${Math.round(60000 / each)} a minute, ${left}`;
  }
  $("undo").disabled = $("back").disabled = !done.length;
}

function answer(what) {
  if (what === "undo") return undo();
  if (place === null) return;
  given.set(place, what);
  done.push(place);
  times.push(performance.now());
  flash(what);
  save(place, what);
  const later = asked.slice(asked.indexOf(place) + 1).find((at) => !given.has(at));
  show(later ?? asked.find((at) => !given.has(at)) ?? null);
}

function undo() {
  if (!done.length) return;
  const last = done.pop();
  times.pop();
  given.delete(last);
  save(last, "taken back");
  if (!asked.includes(last)) {
    $("labels").value = "";
    choose();
  }
  show(last);
}

/** In order, one at a time; what cannot be saved is asked again. */
function save(at, what) {
  saving = saving.then(async () => {
    try {
      const reply = await fetch("/api/answer", {
        method: "POST",
        headers: { "content-type": "application/json" },
        body: JSON.stringify({ place: at, answer: what }),
      });
      if (!reply.ok) throw new Error((await reply.json().catch(() => ({}))).detail ?? reply.statusText);
      $("trouble").hidden = true;
    } catch (error) {
      if (what !== "taken back") given.delete(at);
      $("trouble").textContent = `Not saved: ${error.message}. Is sightline review still running? The image is asked again.`;
      $("trouble").hidden = false;
      if (place === null) choose();
      else count();
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
  choose();
  $("labels").blur();
});

let from = null;
$("stage").addEventListener("pointerdown", (event) => (from = event.clientX));
$("stage").addEventListener("pointerup", (event) => {
  const moved = from === null ? 0 : event.clientX - from;
  from = null;
  if (Math.abs(moved) >= SWIPE) answer(moved > 0 ? "right" : "wrong");
});
$("image").addEventListener("error", () => {
  if (place !== null) $("status").textContent = "The image cannot be shown.";
});

start().catch((error) => {
  $("trouble").textContent = `The page could not start: ${error.message}`;
  $("trouble").hidden = false;
});
