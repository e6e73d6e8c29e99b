import { execFile } from "node:child_process";
import { mkdtemp, rm, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { fileURLToPath } from "node:url";
import { promisify } from "node:util";
import { expect, test } from "vitest";
import { toBlocked } from "../../src/formats/layouts.js";

const run = promisify(execFile);
const header = fileURLToPath(new URL("../../native/kernels/linear/swizzle.hpp", import.meta.url));

/** Prints the bytes of a swizzled matrix of numbers from 1 on, modulo 251. */
const PROGRAM = /* cpp */ `
#include "${header}"
#include <cstdio>
#include <cstdlib>
#include <vector>

int main(int, char** argv) {
  const int rows = std::atoi(argv[1]), blocks = std::atoi(argv[2]);
  std::vector<int> out(fewbit::linear::swizzledBytes(rows, blocks), 0);
  for (int row = 0; row < rows; row++)
    for (int block = 0; block < blocks; block++) out.at(fewbit::linear::swizzledAt(row, block, blocks)) = (row * blocks + block) % 251 + 1;
  for (int byte : out) std::printf("%d ", byte);
}
`;

const compiler = await run("g++", ["--version"]).then(
  () => "g++",
  () => null,
);

test("a C++ compiler: g++ is there, or its absence is named and this is not CI", () => {
  if (compiler === null) console.warn("absent: g++, so the order of block scales is not compiled by this run");
  expect(compiler !== null || process.env.CI === undefined).toBe(true);
});

test.runIf(compiler !== null)("scales lie where torchao's swizzled checkpoints have them", async () => {
  const folder = await mkdtemp(join(tmpdir(), "fewbit-swizzle-"));
  try {
    await writeFile(join(folder, "main.cpp"), PROGRAM);
    await run(
      "g++",
      ["-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-fsanitize=undefined", "main.cpp", "-o", "main"],
      {
        cwd: folder,
      },
    );
    for (const [rows, blocks] of [
      [128, 4],
      [1, 1],
      [300, 10],
      [129, 130],
    ] as const) {
      const { stdout } = await run(join(folder, "main"), [String(rows), String(blocks)], { maxBuffer: 2 ** 24 });
      const scales = Array.from({ length: rows * blocks }, (_, i) => (i % 251) + 1);
      expect(stdout.trim().split(" ").map(Number)).toEqual([...toBlocked(scales, rows, blocks)]);
    }
  } finally {
    await rm(folder, { recursive: true, force: true });
  }
});
