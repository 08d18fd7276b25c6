// One image: what the output has about it, its scores, and its neighbours in one click.

import * as api from "./api.js";
import * as grid from "./grid.js";
import * as selection from "./selection.js";

const $ = (id) => document.getElementById(id);
let like = () => {};
let failed = () => {};
let index = -1, position = -1;

/** Prepare. `search` searches for images like a position, `fail` shows an error. */
export function prepare(search, fail) {
  like = search;
  failed = fail;
}

/** Show the image at an index of the grid's result. */
export async function showDetail(at) {
  index = at;
  let row, about;
  try {
    row = await grid.fetchRow(at);
    if (!row) return;
    about = await api.image(row.position);
  } catch (error) {
    failed(error);
    return;
  }
  if (index !== at) return; // another one was asked for meanwhile
  position = row.position;
  const image = $("detail-image");
  image.classList.remove("shown");
  image.onload = () => image.classList.add("shown");
  image.alt = row.key;
  if (api.about.thumbnails) image.src = api.thumbnail(position);
  else image.removeAttribute("src");
  $("detail-key").textContent = row.key;
  $("detail-scores").replaceChildren(...about.scores.map(makeScore));
  $("detail-values").replaceChildren(...Object.entries(about.values).filter(([name]) => name !== "key").flatMap(([name, value]) => {
    const [term, text] = [document.createElement("dt"), document.createElement("dd")];
    term.textContent = name;
    text.textContent = value ?? "–";
    return [term, text];
  }));
  $("detail-previous").disabled = at <= 0;
  $("detail-next").disabled = at >= grid.results().count - 1;
  describeSelection();
  if (!$("detail").open) $("detail").showModal();
}

function makeScore({ label, score, given }) {
  const item = document.createElement("li");
  const [bar, name, number] = ["share", "name", "number"].map((kind) => {
    const one = document.createElement("span");
    one.className = kind;
    return one;
  });
  bar.style.width = `${100 * (score ?? 0)}%`;
  name.textContent = label;
  number.textContent = score === null ? "–" : grid.formatNumber(score);
  item.classList.toggle("given", given);
  item.title = given ? "The output has given this label" : "";
  item.append(bar, name, number);
  return item;
}

function describeSelection() {
  $("detail-select").firstChild.textContent = selection.has(position) ? "Selected " : "Select ";
  $("detail-select").setAttribute("aria-pressed", selection.has(position));
}

function step(by) {
  const next = index + by;
  if (next < 0 || next >= grid.results().count) return;
  grid.goTo(next);
  showDetail(next);
}

function search() {
  $("detail").close();
  like([position]);
}

async function toggle() {
  await selection.toggle(grid.results(), index);
  describeSelection();
}

$("detail-like").addEventListener("click", search);
$("detail-select").addEventListener("click", toggle);
$("detail-previous").addEventListener("click", () => step(-1));
$("detail-next").addEventListener("click", () => step(1));
$("detail").addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const onButton = event.target.matches("button");
  if (event.key === "ArrowLeft") step(-1);
  else if (event.key === "ArrowRight") step(1);
  else if (event.key.toLowerCase() === "m") search();
  else if (event.key === " " && !onButton) toggle();
  else return;
  event.preventDefault();
});
$("detail").addEventListener("close", () => {
  index = -1;
  $("grid").focus({ preventScroll: true });
});
