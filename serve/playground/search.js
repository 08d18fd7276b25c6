// The search: a form, and a grid of the images that were found in the server's output.

import { ApiError, call } from "./server.js";

const $ = (id) => document.getElementById(id);
const TOP = 40;
const count = (number) => number.toLocaleString("en");

let card = null; // what the server searches, from GET /v1/models; null if it searches nothing
let latestRun = 0;
let example = null; // the image found earlier that others are to be like

/** Show the search if the server searches an output. `onError` gets errors that are not about the search. */
export function showSearch(found, onError) {
  card = found ?? null;
  $("search").hidden = !card;
  if (!card) return;
  const index = card.index ? ", with an index" : "";
  $("search-size").textContent = `${count(card.searched)} images${index}`;
  $("search-label").replaceChildren(new Option("any", ""), ...card.labels.map((label) => new Option(label, label)));
  fail = onError;
}

let fail = () => {};

/** Return the fields of a request. A text goes before an example, because an index takes one of them. */
function readQuery() {
  const query = { top: TOP, thumbnails: card.thumbnails };
  const text = $("search-text").value.trim();
  if (text) query.text = text;
  else if (example) query.like = example.id;
  if ($("search-not").value.trim()) query.not = [$("search-not").value.trim()];
  if ($("search-label").value) query.labels = [$("search-label").value];
  if ($("search-all").checked) query.cutoff = "none";
  if ($("search-fold").checked) query.fold = true;
  return query;
}

async function search() {
  const query = readQuery();
  $("search-error").textContent = "";
  $("search-text").removeAttribute("aria-invalid");
  if (!query.text && !query.like) {
    $("search-text").setAttribute("aria-invalid", "true");
    $("search-text").focus();
    $("search-error").textContent = "Type what the images show.";
    return;
  }
  const run = ++latestRun; // a response that arrives after a newer search was sent is ignored
  $("search").classList.add("busy");
  $("search-go").setAttribute("aria-disabled", "true");
  try {
    const { body } = await call("v1/search", query);
    if (run === latestRun) showFound(body, query);
  } catch (error) {
    if (run !== latestRun) return;
    if (!(error instanceof ApiError) || error.status === 401) fail(error, search);
    else $("search-error").textContent = error.message;
  } finally {
    if (run === latestRun) {
      $("search").classList.remove("busy");
      $("search-go").removeAttribute("aria-disabled");
    }
  }
}

function showFound(body, query) {
  $("search-note").textContent = describe(body, query);
  $("found").replaceChildren(...body.data.map(makeTile));
}

/** Return a sentence about what was found. */
function describe(body, query) {
  const searched = `${count(body.searched)} images searched`;
  const parts = [];
  if (query.like) parts.push(`Images like ${example.key}.`);
  const about = body.estimated ? "about " : "";
  if (body.relevant === 0) parts.push(`${searched}: none of them is relevant.`);
  else if (body.relevant !== null) parts.push(`${searched}, ${about}${count(body.relevant)} are relevant; ${body.data.length} are shown.`);
  else parts.push(`${searched}; the nearest ${body.data.length} are shown.`);
  if (body.left_out) parts.push(`${about}${count(body.left_out)} were left out.`);
  if (body.as_of.not_searched) parts.push(`${count(body.as_of.not_searched)} newer images are not in the index yet, and were not searched.`);
  if (body.as_of.problem) parts.push(`${body.as_of.problem[0].toUpperCase()}${body.as_of.problem.slice(1)}.`);
  return [...parts, ...body.notes].join(" ");
}

function make(tag, className, text = "") {
  const element = document.createElement(tag);
  element.className = className;
  element.textContent = text;
  return element;
}

function makeTile(image) {
  const tile = make("li", "tile");
  const frame = make("div", "tile-image");
  if (image.thumbnail) {
    const picture = document.createElement("img");
    picture.src = image.thumbnail;
    picture.alt = image.key;
    frame.append(picture);
  } else {
    frame.append(make("span", "hint", "no thumbnail"));
  }
  const number = image.score ?? image.similarity;
  const key = make("p", "tile-key", image.key);
  key.title = image.source ? `${image.key}, from ${image.source}` : image.key;
  const row = make("div", "tile-row");
  const score = make("span", "score-number", number > 0 && number < 0.001 ? "under 0.001" : number.toFixed(3));
  score.title = image.score === null ? "Cosine with the example" : "Probability that the text belongs to the image";
  const like = make("button", "quiet tile-like", "Like this");
  like.type = "button";
  like.setAttribute("aria-label", `Images like ${image.key}`);
  like.addEventListener("click", () => {
    example = image;
    $("search-text").value = "";
    search();
  });
  row.append(score, like);
  const labels = image.labels.map(({ label }) => label).join(", ");
  const copies = image.copies ? `and ${count(image.copies)} near-duplicates` : "";
  tile.append(frame, row, key, make("p", "hint tile-labels", [labels, copies].filter(Boolean).join("; ")));
  return tile;
}

$("search-form").addEventListener("submit", (event) => {
  event.preventDefault();
  search();
});
