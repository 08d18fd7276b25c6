// npm's ai with @ai-sdk/openai-compatible, @ai-sdk/openai or @ai-sdk/cohere.
import { createCohere } from "@ai-sdk/cohere";
import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { embed, embedMany } from "ai";

const providers = {
  compatible: ({ url, key }) => createOpenAICompatible({ name: "sightline", baseURL: `${url}/v1`, apiKey: key }),
  openai: ({ url, key }) => createOpenAI({ baseURL: `${url}/v1`, apiKey: key }),
  cohere: ({ url, key }) => createCohere({ baseURL: `${url}/v2`, apiKey: key }),
};

const model = (options) => providers[options.provider ?? "compatible"](options).embeddingModel(options.model);

export async function embedOne(options) {
  const { embedding, usage } = await embed({ model: model(options), value: options.value, ...options.extra });
  return { embedding, usage };
}

export async function embedAll(options) {
  const { embeddings, usage } = await embedMany({ model: model(options), values: options.values, ...options.extra });
  return { embeddings, usage };
}

// All embeddings stay here: the caller gets their number and those at some indices.
export async function embedNumbers(options) {
  const values = Array.from({ length: options.count }, (_, index) => `number ${index}`);
  const { embeddings } = await embedMany({ model: model(options), values });
  return { count: embeddings.length, chosen: options.indices.map((index) => embeddings[index]) };
}
