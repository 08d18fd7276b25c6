// npm's @langchain/openai, which n8n and Flowise use, and @langchain/cohere.
import { CohereEmbeddings } from "@langchain/cohere";
import { OpenAIEmbeddings } from "@langchain/openai";
import { CohereClient } from "cohere-ai";

const open = ({ url, key, model, extra }) =>
  new OpenAIEmbeddings({ model, apiKey: key, maxRetries: 0, configuration: { baseURL: `${url}/v1` }, ...extra });

export async function embedQuery(options) {
  return open(options).embedQuery(options.text);
}

export async function embedDocuments(options) {
  return open(options).embedDocuments(options.texts);
}

export async function embedDocumentsWithCohere({ url, key, model, texts }) {
  const client = new CohereClient({ token: key, environment: url });
  return new CohereEmbeddings({ model, client }).embedDocuments(texts);
}
