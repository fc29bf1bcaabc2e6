// Loads an exported folder with transformers.js and writes what comes out: node THIS FOLDER CASES.json RESULTS.json.
// Lies beside the folder node_modules when it runs. CASES: [{ image: PATH }].

import fs from "node:fs";
import path from "node:path";
import { pathToFileURL } from "node:url";
import { AutoImageProcessor, AutoModel, RawImage, Tensor, env, pipeline } from "@huggingface/transformers";

const [folder, casesFile, resultsFile] = process.argv.slice(2);
env.allowRemoteModels = false;
const { pageProcessor, preparePage } = await import(pathToFileURL(path.join(folder, "prepare_page.mjs")));
const { page_settings: settings } = JSON.parse(fs.readFileSync(path.join(folder, "preprocessor_config.json")));
const cases = JSON.parse(fs.readFileSync(casesFile));
const numbers = (tensor) => ({ dims: tensor.dims, data: Array.from(tensor.data) });

const prepared = [];
for (const { image } of cases) prepared.push(preparePage(await RawImage.read(image), settings));

const results = {
  pages: prepared.map(({ data, dims, originalSize, validRegion }) => ({
    dims,
    data: Buffer.from(data.buffer).toString("base64"),
    originalSize,
    validRegion,
  })),
  models: {},
};
for (const dtype of ["fp32", "fp16", "q8"]) {
  const model = await AutoModel.from_pretrained(folder, { dtype });
  results.models[dtype] = [];
  for (const { data, dims } of prepared) {
    const outputs = await model({ pixel_values: new Tensor("float32", data, dims) });
    results.models[dtype].push(Object.fromEntries(Object.entries(outputs).map(([name, t]) => [name, numbers(t)])));
  }
}

const images = cases.map(({ image }) => image);
const extract = await pipeline("image-feature-extraction", folder);
results.approximate = numbers(await extract(images));
extract.processor = pageProcessor(settings, Tensor);
results.pipeline = numbers(await extract(images));
results.pooled = numbers(await extract(images, { pool: true }));

const processor = await AutoImageProcessor.from_pretrained(folder);
results.processor = [processor.constructor.name, (await processor(await RawImage.read(images[0]))).pixel_values.dims];
fs.writeFileSync(resultsFile, JSON.stringify(results));
