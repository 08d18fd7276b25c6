// The page: the search box, the line above the grid, and what connects the grid, the filters and the selection.

import * as api from "./api.js";
import * as detail from "./detail.js";
import * as facets from "./facets.js";
import * as grid from "./grid.js";
import { change, isRanked, makeQuery, parse, readAddress, state } from "./query.js";
import * as selection from "./selection.js";

const $ = (id) => document.getElementById(id);
const FAST = 1000, SLOW = 5000; // milliseconds between two looks at the copy, while it grows and afterwards
let running = null; // the controller of the search that is under way
let shown = null; // the response that is shown
let silent = false; // whether the command did not answer when it was last asked how far the copy is
let updated = false; // whether there are images that the result does not know of

function note(text, button = "", action = null) {
  $("note").hidden = !text;
  const [message, link] = $("note").children;
  message.textContent = text;
  link.hidden = !button;
  link.textContent = button;
  link.onclick = action;
}

function fail(error) {
  if (error.name === "AbortError") return;
  if (error.status === 410) note(error.message, "Load again", () => window.location.reload());
  else if (error.status === 409) note(error.message, "Search again", () => search(true));
  else note(error.message);
}

/** Search for what the state says. With `stay`, the grid stays where it is, and so does what somebody is typing. */
async function search(stay = false) {
  running?.abort();
  const controller = (running = new AbortController());
  drawControls(stay === true);
  const listed = Boolean(state.reason);
  $("grid").hidden = listed;
  $("rejects").hidden = !listed;
  if (listed) await showRejects(0, controller);
  const waiting = setTimeout(() => document.body.classList.add("busy"), 150);
  try {
    const found = await api.search(makeQuery(), controller.signal);
    if (controller !== running) return;
    shown = found;
    if (found.version !== api.about.version) await api.loadAbout();
    const gone = await selection.follow(found.version);
    if (controller !== running) return;
    note(gone ? `${gone.toLocaleString()} of the selected images are no longer in the output.` : "");
    grid.showResult(found, stay === true);
    facets.showFacets(found, stay === true);
    describe(found);
    updated = false;
  } catch (error) {
    if (controller === running) fail(error);
  } finally {
    clearTimeout(waiting);
    if (controller === running) document.body.classList.remove("busy");
  }
}

function describe(found) {
  if (state.reason) return;
  const number = (value) => value.toLocaleString();
  const parts = [];
  const ranked = parse(state.q).texts.length > 0;
  if (ranked && state.cutoff === "auto" && !found.count && found.best > found.cutoff) {
    parts.push(found.left_out ? "All relevant images are left out" : "No other image is relevant");
  } else if (ranked && state.cutoff === "auto" && !found.count) {
    parts.push("Nothing here is relevant");
    if (found.best !== null) note(`The best score is ${grid.formatNumber(found.best)}, and the cut-off ${grid.formatNumber(found.cutoff)}.`, "Show the nearest", () => {
      change({ cutoff: "none" });
      search();
    });
  } else parts.push(`${number(found.count)} ${found.count === 1 ? "image" : "images"}`);
  if (found.count !== found.searched || found.searched !== api.about.copied) parts.push(`${found.count ? "of" : "among"} ${number(found.searched)}`);
  if (found.found > found.count) parts.push(`(${number(found.found - found.count)} copies folded, among the first ${number(api.about.folded_among)})`);
  if (found.left_out) parts.push(`· ${number(found.left_out)} show what is unwanted`);
  if (found.ms >= 1) parts.push(`· ${Math.round(found.ms)} ms`);
  $("count").textContent = parts.join(" ");
}

async function showRejects(start, of = running) {
  try {
    const { count, rows } = await api.rejects(state.reason, start);
    if (of !== running) return; // something else was asked for meanwhile
    const body = $("rejects").querySelector("tbody");
    const lines = rows.map((row) => {
      const line = document.createElement("tr");
      for (const name of ["key", "detail", "source"]) {
        const cell = document.createElement("td");
        cell.textContent = row[name];
        line.append(cell);
      }
      return line;
    });
    if (!start) body.replaceChildren(...lines);
    else body.append(...lines);
    const more = $("rejects").querySelector("button");
    more.hidden = body.children.length >= count;
    more.onclick = () => showRejects(body.children.length);
    $("count").textContent = `${count.toLocaleString()} rejected: ${state.reason.replaceAll("_", " ")}`;
  } catch (error) {
    fail(error);
  }
}

function drawControls(stay) {
  if (!stay && $("q").value.trim() !== state.q) $("q").value = state.q;
  $("order").value = state.order;
  $("order").options[0].textContent = isRanked() || state.labels.length ? "best first" : "as they come";
  $("fold").checked = state.fold;
  const chips = [];
  for (const position of state.like) chips.push(makeChip(`like an image`, api.thumbnail(position), { like: state.like.filter((one) => one !== position) }));
  for (const image of state.images) chips.push(makeChip("like your image", "", { images: state.images.filter((one) => one !== image) }));
  for (const { label, min } of state.labels) {
    chips.push(makeChip(min === undefined ? label : `${label} ≥ ${min}`, "", { labels: state.labels.filter((one) => one.label !== label) }));
  }
  if (state.unlabelled) chips.push(makeChip("without a label", "", { unlabelled: false }));
  if (state.where) chips.push(makeChip(state.where, "", { where: "" }));
  if (state.reason) chips.push(makeChip(`rejected: ${state.reason.replaceAll("_", " ")}`, "", { reason: "" }));
  if (state.cutoff === "none" && parse(state.q).texts.length) chips.push(makeChip("also what is not relevant", "", { cutoff: "auto" }));
  $("chips").replaceChildren(...chips);
}

