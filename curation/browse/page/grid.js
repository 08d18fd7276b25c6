// A grid that scrolls through any number of images. Only the tiles on the screen, and a few around them, exist.
//
// Browsers limit an element's height, to 33 million pixels in Chromium and half of that in Firefox. A grid that would be
// higher than `HIGHEST` has that height, and a scroll position of its own: small movements are taken as they are, and
// large ones, of the scroll bar or of the keys Home and End, as a share of the whole.

import * as api from "./api.js";
import * as selection from "./selection.js";

const PAGE = 60; // rows that are loaded at once; the search sends the first ones
const HIGHEST = 4_000_000;
const GAP = 8;
const CAPTION = 22;
const AROUND = 2; // rows of tiles above and below the screen
const BELOW = 88; // pixels below the last row, where the selection is shown
const $ = (id) => document.getElementById(id);

let result = null; // the response of the search
let pages = new Map(); // number -> rows, or null while they are loaded
let tiles = new Map(); // index -> element
let columns = 1, width = 160, height = 182;
let top = 0; // the scroll position in the whole grid
let last = 0; // the element's scroll position when `top` was computed
let settling = null;
let active = 0; // the index that the keyboard is at
let open = () => {};
let failed = () => {};

const count = () => result?.count ?? 0;
const whole = () => Math.ceil(count() / columns) * height + GAP + BELOW;
const box = () => $("grid");
const visible = () => box().clientHeight;

/** Prepare the grid. `show` opens an image, `fail` shows an error. */
export function prepare(show, fail) {
  open = show;
  failed = fail;
  box().addEventListener("scroll", scrolled, { passive: true });
  new ResizeObserver(measure).observe(box());
}

/** Show another result. The grid starts at its beginning, or stays where it is with `stay`. */
export function showResult(found, stay = false) {
  result = found;
  pages = new Map([[0, found.rows]]);
  for (const tile of tiles.values()) tile.remove();
  tiles = new Map();
  if (!stay) {
    top = 0;
    active = 0;
    box().scrollTop = last = 0;
  }
  measure();
}

function measure() {
  const inner = box().clientWidth - 2 * GAP;
  if (inner <= 0) return;
  const anchor = Math.floor(top / height) * columns;
  const wanted = inner < 500 ? 110 : 168;
  columns = Math.max(2, Math.floor((inner + GAP) / (wanted + GAP)));
  width = (inner + GAP) / columns - GAP;
  height = Math.round(width + CAPTION + GAP);
  $("space").style.height = `${Math.min(whole(), HIGHEST)}px`;
  if (anchor) moveTo(Math.floor(anchor / columns) * height);
  draw();
}

function scrolled() {
  const now = box().scrollTop;
  const moved = now - last;
  last = now;
  const most = Math.max(0, whole() - visible());
  if (whole() <= HIGHEST) top = now;
  else if (now <= 0) top = 0;
  else if (now >= box().scrollHeight - visible() - 1) top = most;
  else if (Math.abs(moved) < 2 * visible()) top = Math.min(most, Math.max(0, top + moved));
  else top = (now / (box().scrollHeight - visible())) * most;
  clearTimeout(settling);
  settling = setTimeout(settle, 150);
  draw();
}

/** Bring the scroll bar to where the position is in the whole, once nothing moves. */
function settle() {
  if (whole() > HIGHEST) moveTo(top);
  draw();
}

function moveTo(position) {
  top = Math.min(Math.max(0, whole() - visible()), Math.max(0, position));
  const scale = whole() <= HIGHEST ? 1 : (box().scrollHeight - visible()) / Math.max(1, whole() - visible());
  last = Math.round(top * scale);
  if (whole() > HIGHEST && top > 0) last = Math.min(box().scrollHeight - visible() - 2, Math.max(1, last)); // not quite an end
  box().scrollTop = last;
  last = box().scrollTop;
}

function draw() {
  if (!result) return;
  const first = Math.max(0, (Math.floor(top / height) - AROUND) * columns);
  const stop = Math.min(count(), (Math.ceil((top + visible()) / height) + AROUND) * columns);
  for (const [index, tile] of tiles) {
    if (index < first || index >= stop) {
      if (tile.contains(document.activeElement)) box().focus({ preventScroll: true });
      tile.remove();
      tiles.delete(index);
    }
  }
  const shift = box().scrollTop - top;
  for (let index = first; index < stop; index += 1) {
    let tile = tiles.get(index);
    if (!tile) {
      tile = makeTile(index);
      tiles.set(index, tile);
      $("space").append(tile);
    }
    const x = GAP + (index % columns) * (width + GAP);
    const y = GAP + Math.floor(index / columns) * height + shift;
    tile.style.transform = `translate(${x}px, ${y}px)`;
    tile.style.width = `${width}px`;
    tile.style.height = `${height - GAP}px`;
    if (!tile.dataset.position) fill(tile, index);
  }
}

