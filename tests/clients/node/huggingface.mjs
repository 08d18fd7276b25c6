// npm's @huggingface/inference with `endpointUrl`.
import { InferenceClient } from "@huggingface/inference";

const open = ({ url, key }) => new InferenceClient(key, { endpointUrl: url });

export async function classifyImage(options) {
  const image = new Blob([Buffer.from(options.image, "base64")], { type: "image/png" });
  const inputs = options.wrapped ? { image } : image;
  return open(options).zeroShotImageClassification({ inputs, parameters: { candidate_labels: options.labels } });
}

export async function extractFeatures(options) {
  return open(options).featureExtraction({ inputs: options.inputs, ...options.extra });
}
