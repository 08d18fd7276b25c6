// The answers as the page knows them, and their way to the server: one save after the other, each with the versions of
// the answers that the person saw. A save that another tab has overtaken is refused by the server, and is not repeated.

const POLL = 4000; // milliseconds between two looks at what other tabs have answered

export let sample; // the response of /api/sample; its lists have one item for each row
export const answers = new Map(); // row -> answer, with those that are on their way to the server
export const history = []; // what undo takes back, the oldest first: {changes: [{row, before}], marks}

const known = new Map(); // row -> [answer or null, version], as the server said last
const pending = new Map(); // row -> number of its saves that are on their way
const epochs = new Map(); // row -> number of its saves that were refused; a save of an earlier epoch is not sent
let version = 0; // of the server's file
let saving = Promise.resolve();
let report = {}; // {changed(rows), trouble(text), notice(text)}
let troubled = false; // whether the last save failed, which the page says
let lost = false; // whether the page says that the server does not respond

/** Load the sample and its answers. `callbacks` are called when answers change in another tab, and for messages. */
export async function load(callbacks) {
  report = callbacks;
  const response = await fetch("api/sample");
  if (!response.ok) throw new Error(response.statusText);
  sample = await response.json();
  version = sample.version;
  for (const [row, answer, number] of sample.answers) {
    known.set(row, [answer, number]);
    // Undo after a reload takes back the latest answers, as it would have done before.
    if (answer !== null) history.push({ changes: [{ row, before: undefined }] });
    setAnswer(row, answer);
  }
  setInterval(poll, POLL);
  document.addEventListener("visibilitychange", poll);
}

export function isSaving() {
  return pending.size > 0;
}

/** Save `changes`, [{row, answer}], in one request. They count on this page at once, and no longer if the server does
 * not take them. Returns a promise: "saved"; "overtaken", when some were answered in another tab and the others are
 * saved; or "failed", when none is saved. */
export function save(changes) {
  const batch = changes.map(({ row, answer }) => ({ row, answer, epoch: epochs.get(row) ?? 0 }));
  for (const { row, answer } of batch) {
    setAnswer(row, answer);
    pending.set(row, (pending.get(row) ?? 0) + 1);
  }
  const result = saving.then(() => send(batch));
  saving = result;
  return result;
}

/** Answer questions, and remember for undo what was there before. `marks` are kept for the view that undoes it. */
export function answerAll(changes, marks) {
  history.push({ changes: changes.map(({ row }) => ({ row, before: answers.get(row) })), marks });
  return save(changes);
}

/** Take back the last step. Returns what `history` had, or undefined if there was nothing. */
export function undo() {
  const step = history.pop();
  if (step) save(step.changes.map(({ row, before }) => ({ row, answer: before ?? "taken back" })));
  return step;
}

async function send(batch) {
  let open = batch.filter(({ row, epoch }) => (epochs.get(row) ?? 0) === epoch);
  let outcome = open.length === batch.length ? "saved" : "overtaken";
  let reply = null;
  try {
    while (open.length) {
      const body = open.map(({ row, answer }) => ({ row, answer, version: known.get(row)?.[1] ?? 0 }));
      const response = await fetch("api/answers", {
        method: "POST",
        headers: { "content-type": "application/json" },
        body: JSON.stringify({ review: sample.review, since: version, answers: body }),
      });
      const said = await response.json().catch(() => ({}));
      if (response.ok) {
        reply = said;
        break;
      }
      if (response.status !== 409 || !said.conflicts?.length) throw new Error(said.detail ?? response.statusText);
      outcome = "overtaken";
      refuse(said.conflicts);
      const lost = new Set(said.conflicts.map(([row]) => row));
      open = open.filter(({ row }) => !lost.has(row));
    }
    if (reply) {
      troubled = lost = false;
      report.trouble("");
    }
  } catch (error) {
    outcome = "failed";
    troubled = true;
    for (const { row } of open) forget(row);
    report.trouble(`Not saved: ${error.message}. Is sightline review still running? What was not saved will be asked again.`);
  }
  for (const { row } of batch) {
    const left = pending.get(row) - 1;
    if (left) pending.set(row, left);
    else pending.delete(row);
  }
  // The rows of this save are this page's own, also where a later save of them is on its way.
  if (reply) apply(reply, new Set(open.map(({ row }) => row)));
  if (outcome !== "saved") {
    for (const { row } of batch) if (!pending.has(row)) setAnswer(row, known.get(row)?.[0] ?? null);
    report.changed(new Set(batch.map(({ row }) => row)));
  }
  return outcome;
}

/** Take over the answers that another tab gave to questions that this page has answered differently. */
function refuse(conflicts) {
  for (const [row, answer, number] of conflicts) {
    known.set(row, [answer, number]);
    forget(row);
  }
  const [row, answer] = conflicts[0];
  const what = `${sample.key[row]} is “${answer ?? "not answered"}”`;
  const more = conflicts.length > 1 ? ` and ${conflicts.length - 1} more` : "";
  report.notice(`Answered in another tab in the meantime: ${what}${more}. Your answer was not saved. Change it under “Answers” if it is wrong.`);
}

/** Drop the saves of a row that wait, and its steps of undo: they were made without knowing what counts. */
function forget(row) {
  epochs.set(row, (epochs.get(row) ?? 0) + 1);
  for (const step of history) step.changes = step.changes.filter((change) => change.row !== row);
  for (let i = history.length - 1; i >= 0; i--) if (!history[i].changes.length) history.splice(i, 1);
}

function apply(reply, own = new Set()) {
  const changed = new Set();
  let skipped = false;
  for (const [row, answer, number] of reply.changes) {
    if (number <= (known.get(row)?.[1] ?? 0)) continue;
    if (own.has(row)) known.set(row, [answer, number]);
    else if (!pending.has(row)) {
      // With a save on its way, the version stays, so that the server refuses the save.
      known.set(row, [answer, number]);
      forget(row);
      setAnswer(row, answer);
      changed.add(row);
    } else skipped = true;
  }
  if (!skipped) version = Math.max(version, reply.version); // else the next response has these rows again
  if (changed.size) report.changed(changed);
}

async function poll() {
  if (document.hidden) return;
  try {
    const response = await fetch(`api/changes?of=${sample.review}&since=${version}`);
    const said = await response.json();
    if (lost) report.trouble("");
    lost = false;
    if (response.ok) apply(said);
    else if (response.status === 410) report.trouble("Another review runs at this address: reload this page.");
  } catch {
    if (troubled) return;
    lost = true;
    report.trouble("sightline review does not respond. Is it still running? Answers cannot be saved.");
  }
}

function setAnswer(row, answer) {
  answers.delete(row);
  if (answer && answer !== "taken back") answers.set(row, answer);
}
