/**
 * WebGPU in Node: Dawn from the npm package `webgpu`, on the system's GPU or on SwiftShader. Loaded only where
 * `navigator.gpu` is missing.
 *
 * Measured with webgpu 0.6.2: each `create()` loads Vulkan anew, so trying the system first and SwiftShader later works
 * in one process, and the Vulkan variables matter only until an instance has listed its adapters. A Dawn instance that
 * is garbage collected while something is pending on it crashes the process: instances here live as long as the process.
 */

import { constants as fsConstants, readdirSync } from "node:fs";
import { access, chmod, mkdir, mkdtemp, readdir, readFile, rename, rm, stat, writeFile } from "node:fs/promises";
import { createRequire } from "node:module";
import { constants, homedir, tmpdir } from "node:os";
import { delimiter, dirname, join } from "node:path";
import { promisify } from "node:util";
import { brotliDecompress } from "node:zlib";
import { FewbitError } from "../../core/errors.js";
import type { GpuSource } from "./adapter.js";

const DAWN_FLAGS = [
  // fewbit's shaders never read workgroup memory that they have not written, and zeroing it makes SwiftShader's compiler
  // ten times slower (1.0 s instead of 0.1 s for a tiled matrix product).
  "enable-dawn-features=allow_unsafe_apis,vulkan_enable_f16_on_nvidia,disable_workgroup_init",
  "disable-dawn-features=timestamp_quantization",
];

/** The variables through which Vulkan's loader is told its drivers. */
const DRIVER_VARIABLES = ["VK_DRIVER_FILES", "VK_ICD_FILENAMES", "VK_ADD_DRIVER_FILES"] as const;
type DriverVariables = Partial<Record<(typeof DRIVER_VARIABLES)[number], string>>;

const LOADER = "libvulkan.so.1";
const ICD = "vk_swiftshader_icd.json";
const SWIFTSHADER_FILES: readonly string[] = ["libvk_swiftshader.so", LOADER, ICD];

/** dlopen's flag that keeps a library loaded when its handle is closed (Linux). */
const RTLD_NODELETE = 0x1000;

const sources = new Map<string, Promise<GpuSource>>();
let turn: Promise<unknown> = Promise.resolve();

/** Dawn on the machine's own drivers: Vulkan on Linux, Metal on macOS, D3D12 on Windows. */
export function systemGpu(): Promise<GpuSource> {
  return once("system", async () => {
    if (process.platform !== "linux") return openDawn("the system's GPU drivers");
    const set = DRIVER_VARIABLES.filter((name) => process.env[name]);
    const label = set.length > 0 ? `the Vulkan driver in ${set.join(", ")}` : "the system's Vulkan driver";
    if (set.length === 0 && !hasInstalledDriver()) return { label, gpu: null, reason: "no driver is installed" };
    if (!loadLibrary(LOADER)) {
      // The driver is here and only its loader is missing: SwiftShader's package has one.
      const bundled = await provisionSwiftShader().catch(() => null);
      if (!bundled || !loadLibrary(bundled.loader)) return { label, gpu: null, reason: `${LOADER} is not installed` };
    }
    return openDawn(label);
  });
}

/** Dawn on SwiftShader, a Vulkan driver that runs on the CPU. */
export function swiftShaderGpu(): Promise<GpuSource> {
  return once("swiftshader", async () => {
    const label = "SwiftShader";
    let files: SwiftShader;
    try {
      files = await provisionSwiftShader();
    } catch (error) {
      if (error instanceof FewbitError && error.code === "device/unavailable")
        return { label, gpu: null, reason: (error as FewbitError<"device/unavailable">).context.reason };
      throw error;
    }
    if (!loadLibrary(LOADER) && !loadLibrary(files.loader))
      return { label, gpu: null, reason: `${files.loader} cannot be loaded` };
    return openDawn(`npm ${files.package}`, { VK_DRIVER_FILES: files.icd, VK_ICD_FILENAMES: files.icd });
  });
}

/** Each source is opened once, one at a time (they share the environment); a failure is not remembered. */
function once(key: string, open: () => Promise<GpuSource>): Promise<GpuSource> {
  let source = sources.get(key);
  if (!source) {
    source = turn.then(open);
    turn = source.catch(() => undefined);
    source.catch(() => sources.delete(key));
    sources.set(key, source);
  }
  return source;
}

