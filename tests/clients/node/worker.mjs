// Runs the functions of the other files here: one JSON line on stdin for each call, one on stdout for its result.
// A call is {program, name, options}. A result is {value}, or {error} with what the client's own error has.
import { createInterface } from "node:readline";

function describe(error) {
  const headers = error.headers ?? error.responseHeaders ?? error.rawResponse?.headers ?? error.httpResponse?.headers;
  return {
    type: error.name === "Error" ? error.constructor.name : error.name,
    message: error.message,
    status: error.status ?? error.statusCode ?? error.httpResponse?.status ?? null,
    code: error.code ?? null,
    param: error.param ?? null,
    body: error.body ?? error.responseBody ?? error.httpResponse?.body ?? null,
    retry_after: headers?.get?.("retry-after") ?? headers?.["retry-after"] ?? null,
    retryable: error.isRetryable ?? null,
  };
}

for await (const line of createInterface({ input: process.stdin })) {
  const { program, name, options } = JSON.parse(line);
  let reply;
  try {
    const functions = await import(`./${program}.mjs`);
    reply = { value: await functions[name](options) };
  } catch (error) {
    reply = { error: describe(error) };
  }
  process.stdout.write(JSON.stringify(reply) + "\n");
}
