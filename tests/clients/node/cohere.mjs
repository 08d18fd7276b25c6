// npm's cohere-ai: its clients of Cohere's first and second API.
import { CohereClient, CohereClientV2 } from "cohere-ai";

const settings = ({ url, key }) => ({ token: key, environment: url, maxRetries: 0 });

export async function embedV1(options) {
  return new CohereClient(settings(options)).embed(options.request);
}

export async function embedV2(options) {
  return new CohereClientV2(settings(options)).embed(options.request);
}
