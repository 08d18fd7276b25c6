// The form's query: labels or a label set, and options. As the fields of a request, and as a curl command.

import { image } from "./image.js";

const $ = (id) => document.getElementById(id);
const LABELS_SHOWN = 24;
const SAMPLE_LABELS = ["red circle", "blue circle", "red square", "green triangle"];

/** The server's registered label sets. */
let sets = [];

export function setLabelSets(known) {
  sets = known;
  $("source").hidden = !sets.length;
  $("label-set").replaceChildren(...sets.map((set) => new Option(`${set.id} (${set.labels.length})`, set.id)));
}

const usesSet = () => sets.length > 0 && document.querySelector("[name=source]:checked").value === "set";

/** Return the labels in the text field, each once, in order. */
function readLabels() {
  return [...new Set($("labels").value.split(/[,\n]/).map((label) => label.trim()).filter(Boolean))];
}

/** Fill in labels for the sample, unless the text field has labels. */
export function suggestLabels() {
  if (!readLabels().length) $("labels").value = SAMPLE_LABELS.join(", ");
}

/** Return the request's fields except the image. */
export function readQuery() {
  const query = usesSet() ? { label_set: $("label-set").value } : { labels: readLabels() };
  if ($("threshold").value !== "") query.threshold = Number($("threshold").value);
  if ($("top-k").value !== "") query.top_k = Number($("top-k").value);
  if ($("softmax").checked) query.activation = "softmax";
  return query;
}

/** Return a string that identifies the query and its image. */
export const identifyQuery = () => JSON.stringify([image?.url, readQuery()]);

/** Return the first field that is empty or wrong, with a message; null if the form is complete. */
export function findMissing() {
  if (!image) return [$("file"), "Choose an image first, or try the sample."];
  if (!usesSet() && !readLabels().length) return [$("labels"), "Type at least one label: what might the image show?"];
  if (!$("threshold").validity.valid) return [$("threshold"), "The lowest score is a number from 0 to 1."];
  if (!$("top-k").validity.valid) return [$("top-k"), "“At most” is a whole number, 1 or more."];
  return null;
}

/** Update the form's hints, and show the fields of the chosen source of labels. */
export function showQuery() {
  $("own").hidden = usesSet();
  $("set").hidden = !usesSet();
  const count = readLabels().length;
  $("labels-help").textContent = count ? `${count} ${count === 1 ? "label" : "labels"}` : "Separate labels with commas or line breaks.";
  const set = usesSet() ? sets.find((one) => one.id === $("label-set").value) : null;
  $("threshold").placeholder = set?.threshold ? `${set.threshold}, the set’s` : "any";
  $("top-k").placeholder = set?.top_k ? `${set.top_k}, the set’s` : "all labels";
  if (set) {
    const more = set.labels.length - LABELS_SHOWN;
    $("set-labels").textContent = set.labels.slice(0, LABELS_SHOWN).join(", ") + (more > 0 ? `, and ${more} more` : "");
  }
}

/** Return the shell command for the same request. It reads the image from a file in the working directory. */
export function writeCommand(withKey) {
  const query = readQuery();
  if (query.labels && !query.labels.length) query.labels = SAMPLE_LABELS.slice(0, 2); // an example until labels are typed
  const name = image?.name ?? "image.jpg";
  // Inside -F curl has its own quoting: without it a ; or , would end the file's name.
  const file = /[;,\s"\\]/.test(name) ? `"${name.replace(/[\\"]/g, "\\$&")}"` : name;
  const parts = [`curl ${quote(new URL("v1/classify", document.baseURI).href)}`];
  if (withKey) parts.push('-H "Authorization: Bearer $SIGHTLINE_API_KEY"');
  parts.push(`-F ${quote(`image=@${file}`)}`);
  for (const [field, value] of Object.entries(query)) {
    // --form-string, unlike -F, does not take a value that starts with @ or < for a file's name.
    for (const one of [value].flat()) parts.push(`--form-string ${quote(`${field}=${one}`)}`);
  }
  return parts.join(" \\\n  ");
}

/** Quote a text as one word of a POSIX shell. */
const quote = (text) => (/^[\w@%+=:,./-]+$/.test(text) ? text : `'${text.replaceAll("'", "'\\''")}'`);
