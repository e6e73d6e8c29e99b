import { readFileSync } from "node:fs";
import { describe, expect, test } from "vitest";
import { GGML_TYPES, type GgmlType, ggmlType } from "../../src/formats/ggml.js";
import { loadStored } from "../../src/formats/stored-matrix.js";
import { ggmlMatrix } from "../../src/io/gguf-model.js";
import { openSafetensors } from "../../src/io/safetensors.js";
import { memorySource } from "../../src/io/source.js";
import { dense, GraphBuilder, stored } from "../../src/ir/graph.js";
import type { CaseProgram } from "../../src/validate/cases.js";
import { normals, random } from "../../src/validate/cases-random.js";
import { failures, missing, runOn } from "../support/cases.js";

/* Formats of GGML's blocks are no rows of the table: their kernels are tried here, with blocks that the gguf package read too. */

const FILE = "test/golden/checkpoints/ggml_blocks.safetensors";
const [N, K] = [96, 512];

describe("a backend computes with GGML's formats as they are stored", async () => {
  const file = await openSafetensors(memorySource(new Uint8Array(readFileSync(FILE)), FILE));
  const programs = await Promise.all(
    GGML_TYPES.map(async (id): Promise<CaseProgram> => {
      const type = ggmlType(id) as GgmlType;
      const rows = await file.read(`${type.name}.blocks`);
      // The golden's three rows, over and over.
      const data = new Uint8Array((N / 3) * rows.length);
      for (let i = 0; i < N / 3; i++) data.set(rows, i * rows.length);
      // WGSL flushes float32 subnormals, and a scale of 2^-127 is one: MXFP4's exponents stay above them.
      if (type.name === "MXFP4")
        for (let at = 0; at < data.length; at += type.bytes) data[at] = Math.max(data[at] as number, 16);
      const tensor = { name: type.name, shape: [N, K], type: id, byteOffset: 0, byteLength: data.length };
      const weight = await loadStored(ggmlMatrix(memorySource(data), tensor, type, null));
      const input = (T: number) => {
        const numbers = normals(random(id), T * K);
        return {
          x: { dtype: "f32", shape: [T, K], data: numbers } as const,
          ids: { dtype: "i32", shape: [T], data: Int32Array.from({ length: T }, (_, i) => (7 * i) % N) } as const,
        };
      };
      return {
        id: `linear/${type.name}`,
        op: "linear",
        format: type.name,
        seed: id,
        tiered: false,
        buckets: [{ T: 1 }],
        build: () => {
          const graph = new GraphBuilder({ T: 19 });
          const matrix = graph.weight("w", stored(type.format, [N, K]));
          const ids = graph.input("ids", dense("i32", ["T"]));
          graph.output("y", graph.one("linear", [graph.input("x", dense("f32", ["T", K])), matrix], {}, "y"));
          graph.output("rows", graph.one("embedding", [ids, matrix], {}, "rows"));
          return { graph: graph.build(), weights: new Map([["w", weight]]) };
        },
        runs: [1, 19].map((T) => ({
          id: `linear/${type.name}/T${T}`,
          quick: true,
          symbols: { T },
          inputs: () => input(T),
        })),
      };
    }),
  );
  for (const prefer of ["reference", "webgpu"] as const)
    test(prefer, { timeout: 240_000 }, async () => {
      const results = await runOn({ prefer: [prefer] }, programs);
      expect(failures(results)).toEqual([]);
      expect(missing(results)).toEqual([]);
      expect(results).toHaveLength(2 * GGML_TYPES.length);
    });
});
