import { describe, expect, test } from "vitest";
import { openCheckpoint } from "../../src/io/checkpoint.js";
import { openSafetensors, writeSafetensors } from "../../src/io/safetensors.js";
import { openDirectory, openSource } from "../../src/io/source.js";
import { failure } from "../support/failure.js";

const MODEL = "models/fewbit-tiny/model.safetensors";

describe("a checkpoint folder", () => {
  const entry = (name: string) => ({ name, dtype: "U8", shape: [2], data: Uint8Array.of(1, 2) }) as const;
  const shard = (...names: string[]) => writeSafetensors(names.map(entry));
  const index = (map: Record<string, string>) =>
    new TextEncoder().encode(
      JSON.stringify({ metadata: { total_size: 4.5, x: [null, { y: -1e9 }] }, weight_map: map }),
    );
  const INDEX = "model.safetensors.index.json";
  const folder = (files: Record<string, Uint8Array>) => openDirectory(new Map(Object.entries(files)));

  test("with one file is that file", async () => {
    await using local = await openCheckpoint(await openDirectory("models/fewbit-tiny"));
    await using single = await openSafetensors(await openSource(MODEL));
    expect([...local.tensors]).toEqual([...single.tensors]);
    expect(await local.read("model.norm.weight")).toEqual(await single.read("model.norm.weight"));
    expect(local.files[0]?.metadata.get("format")).toBe("pt");
  });

  test("with an index reads each tensor from its shard and shows nothing else", async () => {
    const files = { [INDEX]: index({ a: "1.safetensors", b: "2.safetensors" }) };
    const directory = await folder({ ...files, "1.safetensors": shard("a", "b"), "2.safetensors": shard("b", "c") });
    await using checkpoint = await openCheckpoint(directory);
    expect([...checkpoint.tensors.keys()]).toEqual(["a", "b"]);
    expect(checkpoint.files.map((f) => f.name)).toEqual(["1.safetensors", "2.safetensors"]);
    expect(await checkpoint.read("b", { rows: [1, 2] })).toEqual(Uint8Array.of(2));
    expect(await failure(checkpoint.read("c"))).toMatchObject({ code: "model/missing-tensor" });
  });

  const text = (json: string) => new TextEncoder().encode(json);
  const bad: [law: string, index: Uint8Array, code: string, reason: string][] = [
    ["a shard that is not there", index({ a: "2.safetensors" }), "io/not-found", "2.safetensors"],
    ["a tensor that its shard lacks", index({ b: "1.safetensors" }), "io/malformed", 'has no tensor "b"'],
    ["a path upwards", index({ a: "../1.safetensors" }), "io/malformed", "not a plain file name"],
    ["an absolute path", index({ a: "/etc/passwd" }), "io/malformed", "not a plain file name"],
    ["a Windows path", index({ a: "C:\\x" }), "io/malformed", "not a plain file name"],
    ["the folder itself", index({ a: ".." }), "io/malformed", "not a plain file name"],
    ["no weight_map", text("{}"), "io/malformed", "the index has no weight_map"],
    ["a tensor twice", text('{"weight_map":{"a":"x","a":"y"}}'), "io/malformed", 'the key "a" twice'],
    ["deep nesting", text(`{"metadata":${"[".repeat(50)}`), "io/malformed", "nested too deeply"],
  ];
  for (const [law, json, code, reason] of bad)
    test(`whose index names ${law} is refused`, async () => {
      const error = await failure(openCheckpoint(await folder({ [INDEX]: json, "1.safetensors": shard("a") })));
      expect(error.code).toBe(code);
      expect(error.message).toContain(reason);
    });

  test("without weights is not found, and a damaged single file is not passed over for an index", async () => {
    expect(await failure(openCheckpoint(await folder({})))).toMatchObject({ code: "io/not-found" });
    const files = { "model.safetensors": new Uint8Array(3), [INDEX]: index({ a: "1" }), 1: shard("a") };
    expect(await failure(openCheckpoint(await folder(files)))).toMatchObject({ code: "io/malformed" });
  });
});
