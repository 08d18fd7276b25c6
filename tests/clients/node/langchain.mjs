// npm's @langchain/openai, which n8n and Flowise use.
import { OpenAIEmbeddings } from "@langchain/openai";

const open = ({ url, key, model, extra }) =>
  new OpenAIEmbeddings({ model, apiKey: key, maxRetries: 0, configuration: { baseURL: `${url}/v1` }, ...extra });

export async function embedQuery(options) {
  return open(options).embedQuery(options.text);
}

export async function embedDocuments(options) {
  return open(options).embedDocuments(options.texts);
}
