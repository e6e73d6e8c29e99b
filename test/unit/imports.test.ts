import { fileURLToPath } from "node:url";
import { describe, expect, test } from "vitest";
import { importsOf, readSources, violations } from "../setup/import-rules.js";

const src = fileURLToPath(new URL("../../src", import.meta.url));

describe("imports go one way", () => {
  test("in src", () => {
    const sources = readSources(src);
    expect(sources.size).toBeGreaterThan(5);
    expect(violations(sources)).toEqual([]);
  });

  test("every form of import is read", () => {
    const code = `
      import type { A } from "./a.js"; import { type B, c } from "./b.js"; import { type D } from "./d.js";
      export * from "./e.js"; export type { F } from "./f.js"; export { g } from "./g.js"; import "./h.js";
      const x: import("./i.js").I = await import("./j.js"); type K = typeof import("./k.js");
      await import(name); export const y = 1; // import "./comment.js"
      const s = 'import "./string.js"'; import l = require("./l.js");`;
    expect(importsOf("x.ts", code).map(({ specifier, kind }) => `${kind} ${specifier}`)).toEqual([
      "type ./a.js",
      "static ./b.js",
      "static ./d.js", // without "import type" the import itself stays
      "static ./e.js",
      "type ./f.js",
      "static ./g.js",
      "static ./h.js",
      "type ./i.js",
      "dynamic ./j.js",
      "type ./k.js",
      "dynamic ",
      "static ./l.js",
    ]);
  });

  const files = [
    "core/errors.ts",
    "formats/table.ts",
    "ir/graph.ts",
    "plan/plan.ts",
    "backends/backend.ts",
    "backends/weights.ts",
    "backends/webgpu/adapter.ts",
    "backends/webgpu/node.ts",
    "backends/trace/index.ts",
    "backends/native/addon.ts",
    "runtime/open.ts",
    "io/source.ts",
    "io/node.ts",
    "text/tokenizer.ts",
    "models/decoder.ts",
    "codegen/main.ts",
    "cli/main.ts",
    "index.ts",
  ];
  const tree = (from: string, code: string) => new Map([...files.map((file) => [file, ""] as const), [from, code]]);

  test.each([
    ["plan/plan.ts", 'import type { Backend } from "../backends/backend.js";'],
    ["backends/webgpu/adapter.ts", 'import { a } from "../backend.js"; import { p } from "../../plan/plan.js";'],
    ["backends/webgpu/adapter.ts", 'await import("./node.js");'],
    ["backends/native/addon.ts", 'import { w } from "../weights.js";'],
    ["backends/webgpu/node.ts", 'import fs from "node:fs"; await import("webgpu");'],
    ["io/source.ts", 'import type { N } from "./node.js"; await import("./node.js");'],
    ["models/decoder.ts", 'import { t } from "../text/tokenizer.js"; import { o } from "../runtime/open.js";'],
    ["text/tokenizer.ts", 'import { Tokenizer } from "@huggingface/tokenizers";'],
    ["cli/main.ts", 'import { open } from "../index.js"; import { x } from "../io/node.js"; import os from "node:os";'],
    [
      "codegen/main.ts",
      'import { w } from "../backends/webgpu/adapter.js"; import { n } from "../backends/native/addon.js";',
    ],
    ["index.ts", 'export * from "./runtime/open.js"; export * from "./models/decoder.js";'],
  ])("allowed: %s %s", (from, code) => {
    expect(violations(tree(from, code))).toEqual([]);
  });

  test.each([
    ["core/errors.ts", 'import { t } from "../formats/table.js";', "formats is above core"],
    ["core/errors.ts", 'import type { T } from "../formats/table.js";', "formats is above core"],
    ["ir/graph.ts", 'export { p } from "../plan/plan.js";', "plan is above ir"],
    ["plan/plan.ts", 'import { Backend } from "../backends/backend.js";', "plan takes only types"],
    ["plan/plan.ts", 'import type { A } from "../backends/webgpu/adapter.js";', "backends is above plan"],
    ["backends/webgpu/adapter.ts", 'import { t } from "../trace/index.js";', "backends do not import each other"],
    ["backends/backend.ts", 'import type { A } from "./webgpu/adapter.js";', "backends do not import each other"],
    ["backends/weights.ts", 'import type { A } from "./webgpu/adapter.js";', "backends do not import each other"],
    ["backends/webgpu/adapter.ts", 'import { n } from "./node.js";', "needs Node: use import()"],
    ["backends/webgpu/adapter.ts", 'import { join } from "node:path";', "node: modules are not for web pages"],
    ["formats/table.ts", 'await import("node:fs");', "node: modules are not for web pages"],
    ["io/source.ts", 'import fs from "node:fs";', "node: modules are not for web pages"],
    ["models/decoder.ts", 'import { n } from "../io/node.js";', "needs Node: use import()"],
    ["runtime/open.ts", 'import { n } from "../backends/native/addon.js";', "needs Node: use import()"],
    ["runtime/open.ts", 'import { s } from "../io/source.js";', "io is above runtime"],
    ["runtime/open.ts", 'await import("../codegen/main.js");', "runtime may not use codegen"],
    ["codegen/main.ts", 'import { o } from "../runtime/open.js";', "codegen may not use runtime"],
    ["cli/main.ts", 'import { g } from "../codegen/main.js";', "cli may not use codegen"],
    ["index.ts", 'await import("./cli/main.js");', "index.ts may not use cli"],
    ["io/source.ts", 'import pc from "picocolors";', "uses picocolors"],
    ["io/source.ts", 'import x from "left-pad";', "not a package"],
    ["io/source.ts", "await import(name);", "not a package"],
    ["io/source.ts", 'import "./absent.js";', "no such file"],
    ["misc/x.ts", 'import "../core/errors.js";', "misc is in no layer"],
  ])("caught: %s %s", (from, code, reason) => {
    const found = violations(tree(from, code));
    expect(found).toHaveLength(1);
    expect(found[0]).toContain(reason);
  });
});
