// Builds the native addon with the compilers that this machine has: `npm run build:native`. Says what it skips and why, and
// fails only when a compiler that is there fails.
import { execFileSync, spawnSync } from "node:child_process";
import { existsSync, statSync } from "node:fs";
import { createRequire } from "node:module";
import { join } from "node:path";
import { fileURLToPath } from "node:url";

const root = fileURLToPath(new URL("..", import.meta.url));
const output = join(root, "native/build/Release/fewbit.node");

/** Machine code for each kind of GPU, and PTX for newer ones. nvcc without one of them leaves it out. */
const ARCHITECTURES = ["80-real", "89-real", "90a-real", "100a-real", "120a-real", "80-virtual"];

const say = (line) => process.stdout.write(`${line}\n`);
const skip = (what, reason) => {
  say(`skipped ${what}: ${reason}`);
  process.exit(0);
};

const fail = (step) => {
  say(`failed cuda: ${step}`);
  process.exit(1);
};

/** What a program prints, or null when it cannot be run. */
function ask(program, ...args) {
  try {
    return execFileSync(program, args, { encoding: "utf8", stdio: ["ignore", "pipe", "ignore"] });
  } catch {
    return null;
  }
}

function findCompiler() {
  const folders = [process.env.CUDA_HOME, process.env.CUDA_PATH, "/usr/local/cuda"].filter(Boolean);
  const candidates = [process.env.CUDACXX, "nvcc", ...folders.map((folder) => join(folder, "bin/nvcc"))].filter(
    Boolean,
  );
  return candidates.find((nvcc) => ask(nvcc, "--version") !== null) ?? null;
}

if (process.argv.length > 2) {
  say(
    "npm run build:native: builds native/build/Release/fewbit.node with the compilers that are here, and says what it skips.",
  );
  say(`FEWBIT_CUDA_ARCHITECTURES  which GPUs, as CMake names them (default: ${ARCHITECTURES.join(";")})`);
  say("CUDACXX, CUDA_HOME         where nvcc is, if it is not on the PATH or in /usr/local/cuda");
  process.exit(process.argv.includes("--help") ? 0 : 1);
}

say("skipped rocm: there are no HIP kernels in this version");
if (process.platform !== "linux" || process.arch !== "x64")
  skip("cuda", `it is built on linux-x64, this is ${process.platform}-${process.arch}`);
const nvcc = findCompiler();
if (nvcc === null) skip("cuda", "no CUDA compiler: nvcc is not on the PATH, in CUDACXX, CUDA_HOME or /usr/local/cuda");
if (ask("cmake", "--version") === null) skip("cuda", "cmake is not installed");
const require = createRequire(import.meta.url);
let cmakeJs;
try {
  cmakeJs = require.resolve("cmake-js/bin/cmake-js");
  require.resolve("node-addon-api/package.json");
} catch {
  skip("cuda", "the development packages cmake-js and node-addon-api are not installed");
}

const release = /release ([\d.]+)/.exec(ask(nvcc, "--version"))?.[1] ?? "unknown";
const known = ask(nvcc, "--list-gpu-code") ?? "";
const asked = process.env.FEWBIT_CUDA_ARCHITECTURES?.split(/[ ,;]+/).filter(Boolean) ?? ARCHITECTURES;
const architectures = asked.filter(
  (name) => name.endsWith("-virtual") || known.includes(`sm_${Number.parseInt(name, 10)}\n`),
);
for (const name of asked)
  if (!architectures.includes(name)) say(`skipped cuda ${name}: nvcc ${release} does not know it`);
if (architectures.length === 0) skip("cuda", "nothing is left to build");
say(`building cuda with nvcc ${release} for ${architectures.join(" ")}`);

const options = ["-d", "native", "-O", "native/build", `--CDCMAKE_CUDA_ARCHITECTURES=${architectures.join(";")}`];
// Configured anew every time: `compile` alone would keep the architectures of the last time.
for (const step of ["configure", "build"]) {
  const { status } = spawnSync(process.execPath, [cmakeJs, step, ...options, `--CDCMAKE_CUDA_COMPILER=${nvcc}`], {
    cwd: root,
    stdio: ["ignore", "inherit", "inherit"],
  });
  if (status !== 0) fail(step);
}
if (!existsSync(output)) fail("build");
ask("strip", "--strip-unneeded", output);
// An entry table that registry.cpp names and no file has shows only when the addon is loaded.
const { entries } = require(output);
say(
  `built native/build/Release/fewbit.node, ${(statSync(output).size / 2 ** 20).toFixed(1)} MiB with ${entries.length} entries`,
);
