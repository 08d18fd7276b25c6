// The page's own server: calls of its API, and the API key.

const KEY = "sightline-key";

/** The API key, or null. Session storage keeps it for this browser tab only, and only after the server has accepted it. */
let key = sessionStorage.getItem(KEY);

export const hasKey = () => Boolean(key);

/** Use this key for further calls. `keepKey` stores it. */
export function setKey(text) {
  key = text;
}

export function keepKey() {
  sessionStorage.setItem(KEY, key);
}

/** A call that failed: a message for the user, and the status, or 0 if there was no response. */
export class ApiError extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

/** GET a path, or POST `content` to it. Returns the response's JSON and its headers. Throws `ApiError`. */
export async function call(path, content) {
  const headers = key ? { Authorization: `Bearer ${key}` } : {};
  if (content) headers["Content-Type"] = "application/json";
  let response, text;
  try {
    response = await fetch(path, { method: content ? "POST" : "GET", headers, body: content && JSON.stringify(content) });
    text = await response.text();
  } catch {
    throw new ApiError("The server cannot be reached. Is it still running?", 0);
  }
  let body = null;
  try {
    body = JSON.parse(text);
  } catch {
    // Not JSON, so perhaps a proxy responded. Its text would not help the user.
  }
  if (!response.ok) throw new ApiError(explain(response, body), response.status);
  if (!body) throw new ApiError("The response is not from Sightline: perhaps a proxy responded instead.", 0);
  return { body, headers: response.headers };
}

/** Return the message for a refused request. */
function explain(response, body) {
  const { message: full = "", param } = body?.error ?? {};
  // The field's name, such as images.0, means nothing to the user of a page with one image.
  const text = full.startsWith(`${param}: `) ? full.slice(param.length + 2) : full;
  const message = text ? text[0].toUpperCase() + text.slice(1) : `The server responded with status ${response.status}.`;
  const wait = Number(response.headers.get("Retry-After"));
  return wait ? `${message.replace(/\.?$/, ".")} Try again in ${wait} s.` : message;
}
