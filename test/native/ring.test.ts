import { execFile } from "node:child_process";
import { mkdtemp, rm, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { fileURLToPath } from "node:url";
import { promisify } from "node:util";
import { afterAll, beforeAll, describe, expect, test } from "vitest";

const run = promisify(execFile);
const header = fileURLToPath(new URL("../../native/addon/ring.hpp", import.meta.url));

/**
 * A random life of a ring: parts of random sizes are written with their ticket, tickets end in order at random, and a part must hold
 * its ticket until it has ended. Prints how often it had to wait, and the most parts that were taken at once.
 */
const PROGRAM = /* cpp */ `
#include "${header}"
#include <algorithm>
#include <cstdio>
#include <random>
#include <vector>

int main() {
  const size_t size = 1000;
  fewbit::Ring<int> ring(size);
  std::vector<int> memory(size, -1);
  struct Part { int ticket; size_t begin, bytes; };
  std::deque<Part> live;
  std::mt19937 random(5);
  int waits = 0, ticket = 0;
  size_t most = 0;
  const auto end = [&](int done) {
    // Whoever ends must be the oldest, and nothing may have been written over it.
    if (live.empty() || live.front().ticket != done) { std::puts("out of order"); std::exit(1); }
    for (size_t i = 0; i < live.front().bytes; i++)
      if (memory[live.front().begin + i] != done) { std::puts("overwritten"); std::exit(1); }
    live.pop_front();
  };
  for (int step = 0; step < 100000; step++) {
    const size_t bytes = random() % (step % 17 == 0 ? size + 1 : 200);
    const size_t begin = ring.reserve(bytes, [&](int done) { waits++; end(done); });
    if (begin + bytes > size) { std::puts("outside"); return 1; }
    std::fill(memory.begin() + begin, memory.begin() + begin + bytes, ticket);
    ring.commit(ticket);
    live.push_back({ticket++, begin, bytes});
    most = std::max(most, ring.pending());
    const int until = live.front().ticket + random() % 3;
    ring.collect([&](int done) { return done < until ? (end(done), true) : false; });
    if (ring.pending() != live.size()) { std::puts("lost a part"); return 1; }
  }
  std::printf("%d %zu\\n", waits, most);
}
`;

const compiler = await run("g++", ["--version"]).then(
  () => "g++",
  () => null,
);

test("a C++ compiler: g++ is there, or its absence is named and this is not CI", () => {
  if (compiler === null) console.warn("absent: g++, so the addon's ring is not compiled by this run");
  expect(compiler !== null || process.env.CI === undefined).toBe(true);
});

describe.runIf(compiler !== null)("the ring of staging memory", () => {
  let folder: string;
  beforeAll(async () => {
    folder = await mkdtemp(join(tmpdir(), "fewbit-ring-"));
    await writeFile(join(folder, "main.cpp"), PROGRAM);
    await run(
      "g++",
      ["-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-fsanitize=undefined", "main.cpp", "-o", "main"],
      {
        cwd: folder,
      },
    );
  }, 60_000);
  afterAll(() => rm(folder, { recursive: true, force: true }));

  test("never hands out what is still on its way, and lets go oldest first", async () => {
    const { stdout } = await run(join(folder, "main"));
    const [waits, most] = stdout.trim().split(" ").map(Number) as [number, number];
    expect(waits).toBeGreaterThan(1000);
    expect(most).toBeGreaterThan(5);
  });
});
