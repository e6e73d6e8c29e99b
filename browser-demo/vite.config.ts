import { fileURLToPath } from "node:url";
import { defineConfig, type Plugin } from "vite";

const here = (path: string) => fileURLToPath(new URL(path, import.meta.url));

/** What `src` reaches by `import()` in Node alone; a page never gets there, so its text is left out of the build. */
const NODE_ONLY = ["../src/backends/webgpu/node.ts", "../src/backends/native/", "../src/io/node.ts"].map(here);

function withoutNode(): Plugin {
  return {
    name: "without-node",
    enforce: "pre",
    async resolveId(source, importer) {
      if (!source.startsWith(".") || !/\/(node\.[jt]s$|native\/)/.test(source)) return null;
      const found = await this.resolve(source, importer, { skipSelf: true });
      return NODE_ONLY.some((path) => found?.id.startsWith(path)) ? "\0node-only" : null;
    },
    load: (id) => (id === "\0node-only" ? "export {};" : null),
  };
}

/** The built page says itself that it loads nothing from elsewhere, and a browser holds it to that. */
const POLICY =
  "default-src 'self'; script-src 'self' 'wasm-unsafe-eval'; img-src 'self' data:; object-src 'none'; base-uri 'none'";

function contentPolicy(): Plugin {
  return {
    name: "content-policy",
    apply: "build",
    transformIndexHtml: () => [
      { tag: "meta", attrs: { "http-equiv": "Content-Security-Policy", content: POLICY }, injectTo: "head-prepend" },
    ],
  };
}

export default defineConfig({
  root: here("."),
  // Relative addresses: the folder works under any path of any static host.
  base: "./",
  plugins: [withoutNode(), contentPolicy()],
  worker: { format: "es", plugins: () => [withoutNode()] },
  build: { outDir: here("../artifacts/browser-demo"), emptyOutDir: true, target: "es2022", assetsInlineLimit: 0 },
  server: { fs: { allow: [here("..")] } },
});
