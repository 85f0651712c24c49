// What llama.cpp thinks comes next after each token: node llamacpp.mjs FOLDER FILE.gguf OUT.json TOKEN...
// FOLDER is where `npm install node-llama-cpp` was run. OUT gets a list with, for each token, probabilities by token.
import fs from "node:fs";
import path from "node:path";
import {pathToFileURL} from "node:url";

const [, , folder, file, out, ...tokens] = process.argv;
const entry = path.join(folder, "node_modules", "node-llama-cpp", "dist", "index.js");
const {getLlama} = await import(pathToFileURL(entry));
const llama = await getLlama({gpu: false, build: "never", logLevel: "error"});
const model = await llama.loadModel({modelPath: file, gpuLayers: 0});
const context = await model.createContext({contextSize: 64, sequences: 1, flashAttention: false});
const asked = tokens.map((token) => [Number(token), {generateNext: {probabilities: true}}]);
const found = await context.getSequence().controlledEvaluate(asked);
fs.writeFileSync(out, JSON.stringify(found.map((each) => Object.fromEntries(each.next.probabilities.entries()))));
process.exit(0);
