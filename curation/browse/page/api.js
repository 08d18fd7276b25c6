// Requests to the server of this page. An error has the server's message.

export let about = null; // the last response of /api/about that is about this run
let run = null; // the run of the command that the positions on this page are of

async function read(response) {
  if (response.ok) return response;
  const text = await response.text();
  let message = text || response.statusText;
  try {
    message = JSON.parse(text).detail;
  } catch { /* not JSON: the text is the message */ }
  throw Object.assign(new Error(message), { status: response.status });
}

async function request(path, options = {}) {
  let response;
  try {
    response = await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw Object.assign(new Error("the command `sightline browse` does not answer: is it still running?"), { status: 0 });
  }
  return read(response);
}

function post(path, value, signal) {
  return request(path, { method: "POST", headers: { "content-type": "application/json" }, body: JSON.stringify(value), signal });
}

export async function loadAbout() {
  const latest = await (await request("api/about")).json();
  run ??= latest.run;
  // The positions on this page mean nothing to another run: its requests must go on to name their own.
  if (latest.run === run) about = latest;
  return latest;
}

export const search = async (query, signal) => (await post(`api/search/${run}`, query, signal)).json();
export const rows = async (result, start, stop) => (await request(`api/rows/${run}/${result}?start=${start}&stop=${stop}`)).json();
export const image = async (position) => (await request(`api/image/${run}/${position}`)).json();
export const thumbnail = (position) => `api/thumbnail/${run}/${position}`;
export const moved = async (positions) => (await post(`api/moved/${run}`, { positions })).json();
export const list = async (positions) => (await post(`api/list/${run}`, { positions })).blob();
export const answer = async (positions, label, said) => (await post(`api/answers/${run}`, { positions, label, answer: said })).json();
export const startExport = async (positions, target, destination, thumbnails) =>
  (await post(`api/export/${run}`, { positions, target, destination, thumbnails })).json();
export const readExport = async () => (await request("api/export")).json();
export const cancelExport = async () => (await request("api/export", { method: "DELETE" })).json();

export async function rejects(reason, start) {
  return (await request(`api/rejects/${run}?reason=${encodeURIComponent(reason)}&start=${start}`)).json();
}

/** The positions of all images of a result, in their order. */
export async function positions(result) {
  const data = new DataView(await (await request(`api/positions/${run}/${result}`)).arrayBuffer());
  return Int32Array.from({ length: data.byteLength / 4 }, (_, index) => data.getInt32(4 * index, true));
}

export async function upload(blob) {
  const options = { method: "POST", headers: { "content-type": "application/octet-stream" }, body: blob };
  return (await (await request(`api/upload/${run}`, options)).json()).image;
}
