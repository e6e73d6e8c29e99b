import { provisionSwiftShader } from "../../src/backends/webgpu/node.js";

/** Inflates SwiftShader once, before the test processes ask for it. Other platforms test on the GPU they have. */
export default async function setup(): Promise<void> {
  if (process.platform === "linux" && process.arch === "x64") await provisionSwiftShader();
}
