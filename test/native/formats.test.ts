import { execFile } from "node:child_process";
import { mkdtemp, readFile, rm, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { promisify } from "node:util";
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { formatsHeader } from "../../src/codegen/cxx.js";
import { f32Bits, f32FromBits } from "../../src/core/dtype.js";
import { decode, encoder } from "../../src/formats/codec.js";
import { codecBits } from "../../src/formats/format.js";
import { FORMATS } from "../../src/formats/table.js";
import { allCodes, encodeSamples, fixedCodecs, sameCode, sameNumber, withinTable } from "../support/codecs.js";

const run = promisify(execFile);
const formats = Object.values(FORMATS);
const codecs = fixedCodecs();

/** Reads words from a file, writes what every codec makes of them: `decode` or `encode`, codec, words in, words out. */
const PROGRAM = /* cpp */ `
#include "formats.hpp"
#include <cstdio>
#include <string>
#include <vector>

using namespace fewbit;

template <class Codec>
std::uint32_t apply(bool decoding, std::uint32_t word) {
  return decoding ? detail::bitcast<std::uint32_t>(Codec::decode(word)) : Codec::encode_bits(word);
}
template <class Format>
void describe() {
  std::printf("%s %d %d %d %s\\n", Format::name, Format::element::bits, int(std::tuple_size<typename Format::scales>::value),
              int(Format::zero), Format::rule::kind);
}
std::vector<std::uint32_t> read(const char* path) {
  std::FILE* file = std::fopen(path, "rb");
  std::fseek(file, 0, SEEK_END);
  std::vector<std::uint32_t> words(std::ftell(file) / 4);
  std::rewind(file);
  if (std::fread(words.data(), 4, words.size(), file) != words.size()) words.clear();
  std::fclose(file);
  return words;
}

int main(int argc, char** argv) {
  if (argc < 2) {
#define DESCRIBE(name) describe<format::name>();
    FEWBIT_FORMATS(DESCRIBE)
    return 0;
  }
  const bool decoding = std::string(argv[1]) == "decode";
  const std::string codec_name = argv[2];
  std::vector<std::uint32_t> words = read(argv[3]);
#define APPLY(name) \\
  if (codec_name == #name) for (auto& word : words) word = apply<codec::name>(decoding, word);
  FEWBIT_CODECS(APPLY)
  std::FILE* file = std::fopen(argv[4], "wb");
  std::fwrite(words.data(), 4, words.size(), file);
  std::fclose(file);
}
`;

const compiler = await run("g++", ["--version"]).then(
  () => "g++",
  () => null,
);

/** Node alone must do for the tests, so a missing compiler is an absence by name; CI is expected to have one. */
test("a C++ compiler: g++ is there, or its absence is named and this is not CI", () => {
  if (compiler === null) console.warn("absent: g++, so the generated C++ header is not compiled by this run");
  expect(compiler !== null || process.env.CI === undefined).toBe(true);
});

describe.runIf(compiler !== null)("the generated C++ header", () => {
  let folder: string;
  beforeAll(async () => {
    folder = await mkdtemp(join(tmpdir(), "fewbit-cxx-"));
    await writeFile(join(folder, "formats.hpp"), formatsHeader(formats));
    await writeFile(join(folder, "main.cpp"), PROGRAM);
    const flags = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-fsanitize=undefined", "-fno-sanitize-recover"];
    await run("g++", [...flags, "main.cpp", "-o", "main"], { cwd: folder });
  }, 120_000);
  afterAll(() => rm(folder, { recursive: true, force: true }));

  const apply = async (direction: "decode" | "encode", name: string, words: Uint32Array): Promise<Uint32Array> => {
    const [from, to] = [join(folder, `${direction}-${name}.in`), join(folder, `${direction}-${name}.out`)];
    await writeFile(from, words);
    await run(join(folder, "main"), [direction, name, from, to]);
    const bytes = await readFile(to);
    return new Uint32Array(bytes.buffer.slice(bytes.byteOffset, bytes.byteOffset + bytes.byteLength));
  };

  test("compiles without warnings and describes every format", async () => {
    const { stdout } = await run(join(folder, "main"));
    const expected = formats.map(({ name, element, scales, zero, rule }) =>
      [name, codecBits(element), scales.length, ["none", "int", "float"].indexOf(zero.domain), rule.kind].join(" "),
    );
    expect(stdout.trim().split("\n")).toEqual(expected);
  });

  describe.each(codecs)("codec %s", (name, codec) => {
    test("decodes every code as TypeScript does", async () => {
      const codes = allCodes(codec);
      const bits = await apply("decode", name, codes);
      const expected = Float32Array.from(codes, (code) => decode(codec, code));
      const wrong = [...codes.keys()].filter((i) => !sameNumber(bits[i] as number, f32Bits(expected[i] as number)));
      expect(wrong.slice(0, 5).map((i) => [codes[i], expected[i], f32FromBits(bits[i] as number)])).toEqual([]);
    });

    test("encodes ties, their neighbours, special and random values as TypeScript does", async () => {
      const samples = encodeSamples(codec);
      const encode = encoder(codec);
      const codes = await apply("encode", name, samples);
      const expected = Uint32Array.from(samples, (bits) => encode(withinTable(codec, f32FromBits(bits))));
      const wrong = [...samples.keys()].filter((i) => !sameCode(codec, codes[i] as number, expected[i] as number));
      expect(wrong.slice(0, 5).map((i) => [f32FromBits(samples[i] as number), expected[i], codes[i]])).toEqual([]);
    });
  });
});