function makeChip(text, picture, changes) {
  const chip = document.createElement("button");
  chip.type = "button";
  chip.className = "chip";
  chip.title = "Remove";
  if (picture && api.about.thumbnails) {
    const image = document.createElement("img");
    image.src = picture;
    image.alt = "";
    chip.append(image);
  }
  const name = document.createElement("span");
  name.textContent = text;
  const cross = document.createElement("span");
  cross.textContent = "×";
  cross.setAttribute("aria-hidden", "true");
  chip.setAttribute("aria-label", `Remove: ${text}`);
  chip.append(name, cross);
  chip.addEventListener("click", () => {
    change(changes);
    search();
  });
  return chip;
}

function searchLike(positions) {
  change({ like: positions, q: "", reason: "", images: [] });
  search();
}

async function searchImage(blob) {
  try {
    document.body.classList.add("busy");
    const image = await api.upload(blob);
    change({ images: [image], like: [], q: "", reason: "" });
    await search();
  } catch (error) {
    fail(error);
  }
  document.body.classList.remove("busy");
}

/** Look how far the copy is. The result is made anew while nobody has scrolled or selected, else a line offers it. */
async function follow() {
  let wait = SLOW;
  try {
    const before = api.about.version;
    const about = await api.loadAbout();
    if (about.run !== started) {
      fail(Object.assign(new Error("The command was started again, or there is another output in the place of this one."), { status: 410 }));
      return;
    }
    if (silent) {
      note("");
      if (shown) describe(shown);
    }
    silent = false;
    if (about.copied < about.wanted && !about.problem) wait = FAST;
    showState(about);
    updated ||= about.version !== before || (shown !== null && shown.version !== about.version);
    if (updated) {
      if ($("grid").scrollTop === 0 && !document.querySelector("dialog[open]")) await search(true);
      else note("There are more images than this result knows of.", "Search again", () => search(true));
    }
  } catch (error) {
    silent ||= error.status === 0;
    fail(error);
  }
  setTimeout(follow, wait);
}

let started = null;

function showState(about) {
  const copying = about.copied < about.wanted;
  document.title = `${about.output.split("/").pop()} – Sightline`;
  $("output").textContent = about.output.split("/").pop();
  $("output").title = about.output;
  $("output").dataset.state = about.problem ? `not up to date: ${about.problem}` : copying ? `${Math.floor((100 * about.copied) / about.wanted)} % copied` : "";
  $("review").hidden = !about.review;
}

$("search").addEventListener("submit", (event) => {
  event.preventDefault();
  change({ q: $("q").value.trim(), cutoff: "auto", reason: "" });
  search();
});
$("q").addEventListener("search", () => {
  if (!$("q").value && state.q) $("search").requestSubmit();
});
$("image").addEventListener("click", () => $("file").click());
$("file").addEventListener("change", () => {
  if ($("file").files.length) searchImage($("file").files[0]);
  $("file").value = "";
});
$("order").addEventListener("change", () => {
  change({ order: $("order").value });
  search();
});
$("fold").addEventListener("change", () => {
  change({ fold: $("fold").checked });
  search();
});
for (const id of ["filters", "close-filters"]) {
  $(id).addEventListener("click", () => {
    const open = document.body.classList.toggle("filtering");
    $("filters").setAttribute("aria-expanded", open);
    (open ? $("close-filters") : $("filters")).focus({ preventScroll: true });
  });
}
document.addEventListener("paste", (event) => {
  const file = [...event.clipboardData.files].find(({ type }) => type.startsWith("image/"));
  if (!file || event.target.matches("#where, #export-to")) return;
  event.preventDefault();
  searchImage(file);
});
let dragged = 0; // elements that a dragged file is above
for (const [kind, by] of [["dragenter", 1], ["dragleave", -1]]) {
  document.addEventListener(kind, (event) => {
    if (!event.dataTransfer.types.includes("Files")) return;
    dragged += by;
    $("drop").hidden = dragged <= 0;
  });
}
document.addEventListener("dragover", (event) => event.preventDefault());
document.addEventListener("drop", (event) => {
  event.preventDefault();
  dragged = 0;
  $("drop").hidden = true;
  const file = [...event.dataTransfer.files].find(({ type }) => type.startsWith("image/"));
  if (file) searchImage(file);
  else if (event.dataTransfer.files.length) note("That file is no image.");
});
document.addEventListener("keydown", (event) => {
  if (document.querySelector("dialog[open]")) return;
  const typing = event.target.matches("input, select, textarea");
  const listed = $("grid").hidden; // rejected images are shown, of which none can be selected
  if (event.key === "/" && !typing) $("q").focus();
  else if (event.key.toLowerCase() === "a" && (event.ctrlKey || event.metaKey) && !typing) {
    if (!listed) selection.selectAll(grid.results());
  } else if (event.ctrlKey || event.metaKey || event.altKey) return;
  else if (event.key === "Escape" && typing) event.target.blur();
  else if (event.key === "Escape") selection.clear();
  else if (typing || listed || event.target.matches("button, a")) return;
  else if (event.key.toLowerCase() === "m" && shown?.count) grid.fetchRow(grid.current()).then((row) => row && searchLike([row.position]), fail);
  else if (!grid.press(event)) return;
  event.preventDefault();
});
window.addEventListener("popstate", () => {
  readAddress(started);
  search();
});

async function start() {
  grid.prepare(detail.showDetail, fail);
  detail.prepare(searchLike, fail);
  selection.prepare(fail, searchLike);
  facets.prepare(search);
  const about = await api.loadAbout();
  started = about.run;
  readAddress(started);
  showState(about);
  await search();
  if (!document.activeElement || document.activeElement === document.body) $("grid").focus({ preventScroll: true });
  setTimeout(follow, FAST);
}

start().catch((error) => note(`The page could not start: ${error.message}`));