async function openDawn(label: string, drivers?: DriverVariables): Promise<GpuSource> {
  let create: typeof import("webgpu").create;
  try {
    ({ create } = await import("webgpu"));
  } catch (cause) {
    return { label, gpu: null, reason: `Dawn cannot be loaded: ${(cause as Error).message}` };
  }
  const saved = DRIVER_VARIABLES.map((name) => [name, process.env[name]] as const);
  try {
    if (drivers) for (const name of DRIVER_VARIABLES) setVariable(name, drivers[name]);
    const gpu = create(DAWN_FLAGS);
    await gpu.requestAdapter(); // makes Dawn read the variables now
    return { label, gpu };
  } finally {
    for (const [name, value] of saved) setVariable(name, value);
  }
}

function setVariable(name: string, value: string | undefined): void {
  if (value === undefined) delete process.env[name];
  else process.env[name] = value;
}

/** Whether any Vulkan driver file lies where the loader looks; asking Dawn instead would print warnings. */
function hasInstalledDriver(): boolean {
  const { env } = process;
  const folders = [
    env.XDG_CONFIG_HOME || join(homedir(), ".config"),
    ...(env.XDG_CONFIG_DIRS || "/etc/xdg").split(delimiter),
    "/usr/local/etc",
    "/etc",
    env.XDG_DATA_HOME || join(homedir(), ".local/share"),
    ...(env.XDG_DATA_DIRS || "/usr/local/share:/usr/share").split(delimiter),
  ];
  return folders.some((folder) => {
    try {
      return readdirSync(join(folder, "vulkan/icd.d")).some((name) => name.endsWith(".json"));
    } catch {
      return false;
    }
  });
}

/** Loads a shared library for good, so that Dawn finds it by its name. Node says of one that is no addon that it "did not self-register". */
function loadLibrary(path: string): boolean {
  try {
    process.dlopen({ exports: {} }, path, constants.dlopen.RTLD_NOW | RTLD_NODELETE);
    return true;
  } catch (error) {
    return (error as Error).message.includes("self-register");
  }
}

/** Where SwiftShader's files are. */
export interface SwiftShader {
  /** The npm package and version they are from. */
  readonly package: string;
  readonly folder: string;
  /** Vulkan's loader, for machines that have none. */
  readonly loader: string;
  /** The driver file for `VK_DRIVER_FILES`. */
  readonly icd: string;
}

/**
 * Inflates SwiftShader from the npm package `@sparticuz/chromium` into a private folder, once: later calls only compare
 * sizes. Every file is written elsewhere and renamed into place and the list of sizes comes last, so processes that do
 * this together, and one that is killed in the middle, do no harm.
 * @throws FewbitError `device/unavailable`
 */
export async function provisionSwiftShader(cacheFolder?: string): Promise<SwiftShader> {
  if (process.platform !== "linux" || process.arch !== "x64")
    throw unavailable(`SwiftShader's package is for linux-x64, this is ${process.platform}-${process.arch}`);
  const { archive, version } = await findArchive();
  const folder = await privateFolder(`swiftshader-${version}`, cacheFolder);
  const files = {
    package: `@sparticuz/chromium ${version}`,
    folder,
    loader: join(folder, LOADER),
    icd: join(folder, ICD),
  };
  if (!(await isComplete(folder))) await inflate(archive, folder);
  return files;
}

async function findArchive(): Promise<{ archive: string; version: string }> {
  let entry: string;
  try {
    entry = createRequire(import.meta.url).resolve("@sparticuz/chromium");
  } catch (cause) {
    throw unavailable("the development package @sparticuz/chromium is not installed", cause);
  }
  for (let root = dirname(entry); root !== dirname(root); root = dirname(root)) {
    const manifest = await readFile(join(root, "package.json"), "utf8").catch(() => null);
    if (!manifest) continue;
    const { name, version } = JSON.parse(manifest) as { name?: string; version?: string };
    if (name === "@sparticuz/chromium" && version) return { archive: join(root, "bin", "swiftshader.tar.br"), version };
  }
  throw unavailable("the package @sparticuz/chromium has no package.json");
}