function makeTile(index) {
  const tile = document.createElement("div");
  tile.className = "tile";
  tile.setAttribute("role", "option");
  tile.id = `tile-${index}`;
  tile.setAttribute("aria-posinset", index + 1);
  tile.setAttribute("aria-setsize", count());
  tile.dataset.index = index;
  const image = document.createElement("img");
  image.alt = "";
  image.draggable = false;
  const mark = document.createElement("span");
  mark.className = "select";
  mark.title = "Select";
  const caption = document.createElement("span");
  caption.className = "caption";
  tile.append(image, mark, caption);
  return tile;
}

function fill(tile, index) {
  const row = rowAt(index);
  if (!row) return;
  tile.dataset.position = row.position;
  const [image, , caption] = tile.children;
  if (api.about.thumbnails) {
    image.addEventListener("load", () => image.classList.add("shown"), { once: true });
    image.addEventListener("error", () => tile.classList.add("broken"), { once: true });
    image.src = api.thumbnail(row.position);
  } else tile.classList.add("broken");
  const number = row.score ?? row.similarity;
  const parts = [number === null ? "" : formatNumber(number), row.copies ? `+${row.copies.toLocaleString()}` : ""].filter(Boolean);
  const score = document.createElement("b");
  score.textContent = parts.join(" ");
  caption.replaceChildren(...(parts.length ? [score, " "] : []), row.key);
  tile.title = [row.key, row.labels.join(", "), `${row.width} × ${row.height}`].filter(Boolean).join("\n");
  const copies = row.copies ? `, and ${row.copies} near-identical` : "";
  tile.setAttribute("aria-label", `${row.key}${number === null ? "" : `, ${formatNumber(number)}`}${copies}`);
  markTile(tile);
}

export function formatNumber(value) {
  if (value >= 0.0995) return value.toFixed(value >= 0.99 ? 3 : 2);
  return value.toPrecision(2).replace("e-0", "e-");
}

function rowAt(index) {
  const number = Math.floor(index / PAGE);
  const page = pages.get(number);
  if (page) return page[index % PAGE];
  if (page === undefined) load(number);
  return null;
}

async function load(number) {
  const of = result;
  pages.set(number, null);
  await new Promise((done) => setTimeout(done, 40)); // what only flies by is not loaded
  if (of !== result) return;
  const onScreen = [...tiles.keys()].some((index) => Math.floor(index / PAGE) === number);
  if (!onScreen && number !== Math.floor(active / PAGE)) {
    pages.delete(number);
    return;
  }
  try {
    const loaded = await api.rows(of.result, number * PAGE, (number + 1) * PAGE);
    if (of !== result) return;
    pages.set(number, loaded);
    if (pages.size > 200) for (const key of pages.keys()) if (Math.abs(key - number) > 50) pages.delete(key);
    draw();
  } catch (error) {
    pages.delete(number);
    if (of === result) failed(error);
  }
}

/** The row at an index, loaded if it is not there. */
export async function fetchRow(index) {
  if (index < 0 || index >= count()) return null;
  const known = pages.get(Math.floor(index / PAGE));
  if (known) return known[index % PAGE];
  return (await api.rows(result.result, index, index + 1))[0] ?? null;
}

function markTile(tile) {
  tile.setAttribute("aria-selected", selection.has(Number(tile.dataset.position)));
  tile.classList.toggle("active", Number(tile.dataset.index) === active && document.activeElement === box());
}

/** Show anew which tiles are selected, and which one the keyboard is at. */
export function markTiles() {
  for (const tile of tiles.values()) if (tile.dataset.position) markTile(tile);
  if (tiles.has(active)) box().setAttribute("aria-activedescendant", `tile-${active}`);
  else box().removeAttribute("aria-activedescendant");
}

export const current = () => active;
export const results = () => result;

/** Go to an image: it is on the screen afterwards. */
export function goTo(index) {
  active = Math.min(count() - 1, Math.max(0, index));
  const from = Math.floor(active / columns) * height;
  if (from < top) moveTo(from);
  else if (from + height + GAP > top + visible()) moveTo(from + height + GAP - visible());
  draw();
  markTiles();
}

/** Handle a key of the grid. Returns whether it was one. */
export function press(event) {
  const screen = Math.max(1, Math.floor(visible() / height)) * columns;
  const steps = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns, ArrowDown: columns, PageUp: -screen, PageDown: screen, Home: -Infinity, End: Infinity };
  if (event.key in steps && count()) {
    const before = active;
    goTo(active + steps[event.key]);
    if (event.shiftKey) selection.selectRange(result, before, active);
  } else if (event.key === " " && count()) selection.toggle(result, active);
  else if (event.key === "Enter" && count()) open(active);
  else return false;
  return true;
}

box().addEventListener("click", (event) => {
  const tile = event.target.closest(".tile");
  if (!tile?.dataset.position) return;
  active = Number(tile.dataset.index);
  box().focus({ preventScroll: true });
  if (event.shiftKey) selection.selectTo(result, active);
  else if (event.ctrlKey || event.metaKey || event.target.classList.contains("select")) selection.toggle(result, active);
  else open(active);
  markTiles();
});
box().addEventListener("focus", markTiles);
box().addEventListener("blur", markTiles);
