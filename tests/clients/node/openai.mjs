// npm's openai, with what a user changes: the address and the key.
import OpenAI from "openai";

const open = ({ url, key, maxRetries = 0 }) => new OpenAI({ baseURL: `${url}/v1`, apiKey: key, maxRetries });

export async function embed(options) {
  const response = await open(options).embeddings.create(options.request);
  return { vectors: response.data.map((item) => item.embedding), usage: response.usage, model: response.model };
}

export async function listModels(options) {
  const ids = [];
  for await (const model of open(options).models.list()) ids.push(model.id);
  return ids;
}

export async function moderate(options) {
  return open(options).moderations.create(options.request);
}

export async function classify(options) {
  return open(options).post("/classify", { body: options.request });
}
