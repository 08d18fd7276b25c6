// What is searched for: the state of the page, which is also in its address, and the query that it makes.

const EMPTY = { q: "", labels: [], unlabelled: false, like: [], images: [], where: "", fold: false, order: "best", cutoff: "auto", reason: "" };

export let state = { ...EMPTY };
const list = (read) => (value) => (Array.isArray(value) ? value.map(read).filter((one) => one !== undefined) : undefined);
const of = (type) => (value) => (typeof value === type ? value : undefined);
const among = (...known) => (value) => (known.includes(value) ? value : undefined);
const READ = { // how each part of an address is read that somebody may have changed by hand: undefined for what it cannot be
  q: of("string"),
  labels: list((one) => (typeof one?.label !== "string" ? undefined : typeof one.min === "number" ? { label: one.label, min: one.min } : { label: one.label })),
  unlabelled: of("boolean"),
  like: list((one) => (Number.isInteger(one) ? one : undefined)),
  images: list(of("string")),
  where: of("string"),
  fold: of("boolean"),
  order: among("best", "first", "last"),
  cutoff: among("auto", "none"),
  reason: of("string"),
};
let run = null; // positions and images in the address are of one run of the command

/** Read the state from the page's address. What is of another run of the command is left out. */
export function readAddress(currentRun) {
  run = currentRun;
  state = { ...EMPTY };
  try {
    const stored = JSON.parse(decodeURIComponent(window.location.hash.slice(1)) || "{}");
    for (const [name, read] of Object.entries(READ)) state[name] = read(stored[name]) ?? EMPTY[name];
    if (stored.run !== run) state.like = state.images = [];
  } catch { /* an address that somebody has changed by hand */ }
  return state;
}

/** Change the state, and the address. `keep` replaces the address, so that "back" does not stop at each step. */
export function change(changes, keep = false) {
  state = { ...state, ...changes };
  const stored = Object.fromEntries(Object.entries(state).filter(([name, value]) => JSON.stringify(value) !== JSON.stringify(EMPTY[name])));
  if (state.like.length || state.images.length) stored.run = run;
  const hash = Object.keys(stored).length ? `#${encodeURIComponent(JSON.stringify(stored))}` : window.location.pathname;
  window.history[keep ? "replaceState" : "pushState"](null, "", hash);
}

/** Split what is in the search box: `-word` and `-"some words"` are unwanted, ` + ` separates texts that are all wanted. */
export function parse(q) {
  const without = [];
  const rest = q.replace(/(^|\s)-(?:"([^"]*)"|(\S+))/g, (_, before, quoted, word) => {
    const text = (quoted ?? word).trim();
    if (text) without.push(text);
    return before;
  });
  const texts = rest.split(/\s\+\s/).map((text) => text.replace(/\s+/g, " ").trim()).filter(Boolean);
  return { texts, without };
}

export function makeQuery() {
  const { labels, unlabelled, like, images, where, fold, order, cutoff } = state;
  return { ...parse(state.q), labels, unlabelled, like, images, where, fold, order, cutoff };
}

export const isRanked = () => parse(state.q).texts.length > 0 || state.like.length > 0 || state.images.length > 0;
