// This page's own server: calls of its API, and the key that it may ask for.

const KEY = "sightline-key";

/** The API key, or null. Session storage keeps it for this tab alone, and only once the server has accepted it. */
let key = sessionStorage.getItem(KEY);

export const hasKey = () => Boolean(key);

/** Try a key from now on. `keepKey` remembers it. */
export function setKey(text) {
  key = text;
}

export function keepKey() {
  sessionStorage.setItem(KEY, key);
}

/** A call that failed: words for the user, and the status, or 0 if there was no answer. */
export class Refused extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

/** GET a path, or POST it a body: the answer's JSON and its headers. Throws `Refused`. */
export async function call(path, body) {
  const headers = key ? { Authorization: `Bearer ${key}` } : {};
  if (body) headers["Content-Type"] = "application/json";
  let response, text;
  try {
    response = await fetch(path, { method: body ? "POST" : "GET", headers, body: body && JSON.stringify(body) });
    text = await response.text();
  } catch {
    throw new Refused("The server cannot be reached. Is it still running?", 0);
  }
  let answer = null;
  try {
    answer = JSON.parse(text);
  } catch {
    // A proxy in between, perhaps; what it says is of no use to the user.
  }
  if (!response.ok) throw new Refused(explain(response, answer), response.status);
  if (!answer) throw new Refused("The answer is not from Sightline: something in between answered instead.", 0);
  return { answer, headers: response.headers };
}

/** A refusal in words. */
function explain(response, answer) {
  const { message: said = "", param } = answer?.error ?? {};
  // The field's name, such as images.0, says nothing on a page with one image.
  const words = said.startsWith(`${param}: `) ? said.slice(param.length + 2) : said;
  const message = words ? words[0].toUpperCase() + words.slice(1) : `The server answered with status ${response.status}.`;
  const wait = Number(response.headers.get("Retry-After"));
  return wait ? `${message.replace(/\.?$/, ".")} Try again in ${wait} s.` : message;
}