/** The first folder that is, or can be made, ours alone: drivers are loaded from it, so nobody else may write there. */
async function privateFolder(name: string, cacheFolder: string | undefined): Promise<string> {
  const uid = process.getuid?.() ?? 0;
  const candidates = cacheFolder
    ? [cacheFolder]
    : [join(process.env.XDG_CACHE_HOME || join(homedir(), ".cache"), "fewbit"), join(tmpdir(), `fewbit-${uid}`)];
  const reasons: string[] = [];
  for (const parent of candidates) {
    try {
      const folder = join(parent, name);
      await mkdir(folder, { recursive: true, mode: 0o700 });
      for (const path of [parent, folder]) {
        const { uid: owner, mode } = await stat(path);
        if (owner !== uid) throw new Error(`${path} belongs to another user`);
        if (mode & 0o022) await chmod(path, mode & 0o7755);
      }
      await access(folder, fsConstants.W_OK | fsConstants.R_OK);
      return folder;
    } catch (error) {
      reasons.push((error as Error).message);
    }
  }
  throw unavailable(`no folder for SwiftShader can be written: ${reasons.join("; ")}`);
}

const SIZES = "sizes.json";

async function isComplete(folder: string): Promise<boolean> {
  try {
    const sizes = JSON.parse(await readFile(join(folder, SIZES), "utf8")) as Record<string, number>;
    const stats = await Promise.all(SWIFTSHADER_FILES.map((name) => stat(join(folder, name))));
    return SWIFTSHADER_FILES.every((name, i) => stats[i]?.isFile() && stats[i].size === sizes[name]);
  } catch {
    return false;
  }
}

async function inflate(archive: string, folder: string): Promise<void> {
  let tar: Buffer;
  try {
    tar = await promisify(brotliDecompress)(await readFile(archive));
  } catch (cause) {
    throw unavailable(`SwiftShader's archive cannot be read: ${(cause as Error).message}`, cause);
  }
  const entries = readTar(tar);
  const work = await mkdtemp(join(folder, ".inflate-"));
  try {
    const sizes: Record<string, number> = {};
    for (const name of SWIFTSHADER_FILES) {
      const bytes = entries.get(name);
      if (!bytes) throw unavailable(`SwiftShader's archive has no ${name}`);
      sizes[name] = bytes.byteLength;
      await writeFile(join(work, name), bytes, { mode: 0o700 });
    }
    await writeFile(join(work, SIZES), JSON.stringify(sizes));
    for (const name of [...SWIFTSHADER_FILES, SIZES]) await rename(join(work, name), join(folder, name));
  } finally {
    await rm(work, { recursive: true, force: true });
  }
  await removeStale(folder);
}

/** Removes what processes that were killed more than an hour ago left behind. */
async function removeStale(folder: string): Promise<void> {
  for (const name of await readdir(folder)) {
    if (!name.startsWith(".")) continue;
    const path = join(folder, name);
    const { mtimeMs } = await stat(path).catch(() => ({ mtimeMs: Number.POSITIVE_INFINITY }));
    if (mtimeMs < Date.now() - 3_600_000) await rm(path, { recursive: true, force: true });
  }
}

/** The regular files of a tar archive (ustar: 512-byte headers, sizes in octal). */
function readTar(tar: Buffer): Map<string, Buffer> {
  const text = (at: number, length: number) => {
    const field = tar.toString("latin1", at, at + length);
    const end = field.indexOf("\0");
    return end < 0 ? field : field.slice(0, end);
  };
  const files = new Map<string, Buffer>();
  for (let at = 0; at + 512 <= tar.byteLength && tar[at] !== 0; ) {
    const size = Number.parseInt(text(at + 124, 12), 8);
    const start = at + 512;
    if (!(size >= 0) || start + size > tar.byteLength) throw unavailable("SwiftShader's archive is cut or damaged");
    const type = text(at + 156, 1);
    if (type === "" || type === "0") files.set(text(at, 100), tar.subarray(start, start + size));
    at = start + Math.ceil(size / 512) * 512;
  }
  return files;
}

function unavailable(reason: string, cause?: unknown): FewbitError<"device/unavailable"> {
  return new FewbitError("device/unavailable", { backend: "webgpu", reason }, cause === undefined ? {} : { cause });
}
