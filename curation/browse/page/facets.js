// The filters: labels with the number of images that have them, a score for each selected label, reasons of rejects.

import * as api from "./api.js";
import { change, state } from "./query.js";

const $ = (id) => document.getElementById(id);
const MOST = 200; // labels that are listed
let search = () => {};
let counts = []; // by label
let result = null;

/** Prepare. `run` starts a search after the state was changed. */
export function prepare(run) {
  search = run;
  $("label-filter").addEventListener("input", draw);
  $("where").addEventListener("change", () => {
    change({ where: $("where").value.trim(), reason: "" });
    search();
  });
}

/** Show the counts of a result. With `stay`, what somebody is typing stays. */
export function showFacets(found, stay) {
  result = found;
  counts = found.labels;
  if (!stay) $("where").value = state.where;
  draw();
}

function draw() {
  if (!result) return;
  const names = api.about.labels;
  $("label-filter").hidden = names.length <= 12;
  const wanted = $("label-filter").value.trim().toLowerCase();
  const selected = state.labels.map(({ label }) => label);
  const order = names.map((_, index) => index)
    .filter((index) => selected.includes(names[index]) || (!wanted ? counts[index] : names[index].toLowerCase().includes(wanted)));
  order.sort((a, b) => selected.includes(names[b]) - selected.includes(names[a]) || counts[b] - counts[a] || a - b);
  const most = Math.max(1, ...counts);
  const focused = document.activeElement?.closest("#labels [data-label]")?.dataset.label;
  const items = order.slice(0, MOST).map((index) => makeLabel(names[index], counts[index] ?? 0, most));
  if (!wanted && (result.unlabelled || state.unlabelled)) items.push(makeItem("without a label", result.unlabelled, most, state.unlabelled, () => {
    change({ unlabelled: !state.unlabelled, reason: "" });
    search();
  }));
  // A slider that is being moved must stay the same element.
  if (document.activeElement?.matches("#labels input[type=range]")) updateValues(order.slice(0, MOST));
  else {
    $("labels").replaceChildren(...items);
    if (focused !== undefined) [...$("labels").querySelectorAll("[data-label]")].find((one) => one.dataset.label === focused)?.querySelector("button").focus();
  }
  $("labels-more").hidden = order.length <= MOST;
  $("labels-more").textContent = `${(order.length - MOST).toLocaleString()} more: type a part of a name`;
  drawReasons();
}

function updateValues(order) {
  for (const index of order) {
    const item = [...$("labels").children].find((one) => one.dataset.label === api.about.labels[index]);
    if (item) item.querySelector(".number").textContent = counts[index].toLocaleString();
  }
}

function makeItem(name, count, most, pressed, toggle) {
  const item = document.createElement("li");
  const button = document.createElement("button");
  button.type = "button";
  button.setAttribute("aria-pressed", pressed);
  const text = document.createElement("span");
  text.className = "name";
  text.textContent = name;
  const number = document.createElement("span");
  number.className = "number";
  number.textContent = count.toLocaleString();
  const bar = document.createElement("span");
  bar.className = "share";
  bar.style.width = `${(100 * count) / most}%`;
  button.append(bar, text, number);
  button.title = name;
  button.addEventListener("click", toggle);
  item.append(button);
  return item;
}

function makeLabel(name, count, most) {
  const condition = state.labels.find(({ label }) => label === name);
  const item = makeItem(name, count, most, Boolean(condition), () => {
    change({ labels: condition ? state.labels.filter(({ label }) => label !== name) : [...state.labels, { label: name }], reason: "" });
    search();
  });
  item.dataset.label = name;
  if (condition) item.append(makeSlider(name, condition));
  return item;
}

function makeSlider(name, condition) {
  const threshold = api.about.thresholds[name];
  const box = document.createElement("div");
  box.className = "slider";
  const bars = document.createElement("div");
  bars.className = "histogram";
  bars.setAttribute("aria-hidden", "true");
  const histogram = result.histograms[name] ?? [];
  const highest = Math.max(1, ...histogram.map((count) => Math.log1p(count)));
  for (const [index, count] of histogram.entries()) {
    const bar = document.createElement("span");
    bar.style.height = `${(100 * Math.log1p(count)) / highest}%`;
    bar.title = `${(index / histogram.length).toFixed(2)} to ${((index + 1) / histogram.length).toFixed(2)}: ${count.toLocaleString()} images`;
    bars.append(bar);
  }
  const slider = document.createElement("input");
  slider.type = "range";
  slider.min = 0;
  slider.max = 1;
  slider.step = 0.01;
  slider.value = condition.min ?? threshold ?? 0.5;
  slider.setAttribute("aria-label", `Lowest score for ${name}`);
  const text = document.createElement("span");
  text.className = "muted small";
  const describe = () => {
    const least = state.labels.find(({ label }) => label === name)?.min;
    text.textContent = least === undefined ? `the images that were given it${threshold === undefined ? "" : ` (score ≥ ${threshold})`}` : `score ≥ ${least}`;
    for (const [index, bar] of [...bars.children].entries()) bar.classList.toggle("out", (index + 1) / bars.children.length <= Number(slider.value));
  };
  let timer = null;
  slider.addEventListener("input", () => {
    change({ labels: state.labels.map((one) => (one.label === name ? { label: name, min: Number(slider.value) } : one)) }, true);
    describe();
    clearTimeout(timer);
    timer = setTimeout(search, 120);
  });
  describe();
  box.append(bars, slider, text);
  return box;
}

function drawReasons() {
  const reasons = Object.entries(api.about.rejected);
  $("rejected").hidden = !reasons.length;
  const most = Math.max(1, ...reasons.map(([, count]) => count));
  $("reasons").replaceChildren(...reasons.map(([reason, count]) => makeItem(reason.replaceAll("_", " "), count, most, state.reason === reason, () => {
    change({ reason: state.reason === reason ? "" : reason });
    search();
  })));
}
