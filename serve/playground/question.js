// What is asked of the image: labels or a label set, and the options. As a request's fields, and as a curl command.

import { picture } from "./picture.js";

const $ = (id) => document.getElementById(id);
const LABELS_SHOWN = 24;
const SAMPLE_LABELS = ["red circle", "blue circle", "red square", "green triangle"];

/** The label sets that the server knows. */
let sets = [];

export function setLabelSets(known) {
  sets = known;
  $("source").hidden = !sets.length;
  $("label-set").replaceChildren(...sets.map((set) => new Option(`${set.id} (${set.labels.length})`, set.id)));
}

const usesSet = () => sets.length > 0 && document.querySelector("[name=source]:checked").value === "set";

/** The labels that were typed, each once, in order. */
function readLabels() {
  return [...new Set($("labels").value.split(/[,\n]/).map((label) => label.trim()).filter(Boolean))];
}

/** Labels that suit the sample, unless there are some. */
export function suggestLabels() {
  if (!readLabels().length) $("labels").value = SAMPLE_LABELS.join(", ");
}

/** The request's fields but for the image. */
export function readQuestion() {
  const question = usesSet() ? { label_set: $("label-set").value } : { labels: readLabels() };
  if ($("threshold").value !== "") question.threshold = Number($("threshold").value);
  if ($("top-k").value !== "") question.top_k = Number($("top-k").value);
  if ($("softmax").checked) question.activation = "softmax";
  return question;
}

/** What tells one question from another, the image included. */
export const identifyQuestion = () => JSON.stringify([picture?.url, readQuestion()]);

/** The field that must be filled before asking makes sense, and words; or null. */
export function findMissing() {
  if (!picture) return [$("file"), "Choose an image first, or try the sample."];
  if (!usesSet() && !readLabels().length) return [$("labels"), "Type at least one label: what might the image show?"];
  if (!$("threshold").validity.valid) return [$("threshold"), "The lowest score is a number from 0 to 1."];
  if (!$("top-k").validity.valid) return [$("top-k"), "“At most” is a whole number from 1 up."];
  return null;
}

/** Bring the form's hints, and the fields that belong to the chosen source, up to date. */
export function showQuestion() {
  $("own").hidden = usesSet();
  $("set").hidden = !usesSet();
  const count = readLabels().length;
  $("labels-help").textContent = count ? `${count} ${count === 1 ? "label" : "labels"}` : "Separate them with commas or lines.";
  const set = usesSet() ? sets.find((one) => one.id === $("label-set").value) : null;
  $("threshold").placeholder = set?.threshold ? `${set.threshold}, the set’s` : "any";
  $("top-k").placeholder = set?.top_k ? `${set.top_k}, the set’s` : "all labels";
  if (set) {
    const more = set.labels.length - LABELS_SHOWN;
    $("set-labels").textContent = set.labels.slice(0, LABELS_SHOWN).join(", ") + (more > 0 ? `, and ${more} more` : "");
  }
}

/** The shell command that asks the same, with the image as a file in the working directory. */
export function writeCommand(withKey) {
  const question = readQuestion();
  if (question.labels && !question.labels.length) question.labels = SAMPLE_LABELS.slice(0, 2); // an example for now
  const name = picture?.name ?? "image.jpg";
  // curl's own quoting inside -F: else a ; or , ends the file's name.
  const file = /[;,\s"\\]/.test(name) ? `"${name.replace(/[\\"]/g, "\\$&")}"` : name;
  const parts = [`curl ${quote(new URL("v1/classify", document.baseURI).href)}`];
  if (withKey) parts.push('-H "Authorization: Bearer $SIGHTLINE_API_KEY"');
  parts.push(`-F ${quote(`image=@${file}`)}`);
  for (const [field, value] of Object.entries(question)) {
    // Unlike -F, --form-string does not read a value that starts with @ or < as a file's name.
    for (const one of [value].flat()) parts.push(`--form-string ${quote(`${field}=${one}`)}`);
  }
  return parts.join(" \\\n  ");
}

/** One word for a POSIX shell. */
const quote = (text) => (/^[\w@%+=:,./-]+$/.test(text) ? text : `'${text.replaceAll("'", "'\\''")}'`);
