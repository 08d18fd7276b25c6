// Pictures: the thumbnail at once, then a larger picture of the original if it can be read.

import { sample } from "./answers.js";

const AT_ONCE = 2; // larger pictures on their way. Browsers have six connections, and answers need one
const ENLARGED = 3; // a picture is shown at most so many times larger than its pixels

const loading = new Map(); // row -> AbortController
const state = new Map(); // row -> "loaded" or why there is no larger picture
let wanted = []; // rows, the most urgent first
const waiting = new Map(); // element -> row

export function thumbnail(row) {
  return `api/thumbnail/${sample.review}/${row}`;
}

function larger(row) {
  return `api/picture/${sample.review}/${row}`;
}

/** Say which larger pictures are needed, the most urgent first. Those on their way that are not needed are cancelled. */
export function want(rows) {
  wanted = rows;
  for (const [row, control] of loading) {
    if (rows.includes(row)) continue;
    loading.delete(row);
    control.abort();
  }
  loadNext();
}

function loadNext() {
  for (const row of wanted) {
    if (loading.size >= AT_ONCE) return;
    if (state.has(row) || loading.has(row)) continue;
    const control = new AbortController();
    loading.set(row, control);
    load(row, control.signal).then((what) => loading.get(row) === control && settle(row, what));
  }
}

/** Bring a larger picture into the browser's cache. Returns "loaded", why there is none, or null to ask again later. */
async function load(row, signal) {
  try {
    const response = await fetch(larger(row), { signal });
    if (!response.ok) return null;
    if (response.headers.get("content-type") === "application/json") return (await response.json()).missing;
    await response.blob();
    return "loaded";
  } catch {
    return null;
  }
}

function settle(row, what) {
  loading.delete(row);
  wanted = wanted.filter((other) => other !== row);
  if (what !== null) state.set(row, what);
  for (const [image, shown] of waiting) {
    if (!image.isConnected) waiting.delete(image);
    else if (shown === row) upgrade(image, row);
  }
  loadNext();
}

/** Show a row's picture in an image element: nothing until the thumbnail is there, so that an earlier picture is never
 * taken for this one. Resolves to whether it is shown, or to null if the element shows another row by then. */
export async function show(image, row) {
  waiting.set(image, row);
  image.classList.remove("shown");
  image.dataset.row = row;
  const large = state.get(row) === "loaded";
  image.src = large ? larger(row) : thumbnail(row);
  const fine = await image.decode().then(() => true, () => false);
  if (waiting.get(image) !== row) return null;
  if (!fine && large) {
    state.delete(row);
    return show(image, row);
  }
  if (fine) reveal(image);
  if (state.get(row) === "loaded") upgrade(image, row);
  return fine;
}

function upgrade(image, row) {
  if (state.get(row) === "loaded" && image.classList.contains("shown") && !image.src.endsWith(larger(row))) {
    const next = new Image();
    next.src = larger(row);
    next.decode().then(() => {
      if (waiting.get(image) !== row) return;
      image.src = larger(row);
      image.decode().then(() => waiting.get(image) === row && reveal(image), () => {});
    }, () => {});
  }
  image.dispatchEvent(new CustomEvent("picture"));
}

function reveal(image) {
  image.style.width = `min(100%, ${ENLARGED * image.naturalWidth}px)`;
  image.style.height = `min(100%, ${ENLARGED * image.naturalHeight}px)`;
  image.classList.add("shown");
}

/** Say what an image element shows, in words. */
export function describe(image, row) {
  const what = state.get(row);
  const size = `${image.naturalWidth} × ${image.naturalHeight}`;
  if (what === "loaded") return `original, ${size}`;
  return what === undefined ? `thumbnail, ${size}; the original is being read` : `thumbnail, ${size}: ${what}`;
}

/** The element of one picture in a grid or a list: a button, and a magnifier beside it. */
export function makeTile(row, magnify) {
  const tile = document.createElement("div");
  tile.className = "tile";
  tile.dataset.row = row;
  const button = document.createElement("button");
  button.type = "button";
  button.className = "picture";
  const image = new Image();
  image.alt = "";
  image.draggable = false;
  const badge = document.createElement("span");
  badge.className = "mark";
  button.append(image, badge);
  const key = document.createElement("span");
  key.className = "key";
  key.textContent = sample.key[row];
  key.title = sample.key[row];
  tile.append(button, key);
  if (magnify) {
    const glass = document.createElement("button");
    glass.type = "button";
    glass.className = "magnify";
    glass.tabIndex = -1; // by keyboard, E on the picture does the same
    glass.setAttribute("aria-label", `Enlarge ${sample.key[row]}`);
    glass.addEventListener("click", () => magnify(row));
    tile.append(glass);
  }
  return { tile, button, image, badge };
}
