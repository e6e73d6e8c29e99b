import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { decodeFunction, encodeFunction } from "../../src/backends/webgpu/wgsl/codec.js";
import { f32Bits, f32FromBits } from "../../src/core/dtype.js";
import { decode, encoder } from "../../src/formats/codec.js";
import { allCodes, encodeSamples, fixedCodecs, sameCode, sameNumber, withinTable } from "../support/codecs.js";
import { mapWords, openTestGpu, type TestGpu } from "../support/gpu.js";

let gpu: TestGpu;
beforeAll(async () => {
  gpu = await openTestGpu();
});
afterAll(() => gpu?.destroy());

describe.each(fixedCodecs())("codec %s", (_name, codec) => {
  test("WGSL decodes every code as TypeScript does", async () => {
    const codes = allCodes(codec);
    const expected = Float32Array.from(codes, (code) => decode(codec, code));
    const functions = `${decodeFunction(codec, "dec")}fn map(code: u32) -> u32 { return bitcast<u32>(dec(code)); }`;
    const bits = await mapWords(gpu, functions, "map", codes);
    const wrong = [...codes.keys()].filter((i) => !sameNumber(bits[i] as number, f32Bits(expected[i] as number)));
    expect(wrong.slice(0, 5).map((i) => [codes[i], expected[i], f32FromBits(bits[i] as number)])).toEqual([]);
  });

  test("WGSL encodes ties, their neighbours, special and random values as TypeScript does", async () => {
    const samples = encodeSamples(codec);
    const encode = encoder(codec);
    const expected = Uint32Array.from(samples, (bits) => encode(withinTable(codec, f32FromBits(bits))));
    const codes = await mapWords(gpu, encodeFunction(codec, "enc"), "enc_bits", samples);
    const wrong = [...samples.keys()].filter((i) => !sameCode(codec, codes[i] as number, expected[i] as number));
    expect(wrong.slice(0, 5).map((i) => [f32FromBits(samples[i] as number), expected[i], codes[i]])).toEqual([]);
  });
});
