// What the server answered: scores as bars, the embedding, the time it took.

const $ = (id) => document.getElementById(id);
const NUMBERS_SHOWN = 12;
const SCROLL = matchMedia("(prefers-reduced-motion: reduce)").matches ? "instant" : "smooth";

/** The embedding on show, all of it. */
export let vector = null;

function make(tag, className, text = "") {
  const element = document.createElement(tag);
  element.className = className;
  element.textContent = text;
  return element;
}

const formatScore = (score) => (score > 0 && score < 0.001 ? "under 0.001" : score.toFixed(3));

/** Labels with scores, best first, of `name`; `softmax` if they share one unit. */
export function showScores(labels, name, softmax) {
  $("waiting").hidden = true;
  $("scores").replaceChildren(...labels.map(makeRow));
  const note = !labels.length
    ? "No label reached the lowest score that was asked for."
    : softmax
      ? "The scores add up to 1 over all labels that were asked."
      : "Each score stands alone. They run low: 0.1 to 0.5 is usual for a right label.";
  $("scores-note").textContent = note;
  $("scores-note").hidden = false;
  const best = labels.slice(0, 3).map(({ label, score }) => `${label} ${formatScore(score)}`);
  $("status").textContent = best.length ? `${name}: ${best.join(", ")}` : note;
  // On a phone the scores are below the form, out of sight.
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
  // Two frames on, so that the bar is drawn empty first and grows.
  requestAnimationFrame(() => requestAnimationFrame(() => (bar.style.width = `${100 * score}%`)));
  return row;
}

/** The round trip as this page saw it, in milliseconds, and the server's own account of its part. */
export function showTiming(elapsed, serverTiming) {
  const stages = [...(serverTiming ?? "").matchAll(/(\w+);dur=([\d.]+)/g)]
    .filter(([, stage, ms]) => stage !== "total" && ms >= 0.05)
    .map(([, stage, ms]) => `${stage} ${Number(ms).toFixed(1)}\u00a0ms`);
  $("timing").textContent = `${Math.round(elapsed)} ms`;
  $("stages").textContent = stages.length ? `Time on the server: ${stages.join(", ")}.` : "";
}

/** The first numbers of an embedding. */
export function showVector(numbers) {
  vector = numbers;
  const first = numbers.slice(0, NUMBERS_SHOWN).map((number) => number.toFixed(4));
  $("numbers").textContent = `[${first.join(", ")}, … ${numbers.length} in all]`;
  $("embedding").hidden = false;
}

/** Whether what is on show answers another question than the one in the form. */
export function showStale(stale) {
  $("results").classList.toggle("stale", stale);
}

/** Whether an answer is under way. */
export function showBusy(busy) {
  $("go").setAttribute("aria-disabled", String(busy));
  $("go").textContent = busy ? "Looking…" : "Score the labels";
  $("results").classList.toggle("busy", busy);
}
