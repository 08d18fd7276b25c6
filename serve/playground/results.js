// The results: scores as bars, the embedding, and the request's timing.

const $ = (id) => document.getElementById(id);
const NUMBERS_SHOWN = 12;
const SCROLL = matchMedia("(prefers-reduced-motion: reduce)").matches ? "instant" : "smooth";

/** All numbers of the embedding that is shown. */
export let vector = null;

function make(tag, className, text = "") {
  const element = document.createElement(tag);
  element.className = className;
  element.textContent = text;
  return element;
}

const formatScore = (score) => (score > 0 && score < 0.001 ? "under 0.001" : score.toFixed(3));

/** Show labels with scores, best first. `name` is the image's; `softmax` is whether the scores add up to 1. */
export function showScores(labels, name, softmax) {
  $("waiting").hidden = true;
  $("scores").replaceChildren(...labels.map(makeRow));
  const note = !labels.length
    ? "No label reached the lowest score."
    : softmax
      ? "The scores add up to 1 over all labels of the request."
      : "Each score is independent of the others. Scores are low: 0.1 to 0.5 is usual for a correct label.";
  $("scores-note").textContent = note;
  $("scores-note").hidden = false;
  const best = labels.slice(0, 3).map(({ label, score }) => `${label} ${formatScore(score)}`);
  $("status").textContent = best.length ? `${name}: ${best.join(", ")}` : note;
  // On a phone the scores are below the form and not visible.
  if ($("results").getBoundingClientRect().top > 0.7 * innerHeight) $("results").scrollIntoView({ behavior: SCROLL });
}

function makeRow({ label, score }) {
  const row = make("li", "score");
  const meter = make("div", "meter");
  const bar = make("span", "");
  const about = { role: "meter", "aria-label": label, "aria-valuemin": 0, "aria-valuemax": 1, "aria-valuenow": score };
  for (const [name, value] of Object.entries(about)) meter.setAttribute(name, value);
  meter.setAttribute("aria-valuetext", formatScore(score));
  meter.append(bar);
  row.append(make("span", "score-label", label), make("span", "score-number", formatScore(score)), meter);
  // Set the width two frames later, so that the browser draws an empty bar first and animates it.
  requestAnimationFrame(() => requestAnimationFrame(() => (bar.style.width = `${100 * score}%`)));
  return row;
}

/** Show the round trip's milliseconds as measured by this page, and the stages from the Server-Timing header. */
export function showTiming(elapsed, serverTiming) {
  const stages = [...(serverTiming ?? "").matchAll(/(\w+);dur=([\d.]+)/g)]
    .filter(([, stage, ms]) => stage !== "total" && ms >= 0.05)
    .map(([, stage, ms]) => `${stage} ${Number(ms).toFixed(1)}\u00a0ms`);
  $("timing").textContent = `${Math.round(elapsed)} ms`;
  $("stages").textContent = stages.length ? `Time on the server: ${stages.join(", ")}.` : "";
}

/** Show the first numbers of an embedding. */
export function showVector(numbers) {
  vector = numbers;
  const first = numbers.slice(0, NUMBERS_SHOWN).map((number) => number.toFixed(4));
  $("numbers").textContent = `[${first.join(", ")}, … ${numbers.length} in all]`;
  $("embedding").hidden = false;
}

/** Mark the results as stale if they belong to another query than the form's. */
export function showStale(stale) {
  $("results").classList.toggle("stale", stale);
}

/** Show whether a request is in progress. */
export function showBusy(busy) {
  $("go").setAttribute("aria-disabled", String(busy));
  $("go").textContent = busy ? "Scoring…" : "Score the labels";
  $("results").classList.toggle("busy", busy);
}
